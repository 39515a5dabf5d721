"""Batch normalization for Keras on TensorFlow that trains fast, infers exactly and ships."""

from keras_bn._version import __version__

__all__ = ["__version__"]
