"""Security middleware in front of Gradio: which requests are refused, and the security headers of every response.

Some of Gradio's endpoints answer without a login. On any host but localhost it accepts requests from other websites, and it
serves a cached file to anyone who knows its path. This middleware leaves only the sign-in page public, refuses requests from
other websites, and limits files, events and sessions to the users they belong to.
"""

from __future__ import annotations

import html
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import secure
from secure.middleware import SecureASGIMiddleware
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from webui.accounts import client_address
from webui.workspace import Settings

FILE = "/gradio_api/file="
# Not the address of an upload's progress, which begins alike.
UPLOAD = re.compile(r"/gradio_api/upload/?")
# The paths that a browser needs to show the sign-in page.
PUBLIC_PATHS = re.compile(
    r"/|/login/?|/logout|/favicon\.ico|/card\.png|/robots\.txt|/manifest\.json|(/gradio_api)?/theme\.css|/(static|assets)/.*"
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
HEADERS = secure.Secure(
    xcto=secure.XContentTypeOptions().nosniff(),
    xfo=secure.XFrameOptions().deny(),
    referrer=secure.ReferrerPolicy().no_referrer(),
    coop=secure.CrossOriginOpenerPolicy().same_origin(),
    corp=secure.CrossOriginResourcePolicy().same_origin(),
    # The camera is for photos of the subject and for classifying what it sees.
    permissions=secure.PermissionsPolicy().camera("self").microphone().geolocation(),
)
# The names of this machine for itself. Any other name of a local app is another website's that resolves to this machine.
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
# Gradio's tags for cards on social networks, in place of which the page has its own.
FOREIGN_TAGS = re.compile(rb"<meta\s+(?:property=\"og:|name=\"twitter:)[^>]*/>")


def middlewares(settings: Settings, cache: Path, head: str) -> list[Middleware]:
    """What stands between the network and Gradio.

    Args:
        settings: the settings of the server.
        cache: Gradio's folder of cached files.
        head: HTML for the head of the page, with {origin} for the address of the server.
    """
    names = [*LOOPBACK_NAMES, settings.host] if settings.is_local else ["*"]
    return [
        Middleware(SecureASGIMiddleware, secure=HEADERS),
        Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False),
        Middleware(Guard, settings=settings, cache=cache, head=head),
    ]


class Owners:
    """The users who own a file, an event or a session; the oldest are forgotten beyond `MAX_TRACKED`."""

    def __init__(self) -> None:
        self._users: dict[str, set[str]] = {}

    def of(self, handle: str) -> set[str]:
        """The owners of `handle`; empty if it has none."""
        return self._users.get(handle, set())

    def add(self, handle: str, user: str) -> None:
        """Add `user` to the owners of `handle`, which becomes the newest."""
        self._users[handle] = self._users.pop(handle, set()) | {user}
        if len(self._users) > MAX_TRACKED:
            del self._users[next(iter(self._users))]

    def check(self, handles: Iterable[str], user: str, refusal: str) -> None:
        """Raise HTTPException with `refusal` if one of the handles has owners, and `user` is none of them."""
        if any(owners and user not in owners for owners in map(self.of, handles)):
            raise HTTPException(403, f"{refusal} Reload the page.")


