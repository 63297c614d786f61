"""Who may use the server, checked before every request, as Jupyter does.

A page of another site cannot use it: the token and the cookie are secret, the Host header must name this machine
(against DNS rebinding), and a write needs the Origin of the page itself. The headers of every response let the page
load nothing from elsewhere.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alignkit.labeling.store import Store

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
COOKIE_AGE = 30 * 24 * 3600  # seconds
# A redirect would lose the cookie where a link on another site was followed: the cookie is SameSite=Strict.
SIGNED_IN = '<!doctype html><html lang="en"><meta http-equiv="refresh" content="0; url=/"><title>alignkit label</title>'
SIGNED_OUT = (
    '<!doctype html><html lang="en"><title>alignkit label</title>'
    "<h1>Not signed in</h1><p>Open the address that <code>alignkit label</code> printed, with its token.</p>"
)


class Tokens:
    """The token of the printed address, and one that is valid once: it is on the command line of the browser."""

    def __init__(self) -> None:
        self.printed, self.once = secrets.token_urlsafe(24), secrets.token_urlsafe(24)

    def accept(self, token: str) -> bool:
        """Whether a token is valid."""
        if secrets.compare_digest(token.encode(), self.once.encode()):
            self.once = secrets.token_urlsafe(24)
            return True
        return secrets.compare_digest(token.encode(), self.printed.encode())


class Guard:
    """The application, behind these checks. It signs in whoever has the token."""

    def __init__(self, app: ASGIApp, store: Store, tokens: Tokens, host: str, labeler: str | None) -> None:
        self.app, self.store, self.tokens, self.labeler = app, store, tokens, labeler
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        response = self.refused(request) or self.signed_in(request)
        await (response or self.app)(scope, receive, with_headers)

    def refused(self, request: Request) -> Response | None:
        """The response to a request that does not come from the page itself; None if it does."""
        host = request.headers.get("host", "")
        if not self.is_this_machine(host):
            return error(403, f"{host!r} is not a name of this server: open it by the address that was printed")
        if request.method in ("GET", "HEAD"):
            return None
        if request.headers.get("origin") not in (f"http://{host}", f"https://{host}"):
            return error(403, "the request does not come from this server's page")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return error(400, "the body must be JSON, with the content type application/json")
        return None

    def is_this_machine(self, host: str) -> bool:
        """Whether a Host header names this machine. An address of digits is no name that DNS could rebind."""
        try:
            parts = urlsplit(f"//{host}")
            name = parts.hostname or ""
            return parts.port != 0 and (name in self.names or bool(ipaddress.ip_address(name)))
        except ValueError:  # neither a name nor an address, or an invalid port
            return False

    def signed_in(self, request: Request) -> Response | None:
        """Exchange a token for a cookie. None if the request has the cookie of a session."""
        cookie = session_cookie(request)
        session = self.store.session(cookie) if cookie is not None else None
        known = session is not None and self.labeler in (None, session.labeler)
        if request.url.path == "/" and (token := request.query_params.get("token")) is not None:
            if known:
                return HTMLResponse(SIGNED_IN)
            if self.tokens.accept(token):
                return self.sign_in(request)
        if known:
            return None
        if request.url.path == "/":
            return HTMLResponse(SIGNED_OUT, status_code=401)
        return error(401, "not signed in: open the address that alignkit label printed")

    def sign_in(self, request: Request) -> Response:
        """Begin a session."""
        cookie = secrets.token_urlsafe(32)
        self.store.new_session(cookie, self.labeler)
        response = HTMLResponse(SIGNED_IN)
        response.set_cookie(cookie_name(request), cookie, max_age=COOKIE_AGE, httponly=True, samesite="strict")
        return response


def session_cookie(request: Request) -> str | None:
    """The cookie of the session."""
    return request.cookies.get(cookie_name(request))


def cookie_name(request: Request) -> str:
    """A name of its own for every port, because browsers share cookies between the ports of a host."""
    return f"alignkit-label-{request.url.port or 80}"


def error(status: int, message: str) -> Response:
    """A JSON response with one sentence."""
    return JSONResponse({"error": message}, status_code=status)
