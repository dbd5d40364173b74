"""Security middleware in front of Gradio: which requests are refused, and the security headers of every response.

Some of Gradio's endpoints answer without a login. On any host but localhost it accepts requests from other websites, and it
serves a cached file to anyone who knows its path. This middleware leaves only the sign-in page public, refuses requests from
other websites, and limits files, events and sessions to the users they belong to.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections import OrderedDict
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from webui.accounts import client_address
from webui.settings import Settings, is_loopback

FILE, UPLOAD = "/gradio_api/file=", "/gradio_api/upload"
# The paths that a browser needs to show the sign-in page.
PUBLIC_PATHS = re.compile(
    r"/|/login/?|/logout|/favicon\.ico|/robots\.txt|/manifest\.json|(/gradio_api)?/theme\.css|/(static|assets)/.*"
    r"|/gradio_api/(startup-events|login_check|app_id|user)/?"
)
# Gradio's proxy, code editor, reloader, dashboards and recordings, and the endpoint that gives the session cookie to scripts.
DISABLED_PATHS = re.compile(
    r"/gradio_api/(proxy=|file/|file=\w+:|vibe|undo-vibe|dev/|token|profiling|runs|run-history|process_recording).*"
    r"|/gradio_api/deep_link.*|/monitoring.*|/svelte/.*"
)
# Paths whose responses contain handles.
ISSUES_HANDLES = re.compile(r"/gradio_api/(queue/data|upload|component_server|queue/join|(call|run|api)/.*)/?")
# Paths whose request bodies name a session.
NAMES_SESSION = re.compile(r"/gradio_api/(queue/join|cancel|reset|component_server|(call|run|api)/.*)/?")
SESSION_IN_PATH = re.compile(r"/gradio_api/(?:heartbeat|stream)/([^/]+).*")
# An event's id, or the hash in a cached file's path: too long to be guessed.
HANDLE = re.compile(rb"(?<![0-9a-f])(?:[0-9a-f]{64}|[0-9a-f]{32})(?![0-9a-f])")
MAX_TRACKED = 200_000
MAX_BODY = 32 * 2**20
# Disk space that uploads must leave free.
FREE_BYTES = 2 * 2**30
# Only scripts of this server or with the page's nonce run, so a script in a name or a prompt would not run even if it was not
# escaped. Gradio needs 'unsafe-eval', because it makes functions from strings.
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
FILE_POLICY = "default-src 'none'; sandbox; frame-ancestors 'none'"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
}


class Owners:
    """The users who own a file, an event or a session; the oldest are forgotten beyond `MAX_TRACKED`."""

    def __init__(self) -> None:
        self._users: OrderedDict[str, set[str]] = OrderedDict()

    def add(self, handle: str, user: str) -> None:
        """Add `user` to the owners of `handle`."""
        self._users.setdefault(handle, set()).add(user)
        self._users.move_to_end(handle)
        while len(self._users) > MAX_TRACKED:
            self._users.popitem(last=False)

    def has(self, handle: str, user: str) -> bool:
        """Whether `user` is one of the owners of `handle`."""
        return user in self._users.get(handle, ())

    def is_known(self, handle: str) -> bool:
        """Whether `handle` has an owner."""
        return handle in self._users


class Refusal(Exception):
    """A request is refused.

    Args:
        status: the HTTP status of the response.
        sentence: the reason and the remedy, for the user.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Guard:
    """The middleware: passes a request to Gradio or refuses it.

    Args:
        app: Gradio's app.
        settings: the settings of the server.
        cache: Gradio's folder of cached files.
        head: HTML for the head of the page.
    """

    def __init__(self, app: ASGIApp, settings: Settings, cache: Path, head: str) -> None:
        self._app = app
        self._settings = settings
        self._cache = cache
        self._head = head.encode()
        self._owners = Owners()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        path, headers = scope["path"], Headers(scope=scope)
        nonce = secrets.token_hex(16)
        send = _with_headers(send, FILE_POLICY if path.startswith(FILE) else PAGE_POLICY.format(nonce=nonce))
        if path == "/":
            send = _page(send, self._head, nonce)
        try:
            receive, send = await self._checked(scope, headers, receive, send)
        except Refusal as refusal:
            answer = JSONResponse({"detail": refusal.sentence}, refusal.status)
            return await answer(scope, receive, send)
        client_address.set(scope["client"][0] if scope.get("client") else "")
        await self._app(scope, receive, send)

    async def _checked(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """The request's channels, with the handles in its response recorded for its user.

        Raises: Refusal if the request is not allowed.
        """
        path = scope["path"]
        _check_site(scope, headers, self._settings.is_local)
        if DISABLED_PATHS.fullmatch(path):
            raise Refusal(404, "Not found.")
        if self._settings.accounts is not None:
            receive, send = await self._for_one_user(scope, headers, receive, send)
        if path.startswith(UPLOAD):
            self._check_disk(headers)
        if path.startswith(FILE) and not self._is_cached(path):
            raise Refusal(403, "Only uploaded and generated files are served.")
        return receive, send

    def _check_disk(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if shutil.disk_usage(self._cache).free < FREE_BYTES + (int(length) if length.isdigit() else 0):
            raise Refusal(507, "The server's disk is nearly full. Delete runs or images that are no longer needed.")

    def _is_cached(self, path: str) -> bool:
        return Path(os.path.abspath(path.removeprefix(FILE))).is_relative_to(self._cache)

    async def _for_one_user(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """As `_checked`, when accounts are in use: the user must be signed in and own every handle and session in the request."""
        path, user = scope["path"], _user(scope, headers)
        if user is None:
            if PUBLIC_PATHS.fullmatch(path):
                return receive, send
            raise Refusal(401, "You are not signed in. Reload the page and sign in.")
        scope["user"] = user
        named = f"{path}?{scope['query_string'].decode('latin-1')}".encode()
        sessions = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])
        sessions += SESSION_IN_PATH.findall(path)
        if scope["method"] == "POST" and NAMES_SESSION.fullmatch(path):
            body = await _body(receive)
            named, sessions = named + body, sessions + _sessions_in(body)
            receive = _replayed(body, receive)
        self._check_handles(path, named, user)
        for session in sessions:
            self._bind(f"session {session}", user)
        return receive, self._recording(send, user) if ISSUES_HANDLES.fullmatch(path) else send

    def _check_handles(self, path: str, named: bytes, user: str) -> None:
        """Refuse a request for a file that `user` does not own, or that names a handle of another user."""
        handles = {handle.decode() for handle in HANDLE.findall(named)}
        if path.startswith(FILE) and not any(self._owners.has(handle, user) for handle in handles):
            raise Refusal(403, "This file belongs to another user, or the server was restarted. Reload the page.")
        if any(self._owners.is_known(handle) and not self._owners.has(handle, user) for handle in handles):
            raise Refusal(403, "This request names a file or an event of another user. Reload the page.")

    def _bind(self, session: str, user: str) -> None:
        """Bind a session to the first user who names it, and refuse other users."""
        if self._owners.is_known(session) and not self._owners.has(session, user):
            raise Refusal(403, "This session belongs to another user. Reload the page.")
        self._owners.add(session, user)

    def _recording(self, send: Send, user: str) -> Send:
        """`send` that records `user` as an owner of the handles in the response."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.body":
                for handle in HANDLE.findall(message.get("body", b"")):
                    self._owners.add(handle.decode(), user)
            await send(message)

        return sent


def _check_site(scope: Scope, headers: Headers, is_local: bool) -> None:
    """Refuse requests from other websites, by the browser's Sec-Fetch-Site header, else by the Origin header."""
    host = headers.get("host", "")
    if is_local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
        # DNS rebinding: another website's name that resolves to this machine.
        raise Refusal(403, "The app answers only at its own address. Open the address that it printed when it started.")
    is_opened = scope["path"] == "/" and scope["method"] in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    from_elsewhere = site not in ("same-origin", "none") if site else bool(origin) and urlsplit(origin).netloc != host
    if from_elsewhere and not is_opened:
        raise Refusal(403, "This request came from another website. The app answers only requests from its own page.")


def _user(scope: Scope, headers: Headers) -> str | None:
    """The signed-in user, from Gradio's session cookie; None if nobody is signed in."""
    app = scope["app"]
    cookies = dict(part.strip().split("=", 1) for part in headers.get("cookie", "").split(";") if "=" in part)
    token = cookies.get(f"access-token-{app.cookie_id}") or cookies.get(f"access-token-unsecure-{app.cookie_id}")
    return app.tokens.get(token)


async def _body(receive: Receive) -> bytes:
    content = b""
    while True:
        message = await receive()
        content += message.get("body", b"")
        if len(content) > MAX_BODY:
            raise Refusal(
                413, f"The request is larger than {MAX_BODY >> 20} MB. Upload files instead of sending them in the request."
            )
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return content


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that returns `body`, which was read already, first."""
    waiting = [body]

    async def again() -> Message:
        return {"type": "http.request", "body": waiting.pop(), "more_body": False} if waiting else await receive()

    return again


def _sessions_in(body: bytes) -> list[str]:
    try:
        content = json.loads(body)
    except ValueError:
        return []
    session = content.get("session_hash") if isinstance(content, dict) else None
    return [session] if isinstance(session, str) else []


def _with_headers(send: Send, policy: str) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in (HEADERS | {"Content-Security-Policy": policy}).items():
                headers[name] = value
        await send(message)

    return sent


def _page(send: Send, head: bytes, nonce: str) -> Send:
    """`send` that puts `head` into the page and adds `nonce` to its script tags.

    Without quotes, because some tags are inside strings of a script.
    """
    held: list[Message] = []

    async def sent(message: Message) -> None:
        held.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            body = b"".join(part.get("body", b"") for part in held[1:]).replace(b"<head>", b"<head>" + head, 1)
            body = body.replace(b"<script", b"<script nonce=" + nonce.encode())
            headers = MutableHeaders(scope=held[0])
            if "content-length" in headers and body:
                headers["content-length"] = str(len(body))
            await send(held[0])
            await send({"type": "http.response.body", "body": body})

    return sent
