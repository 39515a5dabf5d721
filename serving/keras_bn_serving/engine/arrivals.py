"""Brings what other threads have done to the event loop, all that is there in one go."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


def settle(waiting: "asyncio.Future[Any] | concurrent.futures.Future[Any]", outcome: Any) -> None:
    """Gives `waiting` its outcome: a result, or the error to raise."""
    if isinstance(outcome, BaseException):
        waiting.set_exception(outcome)
    else:
        waiting.set_result(outcome)


class Arrivals:
    """Waits in the event loop for what other threads finish.

    A group of requests finishes at once: waking the loop for each of them would cost as much as reading their bodies.

    Args:
        loop: Where the outcomes are waited for.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._lock = threading.Lock()
        self._arrived: list[tuple[asyncio.Future[Any], Any]] = []

    def expect(self) -> "Arrival":
        """Returns something to wait for."""
        return Arrival(self, self._loop)

    def _add(self, waiting: "asyncio.Future[Any]", outcome: Any) -> None:
        with self._lock:
            self._arrived.append((waiting, outcome))
            first = len(self._arrived) == 1
        # Once the loop is closed nobody waits any longer.
        if first and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for waiting, outcome in arrived:
            if not waiting.done():
                settle(waiting, outcome)


class Arrival:
    """One outcome that another thread will bring."""

    __slots__ = ("_arrivals", "_loop", "_waiting")

    def __init__(self, arrivals: Arrivals, loop: asyncio.AbstractEventLoop):
        self._arrivals = arrivals
        self._loop = loop
        self._waiting: asyncio.Future[Any] | None = loop.create_future()

    def finish(self, outcome: Any) -> None:
        """Brings the outcome: a result, or the error to raise. Any thread may call this."""
        waiting = self._waiting
        if waiting is not None:
            self._arrivals._add(waiting, outcome)

    async def result(self, seconds: float | None, cancel: Callable[[], object]) -> Any:
        """Returns the result or raises the error.

        Args:
            seconds: How long it may take; for ever where `None`.
            cancel: Called where the outcome is no longer waited for: it took too long, or this was cancelled.

        Raises:
            TimeoutError: If it takes longer than `seconds`.
        """
        timer = None if seconds is None else self._loop.call_later(seconds, self._expire)
        waiting = self._waiting
        if waiting is None:
            raise RuntimeError("The outcome has been asked for before.")
        try:
            return await waiting
        except BaseException:
            cancel()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            # An error refers to the frames that it went through, and those to all that the request holds: a frame must
            # not refer to the error, or only the garbage collection would free it, some time.
            self._waiting = waiting = None

    def _expire(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(TimeoutError())
