"""The README is short, and its code runs as it is printed."""

import json
import re

from tests import pages

README = (pages.ROOT / "README.md").read_text()


def test_the_three_uses_of_the_readme_run_as_they_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (printed,) = pages.run("README.md").printed.values()
    assert (tmp_path / "served/digits/1/saved_model.pb").exists()
    assert capsys.readouterr().out.rstrip().endswith("(3, 10)")
    asked, curled = printed.split("{", 1)
    assert re.findall("example [0-2]:\nclass [0-9]", asked)[2:], printed
    assert len(json.loads("{" + curled)["predictions"][0]) == 10


def test_commands_of_the_readme_are_targets_of_make():
    makefile = (pages.ROOT / "Makefile").read_text()
    codes = [block.code for block in pages.blocks("README.md", "sh")]
    targets = {target for code in codes for target in re.findall(r"^make (\S+)", code, re.MULTILINE)}
    assert targets == {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_readme_is_two_screens_at_the_very_most():
    assert len(README.splitlines()) <= 90


def test_every_page_is_a_link_of_the_readme():
    written = {path.relative_to(pages.ROOT).as_posix() for path in (pages.ROOT / "docs").rglob("*.md")}
    linked = set(re.findall(r"\((docs/[^)#]+\.md)\)", README))
    # The site's own: its front, its API, and the pages below examples, which have a front of their own.
    left = {"docs/index.md", "docs/api.md"} | {page for page in written if page.startswith("docs/examples/")}
    assert linked >= written - left
