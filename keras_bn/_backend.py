"""Keras has to compute with TensorFlow: said when the package is imported, and not in the first step."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_bn needs Keras to compute with TensorFlow: set the environment variable KERAS_BACKEND=tensorflow, or "
        f'"backend" in ~/.keras/keras.json, before Keras is imported. Received: backend {keras.backend.backend()!r}.'
    )
