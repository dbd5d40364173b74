"""The event listeners of the screen Classify, without a browser."""

import json
import re
from pathlib import Path

import gradio as gr
import pytest
from class_folders import COLOURS, colour_folder, colour_set, colour_zip, coloured, finished_classifier
from listeners import listener

from pipelines.errors import InputError
from webui import inference_jobs, launching
from webui.datasets import Dataset
from webui.labelled_datasets import point_to
from webui.page import build_page
from webui.screens.classify_result import ASK
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
    assert describe(None, None) == gr.skip()
    about, preset, *_, command = describe(draft, None)
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


def test_a_zip_becomes_a_dataset_and_a_refused_one_leaves_nothing_behind(page, workspace, tmp_path):
    add_zips = listener(page, "classify", "add_zips")
    before = set(workspace.sets.glob("*"))
    draft, _, said = add_zips({**DRAFT, "set": "digits"}, [str(colour_zip(tmp_path / "a.zip", 4))], None)
    assert "12 images added" in said
    dataset = Dataset.of(workspace, draft["set"])
    assert [one.name for one in dataset.content().classes] == sorted(COLOURS)
    (tmp_path / "b.zip").write_text("no zip")
    draft, _, said = add_zips({**DRAFT, "set": "digits"}, [str(tmp_path / "b.zip")], None)
    assert "not a zip" in said
    assert draft == gr.skip()
    assert set(workspace.sets.glob("[!.]*")) - before == {dataset.folder}


def test_images_join_a_class_and_stay_in_their_field_if_it_has_no_name(page, workspace, tmp_path):
    add, dataset = listener(page, "classify", "add_to_class"), colour_set(workspace, tmp_path / "given")
    (tmp_path / "new.png").write_bytes(coloured("sea", 50))
    draft = {**DRAFT, "set": dataset.id}
    added, *_, name, files = add(draft, "sea", [str(tmp_path / "new.png")], None)
    assert (added["set"], name, files) == (dataset.id, "", None)
    assert [len(one.images) for one in dataset.content().classes] == [6, 6, 7]
    _, _, said, *fields = add(draft, " ", [str(tmp_path / "new.png")], None)
    assert "A class needs a name" in said
    assert fields == [gr.skip()] * 2


def test_the_result_is_shown_and_not_sent_again(page, record):
    refresh = listener(page, "classify_result", "refresh")
    seen, *shown = refresh(record.path.name, None, None, None)
    assert any("test images are classified correctly" in str(one) for one in shown)
    again = refresh(record.path.name, None, seen, None)
    assert all(one == gr.skip() for one in again)


def test_another_method_keeps_the_predictions_and_another_classifier_starts_with_its_best_method(page, record):
    refresh = listener(page, "classify_result", "refresh")
    best, *_ = refresh(record.path.name, None, None, None)
    other, *shown = refresh(record.path.name, "trials/2-shots/seed-0/zeroshot", best, None)
    assert other[2] == "trials/2-shots/seed-0/zeroshot"
    assert shown[-5:] == [gr.skip()] * 5
    changed, *shown = refresh(record.path.name, other[2], ("another run", "done", other[2]), None)
    assert changed == best
    assert shown[-5:-1] == [None, ASK, [], ""]


def test_a_cell_opens_its_images_and_an_unknown_cell_is_refused(page, record):
    opened = listener(page, "classify_result", "open_cell")
    clicked = gr.EventData(None, {"true": "0", "predicted": "1"})
    assert opened(record.path.name, NORA, clicked, None).count("<img") == 2
    for strange in ({}, {"true": "0", "predicted": "7"}, {"true": "x", "predicted": "1"}, {"true": ["0"], "predicted": "-1"}):
        with pytest.raises(InputError, match="belongs to another classifier"):
            opened(record.path.name, None, gr.EventData(None, strange), None)


def test_a_missing_run_causes_no_error_on_the_page(page):
    _, *shown = listener(page, "classify_result", "refresh")("no-such-run", None, None, None)
    assert [one.visible for one in shown[:5]] == [True, False, True, False, False]


@pytest.mark.parametrize(("state", "sentence"), [("failed", "Training failed"), ("stopped", "Training was stopped")])
def test_a_run_without_a_result_says_what_became_of_it(page, workspace, state, sentence):
    run = workspace.new_run()
    (run / "status.json").write_text(json.dumps({"state": state, "phase": "fitting", "error": "InputError: x", "step": 0}))
    (run / "options.json").write_text(json.dumps({"target_layers": {}, "data": {"data_dir": None}}))
    _, result, _, use, *_ = listener(page, "classify_result", "refresh")(run.name, None, None, None)
    assert sentence in result.value
    assert sentence in use.value


