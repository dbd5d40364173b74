"""The files of the container image are checked; where a container engine answers, the image is built and started."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest
from app_process import free_port
from documented import ROOT, code_blocks, pages

import nora_vision_cli
from pipelines.errors import InputError
from webui import server
from webui.accounts import add_account

# What a build must not send to the engine: large, private, or of no use to the wheel.
LEFT_OUT = (
    ".git/config", ".ci/run", ".venv/bin/python", "accounts.txt", "build/lib/nora_vision/layer.py", "docs/index.md",
    "dist/nora_vision.whl", "nora_vision/__pycache__/layer.cpython-311.pyc", "runs/RUN/status.json", "site/index.html",
    "tests/conftest.py", "uploads/ada/photo.png", ".mypy_cache/3.11/cache.json", ".pytest_cache/README.md", ".ruff_cache/tag",
)  # fmt: skip
# Stands in for every program that the image's build calls, and writes down what it was called with.
STAND_IN = '#!/bin/sh\nprintf "%s\\0" "$0" "$@" >>"$CALLS"\nprintf "\\n" >>"$CALLS"\n'
CPU, GPU = re.compile(r"python:3\.\d+-slim-\w+"), re.compile(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.\d\d")


def instructions():
    """The instructions of the Dockerfile, in order, with their text."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line]


def texts(name, lines=None):
    return [text for instruction, text in lines or instructions() if instruction == name]


def final_stage():
    lines = instructions()
    return lines[max(index for index, (name, _) in enumerate(lines) if name == "FROM") :]


def words_of(name):
    """What an instruction of the final stage starts, in its exec form."""
    (text,) = texts(name, final_stage())
    return json.loads(text[text.index("[") :])


def app_flags(folder):
    """The flags of the image's app, with its volume at `folder` and a port that is free."""
    name, *flags = words_of("CMD")
    assert (words_of("ENTRYPOINT"), name) == (["nora-vision"], "app")
    (volume,), (port,) = texts("VOLUME"), texts("EXPOSE")
    assert (flags.count(port), sum(flag.startswith(f"{volume}/") for flag in flags)) == (1, 3)
    return [str(free_port()) if flag == port else flag.replace(volume, str(folder)) for flag in flags]


def is_ignored(path):
    """Whether .dockerignore leaves `path` out: the last pattern that matches it, or a folder above it, decides."""
    parents = [path, *map(str, Path(path).parents)]
    ignored = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
            if any(re.fullmatch(pattern, parent) for parent in parents):
                ignored = not line.startswith("!")
    return ignored


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"git cannot list the files of this checkout: {listed.stderr}")
    return listed.stdout.split("\0")[:-1]


def docker_commands():
    return [command.words for block in code_blocks("bash") for command in block.commands() if command.words[0] == "docker"]


def values_of(words, flag):
    return [words[index + 1] for index, word in enumerate(words) if word == flag]


def test_every_copied_file_is_in_git_and_reaches_the_engine():
    tracked = tracked_files()
    copies = [source for text in texts("COPY") for source in text.split()[:-1]]
    assert all(source == "." or (source in tracked and not is_ignored(source)) for source in copies)


