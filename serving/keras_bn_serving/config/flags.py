"""The flags of `keras-bn serve`, named as tensorflow_model_server names them."""

import argparse
import difflib
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from keras_bn_serving.config.foreign_flags import REFUSED, WITHOUT_EFFECT
from keras_bn_serving.engine.machine import usable_cores

_log = logging.getLogger(__name__)

_TRUE = ("true", "1", "t", "yes", "y")
_FALSE = ("false", "0", "f", "no", "n")
_DEFAULT_GRPC_PORT = 8500
# Of a port: any that is free.
AUTO = -1
# A name or an address, that of IPv6 in brackets or without.
_HOST = re.compile(r"\*|[a-z0-9._-]+|\[?[0-9a-f.]*(:[0-9a-f.]*){2,}\]?", re.IGNORECASE)
_LEVELS = ("debug", "info", "warning", "error")


class UsageError(Exception):
    """A command line that cannot be understood; the message is one line for the person who typed it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message[:1].upper() + message[1:])


def parse(arguments: Sequence[str], program: str = "python -m keras_bn_serving") -> argparse.Namespace:
    """Reads the command line. Flags of TensorFlow Serving that change no answer are taken with a warning.

    Args:
        arguments: The flags.
        program: What stands before them, for the help.

    Raises:
        UsageError: For an unknown flag, naming the nearest one, for a bad value, or for a flag of TensorFlow Serving
            that asks for what is not done here, naming what is.
    """
    parser = _make_parser(program)
    options, unknown = parser.parse_known_args(arguments)
    for argument in unknown:
        name = argument.split("=")[0]
        known = [
            flag for action in parser._actions if action.help != argparse.SUPPRESS for flag in action.option_strings
        ]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]}?" if nearest else " See --help for all flags."
        raise UsageError(f"Unknown flag {name}.{hint}")
    _answer_foreign(options)
    if options.tensorflow_session_parallelism:
        for name in ("tensorflow_intra_op_parallelism", "tensorflow_inter_op_parallelism"):
            setattr(options, name, getattr(options, name) or options.tensorflow_session_parallelism)
    if not options.version and not options.model_base_path and not options.model_config_file:
        raise UsageError("Name a model by --model_base_path=FOLDER, or several by --model_config_file=FILE.")
    if options.batching_parameters_file and not options.enable_batching:
        raise UsageError("--batching_parameters_file needs --enable_batching.")
    if options.port is None:
        options.port = AUTO if options.rest_api_port == AUTO else _DEFAULT_GRPC_PORT
    if options.port == options.rest_api_port not in (0, AUTO):
        raise UsageError(f"--port and --rest_api_port must differ. Received: {options.port} for both.")
    if not options.version and not options.rest_api_port and not options.port and not options.grpc_socket_path:
        raise UsageError("--rest_api_port=0 and --port=0 leave no way to ask. Give one of them a port, or auto.")
    return options


def _make_parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description="Serves SavedModels over TensorFlow Serving's protocol, REST and gRPC.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    add = _adder(parser, "which models")
    add("--model_name", str, "default", "name of the one model", "NAME")
    add("--model_base_path", str, "", "folder of its numbered versions", "FOLDER")
    add("--model_config_file", str, "", "ModelServerConfig as text proto, for several models", "FILE")
    add("--model_config_file_poll_wait_seconds", _number(float, 0), 0.0, "reread it so often; 0 never", "SECONDS")
    add("--file_system_poll_wait_seconds", _number(float, 0), 1.0, "look for versions so often; 0 once", "SECONDS")
    add("--wait_for_models", _boolean, False, "wait for base paths and versions that are not there yet", "BOOL")
    add("--allow_version_labels_for_unavailable_models", _boolean, False, "let labels name unloaded versions", "BOOL")
    add("--max_num_load_retries", _number(int, 0), 0, "tries after a failed one", "COUNT")
    add("--load_retry_interval_micros", _number(int, 0), 60_000_000, "time between tries", "MICROS")
    add("--enable_model_warmup", _boolean, True, "run the warm-up requests that a version brings", "BOOL")
    add("--num_request_iterations_for_warmup", _number(int, 1), 1, "run each so often", "COUNT")

    add = _adder(parser, "where and how to answer")
    add("--address", str, "127.0.0.1", "address to listen on; 0.0.0.0 for every one", "HOST")
    add("--rest_api_port", _port, 8501, "port of the REST API: a number, auto for a free one, 0 for no REST", "PORT")
    add("--port", _port, None, "port of gRPC, as for REST; left out, 8500, or auto where REST has auto", "PORT")
    add("--grpc_socket_path", str, "", "answer gRPC on this UNIX socket as well", "PATH")
    add("--ssl_config_file", str, "", "SSLConfig as text proto, for gRPC", "FILE")
    add("--rest_api_timeout_in_ms", _number(int, 1), 30_000, "time for one answer", "MS")
    add("--rest_api_num_threads", _number(int, 1), 4 * usable_cores(),
        "threads that read large JSON bodies and write large answers", "COUNT")  # fmt: skip
    add("--rest_api_enable_cors_support", _boolean, False, "let pages of other origins ask", "BOOL")
    add("--rest_api_list_models", _boolean, False, "list the models at /v1/models", "BOOL")
    add("--monitoring_config_file", str, "", "MonitoringConfig as text proto: where the metrics are", "FILE")
    add("--enable_page", _boolean, True, "answer browsers at / with a page for a person", "BOOL")
    add("--allowed_hosts", _hosts, (),
        "names that browsers may use for this server, beside localhost, 127.0.0.1, [::1] and --address; * for any",
        "HOST[,HOST]")  # fmt: skip
    add("--log_requests", _boolean, False, "log a line of JSON for every REST request", "BOOL")
    add("--log_level", _level, "INFO", "what is logged at least: " + ", ".join(_LEVELS), "LEVEL")
    add("--request_memory_in_mb", _number(int, 1), None,
        "memory that all requests together may hold; left out, half of what the process may use", "MB")  # fmt: skip
    add("--enable_model_management", _boolean, False, "let callers of gRPC change what is served", "BOOL")
    add("--drain_timeout_in_ms", _number(int, 0), 30_000, "time for answers under way once told to stop", "MS")

    add = _adder(parser, "how the models run")
    add("--enable_batching", _boolean, None, "group requests: true by a parameters file, false never, left out: "
        "those that wait for a free thread, where that changes no answer", "BOOL")  # fmt: skip
    add("--batching_parameters_file", str, "", "BatchingParameters as text proto", "FILE")
    add("--tensorflow_intra_op_parallelism", _number(int, 0), 0, "threads within an operation; 0 chooses", "COUNT")
    add("--tensorflow_inter_op_parallelism", _number(int, 0), 0, "operations side by side; 0 chooses", "COUNT")
    add("--tensorflow_session_parallelism", _number(int, 0), 0, "both of these; 0 leaves them", "COUNT")
    add("--xla_cpu_compilation_enabled", _boolean, False, "run functions saved with jit_compile=True", "BOOL")
    for name in (*WITHOUT_EFFECT, *REFUSED):
        parser.add_argument(f"--{name}", nargs="?", const="true", help=argparse.SUPPRESS)
    parser.epilog = (
        "The other flags of tensorflow_model_server are taken with a warning where they change no answer: "
        f"{', '.join(WITHOUT_EFFECT)}."
    )
    return parser


def _answer_foreign(options: argparse.Namespace) -> None:
    for name, (default, way) in REFUSED.items():
        value = getattr(options, name)
        if value is not None and value.lower() != default:
            raise UsageError(f"--{name}={value} cannot be followed here: {way}.")
    for name in WITHOUT_EFFECT:
        if getattr(options, name) is not None:
            _log.warning("--%s has no effect here, and changes no answer", name)


def _adder(parser: argparse.ArgumentParser, title: str) -> Callable[[str, Callable[[str], Any], Any, str, str], None]:
    group = parser.add_argument_group(title)

    def add(name: str, kind: Callable[[str], Any], default: Any, help: str, metavar: str) -> None:
        switch: dict[str, Any] = {"nargs": "?", "const": True} if kind is _boolean else {}
        if default in (None, "", ()):
            help += "%(default).0s"
        group.add_argument(name, type=kind, default=default, help=help, metavar=metavar, **switch)

    return add


def _number(kind: type, least: float, most: float | None = None) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        span = f"at least {least}" if most is None else f"from {least} to {most}"
        what = "a whole number" if kind is int else "a number"
        problem = argparse.ArgumentTypeError(f"must be {what}, {span}. Received: {text!r}.")
        try:
            value = kind(text)
        except ValueError:
            raise problem from None
        if not value >= least or (most is not None and value > most):
            raise problem
        return value

    return read


def _port(text: str) -> int:
    if text.lower() == "auto":
        return AUTO
    try:
        return _number(int, 0, 65535)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be a whole number, from 0 to 65535, where 0 is none, or auto. Received: {text!r}."
        ) from None


def _hosts(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or not all(_HOST.fullmatch(name) for name in names):
        raise argparse.ArgumentTypeError(
            "must be host names or addresses without scheme and port, with commas between them, or *. "
            f"Received: {text!r}."
        )
    return names


def _level(text: str) -> str:
    if text.lower() not in _LEVELS:
        raise argparse.ArgumentTypeError(f"must be {', '.join(_LEVELS[:-1])} or {_LEVELS[-1]}. Received: {text!r}.")
    return text.upper()


def _boolean(text: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise argparse.ArgumentTypeError(f"must be true or false. Received: {text!r}.")
    return text.lower() in _TRUE
