"""Who trains together: what Kubeflow, Ray and Vertex set is read, and what does not go together is refused at once."""

import json

import pytest

from models import cluster, train

WORKERS = {"worker": ["a:1", "b:2"]}


def _config(clusters=None, task=None, **more):
    return {"TF_CONFIG": json.dumps({"cluster": clusters or WORKERS, "task": task, **more})}


@pytest.mark.parametrize(
    ("config", "index", "addresses"),
    [
        # Kubeflow.
        (
            _config(
                {"chief": ["job-chief-0.ns.svc:2222"], "worker": ["job-worker-0.ns.svc:2222"]},
                {"type": "worker", "index": 0},
                environment="cloud",
            ),
            1,
            ("job-chief-0.ns.svc:2222", "job-worker-0.ns.svc:2222"),
        ),
        # Ray.
        (_config(task={"type": "worker", "index": 1}), 1, ("a:1", "b:2")),
        # Vertex AI.
        (
            _config(
                {"chief": ["c:1"], "worker": ["a:1", "b:2"]},
                {"type": "chief", "index": "0", "trial": "1"},
                job="{}",
            ),
            0,
            ("c:1", "a:1", "b:2"),
        ),
        (_config({"worker": ["[::1]:80"]}, {"type": "worker", "index": 0}), 0, ("[::1]:80",)),
    ],
)
def test_the_cluster_is_read_as_it_is_set(config, index, addresses):
    members = cluster.read(config)
    assert (members.index, members.addresses, members.is_chief) == (index, addresses, index == 0)


@pytest.mark.parametrize("environment", [{}, {"TF_CONFIG": ""}, {"TF_CONFIG": "{}"}, {"TF_CONFIG": '{"cluster": {}}'}])
def test_without_a_cluster_there_is_none(environment):
    assert cluster.read(environment) is None


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"TF_CONFIG": "{"}, r"`TF_CONFIG` must be JSON \(.*Received: TF_CONFIG={"),
        ({"TF_CONFIG": "[1]"}, r"must be an object like .*Received: TF_CONFIG=\[1\]"),
        (_config({"worker": ["a:1"], "ps": ["p:1"]}), "no parameter servers .*Received: ps"),
        (_config({"master": ["a:1"]}), "a master is called chief. Received: master"),
        (_config({"worker": "a:1"}), r"`worker` in TF_CONFIG must be a list of .*worker='a:1'"),
        (_config({"worker": ["a"]}), r"list of \"host:port\". Received: worker=\['a'\]"),
        (_config({"chief": ["a:1", "b:1"]}), r"`chief` in TF_CONFIG must be one address. .*\['a:1', 'b:1'\]"),
        (_config({"chief": ["a:1"], "worker": ["a:1"]}), r"each address once. Received: \['a:1', 'a:1'\]"),
        (_config(), r"`task` in TF_CONFIG must be of a type of \['worker'\]. Received: task=None"),
        (_config(task={"type": "chief", "index": 0}), r"a type of \['worker'\]"),
        (_config(task={"type": "worker", "index": 2}), r"`index` in TF_CONFIG's task must be in \[0, 1\].*index=2"),
        (_config(task={"type": "worker"}), r"in \[0, 1\], .*Received: index=None"),
    ],
)
def test_a_cluster_that_is_none_is_refused(config, text):
    with pytest.raises(ValueError, match=text):
        cluster.read(config)


TWO = _config(task={"type": "worker", "index": 1})


@pytest.mark.parametrize(
    ("flags", "environment", "text"),
    [
        ("--strategy all", {}, "invalid choice: 'all'"),
        ("--local_workers 2", {}, "`local_workers` needs `strategy=workers`. Received: local_workers=2, strategy=one"),
        ("--strategy workers --replicas 2", {}, "`replicas` needs `strategy=mirrored`. Received: replicas=2"),
        ("--strategy workers --local_workers 1", {}, "`local_workers` must be at least 2. Received: local_workers=1"),
        ("", TWO, "`strategy` must be workers where TF_CONFIG names 2 processes"),
        ("--strategy mirrored", TWO, "Received: strategy=mirrored"),
        ("--strategy workers", {}, "needs TF_CONFIG in the environment of each process, or `local_workers`"),
        ("--strategy workers --local_workers 2", TWO, "`local_workers` must not be given where TF_CONFIG says"),
        ("--strategy workers --restart", TWO, "`restart` must not be given with TF_CONFIG"),
        ("--strategy workers --batch_size 1", TWO, "`batch_size` must be at least 2, an image for each replica"),
        ("--strategy mirrored --replicas 4 --batch_size 3", {}, "`batch_size` must be at least 4"),
        ("", {"TF_CONFIG": "{"}, "`TF_CONFIG` must be JSON"),
    ],
)
def test_the_command_refuses_what_does_not_go_together_in_one_line(flags, environment, text, monkeypatch, capsys):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        train.main(flags.split())
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("python -m models.train: error: ")
    assert text in last
