"""Checkpoints: whole or not there, found damaged by their hashes, the newest and the best kept; and the full disk."""

import json
import subprocess

import pytest
import torch
from accelerate import Accelerator
from regression import trainable, trained
from torch import nn

from training.engine import checkpoints
from training.engine.checkpoints import (
    MANIFEST,
    STATE,
    WEIGHTS,
    damage_of,
    list_checkpoints,
    newest_intact_checkpoint,
    save_checkpoint,
)
from training.engine.loop import LoopOptions, Periodic, train
from training.runs.durable import DiskFullError
from training.runs.run import RunDirectory


def names(folder):
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.unlink()])
@pytest.mark.parametrize("file", [WEIGHTS, STATE])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path, file, harm, caplog):
    expected = trained(tmp_path, trainable())
    harm(list_checkpoints(tmp_path / "checkpoints")[-1] / file)
    assert torch.equal(trained(tmp_path, trainable()), expected)
    assert "step-0000006' is damaged" in caplog.text
    assert file in caplog.text
    assert names(tmp_path) == ["step-0000004", "step-0000006"]
    assert (tmp_path / "checkpoints" / "damaged-step-0000006").is_dir()


def test_an_unreadable_or_missing_manifest_is_damage(tmp_path):
    trained(tmp_path, trainable())
    last = list_checkpoints(tmp_path / "checkpoints")[-1]
    (last / MANIFEST).write_text('{"step": 6, "sha')
    assert damage_of(last) == "manifest.json cannot be read"
    (last / MANIFEST).unlink()
    assert damage_of(last) == "manifest.json is missing"


def test_if_all_checkpoints_are_damaged_training_starts_again(tmp_path):
    expected = trained(tmp_path, trainable())
    for path in list_checkpoints(tmp_path / "checkpoints"):
        flip_a_bit(path / STATE)
    assert torch.equal(trained(tmp_path, trainable()), expected)
    assert [line.step for line in RunDirectory(tmp_path).metrics()] == [1, 2, 3, 4, 5, 6]


class Killed(BaseException):
    """Stands for the process's end."""


@pytest.mark.parametrize("at", range(5))
def test_a_write_that_is_interrupted_anywhere_leaves_the_checkpoint_before_it(tmp_path, at, monkeypatch):
    """Each write, flush and rename of a checkpoint, in turn, is the last thing that happens."""
    trained(tmp_path, trainable(), steps=2)
    calls = []

    def dying(function):
        def call(*arguments):
            if "checkpoints" in str(arguments[0]):
                calls.append(function)
                if len(calls) == at + 1:
                    raise Killed
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        # What a dead process leaves is not tidied up by it.
        patch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)
        for name in ("write_durably", "flush_folder"):
            patch.setattr(checkpoints, name, dying(getattr(checkpoints, name)))
        patch.setattr(checkpoints.os, "replace", dying(checkpoints.os.replace))
        with pytest.raises(Killed):
            trained(tmp_path, trainable(), steps=4)
    left = list((tmp_path / "checkpoints").glob(".writing-*"))
    assert [path.name for path in left] == [".writing-step-0000004"]
    assert newest_intact_checkpoint(tmp_path / "checkpoints").name == "step-0000002"
    assert not any(path.exists() for path in left)


def test_the_newest_checkpoints_and_the_best_one_are_kept(tmp_path):
    losses = {2: 0.5, 4: 0.1, 6: 0.3, 8: 0.4, 10: 0.6}
    trained(tmp_path, trainable(), steps=10, periodic=[Periodic(2, losses.get)])
    assert names(tmp_path) == ["step-0000004", "step-0000008", "step-0000010"]
    best = json.loads((tmp_path / "checkpoints" / "step-0000004" / MANIFEST).read_text())
    assert best["score"] == 0.1


def test_a_checkpoint_has_the_score_of_its_own_step(tmp_path):
    trained(tmp_path, trainable(), steps=4, periodic=[Periodic(4, lambda step: 0.25)])
    scores = [json.loads((path / MANIFEST).read_text())["score"] for path in list_checkpoints(tmp_path / "checkpoints")]
    assert scores == [None, 0.25]


def test_a_kill_between_an_action_and_its_checkpoint_repeats_the_action(tmp_path, monkeypatch):
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr("training.engine.loop.save_checkpoint", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            trained(tmp_path, trainable(), periodic=[Periodic(2, seen.append)])
    trained(tmp_path, trainable(), periodic=[Periodic(2, seen.append)])
    assert seen == [2, 2, 4, 6]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def wide():
    """Something to train whose checkpoint takes 600 KiB: weights, and two moments of each."""
    what = trainable(with_ema=False)
    what.module.register_parameter("wide", nn.Parameter(torch.zeros(50_000)))
    what.optimizer.add_param_group({"params": [what.module.wide]})
    what.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(what.optimizer, lambda step: 1)
    what.module.forward = lambda inputs, targets: (what.module.linear(inputs) - targets).square().mean() + what.module.wide.sum()
    return what


def in_run(folder, what, steps):
    run = RunDirectory.create(folder, {})
    with run.recording():
        train(Accelerator(cpu=True), run, what, LoopOptions(steps, checkpointing_steps=1, checkpoints_total_limit=9))
    return torch.cat([parameter.detach().flatten().clone() for parameter in what.module.parameters()])


def test_a_full_disk_keeps_the_last_checkpoint_and_the_error_says_how_to_resume(tmp_path, small_disk):
    expected = in_run(tmp_path / "whole", wide(), 4)
    with pytest.raises(DiskFullError, match=r"is full.*step-0000003 is complete.*--resume_from_checkpoint latest"):
        in_run(small_disk, wide(), 4)
    assert RunDirectory(small_disk).status().state == "failed"
    assert "is full" in RunDirectory(small_disk).status().error
    assert names(small_disk)[-1] == "step-0000003"
    assert not list((small_disk / "checkpoints").glob(".*"))
    for old in list_checkpoints(small_disk / "checkpoints")[:-1]:
        subprocess.run(["rm", "-r", old], check=True)
    assert torch.equal(in_run(small_disk, wide(), 4), expected)


def test_the_status_is_written_even_if_other_programs_fill_the_disk(small_disk):
    run = RunDirectory.create(small_disk, {})

    def fill():
        with (small_disk / "others").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    with pytest.raises(DiskFullError, match=r"No checkpoint was saved yet"), run.recording():
        fill()
    assert run.status().state == "failed"


def test_a_checkpoint_loads_what_was_saved(tmp_path):
    what = trainable()
    path = save_checkpoint(tmp_path, 7, what.module, {"more": 1}, keep=1)
    other = trainable()
    with torch.no_grad():
        other.module.linear.weight.zero_()
    assert checkpoints.load_checkpoint(path, other.module) == {"step": 7, "more": 1}
    assert torch.equal(other.module.linear.weight, what.module.linear.weight)
