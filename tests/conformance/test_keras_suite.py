"""Keras's own tests of its layer, as the installed wheel ships them, run on ours."""

import importlib.util

import keras
import pytest
from keras.src import backend, layers

import keras_bn

_SUITE = "keras.src.layers.normalization.batch_normalization_test"


class _BackendName(str):
    """Equals "tensorflow" and can be called: upstream compares the function with the name, so that half of one test
    never runs there."""

    def __call__(self):
        return str(self)


def _load_suite():
    spec = importlib.util.find_spec(_SUITE)
    module = importlib.util.module_from_spec(spec)
    original = backend.backend
    backend.backend = _BackendName(original())
    try:
        spec.loader.exec_module(module)
    finally:
        backend.backend = original
    return module


class TestKerasSuite(_load_suite().BatchNormalizationTest):
    @pytest.fixture(autouse=True)
    def _our_layer(self, monkeypatch):
        calls = []

        monkeypatch.setattr(layers, "BatchNormalization", keras_bn.BatchNormalization)
        original = keras_bn.BatchNormalization.__init__

        def counted(layer, *args, **kwargs):
            calls.append(layer)
            original(layer, *args, **kwargs)

        monkeypatch.setattr(keras_bn.BatchNormalization, "__init__", counted)
        yield
        assert calls, "the test did not make our layer"


def test_upstream_suite_includes_the_synchronized_branch():
    fully_masked = [name for name in dir(TestKerasSuite) if name.startswith("test_input_fully_masked")]
    assert len(fully_masked) == 2


def test_upstream_suite_is_that_of_the_installed_keras():
    assert importlib.util.find_spec(_SUITE).origin.startswith(str(keras.__path__[0]))
