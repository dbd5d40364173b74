"""Classify in a real browser: from a zip of three classes to a classifier, corrections, and the next classifier."""

import csv
import json
import re
import zipfile
from pathlib import Path

import pytest
from browsing import go_to, quiet, reload
from class_folders import COLOURS, colour_folder, colour_zip, coloured, finished_classifier, images_of
from playwright.sync_api import expect
from processes import wait_for

from training.runs.run_files import Launch
from webui import classifiers
from webui.classifiers import result_of, source_of
from webui.datasets import Dataset
from webui.workspace import Workspace

SOON, TRAINED = 180_000, 600_000
STEPS = 2


def opened(new_page, server, **named):
    """A page with a long timeout, for a machine under load."""
    page = new_page(server.url, **named)
    page.set_default_timeout(TRAINED)
    return page


def to_classify(page, part=None):
    """Open a part of the screen Classify."""
    go_to(page, "classify")
    if part is not None:
        page.locator("#classify-steps").get_by_role("tab", name=part, exact=True).click()


def choose(page, dropdown, option):
    """Choose an option of a dropdown by its text."""
    page.locator(f"{dropdown} input").first.click()
    page.get_by_role("option", name=option).first.click()


def has_no_sideways_scroll(page):
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.fixture(scope="module")
def server(app_server):
    """One server for all of this module."""
    return app_server()


@pytest.fixture(scope="module")
def workspace(server):
    """The workspace of the server's user."""
    return Workspace(server.runs, server.uploads, is_local=True)


@pytest.mark.slow(80)
def test_from_a_zip_to_a_classifier_that_is_trained_again_with_a_correction(server, workspace, new_page, tmp_path, screenshot):
    page = opened(new_page, server)
    to_classify(page)
    expect(page.locator("#classify-classes .class-card")).to_have_count(9, timeout=TRAINED)
    expect(page.locator("#classify-summary .figure")).to_be_visible(timeout=SOON)
    assert int(page.locator("#classify-summary .figure").inner_text().rstrip("%")) >= 90
    expect(page.locator("#classify-summary")).to_contain_text("knows these classes from their names alone")
    screenshot(page, "each/classify-example")

    page.set_input_files("#classify-zip input[type=file]", colour_zip(tmp_path / "colours.zip", 8))
    expect(page.locator("#classify-classes .class-card")).to_have_count(3, timeout=SOON)
    expect(page.locator("#classify-message")).to_contain_text("24 images added")
    expect(page.locator("#classify-summary .figure")).to_be_visible(timeout=SOON)
    edit_classes(page, screenshot)

    page.locator("#classify-go-train").click()
    page.locator("#classify-command-shown > button").click()
    shown = page.locator("#classify-command")
    expect(shown).to_contain_text("--method zeroshot pixels linear_probe nora", timeout=SOON)
    shorten(page)
    words = " ".join(shown.inner_text().split())
    screenshot(page, "each/classify-train")
    page.locator("#classify-start").click()
    expect(page.locator("#train-stop")).to_be_visible(timeout=SOON)
    reload(page)
    go_to(page, "train")
    expect(page.locator("#train-next")).to_have_text("See the classifier", timeout=TRAINED)
    (run_id,) = workspace.run_ids()
    run = workspace.run(run_id)
    started = Launch.read(run.path).command
    assert all(word in words for word in started[:-1] if "/" not in word and " " not in word)
    assert [word for word in started if word.endswith("=<b>green</b> = leaf")]

    result = result_of(run, result_of(run).report.classifier)
    assert result.classes == ["<b>green</b> = leaf", "ruby", "sea"]
    data_dir = Path(json.loads((run.path / "options.json").read_text())["data"]["data_dir"])
    tested = images_of(Dataset.of(workspace, data_dir.name), "test")
    assert len(result.tested) == result.trial.test.count == len(tested)
    assert all(source_of(run, one) is not None for one in result.tested)
    assert set(classifiers.downloads(result)) == set(classifiers.DOWNLOADS)

    page.locator("#train-next").click()
    expect(page.locator("#classify-words")).to_contain_text("They were not used for training", timeout=SOON)
    counts = result_of(run).trial.test.confusion
    cell = page.locator("#classify-confusion button").last
    expected = counts[int(cell.get_attribute("data-true"))][int(cell.get_attribute("data-predicted"))]
    cell.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#classify-cell figure")).to_have_count(expected, timeout=SOON)
    expect(page.locator("#classify-cell img")).to_have_count(expected)
    with page.expect_download() as download:
        page.locator("#classify-download-table").click()
    rows = list(csv.DictReader(download.value.path().open(newline="")))
    assert len(rows) == sum(map(sum, counts))
    choose(page, "#classify-method", "NoRA")
    with page.expect_download() as download:
        page.locator("#classify-download-compact").click()
    assert any(name.endswith(".safetensors") for name in zipfile.ZipFile(download.value.path()).namelist())
    screenshot(page, "each/classify-result")

    page.locator("#classify-steps").get_by_role("tab", name="4 Use", exact=True).click()
    use_live(page, tmp_path, screenshot)
    said = correct_one(page)
    screenshot(page, "each/classify-use")
    page.locator("#classify-again").click()
    expect(page.locator("#train-stop")).to_be_visible(timeout=SOON)
    newest, *_ = workspace.run_ids()
    assert newest != run_id
    again = workspace.run(newest)
    wait_for(lambda: list(again.path.glob("splits/*.json")))
    assert part_of(again, "test") == part_of(run, "test") == tested
    learned = list(part_of(again, "train", "val") - part_of(run, "train", "val"))
    assert len(learned) == 1
    assert again.options()["optimisation"]["min_train_steps"] == STEPS
    names = dict(pair.split("=", 1) for pair in again.options()["data"]["class_names"])
    assert names[learned[0].split("/")[0]] == said
    page.locator("#train-stop").click()
    expect(page.locator("#train-resume")).to_be_visible(timeout=SOON)


