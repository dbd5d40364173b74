"""Passwords: how they are kept, how guessing is slowed down, and when a session ends."""

from __future__ import annotations

import asyncio
import stat
import threading
import time

import pytest
from fastapi import HTTPException
from processes import apart

from pipelines.errors import InputError
from webui import accounts
from webui.accounts import ATTEMPTS, Accounts, LoginGate, Sessions, Throttle, add_account, client_address, hashed, matches

RIGHT, WRONG = "correct horse", "battery staple"


@pytest.fixture
def kept(tmp_path):
    add_account(tmp_path / "accounts.txt", "ada", RIGHT)
    return Accounts(tmp_path / "accounts.txt")


def asked(gate, name, password, client="10.0.0.1"):
    client_address.set(client)
    return apart(gate.admits(name, password))


def test_a_password_is_kept_salted_and_hashed_in_a_file_of_its_owner_alone(kept):
    text = kept.path.read_text()
    assert RIGHT not in text
    assert text.startswith("ada:scrypt$32768$8$1$")
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600
    assert hashed(RIGHT) != hashed(RIGHT)
    assert matches(RIGHT, hashed(RIGHT))
    assert not matches(WRONG, hashed(RIGHT))


def test_an_account_is_accepted_with_its_own_password_alone(kept):
    add_account(kept.path, "bob", WRONG)
    assert kept.accepts("ada", RIGHT)
    assert not kept.accepts("ada", WRONG)
    assert not kept.accepts("bob", RIGHT)
    assert not kept.accepts("", RIGHT)


@pytest.mark.parametrize("name", ["Ada", "../ada", "a b", "", "a" * 41, ".cache", "ada:x", "ada\n", "-"])
def test_names_that_could_be_a_path_or_a_line_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="A name must be"):
        add_account(tmp_path / "accounts.txt", name, RIGHT)


@pytest.mark.parametrize("password", ["", "short", "x" * 201])
def test_passwords_too_short_or_too_long_are_refused(tmp_path, password):
    with pytest.raises(InputError, match="8 to 200"):
        add_account(tmp_path / "accounts.txt", "ada", password)


def test_a_file_that_is_none_or_empty_or_malformed_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no account"):
        Accounts(tmp_path / "none.txt").check()
    (tmp_path / "bad.txt").write_text("ada:secret\n")
    with pytest.raises(InputError, match="Line 1"):
        Accounts(tmp_path / "bad.txt").check()


def test_an_unknown_name_takes_as_long_as_a_known_one(kept):
    def seconds(name):
        begun = time.thread_time()
        kept.accepts(name, WRONG)
        return time.thread_time() - begun

    known, unknown = (min(seconds(name) for _ in range(5)) for name in ("ada", "eve"))
    assert 0.5 < unknown / known < 2


def test_after_five_wrong_passwords_the_right_one_waits_too(kept):
    gate = LoginGate(kept)
    for _ in range(ATTEMPTS):
        assert not asked(gate, "ada", WRONG)
    with pytest.raises(HTTPException, match="Wait") as refused:
        asked(gate, "ada", RIGHT)
    assert refused.value.status_code == 429
    assert 0 < int(refused.value.headers["Retry-After"]) <= 61
    with pytest.raises(HTTPException, match="Wait"):
        asked(gate, "ada", RIGHT, client="10.0.0.2")
    with pytest.raises(HTTPException, match="Wait"):
        asked(gate, "bob", RIGHT)


def test_the_wait_ends_after_a_minute(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(accounts.time, "monotonic", lambda: now[0])
    throttle = Throttle()
    for _ in range(ATTEMPTS):
        assert throttle.begin("a", "ada") == 0
    assert throttle.begin("a", "ada") == 60
    now[0] += 59
    assert throttle.begin("a", "ada") == 1
    now[0] += 1.5
    assert throttle.begin("a", "ada") == 0


def test_a_right_password_wipes_the_slate(kept):
    gate = LoginGate(kept)
    for _ in range(3):
        for _ in range(ATTEMPTS - 1):
            assert not asked(gate, "ada", WRONG)
        assert asked(gate, "ada", RIGHT)


def test_fifty_guesses_at_once_hash_two_at_a_time_and_hold_up_nothing(kept, monkeypatch):
    most, running, lock = [0], [0], threading.Lock()
    real = accounts._scrypt

    def counted(*arguments):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            return real(*arguments)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(accounts, "_scrypt", counted)
    gate = LoginGate(kept)

    async def guess(number):
        client_address.set(f"10.0.1.{number}")
        try:
            return await gate.admits(f"name{number}", WRONG)
        except HTTPException as error:
            return error.status_code

    async def everything():
        guesses = asyncio.gather(*(guess(number) for number in range(50)))
        turns = 0
        while not guesses.done():
            await asyncio.sleep(0.005)
            turns += 1
        return guesses.result(), turns

    results, turns = apart(everything())
    assert most[0] <= 2
    assert set(results) == {False, 429}
    assert results.count(429) >= 50 - accounts.WAITING - 1
    assert turns > 10


def test_a_session_ends_with_its_time_its_password_and_its_account(kept, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(accounts.time, "monotonic", lambda: now[0])
    sessions = Sessions(kept)
    sessions["token"] = "ada"
    assert sessions.get("token") == "ada"
    assert sessions.get("other") is None
    assert sessions.get(None) is None
    now[0] += accounts.SESSION_SECONDS + 1
    assert sessions.get("token") is None
    sessions["second"] = "ada"
    assert list(sessions) == ["second"]
    add_account(kept.path, "ada", WRONG)
    assert sessions.get("second") is None
    sessions["third"] = "ada"
    kept.path.write_text("")
    assert sessions.get("third") is None
