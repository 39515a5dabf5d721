"""Reference networks, their data and their training: an application that uses the public `keras_bn` API alone."""
