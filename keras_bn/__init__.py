"""Batch normalization for Keras on TensorFlow that trains fast, infers exactly and ships."""

from keras_bn import _backend as _backend  # Before all that needs TensorFlow.
from keras_bn._version import __version__
from keras_bn.conversion import convert, load_tf_keras_weights, load_torch_weights, revert
from keras_bn.drift import drift
from keras_bn.exporting import export
from keras_bn.folding import fold
from keras_bn.health import health
from keras_bn.layer import BatchNormalization
from keras_bn.modes import freeze, unfreeze, use_statistics
from keras_bn.ops import compiled
from keras_bn.population import apply_statistics, measure, recalibrate
from keras_bn.population.callback import Recalibrate
from keras_bn.population.moments import Moments

__all__ = [
    "BatchNormalization",
    "Moments",
    "Recalibrate",
    "__version__",
    "apply_statistics",
    "compiled",
    "convert",
    "drift",
    "export",
    "fold",
    "freeze",
    "health",
    "load_tf_keras_weights",
    "load_torch_weights",
    "measure",
    "recalibrate",
    "revert",
    "unfreeze",
    "use_statistics",
]
