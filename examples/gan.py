"""A GAN whose discriminator normalizes two batches, real and generated: what mixed statistics do, and two ways out.

`python -m examples.gan [--quick]`
"""

import argparse

import keras
import numpy as np
import tensorflow as tf

import keras_bn

NOISE, BATCH = 8, 128
ANGLES = np.arange(8) * np.pi / 4
CENTRES = np.stack([2 * np.cos(ANGLES) + 3, 2 * np.sin(ANGLES) + 1], 1)
CROSS_ENTROPY = keras.losses.BinaryCrossentropy(from_logits=True)


def real_points(count: int, rng: np.random.Generator) -> np.ndarray:
    """Points of eight clusters on a circle, off the centre."""
    return (CENTRES[rng.integers(0, 8, count)] + rng.normal(0, 0.1, (count, 2))).astype("float32")


def networks() -> tuple[keras.Model, keras.Model]:
    """Generator and discriminator, of which the latter normalizes."""
    relu, dense = keras.layers.LeakyReLU, keras.layers.Dense
    generator = keras.Sequential([keras.Input((NOISE,)), dense(64), relu(), dense(64), relu(), dense(2)])
    layers = [keras.Input((2,)), dense(64), relu()]
    for _ in range(2):
        layers += [dense(64, use_bias=False), keras_bn.BatchNormalization(momentum=0.9), relu()]
    return generator, keras.Sequential([*layers, dense(1)])


def mixed(discriminator: keras.Model, real: tf.Tensor, generated: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """One call on both: what a point scores depends on how many real ones are beside it."""
    scores = discriminator(tf.concat([real, generated], 0), training=True)
    return scores[:BATCH], scores[BATCH:]


def two_calls(discriminator: keras.Model, real: tf.Tensor, generated: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Each batch by its own statistics; the moving ones follow both in turn, and are those of neither."""
    return discriminator(real, training=True), discriminator(generated, training=True)


def real_only(discriminator: keras.Model, real: tf.Tensor, generated: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The moving statistics follow the real batch, and both are normalized by them: a point scores what it is."""
    discriminator(real, training=True)  # For the moving statistics alone.
    with keras_bn.use_statistics(discriminator, "moving"):
        return discriminator(real, training=True), discriminator(generated, training=True)


def step(way, generator: keras.Model, discriminator: keras.Model):
    """A function that takes one step of both; modes are chosen while it is traced, and stay in it."""
    optimizers = keras.optimizers.Adam(1e-3, beta_1=0.5), keras.optimizers.Adam(1e-3, beta_1=0.5)
    for optimizer, model in zip(optimizers, (generator, discriminator), strict=True):
        optimizer.build(model.trainable_variables)

    @tf.function
    def run(real, noise):
        with tf.GradientTape(persistent=True) as tape:
            of_real, of_generated = way(discriminator, real, generator(noise, training=True))
            judged = CROSS_ENTROPY(tf.ones_like(of_real), of_real) + CROSS_ENTROPY(
                tf.zeros_like(of_generated), of_generated
            )
            fooled = CROSS_ENTROPY(tf.ones_like(of_generated), of_generated)
        for optimizer, model, loss in zip(optimizers, (generator, discriminator), (fooled, judged), strict=True):
            variables = [weight.value for weight in model.trainable_variables]
            optimizer.apply(tape.gradient(loss, variables), model.trainable_variables)
        return judged, fooled

    return run


def score(way, discriminator: keras.Model, real: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """What generated points score in a step, of which the discriminator keeps nothing."""
    weights = discriminator.get_weights()
    scores = way(discriminator, tf.constant(real), tf.constant(generated))[1]
    discriminator.set_weights(weights)
    return np.asarray(scores)


def clusters(points: np.ndarray) -> int:
    """How many of the eight have at least a hundredth of the points within five of their standard deviations."""
    return int(((np.linalg.norm(points[:, None] - CENTRES, axis=-1) < 0.5).mean(0) > 0.01).sum())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise and points (default: 0)")
    options = parser.parse_args()
    steps, rows = 200 if options.quick else 6000, []
    for way in (mixed, two_calls, real_only):
        keras.utils.set_random_seed(options.seed)
        rng, (generator, discriminator) = np.random.default_rng(options.seed), networks()
        run = step(way, generator, discriminator)
        print(f"\n{way.__name__}: {way.__doc__}", flush=True)
        for number in range(1, steps + 1):
            noise = rng.normal(size=(BATCH, NOISE)).astype("float32")
            judged, fooled = run(tf.constant(real_points(BATCH, rng)), tf.constant(noise))
            if number % (steps // 4) == 0:
                print(f"  step {number}: loss {judged:.2f}, of the generator {fooled:.2f}", flush=True)
        generated, real = generator.predict(rng.normal(size=(20 * BATCH, NOISE)), verbose=0), real_points(BATCH, rng)
        trained = score(way, discriminator, real, generated[:BATCH])
        # The first half of the batch stays, the others go two to the right.
        moved = np.concatenate([generated[: BATCH // 2], generated[BATCH // 2 : BATCH] + np.array([2, 0], "float32")])
        beside = abs(score(way, discriminator, real, moved) - trained)[: BATCH // 2].mean()
        inferred = abs(discriminator.predict(generated[:BATCH], verbose=0) - trained).mean()
        rows.append((way.__name__, beside / trained.std(), inferred / trained.std(), clusters(generated)))
    print("\nA generated point's score changes, in standard deviations of the scores,")
    print("              with those beside it   in inference mode   clusters found, of 8")
    for name, beside, inferred, found in rows:
        print(f"  {name:<12} {beside:18.3f} {inferred:19.3f} {found:22}")


if __name__ == "__main__":
    main()
