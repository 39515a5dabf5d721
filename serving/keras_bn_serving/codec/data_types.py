"""TensorFlow's element types: their numbers in messages, and NumPy's types for them; neither needs TensorFlow."""

import functools

import ml_dtypes
import numpy as np

# By their names without the `DT_`.
NUMBERS = {
    **{"float": 1, "double": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "string": 7, "complex64": 8},
    **{"int64": 9, "bool": 10, "qint8": 11, "quint8": 12, "qint32": 13, "bfloat16": 14, "qint16": 15, "quint16": 16},
    **{"uint16": 17, "complex128": 18, "half": 19, "resource": 20, "variant": 21, "uint32": 22, "uint64": 23},
    **{"float8_e5m2": 24, "float8_e4m3fn": 25, "float8_e4m3fnuz": 26, "float8_e4m3b11fnuz": 27},
    **{"float8_e5m2fnuz": 28, "int4": 29, "uint4": 30, "int2": 31, "uint2": 32, "float4_e2m1fn": 33},
}
STRING = NUMBERS["string"]
_OTHER_NAMES = {"float": "float32", "double": "float64", "half": "float16", "string": "object"}
# As TensorFlow has them: a field of their own name, by which one is told from the integers.
_QUANTIZED = {"qint8": "i1", "quint8": "u1", "qint16": "i2", "quint16": "u2", "qint32": "i4"}


def numpy_type(name: str) -> np.dtype:
    """Returns NumPy's type for `float`, `half`, `string` and so on.

    Raises:
        KeyError: If NumPy has no such type.
    """
    if name in _QUANTIZED:
        return np.dtype([(name, _QUANTIZED[name])])
    other = _OTHER_NAMES.get(name, name)
    if name not in NUMBERS or (other not in (*np.sctypeDict, "object") and not hasattr(ml_dtypes, other)):
        raise KeyError(name)
    return np.dtype(getattr(ml_dtypes, other, other))


def number_of(dtype: np.dtype) -> int:
    """Returns the number of an array's type; strings are arrays of objects.

    Raises:
        KeyError: If there is none.
    """
    return _numbers()[dtype]


@functools.cache
def _numbers() -> dict[np.dtype, int]:
    found = {}
    for name, number in NUMBERS.items():
        try:
            found[numpy_type(name)] = number
        except KeyError:
            continue
    return found
