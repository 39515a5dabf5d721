"""What a client says and hears, whatever the protocol."""

from typing import NamedTuple

from keras_bn_serving.errors import Code


class Target(NamedTuple):
    """Which model a call is about; the newest version where neither version nor label is given."""

    model_name: str
    version: int | None = None
    label: str | None = None


class ModelVersion(NamedTuple):
    """One version of a model as the server reports it.

    Attributes:
        version: Its number.
        state: START, LOADING, AVAILABLE, UNLOADING or END.
        error_code: OK, or why it is not served.
        error_message: The same in words.
    """

    version: int
    state: str
    error_code: Code
    error_message: str
