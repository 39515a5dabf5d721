"""The README's code runs as it is printed."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def server_of(tmp_path):
    """Starts the README's server command on a free port; returns that port."""
    running = []

    def start(command):
        words = command.replace("8501", "0").split()
        assert words[:3] == ["python", "-m", "keras_bn_serving"]
        log = tmp_path / "server.log"
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        with log.open("w") as output:
            running.append(
                subprocess.Popen(
                    [sys.executable, *words[1:]], cwd=tmp_path, stdout=output, stderr=output, env=environment
                )
            )
        while running[0].poll() is None:
            found = re.search(r"REST at http://[^:]+:(\d+)", log.read_text())
            if found:
                return found[1]
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    yield start
    for process in running:
        process.terminate()
        process.wait(30)


def test_python_of_the_readme_runs_from_layer_to_answer(tmp_path, monkeypatch, capsys, server_of):
    monkeypatch.chdir(tmp_path)
    *before, query = _blocks("python")
    assert "export" in before[-1]
    names = {}
    for block in before:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "served/digits/1/saved_model.pb").exists()
    (command,) = [block for block in _blocks("sh") if "-m keras_bn_serving" in block]
    port = server_of(command)
    exec(compile(query.replace("8501", port), "README.md", "exec"), names)
    assert capsys.readouterr().out.rstrip().endswith("(3, 10)")


def test_commands_of_the_readme_are_targets_of_make():
    makefile = (ROOT / "Makefile").read_text()
    targets = {target for block in _blocks("sh") for target in re.findall(r"^make (\S+)", block, re.MULTILINE)}
    assert targets == {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
