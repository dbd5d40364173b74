"""The files of a run: written and read back, read from earlier versions, refused from newer ones."""

import json
from pathlib import Path

import pytest
from test_fewshot_files import REPORT, TRIAL

from pipelines.errors import InputError
from pipelines.run_file import Provenance, ResolvedOptions
from pipelines.subject.folder_entries import FolderAccount
from training.runs.fewshot_files import ImagePrediction, PredictionFile
from training.runs.preferences import Preference, Preferences
from training.runs.record import RunRecord, update_status
from training.runs.run_files import (
    METRICS,
    Certificate,
    DryRunReport,
    FallbackStep,
    ImageChecks,
    Launch,
    LoggedMetrics,
    MemoryFallback,
    Point,
    RunStatus,
    StepScores,
    Suggestion,
    read_metrics,
)
from training.runs.waiting import Ticket

SCORES = StepScores(0.5, 0.4, 0.2, 0.6, 0.9)
FALLBACK = MemoryFallback([FallbackStep({"train_batch_size": 1}, True, 10**9, 0.5)])
SUGGESTION = Suggestion(4, 8, ["Because."], ["Overfitting."], [Point(0, 1.0, 0.9)], {0: SCORES}, "adapters/step-0000004")
FILES = [
    RunStatus(state="running", phase="cross_validation", fold=2, num_trainable_parameters=5),
    SUGGESTION,
    Preferences([Preference("a toy", 0, (0, 4), 4), Preference("a toy", 1, (4, 8), None)]),
    Certificate(True, {"kohya": 0.1}, {"kohya": 0.0}, 9.0, 1.0, [], [], ["a toy"], {"height": 64}, "float32", "cpu"),
    DryRunReport(100, 0.5, 50.0, 10**9, 1000, 4000, 10**10, None),
    FALLBACK,
    ImageChecks([{"path": "a.png", "verdict": "good"}], [], FolderAccount(Path("photos")), None, [{"summary": "It is cut."}]),
    ResolvedOptions({"data": {"images_dir": "photos"}, "validation": {"image_scorer": "base"}}),
    Provenance({"name": "mini", "public": True, "files": {"a": "0"}}, [{"file": "a", "sha256": "0"}], seed=3, command="train"),
    Launch("subject", ["accelerate", "launch"], 1.5, {"adapter": {"rank": 4}}),
    Ticket("runs/a", 12, 1.5),
    REPORT,
    TRIAL,
    PredictionFile(["cat", "dog"], 0.5, [ImagePrediction("a.png", "0" * 64, 0, 1, 0.75, [[1, 0.75], [0, 0.25]])]),
]
# The names of version 1, of fields and of options.
NAMES_OF_VERSION_1 = {new: old for file in FILES for old, new in file.RENAMED.items()}
NAMES_OF_VERSION_1 |= {"images_dir": "photos_dir", "image_scorer": "judge_model", "validation": "judging"}
FORMS_OF_VERSION_1 = {
    RunStatus: lambda content: content | {"phase": "leaving out picture 2", "fold": None},
    Suggestion: lambda content: content | {"why": content["reasons"][0], "reasons": None},
    MemoryFallback: lambda content: content["attempts"],
}


def plain(file):
    return json.loads(json.dumps(file.to_json()))


def named_as_in_version_1(value, names):
    if isinstance(value, list):
        return [named_as_in_version_1(one, names) for one in value]
    if not isinstance(value, dict):
        return value
    return {names.get(key, key): named_as_in_version_1(one, names) for key, one in value.items() if key != "version"}


@pytest.fixture(params=FILES, ids=lambda file: file.NAME)
def file(request):
    return request.param


def test_a_file_is_read_as_it_was_written(file, tmp_path):
    assert type(file).read(tmp_path) is None
    file.write(tmp_path)
    assert plain(type(file).read(tmp_path)) == plain(file)


def test_a_file_of_version_1_is_read(file, tmp_path):
    names = {new: old for old, new in file.RENAMED.items()} if not isinstance(file, ResolvedOptions) else NAMES_OF_VERSION_1
    form = FORMS_OF_VERSION_1.get(type(file), lambda content: content)
    (tmp_path / file.NAME).write_text(json.dumps(named_as_in_version_1(form(plain(file)), names)))
    assert plain(type(file).read(tmp_path)) == plain(file)


def test_a_file_of_a_newer_version_is_refused(file, tmp_path):
    newer = file.to_json() | {"version": file.FILE_VERSION + 1}
    (tmp_path / file.NAME).write_text(json.dumps(newer))
    with pytest.raises(InputError, match=rf"{file.NAME} has version {file.FILE_VERSION + 1}; .* Update NoRA Vision"):
        type(file).read(tmp_path)


@pytest.mark.parametrize("text", ["{", "3", '{"version": "x"}', '{"curve": 3}', '{"step": 3}'])
def test_a_damaged_file_is_refused(text, tmp_path):
    (tmp_path / Suggestion.NAME).write_text(text)
    with pytest.raises(InputError, match=r"suggestion\.json"):
        Suggestion.read(tmp_path)


def test_metrics_are_read_as_they_were_logged(tmp_path):
    logged = [LoggedMetrics(1, 2.5, {"loss": 0.5, "lr": 0.1}), LoggedMetrics(2, 3.5, {"loss": 0.25})]
    assert read_metrics(tmp_path) == []
    (tmp_path / METRICS).write_text("".join(each.line() for each in logged) + '{"step": 3, "lo')
    assert read_metrics(tmp_path) == logged
    assert json.loads(logged[0].line()) == {"step": 1, "time": 2.5, "loss": 0.5, "lr": 0.1}


@pytest.mark.parametrize("line", ["{", "3", '{"loss": 3}'])
def test_a_damaged_line_of_metrics_is_refused(line, tmp_path):
    (tmp_path / METRICS).write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl has a line that cannot be read"):
        read_metrics(tmp_path)


def test_an_update_of_the_status_keeps_what_an_earlier_version_wrote(tmp_path):
    (tmp_path / RunStatus.NAME).write_text(json.dumps({"trained_numbers": 5, "phase": "leaving out picture 3"}))
    update_status(RunRecord(tmp_path), state="running")
    status = RunRecord(tmp_path).status()
    assert (status.num_trainable_parameters, status.fold, status.to_json()["version"]) == (5, 3, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'strange'"):
        update_status(RunRecord(tmp_path), strange=1)
