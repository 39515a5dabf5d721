"""What a server of the image's command line is asked, and that the checks see what is wrong with it."""

import json
import signal
import stat
import sys
from pathlib import Path

import pytest
from tensorflow.core.protobuf import saved_model_pb2

from serving.check import CheckError, questions, server
from serving.check import __main__ as command
from serving.check.questions import Answer, Asked
from tests.serving.servers import ROOT

REFUSES = "FAILED_PRECONDITION: Batched output tensor's 0th dimension does not equal"


def a_binary(folder: Path, script: str) -> Path:
    path = folder / "tensorflow_model_server"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("library", ["2.20.0", "2.20.1", "2.21.0", "2.100.0"])
def test_a_server_may_be_as_old_as_what_exported_or_newer(tmp_path, library):
    said = server.check_not_newer("2.20.0", a_binary(tmp_path, f"echo TensorFlow Library: {library}"))
    assert library in said


@pytest.mark.parametrize("library", ["2.19.1", "2.9.0", "1.15.0"])
def test_a_server_older_than_what_exported_is_refused(tmp_path, library):
    binary = a_binary(tmp_path, f"echo TensorFlow Library: {library}")
    with pytest.raises(CheckError, match=rf"TensorFlow {library}, the network was exported with 2.20.0: install what"):
        server.check_not_newer("2.20.0", binary)


def test_a_server_that_does_not_say_its_version_is_refused(tmp_path):
    with pytest.raises(CheckError, match="says no `TensorFlow Library"):
        server.check_not_newer("2.20.0", a_binary(tmp_path, "echo hello"))


@pytest.mark.parametrize(("card", "right"), [("2.20.0", True), ("2.21.0", False)])
def test_savedmodel_and_card_name_one_tensorflow(tmp_path, card, right):
    saved_model = saved_model_pb2.SavedModel()
    saved_model.meta_graphs.add().meta_info_def.tensorflow_version = "2.20.0"
    (tmp_path / "saved_model.pb").write_bytes(saved_model.SerializeToString())
    (tmp_path / "assets.extra").mkdir()
    (tmp_path / "assets.extra/keras_bn.json").write_text(json.dumps({"versions": {"tensorflow": card}}))
    if right:
        assert server.exporter_version(tmp_path) == "2.20.0"
    else:
        with pytest.raises(CheckError, match=r"several TensorFlows: \['2.20.0', '2.21.0'\]"):
            server.exporter_version(tmp_path)


def test_a_model_that_does_not_load_is_told_at_once_and_in_the_servers_words(tmp_path):
    # A real server would try again for five minutes.
    refusing = a_binary(tmp_path, f'echo "Loading servable: {{name: m version: 1}} failed: {REFUSES}"; exec sleep 600')
    with pytest.raises(CheckError, match=f"does not load: {REFUSES}"), server.running(refusing, tmp_path):
        pass


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path):
    ending = a_binary(tmp_path, "echo out of order; exit 3")
    with pytest.raises(CheckError, match="has ended: out of order"), server.running(ending, tmp_path):
        pass


def test_a_server_gets_the_images_environment(tmp_path):
    printing = a_binary(tmp_path, "env")
    with pytest.raises(CheckError, match=r"(?m)^TF_MKL_ALLOC_MAX_BYTES=\d+$"), server.running(printing, tmp_path):
        pass


def test_a_server_gets_the_images_flags_with_paths_of_this_machine(tmp_path):
    printing = a_binary(tmp_path, 'for flag; do echo "$flag"; done; cat "${3#*=}"')
    with pytest.raises(CheckError) as raised, server.running(printing, tmp_path / "models"):
        pass
    said = str(raised.value)
    assert "--enable_batching=true" in said
    assert "=/config/" not in said
    assert "/models/fashion_cnn" not in said


OK = Answer(200, {"predictions": [[0.25, 1]]})


@pytest.mark.parametrize(
    ("theirs", "alike"),
    [
        (OK, True),
        (Answer(200, {"predictions": [[0.25001, 1]]}), True),
        (Answer(200, {"predictions": [[0.26, 1]]}), False),
        (Answer(200, {"predictions": [[0.25, 1.0]]}), False),
        (Answer(200, {"predictions": [[0.25, 2]]}), False),
        (Answer(200, {"predictions": [[0.25]]}), False),
        (Answer(200, {"outputs": [[0.25, 1]]}), False),
        (Answer(400, {"error": "no"}), False),
        (OK._replace(status=206), False),
    ],
)
def test_answers_are_alike_up_to_the_rounding_of_floats(theirs, alike):
    different = list(questions.differences([Asked("q", OK)], [Asked("q", theirs)]))
    assert (different == []) == alike


