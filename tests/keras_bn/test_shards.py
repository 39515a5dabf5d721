"""Statistics of data that is distributed among replicas or workers: those of all the data in one process."""

from pathlib import Path

import numpy as np
import pytest

import keras_bn
from tests import worker_processes
from tests.keras_bn import shards

PROGRAM = Path(__file__).with_name("shards.py")


def _results(folder, count):
    worker_processes.run(PROGRAM, count, folder)
    return [dict(np.load(folder / f"{index}.npz")) for index in range(count)]


@pytest.fixture(scope="module")
def of_replicas(tmp_path_factory):
    return _results(tmp_path_factory.mktemp("replicas"), 1)[0]


@pytest.fixture(scope="module", params=[2, 3])
def of_workers(request, tmp_path_factory):
    return _results(tmp_path_factory.mktemp("workers"), request.param)


def _check(results, kind, want):
    for name, value in want.items():
        np.testing.assert_allclose(results[f"{kind}/{name}"], value, rtol=1e-6, atol=1e-7, err_msg=f"{kind} {name}")


@pytest.mark.parametrize("kind", ["dataset", "iterator", "function", "values", "steps"])
def test_batches_that_are_distributed_among_replicas_are_pooled_exactly(of_replicas, kind):
    x, weights = shards.data()
    network = shards.model()
    keras_bn.recalibrate(network, (x, None, weights), verbose=0)
    _check(of_replicas, kind, shards.statistics(network))
    for name, copies in of_replicas.items():
        if name.startswith(f"{kind}/copies"):
            np.testing.assert_array_equal(copies[0], copies[1], err_msg=name)


def test_moments_of_distributed_batches_are_those_of_all_replicas_of_the_process(of_replicas):
    x, weights = shards.data()
    network = shards.model()
    keras_bn.recalibrate(network, (x, None, weights), verbose=0)
    for name, moments in keras_bn.measure(network, (x, None, weights), verbose=0).items():
        np.testing.assert_allclose(of_replicas[f"measured/{name}"], np.stack(moments), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("options", shards.OPTIONS, ids=lambda options: "-".join(options.values()))
def test_workers_with_shares_of_different_sizes_get_the_statistics_of_all_of_them(of_workers, options):
    x = np.concatenate(shards.shares(len(of_workers)))
    network = shards.model()
    keras_bn.recalibrate(network, x, batch_size=shards.BATCH, verbose=0, **options)
    _check(of_workers[0], "/".join(options.values()), shards.statistics(network))


@pytest.mark.slow
def test_a_distributed_dataset_is_pooled_over_workers(of_workers):
    _check(of_workers[0], "dataset", shards.whole("pooled", "sequential"))


@pytest.mark.slow
def test_all_workers_get_the_same_statistics_bit_for_bit(of_workers):
    for other in of_workers[1:]:
        for name, value in of_workers[0].items():
            if not name.startswith("error"):
                np.testing.assert_array_equal(other[name], value, err_msg=name)


@pytest.mark.slow
def test_a_step_sends_as_many_bytes_whatever_the_number_of_workers(of_workers):
    # Two sums forward, twice, and two backward; without synchronization the two averages of the moving statistics.
    assert (of_workers[0]["bytes/True"], of_workers[0]["bytes/False"]) == (24.0, 8.0)


@pytest.mark.slow
def test_an_error_on_one_worker_is_raised_on_all_and_leaves_the_model_as_it_was(of_workers):
    *others, last = of_workers
    assert "`data` must be finite" in str(last["error/non-finite"])
    assert "must hold at least one batch" in str(last["error/empty"])
    assert "`method` must be one of" in str(last["error/option"])
    assert "`tolerance` must be None" in str(last["error/tolerance"])
    assert str(last["error/interrupted"]).startswith("KeyboardInterrupt")
    for other in others:
        for kind in ("non-finite", "empty", "option", "tolerance", "interrupted"):
            assert f"Received: an error on worker {len(others)}, which says" in str(other[f"error/{kind}"]), kind
    for worker in of_workers:
        for kind in ("method", "order"):
            assert "`method` and `order` must be the same on every worker" in str(worker[f"error/{kind}"])
        assert "call the same normalizations in the same order on every worker" in str(worker["error/layers"])
        assert worker["error/nothing changed"]
