"""What it takes to prove that two models compute the same: inputs to try, the difference, and how large it may be."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import keras
import numpy as np
import tensorflow as tf

from keras_bn.examples import as_arrays, computing_with, dense, numbers, reason, rows_not_finite
from keras_bn.inference import inference_mode
from keras_bn.model import default_tolerance, input_structure, layers_below
from keras_bn.state import seeds_of, variables_restored
from keras_bn.warning import warn


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


KINDS = ("normal", "pixels", "zeros and ones")
_FREE_SIZE = 64
_CLOSE = 1e-3
# Of all free sizes together: pictures of 512 by 512, or series of 262,144.
_MOST_POSITIONS = 2**18


def random_inputs(structure: Any, kind: str, argument: str, batch: int = 3, seed: int = 0, size: int = 64) -> Any:
    """One batch of random numbers.

    Integers are 0 or 1, but uint8 pixels from 0 to 255.

    Args:
        structure: of things with a shape and a dtype.
        kind: of floating-point numbers: "normal", "pixels" from 0 to 255, or "zeros and ones".
        argument: where a person can give inputs instead.
        batch: how many examples, where the shape leaves it open.
        seed: of the numbers.
        size: what other free sizes become.

    Raises:
        ValueError: for inputs that are strings.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> tf.Tensor:
        first, *others = [*leaf.shape] or [None]
        shape = (first or batch, *(other or size for other in others))
        dtype = tf.as_dtype(leaf.dtype)
        if dtype == tf.string:
            raise ValueError(f"`{argument}` must be given for a model that takes strings. Received: {argument}=None.")
        if not dtype.is_floating or kind == "zeros and ones":
            return tf.cast(rng.integers(0, 256 if dtype == tf.uint8 else 2, shape), dtype)
        return tf.cast(rng.uniform(0, 255, shape) if kind == "pixels" else rng.normal(size=shape), dtype)

    return keras.tree.map_structure(draw, structure)


def accepted_inputs(run: Callable[[Any], Any], structure: Any, argument: str, batch: int = 3) -> list[Any]:
    """Batches of random numbers, those of each kind that `run` takes, with free sizes as large as it needs them.

    Args:
        run: what takes them. It accepts a batch if it raises nothing and all its outputs have values.
        structure, argument, batch: as for `random_inputs`.

    Batches of which all outputs are saturated are left out where there are others; of them nothing is proved, and
    where there are no others, that is warned of.

    Raises:
        ValueError: when it takes none; says why, and what to give.
    """
    leaves = keras.tree.flatten(structure)
    free = max(sum(size is None for size in leaf.shape[1:]) for leaf in leaves)
    sizes = [_FREE_SIZE]
    while free and (2 * sizes[-1]) ** free <= _MOST_POSITIONS:
        sizes.append(2 * sizes[-1])
    kinds = KINDS if any(tf.as_dtype(leaf.dtype).is_floating for leaf in leaves) else KINDS[:1]
    refusals = []
    for size in sizes:
        accepted, telling = [], []
        for kind in kinds:
            inputs = random_inputs(structure, kind, argument, batch, size=size)
            try:
                outputs = keras.tree.flatten(run(inputs))
            except Exception as error:  # Any: a model may raise what it likes.
                refusals.append(f"{type(error).__name__}: {reason(error)}"[:300])
                continue
            if not all(int(tf.size(output)) for output in outputs):
                refusals.append("outputs without values")
                continue
            accepted.append(inputs)
            if not _is_saturated(outputs):
                telling.append(inputs)
        if accepted and not telling:
            warn(
                f"`{argument}` should be given, a batch of what the model takes: of random inputs it makes nothing but "
                "0, 1 and -1, as a softmax, a sigmoid or a ReLU does that is saturated, and that proves little. "
                f"Received: {argument}=None."
            )
        if accepted:
            return telling or accepted
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
    raise ValueError(
        f"`{argument}` must be given, a batch of what the model takes: it takes none of the random ones that were tried"
        f"{f' (free sizes from {sizes[0]} to {sizes[-1]})' if free else ''}. "
        f"Received: {argument}=None, and a model of inputs {shapes} that answered: {refusals[-1]}"
    )


def _is_saturated(outputs: list[Any]) -> bool:
    """Whether all floating outputs are at the ends of a softmax, sigmoid, tanh or ReLU, whatever made them."""
    floating = [np.abs(dense(output).astype("float64")) for output in outputs if output.dtype.is_floating]
    at_ends = all(np.all(np.minimum(values, np.abs(values - 1)) <= _CLOSE) for values in floating)
    # Probabilities of very many classes are all small.
    return bool(floating) and at_ends and all(np.max(values) > 0.5 or not np.any(values) for values in floating)


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


def proof_batches(model: keras.Model, check: Any = None, argument: str = "check") -> list[Any]:
    """`check`, a batch of inputs of `model`, or random ones where that is None.

    Args:
        model: what takes them.
        check: as a person gave them.
        argument: where.

    Raises:
        TypeError: when `check` is no arrays.
        ValueError: when `check` holds no example, or there is none and the model takes no random inputs.
    """
    if check is not None:
        return [as_arrays(argument, check, model)]

    structure = input_structure(model)
    is_free = any(None in list(leaf.shape)[1:] for leaf in keras.tree.flatten(structure))
    refusals: dict[Any, Exception | None] = {}

    def run(inputs: Any) -> Any:
        with variables_restored(model), inference_mode(model):
            # Of fewer values than its kernel has, TensorFlow's convolution returns whatever is in memory.
            shapes = tuple(tuple(leaf.shape) for leaf in keras.tree.flatten(inputs))
            if is_free and shapes not in refusals:
                refusals[shapes] = _refusal(model, inputs)
            refusal = refusals.get(shapes)
            if refusal is not None:
                raise refusal
            return model(inputs, training=False)

    return accepted_inputs(run, structure, argument)


def _refusal(model: keras.Model, inputs: Any) -> Exception | None:
    """What a model has against the sizes of `inputs`, whatever their numbers, as far as tracing tells."""
    specs = keras.tree.map_structure(tf.TensorSpec.from_tensor, inputs)
    call = tf.function(lambda x: model(x, training=False), autograph=False)
    try:
        graph = call.get_concrete_function(specs).graph
    except Exception as error:  # Any: a model may raise what it likes.
        return error
    shapes = " and ".join(str(tuple(leaf.shape)) for leaf in keras.tree.flatten(inputs))
    return ValueError(f"inputs of {shapes} leave a layer no values") if leaves_nothing(graph) else None


def leaves_nothing(graph: tf.Graph) -> bool:
    """Whether some operation of a graph that was traced for fixed sizes computes a tensor without values.

    Constants do not count, nor vectors of integers, which are shapes and axes: those of a scalar have no values.
    """
    computed = (tensor for operation in graph.get_operations() if operation.inputs for tensor in operation.outputs)
    return any(
        tensor.shape.rank
        and 0 in list(tensor.shape)
        and not (tensor.shape.rank == 1 and tensor.dtype in (tf.int32, tf.int64))
        for tensor in computed
    )
