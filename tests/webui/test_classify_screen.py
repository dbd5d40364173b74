"""Classify in a real browser: from a zip of three classes to a classifier and its correction, and what each part says."""

import csv
import zipfile
from pathlib import Path

import pytest
from browsing import go_to, quiet
from class_folders import COLOURS, colour_folder, colour_zip, coloured, finished_classifier, images_of
from playwright.sync_api import expect
from run_folders import add_checkpoint, finished_run, run_in

from training.runs.run_files import Launch
from webui import classifiers, launching
from webui.classifiers import result_of, source_of
from webui.datasets import Dataset
from webui.workspace import Workspace

# In milliseconds, for a machine under load.
SOON, TRAINED = 180_000, 600_000
STEPS = 2
SUBJECT, STOPPED = "20990101-000001-subject", "20990101-000002-stopped"


def opened(new_page, server, query="tab=classify", **named):
    """A page at an address; it says yes to every question."""
    page = new_page(**named)
    page.set_default_timeout(SOON)
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(f"{server.url}?{query}")
    return page


def to_part(page, part):
    """Open a part of the screen Classify."""
    page.locator("#classify-steps").get_by_role("tab", name=part, exact=True).click()


def choose(page, dropdown, option):
    """Choose an option of a dropdown by its text."""
    page.locator(f"{dropdown} input").first.click()
    page.get_by_role("option", name=option).first.click()


@pytest.fixture(autouse=True, scope="module")
def patient():
    """Expectations wait for a machine under load."""
    expect.set_options(timeout=SOON)
    yield
    expect.set_options(timeout=5000)


@pytest.fixture(scope="module")
def server(app_server):
    """One server for all of this module."""
    return app_server()


@pytest.fixture(scope="module")
def workspace(server):
    """The workspace of the server's user."""
    return Workspace(server.runs, server.uploads, is_local=True)


@pytest.mark.slow(60)
def test_from_a_zip_to_a_classifier_that_is_trained_again_with_a_correction(server, workspace, new_page, tmp_path, screenshot):
    page = opened(new_page, server)
    expect(page.locator("#classify-classes .class-card")).to_have_count(9)
    expect(page.locator("#classify-summary .figure")).to_be_visible()
    assert int(page.locator("#classify-summary .figure").inner_text().rstrip("%")) >= 90
    expect(page.locator("#classify-summary")).to_contain_text("knows these classes from their names alone")
    screenshot(page, "each/classify-example")

    page.set_input_files("#classify-zip input[type=file]", colour_zip(tmp_path / "colours.zip", 8))
    expect(page.locator("#classify-classes .class-card")).to_have_count(3)
    expect(page.locator("#classify-message")).to_contain_text("24 images added")
    edit_classes(page, screenshot)

    page.locator("#classify-go-train").click()
    page.locator("#classify-command-shown > button").click()
    shown = page.locator("#classify-command")
    expect(shown).to_contain_text("--method zeroshot pixels linear_probe nora")
    shorten(page)
    words = " ".join(shown.inner_text().split())
    screenshot(page, "each/classify-train")
    page.locator("#classify-start").click()
    expect(page.locator("#train-next")).to_have_text("See the classifier", timeout=TRAINED)
    (run_id,) = workspace.run_ids()
    run = workspace.run(run_id)
    started = Launch.read(run.path).command
    assert all(word in words for word in started[:-1] if "/" not in word and " " not in word)
    assert [word for word in started if word.endswith("=<b>green</b> = leaf")]

    result = result_of(run, result_of(run).report.classifier)
    assert result.classes == ["<b>green</b> = leaf", "ruby", "sea"]
    dataset = Dataset(Path(run.options()["data"]["data_dir"]))
    assert len(result.tested) == result.trial.test.count == len(images_of(dataset, "test"))
    assert {one.name for one in result.tested} == images_of(dataset, "test")
    assert all(source_of(run, one) is not None for one in result.tested)
    assert set(classifiers.downloads(result)) == set(classifiers.DOWNLOADS)

    page.locator("#train-next").click()
    result_can_be_examined(page, result_of(run))
    screenshot(page, "each/classify-result")
    to_part(page, "4 Use")
    use_live(page, tmp_path, screenshot)
    field = page.locator("#classify-predictions select").first
    said = field.locator("option").nth(1).inner_text()
    field.select_option(said)
    screenshot(page, "each/classify-use")
    page.get_by_role("button", name="Add the corrected images and train again").click()
    expect(page.locator("#train-stop")).to_be_visible()
    newest, *_ = workspace.run_ids()
    assert newest != run_id
    again = Launch.read(workspace.run(newest).path).options
    launching.stop(workspace, newest)
    assert (again["data"]["data_dir"], int(again["optimisation"]["min_train_steps"])) == (str(dataset.folder), STEPS)
    assert images_of(dataset, "test") == {one.name for one in result.tested}
    assert len(dataset.content().images()) == 21
    assert said in [one.name for one in dataset.content().classes if any(image.name == "new-0.png" for image in one.images)]


