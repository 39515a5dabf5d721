"""Bad arguments: each says which, what is allowed, what came and the way out."""

import inspect
import re

import keras
import numpy as np
import pytest

import keras_bn

_BAD = [
    ({"axis": 1.5}, TypeError, "`axis` must be an int or a list of ints, at least one. Received: axis=1.5."),
    ({"axis": []}, TypeError, "`axis` must be an int or a list of ints, at least one. Received: axis=[]."),
    (
        {"momentum": 1.5},
        ValueError,
        "`momentum` must be a number in [0, 1], or None, or a LearningRateSchedule. Received: momentum=1.5.",
    ),
    (
        {"momentum": "0.9"},
        TypeError,
        "`momentum` must be a number in [0, 1], or None, or a LearningRateSchedule. Received: momentum='0.9'.",
    ),
    ({"epsilon": -1e-3}, ValueError, "`epsilon` must be a number not below 0. Received: epsilon=-0.001."),
    ({"epsilon": None}, TypeError, "`epsilon` must be a number not below 0. Received: epsilon=None."),
    ({"epsilon": float("nan")}, ValueError, "`epsilon` must be a number not below 0. Received: epsilon=nan."),
    (
        {"renorm_momentum": -1},
        ValueError,
        "`renorm_momentum` must be a number in [0, 1]. Received: renorm_momentum=-1.",
    ),
    (
        {"renorm": True, "renorm_clipping": 3.0},
        TypeError,
        "`renorm_clipping` must be a dictionary with some of the keys 'rmax', 'rmin', 'dmax', or 'warmup', or None. "
        "Received: renorm_clipping=3.0.",
    ),
    (
        {"renorm": True, "renorm_clipping": {"max": 1.0}},
        ValueError,
        "`renorm_clipping` may have the keys 'rmax', 'rmin', 'dmax'. Received invalid keys: 'max'.",
    ),
    (
        {"renorm": True, "renorm_clipping": {"rmax": "3"}},
        TypeError,
        "`rmax` in `renorm_clipping` must be a number or a LearningRateSchedule. Received: rmax='3'.",
    ),
    (
        {"renorm": True, "renorm_clipping": {"rmax": 0.5, "rmin": 0.9}},
        ValueError,
        "In `renorm_clipping`, rmax should be greater than rmin. Received: rmax=0.5, rmin=0.9.",
    ),
    (
        {"renorm": True, "renorm_clipping": {"rmax": -1}},
        ValueError,
        "`rmax` in `renorm_clipping` must be positive. Received: rmax=-1.",
    ),
    (
        {"renorm": True, "renorm_clipping": {"dmax": float("nan")}},
        ValueError,
        "`dmax` in `renorm_clipping` must be a number. Received: dmax=nan.",
    ),
    (
        {"renorm": True, "renorm_clipping": {"dmax": -1}},
        ValueError,
        "In `renorm_clipping`, dmax should be non-negative. Received: dmax=-1.",
    ),
    (
        {"virtual_batch_size": 0},
        ValueError,
        "`virtual_batch_size` must be an int above 0, or None. Received: virtual_batch_size=0.",
    ),
    (
        {"virtual_batch_size": 8.0},
        TypeError,
        "`virtual_batch_size` must be an int above 0, or None. Received: virtual_batch_size=8.0.",
    ),
    (
        {"virtual_batch_size": 8, "renorm": True},
        ValueError,
        "`virtual_batch_size` cannot be combined with `renorm=True`: groups have statistics of their own. "
        "Received: virtual_batch_size=8, renorm=True.",
    ),
    (
        {"synchronized": "yes"},
        TypeError,
        "`synchronized` must be True or False, or a number of replicas above 1. Received: synchronized='yes'.",
    ),
    (
        {"synchronized": 1},
        ValueError,
        "`synchronized` must be True or False, or a number of replicas above 1. Received: synchronized=1.",
    ),
    (
        {"virtual_batch_size": 8, "synchronized": True},
        ValueError,
        "`virtual_batch_size` cannot be combined with `synchronized=True`: groups have statistics of their own. "
        "Received: virtual_batch_size=8, synchronized=True.",
    ),
    (
        {"renorm": True, "unbiased_variance": True},
        ValueError,
        "`renorm` cannot be combined with `unbiased_variance=True`: it averages standard deviations. "
        "Received: renorm=True, unbiased_variance=True.",
    ),
    (
        {"kernel": "cudnn"},
        ValueError,
        "`kernel` must be one of 'auto', 'native', 'fused', 'plain'. Received: kernel='cudnn'.",
    ),
    *(
        ({name: "yes"}, TypeError, f"`{name}` must be True or False. Received: {name}='yes'.")
        for name in ("center", "scale", "renorm", "unbiased_variance", "zero_debias")
    ),
    ({"activation": "rectify"}, ValueError, "Could not interpret activation function identifier: rectify"),
    *(
        ({f"{weight}_{kind}": "odd"}, ValueError, f"Could not interpret {kind} identifier: odd")
        for kind, weights in {
            "initializer": ("beta", "gamma", "moving_mean", "moving_variance"),
            "regularizer": ("beta", "gamma"),
            "constraint": ("beta", "gamma"),
        }.items()
        for weight in weights
    ),
]


