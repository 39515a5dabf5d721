"""One loaded version of a SavedModel: its signatures, and how to run them."""

import contextlib
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2

from keras_bn_serving.engine.run_memory import RunMemory
from keras_bn_serving.engine.signatures import (
    Signature,
    check_names,
    check_shapes,
    check_types,
    name_set,
    read_signature,
)
from keras_bn_serving.engine.xla import needs_xla
from keras_bn_serving.errors import (
    CancelledError,
    Code,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ServingError,
)

_log = logging.getLogger(__name__)
DEFAULT_SIGNATURE = "serving_default"
_TAG = "serve"
_FILES = ("saved_model.pb", "saved_model.pbtxt")


@dataclass(frozen=True)
class LoadOptions:
    """How TensorFlow runs the models.

    Attributes:
        intra_op_parallelism: Threads for one operation; 0 lets TensorFlow choose.
        inter_op_parallelism: Threads for operations side by side; 0 lets TensorFlow choose.
        xla: Whether to run functions that were saved to be compiled by XLA.
        timeout_seconds: How long a run may take that is limited at all.
        run_memory: How many bytes a run may take: larger requests run in parts, or are refused; 0 for any number.
    """

    intra_op_parallelism: int = 0
    inter_op_parallelism: int = 0
    xla: bool = False
    timeout_seconds: float = 0.0
    run_memory: int = 0


class Servable:
    """A SavedModel, loaded into a session of its own.

    Args:
        path: The version's folder.
        options: How to run it.
        name: The model's name, for metrics.

    Raises:
        ServingError: If there is no SavedModel or it cannot be loaded.
    """

    def __init__(self, path: str | os.PathLike[str], options: LoadOptions | None = None, name: str = ""):
        self.name = name
        self.path = os.fspath(path)
        options = options or LoadOptions()
        self.meta_graph, self._session = _load(self.path, options)
        definitions = self.meta_graph.signature_def.items()
        self.signatures = {key: read_signature(key, value, self.meta_graph) for key, value in definitions}
        self._memory = RunMemory(self.meta_graph, options.run_memory)
        for signature in self.signatures.values():
            self._memory.expect(signature)
            if signature.inputs:
                grouped = f"each request alone, as {why}" if (why := signature.findings.alone) else "grouped"
                checked = "are checked" if signature.findings.checks_shapes else "are TensorFlow's to check"
                _log.info("%s, signature %s: %s; shapes %s", name or path, signature.name, grouped, checked)
        self._timeout_seconds = options.timeout_seconds
        self._limit = config_pb2.RunOptions(timeout_in_ms=round(options.timeout_seconds * 1000))
        self._disabled = (
            set()
            if options.xla
            else {
                key
                for key, value in self.signatures.items()
                if needs_xla(self.meta_graph, value.tensors["outputs"].values())
            }
        )
        self._lock = threading.Lock()
        self._callables: dict[tuple[str, tuple[str, ...], bool], object] = {}

    def signature(self, name: str) -> Signature:
        """Returns a signature by name; an empty name stands for `serving_default`.

        Raises:
            FailedPreconditionError: If the model has no such signature.
        """
        key = name or DEFAULT_SIGNATURE
        if key not in self.signatures:
            raise FailedPreconditionError(f'Serving signature key "{key}" not found.')
        return self.signatures[key]

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, np.ndarray],
        output_names: Iterable[str] = (),
        limited: bool = False,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> dict[str, np.ndarray]:
        """Runs a signature; in parts where all rows at once would take too much memory and each stands alone.

        Args:
            signature: One of this model's.
            inputs: The arrays by input name, no more and no fewer than the signature has.
            output_names: Which outputs to compute; all where empty.
            limited: Whether it may take no longer than the time limit.
            unwanted: Asked before a further part of a run whether nobody waits for the outputs any longer.

        Raises:
            ServingError: If the inputs do not fit or need too much memory, or with TensorFlow's code and message if the
                model fails.
        """
        check_names(signature, inputs)
        check_types(signature, inputs)
        check_shapes(signature, inputs)
        if signature.name in self._disabled:
            raise InternalError("XLA compilation disabled")
        wanted = tuple(output_names) or tuple(signature.outputs)
        run = self._callable(signature, wanted, limited)
        parts = self._memory.parts(signature, inputs)
        if not parts:
            return _call(run, [inputs[name] for name in sorted(signature.inputs)], wanted)
        made = []
        end = time.monotonic() + (self._timeout_seconds if limited and self._timeout_seconds else math.inf)
        for part in parts:
            if unwanted():
                raise CancelledError("Nobody waits for the answer any longer.")
            if time.monotonic() > end:
                raise DeadlineExceededError("Timed out between two parts of the run.")
            made.append(_call(run, [inputs[name][part] for name in sorted(signature.inputs)], wanted))
        return {name: np.concatenate([outputs.pop(name) for outputs in made]) for name in wanted}

    def close(self) -> None:
        """Frees the model's memory; a run after this fails."""
        self._callables.clear()
        self._session.close()

    def _callable(self, signature: Signature, output_names: tuple[str, ...], limited: bool) -> object:
        key = (signature.name, output_names, limited)
        with self._lock:
            if key not in self._callables:
                for name in output_names:
                    if name not in signature.outputs:
                        raise InvalidArgumentError(
                            f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                            f"{name_set(signature.outputs)}."
                        )
                # `make_callable` has the same speed only without a feed list; a run through it costs six times this.
                options = config_pb2.CallableOptions(
                    feed=[signature.tensors["inputs"][name] for name in sorted(signature.inputs)],
                    fetch=[signature.tensors["outputs"][name] for name in output_names],
                    run_options=self._limit if limited else None,
                )
                with _errors_of_tensorflow():
                    self._callables[key] = self._session._make_callable_from_options(options)
            return self._callables[key]


