"""NoRA's basis from the gradient of the training loss and its weightings, in both tasks; autograd is the oracle."""

import logging
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Linear4bit
from test_lora_one import PROMPTS, batch, class_batch, class_loss, gradients_of, losses_of, small_model, subject_batch, toy_clip
from tiny_clip import images
from tiny_pipeline import tiny_pipeline
from torch import nn

from nora_vision import ActivationStatistics
from nora_vision.quantization import dequantized_weight
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, Probe, trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.clip_attention import separate
from pipelines.errors import InputError
from pipelines.fewshot import adapters as few_shot
from pipelines.gradients import mean_gradients
from pipelines.methods import method_named
from pipelines.subject import adapters
from pipelines.subject.loss import DenoisingLoss
from training.engine.loop import training_losses

NORA, RANK = method_named("nora"), 4


def options(**changes):
    return NORA.Options(**{"rank": RANK, "inner_r": 2, "gradient_batches": 3, **changes})


def started(folder, model=None, losses=losses_of, **changes):
    """The small model with NoRA on its layers, started from its losses."""
    generator = torch.Generator().manual_seed(1)
    model, method = model or small_model(), NORA(options(**{"basis": "gradient", "outer_dtype": "base", **changes}))
    method.attach(model, method.config(["conv", "linear", "unread"]), ADAPTER_NAME, generator)

    def forward():
        model(batch(0))
        model.unread(torch.ones(1, 5))

    probe = Probe(forward, partial(losses, model), generator, folder / "small.safetensors")
    method.start(model, probe, ADAPTER_NAME)
    return model


def check_basis(layer, gradient, scale, rank=RANK):
    """Check that A spans the leading right singular vectors of G S, and B the left ones."""
    relative = (scale / scale.max()).clamp_min(1e-3 * scale.mean() / scale.max()).double()
    U, _, Vh = torch.linalg.svd(-gradient.double() * relative)
    A, B = layer.nora_A[ADAPTER_NAME].double() * relative, layer.nora_B[ADAPTER_NAME].double()
    torch.testing.assert_close(A.T @ A, Vh[:rank].T @ Vh[:rank], atol=1e-4, rtol=1e-3)
    level = torch.linalg.svdvals(layer.finite_weight_matrix("").double())[:rank].mean()
    torch.testing.assert_close(B @ B.T / level**2, U[:, :rank] @ U[:, :rank].T, atol=1e-4, rtol=1e-3)


def test_the_basis_is_that_of_the_mean_gradient_weighted_by_the_activations(tmp_path):
    model, plain = started(tmp_path), small_model()
    statistics = ActivationStatistics.load(tmp_path / "small.safetensors")
    gradients = gradients_of(plain, losses_of(plain, 3), ["conv", "linear"])
    for name, gradient in gradients.items():
        check_basis(model.get_submodule(name), gradient, statistics[name])


def test_without_weighting_it_is_that_of_the_gradient_alone_and_nothing_is_calibrated(tmp_path):
    model, plain = started(tmp_path, weighting="none"), small_model()
    for name, gradient in gradients_of(plain, losses_of(plain, 3), ["conv", "linear"]).items():
        check_basis(model.get_submodule(name), gradient, torch.ones(gradient.shape[1]))
    assert not (tmp_path / "small.safetensors").exists()


def test_a_layer_without_a_gradient_gets_the_basis_of_its_weight(tmp_path):
    one, other = started(tmp_path / "one"), started(tmp_path / "two", basis="weight")
    products = [model.unread.nora_B[ADAPTER_NAME] @ model.unread.nora_A[ADAPTER_NAME] for model in (one, other)]
    torch.testing.assert_close(*products, atol=1e-3, rtol=1e-2)


def not_again(*_):
    raise AssertionError("differentiated again")


