"""Eight browsers of two users on one server for some minutes, and whether it loses a run, fails, or keeps growing.

    PYTHONPATH=. python benchmarks/web_load.py --minutes 10

Needs playwright and Debian's chromium. At random, each browser opens screens by their tabs and by their addresses, uploads photos
(small ones, and JPEGs of 12 megapixels) and zips of classes, removes photos, reloads the page, also during an upload, queues
trainings of a few steps and generates images. It prints a line each minute, and exits with 1 if

- a request, the page or its console reported an error, or a toast said that something failed;
- a run that was started is not listed by the server or has no folder, or a run has failed or was interrupted;
- a stored photo cannot be decoded, or an unfinished upload was left behind;
- the memory of the server's process is not flat.

Memory is the unique set size (USS): what would be free if the process ended, without the pages of libraries and files that it
shares. The worker, a process of its own, loads its models when they are first used and is not judged. The growth is the slope of
the Theil-Sen estimator (the median of the slopes between all pairs of samples) over the second half of the samples, one every
five seconds: a single large upload does not change it, and the start, when caches fill, is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from gradio_client import Client
from PIL import Image
from playwright.async_api import Browser, ConsoleMessage, Error, Page, Response, async_playwright
from scipy.stats import theilslopes

from pipelines.built_in import ASSETS
from training.options.data import SAMPLE_SUBJECT
from webui.accounts import add_account
from webui.datasets import SET, Dataset
from webui.page import SCREENS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "webui"))
from processes import address_of, app_command, kill_all_naming, start_process

USERS = {"ada": "correct horse", "bob": "battery staple"}
MEGABYTE, SAMPLE_SECONDS = 2**20, 5
# In MB per minute: at this rate, ten minutes of eight busy browsers add a tenth to a server of 200 MB.
MAX_GROWTH = 2.0
ACTIONS = {"tab": 5, "address": 5, "upload": 4, "remove": 2, "zip": 1, "reload": 3, "cut": 1, "train": 2, "generate": 2}
STEPS = "4"
LARGE, NUM_LARGE, NOISE = (4000, 3000), 4, 12
CLASSES = ASSETS / "sample-classes" / "coloured-shapes.zip"
GOOD_STATES = {"done", "running", "starting", "queued"}
# What a browser reports of requests that it aborts itself when a page is left, and for how many seconds after that.
ABORTED = ("abort", "Connection errored out", "Failed to fetch", "Connection to the server was lost")
LEAVING_SECONDS = 10
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PATIENCE_MS = 120_000
# Reports the toasts of errors on the console.
REPORT_TOASTS = """new MutationObserver(changes => {
  for (const change of changes) for (const node of change.addedNodes) {
    const toast = node.querySelector?.('.toast-body.error');
    if (toast) console.error(`toast: ${toast.innerText.replaceAll('\\n', ' ')}`);
  }
}).observe(document, {childList: true, subtree: true});"""

# The open screen, what it waits for, and its messages.
DESCRIBE_PAGE = """() => JSON.stringify({
  url: location.search,
  tab: document.querySelector('#screens > .tab-wrapper [aria-selected=true]')?.innerText,
  waiting: [...document.querySelectorAll('.pending, .generating, .translucent')].map(each => each.closest('[id]')?.id),
  messages: [...document.querySelectorAll('.toast-body, [id$=-message], [id$=-progress]')].map(each => each.innerText),
  photos: document.querySelectorAll('.photo-card').length,
})"""
MAX_ERROR = 700


@dataclass
class Load:
    """What the browsers did and saw.

    Args:
        photos: the files that they upload.
        started: the ids of the runs that each user has started.
    """

    photos: list[Path]
    errors: list[str] = field(default_factory=list)
    started: dict[str, list[str]] = field(default_factory=lambda: {user: [] for user in USERS})
    done: Counter[str] = field(default_factory=Counter)
    requests: int = 0


class Visitor:
    """A browser of a user."""

    def __init__(self, page: Page, url: str, user: str, load: Load, rng: random.Random) -> None:
        self.page, self.url, self.user, self.load, self.rng = page, url, user, load, rng
        self.left = 0.0
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.note(error.stack or str(error)))
        page.on("console", self.heard)
        page.on("response", self.answered)

    def heard(self, message: ConsoleMessage) -> None:
        """Record an error on the console; that of a failed request is recorded by its response."""
        if message.type == "error" and "the server responded with a status" not in message.text:
            self.note(message.text)

    def answered(self, response: Response) -> None:
        """Count a response, and record its error."""
        self.load.requests += 1
        if response.status >= 400:
            self.note(f"{response.status} {response.url}")

    def note(self, text: str) -> None:
        """Record an error, unless it is of a request that was aborted when the page was left."""
        was_left = time.monotonic() - self.left < LEAVING_SECONDS
        if not (was_left and any(words.lower() in text.lower() for words in ABORTED)):
            self.load.errors.append(f"{time.strftime('%H:%M:%S')} {self.user}: {' '.join(text.split())[:MAX_ERROR]}")

    async def act(self) -> None:
        """Do one thing."""
        (action,) = self.rng.choices(list(ACTIONS), list(ACTIONS.values()))
        try:
            await getattr(self, action)()
            self.load.done[action] += 1
        except Error as error:
            self.note(f"{action}: {error.message}. Page: {await self.page.evaluate(DESCRIBE_PAGE)}")
            await self.reload()

    async def leave(self, address: str | None = None) -> None:
        """Open an address of the page; by default, reload it."""
        self.left = time.monotonic()
        await (self.page.reload() if address is None else self.page.goto(address))
        self.left = time.monotonic()
        await self.page.wait_for_selector("#screens")

    async def reload(self) -> None:
        """Reload the page."""
        await self.leave()

    async def address(self) -> None:
        """Open a screen by its address."""
        await self.leave(f"{self.url}?tab={self.rng.choice(list(SCREENS))}")

    async def tab(self) -> None:
        """Open a screen by its tab."""
        await self.open(self.rng.choice(list(SCREENS)))

    async def open(self, screen: str) -> None:
        """Open a screen by its tab."""
        await self.page.click(f"#screen-{screen}-button")
        await self.page.locator(f"#screen-{screen}[role=tabpanel]").wait_for()

    async def upload(self) -> None:
        """Add photos, and wait until they are listed."""
        await self.open("photos")
        photos = self.rng.sample(self.load.photos, self.rng.randrange(1, 6))
        async with self.page.expect_response(re.compile("/gradio_api/upload")):
            await self.page.set_input_files("#photos-upload input[type=file]", photos)
        # There may have been a photo of this name, so photos may still be added after it.
        await self.card(photos[-1].name).first.wait_for(state="attached")

    def card(self, name: str) -> Any:
        """The cards of the photos with this name."""
        return self.page.locator(".photo-card", has_text=name)

    async def cut(self) -> None:
        """Begin an upload and reload the page at once."""
        await self.open("photos")
        await self.page.set_input_files("#photos-upload input[type=file]", self.load.photos)
        await self.page.wait_for_timeout(self.rng.randrange(100))
        await self.leave()

    async def remove(self) -> None:
        """Remove all photos but the last four; others may be added meanwhile."""
        await self.open("photos")
        boxes = ".photo-card input[data-action=choose]"
        chosen = await self.page.evaluate(
            "boxes => [...document.querySelectorAll(boxes)].slice(0, -4).map(box => { box.click(); return box.dataset.file; })",
            boxes,
        )
        if not chosen:
            return
        await self.page.click("[data-action=remove-chosen]")
        gone = "([boxes, files]) => ![...document.querySelectorAll(boxes)].some(box => files.includes(box.dataset.file))"
        await self.page.wait_for_function(gone, arg=[boxes, chosen])

    async def zip(self) -> None:
        """Add a zip of class folders."""
        await self.open("classify")
        await self.page.click("#classify-part-pictures-button")
        await self.page.set_input_files("#classify-zip input[type=file]", CLASSES)
        await self.page.locator("#classify-message", has_text="images added").wait_for()

    async def train(self) -> None:
        """Queue a training of a few steps."""
        page = self.page
        await self.open("check")
        await page.evaluate(
            "for (const each of document.querySelectorAll('#check-command-shown > button:not(.open)')) each.click()"
        )
        await page.locator("#check-command").filter(has_text=re.compile("launch|#")).wait_for()
        await page.locator("#check-preset").get_by_text("Fast").click()
        for box, text in (("class input", "toy"), ("scenes textarea", "in the snow")):
            await page.fill(f"#check-{box}", text)
            await page.locator(f"#check-{box}").blur()
        await page.evaluate(
            "for (const each of document.querySelectorAll('#subject-panel, #subject-panel details')) each.open = true"
        )
        await page.fill("#subject-optimisation-max_train_steps", STEPS)
        await page.locator("#subject-optimisation-max_train_steps").blur()
        await page.locator("#check-command").filter(has_text=f"--max_train_steps {STEPS} ").wait_for()
        selected = page.locator("#train-state [data-run]")
        before = await selected.get_attribute("data-run") if await selected.count() else None
        await page.click("#check-start")
        await page.locator("#screen-train-button[aria-selected=true]").wait_for()
        await page.wait_for_function(
            "(before) => ![undefined, before].includes(document.querySelector('#train-state [data-run]')?.dataset.run)",
            arg=before,
        )
        self.load.started[self.user].append(str(await selected.get_attribute("data-run")))

    async def generate(self) -> None:
        """Generate an image, if a run has an adapter."""
        await self.open("use")
        button = self.page.locator("#use-generate")
        if await button.is_visible():
            await button.click()
            await self.page.locator("#use-progress", has_text="Done in").wait_for()


async def visit(browser: Browser, url: str, user: str, load: Load, end: float, rng: random.Random) -> None:
    """Sign in and act at random until `end`."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    await context.add_init_script(REPORT_TOASTS)
    # Of simultaneous attempts from one address, five are checked, and the others are told to try again.
    while not (await context.request.post(f"{url}login", form={"username": user, "password": USERS[user]})).ok:
        await asyncio.sleep(1)
    visitor = Visitor(await context.new_page(), url, user, load, rng)
    await visitor.leave(url)
    while time.monotonic() < end:
        await visitor.act()
        await visitor.page.wait_for_timeout(rng.randrange(500, 3000))
    visitor.left = time.monotonic()
    await context.close()


