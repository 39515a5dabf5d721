"""A release: the changelog has its section, the sdist is the repository, and its tests run from it."""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests import release, wheel

KINDS = {"Breaking", "Added", "Changed", "Fixed"}


def test_the_changelog_has_a_section_of_this_version_one_line_for_each_change():
    text = release.notes(release.CHANGELOG.read_text(), release.version())
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert headings
    assert set(headings) <= KINDS
    for line in text.splitlines():
        assert re.match(r"- \S|### \S|$", line), f"{line!r} is no heading and no change in a line"


def test_the_changelog_begins_with_what_breaks():
    text = release.notes(release.CHANGELOG.read_text(), release.version())
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert "Breaking" not in headings[1:]


@pytest.mark.parametrize(
    ("changelog", "received"),
    [
        ("# Changelog\n\n## 1.2.3\n\n- old\n", "sections of 1.2.3"),
        ("# Changelog\n", "sections of no version"),
        ("# Changelog\n\n## 1.3.0\n\n## 1.2.3\n\n- old\n", "sections of 1.3.0, 1.2.3, this one empty"),
    ],
)
def test_a_version_that_the_changelog_does_not_tell_of_is_refused(changelog, received):
    with pytest.raises(ValueError, match=rf"must have a section `## 1\.3\.0`.*Received: {received}\.$"):
        release.notes(changelog, "1.3.0")


def test_release_notes_are_the_section_of_that_version_alone():
    changelog = "# Changelog\n\n## 1.3.0 (2030-01-01)\n\n### Added\n\n- new\n\n## 1.2.3\n\n- old\n"
    assert release.notes(changelog, "1.3.0") == "### Added\n\n- new"


def test_release_ends_before_it_builds_where_the_changelog_is_silent(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(release, "version", lambda: "99.0.0")
    monkeypatch.setattr(wheel, "build", lambda folder: pytest.fail("it built"))
    monkeypatch.setattr(sys, "argv", ["release", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        release.main()
    assert ended.value.code == 1
    assert "CHANGELOG.md must have a section `## 99.0.0`" in capsys.readouterr().err


def test_others_may_read_what_a_release_leaves(tmp_path):
    built, folder = Path(tempfile.mkdtemp(dir=tmp_path)), tmp_path / "dist"
    (built / "new.whl").write_text("new")
    folder.mkdir()
    (folder / "old.whl").write_text("old")
    (tmp_path / "plain").mkdir()
    release.place([built / "new.whl"], folder)
    assert [path.name for path in folder.iterdir()] == ["new.whl"]
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The sdist's one folder."""
    folder = tmp_path_factory.mktemp("sdist")
    wheel.build(folder)
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        sdist.extractall(folder, filter="data")
    return folder / path.name.removesuffix(".tar.gz")


@pytest.mark.slow
@pytest.mark.skipif(not (wheel.ROOT / ".git").exists(), reason="not a checkout: nothing says what the repository holds")
def test_the_sdist_is_the_repository(unpacked):
    listed = subprocess.run(["git", "ls-files"], cwd=wheel.ROOT, check=True, capture_output=True, text=True)
    tracked = {name for name in listed.stdout.splitlines() if (wheel.ROOT / name).exists()}
    there = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert tracked - there == set()
    assert not [name for name in there if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_tests_of_the_sdist_run_from_it(unpacked):
    some = [
        "tests/keras_bn/test_arguments.py",
        "tests/keras_bn/test_statistics.py",
        "tests/models/test_networks.py",
        "tests/serving/test_json_codec.py",
        "tests/serving/test_flags.py",
        "tests/test_release.py",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        return subprocess.run([sys.executable, *command], cwd=unpacked, env=environment, capture_output=True, text=True)

    ran = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *some)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert re.search(r"\d{2,} passed", ran.stdout), ran.stdout[-1000:]
    assert str(wheel.ROOT) not in ran.stdout
    ours = run("-c", "import keras_bn, keras_bn.layer; print(keras_bn.__file__)")
    assert ours.stdout.strip() == str(unpacked / "keras_bn/__init__.py")
