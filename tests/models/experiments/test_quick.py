"""All experiments in their quick setting: the structure of what they find, and directions that are robust."""

import json

import numpy as np
import pytest

from models import experiments
from models.experiments import figures, page, runs


@pytest.fixture(scope="module")
def quick(tmp_path_factory, fashion_mnist):
    """The numbers of one quick run of each experiment, as the files have them, by name; and the plan."""
    plan = runs.Plan("quick", "fashion_mnist", tmp_path_factory.mktemp("experiments") / "results")
    found = {}
    for name in experiments.NAMES:
        module = experiments.load(name)
        ticks = []
        runs.perform(plan, name, module, module.QUICK, fashion_mnist, 0, lambda ticks=ticks: ticks.append(1))
        assert len(ticks) == module.parts(module.QUICK), name
        found[name] = json.loads(plan.path(name, 0).read_text())["numbers"]
    return plan, found


@pytest.mark.slow
def test_a_page_with_a_figure_for_every_experiment_is_written(quick, tmp_path):
    plan, _ = quick
    written = page.write(plan, tmp_path)
    assert [path.name for path in written] == [*(f"{name}.png" for name in experiments.NAMES), "README.md"]
    text = written[-1].read_text()
    for name in experiments.NAMES:
        module = experiments.load(name)
        for part in (module.CLAIM, module.SOURCE, f"{name}.png", f"python -m models.experiments {name} --quick"):
            assert part in text
    # A single seed has no spread, and so decides nothing that depends on chance.
    assert "which has no spread" in text


@pytest.mark.slow
def test_every_panel_of_every_figure_has_title_axes_and_units(quick):
    _, found = quick
    for name in experiments.NAMES:
        drawn = experiments.load(name).figure([found[name]])
        assert drawn.get_figwidth() == figures.WIDTH
        for axes in drawn.axes:
            assert any(character.isdigit() for character in axes.get_title(loc="left")) or name == "optimizers", name
            assert axes.get_xlabel(), name
            assert axes.get_ylabel(), name
            assert axes.get_legend() is not None or drawn.legends, name


@pytest.mark.slow
def test_directions_that_do_not_depend_on_the_size_of_the_experiment(quick):
    _, found = quick
    drift = found["drift"]
    assert drift["with"]["drift"] < drift["without"]["drift"]
    assert drift["with"]["curve"]["accuracy"][-1] > drift["without"]["curve"]["accuracy"][-1]
    for errors in found["learning_rate"]["scaling"]["epsilon 1e-9"].values():
        assert len(errors) == 5
    np.testing.assert_allclose(found["learning_rate"]["scaling"]["epsilon 1e-9"]["weight_gradient"], 1, rtol=1e-3)
    noise = found["regularization"]["noise"]
    assert noise["4"] > noise["64"] > 0
    without_dropout = found["regularization"]["networks"]["without"]
    assert without_dropout["0"]["switched"] < 1e-6 < without_dropout["0.5"]["switched"]
    averages = found["population"]["averages"]
    assert averages["0.999, zero_debias"]["kl"][0] < averages["0.999"]["kl"][0]
    corrupted = found["test_time"]["corrupted"]
    by_strength = [np.mean([row["drift"] for row in corrupted if row["strength"] == strength]) for strength in (2, 5)]
    assert by_strength[0] < by_strength[1]
    why = found["why"]
    assert np.median(why["drifting"]["drift"]) > np.median(why["with"]["drift"])


@pytest.mark.slow
def test_variants_that_are_the_same_network_have_the_same_numbers(quick):
    _, found = quick
    error = found["batch_size"]["error"]
    assert error["virtual batches of 32"]["2"] == error["batch norm"]["2"]
    accuracies = found["population"]["averages"]
    assert len({json.dumps(one["accuracy"]) for one in accuracies.values()}) > 1
