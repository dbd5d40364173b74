"""The one loop: exact resume, accumulation, processes, and what is left behind when it stops."""

import os
import signal

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from regression import STEPS, asking, batch_at, checkpoints, trainable, trained

from pipelines.errors import InputError
from training.engine.loop import LoopOptions, Periodic, train
from training.engine.prefetch import ProcessBatches, part_of_process
from training.engine.stopping import NotFiniteError, StopRequests, TrainingInterrupted, exit_codes
from training.runs.durable import DiskFullError
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory
from training.runs.run_requests import SAVE


def test_a_resumed_run_ends_as_one_that_was_never_interrupted(tmp_path):
    whole, halves = trainable(), trainable()
    expected = trained(tmp_path / "whole", whole)

    def stop(index):
        if index == 5:
            raise KeyboardInterrupt
        return batch_at(index)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "halves", trainable(stop))
    assert list_checkpoints(tmp_path / "halves" / "checkpoints")[-1].name == "step-0000004"
    assert torch.equal(trained(tmp_path / "halves", halves), expected)
    for ours, theirs in zip(halves.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(ours, theirs)
    assert halves.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr()


def test_metrics_of_a_resumed_run_have_every_step_once(tmp_path):
    trained(tmp_path, trainable(), steps=5, checkpointing_steps=3, checkpoints_total_limit=1)
    last = list_checkpoints(tmp_path / "checkpoints")[-1]
    last.rename(last.with_name("step-0000003"))
    state = torch.load(last.with_name("step-0000003") / "state.pt", weights_only=True)
    torch.save(state | {"step": 3}, last.with_name("step-0000003") / "state.pt")
    trained(tmp_path, trainable(), steps=5)
    assert [line.step for line in RunDirectory(tmp_path).metrics()] == [1, 2, 3, 4, 5]


def test_gradient_accumulation_over_two_batches_equals_one_step_on_both(tmp_path):
    def both(index):
        parts = batch_at(2 * index), batch_at(2 * index + 1)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    accumulated = trained(tmp_path / "a", trainable(dropout=0.0), gradient_accumulation_steps=2)
    at_once = trained(tmp_path / "b", trainable(both, dropout=0.0))
    torch.testing.assert_close(accumulated, at_once)


def test_gradients_are_clipped(tmp_path):
    def huge(index):
        return {name: 1e6 * values for name, values in batch_at(index).items()}

    what = trainable(huge)
    seen = []
    what.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in what.module.parameters()]).norm())
    )
    trained(tmp_path, what, max_grad_norm=0.5)
    assert max(seen) <= 0.5 + 1e-4


def test_periodic_actions_come_at_their_steps_and_at_the_end(tmp_path):
    seen = []
    trained(tmp_path, trainable(), steps=5, periodic=[Periodic(2, seen.append)])
    assert seen == [2, 4, 5]


def test_random_numbers_of_a_periodic_action_do_not_change_the_training(tmp_path):
    def draw(step):
        torch.randn(step)

    expected = trained(tmp_path / "a", trainable())
    disturbed = trained(tmp_path / "b", trainable(), periodic=[Periodic(1, draw)])
    assert torch.equal(disturbed, expected)


def test_the_newest_checkpoints_are_kept(tmp_path):
    trained(tmp_path, trainable(), steps=7, checkpoints_total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-0000006", "step-0000007"]


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint_kept(tmp_path):
    def broken(index):
        return {name: values / (index < 3) for name, values in batch_at(index).items()}

    with pytest.raises(NotFiniteError, match=r"loss of step 4 is (nan|inf).*Lower the learning rate.*checkpoints"):
        trained(tmp_path, trainable(broken))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-0000002"]


def test_a_gradient_that_is_not_finite_stops_before_anything_is_saved(tmp_path):
    what = trainable(dropout=0.0)
    what.module.linear.bias.register_hook(lambda gradient: gradient * float("inf"))
    before = [parameter.clone() for parameter in what.module.parameters()]
    with pytest.raises(NotFiniteError, match=r"gradient's norm of step 1 is (nan|inf)"):
        trained(tmp_path, what, checkpointing_steps=1)
    assert all(torch.equal(*pair) for pair in zip(what.module.parameters(), before, strict=True))
    assert not list_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step_and_the_resumed_run_equals_an_uninterrupted_one(tmp_path, number, code):
    def signalled(index):
        if index == 2:
            os.kill(os.getpid(), number)
        return batch_at(index)

    before = signal.getsignal(number)
    expected = trained(tmp_path / "whole", trainable())
    with pytest.raises(TrainingInterrupted) as stopped:
        trained(tmp_path / "halves", trainable(signalled), checkpointing_steps=STEPS)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before
    assert [path.name for path in list_checkpoints(tmp_path / "halves" / "checkpoints")] == ["step-0000003"]
    assert torch.equal(trained(tmp_path / "halves", trainable()), expected)


def test_a_second_interrupt_does_not_wait_for_the_step():
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.noted == signal.SIGTERM
        with pytest.raises(TrainingInterrupted):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingInterrupted(signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
        (NotFiniteError("The loss"), "error: The loss"),
        (DiskFullError("The disk"), "error: The disk"),
        (InputError("The option"), "error: The option"),
    ],
)
def test_every_ending_has_its_exit_code(error, code):
    with pytest.raises(SystemExit) as ended, exit_codes():
        raise error
    assert ended.value.code == code


