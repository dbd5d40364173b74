"""Classification for the page: zero-shot with the built-in model, and with the classifier of a run."""

import pytest
from class_folders import COLOURS, colour_folder, colour_set, coloured, finished_classifier, images_of
from small_runs import untrained_classifier

from pipelines.clip import load_clip
from pipelines.errors import InputError
from pipelines.fewshot.features import image_features, prompt_features
from pipelines.fewshot.inputs import GivenImageSet
from pipelines.fewshot.prompts import make_prompts
from webui import inference_jobs as work
from webui.datasets import Dataset
from webui.labelled_datasets import class_datasets, uploaded_classes
from webui.screens import classify_use
from webui.workspace import Workspace

NAMES = {name: name for name in COLOURS}


@pytest.fixture
def workspace(tmp_path):
    """An empty workspace."""
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


@pytest.fixture
def images(tmp_path):
    """Class folders of eight images each."""
    return colour_folder(tmp_path / "pictures", 8)


@pytest.fixture
def record(workspace, images):
    """A run whose classifier is the built-in model without any training."""
    return untrained_classifier(workspace, images, NAMES)


def test_the_zero_shot_result_is_that_of_plain_open_clip(workspace, tmp_path):
    dataset = colour_set(workspace, tmp_path / "given")
    found = work.zero_shot(uploaded_classes(dataset))
    clip = load_clip("mini")
    texts = prompt_features(clip, make_prompts(list(COLOURS)))
    for label, one in enumerate(dataset.content().classes):
        given = GivenImageSet([dataset.folder / entry.file for entry in one.images], clip.preprocess)
        own = (image_features(clip, given)[0] @ texts.T).argmax(dim=1)
        assert found.by_class[one.folder] == (int((own == label).sum()), 6)
    assert found.count == 18
    assert found.right == sum(right for right, _ in found.by_class.values())


def test_renaming_a_class_changes_the_zero_shot_result(workspace, tmp_path):
    dataset = colour_set(workspace, tmp_path / "given", names=("ruby", "sea"))
    dataset.rename_class("c00", "a plain red image")
    dataset.rename_class("c01", "a plain blue image")
    named = work.zero_shot(uploaded_classes(dataset))
    dataset.rename_class("c00", "swap")
    dataset.rename_class("c01", "a plain red image")
    dataset.rename_class("c00", "a plain blue image")
    swapped = work.zero_shot(uploaded_classes(dataset))
    assert named.right + swapped.right == named.count


def test_zero_shot_needs_two_classes(workspace, tmp_path):
    with pytest.raises(InputError, match="at least two classes"):
        work.zero_shot(uploaded_classes(colour_set(workspace, tmp_path / "given", names=("ruby",))))


def test_rows_list_the_most_likely_classes_and_name_unusable_files(record, images, tmp_path):
    odd = tmp_path / "<b>.png"
    odd.write_text("<svg onload=alert(1)>")
    rows = work.classify(record, [images / "sea" / "1.png", odd, str(images / "ruby" / "2.png")])
    assert [row["image"] for row in rows] == ["1.png", "<b>.png", "2.png"]
    assert "is not a JPEG, PNG, WebP" in rows[1]["error"]
    expected = work._classifier_of(record).predict([images / "sea" / "1.png", images / "ruby" / "2.png"])
    for row, label, likely in zip((rows[0], rows[2]), expected.labels, expected.top(3), strict=True):
        assert row["class"] == label
        assert row["probability"] == pytest.approx(likely[0][1], abs=1e-5)
        assert [name for name, _ in row["top"]] == [name for name, _ in likely]


def test_a_classifier_stays_loaded_until_its_run_changes(record):
    first = work._classifier_of(record)
    assert work._classifier_of(record) is first
    told = record.path / "trials/2-shots/seed-0/nora/classifier.json"
    told.write_text(told.read_text().replace('"temperature": 1.0', '"temperature": 2.0'))
    assert work._classifier_of(record).temperature == 2.0


def test_a_method_is_selected_by_its_folder_and_no_other_folder_is_read(record):
    assert work._classifier_of(record, "trials/2-shots/seed-0/zeroshot").classes == tuple(COLOURS)
    with pytest.raises(InputError, match="did not train this method"):
        work._classifier_of(record, "../../elsewhere")


def test_an_unfinished_run_cannot_classify(workspace, images):
    run = workspace.new_run()
    (run / "status.json").write_text("{}")
    with pytest.raises(InputError, match="no classifier yet"):
        work.classify(workspace.run(run.name), [images / "sea" / "1.png"])


@pytest.mark.parametrize("count", [0, work.MOST_FILES + 1])
def test_the_number_of_images_per_request_is_limited(record, images, count):
    with pytest.raises(InputError, match=f"1 to {work.MOST_FILES} images"):
        work.classify(record, [images / "sea" / "1.png"] * count)


@pytest.fixture
def started(monkeypatch):
    """The runs that would have been started."""
    from webui import launching

    calls = []
    monkeypatch.setattr(launching, "start", lambda workspace, task, options: calls.append((task, options)) or "new-run")
    monkeypatch.setattr(
        launching, "duplicate", lambda workspace, run_id: {"data": {"seeds": [0], "shots": ["2"], "class_names": ["a=b"]}}
    )
    return calls


def test_corrected_images_become_training_images_of_the_uploaded_dataset(workspace, started, tmp_path):
    dataset = colour_set(workspace, tmp_path / "given")
    keys = {one.folder: one.name for one in dataset.content().classes}
    record = finished_classifier(workspace, dataset.folder, keys)
    tested = images_of(dataset, "test")
    new = tmp_path / "new.png"
    new.write_bytes(coloured("sea", 99))
    assert classify_use.train_again(workspace, record, {"sea": [new]}) == (dataset.id, "new-run")
    (((task, options)),) = started
    assert task == "classify"
    assert options["data"] == {
        "seeds": [0],
        "shots": ["all"],
        "data_dir": str(dataset.folder.absolute()),
        "class_names": ["c00=ruby", "c01=leaf", "c02=sea"],
    }
    assert len(dataset.content().classes[2].images) == 7
    assert images_of(dataset, "test") == tested


def test_correcting_a_run_on_a_local_folder_copies_it_with_the_same_test_split(workspace, record, started, images, tmp_path):
    new = tmp_path / "new.png"
    new.write_bytes(coloured("ruby", 99))
    set_id, _ = classify_use.train_again(workspace, record, {"ruby": [new]})
    dataset = Dataset.of(workspace, set_id)
    assert [len(one.images) for one in dataset.content().classes] == [9, 8, 8]
    assert (len(images_of(dataset, "test")), len(images_of(dataset, "train"))) == (24, 1)
    assert len(list((images / "ruby").iterdir())) == 8


def test_no_run_starts_without_a_correction(workspace, record, started):
    with pytest.raises(InputError, match="No image was corrected"):
        classify_use.train_again(workspace, record, {"ruby": []})
    assert started == []


def test_no_run_starts_if_the_images_are_gone(workspace, record, started, images, tmp_path):
    new = tmp_path / "new.png"
    new.write_bytes(coloured("ruby", 99))
    (images / "sea" / "3.png").unlink()
    with pytest.raises(InputError, match="are gone"):
        classify_use.train_again(workspace, record, {"ruby": [new]})
    assert started == []
    assert class_datasets(workspace) == []
