"""Names: of a model's tensors, made such that TensorFlow and Python take them; and many in a message."""

import keyword
import re
from collections.abc import Sequence
from typing import Any


def listed(values: Sequence[Any], most: int = 5) -> str:
    """The first of `values` as Python writes a list, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return f"{list(values[:most])}{more}"


def shown(value: Any, most: int = 200) -> str:
    """`value` as an error tells it, in one line: where it does not fit in, the shape of an array, or its beginning."""
    text = repr(value)
    if len(text) <= most and "\n" not in text:
        return text
    shape: Any = getattr(value, "shape", None)
    if hasattr(shape, "__len__"):
        dtype = getattr(value, "dtype", "numbers")
        return f"<{type(value).__name__} of shape {tuple(shape)}, {getattr(dtype, 'name', dtype)}>"
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def argument(name: str) -> str:
    """`name` as one of a signature's keyword arguments; empty where nothing of it can stay.

    ASCII letters, digits and underscores, the first a letter; no keyword of Python, and not `self`, which is taken by
    the method that calls a signature.
    """
    cleaned = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_")
    if cleaned[:1].isdigit():
        return f"input_{cleaned}"
    return f"{cleaned}_" if keyword.iskeyword(cleaned) or cleaned == "self" else cleaned


def unique(names: Sequence[str]) -> list[str]:
    """Numbers the names that come twice, from 1, past the numbered names that are there."""
    counters: dict[str, int] = {}
    taken = {name for name in names if names.count(name) == 1}
    result = []
    for name in names:
        candidate = name
        while names.count(name) > 1 and (candidate == name or candidate in taken):
            counters[name] = counters.get(name, 0) + 1
            candidate = f"{name}_{counters[name]}"
        taken.add(candidate)
        result.append(candidate)
    return result