def uss(process: psutil.Process | None) -> float:
    """The unique set size of a process in MB; 0 without one."""
    return 0.0 if process is None else process.memory_full_info().uss / MEGABYTE


def worker_of(server: psutil.Process) -> psutil.Process | None:
    """The worker process of the server."""
    return next((each for each in server.children() if "webui.inference_jobs" in each.cmdline()), None)


async def measure(server: psutil.Process, load: Load, end: float) -> list[tuple[float, float]]:
    """Print a line every minute; returns the server's memory in MB, by the time in minutes."""
    samples: list[tuple[float, float]] = []
    print("| minute | server MB (USS) | RSS | worker MB | requests | uploads | trainings | images | errors |")  # noqa: T201
    print("|---|---|---|---|---|---|---|---|---|")  # noqa: T201
    begun, minute = time.monotonic(), 0
    while (now := time.monotonic()) < end:
        samples.append(((now - begun) / 60, uss(server)))
        if samples[-1][0] >= minute:
            memory = samples[-1][1], server.memory_info().rss / MEGABYTE, uss(worker_of(server))
            done = load.done
            counts = done["upload"] + done["zip"], sum(map(len, load.started.values())), done["generate"], len(load.errors)
            cells = [str(minute), *(f"{each:.0f}" for each in memory), str(load.requests), *map(str, counts)]
            print(f"| {' | '.join(cells)} |", flush=True)  # noqa: T201
            minute += 1
        await asyncio.sleep(SAMPLE_SECONDS)
    return samples


