"""What Docker and Kubernetes run passes its checks, and the checks see what is wrong."""

import re
import shutil

import pytest

from serving.check import CheckError, Skipped, files
from tests.serving.servers import ROOT

pytest.importorskip("kubernetes_validate", reason="needs the test extra")


@pytest.mark.parametrize("check", files.CHECKS, ids=lambda check: check.__name__)
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
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    return tmp_path


MODELS, BATCHING, MONITORING = (f"serving/config/{name}.config" for name in ("models", "batching", "monitoring"))
COMPOSE = "serving/compose.yaml"
DASHBOARD = "serving/monitoring/grafana/dashboards/serving.json"
DEPLOYMENT, AUTOSCALER = (f"serving/k8s/base/{name}.yaml" for name in ("deployment", "autoscaler"))
KSERVE = "serving/k8s/kserve/inference-service.yaml"
SPOILT = [
    (files.lint_dockerfile, "Dockerfile", "WORKDIR /src", "WORKDIR src", "DL3000"),
    (files.check_command_lines, "Dockerfile", "enable_batching=true", "enable_batches=true", "Did you mean"),
    (files.check_command_lines, "Dockerfile", "/config/batching", "/config/b", "no serving/config/b.config"),
    (files.check_command_lines, "Dockerfile", 'ENTRYPOINT ["/usr', 'ENTRYPOINT exec ["/usr', "1 ENTRYPOINTs in exec"),
    (files.check_text_protos, MODELS, "base_path", "base_paths", 'no field named "base_paths"'),
    (files.check_text_protos, BATCHING, "size { value: ", "size { value: -", "must be at least"),
    (files.check_text_protos, MONITORING, "enable: true", "enable: false", "prometheus.yml scrapes"),
    (files.check_dashboard, DASHBOARD, "request_latency", "latency", "latency_bucket"),
]
SPOILT_FOR_SLOW_TOOLS = [
    (files.check_compose, COMPOSE, "read_only: true", "readonly: true", "readonly"),
    (files.check_compose, COMPOSE, "./monitoring/grafana/dash", "./grafana/dash", "which is not there"),
    (files.check_kubernetes, DEPLOYMENT, "readinessProbe:", "readyProbe:", "readyProbe"),
    (files.check_kubernetes, AUTOSCALER, "autoscaling/v2", "autoscaling/v9", "Couldn't find schema"),
    (files.check_kubernetes, KSERVE, "minReplicas", "leastReplicas", "leastReplicas"),
]


@pytest.mark.parametrize(
    ("check", "name", "right", "wrong", "message"),
    SPOILT + [pytest.param(*one, marks=pytest.mark.slow) for one in SPOILT_FOR_SLOW_TOOLS],
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
def test_a_service_that_selects_no_pod_is_found(copy):
    path = copy / "serving/k8s/base/service.yaml"
    path.write_text(path.read_text().replace("selector: { app", "selector: { other"))
    with pytest.raises(CheckError, match=r"base: Service selects \{'other"):
        files.check_kustomize(copy)


def test_all_probes_of_kubernetes_and_the_images_run_the_health_check():
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert dockerfile.count("HEALTHCHECK") == dockerfile.count('CMD ["model-available", "fashion_cnn"]') == 2
    deployment = files._yaml(ROOT / "serving/k8s/base/deployment.yaml")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        _, model, *rest = container[name]["exec"]["command"]
        own_limit = float(rest[1]) if rest else 3
        assert model == "fashion_cnn"
        # It has to end by itself before it is ended, also with `timeout`'s second of grace.
        assert own_limit + 1 < container[name]["timeoutSeconds"]
