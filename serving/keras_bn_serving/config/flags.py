"""The flags of `keras-bn serve`, named as tensorflow_model_server names them."""

import difflib
import logging
import re
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import click

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


def parse(arguments: Sequence[str], program: str = "python -m keras_bn_serving") -> SimpleNamespace:
    """Reads the command line. Flags of TensorFlow Serving that change no answer are taken with a warning.

    Args:
        arguments: The flags.
        program: What stands before them, for the help.

    Returns:
        The value of each flag, under its name.

    Raises:
        UsageError: For an unknown flag, naming the nearest one, for a bad value, or for a flag of TensorFlow Serving
            that asks for what is not done here, naming what is.
        SystemExit: Where the help was asked for, and printed.
    """
    options = _read(arguments, program)
    _answer_foreign(options)
    _tell_what_is_ignored(options)
    options.allowed_hosts = options.allowed_hosts or ()
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


def _read(arguments: Sequence[str], program: str) -> SimpleNamespace:
    command = _Command()
    try:
        return SimpleNamespace(**command.make_context(program, list(arguments)).params)
    except click.exceptions.Exit as error:
        raise SystemExit(error.exit_code) from None
    except click.NoSuchOption as error:
        shown = [flag.name or "" for flag in command.params if not getattr(flag, "hidden", False)]
        # Without the dashes, which all have, and which make any two short names alike.
        near = difflib.get_close_matches(error.option_name.lstrip("-"), shown, 1)
        hint = f"Did you mean --{near[0]}?" if near else "See --help for all flags."
        raise UsageError(f"Unknown flag {error.option_name}. {hint}") from None
    except click.BadParameter as error:
        raise UsageError(f"{error.param.opts[0] if error.param else 'A flag'} {error.message}") from None
    except click.UsageError as error:
        raise UsageError(f"{error.message} See --help for all flags.") from None


