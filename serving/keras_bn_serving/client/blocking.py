"""The client for threads."""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from keras_bn_serving.client.connection import Connection
from keras_bn_serving.client.rest import RestTransport
from keras_bn_serving.client.types import Classes, ModelVersion, Prediction, deadline_after, target_of, time_left
from keras_bn_serving.client.waiting import POLL_SECONDS, Wait
from keras_bn_serving.errors import ServingError


class Client(Connection):
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

    def predict(
        self,
        model_name: str,
        inputs: Any,
        *,
        version: int | None = None,
        label: str | None = None,
        signature_name: str = "",
        timeout: float | None = None,
    ) -> Prediction:
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
        return self._run(
            self._operations.predict(target_of(model_name, version, label), inputs, signature_name), timeout
        )

    def drift(
        self,
        model_name: str,
        inputs: Any,
        *,
        batch_size: int = 32,
        version: int | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> list[dict[str, Any]]:
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
        return self._run(self._drift(target_of(model_name, version, label), inputs, batch_size), timeout)

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
    ) -> Classes:
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
        target = target_of(model_name, version, label)
        return self._run(self._operations.classify(target, examples, context, signature_name), timeout)

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
    ) -> NDArray[Any]:
        """Regresses examples: as `classify`, but returns an array of one number an example."""
        target = target_of(model_name, version, label)
        return self._run(self._operations.regress(target, examples, context, signature_name), timeout)

    def status(
        self, model_name: str, *, version: int | None = None, timeout: float | None = None
    ) -> list[ModelVersion]:
        """Returns the versions of a model, each a `ModelVersion`, newest first.

        Raises:
            ServingError: If the server has no such model or version.
        """
        return self._run(self._operations.status(target_of(model_name, version)), timeout)

    def metadata(
        self,
        model_name: str,
        *,
        version: int | None = None,
        label: str | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Returns the signatures of a model as the server describes them, by name."""
        return self._run(self._operations.metadata(target_of(model_name, version, label)), timeout)

    def wait_until_ready(self, model_name: str, *, version: int | None = None, timeout: float = 60.0) -> None:
        """Returns as soon as a version of the model is available.

        Raises:
            DeadlineExceededError: If that takes longer than `timeout` seconds; says what was seen last.
            ServingError: If loading has failed.
        """
        wait = Wait(self.url, model_name, timeout)
        while wait.goes_on():
            try:
                versions = self.status(model_name, version=version, timeout=wait.left(5.0))
            except ServingError as error:
                wait.failed(error)
            else:
                if wait.saw(versions):
                    return
            time.sleep(wait.left(POLL_SECONDS))
        raise wait.too_long()

    def close(self) -> None:
        """Closes the connections; the client is of no further use."""
        self._closed = True
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
                return self._transport.send(call, time_left(deadline))
            except ServingError as error:
                wait = self._retry.wait(attempt, error, deadline)
            time.sleep(wait)
