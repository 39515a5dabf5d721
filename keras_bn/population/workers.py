"""What the processes that train a model together tell each other while each measures its own share of the data."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf

from keras_bn.names import listed

T = TypeVar("T")


class Workers:
    """The worker processes of a model's distribution strategy; one, that tells nothing, where it has no other.

    All of them have to ask the same questions in the same order: each waits for the others.

    Args:
        model: made in the scope of its strategy.

    Attributes:
        count: how many there are.
    """

    def __init__(self, model: keras.Model):
        self._strategy = model.distribute_strategy
        resolver = None if self._strategy is None else self._strategy.cluster_resolver
        cluster = {} if resolver is None else resolver.cluster_spec().as_dict()
        self.count = max(1, sum(len(cluster.get(kind, [])) for kind in ("chief", "worker")))

    def together(self, own: Callable[[], T]) -> T:
        """What `own` returns, after it was through on every worker.

        Raises:
            ValueError: when it raised an error on another worker; where it did on this one, that error.
        """
        if self.count == 1:
            return own()
        try:
            result = own()
        except BaseException:  # Ctrl-C in one process alone, too.
            self.gathered(np.ones(1))
            raise
        failed = [number for number, value in enumerate(self.gathered(np.zeros(1))) if value[0]]
        if failed:
            raise ValueError(
                "`data` must be measured on every worker, to be put together. "
                f"Received: an error on worker {', '.join(map(str, failed))}, which says what is wrong there."
            )
        return result

    def agreed(self, own: Callable[[], list[str]]) -> list[str]:
        """What `own` returns, which has to be the same on every worker.

        Raises:
            ValueError: when it is not; otherwise as `together`.
        """
        names = self.together(own)
        if self._differ("\n".join(names)):
            raise ValueError(
                "`model` must call the same normalizations in the same order on every worker, to be put together. "
                f"Received: {listed(names)} on this one, others on another."
            )
        return names

    def check_same(self, **options: str) -> None:
        """Refuses options that are others on another worker, which would ask other questions.

        Raises:
            ValueError: on every worker.
        """
        own = ", ".join(f"{name}={value!r}" for name, value in options.items())
        if self._differ(own):
            names = " and ".join(f"`{name}`" for name in options)
            raise ValueError(
                f"{names} must be the same on every worker. Received: {own} on this one, others on another."
            )

    def _differ(self, text: str) -> bool:
        known = zlib.crc32(text.encode())
        return any(value[0] != known for value in self.gathered(np.array([known])))

    def gathered(self, values: np.ndarray) -> list[np.ndarray]:
        """What each worker hands over, float64 of one shape, in one order everywhere."""
        values = np.asarray(values, "float64")
        if self.count == 1:
            return [values]
        of_replicas = _gather_of(self._strategy)(values.ravel())
        everything = np.asarray(self._strategy.experimental_local_results(of_replicas)[0])
        # Every replica of a worker hands over the same.
        return [everything[i].reshape(values.shape) for i in range(0, len(everything), len(everything) // self.count)]


@functools.lru_cache(maxsize=1)  # Traced anew for each question it would take longer than to measure.
def _gather_of(strategy: tf.distribute.Strategy) -> Callable[[np.ndarray], Any]:
    @tf.function(input_signature=[tf.TensorSpec([None], tf.float64)], autograph=False)
    def gather(values: tf.Tensor) -> Any:
        return strategy.run(lambda: tf.distribute.get_replica_context().all_gather(values[None], axis=0))

    return gather
