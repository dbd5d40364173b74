"""Classification for the page: zero-shot with the built-in model, and with the classifier of a run."""

import pytest
from class_folders import COLOURS, colour_folder, colour_set
from small_runs import untrained_classifier

from pipelines.clip import load_clip
from pipelines.errors import InputError
from pipelines.fewshot.features import image_features, prompt_features
from pipelines.fewshot.inputs import GivenImageSet
from pipelines.fewshot.prompts import make_prompts
from webui import inference_jobs as work
from webui.labelled_datasets import uploaded_classes
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
