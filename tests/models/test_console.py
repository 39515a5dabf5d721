"""What the commands take for a number, and that each refuses what is none before anything is done."""

import importlib
import re

import pytest

from models import console

COMMANDS = {
    "benchmarks.layer": ["--seconds=0", "--seconds=nan"],
    "benchmarks.memory": ["--rounds=0"],
    "benchmarks.network": ["--seconds=inf", "--seconds=-1"],
    "benchmarks.replicas": ["--offsets=nan", "--replicas=0"],
    "benchmarks.serving": ["--seconds=nan", "--rounds=0", "--connections=0", "--images=-1"],
    "models.demo": ["--least_accuracy=nan", "--least_accuracy=1.5", "--epochs=0", "--width=-1"],
    "models.experiments.__main__": ["--seeds=-1"],
    "models.pretrained.__main__": ["make run --minutes=nan", "make run --minutes=-1", "export x --version=-1"],
}


@pytest.mark.parametrize(("command", "flags"), [(name, each) for name, flags in COMMANDS.items() for each in flags])
def test_a_number_out_of_range_is_refused_before_anything_is_done(command, flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["command", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(command).main()
    assert ended.value.code == 2
    name, value = flags.split("--")[-1].split("=")
    assert re.search(rf"\b{name}\b.* must be .*Received: .*{value}$", capsys.readouterr().err.strip())


@pytest.mark.parametrize(
    ("number", "text", "message"),
    [
        (console.number(float), "nan", "must be a finite number. Received: nan"),
        (console.number(float, 0), "-0.5", "must be a finite number of at least 0. Received: -0.5"),
        (console.number(float, 0, above=True), "0", "must be a finite number above 0. Received: 0"),
        (console.number(float, 0, 1), "inf", "must be a finite number in [0, 1]. Received: inf"),
        (console.number(int, 1), "1.5", "must be a whole number of at least 1. Received: 1.5"),
    ],
)
def test_a_number_says_what_is_allowed(number, text, message):
    with pytest.raises(console.argparse.ArgumentTypeError) as error:
        number(text)
    assert str(error.value) == message


def test_a_number_at_its_bounds_is_taken():
    assert [console.number(float, 0, 1)(text) for text in ("0", "1")] == [0.0, 1.0]
    assert console.number(int, 1)("1") == 1
    assert console.number(float)("-1e3") == -1000.0
