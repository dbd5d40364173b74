"""The whole way of a user with the built-in model: train on the example, queue a run from a second browser, Judge and Use.

ONE_CLICK=1 trains with the defaults, here and on Classify, and compares both runs. SCREENSHOTS=DIR saves the images of the
README, and in DIR/each every screen in light and dark mode, on a desk and on a phone.
"""

import os
import re
from itertools import product

import pytest
from browsing import go_to
from PIL import Image
from playwright.sync_api import expect

from pipelines.images import read_settings
from training.runs.record import RunRecord
from webui.screens.check import cost_summary
from webui.workspace import Workspace

# The fewest steps with which a run has every part.
STEPS = 6
ONE_CLICK, SCREENSHOTS = bool(os.environ.get("ONE_CLICK")), bool(os.environ.get("SCREENSHOTS"))
# Whole runs take minutes.
PATIENCE = 600_000 if ONE_CLICK else 120_000
# The heights of the images in README and docs, in pixels: each ends below a complete block.
TALLEST = {"photos": 1400, "check": 1400, "train": 1400, "judge": 1560, "use": 1345, "runs": 1215, "classify": 1500}
SCREENS = ("photos", "check", "train", "judge", "use", "classify", "runs")


@pytest.fixture(scope="module")
def server(app_server):
    return app_server()


@pytest.fixture(scope="module")
def workspace(server):
    """The workspace of the server."""
    return Workspace(server.runs, server.uploads, is_local=True)


def opened(new_page, server, **how):
    page = new_page(server.url, **how)
    page.set_default_timeout(PATIENCE)
    expect(page.locator(".photo-card .chip.good").first).to_be_visible(timeout=PATIENCE)
    return page


def shorten(page):
    """Set the smallest possible values in the expert panel."""
    go_to(page, "check")
    page.locator("#check-command-shown > button").click()
    page.locator("#check-preset").get_by_text("Fast").click()
    scenes = page.locator("#check-scenes textarea")
    scenes.fill("in the snow")
    scenes.blur()
    expect(page.locator("#check-command")).to_contain_text("in the snow'", timeout=PATIENCE)
    expect(page.locator("#check-command")).not_to_contain_text("at night", timeout=PATIENCE)
    page.locator("#subject-panel > summary").click()
    page.locator("#subject-panel-optimisation > summary").click(timeout=PATIENCE)
    box = page.locator("#subject-optimisation-max_train_steps")
    box.fill(str(STEPS))
    box.blur()
    expect(page.locator("#check-command")).to_contain_text(f"--max_train_steps {STEPS}", timeout=PATIENCE)


def newest(workspace, known=()):
    (run_id,) = set(workspace.run_ids()) - set(known)
    return workspace.run(run_id)