@contextlib.contextmanager
def _errors_of_tensorflow() -> Iterator[None]:
    try:
        yield
    except tf.errors.OpError as error:
        raise ServingError(error.message, Code(error.error_code)) from error


def _call(run: object, arrays: Iterable[np.ndarray], output_names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with _errors_of_tensorflow():
            values = run(*arrays)  # type: ignore[operator]
    except UnicodeDecodeError as error:
        # TensorFlow's message quotes bytes of the request, which Python cannot read.
        raise InvalidArgumentError(error.object.decode(errors="surrogateescape")) from error
    # A string scalar comes as bytes, and NumPy would drop the zero bytes at its end.
    made = (np.array(value, object) if isinstance(value, bytes) else np.asarray(value) for value in values)
    return dict(zip(output_names, made, strict=True))


def _load(path: str, options: LoadOptions) -> tuple[meta_graph_pb2.MetaGraphDef, tf.compat.v1.Session]:
    if not any(os.path.exists(os.path.join(path, name)) for name in _FILES):
        raise NotFoundError(f"Could not find SavedModel .pb or .pbtxt at supplied export directory path: {path}")
    config = config_pb2.ConfigProto(
        intra_op_parallelism_threads=options.intra_op_parallelism,
        inter_op_parallelism_threads=options.inter_op_parallelism,
        allow_soft_placement=True,
    )
    graph = tf.Graph()
    session = tf.compat.v1.Session(graph=graph, config=config)
    try:
        with graph.as_default():
            meta_graph = tf.compat.v1.saved_model.loader.load(session, [_TAG], path)
        _check_assets(meta_graph)
        return meta_graph, session
    except ServingError:
        session.close()
        raise
    except tf.errors.OpError as error:
        session.close()
        # Of the files of weights TensorFlow says at most which part of which of them it was reading.
        text = f"Cannot load the SavedModel at {path}: {_reason(error)}"
        if re.search(r"\{\{node [^}]*Restore", error.message):
            weights = os.path.join(path, "variables")
            text = f"Cannot load the weights in {weights}: {_reason(error)}; copy or export the version anew"
        raise ServingError(text, Code(error.error_code)) from error
    except (OSError, DecodeError, ValueError, TypeError, KeyError, RuntimeError) as error:
        session.close()
        if isinstance(error, RuntimeError) and "MetaGraphDef associated with tags" in str(error):
            raise NotFoundError(
                f"Could not find meta graph def matching supplied tags: {{ {_TAG} }}. The SavedModel is at {path}."
            ) from error
        raise ServingError(f"Cannot load the SavedModel at {path}: {error}", Code.DATA_LOSS) from error


def _check_assets(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
    """Refuses an asset that is named twice, which TensorFlow Serving feeds twice, and so does not load."""
    assets = list(meta_graph.asset_file_def)
    if not assets:  # As TensorFlow 1 writes them.
        collection = meta_graph.collection_def.get("saved_model_assets", meta_graph_pb2.CollectionDef())
        assets = [meta_graph_pb2.AssetFileDef.FromString(one.value) for one in collection.any_list.value]
    names = [asset.tensor_info.name for asset in assets]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidArgumentError(f'Endpoint "{twice[0]}" fed more than once.')


def _reason(error: tf.errors.OpError) -> str:
    """What TensorFlow says, without where in its graph it was."""
    text = re.sub(r"\[\[\{\{.*?\}\}\]\]", "", error.message, flags=re.DOTALL)
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("Graph execution error"))
