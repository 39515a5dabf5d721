"""How fast is the layer alone? Ours beside stock Keras, tf_keras and PyTorch: `python -m benchmarks.layer`."""

from __future__ import annotations

import argparse
import itertools
import math
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks import measuring
from models.console import positive

SHAPES = {
    "CNN 128x28x28x32": (128, 28, 28, 32),
    "CNN 64x56x56x64": (64, 56, 56, 64),
    "CNN 64x14x14x256": (64, 14, 14, 256),
    "CNN 256x7x7x512": (256, 7, 7, 512),
    "MLP 4096x512": (4096, 512),
    "MLP 256x128": (256, 128),
    "MLP 32x64": (32, 64),
    "3-D 8x16x28x28x16": (8, 16, 28, 28, 16),
}
DTYPES = ("float32", "bfloat16", "float16")
AXES = ("last", "first")
TASKS = ("forward", "training", "inference")
MODES = ("eager", "graph", "steps", "jit_compile")
SERIES = ("ours", "keras", "tf_keras", "torch", "copy", "call")
# Calling a function costs more than normalizing a small tensor does: in a graph so many values go through a stack of
# layers, at most 20 of them, and the time is for each. Under XLA that many layers stand side by side, where the call
# would be most of the time: it would fuse layers that follow each other directly, as they never do in a network.
VALUES_IN_A_CALL = 2**24
SMALL = 2**17
# Each layer adds its variables to what a call has to pass, which takes as long as normalizing a small tensor. The mode
# "steps" is without that: a graph in which the stack of layers takes so many steps, each of what the one before gave.
# In a call of one step it is measured by itself: `call` passes the same variables and results and computes nothing.
STEPS_IN_A_CALL = 50
# TensorFlow takes an operation for a long one, and hands it to other threads, until it has run so many times.
SMALL_WARM_UP = 150
# Training calls the same function again and again. A small tensor that is normalized once after other contestants waits
# for caches and threads that they left behind: each takes so many calls in its turn.
SMALL_TURN = 10
RATIOS = ("keras / ours", "best peer / ours", "ours / copy", "keras / ours without call")
COLUMNS = ("mode", "dtype", "axis", "shape", "task", *SERIES, *RATIOS)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer",
        description="Median time of the layer alone in milliseconds, all contestants in turn. `forward` is a call in "
        "training, `training` adds the gradients. `copy` copies the same tensor: what memory allows at best. The "
        "mode `steps` is for small tensors: a graph takes many steps in one call. For small tensors in a graph `call` "
        "is the part of each time that goes into calling the function.",
    )
    for name, choices in {
        "modes": MODES,
        "dtypes": DTYPES,
        "axes": AXES,
        "tasks": TASKS,
        "shapes": list(SHAPES),
    }.items():
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, default=choices, metavar=name.upper(), help=", ".join(choices)
        )
    parser.add_argument("--seconds", type=positive, default=1.0, help="for each question (default: 1)")
    parser.add_argument("--name", default="layer", help="of the files below benchmarks/results (default: layer)")
    parser.add_argument(
        "--unknown_batch",
        action="store_true",
        help="trace graphs with a batch size that is not known, as Keras's fit does; files end in _unknown_batch",
    )
    parser.add_argument("--keep", action="store_true", help="keep the rows of an earlier run not measured now")
    flags = parser.parse_args()
    questions = [
        question
        for question in itertools.product(flags.modes, flags.dtypes, flags.axes, flags.shapes, flags.tasks)
        if (question[0] != "steps" or math.prod(SHAPES[question[3]]) <= SMALL)
        and not (question[0] == "eager" and flags.unknown_batch)
    ]
    rows = [
        _measure(*question, flags.unknown_batch, flags.seconds) for question in measuring.progress(questions, "layer")
    ]
    if flags.unknown_batch:
        flags.name += "_unknown_batch"
    if flags.keep:
        # In the order of the whole grid.
        rows = sorted(
            measuring.with_earlier(flags.name, rows, COLUMNS[:5]),
            key=lambda row: [
                choices.index(row[key])
                for key, choices in zip(COLUMNS[:5], (MODES, DTYPES, AXES, list(SHAPES), TASKS), strict=True)
            ],
        )
    measuring.save(flags.name, rows, COLUMNS)
    training = [row for row in rows if row["task"] == "training" and row["axis"] == "last"]
    if training:
        picture = measuring.bars(
            flags.name, training, lambda row: f"{row['mode']} {row['dtype']} {row['shape']}", SERIES
        )
        print(f"\n{picture}")


