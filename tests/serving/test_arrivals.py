"""What other threads finish reaches the event loop: results, errors, and nothing that is not wanted any more."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from serving.arrivals import Arrivals


def run(make: Callable[[Arrivals], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        return await make(Arrivals(asyncio.get_running_loop()))

    return asyncio.run(main())


def test_each_of_many_futures_finished_elsewhere_gives_its_own_result():
    futures: list[Future[int]] = [Future() for _ in range(200)]

    async def collect(arrivals: Arrivals) -> list[int]:
        def finish() -> None:
            for number, future in enumerate(futures):
                future.set_result(number)

        waiting = [asyncio.ensure_future(arrivals.result(future, 60)) for future in futures]
        await asyncio.sleep(0)
        thread = threading.Thread(target=finish)
        thread.start()
        results = await asyncio.gather(*waiting)
        thread.join()
        return results

    assert run(collect) == list(range(200))


def test_an_error_arrives_as_it_was_raised():
    future: Future[int] = Future()
    future.set_exception(ValueError("no such row"))
    with pytest.raises(ValueError, match="no such row"):
        run(lambda arrivals: arrivals.result(future, 60))


def test_what_takes_too_long_is_cancelled():
    future: Future[int] = Future()
    with pytest.raises(TimeoutError):
        run(lambda arrivals: arrivals.result(future, 0.01))
    assert future.cancelled()


def test_what_nobody_waits_for_any_longer_is_cancelled():
    future: Future[int] = Future()

    async def give_up(arrivals: Arrivals) -> None:
        task = asyncio.ensure_future(arrivals.result(future, 60))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(give_up)
    assert future.cancelled()


def test_a_future_cancelled_elsewhere_ends_the_wait():
    future: Future[int] = Future()
    future.cancel()
    with pytest.raises((asyncio.CancelledError, CancelledError)):
        run(lambda arrivals: arrivals.result(future, 60))
