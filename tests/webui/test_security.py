"""Attacks on the server over HTTP, without and with accounts."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from hostile import png_bytes
from processes import apart, wait_for

from webui.accounts import add_account
from webui.security import Guard
from webui.workspace import Settings

PASSWORDS = {"ada": "correct horse", "bob": "battery staple"}
PAGE = {"sec-fetch-site": "same-origin"}


@pytest.fixture(scope="module")
def server(app_server):
    """A server without accounts, as on the user's own machine."""
    return app_server()


@pytest.fixture(scope="module")
def accounts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("accounts") / "accounts.txt"
    for name, password in PASSWORDS.items():
        add_account(path, name, password)
    return path


@pytest.fixture(scope="module")
def guarded(app_server, accounts_file):
    """A server with accounts."""
    return app_server("--accounts", str(accounts_file))


@pytest.fixture(scope="module")
def besieged(app_server, accounts_file):
    """Another server with accounts, whose sign-in the test of the password limit locks."""
    return app_server("--accounts", str(accounts_file))


@contextmanager
def signed_in(server, name):
    with httpx.Client(base_url=server.url, timeout=120) as client:
        answer = client.post("/login", data={"username": name, "password": PASSWORDS[name]})
        assert answer.status_code == 200, answer.text
        yield client


def uploaded(client, name, content):
    answer = client.post("/gradio_api/upload", files={"files": (name, content)})
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


def served(client, path, **headers):
    return client.get(f"/gradio_api/file={path}", headers=headers)


@pytest.fixture
def own(server):
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.svg", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'),
        ("a.html", b"<script>alert(1)</script>"),
        ("a.xhtml", b"<script>alert(1)</script>"),
        ("a.js", b"alert(1)"),
        ("a.pdf", b"%PDF-1.4"),
    ],
)
def test_files_that_a_browser_could_run_are_served_as_downloads(own, name, content):
    answer = served(own, uploaded(own, name, content))
    assert answer.status_code == 200
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_html_named_as_an_image_is_served_as_an_image_without_sniffing(own):
    answer = served(own, uploaded(own, "a.png", b"<script>alert(1)</script>"))
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_an_uploaded_file_name_never_leaves_the_cache(server, own):
    for name in ("../../../../evil.png", "/etc/evil.png", "..\\..\\evil.png", "a\x00b.png", "$(touch evil).png", ".bashrc"):
        path = Path(uploaded(own, name, png_bytes()))
        assert path.is_relative_to(server.uploads / ".cache")
        assert re.fullmatch(r"[0-9a-f]{64}", path.parent.name)


def test_the_cache_is_closed_to_other_users_of_the_machine(server):
    assert (server.uploads / ".cache").stat().st_mode & 0o777 == 0o700


def test_no_file_outside_the_cache_is_served(server, own, tmp_path):
    secret = server.uploads / "secret.txt"
    secret.write_text("secret")
    run = server.runs / "20260101-000000-abcdef"
    run.mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text('{"state": "done", "secret": 1}')
    cache = server.uploads / ".cache"
    for path in (
        "/etc/passwd",
        "../../../../etc/passwd",
        "app.py",
        "README.md",
        str(secret),
        f"{cache}/../secret.txt",
        f"{cache}/%2e%2e/secret.txt",
        f"{cache}/..%2fsecret.txt",
        str(run / "status.json"),
        f"{cache}",
        "",
        "/proc/self/environ",
        "file:///etc/passwd",
    ):
        answer = served(own, path)
        assert answer.status_code in (403, 404), path
        assert "secret" not in answer.text
        assert "root:" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/file=https://example.org/a.png",
        "/gradio_api/proxy=https://example.org/",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/token",
        "/gradio_api/dev/reload",
        "/gradio_api/vibe-code",
        "/gradio_api/runs",
        "/gradio_api/run-history/records",
        "/gradio_api/deep_link",
        "/monitoring",
        "/monitoring/summary",
        "/docs",
        "/redoc",
    ],
)
def test_endpoints_of_gradio_that_the_app_does_not_need_are_disabled(own, path):
    assert own.get(path).status_code == 404


def test_every_response_has_the_security_headers(own):
    for path in ("/", "/config", "/gradio_api/info", "/nowhere", "/gradio_api/file=/etc/passwd", "/theme.css"):
        headers = own.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["permissions-policy"] == "camera=(self), microphone=(), geolocation=()"


