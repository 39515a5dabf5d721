"""Batch normalization for Keras on TensorFlow that trains fast, infers exactly and ships."""

import sys
from pathlib import Path

from keras_bn._version import __version__

# The command answers `--help` at once, without the seconds that importing TensorFlow takes: its parts import what they
# need themselves. Anyone else gets all names, and Keras gets to know the layer, so that it loads files that name it.
if Path(sys.argv[0] if sys.argv else "").stem != "keras-bn":
    from keras_bn.batch_normalization import BatchNormalization
    from keras_bn.conversion import convert, load_tf_keras_weights, load_torch_weights, revert
    from keras_bn.exporting import export
    from keras_bn.folding import fold
    from keras_bn.modes import freeze, unfreeze, use_statistics
    from keras_bn.population import Recalibrate, recalibrate
    from keras_bn.reporting import health

__all__ = [
    "BatchNormalization",
    "Recalibrate",
    "__version__",
    "convert",
    "export",
    "fold",
    "freeze",
    "health",
    "load_tf_keras_weights",
    "load_torch_weights",
    "recalibrate",
    "revert",
    "unfreeze",
    "use_statistics",
]
