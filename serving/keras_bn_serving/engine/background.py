"""Work that would keep an event loop from its other requests, done on other threads."""

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from keras_bn_serving.errors import NO_MEMORY, ResourceExhaustedError, ServingError, error_of

T = TypeVar("T")
# Called now and then by what is under way; raises where nobody waits for it any longer.
GoOn = Callable[[], None]


class Background:
    """Threads for work that an event loop waits for.

    Args:
        num_threads: How many.
        name: Of the threads.
    """

    def __init__(self, num_threads: int, name: str):
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    def start(self, work: Callable[[GoOn], T], seconds: float | None = None) -> tuple[Future[Any], Awaitable[T]]:
        """Starts `work` on a thread.

        Args:
            work: What to do. It is given what it has to call now and then, and is ended by.
            seconds: How long to wait for it; for ever where `None`.

        Returns:
            The work as it goes on, and what to await. That raises what `work` raises; of a ServingError a new one, as
            the old one refers, by the frames that it went through, to all that was read until then.
        """
        given_up = threading.Event()

        def go_on() -> None:
            if given_up.is_set():
                raise TimeoutError

        def run() -> tuple[T | None, ServingError | None]:
            try:
                return work(go_on), None
            except ServingError as error:
                return None, error_of(error.code, error.message)
            except MemoryError:
                return None, ResourceExhaustedError(NO_MEMORY)

        # What is logged there is of this request too.
        working = self._threads.submit(contextvars.copy_context().run, run)

        async def wait() -> T:
            try:
                result, error = await asyncio.wait_for(asyncio.wrap_future(working), seconds)
            finally:
                given_up.set()
            if error is not None:
                # Once more a new one: this frame refers to the old one.
                raise error_of(error.code, error.message)
            return result  # type: ignore[return-value]

        return working, wait()

    def close(self) -> None:
        """Frees the threads; what has not begun is not done."""
        self._threads.shutdown(wait=False, cancel_futures=True)