def edit_classes(page, screenshot):
    """Move two images of leaf to ruby at once, delete four at once after a question, and rename the class."""
    page.locator("#classify-edit > button").click()
    choose(page, "#classify-class", "leaf")
    boxes = page.locator("#classify-class-images input[type=checkbox]")
    expect(boxes).to_have_count(8, timeout=SOON)
    boxes.nth(0).check()
    boxes.nth(1).check()
    choose(page, "#classify-move-to", "ruby")
    screenshot(page, "each/classify-pictures")
    page.get_by_role("button", name="Move 2 images").click()
    expect(boxes).to_have_count(6, timeout=SOON)
    quiet(page)
    expect(page.locator("#classify-classes")).to_contain_text("10 images", timeout=SOON)
    choose(page, "#classify-class", "ruby")
    expect(boxes).to_have_count(10, timeout=SOON)
    quiet(page)
    for place in range(4):
        boxes.nth(place).check()
    quiet(page)
    page.locator("#classify-remove").click()
    page.locator("#classify-delete-yes").get_by_text("Delete 4 images").click()
    expect(page.locator("#classify-classes")).not_to_contain_text("10 images", timeout=SOON)
    expect(boxes).to_have_count(6, timeout=SOON)
    quiet(page)
    choose(page, "#classify-class", "leaf")
    quiet(page)
    expect(boxes).to_have_count(6, timeout=SOON)
    page.locator("#classify-rename-to textarea, #classify-rename-to input").first.fill("<b>green</b> = leaf")
    page.locator("#classify-rename").click()
    expect(page.locator("#classify-classes")).to_contain_text("<b>green</b> = leaf", timeout=SOON)
    quiet(page)


def use_live(page, tmp_path, screenshot):
    """One image is answered at once, then two at a time."""
    files = [tmp_path / "new-0.png", tmp_path / "new-1.png"]
    for place, (file, name) in enumerate(zip(files, ("sea", "ruby"), strict=True)):
        file.write_bytes(coloured(name, 50 + place))
    page.set_input_files("#classify-live input[type=file]", files[0])
    expect(page.locator("#classify-answer .share")).to_have_count(3, timeout=SOON)
    screenshot(page, "each/classify-live")
    page.set_input_files("#classify-new-files input[type=file]", files)
    expect(page.locator("#classify-predictions .shares")).to_have_count(2, timeout=SOON)


def correct_one(page):
    """Choose another class than the predicted one for the first image; returns its name."""
    page.locator("#classify-correct-0 input").click()
    # The first option is the predicted class.
    corrected = page.get_by_role("option").nth(1)
    said = corrected.inner_text().strip()
    corrected.click()
    return re.sub("^correct: |^✓ *", "", said)


def shorten(page):
    """Set a few steps in the expert panel."""
    page.locator("#classify-panel > summary").click()
    page.locator("#classify-panel-optimisation > summary").click(timeout=SOON)
    for name, number in (("iterations_per_shot", 1), ("min_train_steps", STEPS)):
        box = page.locator(f"#classify-optimisation-{name}")
        box.fill(str(number))
        box.blur()
        expect(page.locator("#classify-command")).to_contain_text(f"--{name} {number}", timeout=SOON)


def part_of(run, *parts):
    """The names of the images in these parts of a run's split."""
    (path,) = (run.path / "splits").glob("*.json")
    split = json.loads(path.read_text())
    return {name for part in parts for name, *_ in split[part]}


