"""Checks of what Kubernetes and KServe run: schemas, and the rules that no schema knows."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from keras_bn_serving.config import files as config_files
from keras_bn_serving.config import flags as options
from keras_bn_serving.config import settings as server_files

from . import MODEL, ROOT, CheckError, Skipped, kserve
from .files import command_line, read_yaml, run

KUBERNETES_VERSION = "1.34"
# Flags of tensorflow_model_server that the embedded server does not have.
_REAL_SERVER_ONLY = ("--grpc_channel_arguments=", "--grpc_max_threads=")
# Nodes hear of a pod that leaves within this many seconds, and route to it until then.
_SECONDS_TO_BE_FORGOTTEN = 10
_POD_MONITOR = {"port", "path", "scheme", "interval", "scrapeTimeout", "honorLabels", "relabelings"}


def check_kubernetes(root: Path = ROOT) -> str:
    """Every resource fits Kubernetes's schema, in which a field that is not known is an error."""
    paths = sorted((root / "serving/k8s").rglob("*.yaml"))
    names = [name for path in paths for name in validate(yaml.safe_load_all(path.read_text()))]
    return f"{len(names)} resources against {KUBERNETES_VERSION}"


def check_kserve(root: Path = ROOT) -> str:
    """The InferenceService passes the rules of KServe's webhook."""
    service = _first(root, "kserve/inference-service.yaml")
    found = list(kserve.problems(service))
    if found:
        raise CheckError("; ".join(found))
    return f"{service['metadata']['name']}, {service['metadata']['annotations'][kserve.MODE]}"


def check_pods(root: Path = ROOT) -> str:
    """The pods of Kubernetes and of KServe start, are probed and stop as TensorFlow Serving needs it."""
    deployment = _first(root, "base/deployment.yaml")
    if "replicas" in deployment["spec"]:
        raise CheckError("base/deployment.yaml has `replicas`, which fights the autoscaler; leave it out")
    pods = {
        "base/deployment.yaml": deployment["spec"]["template"]["spec"],
        "kserve/inference-service.yaml": _first(root, "kserve/inference-service.yaml")["spec"]["predictor"],
    }
    for name, pod in pods.items():
        for problem in _pod_problems(pod, root):
            raise CheckError(f"{name}: {problem}")
    return ", ".join(pods)


def check_kustomize(root: Path = ROOT) -> str:
    """kustomize renders base, overlay and components, and what it renders fits together."""
    found = {"kustomize": ["kustomize", "build"], "kubectl": ["kubectl", "kustomize"]}
    command = next((words for tool, words in found.items() if shutil.which(tool)), None)
    if command is None:
        raise Skipped("needs kubectl or kustomize: https://kubectl.docs.kubernetes.io/installation/kustomize")
    names = []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(root / "serving/k8s", folder, dirs_exist_ok=True)
        components = sorted(path.name for path in Path(folder, "components").iterdir())
        for component in components:
            _write_overlay(Path(folder), component)
        for part in ("base", "overlays/example", *(f"overlays/{component}" for component in components)):
            resources = list(yaml.safe_load_all(run([*command, str(Path(folder, part))])))
            names += list(validate(resources))
            for problem in _connection_problems(resources, root):
                raise CheckError(f"{part}: {problem}")
    return f"{len(names)} rendered resources"


def _write_overlay(folder: Path, component: str) -> None:
    path = folder / "overlays" / component / "kustomization.yaml"
    path.parent.mkdir()
    path.write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [../../base]\ncomponents: [../../components/{component}]\n"
    )


def _pod_problems(pod: dict[str, Any], root: Path) -> Iterator[str]:
    (container,) = pod["containers"]
    # What gRPC's component adds is in no pod by itself.
    flags = options.parse([*command_line(root, "serving")[1:], *_without_variables(container["args"])])
    if not pod.get("shareProcessNamespace"):
        yield "shareProcessNamespace must be true: as process 1 the server does not react to SIGTERM"
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    longest = flags.rest_api_timeout_in_ms / 1000
    if wait < _SECONDS_TO_BE_FORGOTTEN + longest:
        yield (
            f"preStop must take {_SECONDS_TO_BE_FORGOTTEN} s until no request comes, and the {longest:g} s that one "
            f"may take. Received: {wait} s"
        )
    if pod["terminationGracePeriodSeconds"] <= wait:
        yield f"terminationGracePeriodSeconds must be more than preStop's {wait} s"
    if flags.port or not flags.grpc_socket_path:
        yield "gRPC, and model management with it, must be off: --port=0, --grpc_socket_path=/tmp/grpc.sock"
    cpu = container["resources"]["limits"]["cpu"]
    threads = server_files.read_batching(str(root / "serving/config/batching.config")).num_batch_threads
    if int(cpu) != threads:
        yield f"limits.cpu is {cpu}, and batching.config has num_batch_threads {threads}; they must be the same"
    limit = {"name": "CPU_LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1"}}}
    for kind in ("intra", "inter"):
        if f"--tensorflow_{kind}_op_parallelism=$(CPU_LIMIT)" not in container["args"] or limit not in container["env"]:
            yield f"--tensorflow_{kind}_op_parallelism must be CPU_LIMIT, and that the container's limits.cpu"
    for_tensors = next((one["value"] for one in container["env"] if one["name"] == "TF_MKL_ALLOC_MAX_BYTES"), None)
    memory = _bytes(container["resources"]["limits"]["memory"])
    if for_tensors is None or 2 * int(for_tensors) != memory:
        yield (
            "TF_MKL_ALLOC_MAX_BYTES must be half of limits.memory, or a request can have the server killed. "
            f"Received: {for_tensors} of {memory}"
        )
    yield from _probe_problems(container, root)


