"""The page of the experiments, its figures and tables: made of the JSON of the runs and of nothing else."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import experiments
from models.experiments import figures
from models.experiments.runs import Plan, equal_numbers, without_times
from models.experiments.verdicts import Verdict

PAGE = "README.md"
OUTCOMES = "`held`: the effect is there, and larger than its spread over the seeds. `did not hold`: the opposite is. "


@dataclasses.dataclass(frozen=True)
class Results:
    """The runs of an experiment that are whole.

    Attributes:
        name: Of the experiment.
        module: Its module.
        records: One for each seed, as `models.experiments.runs` writes them.
    """

    name: str
    module: Any
    records: Sequence[dict[str, Any]]

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """What was measured, one for each seed."""
        return [record["numbers"] for record in self.records]

    @property
    def verdicts(self) -> list[Verdict]:
        """What became of its claims."""
        return self.module.verdict(self.numbers)

    @property
    def minutes(self) -> float:
        """That the runs took together."""
        return sum(record["seconds"] for record in self.records) / 60


def collect(plan: Plan) -> list[Results]:
    """The results of all experiments that have some."""
    found = [(name, plan.records(name)) for name in experiments.NAMES]
    return [Results(name, experiments.load(name), records) for name, records in found if records]


def write(plan: Plan, output: Path) -> list[Path]:
    """Draw the figures of all results and write the page.

    Args:
        plan: Where the results are.
        output: Folder of the page and the figures.

    Returns:
        The files written, the page last.

    Raises:
        FileNotFoundError: There is no result.
    """
    results = collect(plan)
    if not results:
        raise FileNotFoundError(
            f"{plan.folder} must hold results of the setting {plan.setting} on {plan.dataset}. Run an experiment first."
        )
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for result in results:
        path = output / f"{result.name}.png"
        figures.save(result.module.figure(result.numbers), path)
        files.append(path)
    page = output / PAGE
    page.write_text(text(plan, results))
    return [*files, page]


def text(plan: Plan, results: Sequence[Results]) -> str:
    """The page, as Markdown.

    Args:
        plan: What was run.
        results: Of it.
    """
    minutes = sum(result.minutes for result in results)
    # One that was interrupted has less to say, and other verdicts for that alone.
    again = {
        second.name: second
        for second in collect(plan.again)
        if plan.again.seeds(second.name) == plan.seeds(second.name)
    }
    parts = [
        "# What is claimed of batch normalization, measured",
        f"Written by `{_command('all', plan)}`, from the JSON in `{plan.folder.name}/` alone; with `--redraw` "
        f"it draws anew without training. Data: {plan.dataset}. Lines are means over the seeds, bands go from the "
        f"lowest to the highest. All of it took {minutes:.0f} minutes.",
        f"{OUTCOMES}`undecided`: the seeds differ by more than the effect. The effect is the mean over the seeds, the "
        "spread the highest less the lowest of them; of factors both are taken of the logarithm.",
        _overview(results),
        *([_agreement(plan, results, again)] if again else []),
        *(_section(plan, result, again.get(result.name)) for result in results),
    ]
    return "\n\n".join(parts) + "\n"


def _overview(results: Sequence[Results]) -> str:
    rows = [
        [f"[{result.name}](#{result.name})", verdict.claim, verdict.outcome]
        for result in results
        for verdict in result.verdicts
    ]
    return figures.markdown(["experiment", "claim", "outcome"], rows).replace("---:", "---")


def _agreement(plan: Plan, results: Sequence[Results], again: dict[str, Results]) -> str:
    """How far a second run came to the same, in a table."""
    twice = [(first, again[first.name]) for first in results if first.name in again]
    rows, alike, claims = [], 0, 0
    for first, second in twice:
        same = sum(one.outcome == other.outcome for one, other in zip(first.verdicts, second.verdicts, strict=True))
        alike, claims = alike + same, claims + len(first.verdicts)
        equal, numbers = equal_numbers(*([without_times(each) for each in one.numbers] for one in (first, second)))
        minutes = [f"{each.minutes:.1f}" for each in (first, second)]
        rows.append([first.name, f"{same} of {len(first.verdicts)}", f"{equal:,} of {numbers:,}", *minutes])
    header = ["experiment", "outcomes that are the same", "numbers that are equal", "minutes", "and again"]
    parts = [
        "## A second run with the same seeds",
        f"`{_command('all', plan)} --again`: {alike} of {claims} outcomes are the same. The others are named where "
        "they stand. Numbers are all that the JSON has but times, and equal in all five digits that are kept. "
        "Threads add in an order of their own, of which training makes much; changes of the library between the two "
        "count as well. It took "
        f"{sum(second.minutes for _, second in twice):.0f} minutes where the first took "
        f"{sum(first.minutes for first, _ in twice):.0f}, with what else the machine had to do.",
        figures.markdown(header, rows),
    ]
    return "\n\n".join(parts)


def _section(plan: Plan, result: Results, second: Results | None) -> str:
    module = result.module
    setting = result.records[0]["setting"]
    values = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in setting.items())
    seeds = ", ".join(str(record["seed"]) for record in result.records)
    parts = [
        f"## {result.name}",
        f"{module.TITLE}",
        f"> {module.CLAIM}\n>\n> {module.SOURCE}",
        f"Setting: {values}. Seeds: {seeds}.",
        f"![{module.TITLE}]({result.name}.png)",
        module.table(result.numbers),
        "\n".join(_outcomes(result, second)),
        f"`{_command(result.name, plan)}`; {_took(result)}.",
    ]
    return "\n\n".join(parts)


def _outcomes(result: Results, second: Results | None) -> list[str]:
    """The verdicts as a list; one that a second run does not share says what came out there."""
    others = second.verdicts if second else result.verdicts
    return [
        f"- {one}"
        if one.outcome == other.outcome
        else f"- {one} **In the second run {other.outcome}**: {other.numbers}"
        for one, other in zip(result.verdicts, others, strict=True)
    ]


def _took(result: Results) -> str:
    seconds = [record["processor_seconds"] for record in result.records if "processor_seconds" in record]
    cpu = f", {sum(seconds) / 60:.1f} of a processor" if len(seconds) == len(result.records) else ""
    return f"{result.minutes:.1f} minutes{cpu}"


def _command(name: str, plan: Plan) -> str:
    flags = " --quick" if plan.setting == "quick" else ""
    if plan.is_own:
        flags += " --data PATH"
    elif plan.dataset != "fashion_mnist":
        flags += f" --dataset {plan.dataset}"
    return f"python -m models.experiments {name}{flags}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_short(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " / ".join(map(_short, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
