"""What an installation of the wheel has to do; run by its Python in an empty folder, with nothing else installed.

`--compiled` also asks for the compiled operations, which are not in the wheels of every system.
"""

import json
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
# `exec` of this file by its path puts this folder first, which holds names that packages of the world have too.
sys.path[0] = ""


def main() -> None:
    """Runs all checks; raises at the first that fails."""
    _comes_from_the_wheel()
    _trains_and_infers_as_the_formula_says()
    _command_says_its_version("--compiled" in sys.argv)
    _pages_run()
    print(f"Python {sys.version.split()[0]}: the wheel does what README and docs/start.md say.")


def _check(condition: bool, what: object) -> None:
    if not condition:
        raise RuntimeError(what)


def _comes_from_the_wheel() -> None:
    import keras_bn_serving

    import keras_bn
    import keras_bn_cli

    for module in (keras_bn, keras_bn_cli, keras_bn_serving):
        _check(CHECKOUT not in Path(str(module.__file__)).parents, f"{module.__file__} is not of the wheel")


def _trains_and_infers_as_the_formula_says() -> None:
    import numpy as np
    import tensorflow as tf

    import keras_bn

    x = tf.constant(np.random.default_rng(0).normal(3, 2, (32, 7, 7, 8)), tf.float32)
    dy = tf.constant(np.random.default_rng(1).normal(0, 1, x.shape), tf.float32)
    layer = keras_bn.BatchNormalization(momentum=0.5)
    layer.build(x.shape)

    def ours(x):
        return layer(x, training=True)

    def plain(x):
        mean, variance = tf.nn.moments(x, [0, 1, 2])
        return (x - mean) / tf.sqrt(variance + layer.epsilon)

    expected, expected_dx = _with_gradient(plain, x, dy)
    for call in (ours, tf.function(ours), tf.function(ours, jit_compile=True)):
        y, dx = _with_gradient(call, x, dy)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dx, expected_dx, rtol=1e-4, atol=1e-5)
    inferred = (x - layer.moving_mean) / tf.sqrt(layer.moving_variance + layer.epsilon)
    for call in (layer, tf.function(layer)):
        np.testing.assert_allclose(call(x), inferred, rtol=1e-4, atol=1e-5)


def _with_gradient(call, x, dy):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = call(x)
    return y.numpy(), tape.gradient(y, x, dy).numpy()


def _command_says_its_version(compiled: bool) -> None:
    from importlib.metadata import version

    command = Path(sys.executable).with_name("keras-bn")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    _check(done.stderr == "", done.stderr)
    _check(done.stdout.startswith(f"keras-bn {version('keras-bn')}\n"), done.stdout)
    _check(not compiled or "\ncompiled operations in use" in done.stdout, done.stdout)


def _pages_run() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("pages", CHECKOUT / "tests/pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    for page, asked in (("README.md", "keras-bn ask"), ("docs/start.md", "base64")):
        (printed,) = (text for title, text in pages.run(page).printed.items() if title.startswith(asked))
        _check(len(json.loads(printed[printed.index("{") :])["predictions"]) == 1, printed)


if __name__ == "__main__":
    main()
