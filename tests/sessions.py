"""A SavedModel as TensorFlow Serving runs it: a graph, a session with its optimizers, and batches of requests."""

import contextlib
import itertools

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2


@contextlib.contextmanager
def plain_session(version):
    """Yields `run(signature, inputs)`, which feeds as C++ does: Python's own check of shapes is passed by."""
    graph = tf.Graph()
    # Not entered, which would make its graph the default one.
    with contextlib.closing(tf.compat.v1.Session(graph=graph)) as session:
        with graph.as_default():
            meta_graph = tf.compat.v1.saved_model.load(session, ["serve"], str(version))
        callables = {}

        def run(signature, inputs):
            spec = meta_graph.signature_def[signature]
            if signature not in callables:
                options = config_pb2.CallableOptions(
                    feed=[spec.inputs[name].name for name in sorted(spec.inputs)],
                    fetch=[spec.outputs[name].name for name in sorted(spec.outputs)],
                )
                callables[signature] = session._make_callable_from_options(options)
            values = callables[signature](*(np.asarray(inputs[name]) for name in sorted(spec.inputs)))
            return dict(zip(sorted(spec.outputs), values, strict=True))

        run.signatures, run.graph = dict(meta_graph.signature_def), graph
        yield run


def run_in_batches(run, signature, requests):
    """The answers to `requests`, run together as TensorFlow Serving's batching does it, by its rule.

    The rule: every input and output has a first axis, and that of every output is as long as those of all requests
    together; else nobody gets an answer.
    """
    rows = [len(next(iter(request.values()))) for request in requests]
    assert all(len(value) == n for request, n in zip(requests, rows, strict=True) for value in request.values())
    together = run(signature, {name: np.concatenate([one[name] for one in requests]) for name in requests[0]})
    for name, value in together.items():
        assert value.ndim, f"Batched output tensor has 0 dimensions: {name}"
        assert len(value) == sum(rows), f"Batched output tensor's 0th dimension is not the sum of the inputs': {name}"
    ends = np.cumsum(rows)[:-1]
    split = {name: np.split(value, ends) for name, value in together.items()}
    return [{name: parts[i] for name, parts in split.items()} for i in range(len(requests))]


def assert_served_in_batches(version, inputs_by_signature, rtol=1e-4):
    """Requests of 1 to 64 rows are answered together as they are alone, by every signature.

    Args:
        version: Folder of the SavedModel.
        inputs_by_signature: For each signature the inputs of some rows, by name.
    """
    with plain_session(version) as run:
        assert sorted(run.signatures) == sorted(["__saved_model_init_op", *inputs_by_signature])
        for signature, inputs in inputs_by_signature.items():
            for rows in ([1] * 5, [1, 2, 7], [64], [31, 1, 32]):
                starts = np.cumsum([0, *rows])
                requests = [
                    {name: np.take(value, np.arange(first, last), 0, mode="wrap") for name, value in inputs.items()}
                    for first, last in itertools.pairwise(starts)
                ]
                for request, answer in zip(requests, run_in_batches(run, signature, requests), strict=True):
                    for name, alone in run(signature, request).items():
                        if alone.dtype == object:
                            assert answer[name].shape == alone.shape
                            continue
                        error = np.abs(answer[name].astype("float64") - alone).max()
                        assert error <= rtol * np.abs(alone).max(), (signature, name)
