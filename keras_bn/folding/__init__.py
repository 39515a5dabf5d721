"""fold(): normalizations absorbed into the weights of their neighbours, and proved to compute the same."""

from typing import Any, NamedTuple

import keras

from keras_bn import arguments
from keras_bn.folding.folder import Folder
from keras_bn.folding.graph import Graph
from keras_bn.folding.proof import Tolerance, check_repeats, errors_between
from keras_bn.folding.report import FoldedNormalization, FoldingReport
from keras_bn.folding.trials import proof_batches
from keras_bn.model import check_finite, check_model, named_batch_norms

__all__ = ["Folded", "FoldedNormalization", "FoldingReport", "fold"]


class Folded(NamedTuple):
    """What `fold` gives: `folded.model` and `folded.report`, or `model, report = fold(...)`.

    Attributes:
        model: the new one.
        report: what became of each normalization, and the proof; prints as a table.
    """

    model: keras.Model
    report: FoldingReport


def fold(model: keras.Model, check: Any = None, tolerance: float | None = None) -> Folded:
    """A new model that computes in inference what `model` does, its batch normalizations absorbed by other weights.

    scale = gamma / sqrt(moving_variance + epsilon), shift = beta - moving_mean * scale

    and then, computed in float64 and cast last,

    scale * (kernel * x + bias) + shift = (scale * kernel) * x + (scale * bias + shift)

    into the Dense, (depthwise, separable, transposed) convolution or multiply-add before it, or else

    kernel * (scale * x + shift) + bias = (kernel * scale) * x + (kernel * shift + bias)

    into all the Dense and convolutions after it, where they do not pad with zeros. Biases are made where there are
    none, shared layers are folded if all their uses allow it, nested models are laid out flat, and layers that do
    nothing in inference (dropout, noise) are left out. What nobody can absorb stays as one multiply-add, a `Rescaling`,
    or where its mean is so many standard deviations from zero that digits would be lost, as a subtraction and that.
    A subclass of a normalization may compute something else and stays as it is. The new model holds Keras's own layers,
    is for inference only, and is proved: both models run on `check`, or on random inputs where it is not given.
    The proof runs `model` in inference mode; until it is through, do not use the model in another thread.

    Args:
        model: functional or sequential, built. It is left as it is; nothing is shared with it but layers that cannot
            be made from their configuration, which the report names, and layers without weights.
        check: inputs, as `model` takes them, to prove the new model on, the larger and the more real the better, all
            finite; of how many the model makes numbers that are not, the report says. Has to be given where random
            numbers are not fit for the model: strings, sizes that are free and must be large.
        tolerance: largest relative error allowed; None for 1e-4, or 2e-2 where a layer computes in half precision, or
            four times what `model` itself is from its result in float64, if that is more, up to 1e-2.

    Returns:
        A `Folded`: the new `model` and the `report`.

    Raises:
        TypeError: when `model` is no Keras model, or another argument of the wrong type.
        ValueError: when `model` is subclassed or not built, has weights that are not finite, takes no random inputs,
            or cannot compute with `check`; when an example of that is not finite; or when the new model is not within
            the tolerance.

    Reference: Jacob et al. 2018 (arXiv 1712.05877), section 3.2.
    """
    return fold_proved_on(model, check, "check", tolerance)


def fold_proved_on(model: keras.Model, check: Any, argument: str, tolerance: float | None) -> Folded:
    """`fold`, which calls `check` what the person calls it who gave it, or could."""
    check_model(model)
    tolerance = arguments.optional_number("tolerance", tolerance, 0.0)
    graph = Graph(model)
    check_finite(model)
    folder = Folder(graph, named_batch_norms(model))
    folder.fold_all()
    new, shared = folder.new_model()
    batches, allowed = proof_batches(model, check, argument), Tolerance(model, tolerance)
    errors, not_finite = errors_between(model, new, batches, argument)
    if not allowed.allows(errors.relative, batches):
        check_repeats(model, batches)
        random = f" It was tried on random inputs; give real ones, as `{argument}`." if check is None else ""
        export = " `fold=False` exports the normalizations as they are." if argument == "warmup" else ""
        raise ValueError(
            "`tolerance` must be above the error of the folded model, or the model is not fit to be folded."
            f"{random}{export} "
            f"Received: tolerance={allowed.value:g}, relative error {errors.relative:.3g}, "
            f"absolute error {errors.absolute:.3g}."
        )
    return Folded(new, FoldingReport(folder.outcomes(), *errors, allowed.value, shared, not_finite))
