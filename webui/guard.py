"""What stands before gradio: who may ask for what, and what browsers are told to refuse.

Gradio answers anyone at some of its endpoints, other websites on any host but localhost, and gives a cached file to whoever
knows its path. Here nothing but the sign-in page answers strangers, other websites are refused, and a file, an event or a
session answers those alone to whom it was given.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from webui.accounts import client_address
from webui.settings import Settings, is_loopback

FILE, UPLOAD, EVENTS = "/gradio_api/file=", "/gradio_api/upload", "/gradio_api/queue/data"
# What a browser needs to show the page that asks for the password.
FOR_STRANGERS = re.compile(
    r"/|/login/?|/logout|/favicon\.ico|/robots\.txt|/manifest\.json|(/gradio_api)?/theme\.css|/(static|assets)/.*"
    r"|/gradio_api/(startup-events|login_check|app_id|user)/?"
)
# Of gradio's own: a proxy, a code editor, a reloader, dashboards, recordings, and the cookie read out to scripts.
CLOSED = re.compile(
    r"/gradio_api/(proxy=|file/|file=\w+:|vibe|undo-vibe|dev/|token|profiling|runs|run-history|process_recording).*"
    r"|/gradio_api/deep_link.*|/monitoring.*|/svelte/.*"
)
# What gives out handles, and what takes a session's name.
ANSWERS = re.compile(r"/gradio_api/(queue/data|upload|component_server|queue/join|(call|run|api)/.*)/?")
ASKS = re.compile(r"/gradio_api/(queue/join|cancel|reset|component_server|(call|run|api)/.*)/?")
SESSION_IN_PATH = re.compile(r"/gradio_api/(?:heartbeat|stream)/([^/]+).*")
# Of events and of cached files, long enough not to be guessed.
HANDLE = re.compile(rb"(?<![0-9a-f])(?:[0-9a-f]{64}|[0-9a-f]{32})(?![0-9a-f])")
MAX_TRACKED = 200_000
MAX_BODY = 32 * 2**20
# Kept free for runs and for the machine.
FREE_BYTES = 2 * 2**30
# Scripts come from here, or carry the number that the page was sent with: what a name or a prompt smuggles into the page does
# not run, were it not escaped somewhere. Gradio itself makes functions of strings.
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
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class Visits:
    """Whether anybody has the page before them yet."""

    def __init__(self) -> None:
        self.first = threading.Event()


class Owners:
    """To whom something was given, for as many things as fit."""

    def __init__(self) -> None:
        self._users: OrderedDict[str, set[str]] = OrderedDict()

    def give(self, thing: str, user: str) -> None:
        """Remember that `user` has it."""
        self._users.setdefault(thing, set()).add(user)
        self._users.move_to_end(thing)
        while len(self._users) > MAX_TRACKED:
            self._users.popitem(last=False)

    def has(self, thing: str, user: str) -> bool:
        """Whether `user` has it."""
        return user in self._users.get(thing, ())

    def is_known(self, thing: str) -> bool:
        """Whether anybody has it."""
        return thing in self._users


class Refusal(Exception):
    """A request that is not passed on.

    Args:
        status: of the answer.
        sentence: why, in words.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Guard:
    """Passes a request on to gradio, or refuses it in a sentence.

    Args:
        app: gradio.
        settings: what the server was started with.
        cache: gradio's folder of cached files.
        visits: told of the first page that was filled.
    """

    def __init__(self, app: ASGIApp, settings: Settings, cache: Path, visits: Visits) -> None:
        self._app = app
        self._settings = settings
        self._cache = cache
        self._visits = visits
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
            send = _with_nonce(send, nonce)
        try:
            receive, send = await self._checked(scope, headers, receive, send)
        except Refusal as refusal:
            answer = JSONResponse({"detail": refusal.sentence}, refusal.status)
            return await answer(scope, receive, send)
        client_address.set(scope["client"][0] if scope.get("client") else "")
        await self._app(scope, receive, send)
        if path == EVENTS:
            self._visits.first.set()

    async def _checked(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """The request's channels, those of its user alone where there are accounts.

        Raises: Refusal.
        """
        path = scope["path"]
        _check_site(scope, headers, self._settings.is_local)
        if CLOSED.fullmatch(path):
            raise Refusal(404, "There is nothing here.")
        if self._settings.accounts is not None:
            receive, send = await self._for_one_user(scope, headers, receive, send)
        if path.startswith(UPLOAD):
            self._check_disk(headers)
        if path.startswith(FILE) and not self._is_cached(path):
            raise Refusal(403, "This file is not served.")
        return receive, send

    def _check_disk(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if shutil.disk_usage(self._cache).free < FREE_BYTES + (int(length) if length.isdigit() else 0):
            raise Refusal(507, "The server's disk is nearly full. Delete runs or images that are no longer needed.")

    def _is_cached(self, path: str) -> bool:
        return Path(os.path.abspath(path.removeprefix(FILE))).is_relative_to(self._cache)

    async def _for_one_user(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """`receive` and `send`, for a request of someone who is signed in and names nothing that is another's."""
        path, user = scope["path"], _user(scope, headers)
        if user is None:
            if FOR_STRANGERS.fullmatch(path):
                return receive, send
            raise Refusal(401, "You are not signed in. Reload the page and sign in.")
        named = f"{path}?{scope['query_string'].decode('latin-1')}".encode()
        sessions = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])
        sessions += SESSION_IN_PATH.findall(path)
        if scope["method"] == "POST" and ASKS.fullmatch(path):
            body = await _body(receive)
            named, sessions = named + body, sessions + _sessions_in(body)
            receive = _replayed(body, receive)
        self._check_handles(path, named, user)
        for session in sessions:
            self._bind(f"session {session}", user)
        return receive, self._noting(send, user) if ANSWERS.fullmatch(path) else send

    def _check_handles(self, path: str, named: bytes, user: str) -> None:
        """Refuse a request that names what was given to others, or a file that was not given to `user`."""
        handles = {handle.decode() for handle in HANDLE.findall(named)}
        if path.startswith(FILE) and not any(self._owners.has(handle, user) for handle in handles):
            raise Refusal(403, "This file is not yours, or the server was started anew. Reload the page.")
        if any(self._owners.is_known(handle) and not self._owners.has(handle, user) for handle in handles):
            raise Refusal(403, "This belongs to somebody else. Reload the page.")

    def _bind(self, session: str, user: str) -> None:
        """Give a session to the first who names it, and refuse others."""
        if self._owners.is_known(session) and not self._owners.has(session, user):
            raise Refusal(403, "This page belongs to somebody else. Reload it.")
        self._owners.give(session, user)

    def _noting(self, send: Send, user: str) -> Send:
        """`send` that gives `user` what the answer names."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.body":
                for handle in HANDLE.findall(message.get("body", b"")):
                    self._owners.give(handle.decode(), user)
            await send(message)

        return sent


def _check_site(scope: Scope, headers: Headers, is_local: bool) -> None:
    """Refuse what another website has a browser do: by what the browser says of it, else by the origin."""
    host = headers.get("host", "")
    if is_local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
        # A name of somebody else's that leads here.
        raise Refusal(403, "This app answers at its own address alone. Open the address that it printed at its start.")
    is_opened = scope["path"] == "/" and scope["method"] in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    from_elsewhere = site not in ("same-origin", "none") if site else bool(origin) and urlsplit(origin).netloc != host
    if from_elsewhere and not is_opened:
        raise Refusal(403, "Another website asked for this, and the app answers its own page alone.")


def _user(scope: Scope, headers: Headers) -> str | None:
    """Who is signed in, as gradio tells it."""
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
            raise Refusal(413, f"This is more than {MAX_BODY >> 20} MB. Send files as files.")
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return content


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that begins with a body that was read already."""
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


def _with_nonce(send: Send, nonce: str) -> Send:
    """`send` for gradio's page, whose scripts get `nonce`; without quotes, so that it may stand within a script's strings too."""
    held: list[Message] = []

    async def sent(message: Message) -> None:
        held.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            body = b"".join(part.get("body", b"") for part in held[1:]).replace(b"<script", b"<script nonce=" + nonce.encode())
            headers = MutableHeaders(scope=held[0])
            if "content-length" in headers and body:
                headers["content-length"] = str(len(body))
            await send(held[0])
            await send({"type": "http.response.body", "body": body})

    return sent
