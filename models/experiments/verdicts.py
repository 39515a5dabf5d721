"""From numbers of several seeds to a sentence: a claim held, did not hold, or is left undecided."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

HELD, DID_NOT_HOLD, UNDECIDED = "held", "did not hold", "undecided"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: What was to be shown, as part of a sentence.
        outcome: `HELD`, `DID_NOT_HOLD` or `UNDECIDED`.
        numbers: What was measured, with its spread over the seeds, in words.
    """

    claim: str
    outcome: str
    numbers: str

    def __str__(self):
        return f"**{self.outcome.capitalize()}**: {self.claim}. {self.numbers}"


def judge(claim: str, effects: Sequence[float | None], what: str, unit: str = "", form: str = "+.2f") -> Verdict:
    """Whether an effect is there: above zero by more than it differs between seeds.

    The effect is the mean over the seeds, the spread the highest less the lowest. Where the spread is larger than the
    effect, or there is one seed only, the claim is undecided.

    Args:
        claim: That the effect is above zero, in words.
        effects: One for each seed, each a difference within that seed; None where it could not be measured.
        what: What the effect is a difference of, in words.
        unit: Of the effect.
        form: How a number is written.

    Returns:
        The verdict.
    """
    known = [float(effect) for effect in effects if effect is not None and math.isfinite(effect)]
    if not known:
        return Verdict(claim, UNDECIDED, f"{what}: not measured with any seed.")
    mean, low, high = float(np.mean(known)), min(known), max(known)
    unit = f" {unit}" if unit else ""
    numbers = f"{what}: {mean:{form}}{unit} ({low:{form}} to {high:{form}} over {len(known)} seeds)."
    missing = len(effects) - len(known)
    if len(known) == 1:
        return Verdict(claim, UNDECIDED, f"{what}: {mean:{form}}{unit} with a single seed, which has no spread.")
    if missing:
        return Verdict(claim, UNDECIDED, f"{numbers} With {missing} more it could not be measured.")
    if high - low > abs(mean):
        return Verdict(claim, UNDECIDED, numbers)
    return Verdict(claim, HELD if mean > 0 else DID_NOT_HOLD, numbers)


def judge_factor(claim: str, factors: Sequence[float | None], what: str, least: float = 1.0) -> Verdict:
    """As `judge`, of a factor that is claimed to be at least `least`; spread and effect are of its logarithm.

    Args:
        claim: That the factor is above `least`, in words.
        factors: One for each seed, positive; None where it could not be measured.
        what: What it is a factor of, in words.
        least: What it has to be above.

    Returns:
        The verdict; the mean is the geometric one.
    """
    logs = [None if not factor else math.log(factor / least) for factor in factors]
    outcome = judge(claim, logs, what).outcome
    known = [factor for factor in factors if factor]
    if not known:
        return Verdict(claim, UNDECIDED, f"{what}: not measured with any seed.")
    mean = math.exp(float(np.mean(np.log(known))))
    seeds = f"{len(known)} of {len(factors)} seeds" if len(known) < len(factors) else f"{len(known)} seeds"
    numbers = f"{what}: {mean:.3g} ({min(known):.3g} to {max(known):.3g} over {seeds})."
    if len(factors) == 1:
        numbers = f"{what}: {mean:.3g} with a single seed, which has no spread."
    return Verdict(claim, outcome, numbers)


def spread(values: Sequence[float | None], form: str = ".3g") -> str:
    """A cell of a table: the mean over the seeds, and in brackets the lowest and the highest."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return "never"
    if len(values) == 1:
        return f"{known[0]:{form}}"
    short = f"{np.mean(known):{form}} ({min(known):{form}} to {max(known):{form}})"
    return short if len(known) == len(values) else f"{short}, {len(known)} of {len(values)} seeds"


def percent(values: Sequence[float | None]) -> str:
    """A cell of shares, in percent."""
    return spread([None if value is None else 100 * value for value in values], ".2f")
