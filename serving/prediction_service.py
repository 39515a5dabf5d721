"""What a server of models answers, whatever protocol asks: predict, classify, regress, metadata, status."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import numpy as np
from tensorflow_serving.apis import input_pb2

from serving import examples
from serving.batching import Batcher, Outputs
from serving.errors import InvalidArgumentError, ServingError
from serving.model_repository import Lease, ModelRepository, State
from serving.servable import DEFAULT_SIGNATURE
from serving.tensor_spec import TensorSpec

_T = TypeVar("_T")


class ModelSpec(NamedTuple):
    """Which model a request is about.

    Attributes:
        name: The model's name.
        version: One of its versions; the newest where this and `label` are `None`.
        label: The name of a version.
    """

    name: str
    version: int | None = None
    label: str | None = None


class PredictionService:
    """Answers requests with the models of a repository.

    Every method that takes a lease and returns a future releases the lease once the future is done; if it raises, the
    lease stays the caller's.

    Args:
        repository: The models.
        batcher: What runs them.
    """

    def __init__(self, repository: ModelRepository, batcher: Batcher):
        self.repository = repository
        self._batcher = batcher

    def lease(self, spec: ModelSpec) -> Lease:
        """Takes the version that a request is about into use.

        Raises:
            NotFoundError: If it is not loaded.
            InvalidArgumentError: If the label is unknown.
        """
        return self.repository.lease(spec.name, spec.version, spec.label)

    def input_specs(self, lease: Lease, signature_name: str) -> Mapping[str, TensorSpec]:
        """Returns what a signature takes, for a protocol whose requests leave the types open.

        Raises:
            InvalidArgumentError: If there is no such signature, or it takes nothing.
        """
        key = signature_name or DEFAULT_SIGNATURE
        signatures = lease.servable.signatures
        if key not in signatures:
            raise InvalidArgumentError(f'Serving signature name: "{key}" not found in signature def')
        if not signatures[key].inputs:
            raise InvalidArgumentError(f"Failed to get input map for signature: {signature_name or 'DEFAULT'}")
        return signatures[key].inputs

    def predict(
        self,
        lease: Lease,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        output_names: Iterable[str] = (),
        start: Callable[[Callable[[], None]], object] | None = None,
    ) -> "Future[Outputs]":
        """Runs a signature on arrays, in the background.

        Args:
            lease: The version.
            signature_name: Which signature; empty for `serving_default`.
            inputs: The arrays by input name.
            output_names: Which outputs are wanted; all where empty.
            start: Calls what it is given a little later, once the requests that came with this one are there too.

        Raises:
            FailedPreconditionError: If there is no such signature.
            InvalidArgumentError: If the inputs do not fit.
            UnavailableError: If too much is waiting already.
        """
        signature = lease.servable.signature(signature_name)
        future = self._batcher.submit(lease.servable, signature, inputs, output_names, start)
        # The model must stay loaded while it runs, even where nobody waits for the answer any longer.
        future.add_done_callback(lambda _: lease.release())
        return future

    def classify(self, lease: Lease, signature_name: str, message: input_pb2.Input) -> "Future[examples.Classes]":
        """Classifies examples, in the background.

        Raises:
            ServingError: If the signature cannot classify, or there is no example.
        """
        signature = examples.find_signature(lease.servable, signature_name)
        examples.check_classify(signature)
        inputs = examples.serialize(message)
        count = len(inputs["inputs"])
        return _mapped(
            self.predict(lease, signature.name, inputs), lambda outputs: examples.read_classes(outputs, count)
        )

    def regress(self, lease: Lease, signature_name: str, message: input_pb2.Input) -> "Future[np.ndarray]":
        """Regresses examples, in the background.

        Raises:
            ServingError: If the signature cannot regress, or there is no example.
        """
        signature = examples.find_signature(lease.servable, signature_name)
        examples.check_regress(signature)
        inputs = examples.serialize(message)
        count = len(inputs["inputs"])
        return _mapped(
            self.predict(lease, signature.name, inputs), lambda outputs: examples.read_numbers(outputs, count)
        )

    def status(self, spec: ModelSpec) -> list[tuple[int, State, ServingError | None]]:
        """Returns the versions of a model with their states, newest first.

        Raises:
            NotFoundError: If there are none.
        """
        return self.repository.status(spec.name, spec.version)


def _mapped(future: "Future[Outputs]", read: Callable[[Outputs], _T]) -> "Future[_T]":
    """Returns a future of what `read` makes of another's result; cancelling it cancels the other."""
    result: Future[_T] = Future()

    def done(finished: "Future[Outputs]") -> None:
        if not result.set_running_or_notify_cancel():
            return
        try:
            result.set_result(read(finished.result()))
        except BaseException as error:
            result.set_exception(error)

    future.add_done_callback(done)
    result.add_done_callback(lambda outer: outer.cancelled() and future.cancel())
    return result
