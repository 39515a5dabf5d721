"""What it takes to prove that two models compute the same: the difference, and how large it may be."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import keras
import numpy as np
import tensorflow as tf

from keras_bn.examples import computing_with, dense, numbers, rows_not_finite
from keras_bn.inference import inference_mode
from keras_bn.model import default_tolerance, layers_below
from keras_bn.state import seeds_of, variables_restored


class Errors(NamedTuple):
    """Largest differences over all outputs; NaN where only one of the two is finite.

    Attributes:
        absolute: largest difference of two values.
        relative: largest difference in an output tensor, divided by the largest magnitude in it.
    """

    absolute: float
    relative: float


_MOST_OF_ITS_OWN = 1e-2


class Tolerance:
    """Largest relative error of what takes the place of a model.

    Where no number is given it is that of `default_tolerance`, or, for a model that rounds more, four times what the
    model itself is from its result in float64, which is measured when it is needed. (Both are off, and folding rounds
    each weight once more: where sums of 512 products cancel 1.0 to 2.9 times were seen.) It is never more than
    1e-2: of a model that rounds more nothing is proved that way.

    Args:
        model: what was there before.
        given: the largest relative error, or None.

    Attributes:
        value: the largest relative error, as far as was asked.
    """

    def __init__(self, model: keras.Model, given: float | None = None):
        self.value = default_tolerance(model) if given is None else given
        self._model = model
        self._left: list[Any] | None = None if given is None else []

    def allows(self, error: float, batches: list[Any]) -> bool:
        """Whether a relative error that was found on `batches` of the model's inputs is small enough.

        Of the batches of the first time that it was too large, only as many are measured as it takes.
        """
        if self._left is None and not error <= self.value:
            self._left = list(batches)
        while self._left and not error <= self.value:
            own = rounding_error(self._model, self._left.pop(0))
            self.value = max(self.value, min(4 * own, _MOST_OF_ITS_OWN))
        return error <= self.value


class _InFloat64(keras.DTypePolicy):
    """Variables stay what they are and are read as float64."""

    @property
    def compute_dtype(self) -> str:
        return "float64"


def largest_errors(expected: Any, got: Any) -> Errors:
    """Compares outputs of the same structure.

    absolute = max(|expected - got|), relative = max over tensors of max(|expected - got|) / max(|expected|)

    Args:
        expected, got: tensors in the same structure; compared in double precision. Strings, which differ by 1, count
            only where there is nothing else: numbers that are close may have other names.
    """
    pairs = list(zip(keras.tree.flatten(expected), keras.tree.flatten(got), strict=True))
    named = [(dense(a), dense(b)) for a, b in pairs if a.dtype == tf.string]
    pairs = [(a, b) for a, b in pairs if a.dtype != tf.string] or [(a == a, a == b) for a, b in named]
    absolute, relative = [0.0], [0.0]
    for a, b in pairs:
        a, b = (v.astype("complex128" if v.dtype.kind == "c" else "float64") for v in (dense(a), dense(b)))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        difference = np.where(same, 0.0, np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b)))
        error = np.max(difference, initial=0.0)
        largest = np.max(np.abs(a[np.isfinite(a)]), initial=0.0)
        absolute.append(float(error))
        relative.append(float(error / largest if largest > 0 else error))
    return Errors(float(np.max(absolute)), float(np.max(relative)))


def rounding_error(model: keras.Model, inputs: Any) -> float:
    """Largest relative error of the model's outputs in inference mode, relative to the same computed in float64.

    Returns:
        The error; 0 where it is not known: a layer is quantized, or cannot compute in float64.
    """
    with variables_restored(model), inference_mode(model):
        rounded = model(inputs, training=False)
        with _computing_in_float64(model) as possible:
            if not possible:
                return 0.0
            try:
                exact = model(inputs, training=False)
            except Exception:  # Any: whatever a layer has against float64, nothing more is allowed then.
                return 0.0
    return largest_errors(exact, rounded).relative


def agree_in_float64(model: keras.Model, other: keras.Model, batches: list[Any], tolerance: float) -> bool:
    """Whether two models that compute the same rounded differently: in float64 they are within the tolerance."""
    for inputs in batches:
        outputs = []
        for one in (model, other):
            with variables_restored(one), inference_mode(one), _computing_in_float64(one) as possible:
                if not possible:
                    return False
                try:
                    outputs.append(one(inputs, training=False))
                except Exception:  # Any: whatever a layer has against float64, nothing is known then.
                    return False
        if not largest_errors(*outputs).relative <= tolerance:
            return False
    return True


@contextlib.contextmanager
def _computing_in_float64(model: keras.Model) -> Iterator[bool]:
    layers = layers_below(model)
    policies = [layer.dtype_policy for layer in layers]
    if any(isinstance(p, keras.dtype_policies.DTypePolicyMap) or p.quantization_mode for p in policies):
        yield False
        return
    try:
        for layer in layers:
            layer.dtype_policy = _InFloat64("float32")
        yield True
    finally:
        for layer, policy in zip(layers, policies, strict=True):
            layer.dtype_policy = policy


def errors_between(
    model: keras.Model, other: keras.Model, batches: list[Any], argument: str = "check"
) -> tuple[Errors, int]:
    """The largest over all batches, both models in inference mode; `other` counts relative to `model`.

    Args:
        model, other: to be compared.
        batches: of inputs.
        argument: where a person gave them, or could.

    Returns:
        The errors, and of how many examples `model` made numbers that are not finite, which prove nothing.

    Raises:
        ValueError: when `model` cannot compute with them, gives nothing finite to compare with, or an example is not
            finite.
    """
    errors, finite, not_finite = [], False, 0
    for inputs in batches:
        # Restored, since recurrent layers may keep a state.
        with variables_restored(model), variables_restored(other), inference_mode(model), inference_mode(other):
            with computing_with(argument, model):
                expected = model(inputs, training=False)
            not_finite += rows_not_finite(argument, inputs, expected)
            errors.append(largest_errors(expected, other(inputs, training=False)))
        finite = finite or any(np.any(np.isfinite(numbers(output))) for output in keras.tree.flatten(expected))
    if not finite:
        raise ValueError(
            f"`{argument}` must be inputs for which the model gives finite numbers; of others nothing can be proved. "
            "Received: outputs of NaN and infinities only."
        )
    return Errors(*np.max(errors, axis=0).tolist()), not_finite


def check_repeats(model: keras.Model, batches: list[Any]) -> None:
    """Refuses a model that draws random numbers in inference mode, as no other can compute what it does.

    Raises:
        ValueError: when it advances a seed, or answers a batch differently when it is asked again.
    """
    seeds = seeds_of(model)
    for inputs in batches:
        answers, before = [], [seed.numpy() for seed in seeds]
        for _ in range(2):
            # Restored each time, as recurrent layers may keep a state.
            with variables_restored(model), inference_mode(model):
                answers.append(model(inputs, training=False))
                advanced = [seed for seed, state in zip(seeds, before, strict=True) if np.any(seed.numpy() != state)]
        if advanced:
            refuse_random(model, f"calls of it advance {advanced[0].path!r}")
        error = largest_errors(*answers).relative
        if not error <= default_tolerance(model):
            refuse_random(model, f"two answers to the same inputs differ by {error:.3g} relative")


def refuse_random(model: keras.Model, what: str) -> NoReturn:
    """Says that a model draws random numbers in inference mode, and by what it is known."""
    raise ValueError(
        "`model` must compute the same each time it is called in inference mode. A layer of it draws random numbers "
        f"there; let it do so only where `training` is true. Received: model={model.name!r}; {what}."
    )
