"""What was found and done, per normalization layer: as objects, as a table and as a picture."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_bn.drift import Distance, distance, summary


class RecalibratedLayer(NamedTuple):
    """One layer before and after.

    Attributes:
        name: the layer's, with the names of the nested models around it.
        count: number of values measured per channel, or their sum of weights.
        mean: the new moving mean, shape `(C,)`, float64.
        variance: the new moving variance; biased (`"pooled"`) or averaged unbiased (`"algorithm2"`).
        old_mean: what was there before.
        old_variance: what was there before.
        epsilon: the layer's.
    """

    name: str
    count: Any
    mean: np.ndarray
    variance: np.ndarray
    old_mean: np.ndarray
    old_variance: np.ndarray
    epsilon: float

    @property
    def distance(self) -> Distance:
        """Of the new statistics from the old ones, per channel."""
        return distance(self.mean, self.variance, self.old_mean, self.old_variance, self.epsilon)


class Recalibration(NamedTuple):
    """What `recalibrate` did; prints as a table.

    Attributes:
        method: `"pooled"` or `"algorithm2"`.
        order: `"sequential"` or `"joint"`.
        layers: a `RecalibratedLayer` each.
        not_called: names of layers that the model did not call for this data; their statistics are as before.
    """

    method: str
    order: str
    layers: list[RecalibratedLayer]
    not_called: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the numbers of the table."""
        return {
            "method": self.method,
            "order": self.order,
            "layers": [
                {"name": one.name, "channels": int(one.mean.size), "count": one.count, **_plain(summary(one.distance))}
                for one in self.layers
            ],
            "not_called": self.not_called,
        }

    def __str__(self) -> str:
        rows = [
            [one["name"], one["channels"], one["count"], one["mean_shift"], one["variance_ratio"], one["kl"]]
            for one in self.to_dict()["layers"]
        ]
        text = table(["layer", "channels", "values", "mean shift", "variance ratio", "KL"], rows)
        text = f"Moving statistics replaced ({self.method}, {self.order}):\n{text}"
        return text + "".join(f"\nNot called, left as it was: {name}" for name in self.not_called)


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


def _plain(numbers: Any) -> dict[str, float]:
    return {name: float(value) for name, value in numbers.items()}
