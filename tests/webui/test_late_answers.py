"""Late responses do not replace the result of the user's last action."""

from types import SimpleNamespace

import gradio as gr
import pytest
from class_folders import COLOURS, colour_set
from listeners import listener

from pipelines.sample_subject import sample_images
from webui.datasets import Dataset
from webui.draft import Draft
from webui.page import build_page
from webui.uploads import add_images
from webui.workspace import Settings


@pytest.fixture
def settings(tmp_path):
    """The settings of a server with its own folders."""
    return Settings(tmp_path / "runs", tmp_path / "sets")


@pytest.fixture
def page(settings):
    """The whole page."""
    return build_page(settings)


@pytest.fixture
def workspace(settings):
    """The workspace of the only user."""
    return settings.workspace(None)


def test_late_image_checks_of_other_photos_are_replaced_by_those_of_the_current_photos(page, workspace, tmp_path):
    photos = Dataset(workspace.new_image_set())
    sample_images()[0].save(tmp_path / "mine.png")
    add_images(photos, [str(tmp_path / "mine.png")])
    example = Draft(previous_set=photos.id).to_browser()
    examine = listener(page, "photos", "examine")
    clicked = SimpleNamespace(action="own", files=[])
    own, *_, shown, _ = listener(page, "photos", "act")(example, clicked, None)
    # The example was selected and left again: the checks run with the old draft and the signature of the current photos.
    late, examined = examine(example, shown, shown, None)
    cards, examined = examine(own, shown, examined, None)
    assert "00.jpg" in late
    assert "mine.png" in cards
    assert examined == shown
    assert examine(own, shown, examined, None) == gr.skip()


def test_photos_whose_upload_is_shown_after_their_checks_are_checked_again(page, tmp_path):
    """Two uploads at once: the checks after the first one see the files of the second, whose own response comes after them."""
    for name, image in zip(("front.png", "side.png"), sample_images(), strict=False):
        image.save(tmp_path / name)
    request = SimpleNamespace(session_hash="one page", username=None)
    add, examine = listener(page, "photos", "add"), listener(page, "photos", "examine")
    first, *_, earlier, _ = add(Draft().to_browser(), [str(tmp_path / "front.png")], request)
    _, _, _, shown, *_, signature, examined = add(first, [str(tmp_path / "side.png")], request)
    _, seen = examine(first, earlier, [], request)
    assert "checking" in shown
    assert seen == signature
    assert examined == []
    checked, examined = examine(first, signature, examined, request)
    assert "side.png" in checked
    assert "checking" not in checked
    assert examine(first, signature, examined, request) == gr.skip()


def test_two_edits_of_photos_with_which_a_run_was_started_change_the_same_copy(page, workspace, tmp_path):
    photos = Dataset(workspace.new_image_set())
    for name, image in zip(("front.png", "side.png", "back.png"), sample_images(), strict=False):
        image.save(tmp_path / name)
    add_images(photos, [str(tmp_path / name) for name in ("front.png", "side.png")])
    photos.seal()
    draft, request = Draft(set=photos.id).to_browser(), SimpleNamespace(session_hash="one page", username=None)
    clicked = SimpleNamespace(action="remove", files=[photos.photos()[0].file])
    removed, *_ = listener(page, "photos", "act")(draft, clicked, request)
    # Sent with the same draft, since the response is not on the page yet.
    added, *_ = listener(page, "photos", "add")(draft, [str(tmp_path / "back.png")], request)
    assert removed["set"] == added["set"] != photos.id
    assert [photo.name for photo in Dataset.of(workspace, added["set"]).photos()] == ["side.png", "back.png"]
    other = SimpleNamespace(session_hash="another page", username=None)
    again, *_ = listener(page, "photos", "add")(draft, [str(tmp_path / "back.png")], other)
    assert again["set"] not in (photos.id, added["set"])


def test_the_zero_shot_accuracy_of_the_previous_dataset_is_removed(page, workspace, tmp_path):
    only = next(iter(COLOURS))
    dataset = colour_set(workspace, tmp_path / "given", names=[only])
    summary, cards = listener(page, "classify", "measure")({"set": dataset.id}, None)
    assert "1 class, 6 images" in summary
    assert only in cards
