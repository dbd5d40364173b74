"""Accounts: how passwords are stored, the limit on wrong passwords, and when a session ends."""

from __future__ import annotations

import asyncio
import stat
import threading
import time

import pytest
from argon2 import PasswordHasher
from fastapi import HTTPException
from limits.storage import memory
from processes import apart

from pipelines.errors import InputError
from webui import accounts
from webui.accounts import MAX_ATTEMPTS, Accounts, LoginGate, Sessions, add_account, client_address

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
    assert text.startswith("ada:$argon2id$v=19$m=32768,t=3,p=1$")
    assert stat.S_IMODE(accounts_file.path.stat().st_mode) == 0o600
    add_account(accounts_file.path, "ada", RIGHT)
    assert accounts_file.path.read_text() != text


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


def test_passwords_hashed_by_earlier_versions_are_refused_with_the_way_on(tmp_path):
    (tmp_path / "old.txt").write_text("ada:scrypt$32768$8$1$00$00\n")
    with pytest.raises(InputError, match=r"Line 1 of .*scrypt\). Delete the line and add the account again with --add_account"):
        Accounts(tmp_path / "old.txt").check()


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


def test_the_wait_ends_after_a_minute(accounts_file, monkeypatch):
    now = [1000.0]
    for module in (accounts, memory):
        monkeypatch.setattr(module.time, "time", lambda: now[0])
    gate = LoginGate(accounts_file)
    for _ in range(MAX_ATTEMPTS):
        assert not login(gate, "ada", WRONG)
    for passed, left in ((0, 60), (58, 2)):
        now[0] = 1000 + passed
        with pytest.raises(HTTPException, match=f"Wait {left + 1} seconds"):
            login(gate, "ada", RIGHT)
    now[0] = 1061
    assert login(gate, "ada", RIGHT)


def test_a_right_password_resets_the_count_of_wrong_ones(accounts_file):
    gate = LoginGate(accounts_file)
    for _ in range(3):
        for _ in range(MAX_ATTEMPTS - 1):
            assert not login(gate, "ada", WRONG)
        assert login(gate, "ada", RIGHT)


def test_of_fifty_parallel_guesses_two_are_hashed_at_a_time_and_the_event_loop_stays_free(accounts_file, monkeypatch):
    most, running, lock = [0], [0], threading.Lock()
    real = PasswordHasher.verify

    def counted(*arguments):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            return real(*arguments)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(PasswordHasher, "verify", counted)
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
    assert results.count(429) >= 50 - accounts.MAX_WAITING - accounts.MAX_HASHING
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
