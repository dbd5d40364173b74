"""Photos and Check in a real browser: from the example or uploads to the start of a run."""

import json
import re

import pillow_heif
import pytest
from browsing import go_to, quiet, reload
from PIL import Image, ImageFilter
from playwright.sync_api import expect
from processes import wait_for
from stand_in_trainer import BEGAN, TOTAL, UNTIL

from pipelines.sample_subject import sample_images
from pipelines.subject.heldout import choose_heldout, num_folds
from training.options import NEW_SCENES
from webui.tasks import DRY_RUNS

# Loading the libraries takes a while when several tests share two cores.
PATIENCE = 120_000


@pytest.fixture(scope="module")
def server(app_server):
    return app_server(script="tests/webui/stand_in_app.py")


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """Sharp images of the toy, a blurred one, and a text file with the name of an image."""
    folder = tmp_path_factory.mktemp("uploads")
    images = sample_images()
    for name, image in (("front.png", images[0]), ("side.jpg", images[1]), ("back.png", images[2])):
        image.save(folder / name)
    images[3].filter(ImageFilter.GaussianBlur(9)).save(folder / "dim.png")
    (folder / "letter.png").write_text("not an image")
    return [str(folder / name) for name in ("front.png", "side.jpg", "dim.png", "letter.png", "back.png")]


def opened(new_page, server, **how):
    page = new_page(server.url, **how)
    expect(page.locator(".photo-card").first).to_be_visible(timeout=PATIENCE)
    return page


def examined(page):
    """Wait until all photos are checked."""
    expect(page.locator(".photo-card .chip", has_text="checking")).to_have_count(0, timeout=PATIENCE)


def expect_examined(page, names):
    """Wait until the page shows the photos `names`, and all are checked."""
    expect(page.locator(".photo-card .title b")).to_have_text(names, timeout=PATIENCE)
    examined(page)


def with_uploads(new_page, server, uploads, **how):
    page = opened(new_page, server, **how)
    page.set_input_files("#photos-upload input[type=file]", uploads)
    expect(page.locator("#photos-message p")).to_have_count(1, timeout=PATIENCE)
    # The photos of the example have no buttons.
    expect(page.locator(".photo-card button").first).to_be_visible(timeout=PATIENCE)
    return page


def command(page, wanted):
    """The command on Check, once it contains `wanted`."""
    expect(page.locator("#check-command")).to_contain_text(re.compile(wanted), timeout=PATIENCE)
    return page.locator("#check-command .cm-content").inner_text()


def type_into(page, box, text):
    widget = page.locator(f"{box} input, {box} textarea, input{box}").first
    widget.fill(text)
    widget.blur()


def open_check(page):
    """Open the screen Check with its command."""
    page.locator("#photos-check").click()
    page.locator("#check-command-shown > button").click()


def open_panel(page, group):
    page.locator("#subject-panel > summary").click()
    page.locator(f"#subject-panel-{group} > summary").click(timeout=PATIENCE)


def test_the_example_is_labelled_as_one_and_without_photos_the_page_says_what_to_do(new_page, server, screenshot):
    page = opened(new_page, server)
    expect(page.locator("#photos-about")).to_contain_text("Example subject")
    expect_examined(page, ["00.jpg", "01.jpg", "02.jpg", "03.jpg", "04.jpg"])
    expect(page.locator(".photo-card .chip.good")).to_have_count(5)
    expect(page.locator(".photo-card button")).to_have_count(0)
    screenshot(page, "photos-example")
    page.locator("#photos-check").click()
    expect(page.locator("#check-scenes textarea")).to_have_value("\n".join(NEW_SCENES), timeout=PATIENCE)
    go_to(page, "photos")
    page.locator("#photos-own").click()
    expect(page.locator("#photos-empty")).to_contain_text("Drop three to ten photos", timeout=PATIENCE)
    expect(page.locator("#photos-train")).to_be_disabled()


