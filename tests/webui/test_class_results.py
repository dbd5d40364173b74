"""The result of a classifier on the page: the measurements, the test images, and that user input is escaped."""

import csv
import re
import zipfile
from dataclasses import replace

import pytest
from class_folders import COLOURS, colour_folder, finished_classifier

from pipelines.errors import InputError
from webui import class_files, class_html
from webui.class_results import result_of, source_of
from webui.workspace import Workspace

NAMES = {name: name for name in COLOURS}
HOSTILE = {"ruby": "<img src=x onerror=alert(1)>", "leaf": "a & b", "sea": "=1+1"}


@pytest.fixture
def workspace(tmp_path):
    """An empty workspace."""
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


@pytest.fixture
def images(tmp_path):
    """Class folders of eight images each, all of them test images."""
    return colour_folder(tmp_path / "pictures", 8)


@pytest.fixture
def record(workspace, images):
    """A run whose NoRA adapter classifies two rubies as leaves."""
    return finished_classifier(workspace, images, NAMES)


def test_the_summary_states_the_accuracy_its_interval_and_the_baselines(record):
    result = result_of(record)
    told = re.sub("<[^>]+>", "", class_html.result_summary(result))
    top1 = result.trial.test.top1
    assert "92%test accuracy: 22 of 24 test images are classified correctly" in told
    assert f"(95% interval: {top1.low:.0%} to {top1.high:.0%})" in told
    assert "zero-shot (no training) 0%" in told
    assert "random guessing 33%" in told


def test_a_warning_is_shown_where_raw_pixels_are_as_good(workspace, images):
    same = finished_classifier(workspace, images, NAMES)
    assert "Raw pixels are about as good here" in class_html.result_summary(result_of(same))
    worse = finished_classifier(workspace, images, NAMES, right_of_pixels=False)
    assert "Raw pixels" not in class_html.result_summary(result_of(worse))


def test_a_significantly_better_method_is_named(workspace, images):
    beaten = finished_classifier(workspace, images, NAMES, wrong=20, right_of_pixels=True)
    told = class_html.result_summary(result_of(beaten))
    assert "Raw pixels is significantly better on these images. Choose it above." in told
    assert "Raw pixels are better here" in told


def test_the_cells_of_the_confusion_matrix_are_labelled_buttons(record):
    shown = class_html.confusion(result_of(record))
    assert shown.count("<button") == 4
    assert "data-true='0' data-predicted='1' aria-label='2 images of ruby predicted as leaf. Show images.'" in shown
    assert "aria-label='8 images of sea classified correctly. Show images.'" in shown
    assert len(re.findall("scope='row'", shown)) == len(re.findall("scope='col'", shown)) == 3


def test_a_cell_opens_the_images_that_it_counts(record):
    result = result_of(record)
    counts = result.trial.test.confusion
    for true in range(3):
        for predicted in range(3):
            assert len(result.in_cell(true, predicted)) == counts[true][predicted]
    shown = class_html.cell_images(result, 0, 1)
    assert shown.count("<img") == 2
    assert "true class ruby, predicted <b>leaf</b>" in shown


def test_the_worst_mistakes_are_those_with_the_highest_confidence(record):
    mistakes = result_of(record).mistakes()
    assert [one.name for one in mistakes] == ["ruby/0.png", "ruby/1.png"]
    assert mistakes[0].confidence >= mistakes[1].confidence
    shown = class_html.worst_mistakes(result_of(record))
    assert "cannot be added to the training" in shown


def test_an_image_that_changed_after_the_test_is_not_shown(record, images):
    (image, _) = result_of(record).in_cell(0, 1)
    assert source_of(record, image) is not None
    (images / image.name).write_bytes((images / "sea" / "0.png").read_bytes())
    assert source_of(record, image) is None
    (images / image.name).unlink()
    assert source_of(record, image) is None
    assert "no longer exists" in class_html.cell_images(result_of(record), 0, 1)


def test_a_test_image_outside_of_the_dataset_is_not_read(record):
    (image, _) = result_of(record).in_cell(0, 1)
    for name in ("../../etc/passwd", "/etc/passwd"):
        assert source_of(record, type(image)(name, image.sha256, 0, 1, 0.5, [])) is None


