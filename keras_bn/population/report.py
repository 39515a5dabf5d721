"""What `recalibrate` did, per layer: as an object, as a table and for JSON."""

from typing import Any, NamedTuple

import numpy as np

from keras_bn.drift.figures import Distance, distance, plain, summary
from keras_bn.population.accumulator import FEWEST_BATCHES, is_settled
from keras_bn.tables import table

# In nats; below it a divergence is rounding.
ROUNDING_KL = 1e-9


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
        standard_error: how far mean and variance may be off, in standard deviations and relative, by how the batches
            differ: the largest over the channels. Infinite for fewer than two batches, None where no `tolerance` was
            given.
        batches: how many were measured, None likewise.
    """

    name: str
    count: Any
    mean: np.ndarray
    variance: np.ndarray
    old_mean: np.ndarray
    old_variance: np.ndarray
    epsilon: float
    standard_error: float | None = None
    batches: int | None = None

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
        unsettled: of layers that are called several times, by name, how far what they see in inference now is from
            their new statistics: KL divergence, nats, mean over channels. Where one call feeds another the statistics
            change what they are measured of, so that no order of measuring is exact. For `"sequential"`; empty where no
            layer is called twice.
        tolerance: as it was given.
    """

    method: str
    order: str
    layers: list[RecalibratedLayer]
    not_called: list[str]
    unsettled: dict[str, float]
    tolerance: float | None = None

    @property
    def short_of_tolerance(self) -> list[str]:
        """Names of the layers for which the data ended before their standard error was below `tolerance`.

        Of fewer than ten batches a standard error is not known well enough, whatever it is.
        """
        return [
            one.name
            for one in self.layers
            if self.tolerance is not None
            and one.standard_error is not None
            and not is_settled(one.standard_error, one.batches or 0, self.tolerance)
        ]

    def shortfall(self) -> str:
        """What `tolerance` asked for and the data did not give, in words; empty where there is nothing to say."""
        short = [one for one in self.layers if one.name in self.short_of_tolerance]
        if not short:
            return ""
        worst = sorted(short, key=lambda one: -(one.standard_error or 0))
        named = ", ".join(f"{one.name} {one.standard_error:.3g} after {one.batches}" for one in worst[:3])
        more = f", and {len(worst) - 3} more" if len(worst) > 3 else ""
        return (
            f"The data ended before the standard errors were below {self.tolerance:g}, for which it takes "
            f"{FEWEST_BATCHES} batches at least: {named}{more}."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the numbers of the table."""
        return {
            "method": self.method,
            "order": self.order,
            "layers": [
                {
                    "name": one.name,
                    "channels": int(one.mean.size),
                    "count": one.count,
                    **plain(summary(one.distance)),
                    "standard_error": _known(one.standard_error),
                    "batches": one.batches,
                }
                for one in self.layers
            ],
            "not_called": self.not_called,
            "unsettled": self.unsettled,
            "tolerance": self.tolerance,
            "short_of_tolerance": self.short_of_tolerance,
        }

    def __str__(self) -> str:
        rows = [
            [one["name"], one["channels"], one["count"], one["mean_shift"], one["variance_ratio"], one["kl"]]
            for one in self.to_dict()["layers"]
        ]
        text = table(["layer", "channels", "values", "mean shift", "variance ratio", "KL"], rows)
        text = f"Moving statistics replaced ({self.method}, {self.order}):\n{text}"
        text += f"\n{self.shortfall()}" if self.short_of_tolerance else ""
        text += "".join(f"\nNot called, left as it was: {name}" for name in self.not_called)
        return text + "".join(
            f"\nCalled several times, one call feeding another, so that no statistics are exact: {name} is off by "
            f"KL {kl:.3g}."
            for name, kl in self.unsettled.items()
            if kl > ROUNDING_KL
        )


def _known(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and np.isfinite(value) else None