@pytest.mark.slow(11)
def test_uploads_have_verdicts_can_be_moved_and_removed_and_survive_a_reload(new_page, server, uploads, screenshot):
    page = with_uploads(new_page, server, uploads)
    expect(page.locator("#photos-message")).to_contain_text("letter.png is not a JPEG, PNG, WebP")
    expect_examined(page, ["front.png", "side.jpg", "dim.png", "back.png"])
    expect(page.locator(".photo-card", has_text="dim.png")).to_contain_text("Use a sharper image")
    screenshot(page, "photos-uploads")

    page.get_by_label("Move back.png one position earlier").click()
    expect(page.locator(".photo-card").nth(2)).to_contain_text("back.png", timeout=PATIENCE)
    expect(page.get_by_label("Move back.png one position earlier")).to_be_focused()
    page.get_by_label("Remove dim.png").click()
    expect(page.locator(".photo-card")).to_have_count(3, timeout=PATIENCE)
    quiet(page)

    reload(page)
    # The page shows the example until it has read the draft of this browser.
    expect(page.locator(".photo-card")).to_have_count(3, timeout=PATIENCE)
    expect_examined(page, ["front.png", "side.jpg", "back.png"])
    page.locator("#photos-example").click()
    expect(page.locator("#photos-about")).to_contain_text("Example subject", timeout=PATIENCE)
    page.locator("#photos-own").click()
    expect(page.locator(".photo-card")).to_have_count(3, timeout=PATIENCE)


PASTE = """async side => {
  const canvas = document.createElement('canvas'), data = new DataTransfer();
  canvas.width = canvas.height = side;
  canvas.getContext('2d').fillRect(side / 4, 0, side / 2, side);
  const blob = await new Promise(done => canvas.toBlob(done, 'image/png'));
  data.items.add(new File([blob], 'image.png', {type: 'image/png'}));
  document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true}));
}"""


@pytest.mark.slow(25)
def test_photos_are_pasted_captioned_cropped_and_removed_together(new_page, server, uploads, tmp_path, screenshot):
    page = with_uploads(new_page, server, uploads)
    examined(page)
    page.evaluate(PASTE, 300)
    expect_examined(page, ["front.png", "side.jpg", "dim.png", "back.png", "pasted 1.png"])

    # A zip that cannot be used leaves one message, and no error in the field, which takes the next file.
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 no zip")
    page.set_input_files("#photos-upload input[type=file]", tmp_path / "bad.zip")
    expect(page.locator("#photos-message p")).to_have_count(1, timeout=PATIENCE)
    expect(page.locator("#photos-message")).to_contain_text("bad.zip")
    quiet(page)
    expect(page.locator("#screen-photos .error:visible")).to_have_count(0)
    Image.effect_noise((8064, 6048), 60).save(tmp_path / "beach duck.jpg", quality=50)
    page.set_input_files("#photos-upload input[type=file]", tmp_path / "beach duck.jpg")
    expect(page.locator("#photos-message")).to_contain_text("It was downscaled to 4,032 x 3,024", timeout=PATIENCE)
    examined(page)

    page.locator(".photo-card", has_text="beach duck.jpg").get_by_role("button", name="Use “").click()
    caption = page.get_by_label("Caption of beach duck.jpg")
    expect(caption).to_have_value("a photo of sks, beach duck", timeout=PATIENCE)
    # The cards are moved under what was typed.
    page.get_by_label("Move beach duck.jpg one position earlier").click()
    expect(page.locator(".photo-card .title b").nth(4)).to_have_text("beach duck.jpg", timeout=PATIENCE)
    expect(caption).to_have_value("a photo of sks, beach duck")
    expect(page.get_by_label("Caption of pasted 1.png")).to_have_value("")
    page.get_by_label("Crop side.jpg").click()
    expect(page.locator(".crop-box")).to_be_focused(timeout=PATIENCE)
    page.keyboard.press("ArrowLeft")
    screenshot(page, "photos-crop")
    page.get_by_role("button", name="Add the crop").click()
    expect(page.locator(".photo-card .title b").nth(2)).to_have_text("side (crop).jpg", timeout=PATIENCE)
    expect(page.locator(".crop-box")).to_have_count(0)
    examined(page)
    expect(caption).to_have_value("a photo of sks, beach duck")

    page.get_by_label("Select front.png").check()
    page.get_by_label("Select pasted 1.png").check()
    page.get_by_role("button", name="Remove selected (2)").click()
    expect(page.locator(".photo-card")).to_have_count(5, timeout=PATIENCE)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove all").click()
    expect(page.locator("#photos-empty")).to_be_visible(timeout=PATIENCE)
    # The file that was uploaded last can be uploaded again.
    page.set_input_files("#photos-upload input[type=file]", tmp_path / "beach duck.jpg")
    expect(page.locator(".photo-card")).to_have_count(1, timeout=PATIENCE)


