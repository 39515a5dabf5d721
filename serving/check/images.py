"""Builds the images with buildah, which needs no daemon, and runs what is in them."""

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import ROOT, CheckError, Skipped

# Without these, buildah needs namespaces and a network of its own, which many a build machine does not allow.
ISOLATION = ["--isolation", "chroot"]
_RUN = ["buildah", "run", *ISOLATION]
PYTHON_BASE = "localhost/debian-python:bookworm"
STAND_IN = "localhost/stand-in-for-tensorflow-serving:latest"


class Pip(NamedTuple):
    """This machine's pip configuration.

    Attributes:
        file: A copy of it, to be handed over as a secret.
        folders: What it names on this machine, to be seen during the build.
        text: What must not get into an image.
    """

    file: Path
    folders: list[str]
    text: str


class Container:
    """A container of an image, not yet running anything."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.name = name
        self.config = config

    @property
    def command(self) -> list[str]:
        """What the container runs by itself."""
        return [*self.config["Entrypoint"], *(self.config.get("Cmd") or [])]

    def run(self, *command: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a command in it to the end, as its user or as another one."""
        who = ["--user", user] if user else []
        return subprocess.run(
            [*_RUN, "--cap-drop", "all", *who, self.name, "--", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def must_run(self, *command: str, user: str | None = None) -> str:
        """As `run`; what it prints.

        Raises:
            CheckError: It fails.
        """
        done = self.run(*command, user=user)
        if done.returncode:
            raise CheckError(f"in the container, {' '.join(command)} says: {(done.stdout + done.stderr).strip()}")
        return done.stdout.strip()

    @contextlib.contextmanager
    def running(self, *flags: str) -> "Iterator[Process]":
        """Runs the container's own command with more flags, without any capability, until the block ends."""
        with tempfile.TemporaryDirectory() as folder:
            # The only place that the server may write to; its process number is written there first.
            os.chmod(folder, 0o1777)
            log = Path(folder) / "log"
            wrapped = ["sh", "-c", 'echo $$ > /tmp/pid; exec "$@"', "sh", *self.command, *flags]
            with log.open("w") as output:
                runner = subprocess.Popen(
                    [*_RUN, "--cap-drop", "all", "--volume", f"{folder}:/tmp", self.name, "--", *wrapped],
                    stdout=output,
                    stderr=output,
                )
            process = Process(runner, Path(folder) / "pid", log)
            try:
                yield process
            finally:
                process.stop(signal.SIGKILL)


class Process:
    """A container's server while it runs."""

    def __init__(self, runner: subprocess.Popen, pid_file: Path, log: Path) -> None:
        self._runner = runner
        self._pid_file = pid_file
        self._log = log

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self._runner.poll() is not None

    def stop(self, number: signal.Signals, seconds: float = 30) -> int:
        """Sends a signal to the server itself and waits; returns its exit code.

        Raises:
            CheckError: It goes on.
        """
        if not self.ended and self._pid_file.exists() and self._pid_file.read_text().strip():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self._pid_file.read_text()), number)
        try:
            return self._runner.wait(seconds)
        except subprocess.TimeoutExpired:
            self._runner.kill()
            raise CheckError(f"the server goes on {seconds} s after {number.name}") from None


def require_buildah() -> str:
    """buildah's version.

    Raises:
        Skipped: It is not here.
    """
    if shutil.which("buildah") is None:
        raise Skipped("needs buildah: apt-get install buildah debootstrap")
    return run("buildah", "--version").strip()


def is_here(image: str) -> bool:
    """Whether an image is in the local storage."""
    arguments = ["buildah", "inspect", "--type", "image", image]
    return not subprocess.run(arguments, capture_output=True, check=False).returncode


def pull(image: str) -> bool:
    """Whether an image is here or can be had from its registry."""
    return is_here(image) or not subprocess.run(["buildah", "pull", image], capture_output=True, check=False).returncode


def make_python_base() -> str:
    """A base image with Python from Debian's packages, where no registry can be reached; made once."""
    if is_here(PYTHON_BASE):
        return PYTHON_BASE
    if shutil.which("debootstrap") is None:
        raise Skipped("no registry can be reached and debootstrap is not here: apt-get install debootstrap")
    if os.geteuid():
        raise Skipped("no registry can be reached, and debootstrap needs root to make a base image")
    with tempfile.TemporaryDirectory() as folder:
        packages = "--include=python3,python3-venv,ca-certificates"
        run("debootstrap", "--variant=minbase", packages, "bookworm", f"{folder}/root")
        shutil.rmtree(f"{folder}/root/var/cache/apt/archives", ignore_errors=True)
        commit_root(Path(folder) / "root", PYTHON_BASE)
    return PYTHON_BASE


