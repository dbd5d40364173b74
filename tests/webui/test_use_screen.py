"""The screen Use in a real browser: generate, vary, cancel, combine adapters, reuse settings and download."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import go_to, quiet, reload
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from run_folders import run_in
from safetensors import safe_open
from small_runs import small_run

from pipelines.built_in import BUILT_IN_MODEL
from pipelines.images import read_settings
from pipelines.subject.base_model import load_base_model
from training.runs.naming import DEMO_ONLY

PATIENCE = 180_000

# What the header of a downloaded file says of its run.
HEADER = {
    "modelspec.title": "a star, step 2",
    "modelspec.trigger_phrase": "a star",
    "ss_sd_model_name": BUILT_IN_MODEL.name,
    "modelspec.description": DEMO_ONLY,
}

REMEMBERING_PREVIEW = """new MutationObserver(() => {
  window.hadPreview ||= document.querySelector('#use-progress .denoising') !== null;
}).observe(document.querySelector('#use-progress'), {childList: true, subtree: true})"""


@pytest.fixture(scope="module")
def server(app_server):
    """A server with two finished runs on the built-in model."""
    server = app_server()
    for run_id in ("older", "newer"):
        pipe = load_base_model(str(BUILT_IN_MODEL))
        small_run(server.runs, BUILT_IN_MODEL, run_id, strength=0.01 * len(run_id), pipe=pipe)
    return server


def opened(new_page, server, **named):
    """The screen Use with the newest run selected."""
    page = new_page(server.url, **named)
    page.set_default_timeout(PATIENCE)
    go_to(page, "use")
    page.wait_for_selector("#use-generate")
    return page


def told(page):
    return page.locator("#use-progress").inner_text()


def set_number(page, field, value):
    given = page.locator(f"#{field} input[type=number]").first
    given.fill(str(value))
    given.press("Enter")
    given.blur()


def with_steps(page, steps):
    quiet(page)
    set_number(page, "use-steps", steps)
    assert page.locator("#use-steps input[type=number]").input_value() == str(steps)


def generated(page):
    """Generate, and wait for the image."""
    page.locator("#use-generate").click()
    finished(page)


def finished(page):
    """Wait for the end of a generation."""
    page.wait_for_selector("#use-cancel")
    page.wait_for_selector("#use-cancel", state="detached")
    page.wait_for_function("document.querySelector('#use-progress').innerText.includes('Done in')")
    page.wait_for_selector("#use-generate:not([disabled])")


def saved_images(server):
    """The saved images, newest first."""
    return sorted((server.uploads / ".drawn").glob("*.png"), reverse=True)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def pick(page, field, option):
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()


@pytest.mark.slow(16)
def test_a_seed_is_random_or_kept_and_an_image_can_be_varied_marked_and_deleted(server, new_page, screenshot):
    page, kept = opened(new_page, server), len(saved_images(server))
    assert page.locator("#use-prompt textarea").input_value() == "a star in the snow"
    page.locator("#use-suggestions button", has_text="a star at night").click()
    page.wait_for_function("document.querySelector('#use-prompt textarea').value === 'a star at night'")
    with_steps(page, 30)
    pick(page, "use-sampler", "DPM++ 2M Karras")
    page.evaluate(REMEMBERING_PREVIEW)
    page.locator("#use-prompt textarea").press("Enter")
    finished(page)
    assert page.evaluate("window.hadPreview")
    with_steps(page, 3)
    # The prompt's own key and that of the page are one generation.
    page.locator("#use-prompt textarea").press("Control+Enter")
    finished(page)
    page.locator("#use-seeding input[value='Same seed']").check()
    page.locator("#use-seed input").press("Control+Enter")
    finished(page)
    newest, same, other = saved_images(server)[: len(saved_images(server)) - kept]
    assert newest.read_bytes() == same.read_bytes() != other.read_bytes()
    made = read_settings(newest)
    assert (made["prompt"], made["sampler"], made["adapters"][0]["scale"]) == ("a star at night", "DPM++ 2M Karras", 1.0)
    assert page.request.get(page.locator("#use-gallery img").first.get_attribute("src")).body() == newest.read_bytes()
    screenshot(page, "use")
    page.locator("#use-gallery .thumbnail-lg").first.click()
    page.wait_for_function("document.querySelector('#use-details').innerText.includes('a star at night')")
    page.locator("#use-vary").click()
    finished(page)
    varied = [read_settings(path)["seed"] for path in saved_images(server)[:4]]
    assert varied == [made["seed"] + distance for distance in (4, 3, 2, 1)]
    page.locator("#use-gallery .caption-label").first.filter(has_text=str(varied[0])).wait_for()
    quiet(page)
    page.locator("#use-gallery .thumbnail-lg").nth(1).click()
    page.wait_for_function(f"document.querySelector('#use-details').innerText.includes('{varied[1]}')")
    page.locator("#use-favourite").click()
    page.locator("#use-filter input[value=Favourites]").check()
    page.wait_for_function("document.querySelectorAll('#use-gallery .thumbnail-lg').length === 1")
    page.locator("#use-delete").click()
    page.locator("#use-details", has_text="No favourites yet").wait_for()
    assert varied[1] not in [read_settings(path)["seed"] for path in saved_images(server)[:3]]


@pytest.mark.slow(4)
def test_on_a_phone_the_images_follow_the_prompt_and_a_failed_run_is_called_ended(server, new_page):
    page = opened(new_page, server, size="phone")
    tops = [page.locator(f"#use-{name}").bounding_box()["y"] for name in ("prompt", "generate", "filter", "weight", "layout")]
    assert tops == sorted(tops)
    broken = run_in(server.runs / "20990101-000000-broken", "failed", error="RuntimeError: out of memory")
    try:
        page = new_page(server.url, size="phone")
        go_to(page, "use")
        page.locator("#use-empty b", has_text="This run ended without an adapter").wait_for(timeout=PATIENCE)
        assert "out of memory. Resume it" in page.locator("#use-empty").inner_text()
    finally:
        shutil.rmtree(broken.path)


@pytest.mark.slow(8)
def test_cancel_stops_the_generation_and_the_next_one_works(server, new_page):
    page = opened(new_page, server)
    with_steps(page, 100)
    set_number(page, "use-count", 8)
    kept = len(saved_images(server))
    page.locator("#use-generate").click()
    page.wait_for_function("/step [1-9]/.test(document.querySelector('#use-progress').innerText)")
    assert page.locator("#use-generate").is_disabled()
    page.locator("#use-cancel").click()
    page.wait_for_selector("#use-cancel", state="detached")
    page.wait_for_selector("#use-generate:not([disabled])")
    assert "Cancelled" in told(page)
    finished = len(saved_images(server))
    assert finished < kept + 8
    with_steps(page, 3)
    set_number(page, "use-count", 1)
    generated(page)
    assert len(saved_images(server)) == finished + 1


@pytest.mark.slow(16)
def test_closing_the_tab_stops_the_generation_and_keeps_the_images(server, new_page):
    page = opened(new_page, server)
    with_steps(page, 3)
    generated(page)
    kept = len(saved_images(server))
    with_steps(page, 100)
    set_number(page, "use-count", 8)
    page.locator("#use-generate").click()
    page.wait_for_function("/step [1-9]/.test(document.querySelector('#use-progress').innerText)")
    page.close()
    again = opened(new_page, server)
    again.wait_for_selector("#use-gallery .thumbnail-lg")
    with_steps(again, 3)
    generated(again)
    assert len(saved_images(server)) < kept + 8


@pytest.mark.slow(8)
def test_weight_zero_is_the_base_model(server, new_page):
    page = opened(new_page, server)
    with_steps(page, 3)
    set_number(page, "use-weight", 0)
    page.locator("#use-base input").check()
    generated(page)
    base, adapted = saved_images(server)[:2]
    assert read_settings(base)["adapters"] == []
    assert np.array_equal(pixels(base), pixels(adapted))
    set_number(page, "use-weight", 1)
    generated(page)
    base, adapted = saved_images(server)[:2]
    assert not np.array_equal(pixels(base), pixels(adapted))


@pytest.mark.slow(14)
def test_combined_adapters_generate_are_reused_and_merged_for_stock_diffusers(server, new_page, tmp_path):
    page = opened(new_page, server)
    with_steps(page, 3)
    set_number(page, "use-weight", 0.5)
    set_number(page, "use-seed", 7)
    page.locator("#use-blocks-0 button").first.click()
    page.locator("#use-down-0 input[type=number]").wait_for()
    quiet(page)
    set_number(page, "use-down-0", 0.5)
    page.locator("#use-combine button").first.click()
    page.locator("#use-mixed-0 input").click()
    page.get_by_role("option").nth(1).click()
    set_number(page, "use-mixed-weight-0", 0.7)
    generated(page)
    mixed = saved_images(server)[0]
    settings = read_settings(mixed)
    assert [each["scale"] for each in settings["adapters"]] == [0.5, 0.7]
    assert (settings["seed"], settings["num_inference_steps"]) == (7, 3)
    assert settings["adapters"][0]["blocks"] == {"down": 0.5, "mid": 1.0, "up": 1.0}
    # A merged file has one weight for each adapter.
    set_number(page, "use-down-0", 1)
    generated(page)
    mixed = saved_images(server)[0]
    page.locator("#use-layout input[value=diffusers]").check()
    with page.expect_download() as download:
        page.locator("#use-merge").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    stock = StableDiffusionXLPipeline.from_pretrained(BUILT_IN_MODEL, dtype=torch.float32, add_watermarker=False)
    stock.load_lora_weights(tmp_path, weight_name=file.name)
    generator = torch.Generator().manual_seed(7)
    image = stock(settings["prompt"], num_inference_steps=3, guidance_scale=4.0, generator=generator).images[0]
    assert np.abs(np.asarray(image).astype(int) - pixels(mixed)).max() <= 1

    reload(page)
    page = opened(lambda *_, **__: page, server)
    page.locator("#use-gallery .thumbnail-lg").first.click()
    page.locator("#use-again").click()
    page.wait_for_function("document.querySelector('#use-seed input').value === '7'")
    quiet(page)
    generated(page)
    assert saved_images(server)[0].read_bytes() == mixed.read_bytes()


@pytest.mark.slow(7)
def test_every_layout_of_the_adapter_can_be_downloaded_with_a_card(server, new_page, tmp_path):
    page = opened(new_page, server)
    names = []
    for layout in ("full", "diffusers", "kohya"):
        page.locator(f"#use-layout input[value={layout}]").check()
        with page.expect_download() as download:
            page.locator("#use-download").click()
        names.append(download.value.suggested_filename)
        assert Path(download.value.path()).stat().st_size > 1000
        if layout != "full":
            with safe_open(download.value.path(), "pt") as file:
                header = file.metadata()
            assert header.items() >= HEADER.items()
            assert header.get("ss_base_model_version") == ("custom" if layout == "kohya" else None)
        page.locator("#use-card h3", has_text=names[-1]).wait_for()
    assert names == ["a-star-step2-full.zip", "a-star-step2-diffusers.safetensors", "a-star-step2.safetensors"]
    # The built-in model is no SDXL, and a LoRA has no smaller form.
    assert page.locator("#screen-use").inner_text().count("fit the demo model alone") == 1
    assert "a-star-step2.safetensors" in page.locator("#use-code").inner_text()
    assert page.locator("#use-workflow").count() == 0
    assert "For ComfyUI" not in page.locator("#use-layout").inner_text()
    assert page.locator("#use-layout input[value=compact]").count() == 0
