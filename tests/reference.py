"""Batch normalization in float64 NumPy, written from the equations: what every test compares with."""

import numpy as np

# How far a result may be from the oracle's, absolute and relative, by the dtype that the layer computes in. Outputs of
# batch norm are of order 1. The half types round the output itself: 2**-11 and 2**-8 of it.
TOLERANCE = {
    "float64": 1e-9,
    "float32": 2e-5,
    "mixed_float16": 4e-3,
    "mixed_bfloat16": 3e-2,
    "float16": 4e-3,
    "bfloat16": 3e-2,
}


def assert_close(got, want, dtype, scale=1.0):
    """Within the tolerance of `dtype`, in units of `scale`."""
    tolerance = TOLERANCE[str(dtype)] * scale
    np.testing.assert_allclose(np.asarray(got, "float64"), np.asarray(want, "float64"), rtol=tolerance, atol=tolerance)


def drift_of(seen, moving_mean, moving_variance):
    """How far all values of a `Reference` are from a population, per channel: see `keras_bn.drift.distance`."""
    mean, variance = np.asarray(moving_mean, "float64"), np.asarray(moving_variance, "float64")
    shift = (seen.batch_mean - mean) / np.sqrt(variance + seen.epsilon)
    ratio = (seen.biased_variance + seen.epsilon) / (variance + seen.epsilon)
    return {"mean_shift": shift, "variance_ratio": ratio, "kl": (ratio + shift**2 - 1 - np.log(ratio)) / 2}


class Reference:
    """y = gamma (x - mean) / sqrt(variance + epsilon) + beta, and all that follows from it.

    Args:
        x: Any shape; taken as float64.
        axes: The channel axes.
        weights: What each value counts, of a shape that broadcasts to that of x: integers are frequencies, floats are
            reliabilities.
    """

    def __init__(self, x, axes, gamma=1.0, beta=0.0, epsilon=1e-3, weights=None):
        self.x = np.asarray(x, "float64")
        axes = [axes] if isinstance(axes, int) else axes
        self.axes = [axis % self.x.ndim for axis in axes]
        self.others = tuple(axis for axis in range(self.x.ndim) if axis not in self.axes)
        self.gamma, self.beta, self.epsilon = self.along(gamma), self.along(beta), epsilon
        weights = np.ones(self.x.shape, int) if weights is None else np.broadcast_to(weights, self.x.shape)
        self.weights, self.frequencies = weights.astype("float64"), not np.issubdtype(weights.dtype, np.floating)
        # Far from zero float64 itself has no digits to spare, so the offset goes first.
        offset = self.x[tuple(slice(None) if axis in self.axes else slice(0, 1) for axis in range(self.x.ndim))]
        shifted = self.x - offset
        self.count = self.weights.sum(self.others, keepdims=True)
        share = self.weights / np.maximum(self.count, 1e-300)
        delta = (share * shifted).sum(self.others, keepdims=True)
        self.deviation = shifted - delta
        self.mean = np.where(self.count > 0, offset + delta, 0.0)
        self.deviation = np.where(self.count > 0, self.deviation, self.x)
        self.m2 = (self.weights * self.deviation**2).sum(self.others, keepdims=True)
        self.variance = self.m2 / np.maximum(self.count, 1e-300)
        self.inverse_std = 1.0 / np.sqrt(self.variance + epsilon)
        self.normalized = self.deviation * self.inverse_std

    def along(self, values):
        """Per-channel values with the rank of x."""
        values = np.asarray(values, "float64")
        if values.ndim == 0:
            return values
        return values.reshape([size if axis in self.axes else 1 for axis, size in enumerate(self.x.shape)])

    def channels(self, values):
        """Values of rank of x, reduced over everything but the channels."""
        return values.reshape([self.x.shape[axis] for axis in self.axes])

    @property
    def y(self):
        return self.gamma * self.normalized + self.beta

    def inference(self, mean, variance):
        return self.gamma * (self.x - self.along(mean)) / np.sqrt(self.along(variance) + self.epsilon) + self.beta

    @property
    def batch_mean(self):
        return self.channels(self.mean)

    @property
    def biased_variance(self):
        return self.channels(self.variance)

    @property
    def unbiased_variance(self):
        """sum(w d**2) / (V1 - 1) for frequencies, / (V1 - V2 / V1) for reliabilities; V1 = sum(w), V2 = sum(w**2)."""
        squares = (self.weights**2).sum(self.others, keepdims=True)
        return self.channels(self.m2 / (self.count - (1 if self.frequencies else squares / self.count)))

    def gradients(self, dy):
        """Of sum(dy * y) with respect to x, gamma and beta, statistics included.

        The figures of Ioffe & Szegedy 2015, section 3, with weights: only what counts moves the statistics.
        """
        dy = np.asarray(dy, "float64")
        dbeta = dy.sum(self.others, keepdims=True)
        dgamma = (dy * self.normalized).sum(self.others, keepdims=True)
        share = self.weights / np.maximum(self.count, 1e-300)
        dx = self.gamma * self.inverse_std * (dy - share * dbeta - share * self.normalized * dgamma)
        return dx, self.channels(dgamma), self.channels(dbeta)
