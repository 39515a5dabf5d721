"""The page for a person, in a real browser."""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf

from tests.serving import saved_models
from tests.serving.servers import RunningServer, running_server

webdriver = pytest.importorskip("selenium.webdriver")
support = pytest.importorskip("selenium.webdriver.support.ui")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not BROWSER or not DRIVER, reason="needs Chromium and its driver: apt-get install chromium chromium-driver"
)
CLASSES = ["blank", "shirt", "shoe"]


def row_figures(x: tf.Tensor) -> dict[str, tf.Tensor]:
    """As a version of keras_bn answers, of two layers of two and one channels: each row's mean is x."""
    rows = tf.size(x)
    figures = {"count": [2.0, 2.0, 8.0], "variance_ratio": [1.0, 1.0, 2.0]}
    return {
        "layer": tf.tile([["first", "second"]], [rows, 1]),
        "channels": tf.tile([[2, 1]], [rows, 1]),
        "mean_shift": tf.stack([x, x, 0 * x], 1),
        **{name: tf.tile([values], [rows, 1]) for name, values in figures.items()},
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A picture model in two versions: it looks at whether the lower or the upper half of the picture is light."""
    base = tmp_path_factory.mktemp("pictures")
    for version, warmth in ((1, 1.0), (2, 10.0)):

        def look(image: tf.Tensor, warmth: float = warmth) -> dict[str, tf.Tensor]:
            light = tf.reduce_mean(tf.cast(image, tf.float32), [2, 3]) / 255.0
            upper, lower = tf.reduce_mean(light[:, :14], 1), tf.reduce_mean(light[:, 14:], 1)
            scores = tf.stack([tf.fill(tf.shape(upper), 0.02), upper, lower], axis=1)
            names = tf.tile(tf.constant([CLASSES]), [tf.shape(upper)[0], 1])
            return {"probabilities": tf.nn.softmax(scores * 10.0 * warmth), "classes": names}

        spec = tf.TensorSpec([None, 28, 28, 1], tf.uint8, name="image")
        numbers = (lambda x: {"y": x * 2.0}, [tf.TensorSpec([None], tf.float32, name="x")])
        drift = (row_figures, [tf.TensorSpec([None], tf.float32, name="x")])
        signatures = {"serving_default": (look, [spec]), "numbers": numbers, "batch_norm_drift": drift}
        saved_models.export(base / str(version), signatures)
    config = base / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "pictures" base_path: "{base}" model_platform: "tensorflow" '
        "model_version_policy { all {} } "
        'version_labels { key: "stable" value: 1 } } }'
    )
    labels = "--allow_version_labels_for_unavailable_models"
    with running_server(f"--model_config_file={config}", labels) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator["webdriver.Chrome"]:
    """A headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,1050"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(20)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: "webdriver.Chrome", server: RunningServer) -> "webdriver.Chrome":
    """The page, freshly opened, with the model's form shown."""
    browser.get(server.url)
    browser.find_element("css selector", "#input-image")
    return browser


def text(page: "webdriver.Chrome", selector: str) -> str:
    return page.find_element("css selector", selector).text


def draw_shoe(page: "webdriver.Chrome") -> None:
    """Draws with the mouse what looks like a shoe: a sole along the bottom, a toe, a heel."""
    canvas = page.find_element("css selector", "#input-image")
    moves = webdriver.ActionChains(page)
    for path in ([(-80, 70), (80, 70)], [(-80, 50), (80, 50)], [(80, 30), (-10, 30), (-80, 60)], [(70, 30), (70, 10)]):
        moves.move_to_element_with_offset(canvas, *path[0]).click_and_hold()
        for place in path[1:]:
            moves.move_to_element_with_offset(canvas, *place)
        moves.release()
    moves.perform()


def choose(page: "webdriver.Chrome", selector: str, value: str) -> None:
    support.Select(page.find_element("css selector", selector)).select_by_visible_text(value)


def ask(page: "webdriver.Chrome") -> None:
    page.find_element("css selector", "#ask").click()


def answered(page: "webdriver.Chrome") -> list[tuple[str, float]]:
    rows = page.find_elements("css selector", "#answer:not([hidden]) .bar")
    return [
        (
            row.find_element("css selector", "span").text,
            float(row.find_element("css selector", "output").text.removesuffix(" %")),
        )
        for row in rows
    ]


def test_a_drawn_shoe_gets_probabilities_latency_and_a_curl_line(page: "webdriver.Chrome", server: RunningServer):
    draw_shoe(page)
    ask(page)
    bars = answered(page)
    assert bars[0][0] == "shoe"
    assert sorted(name for name, _ in bars) == CLASSES
    assert sum(value for _, value in bars) == pytest.approx(100, abs=0.5)
    assert text(page, "#latency").endswith("ms")
    assert text(page, "#curl").startswith(f"curl {server.url}/v1/models/pictures/versions/2:predict -d '")
    if "KERAS_BN_SCREENSHOT" in os.environ:
        page.save_screenshot(os.environ["KERAS_BN_SCREENSHOT"])


def test_another_version_answers_once_it_is_chosen(page: "webdriver.Chrome"):
    draw_shoe(page)
    ask(page)
    sure = answered(page)[0]
    choose(page, "#version", "1")
    draw_shoe(page)
    ask(page)
    unsure = answered(page)[0]
    assert unsure[0] == sure[0] == "shoe"
    assert unsure[1] < sure[1]
    assert "/versions/1:predict" in text(page, "#curl")


def test_drift_is_shown_for_each_layer_all_rows_together(page: "webdriver.Chrome"):
    choose(page, "#signature", "batch_norm_drift")
    area = page.find_element("css selector", "#input-x")
    area.clear()
    area.send_keys("[1, 3]")
    ask(page)
    # Mean 2 and variance ratio 1 + 1; mean 0 and variance ratio 2.
    expected = {"first": (2 + 4 - 1 - math.log(2)) / 2, "second": (2 - 1 - math.log(2)) / 2}
    assert dict(answered(page)) == pytest.approx(expected, rel=1e-3)


def test_an_empty_picture_and_text_that_is_no_json_are_explained_in_plain_words(page: "webdriver.Chrome"):
    ask(page)
    assert "“image” is empty: draw something" in text(page, "#problem:not([hidden])")
    choose(page, "#signature", "numbers")
    area = page.find_element("css selector", "#input-x")
    area.clear()
    area.send_keys("[1, 2")
    ask(page)
    problem = text(page, "#problem:not([hidden])")
    assert "What you wrote for “x” cannot be read" in problem
    assert "as a JSON list, for example [0.5]" in problem


def test_what_the_server_refuses_is_explained_with_its_own_words_below(page: "webdriver.Chrome"):
    choose(page, "#signature", "numbers")
    area = page.find_element("css selector", "#input-x")
    area.clear()
    area.send_keys('["a"]')
    ask(page)
    problem = text(page, "#problem:not([hidden])")
    assert "The model cannot use what you sent" in problem
    assert 'JSON Value: "a" Type: String is not of expected type: float' in problem


def test_the_page_shows_states_and_labels_and_works_by_keyboard_alone(page: "webdriver.Chrome"):
    models = text(page, "#models")
    assert models.count("AVAILABLE") == 2
    assert "labels: stable → 1" in models
    keys = webdriver.Keys
    page.find_element("css selector", "#input-image").send_keys(keys.ARROW_DOWN * 8 + keys.SPACE)
    page.find_element("css selector", "#ask").send_keys(keys.ENTER)
    assert len(answered(page)) == 3


def test_a_picture_file_can_be_chosen(page: "webdriver.Chrome", tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    picture = image.new("L", (56, 56))
    picture.paste(255, (0, 0, 56, 28))
    picture.save(tmp_path / "shirt.png")
    page.find_element("css selector", "input[type=file]").send_keys(str(tmp_path / "shirt.png"))
    support.WebDriverWait(page, 20).until(
        lambda driver: driver.execute_script(
            "return document.querySelector('#input-image').getContext('2d').getImageData(5, 5, 1, 1).data[0]"
        )
    )
    ask(page)
    assert answered(page)[0][0] == "shirt"


def test_neither_a_large_nor_a_small_screen_needs_sideways_scrolling(page: "webdriver.Chrome"):
    draw_shoe(page)
    ask(page)
    assert answered(page)
    for width in (1100, 500):
        page.set_window_size(width, 1000)
        assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"), width
    page.set_window_size(1100, 1000)


def test_nothing_is_loaded_from_elsewhere_and_the_browser_does_not_complain(
    page: "webdriver.Chrome", server: RunningServer
):
    # The refusals that other tests ask for are in the log as well.
    page.get_log("browser")
    page.refresh()
    page.find_element("css selector", "#input-image")
    loaded = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith((server.url, "data:")) for name in loaded)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
