"""HTTP requests and responses as values."""

import functools
import re
from http import HTTPStatus
from typing import NamedTuple

from keras_bn_serving.engine.memory import Share

Headers = dict[bytes, bytes]

_AUTHORITY = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//[^/?#]*", re.IGNORECASE)
_CHARACTER = r"[\w.~!$&'()*+,;=:@/-]|%[0-9a-f]{2}"
_PATH = re.compile(rf"(?:{_CHARACTER})*(?:\?(?:{_CHARACTER}|\?)*)?(?:#(?:{_CHARACTER}|\?)*)?", re.IGNORECASE | re.ASCII)


class Request(NamedTuple):
    """One request, complete.

    Attributes:
        method: As it came.
        target: The request's target, as it came.
        headers: By lower-case name; of equal names the last counts.
        body: Decompressed.
        share: The memory that it holds.
    """

    method: str
    target: str
    headers: Headers
    body: bytes
    share: Share


class Response(NamedTuple):
    """One answer.

    Attributes:
        status: The HTTP status code.
        body: The bytes, of the type that `content_type` says.
        content_type: For the header of that name.
        headers: More headers.
    """

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@functools.lru_cache(maxsize=1024)
def path_of(target: str) -> str | None:
    """Returns path, query and fragment of a target, which may be a whole URL; `None` if it is neither."""
    authority = _AUTHORITY.match(target)
    rest = target[authority.end() :] or "/" if authority else target
    return rest if _PATH.fullmatch(rest) else None


def html_error(status: HTTPStatus) -> Response:
    """Makes the page that TensorFlow Serving's HTTP library answers what never reaches its protocol with."""
    page = (
        f"<HTML><HEAD>\n<TITLE>{status.value} {status.phrase}</TITLE>\n</HEAD><BODY>\n<H1>{status.phrase}</H1>\n"
        "</BODY></HTML>\n"
    )
    return Response(status, page.encode(), "text/html")
