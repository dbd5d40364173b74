"""Finished runs written without training: adapters for generation, and a classifier."""

import json
import time

import torch
from class_folders import finished_classifier
from tiny_options import TINY
from tiny_pipeline import tiny_pipeline

from pipelines.adapter_method import trained_parameters
from pipelines.adapter_options import AdapterOptions
from pipelines.cache import module_digest
from pipelines.fewshot.classifier import ClassifierFile, save_classifier
from pipelines.subject import adapters
from training.runs.run import RunDirectory
from training.subject.image_scoring import keep_adapter
from webui.inference_jobs import FEATURES


def small_run(runs, model, run_id="example", method="lora", strength=0.5, steps=(2, 4), suggested=2, pipe=None, **more):
    """The directory of a run whose random adapter, with a fixed seed, grows by `strength` with each saved step.

    Args:
        pipe: the loaded pipeline of `model`; None for the tiny one.
        more: options of the adapter.
    """
    pipe, options = pipe or tiny_pipeline(), AdapterOptions(method=method, rank=4, inner_r=2, **TINY, **more)
    components = adapters.attach(pipe, options)
    adapters.start(options, components, dict.fromkeys(components, lambda: run_tiny(pipe)), runs / run_id / "calibration", 0)
    told = {"model": {"pretrained_model_name_or_path": str(model)}, "data": {"instance_prompt": "a star", "resolution": None}}
    told |= {"adapter": {"method": method}, "output": {"validation_prompt": ["a star", "a star at night"]}}
    run = RunDirectory.create(runs / run_id, told)
    generator = torch.Generator().manual_seed(len(run_id))
    for step in steps:
        with torch.no_grad():
            for parameter in trained_parameters(components):
                parameter.add_(strength * torch.randn(parameter.shape, generator=generator))
        keep_adapter(run, step, components)
    adapters.save_everywhere(pipe, components, run.path, run_id)
    run.update_status(state="done", phase="done", step=steps[-1], total=steps[-1])
    (run.path / "suggestion.json").write_text(json.dumps({"step": suggested, "last": steps[-1], "warnings": [], "why": "."}))
    time.sleep(0.01)
    return run


def untrained_classifier(workspace, data_dir, names):
    """The directory of a finished run whose classifier is the built-in model without training.

    Args:
        names: the class names by folder in `data_dir`.
    """
    run = finished_classifier(workspace, data_dir, names)
    digest = module_digest(FEATURES.clip.model)
    told = ClassifierFile("zeroshot", "mini", None, digest, tuple(names), tuple(names.values()), ("a photo of a {}.",))
    for method in ("nora", "zeroshot"):
        save_classifier(run.path / "trials/2-shots/seed-0" / method, told)
    return run


def run_tiny(pipe):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        pipe("a star", num_inference_steps=1, height=16, width=16, output_type="latent", generator=generator)
