"""Workers as processes of this machine: one mistake ends all, a death starts all again while there is progress."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from models import local_workers

# What a worker does is in its first argument; `runs` holds how often a worker was started.
PROGRAM = """if True:
    import json, os, pathlib, sys, time
    folder = pathlib.Path(sys.argv[1])
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    with (folder / "runs").open("a") as file:
        file.write(f"{index}\\n")
    attempt = (folder / "runs").read_text().split().count(str(index))
    """


@pytest.fixture
def run(tmp_path):
    def run(body, count=2):
        return local_workers.run(
            [sys.executable, "-c", PROGRAM + body.replace("\n", "\n    "), tmp_path], count, tmp_path
        )

    return run


def _starts(folder):
    return (folder / "runs").read_text().split().count("0")


def test_each_worker_gets_its_place_in_one_cluster(run, tmp_path):
    body = "(folder / f'config_{index}').write_text(os.environ['TF_CONFIG']); print('of', index)"
    assert run(body, 3) == 0
    configs = [json.loads((tmp_path / f"config_{index}").read_text()) for index in range(3)]
    assert [config["task"] for config in configs] == [{"type": "worker", "index": index} for index in range(3)]
    assert all(config["cluster"] == configs[0]["cluster"] for config in configs)
    assert len(set(configs[0]["cluster"]["worker"])) == 3


def test_what_workers_print_is_kept_and_named_where_one_fails_and_gone_where_all_are_through(run, tmp_path, capfd):
    body = "print('of', index, flush=True)\nif index == 0: sys.exit(1)\ntime.sleep(60)"
    assert run(body, 3) == 1
    assert f"Worker 0, the chief, ended with 1. What the others said is in {tmp_path}/worker_*.log" in (
        capfd.readouterr().err
    )
    assert (tmp_path / "worker_2.log").read_text() == "of 2\n"
    assert run("print('of', index)", 3) == 0
    assert list(tmp_path.glob("*.log")) == []


def test_a_mistake_ends_all_and_is_not_tried_again(run, tmp_path, capfd):
    assert run("if index: print('line\\nno such file'); sys.exit(1)\ntime.sleep(1); sys.exit(138)") == 1
    assert _starts(tmp_path) == 1
    assert "Worker 1 ended with 1" in (said := capfd.readouterr().err)
    assert said.rstrip().endswith("ends with: no such file")


def test_a_death_starts_all_again(run, tmp_path, capfd):
    assert run("if index and attempt == 1: os.kill(os.getpid(), 9)\nif attempt == 1: time.sleep(60)") == 0
    assert _starts(tmp_path) == 2
    assert "Worker 1 was ended by SIGKILL" in capfd.readouterr().err


def test_deaths_without_a_new_epoch_end_the_training(run, tmp_path, capfd):
    assert run("if index: os.kill(os.getpid(), 9)") == 128 + signal.SIGKILL
    assert _starts(tmp_path) == 3
    assert "No epoch came to its end in 3 attempts" in capfd.readouterr().err


def test_deaths_after_new_epochs_do_not(run, tmp_path):
    log = "if not index: (folder / 'log.csv').write_text('epoch\\n' + '1\\n' * attempt)\n"
    assert run(log + "if attempt < 5: time.sleep(0.3); sys.exit(138)") == 0
    assert _starts(tmp_path) == 5


def test_who_was_killed_is_named_and_not_who_lost_another():
    assert local_workers._culprit([138, None, -9]) == (2, -9)
    assert local_workers._culprit([138, 1, -15]) == (1, 1)
    assert local_workers._culprit([None, 138]) == (1, 138)


def _alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # Who has ended and was not waited for yet is there, too.
    return subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout[:1] != "Z"


def _wait_until(is_so, command, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def stubborn(tmp_path):
    """A command whose two workers take no notice of Ctrl-C, and their process ids."""
    body = "\n    ".join(
        [
            PROGRAM + "import signal",
            "from models import local_workers",
            "local_workers.end_with_launcher()",
            "signal.signal(signal.SIGINT, signal.SIG_IGN)",
            "(folder / f'pid_{index}').write_text(str(os.getpid()))",
            "time.sleep(600)",
        ]
    )
    program = f"""if True:
        import pathlib, sys
        from models import local_workers
        local_workers.run([sys.executable, "-c", {body!r}, {str(tmp_path)!r}], 2, pathlib.Path({str(tmp_path)!r}))
    """
    command = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    paths = [tmp_path / f"pid_{index}" for index in range(2)]
    _wait_until(lambda: all(path.exists() and path.read_text() for path in paths), command)
    workers = [int(path.read_text()) for path in paths]
    yield command, workers
    command.kill()
    for worker in workers:
        if _alive(worker):
            os.kill(worker, signal.SIGKILL)
    command.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_no_worker_is_left_when_the_command_is_stopped(stubborn, number, code):
    command, workers = stubborn
    begin = time.monotonic()
    command.send_signal(number)
    assert command.wait(60) == code
    assert time.monotonic() - begin < 4
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    assert "The 2 workers are being stopped." in command.stderr.read()


def test_no_worker_is_left_when_the_command_is_killed(stubborn, tmp_path):
    command, workers = stubborn
    command.kill()
    command.wait()
    deadline = time.monotonic() + 10
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Who started this worker is gone." in (tmp_path / "worker_1.log").read_text()


def test_who_starts_the_same_command_meanwhile_is_refused(stubborn, tmp_path):
    command, _ = stubborn
    holder = rf"Received: {tmp_path}, where process {command.pid} on .* choose another `--output`"
    with pytest.raises(ValueError, match=holder):
        local_workers.run([sys.executable, "-c", "pass"], 2, tmp_path, restart=True)


def test_the_same_command_goes_on_at_once_after_it_was_killed(stubborn, tmp_path):
    command, _ = stubborn
    command.kill()
    assert local_workers.run([sys.executable, "-c", "pass"], 2, tmp_path) == 0
