"""Which requests the web page answers: those to a name of this machine, from no page but its own.

A browser sends requests for every page that it shows. So a foreign page could send files to a server on this machine
(it names itself in `Origin`), or let its own name lead here, to read the answers as well (DNS rebinding; the browser
then sends that name as `Host`).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names that always lead to the own machine."""


def host_name(place: str) -> str:
    """The name in `name`, `name:port` or `https://name:port/path`, in lower case; empty if there is none."""
    try:
        return urlsplit(place if "//" in place else f"//{place}").hostname or ""
    except ValueError:
        return ""


class Guard:
    """An ASGI application that refuses foreign requests (403, one line) and passes on all others."""

    def __init__(self, app: "ASGIApp", more: Iterable[str] = ()) -> None:
        """more: names of hosts beside LOOPBACK. Pages under these names may send requests, from any port."""
        self.app = app
        self.more = frozenset(more)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request, as ASGI defines it."""
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        app = self.app
        if scope["type"] != "lifespan":
            headers = Headers(scope=scope)
            refused = self.refusal(headers.getlist("host"), headers.getlist("origin"))
            if refused:
                app = PlainTextResponse(f"{refused}; to allow it, start train.serve with --allow-host NAME\n", 403)
        await app(scope, receive, send)

    def refusal(self, hosts: list[str], origins: list[str]) -> str:
        """Why a request with these headers is refused; empty if it is not."""
        if len(hosts) != 1 or host_name(hosts[0]) not in LOOPBACK | self.more:
            return "this name of the host is not allowed"
        for origin in origins:
            own = origin.partition("://")[2].lower() == hosts[0].lower()
            if not own and host_name(origin) not in self.more:
                return "requests of another page are not allowed"
        return ""
