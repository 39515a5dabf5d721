"""The command: says of every check PASS, FAIL, or SKIPPED and what it needs; exits with 1 if one failed."""

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from keras_bn_serving.quiet import import_tensorflow

from . import MODEL, ROOT, CheckError, Skipped

_SHOWN = 10
_NEEDS_BINARY = "needs a tensorflow_model_server: make docker-check TF_SERVING_BINARY=/path/to/it"


class _Report:
    """Prints the steps and counts those that failed or were left out."""

    def __init__(self) -> None:
        self.failed = 0
        self.skipped = 0

    def step(self, what: str, check: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a step; what it returns, None where it failed or was left out."""
        try:
            result = check(*arguments)
        except Skipped as error:
            self.skip(what, str(error))
            return None
        except CheckError as error:
            self.failed += 1
            print(f"FAIL     {what}: {error}", flush=True)
            return None
        print(f"PASS     {what}{f': {result}' if isinstance(result, str) else ''}", flush=True)
        return result

    def skip(self, what: str, needs: str) -> None:
        """A step that cannot be run here."""
        self.skipped += 1
        print(f"SKIPPED  {what} ({needs})", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m serving.check", description=__doc__)
    parser.add_argument("--files_only", action="store_true", help="start and build nothing")
    parser.add_argument("--tf_serving_binary", metavar="FILE", type=Path, help="a tensorflow_model_server to be asked")
    parser.add_argument("--python_image", metavar="IMAGE", help="base image with Python; by default the Dockerfile's")
    parser.add_argument("--tf_serving_image", metavar="IMAGE", help="TensorFlow Serving; by default the Dockerfile's")
    flags = parser.parse_args(arguments)
    import_tensorflow()
    from . import files, images, kubernetes, training

    report = _Report()
    for check in files.CHECKS + kubernetes.CHECKS + training.CHECKS:
        report.step(_title(check), check)
    if not flags.files_only:
        _run_servers(report, flags.tf_serving_binary)
        if report.step("images", images.require_buildah):
            with images.pip_configuration() as pip:
                _build_and_ask(report, flags.python_image, flags.tf_serving_image, pip)
    print(f"\n{report.failed or 'None'} failed, {report.skipped or 'none'} skipped.")
    return 1 if report.failed else 0


def _title(check: Callable[..., Any]) -> str:
    return (check.__doc__ or "").split(".\n")[0].rstrip(".")


def _run_servers(report: _Report, binary: Path | None) -> None:
    """The image's command line on this machine: by the embedded server, and by the real one where there is one."""
    from . import questions, server

    with tempfile.TemporaryDirectory() as folder:
        base_path = Path(folder) / MODEL
        exported = report.step("the pretrained network is exported; TensorFlow", server.export, base_path)
        if exported is None:
            return
        ours = _run_server(report, "embedded", None, base_path)
        if binary is None:
            for group in questions.GROUPS:
                report.skip(f"real: {_title(group)}, as the embedded server's", _NEEDS_BINARY)
            report.skip("real: the image's command line loads the network; SIGTERM ends it", _NEEDS_BINARY)
        elif report.step(
            "real: its TensorFlow is not older than what exported", server.check_not_newer, exported, binary
        ):
            _compare(report, "real", ours, _run_server(report, "real", binary, base_path))


def _run_server(report: _Report, name: str, binary: Path | None, base_path: Path) -> dict[str, Any]:
    from . import server

    with contextlib.ExitStack() as stack:
        start = server.running(binary, base_path)
        what = f"{name}: the image's command line loads the network, with batching and warm-up"
        running = report.step(what, stack.enter_context, start)
        if running is None:
            return {}
        answers = _ask(report, name, running)
        report.step(f"{name}: SIGTERM ends it", _end, running.process, 0 if binary is None else -signal.SIGTERM)
        return answers


def _ask(report: _Report, name: str, running: Any) -> dict[str, list[Any]]:
    """Asks a server everything; the answers by what was asked, also where they are not as they have to be."""
    from . import questions

    answers: dict[str, list[Any]] = {}
    for group in questions.GROUPS:
        asked = answers.setdefault(_title(group), [])
        report.step(f"{name}: {_title(group)}", _check_asked, group(running), asked)
    return answers


def _check_asked(asking: Iterator[Any], asked: list[Any]) -> str:
    for answered in asking:
        asked.append(answered)
    _fail([f"{each.question}: {each.problem}" for each in asked if each.problem], len(asked))
    return f"{len(asked)} answers"


def _fail(problems: list[str], of: int) -> None:
    if problems:
        shown = "".join(f"\n             {problem}" for problem in problems[:_SHOWN])
        raise CheckError(f"{len(problems)} of {of}, the first of them:{shown}")


def _end(process: Any, code: int) -> str:
    received = process.stop(signal.SIGTERM)
    if received != code:
        raise CheckError(f"exit code {received}, where {code} is expected: {process.log[-500:]}")
    return f"exit code {received}"


def _compare(report: _Report, name: str, ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> None:
    for group in ours:
        what = f"{name} and embedded answer alike: {group}"
        if ours[group] and len(ours[group]) == len(theirs.get(group, [])):
            report.step(what, _check_alike, ours[group], theirs[group])
        else:
            report.skip(what, "needs the answers of both")


def _check_alike(ours: list[Any], theirs: list[Any]) -> str:
    from . import questions

    _fail(list(questions.differences(ours, theirs)), len(ours))
    return f"{len(ours)} answers"


def _build_and_ask(report: _Report, python_image: str | None, tf_serving_image: str | None, pip: Any) -> None:
    from . import image_checks, images

    python_image = report.step("base image with Python", image_checks.python_image, python_image)
    if python_image is None:
        return
    given = {"PYTHON_IMAGE": python_image}
    if not report.step("stage embedded is built", image_checks.build, "embedded", given, pip):
        return
    with images.from_image(image_checks.IMAGE["embedded"]) as container:
        _check_image(report, "embedded", container, pip)
        ours = _ask_container(report, "image embedded", container, 0)

    image = report.step("TensorFlow Serving's image", image_checks.tf_serving_image, tf_serving_image)
    if image is None:
        return
    if not report.step(
        "stage serving is built", image_checks.build, "serving", given | {"TF_SERVING_IMAGE": image}, pip
    ):
        return
    stand_in = image == images.STAND_IN
    name = "image serving (STAND-IN)" if stand_in else "image serving"
    with images.from_image(image_checks.IMAGE["serving"]) as container:
        _check_image(report, name, container, pip)
        theirs = _ask_container(report, name, container, 0 if stand_in else 128 + signal.SIGTERM)
    if stand_in:
        report.skip("image serving and embedded answer alike", "needs TensorFlow Serving's image: TF_SERVING_IMAGE=...")
    else:
        _compare(report, name, ours, theirs)


def _check_image(report: _Report, stage: str, container: Any, pip: Any) -> None:
    from . import image_checks

    report.step(f"{stage}: user, health check, labels, command in exec form", image_checks.check_config, container)
    report.step(
        f"{stage}: the model, its configuration and the health check are there", image_checks.check_held, container
    )
    report.step(
        f"{stage}: no secrets, caches, sources or tools of the build", image_checks.check_left_out, container, pip
    )


def _ask_container(report: _Report, name: str, container: Any, code: int) -> dict[str, Any]:
    from . import image_checks, server
    from .files import command_line

    rest, grpc = server.free_port(), server.free_port()
    # Batching and what else TensorFlow Serving's image has: answers are to be compared.
    flags = [flag for flag in command_line(ROOT, "serving")[1:] if flag not in container.command]
    with container.running(*flags, f"--rest_api_port={rest}", f"--port={grpc}") as process:
        if (
            report.step(f"{name}: its command line loads the network", image_checks.wait, container, process, rest)
            is None
        ):
            return {}
        answers = _ask(report, name, server.Server(rest, grpc, process))
        report.step(f"{name}: it wrote nothing but to /tmp", image_checks.check_written, container)
        report.step(f"{name}: SIGTERM ends it", _end, process, code)
    report.step(f"{name}: the health check sees that it is down", image_checks.check_down, container, rest)
    return answers


if __name__ == "__main__":
    sys.exit(main())
