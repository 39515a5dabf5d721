"""Batch normalization for Keras on TensorFlow that trains fast, infers exactly and ships."""

from keras_bn._version import __version__
from keras_bn.batch_normalization import BatchNormalization
from keras_bn.exporting import export
from keras_bn.folding import fold
from keras_bn.modes import freeze, unfreeze, use_statistics
from keras_bn.population import Recalibrate, recalibrate
from keras_bn.reporting import health

__all__ = [
    "BatchNormalization",
    "Recalibrate",
    "__version__",
    "export",
    "fold",
    "freeze",
    "health",
    "recalibrate",
    "unfreeze",
    "use_statistics",
]
