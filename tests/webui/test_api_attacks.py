"""Attacks on every public endpoint through each of its arguments, by a user with an account."""

from __future__ import annotations

import json
import os

import httpx
import pytest
from gradio_client import Client
from hostile import png_bytes

from webui.accounts import add_account

PASSWORDS = {"ada": "correct horse", "bob": "battery staple"}
CANARY = "the secret of ada"
RUN = "20260101-000000-abcdef"


@pytest.fixture(scope="module")
def server(app_server, tmp_path_factory):
    """A server with two accounts, a run of each, and files that nobody may read."""
    accounts = tmp_path_factory.mktemp("accounts") / "accounts.txt"
    for name, password in PASSWORDS.items():
        add_account(accounts, name, password)
    started = app_server("--accounts", str(accounts))
    outside = tmp_path_factory.mktemp("outside")
    for folder in (started.runs / "ada" / f"{RUN}-ada", started.runs / "bob" / f"{RUN}-bob", outside / "run", outside / "photos"):
        folder.mkdir(parents=True)
        secret = "" if folder.name.endswith("bob") else CANARY
        (folder / "status.json").write_text(json.dumps({"state": "done", "step": 1, "total": 1, "phase": secret}))
        (folder / "options.json").write_text(json.dumps({"data": {"instance_prompt": secret}}))
        (folder / "secret.txt").write_text(secret)
        (folder / "1.png").write_bytes(png_bytes())
    theirs = started.uploads / "ada" / "20260101-000000-aaaaaa"
    theirs.mkdir(parents=True)
    (theirs / "0001.png").write_bytes(png_bytes())
    os.symlink(outside / "run", started.runs / "bob" / "20260101-000000-linked")
    started.outside, started.theirs, started.accounts = outside, theirs, accounts
    return started


@pytest.fixture(scope="module")
def bob(server):
    with httpx.Client(base_url=server.url, timeout=300) as client:
        answer = client.post("/login", data={"username": "bob", "password": PASSWORDS["bob"]})
        assert answer.status_code == 200
        yield client


@pytest.fixture(scope="module")
def endpoints(bob):
    """The arguments of each public endpoint, from Gradio's API info."""
    return {name: told["parameters"] for name, told in bob.get("/gradio_api/info").json()["named_endpoints"].items()}


def called(client, endpoint, arguments):
    """The events of the endpoint's response, or the refusal."""
    asked = client.post(f"/gradio_api/call{endpoint}", json={"data": arguments})
    if asked.status_code != 200:
        return f"refused {asked.status_code}: {asked.text}"
    return client.get(f"/gradio_api/call{endpoint}/{asked.json()['event_id']}").text


def honest(parameter):
    """A valid value of an argument."""
    if parameter.get("parameter_has_default"):
        return parameter["parameter_default"]
    named = {"run": f"{RUN}-bob", "task": "subject", "options": {}, "images": [], "prompt": "a star"}
    return named.get(parameter["parameter_name"], "")


def paths(server):
    """Paths that lead out of the user's folder."""
    return [
        "../ada/" + f"{RUN}-ada",
        f"{RUN}-ada",
        f"../../runs/ada/{RUN}-ada",
        str(server.runs / "ada" / f"{RUN}-ada"),
        str(server.outside / "run"),
        "20260101-000000-linked",
        "/etc",
        "../..",
        "..",
        ".",
        "%2e%2e%2fada",
        f"{RUN}-bob/../../ada/{RUN}-ada",
        f"{RUN}-bob\x00",
        "~",
        "$(touch /tmp/was-run)",
        "file:///etc/passwd",
    ]


def files(server):
    """References to files that were not uploaded."""
    named = [server.outside / "photos" / "1.png", server.theirs / "0001.png", server.accounts, "/etc/passwd"]
    given = [str(path) for path in named] + [
        f"{server.uploads}/.cache/../ada/{server.theirs.name}/0001.png",
        "http://127.0.0.1:1/",
    ]
    return [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in given]


def options(server):
    """Options that refer to folders, models and programs of the machine."""
    theirs = f"{server.uploads}/bob/../ada/{server.theirs.name}"
    folders = [str(server.outside / "photos"), str(server.theirs), "/etc", "../../ada", theirs]
    fields = {
        "data": ("instance_data_dir", "class_data_dir", "cache_dir"),
        "model": ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"),
        "output": ("output_dir", "resume_from_checkpoint", "hub_token"),
        "validation": ("image_scorer",),
    }
    given = [{group: {name: folder}} for group, names in fields.items() for name in names for folder in folders]
    return [
        *given,
        {"data": {"instance_prompt": ["--output_dir", "/tmp/evil"]}},
        {"data": {"instance_prompt\n--push_to_hub": "x"}},
        {"output": {"push_to_hub": True}},
        {"../data": {}},
        {"__class__": {"__init__": "x"}},
    ]


def snapshot(server):
    """Everything that bob must neither see nor change."""
    roots = (server.outside, server.runs / "ada", server.theirs)
    return {path: path.read_bytes() if path.is_file() else None for root in roots for path in sorted(root.rglob("*"))}


def test_only_the_endpoints_of_the_app_are_public(endpoints):
    assert {"/start", "/status", "/stop", "/generate", "/classify", "/list"} == set(endpoints)


def attacks(server, parameter):
    """The attacks on an argument: all of them for a run, files or options, a few for a number or text."""
    listed = [[each] for each in files(server)]
    by_name = {"run": paths(server), "images": [*listed, *files(server)[:2]], "options": options(server), "prompt": []}
    return by_name.get(parameter["parameter_name"], [paths(server)[0], files(server)[0]])


@pytest.mark.slow(12)
def test_no_argument_of_any_endpoint_leads_out_of_the_users_folders(server, bob, endpoints):
    before, runs, asked = snapshot(server), sorted(os.listdir(server.runs / "bob")), 0
    for endpoint, parameters in endpoints.items():
        for place, parameter in enumerate(parameters):
            for attack in attacks(server, parameter):
                arguments = [honest(each) for each in parameters]
                arguments[place] = attack
                answer = called(bob, endpoint, arguments)
                what = f"{endpoint} {parameter['parameter_name']}={attack!r}: {answer}"
                assert "event: error" in answer or answer.startswith("refused"), what
                assert not any(words in answer for words in ("event: complete", CANARY, "root:", "Traceback")), what
                asked += 1
    assert asked > 100
    assert snapshot(server) == before
    assert sorted(os.listdir(server.runs / "bob")) == runs


def test_each_user_lists_only_their_own_runs(server):
    for name, password in PASSWORDS.items():
        client = Client(server.url, verbose=False, auth=(name, password), download_files=False)
        assert [run["run"] for run in client.predict(api_name="/list")] == [f"{RUN}-{name}"]
        assert client.predict(f"{RUN}-{name}", api_name="/status")["state"] == "done"


def test_only_the_user_who_called_an_endpoint_can_fetch_its_result(server, bob):
    event = bob.post("/gradio_api/call/list", json={"data": []}).json()["event_id"]
    with httpx.Client(base_url=server.url, timeout=120) as ada:
        ada.post("/login", data={"username": "ada", "password": PASSWORDS["ada"]})
        assert ada.get(f"/gradio_api/call/list/{event}").status_code == 403
    assert f"{RUN}-bob" in bob.get(f"/gradio_api/call/list/{event}").text
