"""docs/scale.md: its code runs as it is printed, its numbers are those that were measured, its files are there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml

import keras_bn
from benchmarks import measuring, replicas
from models import data
from tests import pages, worker_processes

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/scale.md").read_text()


def _blocks(language):
    return [block.code for block in pages.blocks("docs/scale.md", language)]


def _statistics(model):
    norms = [layer for layer in model.layers if isinstance(layer, keras_bn.BatchNormalization)]
    return [value.numpy() for norm in norms for value in (norm.moving_mean, norm.moving_variance)]


def _check_recalibrated(model, x):
    """Its statistics are those that one process measures, which leaves it with them."""
    found = _statistics(model)
    keras_bn.recalibrate(model, x, verbose=0)
    for ours, theirs in zip(found, _statistics(model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_loop_trains_as_workers_and_saves_a_model_with_the_statistics_of_all_shares(tmp_path):
    loop = _blocks("python")[0]
    (tmp_path / "loop.py").write_text(loop)
    worker_processes.run(tmp_path / "loop.py", 2, tmp_path)
    names = {"np": np}
    exec(next(line for line in loop.splitlines() if line.startswith("images = ")), names)
    _check_recalibrated(keras.models.load_model(tmp_path / "model.keras"), names["images"])


def test_the_other_blocks_run_one_after_the_other():
    loop, *others = _blocks("python")
    names = {}
    exec("\n".join(line for line in loop.splitlines() if line.startswith("import ")), names)
    for block in others:
        exec(compile(block, "docs/scale.md", "exec"), names)
        _check_recalibrated(names["model"], names["x"])


@pytest.mark.slow
def test_the_commands_train_the_same_network_in_three_ways(tmp_path):
    try:
        data.load()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    commands, _ = _blocks("sh")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "serving"))),
    }
    done = subprocess.run(["sh", "-e", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, mirrored, workers = (
        keras.models.load_model(tmp_path / "runs" / name / "model.keras") for name in ("one", "mirrored", "workers")
    )
    for network in (mirrored, workers):
        for ours, theirs in zip(network.weights, one.weights, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-3, err_msg=ours.path)


def test_what_the_commands_for_kubernetes_name_is_there():
    _, commands = _blocks("sh")
    (target,) = re.findall(r"--target (\S+)", commands)
    (folder,) = re.findall(r"--kustomize (\S+)", commands)
    (pod,) = re.findall(r"--follow (\S+)", commands)
    assert re.search(rf"^FROM \S+ AS {target}$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert (ROOT / folder / "kustomization.yaml").exists()
    assert pod == f"{yaml.safe_load((ROOT / folder / 'tfjob.yaml').read_text())['metadata']['name']}-chief-0"


def test_the_table_is_of_what_was_measured():
    rows = json.loads((measuring.RESULTS / "replicas.json").read_text())["rows"]
    assert f"<!-- benchmarks.replicas -->\n{replicas.page_table(rows)}\n<!-- end -->" in PAGE
