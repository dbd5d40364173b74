"""Asked for samples or a checkpoint while it trains, a run gives them at the end of its step and ends as if nobody had asked."""

from pathlib import Path

import torch
from regression import STEPS, asking, checkpoints, trainable, trained

from training.engine.loop import Periodic
from training.runs.record import RunRecord
from training.runs.run_requests import FOLDER, SAMPLE, SAVE, STOP, Requests, ask, forget, was_asked


def test_a_request_is_taken_once(tmp_path):
    record = RunRecord(tmp_path)
    requests = Requests.of(record, looks=True)
    assert requests.take() == frozenset()
    ask(record, SAMPLE)
    ask(record, SAMPLE)
    assert requests.take() == {SAMPLE}
    assert requests.take() == frozenset()
    ask(record, STOP)
    assert requests.take() == frozenset()
    assert was_asked(record, STOP)
    forget(record)
    assert not was_asked(record, STOP)


def test_old_requests_are_deleted_and_only_one_process_looks_for_new_ones(tmp_path):
    record = RunRecord(tmp_path)
    ask(record, SAVE)
    assert Requests.of(record, looks=False).take() == frozenset()
    assert was_asked(record, SAVE)
    assert Requests.of(record, looks=True).take() == frozenset()
    assert not was_asked(record, SAVE)


def test_a_step_without_requests_looks_at_the_disk_once(tmp_path, monkeypatch):
    requests, looks, exists = Requests.of(RunRecord(tmp_path), looks=True), [], Path.exists
    monkeypatch.setattr(Path, "exists", lambda path, **more: looks.append(path) or exists(path, **more))
    requests.take()
    assert looks == [tmp_path / FOLDER]


def test_a_requested_checkpoint_is_written_at_the_end_of_the_step(tmp_path):
    expected = trained(tmp_path / "a", trainable(), checkpointing_steps=STEPS)
    what = trainable(asking(RunRecord(tmp_path / "b"), SAVE, at=[3]))
    assert torch.equal(trained(tmp_path / "b", what, checkpointing_steps=STEPS), expected)
    assert (checkpoints(tmp_path / "a"), checkpoints(tmp_path / "b")) == ([STEPS], [3, STEPS])


def test_requested_samples_are_generated_at_the_end_of_the_step_and_change_nothing(tmp_path):
    drawn = []

    def draw(step):
        drawn.append((step, torch.rand(1)))

    expected = trained(tmp_path / "a", trainable(), checkpointing_steps=STEPS)
    what = trainable(asking(RunRecord(tmp_path / "b"), SAMPLE, at=[2, 3]))
    periodic = [Periodic(3, lambda step: None, draw), Periodic(STEPS, lambda step: None)]
    assert torch.equal(trained(tmp_path / "b", what, periodic=periodic, checkpointing_steps=STEPS), expected)
    # What is due at step 3 draws then anyway.
    assert [step for step, _ in drawn] == [2]
    assert not (tmp_path / "b" / FOLDER / SAMPLE).exists()


def test_requested_samples_use_the_moving_average(tmp_path):
    what, seen = trainable(asking(RunRecord(tmp_path), SAMPLE, at=[2])), []

    def draw(step):
        seen.extend((parameter.detach().clone(), average) for parameter, average in zip(
            what.module.parameters(), (shadow.clone() for shadow in what.ema.shadow_params), strict=True
        ))  # fmt: skip

    trained(tmp_path, what, periodic=[Periodic(STEPS, lambda step: None, draw)])
    assert seen
    assert all(torch.equal(parameter, average) for parameter, average in seen)
