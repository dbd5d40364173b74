"""The files of a run: written and read back, read from earlier versions, refused from newer ones."""

import json

import pytest

from pipelines.errors import InputError
from training.runs.record import RunRecord, update_status
from training.runs.run_files import (
    Certificate,
    DryRunReport,
    FallbackStep,
    MemoryFallback,
    Point,
    RunStatus,
    StepScores,
    Suggestion,
)

SCORES = StepScores(0.5, 0.4, 0.2, 0.6, 0.9)
FILES = [
    RunStatus(state="running", phase="cross_validation", fold=2, folds=3),
    Suggestion(4, 8, ["Because.", "Figures."], ["Overfitting."], [Point(0, 1.0, 0.9)], {0: SCORES}, "adapters/step-0000004"),
    Certificate(True, {"kohya": 0.1}, {"kohya": 0.0}, 9.0, 1.0, [], [], ["a toy"], {"height": 64}, "float32", "cpu"),
    DryRunReport(100, 0.5, 50.0, 10**9, 1000, 4000, 10**10, None),
    MemoryFallback([FallbackStep({"train_batch_size": 1}, True, 10**9, 0.5)]),
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.NAME)
def test_a_file_is_read_as_it_was_written(file, tmp_path):
    assert type(file).read(tmp_path) is None
    file.write(tmp_path)
    assert type(file).read(tmp_path) == file


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.NAME)
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


def test_files_of_version_1_are_read():
    assert RunStatus.from_json({"trained_numbers": 5, "strange": 1}).num_trainable_parameters == 5
    for word in ("picture", "image"):
        status = RunStatus.from_json({"phase": f"leaving out {word} 3"})
        assert (status.phase, status.fold) == ("cross_validation", 3)
    why = {"step": 2, "last": 4, "why": "One. Two.", "warnings": []}
    assert Suggestion.from_json(why).reasons == ["One. Two."]
    report = FILES[3].to_json()
    report["trained_numbers"] = report.pop("num_trainable_parameters")
    assert DryRunReport.from_json(report | {"version": 1}) == FILES[3]


def test_a_memory_fallback_of_version_1_is_the_list_of_attempts(tmp_path):
    (tmp_path / MemoryFallback.NAME).write_text(json.dumps(FILES[4].to_json()["attempts"]))
    assert MemoryFallback.read(tmp_path) == FILES[4]


def test_an_update_of_the_status_keeps_what_an_earlier_version_wrote(tmp_path):
    (tmp_path / RunStatus.NAME).write_text(json.dumps({"trained_numbers": 5, "phase": "leaving out picture 3"}))
    update_status(RunRecord(tmp_path), state="running")
    status = RunRecord(tmp_path).status()
    assert (status["num_trainable_parameters"], status["fold"], status["version"]) == (5, 3, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'strange'"):
        update_status(RunRecord(tmp_path), strange=1)
