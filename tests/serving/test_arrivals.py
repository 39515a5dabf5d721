"""What other threads finish reaches the event loop: results, errors, and word of what is not wanted any more."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from keras_bn_serving.engine.arrivals import Arrivals


def run(make: Callable[[Arrivals], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        return await make(Arrivals(asyncio.get_running_loop()))

    return asyncio.run(main())


def unexpected() -> None:
    raise AssertionError("cancelled although it was waited for")


def test_each_of_many_finished_elsewhere_gives_its_own_result():
    async def collect(arrivals: Arrivals) -> list[int]:
        expected = [arrivals.expect() for _ in range(200)]

        def finish() -> None:
            for number, arrival in enumerate(expected):
                arrival.finish(number)

        waiting = [asyncio.ensure_future(arrival.result(60, unexpected)) for arrival in expected]
        await asyncio.sleep(0)
        thread = threading.Thread(target=finish)
        thread.start()
        results = await asyncio.gather(*waiting)
        thread.join()
        return results

    assert run(collect) == list(range(200))


def test_what_is_finished_before_it_is_waited_for_arrives_too():
    async def ask(arrivals: Arrivals) -> Any:
        arrival = arrivals.expect()
        arrival.finish("early")
        await asyncio.sleep(0.01)
        return await arrival.result(60, unexpected)

    assert run(ask) == "early"


def test_an_error_arrives_as_it_was_raised():
    async def ask(arrivals: Arrivals) -> Any:
        arrival = arrivals.expect()
        arrival.finish(ValueError("no such row"))
        return await arrival.result(60, lambda: None)

    with pytest.raises(ValueError, match="no such row"):
        run(ask)


def test_what_takes_too_long_is_cancelled_and_may_still_finish():
    cancelled: list[bool] = []

    async def ask(arrivals: Arrivals) -> None:
        arrival = arrivals.expect()
        with pytest.raises(TimeoutError):
            await arrival.result(0.01, lambda: cancelled.append(True))
        arrival.finish("late")
        await asyncio.sleep(0.01)

    run(ask)
    assert cancelled == [True]


def test_what_nobody_waits_for_any_longer_is_cancelled():
    cancelled: list[bool] = []

    async def give_up(arrivals: Arrivals) -> None:
        task = asyncio.ensure_future(arrivals.expect().result(60, lambda: cancelled.append(True)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(give_up)
    assert cancelled == [True]
