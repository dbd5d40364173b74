"""AdaLoRA: its equation, PEFT's rank allocation, the orthogonality regularisation, and its files in PEFT."""

import copy
import json

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from tiny_pipeline import image, tiny_pipeline
from torch import nn

from nora_vision.factors import low_rank_factors
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, Probe, no_losses, trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.subject import adapters

INIT_R, TARGET_R, STEPS = 6, 3, 10


def adapted(pipe, folder, **changes):
    """Attach and start AdaLoRA on the UNet; returns the components and the options."""
    options = AdapterOptions("adalora", init_r=INIT_R, target_r=TARGET_R, **changes)
    components = adapters.attach(pipe, options)
    for model in components.values():
        options.create().start(model, Probe(lambda: None, no_losses, torch.Generator().manual_seed(1), folder), ADAPTER_NAME)
    return components, options


def disturb(components, zero_every=0):
    """Change every trained parameter, then prune half of the triplets of each layer if `zero_every` is set."""
    with torch.no_grad():
        for index, parameter in enumerate(trained_parameters(components)):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        for layer in (layer for model in components.values() for layer in tuner_layers(model).values()):
            layer.lora_E[ADAPTER_NAME][: INIT_R // 2 if zero_every else 0] = 0


def test_a_layer_adds_s_B_e_A_x_and_scales_it_as_diffusers_does(pipe, tmp_path):
    components, _ = adapted(pipe, tmp_path, alpha=3.0, target_modules=[*adapters.ATTENTION, "conv1"])
    disturb(components, zero_every=2)
    for layer in tuner_layers(components["unet"]).values():
        A, B, e = (part[ADAPTER_NAME].detach() for part in (layer.lora_A, layer.lora_B, layer.lora_E))
        change = 3.0 / INIT_R * B @ torch.diag(e.flatten()) @ A
        for scale in (1.0, 0.25):
            layer.set_scale(ADAPTER_NAME, scale)
            found = layer.get_delta_weight(ADAPTER_NAME).flatten(1)
            torch.testing.assert_close(found, scale * change, atol=1e-5, rtol=1e-4)
        layer.scale_layer(0.5)
        layer.unscale_layer()
        torch.testing.assert_close(layer.get_delta_weight(ADAPTER_NAME).flatten(1), change, atol=1e-5, rtol=1e-4)
        factors = low_rank_factors(layer, ADAPTER_NAME)
        torch.testing.assert_close(factors.up @ factors.down, change, atol=1e-5, rtol=1e-4)
        assert len(factors.down) == INIT_R - INIT_R // 2


def test_a_layer_has_rank_times_in_plus_out_plus_one_trained_parameters(pipe, tmp_path):
    components, _ = adapted(pipe, tmp_path)
    expected = sum(INIT_R * (layer.in_features + layer.out_features + 1) for layer in tuner_layers(components["unet"]).values())
    assert sum(parameter.numel() for parameter in trained_parameters(components)) == expected


class Projections(nn.Module):
    """Two Linear layers, for PEFT's own tuner."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.second(self.first(x))


def test_every_step_allocates_the_same_ranks_as_pefts_tuner():
    config = {"tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": STEPS, "init_r": INIT_R, "target_r": TARGET_R}
    names = {"target_modules": ["first", "second"], "lora_alpha": INIT_R, "orth_reg_weight": 0.5}
    torch.manual_seed(1)
    theirs = get_peft_model(Projections(), AdaLoraConfig(**config, **names))
    ours = Projections()
    own = {"init_r": INIT_R, "target_r": TARGET_R, "tinit_ratio": 0.2, "tfinal_ratio": 0.3, "delta_t": 2, "orth_reg_weight": 0.5}
    method = AdapterOptions("adalora", **own).create()
    method.add(ours, ["first", "second"], torch.Generator())
    ours.load_state_dict({name.removeprefix("base_model.model."): value for name, value in theirs.state_dict().items()})
    training = method.training([ours], STEPS)
    optimizers = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1) for model in (ours, theirs)]
    left = []
    for step in range(1, STEPS + 1):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        training.after_step(step)
        theirs.base_model.update_and_allocate(step)
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, theirs.base_model.model.get_parameter(name))
        left.append(sum(int(layer.lora_E[ADAPTER_NAME].count_nonzero()) for layer in tuner_layers(ours).values()))
    assert left[0] == 2 * INIT_R
    assert left[-1] == 2 * TARGET_R


def test_the_regulariser_is_the_term_that_pefts_tuner_adds_to_the_loss(tmp_path):
    class WithLoss(Projections):
        def forward(self, x):
            return type("Output", (), {"loss": super().forward(x).sum()})()

    method = AdapterOptions("adalora", init_r=INIT_R, target_r=TARGET_R, orth_reg_weight=0.7).create()
    config = method.config(["first", "second"])
    theirs = get_peft_model(WithLoss(), config)
    model, x = theirs.base_model.model, torch.randn(3, 8)
    added = theirs.base_model(x).loss - model(x).loss
    torch.testing.assert_close(method.training([model], STEPS).regularizer(), added, atol=1e-4, rtol=1e-4)


def test_weight_zero_disables_the_regulariser(pipe, tmp_path):
    components, options = adapted(pipe, tmp_path, orth_reg_weight=0.0)
    assert options.create().training(list(components.values()), STEPS).regularizer() is None


def test_a_second_training_starts_with_full_ranks_and_fresh_statistics(pipe, tmp_path):
    components, options = adapted(pipe, tmp_path)
    models, method = list(components.values()), options.create()
    first = method.training(models, STEPS)
    for parameter in trained_parameters(components):
        parameter.grad = torch.ones_like(parameter)
    first.after_step(5)
    first.after_step(STEPS)
    state = copy.deepcopy(first.state_dict())
    assert sum(map(sum, state["0"]["kept"].values())) == TARGET_R * len(tuner_layers(models[0]))
    fresh = method.training(models, STEPS).state_dict()["0"]
    assert fresh["kept"] is None
    assert fresh["exp_avg_ipt"] == {}
    first.load_state_dict({})
    first.load_state_dict(state)
    assert first.state_dict()["0"]["kept"] == state["0"]["kept"]
    moments = first.state_dict()["0"]["exp_avg_ipt"]
    assert moments
    assert all(torch.equal(value, state["0"]["exp_avg_ipt"][name]) for name, value in moments.items())


@pytest.mark.parametrize(("steps", "done"), [(1, [1]), (10, [1, 9]), (10, [9])], ids=["one step", "left out", "nothing compared"])
def test_the_final_allocation_is_made_even_if_steps_were_skipped(pipe, tmp_path, steps, done):
    components, options = adapted(pipe, tmp_path, delta_t=5)
    disturb(components)
    training = options.create().training(list(components.values()), steps)
    for parameter in trained_parameters(components):
        parameter.grad = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    for step in done:
        training.after_step(step)
    left = [int(layer.lora_E[ADAPTER_NAME].count_nonzero()) for layer in tuner_layers(components["unet"]).values()]
    assert sum(left) == TARGET_R * len(left)


def test_peft_loads_the_file_which_holds_only_the_kept_triplets(pipe, tmp_path):
    components, _ = adapted(pipe, tmp_path, target_modules=[*adapters.ATTENTION, "conv1"])
    disturb(components, zero_every=2)
    adapter_files.save(components, tmp_path)
    config = json.loads((tmp_path / "full" / "unet" / "adapter_config.json").read_text())
    assert {sum(pattern) for pattern in config["rank_pattern"].values()} == {INIT_R - INIT_R // 2}
    expected, stock = image(pipe), tiny_pipeline()
    PeftModel.from_pretrained(stock.unet, str(tmp_path / "full" / "unet"))
    torch.testing.assert_close(image(stock), expected, atol=1 / 255, rtol=0)


def test_a_layer_whose_triplets_are_all_pruned_is_saved_and_loaded(pipe, tmp_path):
    components, _ = adapted(pipe, tmp_path)
    disturb(components)
    with torch.no_grad():
        next(iter(tuner_layers(components["unet"]).values())).lora_E[ADAPTER_NAME].zero_()
    adapters.save_everywhere(pipe, components, tmp_path, "subject")
    for path in ("adapter/full", "kohya/subject.safetensors"):
        fresh = tiny_pipeline()
        adapters.load_adapter(fresh, tmp_path / path, "loaded")
        torch.testing.assert_close(image(fresh), image(pipe), atol=1 / 255, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_r": 6}, r"target_r must be in \[1, init_r - 1 = 5\], got 6. Lower target_r or raise init_r"),
        ({"target_r": 0}, r"target_r must be in .* got 0"),
        ({"tinit_ratio": 0.6, "tfinal_ratio": 0.5}, r"tinit_ratio \+ tfinal_ratio must be below 1.*got 1.1"),
        ({"tinit_ratio": -0.1}, r"tinit_ratio must be in \[0, 1\), got -0.1"),
        ({"delta_t": 0}, r"delta_t must be at least 1, got 0"),
        ({"beta1": 1.0}, r"beta1 must be between 0 and 1, got 1.0"),
        ({"orth_reg_weight": -1.0}, r"orth_reg_weight must be at least 0, got -1.0"),
        ({"alpha": 0.0}, r"alpha must be above 0, got 0.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        AdapterOptions("adalora", init_r=INIT_R, **changes)


def predicted(unet):
    conditions = {"text_embeds": torch.ones(1, 24), "time_ids": torch.ones(1, 6)}
    return unet(torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 3, 40), added_cond_kwargs=conditions).sample


def test_ranks_are_allocated_although_add_adapter_drops_pefts_tuner_with_its_allocator(pipe, tmp_path):
    """The trap: after `add_adapter`, nothing is left whose `update_and_allocate` could be called, and all ranks would stay."""
    components, options = adapted(pipe, tmp_path)
    assert not any(isinstance(module, AdaLoraModel) for module in pipe.unet.modules())
    assert not hasattr(pipe.unet, "update_and_allocate")
    layers = tuner_layers(pipe.unet).values()
    training = options.create().training(list(components.values()), STEPS)
    optimizer = torch.optim.AdamW(trained_parameters(components), lr=0.01)
    left = []
    for step in range(1, STEPS + 1):
        ((predicted(pipe.unet) - 1).square().mean() + training.regularizer()).backward()
        optimizer.step()
        training.after_step(step)
        optimizer.zero_grad()
        left.append(sum(int(layer.lora_E[ADAPTER_NAME].count_nonzero()) for layer in layers))
    assert left[0] == INIT_R * len(layers)
    assert left[-1] == TARGET_R * len(layers)
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 3
    # Over all layers, not each to the target.
    assert len({int(layer.lora_E[ADAPTER_NAME].count_nonzero()) for layer in layers}) > 1
