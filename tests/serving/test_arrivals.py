"""What other threads finish reaches the event loop: results, errors, and word of what is not wanted any more."""

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from keras_bn_serving.engine.arrivals import Arrivals
from keras_bn_serving.engine.background import Background
from keras_bn_serving.errors import InvalidArgumentError


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


class Held:
    """Something large that a request holds."""


@pytest.fixture
def without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_an_error_keeps_nothing_alive_that_its_request_held(without_garbage_collection: None):
    seen: list[weakref.ref[Held]] = []

    async def fail(arrivals: Arrivals) -> None:
        held = Held()
        seen.append(weakref.ref(held))
        arrival = arrivals.expect()
        arrival.finish(ValueError("no such row"))
        await arrival.result(60, lambda: None)

    async def ask(arrivals: Arrivals) -> None:
        with contextlib.suppress(ValueError):
            await fail(arrivals)
        await asyncio.sleep(0)  # The loop lets go of what woke this up.
        assert seen[0]() is None

    run(ask)


def test_an_error_of_background_work_keeps_nothing_alive_that_it_had_read(without_garbage_collection: None):
    seen: list[weakref.ref[Held]] = []
    background = Background(1, "test")

    def work(go_on: Callable[[], None]) -> None:
        held = Held()
        seen.append(weakref.ref(held))
        raise InvalidArgumentError("no such row")

    async def fail() -> None:
        held = Held()
        seen.append(weakref.ref(held))
        await background.start(work, 60)[1]

    async def ask(arrivals: Arrivals) -> None:
        with contextlib.suppress(InvalidArgumentError):
            await fail()
        await asyncio.sleep(0.05)  # The thread lets go of its last work.
        assert [each() for each in seen] == [None, None]

    run(ask)
    background.close()


def test_background_work_that_nobody_waits_for_is_told_so():
    background = Background(1, "test")
    ended = threading.Event()

    def work(go_on: Callable[[], None]) -> None:
        try:
            while True:
                go_on()
        finally:
            ended.set()

    async def ask(arrivals: Arrivals) -> None:
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await background.start(work, 0.05)[1]

    run(ask)
    assert ended.wait(60)
    background.close()