def test_the_factors_are_cached_and_give_the_same_bytes_without_another_pass(tmp_path):
    first, again = started(tmp_path), started(tmp_path, losses=not_again)
    assert {file.name for file in tmp_path.iterdir()} == {"small.safetensors", "small-nora-gradient.safetensors"}
    for ours, theirs in zip(again.state_dict().values(), first.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    for changes in (
        {"rank": 3},
        {"basis": "mixed"},
        {"gradient_scale": "gradient"},
        {"weighting": "none"},
        {"gradient_batches": 2},
    ):
        with pytest.raises(AssertionError, match="differentiated again"):
            started(tmp_path, losses=not_again, **changes)


def test_statistics_that_lack_what_a_weighting_needs_are_collected_again(tmp_path, caplog):
    started(tmp_path, basis="weight")
    assert not ActivationStatistics.load(tmp_path / "small.safetensors").supports("covariance")
    with caplog.at_level(logging.INFO):
        started(tmp_path, basis="weight", weighting="covariance")
    statistics = ActivationStatistics.load(tmp_path / "small.safetensors")
    assert statistics.supports("covariance")
    largest = max(statistics.condition_number(name, "covariance") for name in statistics)
    assert "Condition number of the weighting covariance over 3 layers: median" in caplog.text
    assert f"largest {largest:.3g}" in caplog.text


def test_gradients_of_groups_of_layers_equal_those_of_all_at_once(tmp_path):
    model, calls = small_model(), []
    layers = {name: model.get_submodule(name) for name in ("conv", "linear", "unread")}

    def losses(count):
        calls.append([name for name, layer in layers.items() if layer.weight.requires_grad])
        yield from losses_of(model, count)

    together = dict(mean_gradients(layers, losses, 3))
    singly = dict(mean_gradients(layers, losses, 3, group_bytes=1))
    pairs = dict(mean_gradients(layers, losses, 3, group_bytes=4 * 2 * 35))
    assert calls == [["conv", "linear", "unread"], ["conv"], ["linear"], ["unread"], ["conv"], ["linear", "unread"]]
    for gradients in (singly, pairs):
        assert list(gradients) == list(together)
        assert all(torch.equal(gradients[name], together[name]) for name in together)
    assert not any(layer.weight.requires_grad for layer in layers.values())


def test_no_batches_are_those_of_an_epoch():
    model = nn.Linear(1, 1)

    def batch_at(index):
        return {"input": torch.full((2, 1), float(index))}

    losses = partial(training_losses, model, batch_at, Accelerator(cpu=True), per_epoch=3)
    assert len(list(losses(0))) == 3
    assert len(list(losses(2))) == 2
    with pytest.raises(ValueError, match="must be at least 1"):
        next(training_losses(model, batch_at, Accelerator(cpu=True), 0))


def test_a_quantised_weight_has_the_gradient_of_its_dequantised_value():
    torch.manual_seed(0)
    quantised = nn.Sequential(Linear4bit(64, 64, compute_dtype=torch.float32), nn.Tanh(), Linear4bit(64, 3)).to("cpu")
    plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    for ours, theirs in zip(plain[::2], quantised[::2], strict=True):
        ours.weight.data, ours.bias.data = dequantized_weight(theirs).float(), theirs.bias.data.float()

    def losses(model, count):
        for index in range(count):
            yield model(torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(index))).square().sum()

    found = dict(mean_gradients(dict(quantised[::2].named_children()), partial(losses, quantised), 3))
    expected = gradients_of(plain, losses(plain, 3), list(found))
    assert len(found) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())
    assert not any(layer._forward_hooks for layer in quantised)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_batches": -1}, r"gradient_batches must be at least 0, got -1"),
        ({"gradient_share": 1.5}, r"gradient_share must be in \[0, 1\], got 1.5"),
        ({"gradient_scale": "half"}, r"gradient_scale must be one of mean, gradient, got 'half'"),
        ({"basis": "both"}, r"basis must be one of"),
        ({"weighting": "robust"}, r"weighting must be one of"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AdapterOptions("nora", **changes)


# Both tasks


def test_all_components_of_sdxl_get_the_basis_of_the_denoising_loss_and_only_full_files(pipe, tmp_path, caplog):
    chosen = AdapterOptions(
        "nora",
        rank=RANK,
        inner_r=2,
        gradient_batches=2,
        basis="gradient",
        outer_dtype="base",
        weighting="none",
        train_text_encoder=True,
    )
    components = adapters.attach(pipe, chosen)
    losses = partial(training_losses, DenoisingLoss(pipe), subject_batch, Accelerator(cpu=True))
    adapters.start(chosen, components, dict.fromkeys(components), tmp_path, 0, losses)
    plain = tiny_pipeline()
    loss = DenoisingLoss(plain)
    for name, model in components.items():
        layers, checked = tuner_layers(model), []
        gradients = gradients_of(getattr(plain, name), (loss(**subject_batch(index)) for index in range(2)), list(layers))
        for layer, gradient in gradients.items():
            if torch.linalg.matrix_rank(gradient) >= RANK:
                check_basis(layers[layer], gradient, torch.ones(gradient.shape[1]))
                checked.append(layer)
        assert checked
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            adapter_files.save(components, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["full"]
    assert caplog.text.count("is not saved as a compact file: with the basis 'gradient'") == 3
    fresh = tiny_pipeline()
    adapters.load_adapter(fresh, tmp_path / "saved" / "full", ADAPTER_NAME)
    for name, model in components.items():
        for ours, theirs in zip(tuner_layers(getattr(fresh, name)).values(), tuner_layers(model).values(), strict=True):
            assert torch.equal(ours.nora_A[ADAPTER_NAME], theirs.nora_A[ADAPTER_NAME])
            assert torch.equal(ours.nora_B[ADAPTER_NAME], theirs.nora_B[ADAPTER_NAME])


def test_an_encoder_of_clip_gets_the_basis_of_the_classification_loss(tmp_path):
    changes = {"rank": RANK, "inner_r": 2, "basis": "gradient", "outer_dtype": "base", "gradient_batches": 0}
    chosen, clip = AdapterOptions("nora", **changes), toy_clip()
    components = few_shot.attach(clip, chosen, few_shot.TargetLayers(encoders="image"))
    batch_at = partial(class_batch, clip, "image")
    losses = partial(training_losses, class_loss(clip, "image"), batch_at, Accelerator(cpu=True), per_epoch=2)
    few_shot.start(clip, chosen, components, [images(3)], clip.tokenizer(PROMPTS.texts()), tmp_path, 0, losses)
    plain = toy_clip()
    separate(plain.model)
    loss, encoder = class_loss(plain, "image"), few_shot.encoder(plain, "image")
    layers = tuner_layers(components["image"])
    gradients = gradients_of(encoder, (loss(**class_batch(plain, "image", index)) for index in range(2)), list(layers))
    statistics = ActivationStatistics.load(tmp_path / "image.safetensors")
    checked = [name for name, gradient in gradients.items() if torch.linalg.matrix_rank(gradient) >= RANK]
    assert checked
    for name in checked:
        check_basis(layers[name], gradients[name], statistics[name])


# Ranks under one budget


def counted(components):
    return sum(parameter.numel() for parameter in trained_parameters(components))


def budgeted(pipe, folder, budget, losses=None, **changes):
    """SDXL's three components with ranks under one budget."""
    chosen = AdapterOptions(
        "nora",
        rank=RANK,
        inner_r=2,
        gradient_batches=1,
        weighting="none",
        train_text_encoder=True,
        parameter_budget=budget,
        **changes,
    )
    components = adapters.attach(pipe, chosen)
    losses = losses or partial(training_losses, DenoisingLoss(pipe), subject_batch, Accelerator(cpu=True))
    adapters.start(chosen, components, dict.fromkeys(components), folder, 0, losses)
    return components


def test_one_budget_covers_all_layers_of_all_components_and_a_resumed_run_gets_the_same_ranks(pipe, tmp_path):
    components = budgeted(pipe, tmp_path, 2500)
    layers = {(name, key): layer for name, model in components.items() for key, layer in tuner_layers(model).items()}
    sizes = {name: (layer.r[ADAPTER_NAME], layer.inner_r[ADAPTER_NAME]) for name, layer in layers.items()}
    steps = [2 * min(r, inner_r) for r, inner_r in sizes.values()]
    assert 2500 - min(steps) < counted(components) <= 2500
    assert len(set(sizes.values())) > 1
    again = budgeted(tiny_pipeline(), tmp_path, 2500, losses=not_again)
    for name, model in components.items():
        assert again[name].peft_config[ADAPTER_NAME].rank_pattern == model.peft_config[ADAPTER_NAME].rank_pattern
        for ours, theirs in zip(tuner_layers(again[name]).values(), tuner_layers(model).values(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    adapter_files.save(components, tmp_path / "saved")
    fresh = tiny_pipeline()
    for layout in ("full", "compact"):
        adapters.load_adapter(fresh, tmp_path / "saved" / layout, layout)
        for name in components:
            loaded = tuner_layers(getattr(fresh, name))
            assert all((loaded[key].r[layout], loaded[key].inner_r[layout]) == sizes[name, key] for key in loaded)


def test_a_budget_below_rank_one_is_refused_with_the_least_budget(pipe, tmp_path):
    with pytest.raises(InputError, match=r"parameter_budget must be at least \d+, for rank 1 in each of \d+ layers, got 10"):
        budgeted(pipe, tmp_path, 10)
    with pytest.raises(InputError, match=r"parameter_budget needs inner_form serial"):
        AdapterOptions("nora", parameter_budget=1000, inner_form="full")


def test_an_encoder_of_clip_is_given_ranks_under_a_budget(tmp_path):
    chosen = AdapterOptions("nora", rank=RANK, inner_r=2, gradient_batches=1, parameter_budget=300)
    clip = toy_clip()
    components = few_shot.attach(clip, chosen, few_shot.TargetLayers(encoders="image"))
    batch_at = partial(class_batch, clip, "image")
    losses = partial(training_losses, class_loss(clip, "image"), batch_at, Accelerator(cpu=True))
    few_shot.start(clip, chosen, components, [images(3)], clip.tokenizer(PROMPTS.texts()), tmp_path, 0, losses)
    layers = tuner_layers(components["image"]).values()
    smallest = min(2 * layer.inner_r[ADAPTER_NAME] for layer in layers)
    assert 300 - smallest < counted(components) <= 300


def test_a_budget_on_quantised_weights_gives_the_inner_ranks_to_the_layers_with_gradients(tmp_path):
    model = nn.Sequential(Linear4bit(64, 64, compute_dtype=torch.float32), nn.Linear(64, 64)).to("cpu")
    method = NORA(options(weighting="none", parameter_budget=200))
    method.attach(model, method.config(["0", "1"]), ADAPTER_NAME, torch.Generator())

    def losses(count):
        for _ in range(count):
            yield model[0](torch.ones(1, 64)).square().sum()

    method.prepare_start(
        {"": model}, {"": Probe(not_again, losses, torch.Generator(), tmp_path / "small.safetensors")}, ADAPTER_NAME
    )
    quantised, unread = (layer.inner_r[ADAPTER_NAME] for layer in tuner_layers(model).values())
    assert quantised > unread
    assert counted({"": model}) <= 200
