"""Every tool of docs/interop.md that is installed answers what Keras's `predict` does."""

import pytest

from benchmarks import interop

MOST = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("network", interop.NETWORKS)
def test_tools_that_are_installed_answer_what_predict_does(network, tmp_path):
    differences = {}
    with interop.prepared(network, tmp_path) as (x, want, written):
        for tool, run in interop.TOOLS.items():
            for form, one in written.items():
                try:
                    differences[tool, form] = interop.difference(run(one, x).values, want)
                except ImportError as error:
                    print(f"{tool}: {error.name} is not installed")
    assert {"TensorFlow 1 Session", "C API", "LiteRT, default conversion"} <= {tool for tool, _ in differences}
    assert {key: value for key, value in differences.items() if not value <= MOST} == {}