class _Command(click.Command):
    """The command as its help shows it: flags below headings."""

    def __init__(self) -> None:
        self.sections: dict[str, list[click.Option]] = {
            "Which models": _flags_of_models(),
            "Where and how to answer": _flags_of_answers(),
            "How the models run": _flags_of_runs(),
        }
        foreign = [
            click.Option([f"--{name}"], is_flag=False, flag_value="true", hidden=True)
            for name in (*WITHOUT_EFFECT, *REFUSED)
        ]
        version = click.Option(["--version"], is_flag=True, help="Print the version and exit.")
        super().__init__(
            "serve",
            params=[version, *(flag for flags in self.sections.values() for flag in flags), *foreign],
            help="Serves SavedModels over TensorFlow Serving's protocol, REST and gRPC.",
            epilog="The other flags of tensorflow_model_server are taken with a warning where they change no answer: "
            f"{', '.join(WITHOUT_EFFECT)}.",
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the flags, section after section."""
        below = {flag.name for flags in self.sections.values() for flag in flags}
        others = [flag for flag in self.get_params(ctx) if flag.name not in below]
        sections: dict[str, Sequence[click.Parameter]] = {**self.sections, "Others": others}
        for title, flags in sections.items():
            with formatter.section(title):
                formatter.write_dl([record for flag in flags if (record := flag.get_help_record(ctx))])


def _flags_of_models() -> list[click.Option]:
    return [
        _flag("model_name", str, "default", "Name of the one model.", "NAME"),
        _flag("model_base_path", str, "", "Folder of its numbered versions.", "FOLDER"),
        _flag("model_config_file", str, "", "ModelServerConfig as text proto, for several models; "
              "then --model_name and --model_base_path are ignored.", "FILE"),
        _flag("model_config_file_poll_wait_seconds", _PAUSE, 0.0, "Reread it so often; 0 never.",
              "SECONDS"),
        _flag("file_system_poll_wait_seconds", _PAUSE, 1.0, "Look for versions so often; 0 once.",
              "SECONDS"),
        _flag("wait_for_models", _BOOLEAN, True,
              "Wait for base paths and versions that are not there yet; false gives up instead.", "BOOL"),
        _flag("allow_version_labels_for_unavailable_models", _BOOLEAN, False, "Let labels name unloaded versions.",
              "BOOL"),
        _flag("max_num_load_retries", _Number(int, 0), 0, "Tries after a failed one.", "COUNT"),
        _flag("load_retry_interval_micros", _Number(int, 0), 60_000_000, "Time between tries.", "MICROS"),
        _flag("enable_model_warmup", _BOOLEAN, True, "Run the warm-up requests that a version brings.", "BOOL"),
        _flag("num_request_iterations_for_warmup", _Number(int, 1), 1, "Run each so often.", "COUNT"),
    ]  # fmt: skip


def _flags_of_answers() -> list[click.Option]:
    return [
        _flag("address", str, "127.0.0.1", "Address to listen on; 0.0.0.0 for every one.", "HOST"),
        _flag("rest_api_port", _PORT, 8501, "Port of the REST API: a number, auto for a free one, 0 for no REST.",
              "PORT"),
        _flag("port", _PORT, None, "Port of gRPC, as for REST; left out, 8500, or auto where REST has auto.", "PORT"),
        _flag("grpc_socket_path", str, "", "Answer gRPC on this UNIX socket as well.", "PATH"),
        _flag("ssl_config_file", str, "", "SSLConfig as text proto, for gRPC.", "FILE"),
        _flag("rest_api_timeout_in_ms", _Number(int, 1), 30_000, "Time for one answer.", "MS"),
        _flag("rest_api_num_threads", _Number(int, 1), 4 * usable_cores(),
              "Threads that read large JSON bodies and write large answers.", "COUNT"),
        _flag("rest_api_enable_cors_support", _BOOLEAN, False, "Let pages of other origins ask.", "BOOL"),
        _flag("rest_api_list_models", _BOOLEAN, False, "List the models at /v1/models.", "BOOL"),
        _flag("monitoring_config_file", str, "", "MonitoringConfig as text proto: where the metrics are.", "FILE"),
        _flag("enable_page", _BOOLEAN, True, "Answer browsers at / with a page for a person.", "BOOL"),
        _flag("allowed_hosts", _HOSTS, None, "Names that browsers may use for this server, beside localhost, "
              "127.0.0.1, [::1] and --address; * for any.", "HOST[,HOST]"),
        _flag("log_requests", _BOOLEAN, False, "Log a line of JSON for every REST request.", "BOOL"),
        _flag("log_level", _LEVEL, "info", "What is logged at least.", None),
        _flag("request_memory_in_mb", _Number(int, 1), None,
              "Memory that all requests together may hold; left out, half of what the process may use.", "MB"),
        _flag("run_memory_in_mb", _Number(int, 1), None,
              "Memory that models may take while they run, all runs together; left out, a quarter of what the process "
              "may use.", "MB"),
        _flag("enable_model_management", _BOOLEAN, False, "Let callers of gRPC change what is served.", "BOOL"),
        _flag("drain_timeout_in_ms", _Number(int, 0), 30_000, "Time for answers under way once told to stop.", "MS"),
    ]  # fmt: skip


def _flags_of_runs() -> list[click.Option]:
    return [
        _flag("enable_batching", _BOOLEAN, None, "Group requests: true by a parameters file, false never, left out: "
              "those that wait for a free thread, where that changes no answer.", "BOOL"),
        _flag("batching_parameters_file", str, "", "BatchingParameters as text proto.", "FILE"),
        _flag("tensorflow_intra_op_parallelism", _Number(int, 0), 0, "Threads within an operation; 0 chooses.",
              "COUNT"),
        _flag("tensorflow_inter_op_parallelism", _Number(int, 0), 0, "Operations side by side; 0 chooses.", "COUNT"),
        _flag("tensorflow_session_parallelism", _Number(int, 0), 0, "Both of these; 0 leaves them.", "COUNT"),
        _flag("xla_cpu_compilation_enabled", _BOOLEAN, False, "Run functions saved with jit_compile=True.", "BOOL"),
    ]  # fmt: skip


def _flag(name: str, kind: Any, default: Any, help: str, metavar: str | None) -> click.Option:
    # As tensorflow_model_server has it, a flag that is named without a value is true.
    switch: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if kind is _BOOLEAN else {}
    if isinstance(default, bool):
        default = str(default).lower()
    shown = default not in (None, "")
    return click.Option(
        [f"--{name}"], type=kind, default=default, help=help, metavar=metavar, show_default=shown, **switch
    )


class _Number(click.ParamType):
    """A number within bounds."""

    name = "number"

    def __init__(self, kind: type, least: float, most: float | None = None):
        self.kind, self.least, self.most = kind, least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Reads the text of a number."""
        span = f"at least {self.least}" if self.most is None else f"from {self.least} to {self.most}"
        what = "a whole number" if self.kind is int else "a number"
        try:
            number = self.kind(value)
        except ValueError:
            number = None
        if number is None or not number >= self.least or (self.most is not None and number > self.most):
            self.fail(f"must be {what}, {span}. Received: {value!r}.", param, ctx)
        return number


class _Words(click.ParamType):
    """What a function makes of a text, or None of one that it does not know."""

    def __init__(self, name: str, read: Callable[[str], Any], allowed: str):
        self.name, self._read, self._allowed = name, read, allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Reads the text; a default is what it is."""
        result = self._read(value.lower()) if isinstance(value, str) else value
        if result is None:
            self.fail(f"must be {self._allowed}. Received: {value!r}.", param, ctx)
        return result


def _port(text: str) -> int | None:
    if text == "auto":
        return AUTO
    return int(text) if text.isascii() and text.isdigit() and int(text) <= 65535 else None


def _hosts(text: str) -> tuple[str, ...] | None:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return names if names and all(_HOST.fullmatch(name) for name in names) else None


# As long as a thread can wait, of seconds.
_PAUSE = _Number(float, 0, int(threading.TIMEOUT_MAX))
_BOOLEAN = _Words("bool", lambda text: True if text in _TRUE else False if text in _FALSE else None, "true or false")
_PORT = _Words("port", _port, "a whole number, from 0 to 65535, where 0 is none, or auto")
_HOSTS = _Words("hosts", _hosts, "host names or addresses without scheme and port, with commas between them, or *")
_LEVEL = _Words(
    "level", lambda text: text.upper() if text in _LEVELS else None, ", ".join(_LEVELS[:-1]) + f" or {_LEVELS[-1]}"
)


def _tell_what_is_ignored(options: SimpleNamespace) -> None:
    """Of several models the file says names and paths, as for tensorflow_model_server."""
    defaults = {"model_name": "default", "model_base_path": ""}
    given = [name for name, default in defaults.items() if getattr(options, name) != default]
    if options.model_config_file and given:
        ignored = " and ".join(f"--{name}" for name in given)
        _log.warning("%s ignored: --model_config_file=%s names the models", ignored, options.model_config_file)


def _answer_foreign(options: SimpleNamespace) -> None:
    for name, (default, way) in REFUSED.items():
        value = getattr(options, name)
        if value is not None and value.lower() != default:
            raise UsageError(f"--{name}={value} cannot be followed here: {way}.")
    for name in WITHOUT_EFFECT:
        if getattr(options, name) is not None:
            _log.warning("--%s has no effect here, and changes no answer", name)
