"""TensorFlow imported without its chatter about the machine, for commands whose stderr a person reads."""

import logging
import os
import tempfile


def import_tensorflow() -> None:
    """Imports TensorFlow; what it says meanwhile, which no setting silences, is kept from stderr unless it fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as chatter:
        os.dup2(chatter.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.list_physical_devices()  # The rest of it comes when a GPU is looked for.
        except Exception:  # Not where it was interrupted.
            chatter.seek(0)
            os.write(stderr, chatter.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    tf.get_logger().setLevel(logging.ERROR)
