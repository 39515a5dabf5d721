"""Asks a model server, this one or TensorFlow Serving, over REST or gRPC: NumPy in, NumPy out."""

from keras_bn_serving.client.asynchronous import AsyncClient
from keras_bn_serving.client.blocking import Client
from keras_bn_serving.client.types import ModelVersion, Retry

__all__ = ["AsyncClient", "Client", "ModelVersion", "Retry"]
