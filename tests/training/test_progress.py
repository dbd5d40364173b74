"""One share and one remaining time for a whole run: they follow what was measured, and the share never falls."""

from itertools import pairwise

import pytest

from training.options import SubjectOptions
from training.options.output import OutputOptions
from training.options.validation import UNRELATED_PROMPTS, ValidationOptions
from training.runs.progress import PlannedPhase, RunProgress
from training.runs.run import RunDirectory
from training.runs.run_files import (
    COMPARING,
    CROSS_VALIDATION,
    EVALUATING,
    LOADING,
    SAMPLING,
    TRAINING,
    DryRunReport,
    RunStatus,
)
from training.subject.plan import DEMO_PACE, Pace, estimated_seconds, expected_pace, fold_steps, phases


class Clock:
    """A clock that a test turns on."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def planned(clock, *seconds, share=None):
    progress = RunProgress(clock)
    progress.expect([PlannedPhase(name, each) for name, each in zip("abcd", seconds, strict=False)], share)
    return progress


def looked(progress):
    fields = progress.fields()
    return fields["share"], fields["seconds_left"]


def test_nothing_is_estimated_before_every_phase_has_an_estimate(clock):
    progress = planned(clock, None, None)
    progress.enter("a")
    clock.now = 5.0
    assert looked(progress) == (None, None)
    progress.enter("b")
    progress.estimate({"b": 15.0})
    assert looked(progress) == (pytest.approx(0.25), 15.0)


def test_a_phase_that_takes_longer_than_estimated_corrects_the_time_left(clock):
    progress = planned(clock, 10.0, 10.0)
    progress.enter("a")
    clock.now = 10.0
    progress.reach(0.5)
    # Half trusted: the pace says 20 s, the estimate 10 s.
    assert progress.seconds_left() == pytest.approx(0.5 * 15.0 + 10.0)
    clock.now = 20.0
    progress.reach(1.0)
    assert looked(progress) == (pytest.approx(20 / 30), 10.0)


def test_the_share_never_falls_and_ends_at_one(clock):
    progress, shares = planned(clock, 10.0, 1.0, 1.0), []
    for index, name in enumerate("abc"):
        progress.enter(name)
        for part in range(4):
            clock.now += 2.0 + index
            progress.reach((part + 1) / 4)
            shares.append(progress.fields()["share"])
    assert all(first <= second for first, second in pairwise(shares))
    assert shares[-1] == 1.0


def test_a_resumed_run_counts_what_an_earlier_session_did(clock):
    progress = planned(clock, 10.0, 10.0, 10.0, share=0.4)
    progress.enter("a")
    assert looked(progress)[0] == 0.4
    progress.enter("c")
    progress.reach(0.5, first=0.5)
    assert looked(progress) == (pytest.approx(15 / 20, abs=0.2), 5.0)


def test_phases_of_unknown_length_that_are_repeated_count_alike(clock):
    progress = RunProgress(clock)
    progress.expect([PlannedPhase("trial", number=number) for number in (1, 2, 3, 4)])
    progress.enter("trial", 3)
    progress.reach(0.5)
    assert looked(progress) == (0.625, None)


def test_at_the_end_every_phase_has_its_measured_duration(clock):
    progress = planned(clock, 10.0, 20.0, 30.0)
    progress.enter("a")
    clock.now = 4.0
    progress.enter("c")
    clock.now = 9.0
    progress.end()
    assert [phase.seconds for phase in progress.plan] == [4.0, 0.0, 5.0]


def test_a_skipped_phase_that_comes_later_is_measured_by_itself(clock):
    progress = planned(clock, 10.0, 20.0, 30.0, 40.0)
    for seconds, name in ((1.0, "a"), (2.0, "c"), (4.0, "b"), (8.0, "c"), (16.0, "d")):
        progress.enter(name)
        clock.now += seconds
    progress.end()
    # The second c is not planned and belongs to b.
    assert [(phase.name, phase.seconds) for phase in progress.plan] == [("a", 1.0), ("c", 2.0), ("b", 12.0), ("d", 16.0)]


def test_the_status_of_a_run_has_the_progress_of_its_parts(tmp_path):
    run = RunDirectory.create(tmp_path, {})
    run.plan([PlannedPhase(CROSS_VALIDATION, 10.0, number) for number in (1, 2)] + [PlannedPhase(TRAINING, 20.0)])
    run.begin(CROSS_VALIDATION, 2, fold=2, folds=2)
    RunDirectory.create(tmp_path / "folds" / "1", {}, whole=run).reach(5, 10)
    status = RunStatus.read(tmp_path)
    assert (status.phase, status.fold, status.step) == (CROSS_VALIDATION, 2, None)
    assert 10 / 40 < status.share < 15 / 40
    assert [phase.number for phase in status.plan] == [1, 2, None]
    assert RunStatus.read(tmp_path / "folds" / "1").step == 5


def test_a_subject_s_run_plans_its_folds_and_estimates_every_phase():
    options = SubjectOptions()
    plan, seconds = phases(options, 4), estimated_seconds(options, Pace(0.5 / options.optimisation.images_per_step, 2.0, 3.0))
    assert [phase.number for phase in plan if phase.name == CROSS_VALIDATION] == [1, 2, 3, 4]
    assert {phase.name for phase in plan} < set(seconds)
    assert EVALUATING not in {phase.name for phase in plan}
    evaluated = SubjectOptions(validation=ValidationOptions(evaluate=True, num_evaluation_images=3))
    assert EVALUATING in {phase.name for phase in phases(evaluated, 0)}
    # With the adapter and without it: three images in each of four scenes, and the unrelated ones.
    images = 2 * (4 * 3 + len(UNRELATED_PROMPTS))
    assert estimated_seconds(evaluated, Pace(0.1, 2.0, 3.0))[EVALUATING] == images * 2.0
    assert seconds[LOADING] == 3.0
    assert seconds[TRAINING] > options.optimisation.max_train_steps * 0.5
    assert seconds[CROSS_VALIDATION] > fold_steps(options.optimisation.max_train_steps) * 0.5
    sampling = len(options.output.validation_prompt) * 2.0
    # Each candidate is generated and scored.
    assert seconds[COMPARING] > options.validation.num_candidate_images * sampling
    without = SubjectOptions(output=OutputOptions(validation_images=False))
    assert SAMPLING not in {phase.name for phase in phases(without, 0)}
    assert estimated_seconds(without, Pace(0.5, 2.0, 3.0))[COMPARING] == seconds[COMPARING] - 1.5 * 4 * sampling


def test_a_run_expects_the_pace_of_the_newest_finished_one_with_its_base_model(tmp_path):
    assert expected_pace(tmp_path, "mini-sdxl") == DEMO_PACE
    assert expected_pace(tmp_path, "owner/model") is None
    runs = (
        ("a", "owner/model", "done"),
        ("b", "owner/model", "failed"),
        ("c", "owner/other", "done"),
        ("e", "owner/model", "done"),
    )
    for name, model, state in runs:
        # The file of the last one, which is the newest, is not complete.
        optimisation = {} if name == "e" else {"train_batch_size": 2, "gradient_accumulation_steps": 2}
        model_options = {"pretrained_model_name_or_path": model}
        groups = {"optimisation": optimisation, "output": {"validation_prompt": ["x", "y"]}, "model": model_options}
        run = RunDirectory.create(tmp_path / name, groups)
        DryRunReport(1, 0.8, 8.0, 1, 1, 1, 1, None).write(run.path)
        run.update_status(state=state, plan=[PlannedPhase(LOADING, 3.0), PlannedPhase(SAMPLING, 5.0)])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "status.json").write_text("no status")
    assert expected_pace(tmp_path, "owner/model") == Pace(image=0.2, sample=2.5, loading=3.0)


def test_the_time_of_an_image_is_estimated_from_the_training_in_a_run_without_validation_images():
    options = {"optimisation": {"train_batch_size": 4, "gradient_accumulation_steps": 1}, "output": {"validation_prompt": ["x"]}}
    # 50 passes, each a third of a training step on an image.
    pace = Pace.of(DryRunReport(1, 0.24, 8.0, 1, 1, 1, 1, None), options, {LOADING: 3.0, SAMPLING: 0.0}.__getitem__)
    assert pace == Pace(image=pytest.approx(0.06), sample=pytest.approx(1.0), loading=3.0)
