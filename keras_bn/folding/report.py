"""What `fold` did, per normalization: as an object, as a table and for JSON."""

from typing import Any, NamedTuple

from keras_bn.tables import table


class FoldedNormalization(NamedTuple):
    """What became of one batch normalization.

    Attributes:
        name: the layer's, with the names of the nested models around it.
        into: names of the layers that absorbed it; empty if it stayed, as a multiply-add.
        reason: why it was not absorbed; empty if it was.
    """

    name: str
    into: list[str]
    reason: str


class FoldingReport(NamedTuple):
    """What `fold` did, and how well the new model agrees with the old; prints as a table.

    Attributes:
        normalizations: a `FoldedNormalization` each.
        absolute_error: largest difference of any output value.
        relative_error: largest difference of an output, divided by the largest magnitude in that output.
        tolerance: what the relative error had to stay below.
        shared: names of the layers that could not be copied and belong to both models.
        not_finite: of how many examples the model made numbers that are not finite. They prove nothing.
    """

    normalizations: list[FoldedNormalization]
    absolute_error: float
    relative_error: float
    tolerance: float
    shared: list[str]
    not_finite: int = 0

    @property
    def absorbed(self) -> int:
        """How many normalizations are gone."""
        return sum(bool(one.into) for one in self.normalizations)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self._asdict(),
            "normalizations": [one._asdict() for one in self.normalizations],
            "absorbed": self.absorbed,
        }

    def __str__(self) -> str:
        rows = [[one.name, ", ".join(one.into) or "-", one.reason] for one in self.normalizations]
        stay = self.absorbed < len(self.normalizations)
        return (
            f"{self.absorbed} of {len(self.normalizations)} normalizations absorbed; largest error "
            f"{self.absolute_error:.3g} absolute, {self.relative_error:.3g} relative (allowed: {self.tolerance:g}).\n"
            + table(["layer", "absorbed by", "why it stays"], rows)
            + (
                f"\nOf {self.not_finite} examples the model made numbers that are not finite: these prove nothing."
                if self.not_finite
                else ""
            )
            + ("\nWhat stays is computed as a multiply-add, and everything else is as before." if stay else "")
        )
