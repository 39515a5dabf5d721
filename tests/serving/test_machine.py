"""The cores and the memory that a process may use, by affinity and by the control groups of a container."""

import math
import os
import re
from pathlib import Path

import pytest
from keras_bn_serving.engine import machine
from keras_bn_serving.engine.grouping import BatchingOptions


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


V1_GROUPS = "4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"


@pytest.mark.parametrize(("files", "limit"), [
    ({}, math.inf),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000",
      "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 2.0),
    ({"proc/self/cgroup": V1_GROUPS, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
      "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3.0),
    ({"proc/self/cgroup": V1_GROUPS, "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "-1\n",
      "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, math.inf),
])  # fmt: skip
def test_the_limit_is_that_of_the_control_groups(tmp_path: Path, files: dict[str, str], limit: float):
    write(tmp_path, files)
    assert machine.cores_of_control_groups(tmp_path) == limit


@pytest.mark.parametrize(("files", "limit"), [
    ({}, math.inf),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, math.inf),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "1073741824\n",
      "sys/fs/cgroup/a/b/memory.max": "2147483648\n"}, 2**30),
    ({"proc/self/cgroup": "9:memory:/docker/abc\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912"}, 2**29),
])  # fmt: skip
def test_memory_too_is_limited_by_the_control_groups(tmp_path: Path, files: dict[str, str], limit: float):
    write(tmp_path, files)
    assert machine.memory_of_control_groups(tmp_path) == limit


def test_memory_without_a_limit_is_what_is_installed():
    kibibytes = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    assert 0 < machine.usable_memory() <= kibibytes * 1024


@pytest.mark.parametrize(("limit", "expected"), [(math.inf, 3), (1.5, 2), (0.2, 1), (8.0, 3)])
def test_a_process_uses_no_more_cores_than_either_lets_it(monkeypatch: pytest.MonkeyPatch, limit: float, expected: int):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5})
    monkeypatch.setattr(machine, "cores_of_control_groups", lambda root: limit)
    machine.usable_cores.cache_clear()
    try:
        assert machine.usable_cores() == expected
        assert BatchingOptions().num_batch_threads == expected
    finally:
        machine.usable_cores.cache_clear()
