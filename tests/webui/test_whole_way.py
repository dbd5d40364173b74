"""The whole way of a user with the built-in model: train on the example, queue another, Judge, Use, Download."""

import re

import pytest
from browsing import go_to
from PIL import Image
from playwright.sync_api import expect
from safetensors import safe_open

from pipelines.images import read_settings
from webui.screens.check import cost_summary
from webui.workspace import Workspace

# The fewest steps with which a run has every part.
STEPS, PATIENCE = 6, 120_000
PROMPT = "a photo of sks toy on the beach"


@pytest.fixture(scope="module")
def server(app_server):
    return app_server()


def opened(new_page, server):
    page = new_page(server.url)
    page.set_default_timeout(PATIENCE)
    expect(page.locator(".photo-card .chip.good").first).to_be_visible(timeout=PATIENCE)
    return page


def shorten(page):
    """Set the smallest possible values on Check."""
    go_to(page, "check")
    page.locator("#check-command-shown > button").click()
    page.locator("#check-preset").get_by_text("Fast").click()
    scenes = page.locator("#check-scenes textarea")
    scenes.fill("in the snow")
    scenes.blur()
    expect(page.locator("#check-command")).to_contain_text("in the snow'", timeout=PATIENCE)
    expect(page.locator("#check-command")).not_to_contain_text("at night", timeout=PATIENCE)
    page.locator("#subject-panel > summary").click()
    page.locator("#subject-panel-optimisation > summary").click()
    box = page.locator("#subject-optimisation-max_train_steps")
    box.fill(str(STEPS))
    box.blur()
    expect(page.locator("#check-command")).to_contain_text(f"--max_train_steps {STEPS}", timeout=PATIENCE)


@pytest.mark.slow(90)
def test_from_the_example_to_images_in_new_scenes_and_a_file(new_page, server):
    page, workspace = opened(new_page, server), Workspace(server.runs, server.uploads, is_local=True)
    shorten(page)
    page.click("#check-start")
    expect(page.locator("#train-phase")).to_be_visible(timeout=PATIENCE)
    first = workspace.run(*workspace.run_ids())
    assert "--output_dir" in (first.path / "launch.json").read_text()

    # Meanwhile another browser selects the same run and starts a second one.
    other = opened(new_page, server)
    go_to(other, "train")
    expect(other.locator("#train-phase")).to_be_visible(timeout=PATIENCE)
    expect(other.locator("#run .on-train summary")).to_contain_text("sks toy", timeout=PATIENCE)
    go_to(other, "check")
    other.click("#check-start")
    expect(other.locator("#train-phase")).to_contain_text(re.compile("queue"), timeout=PATIENCE)
    second = workspace.run(*set(workspace.run_ids()) - {first.path.name})
    assert second.status().state == "queued"
    other.click("#train-stop")
    expect(other.locator("#train-state")).to_contain_text("You stopped it.", timeout=PATIENCE)

    expect(page.locator("#train-samples img").first).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#train-loss svg").first).to_be_visible(timeout=PATIENCE)
    page.click("#train-next")
    assert first.status().state == "done"
    assert (first.path / "before_after.png").exists()
    # Every run begins with a dry run; the page shows its report.
    assert "54,272 trainable parameters" in cost_summary(first)

    expect(page.locator("#judge-slider img").first).to_be_visible(timeout=PATIENCE)
    step = first.status().suggested_step
    expect(page.locator("#judge-suggestion")).to_contain_text(f"Step {step}", timeout=PATIENCE)
    page.click("#judge-use")
    generate(page, server)
    with page.expect_download() as download:
        page.click("#use-download")
    assert download.value.suggested_filename == f"sks-toy-step{step}.safetensors"
    with safe_open(download.value.path(), "pt") as file:
        assert file.metadata()["ss_base_model_version"] != "sdxl_base_v1-0"
    expect(page.locator("#use-card")).to_contain_text("load_lora_weights", timeout=PATIENCE)
    expect(page.locator("#use-formats")).to_contain_text("fit the demo model alone", timeout=PATIENCE)


def generate(page, server):
    """Generate an image on Use and check the settings in its file."""
    page.fill("#use-prompt textarea", PROMPT)
    page.click("#use-generate")
    expect(page.locator("#use-gallery img").first).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#use-cancel")).to_be_hidden(timeout=PATIENCE)
    (path,) = [path for path in server.uploads.rglob("*.png") if ".drawn" in path.parts]
    assert read_settings(path)["prompt"] == PROMPT
    with Image.open(path) as image:
        assert image.size == (64, 64)
