"""Going on with a run: what may change, what may not, and the first moments of a run."""

import copy
import dataclasses
import json
import os

import pytest

from pipelines.adapter_options import AdapterOptions, changed_options_of
from pipelines.errors import InputError
from pipelines.methods import method_names
from training.engine.resuming import changed_options, check_can_resume
from training.options import SubjectOptions
from training.options.fewshot import FewShotMethodOptions, FewShotOptions
from training.runs.run import RunDirectory

OPTIONS = {
    "optimisation": {"learning_rate": 1e-3, "max_train_steps": 400, "seed": 0},
    "data": {"instance_prompt": "a photo of sks dog", "dataloader_num_workers": 0},
    "output": {"validation_prompt": ["a"], "checkpointing_steps": 100},
}


def changed(**changes):
    return {group: {name: changes.get(name, value) for name, value in fields.items()} for group, fields in OPTIONS.items()}


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path, OPTIONS)


def test_a_changed_option_is_refused_with_both_values(run):
    with pytest.raises(InputError, match=r"other options.*learning_rate: 0\.001 before, 0\.002 now.*another --output_dir"):
        check_can_resume(run.path, changed(learning_rate=2e-3), 1)


def test_every_changed_option_is_named(run):
    with pytest.raises(InputError, match=r"instance_prompt: 'a photo of sks dog' before, 'x' now; seed: 0 before, 1 now"):
        check_can_resume(run.path, changed(instance_prompt="x", seed=1), 1)


@pytest.mark.parametrize(
    "change",
    [{"max_train_steps": 800}, {"dataloader_num_workers": 2}, {"validation_prompt": ["b"]}, {"checkpointing_steps": 7}, {}],
)
def test_steps_prompts_intervals_and_workers_may_change(run, change):
    check_can_resume(run.path, changed(**change), 1)


def test_the_steps_of_adapters_in_a_few_shot_run_must_not_change(tmp_path):
    run = RunDirectory.create(tmp_path, FewShotOptions().to_dict())
    longer = FewShotOptions()
    longer.optimisation.max_train_steps = 7
    with pytest.raises(InputError, match=r"max_train_steps: None before, 7 now"):
        check_can_resume(run.path, longer.to_dict(), 1)


def test_options_that_only_one_version_has_are_no_difference(run):
    later = changed()
    later["data"]["new"] = True
    check_can_resume(run.path, later, 1)


def earlier_and_later(task, **method):
    """The group of the methods' options as a version without NoRA's basis recorded it, and all options of this version."""
    if task == "subject":
        later = SubjectOptions(adapter=AdapterOptions(**method)).to_dict()
        return later["adapter"], later
    method["method"] = ["zeroshot", method["method"]]
    later = FewShotOptions(method=FewShotMethodOptions(**method)).to_dict()
    return later["method"], later


@pytest.mark.parametrize("task", ["subject", "few-shot"])
@pytest.mark.parametrize("method", ["lora", "nora"])
def test_a_default_that_changed_with_the_methods_that_share_its_flag_is_no_difference(task, method):
    group, later = earlier_and_later(task, method=method, basis="weight")
    before = copy.deepcopy(later)
    (name,) = (name for name, value in later.items() if value is group)
    del before[name]["basis"]
    before[name] |= {"gradient_batches": 8} | ({} if task == "subject" else {"lora_rank": 2})
    assert before[name]["gradient_batches"] != group["gradient_batches"]
    assert list(changed_options(before, later)) == []


def test_a_run_of_a_version_without_a_basis_had_that_of_the_weight():
    group, later = earlier_and_later("few-shot", method="nora")
    before = copy.deepcopy(later)
    del before["method"]["basis"], before["method"]["outer_dtype"]
    assert group["basis"] == "gradient"
    changes = ["basis: 'weight' before, 'gradient' now", "outer_dtype: 'base' before, 'int4' now"]
    assert list(changed_options(before, later)) == changes


