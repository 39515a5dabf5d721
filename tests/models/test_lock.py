"""A folder that one process writes to: others are refused, who was killed is not in the way."""

import errno
import os
import subprocess
import sys

import pytest

from models import demo, lock, train
from models.experiments import __main__ as experiments

PROGRAM = """if True:
    import sys, time
    from pathlib import Path
    from models import lock
    with lock.held(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder `run`."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path / "run"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_another_process_is_refused_and_told_who_is_at_work(holder, tmp_path):
    message = rf"`output` must be .* Received: {tmp_path / 'run'}, where process {holder.pid} on .* another `--output`"
    with pytest.raises(ValueError, match=message), lock.held(tmp_path / "run"):
        pytest.fail("both write")
    assert (tmp_path / "run" / ".lock").exists()


def test_who_was_killed_is_not_in_the_way(holder, tmp_path):
    holder.kill()
    holder.wait()
    with lock.held(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_worker_writes_to_what_its_launcher_holds(holder, tmp_path):
    with lock.held(tmp_path / "run", launcher=holder.pid) as descriptor:
        assert descriptor is None
    assert (tmp_path / "run" / ".lock").exists()


def test_what_a_holder_has_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Between the opening of the file and its lock."""
    folder, flock, removed = tmp_path, lock.fcntl.flock, []

    def after_the_other_has_gone(descriptor, how):
        if not removed:
            (folder / ".lock").unlink()
            removed.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", after_the_other_has_gone)
    with lock.held(folder) as descriptor:
        assert os.path.samestat((folder / ".lock").stat(), os.fstat(descriptor))


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.held(tmp_path):
        assert f"{tmp_path} cannot be locked ([Errno {errno.ENOLCK}] No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (train, ["--restart"]),
        (train, ["--strategy", "workers", "--local_workers", "2", "--restart"]),
        (demo, []),
        (experiments, ["drift", "--quick"]),
        (experiments, ["--redraw"]),
    ],
)
def test_no_command_begins_in_a_folder_where_another_is_at_work(command, flags, holder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "start_tensorflow", lambda: pytest.fail("work has begun"))
    (tmp_path / "run" / "log.csv").write_text("of the other")
    with pytest.raises(SystemExit) as ended:
        command.main([*flags, "--output", str(tmp_path / "run")])
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"Received: {tmp_path / 'run'}, where process {holder.pid} " in last
    assert (tmp_path / "run" / "log.csv").read_text() == "of the other"