def commit_root(root: Path, image: str) -> None:
    """Makes an image of a folder that holds a root file system."""
    with container("scratch") as name:
        run("buildah", "add", "--quiet", name, str(root), "/")
        run("buildah", "config", "--cmd", "bash", name)
        run("buildah", "commit", "--quiet", name, image)


def make_stand_in(embedded: str) -> str:
    """An image in the place of tensorflow/serving's, whose `tensorflow_model_server` is the embedded server.

    It holds nothing of what the Dockerfile's last stage has to bring itself.
    """
    script = (
        "#!/bin/sh\n"
        "echo 'STAND-IN: this is the embedded server, not TensorFlow Serving' >&2\n"
        'library=\'from importlib.metadata import version; print("TensorFlow Library:", version("tensorflow"))\'\n'
        'if [ "$1" = --version ]; then exec /opt/venv/bin/python -c "$library"; fi\n'
        'cd /app && exec /opt/venv/bin/python -m keras_bn_serving --address=127.0.0.1 "$@"\n'
    )
    with container(embedded) as name, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensorflow_model_server"
        path.write_text(script)
        path.chmod(0o755)
        run("buildah", "copy", "--quiet", name, str(path), "/usr/bin/tensorflow_model_server")
        run(
            "buildah",
            "run",
            *ISOLATION,
            "--user",
            "0",
            name,
            "--",
            "rm",
            "-r",
            "/models",
            "/config",
        )
        run("buildah", "run", *ISOLATION, "--user", "0", name, "--", "rm", "/usr/local/bin/model-available")
        run("buildah", "config", "--entrypoint", "[]", "--cmd", "", "--user", "0", name)
        run("buildah", "commit", "--quiet", name, STAND_IN)
    return STAND_IN


def build(target: str, image: str, arguments: dict[str, str], pip: Pip) -> None:
    """Builds a stage of the Dockerfile; prints what buildah prints.

    Raises:
        CheckError: It fails.
    """
    command = [
        "buildah",
        "build",
        *ISOLATION,
        "--network",
        "host",
        "--layers",
        "--format",
        "docker",
        "--target",
        target,
    ]
    command += [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    command += ["--secret", f"id=pip_config,src={pip.file}"]
    command += [word for folder in pip.folders for word in ("--volume", f"{folder}:{folder}:ro")]
    done = subprocess.run([*command, "--tag", image, str(ROOT)], check=False)
    if done.returncode:
        raise CheckError(f"buildah cannot build {target}: exit code {done.returncode}, see above")


@contextlib.contextmanager
def from_image(image: str) -> Iterator[Container]:
    """A container of an image; removed when the block ends."""
    described = json.loads(run("buildah", "inspect", "--type", "image", image))
    with container(image) as name:
        yield Container(name, described["Docker"]["config"])


@contextlib.contextmanager
def container(image: str) -> Iterator[str]:
    """The name of a container that buildah makes of an image; removed when the block ends."""
    name = run("buildah", "from", "--pull-never", image).strip()
    try:
        yield name
    finally:
        run("buildah", "rm", name)


@contextlib.contextmanager
def pip_configuration() -> Iterator[Pip]:
    """What pip is told on this machine, by files and by environment, as one file that only its owner can read."""
    values: dict[str, dict[str, str]] = {}
    folders: set[str] = set()
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        key, _, quoted = line.partition("=")
        section, _, name = key.rpartition(".")
        value = str(ast.literal_eval(quoted))
        # The environment comes first in the list, and wins in pip.
        values.setdefault("global" if section == ":env:" else section, {}).setdefault(name, value)
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # The pages of an index name files beside it.
                beside = word.startswith("file://") and path.parent != Path("/")
                folders.add(str(path.parent if beside else path))
    text = ""
    for section, settings in values.items():
        text += f"[{section}]\n" + "".join(
            f"{name} = {value.replace(chr(10), chr(10) + '  ')}\n" for name, value in settings.items()
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pip.conf"
        file.touch(mode=0o600)
        file.write_text(text)
        yield Pip(file, sorted(folders), text)


def run(*command: str) -> str:
    """Runs a command and gives what it prints.

    Raises:
        CheckError: It fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode:
        raise CheckError(f"{' '.join(command[:2])} says: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout
