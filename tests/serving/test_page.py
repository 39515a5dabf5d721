"""The page for a person, in a real browser: questions and their answers."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from tests.serving import saved_models
from tests.serving.servers import RunningServer, running_server

pytest.importorskip("selenium")
from tests.serving.browsing import DESKTOP, Page

CLASSES = ["blank", "shirt", "shoe"]
FIGURE = "#answer:not([hidden]) .figure"
# No double holds it.
ODD = 2**53 + 1


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


def looking(sureness: float):
    """A function that looks whether the lower or the upper half of a picture is light."""

    def look(image: tf.Tensor) -> dict[str, tf.Tensor]:
        light = tf.reduce_mean(tf.cast(image, tf.float32), [2, 3]) / 255.0
        upper, lower = tf.reduce_mean(light[:, :14], 1), tf.reduce_mean(light[:, 14:], 1)
        scores = tf.stack([tf.fill(tf.shape(upper), 0.02), upper, lower], axis=1)
        names = tf.tile(tf.constant([CLASSES]), [tf.shape(upper)[0], 1])
        return {"probabilities": tf.nn.softmax(scores * 10.0 * sureness), "classes": names}

    return look


def write_example(version: Path, image: np.ndarray) -> None:
    """Gives a version a warm-up request, which is its example."""
    request = predict_pb2.PredictRequest(inputs={"image": tf.make_tensor_proto(image)})
    log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
    (version / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(version / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        writer.write(log.SerializeToString())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A model in two versions, with a signature for each kind of answer."""
    base = tmp_path_factory.mktemp("pictures")
    any_x = tf.TensorSpec([None], tf.float32, name="x")
    for version, sureness in ((1, 1.0), (2, 10.0)):
        signatures = {
            "serving_default": (looking(sureness), [tf.TensorSpec([None, 28, 28, 1], tf.uint8, name="image")]),
            "numbers": (lambda x: {"y": x * 2.0}, [any_x]),
            "regression": (lambda x: {"price": x[:, None]}, [any_x]),
            "signed": (lambda x: {"logits": tf.stack([-2.0 * x, x, 0 * x], 1)}, [any_x]),
            "shares": (lambda x: {"out": tf.nn.softmax(tf.stack([x, 3 * x, 2 * x], 1))}, [any_x]),
            "whole": (lambda n: {"same": tf.identity(n)}, [tf.TensorSpec([None], tf.int64, name="n")]),
            "batch_norm_drift": (row_figures, [any_x]),
        }
        saved_models.export(base / str(version), signatures)
    upper_half = np.repeat(np.uint8([255, 0]), 14)[None, :, None, None] * np.ones((2, 28, 28, 1), np.uint8)
    write_example(base / "2", upper_half)
    config = base / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "pictures" base_path: "{base}" model_platform: "tensorflow" '
        "model_version_policy { all {} } "
        'version_labels { key: "stable" value: 1 } } }'
    )
    labels = "--allow_version_labels_for_unavailable_models"
    with running_server(f"--model_config_file={config}", labels) as running:
        yield running


@pytest.fixture
def page(browser, server: RunningServer) -> Page:
    """The page, freshly opened, with the model's form shown."""
    page = Page(browser, server.url)
    page.resize(DESKTOP)
    page.prefer("light")
    return page.open("canvas#input-image")


def test_a_drawn_shoe_gets_probabilities_latency_and_a_curl_line(page: Page, server: RunningServer):
    page.draw_shoe()
    page.ask()
    bars = page.bars()
    assert next(iter(bars)) == "shoe"
    assert sorted(bars) == CLASSES
    assert sum(bars.values()) == pytest.approx(100, abs=0.5)
    assert page.text("#answer:not([hidden]) .headline") == f"shoe\n{bars['shoe']} %"
    assert page.text("#latency").endswith("ms")
    page.click("details:has(#curl) summary")
    assert page.text("#curl").startswith(f"curl {server.url}/v1/models/pictures/versions/2:predict -d '")


def test_another_version_answers_once_it_is_chosen(page: Page):
    page.draw_shoe()
    page.ask()
    sure = page.bars()["shoe"]
    page.choose("#version", "1")
    page.find("canvas#input-image")
    page.draw_shoe()
    page.ask()
    assert next(iter(page.bars())) == "shoe"
    assert page.bars()["shoe"] < sure
    assert page.text("#answer:not([hidden]) .by").startswith("pictures, version 1 ·")


