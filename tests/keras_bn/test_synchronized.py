"""Statistics of several replicas: synchronized they are those of one large batch; the moving ones are everyone's."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.reference import Reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    program = Path(__file__).with_name("replicas.py")
    arrays = {}
    for replicas in ("2", "4"):  # Processes of their own: collective operations keep their first number of devices.
        path = tmp_path_factory.mktemp("replicas") / f"{replicas}.npz"
        arguments = [sys.executable, program, path, replicas]
        ended = subprocess.run(arguments, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        with np.load(path) as loaded:
            arrays |= dict(loaded)
    return arrays


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


FOUR = [slice(0, 1), slice(1, 5), slice(5, 10), slice(10, 12)]
GROUPS = {"groups": [slice(0, 5), slice(5, 12)], "all": [slice(0, 12)], "none": FOUR}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_replicas_normalize_with_the_statistics_of_their_group(results, name):
    x = results["four/x"]
    oracles = [Reference(x[part], -1) for part in GROUPS[name]]
    np.testing.assert_allclose(results[f"four/{name}/y"], np.concatenate([one.y for one in oracles]), atol=1e-4)
    want = np.concatenate([one.gradients(3 * one.y**2)[0] for one in oracles])
    np.testing.assert_allclose(results[f"four/{name}/dx"], want, atol=3e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", GROUPS)
def test_moving_statistics_of_all_replicas_are_the_same_bit_for_bit_and_the_mean_of_theirs(results, name):
    for kind, of_batch in (("mean", "batch_mean"), ("variance", "biased_variance")):
        local = results[f"four/{name}/moving_{kind}"]
        np.testing.assert_array_equal(local, np.broadcast_to(local[:1], local.shape))
        oracles = [Reference(results["four/x"][part], -1) for part in GROUPS[name]]
        want = np.mean([getattr(one, of_batch) for one in oracles], 0)
        np.testing.assert_allclose(local[0], want, rtol=1e-4 if kind == "variance" else 1e-7, atol=1e-7)


@pytest.mark.parametrize("name", GROUPS)
def test_constant_channels_give_beta_to_the_last_digit_on_every_replica(results, name):
    np.testing.assert_array_equal(results[f"four/{name}/y"][..., 3:], 0.0)


def test_replicas_that_do_not_split_into_groups_are_refused(results):
    text = "into which all can be split. Received: synchronized=3 for 4 replicas."
    assert text in str(results["four/threes/error"])


def test_several_replicas_must_know_whether_they_train(results):
    assert "`training` must be True or False for several replicas" in str(results["four/unknown/error"])
