"""The results of experiments: one JSON file for each run, there when the run is whole and not before."""

import dataclasses
import functools
import itertools
import json
import math
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoint import whole
from models.data import ImageData

# What depends on the machine and on what else it does: not the same when a run is repeated.
MEASURED_TIMES = ("seconds", "processor_seconds", "timings")
DIGITS = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which runs there are to be: those of one setting on one data set, for each experiment and seed.

    Attributes:
        setting: "full" or "quick".
        dataset: One of `models.experiments.DATASETS`, or what a person's own is called.
        folder: Where the JSON files are.
        is_own: Whether it is a person's own.
    """

    setting: str
    dataset: str
    folder: Path
    is_own: bool = False

    @property
    def again(self) -> "Plan":
        """The second run of the same, with the same seeds: its files are in the folder `again` beside."""
        return dataclasses.replace(self, folder=self.folder.with_name("again"))

    def path(self, experiment: str, seed: int) -> Path:
        """The file of a run."""
        return self.folder / f"{experiment}-{self.setting}-{self.dataset}-{seed}.json"

    def seeds(self, experiment: str) -> list[int]:
        """The seeds whose runs are whole, in order."""
        stem = self.path(experiment, 0).stem.removesuffix("0")
        found = [path.stem.removeprefix(stem) for path in self.folder.glob(f"{stem}*.json")]
        return sorted(int(seed) for seed in found if seed.isdigit())

    def records(self, experiment: str) -> list[dict[str, Any]]:
        """What the runs of an experiment have left, by seed.

        Raises:
            ValueError: They are of different settings.
        """
        records = [json.loads(self.path(experiment, seed).read_text()) for seed in self.seeds(experiment)]
        other = [str(record["seed"]) for record in records if record["setting"] != records[0]["setting"]]
        if other:
            raise ValueError(
                f"results of {experiment} in {self.folder} must be of one setting. Those of seeds {', '.join(other)} "
                f"differ from that of seed {records[0]['seed']}: run them again, or delete them."
            )
        return records


def pending(plan: Plan, experiment: str, setting: Any, seeds: Sequence[int]) -> list[int]:
    """The seeds that have still to be run: those without a file, or with one that was made with another setting.

    Args:
        plan: Where the files are.
        experiment: Its name.
        setting: What it would be run with now.
        seeds: All that are asked for.

    Returns:
        Some of `seeds`, in their order.
    """
    wanted = described(setting)

    def is_done(seed: int) -> bool:
        path = plan.path(experiment, seed)
        return path.exists() and json.loads(path.read_text())["setting"] == wanted

    return [seed for seed in seeds if not is_done(seed)]


def perform(
    plan: Plan, experiment: str, module: Any, setting: Any, images: ImageData, seed: int, tick: Callable[[], None]
) -> None:
    """Run an experiment with one seed, and write its file when it is through.

    Args:
        plan: Where the file goes.
        experiment: Its name.
        module: Of the experiment.
        setting: What it is run with.
        images: The data.
        seed: Of the weights, the order and all else that is drawn at random.
        tick: Called `module.parts(setting)` times.
    """
    begin, processor = time.perf_counter(), time.process_time()
    plan.folder.mkdir(parents=True, exist_ok=True)
    numbers = module.run(setting, images, seed, tick)
    record = {
        "experiment": experiment,
        "dataset": plan.dataset,
        "setting": described(setting),
        "seed": seed,
        "images_crc32": fingerprint(images),
        "seconds": round(time.perf_counter() - begin, 1),
        # Of all threads: what it takes where nothing else is done, times the cores that are kept busy.
        "processor_seconds": round(time.process_time() - processor, 1),
        "numbers": plain(numbers),
    }
    with whole(plan.path(experiment, seed)) as path:
        path.write_text(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")


def fingerprint(images: ImageData) -> int:
    """By which images and labels are known again."""
    arrays = (images.x_train, images.y_train, images.x_test, images.y_test)
    return functools.reduce(lambda crc, array: zlib.crc32(np.ascontiguousarray(array).data, crc), arrays, 0)


def check_images(plan: Plan, experiments: Sequence[str], images: ImageData) -> None:
    """Refuses to go on with runs on other images; those from before this was written down pass.

    Raises:
        ValueError: There are such runs.
    """
    known = fingerprint(images)
    both = [dataclasses.replace(plan, folder=plan.folder.with_name(name)) for name in ("results", "again")]
    for each, experiment in itertools.product(both, experiments):
        for record in each.records(experiment):
            if record.get("images_crc32", known) != known:
                raise ValueError(
                    f"{each.folder} must hold runs on the same images. Received: others than those of {experiment}, "
                    f"seed {record['seed']}. Choose another `--output`, or delete them."
                )


def described(setting: Any) -> dict[str, Any]:
    """A setting as JSON has it, without its estimated cost."""
    values = {name: value for name, value in dataclasses.asdict(setting).items() if name != "cost"}
    return json.loads(json.dumps(values))


def plain(value: Any) -> Any:
    """As JSON has it: short numbers, and None for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(each) for each in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    number = float(value)
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def without_times(record: Any) -> Any:
    """A record without what was measured with a clock, for comparing two."""
    if isinstance(record, dict):
        return {key: without_times(value) for key, value in record.items() if key not in MEASURED_TIMES}
    return record


def equal_numbers(first: Any, second: Any) -> tuple[int, int]:
    """How many numbers of a record are the same in another, to the last digit kept, and how many there are.

    Args:
        first: A record.
        second: Another of the same setting and seed, in which nothing is missing.

    Returns:
        The count of those that are equal, and of all.
    """
    if isinstance(first, dict):
        pairs = [(value, second[key]) for key, value in first.items()]
    elif isinstance(first, list):
        pairs = list(zip(first, second, strict=True))
    else:
        return int(first == second), 1
    counts = [equal_numbers(*pair) for pair in pairs]
    return sum(equal for equal, _ in counts), sum(number for _, number in counts)