@pytest.mark.slow(20)
def test_photos_are_added_by_two_uploads_at_once_from_a_folder_and_by_the_camera(new_page, server, uploads, tmp_path):
    page = opened(new_page, server, permissions=["camera"])
    page.set_default_timeout(PATIENCE)
    examined(page)
    # The page has no response to the first upload when the files of the second one arrive.
    held, released, sets = [], False, set(server.uploads.glob("*/set.json"))
    page.route("**/gradio_api/queue/data**", lambda route: route.continue_() if released else held.append(route))
    for name, path in zip(("front.png", "side.jpg"), uploads, strict=False):
        # The field takes other files once those that it had are being added.
        with page.expect_request(lambda sent, name=name: "/queue/join" in sent.url and name in sent.post_data):
            page.set_input_files("#photos-upload input[type=file]", path)
    released = True
    for route in held:
        route.continue_()
    expect_examined(page, ["front.png", "side.jpg"])
    assert len(set(server.uploads.glob("*/set.json")) - sets) == 1

    pillow_heif.register_heif_opener()
    folder = tmp_path / "my toy"
    folder.mkdir()
    first, second, *_ = sample_images()
    first.save(folder / "top.png")
    (folder / "top.txt").write_text("sks toy from the top")
    (folder / ".DS_Store").write_bytes(bytes(8))
    second.save(folder / "IMG_1.HEIC", "HEIF")
    with page.expect_file_chooser() as chooser:
        page.locator("#photos-folder").click()
    chooser.value.set_files(folder)
    expect(page.get_by_label("Caption of top.png")).to_have_value("sks toy from the top", timeout=PATIENCE)
    expect(page.locator(".photo-card .title b")).to_have_text(["front.png", "side.jpg", "IMG_1.HEIC", "top.png"])
    expect(page.locator("#photos-message")).to_be_hidden()

    page.locator("#photos-camera-open").click()
    page.locator("#photos-camera [title='grant webcam access'] button").click()
    # Gradio's button does nothing before the camera has sent an image.
    page.wait_for_function("document.querySelector('#photos-camera video')?.videoWidth > 0")
    page.get_by_label("capture photo").click()
    expect(page.locator(".photo-card .title b").nth(4)).to_have_text("image.png", timeout=PATIENCE)