@pytest.mark.parametrize(("arguments", "error", "text"), _BAD, ids=[str(bad[0]) for bad in _BAD])
def test_bad_argument_is_named_with_what_is_allowed(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        keras_bn.BatchNormalization(**arguments)


def test_every_public_argument_has_a_bad_value_here():
    named = {name for arguments, _, _ in _BAD for name in arguments}
    public = set(inspect.signature(keras_bn.BatchNormalization).parameters) - {"kwargs"}
    assert public - named == set()


_BAD_SHAPES = [
    ({"axis": 5}, (2, 3, 3, 4), "`axis` must be in [-4, 3] for rank-4 inputs. Received: axis=5."),
    ({"axis": [0, -3]}, (2, 3), "`axis` must be in [-2, 1] for rank-2 inputs. Received: axis=[0, -3]."),
    (
        {"axis": [0, 1]},
        (2, 3),
        "`axis` must leave at least one axis to take statistics over, for rank-2 inputs. Received: axis=[0, 1].",
    ),
    (
        {"axis": [0, 1], "virtual_batch_size": 2},
        (2, 3, 4),
        "`virtual_batch_size` needs axis 0 to be the examples, not a channel axis. Received: virtual_batch_size=2, "
        "axis=[0, 1].",
    ),
    (
        {"axis": 1},
        (None, None, 4),
        "`axis` must name axes of known size, since each has its own statistics. Received: axis=1 and inputs of shape "
        "(None, None, 4).",
    ),
]


@pytest.mark.parametrize(("arguments", "shape", "text"), _BAD_SHAPES, ids=[str(bad[0]) for bad in _BAD_SHAPES])
def test_inputs_that_do_not_fit_the_axis_are_refused(arguments, shape, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        keras_bn.BatchNormalization(**arguments).build(shape)


def test_mask_that_does_not_broadcast_is_refused():
    text = (
        "`mask` must have the first axes of the inputs, as Keras's masks do, or all but the channel axes [2]; sizes "
        "may be 1. Received: mask of shape (7,) for inputs of shape (2, 3, 4)."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        keras_bn.BatchNormalization()(np.zeros((2, 3, 4), "float32"), training=True, mask=np.ones(7))


@pytest.mark.parametrize(
    "function", [keras_bn.freeze, keras_bn.unfreeze, lambda it: keras_bn.use_statistics(it, "auto")]
)
def test_switches_refuse_what_is_no_layer_or_holds_none(function):
    with pytest.raises(TypeError, match=r"`model_or_layer` must be a Keras model or layer. Received: str, 'model'\."):
        function("model")
    text = "`model_or_layer` must be or contain a batch normalization that was made already (a subclassed model"
    with pytest.raises(ValueError, match=re.escape(text)):
        function(keras.layers.Dense(3))


def test_unknown_statistics_are_refused():
    text = "`statistics` must be one of 'auto', 'batch', 'moving'. Received: statistics='running'."
    with pytest.raises(ValueError, match=re.escape(text)):
        keras_bn.use_statistics(keras_bn.BatchNormalization(), "running")


@pytest.mark.parametrize(("arguments", "error"), [
    ({"axis": [1, 1]}, ValueError), ({"axis": True}, TypeError), ({"epsilon": float("inf")}, ValueError),
])  # fmt: skip
def test_axes_named_twice_and_an_infinite_epsilon_are_refused(arguments, error):
    with pytest.raises(error, match=f"`{next(iter(arguments))}` must"):
        keras_bn.BatchNormalization(**arguments)


def test_an_axis_named_from_both_ends_is_refused_when_the_rank_is_known():
    with pytest.raises(ValueError, match=r"`axis` must name each axis once, for rank-2 inputs"):
        keras_bn.BatchNormalization(axis=[1, -1]).build((4, 3))
