"""What KServe's admission webhook and, below it, Knative's refuse, as far as this InferenceService may meet it."""

import re
from collections.abc import Iterator
from typing import Any

MODE = "serving.kserve.io/deploymentMode"
AUTOSCALER = "serving.kserve.io/autoscalerClass"
# What KServe adds to a Kubernetes pod in `spec.predictor`, of what is used here.
FIELDS = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget"}
# Up to 0.15 it has one name, from 0.16 on another, and the old one is still read.
_STANDARD = ("RawDeployment", "Standard")
_AUTOSCALERS = ("hpa", "keda", "external", "none")
_METRICS = {"hpa": ("cpu", "memory"), "knative": ("concurrency", "rps")}
# Parts of a pod that Knative takes; of others it takes some, once its cluster's config-features says so.
_KNATIVE_POD = {"containers", "volumes", "serviceAccountName", "imagePullSecrets", "enableServiceLinks"}
_KNATIVE_POD |= {"automountServiceAccountToken"}
_KNATIVE_CONTAINER = {"name", "args", "command", "env", "workingDir", "envFrom", "image", "imagePullPolicy", "ports"}
_KNATIVE_CONTAINER |= {
    "livenessProbe",
    "readinessProbe",
    "startupProbe",
    "resources",
    "securityContext",
    "volumeMounts",
}
_KNATIVE_CONTAINER |= {"terminationMessagePath", "terminationMessagePolicy"}


def problems(service: dict[str, Any]) -> Iterator[str]:
    """What would be refused of an InferenceService whose predictor is a container of ours; a sentence each.

    Reference: kserve/kserve, pkg/apis/serving/v1beta1/inference_service_validation.go and component.go (0.13 to 0.20);
        knative/serving, pkg/apis/serving/fieldmask.go, with the defaults of config-features.
    """
    annotations = service["metadata"].get("annotations", {})
    predictor = service["spec"]["predictor"]
    name = service["metadata"]["name"]
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the name {name!r} must be of small letters, digits and -, a letter first"
    standard = annotations.get(MODE) in _STANDARD
    autoscaler = annotations.get(AUTOSCALER, "hpa")
    if autoscaler not in _AUTOSCALERS:
        yield f"{AUTOSCALER} must be one of {', '.join(_AUTOSCALERS)}. Received: {autoscaler}"
    if MODE in annotations and annotations[MODE] not in (*_STANDARD, "Serverless", "Knative"):
        yield f"{MODE} must be RawDeployment or Serverless. Received: {annotations[MODE]}"
    if annotations.get(MODE) == "Standard":
        yield f"{MODE}: Standard is what KServe before 0.16 takes for Knative; RawDeployment is known to all"
    yield from _scaling_problems(predictor, standard, autoscaler)
    yield from _container_problems(predictor)
    if not standard:
        yield from _knative_problems(predictor)


def _scaling_problems(predictor: dict[str, Any], standard: bool, autoscaler: str) -> Iterator[str]:
    least, most = predictor.get("minReplicas", 1), predictor.get("maxReplicas", 0)
    if least < 0 or most < 0 or (most and least > most):
        yield f"minReplicas must be from 0 to maxReplicas. Received: {least} and {most}"
    kind = autoscaler if standard else "knative"
    metric, target = predictor.get("scaleMetric"), predictor.get("scaleTarget")
    if kind == "keda" and metric:
        yield "scaleMetric is not for KEDA: autoScaling.metrics is"
    allowed = _METRICS.get(kind)
    if metric and allowed and metric not in allowed:
        mode = f"with {MODE}: RawDeployment" if standard else f"without {MODE}: RawDeployment"
        yield f"scaleMetric must be one of {', '.join(allowed)} {mode}. Received: {metric}"
    if kind == "hpa" and target is not None and not 1 <= target <= 100:
        yield f"scaleTarget must be from 1 to 100 percent. Received: {target}"
    if metric == "rps" and target is not None and target < 1:
        yield f"scaleTarget must be at least 1. Received: {target}"


def _container_problems(predictor: dict[str, Any]) -> Iterator[str]:
    if len(predictor.get("containers", [])) != 1 or "model" in predictor:
        yield "spec.predictor must have one container, and no model beside it"
        return
    (container,) = predictor["containers"]
    if container.get("name") != "kserve-container":
        yield f"the container must be called kserve-container. Received: {container.get('name')}"
    if any(variable["name"] == "PYTHONPATH" for variable in container.get("env", [])):
        yield "PYTHONPATH must not be set"


def _knative_problems(predictor: dict[str, Any]) -> Iterator[str]:
    (container,) = predictor["containers"]
    for field in sorted(set(predictor) - FIELDS - _KNATIVE_POD):
        yield f"{field} is not allowed by Knative, or off in its config-features"
    for field in sorted(set(container) - _KNATIVE_CONTAINER):
        yield f"containers[0].{field} is not allowed by Knative"
    for variable in container.get("env", []):
        if {"fieldRef", "resourceFieldRef"} & set(variable.get("valueFrom", {})):
            yield f"the variable {variable['name']} refers to the pod, which is off in Knative's config-features"
    if len(container.get("ports", [])) > 1 or container["ports"][0].get("name") not in ("http1", "h2c", None):
        yield "one port, called http1 or h2c, is allowed by Knative"