@pytest.mark.slow(23)
def test_the_command_contains_the_changes_of_preset_form_and_prompts(new_page, server, screenshot):
    page = opened(new_page, server)
    examined(page)
    open_check(page)
    expect(page.locator("#check-crops img")).to_have_count(5, timeout=PATIENCE)
    expect(page.locator("#check-crops")).to_contain_text("64 x 64")
    assert re.fullmatch(r"accelerate launch training/dreambooth_nora.py --output_dir \S+NEW-RUN", command(page, "accelerate"))
    expect(page.locator("#check-plan")).to_have_text("sks toy · Balanced · demo model · about 3 minutes")

    page.locator("#check-preset label", has_text="Fast").click()
    assert "--num_candidate_images" in command(page, "--max_train_steps")
    open_panel(page, "optimisation")
    steps, field = (
        page.locator("#subject-optimisation-max_train_steps"),
        page.locator("[data-field='optimisation.max_train_steps']"),
    )
    expect(steps).to_have_attribute("placeholder", "160")
    expect(field.locator("label")).to_have_attribute("title", "--max_train_steps")
    # Without a pause, while the answers to the fields before arrive.
    values = {"max_train_steps": "9", "train_batch_size": "2", "lr_warmup_steps": "3", "seed": "7"}
    for name, value in values.items():
        page.locator(f"#subject-optimisation-{name}").fill(value)
    page.locator("#check-preset label", has_text="Best").click()
    shown = command(page, "--seed 7 .*--heldout_steps 20|--heldout_steps 20 .*--seed 7")
    for name, value in values.items():
        assert f"--{name} {value} " in shown
        expect(page.locator(f"#subject-optimisation-{name}")).to_have_value(value)
    expect(page.locator("#check-plan")).to_have_text(re.compile("Best · 4 settings changed"))
    screenshot(page, "check-panel")
    steps.fill("0")
    expect(field.locator("[data-problem]")).to_contain_text("must be at least 1, got 0", timeout=PATIENCE)
    expect(page.locator("#check-plan")).to_contain_text("must be at least 1, got 0")
    expect(steps).to_have_value("0")
    page.locator(".expert [type=search]").fill("learning rate")
    expect(page.locator(".expert .field:visible", has_text="Learning rate schedule")).to_have_count(1)
    expect(steps).to_be_hidden()
    page.locator(".expert [type=search]").fill("")
    page.locator("#subject-panel-adapter > summary").click()
    page.locator("#subject-adapter-method").select_option("vera")
    expect(page.locator("#subject-adapter-d_initial")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#subject-adapter-inner_r")).to_be_hidden()
    page.locator(".expert [data-reset]").click()
    expect(page.locator("#check-plan")).to_have_text(re.compile("sks toy · Best · demo model"), timeout=PATIENCE)
    expect(steps).to_have_value("")

    type_into(page, "#check-class", "coffee mug")
    assert "--instance_prompt 'a photo of sks coffee mug'" in command(page, "coffee mug")
    type_into(page, "#check-trigger", "two words")
    expect(page.locator("#check-prompt")).to_contain_text("must be one word", timeout=PATIENCE)
    type_into(page, "#check-trigger", "sks")
    type_into(page, "#check-scenes", "at sea\n\nsks in a suit")
    assert "'a photo of sks coffee mug at sea' 'sks in a suit'" in command(page, "at sea")


@pytest.mark.slow(15)
def test_fast_typing_is_not_overwritten_by_late_responses(new_page, server):
    page = opened(new_page, server)
    examined(page)
    open_check(page)
    command(page, "accelerate")
    box, words = page.locator("#check-scenes textarea"), "on a mountain at dawn, behind it the sea and a ship with sails"
    box.fill("")
    box.press_sequentially(words, delay=15)
    # Responses to every keystroke arrive in the meantime.
    expect(page.locator("#check-prompt")).to_contain_text(words, timeout=PATIENCE)
    quiet(page)
    assert box.input_value() == words
    reload(page)
    go_to(page, "check")
    expect(page.locator("#check-scenes textarea")).to_have_value(words, timeout=PATIENCE)


def test_words_and_settings_belong_to_their_photos_and_a_missing_class_word_is_asked_for(new_page, server, uploads):
    page = with_uploads(new_page, server, uploads[:4])
    examined(page)
    expect(page.locator("#photos-plan")).to_contain_text("The class word under Check is empty", timeout=PATIENCE)
    page.locator("#photos-train").click()
    expect(page.locator(".toast-body")).to_contain_text("Enter the class word: what the photos show", timeout=PATIENCE)
    expect(page.locator("#check-class")).to_be_visible(timeout=PATIENCE)
    type_into(page, "#check-class", "duck")
    page.locator("#check-preset label", has_text="Fast").click()
    expect(page.locator("#check-plan")).to_contain_text("sks duck · Fast", timeout=PATIENCE)
    for photos, line, word in (("example", "sks toy · Balanced", "toy"), ("own", "sks duck · Fast", "duck")):
        go_to(page, "photos")
        page.locator(f"#photos-{photos}").click()
        expect(page.locator("#photos-plan")).to_contain_text(line, timeout=PATIENCE)
        go_to(page, "check")
        expect(page.locator("#check-class input, #check-class textarea")).to_have_value(word, timeout=PATIENCE)
        expect(page.locator("#check-plan")).to_contain_text(line, timeout=PATIENCE)


def test_what_is_entered_while_photos_are_added_is_kept_for_them(new_page, server, uploads):
    page, held = opened(new_page, server), []
    page.route(
        "**/queue/join*",
        lambda route: held.append(route) if "side.jpg" in (route.request.post_data or "") else route.continue_(),
    )
    page.set_input_files("#photos-upload input[type=file]", uploads[1])
    while not held:
        page.wait_for_timeout(50)
    open_check(page)
    type_into(page, "#check-class", "duck")
    expect(page.locator("#check-plan")).to_contain_text("sks duck", timeout=PATIENCE)
    held.pop().continue_()
    for _ in range(2):
        go_to(page, "photos")
        expect(page.locator(".photo-card .title b")).to_have_text(["side.jpg"], timeout=PATIENCE)
        expect(page.locator("#photos-plan")).to_contain_text("sks duck", timeout=PATIENCE)
        go_to(page, "check")
        expect(page.locator("#check-class input, #check-class textarea")).to_have_value("duck", timeout=PATIENCE)
        reload(page)
    go_to(page, "photos")
    page.locator("#photos-example").click()
    expect(page.locator("#photos-plan")).to_contain_text("sks toy", timeout=PATIENCE)


@pytest.mark.slow(15)
def test_the_cost_is_measured_once_and_train_starts_the_displayed_command(new_page, server, screenshot):
    page = opened(new_page, server)
    examined(page)
    open_check(page)
    command(page, "accelerate")
    expect(page.locator("#check-cost")).to_contain_text("Not measured yet")
    page.locator("#check-measure").click()
    expect(page.locator("#check-cost .chip")).to_have_text("measuring", timeout=PATIENCE)
    (dry_run,) = (server.runs / DRY_RUNS).iterdir()
    (dry_run / UNTIL).write_text(str(TOTAL))
    expect(page.locator("#check-cost")).to_contain_text("seconds per step", timeout=PATIENCE)
    expect(page.locator("#check-cost")).to_contain_text("54,272 trainable parameters")
    expect(page.locator("#check-measure")).to_be_disabled()
    assert not [path for path in server.runs.iterdir() if not path.name.startswith(".")]
    screenshot(page, "check-cost")

    open_panel(page, "optimisation")
    type_into(page, "#subject-optimisation-max_train_steps", "4")
    shown = command(page, "--max_train_steps 4 ")
    expect(page.locator("#check-cost")).to_contain_text("Not measured yet", timeout=PATIENCE)
    page.locator("#check-start").click()
    expect(page.locator("#screen-train")).to_be_visible(timeout=PATIENCE)
    (run,) = [path for path in server.runs.iterdir() if not path.name.startswith(".")]
    launched = json.loads((run / "launch.json").read_text())["command"]
    assert launched == shown.replace("NEW-RUN", run.name).split()
    wait_for(lambda: (run / BEGAN).exists())
    assert (run / BEGAN).read_text().split() == launched[1:]


@pytest.mark.slow(12)
def test_photos_and_check_fit_a_phone(new_page, server, uploads, screenshot):
    page = with_uploads(new_page, server, uploads, size="phone", dark=True)
    examined(page)
    for screen in ("photos", "check"):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        screenshot(page, f"{screen}-phone")
        page.locator("#photos-check").click() if screen == "photos" else None
        expect(page.locator("#check-crops img").first).to_be_visible(timeout=PATIENCE)
        quiet(page)
    open_panel(page, "optimisation")
    expect(page.locator("#subject-optimisation-max_train_steps")).to_be_visible(timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    screenshot(page, "panel-phone")


@pytest.mark.parametrize(
    ("photos", "heldout", "folds"),
    [(5, "auto", 0), (4, "auto", 4), (2, "auto", 2), (1, "auto", 0), (4, "none", 0), (6, "leave_one_out", 6)],
)
def test_the_estimate_counts_the_folds_of_cross_validation_as_the_trainer_does(photos, heldout, folds):
    names = [f"{place}.png" for place in range(photos)]
    assert num_folds(photos, heldout) == folds == len(choose_heldout(names, heldout, 0).folds)
