"""Each example runs with --quick, and prints what its page says that it shows."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__")

# Before each --quick there is nothing trained, and after it little: what is compared holds all the same.
pytestmark = pytest.mark.slow


def _printed(name, *flags):
    # A server that hangs must end too.
    command = [sys.executable, "-m", f"examples.{name}", *flags]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


def _row(text, name):
    """The numbers behind a name at the beginning of a line."""
    (line,) = re.findall(rf"^ *{re.escape(name)}  +(.*)$", text, re.MULTILINE)
    return [float(number) for number in line.split()]


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_an_example_shows(name):
    assert "--quick" in _printed(name, "--help")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_a_page_that_the_index_links(name):
    page = (ROOT / f"docs/examples/{name}.md").read_text()
    assert f"python -m examples.{name}" in page
    assert f"]({name}.md)" in (ROOT / "docs/examples/index.md").read_text()


def test_finetune_compares_frozen_with_adapted_statistics():
    said = _printed("finetune", "--quick")
    for name in ("frozen statistics", "adapted statistics", "adapted statistics, weights tuned"):
        (share,) = _row(said, name)
        assert 0 <= share <= 1
    _, frozen, rest = re.split(r"^Frozen weights, .*$", said, flags=re.MULTILINE)
    adapted = rest.split("All weights tuned")[0]
    # Of random weights, whose statistics of nothing let little through, so that a head learns nothing.
    learnt = [float(re.findall(r"accuracy: ([\d.]+)", part)[-1]) for part in (frozen, adapted)]
    assert learnt[0] < 0.35 < learnt[1]


def test_gan_scores_by_real_statistics_do_not_depend_on_what_is_beside():
    said = _printed("gan", "--quick")
    mixed, two_calls, real_only = (_row(said, name) for name in ("mixed", "two_calls", "real_only"))
    assert real_only[0] == 0 < min(mixed[0], two_calls[0])
    assert real_only[1] < 0.5 * min(mixed[1], two_calls[1])


def test_masked_rnn_has_the_statistics_of_the_steps_that_are_there():
    said = _printed("masked_rnn", "--quick")
    there = _row(said, "the steps themselves")
    obeys, blind = _row(said, "obeys the mask"), _row(said, "is blind to it")
    assert obeys[:2] == pytest.approx(there, abs=2e-3)
    assert blind[0] < 0.8 * there[0]
    assert obeys[-1] < 1e-5 < 1e-3 < blind[-1]


def test_micro_batches_are_ghost_batches():
    said = _printed("micro_batches", "--quick")
    (ghost,), (whole,) = _row(said, "with virtual_batch_size=16"), _row(said, "with statistics of all 128")
    assert ghost < 1e-4 < 1e-2 < whole
    for name in ("8 micro-batches of 16", "one batch of 128, ghosts of 16", "one batch of 128"):
        before, after = _row(said, name)
        assert after > before


def test_a_drifting_stream_is_seen_to_drift_and_is_answered_better_after_a_swap():
    said = _printed("drifting_stream", "--quick")
    hours = {int(hour): (int(version), float(kl), float(share)) for hour, version, kl, share in re.findall(
        r"^ +(\d) +(\d+) +([\d.]+)  \w+ +([\d.]+)$", said, re.MULTILINE
    )}  # fmt: skip
    assert list(hours) == list(range(8))
    assert [version for version, _, _ in hours.values()] == sorted(version for version, _, _ in hours.values())
    assert hours[0][:2] < (2, 0.1)
    version, kl, accuracy = hours[7]
    # The lens fogs no further: the version that was made of the last pictures sees them as they are.
    assert version > 1
    assert kl < 0.1
    assert accuracy > max(share for _, distance, share in hours.values() if distance > 0.1)


def test_from_pytorch_answers_as_pytorch_does():
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed: `make torch` installs it")
    said = _printed("from_pytorch", "--quick")
    assert "9 of 9 normalizations absorbed" in said
    for name in ("Keras", "folded", "served"):
        assert _row(said, name)[0] < 1e-4


def test_from_pytorch_says_what_it_needs():
    program = "import sys; sys.modules['torch'] = None; from examples import from_pytorch; from_pytorch.main()"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "This example needs PyTorch" in ran.stderr