def test_the_page_has_its_own_icon_and_card(own):
    page = own.get("/").text
    assert 'property="og:title" content="NoRA Vision"' in page
    assert not re.search("gradio", " ".join(re.findall(r"<meta[^>]*(?:og:|twitter:)[^>]*>", page)), re.IGNORECASE)
    (card,) = set(re.findall(r'(?:og|twitter):image" content="([^"]+)"', page))
    assert own.get(card).headers["content-type"] == "image/png"
    assert "svg" in own.get("/favicon.ico").headers["content-type"]


def test_a_host_header_puts_no_markup_into_the_page(guarded):
    answer = httpx.get(f"{guarded.url}/", headers={"host": 'x"><script>alert(1)</script>'})
    assert "alert(1)" not in answer.text


def test_what_runs_is_told_only_to_the_user_whose_runs_they_are(server, guarded):
    run = server.runs / "20260101-000000-abcdef"
    run.mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text('{"state": "done"}')
    assert [each["id"] for each in httpx.get(f"{server.url}activity").json()["runs"]] == [run.name]
    assert httpx.get(f"{guarded.url}activity").status_code == 401
    theirs = guarded.runs / "ada" / run.name
    theirs.mkdir(parents=True)
    (theirs / "status.json").write_text('{"state": "done"}')
    for name, count in (("ada", 1), ("bob", 0)):
        with signed_in(guarded, name) as client:
            assert len(client.get("/activity").json()["runs"]) == count


def test_scripts_carry_a_nonce_that_is_new_in_each_response(own):
    answers = [own.get("/") for _ in range(2)]
    numbers = [re.search(r"'nonce-(\w+)'", answer.headers["content-security-policy"])[1] for answer in answers]
    assert numbers[0] != numbers[1]
    for answer, number in zip(answers, numbers, strict=True):
        assert answer.text.count("<script") == answer.text.count(f"<script nonce={number}") > 2
        assert "'unsafe-inline'" not in re.search("script-src [^;]*", answer.headers["content-security-policy"])[0]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        (PAGE, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:1"}, 403),
        ({"host": "evil.example"}, 400),
        ({"host": "127.0.0.1.evil.example:7860"}, 400),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
    ],
)
def test_requests_from_other_websites_are_refused(own, headers, status):
    assert own.get("/config", headers=headers).status_code == status


def test_a_link_on_another_website_may_only_open_the_page(own):
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert own.get("/", headers=followed).status_code == 200
    assert own.get("/config", headers=followed).status_code == 403
    assert own.post("/", headers=followed).status_code == 403


