"""The server as a user starts it: what it refuses, what it loads, and how it stops."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from app_process import REPOSITORY
from browsing import go_to
from hostile import png_bytes

from webui.server import FIRST_PORT, main

HOSTILE = "<img src='x-hostile' onerror='window.hacked=1'><script>window.hacked=1</script>$(touch x)`id`"
SCREENS = ("photos", "check", "train", "judge", "use", "classify", "runs")


def loads_torch(server):
    return "libtorch" in Path(f"/proc/{server.process.pid}/maps").read_text()


@pytest.fixture(scope="module")
def server(app_server):
    return app_server()


@pytest.mark.parametrize(
    "options",
    [
        ["--host", "0.0.0.0"],
        ["--host", "::"],
        ["--host", "192.168.1.2"],
        ["--share"],
        ["--share", "--host", "127.0.0.1"],
        ["--host", "0.0.0.0", "--accounts", "/nowhere/accounts.txt"],
        ["--share", "--accounts", "/nowhere/accounts.txt"],
        ["--port", "99999"],
    ],
    ids=" ".join,
)
def test_the_server_does_not_start_if_others_could_use_it_without_a_password(options, tmp_path, capsys):
    assert main(["--runs_dir", str(tmp_path / "runs"), "--uploads_dir", str(tmp_path / "uploads"), *options]) == 2
    told = capsys.readouterr().err
    assert len(told.strip().splitlines()) == 1
    assert re.search(r"--add_account NAME|--port must be", told)
    assert not (tmp_path / "runs").exists()


def test_environment_variables_of_gradio_do_not_weaken_the_server(app_server):
    variables = {
        "GRADIO_SHARE": "True",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_ALLOWED_PATHS": "/",
        "GRADIO_MCP_SERVER": "True",
        "GRADIO_RUN_HISTORY": "True",
        "GRADIO_VIBE_MODE": "1",
        "GRADIO_TEMP_DIR": "/tmp/elsewhere",
    }
    server = app_server(environment=variables, forked=False)
    assert server.url.startswith("http://127.0.0.1:")
    assert {each.laddr.ip for each in psutil.Process(server.process.pid).net_connections() if each.status == "LISTEN"} == {
        "127.0.0.1"
    }
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file=/etc/hostname"):
        assert httpx.get(server.url.rstrip("/") + path, timeout=60).status_code == 403
    assert httpx.get(f"{server.url}gradio_api/mcp/", timeout=60).status_code == 404


def test_a_port_that_is_taken_is_reported_in_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ["app.py", "--port", port, "--runs_dir", tmp_path / "r", "--uploads_dir", tmp_path / "u"]
        ended = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert f"Port {port} is taken" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_account_is_added_on_the_command_line_without_showing_the_password(tmp_path):
    pty = pytest.importorskip("pty")
    path, shown = tmp_path / "accounts.txt", b""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        os.execv(sys.executable, [sys.executable, "app.py", "--accounts", str(path), "--add_account", "ada"])
    for prompt in (b"Password for ada: ", b"Repeat the password: "):
        while not shown.endswith(prompt):
            shown += os.read(terminal, 1024)
        os.write(terminal, b"correct horse\n")
    _, state = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(state) == 0
    assert b"correct horse" not in shown
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("ada:$argon2id$")


def test_it_serves_without_model_libraries_restarts_after_a_kill_at_the_same_address_and_stops_at_ctrl_c(app_server):
    server = app_server(forked=False)
    page = httpx.get(server.url, timeout=120)
    assert page.status_code == 200
    assert "photos-upload" in page.text
    assert not loads_torch(server)

    before = server.url
    server.restart()
    assert server.url == before
    assert httpx.get(server.url, timeout=120).status_code == 200

    assert server.interrupt() == 0
    assert "Traceback" not in server.log.read_text()


def test_without_a_port_it_takes_the_first_free_one(app_server):
    with socket.socket() as taken:
        # A server of another test may have it, and give it back before this one starts.
        for _ in range(120):
            with contextlib.suppress(OSError):
                taken.bind(("127.0.0.1", FIRST_PORT))
                taken.listen()
                break
            time.sleep(0.5)
        server = app_server(own_port=False)
    assert FIRST_PORT < int(server.url.rstrip("/").rpartition(":")[2]) < FIRST_PORT + 100


@pytest.mark.slow(30)
def test_names_that_contain_html_or_shell_code_are_shown_as_text(server, new_page, tmp_path):
    run = server.runs / "20260101-000000-abcdef"
    run.mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text(json.dumps({"state": "failed", "phase": HOSTILE, "step": 1, "total": 2, "error": HOSTILE}))
    (run / "options.json").write_text(
        json.dumps({"data": {"instance_prompt": HOSTILE, "class_prompt": HOSTILE}, "output": {"validation_prompt": [HOSTILE]}})
    )
    (run / "launch.json").write_text(json.dumps({"task": "subject", "command": ["x", HOSTILE], "created": 1.0, "name": HOSTILE}))
    photo = tmp_path / (HOSTILE.replace("/", "") + ".png")
    photo.write_bytes(png_bytes(1, 96))
    bad = tmp_path / (HOSTILE.replace("/", "") + "bad.png")
    bad.write_bytes(b"no image")
    page = new_page(server.url)
    page.set_input_files("#photos-upload input[type=file]", [photo, bad])
    # The names of runs on the other screens have the same text, and may come first.
    page.get_by_text("x-hostile").locator("visible=true").first.wait_for(timeout=120_000)
    # The first refresh is complete.
    page.locator("#run summary").first.wait_for(state="attached", timeout=120_000)
    for screen in SCREENS:
        go_to(page, screen)
        page.wait_for_timeout(500)
        assert page.locator("[src='x-hostile'], [src$='/x-hostile']").count() == 0, screen
        assert page.evaluate("window.hacked === undefined"), screen
