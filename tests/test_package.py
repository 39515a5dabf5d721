"""The package as a whole: what the wheel holds, who imports whom, what is public."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import keras
import pytest

import keras_bn
from tests import wheel

ROOT = Path(__file__).resolve().parent.parent


SERVER = "serving/keras_bn_serving"


def _modules(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _id(path):
    return str(path.relative_to(ROOT))


def _room(path, package):
    """The folder or file below a package that a path or a dotted name is in."""
    parts = path.relative_to(ROOT / package).with_suffix("").parts if isinstance(path, Path) else path.split(".")[1:]
    return parts[0] if parts else "__init__"


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


@pytest.mark.parametrize("path", _modules("keras_bn"), ids=_id)
def test_library_imports_neither_sibling(path):
    assert _imported(path, "models", "serving", "keras_bn_serving", "keras_bn_cli") == []


@pytest.mark.parametrize("path", _modules("models"), ids=_id)
def test_networks_import_only_public_names_of_the_library_and_the_client(path):
    names = [name.removeprefix("keras_bn.") for name in _imported(path, "keras_bn") if name != "keras_bn"]
    assert set(names) <= set(keras_bn.__all__)
    served = list(_imported(path, "serving", "keras_bn_serving"))
    assert [
        name for name in served if not name.startswith(("keras_bn_serving.client", "keras_bn_serving.errors"))
    ] == []


@pytest.mark.parametrize("path", _modules("examples"), ids=_id)
def test_examples_import_only_public_names_the_client_and_the_data(path):
    allowed = {f"keras_bn.{name}" for name in keras_bn.__all__} | {"keras_bn", "models.data"}
    packages = ("keras_bn", "keras_bn_cli", "keras_bn_serving", "models", "serving", "tests", "benchmarks", "examples")
    names = [name for name in _imported(path, *packages) if not name.startswith("keras_bn_serving.client.")]
    assert set(names) <= allowed


@pytest.mark.parametrize("path", _modules("examples"), ids=_id)
def test_examples_can_be_read_at_once(path):
    assert len(path.read_text().splitlines()) < 120


@pytest.mark.parametrize("path", _modules(SERVER), ids=_id)
def test_server_imports_neither_library_nor_networks_nor_keras(path):
    assert _imported(path, "keras_bn", "keras_bn_cli", "models", "keras", "tf_keras", "serving") == []


# From the ground up: what stands in a line may import what stands in the same line or before it.
LIBRARY_FLOORS = [
    {"_version", "names", "tables", "warning"},
    {"ops", "statistics", "masks"},
    {"arguments", "updates"},
    {"layer"},
    {"model", "modes"},
    {"configuration", "examples", "inference", "state"},
    {"drift", "cloning"},
    {"population"},
    {"health", "folding", "conversion"},
    {"exporting"},
    {"__init__"},
]
SERVER_FLOORS = [
    {"errors", "quiet", "request_ids", "sizes"},
    {"codec"},
    {"config", "engine"},
    {"rest", "rpc"},
    {"client", "run"},
    {"__main__", "__init__"},
]


@pytest.mark.parametrize(
    ("package", "floors"), [("keras_bn", LIBRARY_FLOORS), (SERVER, SERVER_FLOORS)], ids=["library", "server"]
)
def test_files_import_from_their_own_floor_and_below(package, floors):
    floor = {room: number for number, rooms in enumerate(floors) for room in rooms}
    for path in _modules(package):
        for name in _imported(path, Path(package).name):
            room, imported = _room(path, package), _room(name, package)
            if imported not in floor:  # A public name, or the package.
                imported = "_version" if name.endswith("__version__") else "__init__"
            assert floor[imported] <= floor[room], f"{_id(path)} imports {name}"


def test_protocols_and_client_do_not_know_each_other():
    for one, others in (
        ("rest", {"rpc", "client"}),
        ("rpc", {"rest", "client"}),
        ("client", {"rest", "rpc", "engine"}),
    ):
        for path in _modules(f"{SERVER}/{one}"):
            for name in _imported(path, "keras_bn_serving"):
                assert _room(name, SERVER) not in others, f"{_id(path)} imports {name}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    wheel.build(folder)
    return folder


def test_wheel_holds_library_command_and_server(built):
    (path,) = built.glob("*.whl")
    names = zipfile.ZipFile(path).namelist()
    ours = [name for name in names if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in ours} == {"keras_bn", "keras_bn_cli", "keras_bn_serving"}
    assert "keras_bn/py.typed" in names
    modules = {
        str(path.relative_to(ROOT)).removeprefix("serving/") for path in _modules("keras_bn", "keras_bn_cli", SERVER)
    }
    assert {name for name in ours if name.endswith(".py")} == modules
    page = {f"keras_bn_serving/rest/page/{path.name}" for path in (ROOT / SERVER / "rest" / "page").iterdir()}
    assert {path.rsplit(".", 1)[1] for path in page} == {"html", "css", "js"}
    assert page == {name for name in ours if not name.endswith((".py", "py.typed", ".so"))}
    if any(shutil.which(compiler) for compiler in ("c++", "g++")):
        assert "keras_bn/ops/_operations.abi3.so" in names


def test_sdist_holds_what_the_compiled_operations_are_made_of_and_the_server(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    sources = {_id(path) for suffix in ("cc", "h") for path in (ROOT / "keras_bn").rglob(f"*.{suffix}")}
    assert sources != set()
    assert sources | {_id(path) for path in _modules("keras_bn", SERVER)} <= names
    assert f"{SERVER}/rest/page/index.html" in names


@pytest.mark.slow
def test_package_built_without_a_compiler_says_so_in_a_line_and_works(tmp_path):
    said = wheel.build(tmp_path, CC="/no/compiler", CXX="/no/compiler")
    (line,) = [line for line in said.splitlines() if "compiled operations" in line]
    assert line.startswith("keras_bn goes without its compiled operations, only slower on a CPU: ")
    installed = tmp_path / "installed"
    (path,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(path).extractall(installed)
    assert not list((installed / "keras_bn").rglob("*.so"))
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


@pytest.mark.slow
def test_the_wheel_alone_does_what_readme_and_start_page_say(built):
    said = wheel.check(wheel.repair(built), sys.executable)
    assert "the wheel does what README and docs/start.md say." in said


@pytest.mark.slow
@pytest.mark.parametrize("path", _modules("keras_bn", SERVER), ids=_id)
def test_submodules_import_on_their_own(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("serving.").removesuffix(".__init__")
    if not name.endswith("__main__"):
        subprocess.run([sys.executable, "-c", f"import {name}"], check=True, capture_output=True, cwd=ROOT)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_another_backend_of_keras_is_named_when_the_package_is_imported(backend, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    with pytest.raises(ImportError, match=f"KERAS_BACKEND=tensorflow.*Received: backend '{backend}'"):
        importlib.reload(keras_bn._backend)
