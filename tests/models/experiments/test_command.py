"""The command: arguments, what is kept, what a killed run leaves, and the page that says what the JSON says."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from models import experiments
from models.experiments import __main__ as command
from models.experiments import page, runs

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["drifting"], r"NAME must be one of drift, .*, or all\. Received: drifting"),
        ([], r"name what to run: drift, .*--redraw"),
        (["all", "--redraw"], r"--redraw draws all there is and takes no NAME\. Received: all"),
        (["--again", "--redraw"], r"--redraw draws a second run too, and --again makes one"),
        (
            ["drift", "why", "--again", "--output", "nowhere"],
            r"no first run with 3 seeds of drift, why\. Run it without",
        ),
        (["drift", "--seeds", "0"], r"`--seeds` must be at least 1\. Received: 0"),
        (["drift", "--dataset", "imagenet"], r"invalid choice: 'imagenet'"),
        (["drift", "--dataset", "mnist", "--data", "x"], r"--data is where fashion_mnist is.* Received: mnist"),
        (["drift", "--output", __file__], r"`--output` must be a folder, or nothing yet\. Received: .*which is a file"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_run(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "start_tensorflow", lambda: pytest.fail("work has begun"))
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_images_are_looked_for_where_the_flag_says(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["drift", "--quick", "--data", str(tmp_path / "away"), "--output", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert str(tmp_path / "away") in capsys.readouterr().err


def test_nothing_to_draw_is_an_error_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--redraw", "--output", str(tmp_path)])
    assert ended.value.code == 1
    assert "must hold results of the setting full on fashion_mnist" in capsys.readouterr().err


def _files(folder):
    return sorted(path.name for path in folder.glob("*.json"))


SMALL = {"steps": 40, "every": 20, "test_images": 100}
SCRIPT = f"""
import dataclasses, sys
from models.experiments import __main__ as command, drift
drift.QUICK = dataclasses.replace(drift.QUICK, **{SMALL})
command.main(sys.argv[1:])
"""


def _records(folder):
    return [runs.without_times(json.loads((folder / name).read_text())) for name in _files(folder)]


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not_killed(tmp_path, fashion_mnist, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["drift", "--quick", "--seeds", "2", "--output"]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments, str(killed)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # Not the half of it that is being written.
        while process.poll() is None and not (killed / "results" / "drift-quick-fashion_mnist-0.json").exists():
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert _files(killed / "results") == ["drift-quick-fashion_mnist-0.json"]
    assert not (killed / "README.md").exists()
    before = (killed / "results" / "drift-quick-fashion_mnist-0.json").read_bytes()
    module = experiments.load("drift")
    monkeypatch.setattr(module, "QUICK", dataclasses.replace(module.QUICK, **SMALL))
    for folder in (killed, whole):
        command.main([*arguments, str(folder)])
    assert _files(killed / "results") == _files(whole / "results")
    assert len(_records(whole / "results")) == 2
    assert _records(killed / "results") == _records(whole / "results")
    assert (killed / "results" / "drift-quick-fashion_mnist-0.json").read_bytes() == before


def test_a_second_run_is_kept_beside_the_first_and_compared(tmp_path, fashion_mnist, monkeypatch):
    module = experiments.load("drift")
    monkeypatch.setattr(module, "QUICK", dataclasses.replace(module.QUICK, **SMALL))
    arguments = ["drift", "--quick", "--output", str(tmp_path)]
    command.main(arguments)
    first = (tmp_path / "results" / "drift-quick-fashion_mnist-0.json").read_bytes()
    assert "A second run" not in (tmp_path / "README.md").read_text()
    command.main([*arguments, "--again"])
    assert (tmp_path / "results" / "drift-quick-fashion_mnist-0.json").read_bytes() == first
    assert _files(tmp_path / "again") == _files(tmp_path / "results")
    assert re.search(r"^\| drift \| 4 of 4 \| ", (tmp_path / "README.md").read_text(), re.MULTILINE)


def test_the_page_says_which_outcomes_a_second_run_does_not_share(committed):
    shutil.rmtree(committed.again.folder, ignore_errors=True)
    shutil.copytree(committed.folder, committed.again.folder)
    results = page.collect(committed)
    text = page.text(committed, results)
    claims = len([line for line in text.splitlines() if re.match(r"- \*\*", line)])
    assert f"{claims} of {claims} outcomes are the same" in text
    assert re.search(r"^\| drift \| 4 of 4 \| ([\d,]+) of \1 \|", text, re.MULTILINE)
    assert "In the second run" not in text
    for seed in range(3):
        path = committed.again.path("drift", seed)
        record = json.loads(path.read_text())
        record["numbers"]["with"]["drift"] = 2 * record["numbers"]["without"]["drift"]
        path.write_text(json.dumps(record))
    text = page.text(committed, results)
    assert f"{claims - 1} of {claims} outcomes are the same" in text
    assert "| drift | 3 of 4 |" in text
    told = [line for line in text.splitlines() if "**In the second run did not hold**" in line]
    assert len(told) == 1
    assert told[0].startswith("- **Held**: with batch norm the distribution")


def test_a_second_run_that_was_interrupted_is_not_compared(committed):
    shutil.rmtree(committed.again.folder, ignore_errors=True)
    shutil.copytree(committed.folder, committed.again.folder)
    committed.again.path("drift", 2).unlink()
    text = page.text(committed, page.collect(committed))
    assert not re.search(r"^\| drift \| \d of \d \|", text, re.MULTILINE)
    assert re.search(r"^\| why \| 5 of 5 \|", text, re.MULTILINE)


def test_results_of_other_images_are_not_gone_on_with(tmp_path, fashion_mnist, monkeypatch, capsys):
    module = experiments.load("drift")
    monkeypatch.setattr(module, "QUICK", dataclasses.replace(module.QUICK, **SMALL))
    parts = {name: getattr(fashion_mnist, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(tmp_path / "mine.npz", **parts)
    arguments = ["drift", "--quick", "--data", str(tmp_path / "mine.npz"), "--output", str(tmp_path / "out")]
    command.main(arguments)
    assert _files(tmp_path / "out" / "results") == ["drift-quick-mine-0.json"]
    assert "Data: mine." in (tmp_path / "out" / "README.md").read_text()
    command.main(arguments)
    np.savez(tmp_path / "mine.npz", **{**parts, "y_train": 9 - fashion_mnist.y_train})
    for again in ([], ["--again"]):
        with pytest.raises(SystemExit) as ended:
            command.main([*arguments, *again])
        assert ended.value.code == 1
        assert (
            "must hold runs on the same images. Received: others than those of drift, seed 0" in capsys.readouterr().err
        )


def test_numbers_of_two_records_are_counted_where_they_are_equal():
    first = {"a": [1.0, None, 3], "b": {"c": "x"}}
    assert runs.equal_numbers(first, first) == (4, 4)
    assert runs.equal_numbers(first, {"a": [1.0, 2.0, 4], "b": {"c": "x"}}) == (2, 4)
    with pytest.raises(ValueError, match="shorter"):
        runs.equal_numbers(first, {"a": [1.0], "b": {"c": "x"}})
    with pytest.raises(KeyError):
        runs.equal_numbers(first, {"a": [1.0, None, 3]})


def test_a_run_of_another_setting_is_done_again(tmp_path):
    module = experiments.load("drift")
    plan = runs.Plan("quick", "fashion_mnist", tmp_path)
    assert runs.pending(plan, "drift", module.QUICK, range(2)) == [0, 1]
    for seed, setting in enumerate((module.QUICK, module.FULL)):
        plan.path("drift", seed).write_text(json.dumps({"setting": runs.described(setting)}))
    assert runs.pending(plan, "drift", module.QUICK, range(3)) == [1, 2]


def test_results_of_different_settings_are_not_put_together(tmp_path):
    module = experiments.load("drift")
    plan = runs.Plan("full", "fashion_mnist", tmp_path)
    for seed, setting in enumerate((module.QUICK, module.FULL)):
        plan.path("drift", seed).write_text(json.dumps({"seed": seed, "setting": runs.described(setting)}))
    with pytest.raises(ValueError, match=r"must be of one setting\. Those of seeds 1 differ from that of seed 0"):
        plan.records("drift")


def test_a_run_that_fails_leaves_no_file(tmp_path):
    class Failing:
        @staticmethod
        def run(setting, images, seed, tick):
            raise ValueError("in the middle")

    plan = runs.Plan("quick", "fashion_mnist", tmp_path)
    setting = experiments.load("drift").QUICK
    with pytest.raises(ValueError, match="in the middle"):
        runs.perform(plan, "drift", Failing, setting, None, 0, lambda: None)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def committed(tmp_path):
    """The committed results, copied."""
    for folder in ("results", "again"):
        shutil.copytree(ROOT / "docs" / "experiments" / folder, tmp_path / folder)
    return runs.Plan("full", "fashion_mnist", tmp_path / "results")


def test_the_committed_page_is_the_one_that_its_results_give(committed):
    written = (ROOT / "docs" / "experiments" / "README.md").read_text()
    assert page.text(committed, page.collect(committed)) == written


def test_every_experiment_on_the_page_has_results_of_three_seeds_and_a_figure(committed):
    results = page.collect(committed)
    assert [result.name for result in results] == list(experiments.NAMES)
    for result in results:
        assert committed.seeds(result.name)[:3] == [0, 1, 2]
        assert (ROOT / "docs" / "experiments" / f"{result.name}.png").stat().st_size > 10_000


def test_the_committed_results_are_those_of_the_settings(committed):
    for result in page.collect(committed):
        assert runs.pending(committed, result.name, result.module.FULL, range(3)) == []
    assert sum(path.stat().st_size for path in committed.folder.iterdir()) < 3e6


def test_a_number_that_changes_in_the_json_changes_on_the_page(committed):
    results, changed = page.collect(committed), page.collect(committed)
    drift = next(result for result in changed if result.name == "drift")
    for record in drift.records:
        record["numbers"]["with"]["drift"] *= 1000
    before, after = (page.text(committed, each) for each in (results, changed))
    assert before != after
    row = next(line for line in after.splitlines() if line.startswith("| batch norm |"))
    mean = sum(record["numbers"]["with"]["drift"] for record in drift.records) / len(drift.records)
    assert f"{mean:.3g}" in row


def test_redrawing_needs_no_training_and_writes_the_same_files(committed):
    output = committed.folder.parent
    command.main(["--redraw", "--output", str(output)])
    for path in (ROOT / "docs" / "experiments").glob("*.md"):
        assert (output / path.name).read_text() == path.read_text()
    drawn = [path.name for path in (ROOT / "docs" / "experiments").glob("*.png")]
    assert sorted(path.name for path in output.glob("*.png")) == sorted(drawn)


def test_where_stderr_is_no_terminal_each_tenth_is_a_line_and_nothing_is_redrawn(capsys):
    with command._bar(30) as bar:
        bar.set_description("drift, seed 0")
        for _ in range(300):
            bar.update(0.1)
    said = capsys.readouterr().err
    assert "\r" not in said
    assert [line.split(",")[1] for line in said.splitlines()] == [f" seed 0: {10 * n} %" for n in range(1, 11)]
