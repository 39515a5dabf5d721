"""What the two kinds of client share: where the server is, which protocol it speaks, and what they ask it."""

from typing import Any
from urllib.parse import urlsplit

import httpx

from keras_bn_serving.client import drift
from keras_bn_serving.client.rest import RestProtocol
from keras_bn_serving.client.types import Retry, Target, deadline_after

_SCHEMES = ("http", "https", "grpc", "grpcs")


class Connection:
    """A server, and the operations that it can be asked; a client runs them."""

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retry: Retry | None = None,
        root_certificate: bytes = b"",
        http: httpx.Client | httpx.AsyncClient | None = None,
    ):
        if not isinstance(url, str) or not _is_address(url):
            raise ValueError(f"`url` must be http, https, grpc or grpcs://host:port. Received: url={url!r}.")
        parts = urlsplit(url)
        if http is not None and parts.scheme not in ("http", "https"):
            raise ValueError(f"`http` sends REST requests; with gRPC leave it out. Received: url={url!r}.")
        self.url = url.rstrip("/")
        self._http: Any = http
        deadline_after(timeout)
        self._timeout = timeout
        self._closed = False
        self._retry = retry or Retry()
        self._operations: Any
        if parts.scheme in ("http", "https"):
            self._operations = RestProtocol()
            self._transport = self._rest_transport(self.url)
        else:
            import grpc

            from keras_bn_serving.client import rpc as client_grpc

            secure = grpc.ssl_channel_credentials(root_certificate or None) if parts.scheme == "grpcs" else None
            self._operations = client_grpc.GrpcProtocol()
            self._transport = self._grpc_transport(client_grpc, parts.netloc, secure)

    def _rest_transport(self, url: str) -> Any:
        raise NotImplementedError

    def _grpc_transport(self, module: Any, target: str, credentials: Any) -> Any:
        raise NotImplementedError

    def _drift(self, target: Target, inputs: Any, batch_size: int) -> Any:
        def predict(some: Any) -> Any:
            return self._operations.predict(target, some, drift.SIGNATURE)

        return drift.operation(predict, inputs, batch_size)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        # A port that is no number, or above 65535.
        return False
