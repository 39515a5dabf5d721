"""The client for asyncio."""

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from keras_bn_serving.client.connection import Connection
from keras_bn_serving.client.rest import AsyncRestTransport
from keras_bn_serving.client.types import Classes, ModelVersion, Prediction, deadline_after, target_of, time_left
from keras_bn_serving.client.waiting import POLL_SECONDS, Wait
from keras_bn_serving.errors import ServingError


class AsyncClient(Connection):
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

    async def predict(
        self,
        model_name: str,
        inputs: Any,
        *,
        version: int | None = None,
        label: str | None = None,
        signature_name: str = "",
        timeout: float | None = None,
    ) -> Prediction:
        """As `Client.predict`."""
        return await self._run(
            self._operations.predict(target_of(model_name, version, label), inputs, signature_name), timeout
        )

    async def drift(
        self,
        model_name: str,
        inputs: Any,
        *,
        batch_size: int = 32,
        version: int | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> list[dict[str, Any]]:
        """As `Client.drift`."""
        return await self._run(self._drift(target_of(model_name, version, label), inputs, batch_size), timeout)

    async def classify(
        self,
        model_name: str,
        examples: Sequence[Mapping[str, Any]],
        *,
        context: Mapping[str, Any] | None = None,
        version: int | None = None,
        label: str | None = None,
        signature_name: str = "",
        timeout: float | None = None,
    ) -> Classes:
        """As `Client.classify`."""
        target = target_of(model_name, version, label)
        return await self._run(self._operations.classify(target, examples, context, signature_name), timeout)

    async def regress(
        self,
        model_name: str,
        examples: Sequence[Mapping[str, Any]],
        *,
        context: Mapping[str, Any] | None = None,
        version: int | None = None,
        label: str | None = None,
        signature_name: str = "",
        timeout: float | None = None,
    ) -> NDArray[Any]:
        """As `Client.regress`."""
        target = target_of(model_name, version, label)
        return await self._run(self._operations.regress(target, examples, context, signature_name), timeout)

    async def status(
        self, model_name: str, *, version: int | None = None, timeout: float | None = None
    ) -> list[ModelVersion]:
        """As `Client.status`."""
        return await self._run(self._operations.status(target_of(model_name, version)), timeout)

    async def metadata(
        self,
        model_name: str,
        *,
        version: int | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """As `Client.metadata`."""
        return await self._run(self._operations.metadata(target_of(model_name, version, label)), timeout)

    async def wait_until_ready(self, model_name: str, *, version: int | None = None, timeout: float = 60.0) -> None:
        """Returns as soon as a version of the model is available; raises as `Client.wait_until_ready`."""
        wait = Wait(self.url, model_name, timeout)
        while wait.goes_on():
            try:
                versions = await self.status(model_name, version=version, timeout=wait.left(5.0))
            except ServingError as error:
                wait.failed(error)
            else:
                if wait.saw(versions):
                    return
            await asyncio.sleep(wait.left(POLL_SECONDS))
        raise wait.too_long()

    async def close(self) -> None:
        """Closes the connections; the client is of no further use."""
        self._closed = True
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
        if self._closed:
            raise ValueError("The client is closed; make another one.")
        deadline = deadline_after(self._timeout if timeout is None else timeout)
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
                return await self._transport.send(call, time_left(deadline))
            except ServingError as error:
                wait = self._retry.wait(attempt, error, deadline)
            await asyncio.sleep(wait)
