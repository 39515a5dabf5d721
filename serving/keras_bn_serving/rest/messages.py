"""HTTP requests and responses as values, and a response as bytes."""

import functools
import re
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple

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
    """

    method: str
    target: str
    headers: Headers
    body: bytes


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


def serialize(response: Response, keep_alive: bool, version: str, head_only: bool) -> bytes:
    """Writes a response as it goes over the wire."""
    try:
        reason = HTTPStatus(response.status).phrase
    except ValueError:
        reason = "Client Closed Request"
    lines = [
        f"HTTP/1.1 {response.status} {reason}",
        f"Content-Type: {response.content_type}",
        f"Date: {_date(int(time.time()))}",
        f"Content-Length: {len(response.body)}",
        *(f"{name}: {value}" for name, value in response.headers),
    ]
    if not keep_alive:
        lines.append("Connection: close")
    elif version == "1.0":
        lines.append("Connection: keep-alive")
    head = "\r\n".join(lines) + "\r\n\r\n"
    return head.encode("latin-1") + (b"" if head_only else response.body)


@functools.lru_cache(maxsize=1)
def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)