def test_outside_of_training_a_signal_stops_at_once_with_its_exit_code():
    with pytest.raises(SystemExit) as ended, exit_codes():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_their_order_from_any_number_of_workers(workers):
    batches = ProcessBatches(batch_at, 1, 2).over(range(3, 9), workers)
    for index, batch in zip(range(3, 9), batches, strict=True):
        assert torch.equal(batch["inputs"], batch_at(index)["inputs"][2:])


def test_the_number_of_workers_does_not_change_the_training(tmp_path):
    expected = trained(tmp_path / "none", trainable())
    assert torch.equal(trained(tmp_path / "two", trainable(), dataloader_num_workers=2), expected)


def test_more_steps_continue_on_the_new_schedule(tmp_path):
    def lasting(steps):
        what = trainable()
        what.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(what.optimizer, lambda step: 1 - step / steps)
        return what

    trained(tmp_path, lasting(4), steps=4)
    trained(tmp_path, lasting(8), steps=8)
    rates = [line.values["lr"] for line in RunDirectory(tmp_path).metrics()]
    assert rates == pytest.approx([0.05 * (1 - step / 4) for step in range(4)] + [0.05 * (1 - step / 8) for step in range(4, 8)])


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    trained(tmp_path, trainable())
    with pytest.raises(InputError, match=rf"max_train_steps must be at least {STEPS}, the number .* already trained, got 3"):
        trained(tmp_path, trainable(), steps=3)


def test_progress_and_time_left_are_in_the_status(tmp_path):
    trained(tmp_path, trainable(), steps=10)
    status = RunDirectory(tmp_path).status()
    assert (status.phase, status.step, status.total, status.seconds_left) == ("training", 10, 10, 0.0)


def test_the_learning_rate_logged_is_the_one_used(tmp_path):
    trained(tmp_path, trainable(), steps=3)
    rates = [line.values["lr"] for line in RunDirectory(tmp_path).metrics()]
    assert rates == pytest.approx([0.05 * (1 - step / 20) for step in range(3)])


def test_processes_share_a_batch_without_overlap():
    batch = batch_at(0, size=6)
    parts = [part_of_process(batch, process, 3) for process in range(3)]
    for name, values in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values)


def test_a_batch_that_does_not_divide_among_processes_is_refused():
    with pytest.raises(ValueError, match=r"multiple of 3 processes, got 4 examples"):
        part_of_process(batch_at(0), 0, 3)


def in_two_processes(folder):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    run = RunDirectory.create(folder, {}, writes=accelerator.is_main_process)
    batches = asking(run, SAVE, at=[5]) if accelerator.is_main_process else batch_at
    train(accelerator, run, trainable(batches, dropout=0.0), LoopOptions(STEPS, checkpointing_steps=STEPS))


def test_two_processes_train_as_one_on_the_same_global_batch_and_share_requests(tmp_path):
    expected = trained(tmp_path / "one", trainable(dropout=0.0), checkpointing_steps=STEPS)
    debug_launcher(in_two_processes, (tmp_path / "two",), num_processes=2)
    assert checkpoints(tmp_path / "two") == [5, STEPS]
    resumed = trained(tmp_path / "two", trainable(dropout=0.0))
    torch.testing.assert_close(resumed, expected, atol=1e-5, rtol=1e-5)
    losses = [[line.values["loss"] for line in RunDirectory(tmp_path / name).metrics()] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "field", ["max_train_steps", "gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit"]
)
def test_options_below_one_are_refused(field):
    with pytest.raises(ValueError, match=rf"{field} must be at least 1, got 0"):
        LoopOptions(**{"max_train_steps": 1, field: 0})


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trained(tmp_path, trainable())
    other = trainable()
    other.module.linear.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"belongs to another model or adapter.*linear\.bias"):
        trained(tmp_path, other, steps=STEPS + 1)


def test_status_says_how_a_run_ended(tmp_path):
    run = RunDirectory.create(tmp_path, {"seed": 3})
    assert run.options() == {"seed": 3}
    with run.recording():
        assert run.status().state == "running"
    assert run.status().state == "done"
    with pytest.raises(KeyboardInterrupt), run.recording():
        raise KeyboardInterrupt
    assert run.status().state == "stopped"
    with pytest.raises(OSError, match="broken"), run.recording():
        raise OSError("broken")
    assert run.status().state == "failed"
    assert run.status().error == "OSError: broken"


def test_processes_other_than_the_main_one_write_nothing(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {}, writes=False)
    run.update_status(phase="x")
    run.log(1, loss=0.0)
    run.forget_metrics_after(0)
    assert not (tmp_path / "run").exists()


def test_an_incomplete_last_line_of_metrics_is_ignored(tmp_path):
    run = RunDirectory.create(tmp_path, {})
    run.log(1, loss=0.5)
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 2, "lo')
    assert [line.step for line in run.metrics()] == [1]
