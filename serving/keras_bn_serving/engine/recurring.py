"""Work in the background that is done again and again, and ends only when it is told to."""

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Recurring:
    """Calls `action` every `seconds`, on a thread of its own, whatever it raises.

    Args:
        name: Of the thread, for the log.
        seconds: From the end of one call to the begin of the next.
        action: What to do.
        on_failure: Told the name whenever `action` has raised: for metrics.
    """

    def __init__(
        self, name: str, seconds: float, action: Callable[[], None], on_failure: Callable[[str], None] = lambda _: None
    ):
        self._name, self._seconds, self._action, self._on_failure = name, seconds, action, on_failure
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begins; the first call comes after `seconds`."""
        self._thread.start()

    def stop(self, patience: float | None = None) -> None:
        """Ends it after the call under way, for which it waits, `patience` seconds at most."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(patience)

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self._action()
            except Exception:
                _log.exception("%s: this turn has failed, the next comes in %g s", self._name, self._seconds)
                self._on_failure(self._name)
