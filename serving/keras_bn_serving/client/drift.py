"""How far examples are from those a model was trained on, from what `batch_norm_drift` answers for each of them."""

from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

SIGNATURE = "batch_norm_drift"
_FIGURES = ("count", "mean_shift", "variance_ratio")
Figures = tuple[np.ndarray, np.ndarray, np.ndarray]


def operation(
    predict: Callable[[Any], Generator[Any, Any, Any]], inputs: Any, batch_size: int
) -> Generator[Any, Any, Any]:
    """Asks about `batch_size` examples at a time and pools all of them; see `Client.drift`.

    Args:
        predict: The operation that asks the signature about some of them.
        inputs: As for `Client.predict`.
        batch_size: Examples in a request.

    Raises:
        TypeError: What is given has no examples.
        ValueError: There is no example, or not as many for each input, or one is not finite where it is measured.
    """
    arrays = inputs if isinstance(inputs, Mapping) else {"": inputs}
    if not all(hasattr(array, "__len__") for array in arrays.values()):
        raise TypeError(
            "`inputs` must be arrays or lists of examples, or a dictionary of such by input name. "
            f"Received: {inputs!r} of type {type(inputs).__name__}."
        )
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) != 1 or 0 in lengths or batch_size < 1:
        raise ValueError(
            "`inputs` must have one example at least and as many for each input, `batch_size` must be positive. "
            f"Received: {[len(array) for array in arrays.values()]} examples, batch_size={batch_size}."
        )
    parts, answer = [], {}
    for first in range(0, lengths.pop(), batch_size):
        some = {name: array[first : first + batch_size] for name, array in arrays.items()}
        answer = yield from predict(some if isinstance(inputs, Mapping) else some[""])
        _check_finite(answer, first)
        parts.append(_merged([answer[name] for name in _FIGURES]))
    return pooled({**answer, **dict(zip(_FIGURES, map(np.stack, zip(*parts, strict=True)), strict=True))})


def _check_finite(answer: Mapping[str, np.ndarray], first: int) -> None:
    finite = np.isfinite(answer["mean_shift"]) & np.isfinite(answer["variance_ratio"])
    (broken,) = np.nonzero(~finite.all(axis=1))
    if broken.size:
        raise ValueError(
            f"`inputs` must be finite. Received: example {first + broken[0]} (counted from 0) with non-finite values "
            "at the input of a normalization."
        )


def pooled(answer: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The distance of all rows together from the population, for each normalization.

    Per channel, with the sums over rows (Chan's formula in units of the population's standard deviation):

    mean_shift = sum(count_i mean_shift_i) / sum(count_i)
    variance_ratio = sum(count_i (variance_ratio_i + (mean_shift_i - mean_shift)**2)) / sum(count_i)
    kl = (variance_ratio + mean_shift**2 - 1 - log(variance_ratio)) / 2

    Args:
        answer: Of the signature `batch_norm_drift`: `layer` and `channels` of shape `(rows, layers)`; `count`,
            `mean_shift` and `variance_ratio` of shape `(rows, channels of all layers)`.

    Returns:
        For each layer its name, `layer`, and three numbers: the root mean square of `mean_shift`, the
        `variance_ratio` farthest from 1, and the mean of `kl`; NaN where all is masked.
    """
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in answer["layer"][0]]
    count, shift, ratio = _merged([answer[name] for name in _FIGURES])
    shift, ratio = (np.where(count > 0, value, np.nan) for value in (shift, ratio))
    kl = (ratio + shift**2 - 1 - np.log(ratio)) / 2
    ends = np.cumsum(answer["channels"][0])[:-1]
    return [
        {
            "layer": name,
            "mean_shift": float(np.sqrt(np.mean(shift**2))),
            "variance_ratio": float(ratio[np.argmax(np.abs(np.log(ratio)))]),
            "kl": float(np.mean(kl)),
        }
        for name, shift, ratio, kl in zip(names, *(np.split(value, ends) for value in (shift, ratio, kl)), strict=True)
    ]


def _merged(figures: list[Any]) -> Figures:
    count, shift, ratio = (np.asarray(value, np.float64) for value in figures)
    total = count.sum(0)
    share = count / np.where(total > 0, total, 1)
    mean = (share * shift).sum(0)
    return total, mean, (share * (ratio + (shift - mean) ** 2)).sum(0)
