"""Accounts: a file of names and hashed passwords, a gate that slows guessing down, and sessions that end."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

from pipelines.errors import InputError
from pipelines.text_files import read_text
from training.runs.durable import write_text_atomically
from webui.settings import app_command

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
MIN_PASSWORD, MAX_PASSWORD = 8, 200
# 32 MiB and about a tenth of a second a guess.
COST, BLOCK, PARALLEL = 2**15, 8, 1
SCRYPT_BYTES = 64 * 2**20
# So many wrong passwords within so many seconds, of one client or for one name, and both wait as long.
ATTEMPTS, SECONDS = 5, 60.0
# Passwords that are hashed at once, and that may wait for it; 32 MiB each, and the cores are training's.
AT_ONCE, WAITING = 2, 16
SESSION_SECONDS = 7 * 86400
MAX_TRACKED = 10_000

# Who asks, set by webui.guard for each request; gradio tells its gate the name and the password alone.
client_address: ContextVar[str] = ContextVar("client_address", default="")


class Accounts:
    """The file of accounts, a line `name:scrypt$cost$block$parallel$salt$hash` each; read anew when it has changed.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: tuple[tuple[int, int], dict[str, str]] = ((0, 0), {})
        # Nobody's: an unknown name takes as long as a known one.
        self._decoy = hashed(secrets.token_hex(16))

    def check(self) -> None:
        """Raise InputError if the file is missing, malformed or empty."""
        if not self.all():
            raise InputError(
                f"{str(self.path)!r} holds no account. Make one with '{app_command()} --accounts {self.path} --add_account NAME'."
            )

    def all(self) -> dict[str, str]:
        """The hashed passwords by name; none where there is no file.

        Raises: InputError naming a line that is none.
        """
        try:
            state = self.path.stat()
        except FileNotFoundError:
            return {}
        if self._read[0] != (state.st_mtime_ns, state.st_size):
            self._read = (state.st_mtime_ns, state.st_size), dict(self._lines())
        return self._read[1]

    def accepts(self, name: str, password: str) -> bool:
        """Whether `password` is that of `name`; takes as long for names that there are not."""
        stored = self.all().get(name)
        is_right = matches(password, stored or self._decoy)
        return is_right and stored is not None

    def _lines(self) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(read_text(self.path).splitlines(), 1):
            name, _, stored = line.partition(":")
            if line and (not NAME.fullmatch(name) or len(stored.split("$")) != 6):
                raise InputError(f"Line {number} of {str(self.path)!r} is no account. Remove it, and use --add_account.")
            if line:
                yield name, stored