async def drive(url: str, server: psutil.Process, load: Load, minutes: float, browsers: int) -> list[tuple[float, float]]:
    """Let all browsers act for `minutes`; returns the samples of `measure`."""
    end = time.monotonic() + 60 * minutes
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        users = [list(USERS)[number % len(USERS)] for number in range(browsers)]
        visits = [visit(browser, url, user, load, end, random.Random(number)) for number, user in enumerate(users)]
        *_, samples = await asyncio.gather(*visits, measure(server, load, end))
        await browser.close()
    return samples


def photos_in(folder: Path, others: Path | None) -> list[Path]:
    """The photos to upload: the bundled ones, JPEGs of 12 megapixels, which are made in `folder`, and those below `others`."""
    small = sorted(SAMPLE_SUBJECT.glob("*.jpg"))
    large = [folder / f"large {number}.jpg" for number in range(NUM_LARGE)]
    for path, source in zip(large, small, strict=False):
        with Image.open(source) as image:
            enlarged = image.convert("RGB").resize(LARGE)
        grain = Image.effect_noise(LARGE, NOISE).convert("RGB")
        Image.blend(enlarged, grain, 0.2).save(path, quality=92)
    return [*small, *large, *([] if others is None else sorted(others.rglob("*.jpg")))]


@contextmanager
def served(home: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server with its files in `home`: its address and its process. At the end, it and its runs are killed."""
    for name, password in USERS.items():
        add_account(home / "accounts.txt", name, password)
    process = start_process(app_command(home, "--accounts", str(home / "accounts.txt")), home / "server.txt")
    try:
        yield address_of(process, home / "server.txt"), psutil.Process(process.pid)
    finally:
        kill_all_naming(home)
        process.wait()


def faults_of_runs(home: Path, url: str, load: Load) -> Iterator[str]:
    """A sentence for each run that is lost, has failed or was interrupted; prints the states of all runs."""
    for user, password in USERS.items():
        runs = {run["run"]: run for run in Client(url, auth=(user, password), verbose=False).predict(api_name="/list")}
        print(f"{user}: {len(runs)} runs, {dict(Counter(run['state'] for run in runs.values()))}")  # noqa: T201
        lost = [run for run in load.started[user] if run not in runs or not (home / "runs" / user / run).is_dir()]
        yield from (f"The run {run} of {user} is lost." for run in lost)
        yield from (f"{run['run']}: {run['state']}. {run['reason']}" for run in runs.values() if run["state"] not in GOOD_STATES)
        # A page may show a run that another page of the user has started for a moment, so ids may be equal.
        if len(runs) < len(load.started[user]):
            yield f"{len(load.started[user])} trainings of {user} were started, {len(runs)} runs are listed."


def faults_of_files(home: Path) -> Iterator[str]:
    """A sentence for each photo that cannot be decoded, unfinished upload, and error in the server's log."""
    for path in (home / "uploads").glob(f"*/*/{SET}"):
        for image in Dataset(path.parent).content().images():
            try:
                with Image.open(path.parent / image.file) as opened:
                    opened.load()
            except OSError as error:
                yield f"{path.parent.name}/{image.file}: {error}"
    # For each file of an upload, Gradio leaves an empty one beside its copy.
    parts = [path for path in (home / "uploads" / ".cache").glob("tmp*") if path.is_file() and path.stat().st_size]
    yield from (f"{path.name} is left of an upload." for path in parts)
    log = (home / "server.txt").read_text()
    yield from (
        f"log: {each[0]}" for each in re.finditer(r"(?:.*\n){0,12}^[\w.]*(Error|Exception|Disconnect)\b.*", log, re.MULTILINE)
    )


def growth(samples: list[tuple[float, float]]) -> float:
    """The slope of the memory over the second half of the samples, in MB per minute."""
    minutes, memory = zip(*samples[len(samples) // 2 :], strict=True)
    return float(theilslopes(memory, minutes).slope)


def main() -> int:
    """Start the server, drive it, and report."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--browsers", type=int, default=8)
    options.add_argument("--photos", type=Path, help="a folder whose JPEGs are uploaded too")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as photos, served(Path(folder)) as (url, server):
        load = Load(photos_in(Path(photos), given.photos))
        samples = asyncio.run(drive(url, server, load, given.minutes, given.browsers))
        wrong = [*faults_of_runs(Path(folder), url, load), *faults_of_files(Path(folder)), *load.errors]
    slope = growth(samples)
    print(f"{dict(load.done)}\nMemory: {slope:+.2f} MB per minute in the second half.")  # noqa: T201
    print("\n".join(wrong) or "Nothing went wrong.")  # noqa: T201
    return int(bool(wrong) or slope > MAX_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
