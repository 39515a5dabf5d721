"""Moments as a person holds them: checked, in float64, merged and sent through JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np

from keras_bn import statistics
from keras_bn.names import shown
from keras_bn.statistics import merge


class Moments(statistics.Moments):
    """Count, mean and sum of squared deviations from the mean (m2), per channel, of values of weight w.

    variance = m2 / count (biased) or m2 / (count - unit) (unbiased)

    with unit = 1 where the weights are frequencies, so that a value of weight 2 is two values; and
    unit = sum(w**2) / sum(w) where they are reliabilities, whose scale says nothing. Without weights they are the same.
    There are count / unit values: the sum of frequencies, or Kish's effective number sum(w)**2 / sum(w**2).

    All are kept in float64, whatever they are given as. `a + b` are the moments of the values of both, exactly:

    count = sum(count_i), mean = sum(count_i mean_i) / count, m2 = sum(m2_i + count_i (mean_i - mean)**2)

    Args:
        count: `sum(w)`, 0 or more: a number, or of a shape that broadcasts to that of `mean`.
        mean: Shape `(C,)`, or the sizes of the axes of a layer with several.
        m2: `sum(w (x - mean)**2)`, the shape of `mean`, never negative.
        unit: What one value weighs, as `count`.

    Raises:
        TypeError: If one of them is no real numbers.
        ValueError: If one is not finite, is negative and must not be, or the shapes do not fit.

    Reference: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances";
        GNU Scientific Library, "Weighted Samples" (`gsl_stats_wvariance`), for reliabilities; Kish 1965, "Survey
        Sampling", for their effective number.
    """

    __slots__ = ()

    def __new__(cls, count: Any, mean: Any, m2: Any, unit: Any = 1.0) -> Moments:
        mean = _numbers("mean", mean)
        if mean.ndim == 0 or mean.size == 0:
            raise ValueError(
                f"`mean` must have a number for each channel, one at least. Received: mean of shape {mean.shape}."
            )
        m2 = _not_negative("m2", m2)
        if m2.shape != mean.shape:
            raise ValueError(f"`m2` must have the shape of `mean`, {mean.shape}. Received: m2 of shape {m2.shape}.")
        return super().__new__(cls, _fitting("count", count, mean), mean, m2, _fitting("unit", unit, mean))

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Any:  # type: ignore[override]
        return cls(*iterable)  # What `_replace` gives is checked too.

    def __add__(self, other: Any) -> Moments:
        if not isinstance(other, Moments):
            _refuse(other)
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                "Moments must be of as many channels to be merged. "
                f"Received: means of shapes {self.mean.shape} and {other.mean.shape}."
            )
        filled = [statistics.Moments(*(np.broadcast_to(v, part.mean.shape) for v in part)) for part in (self, other)]
        return Moments(*merge(filled))

    def __radd__(self, other: Any) -> NoReturn:
        _refuse(other)

    @property
    def variance(self) -> np.ndarray:
        """m2 / count, the biased variance, float64, of the shape of `mean`; 0 where nothing counts."""
        count = np.broadcast_to(self.count, self.mean.shape)
        return np.divide(self.m2, count, out=np.zeros_like(self.m2), where=count > 0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: lists of numbers by the names of the attributes; `Moments(**lists)` is the same to the last bit."""
        return {name: np.asarray(value).tolist() for name, value in self._asdict().items()}


def _refuse(other: Any) -> NoReturn:
    raise TypeError(
        "Moments can be added to Moments only; `functools.reduce(operator.add, parts)` merges a list. "
        f"Received: {shown(other)} of type {type(other).__name__}."
    )


def _numbers(name: str, value: Any) -> np.ndarray:
    """A copy in float64."""
    problem = f"of type {type(value).__name__}"
    try:
        numbers = np.asarray(value)
        problem = f"of dtype {numbers.dtype}"
    except (TypeError, ValueError, NotImplementedError) as error:  # Ragged lists; tensors without values.
        raise TypeError(_not_numbers(name, value, problem)) from error
    if numbers.dtype.kind not in "iuf":
        raise TypeError(_not_numbers(name, value, problem))
    result = numbers.astype("float64")
    if not np.all(np.isfinite(result)):
        raise ValueError(f"`{name}` must be finite. Received: {name}={shown(value)}.")
    return result


def _not_numbers(name: str, value: Any, problem: str) -> str:
    return f"`{name}` must be real numbers, of one shape. Received: {name}={shown(value)} {problem}."


def _not_negative(name: str, value: Any) -> np.ndarray:
    result = _numbers(name, value)
    if np.any(result < 0):
        raise ValueError(f"`{name}` must not be negative. Received: {name}={shown(value)}.")
    return result


def _fitting(name: str, value: Any, mean: np.ndarray) -> Any:
    """Of a shape that broadcasts to that of `mean`; a number of Python where it is one."""
    result = _not_negative(name, value)
    sizes = (1,) * (mean.ndim - result.ndim) + result.shape
    if result.ndim > mean.ndim or any(a not in (1, b) for a, b in zip(sizes, mean.shape, strict=True)):
        raise ValueError(
            f"`{name}` must be a number, or of a shape that broadcasts to that of `mean`, {mean.shape}. "
            f"Received: {name} of shape {result.shape}."
        )
    return result if result.ndim else float(result)
