"""Who trains together: the strategy of a run, and `TF_CONFIG` as Kubeflow, Ray and Vertex set it, checked at once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STRATEGIES = ("one", "mirrored", "workers")
# What a MultiWorkerMirroredStrategy trains with, the chief first.
_TASKS = ("chief", "worker")


@dataclass(frozen=True)
class Cluster:
    """The processes that train together, as `TF_CONFIG` has them.

    Attributes:
        addresses: `host:port` of each, the chief's first: that of the task "chief", or else of the first worker.
        index: Which of them this process is.
    """

    addresses: tuple[str, ...]
    index: int

    @property
    def is_chief(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.index == 0


def read(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that `TF_CONFIG` in `environment` describes; None where it is not set or has no cluster.

    Raises:
        ValueError: It is no JSON of a cluster of chief and workers, of which this process is one.
    """
    text = environment.get("TF_CONFIG", "")
    if not text.strip():
        return None
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`TF_CONFIG` must be JSON ({error}). Received: TF_CONFIG={text}") from error
    if not isinstance(config, dict) or not isinstance(config.get("cluster", {}), dict):
        raise ValueError(
            '`TF_CONFIG` must be an object like {"cluster": {"worker": ["host:port", ...]}, '
            f'"task": {{"type": "worker", "index": 0}}}}. Received: TF_CONFIG={text}'
        )
    cluster = config.get("cluster")
    if not cluster:
        return None
    _check_cluster(cluster)
    task = config.get("task")
    if not isinstance(task, dict) or task.get("type") not in cluster:
        raise ValueError(f"`task` in TF_CONFIG must be of a type of {sorted(cluster)}. Received: task={task!r}")
    kind = task["type"]
    index = str(task.get("index"))  # Some write it as a string.
    if not index.isdigit() or int(index) >= len(cluster[kind]):
        raise ValueError(
            f'`index` in TF_CONFIG\'s task must be in [0, {len(cluster[kind]) - 1}], of the addresses of "{kind}". '
            f"Received: index={index}"
        )
    before = len(cluster.get("chief", [])) if kind == "worker" else 0
    return Cluster(tuple(address for kind in _TASKS for address in cluster.get(kind, [])), before + int(index))


def _check_cluster(cluster: dict[str, Any]) -> None:
    unknown = sorted(set(cluster) - set(_TASKS))
    if unknown:
        raise ValueError(
            "`cluster` in TF_CONFIG must have the tasks chief and worker only: there are no parameter servers and no "
            f"evaluators here, and a master is called chief. Received: {', '.join(unknown)}"
        )
    for kind, addresses in cluster.items():
        if not (isinstance(addresses, list) and addresses and all(_is_address(address) for address in addresses)):
            raise ValueError(f'`{kind}` in TF_CONFIG must be a list of "host:port". Received: {kind}={addresses!r}')
    if len(cluster.get("chief", [])) > 1:
        raise ValueError(f"`chief` in TF_CONFIG must be one address. Received: chief={cluster['chief']}")
    everyone = [address for addresses in cluster.values() for address in addresses]
    if len(set(everyone)) < len(everyone):
        raise ValueError(f"`cluster` in TF_CONFIG must have each address once. Received: {sorted(everyone)}")


def _is_address(address: Any) -> bool:
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    return bool(host) and port.isdigit()


def check(
    strategy: str,
    local_workers: int | None,
    replicas: int | None,
    restart: bool,
    batch_size: int,
    cluster: Cluster | None,
) -> None:
    """Refuse flags of a run that do not go together, and a cluster that they leave alone.

    Args:
        strategy: One of `STRATEGIES`.
        local_workers: How many workers to start on this machine; None for none.
        replicas: How many replicas are mirrored in this process; None for all GPUs.
        restart: Whether the run starts anew.
        batch_size: Of all replicas together.
        cluster: As `TF_CONFIG` has it.

    Raises:
        ValueError: They do not go together.
    """
    for name, value, needed in (("local_workers", local_workers, "workers"), ("replicas", replicas, "mirrored")):
        if value is not None and strategy != needed:
            raise ValueError(f"`{name}` needs `strategy={needed}`. Received: {name}={value}, strategy={strategy}")
        if value is not None and value < 2:
            raise ValueError(f"`{name}` must be at least 2. Received: {name}={value}")
    count = 1 if cluster is None else len(cluster.addresses)
    if strategy != "workers" and count > 1:
        raise ValueError(
            f"`strategy` must be workers where TF_CONFIG names {count} processes: each would train a network of its "
            f"own. Unset TF_CONFIG to do that. Received: strategy={strategy}"
        )
    if strategy == "workers" and local_workers is None and cluster is None:
        raise ValueError(
            "`strategy=workers` needs TF_CONFIG in the environment of each process, or `local_workers` to start some "
            "on this machine. Received: neither"
        )
    if local_workers is not None and cluster is not None:
        raise ValueError(
            "`local_workers` must not be given where TF_CONFIG says who trains. "
            f"Received: local_workers={local_workers}, and TF_CONFIG with {count} processes"
        )
    if restart and cluster is not None and strategy == "workers":
        raise ValueError(
            "`restart` must not be given with TF_CONFIG: a worker that died and is started by the same command would "
            "forget what the others did. Choose another `output`. Received: restart=True"
        )
    least = local_workers or replicas or count
    if batch_size < least:
        raise ValueError(
            f"`batch_size` must be at least {least}, an image for each replica. Received: batch_size={batch_size}"
        )
