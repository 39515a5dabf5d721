"""Fine-tunes MobileNetV2 on pictures of another kind, with frozen and then with adapted statistics.

`python -m examples.finetune [--weights FILE | imagenet] [--quick]`, in a checkout.
"""

import argparse

import keras
import numpy as np

import keras_bn
from models import data

SIZE = 96  # The least for which there are weights of ImageNet.


def rgb(images: np.ndarray) -> np.ndarray:
    """What MobileNetV2 takes: three channels in [-1, 1], at least 32 pixels wide."""
    large = keras.ops.image.resize(images, (SIZE, SIZE))
    return np.repeat(keras.ops.convert_to_numpy(large) * 2 - 1, 3, axis=-1)


def network(weights: str | None) -> keras.Model:
    """MobileNetV2 without its head, its normalizations ours, so that they can be switched and recalibrated."""
    stock = keras.applications.MobileNetV2(
        (SIZE, SIZE, 3), alpha=0.35, include_top=False, weights=weights, pooling="avg"
    )
    return keras_bn.convert(stock)


def fit(model: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int, rate: float) -> None:
    """Trains what is trainable."""
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=2)


def fit_head(head: keras.Model, base: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int) -> None:
    """Trains the head alone, anew, on what the frozen rest makes of each picture, computed once."""
    head.layers[-1].kernel.assign(keras.initializers.GlorotUniform(seed=0)(head.layers[-1].kernel.shape))
    head.layers[-1].bias.assign(np.zeros(5))
    fit(head, base.predict(x, 256, verbose=0), y, epochs, rate=1e-2)


def accuracy(head: keras.Model, base: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """In inference mode."""
    return float(np.mean(head.predict(base.predict(x, 256, verbose=0), verbose=0).argmax(1) == y))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", help="a .weights.h5 of MobileNetV2(alpha=0.35), or imagenet; else trained here")
    parser.add_argument("--data", help="folder or .npz with Fashion-MNIST (default: what is found)")
    parser.add_argument("--quick", action="store_true", help="few pictures, random weights, to see that it runs")
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    images = data.load(options.data)
    count = 192 if options.quick else 4000

    # The old task: the first five classes, as they are. The new one: the others, seen by a camera that inverts.
    old, new, test = images.y_train < 5, images.y_train >= 5, images.y_test >= 5
    x_new, y_new = rgb(0.8 - 0.5 * images.x_train[new][:count]), images.y_train[new][:count] - 5
    x_test, y_test = rgb(0.8 - 0.5 * images.x_test[test][: count // 2]), images.y_test[test][: count // 2] - 5

    base = network(options.weights)
    head = keras.Sequential([keras.Input(base.output_shape[1:]), keras.layers.Dense(5, activation="softmax")])
    image = keras.Input((SIZE, SIZE, 3), name="image")
    model = keras.Model(image, head(base(image)))
    if options.weights is None and not options.quick:
        print("No weights given: all of it trains on the old pictures first", flush=True)
        x_old, y_old = rgb(images.x_train[old][:count]), images.y_train[old][:count]
        fit(model, x_old, y_old, epochs=4, rate=2e-3)
        keras_bn.recalibrate(base, x_old, order="joint", batch_size=256, verbose=0)
    epochs, results = 10, {}

    print("\nFrozen weights, frozen statistics: those of the old pictures", flush=True)
    fit_head(head, base, x_new, y_new, epochs)
    results["frozen statistics"] = accuracy(head, base, x_test, y_test)

    print("\nFrozen weights, adapted statistics: those of the new pictures, which needs no label", flush=True)
    keras_bn.recalibrate(base, x_new, order="joint", batch_size=256, verbose=0)
    fit_head(head, base, x_new, y_new, epochs)
    results["adapted statistics"] = accuracy(head, base, x_test, y_test)

    print("\nAll weights tuned, normalized with the statistics that the head was trained on", flush=True)
    with keras_bn.use_statistics(model, "moving"):
        fit(model, x_new, y_new, epochs=1 if options.quick else 3, rate=2e-4)
    keras_bn.recalibrate(base, x_new, order="joint", batch_size=256, verbose=0)
    results["adapted statistics, weights tuned"] = accuracy(head, base, x_test, y_test)

    print(f"\nAccuracy on {len(x_test):,} new pictures")
    for name, share in results.items():
        print(f"  {name:<36} {share:.3f}")


if __name__ == "__main__":
    main()