def _bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMG]i)?", quantity).groups()  # type: ignore[union-attr]
    return int(number) << {None: 0, "Ki": 10, "Mi": 20, "Gi": 30}[unit]


def _probe_problems(container: dict[str, Any], root: Path) -> Iterator[str]:
    for name in ("startupProbe", "readinessProbe"):
        if container[name].get("exec") != {"command": ["model-available", MODEL]}:
            yield f"{name} must run model-available {MODEL}"
        # It ends by itself after 3 s, and a second of grace.
        elif container[name]["timeoutSeconds"] <= 4:
            yield f"{name}: timeoutSeconds must be more than the 4 s after which model-available ends by itself"
    alive = container["livenessProbe"].get("httpGet", {})
    metrics = config_files.read_metrics_path(str(root / "serving/config/monitoring.config"))
    if alive.get("path") != metrics:
        yield f"livenessProbe must get {metrics}, which answers whatever becomes of the models"
    if alive.get("port") not in [port["name"] for port in container["ports"]]:
        yield f"livenessProbe asks the port {alive.get('port')!r}, which the container does not have"


def _connection_problems(resources: list[dict[str, Any]], root: Path) -> Iterator[str]:
    """What names something in another resource that is not there."""
    by_kind = {resource["kind"]: resource for resource in resources}
    template = by_kind["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    selectors = {
        "Service": by_kind["Service"]["spec"]["selector"],
        "NetworkPolicy": by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        "PodDisruptionBudget": by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    }
    named = [(port["targetPort"], "Service") for port in by_kind["Service"]["spec"]["ports"]]
    named += [
        (port["port"], "NetworkPolicy")
        for rule in by_kind["NetworkPolicy"]["spec"]["ingress"]
        for port in rule["ports"]
    ]
    if "PodMonitor" in by_kind:
        selectors["PodMonitor"] = by_kind["PodMonitor"]["spec"]["selector"]["matchLabels"]
        named += [(one["port"], "PodMonitor") for one in by_kind["PodMonitor"]["spec"]["podMetricsEndpoints"]]
    for kind, selector in selectors.items():
        if not selector or not selector.items() <= labels.items():
            yield f"{kind} selects {selector}, the pods have {labels}"
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for port, kind in named:
        if port not in ports:
            yield f"{kind} names the port {port!r}, the pods have {sorted(ports)}"
    flags = options.parse([*command_line(root, "serving")[1:], *_without_variables(container["args"])])
    if flags.port != ports.get("grpc", 0):
        yield f"the server has --port={flags.port}, the pods have {ports}"
    for rule in by_kind["NetworkPolicy"]["spec"]["ingress"]:
        if any(port["port"] == "grpc" for port in rule["ports"]) and not rule.get("from"):
            yield "NetworkPolicy lets everybody reach gRPC, and model management with it"


def _without_variables(arguments: list[str]) -> list[str]:
    """A container's arguments as the embedded server can read them."""
    return [re.sub(r"\$\(\w+\)", "2", word) for word in arguments if not word.startswith(_REAL_SERVER_ONLY)]


def validate(resources: Any) -> Iterator[str]:
    """Validates resources strictly; gives their names. KServe's are validated as the pod that they describe."""
    import kubernetes_validate

    for resource in resources:
        kind = resource["kind"]
        if kind in ("Kustomization", "Component"):
            continue
        name = f"{kind}/{resource['metadata']['name']}"
        if kind == "PodMonitor":
            _validate_pod_monitor(resource)
            yield name
            continue
        if kind == "InferenceService":
            pod = {key: value for key, value in resource["spec"]["predictor"].items() if key not in kserve.FIELDS}
            resource = {"apiVersion": "v1", "kind": "Pod", "metadata": resource["metadata"], "spec": pod}
        try:
            kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            where = ".".join(str(step) for step in error.path)
            raise CheckError(f"{name}: {where}: {error.message}") from error
        except kubernetes_validate.SchemaNotFoundError as error:
            raise CheckError(f"{name}: {error.message}") from error
        yield name


def _validate_pod_monitor(monitor: dict[str, Any]) -> None:
    """The Prometheus operator's resource, of whose many fields few are used here."""
    endpoints = monitor["spec"].get("podMetricsEndpoints", [])
    unknown = set(monitor["spec"]) - {"selector", "podMetricsEndpoints", "namespaceSelector"}
    unknown |= {key for endpoint in endpoints for key in endpoint} - _POD_MONITOR
    if monitor["apiVersion"] != "monitoring.coreos.com/v1" or unknown or not endpoints:
        raise CheckError(f"PodMonitor of {monitor['apiVersion']}, {len(endpoints)} endpoints: not known: {unknown}")


def _first(root: Path, name: str) -> Any:
    return read_yaml(root / "serving/k8s" / name)


CHECKS = (check_kubernetes, check_kserve, check_pods, check_kustomize)
