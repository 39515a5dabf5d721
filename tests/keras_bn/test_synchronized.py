"""Synchronized statistics on two replicas equal those of one large batch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.reference import Reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("replicas") / "results.npz"
    program = Path(__file__).with_name("replicas.py")
    ended = subprocess.run(
        [sys.executable, program, path], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    with np.load(path) as arrays:
        return dict(arrays)


CASES = [
    f"{sizes}-{where}-{masked}"
    for sizes in ("equal", "uneven", "empty")
    for where in ("near", "far")
    for masked in ("plain", "masked", "weighted")
]


def _oracle(results, case):
    return Reference(results[f"{case}/x"], -1, weights=results[f"{case}/mask"][..., None])


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_averages_of_two_replicas_are_those_of_one_batch(results, case):
    oracle = _oracle(results, case)
    np.testing.assert_allclose(results[f"{case}/y"], oracle.y, atol=1e-4)
    np.testing.assert_allclose(results[f"{case}/mean"], oracle.batch_mean, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(results[f"{case}/variance"], oracle.unbiased_variance, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_two_replicas_are_those_of_one_batch(results, case):
    oracle = _oracle(results, case)
    want = oracle.gradients(3 * oracle.y**2)[0]
    np.testing.assert_allclose(results[f"{case}/dx"], want, atol=3e-4 * np.abs(want).max())


def test_fit_averages_the_statistics_of_the_whole_batch(results):
    oracle = Reference(results["fit/x"], -1)
    np.testing.assert_allclose(results["fit/mean"], oracle.batch_mean, rtol=1e-5)
    np.testing.assert_allclose(results["fit/variance"], oracle.biased_variance, rtol=1e-5)
