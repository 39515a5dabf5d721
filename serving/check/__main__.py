"""The command: says of every step what it found, or why it was left out; exits with 1 if one failed."""

import argparse
import base64
import http.client
import json
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from keras_bn_serving.quiet import import_tensorflow

from . import MODEL, ROOT, CheckError, Skipped, images

EXAMPLE = ROOT / "models/pretrained/examples/9_ankle_boot.png"
EXAMPLE_LABEL = "Ankle boot"
IMAGE = {"embedded": "localhost/fashion-cnn:embedded", "serving": "localhost/fashion-cnn:latest"}
# What both images hold of ours.
VERSION = f"/models/{MODEL}/1"
HELD = [
    *(f"{VERSION}/{name}" for name in ("saved_model.pb", "variables/variables.index", "assets.extra/keras_bn.json")),
    f"{VERSION}/assets.extra/tf_serving_warmup_requests",
    *(f"/config/{name}.config" for name in ("models", "batching", "monitoring")),
    "/usr/local/bin/model-available",
]


class _Report:
    """Prints the steps and counts those that failed."""

    def __init__(self) -> None:
        self.failed = 0

    def step(self, what: str, check: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a step; what it returns, None where it failed or was left out."""
        try:
            result = check(*arguments)
        except Skipped as error:
            print(f"skipped  {what}: {error}", flush=True)
            return None
        except CheckError as error:
            self.failed += 1
            print(f"FAILED   {what}: {error}", flush=True)
            return None
        print(f"ok       {what}{f': {result}' if isinstance(result, str) else ''}", flush=True)
        return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m serving.check", description=__doc__)
    parser.add_argument("--files_only", action="store_true", help="build nothing")
    parser.add_argument("--python_image", metavar="IMAGE", help="base image with Python; by default the Dockerfile's")
    parser.add_argument("--tf_serving_image", metavar="IMAGE", help="TensorFlow Serving; by default the Dockerfile's")
    flags = parser.parse_args(arguments)
    import_tensorflow()
    from . import files

    report = _Report()
    for check in files.CHECKS:
        report.step((check.__doc__ or "").split(".\n")[0].rstrip("."), check)
    if not flags.files_only and report.step("buildah", images.require_buildah):
        with images.pip_configuration() as pip:
            _build_and_ask(report, flags.python_image, flags.tf_serving_image, pip)
    print(f"\n{report.failed} failed" if report.failed else "\nNothing failed.")
    return 1 if report.failed else 0


def _build_and_ask(report: _Report, python_image: str | None, tf_serving_image: str | None, pip: images.Pip) -> None:
    python_image = report.step("base image with Python", _python_image, python_image)
    if python_image is None:
        return
    given = {"PYTHON_IMAGE": python_image}
    if not report.step("stage embedded is built", _built, "embedded", given, pip):
        return
    with images.from_image(IMAGE["embedded"]) as container:
        _check_image(report, "embedded", container, pip)
        report.step("embedded: its server answers a picture and ends on SIGTERM", _ask_embedded, container)

    image = report.step("TensorFlow Serving's image", _tf_serving_image, tf_serving_image)
    if image is None or not report.step(
        "stage serving is built", _built, "serving", given | {"TF_SERVING_IMAGE": image}, pip
    ):
        return
    with images.from_image(IMAGE["serving"]) as container:
        _check_image(report, "serving", container, pip)
        report.step("serving: its command line serves the model", _ask_serving, container, image == images.STAND_IN)


def _python_image(given: str | None) -> str:
    default = _default("PYTHON_IMAGE")
    if given or images.pull(default):
        return given or default
    print(f"         {default} cannot be had; made by debootstrap instead", flush=True)
    return images.make_python_base()


def _tf_serving_image(given: str | None) -> str:
    default = _default("TF_SERVING_IMAGE")
    if given or images.pull(default):
        return given or default
    print(f"         {default} cannot be had; a STAND-IN, which is the embedded server, takes its place", flush=True)
    return images.make_stand_in(IMAGE["embedded"])


def _default(name: str) -> str:
    """A build argument's default in the Dockerfile."""
    found = dict(re.findall(r"^ARG (\w+)=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    return re.sub(r"\$\{(\w+)\}", lambda match: found[match[1]], found[name])


def _built(target: str, arguments: dict[str, str], pip: images.Pip) -> str:
    if not (ROOT / "models/pretrained/fashion_cnn.keras").exists():
        raise CheckError("models/pretrained/fashion_cnn.keras is missing: python -m models.pretrained make RUN")
    images.build(target, IMAGE[target], arguments, pip)
    return IMAGE[target]


def _check_image(report: _Report, stage: str, container: images.Container, pip: images.Pip) -> None:
    report.step(f"{stage}: user, health check, labels, command in exec form", _check_config, container)
    report.step(f"{stage}: the model, its configuration and the health check are there", _check_held, container)
    report.step(f"{stage}: no secrets, caches, sources or tools of the build", _check_left_out, container, pip)


def _check_config(container: images.Container) -> str:
    config = container.config
    if config["User"] != "65532:65532":
        raise CheckError(f"it runs as {config['User'] or 'root'!r}, not as 65532:65532")
    if container.must_run("id", "-u") != "65532":
        raise CheckError("commands in it do not run as 65532")
    if config.get("Healthcheck", {}).get("Test") != ["CMD", "model-available", MODEL]:
        raise CheckError(f"its health check is {config.get('Healthcheck')}")
    if container.command[0].endswith("sh") or config.get("Shell"):
        raise CheckError(f"a shell would be process 1: {container.command}")
    for name in ("title", "description", "licenses", "revision", "created"):
        if not config["Labels"].get(f"org.opencontainers.image.{name}"):
            raise CheckError(f"there is no label org.opencontainers.image.{name}")
    return f"{config['User']}, {container.command[0]}"


def _check_held(container: images.Container) -> str:
    container.must_run("sh", "-c", 'for file; do test -s "$file" && cat "$file" > /dev/null || exit; done', "sh", *HELD)
    container.must_run("test", "-x", "/usr/local/bin/model-available")
    writable = container.run("find", "/models", "/config", "-writable").stdout.split()
    if writable:
        raise CheckError(f"its user can write {writable}")
    return f"{len(HELD)} files"


def _check_left_out(container: images.Container, pip: images.Pip) -> str:
    paths = ["/src", "/wheels", "/opt/tools", "/root/.cache/pip", "/run/secrets", "/app/serving/k8s"]
    script = 'for path; do test -e "$path" && echo "$path"; done; test -s /etc/pip.conf && echo /etc/pip.conf; true'
    found = container.must_run("sh", "-c", script, "sh", *paths, user="0")
    found += container.run("sh", "-c", "command -v gcc cc make git").stdout
    modules = "print(*(name for name in ('keras_bn', 'models', 'pip', 'matplotlib') if find_spec(name)))"
    found += container.run("/opt/venv/bin/python", "-c", f"from importlib.util import find_spec; {modules}").stdout
    if found.strip():
        raise CheckError(f"it holds {found.split()}")
    history = images.run("buildah", "inspect", container.name)
    secrets = [word for word in pip.text.split() if "://" in word and "pypi.org" not in word]
    if any(secret in history for secret in secrets):
        raise CheckError("pip's configuration is in its history")
    return ""


def _ask_embedded(container: images.Container) -> str:
    rest, grpc = _free_port(), _free_port()
    with container.running("--address=127.0.0.1", f"--rest_api_port={rest}", f"--port={grpc}") as process:
        _wait_until_available(container, process, rest)
        label = _label(rest)
        if label != EXAMPLE_LABEL:
            raise CheckError(f"{EXAMPLE.name} is answered with {label}")
        if container.run("model-available", "another", str(rest)).returncode != 1:
            raise CheckError("the health check is content with a model that is not there")
        _check_written(container)
        code = process.stop(signal.SIGTERM)
    if code:
        raise CheckError(f"exit code {code} after SIGTERM")
    if container.run("model-available", MODEL, str(rest)).returncode != 1:
        raise CheckError("the health check is content with a server that is down")
    return f"{EXAMPLE.name} posted as b64: {label}"


def _ask_serving(container: images.Container, stand_in: bool) -> str:
    rest, grpc = _free_port(), _free_port()
    with container.running(f"--rest_api_port={rest}", f"--port={grpc}") as process:
        _wait_until_available(container, process, rest)
        label = _label(rest)
        _check_written(container)
        said = "STAND-IN" in process.log
        process.stop(signal.SIGTERM)
    if stand_in != said:
        raise CheckError("what stands in for TensorFlow Serving must say so, and nothing else")
    if label != EXAMPLE_LABEL:
        raise CheckError(f"{EXAMPLE.name} is answered with {label}")
    return f"{label}; served by {'the STAND-IN, not by TensorFlow Serving' if stand_in else 'TensorFlow Serving'}"


def _wait_until_available(container: images.Container, process: images.Process, port: int) -> None:
    def settled() -> bool:
        return process.ended or not container.run("model-available", MODEL, str(port)).returncode

    if not images.wait_until(settled, 90) or process.ended:
        raise CheckError(f"the health check is not content after 90 s, or the server has ended: {process.log[-2000:]}")


def _label(port: int) -> str:
    """What the server takes the example for."""
    body = {
        "signature_name": "image_bytes",
        "instances": [{"b64": base64.b64encode(EXAMPLE.read_bytes()).decode()}],
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", f"/v1/models/{MODEL}:predict", json.dumps(body))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != 200:
        raise CheckError(f"the server answers {response.status}: {text}")
    return json.loads(text)["predictions"][0]["top_labels"][0]


def _check_written(container: images.Container) -> None:
    """buildah's chroot has no read-only root: that nothing was written shows that there could be one."""
    root = images.run("buildah", "mount", container.name).strip()
    written = images.run("find", root, "-xdev", "-uid", "65532").split()
    images.run("buildah", "umount", container.name)
    if written:
        raise CheckError(f"the server wrote {written} into its image; only /tmp is for that")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
