"""What Use says of an adapter's files, and the code and the workflow for other programs."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folders import finished_run, run_in
from small_runs import small_run

from pipelines.built_in import BUILT_IN_MODEL
from pipelines.run_file import ResolvedOptions
from pipelines.subject.base_model import load_base_model
from pipelines.subject.generation_request import SAMPLERS, GenerationRequest
from pipelines.subject.pipeline_cache import PipelineCache
from pipelines.subject.usage import COMFYUI_SAMPLERS, comfyui_workflow, python_code
from webui.generation import request_for
from webui.runs import RunView
from webui.screens.use import request_of
from webui.screens.use_results import DEMO, _card, file_name, warnings_of
from webui.workspace import Workspace

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def view_of_model(folder, model, method="nora", **status):
    """A finished run on a base model."""
    run = finished_run(folder, **status)
    options = {**run.options(), "model": {"pretrained_model_name_or_path": model}, "adapter": {"method": method}}
    ResolvedOptions(options).write(folder)
    return RunView(run)


def test_the_page_says_what_a_file_fits_and_what_the_method_of_its_adapter_cannot_do(tmp_path):
    assert warnings_of(view_of_model(tmp_path / "sdxl", SDXL)) == []
    assert warnings_of(view_of_model(tmp_path / "demo", "mini-sdxl")) == [DEMO]
    (approximate,) = warnings_of(RunView(run_in(tmp_path / "cut", "done", expected_left_out=0.64)))
    assert "about 64% of the weight change" in approximate
    read_differently, no_weight = warnings_of(view_of_model(tmp_path / "dora", SDXL, "dora"))
    assert "Other programs read it differently" in read_differently
    assert "cannot be merged" in no_weight


def card_for(folder, model, layout="kohya"):
    """The card, the workflow and the code of a file."""
    view, workspace = view_of_model(folder / "runs" / "a", model), Workspace(folder / "runs", folder / "sets", is_local=True)
    wanted = request_for(workspace, [("a@60", 0.8, None)], prompt="sks toy at night", sampler="DPM++ 2M Karras", seed=3)
    path = folder / file_name("sks-toy-step60", layout)
    return _card(view, wanted, layout, path)


def test_a_file_for_sdxl_comes_with_places_trigger_word_weight_and_a_workflow(tmp_path):
    card, workflow, code = card_for(tmp_path, SDXL)
    for words in ("ComfyUI/models/loras", "&lt;lora:sks-toy-step60:0.8&gt;", "Trigger word", "sks toy", "0.8"):
        assert words in card.value
    assert workflow.value["orig_name"] == "sks-toy-step60-comfyui.json"
    assert f"from_pretrained('{SDXL}'" in code.value
    assert "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)" in code.value


def test_a_file_of_the_demo_model_is_not_offered_for_sdxl_programs(tmp_path):
    card, workflow, code = card_for(tmp_path, "mini-sdxl")
    assert "models/loras" not in card.value
    assert "load_lora_weights" in card.value
    assert "lora:" not in card.value
    assert not workflow.visible
    assert "BUILT_IN_MODEL" in code.value


def test_the_workflow_links_its_nodes_and_has_the_values_of_the_request():
    assert SAMPLERS.keys() == COMFYUI_SAMPLERS.keys()
    wanted = GenerationRequest(prompt="a star", negative_prompt="fog", seed=7, steps=9, sampler="Euler a", size=(832, 1216))
    nodes = comfyui_workflow(wanted, "a.safetensors")
    links = [link for node in nodes.values() for link in node["inputs"].values() if isinstance(link, list)]
    assert {number for number, _ in links} == nodes.keys() - {"8"}
    values = {name: value for node in nodes.values() for name, value in node["inputs"].items()}
    expected = {"seed": 7, "steps": 9, "cfg": 4.0, "width": 832, "lora_name": "a.safetensors", "sampler_name": "euler_ancestral"}
    assert expected.items() <= values.items()
    assert [node["inputs"]["text"] for node in nodes.values() if "text" in node["inputs"]] == ["a star", "fog"]


@pytest.mark.parametrize("is_native", [False, True])
def test_the_code_generates_the_image_of_the_page(tmp_path, monkeypatch, is_native):
    pipe = load_base_model(str(BUILT_IN_MODEL))
    small_run(tmp_path / "runs", BUILT_IN_MODEL, "a", "nora", strength=0.05, pipe=pipe)
    workspace = Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    values = {"prompt": 'a star\'s "light"', "seed": 3, "steps": 3, "sampler": "DPM++ 2M", "size": (64, 72)}
    wanted = request_for(workspace, [("a@4", 0.7, None)], **values)
    events = []
    PipelineCache().generate(wanted, events.append)
    image = events[-1].image
    monkeypatch.chdir(tmp_path / "runs/a/adapter" if is_native else tmp_path / "runs/a/diffusers")
    Path("code.py").write_text(python_code(wanted, "full" if is_native else "pytorch_lora_weights.safetensors", is_native))
    runpy.run_path("code.py")
    difference = np.asarray(Image.open("image.png")).astype(int) - np.asarray(image)
    assert np.abs(difference).max() <= 1


def test_the_values_of_the_page_become_one_request(tmp_path):
    view_of_model(tmp_path / "runs" / "a", SDXL)
    view_of_model(tmp_path / "runs" / "b", SDXL)
    workspace = Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    fields = {"prompt": "a star", "count": 2, "seed": 5, "seeding": "Same seed", "size": "832 x 1216", "sampler": "Euler a"}
    slots = [["a@60", 0.5, 0.3, 1, 1], ["b@60", 0.7, 1, 1, 1], ["", 1, 1, 1, 1]]
    made = request_of(workspace, {**fields, "steps": 9, "guidance_scale": 3.5, "with_base": True}, slots)
    assert [(each.reference, each.scale, each.blocks.down) for each in made.adapters] == [("a@60", 0.5, 0.3), ("b@60", 0.7, 1)]
    assert (made.size, made.sampler, made.seeds, made.with_base) == ((832, 1216), "Euler a", range(5, 7), True)
