"""A real server in a process of its own, and a real browser before it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from app_process import AppProcess
from browsing import cropped, watch_answers
from PIL import Image
from worker_thread import run_jobs_in_this_process

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A camera that shows a test image, without a question to the user.
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
# Phone and desk.
SIZES = {"phone": (390, 844), "desk": (1280, 900)}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[pytest.TestReport]:
    """Add to the report of a failed test what its servers are doing."""
    report = yield
    if report.when == "call" and report.failed:
        servers = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, AppProcess)]
        report.sections += [(f"the server at {server.url}", server.describe()) for server in servers]
    return report


@pytest.fixture(autouse=True, scope="session")
def worker_in_this_process() -> Iterator[None]:
    """Jobs run in a thread of the test's process, except in servers that are started as processes."""
    with pytest.MonkeyPatch.context() as patch:
        run_jobs_in_this_process(patch)
        yield


@pytest.fixture(scope="session")
def chromium() -> Iterator[object]:
    """Debian's Chromium; the test is skipped where there is none, and fails if REQUIRE_CHROMIUM is set."""
    found, missing = shutil.which("chromium"), None
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "playwright is not installed (pip install -r requirements.txt)"
    if found is None:
        missing = "there is no chromium (apt-get install chromium)"
    if missing is not None:
        (pytest.fail if os.environ.get("REQUIRE_CHROMIUM") else pytest.skip)(f"{missing}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def app_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., AppProcess]]:
    """Starts servers: `app_server(*options, environment=...)`, each with runs and uploads of its own; all end with the module."""
    started: list[AppProcess] = []

    def start(*options: str, **named: object) -> AppProcess:
        started.append(AppProcess(tmp_path_factory.mktemp("app"), *options, **named))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def new_page(chromium: object) -> Iterator[Callable[..., object]]:
    """Opens pages: `new_page(url, size="desk", dark=False, **context)`, each as a browser of its own.

    What a page writes to its console as an error, and what it throws, fails the test at its end.
    `page.errors` lists it, for tests that mean it: they clear the list.
    """
    contexts, pages = [], []

    def open_page(url: str | None = None, size: str = "desk", dark: bool = False, **named: object) -> object:
        width, height = SIZES[size]
        # Animations take much of the processor, drawn without a graphics card.
        still = {"color_scheme": "dark" if dark else "light", "reduced_motion": "reduce"}
        context = chromium.new_context(viewport={"width": width, "height": height}, **still, **named)
        contexts.append(context)
        page = context.new_page()
        page.errors = []
        watch_answers(page)
        page.on("console", lambda message: message.type == "error" and page.errors.append(f"{message.text} {message.location}"))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        pages.append(page)
        if url is not None:
            page.goto(f"{url}?__theme={'dark' if dark else 'light'}")
            page.wait_for_selector("#screens", timeout=60_000)
        return page

    yield open_page
    seen = [error for page in pages for error in page.errors]
    for context in contexts:
        context.close()
    assert not seen, "the browser's console has errors:\n" + "\n".join(seen)


@pytest.fixture
def page(new_page: Callable[..., object]) -> object:
    """One page of a desk's size, not opened yet."""
    return new_page()


@pytest.fixture
def screenshot() -> Callable[..., None]:
    """Writes an image of a page, `screenshot(page, name)`, into the folder that $SCREENSHOTS names; nothing if it is unset.

    It is cropped to about `tallest` pixels, between two blocks of the page.
    """

    def take(page: object, name: str, tallest: int | None = None) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            path = Path(folder) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            # The bar of buttons sticks to the window, which is in the middle of the page.
            whole = page.screenshot(full_page=True, style="#photos-actions { position: static !important; }")
            with Image.open(io.BytesIO(whole)) as image:
                cropped(image, tallest).quantize(256).save(path, optimize=True)

    return take