@pytest.mark.parametrize(("method", "changes"), [("nora", ["optimizer: 'AdamW' before, 'Muon' now"]), ("lora", [])])
def test_a_few_shot_run_of_a_version_without_a_choice_had_adamw(method, changes):
    later = FewShotOptions(method=FewShotMethodOptions(method=[method])).to_dict()
    before = copy.deepcopy(later)
    del before["optimisation"]["optimizer"]
    assert list(changed_options(before, later)) == changes
    later["optimisation"]["optimizer"] = "AdamW"
    assert list(changed_options(before, later)) == []


@pytest.mark.parametrize("task", ["subject", "few-shot"])
def test_a_changed_option_of_the_method_is_refused_where_it_has_an_effect(task):
    group, later = earlier_and_later(task, method="nora", basis="gradient")
    before = copy.deepcopy(later)
    (name,) = (name for name, value in later.items() if value is group)
    before[name] |= {"gradient_batches": 8, "inner_init": "gaussian", "gamma": 7.0}
    assert [text.split(":")[0] for text in changed_options(before, later)] == ["gradient_batches", "inner_init"]


@pytest.mark.parametrize("task", ["subject", "few-shot"])
def test_a_run_of_t_lora_that_did_not_record_ortho_lora_goes_on_without_it_and_is_refused_with_it(task):
    """Such a run trained A and B alone, with nothing subtracted."""
    for ortho_lora, differences in ((True, ["ortho_lora: False before, True now"]), (False, [])):
        group, later = earlier_and_later(task, method="t_lora", ortho_lora=ortho_lora)
        before = copy.deepcopy(later)
        (name,) = (name for name, value in later.items() if value is group)
        del before[name]["ortho_lora"]
        assert list(changed_options(before, later)) == differences


@pytest.mark.parametrize("method", method_names())
def test_an_unchanged_run_of_each_method_can_be_resumed(method):
    options = dataclasses.asdict(AdapterOptions(method))
    assert list(changed_options_of(method, options, options, "subject", built_in=False)) == []


def test_another_number_of_processes_is_refused(run):
    run.update_status(processes=2)
    with pytest.raises(InputError, match=r"processes: 2 before, 1 now"):
        check_can_resume(run.path, OPTIONS, 1)


def test_a_run_whose_process_is_alive_is_not_resumed(run, monkeypatch):
    run.update_status(state="running")
    status = json.loads((run.path / "status.json").read_text())
    (run.path / "status.json").write_text(json.dumps(status))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(InputError, match=rf"process {status['pid']} is still training"):
        check_can_resume(run.path, OPTIONS, 1)


def test_another_process_with_the_id_of_the_runs_process_does_not_prevent_resuming(run, monkeypatch):
    run.update_status(state="running")
    status = json.loads((run.path / "status.json").read_text())
    (run.path / "status.json").write_text(json.dumps(status | {"pid_started": status["pid_started"] - 60}))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    check_can_resume(run.path, OPTIONS, 1)


def test_without_a_run_there_is_nothing_to_check(tmp_path):
    check_can_resume(tmp_path / "new", OPTIONS, 1)


def test_a_run_of_the_built_in_model_resumes_in_another_checkout(tmp_path):
    def options(name):
        return {"model": {"pretrained_model_name_or_path": name}}

    RunDirectory.create(tmp_path, options("/gone/assets/mini-sdxl"))
    check_can_resume(tmp_path, options("mini-sdxl"), 1)
    with pytest.raises(InputError, match=r"pretrained_model_name_or_path: '/gone/assets/mini-sdxl' before, 'owner/model' now"):
        check_can_resume(tmp_path, options("owner/model"), 1)


def test_a_run_of_the_other_task_is_refused(tmp_path):
    RunDirectory.create(tmp_path, {"target_layers": {"rank": 2}})
    with pytest.raises(InputError, match=r"is a few-shot run, which another script trains\. Give another --output_dir"):
        check_can_resume(tmp_path, {"model": {"pretrained_model_name_or_path": "mini-sdxl"}}, 1)
