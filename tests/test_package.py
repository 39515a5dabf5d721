"""The package as a whole: what the wheel holds, who imports whom, what is public."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import keras_bn

ROOT = Path(__file__).resolve().parent.parent
# json_tensor is a room of several files.
LEAVES = {"errors", "json_tensor", "json_document", "json_numbers", "json_answer", "tensor_spec"}
SERVING_ORDER = ["rest_server grpc_server", "prediction_service", "model_repository", "servable"]


def _modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def _imports(path):
    """Every module that a file imports, at its top or inside a function, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imported(path, *packages):
    return sorted(name for name in _imports(path) if name.split(".")[0] in packages)


def test_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", keras_bn.__version__)


def test_public_names_are_sorted_and_there():
    assert keras_bn.__all__ == sorted(keras_bn.__all__)
    for name in keras_bn.__all__:
        assert getattr(keras_bn, name) is not None


@pytest.mark.parametrize("path", _modules("keras_bn"), ids=lambda path: path.stem)
def test_library_imports_neither_sibling(path):
    assert _imported(path, "models", "serving") == []


@pytest.mark.parametrize("path", _modules("models"), ids=lambda path: path.stem)
def test_networks_import_only_public_names_of_the_library(path):
    names = _imported(path, "keras_bn")
    assert [
        name for name in names if name.removeprefix("keras_bn.") not in keras_bn.__all__ and name != "keras_bn"
    ] == []


@pytest.mark.parametrize("path", _modules("serving"), ids=lambda path: path.stem)
def test_server_imports_neither_library_nor_networks_nor_keras(path):
    assert _imported(path, "keras_bn", "models", "keras", "tf_keras") == []


@pytest.mark.parametrize("path", _modules("keras_bn"), ids=lambda path: path.stem)
def test_layer_stands_on_kernels_and_statistics_only(path):
    above = {"population", "folding", "exporting", "drift", "conversion", "reporting", "cli"}
    below = {"fused", "plain", "inference", "native", "stand_ins", "statistics"}
    below |= {"layouts"}
    if path.stem in below | {"batch_normalization", "arguments", "modes"}:
        assert [name for name in _imported(path, "keras_bn") if above & set(name.split("."))] == []
    if path.stem in below:
        assert [name for name in _imported(path, "keras_bn") if "batch_normalization" in name.split(".")] == []


def test_server_modules_import_downwards_only():
    rank = {stem: level for level, stems in enumerate(SERVING_ORDER) for stem in stems.split()}
    for path in _modules("serving"):
        for name in _imported(path, "serving"):
            imported = name.split(".")[1] if "." in name else ""
            if path.stem in LEAVES:
                assert imported in LEAVES, f"{path.name} is a leaf and imports {name}"
            if path.stem in rank and imported in rank:
                assert rank[imported] > rank[path.stem], f"{path.name} imports {name}"


def _built_wheel(folder, **environment):
    """The wheel of a copy: a build leaves files behind that the next one takes."""
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "keras_bn", source / "keras_bn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", folder, source],
        check=True,
        capture_output=True,
        env=os.environ | environment,
    )
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_wheel_holds_one_package(tmp_path):
    names = _built_wheel(tmp_path).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"keras_bn"}
    assert "keras_bn/py.typed" in names
    assert all(name.endswith((".py", "py.typed", ".so")) for name in names if ".dist-info/" not in name)
    if any(shutil.which(compiler) for compiler in ("c++", "g++")):
        assert "keras_bn/ops/_operations.abi3.so" in names


def test_package_built_without_a_compiler_works(tmp_path):
    installed = tmp_path / "installed"
    _built_wheel(tmp_path, CC="/no/compiler", CXX="/no/compiler").extractall(installed)
    assert not list((installed / "keras_bn").glob("*.so"))
    program = """if True:
        import numpy as np, tensorflow as tf, keras_bn
        print(keras_bn.__file__)
        x = np.random.default_rng(0).normal(3, 2, (8, 4)).astype("float32")
        layer = keras_bn.BatchNormalization()
        for call in (layer, tf.function(layer)):
            y = call(x, training=True)
            print(np.abs(np.mean(y, 0)).max() < 1e-6, np.abs(np.std(y, 0) - 1).max() < 1e-3)
    """
    ran = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )
    path, *results = ran.stdout.splitlines()
    assert path.startswith(str(tmp_path))
    assert results == ["True True"] * 2


def test_submodules_import_on_their_own():
    for path in _modules("keras_bn"):
        if path.stem != "__main__":
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
