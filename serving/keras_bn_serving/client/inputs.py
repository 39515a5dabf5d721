"""What a person hands over, as arrays of the types that a signature takes: no value is altered."""

from typing import Any

import numpy as np

from keras_bn_serving.codec.data_types import number_of, numpy_type
from keras_bn_serving.errors import InvalidArgumentError


def type_of(info: dict[str, Any]) -> np.dtype | None:
    """Returns NumPy's type for an input as the metadata has it, None where there is none."""
    try:
        return numpy_type(info["dtype"].removeprefix("DT_").lower())
    except KeyError:
        return None


def is_numeric(array: np.ndarray) -> bool:
    """Whether an array holds numbers or truth values: no strings, no objects, no dates."""
    try:
        return array.dtype.kind not in "OSU" and number_of(array.dtype.newbyteorder("=")) > 0
    except KeyError:
        return False


def fitting(name: str, array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Returns numbers as an input's type has them, where that alters none of them beyond rounding.

    Integers become integers of another width, integers and floats floats. Whatever else does not fit stays as it is,
    for the server to refuse.

    Args:
        name: Of the input.
        array: Numbers or truth values.
        dtype: What the input takes; None where that is not known.

    Raises:
        InvalidArgumentError: If a number is out of the type's range.
    """
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if dtype is None or dtype.hasobject or dtype.names or array.dtype == dtype:
        return array
    if array.size == 0:
        return array.astype(dtype)
    if array.dtype.kind in "iu" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise _out_of_range(name, dtype, f"in [{limits.min}, {limits.max}]", array.min(), array.max())
        return array.astype(dtype)
    if dtype.kind in "iub" or not np.can_cast(array.dtype, dtype, "same_kind"):
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
        lost = np.isfinite(array) & ~np.isfinite(result)
    if lost.any():
        values = array[lost]
        raise _out_of_range(name, dtype, "finite in it, or not finite to begin with", values.min(), values.max())
    return result


def _out_of_range(name: str, dtype: np.dtype, allowed: str, low: Any, high: Any) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"Input {name!r} takes {dtype}: its numbers must be {allowed}. Received: numbers from {low} to {high}."
    )
