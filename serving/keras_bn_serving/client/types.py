"""What a client says and hears, whatever the protocol."""

import time
from typing import Generic, NamedTuple, TypeVar

from keras_bn_serving.errors import Code

Key = TypeVar("Key")
Value = TypeVar("Value")
_REMEMBERED_SECONDS = 10.0


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


class Remembered(Generic[Key, Value]):
    """What a server has said of its models, for a few seconds: it may serve another version by now."""

    def __init__(self) -> None:
        self._values: dict[Key, tuple[float, Value]] = {}

    def find(self, key: Key) -> Value | None:
        """Returns what was said, or `None` where that is too long ago."""
        since, value = self._values.get(key, (0.0, None))
        return value if since and time.monotonic() - since < _REMEMBERED_SECONDS else None

    def keep(self, key: Key, value: Value) -> None:
        """Remembers what was said."""
        self._values[key] = (time.monotonic(), value)

    def forget(self, key: Key) -> None:
        """Forgets what was said, if anything."""
        self._values.pop(key, None)
