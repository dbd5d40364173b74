"""Eight browsers of two users on one server for some minutes: photos added, trainings queued, screens opened, pages reloaded.

    PYTHONPATH=. python benchmarks/web_load.py --minutes 10

Needs playwright and Debian's chromium. Prints a table of the server's memory, requests and runs by minute, and ends with 1 if a
run was lost, a request failed, a page threw an error, or the memory of the second half grew by more than a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from playwright.async_api import Browser, Error, Page, async_playwright

from pipelines.sample_subject import sample_images
from webui.accounts import add_account
from webui.page import SCREENS

ADDRESS = re.compile(r"NoRA Vision is at (http://\S+)")
USERS = {"ada": "correct horse", "bob": "battery staple"}
BROWSERS, MEGABYTE, MAX_GROWTH = 8, 2**20, 1.1
# What a browser reports of requests that it aborts itself when a page is reloaded.
ABORTED = ("aborted", "Connection errored out", "ERR_ABORTED", "Failed to fetch")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class Load:
    """What the browsers did and saw."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.started: dict[str, int] = dict.fromkeys(USERS, 0)
        self.requests = self.reloads = self.uploads = 0

    def watch(self, page: Page) -> None:
        """Count the requests of `page` and record its errors."""
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("response", lambda response: self._count(response.status, response.url))

    def _count(self, status: int, url: str) -> None:
        self.requests += 1
        if status >= 400:
            self._note(f"{status} {url}")

    def _note(self, text: str) -> None:
        if not any(words in text for words in ABORTED):
            self.errors.append(text.splitlines()[0])


async def visit(browser: Browser, url: str, user: str, load: Load, end: float, rng: random.Random) -> None:
    """Sign in and act at random until `end`."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    # Of simultaneous attempts from one address, five are checked, and the others are told to try again.
    while not (await context.request.post(f"{url}login", form={"username": user, "password": USERS[user]})).ok:
        await asyncio.sleep(1)
    page = await context.new_page()
    page.set_default_timeout(120_000)
    load.watch(page)
    await page.goto(url)
    await page.wait_for_selector("#screens")
    while time.monotonic() < end:
        action = rng.choices(("open", "upload", "train", "reload"), (6, 1, 1, 2))[0]
        await act(page, action, user, load, rng)
        await page.wait_for_timeout(rng.randrange(500, 3000))
    await context.close()


async def act(page: Page, action: str, user: str, load: Load, rng: random.Random) -> None:
    """One action of a user."""
    if action == "open":
        await page.click(f"#screen-{rng.choice(list(SCREENS))}-button")
    elif action == "reload":
        await page.reload()
        await page.wait_for_selector("#screens")
        load.reloads += 1
    else:
        await page.click("#screen-photos-button")
        if action == "upload":
            await page.set_input_files("#photos-upload input[type=file]", [str(path) for path in sample_images()])
            load.uploads += 1
        else:
            await page.click("#photos-train")
            await page.locator("#screen-train-button[aria-selected=true]").wait_for()
            load.started[user] += 1


def runs_of(runs: Path) -> dict[str, int]:
    """The number of run directories by user."""
    return {user: len([path for path in (runs / user).glob("2*") if path.is_dir()]) for user in USERS}


async def measure(server: psutil.Process, runs: Path, load: Load, end: float) -> list[float]:
    """Print a line every half minute; returns the memory at each, in MB."""
    memory = []
    print("| minute | server MB | requests | runs started | run directories | errors |\n|---|---|---|---|---|---|")  # noqa: T201
    begun = time.monotonic()
    while time.monotonic() < end:
        await asyncio.sleep(min(30.0, max(0.0, end - time.monotonic())))
        memory.append(server.memory_info().rss / MEGABYTE)
        counts = sum(load.started.values()), sum(runs_of(runs).values()), len(load.errors)
        minute = (time.monotonic() - begun) / 60
        print(f"| {minute:.1f} | {memory[-1]:.0f} | {load.requests} | " + " | ".join(map(str, counts)) + " |", flush=True)  # noqa: T201
    return memory


async def drive(url: str, server: psutil.Process, runs: Path, minutes: float) -> tuple[Load, list[float]]:
    """Let all browsers act for `minutes`."""
    load, end = Load(), time.monotonic() + 60 * minutes
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        users = [list(USERS)[number % len(USERS)] for number in range(BROWSERS)]
        visits = [visit(browser, url, user, load, end, random.Random(number)) for number, user in enumerate(users)]
        *ended, memory = await asyncio.gather(*visits, measure(server, runs, load, end), return_exceptions=True)
        load.errors += [str(error).splitlines()[0] for error in ended if isinstance(error, Error)]
        await browser.close()
    return load, memory


def main() -> int:
    """Start the server, drive it, and say what was lost."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10.0)
    minutes = options.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for name, password in USERS.items():
            add_account(home / "accounts.txt", name, password)
        folders = [
            "--runs_dir",
            str(home / "runs"),
            "--uploads_dir",
            str(home / "uploads"),
            "--accounts",
            str(home / "accounts.txt"),
        ]
        log = home / "server.txt"
        with log.open("w") as output:
            process = subprocess.Popen([sys.executable, "app.py", *folders], stdout=output, stderr=output)
        server = psutil.Process(process.pid)
        while not (address := ADDRESS.search(log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(f"The server did not start: {log.read_text()}")
            time.sleep(0.2)
        load, memory = asyncio.run(drive(address[1], server, home / "runs", minutes))
        directories, internal = runs_of(home / "runs"), log.read_text().count("Traceback")
        end_all(server, home)
    return verdict(load, memory, directories, internal)


def end_all(server: psutil.Process, home: Path) -> None:
    """End the server and the runs that it started, which are processes of their own."""
    for process in psutil.process_iter(["cmdline"]):
        if process.pid == server.pid or any(str(home) in word for word in process.info["cmdline"] or ()):
            process.kill()
    server.wait()


def verdict(load: Load, memory: list[float], directories: dict[str, int], internal: int) -> int:
    """Print the totals; returns the exit code."""
    growth = memory[-1] / memory[len(memory) // 2]
    lost = {user: count - directories[user] for user, count in load.started.items() if directories[user] < count}
    print(f"{load.uploads} uploads, {load.reloads} reloads, runs {load.started}, lost {lost or 'none'}")  # noqa: T201
    print(f"{len(load.errors)} errors {load.errors[:5]}, {internal} tracebacks in the log, memory x {growth:.2f}")  # noqa: T201
    return int(bool(lost or load.errors or internal) or growth > MAX_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
