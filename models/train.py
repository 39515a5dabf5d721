"""Train a reference network: `python -m models.train`; after an interruption, the same command goes on."""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import cluster, data, local_workers, lock, run_folder
from models.console import start_tensorflow
from models.settings import Settings


def main(arguments: Sequence[str] | None = None) -> None:
    """The command.

    Exits with 0 when the network is trained, 2 on a wrong flag or `TF_CONFIG`, 1 on missing data or a folder that
    another process writes to, 130 on Ctrl-C, and 138 where another worker was lost: to be started again.
    """
    local_workers.end_with_launcher()
    parser = flag_parser()
    flags = vars(parser.parse_args(arguments))
    source, output, restart = flags.pop("data"), flags.pop("output"), flags.pop("restart")
    strategy, count, replicas = flags.pop("strategy"), flags.pop("local_workers"), flags.pop("replicas")
    try:
        settings = Settings(**flags)
        members = cluster.read(os.environ)
        cluster.check(strategy, count, replicas, restart, settings.batch_size, members)
    except ValueError as error:
        parser.error(str(error))
    folder = Path(output) if output else Path("runs") / settings.network
    try:
        if source:
            data.check(source)
        if count:
            command = [sys.executable, "-m", "models.train", *settings.flags(), "--strategy", strategy]
            command += ["--output", str(folder), *(["--data", source] if source else [])]
            sys.exit(local_workers.run(command, count, folder, restart))
        writes = strategy != "workers" or members is None or members.is_chief
        with lock.held(folder, local_workers.launcher()) if writes else contextlib.nullcontext():
            start_tensorflow()
            with _strategy(strategy, replicas) as distributed:
                _train(settings, source, folder, restart, distributed)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted. The same command goes on after the last whole epoch.\n")


@contextlib.contextmanager
def _strategy(name: str, replicas: int | None):
    """The strategy of that name, for as long as this process trains; None for one replica."""
    if name == "one":
        yield None
        return
    from models import distributed

    with distributed.workers() if name == "workers" else distributed.mirrored(replicas) as strategy:
        yield strategy


def _train(settings: Settings, source: str | None, folder: Path, restart: bool, strategy: Any) -> None:
    from models import distributed, training

    images = data.load(source)
    model = (
        training.train(settings, images, folder, restart=restart)
        if strategy is None
        else distributed.train(settings, images, folder, strategy, restart=restart)
    )
    if model is None:  # Of a worker; the chief says it.
        return
    accuracy = training.accuracy(model, images.x_test, images.y_test)
    print(f"Test accuracy: {accuracy:.4f} on {len(images.x_test):,} images")
    saved = folder / run_folder.MODEL
    print(f"Saved: {saved} ({model.count_params():,} weights); log: {folder / run_folder.LOG}")


def flag_parser() -> argparse.ArgumentParser:
    """What reads the command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m models.train",
        description="Train a reference network on Fashion-MNIST with keras_bn.BatchNormalization. After an "
        "interruption, the same command goes on and ends with the weights it would have had without one.",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--data", metavar="PATH", help="folder of IDX files or .npz; by default Fashion-MNIST is found")
    files.add_argument("--output", metavar="FOLDER", help="of this run; by default runs/<network>")
    files.add_argument("--restart", action="store_true", help="forget what --output holds and start anew")
    where = parser.add_argument_group("where it runs: the weights are the same, but for the rounding of floats")
    where.add_argument(
        "--strategy",
        choices=cluster.STRATEGIES,
        default="one",
        help="one replica; mirrored on the GPUs of this machine, or on parts of its CPU; or workers, the processes "
        "that TF_CONFIG names, each of which is started with the same command (default: one)",
    )
    where.add_argument("--local_workers", type=int, metavar="N", help="with workers: start N on this machine")
    where.add_argument("--replicas", type=int, metavar="N", help="with mirrored: of all GPUs, or 2 parts of the CPU")
    run = parser.add_argument_group("settings of the run")
    for field in dataclasses.fields(Settings):
        options = dict(field.metadata)
        if field.default not in (None, False):
            options["help"] += f" (default: {field.default})"
        run.add_argument(f"--{field.name}", default=field.default, **options)
    return parser


if __name__ == "__main__":
    main()
