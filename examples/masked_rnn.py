"""A recurrent network on padded sequences: a normalization that obeys the mask does not see the padding.

`python -m examples.masked_rnn [--quick]`
"""

import argparse

import keras
import numpy as np

import keras_bn

LENGTH, CHANNELS = 24, 3


class Unmasked(keras_bn.BatchNormalization):
    """The same layer, but blind to the mask, to see what that changes."""

    def call(self, inputs, training=None):  # type: ignore[override]
        """Has no `mask`, so that Keras hands none, neither to it nor to what recalibrates it."""
        return super().call(inputs, training=training)


def sequences(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Waves of 6 to 24 steps around 2, padded with zeros; the question is whether the pitch rises or falls."""
    lengths, labels = rng.integers(6, LENGTH + 1, count), rng.integers(0, 2, count)
    steps = np.arange(LENGTH)[None, :, None]
    pitch = 0.8 + (2 * labels[:, None, None] - 1) * 0.02 * (steps - LENGTH / 4)
    phase = rng.uniform(0, 2 * np.pi, (count, 1, CHANNELS))
    x = 2 + np.sin(pitch * steps + phase) + rng.normal(0, 0.2, (count, LENGTH, CHANNELS))
    return np.where(steps < lengths[:, None, None], x, 0).astype("float32"), labels


def padded(x: np.ndarray, length: int) -> np.ndarray:
    """More padding behind the same sequences, as in a batch with one longer than all others."""
    return np.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))


def network(normalization: type[keras.layers.Layer]) -> keras.Model:
    """Masking, normalization, a GRU, normalization, the mean over the steps that are there."""
    x = steps = keras.Input((None, CHANNELS), name="steps")
    x = keras.layers.Masking(0.0)(x)
    x = normalization(name="bn_inputs")(x)
    x = keras.layers.GRU(32, return_sequences=True)(x)
    x = normalization(name="bn_states")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(steps, keras.layers.Dense(1, activation="sigmoid", name="rises")(x))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few sequences, to see that it runs")
    quick = parser.parse_args().quick
    rng = np.random.default_rng(0)
    x, y = sequences(512 if quick else 8000, rng)
    x_test, y_test = sequences(512 if quick else 2000, rng)
    there = x[(x != 0).any(-1)]
    print(f"{1 - len(there) / x[..., 0].size:.0%} of the steps are padding")

    rows = []
    for name, normalization in (("obeys the mask", keras_bn.BatchNormalization), ("is blind to it", Unmasked)):
        print(f"\nA normalization that {name}", flush=True)
        keras.utils.set_random_seed(1)
        model = network(normalization)
        model.compile(keras.optimizers.Adam(3e-3), "binary_crossentropy", metrics=["accuracy"])
        model.fit(x, y, batch_size=64, epochs=1 if quick else 8, verbose=2)
        keras_bn.recalibrate(model, x, batch_size=512, verbose=0)
        norm = model.get_layer("bn_inputs")
        short, long = (model.predict(padded(x_test, length), verbose=0)[:, 0] for length in (LENGTH, 3 * LENGTH))
        with keras_bn.use_statistics(model, "batch"):  # As in training.
            batches = [model(padded(x_test, length), training=False)[:, 0] for length in (LENGTH, 3 * LENGTH)]
        rows.append(
            (
                name,
                float(norm.moving_mean[0]),
                float(norm.moving_variance[0]),
                np.mean((short > 0.5) == y_test),
                np.abs(short - long).max(),
                np.abs(batches[0] - batches[1]).max(),
            )
        )
    print("\n                   statistics of the first channel    accuracy    answers change by, padded to 72 steps")
    print("                         mean    variance                        moving statistics    batch statistics")
    print(f"the steps themselves    {there[:, 0].mean():5.3f}       {there[:, 0].var():5.3f}")
    for name, mean, variance, accuracy, moving, batch in rows:
        print(f"{name:<22}  {mean:5.3f}       {variance:5.3f}      {accuracy:8.3f}  {moving:19.1e} {batch:19.1e}")


if __name__ == "__main__":
    main()
