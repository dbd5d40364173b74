"""A classifier: sentences on made-up accuracies, the test images, tables and files of a run, and training again."""

import csv
import html
import re
import zipfile
from dataclasses import replace

import pytest
from class_folders import COLOURS, colour_folder, colour_set, coloured, finished_classifier, images_of

from pipelines.errors import InputError
from pipelines.fewshot.metrics import wilson_interval
from training.fewshot.report import summary_of
from webui import classifiers, launching
from webui.classifiers import Result, result_of, share, source_of, train_again
from webui.datasets import Dataset
from webui.labelled_datasets import class_datasets
from webui.screens.classify_result import result_html, result_updates
from webui.workspace import Workspace

NAMES = {name: name for name in COLOURS}
HOSTILE = {"ruby": "<img src=x onerror=alert(1)>", "leaf": "a & b {{x}}", "sea": "=1+1"}


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


@pytest.fixture
def made_up(record):
    """Makes a result from accuracies by method, on `count` test images of ten classes, with the best method selected."""
    template = result_of(record).trial

    def make(model="mini", count=200, shown=None, **accuracies):
        trials = []
        for method, accuracy in accuracies.items():
            right = round(accuracy * count)
            test = replace(template.test, count=count, top1=wilson_interval(right, count))
            trials.append(replace(template, method=method, folder=f"trials/2-shots/seed-0/{method}", test=test))
        report = result_of(record).report
        dataset = replace(report.dataset, classes=[f"class {label}" for label in range(10)])
        report = replace(report, model=model, dataset=dataset, trials=trials, summary=[summary_of([one]) for one in trials])
        result = Result(record, report, trials[0])
        return replace(result, trial=report.trial_in(f"trials/2-shots/seed-0/{shown}") or result.best)

    return make


