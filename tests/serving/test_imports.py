"""Who may import whom inside `serving`, and what it may not import at all."""

import ast
from pathlib import Path

import pytest

import serving

FOLDER = Path(serving.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))
FORBIDDEN = {"keras_bn", "models", "keras", "tf_keras"}
# From the outside in; a module may import what stands below it, never what stands above.
LAYERS = [
    {"__main__"},
    {"server"},
    {"rest_server", "grpc_server"},
    {"rest_extras", "grpc_messages"},
    {"prediction_service"},
    {"model_repository", "batching", "loading"},
    {"examples"},
    {"servable"},
]
LEAVES = {"errors", "tensor_spec", "text_protos"}


def imported(module: str) -> set[str]:
    """The modules that one imports, ours by their last name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("serving.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "serving":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.removeprefix("serving."))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_saved_model_is_enough(module: str):
    assert not FORBIDDEN & {name.split(".")[0] for name in imported(module)}


@pytest.mark.parametrize("upper", range(len(LAYERS)))
def test_imports_point_inwards(upper: int):
    above = set().union(*LAYERS[:upper])
    for module in LAYERS[upper]:
        assert not imported(module) & above


@pytest.mark.parametrize("module", sorted(LEAVES))
def test_leaves_import_nothing_of_ours(module: str):
    assert not imported(module) & set(MODULES)


def test_json_modules_know_no_models_and_no_protocol():
    for module in MODULES:
        if module.startswith("json_"):
            assert not imported(module) & set().union(*LAYERS)