def test_drift_is_shown_for_each_layer_all_rows_together(page: Page):
    page.choose("#signature", "batch_norm_drift")
    page.write("x", "[1, 3]")
    page.ask()
    # Mean 2 and variance ratio 1 + 1; mean 0 and variance ratio 2.
    expected = {"first": (2 + 4 - 1 - math.log(2)) / 2, "second": (2 - 1 - math.log(2)) / 2}
    assert page.bars() == pytest.approx(expected, abs=6e-4)


def test_the_drift_of_what_is_asked_stands_below_its_answer_where_the_version_tells_it(page: Page):
    page.choose("#signature", "numbers")
    page.write("x", "[2]")
    page.ask()
    expected = {"first": (1 + 4 - 1 - math.log(1)) / 2, "second": (2 - 1 - math.log(2)) / 2}
    assert page.bars("#drift") == pytest.approx(expected, abs=6e-4)
    page.choose("#signature", "whole")
    page.write("n", "[2]")
    page.hold()
    page.ask()
    page.let_go()
    assert page.text(FIGURE) == "same\n2"
    assert page.run("return window.held.length") == 0


def test_an_empty_picture_and_text_that_is_no_json_are_explained_in_plain_words(page: Page):
    page.ask()
    assert "“image” is empty: draw something" in page.text("#problem:not([hidden])")
    page.choose("#signature", "numbers")
    page.write("x", "[1, 2")
    page.ask()
    problem = page.text("#problem:not([hidden])")
    assert "What you wrote for “x” cannot be read" in problem
    assert "as a JSON list, for example [0.5]" in problem


def test_what_the_server_refuses_is_explained_with_its_own_words_below(page: Page):
    page.choose("#signature", "numbers")
    page.write("x", '["a"]')
    page.ask()
    problem = page.text("#problem:not([hidden])")
    assert "The model cannot use what you sent" in problem
    assert 'JSON Value: "a" Type: String is not of expected type: float' in problem
    assert "Refused with 400" in page.text("#requests li:first-child")


def test_of_a_number_the_number_is_seen_at_once_and_the_curl_line_only_when_it_is_opened(page: Page):
    page.choose("#signature", "numbers")
    page.write("x", "[3.25]")
    page.ask()
    assert page.text(FIGURE) == "y\n6.5"
    assert "class" not in page.text("#view")
    assert page.all("details[open]") == []
    assert not page.find("#curl").is_displayed()


def test_a_regression_has_its_name_for_a_title_and_no_class(page: Page):
    page.choose("#signature", "regression")
    page.write("x", "[1, 0.25]")
    page.ask()
    assert page.text(FIGURE) == "price\n1"
    page.choose("#row", "2")
    assert page.text(FIGURE) == "price\n0.25"
    assert "class" not in page.text("#result") + page.text("#requests")
    assert page.all("#view .bar") == []


def test_negative_values_have_bars_to_the_left_of_zero(page: Page):
    page.choose("#signature", "signed")
    page.write("x", "[1.5]")
    page.ask()
    assert page.bars() == {"0": -3, "1": 1.5, "2": 0}
    edges = "const box = arguments[0].getBoundingClientRect(); return [box.left, box.right];"
    negative, positive = page.all("#view .fill")[:2]
    zero = page.find("#view .zero")
    middle = sum(page.run(edges, zero)) / 2
    assert page.run(edges, negative)[1] == pytest.approx(middle, abs=1)
    assert page.run(edges, positive)[0] == pytest.approx(middle, abs=1)
    assert negative.size["width"] == pytest.approx(2 * positive.size["width"], abs=2)
    assert "class" not in page.text("#view")


def test_probabilities_without_names_are_those_of_numbered_classes(page: Page):
    page.choose("#signature", "shares")
    page.write("x", "[2]")
    page.ask()
    assert list(page.bars()) == ["class 1", "class 2", "class 0"]
    assert page.text("#answer:not([hidden]) .headline").startswith("class 1\n")


