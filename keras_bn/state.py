"""What a Keras model remembers: put back after a while, or given to a copy of it."""

import contextlib
import tempfile
from collections.abc import Iterator

import keras

from keras_bn.model import batch_norms_below, layers_below, set_statistics


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
    """
    norms = zip(batch_norms_below(old), batch_norms_below(new), strict=True)
    changed = [(a, b) for a, b in norms if type(a) is not type(b)]
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
        if hasattr(a, "save_assets"):  # Vocabularies, which are no variables.
            with tempfile.TemporaryDirectory() as folder:
                a.save_assets(folder)
                b.load_assets(folder)
        if hasattr(b, "finalize_state"):  # Normalization computes with numbers it derives from its variables.
            b.finalize_state()
    return pairs