def test_an_upload_above_the_limit_is_refused(server, own):
    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\n'
        for _ in range(600):
            yield bytes(2**20)
        yield b"\r\n--x--\r\n"

    answer = own.post("/gradio_api/upload", content=endless(), headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 413
    assert sum(path.stat().st_size for path in (server.uploads / ".cache").rglob("*") if path.is_file()) < 100 * 2**20


def test_an_upload_that_is_cut_leaves_no_file(server, own):
    """As when the page is reloaded meanwhile: one file has arrived, the other one has not."""
    parts = server.uploads / ".cache"

    def cut():
        head = 'Content-Disposition: form-data; name="files"; filename="{}"\r\nContent-Type: image/png\r\n\r\n'
        yield f"--x\r\n{head.format('a.png')}".encode() + png_bytes() + f"\r\n--x\r\n{head.format('b.png')}".encode()
        yield bytes(2**20)
        wait_for(lambda: len(list(parts.glob("tmp*"))) == 2)
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        own.post("/gradio_api/upload", content=cut(), headers={"content-type": "multipart/form-data; boundary=x"})
    wait_for(lambda: not list(parts.glob("tmp*")))


def test_the_progress_of_an_upload_ends_with_its_connection(tmp_path):
    """A page that is left at once closes the connection before anything was read from it."""
    answered = []

    async def progress(scope, receive, send):
        answered.append(await receive())

    async def closed():
        return {"type": "http.disconnect"}

    guard = Guard(progress, Settings(tmp_path, tmp_path), tmp_path, "")
    address = {"path": "/gradio_api/upload_progress", "query_string": b"upload_id=a", "headers": [], "method": "GET"}
    apart(guard({"type": "http", "client": None, **address}, closed, None))
    assert answered == [{"type": "http.disconnect"}]


@pytest.mark.parametrize(
    "request_",
    [
        ("GET", "/config"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/queue/data?session_hash=abc"),
        ("GET", "/gradio_api/queue/status"),
        ("GET", "/gradio_api/heartbeat/abc"),
        ("GET", "/gradio_api/call/list/00000000000000000000000000000000"),
        ("GET", "/gradio_api/custom_component/1/client/component/index.js"),
        ("GET", "/gradio_api/nowhere"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/cancel"),
        ("POST", "/gradio_api/reset"),
        ("POST", "/gradio_api/call/list"),
        ("POST", "/gradio_api/run/list"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/stream/abc"),
    ],
    ids=" ".join,
)
def test_without_signing_in_only_the_sign_in_page_answers(guarded, request_):
    method, path = request_
    with httpx.Client(base_url=guarded.url, timeout=120) as stranger:
        assert stranger.request(method, path, json={} if method == "POST" else None).status_code == 401
        stranger.cookies.set("access-token-unsecure-x", "guess")
        assert stranger.request(method, path, json={} if method == "POST" else None).status_code == 401


def test_the_sign_in_page_shows_nothing_of_the_app(guarded):
    page = httpx.get(guarded.url).text
    assert '"auth_required": true' in page.replace('":true', '": true')
    assert "photos-upload" not in page


def test_a_wrong_password_is_refused(guarded):
    with httpx.Client(base_url=guarded.url, timeout=120) as client:
        for name, password in (("ada", PASSWORDS["bob"]), ("", ""), ("ADA", PASSWORDS["ada"])):
            assert client.post("/login", data={"username": name, "password": password}).status_code in (400, 422)
        assert not client.cookies
        assert client.get("/config").status_code == 401
    with signed_in(guarded, "ada") as client:
        assert client.get("/config").status_code == 200


def test_a_file_is_served_only_to_the_users_who_uploaded_it(guarded):
    with signed_in(guarded, "ada") as ada, signed_in(guarded, "bob") as bob, httpx.Client(base_url=guarded.url) as stranger:
        path = uploaded(ada, "a.png", png_bytes(1))
        assert served(ada, path).content == png_bytes(1)
        assert served(bob, path).status_code == 403
        assert served(stranger, path).status_code == 401
        # Nor as the argument of another user's event.
        asked = {"fn_index": 0, "session_hash": "bobs", "data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
        assert bob.post("/gradio_api/queue/join", json=asked).status_code == 403
        # A user who uploads the same image may load it.
        assert uploaded(bob, "a.png", png_bytes(1)) == path
        assert served(bob, path).status_code == 200


def test_the_events_of_a_session_answer_only_its_user(guarded):
    with signed_in(guarded, "ada") as ada, signed_in(guarded, "bob") as bob:
        load = next(each["id"] for each in ada.get("/config").json()["dependencies"] if not each["inputs"])
        joined = ada.post("/gradio_api/queue/join", json={"fn_index": load, "session_hash": "adas", "data": []})
        assert joined.status_code in (200, 422), joined.text
        for method, path, body in (
            ("GET", "/gradio_api/queue/data?session_hash=adas", None),
            ("GET", "/gradio_api/heartbeat/adas", None),
            ("POST", "/gradio_api/queue/join", {"fn_index": load, "session_hash": "adas", "data": []}),
            ("POST", "/gradio_api/cancel", {"fn_index": load, "session_hash": "adas", "event_id": "x"}),
            ("POST", "/gradio_api/component_server", {"session_hash": "adas", "component_id": 1, "fn_name": "ls", "data": []}),
        ):
            assert bob.request(method, path, json=body).status_code == 403, path


def test_signing_out_ends_every_session_of_the_user(guarded):
    with signed_in(guarded, "ada") as here, signed_in(guarded, "ada") as there, signed_in(guarded, "bob") as bob:
        here.get("/logout")
        assert [client.get("/config").status_code for client in (here, there, bob)] == [401, 401, 200]


def test_fifty_wrong_passwords_in_a_second_are_limited_and_the_page_still_answers(besieged):
    process = psutil.Process(besieged.process.pid)

    async def guess(client, number):
        name = "ada" if number % 2 else f"name{number}"
        return (await client.post("/login", data={"username": name, "password": f"wrong {number}"})).status_code

    async def attack():
        async with httpx.AsyncClient(base_url=besieged.url, timeout=120) as client:
            await client.get("/")
            before, begun = process.cpu_times().user, time.monotonic()
            guesses = [asyncio.create_task(guess(client, number)) for number in range(50)]
            await asyncio.sleep(0.05)
            page = await client.get("/")
            statuses = await asyncio.gather(*guesses)
            return statuses, page.status_code, process.cpu_times().user - before, time.monotonic() - begun

    statuses, page, spent, _ = apart(attack())
    assert page == 200
    assert set(statuses) == {400, 429}
    assert statuses.count(400) <= 5
    assert spent < 5
    with httpx.Client(base_url=besieged.url, timeout=120) as client:
        answer = client.post("/login", data={"username": "ada", "password": PASSWORDS["ada"]})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) <= 61
    assert "Wait" in answer.json()["detail"]
