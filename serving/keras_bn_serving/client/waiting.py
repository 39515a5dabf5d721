"""Waiting for a model to be available."""

import time

from keras_bn_serving.client.types import AGAIN, ModelVersion
from keras_bn_serving.errors import Code, DeadlineExceededError, ServingError, error_of

POLL_SECONDS = 0.1


class Wait:
    """How long to wait for a model, and what was seen of it."""

    def __init__(self, url: str, model_name: str, timeout: float):
        self._place = f"{model_name} at {url}"
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._seen = "the server has not answered yet"

    def goes_on(self) -> bool:
        """Returns whether there is time left."""
        return time.monotonic() < self._deadline

    def left(self, most: float) -> float:
        """Returns the seconds that are left, `most` at most."""
        return max(0.001, min(most, self._deadline - time.monotonic()))

    def saw(self, versions: list[ModelVersion]) -> bool:
        """Takes in what the server said; returns whether a version is available.

        Raises:
            ServingError: All have failed.
        """
        if any(each.state == "AVAILABLE" for each in versions):
            return True
        failed = [each for each in versions if each.state == "END" and each.error_code is not Code.OK]
        if failed and len(failed) == len(versions):
            raise error_of(failed[0].error_code, failed[0].error_message)
        self._seen = ", ".join(f"version {each.version} is {each.state}" for each in versions)
        return False

    def failed(self, error: ServingError) -> None:
        """Takes in that the server could not be asked; raises where that will not change."""
        if error.code not in (*AGAIN, Code.NOT_FOUND, Code.DEADLINE_EXCEEDED):
            raise error
        self._seen = str(error)

    def too_long(self) -> DeadlineExceededError:
        """Returns the error that says what was seen last."""
        return DeadlineExceededError(f"{self._place} was not ready within {self._timeout:g} s: {self._seen}.")
