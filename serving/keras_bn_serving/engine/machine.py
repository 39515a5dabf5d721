"""What of the machine the process may use: its own share, and what its control groups let it have."""

import functools
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CPU_FOLDERS = ("cpu", "cpu,cpuacct")


@functools.cache
def usable_cores() -> int:
    """Returns the number of cores, at least 1; a limit of 1.5 cores makes 2."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, cores_of_control_groups(Path("/")))))


@functools.cache
def usable_memory() -> int:
    """Returns the number of bytes: what is installed, or what control groups or the process's own limits allow."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    own = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return int(min(installed, memory_of_control_groups(Path("/")), *own))


def cores_of_control_groups(root: Path) -> float:
    """Returns how many cores the least of the control groups around the process allows; infinity without limit.

    Args:
        root: Of the file system.
    """
    limits = [math.inf]
    for below in _groups(root):
        quota, _, period = _text(root / "sys/fs/cgroup" / below / "cpu.max").partition(" ")
        limits += [float(quota) / float(period)] if quota not in ("", "max") else []
        for name in _CPU_FOLDERS:
            folder = root / "sys/fs/cgroup" / name / below
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
            limits += [float(quota) / float(period)] if quota and period and float(quota) > 0 else []
    return min(limits)


def memory_of_control_groups(root: Path) -> float:
    """Returns how many bytes the least of the control groups around the process allows; infinity without limit."""
    limits = [math.inf]
    for below in _groups(root):
        for file in (Path(below, "memory.max"), Path("memory", below, "memory.limit_in_bytes")):
            text = _text(root / "sys/fs/cgroup" / file)
            limits += [float(text)] if text not in ("", "max") else []
    return min(limits)


def _groups(root: Path) -> Iterator[str]:
    """Yields the folders of the process's groups and of those around them, below that of all groups."""
    lines = _text(root / "proc/self/cgroup").splitlines()
    for group in {PurePosixPath(line.split(":", 2)[2]) for line in lines if line.count(":") >= 2}:
        # A container may see its own group as the root, or by the name that it has outside.
        for folder in (group, *group.parents):
            yield str(folder).lstrip("/")


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # Not Linux, or there is no such group, or none of this kind.
        return ""
