"""Training by several replicas, on this machine or on many, that ends with the weights of one process.

Keras's `fit` cannot: with the strategy for several workers it fails, for stock layers too
(https://github.com/keras-team/keras/issues/20585), so that the loop is written out here.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from models import cluster, data, local_workers, run_folder, training
from models.checkpoint import Checkpoint, whole
from models.settings import Settings

_ROWS = 500
# What the collective operations of a worker end with when another one is gone.
_LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError)


@contextlib.contextmanager
def mirrored(replicas: int | None = None) -> Iterator[tf.distribute.Strategy]:
    """A strategy for all GPUs of this machine, or where there are none, for parts of its CPU.

    Args:
        replicas: How many; by default all GPUs, or 2 parts of the CPU.

    Raises:
        ValueError: There are GPUs, but not as many.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        count = replicas or len(gpus)
        if count > len(gpus):
            raise ValueError(f"`replicas` must be at most {len(gpus)}, the number of GPUs. Received: {replicas}")
        yield tf.distribute.MirroredStrategy([f"GPU:{number}" for number in range(count)])
        return
    count = replicas or 2
    # Before TensorFlow has used it for the first time.
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    yield tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(count)])


@contextlib.contextmanager
def workers() -> Iterator[tf.distribute.Strategy]:
    """The strategy of the workers that `TF_CONFIG` names, of whom none leaves before all are through.

    Where another worker is lost meanwhile, the process says so and ends with `local_workers.TRY_AGAIN`: what is left of
    the cluster cannot be mended, but all that are started again find each other.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        # TensorFlow's runtime takes it for itself, to tell who asks that this process shall end; nobody asks.
        signal.signal(signal.SIGTERM, on_sigterm)
        yield strategy
        # Who leaves while others compute is taken for dead.
        of_chief(strategy, [0])
    except _LOST as error:
        said = f"{error}\nAnother worker was lost; the same command goes on after the last whole epoch."
        print(said, file=sys.stderr, flush=True)
        raise SystemExit(local_workers.TRY_AGAIN) from error


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes and prints for all."""
    return _place(strategy)[0] == 0


def of_chief(strategy: tf.distribute.Strategy, values: Sequence[Any]) -> list[Any]:
    """The chief's numbers, arrays or variables, on every worker.

    Args:
        strategy: Of all workers, each of which has to ask.
        values: As many of the same shapes and dtypes on each.
    """

    def on_replica() -> list[tf.Tensor]:
        context = tf.distribute.get_replica_context()
        own = tf.equal(tf.cast(context.replica_id_in_sync_group, tf.int32), 0)
        tensors = [tf.convert_to_tensor(value) for value in values]
        chosen = [tf.where(own, value, tf.zeros_like(value)) for value in tensors]
        return [context.all_reduce(tf.distribute.ReduceOp.SUM, value) for value in chosen]

    reduced = tf.function(lambda: strategy.run(on_replica), autograph=False)()
    return [strategy.experimental_local_results(value)[0].numpy() for value in reduced]


def train(
    settings: Settings,
    images: data.ImageData,
    folder: str | os.PathLike,
    strategy: tf.distribute.Strategy,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    restart: bool = False,
) -> keras.Model | None:
    """As `models.training.train`, by all replicas of `strategy`: the same weights, but for the rounding of floats.

    Every worker makes the whole batch, a function of seed and epoch alone, and each of its replicas trains on a share
    of it; the normalizations are synchronized. Only the chief reads and writes `folder`, prints, and tells the others
    where a training goes on that was interrupted, also with another number of replicas.

    Args:
        settings: As there; `batch_size` is that of all replicas together.
        images: As there, the same on every worker.
        folder: As there.
        strategy: A mirrored one, or that of several workers, each of which has to call this.
        callbacks: As there, on every worker.
        restart: As there.

    Returns:
        The trained model without the strategy, as it was saved; None on a worker that is not the chief.

    Raises:
        ValueError: As there, or there are more replicas than images in a batch.
    """
    folder, chief, replicas = Path(folder), is_chief(strategy), strategy.num_replicas_in_sync
    if settings.batch_size < replicas:
        raise ValueError(
            f"`batch_size` must be at least {replicas}, an image for each replica. "
            f"Received: batch_size={settings.batch_size}"
        )
    if chief:
        if restart:
            run_folder.forget(folder)
        run_folder.claim(folder, settings, images)
    path = folder / run_folder.MODEL
    (finished,) = of_chief(strategy, [int(chief and path.exists())])
    if finished:
        if chief:
            print(f"Trained already: {path}")
        return keras.models.load_model(path) if chief else None

    x, y, validation = training.split(settings, images)
    steps = len(x) // settings.batch_size
    keras.utils.set_random_seed(settings.seed)
    checkpoint = Checkpoint(folder)
    with strategy.scope():
        model = training.compiled(settings, steps, synchronized=True)
        model.optimizer.build(model.trainable_variables)
    if chief:
        checkpoint.restore(model)
    variables = list({id(variable): variable for variable in (*model.variables, *model.optimizer.variables)}.values())
    for variable, value in zip(variables, of_chief(strategy, variables), strict=True):
        variable.assign(value)
    first_epoch = int(model.optimizer.iterations.numpy()) // steps
    if chief and first_epoch:
        print(f"Going on after epoch {first_epoch}/{settings.epochs} of {folder}")
    batches = data.training_batches(
        x, y, settings.batch_size, seed=settings.seed, first_epoch=first_epoch, augment=training.augmentation(settings)
    )
    fit(
        strategy,
        model,
        batches,
        epochs=range(first_epoch, settings.epochs),
        steps=steps,
        validation=validation,
        callbacks=[*([checkpoint] if chief else []), *callbacks],
        verbose=0 if not chief else 1 if sys.stdout.isatty() else 2,
    )
    if settings.recalibrate:
        number, count = _place(strategy)
        keras_bn.recalibrate(model, x[number::count], batch_size=_ROWS, verbose=0)
    if not chief:
        return None
    with whole(path) as half:
        model.save(half)
    # Outside of the scope: what it computes from here on is this process's own.
    return keras.models.load_model(path)


