"""The screen Use in a real browser: generate, cancel, combine adapters, reuse settings and download."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import go_to, quiet, reload
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from small_runs import small_run

from pipelines.built_in import BUILT_IN_MODEL
from pipelines.images import read_settings
from pipelines.subject.base_model import load_base_model

PATIENCE = 180_000


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
    if not page.locator("#use-steps").is_visible():
        page.locator("#use-more button").first.click()
        # Gradio resets what is typed while the fields are being created.
        page.locator("#use-steps input[type=number]").wait_for()
        quiet(page)
    set_number(page, "use-steps", steps)
    assert page.locator("#use-steps input[type=number]").input_value() == str(steps)


def generated(page):
    """Generate, and wait for the image."""
    page.locator("#use-generate").click()
    page.wait_for_selector("#use-cancel")
    page.wait_for_selector("#use-cancel", state="detached")
    page.wait_for_function("document.querySelector('#use-progress').innerText.includes('Done in')")
    page.wait_for_selector("#use-generate:not([disabled])")


def saved_images(server):
    """The saved images, newest first."""
    return sorted((server.uploads / ".drawn").glob("*.png"), reverse=True)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow(12)
def test_an_image_is_reproducible_and_contains_its_settings(server, new_page, screenshot):
    page = opened(new_page, server)
    assert page.locator("#use-prompt textarea").input_value() == "a star in the snow"
    page.locator("#use-suggestions button", has_text="a star at night").click()
    page.wait_for_function("document.querySelector('#use-prompt textarea').value === 'a star at night'")
    with_steps(page, 3)
    generated(page)
    generated(page)
    first, second, *_ = saved_images(server)
    assert first.read_bytes() == second.read_bytes()
    said = read_settings(first)
    assert (said["prompt"], said["seed"], said["adapters"][0]["scale"]) == ("a star at night", 0, 1.0)
    page.locator("#use-gallery .thumbnail-lg").first.click()
    page.wait_for_function("document.querySelector('#use-details').innerText.includes('a star at night')")
    shown = page.locator("#use-gallery img").first.get_attribute("src")
    served = page.request.get(shown)
    assert served.body() == first.read_bytes()
    screenshot(page, "use")


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
    page.locator("#use-combine button").first.click()
    page.locator("#use-mixed-0 input").click()
    page.get_by_role("option").nth(1).click()
    set_number(page, "use-mixed-weight-0", 0.7)
    generated(page)
    mixed = saved_images(server)[0]
    settings = read_settings(mixed)
    assert [each["scale"] for each in settings["adapters"]] == [0.5, 0.7]
    assert (settings["seed"], settings["num_inference_steps"]) == (7, 3)
    page.locator("#use-merge-layout input[value=diffusers]").check()
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
def test_every_layout_of_the_adapter_can_be_downloaded(server, new_page, tmp_path):
    page = opened(new_page, server)
    names = []
    for layout in ("full", "diffusers", "kohya"):
        with page.expect_download() as download:
            page.locator(f"#use-download-{layout}").click()
        names.append(download.value.suggested_filename)
        assert Path(download.value.path()).stat().st_size > 1000
    run = names[0].partition("-step")[0]
    step = re.search(r"step-(\d+)", names[0])[1]
    assert names == [f"{run}-step-{step}-{end}" for end in ("full.zip", "diffusers.safetensors", "kohya.safetensors")]
    # A LoRA has no smaller form.
    assert page.locator("#use-download-compact").is_hidden()
    assert "KB" in page.locator("#use-size-full").inner_text()


@pytest.mark.slow(10)
def test_without_a_run_the_screen_says_what_to_do(app_server, new_page):
    page = new_page(app_server().url)
    page.set_default_timeout(PATIENCE)
    go_to(page, "use")
    page.wait_for_selector("#use-empty")
    assert "There is no adapter yet" in page.locator("#use-empty").inner_text()
    assert not page.locator("#use-generate").is_visible()
