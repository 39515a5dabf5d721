"""What a client says and hears, whatever the protocol."""

import random
import time
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from keras_bn_serving.errors import Code, DeadlineExceededError, ServingError

# The array of the only output, or of each by name.
Prediction = NDArray[Any] | dict[str, NDArray[Any]]
# For each example its labels with their scores.
Classes = list[list[tuple[str, float]]]

Key = TypeVar("Key")
Value = TypeVar("Value")
_REMEMBERED_SECONDS = 10.0
# Codes after which asking again may help.
AGAIN = (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)


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


@dataclass(frozen=True)
class Retry:
    """When to ask again: only where the server was out of reach or said that it is busy.

    Attributes:
        attempts: How often to ask at most.
        first_wait_seconds: The wait after the first try; it doubles with every further one, and a random part of up
            to half of it is left out.
        longest_wait_seconds: No wait is longer.
    """

    attempts: int = 4
    first_wait_seconds: float = 0.1
    longest_wait_seconds: float = 2.0

    def wait(self, attempt: int, error: ServingError, deadline: float) -> float:
        """Returns the seconds to wait after try number `attempt`, the first being 1.

        Raises:
            ServingError: `error`, where asking again would not help or there is no time left for it.
        """
        longest = min(self.first_wait_seconds * 2 ** (attempt - 1), self.longest_wait_seconds)
        wait = longest * random.uniform(0.5, 1.0)
        if error.code not in AGAIN or attempt >= self.attempts or time.monotonic() + wait > deadline:
            raise error
        return wait


def target_of(model_name: str, version: int | None = None, label: str | None = None) -> Target:
    """Returns what a call is about.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A version is negative, or both a version and a label are given.
    """
    if not isinstance(model_name, str):
        raise TypeError(f"`model_name` must be a string. Received: model_name={model_name!r}.")
    if version is not None and (isinstance(version, bool) or not isinstance(version, int | np.integer)):
        raise TypeError(f"`version` must be an integer, or None for the newest. Received: version={version!r}.")
    if version is not None and not 0 <= version < 2**63:
        raise ValueError(f"`version` must be from 0 to 2**63 - 1, or None for the newest. Received: version={version}.")
    if label is not None and not isinstance(label, str):
        raise TypeError(f"`label` must be a string, or None. Received: label={label!r}.")
    if version is not None and label is not None:
        raise ValueError(f"Give `version` or `label`, not both. Received: version={version}, label={label!r}.")
    return Target(model_name, None if version is None else int(version), label)


def deadline_after(timeout: float) -> float:
    """Returns when that many seconds are over, by the monotonic clock.

    Raises:
        ValueError: They are not a number above 0.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(f"`timeout` must be a number of seconds above 0. Received: timeout={timeout!r}.")
    return time.monotonic() + timeout


def time_left(deadline: float) -> float:
    """Returns the seconds until then, by the monotonic clock.

    Raises:
        DeadlineExceededError: There are none.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceededError("No time is left.")
    return left
