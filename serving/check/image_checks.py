"""The images: from which bases they are built, and what has to be in them."""

from . import MODEL, ROOT, CheckError, files, images
from .server import wait_until

IMAGE = {"embedded": "localhost/fashion-cnn:embedded", "serving": "localhost/fashion-cnn:latest"}
# What both images hold of ours.
VERSION = f"/models/{MODEL}/1"
HELD = [
    *(f"{VERSION}/{name}" for name in ("saved_model.pb", "variables/variables.index", "assets.extra/keras_bn.json")),
    f"{VERSION}/assets.extra/tf_serving_warmup_requests",
    *(f"/config/{name}.config" for name in ("models", "batching", "monitoring")),
    "/usr/local/bin/model-available",
]


def python_image(given: str | None) -> str:
    default = files.build_argument("PYTHON_IMAGE")
    if given or images.pull(default):
        return given or default
    print(f"         {default} cannot be had; made by debootstrap instead", flush=True)
    return images.make_python_base()


def tf_serving_image(given: str | None) -> str:
    default = files.build_argument("TF_SERVING_IMAGE")
    if given or images.pull(default):
        return given or default
    print(f"         {default} cannot be had; a STAND-IN, which is the embedded server, takes its place", flush=True)
    return images.make_stand_in(IMAGE["embedded"])


def build(target: str, arguments: dict[str, str], pip: images.Pip) -> str:
    if not (ROOT / "models/pretrained/fashion_cnn.keras").exists():
        raise CheckError("models/pretrained/fashion_cnn.keras is missing: python -m models.pretrained make RUN")
    images.build(target, IMAGE[target], arguments, pip)
    return IMAGE[target]


def check_config(container: images.Container) -> str:
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


def check_held(container: images.Container) -> str:
    container.must_run("sh", "-c", 'for file; do test -s "$file" && cat "$file" > /dev/null || exit; done', "sh", *HELD)
    container.must_run("test", "-x", "/usr/local/bin/model-available")
    writable = container.run("find", "/models", "/config", "-writable").stdout.split()
    if writable:
        raise CheckError(f"its user can write {writable}")
    return f"{len(HELD)} files"


def check_left_out(container: images.Container, pip: images.Pip) -> str:
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


def check_written(container: images.Container) -> None:
    """buildah's chroot has no read-only root: that nothing was written shows that there could be one."""
    root = images.run("buildah", "mount", container.name).strip()
    written = images.run("find", root, "-xdev", "-uid", "65532").split()
    images.run("buildah", "umount", container.name)
    if written:
        raise CheckError(f"the server wrote {written} into its image; only /tmp is for that")


def wait(container: images.Container, process: images.Process, port: int) -> str:
    """Waits until the container's health check is content.

    Raises:
        CheckError: It is not, or is content with a model that is not there.
    """

    def settled() -> bool:
        return process.ended or not container.run("model-available", MODEL, str(port)).returncode

    if not wait_until(settled, 90) or process.ended:
        raise CheckError(f"the health check is not content after 90 s, or the server has ended: {process.log[-2000:]}")
    if container.run("model-available", "another", str(port)).returncode != 1:
        raise CheckError("the health check is content with a model that is not there")
    return "the health check is content"


def check_down(container: images.Container, port: int) -> None:
    """That the health check is not content with a server that has ended.

    Raises:
        CheckError: It is.
    """
    if container.run("model-available", MODEL, str(port)).returncode != 1:
        raise CheckError("it is content with a server that is down")
