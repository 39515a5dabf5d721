"""Batch normalization for Keras on TensorFlow that trains fast, infers exactly and ships."""

from keras_bn._version import __version__
from keras_bn.batch_normalization import BatchNormalization

__all__ = ["BatchNormalization", "__version__"]
