"""What a server of models answers, whatever protocol asks: predict, classify, regress, metadata, status."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from tensorflow_serving.apis import input_pb2

from keras_bn_serving.codec.tensor_spec import TensorSpec
from keras_bn_serving.engine import examples
from keras_bn_serving.engine.batching import Batcher, Finish, Outputs, Task
from keras_bn_serving.engine.repository import Lease, ModelRepository
from keras_bn_serving.engine.servable import DEFAULT_SIGNATURE
from keras_bn_serving.engine.versions import State
from keras_bn_serving.errors import InvalidArgumentError, ServingError


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

    Every method that takes a lease and tells the end to `finish` releases the lease before; if it raises, it tells
    nothing and the lease stays the caller's.

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
        finish: Finish,
        output_names: Iterable[str] = (),
        start: Callable[[Callable[[], None]], object] | None = None,
        limited: bool = False,
    ) -> Task:
        """Runs a signature on arrays, in the background.

        Args:
            lease: The version.
            signature_name: Which signature; empty for `serving_default`.
            inputs: The arrays by input name.
            finish: Told the outputs by name, or the error, on another thread.
            output_names: Which outputs are wanted; all where empty.
            start: Calls what it is given a little later, once the requests that came with this one are there too.
            limited: Whether it may run no longer than the time limit.

        Raises:
            FailedPreconditionError: If there is no such signature.
            InvalidArgumentError: If the inputs do not fit.
            UnavailableError: If too much is waiting already.
        """
        signature = lease.servable.signature(signature_name)

        # The model must stay loaded while it runs, even where nobody waits for the answer any longer.
        def done(outcome: Outputs | BaseException) -> None:
            lease.release()
            finish(outcome)

        return self._batcher.submit(lease.servable, signature, inputs, done, output_names, start, limited)

    def classify(
        self,
        lease: Lease,
        signature_name: str,
        message: input_pb2.Input,
        finish: Callable[[examples.Classes | BaseException], None],
        limited: bool = False,
    ) -> Task:
        """Classifies examples, in the background.

        Raises:
            ServingError: If the signature cannot classify, or there is no example.
        """
        signature = examples.find_signature(lease.servable, signature_name)
        examples.check_classify(lease.servable.meta_graph.signature_def[signature.name])
        inputs = examples.serialize(message)
        count = len(inputs["inputs"])
        read = _reading(finish, lambda outputs: examples.read_classes(outputs, count))
        return self.predict(lease, signature.name, inputs, read, limited=limited)

    def regress(
        self,
        lease: Lease,
        signature_name: str,
        message: input_pb2.Input,
        finish: Callable[[np.ndarray | BaseException], None],
        limited: bool = False,
    ) -> Task:
        """Regresses examples, in the background.

        Raises:
            ServingError: If the signature cannot regress, or there is no example.
        """
        signature = examples.find_signature(lease.servable, signature_name)
        examples.check_regress(lease.servable.meta_graph.signature_def[signature.name])
        inputs = examples.serialize(message)
        count = len(inputs["inputs"])
        read = _reading(finish, lambda outputs: examples.read_numbers(outputs, count))
        return self.predict(lease, signature.name, inputs, read, limited=limited)

    def status(self, spec: ModelSpec) -> list[tuple[int, State, ServingError | None]]:
        """Returns the versions of a model with their states, newest first.

        Raises:
            NotFoundError: If there are none.
        """
        return self.repository.status(spec.name, spec.version)


def _reading(finish: Callable[[Any], None], read: Callable[[Outputs], Any]) -> Finish:
    """Returns what brings `finish` what `read` makes of the outputs, or the error."""

    def done(outcome: Outputs | BaseException) -> None:
        if not isinstance(outcome, BaseException):
            try:
                outcome = read(outcome)
            except Exception as error:
                outcome = error
        finish(outcome)

    return done
