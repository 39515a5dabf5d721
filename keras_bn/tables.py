"""Text tables for people."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines of columns; numbers to the right with four digits, text to the left."""
    cells = [list(headers), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    numeric = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(headers))]
    lines = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4g}"
    return str(value)
