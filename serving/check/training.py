"""Checks of what trains on Kubernetes: Kubeflow's schema, the rules of its operator, and the command that it starts."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from models import cluster, train

from . import ROOT, CheckError
from .files import command_line, read_yaml
from .kubernetes import validate

# Both of the operator: the container that it gives TF_CONFIG, and the port that its services have.
_CONTAINER = "tensorflow"
_PORT = 2222


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


_COUNT = {"type": "integer", "minimum": 0}
# What is in `spec` of kubeflow.org/v1 TFJob. Of the pods, Kubernetes's own schema.
SPEC = _object(
    runPolicy=_object(
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        backoffLimit=_COUNT,
        cleanPodPolicy={"enum": ["All", "Running", "None"]},
        managedBy={"type": "string"},
        schedulingPolicy=_object(
            minAvailable=_COUNT,
            minResources={"type": "object"},
            priorityClass={"type": "string"},
            queue={"type": "string"},
            scheduleTimeoutSeconds=_COUNT,
        ),
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished=_COUNT,
    ),
    successPolicy={"enum": ["", "AllWorkers"]},
    enableDynamicWorker={"type": "boolean"},
    tfReplicaSpecs={
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"enum": ["Chief", "Master", "Worker", "PS", "Evaluator"]},
        "additionalProperties": _object(
            replicas=_COUNT,
            restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
            template=_object(metadata={"type": "object"}, spec={"type": "object"}),
        )
        | {"required": ["template"]},
    },
) | {"required": ["tfReplicaSpecs"]}


def check_training(root: Path = ROOT) -> str:
    """The training job fits Kubeflow's schema and its operator, and each of its pods runs a command that trains."""
    folder = root / "models/k8s"
    job = read_yaml(folder / "tfjob.yaml")
    _check_schema(job)
    for problem in (*_operator_problems(job), *_pod_problems(job, root)):
        raise CheckError(f"tfjob.yaml: {problem}")
    others = [path for path in sorted(folder.glob("*.yaml")) if path.name != "tfjob.yaml"]
    resources = [resource for path in others for resource in yaml.safe_load_all(path.read_text())]
    names = list(validate(resources))
    for claim in _claims(job):
        if f"PersistentVolumeClaim/{claim}" not in names:
            raise CheckError(f"tfjob.yaml: mounts the claim {claim!r}; there are {', '.join(names)}")
    addresses = _cluster_of(job)
    return f"TFJob/{job['metadata']['name']}, {sum(map(len, addresses.values()))} pods; {', '.join(names)}"


def _check_schema(job: dict[str, Any]) -> None:
    import jsonschema

    if job["apiVersion"] != "kubeflow.org/v1" or job["kind"] != "TFJob":
        raise CheckError(f"tfjob.yaml: {job['kind']} of {job['apiVersion']}, where kubeflow.org/v1 TFJob is wanted")
    try:
        jsonschema.validate(job["spec"], SPEC)
    except jsonschema.ValidationError as error:
        raise CheckError(f"tfjob.yaml: spec.{'.'.join(map(str, error.path))}: {error.message}") from error
    for kind, part in job["spec"]["tfReplicaSpecs"].items():
        metadata = {**part["template"].get("metadata", {}), "name": kind.lower()}
        list(validate([{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": part["template"]["spec"]}]))


def _operator_problems(job: dict[str, Any]) -> Iterator[str]:
    """What the training operator refuses, or does other than is meant.

    Reference: kubeflow/training-operator, release 1.9: pkg/webhooks/tensorflow and pkg/apis/kubeflow.org/v1.
    """
    name = job["metadata"]["name"]
    if not re.fullmatch("[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
        yield f"the name {name!r} must be of small letters, digits and -, a letter first: services are named after it"
    parts = job["spec"]["tfReplicaSpecs"]
    if parts.get("Chief", {}).get("replicas", 1) != 1:
        yield "Chief.replicas must be 1"
    for kind, part in parts.items():
        containers = part["template"]["spec"]["containers"]
        if [container["name"] for container in containers].count(_CONTAINER) != 1:
            yield f"{kind} must have one container called {_CONTAINER}"
        if any(not container.get("image") for container in containers):
            yield f"{kind} must have an image for each container"
        if part.get("restartPolicy") != "ExitCode":
            yield f"{kind}.restartPolicy must be ExitCode: a worker that lost another one ends with a code to try again"
        if "restartPolicy" in part["template"]["spec"]:
            yield f"{kind}'s pods must have no restartPolicy: that of the job is put over it"
    gang = job["spec"].get("runPolicy", {}).get("schedulingPolicy", {}).get("minAvailable")
    pods = sum(part.get("replicas", 1) for part in parts.values())
    if gang not in (None, pods):
        yield f"minAvailable must be {pods}, all pods: none trains without the others. Received: {gang}"


def _pod_problems(job: dict[str, Any], root: Path) -> Iterator[str]:
    """What is wrong with the command of a pod, in the cluster that the operator makes of the job."""
    commands = set()
    clusters = _cluster_of(job)
    for kind, part in job["spec"]["tfReplicaSpecs"].items():
        (container,) = part["template"]["spec"]["containers"]
        ports = [port["containerPort"] for port in container.get("ports", []) if port["name"] == "tfjob-port"]
        if ports not in ([], [_PORT]):
            yield f"{kind}: tfjob-port must be {_PORT}, or left to the operator. Received: {ports}"
        command = [*command_line(root, "training"), *container["args"]]
        commands.add(tuple(command))
        task = {"type": kind.lower(), "index": 0}
        environment = {"TF_CONFIG": json.dumps({"cluster": clusters, "task": task, "environment": "cloud"})}
        try:
            flags = _flags(command[3:])
            members = cluster.read(environment)
            cluster.check(flags.strategy, flags.local_workers, flags.replicas, flags.restart, flags.batch_size, members)
        except ValueError as error:
            yield f"{kind}: {error}"
            continue
        if kind == "Chief" and flags.output not in _mounts(part, "persistentVolumeClaim"):
            yield f"Chief: --output={flags.output} must be on a volume that outlives the pod"
    if len(commands) > 1:
        yield "all pods must run the same command, whose settings make the batches that they share"


def _flags(words: list[str]) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return train.flag_parser().parse_args(words)
    except SystemExit as error:
        raise ValueError(said.getvalue().splitlines()[-1]) from error


def _cluster_of(job: dict[str, Any]) -> dict[str, list[str]]:
    """As the operator writes it into TF_CONFIG, with a service for each pod."""
    name, namespace = job["metadata"]["name"], job["metadata"].get("namespace", "default")
    return {
        kind.lower(): [
            f"{name}-{kind.lower()}-{index}.{namespace}.svc:{_PORT}" for index in range(part.get("replicas", 1))
        ]
        for kind, part in job["spec"]["tfReplicaSpecs"].items()
    }


def _mounts(part: dict[str, Any], source: str) -> list[str]:
    """Where the pods of a part have volumes of that kind."""
    pod = part["template"]["spec"]
    names = {volume["name"] for volume in pod.get("volumes", []) if source in volume}
    return [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if mount["name"] in names]


def _claims(job: dict[str, Any]) -> Iterator[str]:
    for part in job["spec"]["tfReplicaSpecs"].values():
        for volume in part["template"]["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                yield volume["persistentVolumeClaim"]["claimName"]


CHECKS = (check_training,)
