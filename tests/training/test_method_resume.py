"""Every adapter method in the one loop, on both tasks: stopped in the middle and resumed, it ends in the same bytes."""

import shutil
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_clip import images, prompts, tiny_clip
from tiny_options import TINY
from tiny_pipeline import tiny_pipeline
from torch import nn

from nora_vision import decomposition, initialization, moment_groups
from pipelines import adapter_files
from pipelines.adapter_method import AdapterMethod
from pipelines.adapter_options import AdapterOptions
from pipelines.clip import Clip
from pipelines.errors import InputError
from pipelines.fewshot.adapters import TargetLayers
from pipelines.fewshot.adapters import attach as attach_to_clip
from pipelines.fewshot.adapters import start as start_on_clip
from pipelines.fewshot.quantization import quantized
from pipelines.methods import DEFAULT, REFERENCE, method_named, method_names
from pipelines.methods.nora import NoraTraining
from pipelines.optimizers import ADAMW, MUON, OptimizerSettings, Rates, parameter_groups
from pipelines.peft_method import PeftMethod
from pipelines.subject.adapters import attach, start
from pipelines.subject.base_model import PromptEmbeddings, quantize_components
from pipelines.subject.loss import DenoisingLoss
from training.engine.loop import LoopOptions, Trainable, train, training_losses
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory

STEPS, BATCH, TOKENS = 6, 2, prompts(3, 5, 9)


class Classification(nn.Module):
    """Cross-entropy of images against three prompts."""

    def __init__(self, clip):
        super().__init__()
        self.model, self.clip = clip.model, clip

    def forward(self, images, labels):
        logits = 10 * self.clip.encode_images(images) @ self.clip.encode_texts(TOKENS).T
        return nn.functional.cross_entropy(logits, labels)


def subject_batch(index):
    generator = torch.Generator().manual_seed(index)
    latents, noise = torch.randn(2, BATCH, 4, 8, 8, generator=generator)
    tokens = torch.randint(0, 100, (BATCH, 2, 16), generator=generator)
    return {
        "latents": latents,
        "noise": noise,
        "timesteps": torch.tensor([100, 900]),
        "time_ids": torch.ones(BATCH, 6),
        "tokens": tokens,
    }


def class_batch(index):
    return {"images": images(3, seed=index), "labels": torch.arange(3)}


def subject(options, cache):
    """The loss of a tiny SDXL with a started adapter, its batches, and the adapted components."""
    pipe, unquantized = tiny_pipeline(), None
    if options.create().needs_quantization:
        unquantized = cache / "unquantized"
        quantize_components(pipe, "nf4", torch.float32, unquantized)
    components = attach(pipe, options)
    loss = DenoisingLoss(pipe)
    losses = partial(training_losses, loss, subject_batch, Accelerator(cpu=True))
    tokens = subject_batch(0)["tokens"]
    prompts = PromptEmbeddings(torch.randn(BATCH, 16, 40), torch.randn(BATCH, 24))
    noised = {name: value for name, value in subject_batch(0).items() if name != "tokens"}
    runs = {
        "unet": lambda: loss.predict(**noised, prompts=prompts),
        "text_encoder": lambda: pipe.text_encoder(tokens[:, 0]),
        "text_encoder_2": lambda: pipe.text_encoder_2(tokens[:, 1]),
    }
    start(options, components, runs, cache, 0, losses, unquantized=unquantized)
    return loss, subject_batch, components


def few_shot(options, cache):
    """The same of a tiny CLIP."""
    clip, unquantized = Clip(tiny_clip(), None, None, "tiny"), None
    if options.create().needs_quantization:
        unquantized = cache / "unquantized"
        clip = quantized(clip, "nf4", unquantized)
    components = attach_to_clip(clip, options, TargetLayers())
    loss = Classification(clip)
    losses = partial(training_losses, loss, class_batch, Accelerator(cpu=True))
    start_on_clip(clip, options, components, [images(3)], TOKENS, cache, 0, losses, unquantized)
    return loss, class_batch, components


