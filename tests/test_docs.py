"""README and docs: every block of code is run or says why not, and what a page names is there."""

import ast
import configparser
import importlib.util
import os
import re
import subprocess
import sys
import unicodedata

import click
import pytest

import keras_bn_cli.commands
from docs.figures import __main__ as figures
from docs.figures import speed
from tests import pages

ROOT = pages.ROOT
PAGES = [
    "README.md",
    "serving/README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
BLOCKS = [block for page in PAGES for block in pages.blocks(page)]
RUN = [page for page in PAGES if any(block.reason is None for block in pages.blocks(page, *pages.LANGUAGES))]
# What is no code: what a command prints, and equations, which tests/test_equations.py computes.
NOT_CODE = ("text", "json", "equations")
# Pages that are run by tests of their own, which look at what they leave.
LOOKED_AT = ("README.md", "docs/start.md", "docs/transfer.md")


def _inline(page):
    """What stands between backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def _commands(start):
    """The words of all commands that begin like this, inline and in blocks, with the page."""
    found = [(page, code) for page in PAGES for code in _inline(page) if code.startswith(start)]
    for block in BLOCKS:
        if block.language == "sh":
            lines = block.code.replace("\\\n", " ").splitlines()
            found += [(block.page, line.strip()) for line in lines if line.strip().startswith(start)]
    return [(page, code.split("  #")[0].split()) for page, code in found]


def test_every_block_says_what_it_is():
    unknown = [block for block in BLOCKS if block.language not in (*pages.LANGUAGES, *NOT_CODE)]
    assert [(block.page, block.line, block.language) for block in unknown] == []


@pytest.mark.parametrize("start", pages.NOT_RUN)
def test_what_is_not_run_is_there(start):
    assert [block for block in BLOCKS if block.title.startswith(start)]


@pytest.mark.parametrize("reason", sorted({*pages.NOT_RUN.values(), *pages.LEFT.values()}))
def test_what_is_not_run_is_done_elsewhere(reason):
    for path in re.findall(r"tests/[\w/]+\.py", reason):
        assert (ROOT / path).exists()
    for target in re.findall(r"`make (\S+)`", reason):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.search(r"tests/|`make ", reason)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda b: f"{b.page}:{b.line}")
def test_blocks_of_python_are_python(block):
    ast.parse(block.code)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN if page not in LOOKED_AT])
def test_pages_run_as_they_are_printed(page, tmp_path):
    (tmp_path / "models").symlink_to(ROOT / "models")  # Some pages are read in a checkout.
    command = [sys.executable, str(ROOT / "tests/pages.py"), page]
    path = os.pathsep.join([str(ROOT), str(ROOT / "serving")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_the_start_page_finds_what_was_learnt_and_answers_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = pages.run("docs/start.md")
    assert names["training"].history["accuracy"][-1] > 0.93
    assert names["before"] < 0.6
    assert names["after"] > 0.93
    assert names["answer"]["top_labels"][0][0] == names["NAMES"][names["test_kinds"][2]].encode()
    assert max(row["kl"] for row in names["usual"]) < 0.05 < min(row["kl"] for row in names["inverted"])
    asked = printed["keras-bn ask --model_name=shapes --url=http://127.0.0.1:8501 question.png"]
    assert asked.split()[0] == "cross"


@pytest.mark.slow
def test_the_page_on_transfer_learning_ends_with_the_right_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = pages.run("docs/transfer.md")
    assert names["before"] < 0.7
    assert names["after"] > 0.95
    assert names["exported"].folding.absorbed == 52
    asked = printed["keras-bn ask --model_name=stripes --url=http://127.0.0.1:8501 stripes.png"]
    assert asked.split()[0] == names["NAMES"][names["test_kinds"][0]]


def test_servers_of_pages_take_no_port_that_another_may_have():
    commands = [block for block in BLOCKS if block.title.startswith(pages.SERVE)]
    assert len(commands) >= 4
    for block in commands:
        code = pages.with_ports(block, {"8500": "1", "8501": "2"})
        assert ("--rest_api_port=2" in code, "--port=1" in code) == (True, True), block


def _anchor(heading):
    """As GitHub and Python-Markdown make it."""
    plain = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", heading)).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in map(_anchor, headings), f"{page} links {target}"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_the_command_that_makes_its_figures(page):
    text = " ".join((ROOT / page).read_text().split())
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        name = path.rsplit("/", 1)[-1].removesuffix(".png")
        if name in figures.FIGURES:
            assert f"`python -m docs.figures {name}`" in text, f"{page} shows {path}"
        else:
            assert re.search(r"`[^`]*python -m [^`]+`|drawn by hand", text), f"{page} shows {path}"


def test_targets_of_make_that_pages_name_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for page, (_, *words) in _commands("make "):
        target = next(word for word in words if "=" not in word)
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page} names make {target}"


def test_modules_that_pages_run_are_there():
    found = _commands("python -m ")
    assert found
    for page, (_, _, module, *_) in found:
        path = module.split(".")
        roots = (ROOT.joinpath(*path), ROOT.joinpath("serving", *path))
        ours = any(root.is_dir() or root.with_suffix(".py").exists() for root in roots)
        assert ours or importlib.util.find_spec(module), f"{page} names python -m {module}"


def test_commands_and_options_of_keras_bn_that_pages_name_are_there():
    group = keras_bn_cli.commands.main
    found = _commands("keras-bn ")
    assert found
    for page, (_, *words) in found:
        names = [word for word in words if not word.startswith("-") and not word.isupper() and word != "..."]
        known = {option for parameter in group.params for option in parameter.opts} | {"--help"}
        if names:
            command = group.commands.get(names[0])
            assert command is not None, f"{page} names keras-bn {names[0]}"
            if not isinstance(command, click.Command) or not command.params:
                continue  # Its arguments are read by the server or the client, which pages that run show.
            known |= {option for parameter in command.params for option in parameter.opts}
        for word in words:
            if word.startswith("-"):
                assert word.split("=")[0] in known, f"{page} names {' '.join(words)}"


def test_extras_that_pages_install_are_there():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = [extra for page in PAGES for extra in re.findall(r"keras-bn\[([\w,]+)\]", (ROOT / page).read_text())]
    assert found
    assert {name for extra in found for name in extra.split(",")} <= set(setup["options.extras_require"])


def _texts():
    """All that the sources can say, with a null where a value is put in."""
    said = []
    for folder in ("keras_bn", "keras_bn_cli", "serving/keras_bn_serving"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    said.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    said.append("".join(map(str, parts)))
    for path in (ROOT / "keras_bn/ops/csrc").iterdir():
        # Neighbouring literals of C are one.
        said += re.findall(r'"((?:[^"\\]|\\.)*)"', re.sub(r'"\s*\n\s*"', "", path.read_text()))
    return said


@pytest.mark.parametrize(("page", "least"), [("docs/trouble.md", 40), ("docs/folding.md", 7)])
def test_messages_that_pages_quote_are_said_by_the_sources(page, least):
    rows = re.findall(r"^\| (`[^|]*) \| [^|]+ \|$", (ROOT / page).read_text(), re.MULTILINE)
    quoted = [re.match(r"`([^`]+)`", row)[1] for row in rows]
    assert len(quoted) >= least
    texts = _texts()
    for message in quoted:
        parts = [part for part in message.split("...") if part.strip()]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


def test_the_numbers_on_speed_are_those_that_were_measured_last():
    page = speed.PAGE.read_text()
    assert speed.with_numbers(page) == page


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "keras_bn.BatchNormalization" in (tmp_path / "api.html").read_text()
    for path in tmp_path.rglob("*.html"):
        # Nothing that a browser would fetch by itself, nor what the theme fetches a library for.
        text = path.read_text()
        assert re.findall(r"""<(?:script|img|link|iframe)[^>]*(?:src|href)="?https?:[^ >"]+""", text) == []
        assert 'class="mermaid"' not in text
