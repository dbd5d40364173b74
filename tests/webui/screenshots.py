"""The images of README and docs, of runs with the defaults, and every screen in light and dark mode, on a desk and on a phone.

    SCREENSHOTS=assets/screens python -m pytest tests/webui/screenshots.py

It takes about ten minutes and is no part of the tests. The screens by size and mode lie in `each`, in the folder of the others.
"""

from itertools import product

from arena_folders import arena_in
from browsing import go_to
from playwright.sync_api import expect

from webui.page import SCREENS

PATIENCE = 900_000
# The heights of the images, in pixels: each ends below a complete block.
TALLEST = {"photos": 1500, "check": 1400, "train": 1400, "judge": 1560, "use": 1345, "runs": 1215, "classify": 1500}


def opened(new_page, server, **how):
    page = new_page(server.url, **how)
    page.set_default_timeout(PATIENCE)
    expect(page.locator(".photo-card .chip.good").first).to_be_visible(timeout=PATIENCE)
    return page


def test_screens_of_whole_runs(app_server, new_page, screenshot):
    server = app_server()
    page = opened(new_page, server)
    screenshot(page, "photos", TALLEST["photos"])
    go_to(page, "check")
    expect(page.locator("#check-crops img").first).to_be_visible(timeout=PATIENCE)
    screenshot(page, "check", TALLEST["check"])
    go_to(page, "photos")
    page.click("#photos-train")
    expect(page.locator("#train-samples")).to_contain_text("After step", timeout=PATIENCE)
    screenshot(page, "train", TALLEST["train"])
    page.click("#train-next")
    expect(page.locator("#judge-slider img").first).to_be_visible(timeout=PATIENCE)
    page.locator("#judge-samples img").last.scroll_into_view_if_needed()
    screenshot(page, "judge", TALLEST["judge"])
    page.click("#judge-use")
    page.fill("#use-prompt textarea", "a photo of sks toy on the beach")
    page.click("#use-generate")
    expect(page.locator("#use-progress")).to_contain_text("Done in", timeout=PATIENCE)
    screenshot(page, "use", TALLEST["use"])
    compare(page)
    screenshot(page, "runs", TALLEST["runs"])
    classify(page)
    screenshot(page, "classify", TALLEST["classify"])
    arena_in(server.runs / "arena")
    for size, dark in product(("desk", "phone"), (False, True)):
        page = opened(new_page, server, size=size, dark=dark)
        for screen in SCREENS:
            go_to(page, screen)
            page.wait_for_timeout(1500)
            screenshot(page, f"each/{screen}-{size}-{'dark' if dark else 'light'}")
        page.context.close()


def compare(page):
    """Train once more, with the preset Fast, and compare both runs."""
    go_to(page, "check")
    page.locator("#check-preset").get_by_text("Fast").click()
    expect(page.locator("#check-plan")).to_contain_text("Fast", timeout=PATIENCE)
    page.click("#check-start")
    expect(page.locator("#train-phase")).to_contain_text("running", timeout=PATIENCE)
    page.click("#train-next")
    expect(page.locator("#screen-judge[role=tabpanel]")).to_be_visible(timeout=PATIENCE)
    go_to(page, "runs")
    expect(page.locator("button.run")).to_have_count(2, timeout=PATIENCE)
    for place in range(2):
        page.locator("#runs-compare input").click()
        page.locator("#runs-compare [role=option]").nth(place).click()
    page.keyboard.press("Escape")
    page.click("#runs-compare-show")
    expect(page.locator(".compare td img").first).to_be_visible(timeout=PATIENCE)
    page.wait_for_timeout(1500)


def classify(page):
    """Train on the example of Classify with the defaults."""
    go_to(page, "classify")
    page.click("#classify-go-train")
    page.click("#classify-start")
    page.get_by_role("button", name="See the classifier").click()
    expect(page.locator("#classify-confusion button").first).to_be_visible(timeout=PATIENCE)
    page.wait_for_timeout(3000)
