"""The equations that the pages print, computed as they are printed, against the layer and the float64 oracle."""

import numpy as np
import pytest

import keras_bn
from keras_bn.drift import distance
from keras_bn.folding.weights import affine_of, fold_conv, fold_into_conv
from tests import pages
from tests.reference import Reference, assert_close

PAGES = [path.relative_to(pages.ROOT).as_posix() for path in sorted((pages.ROOT / "docs").rglob("*.md"))]
EQUATIONS = [block for page in PAGES for block in pages.blocks(page, "equations")]
RNG = np.random.default_rng(0)
CHANNELS = 3
# float32 values, that the layer and float64 are given the same.
X = RNG.normal(3, 2, (20, CHANNELS)).astype("float32")
DY, OTHER = RNG.normal(size=(2, *X.shape)).astype("float32")
GAMMA, BETA, MEAN = RNG.normal(size=(3, CHANNELS)).astype("float32")
VARIANCE = RNG.uniform(1, 5, CHANNELS).astype("float32")
EPSILON = 1e-3


def _computed(start, **values):
    """What the block that begins like this makes of the values, by name."""
    (block,) = [block for block in EQUATIONS if block.title.startswith(start)]
    names = {
        **{"sum": lambda array: np.sum(array, 0), "sqrt": np.sqrt, "log": np.log, "clip": np.clip},
        **{"activation": lambda array: np.maximum(array, 0), "epsilon": EPSILON, "count": float(len(X))},
        **{name: np.asarray(value, "float64") for name, value in values.items()},
    }
    exec(block.code, names)
    return names


def _layer(**options):
    layer = keras_bn.BatchNormalization(epsilon=EPSILON, **options)
    layer.build(X.shape)
    values = {"gamma": GAMMA, "beta": BETA, "moving_mean": MEAN, "moving_variance": VARIANCE}
    for name, value in values.items():
        getattr(layer, name).assign(value)
    return layer


def _moments():
    reference = Reference(X, -1, GAMMA, BETA, EPSILON)
    return {"mean": reference.batch_mean, "variance": reference.biased_variance}


def _training():
    names = _computed("mean = sum(x) / count", x=X, gamma=GAMMA, beta=BETA)
    assert_close(np.maximum(Reference(X, -1, GAMMA, BETA, EPSILON).y, 0), names["y"], "float64")
    assert_close(_layer(activation="relu")(X, training=True), names["y"], "float32")


def _inference():
    start = "y = activation(gamma * (x - moving_mean)"
    names = _computed(start, x=X, gamma=GAMMA, beta=BETA, moving_mean=MEAN, moving_variance=VARIANCE)
    assert_close(_layer(activation="relu")(X), names["y"], "float32")


def _moves(layer, names):
    layer(X, training=True)
    assert_close(layer.moving_mean, names["moving_mean"], "float32")
    if "moving_variance" in names:
        assert_close(layer.moving_variance, names["moving_variance"], "float32", 5)


def _momentum():
    names = _computed("moving_mean = momentum", moving_mean=MEAN, moving_variance=VARIANCE, momentum=0.9, **_moments())
    _moves(_layer(momentum=0.9), names)


def _momentum_none():
    layer = _layer(momentum=None)
    layer(OTHER, training=True)
    momentum = _computed("momentum = updates", updates=1)["momentum"]
    names = _computed(
        "moving_mean = momentum",
        moving_mean=layer.moving_mean,
        moving_variance=layer.moving_variance,
        momentum=momentum,
        **_moments(),
    )
    _moves(layer, names)


def _zero_debias():
    layer = _layer(momentum=0.9, zero_debias=True)
    weight = 1.0
    for batch in (OTHER, X):
        names = _computed(
            "initial_weight = initial_weight",
            initial_weight=weight,
            momentum=0.9,
            mean=Reference(batch, -1).batch_mean,
            moving_mean=layer.moving_mean,
        )
        layer(batch, training=True)
        assert_close(layer.moving_mean, names["moving_mean"], "float32")
        weight = names["initial_weight"]


def _unbiased():
    names = _computed("variance = sum((x - mean) ** 2) / (count - 1)", x=X, **_moments())
    assert_close(Reference(X, -1).unbiased_variance, names["variance"], "float64")
    layer = _layer(momentum=0.0, unbiased_variance=True)
    layer(X, training=True)
    assert_close(layer.moving_variance, names["variance"], "float32")


