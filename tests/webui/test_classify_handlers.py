"""The event listeners of the screen Classify, without a browser."""

import json
from pathlib import Path

import gradio as gr
import pytest
from class_folders import COLOURS, colour_folder, colour_set, colour_zip, coloured, finished_classifier
from listeners import listener

from pipelines.errors import InputError
from webui import inference_jobs, launching
from webui.datasets import Dataset
from webui.page import build_page
from webui.workspace import Settings

DRAFT = {"set": None, "preset": "Fast", "options": {}}
NORA = "trials/2-shots/seed-0/nora"
NAMES = {name: name for name in COLOURS}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The settings of a server with its own folders."""
    home = tmp_path_factory.mktemp("server")
    return Settings(home / "runs", home / "sets")


@pytest.fixture(scope="module")
def page(settings):
    """The whole page."""
    return build_page(settings)


@pytest.fixture
def workspace(settings):
    """The workspace of the only user."""
    return settings.workspace(None)


@pytest.fixture
def record(workspace, tmp_path):
    """A finished run."""
    return finished_classifier(workspace, colour_folder(tmp_path / "pictures", 6), NAMES)


def test_train_starts_the_displayed_command(page, workspace, tmp_path, monkeypatch):
    dataset, started = colour_set(workspace, tmp_path / "given"), []
    monkeypatch.setattr(launching, "start", lambda workspace, task, values: started.append((task, values)) or "run")
    draft = {**DRAFT, "set": dataset.id}
    describe = listener(page, "classify", "describe")
    assert describe("photos", draft, None) == (gr.skip(),) * 5
    about, preset, *_, command = describe("classify", draft, None)
    assert "6 of its 18 images are test images" in about
    assert preset == "Fast"
    listener(page, "classify", "begin")(draft, None)
    ((task, values),) = started
    assert task == "classify"
    assert f"--data_dir {dataset.folder.absolute()}" in command
    assert f"--class_names {' '.join(values['data']['class_names'])}" in command
    assert values["data"]["shots"] == ["all"]


def test_no_run_starts_on_a_dataset_that_is_not_ready(page, workspace, tmp_path):
    dataset = colour_set(workspace, tmp_path / "given", each=2)
    with pytest.raises(InputError, match="Training needs at least 3 per class"):
        listener(page, "classify", "begin")({**DRAFT, "set": dataset.id}, None)


def test_a_zip_becomes_a_dataset_and_a_refused_one_leaves_nothing(page, workspace, tmp_path):
    take = listener(page, "classify_images", "take_zip")
    before = len(list(workspace.sets.glob("*/set.json"))) if workspace.sets.is_dir() else 0
    draft, said, _ = take(str(colour_zip(tmp_path / "a.zip", 4)), {**DRAFT, "set": "digits"}, None)
    assert "12 images added" in said
    assert [one.name for one in Dataset.of(workspace, draft["set"]).content().classes] == sorted(COLOURS)
    (tmp_path / "b.zip").write_text("no zip")
    _, said, file = take(str(tmp_path / "b.zip"), {**DRAFT, "set": "digits"}, None)
    assert "not a zip" in said
    assert file is None
    assert len(list(workspace.sets.glob("*/set.json"))) == before + 1


def test_the_result_is_shown_and_not_sent_again(page, record):
    refresh = listener(page, "classify_result", "refresh")
    *shown, seen = refresh(record.path.name, None, None, None)
    assert any("test images are classified correctly" in str(one) for one in shown)
    again = refresh(record.path.name, None, seen, None)
    assert all(one == gr.skip() for one in again)


def test_a_cell_opens_its_images_and_an_unknown_cell_is_refused(page, record):
    opened = listener(page, "classify_result", "open_cell")
    assert opened(record.path.name, NORA, gr.EventData(None, {"true": 0, "predicted": 1}), None).count("<img") == 2
    for strange in ({}, {"true": 0, "predicted": 7}, {"true": "0", "predicted": 1}, {"true": [0], "predicted": -1}):
        with pytest.raises(InputError, match="belongs to another classifier"):
            opened(record.path.name, None, gr.EventData(None, strange), None)


def test_a_missing_run_causes_no_error_on_the_page(page):
    for part, given in (("classify_result", (None, None)), ("classify_use", (None,))):
        empty, content, *_ = listener(page, part, "refresh")("no-such-run", *given, None)
        assert (empty.visible, content.visible) == (True, False)


@pytest.mark.parametrize(("state", "sentence"), [("failed", "Training failed"), ("stopped", "Training was stopped")])
def test_a_run_without_a_result_says_what_became_of_it(page, workspace, state, sentence):
    run = workspace.new_run()
    (run / "status.json").write_text(json.dumps({"state": state, "phase": "fitting", "error": "InputError: x", "step": 0}))
    (run / "options.json").write_text(json.dumps({"target_layers": {}, "data": {"data_dir": None}}))
    for part, given in (("classify_result", (None, None)), ("classify_use", (None,))):
        assert sentence in listener(page, part, "refresh")(run.name, *given, None)[0].value


def test_images_are_chosen_moved_and_deleted_together(page, workspace, tmp_path):
    dataset = colour_set(workspace, tmp_path / "given")
    draft, named = {**DRAFT, "set": dataset.id}, [[one.file for one in group.images] for group in dataset.content().classes]
    choose = listener(page, "classify_images", "choose")
    chosen, *_, delete = choose("c00", draft, gr.EventData(None, {"files": [*named[0][:2], "../../x", named[1][0]]}), None)
    assert (chosen, delete.value) == (named[0][:2], "Delete 2 images")
    listener(page, "classify_images", "move_chosen")(chosen, "c01", draft, None)
    assert [len(one.images) for one in dataset.content().classes] == [4, 8, 6]
    delete_asked = listener(page, "classify_images", "delete_asked")
    delete_asked("images", "c01", [one.file for one in dataset.content().classes[1].images[:3]], draft, None)
    assert [len(one.images) for one in dataset.content().classes] == [4, 5, 6]
    delete_asked("class", "c01", [], draft, None)
    assert [one.folder for one in dataset.content().classes] == ["c00", "c02"]
    assert delete_asked("dataset", "c00", [], draft, None)[0]["set"] is None
    assert not dataset.folder.exists()


def test_what_would_be_deleted_is_said_before(page, workspace, tmp_path):
    draft = {**DRAFT, "set": colour_set(workspace, tmp_path / "given").id}
    for what, label in (("images", "Delete 1 image"), ("class", "Delete ruby and its 6 images"), ("dataset", "its 18 images")):
        asked, row, button = listener(page, "classify_images", "ask")(what, "c00", ["c00/0001.png"], draft, None)
        assert (asked, row.visible) == (what, True)
        assert label in button.value


def test_images_are_classified_with_a_table_to_download_and_one_at_once(page, record, tmp_path, monkeypatch):
    rows = [{"image": "=1.png", "class": "sea", "probability": 0.7, "top": [["sea", 0.7], ["ruby", 0.2], ["leaf", 0.1]]}]
    monkeypatch.setattr(inference_jobs, "classify", lambda *given: rows)
    file = tmp_path / "new.png"
    file.write_bytes(coloured("sea", 5))
    kept, table = listener(page, "classify_use", "classify")(record.path.name, None, [str(file)], None)
    assert kept == [{**rows[0], "file": str(file)}]
    path = Path(table.value if isinstance(table.value, str) else table.value["path"])
    assert path.read_text().splitlines()[1].startswith("'=1.png,sea,0.7")
    answer = listener(page, "classify_use", "classify_one")(record.path.name, None, str(file), None)
    assert answer.count('class="share"') == 3
    assert "70%" in answer


def test_the_list_of_classifiers_follows_the_run_that_is_selected_elsewhere_once(page, record):
    renew = listener(page, "classify", "renew")
    listed, part, seen = renew(record.path.name, None, "another", None)
    assert (listed.value, part.selected, seen) == (record.path.name, "result", record.path.name)
    for elsewhere in (seen, None):
        assert renew(elsewhere, None, seen, None)[1] == gr.skip()
    assert record.path.name in [run_id for _, run_id in listed.choices]
