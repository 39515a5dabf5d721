"""Asks a model server, this one or TensorFlow Serving, over REST: NumPy in, NumPy out."""

import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from serving import client_rest
from serving.client_rest import Call, ModelVersion, Reply
from serving.errors import Code, DeadlineExceededError, ServingError, UnavailableError

__all__ = ["Client", "ModelVersion", "Retry"]
_T = TypeVar("_T")
_Operation = Iterator[Call]
_AGAIN = (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)


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

    def wait(self, attempt: int) -> float:
        """Returns the seconds to wait after try number `attempt`, the first being 1."""
        longest = min(self.first_wait_seconds * 2 ** (attempt - 1), self.longest_wait_seconds)
        return longest * random.uniform(0.5, 1.0)


class Client:
    """A connection to a server, for use by any number of threads.

    Args:
        url: `http://host:port` or `https://host:port`.
        timeout: Seconds that a call may take in all, tries and waits included.
        retry: When to ask again.

    Example:
        >>> with Client("http://127.0.0.1:8501") as client:
        ...     probabilities = client.predict("fashion_cnn", images)
    """

    def __init__(self, url: str, timeout: float = 60.0, retry: Retry | None = None):
        scheme = urlsplit(url).scheme
        if scheme not in ("http", "https"):
            raise ValueError(f"`url` must begin with http:// or https://. Received: url={url!r}.")
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._retry = retry or Retry()
        self._http = httpx.Client(base_url=self.url, trust_env=False)
        self._types = client_rest.OutputTypes()

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
            timeout: Seconds for this call.

        Returns:
            The array of the only output, or a dictionary of arrays by output name.

        Raises:
            ServingError: With the server's code and message, or if it cannot be reached in time.
        """
        where = client_rest.where(model_name, version, label)
        return self._run(client_rest.predict(self._types, where, inputs, signature_name), timeout)

    def status(
        self, model_name: str, *, version: int | None = None, timeout: float | None = None
    ) -> list[ModelVersion]:
        """Returns the versions of a model with their states, newest first.

        Raises:
            NotFoundError: If the server has no such model or version.
        """
        return self._run(client_rest.status(client_rest.where(model_name, version, None)), timeout)

    def metadata(
        self,
        model_name: str,
        *,
        version: int | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Returns the signatures of a model as the server describes them, by name."""
        return self._run(client_rest.metadata(client_rest.where(model_name, version, label)), timeout)

    def wait_until_ready(self, model_name: str, *, version: int | None = None, timeout: float = 60.0) -> None:
        """Returns as soon as a version of the model is available.

        Raises:
            DeadlineExceededError: If that takes longer than `timeout` seconds; says what was seen last.
            ServingError: If loading has failed.
        """
        deadline = time.monotonic() + timeout
        seen = "the server has not answered yet"
        while (left := deadline - time.monotonic()) > 0:
            try:
                versions = self.status(model_name, version=version, timeout=min(left, 5.0))
            except ServingError as error:
                seen = str(error)
            else:
                if any(each.state == "AVAILABLE" for each in versions):
                    return
                failed = [each for each in versions if each.state == "END" and each.error_code != Code.OK]
                if failed and len(failed) == len(versions):
                    raise ServingError(failed[0].error_message, failed[0].error_code)
                seen = ", ".join(f"version {each.version} is {each.state}" for each in versions)
            time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
        raise DeadlineExceededError(f"{model_name} at {self.url} was not ready within {timeout:g} s: {seen}.")

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, operation: Any, timeout: float | None) -> Any:
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        try:
            call = next(operation)
            while True:
                call = operation.send(self._send(call, deadline))
        except StopIteration as finished:
            return finished.value

    def _send(self, call: Call, deadline: float) -> Reply:
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._send_once(call, deadline)
            except ServingError as error:
                wait = self._retry.wait(attempt)
                if error.code not in _AGAIN or attempt == self._retry.attempts or time.monotonic() + wait > deadline:
                    raise
            time.sleep(wait)

    def _send_once(self, call: Call, deadline: float) -> Reply:
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError(f"{call.method} {self.url}{call.path}: no time is left.")
        try:
            response = self._http.request(call.method, call.path, content=call.body, timeout=left)
        except httpx.TimeoutException as error:
            raise DeadlineExceededError(f"{call.method} {self.url}{call.path}: no answer in time.") from error
        except httpx.TransportError as error:
            raise UnavailableError(f"{call.method} {self.url}{call.path}: {error}") from error
        return client_rest.check(Reply(response.status_code, response.content))


if __name__ == "__main__":
    from serving.client_command import main

    sys.exit(main())
