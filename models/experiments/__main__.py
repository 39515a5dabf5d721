"""`python -m models.experiments`: run experiments, goes on after an interruption, and write the page."""

import argparse
import contextlib
import functools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from models import data, lock
from models.console import start_tensorflow
from models.experiments import DATASETS, NAMES
from models.experiments.runs import Plan

PAGE_FOLDER = Path("docs/experiments")
SEEDS = {"full": 3, "quick": 1}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exits with 0 when the page is written, 2 on a wrong flag, 1 on missing data, 130 on Ctrl-C."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    setting = "quick" if flags.quick else "full"
    seeds = SEEDS[setting] if flags.seeds is None else flags.seeds
    if seeds < 1:
        parser.error(f"`--seeds` must be at least 1. Received: {seeds}")
    unknown = [name for name in flags.names if name not in (*NAMES, "all")]
    if unknown:
        parser.error(f"NAME must be one of {', '.join(NAMES)}, or all. Received: {', '.join(unknown)}")
    if not flags.names and not flags.redraw:
        parser.error(f"name what to run: {', '.join(NAMES)}, or all; or draw what there is with --redraw")
    if flags.names and flags.redraw:
        parser.error(f"--redraw draws all there is and takes no NAME. Received: {', '.join(flags.names)}")
    if flags.again and flags.redraw:
        parser.error("--redraw draws a second run too, and --again makes one: give one of them")
    if flags.data and flags.dataset != DATASETS[0]:
        parser.error(f"--data is where {DATASETS[0]} is, and goes with no other --dataset. Received: {flags.dataset}")
    names = [name for name in NAMES if name in flags.names or "all" in flags.names]
    dataset = re.sub(r"\W+", "_", Path(flags.data).stem) if flags.data else flags.dataset
    output = flags.output or _default_output(setting, dataset)
    if output.exists() and not output.is_dir():
        parser.error(f"`--output` must be a folder, or nothing yet. Received: {output}, which is a file")
    plan = Plan(setting, dataset, output / "results", is_own=bool(flags.data))
    missing = [name for name in names if not set(range(seeds)) <= set(plan.seeds(name))]
    if flags.again and missing:
        parser.error(
            f"--again repeats what is in {plan.folder}, and there is no first run with {seeds} seeds of "
            f"{', '.join(missing)}. Run it without --again before"
        )
    try:
        if flags.data:
            data.check(flags.data)
        with lock.held(output):
            start_tensorflow()
            from models.experiments import page

            _run(plan.again if flags.again else plan, names, range(seeds), flags.data)
            written = page.write(plan, output)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted. The same command goes on after the last whole run.\n")
    for result in page.collect(plan):
        for verdict in result.verdicts:
            print(f"{result.name}: {verdict.outcome}: {verdict.claim}. {verdict.numbers}")
    print(f"Written: {written[-1]} and {len(written) - 1} figures")


def _run(plan: Plan, names: Sequence[str], seeds: Sequence[int], source: str | None) -> None:
    import tensorflow as tf

    from models import experiments
    from models.experiments import images, runs

    # It takes each network's own function for one that is traced again and again.
    tf.get_logger().setLevel("ERROR")

    todo = []
    for name in names:
        module = experiments.load(name)
        setting = module.QUICK if plan.setting == "quick" else module.FULL
        todo += [(name, module, setting, seed) for seed in runs.pending(plan, name, setting, seeds)]
    done = len(names) * len(seeds) - len(todo)
    if done:
        print(f"{done} of {done + len(todo)} runs are there already: {plan.folder}", file=sys.stderr)
    if not todo and not source:
        return
    dataset = images.load(DATASETS[0] if plan.is_own else plan.dataset, source)
    runs.check_images(plan, names, dataset)
    with _bar(sum(setting.cost for _, _, setting, _ in todo)) as bar:
        for name, module, setting, seed in todo:
            bar.set_description(f"{name}, seed {seed}")
            share = setting.cost / module.parts(setting)
            runs.perform(plan, name, module, setting, dataset, seed, functools.partial(bar.update, share))


@contextlib.contextmanager
def _bar(seconds: float) -> Iterator[Any]:
    """A bar over the seconds that the runs were estimated to take, so that what is left is in proportion.

    Where stderr is no terminal, a line for every tenth of them.
    """
    if not sys.stderr.isatty():
        yield _Lines(seconds)
        return
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
    with tqdm(total=seconds, bar_format=form, smoothing=0.02, mininterval=1.0) as bar:
        yield bar


class _Lines:
    """What stands for `tqdm` where its line cannot be redrawn."""

    def __init__(self, total: float):
        self._total, self._done, self._name, self._begin = total, 0.0, "", time.monotonic()

    def set_description(self, name: str) -> None:
        self._name = name

    def update(self, seconds: float) -> None:
        before, self._done = self._tenths(), self._done + seconds
        if self._tenths() > before:
            minutes = (time.monotonic() - self._begin) / 60
            print(f"{self._name}: {10 * self._tenths()} %, {minutes:.1f} minutes", file=sys.stderr, flush=True)

    def _tenths(self) -> int:
        # The sum of all shares is rounded.
        return int(10 * self._done / self._total + 1e-6)


def _default_output(setting: str, dataset: str) -> Path:
    return (
        PAGE_FOLDER
        if (setting, dataset) == ("full", DATASETS[0])
        else Path("runs/experiments") / f"{setting}-{dataset}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.experiments",
        description="Measures what is claimed of batch normalization, and writes figures, tables and verdicts. A run "
        "that is whole is kept as JSON and not done again: after an interruption the same command goes on.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(NAMES)}, or all")
    parser.add_argument("--quick", action="store_true", help="small settings, for a look: minutes, and no evidence")
    parser.add_argument(
        "--again",
        action="store_true",
        help="run what is there once more with the same seeds: the page compares the two",
    )
    parser.add_argument("--seeds", type=int, help="how many, counted from 0 (default: 3; with --quick: 1)")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        help=f"for page, figures and results (default: {PAGE_FOLDER}; with --quick or another data set a folder below "
        "runs/experiments)",
    )
    parser.add_argument("--dataset", choices=DATASETS, default=DATASETS[0], help="default: %(default)s")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="a folder of IDX files or .npz, named on the page; by default Fashion-MNIST is found",
    )
    parser.add_argument("--redraw", action="store_true", help="draw figures and page of the results; no training")
    return parser


if __name__ == "__main__":
    main()