def add_account(path: Path, name: str, password: str) -> None:
    """Write an account to the file at `path`, which only its owner can read; an account of that name is replaced.

    Raises: InputError if the name or the password cannot be one.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"A name must be up to 40 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit, got {name!r}."
        )
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise InputError(f"A password must have {MIN_PASSWORD} to {MAX_PASSWORD} letters, this one has {len(password)}.")
    accounts = Accounts(path).all() | {name: hashed(password)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made before it is written, so that it is never readable to others.
    before = os.umask(0o077)
    try:
        write_text_atomically(path, "".join(f"{user}:{stored}\n" for user, stored in sorted(accounts.items())))
    finally:
        os.umask(before)


def hashed(password: str) -> str:
    """`password` with a new salt, as accounts are stored."""
    salt = secrets.token_bytes(16)
    return f"scrypt${COST}${BLOCK}${PARALLEL}${salt.hex()}${_scrypt(password, salt, COST, BLOCK, PARALLEL).hex()}"


def matches(password: str, stored: str) -> bool:
    """Whether `stored` was made from `password`, told in the same time either way."""
    _, cost, block, parallel, salt, digest = stored.split("$")
    made = _scrypt(password, bytes.fromhex(salt), int(cost), int(block), int(parallel))
    return hmac.compare_digest(made, bytes.fromhex(digest))


def _scrypt(password: str, salt: bytes, cost: int, block: int, parallel: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=cost, r=block, p=parallel, maxmem=SCRYPT_BYTES, dklen=32)


class Throttle:
    """Counts attempts of clients and for names.

    An attempt counts as wrong until it was right, so that many at once do not slip by. Behind a tunnel or a proxy all clients
    have one address, and wait together.
    """

    def __init__(self) -> None:
        self._attempts: defaultdict[str, deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()

    def begin(self, client: str, name: str) -> float:
        """Count an attempt; returns the seconds to wait instead, which is then not counted."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            recent = [self._attempts[key] for key in _keys(client, name)]
            wait = max((attempts[0] + SECONDS - now for attempts in recent if len(attempts) >= ATTEMPTS), default=0.0)
            if wait <= 0:
                for attempts in recent:
                    attempts.append(now)
            return max(wait, 0.0)

    def succeed(self, client: str, name: str) -> None:
        """Forget the attempts that led to the right password."""
        with self._lock:
            for key in _keys(client, name):
                self._attempts.pop(key, None)

    def _forget(self, now: float) -> None:
        for key in list(self._attempts) if len(self._attempts) > MAX_TRACKED else []:
            if self._attempts[key][-1] < now - SECONDS:
                del self._attempts[key]
        for attempts in self._attempts.values():
            while attempts and attempts[0] <= now - SECONDS:
                attempts.popleft()


def _keys(client: str, name: str) -> tuple[str, str]:
    return f"client {client}", f"name {name}"


class LoginGate:
    """What gradio asks whether a name and a password belong together.

    Hashing happens in two threads of its own, so that guesses hold up neither the page nor a run; more than a few that wait for
    it are sent away.

    Args:
        accounts: who may come in.
    """

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._throttle = Throttle()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="password")
        self._waiting = 0

    async def admits(self, name: str, password: str) -> bool:
        """Whether they do. Gradio awaits a method, but would take the unawaited answer of a called object for a yes.

        Raises: HTTPException 429 with the seconds to wait.
        """
        client, account = client_address.get(), name if NAME.fullmatch(name) else ""
        wait = self._throttle.begin(client, account)
        if wait > 0:
            raise _too_many(f"Too many wrong passwords. Wait {wait + 1:.0f} seconds and try again.", wait)
        if self._waiting >= WAITING:
            raise _too_many("Too many people sign in at once. Try again in a few seconds.", 5)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            is_right = await loop.run_in_executor(self._threads, self._accounts.accepts, account, password[: MAX_PASSWORD + 1])
        finally:
            self._waiting -= 1
        if is_right:
            self._throttle.succeed(client, account)
        return is_right


class Sessions(dict[str, str]):
    """Who is signed in, by token, in the place of gradio's dictionary, whose sessions last as long as the server.

    A session ends after a week, when its user signs out, when the account goes or gets another password, and with the server.

    Args:
        accounts: who may come in.
    """

    def __init__(self, accounts: Accounts) -> None:
        super().__init__()
        self._accounts = accounts
        self._given: dict[str, tuple[float, str]] = {}

    def __setitem__(self, token: str, name: str) -> None:
        for address in [address for address in self if self.get(address) is None]:
            self.pop(address, None)
            self._given.pop(address, None)
        self._given[token] = time.monotonic() + SESSION_SECONDS, self._accounts.all().get(name, "")
        super().__setitem__(token, name)

    def get(self, token: str | None, default: str | None = None) -> str | None:
        """Whose session it is, if it has not ended."""
        name = super().get(token)
        if name is None or token not in self._given:
            return default
        until, stored = self._given[token]
        return name if time.monotonic() < until and self._accounts.all().get(name) == stored else default


def _too_many(sentence: str, wait: float) -> Exception:
    # Here, since the options are checked without it.
    from fastapi import HTTPException

    return HTTPException(429, sentence, headers={"Retry-After": str(int(wait) + 1)})