def plain(markup):
    """The text of a piece of HTML."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", str(markup))).split())


def sentences_of(result):
    return plain(result_html.findings(replace(result, trial=no_counts(result))))


def no_counts(result):
    """The trial without a confusion matrix, which the made-up accuracies do not fit."""
    return replace(result.trial, test=replace(result.trial.test, confusion=[[1]] * len(result.classes)))


def test_the_headline_names_the_best_method_with_its_interval_and_the_others_beside_it(made_up):
    result = made_up(zeroshot=0.1, pixels=0.2, linear_probe=0.38, nora=0.28)
    top1 = result.trial.test.top1
    assert result.trial.method == "linear_probe"
    assert plain(result_html.headline(result)) == (
        "38% test accuracy of the best of 4 methods, Linear probe: 76 of 200 test images are classified correctly (95% interval: "
        f"{share(top1.low)} to {share(top1.high)}). They were not used for training. "
        "On the same images: Zero-shot 10%, Raw pixels 20%, random guessing 10%."
    )


def test_another_method_than_the_best_says_which_is_better_and_how_clearly(made_up):
    accuracies = {"zeroshot": 0.5, "pixels": 0.2, "linear_probe": 0.9, "nora": 0.88}
    assert "Linear probe is slightly better on these images (90%). Choose it above." in sentences_of(
        made_up(shown="nora", **accuracies)
    )
    assert "Linear probe is clearly better" in sentences_of(made_up(shown="zeroshot", **accuracies))
    assert "Choose it above" not in sentences_of(made_up(**accuracies))


@pytest.mark.parametrize(
    ("accuracies", "sentence"),
    [
        ({"zeroshot": 0.1, "nora": 0.28}, "The base model does not know these class names"),
        ({"zeroshot": 0.1, "nora": 0.95}, "The base model does not know these class names"),
        ({"zeroshot": 0.12, "pixels": 0.1, "nora": 0.11}, "No method is better than random guessing (10%)"),
        ({"zeroshot": 0.8, "nora": 0.95}, "Training helps: 80% from the class names alone, 95% with NoRA."),
        ({"zeroshot": 0.94, "nora": 0.96}, "within the uncertainty of this test"),
        ({"zeroshot": 0.96, "nora": 0.9}, "training did not improve on its 96%"),
        ({"nora": 0.9}, "control was not run"),
    ],
)
def test_whether_the_model_knows_the_classes_and_training_helps_follows_from_the_accuracies(made_up, accuracies, sentence):
    assert sentence in sentences_of(made_up(**accuracies))
    others = {"does not know", "No method is better", "Training helps", "within the uncertainty", "did not improve"}
    assert sum(each in sentences_of(made_up(**accuracies)) for each in others) <= 1


def test_a_larger_model_is_advised_only_where_the_built_in_one_knows_too_little(made_up):
    assert "ViT-B-16" in sentences_of(made_up(zeroshot=0.1, nora=0.28))
    assert "ViT-B-16" not in sentences_of(made_up(zeroshot=0.1, nora=0.28, model="ViT-B-16"))
    assert "ViT-B-16" not in sentences_of(made_up(zeroshot=0.8, nora=0.95))


def test_a_linear_probe_above_every_adapter_is_said_and_not_explained_by_alike_images(made_up):
    low = sentences_of(made_up(zeroshot=0.1, pixels=0.3, linear_probe=0.38, nora=0.2, lora=0.28))
    assert "The linear probe is slightly better than the best adapter, LoRA (38% and 28%)" in low
    assert "alike" not in low
    assert "The model adds little: 30% without any model, 38% with Linear probe. Both are low" in low
    assert "The linear probe is clearly better" in sentences_of(made_up(zeroshot=0.1, pixels=0.1, linear_probe=0.6, nora=0.28))
    for nora in (0.38, 0.5):
        assert "linear probe is" not in sentences_of(made_up(zeroshot=0.1, pixels=0.1, linear_probe=0.38, nora=nora))


def test_alike_images_are_the_explanation_only_where_raw_pixels_are_accurate(made_up):
    assert "so alike" in sentences_of(made_up(zeroshot=0.9, pixels=0.92, nora=0.93))
    assert "so alike" in sentences_of(made_up(zeroshot=0.9, pixels=0.97, nora=0.93))
    assert "so alike" not in sentences_of(made_up(zeroshot=0.8, pixels=0.75, nora=0.99))
    assert "adds little" not in sentences_of(made_up(zeroshot=0.8, pixels=0.2, nora=0.99))
    assert "control was not run" in sentences_of(made_up(zeroshot=0.9, nora=0.93))


def test_few_test_images_and_many_methods_limit_what_the_accuracy_says(made_up):
    few = sentences_of(made_up(count=20, zeroshot=0.5, pixels=0.1, nora=0.75))
    assert "20 test images allow only a rough estimate" in few
    many = dict.fromkeys(("zeroshot", "pixels", "linear_probe", "lora", "nora"), 0.9)
    assert "The best of 5 methods is chosen on the test images" in sentences_of(made_up(**many))
    assert "rough estimate" not in sentences_of(made_up(**many))
    assert "chosen on the test images" not in sentences_of(made_up(zeroshot=0.9, nora=0.9))


def test_methods_are_sorted_by_accuracy_and_the_best_is_marked(made_up):
    table = result_html.methods(made_up(shown="nora", zeroshot=0.1, pixels=0.2, linear_probe=0.38, nora=0.28))
    rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall("<tr.*?</tr>", table, re.DOTALL)[1:]]
    assert [plain(name).split(" ")[0] for name, *_ in rows] == ["Linear", "NoRA", "Raw", "Zero-shot"]
    assert ["best" in name for name, *_ in rows] == [True, False, False, False]
    assert rows[0][3:] == ["10", "8.0 kB", "3 s"]
    assert re.search('<tr class="chosen">.*?<span>(.*?)</span>', table, re.DOTALL)[1] == "NoRA"
    assert table.count('class="chosen"') == 1


def test_a_method_that_failed_is_listed_last_with_its_reason(made_up):
    result = made_up(zeroshot=0.1, nora=0.28)
    result = replace(result, report=replace(result.report, failed={"lora": "rank must be smaller. <Lower> it."}))
    last = result_html.methods(result).rpartition("<tr>")[2]
    assert "LoRA" in last
    assert "failed: rank must be smaller. &lt;Lower&gt; it." in last


def test_a_class_without_test_images_is_named(record):
    result = result_of(record)
    assert result.trial.test.untested == []
    result.trial.test.confusion[1] = [0, 0, 0]
    result.trial.test.per_class[result.classes[1]] = None
    assert result.trial.test.untested == [result.classes[1]]
    assert f"{result.classes[1]} (0): no test images." in result_html.per_class(result)
    assert f"No test images for {result.classes[1]}" in result_html.findings(result)


def test_the_cells_of_the_confusion_matrix_are_labelled_buttons_and_open_the_images_that_they_count(record):
    result = result_of(record, "trials/2-shots/seed-0/nora")
    matrix = result_html.confusion(result)
    assert matrix.count("<button") == 4
    assert 'aria-label="2 images of ruby predicted as leaf. Show images."' in matrix
    assert 'aria-label="8 images of sea classified correctly. Show images."' in matrix
    assert matrix.count('scope="row"') == matrix.count('scope="col"') == 3
    for true, row in enumerate(result.trial.test.confusion):
        for predicted, count in enumerate(row):
            assert len(result.in_cell(true, predicted)) == count
    opened = result_html.cell(result, 0, 1)
    assert opened.count("<img") == 2
    assert "true class ruby, predicted <b>leaf</b>" in opened
    assert "8 test images, mostly mistaken for leaf" in result_html.per_class(result)


def test_with_many_classes_the_confusion_matrix_shows_those_with_the_most_mistakes(record):
    result = result_of(record)
    count = result_html.MOST_IN_MATRIX + 5
    counts = [[5 * (row == column) for column in range(count)] for row in range(count)]
    counts[2][count - 1] = 3
    trial = replace(result.trial, test=replace(result.trial.test, confusion=counts))
    dataset = replace(result.report.dataset, classes=[f"class {label}" for label in range(count)])
    matrix = result_html.confusion(replace(result, trial=trial, report=replace(result.report, dataset=dataset)))
    assert f"3 images of class 2 predicted as class {count - 1}" in matrix
    assert "The 5 classes with the fewest mistakes are not shown" in matrix
    assert matrix.count('scope="row"') == result_html.MOST_IN_MATRIX


def test_the_worst_mistakes_are_those_with_the_highest_confidence(record):
    result = result_of(record, "trials/2-shots/seed-0/nora")
    mistakes = result.mistakes
    assert [one.name for one in mistakes] == ["ruby/0.png", "ruby/1.png"]
    assert mistakes[0].confidence >= mistakes[1].confidence
    assert "cannot be added to the training" in plain(result_html.worst(result))


def test_an_image_that_changed_after_the_test_is_not_shown(record, images):
    result = result_of(record, "trials/2-shots/seed-0/nora")
    (image, _) = result.in_cell(0, 1)
    assert source_of(record, image) is not None
    (images / image.name).write_bytes((images / "sea" / "0.png").read_bytes())
    assert source_of(record, image) is None
    (images / image.name).unlink()
    assert source_of(record, image) is None
    assert "no longer exists" in result_html.cell(result, 0, 1)


def test_a_test_image_outside_of_the_dataset_is_not_read(record):
    (image, *_) = result_of(record).tested
    for name in ("../../etc/passwd", "/etc/passwd"):
        assert source_of(record, type(image)(name, image.sha256, 0, 1, 0.5, [])) is None


def test_class_names_are_escaped_everywhere(workspace, images):
    result = result_of(finished_classifier(workspace, images, HOSTILE), "trials/2-shots/seed-0/nora")
    result.trial.test.confusion[1] = [0, 0, 0]
    shown = " ".join(map(str, result_updates(result)[1:5])) + result_html.cell(result, 0, 1)
    assert "&lt;img src=x" in shown
    assert "<img src=x" not in shown
    assert "a & b" not in shown
    assert "{{x}}" not in shown


def test_the_table_of_predictions_lists_every_test_image_and_contains_no_formula(workspace, images):
    result = result_of(finished_classifier(workspace, images, HOSTILE), "trials/2-shots/seed-0/nora")
    path = classifiers.downloads(result)[classifiers.TABLE]
    rows = list(csv.DictReader(path.open(newline="")))
    assert len(rows) == 24
    assert sum(row["correct"] == "yes" for row in rows) == 22
    assert {row["true class"] for row in rows} == {HOSTILE["ruby"], HOSTILE["leaf"], "'=1+1"}
    assert not any(cell.startswith("=") for row in rows for cell in row.values())
    assert float(rows[0]["probability"]) >= float(rows[0]["probability 2"])


def test_only_existing_files_can_be_downloaded(record):
    nora = "trials/2-shots/seed-0/nora"
    assert set(classifiers.downloads(result_of(record, nora))) == {classifiers.TABLE}
    own = record.path / nora / "adapter/compact"
    own.mkdir(parents=True)
    (own / "adapter_config.json").write_text("{}")
    (record.path / "README.md").write_text("card")
    files = classifiers.downloads(result_of(record, nora))
    assert set(files) == {classifiers.TABLE, classifiers.COMPACT, classifiers.CARD}
    (name,) = zipfile.ZipFile(files[classifiers.COMPACT]).namelist()
    assert name.endswith("-nora-compact/adapter_config.json")


def test_a_trial_is_selected_by_its_folder_and_no_other_folder_is_read(record):
    assert result_of(record, "trials/2-shots/seed-0/pixels").trial.method == "pixels"
    for strange in (None, "..", "../other", "/etc"):
        assert result_of(record, strange).trial == result_of(record).best


def test_a_report_that_names_files_outside_of_its_run_is_refused(record):
    path = record.path / "report.json"
    path.write_text(path.read_text().replace("trials/2-shots/seed-0/", "../elsewhere/"))
    with pytest.raises(InputError, match="outside of its folder"):
        result_of(record)


def test_a_run_that_is_not_done_has_no_result(workspace):
    run = workspace.new_run()
    (run / "status.json").write_text("{}")
    assert result_of(workspace.run(run.name)) is None


@pytest.mark.parametrize(("value", "shown"), [(0.694, "69%"), (1.0, "100%"), (0.997, "over 99%"), (0.0, "0%")])
def test_a_share_below_one_is_never_rounded_to_100_percent(value, shown):
    assert share(value) == shown


@pytest.fixture
def started(monkeypatch):
    """The runs that would have been started."""
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
    assert train_again(workspace, record, {"sea": [new]}) == (dataset.id, "new-run")
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
    set_id, _ = train_again(workspace, record, {"ruby": [new]})
    dataset = Dataset.of(workspace, set_id)
    assert [len(one.images) for one in dataset.content().classes] == [9, 8, 8]
    assert (len(images_of(dataset, "test")), len(images_of(dataset, "train"))) == (24, 1)
    assert len(list((images / "ruby").iterdir())) == 8


def test_no_run_starts_without_a_correction(workspace, record, started):
    with pytest.raises(InputError, match="No image was corrected"):
        train_again(workspace, record, {"ruby": []})
    assert started == []


def test_no_run_starts_if_the_images_are_gone(workspace, record, started, images, tmp_path):
    new = tmp_path / "new.png"
    new.write_bytes(coloured("ruby", 99))
    (images / "sea" / "3.png").unlink()
    with pytest.raises(InputError, match="are gone"):
        train_again(workspace, record, {"ruby": [new]})
    assert started == []
    assert class_datasets(workspace) == {}
