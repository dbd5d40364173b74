"""The processor time of a browser whose page is left open while a run goes on, beside the same page without a run.

    PYTHONPATH=. python benchmarks/open_page.py --seconds 60

Needs playwright and Debian's chromium. Two servers have the same finished run; on one of them another run advances by a step
every 0.35 s, with sample images every 50 steps. For each screen, two browsers show it at the same time, one of each server, and
the processor time of all their processes is counted. Prints a table in percent of a core, and ends with 1 if a screen costs
more than `--most` percent. The browser draws without a graphics card, which is more work for the processor than with one.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import exp
from pathlib import Path

import psutil
from playwright.sync_api import Browser, BrowserType, Page, sync_playwright

from training.runs.record import update_status
from webui.page import SCREENS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "webui"))
from processes import address_of, app_command, start_process
from run_folders import GIVEN, WrittenRun, add_samples, finished_run, measure

from pipelines.run_file import ResolvedOptions

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
STEP_SECONDS, FIRST_STEP, TOTAL, STEPS_PER_SAMPLE = 0.35, 100, 400, 50
# The page is measured when no answer has been pending for so long; its checks of the example load a library first.
SETTLE_SECONDS, PATIENCE_MS = 5, 240_000
RUN, DONE = "29990101-000002-running", "29990101-000001-done"


class Trainer(threading.Thread):
    """Writes the files of a run as training does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._run, self._ended = WrittenRun(folder), threading.Event()
        self._run.samples.mkdir(parents=True)
        ResolvedOptions(GIVEN).write(folder)
        for step in range(FIRST_STEP + 1):
            self._reach(step)
        measure(self._run, scored={})

    def _reach(self, step: int) -> None:
        fields = {"phase": "training", "step": step, "total": TOTAL, "share": step / TOTAL}
        if step:
            self._run.log(step, loss=1 + exp(-4 * step / TOTAL) + 0.3 * (step % 7) / 7, lr=1e-3 * min(1.0, step / 20))
        if step % STEPS_PER_SAMPLE == 0:
            add_samples(self._run, step, side=64)
        update_status(self._run, state="running", seconds_left=STEP_SECONDS * (TOTAL - step), **fields)

    def run(self) -> None:
        """Write a step after the other until `end`."""
        for step in range(FIRST_STEP + 1, TOTAL):
            if self._ended.wait(STEP_SECONDS):
                return
            self._reach(step)

    def end(self) -> None:
        """Stop, and delete the run."""
        self._ended.set()
        self.join()
        shutil.rmtree(self._run.path)


@contextmanager
def served(home: Path) -> Iterator[tuple[str, Path]]:
    """A server with a finished run: its address and its folder of runs."""
    finished_run(home / "runs" / DONE)
    server = start_process(app_command(home), home / "server.txt")
    try:
        yield address_of(server, home / "server.txt"), home / "runs"
    finally:
        server.terminate()
        server.wait()


@contextmanager
def browser_process(chromium: BrowserType) -> Iterator[tuple[Browser, psutil.Process]]:
    """A browser and its main process."""
    name = f"--measured-browser={time.monotonic_ns()}"
    browser = chromium.launch(executable_path="/usr/bin/chromium", args=[*FLAGS, name])
    named = [process for process in psutil.Process().children(recursive=True) if name in process.cmdline()]
    try:
        yield browser, next(process for process in named if not any(word.startswith("--type=") for word in process.cmdline()))
    finally:
        browser.close()


def processor_seconds(process: psutil.Process) -> float:
    """What a process and all its children have used."""
    return sum(sum(each.cpu_times()[:2]) for each in [process, *process.children(recursive=True)])


def opened(browser: Browser, url: str, screen: str) -> Page:
    """A page of its own that shows `screen`."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{url}?tab={screen}")
    page.locator(f"#screen-{screen}-button[aria-selected=true]").wait_for(timeout=PATIENCE_MS)
    return page


def settle(pages: list[Page]) -> None:
    """Wait until the pages have been idle for a while."""
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < SETTLE_SECONDS:
        for page in pages:
            if page.locator("body[data-busy]").count():
                page.locator("body:not([data-busy])").wait_for(timeout=PATIENCE_MS)
                idle_since = time.monotonic()
        time.sleep(0.5)


def costs(browsers: list[tuple[Browser, psutil.Process, str]], screen: str, seconds: float) -> list[float]:
    """The percent of a core that each browser needs while it shows `screen`."""
    pages = [opened(browser, url, screen) for browser, _, url in browsers]
    settle(pages)
    before, begun = [processor_seconds(process) for _, process, _ in browsers], time.monotonic()
    # The pages act meanwhile: playwright need not be asked.
    time.sleep(seconds)
    used = [processor_seconds(process) - start for (_, process, _), start in zip(browsers, before, strict=True)]
    elapsed = time.monotonic() - begun
    for page in pages:
        page.close()
    return [100 * each / elapsed for each in used]


def main() -> int:
    """Measure all screens and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=60.0, help="of each screen")
    options.add_argument("--screens", nargs="+", default=list(SCREENS), choices=list(SCREENS))
    options.add_argument("--most", type=float, default=5.0, help="allowed percent of a core")
    chosen = options.parse_args()
    most = 0.0
    with ExitStack() as stack:
        homes = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        servers = [stack.enter_context(served(home)) for home in homes]
        chromium = stack.enter_context(sync_playwright()).chromium
        browsers = [(*stack.enter_context(browser_process(chromium)), url) for url, _ in servers]
        print("| screen | no run, % of a core | a run, % of a core | difference |\n|---|---|---|---|")  # noqa: T201
        for screen in chosen.screens:
            trainer = Trainer(servers[1][1] / RUN)
            trainer.start()
            without, during = costs(browsers, screen, chosen.seconds)
            trainer.end()
            most = max(most, during)
            print(f"| {SCREENS[screen][0]} | {without:.1f} | {during:.1f} | {during - without:.1f} |", flush=True)  # noqa: T201
    return int(most > chosen.most)


if __name__ == "__main__":
    sys.exit(main())