def _measure(mode: str, dtype: str, axis: str, shape_name: str, task: str, unknown_batch: bool, seconds: float) -> dict:
    import gc

    shape = SHAPES[shape_name]
    if axis == "first":
        shape = (shape[0], shape[-1], *shape[1:-1])
    layers = max(1, min(20, VALUES_IN_A_CALL // math.prod(shape)))
    if mode == "eager" or (mode == "jit_compile" and math.prod(shape) > SMALL):
        layers = 1
    steps = STEPS_IN_A_CALL if mode == "steps" else 1
    stepping = _tensorflow(mode, dtype, axis, shape, task, layers, steps, unknown_batch)
    contestants = stepping | _torch(mode, dtype, axis, shape, task, layers) | _copy(dtype, shape, layers)
    small = math.prod(shape) <= SMALL
    if mode != "graph" or not small:
        del contestants["call"]
    repeated = {"warm_up": SMALL_WARM_UP, "turn": SMALL_TURN} if mode == "graph" and small else {}
    times = {
        name: time / layers / (steps if name in stepping else 1)
        for name, time in measuring.interleaved(contestants, seconds, **repeated).items()
    }
    without_call = (times["keras"] - times["call"]) / (times["ours"] - times["call"]) if "call" in times else None
    del contestants, stepping
    gc.collect()
    peers = [times[name] for name in ("keras", "tf_keras", "torch") if name in times]
    return {
        "mode": mode,
        "dtype": dtype,
        "axis": axis,
        "shape": shape_name,
        "task": task,
        **times,
        "keras / ours": times["keras"] / times["ours"],
        "best peer / ours": min(peers) / times["ours"],
        "ours / copy": times["ours"] / times["copy"],
        "keras / ours without call": without_call,
    }


def _tensorflow(
    mode: str, dtype: str, axis: str, shape: tuple, task: str, layers: int, steps: int, unknown_batch: bool = False
) -> dict:
    import keras
    import tensorflow as tf
    import tf_keras

    import keras_bn

    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    number = 1 if axis == "first" else -1
    inputs = layers if mode == "jit_compile" else 1
    xs = [tf.cast(tf.random.normal(shape, mean=0.5), dtype) for _ in range(inputs)]
    dys = [tf.cast(tf.random.normal(shape), dtype) for _ in range(inputs)]

    def runner(kind, computes=True):
        made = [kind(axis=number, dtype=policy) for _ in range(layers)]
        for layer in made:
            layer.build(shape)
        variables = [getattr(variable, "_value", variable) for layer in made for variable in (layer.gamma, layer.beta)]
        moving = [variable for layer in made for variable in (layer.moving_mean, layer.moving_variance)]
        all_variables = [*variables, *moving]

        def nothing(xs, dys):
            values = [tf.convert_to_tensor(getattr(variable, "_value", variable)) for variable in all_variables]
            return [*dys, *values[: len(variables)]] if task == "training" else xs

        def forward(xs):
            ys = list(xs)
            for index, layer in enumerate(made):
                ys[index % inputs] = layer(ys[index % inputs], training=task != "inference")
            return ys

        def run(xs, dys):
            if task != "training":
                return forward(xs)
            with tf.GradientTape() as tape:
                tape.watch(xs)
                ys = forward(xs)
            return tape.gradient(ys, [*xs, *variables], output_gradients=dys)

        def run_steps(xs, dys):
            def step(done, xs, total):
                (x, *gradients) = run(xs, dys)
                return done + 1, [x], total + tf.add_n(gradients) if gradients else total

            total = tf.zeros(shape[number])
            return tf.while_loop(lambda done, *_: done < steps, step, [0, xs, total], parallel_iterations=1)

        whole = run_steps if steps > 1 else run if computes else nothing
        specs = [[tf.TensorSpec([None, *shape[1:]], dtype)] * inputs] * 2 if unknown_batch else None
        function = run
        if mode != "eager":
            function = tf.function(whole, specs, jit_compile=mode == "jit_compile", autograph=False)
        # Operations and functions return when their work is done: TensorFlow runs them synchronously on a CPU.
        return lambda: function(xs, dys)

    return {
        "ours": runner(keras_bn.BatchNormalization),
        "keras": runner(keras.layers.BatchNormalization),
        "tf_keras": runner(tf_keras.layers.BatchNormalization),
        "call": runner(keras.layers.BatchNormalization, computes=False),
    }


def _copy(dtype: str, shape: tuple, layers: int) -> dict:
    import tensorflow as tf

    x = tf.cast(tf.random.normal(shape, mean=0.5), dtype)
    return {"copy": lambda: [tf.raw_ops.DeepCopy(x=x) for _ in range(layers)]}


def _torch(mode: str, dtype: str, axis: str, shape: tuple, task: str, layers: int) -> dict:
    """PyTorch's functional batch norm, eager, in its own layout (channels after the examples)."""
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    if mode == "jit_compile" or dtype == "float16":
        return {}
    channels = shape[1] if axis == "first" else shape[-1]
    spatial = shape[2:] if axis == "first" else shape[1:-1]
    x = torch.randn(shape[0], channels, *spatial).to(getattr(torch, dtype))
    if axis == "last" and len(shape) in (4, 5):
        x = x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    dy = torch.randn_like(x)
    weight, bias = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    mean, variance = torch.zeros(channels), torch.ones(channels)

    def run():
        if task != "training":
            with torch.no_grad():
                y = x
                for _ in range(layers):
                    y = torch.nn.functional.batch_norm(y, mean, variance, weight, bias, task == "forward")
            return
        y = x.detach().requires_grad_()
        weight.grad = bias.grad = None
        for _ in range(layers):
            y = torch.nn.functional.batch_norm(y, mean, variance, weight, bias, True)
        y.backward(dy)

    return {"torch": run}


if __name__ == "__main__":
    main()
