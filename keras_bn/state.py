"""What a Keras model remembers: put back after a while, or given to a copy of it."""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import keras

from keras_bn.model import batch_norms_below, layers_below, set_statistics

_WITH_VOCABULARY = (keras.layers.StringLookup, keras.layers.IntegerLookup, keras.layers.TextVectorization)


def _recurrent_states(model: keras.Layer) -> list[keras.Variable]:
    """Those of stateful layers, which Keras does not count among their variables."""
    layers = [layer for layer in layers_below(model) if isinstance(layer, keras.layers.RNN) and layer.stateful]
    return [v for layer in layers for v in keras.tree.flatten(layer.states) if isinstance(v, keras.Variable)]


def seeds_of(model: keras.Layer) -> list[keras.Variable]:
    """The states of Keras's generators of random numbers in `model`, which it names so."""
    return [variable for variable in model.non_trainable_variables if variable.name == "seed_generator_state"]


@contextlib.contextmanager
def variables_restored(model: keras.Layer, only_on_error: bool = False) -> Iterator[None]:
    """Puts every variable that an optimizer does not train back, bit for bit: at the end, or only when the body raises.

    "Raises" is anything at all, Ctrl-C included. States of recurrent layers are put back in any case.
    """
    states = _recurrent_states(model)
    variables = [*states, *(v for v in model.variables if not v.trainable)]
    before = [v.numpy() for v in variables]
    finished = False
    try:
        yield
        finished = True
    finally:
        kept = len(states) if finished and only_on_error else len(variables)
        for variable, value in zip(variables[:kept], before[:kept], strict=True):
            variable.assign(value)


def copy_state(old: keras.Layer, new: keras.Layer) -> list[tuple[keras.Variable, keras.Variable]]:
    """Gives `new`, made from the configuration of `old` or with ours and stock normalizations changed, its state too.

    Returns:
        The variables of one and the other that mean the same.

    Raises:
        ValueError: when `new` has other variables or layers, as where Keras could not build it.
    """
    norms = batch_norms_below(old), batch_norms_below(new)
    changed = [(a, b) for a, b in zip(*norms, strict=False) if type(a) is not type(b)]
    pairs = [
        (getattr(a, name), getattr(b, name))
        for a, b in changed
        for name in ("gamma", "beta")
        if getattr(a, name, None) is not None
    ]
    sides = []
    for layer, own in ((old, [a for a, _ in changed]), (new, [b for _, b in changed])):
        of_changed = {id(variable) for norm in own for variable in norm.variables}
        sides.append([variable for variable in layer.variables if id(variable) not in of_changed])
    counts = [(len(side), len(layers_below(layer))) for side, layer in zip(sides, (old, new), strict=True)]
    if counts[0] != counts[1]:
        raise ValueError(
            "`model` must have layers that Keras builds anew from their configuration and the shapes that they were "
            "called with (`get_build_config` and `build_from_config`), with all their layers and variables. Received: "
            f"layer {old.name!r} of type {type(old).__name__} with {counts[0][0]} variables in {counts[0][1]} layers; "
            f"made anew it has {counts[1][0]} in {counts[1][1]}."
        )
    if sorted(v.name for v in sides[0]) == sorted(v.name for v in sides[1]):
        # What was quantized after it was built has its variables in another order.
        sides = [sorted(side, key=lambda variable: variable.name) for side in sides]
    pairs += zip(*sides, strict=True)
    for source, target in pairs:
        target.assign(source)
    for a, b in changed:
        set_statistics(b, a.moving_mean.numpy(), a.moving_variance.numpy())
    for source, target in zip(_recurrent_states(old), _recurrent_states(new), strict=True):
        target.assign(source)
    for a, b in zip(layers_below(old), layers_below(new), strict=True):
        if not isinstance(a, _WITH_VOCABULARY) and hasattr(a, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                a.save_assets(folder)
                b.load_assets(folder)
        if isinstance(b, keras.layers.Normalization):  # It computes with numbers that it derives from its variables.
            b.finalize_state()
    copy_vocabularies(old, new)
    return pairs


def copy_vocabularies(old: keras.Layer, new: keras.Layer) -> None:
    """Those that layers were adapted to, which are no variables, nor in what they are made from.

    Keras writes them into files of a word in each line, which some words are not.
    """
    sides = ([one for one in layers_below(layer) if isinstance(one, _WITH_VOCABULARY)] for layer in (old, new))
    for a, b in zip(*sides, strict=False):  # Before it is built, `new` may have fewer layers.
        if a.get_vocabulary(include_special_tokens=False):
            store: dict[str, Any] = {}
            a.save_own_variables(store)
            vocabulary, weights = a.get_vocabulary(), store.get("idf_weights")
            b.set_vocabulary(vocabulary, None if weights is None else weights[: len(vocabulary)])