def test_class_names_are_escaped_everywhere(workspace, images):
    result = result_of(finished_classifier(workspace, images, HOSTILE))
    shown = [
        class_html.result_summary(result),
        class_html.confusion(result),
        class_html.per_class(result),
        class_html.cell_images(result, 0, 1),
        class_html.worst_mistakes(result),
        class_html.methods_table(result),
    ]
    for part in shown:
        assert "<img src=x" not in part
        assert "a & b" not in part


def test_the_table_of_predictions_lists_every_test_image_and_contains_no_formula(workspace, images):
    result = result_of(finished_classifier(workspace, images, HOSTILE))
    path = class_files.downloads(result)[class_files.TABLE]
    rows = list(csv.DictReader(path.open(newline="")))
    assert len(rows) == 24
    assert sum(row["correct"] == "yes" for row in rows) == 22
    assert {row["true class"] for row in rows} == {HOSTILE["ruby"], "a & b", "'=1+1"}
    assert not any(cell.startswith("=") for row in rows for cell in row.values())
    assert float(rows[0]["probability"]) >= float(rows[0]["probability 2"])


def test_only_existing_files_can_be_downloaded(record):
    assert set(class_files.downloads(result_of(record))) == {class_files.TABLE}
    own = record.path / "trials/2-shots/seed-0/nora/adapter/compact"
    own.mkdir(parents=True)
    (own / "adapter_config.json").write_text("{}")
    (record.path / "README.md").write_text("card")
    found = class_files.downloads(result_of(record))
    assert set(found) == {class_files.TABLE, class_files.COMPACT, class_files.CARD}
    (name,) = zipfile.ZipFile(found[class_files.COMPACT]).namelist()
    assert name.endswith("-nora-compact/adapter_config.json")


def test_a_trial_is_selected_by_its_folder_and_no_other_folder_is_read(record):
    assert result_of(record, "trials/2-shots/seed-0/pixels").trial.method == "pixels"
    for strange in (None, "..", "../other", "/etc"):
        assert result_of(record, strange).trial.method == "nora"


def test_a_report_that_names_files_outside_of_its_run_is_refused(record):
    path = record.path / "report.json"
    path.write_text(path.read_text().replace("trials/2-shots/seed-0/nora", "../elsewhere"))
    with pytest.raises(InputError, match="outside of its folder"):
        result_of(record)


def test_a_run_that_is_not_done_has_no_result(workspace):
    run = workspace.new_run()
    (run / "status.json").write_text("{}")
    assert result_of(workspace.run(run.name)) is None


def test_with_many_classes_the_confusion_matrix_shows_those_with_the_most_mistakes(record):
    result = result_of(record)
    count = class_html.MOST_IN_MATRIX + 5
    counts = [[5 * (row == column) for column in range(count)] for row in range(count)]
    counts[2][count - 1] = 3
    trial = replace(result.trial, test=replace(result.trial.test, confusion=counts))
    dataset = replace(result.report.dataset, classes=[f"class {label}" for label in range(count)])
    result = replace(result, trial=trial, report=replace(result.report, dataset=dataset))
    shown = class_html.confusion(result)
    assert f"3 images of class 2 predicted as class {count - 1}" in shown
    assert "The 5 classes with the fewest mistakes are not shown" in shown
    assert shown.count("scope='row'") == class_html.MOST_IN_MATRIX


def test_a_class_without_test_images_is_named(record):
    result = result_of(record)
    assert result.untested() == []
    assert "no test images" not in class_html.result_summary(result)
    result.trial.test.confusion[1] = [0, 0, 0]
    result.trial.test.per_class[result.classes[1]] = None
    assert result.untested() == [result.classes[1]]
    assert f"{result.classes[1]} (0): no test images." in class_html.per_class(result)
    assert f"No test images for {result.classes[1]}, so the accuracy" in class_html.result_summary(result)


@pytest.mark.parametrize(("value", "shown"), [(0.694, "69%"), (1.0, "100%"), (0.997, "over 99%"), (0.0, "0%")])
def test_a_share_below_one_is_never_rounded_to_100_percent(value, shown):
    assert class_html.share(value) == shown
