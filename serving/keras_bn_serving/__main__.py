"""keras-bn serve, or python -m keras_bn_serving: the embedded server's command."""

import logging
import os
import socket
import sys
from collections.abc import Sequence
from importlib import metadata
from types import SimpleNamespace

from keras_bn_serving import request_ids
from keras_bn_serving.config import files as config_files
from keras_bn_serving.config import flags as command_line
from keras_bn_serving.config.models import ModelConfig, check_base_path
from keras_bn_serving.errors import NotFoundError, ServingError, UnavailableError
from keras_bn_serving.quiet import import_tensorflow

_INSTALL = "python -m pip install 'keras-bn[serving]'"


def main(arguments: Sequence[str] | None = None, program: str = "python -m keras_bn_serving") -> int:
    """Runs the server; returns the exit code.

    Args:
        arguments: The flags; those of the process where left out.
        program: What the person typed before them, for the help.
    """
    handler = logging.StreamHandler()
    handler.addFilter(request_ids.Marking())
    format = "%(asctime)s %(levelname)s %(name)s%(request)s: %(message)s"
    logging.basicConfig(format=format, level=logging.WARNING, handlers=[handler])
    try:
        options = command_line.parse(sys.argv[1:] if arguments is None else arguments, program)
    except command_line.UsageError as error:
        return _fail(str(error), 2)
    if options.version:
        print(f"Embedded model server, TensorFlow {metadata.version('tensorflow')}")
        return 0
    logging.getLogger("keras_bn_serving").setLevel(options.log_level)
    if options.log_requests:
        logging.getLogger("keras_bn_serving.requests").setLevel(logging.INFO)
    try:
        _serve(options)
    except ServingError as error:
        return _fail(error.message, 1)
    except KeyboardInterrupt:  # Before the server listens for it.
        return _fail("Interrupted.", 130)
    except ModuleNotFoundError as error:
        return _fail(f"The server needs {error.name}, which is not installed: {_INSTALL}", 1)
    return 0


def _serve(options: SimpleNamespace) -> None:
    configs = _read_configs(options)
    for config in configs:
        try:
            check_base_path(config)
        except NotFoundError:
            if not options.wait_for_models:
                raise
    rest_socket = _bind(options.address, options.rest_api_port) if options.rest_api_port else None
    if options.port:
        # gRPC opens its port itself, once the models are loaded; a taken one should not take that long to tell.
        _bind(options.address, options.port).close()
    metrics_path = config_files.read_metrics_path(options.monitoring_config_file)
    import_tensorflow()
    from keras_bn_serving.config.settings import read_batching, read_credentials
    from keras_bn_serving.engine.grouping import BatchingOptions
    from keras_bn_serving.engine.loading import Loader
    from keras_bn_serving.engine.machine import usable_cores, usable_memory
    from keras_bn_serving.engine.servable import LoadOptions
    from keras_bn_serving.rest.hosts import AllowedHosts
    from keras_bn_serving.rest.server import RestOptions
    from keras_bn_serving.run import ServerOptions, serve

    batching: BatchingOptions | None = BatchingOptions()
    if options.enable_batching is not None:
        batching = read_batching(options.batching_parameters_file) if options.enable_batching else None
    host = f"[{options.address}]" if ":" in options.address else options.address
    addresses = [f"{host}:{0 if options.port == command_line.AUTO else options.port}"] if options.port else []
    if options.grpc_socket_path:
        addresses.append(f"unix:{options.grpc_socket_path}")
    run_memory = usable_memory() // 4 if options.run_memory_in_mb is None else options.run_memory_in_mb * 2**20
    runs = usable_cores() if batching is None else batching.num_batch_threads
    memory = {} if options.request_memory_in_mb is None else {"request_memory": options.request_memory_in_mb * 2**20}
    serve(
        configs,
        ServerOptions(
            rest_socket,
            tuple(addresses),
            read_credentials(options.ssl_config_file),
            options.rest_api_timeout_in_ms / 1000,
            options.file_system_poll_wait_seconds,
            (lambda: _read_configs(options)) if options.model_config_file else None,
            options.model_config_file_poll_wait_seconds,
            options.allow_version_labels_for_unavailable_models,
            options.wait_for_models,
            options.enable_model_management,
            options.drain_timeout_in_ms / 1000,
            batching=batching,
            loader=Loader(
                LoadOptions(
                    options.tensorflow_intra_op_parallelism,
                    options.tensorflow_inter_op_parallelism,
                    options.xla_cpu_compilation_enabled,
                    options.rest_api_timeout_in_ms / 1000,
                    run_memory // runs,
                ),
                options.enable_model_warmup,
                options.num_request_iterations_for_warmup,
                options.max_num_load_retries,
                options.load_retry_interval_micros / 1e6,
                batching=batching,
            ),
            rest=RestOptions(
                options.rest_api_enable_cors_support,
                options.rest_api_list_models,
                metrics_path,
                options.rest_api_num_threads,
                options.log_requests,
                options.enable_page,
                AllowedHosts(options.allowed_hosts, options.address),
            ),
            **memory,
        ),
    )


def _read_configs(options: SimpleNamespace) -> list[ModelConfig]:
    if options.model_config_file:
        return config_files.read_model_configs(options.model_config_file)
    return [ModelConfig(options.model_name, os.path.abspath(options.model_base_path))]


def _fail(message: str, code: int) -> int:
    print("Error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _bind(host: str, port: int) -> socket.socket:
    try:
        number = 0 if port == command_line.AUTO else port
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.setblocking(False)
    except OSError as error:
        where = "any port" if port == command_line.AUTO else f"port {port}"
        raise UnavailableError(f"Cannot listen on {host}, {where}: {error.strerror}.") from error
    return bound


if __name__ == "__main__":
    sys.exit(main())