def test_integers_keep_all_their_digits_on_the_way_there_and_back(page: Page):
    page.choose("#signature", "whole")
    page.write("n", f"[{ODD}, {-ODD}]")
    page.ask()
    assert page.text(FIGURE) == f"same\n{ODD}"
    page.choose("#row", "2")
    assert page.text(FIGURE) == f"same\n{-ODD}"
    page.click("details:has(#curl) summary")
    assert f'"inputs": {{"n": [{ODD}, {-ODD}]}}' in page.text("#curl")


def test_numbers_that_json_has_no_word_for_are_shown_as_they_are(page: Page):
    page.choose("#signature", "numbers")
    page.write("x", "[1e39, 1]")
    page.run("document.querySelector('#input-x').value = '[NaN, -Infinity]'")
    page.ask()
    assert page.text(FIGURE) == "y\nNaN"
    page.choose("#row", "2")
    assert page.text(FIGURE) == "y\n-Infinity"


def test_copying_says_that_it_was_done(page: Page):
    page.choose("#signature", "numbers")
    page.ask()
    page.click("details:has(#curl) summary")
    page.run("navigator.clipboard.writeText = async (text) => { window.written = text; }")
    page.click("#copy")
    page.wait_for_text("#copied", "Copied")
    assert json.loads(page.run("return window.written").split("-d ")[1].strip("'"))["inputs"] == {"x": [0.5]}


def test_copying_works_where_a_browser_has_no_clipboard_for_pages(page: Page):
    page.choose("#signature", "numbers")
    page.ask()
    page.click("details:has(#curl) summary")
    page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true });")
    page.run("document.addEventListener('copy', () => { window.written = String(getSelection()); });")
    page.click("#copy")
    page.wait_for_text("#copied", "Copied")
    assert page.run("return window.written").startswith("curl ")


def test_the_page_shows_states_and_labels_and_works_by_keyboard_alone(page: Page):
    models = page.text("#models")
    assert models.count("available") == 2
    assert "labels: stable → 1" in models
    page.find("canvas#input-image").send_keys(page.keys.ARROW_DOWN * 8, page.keys.SHIFT, page.keys.ARROW_RIGHT * 9)
    page.find("#ask").send_keys(page.keys.ENTER)
    assert next(iter(page.bars())) == "shoe"


def test_the_keys_move_a_pen_that_is_seen(page: Page):
    assert not page.find(".pen").is_displayed()
    canvas = page.find("canvas#input-image")
    canvas.send_keys(page.keys.ARROW_LEFT)
    assert page.find(".pen").is_displayed()
    assert page.text(".where") == "column 14, row 15"
    before = page.find(".pen").location
    canvas.send_keys(page.keys.ARROW_DOWN * 3)
    step = canvas.size["height"] / 28
    assert page.find(".pen").location["y"] - before["y"] == pytest.approx(3 * step, abs=1.5)
    assert page.pixel(13, 17) == 0
    canvas.send_keys(page.keys.SPACE)
    assert page.pixel(13, 17) > 200
    page.find("#ask").send_keys(page.keys.TAB)
    assert not page.find(".pen").is_displayed()


def test_a_picture_file_can_be_chosen(page: Page, tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    picture = image.new("L", (56, 56))
    picture.paste(255, (0, 0, 56, 28))
    picture.save(tmp_path / "shirt.png")
    page.find("input[type=file]").send_keys(str(tmp_path / "shirt.png"))
    page.wait_until(lambda: page.pixel(5, 5) > 200)
    page.ask()
    assert next(iter(page.bars())) == "shirt"


def test_an_example_that_the_version_brings_is_asked_with_one_click(page: Page):
    assert len(page.all("#examples .example img")) == 2
    page.click("#examples .example")
    assert next(iter(page.bars())) == "shirt"
    assert page.pixel(3, 3) == 255
    page.choose("#version", "1")
    page.find("canvas#input-image")
    assert page.all("#examples:not([hidden])") == []


def test_the_last_requests_are_listed_with_what_they_took(page: Page):
    page.click("#examples .example")
    page.bars()
    page.choose("#signature", "numbers")
    page.write("x", "[21]")
    page.ask()
    page.find(FIGURE)
    numbers, picture = page.all("#requests li")
    assert "42" in numbers.text
    assert "pictures, version 2, numbers" in numbers.text
    assert "shirt" in picture.text
    assert all(each.text.endswith(" ms") for each in (numbers, picture))
    assert len(picture.find_elements("css selector", "img")) == 1
    assert page.text("#pace").startswith("Median of the last 2: ")