def edit_classes(page, screenshot):
    """Move two images of leaf to ruby at once, delete four at once, and rename the class."""
    page.get_by_role("button", name="Edit leaf").click()
    boxes = page.locator("#classify-edit input[type=checkbox]")
    expect(boxes).to_have_count(8)
    boxes.nth(0).check()
    boxes.nth(1).check()
    page.locator("#classify-edit select").select_option("ruby")
    screenshot(page, "each/classify-pictures")
    page.get_by_role("button", name="Move 2 images").click()
    expect(boxes).to_have_count(6)
    expect(page.locator("#classify-edit input:checked")).to_have_count(0)
    page.locator("#classify-edit input[name=name]").fill("<b>green</b> = leaf")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Edit <b>green</b> = leaf").wait_for()
    page.get_by_role("button", name="Edit ruby").click()
    expect(boxes).to_have_count(10)
    for place in range(4):
        boxes.nth(place).check()
    page.get_by_role("button", name="Delete 4 images").click()
    expect(boxes).to_have_count(6)
    expect(page.locator("#classify-classes")).not_to_contain_text("10 images")
    expect(page.locator("#classify-summary .figure")).to_be_visible()


def result_can_be_examined(page, result):
    """The best method comes first, a cell of the matrix opens its images, and files can be downloaded."""
    expect(page.locator("#classify-words .figure")).to_have_text(classifiers.share(result.best.test.top1.value))
    expect(page.locator("#classify-words")).to_contain_text("test accuracy of the best of 4 methods")
    counts = result.trial.test.confusion
    cell = page.locator("#classify-confusion button").last
    expected = counts[int(cell.get_attribute("data-true"))][int(cell.get_attribute("data-predicted"))]
    cell.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#classify-cell img")).to_have_count(expected)
    with page.expect_download() as download:
        page.locator("#classify-download-table").click()
    assert len(list(csv.DictReader(download.value.path().open(newline="")))) == sum(map(sum, counts))
    choose(page, "#classify-method", "NoRA")
    with page.expect_download() as download:
        page.locator("#classify-download-compact").click()
    assert any(name.endswith(".safetensors") for name in zipfile.ZipFile(download.value.path()).namelist())


def use_live(page, tmp_path, screenshot):
    """One image is answered at once, then two at a time."""
    files = [tmp_path / "new-0.png", tmp_path / "new-1.png"]
    for place, (file, name) in enumerate(zip(files, ("sea", "ruby"), strict=True)):
        file.write_bytes(coloured(name, 50 + place))
    page.set_input_files("#classify-live input[type=file]", files[0])
    expect(page.locator("#classify-answer .share")).to_have_count(3)
    screenshot(page, "each/classify-live")
    page.set_input_files("#classify-new-files input[type=file]", files)
    expect(page.locator("#classify-predictions .shares")).to_have_count(2)


def shorten(page):
    """Set a few steps in the expert panel."""
    page.locator("#classify-panel > summary").click()
    page.locator("#classify-panel-optimisation > summary").click()
    for name, number in (("iterations_per_shot", 1), ("min_train_steps", STEPS)):
        box = page.locator(f"#classify-optimisation-{name}")
        box.fill(str(number))
        box.blur()
        expect(page.locator("#classify-command")).to_contain_text(f"--{name} {number}")