class Guard:
    """The middleware: passes a request to Gradio or refuses it.

    Args:
        app: Gradio's app.
        settings, cache, head: as for `middlewares`.
    """

    def __init__(self, app: ASGIApp, settings: Settings, cache: Path, head: str) -> None:
        self._app, self._settings, self._cache, self._head = app, settings, cache, head
        self._owners = Owners()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        nonce, request = secrets.token_hex(16), HTTPConnection(scope)
        send = _with_policy(send, FILE_POLICY if scope["path"].startswith(FILE) else PAGE_POLICY.format(nonce=nonce))
        if scope["path"] == "/":
            send = _page(send, self._head.replace("{origin}", html.escape(str(request.base_url))), nonce)
        try:
            _check_path_and_site(request)
            if self._settings.accounts is not None:
                receive, send = await self._for_one_user(request, receive, send)
            self._check_files(request)
        except HTTPException as refusal:
            return await JSONResponse({"detail": refusal.detail}, refusal.status_code)(scope, receive, send)
        if UPLOAD.fullmatch(scope["path"]):
            receive = _refusing_cut_uploads(receive)
        client_address.set(request.client.host if request.client else "")
        await self._app(scope, receive, send)

    def _check_files(self, request: HTTPConnection) -> None:
        """Refuse uploads that the disk has no room for, and files outside of the cache."""
        path, length = request.scope["path"], request.headers.get("content-length", "")
        needed = FREE_BYTES + (int(length) if length.isdigit() else 0)
        if UPLOAD.fullmatch(path) and shutil.disk_usage(self._cache).free < needed:
            raise HTTPException(507, "The server's disk is nearly full. Delete runs or images that are no longer needed.")
        if path.startswith(FILE) and not Path(os.path.abspath(path.removeprefix(FILE))).is_relative_to(self._cache):
            raise HTTPException(403, "Only uploaded and generated files are served.")

    async def _for_one_user(self, request: HTTPConnection, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """The request's channels, with the handles in its response recorded for its user.

        Raises: HTTPException if the user is not signed in, or does not own every handle and session in the request.
        """
        path, user = request.scope["path"], _user(request)
        if user is None:
            if PUBLIC_PATHS.fullmatch(path):
                return receive, send
            raise HTTPException(401, "You are not signed in. Reload the page and sign in.")
        request.scope["user"] = user
        named = f"{path}?{request.url.query}".encode()
        sessions = request.query_params.getlist("session_hash") + SESSION_IN_PATH.findall(path)
        if request.scope["method"] == "POST" and NAMES_SESSION.fullmatch(path):
            body, receive = await _read(receive)
            named, sessions = named + body, sessions + _sessions_in(body)
        self._check_owner(path, _handles_in(named), [f"session {each}" for each in sessions], user)
        return receive, self._recording(send, user) if ISSUES_HANDLES.fullmatch(path) else send

    def _check_owner(self, path: str, handles: list[str], sessions: list[str], user: str) -> None:
        """Refuse a request that names what is another user's. A session belongs to the first user who names it."""
        if path.startswith(FILE) and not any(user in self._owners.of(handle) for handle in handles):
            raise HTTPException(403, "This file belongs to another user, or the server was restarted. Reload the page.")
        self._owners.check(handles, user, "This request names a file or an event of another user.")
        self._owners.check(sessions, user, "This session belongs to another user.")
        for session in sessions:
            self._owners.add(session, user)

    def _recording(self, send: Send, user: str) -> Send:
        """`send` that records `user` as an owner of the handles in the response."""

        async def sent(message: Message) -> None:
            for handle in _handles_in(message.get("body", b"")):
                self._owners.add(handle, user)
            await send(message)

        return sent


def _check_path_and_site(request: HTTPConnection) -> None:
    """Refuse disabled paths, and requests from other websites, by the browser's header Sec-Fetch-Site, else by Origin."""
    headers, scope = request.headers, request.scope
    is_opened = scope["path"] == "/" and scope["method"] in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    is_foreign = site not in ("same-origin", "none") if site else bool(origin) and urlsplit(origin).netloc != headers.get("host")
    if is_foreign and not is_opened:
        raise HTTPException(403, "This request came from another website. The app answers only requests from its own page.")
    if DISABLED_PATHS.fullmatch(scope["path"]):
        raise HTTPException(404, "Not found.")


def _user(request: HTTPConnection) -> str | None:
    """The signed-in user, from Gradio's session cookie; None if nobody is signed in."""
    app, cookies = request.app, request.cookies
    token = cookies.get(f"access-token-{app.cookie_id}") or cookies.get(f"access-token-unsecure-{app.cookie_id}")
    return app.tokens.get(token)


def _handles_in(text: bytes) -> list[str]:
    return [handle.decode() for handle in HANDLE.findall(text)]


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """The body of a request, and a channel that returns it once more.

    Raises: HTTPException if it is larger than `MAX_BODY`.
    """
    content, more = b"", True
    while more:
        message = await receive()
        content, more = content + message.get("body", b""), message.get("more_body", False)
        if len(content) > MAX_BODY:
            raise HTTPException(413, f"The request is larger than {MAX_BODY >> 20} MB. Upload files instead of sending them.")
    unread = [{"type": "http.request", "body": content, "more_body": False}]

    async def again() -> Message:
        return unread.pop() if unread else await receive()

    return content, again


def _refusing_cut_uploads(receive: Receive) -> Receive:
    """`receive` that reports a connection that is closed during an upload like a malformed one, whose files Gradio deletes."""
    is_complete = False

    async def received() -> Message:
        nonlocal is_complete
        message = await receive()
        if message["type"] == "http.disconnect" and not is_complete:
            raise MultiPartException("The connection was closed before the upload was complete.")
        is_complete = not message.get("more_body")
        return message

    return received


def _sessions_in(body: bytes) -> list[str]:
    try:
        content = json.loads(body)
    except ValueError:
        return []
    session = content.get("session_hash") if isinstance(content, dict) else None
    return [session] if isinstance(session, str) else []


def _with_policy(send: Send, policy: str) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Content-Security-Policy"] = policy
        await send(message)

    return sent


def _page(send: Send, head: str, nonce: str) -> Send:
    """`send` that puts `head` into the page and adds `nonce` to its script tags.

    Without quotes, because some tags are inside strings of a script.
    """
    held: list[Message] = []

    async def sent(message: Message) -> None:
        held.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            body = FOREIGN_TAGS.sub(b"", b"".join(part.get("body", b"") for part in held[1:]))
            body = body.replace(b"<head>", f"<head>{head}".encode(), 1).replace(b"<script", f"<script nonce={nonce}".encode())
            headers = MutableHeaders(scope=held[0])
            if "content-length" in headers and body:
                headers["content-length"] = str(len(body))
            await send(held[0])
            await send({"type": "http.response.body", "body": body})

    return sent
