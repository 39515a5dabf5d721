"""Four replicas with unequal shares, in every precision, layout and grouping: all equal the oracle."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conformance import replicas
from tests.reference import Reference, assert_close

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "mixed_float16", "mixed_bfloat16", "float64")
SHARES = [slice(0, 1), slice(1, 5), slice(5, 10), slice(10, 12)]
GROUPS = {"all": [slice(0, 12)], "groups": [slice(0, 5), slice(5, 12)], "none": SHARES}


# `tests/keras_bn/test_synchronized.py` is the quick part of it.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=DTYPES)
def results(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("replicas") / "results.npz"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, replicas.__file__, path, request.param]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    with np.load(path) as loaded:
        return request.param, dict(loaded)


@pytest.mark.parametrize(("synchronized", "axis", "rank", "where"), replicas.CELLS, ids=str)
def test_a_step_of_four_replicas_equals_the_oracle_of_their_groups(results, synchronized, axis, rank, where):
    dtype, values = results
    got = {name: values[f"{synchronized}/{axis}/{rank}/{where}/{name}"] for name in ("y", "dx", "dgamma", "dbeta")}
    x, dy = replicas.inputs(rank, dtype)
    gamma, beta, *moving = replicas.weights(x.shape[axis])
    groups = GROUPS[synchronized]
    oracles = [Reference(x[part], axis, gamma, beta) for part in groups]
    gradients = [oracle.gradients(dy[part]) for oracle, part in zip(oracles, groups, strict=True)]
    dx, dgamma, dbeta = zip(*gradients, strict=True)
    want = {
        "y": np.concatenate([oracle.y for oracle in oracles]),
        "dx": np.concatenate(dx),
        "dgamma": sum(dgamma),
        "dbeta": sum(dbeta),
    }
    for name, value in want.items():
        assert_close(got[name], value, dtype, scale=4 * max(1, np.abs(value).max()))
    kinds = (("moving_mean", "batch_mean"), ("moving_variance", "biased_variance"))
    for (name, of_batch), old in zip(kinds, moving, strict=True):
        copies = values[f"{synchronized}/{axis}/{rank}/{where}/{name}"]
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))
        moved = np.mean([_moved(oracle, getattr(oracle, of_batch), old) for oracle in oracles], 0)
        assert_close(copies[0], moved, "float64" if dtype == "float64" else "float32", scale=4)


def _moved(oracle, batch, old):
    if oracle.count.max() <= 1:  # One value per channel moves nothing.
        return old
    return replicas.MOMENTUM * old + (1 - replicas.MOMENTUM) * batch
