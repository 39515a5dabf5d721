"""The cores that a process may use, by affinity and by the control groups of a container."""

import math
import os
from pathlib import Path

import pytest
from keras_bn_serving.engine import cores
from keras_bn_serving.engine.grouping import BatchingOptions

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
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cores.control_group_limit(tmp_path) == limit


@pytest.mark.parametrize(("limit", "expected"), [(math.inf, 3), (1.5, 2), (0.2, 1), (8.0, 3)])
def test_a_process_uses_no_more_cores_than_either_lets_it(monkeypatch: pytest.MonkeyPatch, limit: float, expected: int):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5})
    monkeypatch.setattr(cores, "control_group_limit", lambda root: limit)
    cores.usable_cores.cache_clear()
    try:
        assert cores.usable_cores() == expected
        assert BatchingOptions().num_batch_threads == expected
    finally:
        cores.usable_cores.cache_clear()
