"""What a server of models answers, whatever protocol asks: predict, metadata, status."""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from serving.errors import InvalidArgumentError, ServingError
from serving.model_repository import Lease, ModelRepository, State
from serving.servable import DEFAULT_SIGNATURE, Signature
from serving.tensor_spec import TensorSpec

Outputs = dict[str, np.ndarray]


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

    Args:
        repository: The models.
        num_threads: How many requests to run at a time.
    """

    def __init__(self, repository: ModelRepository, num_threads: int = 4):
        self.repository = repository
        self._runners = ThreadPoolExecutor(num_threads, thread_name_prefix="run")

    def lease(self, spec: ModelSpec) -> Lease:
        """Takes the version that a request is about into use; the caller releases it.

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
    ) -> "Future[Outputs]":
        """Runs a signature on arrays, in the background.

        Args:
            lease: The version; released here once the future is done, by the caller if this raises.
            signature_name: Which signature; empty for `serving_default`.
            inputs: The arrays by input name.
            output_names: Which outputs are wanted; all where empty.

        Returns:
            A future of the outputs by name, or of the ServingError.

        Raises:
            FailedPreconditionError: If there is no such signature.
        """
        signature = lease.servable.signature(signature_name)
        future = self._runners.submit(lease.servable.run, signature, inputs, tuple(output_names))
        # The model must stay loaded while it runs, even where nobody waits for the answer any longer.
        future.add_done_callback(lambda _: lease.release())
        return future

    def signature(self, lease: Lease, signature_name: str) -> Signature:
        """Returns a signature by name; an empty name stands for `serving_default`."""
        return lease.servable.signature(signature_name)

    def status(self, spec: ModelSpec) -> list[tuple[int, State, ServingError | None]]:
        """Returns the versions of a model with their states, newest first.

        Raises:
            NotFoundError: If there are none.
        """
        return self.repository.status(spec.name, spec.version)

    def close(self) -> None:
        """Finishes what is under way."""
        self._runners.shutdown()
