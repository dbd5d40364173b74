"""Asked for samples or a checkpoint while it trains, a run gives them at the end of its step and ends as if nobody had asked."""

import time
from statistics import median

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from regression import STEPS, batch_at, trainable, trained

from training.dreambooth_nora import main
from training.engine.loop import LoopOptions, Periodic, Progress, train
from training.options import parse_options
from training.runs.record import RunRecord, list_checkpoints
from training.runs.run import RunDirectory
from training.runs.run_requests import ASKED, FOLDER, SAMPLE, SAVE, STOP, Requests, ask, forget, was_asked


def asking(record, what, at):
    """Batches during whose making it is asked for `what`, at each of the steps `at`."""

    def batches(index):
        if index + 1 in at:
            ask(record, what)
        return batch_at(index)

    return batches


def checkpoints(folder):
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")]


def test_what_is_asked_for_is_taken_once(tmp_path):
    record = RunRecord(tmp_path)
    requests = Requests.of(record, looks=True)
    assert requests.taken() == frozenset()
    ask(record, SAMPLE)
    ask(record, SAMPLE)
    assert requests.taken() == {SAMPLE}
    assert requests.taken() == frozenset()
    ask(record, STOP)
    assert requests.taken() == frozenset()
    assert was_asked(record, STOP)
    forget(record)
    assert not was_asked(record, STOP)


def test_what_was_left_over_is_forgotten_and_only_one_process_looks(tmp_path):
    record = RunRecord(tmp_path)
    ask(record, SAVE)
    assert Requests.of(record, looks=False).taken() == frozenset()
    assert was_asked(record, SAVE)
    assert Requests.of(record, looks=True).taken() == frozenset()
    assert not was_asked(record, SAVE)


def test_looking_costs_nothing_measurable(tmp_path):
    requests, seconds = Requests.of(RunRecord(tmp_path), looks=True), []
    for _ in range(1000):
        began = time.perf_counter()
        requests.taken()
        seconds.append(time.perf_counter() - began)
    assert median(seconds) < 1e-4


def test_a_checkpoint_that_is_asked_for_is_written_at_the_end_of_the_step(tmp_path):
    expected = trained(tmp_path / "a", trainable(), checkpointing_steps=STEPS)
    what = trainable(asking(RunRecord(tmp_path / "b"), SAVE, at=[3]))
    assert torch.equal(trained(tmp_path / "b", what, checkpointing_steps=STEPS), expected)
    assert (checkpoints(tmp_path / "a"), checkpoints(tmp_path / "b")) == ([STEPS], [3, STEPS])


def test_samples_that_are_asked_for_are_drawn_at_the_end_of_the_step_and_change_nothing(tmp_path):
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


def test_the_average_is_what_is_drawn(tmp_path):
    what, seen = trainable(asking(RunRecord(tmp_path), SAMPLE, at=[2])), []

    def draw(step):
        seen.extend((parameter.detach().clone(), average) for parameter, average in zip(
            what.module.parameters(), (shadow.clone() for shadow in what.ema.shadow_params), strict=True
        ))  # fmt: skip

    trained(tmp_path, what, periodic=[Periodic(STEPS, lambda step: None, draw)])
    assert seen
    assert all(torch.equal(parameter, average) for parameter, average in seen)


def in_two_processes(folder):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    run = RunDirectory.create(folder, {}, writes=accelerator.is_main_process)
    batches = asking(run, SAVE, at=[5]) if accelerator.is_main_process else batch_at
    train(accelerator, run, trainable(batches, dropout=0.0), LoopOptions(STEPS, checkpointing_steps=STEPS))


@pytest.mark.slow
def test_all_processes_do_what_the_main_one_is_asked_for(tmp_path):
    debug_launcher(in_two_processes, (tmp_path,), num_processes=2)
    assert checkpoints(tmp_path) == [5, STEPS]


FLAGS = """--instance_prompt sks --heldout_image 0.png --rank 4 --inner_r 2 --target_modules to_v --max_train_steps 6
--checkpointing_steps 6 --validation_steps 3 --heldout_steps 3 --validation_prompt sks dog --no_certify --report_to none"""
KINDS = ("adapter", "adapters", "suggested", "diffusers", "kohya")


@pytest.mark.slow
def test_a_run_that_was_asked_for_samples_ends_in_the_same_bytes(tiny_model, pictures_dir, tmp_path, monkeypatch):
    places = ["--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures_dir)]
    options = [
        parse_options([*FLAGS.split(), *places, "--output_dir", str(tmp_path / name / "run")]) for name in ("plain", "asked")
    ]
    main(options[0])
    report = Progress.report

    def asked(self, step):
        if step == 1:
            for what in ASKED:
                ask(self.run, what)
        report(self, step)

    monkeypatch.setattr(Progress, "report", asked)
    main(options[1])
    assert (tmp_path / "asked" / "run" / "samples" / "step-0000002.png").exists()
    assert not (tmp_path / "plain" / "run" / "samples" / "step-0000002.png").exists()
    assert checkpoints(tmp_path / "asked" / "run") == [2, 6]
    files = []
    for name in ("plain", "asked"):
        adapters = [path for kind in KINDS for path in (tmp_path / name / "run" / kind).rglob("*.safetensors")]
        files.append({path.relative_to(tmp_path / name): path.read_bytes() for path in adapters})
    assert len(files[0]) > len(KINDS)
    assert files[0] == files[1]
    metrics = [[{**line, "time": 0} for line in RunRecord(tmp_path / name / "run").metrics()] for name in ("plain", "asked")]
    assert metrics[0] == metrics[1]
    suggestions = [(tmp_path / name / "run" / "suggestion.json").read_bytes() for name in ("plain", "asked")]
    assert suggestions[0] == suggestions[1]