def fit(
    strategy: tf.distribute.Strategy,
    model: keras.Model,
    batches: tf.data.Dataset,
    *,
    epochs: range,
    steps: int,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int = 0,
) -> None:
    """Train as Keras's `fit` would on whole batches, each replica on its share of each.

    Args:
        strategy: In whose scope `model` was made; each of its workers has to call this.
        model: Compiled, with one input and a loss that is a mean over the images; its metric is the accuracy.
        batches: Of `(images, one-hot labels)`, the same on every worker, of any sizes.
        epochs: The numbers of the epochs, from 0 on.
        steps: Batches in an epoch.
        validation: Images and labels on which to report after each epoch.
        callbacks: Of Keras, in this process. Where the chief's end the training, it ends for all after the epoch.
        verbose: As for Keras's `fit`.
    """
    train_step, test_step = _steps_of(strategy, model, batches.element_spec)
    logged = keras.callbacks.CallbackList(
        list(callbacks), model=model, add_progbar=verbose > 0, verbose=verbose, epochs=epochs.stop, steps=steps
    )
    source = iter(batches)
    model.stop_training = False
    logged.on_train_begin()
    for epoch in epochs:
        logged.on_epoch_begin(epoch)
        sums = np.zeros(3)
        for step in range(steps):
            logged.on_train_batch_begin(step)
            sums += train_step(*next(source)).numpy()
            logged.on_train_batch_end(step, _means(sums))
        logs = _means(sums)
        if validation is not None:
            sums = np.zeros(3)
            for start in range(0, len(validation[0]), _ROWS):
                sums += test_step(*(part[start : start + _ROWS] for part in validation)).numpy()
            logs |= {f"val_{name}": value for name, value in _means(sums).items()}
        logged.on_epoch_end(epoch, logs)
        # An epoch that some begin alone would wait for the others for ever.
        if of_chief(strategy, [int(model.stop_training)])[0]:
            break
    logged.on_train_end()


def _means(sums: np.ndarray) -> dict[str, float]:
    loss, correct, count = sums.tolist()
    return {"accuracy": correct / count, "loss": loss / count}


def _steps_of(
    strategy: tf.distribute.Strategy, model: keras.Model, spec: tuple[tf.TensorSpec, tf.TensorSpec]
) -> tuple[Callable[..., tf.Tensor], ...]:
    """Functions of a whole batch that train and test; they return the sums of losses and right answers, and rows."""

    def share(values: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        number, replicas = tf.cast(context.replica_id_in_sync_group, tf.int32), context.num_replicas_in_sync
        rows = tf.shape(values)[0]
        return values[rows * number // replicas : rows * (number + 1) // replicas]

    def sums(y: tf.Tensor, probabilities: tf.Tensor) -> tf.Tensor:
        losses = model.loss.call(y, probabilities)
        correct = tf.equal(tf.argmax(y, -1), tf.argmax(probabilities, -1))
        return tf.stack([
            tf.reduce_sum(losses), tf.reduce_sum(tf.cast(correct, losses.dtype)), tf.cast(tf.shape(y)[0], losses.dtype)
        ])  # fmt: skip

    def train_on_share(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        own_x, own_y = share(x), share(y)
        with tf.GradientTape() as tape:
            result = sums(own_y, model(own_x, training=True))
            # Gradients are added up over the replicas, so that each loss is a part of the mean over the whole batch.
            loss = result[0] / tf.cast(tf.shape(x)[0], result.dtype)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return result

    def test_on_share(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return sums(share(y), model(share(x), training=False))

    def over_replicas(on_share: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
        # Of an unknown number of rows: a function that one worker traces anew waits for the others, which do not.
        signature = [tf.TensorSpec([None, *one.shape[1:]], one.dtype) for one in spec]

        @tf.function(input_signature=signature, autograph=False)
        def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(on_share, (x, y)), axis=None)

        return step

    return over_replicas(train_on_share), over_replicas(test_on_share)


def _place(strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """Which of the workers this process is, the chief being 0, and how many there are."""
    is_one_of_many = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    members = cluster.read(os.environ) if is_one_of_many else None
    return (0, 1) if members is None else (members.index, len(members.addresses))