def trained(task, method, run, optimizer=ADAMW, **more):
    """Train `STEPS` steps in the run `run`; returns the bytes of the adapter's native files and the steps that were computed."""
    # The precision of a run before, in the same process, would be that of this one.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    options = AdapterOptions(method, rank=4, inner_r=2, **TINY, train_text_encoder=True, **more)
    loss, batch_at, components = task(options, run.parent / "calibration")
    chosen, steps = options.create(), []

    def recorded(step):
        steps.append(step)
        return batch_at(step)

    optimizer = OptimizerSettings(optimizer).optimizer(parameter_groups(loss, Rates(0.02, factor=chosen.learning_rate_factor)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    hooks = chosen.training(list(components.values()), STEPS)
    trainable = Trainable(loss, recorded, optimizer, schedule, method=hooks)
    train(accelerator, RunDirectory.create(run, {}), trainable, LoopOptions(STEPS, checkpointing_steps=STEPS // 2))
    adapter_files.save(components, run / "adapter")
    files = {file.relative_to(run): file.read_bytes() for file in sorted((run / "adapter").rglob("*.safetensors"))}
    return files, steps


def assert_resumes_exactly(task, method, folder, **more):
    """A run that lost all that it wrote after half of its steps computes the other half, and ends in the same bytes."""
    whole, steps = trained(task, method, folder / "whole", **more)
    assert steps == list(range(STEPS))
    middle, _ = list_checkpoints(folder / "whole" / "checkpoints")
    shutil.copytree(middle, folder / "resumed" / "checkpoints" / middle.name)
    assert trained(task, method, folder / "resumed", **more) == (whole, list(range(STEPS // 2, STEPS)))
    return whole


tasks = pytest.mark.parametrize("task", [subject, few_shot])


def with_state():
    """The methods that have hooks in the loop, which their checkpoints must restore."""
    return [name for name in method_names() if method_named(name).training is not AdapterMethod.training]


def methods_of_subjects():
    """Of the tuners of PEFT, which have no code of their own, the first stands for all."""
    of_peft = [name for name in method_names() if PeftMethod in method_named(name).__bases__ and name not in with_state()]
    return [name for name in method_names() if name not in of_peft[1:]]


# Without hooks, a method is its tensors to the loop, on both tasks alike.
@pytest.mark.parametrize(
    ("method", "task"),
    [*((name, subject) for name in methods_of_subjects()), *((name, few_shot) for name in (REFERENCE, *with_state()))],
)
def test_a_training_stopped_in_the_middle_ends_in_the_same_files(method, task, tmp_path):
    assert_resumes_exactly(task, method, tmp_path)


@tasks
def test_a_training_of_nora_on_a_model_in_4_bits_resumes_too(task, tmp_path):
    assert_resumes_exactly(task, "nora", tmp_path, loftq_start=True)


@tasks
def test_a_training_by_muon_resumes_too(task, tmp_path):
    by_muon = assert_resumes_exactly(task, DEFAULT, tmp_path, optimizer=MUON)
    assert by_muon != trained(task, DEFAULT, tmp_path / "other")[0]


GRADIENT_BASIS = {"basis": "mixed", "weighting": "covariance", "gradient_batches": 1, "parameter_budget": 1500}


@tasks
def test_a_resumed_training_has_the_same_basis_from_gradients_and_the_same_ranks_under_a_budget(task, tmp_path):
    files = assert_resumes_exactly(task, DEFAULT, tmp_path, **GRADIENT_BASIS)
    assert {file.parts[1] for file in files} == {"full", "compact"}


@tasks
def test_a_covariance_in_groups_of_layers_gives_the_files_of_one_pass_and_is_read_on_resumption(task, tmp_path, monkeypatch):
    one_pass, _ = trained(task, DEFAULT, tmp_path / "one" / "pass", weighting="covariance")
    monkeypatch.setattr(moment_groups, "GROUP_BYTES", 1)
    assert assert_resumes_exactly(task, DEFAULT, tmp_path, weighting="covariance") == one_pass
    names = {file.stem.rpartition("-")[0] for file in (tmp_path / "calibration").glob("*.safetensors")}
    assert names == {file.stem for file in (tmp_path / "one" / "calibration").iterdir()}


def earlier_awsvd(*args, legacy=False):
    return decomposition.reproducible_awsvd(*args, legacy=True)


@tasks
def test_a_run_of_an_earlier_version_goes_on_with_the_outer_factors_of_its_algorithm(task, tmp_path, monkeypatch):
    # Small enough a block for the layers of the tiny models, which are decomposed in full otherwise.
    monkeypatch.setattr(decomposition, "MIN_BLOCK", 1)
    gaussian = {"inner_init": "gaussian", "preserve_output": True}
    with monkeypatch.context() as earlier:
        earlier.setattr(initialization, "reproducible_awsvd", earlier_awsvd)
        earlier.setattr(NoraTraining, "state_dict", lambda self: {})
        whole, _ = trained(task, DEFAULT, tmp_path / "whole", **gaussian)
    middle, _ = list_checkpoints(tmp_path / "whole" / "checkpoints")
    for name in ("resumed", "mixed"):
        shutil.copytree(middle, tmp_path / name / "checkpoints" / middle.name)
    assert trained(task, DEFAULT, tmp_path / "resumed", **gaussian) == (whole, list(range(STEPS // 2, STEPS)))
    # The next resumption reads the algorithm.
    state = torch.load(list_checkpoints(tmp_path / "resumed" / "checkpoints")[-1] / "state.pt", weights_only=True)
    assert set(state["method"]["decomposition"]) == {decomposition.EARLIER}
    monkeypatch.setattr(NoraTraining, "load_state_dict", lambda self, state: None)
    assert trained(task, DEFAULT, tmp_path / "mixed", **gaussian)[0] != whole


def test_a_checkpoint_whose_outer_factors_cannot_be_computed_is_refused_with_the_remedy(tmp_path):
    _, _, components = few_shot(AdapterOptions(DEFAULT, rank=4, inner_r=2, **GRADIENT_BASIS), tmp_path)
    training = NoraTraining(list(components.values()), STEPS, "float32")
    assert training.state_dict() == {"decomposition": ["block Krylov"] * len(components)}
    training.load_state_dict(training.state_dict())
    remedy = r".*Resume the run with the version of nora_vision that began it, or start again in another --output_dir\."
    with pytest.raises(InputError, match=r"no earlier version had the weighting 'covariance' and the basis 'mixed'" + remedy):
        training.load_state_dict({})
    with pytest.raises(InputError, match="computed by 'a later one', but here by 'block Krylov'" + remedy):
        training.load_state_dict({"decomposition": ["a later one"] * len(components)})
