"""The keras-bn command: what the library does, on files; and the server and its client."""

from keras_bn_cli.commands import main as main
