"""python -m serving: the embedded server's command."""

import logging
import os
import socket
import sys
import tempfile

from serving import options as command_line
from serving.config_files import read_model_configs
from serving.errors import ServingError
from serving.model_config import ModelConfig, check_base_path


def main() -> int:
    """Runs the server; returns the exit code."""
    try:
        options = command_line.parse(sys.argv[1:])
    except command_line.UsageError as error:
        return _fail(str(error), 2)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        if options.model_config_file:
            configs = read_model_configs(options.model_config_file)
        else:
            configs = [ModelConfig(options.model_name, os.path.abspath(options.model_base_path))]
        for config in configs:
            check_base_path(config)
        rest_socket = _bind(options.address, options.rest_api_port)
        _import_tensorflow_quietly()
        from serving.servable import LoadOptions
        from serving.server import ServerOptions, serve

        serve(
            configs,
            ServerOptions(
                rest_socket,
                options.rest_api_timeout_in_ms / 1000,
                options.file_system_poll_wait_seconds,
                options.allow_version_labels_for_unavailable_models,
                load=LoadOptions(
                    options.tensorflow_intra_op_parallelism,
                    options.tensorflow_inter_op_parallelism,
                ),
            ),
        )
    except ServingError as error:
        return _fail(error.message, 1)
    return 0


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.setblocking(False)
    except OSError as error:
        raise ServingError(f"Cannot listen on {host} port {port}: {error.strerror}.") from error
    return bound


def _import_tensorflow_quietly() -> None:
    """Imports TensorFlow with its start-up chatter, which no setting silences, kept from stderr unless it fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as chatter:
        os.dup2(chatter.fileno(), 2)
        try:
            import tensorflow as tf
        except BaseException:
            chatter.seek(0)
            os.write(stderr, chatter.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    tf.get_logger().setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
