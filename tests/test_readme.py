"""The README's code runs as it is printed."""

import json
import re

from tests import readme


def test_the_three_uses_of_the_readme_run_as_they_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = readme.three_uses()
    assert (tmp_path / "served/digits/1/saved_model.pb").exists()
    assert capsys.readouterr().out.rstrip().endswith("(3, 10)")
    asked, curled = printed.split("{", 1)
    assert re.findall("example [0-2]:\nclass [0-9]", asked)[2:], printed
    assert len(json.loads("{" + curled)["predictions"][0]) == 10


def test_commands_of_the_readme_are_targets_of_make():
    makefile = (readme.README.parent / "Makefile").read_text()
    targets = {target for block in readme.blocks("sh") for target in re.findall(r"^make (\S+)", block, re.MULTILINE)}
    assert targets == {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
