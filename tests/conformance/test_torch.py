"""Ours against PyTorch's batch norm on a CPU, where PyTorch is installed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn

torch = pytest.importorskip("torch", reason="PyTorch is not installed: ours was not compared with it")


@pytest.mark.parametrize("shape", [(16, 3), (8, 3, 5), (8, 3, 4, 4), (4, 3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_training_and_inference_equal_torch(momentum, shape):
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
    theirs = kind[len(shape)](3, eps=1e-5, momentum=momentum)
    ours = keras_bn.BatchNormalization(
        axis=1,
        epsilon=1e-5,
        momentum=None if momentum is None else 1 - momentum,
        unbiased_variance=True,
        moving_variance_initializer=keras.initializers.Ones(),
    )
    ours.build(shape)
    rng = np.random.default_rng(0)
    for name, parameter in {"gamma": theirs.weight, "beta": theirs.bias}.items():
        value = rng.normal(1, 0.3, 3).astype("float32")
        getattr(ours, name).assign(value)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value))
    for _ in range(3):
        x, dy = (rng.normal(1, 2, shape).astype("float32") for _ in range(2))
        leaf = torch.from_numpy(x).requires_grad_()
        theirs.zero_grad()
        expected = theirs(leaf)
        expected.backward(torch.from_numpy(dy))
        with tf.GradientTape() as tape:
            tensor = tf.constant(x)
            tape.watch(tensor)
            y = ours(tensor, training=True)
            loss = tf.reduce_sum(y * dy)
        dx, dgamma, dbeta = tape.gradient(loss, [tensor, ours.gamma.value, ours.beta.value])
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dx, leaf.grad.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dgamma, theirs.weight.grad.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dbeta, theirs.bias.grad.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.moving_mean, theirs.running_mean.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.moving_variance, theirs.running_var.numpy(), rtol=1e-5)
    if momentum is None:
        np.testing.assert_array_equal(ours.update_count, np.full(3, float(theirs.num_batches_tracked)))
    theirs.eval()
    x = rng.normal(1, 2, shape).astype("float32")
    np.testing.assert_allclose(ours(x), theirs(torch.from_numpy(x)).detach().numpy(), rtol=1e-4, atol=1e-5)