def _renorm():
    limits = {"rmax": 1.5, "rmin": 0.7, "dmax": 0.5}
    layer = _layer(renorm=True, renorm_clipping=limits, activation="relu")
    layer.renorm_mean.assign(MEAN)
    layer.renorm_stddev.assign(np.sqrt(VARIANCE))
    names = _computed(
        "stddev = sqrt(variance",
        x=X,
        gamma=GAMMA,
        beta=BETA,
        renorm_mean=MEAN,
        renorm_stddev=np.sqrt(VARIANCE),
        **limits,
        **_moments(),
    )
    assert_close(layer(X, training=True), names["y"], "float32", 5)


def _mask():
    weights = RNG.integers(0, 3, (len(X), 1))
    layer = _layer(activation="relu", momentum=0.0)
    layer(X, training=True, mask=weights)
    names = _computed("count = sum(w)", w=np.broadcast_to(weights, X.shape), x=X)
    reference = Reference(X, -1, weights=weights)
    assert_close(reference.biased_variance, names["variance"], "float64")
    assert_close(layer.moving_mean, names["mean"], "float32")
    assert_close(layer.moving_variance, names["variance"], "float32", 5)


def _merging():
    parts = [Reference(part, -1) for part in (X[:7], X[7:])]
    given = [(len(part.x), part.batch_mean, part.channels(part.m2)) for part in parts]
    first, second = (keras_bn.Moments(*part) for part in given)
    names = _computed(
        "count = count_1 + count_2",
        **{
            f"{name}_{i + 1}": value
            for i, part in enumerate(given)
            for name, value in zip(("count", "mean", "m2"), part, strict=True)
        },
    )
    whole = Reference(X, -1)
    assert_close(whole.batch_mean, names["mean"], "float64")
    assert_close(whole.channels(whole.m2), names["m2"], "float64")
    assert_close((first + second).m2, names["m2"], "float64")
    assert_close((first + second).mean, names["mean"], "float64")


def _drift():
    moments = _moments()
    names = _computed("mean_shift = ", moving_mean=MEAN, moving_variance=VARIANCE, **moments)
    found = distance(*moments.values(), MEAN, VARIANCE, EPSILON)
    for name in ("mean_shift", "variance_ratio", "kl"):
        assert_close(getattr(found, name), names[name], "float64")


def _affine():
    given = {"gamma": GAMMA, "beta": BETA, "moving_mean": MEAN, "moving_variance": VARIANCE}
    return given, affine_of(*given.values(), EPSILON)


def _fold_affine():
    given, affine = _affine()
    names = _computed("scale = gamma", x=X, **given)
    assert_close(affine.scale, names["scale"], "float64")
    assert_close(affine.shift, names["shift"], "float64")
    assert_close(_layer()(X), names["y"], "float32", 5)


def _fold_before():
    _, affine = _affine()
    kernel, bias = RNG.normal(size=(4, CHANNELS)), RNG.normal(size=CHANNELS)
    names = _computed("new_kernel = kernel * scale", kernel=kernel, bias=bias, **affine._asdict())
    for got, name in zip(fold_conv(kernel, bias, affine), ("new_kernel", "new_bias"), strict=True):
        assert_close(got, names[name], "float64")


def _fold_after():
    _, affine = _affine()
    kernel, bias = RNG.normal(size=(CHANNELS, 4)), RNG.normal(size=4)
    names = _computed("new_kernel = scale[:, None]", kernel=kernel, bias=bias, **affine._asdict())
    for got, name in zip(fold_into_conv(affine, kernel, bias), ("new_kernel", "new_bias"), strict=True):
        assert_close(got, names[name], "float64")


def _first_value():
    names = _computed("d = x - first", x=X, first=X[0])
    reference = Reference(X, -1)
    assert_close(reference.batch_mean, names["mean"], "float64")
    assert_close(reference.biased_variance, names["variance"], "float64")


def _gradients():
    reference = Reference(X, -1, GAMMA, BETA, EPSILON)
    names = _computed("dbeta = sum(dy)", dy=DY, normalized=reference.normalized, gamma=GAMMA, **_moments())
    for got, name in zip(reference.gradients(DY), ("dx", "dgamma", "dbeta"), strict=True):
        assert_close(got, names[name], "float64")


CHECKS = [
    *(_training, _inference, _momentum, _momentum_none, _zero_debias, _unbiased, _renorm, _mask, _merging, _drift),
    *(_fold_affine, _fold_before, _fold_after, _first_value, _gradients),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.strip("_"))
def test_equation_is_what_is_computed(check):
    check()


def test_every_equation_of_the_pages_has_such_a_test():
    assert len(EQUATIONS) == len(CHECKS)
