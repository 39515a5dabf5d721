"""The page for a person, in a real browser: what it shows while something is waited for, fails, comes or goes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf

from tests.serving import saved_models
from tests.serving.servers import RunningServer, running_server

pytest.importorskip("selenium")
from tests.serving.browsing import DESKTOP, Page

FIGURE = "#answer:not([hidden]) .figure"
ANY_X = [tf.TensorSpec([None], tf.float32, name="x")]


def config(path: Path, *models: tuple[str, Path]) -> Path:
    """Writes a configuration of these models."""
    lines = [f'config {{ name: "{name}" base_path: "{base}" model_platform: "tensorflow" }}' for name, base in models]
    path.write_text(f"model_config_list {{ {' '.join(lines)} }}")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models, one that doubles and one that halves."""
    for name, factor in (("double", 2.0), ("half", 0.5)):
        saved_models.export(tmp_path / name / "1", {"serving_default": (lambda x, f=factor: {"y": x * f}, ANY_X)})
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[RunningServer]:
    """A server of both that looks for versions ten times a second."""
    models = config(folder / "models.config", ("double", folder / "double"), ("half", folder / "half"))
    with running_server(f"--model_config_file={models}", "--file_system_poll_wait_seconds=0.1") as running:
        yield running


@pytest.fixture
def page(browser, server: RunningServer) -> Page:
    """The page, freshly opened, with the form of `double`."""
    page = Page(browser, server.url)
    page.resize(DESKTOP)
    page.prefer("light")
    return page.open("textarea#input-x")


def test_what_is_waited_for_is_said_and_asking_again_waits_too(page: Page):
    page.write("x", "[4]")
    page.hold()
    page.ask()
    assert page.text("#hint") == "Waiting for double…"
    assert page.text("#ask") == "Asking…"
    assert page.find("#result").get_attribute("aria-busy") == "true"
    page.ask()
    assert page.run("return window.held.length") == 1
    page.let_go()
    assert page.text(FIGURE) == "y\n8"
    assert page.text("#ask") == "Ask the model"
    assert page.find("#result").get_attribute("aria-busy") == "false"


def test_the_answer_of_a_model_that_has_been_left_is_not_shown_under_another(page: Page):
    page.write("x", "[4]")
    page.hold()
    page.ask()
    page.click("nav button[data-model=half]")
    assert page.text("#model-title") == "half"
    page.let_go()
    page.wait_for_text("#requests", "double, version 1")
    assert page.all("#answer:not([hidden])") == []
    assert page.text("#ask") == "Ask the model"
    page.write("x", "[4]")
    page.ask()
    page.let_go()
    assert page.text(FIGURE) == "y\n2"


def test_the_list_follows_a_swap_and_what_has_been_written_stays(page: Page, folder: Path):
    page.write("x", "[5]")
    page.run("document.querySelector('nav button[data-model=half]').focus()")
    signatures = {"serving_default": (lambda x: {"y": x * 3.0}, ANY_X), "other": (lambda x: {"z": x - 1.0}, ANY_X)}
    saved_models.export(folder / "coming", signatures)
    (folder / "coming").rename(folder / "double" / "2")
    page.wait_for_text("nav button[data-model=double]", "version 2 available")
    assert page.text("#notice") == "Version 2 has taken over from 1."
    assert page.run("return document.activeElement.dataset.model") == "half"
    page.ask()
    assert page.text(FIGURE) == "y\n15"
    assert page.text("#answer:not([hidden]) .by").startswith("double, version 2")
    page.choose("#signature", "other")
    page.ask()
    page.wait_for_text(FIGURE, "z\n-0.5")


def test_a_form_that_no_longer_fits_is_built_anew_after_a_swap(page: Page, folder: Path):
    other = (lambda n: {"z": n + 1}, [tf.TensorSpec([None], tf.int64, name="n")])
    saved_models.export(folder / "coming", {"serving_default": other})
    (folder / "coming").rename(folder / "double" / "2")
    page.find("textarea#input-n")
    assert page.all("#input-x") == []
    page.ask()
    assert page.text(FIGURE) == "z\n2"


def test_a_version_that_cannot_be_served_is_shown_with_its_reason(page: Page, folder: Path):
    shutil.copytree(folder / "double" / "1", folder / "coming")
    (folder / "coming" / "saved_model.pb").write_bytes(b"no graph at all")
    (folder / "coming").rename(folder / "double" / "7")
    page.wait_for_text("nav button[data-model=double]", "version 7 failed")
    page.wait_for_text("#failures summary", "Version 7 cannot be served")
    page.click("#failures summary")
    assert str(folder / "double" / "7") in page.text("#failures p")
    page.write("x", "[1]")
    page.ask()
    assert page.text("#answer:not([hidden]) .by").startswith("double, version 1")


def test_a_model_whose_versions_are_gone_says_so_until_one_comes_back(page: Page, folder: Path):
    page.driver.get_log("browser")
    (folder / "double" / "1").rename(folder / "away")
    page.wait_for_text("#failures", "No version can answer yet.")
    assert not page.find("#columns").is_displayed()
    (folder / "away").rename(folder / "double" / "1")
    page.write("x", "[6]")
    page.ask()
    assert page.text(FIGURE) == "y\n12"
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_server_that_is_gone_is_missed(page: Page, server: RunningServer):
    server.process.terminate()
    server.process.wait()
    page.wait_for_text("#summary", "The server does not answer. Is it still running?")
    page.ask()
    assert page.text("#problem:not([hidden])") == "The server does not answer. Is it still running?"


def test_a_server_without_models_says_what_to_do_and_shows_the_first_one_that_comes(browser, folder: Path):
    models = config(folder / "models.config")
    flags = (f"--model_config_file={models}", "--model_config_file_poll_wait_seconds=0.1")
    with running_server(*flags) as running:
        page = Page(browser, running.url)
        page.resize(DESKTOP)
        page.open("#nothing:not([hidden])")
        assert "its configuration names no model" in page.text("#nothing")
        assert "No models at" in page.text("#summary")
        config(folder / "coming.config", ("half", folder / "half")).rename(models)
        page.wait_for_text("#model-title", "half")
        assert page.all("#nothing:not([hidden])") == []
        page.write("x", "[5]")
        page.ask()
        assert page.text(FIGURE) == "y\n2.5"