def editing(page, draft, key, action, files=(), **fields):
    """Click a button of the editor with the class `key` open."""
    event = gr.EventData(None, {"action": action, "files": list(files), "fields": fields})
    return listener(page, "classify", "edit")(draft, key, event, None)


def test_images_are_moved_and_deleted_together_and_classes_renamed(page, workspace, tmp_path):
    dataset = colour_set(workspace, tmp_path / "given")
    draft, named = {**DRAFT, "set": dataset.id}, [[one.file for one in group.images] for group in dataset.content().classes]
    editing(page, draft, "c00", "move", [*named[0][:2], "../../x", named[2][0]], target="c01")
    assert [len(one.images) for one in dataset.content().classes] == [4, 8, 6]
    editing(page, draft, "c01", "remove", [one.file for one in dataset.content().classes[1].images[:3]])
    assert [len(one.images) for one in dataset.content().classes] == [4, 5, 6]
    assert editing(page, draft, "c01", "rename", name="green leaf")[1] == "c01"
    assert dataset.content().classes[1].name == "green leaf"
    assert editing(page, draft, "c01", "remove_class")[1] is None
    assert [one.folder for one in dataset.content().classes] == ["c00", "c02"]
    assert editing(page, draft, "c00", "delete")[0]["set"] is None
    assert not dataset.folder.exists()


def test_the_editor_says_what_would_be_deleted_and_offers_only_what_a_dataset_allows(page, workspace, tmp_path):
    show, clicked = listener(page, "classify", "show_class"), gr.EventData(None, {"key": "c00"})
    key, own = show({**DRAFT, "set": colour_set(workspace, tmp_path / "given").id}, clicked, None)
    assert key == "c00"
    assert 'data-confirm="Delete ruby and its 6 images?"' in own
    assert 'data-confirm="Delete the dataset and its 18 images?"' in own
    folder = point_to(workspace, str(colour_folder(tmp_path / "mine", 4)))
    _, local = show({**DRAFT, "set": folder}, gr.EventData(None, {"key": "sea"}), None)
    _, example = show({**DRAFT, "set": "shapes"}, gr.EventData(None, {"key": "red star"}), None)
    offered = [re.findall('data-action="([a-z_]+)"', one) for one in (own, local, example)]
    assert offered[0] == ["show", "rename", "remove_class", "move", "remove", "delete"]
    assert offered[1] == ["show", "rename", "delete"]
    assert offered[2] == ["show"]
    assert example.count("<img") == 40


def test_images_are_classified_with_a_table_to_download_and_one_at_once(page, record, tmp_path, monkeypatch):
    rows = [{"image": "=1.png", "class": "sea", "probability": 0.7, "top": [["sea", 0.7], ["ruby", 0.2], ["leaf", 0.1]]}]
    unread = {"image": "b.png", "error": "b.png is <b>no</b> image"}
    monkeypatch.setattr(inference_jobs, "classify", lambda record, files, *_: [*rows, unread][: len(files)])
    file = tmp_path / "new.png"
    file.write_bytes(coloured("sea", 5))
    kept, cards, table = listener(page, "classify_result", "classify")(record.path.name, None, [str(file)] * 2, None)
    assert kept[0] == {**rows[0], "file": str(file)}
    assert re.findall("<option[^>]*>([^<]*)</option>", cards) == ["correct: sea", "ruby", "leaf"]
    assert "&lt;b&gt;no&lt;/b&gt;" in cards
    path = Path(table.value if isinstance(table.value, str) else table.value["path"])
    assert [line.split(",")[:3] for line in path.read_text().splitlines()[1:]] == [["'=1.png", "sea", "0.7"]]
    answer = listener(page, "classify_result", "classify_one")(record.path.name, None, str(file), None)
    assert answer.count('class="share"') == 3
    assert "70%" in answer


def test_the_list_of_classifiers_follows_the_run_that_is_selected_elsewhere_once(page, record):
    renew = listener(page, "classify", "renew")
    listed, part, seen = renew(record.path.name, None, "another", None)
    assert (listed.value, part.selected, seen) == (record.path.name, "result", record.path.name)
    for elsewhere in (seen, None):
        assert renew(elsewhere, None, seen, None)[1] == gr.skip()
    assert record.path.name in [run_id for _, run_id in listed.choices]