@pytest.mark.slow(90)
def test_from_the_example_to_images_in_new_scenes(new_page, server, workspace, screenshot):
    page = opened(new_page, server)
    screenshot(page, "photos", TALLEST["photos"])
    go_to(page, "check")
    expect(page.locator("#check-crops img").first).to_be_visible(timeout=PATIENCE)
    screenshot(page, "check", TALLEST["check"])
    if ONE_CLICK:
        go_to(page, "photos")
        page.click("#photos-train")
    else:
        shorten(page)
        page.click("#check-start")
    expect(page.locator("#train-phase")).to_be_visible(timeout=PATIENCE)
    first = newest(workspace)
    started_with = (first.path / "launch.json").read_text()
    assert "--output_dir" in started_with

    # Meanwhile another browser selects the same run and starts a second one.
    other = opened(new_page, server)
    go_to(other, "train")
    expect(other.locator("#train-phase")).to_be_visible(timeout=PATIENCE)
    expect(other.locator("#run .on-train summary")).to_contain_text("sks toy", timeout=PATIENCE)
    if ONE_CLICK:
        shorten(other)
    else:
        go_to(other, "check")
    other.click("#check-start")
    expect(other.locator("#train-phase")).to_contain_text(re.compile("queue"), timeout=PATIENCE)
    second = newest(workspace, [first.path.name])
    assert second.status().state == "queued"
    if not ONE_CLICK:
        other.click("#train-stop")
        expect(other.locator("#train-state")).to_contain_text("You stopped it.", timeout=PATIENCE)

    expect(page.locator("#train-samples img").first).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#train-loss svg").first).to_be_visible(timeout=PATIENCE)
    if ONE_CLICK:
        expect(page.locator("#train-samples")).to_contain_text("After step", timeout=PATIENCE)
    screenshot(page, "train", TALLEST["train"])
    page.locator("#train-next").click(timeout=PATIENCE)
    assert first.status().state == "done"
    assert (first.path / "before_after.png").exists()
    # Every run begins with a dry run; the page shows its report.
    assert "54,272 trainable parameters" in cost_summary(first)

    expect(page.locator("#judge-slider img").first).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#judge-suggestion")).to_contain_text(f"Step {first.status().suggested_step}", timeout=PATIENCE)
    page.locator("#judge-samples img").last.scroll_into_view_if_needed()
    screenshot(page, "judge", TALLEST["judge"])
    page.click("#judge-use")
    generate(page, "a photo of sks toy on the beach", server, screenshot)

    if ONE_CLICK:
        expect(other.locator("#train-phase")).to_contain_text("Done in", timeout=PATIENCE)
        compared(page, [first, second], screenshot)
        classified(page, screenshot)
    if SCREENSHOTS:
        each_screen(new_page, server, screenshot)


def generate(page, prompt, server, screenshot):
    """Generate an image of `prompt` on Use and check the settings in its file."""
    box = page.locator("#use-prompt textarea")
    expect(box).to_be_visible(timeout=PATIENCE)
    box.fill(prompt)
    page.click("#use-generate")
    expect(page.locator("#use-gallery img").first).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#use-cancel")).to_be_hidden(timeout=PATIENCE)
    screenshot(page, "use", TALLEST["use"])
    drawn = [path for path in server.uploads.rglob("*.png") if ".drawn" in path.parts]
    assert [read_settings(path)["prompt"] for path in drawn] == [prompt]
    with Image.open(drawn[0]) as image:
        assert image.size == (64, 64)


def compared(page, records: list[RunRecord], screenshot):
    """Compare both runs by samples with the same prompts and seeds."""
    go_to(page, "runs")
    page.click("#runs-refresh")
    expect(page.locator("button.run")).to_have_count(len(records), timeout=PATIENCE)
    for place in range(len(records)):
        page.locator("#runs-compare input").click()
        page.locator("#runs-compare [role=option]").nth(place).click()
    page.keyboard.press("Escape")
    page.click("#runs-compare-show")
    expect(page.locator(".compare td img").first).to_be_visible(timeout=PATIENCE)
    page.wait_for_timeout(1500)
    screenshot(page, "runs", TALLEST["runs"])


def classified(page, screenshot):
    """Train on the example of Classify with the defaults."""
    go_to(page, "classify")
    page.locator("#classify-go-train").click(timeout=PATIENCE)
    page.locator("#classify-start").click()
    page.locator("#classify-see-result").click(timeout=PATIENCE)
    expect(page.locator("#classify-confusion button").first).to_be_visible(timeout=PATIENCE)
    page.wait_for_timeout(3000)
    screenshot(page, "classify", TALLEST["classify"])


def each_screen(new_page, server, screenshot):
    """Take a screenshot of every screen."""
    for size, dark in product(("desk", "phone"), (False, True)):
        page = opened(new_page, server, size=size, dark=dark)
        for screen in SCREENS:
            go_to(page, screen)
            page.wait_for_timeout(1500)
            screenshot(page, f"each/{screen}-{size}-{'dark' if dark else 'light'}")
        page.context.close()
