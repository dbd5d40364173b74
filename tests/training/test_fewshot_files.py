"""The files of a few-shot run, written and read; version 1 had other names for some fields."""

import json

import pytest

from pipelines.errors import InputError
from pipelines.fewshot.metric_values import ClassificationMetrics, Interval, Reliability
from training.runs.fewshot_files import (
    DatasetSummary,
    FewShotReport,
    MethodSummary,
    NewClassesResult,
    TrialResult,
    ValidationResult,
    trials_folder,
)

HALF = Interval(0.5, 0.25, 0.75)
METRICS = ClassificationMetrics(
    4, HALF, {"cat": 0.5, "dog": None}, {"cat": 4, "dog": 0}, 0.1, 0.7, 1.0, [[2, 2], [0, 0]], Reliability((0.5,), (0.5,), (4,))
)
TRIAL = TrialResult(
    shots=2,
    seed=0,
    method="nora",
    folder="trials/2-shots/seed-0/nora",
    split_sha256="0" * 64,
    setting={"learning_rate": 1e-3},
    scale=0.5,
    scale_reason="A reason.",
    num_trainable_parameters=12,
    stored_bytes=34,
    seconds=5.5,
    peak_memory=6,
    temperature=0.5,
    validation=ValidationResult(0.5, 0.25, 4),
    test=METRICS,
    calibrated=METRICS,
    new_classes=NewClassesResult(HALF, 0.25, 0.5, 4),
)
SUMMARY = MethodSummary(2, "nora", 1, HALF, 0.1, 0.1, 12.0, 34.0, 5.5, 6.0, HALF, 0.5)
REPORT = FewShotReport(
    dataset=DatasetSummary("pets", ["cat", "dog"], ["boat"], 8, ["Two are the same."], ["A note."]),
    model="mini",
    pretrained=None,
    templates=["a {}"],
    shots=[2],
    seeds=[0],
    methods=["nora"],
    trials=(TRIAL,),
    summary=(SUMMARY,),
    classifier=TRIAL.folder,
)
NAMES_OF_VERSION_1 = {
    "dataset": "set",
    "images": "pictures",
    "duplicates": "copies",
    "trials": "members",
    "num_seeds": "runs",
    "scale": "strength",
    "scale_reason": "guard",
    "num_trainable_parameters": "trained_numbers",
}


def plain(value):
    return json.loads(json.dumps(value))


def as_version_1(value):
    """The same content as version 1 wrote it."""
    if isinstance(value, list):
        return list(map(as_version_1, value))
    if not isinstance(value, dict):
        return value
    return {NAMES_OF_VERSION_1.get(name, name): as_version_1(one) for name, one in value.items() if name != "version"}


@pytest.mark.parametrize("of_version", [dict, as_version_1])
def test_a_report_of_any_version_is_read(of_version):
    content = plain(REPORT.to_json())
    report = FewShotReport.from_json(of_version(content))
    assert plain(report.to_json()) == content
    assert report.representative == report.trial_in(TRIAL.folder)
    assert report.on_same_split(report.representative, "zeroshot") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"report\.json must hold a JSON object, got list"),
        ({"version": 2, "model": "mini"}, r"report\.json lacks 'dataset'"),
        ({"version": 2, "dataset": {}}, "DatasetSummary lacks 'name', 'classes'"),
    ],
)
def test_a_file_that_is_no_report_is_refused(content, message):
    with pytest.raises(InputError, match=message):
        FewShotReport.from_json(content)


def test_a_report_whose_classifier_is_no_trial_is_refused():
    content = REPORT.to_json() | {"classifier": "elsewhere"}
    with pytest.raises(InputError, match="classifier must be the folder of a trial, got 'elsewhere'"):
        assert FewShotReport.from_json(content).representative


def test_a_run_of_version_1_keeps_its_folder_of_trials(tmp_path):
    assert trials_folder(tmp_path) == "trials"
    (tmp_path / "members").mkdir()
    assert trials_folder(tmp_path) == "members"
