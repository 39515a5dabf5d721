"""How one input or output of a signature looks from outside: its element type and its shape."""

from typing import NamedTuple


class TensorSpec(NamedTuple):
    """One named tensor of a signature.

    Attributes:
        dtype: TensorFlow's name of the element type: `float`, `int32`, `string`, `half`, ...
        shape: One entry a dimension, -1 where it is free; `None` where even the rank is free.
    """

    dtype: str
    shape: tuple[int, ...] | None
