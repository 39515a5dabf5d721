"""Training by several replicas and worker processes: the weights of one process, whoever dies in the middle."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from models import local_workers
from models.training import train
from tests import worker_processes
from tests.models import workers

PROGRAM = Path(__file__).with_name("workers.py")


# Adam makes a step of nearly its whole length of a gradient that is nearly rounding, as convolutions have some: a tenth
# of one. Without synchronized statistics it is several steps.
TOLERANCES = {"mlp": 1e-5, "cnn": 3e-4}


def _check_equal(weights, others, tolerance=1e-5):
    for ours, theirs in zip(weights, others, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=getattr(ours, "path", ""))


def _rows(folder):
    with (folder / "log.csv").open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


def _run(folder, count, kind, *killed):
    command = [sys.executable, str(PROGRAM), str(folder), kind, *killed]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # The checkout's packages, which pytest has found.
        assert local_workers.run(command, count, folder) == 0
    return folder


@pytest.fixture(scope="module", params=workers.SETTINGS)
def of_one(request, fashion_mnist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return request.param, train(workers.SETTINGS[request.param], workers.few(), folder), _rows(folder)


@pytest.fixture(scope="module")
def uneven_of_one(fashion_mnist):
    model = workers.uneven_model(synchronized=False)
    for batch in workers.uneven_batches():
        model.train_on_batch(*batch)
    return model


def _check_run(folder, of_one):
    kind, model, rows = of_one
    saved = keras.models.load_model(folder / "run" / "model.keras")
    _check_equal(saved.weights, model.weights, TOLERANCES[kind])
    assert len(_rows(folder / "run")) == len(rows)
    for ours, theirs in zip(_rows(folder / "run"), rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def _check_uneven(folder, count, model):
    results = [list(np.load(folder / f"uneven_{index}.npz").values()) for index in range(count)]
    _check_equal(results[0], [variable.numpy() for variable in model.variables])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def _check_stopped(folder, count):
    """All, where the chief alone would have had it so."""
    assert [(folder / f"epochs_{index}").read_text() for index in range(count)] == ["2"] * count


@pytest.mark.parametrize("of_one", ["mlp"], indirect=True)
def test_replicas_of_one_process_train_as_one(of_one, uneven_of_one, tmp_path):
    worker_processes.run(PROGRAM, 1, tmp_path, of_one[0])
    _check_run(tmp_path, of_one)
    _check_uneven(tmp_path, 1, uneven_of_one)
    _check_stopped(tmp_path, 1)


class StopInTheSecondEpoch(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("of_one", ["mlp"], indirect=True)
def test_replicas_go_on_where_one_process_was_stopped(of_one, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(workers.SETTINGS[of_one[0]], workers.few(), tmp_path / "run", callbacks=[StopInTheSecondEpoch()])
    worker_processes.run(PROGRAM, 1, tmp_path, of_one[0])
    assert "Going on after epoch 1/3" in (tmp_path / "worker_0.log").read_text()
    _check_run(tmp_path, of_one)


@pytest.mark.slow
@pytest.mark.parametrize("of_one", ["mlp"], indirect=True)
def test_two_workers_of_whom_one_is_killed_and_comes_back_train_as_one(of_one, uneven_of_one, tmp_path, capfd):
    _run(tmp_path, 2, of_one[0], "1")
    _check_run(tmp_path, of_one)
    _check_uneven(tmp_path, 2, uneven_of_one)
    _check_stopped(tmp_path, 2)
    printed = capfd.readouterr()
    assert "Worker 1 was ended by SIGKILL" in printed.err
    assert "Going on after epoch 1/3" in printed.out
    # One bar, the chief's: a line an epoch where it is not a terminal.
    assert printed.out.count("Epoch 3/3") == 1


@pytest.mark.slow
@pytest.mark.parametrize("of_one", ["mlp"], indirect=True)
def test_workers_that_are_started_again_one_by_one_after_their_chief_was_killed_train_as_one(of_one, tmp_path):
    """As Kubernetes does it: each pod whose code says so is made anew, whatever the others are at."""
    codes = worker_processes.run_as_pods(PROGRAM, 2, tmp_path, of_one[0], "0")
    assert codes == [[128 + signal.SIGKILL, 0], [local_workers.TRY_AGAIN, 0]]
    _check_run(tmp_path, of_one)
    assert "Epoch 3/3" in (tmp_path / "worker_0.log").read_text()
    assert "Epoch" not in (tmp_path / "worker_1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("of_one", ["cnn"], indirect=True)
def test_three_workers_with_shares_of_different_sizes_train_as_one(of_one, uneven_of_one, tmp_path):
    _run(tmp_path, 3, of_one[0])
    _check_run(tmp_path, of_one)
    _check_uneven(tmp_path, 3, uneven_of_one)


@pytest.mark.slow
def test_a_worker_ends_by_sigterm_as_any_process_does(tmp_path):
    program = tmp_path / "idle.py"
    program.write_text(
        "import time\nfrom models import distributed\n"
        "with distributed.workers():\n    print('there', flush=True)\n    time.sleep(600)\n"
    )
    processes = []
    for config in worker_processes.clusters(2):
        environment = os.environ | {"TF_CONFIG": config, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, program]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        assert [process.stdout.readline() for process in processes] == ["there\n"] * 2
        for process in processes:
            process.terminate()
        assert [process.wait(10) for process in processes] == [-signal.SIGTERM] * 2
    finally:
        for process in processes:
            process.kill()
            process.communicate()
