"""Batch normalization for Keras on TensorFlow that trains fast, infers exactly and ships."""

from keras_bn._version import __version__
from keras_bn.exporting import export

__all__ = ["__version__", "export"]