@pytest.mark.slow(12)
def test_a_class_is_created_from_images_a_folder_is_used_in_place_and_other_files_are_refused(server, new_page, tmp_path):
    page = opened(new_page, server)
    expect(page.locator("#classify-classes .class-card").first).to_be_visible()
    choose(page, "#classify-set", "Example: handwritten digits")
    expect(page.locator("#classify-classes .class-card")).to_have_count(10)
    (tmp_path / "broken.zip").write_text("no zip")
    page.set_input_files("#classify-zip input[type=file]", tmp_path / "broken.zip")
    expect(page.locator("#classify-message")).to_contain_text("not a zip")
    expect(page.locator("#classify-zip")).not_to_contain_text("broken.zip")
    expect(page.locator("#classify-zip").get_by_text("Error")).to_have_count(0)
    page.get_by_role("tab", name="One class at a time").click()
    (tmp_path / "ruby.png").write_bytes(coloured("ruby", 0))
    (tmp_path / "page.png").write_text("<html><script>alert(1)</script></html>")
    expect(page.locator("#classify-add")).to_be_disabled()
    page.set_input_files("#classify-class-files input[type=file]", [tmp_path / "ruby.png", tmp_path / "page.png"])
    expect(page.locator("#classify-add")).to_be_enabled()
    # Gradio has no text for this button: it showed the key common.upload.
    expect(page.locator("#classify-class-files").get_by_label("Upload", exact=True)).to_be_visible()
    page.locator("#classify-class-name").get_by_role("textbox").fill("ruby")
    page.locator("#classify-add").click()
    expect(page.locator("#classify-classes .class-card")).to_have_count(1)
    expect(page.locator("#classify-message")).to_contain_text("1 image added")
    expect(page.locator("#classify-message")).to_contain_text("page.png is not a JPEG, PNG, WebP")
    expect(page.locator("#classify-summary")).to_contain_text("only one class")
    expect(page.locator("#classify-go-train")).to_be_disabled()

    page.get_by_role("tab", name="Local folder").click()
    page.locator("#classify-folder").get_by_role("textbox").fill(str(colour_folder(tmp_path / "mine", 5)))
    page.locator("#classify-use-folder").click()
    expect(page.locator("#classify-classes .class-card")).to_have_count(3)
    expect(page.locator("#classify-summary")).to_contain_text("which the app never changes")
    page.locator("#classify-go-train").click()
    expect(page.locator("#classify-about")).to_contain_text("6 of its 15 images are test images")


@pytest.fixture
def classifier(workspace, tmp_path):
    """The id of a finished classifier of twelve classes, beside a finished and a stopped run of a subject."""
    finished_run(workspace.runs / SUBJECT)
    add_checkpoint(run_in(workspace.runs / STOPPED, "stopped", steps=25, total=160), 26)
    keys = [f"{name}{place}" for place in range(4) for name in COLOURS]
    images = colour_folder(tmp_path / "pictures", 2, keys)
    return finished_classifier(workspace, images, {key: f"{key} with quite a long name" for key in keys}, wrong=1).path.name


def open_run(page, run_id):
    """Select a run on Runs and open it."""
    go_to(page, "runs")
    page.locator(f'button.run[data-run="{run_id}"]').click()
    page.locator(f'button.run[data-run="{run_id}"][aria-pressed=true]').wait_for()
    page.locator("#runs-open").click()


@pytest.mark.slow(20)
def test_a_classifier_opened_from_runs_is_told_plainly_fits_a_phone_and_leaves_the_subject_run(
    server, classifier, new_page, screenshot
):
    page = opened(new_page, server, f"tab=runs&run={SUBJECT}", size="phone", dark=True)
    open_run(page, classifier)
    expect(page.locator("#classify-words .figure")).to_have_text("96%")
    expect(page.locator("#classify-words")).to_contain_text("test accuracy of the best of 3 methods, NoRA: 23 of 24")
    expect(page.locator("#classify-words")).to_contain_text("The base model does not know these class names")
    page.locator("#classify-confusion td.wrong button").first.click()
    names_stay_whole_and_in_view(page)
    expect(page.locator("#classify-cell img").first).to_be_visible()
    for part in ("1 Images", "2 Train", "3 Result", "4 Use"):
        to_part(page, part)
        quiet(page)
        screenshot(page, f"each/classify-phone-{part[2:].lower()}")
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    go_to(page, "judge")
    expect(page.locator("#judge-suggestion")).to_contain_text("Step")
    go_to(page, "train")
    expect(page.locator("#train-next")).to_have_text("See the classifier")
    open_run(page, STOPPED)
    expect(page.locator("#train-state")).to_contain_text("26 of 160 steps were done")
    expect(page.locator("#train-state")).to_contain_text("Everything up to step 26 is saved.")


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