@pytest.mark.parametrize(
    ("theirs", "alike"),
    [
        ("bad shape\n\t [[{{node other_name}}]]", True),
        ("bad shape", True),
        ("bad rank\n\t [[{{node some_name}}]]", False),
    ],
)
def test_of_an_error_everything_counts_but_the_nodes_that_it_names(theirs, alike):
    ours = Answer(400, {"error": "bad shape\n\t [[{{node some_name}}]]"})
    different = list(questions.differences([Asked("q", ours)], [Asked("q", Answer(400, {"error": theirs}))]))
    assert (different == []) == alike


SHAPE = "Input `x` must have the shape [?,28,1]. Received: shape [2,28]."
NOTHING = "`x` has no entries, and its sizes are more than an array can have. Received: shape [2,28]."


@pytest.mark.parametrize(
    ("ours", "received", "expected", "alike"),
    [
        (SHAPE, "[2,28]", "[?,28,1]", True),
        (SHAPE, "[2,29]", "[?,28,1]", False),
        (SHAPE, "[2,28]", "[?,28,3]", False),
        (NOTHING, "[2,28]", "[?,28,1]", True),
        (NOTHING, "[2,29]", "[?,28,1]", False),
    ],
)
def test_a_refused_shape_is_compared_by_the_shapes_and_not_by_the_words(ours, received, expected, alike):
    theirs = f"Shape of tensor x_0 {received} is not compatible with expected shape {expected}.\n\t [[n]]"
    asked = [[Asked("q", Answer(400, {"error": text}))] for text in (ours, theirs)]
    assert (list(questions.differences(*asked)) == []) == alike


def test_a_report_counts_and_says_what_a_skipped_step_needs(capsys):
    report = command._Report()
    report.step("works", lambda: "found")
    report.skip("other", "needs a thing")

    def fail():
        raise CheckError("it is wrong")

    report.step("fails", fail)
    assert capsys.readouterr().out.splitlines() == [
        "PASS     works: found",
        "SKIPPED  other (needs a thing)",
        "FAIL     fails: it is wrong",
    ]
    assert (report.failed, report.skipped) == (1, 1)


def test_answers_are_kept_where_some_are_wrong():
    asked: list[Asked] = []
    with pytest.raises(CheckError, match=r"1 of 2, the first of them:\n *b: is wrong"):
        command._check_asked(iter([Asked("a", OK), Asked("b", OK, "is wrong")]), asked)
    assert [each.question for each in asked] == ["a", "b"]


def test_a_server_that_ended_before_sigterm_is_told():
    class Ended:
        log = "killed itself"
        ended = True

        def stop(self, number, seconds=30):
            return -6

    with pytest.raises(CheckError, match=r"exit code -6, where -15 is expected: killed itself"):
        command._end(Ended(), -signal.SIGTERM)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    base_path = tmp_path_factory.mktemp("docker_check") / "fashion_cnn"
    server.export(base_path)
    return base_path


@pytest.fixture
def few_malformed(monkeypatch):
    # The whole five thousand are for `make docker-check`, and for tests/serving/test_malformed.py.
    monkeypatch.setattr(questions, "_MALFORMED", 100)


@pytest.mark.slow
@pytest.mark.usefixtures("few_malformed")
def test_the_embedded_server_runs_the_images_command_line_and_gives_every_answer_right(exported):
    with server.running(None, exported) as running:
        wrong = [asked for group in questions.GROUPS for asked in group(running) if asked.problem]
        assert wrong == []
        assert running.process.stop(signal.SIGTERM) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("few_malformed")
def test_a_real_server_that_answers_otherwise_is_found(exported, tmp_path, capsys):
    # The embedded server without batches: it answers more rows than a batch may have.
    script = f'cd {ROOT}/serving && exec {sys.executable} -m keras_bn_serving "$@" --enable_batching=false '
    binary = a_binary(tmp_path, script + "--batching_parameters_file=")
    report = command._Report()
    ours = command._run_server(report, "embedded", None, exported)
    command._compare(report, "real", ours, command._run_server(report, "real", binary, exported))
    lines = capsys.readouterr().out.splitlines()
    rows = "Every signature answers 1 to 64 rows over REST, and refuses 65"
    assert any(line.startswith(f"FAIL     real and embedded answer alike: {rows}") for line in lines)
    assert any("65 rows as instances: embedded 400" in line for line in lines)
