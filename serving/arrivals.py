"""Brings what other threads have done to the event loop, all that is there in one go."""

import asyncio
import functools
import threading
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")


class Arrivals:
    """Waits in the event loop for futures that other threads finish.

    A group of requests finishes at once: waking the loop for each of them, and a chain of futures for each, would cost
    as much as reading their bodies.

    Args:
        loop: Where the results are waited for.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._lock = threading.Lock()
        self._arrived: list[tuple[asyncio.Future[Any], Future[Any]]] = []

    async def result(self, future: "Future[_T]", seconds: float) -> _T:
        """Returns a future's result; cancels the future if that is no longer wanted or takes too long.

        Raises:
            TimeoutError: If it takes longer than `seconds`.
        """
        waiting: asyncio.Future[_T] = self._loop.create_future()
        timer = self._loop.call_later(seconds, _expire, waiting)
        future.add_done_callback(functools.partial(self._add, waiting))
        try:
            return await waiting
        finally:
            timer.cancel()
            future.cancel()

    def _add(self, waiting: "asyncio.Future[Any]", future: "Future[Any]") -> None:
        with self._lock:
            self._arrived.append((waiting, future))
            first = len(self._arrived) == 1
        # Once the loop is closed nobody waits any longer.
        if first and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for waiting, future in arrived:
            if waiting.done():
                continue
            if future.cancelled():
                waiting.cancel()
            elif (error := future.exception()) is not None:
                waiting.set_exception(error)
            else:
                waiting.set_result(future.result())


def _expire(waiting: "asyncio.Future[Any]") -> None:
    if not waiting.done():
        waiting.set_exception(TimeoutError())
