"""The page for a person, in a real browser: its looks on screens of every size, by day and by night."""

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf

from models import pretrained
from models.pretrained.__main__ import main as pretrained_command
from tests.serving import saved_models
from tests.serving.servers import RunningServer, running_server

pytest.importorskip("selenium")
from tests.serving.browsing import DESKTOP, PHONE, Page

LONG = "a_name_that_goes_on_" + "and_on" * 20
TABLET = (820, 1180)
# Where the pictures of the documentation are written to, where it is set: docs, for example.
SCREENSHOTS = os.environ.get("KERAS_BN_SCREENSHOTS")


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Twelve models, one with a long name, of which a version cannot be served for a reason that is long, too."""
    folder = tmp_path_factory.mktemp("crowd")
    wide = [tf.TensorSpec([None, 40], tf.float32, name="quantities")]
    names = [LONG, *(f"model_{number}" for number in range(11))]
    for name in names:
        saved_models.export(folder / name / "1", {LONG: (lambda quantities: {LONG: quantities * 1e30}, wide)})
    paths = [f'config {{ name: "{name}" base_path: "{folder / name}" model_platform: "tensorflow" }}' for name in names]
    (folder / "models.config").write_text(f"model_config_list {{ {' '.join(paths)} }}")
    with running_server(f"--model_config_file={folder / 'models.config'}") as running:
        (folder / LONG / "2").mkdir()
        (folder / LONG / "2" / "saved_model.pb").write_bytes(b"no graph")
        yield running


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The shipped network, as it is exported for a server."""
    base = tmp_path_factory.mktemp("served") / "fashion_cnn"
    pretrained_command(["export", str(base)])
    with running_server("--model_name=fashion_cnn", f"--model_base_path={base}") as running:
        yield running


@pytest.fixture
def page(browser) -> Page:
    """A page on a desktop's screen, by day."""
    page = Page(browser, "")
    page.resize(DESKTOP)
    page.prefer("light")
    return page


@pytest.mark.parametrize("size", [DESKTOP, TABLET, PHONE], ids=["desktop", "tablet", "phone"])
def test_long_names_and_reasons_fit_on_every_screen(page: Page, crowd: RunningServer, size: tuple[int, int]):
    page.resize(size)
    page.url = crowd.url
    page.open("textarea#input-quantities")
    page.wait_for_text("#failures summary", "Version 2 cannot be served")
    page.click("#failures summary")
    assert LONG in page.text("#failures p")
    page.ask()
    page.find("#answer:not([hidden]) .bar")
    for summary in page.all(".details summary"):
        summary.click()
    assert page.overflowing() == []
    page.write("quantities", '["' + "long" * 100 + '"]')
    page.ask()
    page.find("#problem:not([hidden])")
    assert page.overflowing() == []
    assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(page: Page, crowd: RunningServer, fashion: RunningServer, scheme: str):
    page.prefer(scheme)
    page.url = crowd.url
    page.open("textarea#input-quantities")
    page.wait_for_text("nav", "failed")
    page.write("quantities", "[")
    page.ask()
    page.find("#problem:not([hidden])")
    faint = [text for contrast, text in page.contrasts() if contrast < 4.5]
    page.url = fashion.url
    page.open("#examples .example")
    page.click("#examples .example")
    page.find("#drift:not([hidden]) .verdict")
    seen = page.contrasts()
    assert any("available" in text for _, text in seen)
    assert faint + [text for contrast, text in seen if contrast < 4.5] == []


def test_on_a_phone_the_form_stands_before_the_fold_and_the_answer_comes_into_view(page: Page, crowd: RunningServer):
    page.resize(PHONE)
    page.url = crowd.url
    page.open("textarea#input-quantities")
    bottom = "return arguments[0].getBoundingClientRect().bottom"
    page.click("nav button[data-model=model_1]")
    page.wait_for_text("#model-title", "model_1")
    assert page.run(bottom, page.find("textarea#input-quantities")) < PHONE[1]
    page.ask()
    page.find("#answer:not([hidden]) .bar")
    page.wait_until(lambda: 0 < page.run(bottom, page.find("#view .by")) < PHONE[1])


def test_the_page_of_a_real_network_as_it_is_shown_in_the_documentation(page: Page, fashion: RunningServer):
    page.url = fashion.url
    page.open("#examples .example:last-child img")
    names = list(pretrained.load_card()["accuracy_per_class"])
    assert len(page.all("#examples .example")) == len(names)
    assert "accuracy" in page.text("#about")
    for at in (3, 8, 2, 10):
        page.click(f"#examples .example:nth-child({at})")
        page.wait_for_text("#answer:not([hidden]) .headline strong", names[at - 1])
        page.find("#drift:not([hidden]) .verdict")
    assert len(page.bars("#drift")) == len(page.all("#drift .band")) == 5
    assert "As near as the model's own examples." in page.text("#drift .verdict")
    page.run("document.activeElement.blur()")
    keep(page, "server_page.png")
    page.prefer("dark")
    page.click("#examples .example:nth-child(8)")
    page.wait_for_text("#answer:not([hidden]) .headline strong", "Sneaker")
    page.click(".tools button:last-child")
    page.ask()
    page.wait_for_text("#requests li:nth-child(6) strong", "Pullover")
    page.find("#drift:not([hidden]) .verdict.far")
    page.run("document.activeElement.blur()")
    keep(page, "server_page_dark.png")
    page.prefer("light")
    page.resize(PHONE)
    page.click("#examples .example:nth-child(9)")
    page.wait_for_text("#answer:not([hidden]) .headline strong", "Bag")
    page.find("#drift:not([hidden]) .verdict")
    page.run("document.activeElement.blur()")
    keep(page, "server_page_phone.png", whole=True)


def test_encoded_pictures_are_sent_as_they_are(page: Page, fashion: RunningServer):
    page.url = fashion.url
    page.open("#examples .example")
    page.choose("#signature", "image_bytes")
    page.click("#form:has(#input-image_bytes) .example:nth-child(2)")
    page.wait_for_text("#answer:not([hidden]) .headline strong", "Trouser")
    example = page.find(".preview").get_attribute("src")
    page.find("#input-image_bytes").send_keys(str(pretrained.FOLDER / pretrained.EXAMPLES / "9_ankle_boot.png"))
    page.wait_until(lambda: page.find(".preview").get_attribute("src") != example)
    page.ask()
    page.wait_for_text("#answer:not([hidden]) .headline strong", "Ankle boot")


def test_nothing_is_loaded_from_elsewhere_and_the_browser_does_not_complain(page: Page, fashion: RunningServer):
    page.url = fashion.url
    page.open("#examples .example")
    page.driver.get_log("browser")  # The refusals that other tests ask for are in there as well.
    page.open("#examples .example")
    page.click("#examples .example")
    page.find("#drift:not([hidden]) .verdict")
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith((fashion.url, "data:")) for name in loaded)
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def keep(page: Page, name: str, whole: bool = False) -> None:
    """Keeps a picture of the page for the documentation: of what is seen, or of all of it."""
    if SCREENSHOTS:
        shot = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
        (Path(SCREENSHOTS) / name).write_bytes(base64.b64decode(shot["data"]))
