"""Which names the server answers browsers to, so that no page reaches it by giving its own name this address.

A page of `evil.example` may have that name lead here once it is loaded (DNS rebinding). To the browser the server is
then the page's own, and it reads every answer. What gives it away is the name that it asks for.
"""

import ipaddress
import re
from collections.abc import Iterable

from keras_bn_serving.errors import PermissionDeniedError
from keras_bn_serving.rest.messages import Headers

ANY = "*"
_OURS = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d*)?", re.IGNORECASE)
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//([^/?#]*)", re.IGNORECASE)
# Sent by browsers, and out of a page's reach. Node's `fetch` sends `Sec-Fetch-Mode`, too, but neither of these.
_BROWSERS = (b"origin", b"sec-fetch-site")


class AllowedHosts:
    """The names by which browsers may ask.

    Those of the machine itself always are among them: no other name leads here by them.

    Args:
        names: Host names and addresses, without ports; `*` for any.
        address: Where the server listens. Where that is every address of the machine, every one may be asked for: what
            is asked for by its address has no name that could lead elsewhere.
    """

    def __init__(self, names: Iterable[str] = (), address: str = ""):
        self._names = {normal for name in (*_OURS, *names, address) if (normal := normalized(name))}
        self._any = ANY in names
        self._addresses = address in ("0.0.0.0", "::")

    def check(self, host: str) -> None:
        """Raises a PermissionDeniedError unless browsers may ask for this `Host`."""
        if not self.allow(host):
            raise PermissionDeniedError(
                f"Browsers may not ask for the host {host!r}. To allow it, start the server with "
                f"--allowed_hosts={normalized(host) or 'NAME'}."
            )

    def allow(self, host: str) -> bool:
        """Returns whether browsers may ask for this `Host`, which may have a port."""
        if self._any:
            return True
        name = normalized(host)
        return name in self._names or (self._addresses and _is_address(name))


def asked_for(headers: Headers, target: str) -> str:
    """Returns the host that a request is for: of a whole URL its own, else what the header says."""
    whole = _URL.match(target)
    return whole[1] if whole else headers.get(b"host", b"").decode("latin-1")


def is_of_browser(headers: Headers) -> bool:
    """Returns whether only a browser sends such headers."""
    return any(name in headers for name in _BROWSERS)


def normalized(host: str) -> str:
    """Returns a host without its port, in the one form that all spellings share; empty if it is none."""
    found = _HOST.fullmatch(host if host.count(":") < 2 or host.startswith("[") else f"[{host}]")
    if found is None:
        return ""
    name = found[1].lower().removesuffix(".")
    if name.startswith("["):
        return f"[{ipaddress.IPv6Address(name[1:-1]).compressed}]" if _is_address(name) else ""
    return name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