def test_the_engine_gets_what_the_wheel_is_built_from_and_nothing_else():
    assert [path for path in LEFT_OUT if not is_ignored(path)] == []
    sent = [path for path in tracked_files() if not is_ignored(path)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {"nora_vision", "pipelines", "training", "webui", "assets"}
    files = {"pyproject.toml", "setup.py", "requirements.txt", "nora_vision_cli.py", project["project"]["readme"], "LICENSE"}
    assert {path.partition("/")[0] for path in sent} == packages | files
    data = project["tool"]["setuptools"]["package-data"]
    for package, patterns in data.items():
        folder = ROOT / {"nora_vision_assets": "assets"}.get(package, package)
        needed = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
        assert needed, patterns
        assert {path.relative_to(ROOT).as_posix() for path in needed} <= set(sent)


def test_both_bases_are_pinned():
    (declared,) = (text for text in texts("ARG") if text.startswith("BASE="))
    assert CPU.fullmatch(declared.removeprefix("BASE="))
    given = [value for words in docker_commands() for value in values_of(words, "--build-arg") if value.startswith("BASE=")]
    assert len(given) == 1
    assert GPU.fullmatch(given[0].removeprefix("BASE="))
    stages = {text.partition(" AS ")[2] for text in texts("FROM")}
    assert {text.partition(" AS ")[0] for text in texts("FROM")} <= {"${BASE}", *stages}


def test_the_container_runs_without_root_and_its_user_owns_the_volume():
    (user,), (volume,) = texts("USER"), texts("VOLUME")
    (created,) = (text for text in texts("RUN") if "useradd" in text)
    assert user not in ("root", "0")
    assert re.search(rf"useradd --uid [1-9]\d* .*{user} && install --directory --owner {user} {volume}$", created)
    after = [name for name, _ in final_stage()][[name for name, _ in final_stage()].index("USER") :]
    assert not {"RUN", "COPY", "ADD"} & set(after)
    environment = dict(pair.split("=", 1) for text in texts("ENV", final_stage()) for pair in shlex.split(text))
    assert all(environment[name].startswith(volume) for name in ("HOME", "HF_HOME"))


def test_the_documented_commands_fit_the_image():
    arguments = {text.partition("=")[0] for text in texts("ARG")}
    (volume,), (port,) = texts("VOLUME"), texts("EXPOSE")
    for words in docker_commands():
        assert {value.partition("=")[0] for value in values_of(words, "--build-arg")} <= arguments
        assert {value.rpartition(":")[2] for value in values_of(words, "--volume")} <= {volume}
        # Where this machine alone reaches it.
        assert {*values_of(words, "--publish")} <= {f"127.0.0.1:{port}:{port}"}
        image = next(index for index, word in enumerate(words) if word.startswith("nora-vision") and ":/" not in word)
        assert words[1] == "build" or {*words[image + 1 : image + 2]} <= {*nora_vision_cli.SUBCOMMANDS}


def test_the_requirements_are_those_of_the_package_in_the_tested_versions(tmp_path):
    (script,) = (text for text in texts("RUN") if "pip install --constraint" in text)
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").write_text(STAND_IN)
    (tmp_path / "bin" / "pip").chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "CALLS": str(tmp_path / "calls"),
        "TORCH_INDEX": "https://torch.test",
    }
    subprocess.run(["/bin/sh", "-c", script], cwd=tmp_path, env=environment, check=True)

    calls = [call.split("\0")[1:-1] for call in (tmp_path / "calls").read_text().splitlines()]
    assert calls == [
        ["install", "--index-url", "https://torch.test", "--constraint", "pins.txt", "torch", "torchvision"],
        ["install", "--constraint", "pins.txt", "--requirement", "runtime.txt"],
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    assert (tmp_path / "runtime.txt").read_text().splitlines() == [*project["dependencies"], *extras]
    # pip refuses an editable requirement as a constraint.
    pins = [line for line in (tmp_path / "pins.txt").read_text().splitlines() if not line.startswith("#")]
    assert pins
    assert all("==" in pin for pin in pins)


def test_without_accounts_the_container_stops_with_the_documented_message(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nora-vision app"])
    settings = server.parser().parse_args(app_flags(tmp_path))
    with pytest.raises(InputError, match="contains no account") as refused:
        server.checked_settings(settings)
    (volume,) = texts("VOLUME")
    assert str(refused.value).replace(str(tmp_path), volume) in pages()["docs/guides/docker.md"]


def test_with_an_account_the_app_starts_and_is_healthy(tmp_path):
    add_account(tmp_path / "accounts.txt", "ada", "a long enough password")
    settings = server.checked_settings(server.parser().parse_args(app_flags(tmp_path)))
    page = server.launched(settings)
    try:
        program, *words = words_of("HEALTHCHECK")
        check = [word.replace(texts("EXPOSE")[0], str(settings.port)) for word in words]
        assert (program, subprocess.run([sys.executable, *check], check=False).returncode) == ("python", 0)
    finally:
        page.close(verbose=False)
    assert subprocess.run([sys.executable, *check], capture_output=True, check=False).returncode == 1


MAKE_ACCOUNT = """
from pathlib import Path
from webui.accounts import add_account
add_account(Path("accounts.txt"), "ada", "a long enough password")
"""


@pytest.mark.slow(600)
def test_the_image_is_built_and_serves_the_app():
    engine = shutil.which("docker") or shutil.which("podman")
    answer = engine and subprocess.run([engine, "info"], capture_output=True, text=True, check=False)
    if not answer or answer.returncode:
        pytest.skip(f"no container engine answers: {answer.stderr.strip() if answer else 'docker and podman are not installed'}")
    image, volume, port = "nora-vision-test", f"nora-vision-test-{os.getpid()}", free_port()
    subprocess.run([engine, "build", "--tag", image, "."], cwd=ROOT, check=True)
    mounted = ["--volume", f"{volume}:/data"]
    try:
        refused = subprocess.run([engine, "run", "--rm", *mounted, image], capture_output=True, text=True, check=False)
        assert (refused.returncode, "contains no account" in refused.stderr) == (2, True), refused.stderr
        subprocess.run([engine, "run", "--rm", *mounted, "--entrypoint", "python", image, "-c", MAKE_ACCOUNT], check=True)
        options = ["--detach", "--init", "--publish", f"127.0.0.1:{port}:7860", "--name", volume]
        subprocess.run([engine, "run", *options, *mounted, image], check=True)
        assert served(f"http://127.0.0.1:{port}")
    finally:
        subprocess.run([engine, "rm", "--force", volume], check=False)
        subprocess.run([engine, "volume", "rm", "--force", volume], check=False)


def served(address):
    """Whether the app answers within two minutes."""
    for _ in range(120):
        try:
            return httpx.get(address).status_code == 200
        except httpx.TransportError:
            time.sleep(1)
    return False