@pytest.mark.slow(12)
def test_a_class_is_created_from_a_name_and_images_and_other_files_are_refused(server, new_page, tmp_path):
    page = opened(new_page, server)
    to_classify(page)
    expect(page.locator("#classify-classes .class-card").first).to_be_visible(timeout=TRAINED)
    choose(page, "#classify-set", "Example: handwritten digits")
    expect(page.locator("#classify-classes .class-card")).to_have_count(10, timeout=SOON)
    (tmp_path / "broken.zip").write_text("no zip")
    page.set_input_files("#classify-zip input[type=file]", tmp_path / "broken.zip")
    expect(page.locator("#classify-message")).to_contain_text("not a zip", timeout=SOON)
    expect(page.locator("#classify-zip")).not_to_contain_text("broken.zip")
    expect(page.locator("#classify-zip").get_by_text("Error")).to_have_count(0)
    page.get_by_role("tab", name="One class at a time").click()
    quiet(page)
    files = [tmp_path / "ruby-0.png", tmp_path / "ruby-1.png"]
    for place, file in enumerate(files):
        file.write_bytes(coloured("ruby", place))
    (tmp_path / "page.png").write_text("<html><script>alert(1)</script></html>")
    expect(page.locator("#classify-add")).to_be_disabled()
    page.set_input_files("#classify-class-files input[type=file]", [*files, tmp_path / "page.png"])
    expect(page.locator("#classify-add")).to_be_enabled(timeout=SOON)
    name = page.locator("#classify-class-name input, #classify-class-name textarea").first
    name.fill("ruby")
    expect(name).to_have_value("ruby")
    page.locator("#classify-add").click()
    expect(page.locator("#classify-classes .class-card")).to_have_count(1, timeout=SOON)
    expect(page.locator("#classify-message")).to_contain_text("2 images added")
    expect(page.locator("#classify-message")).to_contain_text("page.png is not a JPEG, PNG, WebP")
    expect(page.locator("#classify-summary")).to_contain_text("only one class")
    expect(page.locator("#classify-go-train")).to_be_disabled()


def test_a_local_folder_is_used_in_place(server, new_page, tmp_path):
    given = colour_folder(tmp_path / "mine", 5)
    page = opened(new_page, server)
    to_classify(page)
    page.get_by_role("tab", name="Local folder").click()
    page.locator("#classify-folder input, #classify-folder textarea").first.fill(str(given))
    page.locator("#classify-use-folder").click()
    expect(page.locator("#classify-classes .class-card")).to_have_count(3, timeout=TRAINED)
    expect(page.locator("#classify-summary")).to_contain_text("which the app never changes")
    page.locator("#classify-go-train").click()
    expect(page.locator("#classify-about")).to_contain_text("6 of its 15 images are test images", timeout=SOON)


@pytest.mark.slow(12)
def test_every_part_fits_a_phone(server, workspace, new_page, tmp_path, screenshot):
    keys = [f"{name}{place}" for place in range(4) for name in COLOURS]
    images = colour_folder(tmp_path / "pictures", 2, keys)
    finished_classifier(workspace, images, {key: f"{key} with quite a long name" for key in keys}, wrong=1)
    page = opened(new_page, server, size="phone", dark=True)
    to_classify(page)
    for part in ("1 Images", "2 Train", "3 Result", "4 Use"):
        page.locator("#classify-steps").get_by_role("tab", name=part, exact=True).click()
        quiet(page)
        if part == "3 Result":
            page.locator("#classify-confusion td.wrong button").first.click(timeout=SOON)
            names_stay_whole_and_in_view(page)
            expect(page.locator("#classify-cell img").first).to_be_visible(timeout=SOON)
        quiet(page)
        screenshot(page, f"each/classify-phone-{part[2:].lower()}")
        assert has_no_sideways_scroll(page)


def names_stay_whole_and_in_view(page):
    """No name of the confusion matrix breaks into several lines, and the rows' names do not scroll away."""
    one_line = "names => names.every(name => Math.min(name.clientWidth, name.clientHeight) < 30)"
    names = page.locator("#classify-confusion th[scope] span")
    assert names.evaluate_all(one_line)
    box, row = page.locator("#classify-confusion .scroll"), page.locator("#classify-confusion th[scope=row]").first
    box.evaluate("box => { box.scrollLeft = box.scrollWidth }")
    assert box.evaluate("box => box.scrollLeft") > 0
    assert abs(row.bounding_box()["x"] - box.bounding_box()["x"]) < 1
    box.evaluate("box => { box.scrollLeft = 0 }")
