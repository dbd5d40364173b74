"""How a person finds a screen, waits for answers, and loads the page anew."""

import time

from webui.page import SCREENS

# What the browser says of requests that it cuts off when its page goes.
CUT_OFF = ("BodyStreamBuffer was aborted", "Connection errored out")


def go_to(page, screen, patience=180_000):
    """Open a screen, however narrow the page is: what does not fit is behind the three dots."""
    # Until the page has found its width, each tab is there twice, or not to be seen.
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
    """Keep in `page.streams` the requests that are being answered, and in `page.asked` how many there have been."""
    page.streams, page.asked = set(), 0

    def begin(request):
        if "/queue/" in request.url:
            page.streams.add(request)
            page.asked += 1

    page.on("request", begin)
    for ended in ("requestfinished", "requestfailed"):
        page.on(ended, lambda request: page.streams.discard(request))


def quiet(page, patience=60, silence=20):
    """Wait until everything has been answered, and no answer has asked for more.

    Now and then Gradio leaves a stream open that has nothing more to say: one is not waited for where nothing is asked for
    `silence` seconds.
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
    """Load the page anew in the middle of whatever it asks: that it was cut off is no error of the page that comes."""
    before = len(page.errors)
    page.reload()
    page.wait_for_selector("#screens", timeout=180_000)
    page.errors[before:] = [error for error in page.errors[before:] if not any(words in error for words in CUT_OFF)]
