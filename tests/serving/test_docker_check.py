"""What Docker and Kubernetes run passes its checks, and the checks see what is wrong."""

import re
import shutil

import pytest

from serving.check import CheckError, Skipped, files, kserve, kubernetes, training
from tests.serving.servers import ROOT

pytest.importorskip("kubernetes_validate", reason="needs the test extra")


@pytest.mark.parametrize("check", files.CHECKS + kubernetes.CHECKS + training.CHECKS, ids=lambda check: check.__name__)
def test_the_files_pass(check):
    try:
        check()
    except Skipped as reason:
        pytest.skip(str(reason))


@pytest.fixture
def copy(tmp_path):
    """A copy of the files that are checked, to be spoilt."""
    shutil.copytree(
        ROOT / "serving", tmp_path / "serving", ignore=shutil.ignore_patterns("*.py", "__pycache__", "page")
    )
    shutil.copytree(ROOT / "models/k8s", tmp_path / "models/k8s")
    for name in ("Dockerfile", ".dockerignore", "setup.cfg"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


MODELS, BATCHING, MONITORING = (f"serving/config/{name}.config" for name in ("models", "batching", "monitoring"))
COMPOSE = "serving/compose.yaml"
DASHBOARD = "serving/monitoring/grafana/dashboards/serving.json"
DEPLOYMENT, AUTOSCALER = (f"serving/k8s/base/{name}.yaml" for name in ("deployment", "autoscaler"))
TFJOB, VOLUME = "models/k8s/tfjob.yaml", "models/k8s/volume.yaml"
KSERVE = "serving/k8s/kserve/inference-service.yaml"
CONSTRAINTS = "serving/constraints/2.20.0.txt"
GRPC, POD_MONITOR = (
    "serving/k8s/components/grpc/kustomization.yaml",
    "serving/k8s/components/pod-monitor/pod-monitor.yaml",
)
SPOILT = [
    (files.lint_dockerfile, "Dockerfile", "WORKDIR /src", "WORKDIR src", "DL3000"),
    (files.check_build_context, ".dockerignore", "!keras_bn_cli\n", "", "['keras_bn_cli']"),
    (
        files.check_constraints,
        CONSTRAINTS,
        "tensorflow==2.20.0",
        "tensorflow==2.21.0",
        "2.20.0.txt has tensorflow==2.21.0",
    ),
    (files.check_constraints, CONSTRAINTS, "keras==3", "keras==2", "setup.cfg says keras>=3"),
    (files.check_constraints, CONSTRAINTS, "uvloop==", "other==", "has uvloop==None"),
    (files.check_constraints, "Dockerfile", "VERSION=2.20.0", "VERSION=2.18.0", "no serving/constraints/2.18.0.txt"),
    (files.check_command_lines, "Dockerfile", "threads=64", "threads=8", "cannot fill batches of 64"),
    (files.check_command_lines, "Dockerfile", "enable_batching=true", "enable_batches=true", "Did you mean"),
    (files.check_command_lines, "Dockerfile", "/config/batching", "/config/b", "no serving/config/b.config"),
    (
        files.check_command_lines,
        "Dockerfile",
        'ENTRYPOINT ["/usr',
        'ENTRYPOINT exec ["/usr',
        "has 0 ENTRYPOINTs in exec",
    ),
    (files.check_text_protos, MODELS, "base_path", "base_paths", 'no field named "base_paths"'),
    (files.check_text_protos, BATCHING, "size { value: ", "size { value: -", "must be at least"),
    (files.check_text_protos, MONITORING, "enable: true", "enable: false", "prometheus.yml scrapes"),
    (files.check_dashboard, DASHBOARD, "request_latency", "latency", "latency_bucket"),
]
SPOILT_FOR_SLOW_TOOLS = [
    (files.check_compose, COMPOSE, "read_only: true", "readonly: true", "readonly"),
    (files.check_compose, COMPOSE, "./monitoring/grafana/dash", "./grafana/dash", "which is not there"),
    (files.check_compose, COMPOSE, 'BASIC_ENABLED: "false"', 'BASIC_ENABLED: "true"', "takes admin/admin"),
    (files.check_compose, COMPOSE, "cpus: ${CPUS:-2}", "cpus: ${CPUS:-4}", "batching.config's num_batch_threads"),
    (files.check_compose, COMPOSE, '"127.0.0.1:${GRPC', '"${GRPC', "must begin with 127.0.0.1"),
    (kubernetes.check_kubernetes, DEPLOYMENT, "readinessProbe:", "readyProbe:", "readyProbe"),
    (kubernetes.check_kubernetes, AUTOSCALER, "autoscaling/v2", "autoscaling/v9", "Couldn't find schema"),
    (kubernetes.check_kubernetes, KSERVE, "minReplicas", "leastReplicas", "leastReplicas"),
    (kubernetes.check_kubernetes, POD_MONITOR, "port: rest, path", "port: rest, paths", "{'paths'}"),
]
SPOILT_RULES = [
    (
        kubernetes.check_kserve,
        KSERVE,
        "deploymentMode: Raw",
        "mode: Raw",
        "scaleMetric must be one of concurrency, rps",
    ),
    (kubernetes.check_kserve, KSERVE, "Mode: RawDeployment", "Mode: Standard", "before 0.16"),
    (kubernetes.check_kserve, KSERVE, "autoscalerClass: hpa", "autoscalerClass: kpa", "Received: kpa"),
    (kubernetes.check_kserve, KSERVE, "scaleMetric: cpu", "scaleMetric: rps", "scaleMetric must be one of cpu, memory"),
    (kubernetes.check_kserve, KSERVE, "scaleTarget: 70", "scaleTarget: 700", "from 1 to 100 percent"),
    (kubernetes.check_kserve, KSERVE, "maxReplicas: 10", "maxReplicas: 1", "minReplicas must be from 0 to maxReplicas"),
    (kubernetes.check_kserve, KSERVE, "name: kserve-container", "name: server", "must be called kserve-container"),
    (kubernetes.check_pods, DEPLOYMENT, "\n  selector:", "\n  replicas: 2\n  selector:", "fights the autoscaler"),
    (kubernetes.check_pods, DEPLOYMENT, '[sleep, "40"]', '[sleep, "10"]', "and the 30 s that one may take"),
    (kubernetes.check_pods, DEPLOYMENT, "PeriodSeconds: 50", "PeriodSeconds: 40", "must be more than preStop's 40 s"),
    (kubernetes.check_pods, DEPLOYMENT, "--port=0", "--port=8500", "model management with it, must be off"),
    (kubernetes.check_pods, DEPLOYMENT, 'limits: { cpu: "2"', 'limits: { cpu: "4"', "num_batch_threads 2"),
    (
        kubernetes.check_pods,
        DEPLOYMENT,
        "inter_op_parallelism=$(CPU_LIMIT)",
        "inter_op_parallelism=8",
        "must be CPU_LIMIT",
    ),
    (kubernetes.check_pods, DEPLOYMENT, "resource: limits.cpu", "resource: limits.memory", "must be CPU_LIMIT"),
    (kubernetes.check_pods, DEPLOYMENT, "memory: 1Gi", "memory: 768Mi", "half of limits.memory"),
    (kubernetes.check_pods, KSERVE, "TF_MKL_ALLOC_MAX_BYTES", "TF_MKL_ALLOC", "Received: None of 1073741824"),
    (kubernetes.check_pods, DEPLOYMENT, "timeoutSeconds: 5", "timeoutSeconds: 4", "ends by itself"),
    (
        kubernetes.check_pods,
        DEPLOYMENT,
        "path: /monitoring/prometheus/metrics, port",
        "path: /v1, port",
        "livenessProbe must",
    ),
    (kubernetes.check_pods, KSERVE, "shareProcessNamespace: true", "shareProcessNamespace: false", "SIGTERM"),
    (kubernetes.check_pods, KSERVE, "port: http1 }", "port: rest }", "which the container does not have"),
]
SPOILT_TRAINING = [
    (training.check_training, TFJOB, "kind: TFJob", "kind: PyTorchJob", "where kubeflow.org/v1 TFJob is wanted"),
    (training.check_training, TFJOB, "cleanPodPolicy: Running", "cleanPodsPolicy: Running", "'cleanPodsPolicy' was"),
    (training.check_training, TFJOB, "cleanPodPolicy: Running", "cleanPodPolicy: Never", "'Never' is not one of"),
    (training.check_training, TFJOB, "    Worker:", "    Workers:", "'Workers' is not one of"),
    (training.check_training, TFJOB, "emptyDir: {", "emptyDirectory: {", "emptyDirectory"),
    (training.check_training, TFJOB, "name: fashion-cnn-training\n  labels", "name: 1cnn\n  labels", "a letter first"),
    (training.check_training, TFJOB, "- name: tensorflow", "- name: trainer", "one container called tensorflow"),
    (training.check_training, TFJOB, "Policy: ExitCode", "Policy: OnFailure", "restartPolicy must be ExitCode"),
    (training.check_training, TFJOB, "minAvailable: 3", "minAvailable: 2", "minAvailable must be 3"),
    (training.check_training, TFJOB, "replicas: 1\n", "replicas: 2\n", "Chief.replicas must be 1"),
    (training.check_training, TFJOB, "containerPort: 2222", "containerPort: 2223", "tfjob-port must be 2222"),
    (training.check_training, TFJOB, "--strategy=workers", "--strategy=one", "TF_CONFIG names 3 processes"),
    (training.check_training, TFJOB, "--epochs=40", "--epoch_count=40", "unrecognized arguments: --epoch_count=40"),
    (training.check_training, TFJOB, "--batch_size=384", "--batch_size=2", "`batch_size` must be at least 3"),
    (training.check_training, TFJOB, "- --recalibrate", "- --restart", "`restart` must not be given with TF_CONFIG"),
    (
        training.check_training,
        TFJOB,
        "--output=/run/training",
        "--output=/tmp/run",
        "on a volume that outlives the pod",
    ),
    (training.check_training, TFJOB, "    Worker:", "    PS:", "no parameter servers"),
    (training.check_training, VOLUME, "name: fashion-cnn-training", "name: other", "mounts the claim"),
    (training.check_training, VOLUME, "accessModes", "accessMode", "accessMode"),
]
RENDERED = [
    ("serving/k8s/base/service.yaml", "selector: { app", "selector: { other", "Service selects {'other"),
    ("serving/k8s/base/network-policy.yaml", "port: rest", "port: http", "NetworkPolicy names the port 'http'"),
    (POD_MONITOR, "port: rest", "port: http", "PodMonitor names the port 'http'"),
    (GRPC, "--port=8500", "--port=8600", "--port=8600"),
    (GRPC, "from:", "to:", "Additional properties are not allowed"),
    (GRPC, "- podSelector: { matchLabels: { fashion-cnn-grpc: client } }", "[]", "lets everybody reach gRPC"),
]


@pytest.mark.parametrize(
    ("check", "name", "right", "wrong", "message"),
    SPOILT
    + SPOILT_RULES
    + SPOILT_TRAINING
    + [pytest.param(*one, marks=pytest.mark.slow) for one in SPOILT_FOR_SLOW_TOOLS],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mistake_in_a_file_is_found(copy, check, name, right, wrong, message):
    path = copy / name
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong))
    try:
        with pytest.raises(CheckError, match=re.escape(message)):
            check(copy)
    except Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.skipif(not shutil.which("kubectl") and not shutil.which("kustomize"), reason="neither is here")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "right", "wrong", "message"), RENDERED)
def test_what_does_not_fit_together_once_rendered_is_found(copy, name, right, wrong, message):
    path = copy / name
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong))
    with pytest.raises(CheckError, match=re.escape(message)):
        kubernetes.check_kustomize(copy)


def test_pods_that_would_not_make_the_same_batches_are_found(copy):
    path = copy / TFJOB
    path.write_text(path.read_text().replace("--epochs=40", "--epochs=41", 1))
    with pytest.raises(CheckError, match="all pods must run the same command"):
        training.check_training(copy)


def test_what_knative_refuses_by_default_is_named():
    service = files.read_yaml(ROOT / KSERVE)
    del service["metadata"]["annotations"][kserve.MODE]
    refused = " ".join(kserve.problems(service))
    for field in (
        "shareProcessNamespace",
        "terminationGracePeriodSeconds",
        "securityContext",
        "lifecycle",
        "CPU_LIMIT",
    ):
        assert field in refused


def test_the_health_check_of_both_images_is_the_same():
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert dockerfile.count("HEALTHCHECK") == dockerfile.count('CMD ["model-available", "fashion_cnn"]') == 2
