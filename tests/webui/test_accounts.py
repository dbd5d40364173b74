"""Accounts: how passwords are stored, the limit on wrong passwords, and when a session ends."""

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
from webui.accounts import MAX_ATTEMPTS, Accounts, LoginGate, Sessions, Throttle, add_account, client_address, hashed, matches

RIGHT, WRONG = "correct horse", "battery staple"


@pytest.fixture
def accounts_file(tmp_path):
    add_account(tmp_path / "accounts.txt", "ada", RIGHT)
    return Accounts(tmp_path / "accounts.txt")


def login(gate, name, password, client="10.0.0.1"):
    client_address.set(client)
    return apart(gate.admits(name, password))


def test_passwords_are_stored_salted_and_hashed_in_a_file_that_only_its_owner_can_read(accounts_file):
    text = accounts_file.path.read_text()
    assert RIGHT not in text
    assert text.startswith("ada:scrypt$32768$8$1$")
    assert stat.S_IMODE(accounts_file.path.stat().st_mode) == 0o600
    assert hashed(RIGHT) != hashed(RIGHT)
    assert matches(RIGHT, hashed(RIGHT))
    assert not matches(WRONG, hashed(RIGHT))


def test_an_account_is_accepted_only_with_its_own_password(accounts_file):
    add_account(accounts_file.path, "bob", WRONG)
    assert accounts_file.accepts("ada", RIGHT)
    assert not accounts_file.accepts("ada", WRONG)
    assert not accounts_file.accepts("bob", RIGHT)
    assert not accounts_file.accepts("", RIGHT)


@pytest.mark.parametrize("name", ["Ada", "../ada", "a b", "", "a" * 41, ".cache", "ada:x", "ada\n", "-"])
def test_names_that_could_be_a_path_or_break_a_line_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="A name must have"):
        add_account(tmp_path / "accounts.txt", name, RIGHT)


@pytest.mark.parametrize("password", ["", "short", "x" * 201])
def test_passwords_that_are_too_short_or_too_long_are_refused(tmp_path, password):
    with pytest.raises(InputError, match="8 to 200"):
        add_account(tmp_path / "accounts.txt", "ada", password)


def test_a_missing_or_malformed_accounts_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="contains no account"):
        Accounts(tmp_path / "none.txt").check()
    (tmp_path / "bad.txt").write_text("ada:secret\n")
    with pytest.raises(InputError, match="Line 1"):
        Accounts(tmp_path / "bad.txt").check()


def test_an_unknown_name_takes_as_long_as_an_existing_one(accounts_file):
    def seconds(name):
        begun = time.thread_time()
        accounts_file.accepts(name, WRONG)
        return time.thread_time() - begun

    known, unknown = (min(seconds(name) for _ in range(5)) for name in ("ada", "eve"))
    assert 0.5 < unknown / known < 2


def test_after_five_wrong_passwords_the_right_one_must_wait_too(accounts_file):
    gate = LoginGate(accounts_file)
    for _ in range(MAX_ATTEMPTS):
        assert not login(gate, "ada", WRONG)
    with pytest.raises(HTTPException, match="Wait") as refused:
        login(gate, "ada", RIGHT)
    assert refused.value.status_code == 429
    assert 0 < int(refused.value.headers["Retry-After"]) <= 61
    with pytest.raises(HTTPException, match="Wait"):
        login(gate, "ada", RIGHT, client="10.0.0.2")
    with pytest.raises(HTTPException, match="Wait"):
        login(gate, "bob", RIGHT)


def test_the_wait_ends_after_a_minute(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(accounts.time, "monotonic", lambda: now[0])
    throttle = Throttle()
    for _ in range(MAX_ATTEMPTS):
        assert throttle.begin("a", "ada") == 0
    assert throttle.begin("a", "ada") == 60
    now[0] += 59
    assert throttle.begin("a", "ada") == 1
    now[0] += 1.5
    assert throttle.begin("a", "ada") == 0


def test_a_right_password_resets_the_count_of_wrong_ones(accounts_file):
    gate = LoginGate(accounts_file)
    for _ in range(3):
        for _ in range(MAX_ATTEMPTS - 1):
            assert not login(gate, "ada", WRONG)
        assert login(gate, "ada", RIGHT)


def test_of_fifty_parallel_guesses_two_are_hashed_at_a_time_and_the_event_loop_stays_free(accounts_file, monkeypatch):
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
    gate = LoginGate(accounts_file)

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
    assert results.count(429) >= 50 - accounts.MAX_WAITING - 1
    assert turns > 10


def test_a_session_ends_after_a_week_or_when_its_password_or_account_changes(accounts_file, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(accounts.time, "monotonic", lambda: now[0])
    sessions = Sessions(accounts_file)
    sessions["token"] = "ada"
    assert sessions.get("token") == "ada"
    assert sessions.get("other") is None
    assert sessions.get(None) is None
    now[0] += accounts.SESSION_SECONDS + 1
    assert sessions.get("token") is None
    sessions["second"] = "ada"
    assert list(sessions) == ["second"]
    add_account(accounts_file.path, "ada", WRONG)
    assert sessions.get("second") is None
    sessions["third"] = "ada"
    accounts_file.path.write_text("")
    assert sessions.get("third") is None
