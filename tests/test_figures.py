"""The figures of the pages show what the pages say of them."""

import pytest

from docs.figures import __main__ as figures
from docs.figures import layer
from tests import pages


def _lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.lines}


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_there_and_shown(name):
    path = figures.FOLDER / f"{name}.png"
    assert path.stat().st_size < 200_000
    assert any(f"({name}.png)" in page.read_text() for page in (pages.ROOT / "docs").glob("*.md"))


@pytest.mark.slow
def test_far_from_zero_ours_keeps_the_digits_that_stock_keras_loses():
    for axes in layer.digits().axes:
        errors = _lines(axes)
        assert max(errors["keras_bn"]) < 1e-5
        assert errors["keras.layers"][-1] > 0.1


@pytest.mark.slow
def test_moving_means_that_owe_nothing_to_initial_values_are_near_at_once():
    means = _lines(layer.momentum().axes[0])
    assert abs(means["momentum=None"][10] - 3) < 0.5
    assert abs(means["momentum=0.99, zero_debias=True"][10] - 3) < 0.5
    assert means["momentum=0.99"][10] < 0.5
