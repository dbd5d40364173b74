"""Helpers for browser tests: open a screen, wait for pending requests, reload the page."""

import time

import numpy as np
from PIL import Image

from webui.page import SCREENS

# The error of a request that the browser aborts when the page is closed.
CUT_OFF = ("BodyStreamBuffer was aborted", "Connection errored out", "signal is aborted without reason")
# Rows of background pixels: between two blocks of a page at least, and below the last one.
GAP, MARGIN = 5, 24


def go_to(page, screen, patience=180_000):
    """Open a screen; on a narrow page, tabs that do not fit are in the overflow menu."""
    # Until the page has been laid out, a tab may exist twice or be invisible.
    page.wait_for_function("document.querySelectorAll('#screen-photos-button').length === 1", timeout=patience)
    more = page.locator("#screens > .tab-wrapper .overflow-menu")
    tab = page.locator(f"#screen-{screen}-button")
    tab.or_(more.locator("> button")).locator("visible=true").first.wait_for(timeout=patience)
    if not tab.is_visible():
        more.locator("> button").click(timeout=patience)
        tab = more.locator(".overflow-dropdown button", has_text=SCREENS[screen][0])
    tab.click(timeout=patience)
    page.locator(f"#screen-{screen}[role=tabpanel]").wait_for(state="visible", timeout=patience)


def watch_answers(page):
    """Record the pending requests in `page.streams`, and the number of all requests in `page.asked`."""
    page.streams, page.asked = set(), 0

    def begin(request):
        if "/queue/" in request.url:
            page.streams.add(request)
            page.asked += 1

    page.on("request", begin)
    for ended in ("requestfinished", "requestfailed"):
        page.on(ended, lambda request: page.streams.discard(request))


def quiet(page, patience=60, silence=5):
    """Wait until no request is pending and no response has caused another one.

    Gradio sometimes leaves an event stream open, so one open stream is ignored after `silence` seconds without a request.
    """
    looks, asked, since, end = 0, page.asked, time.monotonic(), time.monotonic() + patience
    while looks < 4:
        now = time.monotonic()
        assert now < end, [request.url for request in page.streams]
        page.wait_for_timeout(250)
        if page.asked != asked:
            asked, since = page.asked, now
        looks = 0 if page.streams and now - since < silence else looks + 1


def reload(page):
    """Reload the page while requests are pending; the errors of aborted requests are ignored."""
    before = len(page.errors)
    page.reload()
    page.wait_for_selector("#screens", timeout=180_000)
    page.errors[before:] = [error for error in page.errors[before:] if not any(words in error for words in CUT_OFF)]


def cropped(image, tallest=None):
    """The top of a screenshot: up to a gap between two blocks if it is taller than `tallest` pixels, without the empty rest."""
    pixels = np.asarray(image.convert("RGB"))
    is_empty = (pixels == pixels[0, 0]).all(axis=(1, 2))
    end = min(image.height, tallest or image.height)
    if end < image.height:
        end = next((row for row in range(end, GAP, -1) if is_empty[row - GAP : row].all()), end)
    used = np.flatnonzero(~is_empty[:end])
    bottom = min(image.height, used[-1] + 1 + MARGIN) if len(used) else end
    page = Image.new("RGB", (image.width, bottom), tuple(pixels[0, 0].tolist()))
    page.paste(image.crop((0, 0, image.width, min(end, bottom))))
    return page
