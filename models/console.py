"""What the commands of this folder share: a quiet start of TensorFlow."""

import os
import sys
import tempfile


def start_tensorflow() -> None:
    """Import TensorFlow without its messages about its build and missing GPUs.

    They are written by C++ before its log level can be set, so the process's stderr is put aside meanwhile. Where the
    import fails, what was put aside is shown.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            import keras  # noqa: F401
            import tensorflow as tf

            # The search for devices has messages of its own.
            tf.config.list_physical_devices()
        except BaseException:
            aside.seek(0)
            os.write(stderr, aside.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
