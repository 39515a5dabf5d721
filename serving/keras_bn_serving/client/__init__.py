"""Asks a model server, this one or TensorFlow Serving, over REST or gRPC: NumPy in, NumPy out."""

import asyncio
import functools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from keras_bn_serving.client import drift
from keras_bn_serving.client.rest import AsyncRestTransport, RestProtocol, RestTransport
from keras_bn_serving.client.types import ModelVersion, Target
from keras_bn_serving.errors import Code, DeadlineExceededError, ServingError, error_of

__all__ = ["AsyncClient", "Client", "ModelVersion", "Retry"]
_AGAIN = (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
_SCHEMES = ("http", "https", "grpc", "grpcs")
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Retry:
    """When to ask again: only where the server was out of reach or said that it is busy.

    Attributes:
        attempts: How often to ask at most.
        first_wait_seconds: The wait after the first try; it doubles with every further one, and a random part of up
            to half of it is left out.
        longest_wait_seconds: No wait is longer.
    """

    attempts: int = 4
    first_wait_seconds: float = 0.1
    longest_wait_seconds: float = 2.0

    def wait(self, attempt: int, error: ServingError, deadline: float) -> float:
        """Returns the seconds to wait after try number `attempt`, the first being 1.

        Raises:
            ServingError: `error`, where asking again would not help or there is no time left for it.
        """
        longest = min(self.first_wait_seconds * 2 ** (attempt - 1), self.longest_wait_seconds)
        wait = longest * random.uniform(0.5, 1.0)
        if error.code not in _AGAIN or attempt >= self.attempts or time.monotonic() + wait > deadline:
            raise error
        return wait


class _Operations:
    """What the two kinds of client share: the operations, each in terms of `_run`."""

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retry: Retry | None = None,
        root_certificate: bytes = b"",
        http: httpx.Client | httpx.AsyncClient | None = None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in _SCHEMES or not parts.netloc:
            raise ValueError(f"`url` must be http, https, grpc or grpcs://host:port. Received: url={url!r}.")
        if http is not None and parts.scheme not in ("http", "https"):
            raise ValueError(f"`http` sends REST requests; with gRPC leave it out. Received: url={url!r}.")
        self.url = url.rstrip("/")
        self._http: Any = http
        self._timeout = timeout
        self._retry = retry or Retry()
        self._protocol: Any
        if parts.scheme in ("http", "https"):
            self._protocol = RestProtocol()
            self._transport = self._rest_transport(self.url)
        else:
            import grpc

            from keras_bn_serving.client import rpc as client_grpc

            secure = grpc.ssl_channel_credentials(root_certificate or None) if parts.scheme == "grpcs" else None
            self._protocol = client_grpc.GrpcProtocol()
            self._transport = self._grpc_transport(client_grpc, parts.netloc, secure)

    def _rest_transport(self, url: str) -> Any:
        raise NotImplementedError

    def _grpc_transport(self, module: Any, target: str, credentials: Any) -> Any:
        raise NotImplementedError

    def _run(self, operation: Any, timeout: float | None) -> Any:
        raise NotImplementedError

    def predict(
        self,
        model_name: str,
        inputs: Any,
        *,
        version: int | None = None,
        label: str | None = None,
        signature_name: str = "",
        timeout: float | None = None,
    ) -> Any:
        """Runs a signature of a model.

        Args:
            model_name: The model.
            inputs: An array for the only input, or a mapping from input names to arrays. Strings and bytes go as they
                are, in lists or arrays.
            version: Which version; the newest where this and `label` are left out.
            label: A label of a version.
            signature_name: Which signature; `serving_default` where left out.
            timeout: Seconds for this call, tries and waits included.

        Returns:
            The array of the only output, or a dictionary of arrays by output name.

        Raises:
            ServingError: With the server's code and message, of the class that stands for the code: `NotFoundError`,
                `InvalidArgumentError` and so on. `DeadlineExceededError` or `UnavailableError` if the server cannot be
                reached in time.
        """
        return self._run(self._protocol.predict(_target(model_name, version, label), inputs, signature_name), timeout)

    def drift(
        self,
        model_name: str,
        inputs: Any,
        *,
        batch_size: int = 32,
        version: int | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Tells how far examples are from those that a model, exported by `keras_bn.export`, was trained on.

        The signature `batch_norm_drift` answers for each example by itself; all examples are pooled here, exactly.

        Args:
            model_name: The model.
            inputs: As for `predict`, the first axis along the examples.
            batch_size: Examples in a request.
            version: As for `predict`.
            label: As for `predict`.
            timeout: Seconds for all requests.

        Returns:
            For each normalization a dictionary: its name, `layer`; `mean_shift`, in standard deviations;
            `variance_ratio`; and `kl`, the Kullback-Leibler divergence in nats.

        Raises:
            ServingError: As for `predict`; also if the model has no such signature.
            ValueError: If there is no example, or one is not finite where a normalization sees it.
        """
        target = _target(model_name, version, label)

        def predict(some: Any) -> Any:
            return self._protocol.predict(target, some, drift.SIGNATURE)

        return self._run(drift.operation(predict, inputs, batch_size), timeout)

    def classify(
        self,
        model_name: str,
        examples: Sequence[Mapping[str, Any]],
        *,
        context: Mapping[str, Any] | None = None,
        version: int | None = None,
        label: str | None = None,
        signature_name: str = "",
        timeout: float | None = None,
    ) -> Any:
        """Classifies examples.

        Args:
            model_name: The model.
            examples: For each, its features by name: numbers, strings, bytes, or lists of them.
            context: Features that all of them share.
            version: As for `predict`.
            label: As for `predict`.
            signature_name: As for `predict`.
            timeout: As for `predict`.

        Returns:
            For every example a list of labels with scores.

        Raises:
            ServingError: As for `predict`.
        """
        target = _target(model_name, version, label)
        return self._run(self._protocol.classify(target, examples, context, signature_name), timeout)

    def regress(
        self,
        model_name: str,
        examples: Sequence[Mapping[str, Any]],
        *,
        context: Mapping[str, Any] | None = None,
        version: int | None = None,
        label: str | None = None,
        signature_name: str = "",
        timeout: float | None = None,
    ) -> Any:
        """Regresses examples: as `classify`, but returns an array of one number an example."""
        target = _target(model_name, version, label)
        return self._run(self._protocol.regress(target, examples, context, signature_name), timeout)

    def status(self, model_name: str, *, version: int | None = None, timeout: float | None = None) -> Any:
        """Returns the versions of a model, each a `ModelVersion`, newest first.

        Raises:
            ServingError: If the server has no such model or version.
        """
        return self._run(self._protocol.status(Target(model_name, version)), timeout)

    def metadata(
        self,
        model_name: str,
        *,
        version: int | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Returns the signatures of a model as the server describes them, by name."""
        return self._run(self._protocol.metadata(_target(model_name, version, label)), timeout)


class Client(_Operations):
    """A connection to a server, for use by any number of threads.

    Args:
        url: `http`, `https`, `grpc` or `grpcs://host:port`.
        timeout: Seconds that a call may take in all, tries and waits included.
        retry: When to ask again.
        root_certificate: For `grpcs`, where the server's certificate is not signed by one that the system trusts.
        http: An `httpx.Client` that sends REST requests: with headers, a token, a proxy or certificates of one's own.
            Who made it closes it.

    Example:
        >>> with Client("http://127.0.0.1:8501") as client:
        ...     probabilities = client.predict("fashion_cnn", images)
    """

    def wait_until_ready(self, model_name: str, *, version: int | None = None, timeout: float = 60.0) -> None:
        """Returns as soon as a version of the model is available.

        Raises:
            DeadlineExceededError: If that takes longer than `timeout` seconds; says what was seen last.
            ServingError: If loading has failed.
        """
        wait = _Wait(self.url, model_name, timeout)
        while wait.goes_on():
            try:
                versions = self.status(model_name, version=version, timeout=wait.left(5.0))
            except ServingError as error:
                wait.failed(error)
            else:
                if wait.saw(versions):
                    return
            time.sleep(wait.left(_POLL_SECONDS))
        raise wait.too_long()

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _rest_transport(self, url: str) -> Any:
        return RestTransport(url, self._http)

    def _grpc_transport(self, module: Any, target: str, credentials: Any) -> Any:
        return module.GrpcTransport(target, credentials)

    def _run(self, operation: Any, timeout: float | None) -> Any:
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        go_on = functools.partial(operation.send, None)
        while True:
            try:
                call = go_on()
            except StopIteration as finished:
                return finished.value
            try:
                reply = self._send(call, deadline)
            except ServingError as error:
                go_on = functools.partial(operation.throw, error)
            else:
                go_on = functools.partial(operation.send, reply)

    def _send(self, call: Any, deadline: float) -> Any:
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._transport.send(call, _time_left(deadline))
            except ServingError as error:
                wait = self._retry.wait(attempt, error, deadline)
            time.sleep(wait)


class AsyncClient(_Operations):
    """The same for asyncio: every operation is awaited.

    Args:
        url: As for `Client`.
        timeout: As for `Client`.
        retry: As for `Client`.
        root_certificate: As for `Client`.
        http: An `httpx.AsyncClient`, as for `Client`.

    Example:
        >>> async with AsyncClient("grpc://127.0.0.1:8500") as client:
        ...     probabilities = await client.predict("fashion_cnn", images)
    """

    async def wait_until_ready(self, model_name: str, *, version: int | None = None, timeout: float = 60.0) -> None:
        """Returns as soon as a version of the model is available; raises as `Client.wait_until_ready`."""
        wait = _Wait(self.url, model_name, timeout)
        while wait.goes_on():
            try:
                versions = await self.status(model_name, version=version, timeout=wait.left(5.0))
            except ServingError as error:
                wait.failed(error)
            else:
                if wait.saw(versions):
                    return
            await asyncio.sleep(wait.left(_POLL_SECONDS))
        raise wait.too_long()

    async def close(self) -> None:
        """Closes the connections."""
        await self._transport.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def _rest_transport(self, url: str) -> Any:
        return AsyncRestTransport(url, self._http)

    def _grpc_transport(self, module: Any, target: str, credentials: Any) -> Any:
        return module.AsyncGrpcTransport(target, credentials)

    async def _run(self, operation: Any, timeout: float | None) -> Any:
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        go_on = functools.partial(operation.send, None)
        while True:
            try:
                call = go_on()
            except StopIteration as finished:
                return finished.value
            try:
                reply = await self._send(call, deadline)
            except ServingError as error:
                go_on = functools.partial(operation.throw, error)
            else:
                go_on = functools.partial(operation.send, reply)

    async def _send(self, call: Any, deadline: float) -> Any:
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._transport.send(call, _time_left(deadline))
            except ServingError as error:
                wait = self._retry.wait(attempt, error, deadline)
            await asyncio.sleep(wait)


class _Wait:
    """How long to wait for a model, and what was seen of it."""

    def __init__(self, url: str, model_name: str, timeout: float):
        self._place = f"{model_name} at {url}"
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._seen = "the server has not answered yet"

    def goes_on(self) -> bool:
        return time.monotonic() < self._deadline

    def left(self, most: float) -> float:
        return max(0.001, min(most, self._deadline - time.monotonic()))

    def saw(self, versions: list[ModelVersion]) -> bool:
        if any(each.state == "AVAILABLE" for each in versions):
            return True
        failed = [each for each in versions if each.state == "END" and each.error_code is not Code.OK]
        if failed and len(failed) == len(versions):
            raise error_of(failed[0].error_code, failed[0].error_message)
        self._seen = ", ".join(f"version {each.version} is {each.state}" for each in versions)
        return False

    def failed(self, error: ServingError) -> None:
        if error.code not in (*_AGAIN, Code.NOT_FOUND, Code.DEADLINE_EXCEEDED):
            raise error
        self._seen = str(error)

    def too_long(self) -> DeadlineExceededError:
        return DeadlineExceededError(f"{self._place} was not ready within {self._timeout:g} s: {self._seen}.")


def _target(model_name: str, version: int | None, label: str | None) -> Target:
    if version is not None and label is not None:
        raise ValueError(f"Give `version` or `label`, not both. Received: version={version}, label={label!r}.")
    return Target(model_name, version, label)


def _time_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceededError("No time is left.")
    return left
