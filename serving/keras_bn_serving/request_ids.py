"""Which request is being answered: its id goes into the answer and into every line that is logged about it."""

import itertools
import logging
import re
import secrets
from contextvars import ContextVar

# Of HTTP and of gRPC's metadata.
HEADER = "x-request-id"

_TAKEN = re.compile(r"[!-~]{1,128}")
_PREFIX = secrets.token_hex(6)
_numbers = itertools.count(1)
_current: ContextVar[str] = ContextVar("request_id", default="")


def begin(given: str) -> str:
    """Takes up a request in the current task.

    Args:
        given: The id that the caller gave it; empty for none.

    Returns:
        That, where it is 1 to 128 printable ASCII characters without blanks; else one that no other request has.
    """
    request_id = given if _TAKEN.fullmatch(given) else f"{_PREFIX}-{next(_numbers)}"
    _current.set(request_id)
    return request_id


def current() -> str:
    """Returns the id of the request that is being answered here; empty where there is none."""
    return _current.get()


class Marking(logging.Filter):
    """Gives every record the field `request`: the id in brackets, or nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets every record pass."""
        request_id = current()
        record.request = f" [request {request_id}]" if request_id else ""
        return True
