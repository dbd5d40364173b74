"""Accounts: a file of user names and hashed passwords, a login with a limit on wrong passwords, and sessions that expire."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from anyio import CapacityLimiter
from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import InvalidHashError, VerifyMismatchError
from fastapi import HTTPException
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from pipelines.errors import InputError
from pipelines.text_files import read_text, write_text_atomically
from training.runs.snapshot import Revision, revision
from webui.workspace import app_command

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
MIN_PASSWORD, MAX_PASSWORD = 8, 200
# Hashing a password takes 32 MiB and some hundredths of a second.
HASHER = PasswordHasher(time_cost=3, memory_cost=2**15, parallelism=1)
# Wrong passwords that a client, or a name, may have within a minute.
MAX_ATTEMPTS = 5
# Passwords that are hashed at the same time, and that may wait. Each takes memory, and training needs the cores.
MAX_HASHING, MAX_WAITING = 2, 16
SESSION_SECONDS = 7 * 86400

# Set by webui.security for each request, because Gradio passes only the name and the password to the login check.
client_address: ContextVar[str] = ContextVar("client_address", default="")


@dataclass(frozen=True)
class Accounts:
    """The accounts file: a line `name:hash` per account, hashed by Argon2; read again when it changes.

    Args:
        path: the file.
    """

    path: Path

    def check(self) -> None:
        """Raise InputError if the file is missing, malformed or empty."""
        if not self.all():
            raise InputError(
                f"{str(self.path)!r} contains no account. "
                f"Create one with '{app_command()} --accounts {self.path} --add_account NAME'."
            )

    def all(self) -> dict[str, str]:
        """The hashed passwords by name; empty if the file does not exist.

        Raises: InputError naming a malformed line.
        """
        changed = revision(self.path)
        return {} if changed is None else _read(self.path, changed)

    def accepts(self, name: str, password: str) -> bool:
        """Whether `password` is the password of `name`. Takes as long for unknown names as for existing ones."""
        accounts = self.all()
        try:
            HASHER.verify(accounts.get(name, _decoy()), password)
        except VerifyMismatchError:
            return False
        return name in accounts


@lru_cache(maxsize=1)
def _read(path: Path, changed: Revision) -> dict[str, str]:
    accounts = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name, _, stored = line.partition(":")
        if line and not (NAME.fullmatch(name) and _is_hash(stored)):
            raise InputError(
                f"Line {number} of {str(path)!r} is not a name and a password hashed by Argon2 (earlier versions used scrypt). "
                "Delete the line and add the account again with --add_account."
            )
        if line:
            accounts[name] = stored
    return accounts


def _is_hash(stored: str) -> bool:
    try:
        extract_parameters(stored)
    except InvalidHashError:
        return False
    return True


@lru_cache(maxsize=1)
def _decoy() -> str:
    """A hash to check for unknown names, of no password that anybody knows."""
    return HASHER.hash(secrets.token_hex(16))


def add_account(path: Path, name: str, password: str) -> None:
    """Write an account to the file at `path`, which only its owner can read; replaces an account of the same name.

    Raises: InputError if the name or the password is invalid.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"A name must have at most 40 of a-z, 0-9, '.', '_' and '-' and begin with a letter or digit, got {name!r}."
        )
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise InputError(f"A password must have {MIN_PASSWORD} to {MAX_PASSWORD} characters, got {len(password)}.")
    accounts = Accounts(path).all() | {name: HASHER.hash(password)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Set before the file is created, so that other users can never read it.
    before = os.umask(0o077)
    try:
        write_text_atomically(path, "".join(f"{user}:{stored}\n" for user, stored in sorted(accounts.items())))
    finally:
        os.umask(before)


class LoginGate:
    """The login check that Gradio calls, with a limit on the attempts per client and per name.

    An attempt counts as wrong until it succeeds, so that parallel attempts do not bypass the limit. Behind a tunnel or a proxy
    all clients have one address and share one limit. Two passwords are hashed at a time, in threads, so that guessing slows down
    neither the page nor a run. Beyond `MAX_WAITING` waiting attempts, further ones are refused.

    Args:
        accounts: the accounts that may sign in.
    """

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._limit = RateLimitItemPerMinute(MAX_ATTEMPTS)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._hashing = CapacityLimiter(MAX_HASHING)

    async def admits(self, name: str, password: str) -> bool:
        """Whether `password` is correct.

        Pass this method to Gradio, not the object: Gradio does not await a callable object, and a coroutine counts as true.

        Raises: HTTPException 429 with the seconds to wait.
        """
        account = name if NAME.fullmatch(name) else ""
        keys = ("client", client_address.get()), ("name", account)
        # Both are tested before either counts. Nothing is awaited in between, so no other attempt comes between.
        waits = [self._limiter.get_window_stats(self._limit, *key) for key in keys if not self._limiter.test(self._limit, *key)]
        if waits:
            wait = max(1.0, max(each.reset_time for each in waits) - time.time())
            raise _too_many(f"Too many wrong passwords. Wait {wait + 1:.0f} seconds and try again.", wait)
        if self._hashing.statistics().tasks_waiting >= MAX_WAITING:
            raise _too_many("Too many people are signing in. Try again in a few seconds.", 5)
        for key in keys:
            self._limiter.hit(self._limit, *key)
        async with self._hashing:
            is_right = await asyncio.to_thread(self._accounts.accepts, account, password[: MAX_PASSWORD + 1])
        for key in keys if is_right else ():
            self._limiter.clear(self._limit, *key)
        return is_right


class Sessions(dict[str, str]):
    """The signed-in users by token. Replaces Gradio's dictionary, whose sessions last as long as the server.

    A session ends after a week, when its user signs out, when the account is removed or its password changes, and when the server
    stops.

    Args:
        accounts: the accounts that may sign in.
    """

    def __init__(self, accounts: Accounts) -> None:
        super().__init__()
        self._accounts = accounts
        self._issued: dict[str, tuple[float, str]] = {}

    def __setitem__(self, token: str, name: str) -> None:
        for ended in [each for each in self._issued if self.get(each) is None]:
            self.pop(ended, None)
            del self._issued[ended]
        self._issued[token] = time.monotonic() + SESSION_SECONDS, self._accounts.all().get(name, "")
        super().__setitem__(token, name)

    def get(self, token: str | None, default: str | None = None) -> str | None:
        """The user of the session `token`; `default` if it has ended."""
        name, (until, stored) = super().get(token), self._issued.get(token, (0.0, ""))
        is_valid = name is not None and time.monotonic() < until and self._accounts.all().get(name) == stored
        return name if is_valid else default


def _too_many(sentence: str, wait: float) -> HTTPException:
    return HTTPException(429, sentence, headers={"Retry-After": str(int(wait) + 1)})
