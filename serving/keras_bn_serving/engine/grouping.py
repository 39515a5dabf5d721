"""Several requests as one run: their rows put together, and the outputs cut apart again."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from keras_bn_serving.engine.machine import usable_cores
from keras_bn_serving.engine.servable import Servable
from keras_bn_serving.engine.signatures import Signature
from keras_bn_serving.errors import FailedPreconditionError, InvalidArgumentError

Inputs = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]
_MOST_PADDED_AXES = 6


@dataclass(frozen=True)
class BatchingOptions:
    """How requests are grouped.

    Attributes:
        max_batch_size: How many rows a group may have; a larger request runs alone, or is refused if `strict`.
        batch_timeout_seconds: How long a request may wait for others to join it.
        max_enqueued_batches: How many full groups may wait; what comes then is turned away.
        num_batch_threads: How many groups run at a time; as many as there are cores unless told otherwise.
        max_execution_batch_size: How many rows a run may have: a larger request, up to `max_batch_size`, runs in parts.
            The same as `max_batch_size` where it is 0.
        allowed_batch_sizes: Where set, runs are filled up to the next of these sizes.
        pad_variable_length_inputs: Whether requests of different lengths are filled up, each array with its first
            value, to be grouped.
        strict: Whether to do as TensorFlow Serving does with batching on: take every signature to be one of batches
            whose rows are independent, and refuse what is not.
    """

    max_batch_size: int = 64
    batch_timeout_seconds: float = 0.0
    max_enqueued_batches: int = 64
    num_batch_threads: int = field(default_factory=usable_cores)
    max_execution_batch_size: int = 0
    allowed_batch_sizes: tuple[int, ...] = ()
    pad_variable_length_inputs: bool = False
    strict: bool = False

    @property
    def run_size(self) -> int:
        """How many rows a run may have."""
        return self.max_execution_batch_size or self.max_batch_size


def count_rows(inputs: Inputs, options: BatchingOptions) -> int:
    """Returns how many rows a request brings, by TensorFlow Serving's rules and in its words.

    Raises:
        InvalidArgumentError: If its inputs are no batch, or a larger one than a group may be.
    """
    if not inputs:
        raise InvalidArgumentError("Batching Run() must have at least one input tensor")
    rows: int | None = None
    for name in sorted(inputs):
        array = inputs[name]
        if not array.ndim:
            raise InvalidArgumentError("Batching Run() input tensors must have at least one dimension")
        if rows is not None and len(array) != rows:
            raise InvalidArgumentError("Batching Run() input tensors must have equal 0th-dimension size")
        rows = len(array)
    if (rows or 0) > options.max_batch_size:
        raise InvalidArgumentError(f"Task size {rows} is larger than maximum input batch size {options.max_batch_size}")
    return rows or 0


def run_together(
    servable: Servable,
    signature: Signature,
    requests: Sequence[Inputs],
    output_names: Sequence[str],
    options: BatchingOptions,
    limited: bool = False,
) -> list[Outputs]:
    """Runs requests of one signature, each of at least one row, as one; returns the outputs of each.

    Raises:
        ServingError: For all of them, if they cannot be put together, the model fails, or its outputs are no batch.
    """
    counts = [len(next(iter(inputs.values()))) for inputs in requests]
    joined, filling = {}, {}
    for name in sorted(signature.inputs):
        arrays = [inputs[name] for inputs in requests]
        if options.pad_variable_length_inputs:
            arrays = _of_one_size(arrays)
        elif any(array.shape[1:] != arrays[0].shape[1:] for array in arrays):
            raise FailedPreconditionError(
                f"Tensors with name '{signature.tensors['inputs'][name]}' from different tasks have different shapes "
                "and padding is turned off. Set pad_variable_length_inputs to true, or ensure that all tensors with "
                "the same name have equal dimensions starting with the first dim."
            )
        joined[name] = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        filling[name] = arrays[-1][:1]
    parts = [
        _run_part(servable, signature, joined, filling, start, output_names, options, limited)
        for start in range(0, sum(counts), options.run_size)
    ]
    outputs = parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    ends = list(itertools.accumulate(counts, initial=0))
    return [{name: array[start:end] for name, array in outputs.items()} for start, end in itertools.pairwise(ends)]


def _run_part(
    servable: Servable,
    signature: Signature,
    inputs: Inputs,
    filling: Inputs,
    start: int,
    output_names: Sequence[str],
    options: BatchingOptions,
    limited: bool,
) -> Outputs:
    taken = {name: array[start : start + options.run_size] for name, array in inputs.items()}
    rows = len(next(iter(taken.values())))
    padding = next((size for size in options.allowed_batch_sizes if size >= rows), rows) - rows
    if padding:
        taken = {name: np.concatenate([array, *[filling[name]] * padding]) for name, array in taken.items()}
    outputs = servable.run(signature, taken, output_names, limited)
    for name in sorted(outputs, key=signature.tensors["outputs"].__getitem__):
        if not outputs[name].ndim:
            raise FailedPreconditionError("Batched output tensor has 0 dimensions")
        if len(outputs[name]) != rows + padding:
            raise FailedPreconditionError(
                "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes of the input "
                "tensors"
            )
    return {name: array[:rows] for name, array in outputs.items()}


def run_one(
    servable: Servable,
    signature: Signature,
    inputs: Inputs,
    output_names: Sequence[str],
    options: BatchingOptions | None,
    limited: bool = False,
    unwanted: Callable[[], bool] = lambda: False,
) -> Outputs:
    """Runs one request as a group of its own where TensorFlow Serving would, else as it is.

    Raises:
        ServingError: As `count_rows` and `run_together`.
    """
    # TensorFlow Serving never answers a batch without rows. Nobody can want that.
    if options is None or not options.strict or not count_rows(inputs, options):
        return servable.run(signature, inputs, output_names, limited, unwanted)
    return run_together(servable, signature, [inputs], output_names, options, limited)[0]


def _of_one_size(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    if arrays[0].ndim > _MOST_PADDED_AXES:
        raise InvalidArgumentError("Only tensors with rank from 1 to 6 can be padded.")
    longest = np.max([array.shape[1:] for array in arrays], axis=0) if arrays[0].ndim > 1 else ()
    padded = []
    for array in arrays:
        missing = [(0, 0), *((0, int(to - size)) for to, size in zip(longest, array.shape[1:], strict=True))]
        if array.shape[1:] != tuple(longest):
            if not array.size:
                raise InvalidArgumentError("Got empty tensor in batch of non-empty tensors.")
            array = np.pad(array, missing, constant_values=array.flat[0])
        padded.append(array)
    return padded
