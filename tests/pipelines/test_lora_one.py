"""LoRA-One: A and B from the gradient at the pretrained weights; autograd and the full SVD are the oracles."""

import logging
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from peft import PeftConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_clip import images
from tiny_pipeline import image, tiny_pipeline
from torch import nn
from toy_task import toy_clip

from nora_vision import AdapterFileError
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, MethodTraining, Probe, no_losses, trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.clip_attention import separate
from pipelines.errors import InputError
from pipelines.fewshot import adapters as few_shot
from pipelines.fewshot.loss import ClassificationLoss
from pipelines.fewshot.prompts import Prompts
from pipelines.gradients import mean_gradients
from pipelines.methods import method_of
from pipelines.methods.lora_one import LoraOne, LoraOneOptions, starting_factors
from pipelines.subject import adapters
from pipelines.subject.loss import DenoisingLoss
from training.engine.loop import training_losses

RANK, BATCHES, GAMMA = 4, 8, 128.0


class Small(nn.Module):
    """A convolution and two linear layers, one of which does not affect the loss."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.unread = nn.Conv2d(3, 5, 3, bias=False), nn.Linear(5, 7), nn.Linear(5, 7)

    def forward(self, images):
        return self.linear(self.conv(images).tanh().mean(dim=(2, 3)))


def small_model():
    torch.manual_seed(0)
    return Small().requires_grad_(False)


def batch(index):
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(index))


def losses_of(model, count):
    """The distance of the outputs from one for each batch; the layer without effect is called too."""
    for index in range(count):
        yield (model(batch(index)) - 1).square().mean() + 0 * model.unread(torch.ones(5)).sum()


def started(folder, model=None, losses=losses_of, seed=1, **options):
    """The small model with an adapter on every layer."""
    model = model or small_model()
    method = LoraOne(LoraOneOptions(**{"rank": RANK, "alpha": 16.0, **options}))
    method.add(model, ["conv", "linear", "unread"], torch.Generator())
    probe = Probe(None, partial(losses, model), torch.Generator().manual_seed(seed), folder / "small.safetensors")
    method.start(model, probe, ADAPTER_NAME)
    return model


def gradients_of(model, losses, names):
    """The gradient of the mean loss with respect to a weight, by autograd: (out, in or in * kh * kw)."""
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in names]
    found = torch.autograd.grad(torch.stack(list(losses)).mean(), weights)
    return {name: gradient.flatten(1) for name, gradient in zip(names, found, strict=True)}


def check_start(layer, gradient, alpha=16.0, rank=RANK, gamma=GAMMA):
    """Check that the layer's change is s / gamma times the best rank-r approximation of -G / ||G||_2."""
    U, S, Vh = torch.linalg.svd(-gradient)
    best = U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]
    expected = alpha / rank**0.5 / gamma * best / S[0]
    torch.testing.assert_close(layer.get_delta_weight(ADAPTER_NAME).flatten(1), expected, atol=1e-6, rtol=1e-3)
    # Directions beyond the rank of the gradient start as in LoRA.
    count = min(rank, int(torch.linalg.matrix_rank(gradient)))
    A, B = layer.lora_A[ADAPTER_NAME].weight.flatten(1)[:count], layer.lora_B[ADAPTER_NAME].weight.flatten(1)
    assert not B[:, count:].any()
    torch.testing.assert_close(A @ A.T, B[:, :count].T @ B[:, :count], atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(A @ A.T, torch.diag(S[:count] / S[0] / gamma), atol=1e-6, rtol=1e-3)


def test_the_initial_change_is_the_best_approximation_of_the_negative_gradient(tmp_path):
    model, plain = started(tmp_path), small_model()
    gradients = gradients_of(plain, losses_of(plain, BATCHES), ["conv", "linear"])
    for name, gradient in gradients.items():
        check_start(model.get_submodule(name), gradient)


def test_the_base_weights_stay_and_only_the_adapter_is_trained(tmp_path):
    model, plain = started(tmp_path), small_model()
    for name, layer in tuner_layers(model).items():
        base = layer.get_base_layer()
        assert torch.equal(base.weight, plain.get_submodule(name).weight)
        assert base.weight.grad is None
        assert not base.weight._post_accumulate_grad_hooks
        x = batch(0) if name == "conv" else torch.randn(4, 5)
        change = layer.get_delta_weight(ADAPTER_NAME)
        expected = base(x) + (nn.functional.conv2d(x, change) if name == "conv" else x @ change.T)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    sizes = [RANK * (27 + 5), RANK * (5 + 7), RANK * (5 + 7)]
    assert sum(parameter.numel() for parameter in trained_parameters({"": model})) == sum(sizes)
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_a_layer_without_a_gradient_starts_as_in_lora_and_is_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        layer = started(tmp_path).unread
    assert "gradient of 1 of 3 layers is zero" in caplog.text
    assert caplog.text.rstrip().endswith("unread.")
    assert not layer.lora_B[ADAPTER_NAME].weight.any()
    assert layer.lora_A[ADAPTER_NAME].weight.any(dim=1).all()


def test_directions_beyond_the_gradients_rank_start_as_in_lora(tmp_path):
    def one_image(model, count):
        for _ in range(count):
            yield model.linear(torch.ones(5)).square().mean()

    layer = started(tmp_path, losses=one_image).linear
    A, B = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    assert A.any(dim=1).all()
    assert B.any(dim=0).tolist() == [True, False, False, False]
    plain = small_model()
    gradient = gradients_of(plain, one_image(plain, 1), ["linear"])["linear"]
    torch.testing.assert_close(
        layer.get_delta_weight(ADAPTER_NAME), -16 / 2 / GAMMA * gradient / gradient.norm(), atol=1e-6, rtol=1e-3
    )


def test_a_large_gradient_is_factored_nearly_as_well_as_by_the_full_svd():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(120, 120, generator=generator)).Q for _ in range(2))
    gradient = left @ torch.diag(0.8 ** torch.arange(120)) @ right
    factors = starting_factors(gradient, RANK, GAMMA)
    U, S, Vh = torch.linalg.svd(-gradient)
    best = U[:, :RANK] @ torch.diag(S[:RANK]) @ Vh[:RANK]
    torch.testing.assert_close(GAMMA * S[0] * factors.up @ factors.down, best, atol=1e-4, rtol=0)
    largest = factors.down.gather(1, factors.down.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


def test_the_same_seed_and_data_give_the_same_bytes(tmp_path):
    for run in ("a", "b"):
        adapter_files.save({"small": started(tmp_path / run)}, tmp_path / run)
    first, second = (tmp_path / run / "full" / "small" / "adapter_model.safetensors" for run in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_the_initial_change_and_a_step_along_it_lower_the_loss(tmp_path):
    model, plain = started(tmp_path), small_model()
    before = torch.stack(list(losses_of(plain, BATCHES))).mean()
    at_start = torch.stack(list(losses_of(model, BATCHES))).mean()
    optimizer = torch.optim.SGD(trained_parameters({"": model}), lr=1e-3)
    at_start.backward()
    optimizer.step()
    assert torch.stack(list(losses_of(model, BATCHES))).mean() < at_start < before


# The cache


def not_again(model, count):
    raise AssertionError("differentiated again")


def test_factors_are_cached_and_reused_without_another_pass(tmp_path):
    first = started(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["small-lora_one.safetensors"]
    again = started(tmp_path, losses=not_again)
    for ours, theirs in zip(again.state_dict().values(), first.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_cached_factors_of_other_options_or_weights_are_not_reused(tmp_path):
    started(tmp_path)
    other = small_model()
    other.linear.weight.mul_(2)
    for changes in ({"rank": 3}, {"gamma": 64.0}, {"gradient_batches": 2}, {"model": other}):
        with pytest.raises(AssertionError, match="differentiated again"):
            started(tmp_path, losses=not_again, **changes)


def test_a_damaged_cache_is_refused_by_its_name(tmp_path):
    started(tmp_path)
    file = tmp_path / "small-lora_one.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AdapterFileError, match=r"small-lora_one.safetensors was changed"):
        started(tmp_path)


# Errors


def test_an_error_in_the_pass_leaves_the_weights_frozen_and_the_losses_closed(tmp_path):
    model, closed = small_model(), []

    def failing(model, count):
        try:
            yield next(losses_of(model, 1))
            yield model.linear(torch.ones(5)).sum() / 0 * torch.nan
            raise MemoryError
        finally:
            closed.append(True)

    with pytest.raises(MemoryError):
        started(tmp_path, model, failing)
    assert closed
    for layer in tuner_layers(model).values():
        weight = layer.get_base_layer().weight
        assert not weight.requires_grad
        assert weight.grad is None
        assert not weight._post_accumulate_grad_hooks


def test_a_non_finite_gradient_is_reported_with_its_layer(tmp_path):
    def infinite(model, count):
        yield model.linear(torch.full((5,), torch.inf)).sum()

    with pytest.raises(ValueError, match=r"gradient of 'linear' .* is not finite.*bf16"):
        started(tmp_path, losses=infinite)
    assert not list(tmp_path.iterdir())


def test_a_grouped_convolution_is_refused(tmp_path):
    model = small_model()
    model.conv = nn.Conv2d(4, 8, 3, groups=2)
    with pytest.raises(InputError, match=r"'conv', a convolution with 2 groups"):
        started(tmp_path, model, not_again)


def test_missing_losses_are_an_error(pipe, tmp_path):
    options = AdapterOptions("lora_one")
    components = adapters.attach(pipe, options)
    with pytest.raises(ValueError, match="initialised from gradients"):
        adapters.start(options, components, {"unet": None}, tmp_path, 0, no_losses)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"rank must be at least 1, got 0"),
        ({"gamma": 0.0}, r"gamma must be above 0, got 0.0"),
        ({"gradient_batches": 0}, r"gradient_batches must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        AdapterOptions("lora_one", **changes)


# Precision and processes


def test_loss_scaling_keeps_gradients_too_small_for_float16():
    linear = nn.Linear(4, 3, dtype=torch.float16).requires_grad_(False)

    def tiny(count):
        for _ in range(count):
            yield (linear.weight.float() * 1e-8).sum()

    found = dict(mean_gradients({"linear": linear}, tiny, 2))["linear"]
    torch.testing.assert_close(found, torch.full((3, 4), 1e-8), atol=0, rtol=0.01)


def half_of_batch(model, process, count):
    """The losses of one of two processes."""
    for index in range(count):
        yield (model(batch(index).chunk(2)[process]) - 1).square().mean()


def test_several_processes_start_from_the_mean_of_their_gradients(monkeypatch):
    model, names, of_first = small_model(), ("conv", "linear"), []

    def noted(own, reduction):
        assert reduction == "mean"
        if len(of_first) < len(names):
            of_first.append(own.clone())
            return own
        return (own + of_first[names.index("conv" if own.ndim == 4 else "linear")]) / 2

    monkeypatch.setattr("accelerate.utils.reduce", noted)
    layers = {name: model.get_submodule(name) for name in names}
    for process in (0, 1):
        found = dict(mean_gradients(layers, partial(half_of_batch, model, process), BATCHES))
    expected = gradients_of(model, ((model(batch(index)) - 1).square().mean() for index in range(BATCHES)), names)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


# Both tasks


def check_components(components, plain, losses):
    """Check that each of `components` starts from the gradient of the mean of `losses()` by the weights of `plain`."""
    for name, model in components.items():
        layers = tuner_layers(model)
        gradients = gradients_of(plain[name], losses(), list(layers))
        for layer, gradient in gradients.items():
            check_start(layers[layer], gradient)


def subject_batch(index):
    generator = torch.Generator().manual_seed(index)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    tokens = torch.randint(0, 100, (2, 2, 16), generator=generator)
    timesteps, time_ids = torch.tensor([100, 900]), torch.ones(2, 6)
    return {"latents": latents, "noise": noise, "timesteps": timesteps, "time_ids": time_ids, "tokens": tokens}


def test_all_components_of_sdxl_start_from_the_gradient_of_the_base_model(pipe, tmp_path):
    options = AdapterOptions("lora_one", rank=RANK, gradient_batches=2, train_text_encoder=True)
    components = adapters.attach(pipe, options)
    losses = partial(training_losses, DenoisingLoss(pipe), subject_batch, Accelerator(cpu=True))
    adapters.start(options, components, dict.fromkeys(components), tmp_path, 0, losses)
    plain = tiny_pipeline()
    loss = DenoisingLoss(plain)
    parts = {name: getattr(plain, name) for name in components}
    assert len(parts) == 3
    check_components(components, parts, lambda: (loss(**subject_batch(index)) for index in range(2)))


PROMPTS = Prompts(("cat", "grey_dog", "teapot"), ("a {}.",))


def class_loss(clip, encoders):
    """The training loss of `encoders`, with features in place of the frozen one."""
    with torch.no_grad():
        features = PROMPTS.class_features(clip.encode_texts(clip.tokenizer(PROMPTS.texts())))
    return ClassificationLoss(clip, PROMPTS, features if encoders == "image" else None, encoders == "text")


def class_batch(clip, encoders, index):
    pixels = images(3, seed=index)
    with torch.no_grad():
        return {"images": clip.encode_images(pixels) if encoders == "text" else pixels, "labels": torch.arange(3)}


@pytest.mark.parametrize("encoders", ["image", "text", "both"])
def test_each_encoder_of_clip_starts_from_the_gradient_of_the_base_model(encoders, tmp_path):
    options, clip, plain = AdapterOptions("lora_one", rank=RANK), toy_clip(), toy_clip()
    separate(plain.model)
    components = few_shot.attach(clip, options, few_shot.TargetLayers(encoders))
    batch_at = partial(class_batch, plain, encoders)
    losses = partial(training_losses, class_loss(clip, encoders), batch_at, Accelerator(cpu=True))
    few_shot.start(clip, options, components, (), None, tmp_path, 0, losses)
    loss = class_loss(plain, encoders)
    parts = {name: few_shot.encoder(plain, name) for name in components}
    check_components(components, parts, lambda: (loss(**batch_at(index)) for index in range(BATCHES)))


def test_files_are_plain_lora_that_peft_loads(pipe, tmp_path):
    options = AdapterOptions("lora_one", rank=RANK, gradient_batches=1)
    components = adapters.attach(pipe, options)
    losses = partial(training_losses, DenoisingLoss(pipe), subject_batch, Accelerator(cpu=True))
    adapters.start(options, components, {"unet": None}, tmp_path, 0, losses)
    with torch.no_grad():
        for index, parameter in enumerate(trained_parameters(components)):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    adapter_files.save(components, tmp_path)
    expected, stock = image(pipe), tiny_pipeline()
    folder = tmp_path / "full" / "unet"
    stock.unet.add_adapter(PeftConfig.from_pretrained(str(folder)))
    set_peft_model_state_dict(stock.unet, load_file(folder / "adapter_model.safetensors"))
    torch.testing.assert_close(image(stock), expected, atol=1 / 255, rtol=0)
    assert (expected - image(tiny_pipeline())).abs().max() > 1 / 255
    assert method_of(components["unet"].peft_config[ADAPTER_NAME]).name == "lora_one"


def test_the_preconditioner_solves_with_the_gram_matrix_of_the_other_factor():
    model = nn.ModuleDict({"linear": nn.Linear(6, 5), "conv": nn.Conv2d(3, 4, 3)})
    method = AdapterOptions("lora_one", rank=2, precondition=True, damping=1e-3).create()
    method.add(model, ["linear", "conv"], torch.Generator().manual_seed(0))
    layers = tuner_layers(model).values()
    expected = []
    for layer in layers:
        A, B = (part[ADAPTER_NAME].weight for part in (layer.lora_A, layer.lora_B))
        for parameter in (A, B):
            nn.init.normal_(parameter)
            parameter.grad = torch.randn_like(parameter)
        gram_B = B.flatten(1).T @ B.flatten(1) + 1e-3 * torch.eye(2)
        gram_A = A.flatten(1) @ A.flatten(1).T + 1e-3 * torch.eye(2)
        expected.append((gram_B.inverse() @ A.grad.flatten(1), B.grad.flatten(1) @ gram_A.inverse()))
    method.training([model], 10).after_backward(1)
    for layer, (of_A, of_B) in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.lora_A[ADAPTER_NAME].weight.grad.flatten(1), of_A, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.lora_B[ADAPTER_NAME].weight.grad.flatten(1), of_B, atol=1e-4, rtol=1e-4)


def test_the_preconditioned_step_is_that_of_pefts_riemannian_optimizer():
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_riemannian_optimizer

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(get_peft_model(nn.ModuleDict({"linear": nn.Linear(6, 5)}), LoraConfig(r=2, target_modules=["linear"])))
        nn.init.normal_(models[-1].base_model.model["linear"].lora_B[ADAPTER_NAME].weight)
    ours, theirs = (model.base_model.model for model in models)
    training = AdapterOptions("lora_one", rank=2, precondition=True, damping=1e-2).create().training([ours], 3)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
    optimizers = [torch.optim.AdamW(trained[0], lr=0.1), create_riemannian_optimizer(models[1], torch.optim.AdamW, lr=0.1)]
    x = torch.randn(4, 6)
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model["linear"](x).square().mean().backward()
            if model is ours:
                training.after_backward(1)
            optimizer.step()
    for first, second in zip(*trained, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_a_preconditioned_training_is_not_sharded():
    assert AdapterOptions("lora_one").create().can_be_sharded
    assert not AdapterOptions("lora_one", precondition=True).create().can_be_sharded
    assert type(AdapterOptions("lora_one").create().training([], 1)) is MethodTraining
