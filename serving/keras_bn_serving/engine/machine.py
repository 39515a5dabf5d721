"""How many cores the process may use: those that it may run on, and what its control group lets it have."""

import functools
import math
import os
from pathlib import Path, PurePosixPath

_V1_FOLDERS = ("cpu", "cpu,cpuacct")


@functools.cache
def usable_cores() -> int:
    """Returns the number of cores, at least 1; a limit of 1.5 cores makes 2."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, control_group_limit(Path("/")))))


def control_group_limit(root: Path) -> float:
    """Returns how many cores the least of the control groups around the process allows; infinity without limit.

    Args:
        root: Of the file system.
    """
    limits = [math.inf]
    for path in _groups(root / "proc/self/cgroup"):
        # A container may see its own group as the root, or by the name that it has outside.
        for folder in (path, *path.parents):
            below = str(folder).lstrip("/")
            limits.append(_v2_limit(root / "sys/fs/cgroup" / below / "cpu.max"))
            limits += [_v1_limit(root / "sys/fs/cgroup" / name / below) for name in _V1_FOLDERS]
    return min(limits)


def _groups(file: Path) -> set[PurePosixPath]:
    try:
        lines = file.read_text().splitlines()
    except OSError:  # Not Linux.
        return set()
    return {PurePosixPath(line.split(":", 2)[2]) for line in lines if line.count(":") >= 2}


def _v2_limit(file: Path) -> float:
    quota, _, period = _text(file).partition(" ")
    return float(quota) / float(period) if quota not in ("", "max") else math.inf


def _v1_limit(folder: Path) -> float:
    quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return float(quota) / float(period) if quota and period and float(quota) > 0 else math.inf


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # There is no such group, or none of this kind.
        return ""
