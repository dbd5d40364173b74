"""Every adapter method on the encoders of a CLIP model: target layers, initialisation, and files."""

import json
import shutil
from functools import partial
from itertools import product
from random import Random

import pytest
import torch
from mutations import mutate
from peft import LoraConfig, get_peft_model
from tiny_clip import END, NextAttention, images, prompts, tiny_clip
from tiny_options import TINY, full_precision_methods
from torch import nn

from nora_vision import ActivationStatistics, AdapterFileError
from nora_vision.files import write_tensors
from nora_vision.layer import nora_layers
from pipelines import adapter_files
from pipelines.adapter_method import trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.clip import Clip
from pipelines.clip_attention import separate
from pipelines.errors import InputError
from pipelines.fewshot import adapters
from pipelines.fewshot.adapters import TargetLayers
from pipelines.methods import DEFAULT, method_named

TOKENS = prompts(3, 5, 5, 9)
methods = pytest.mark.parametrize("method", full_precision_methods())


def adapter_layers(components):
    """Every adapted layer, by encoder and name."""
    return {f"{name}.{layer}": module for name, model in components.items() for layer, module in tuner_layers(model).items()}


def state_of(layer):
    """Every parameter and buffer of a layer's adapter."""
    return [tensor for name, tensor in (*layer.named_parameters(), *layer.named_buffers()) if "base_layer" not in name]


def small(method="nora", **changes):
    return AdapterOptions(method=method, rank=4, inner_r=2, **TINY, **changes)


def clip_of(model=None):
    return Clip(tiny_clip() if model is None else model, None, None, "tiny")


def noise_losses(clip, seed, count):
    """Losses of `count` batches of noise, against the prompts."""
    for index in range(count):
        logits = 10 * clip.encode_images(images(3, seed=100 * seed + index)) @ clip.encode_texts(TOKENS).T
        yield nn.functional.cross_entropy(logits, torch.tensor([0, 1, 3]))


def started(folder, options=None, targets=None, clip=None, tokens=TOKENS, seed=0):
    options, clip = options or small(), clip or clip_of()
    components = adapters.attach(clip, options, targets or TargetLayers(projections=["q", "k", "v", "out"]), seed)
    losses = partial(noise_losses, clip, seed)
    adapters.start(clip, options, components, [images(3), images(2, seed=1)], tokens, folder, seed, losses)
    return clip, components


def disturb(components):
    """Change every trainable parameter, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(components):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def outputs(clip):
    return torch.cat([clip.encode_images(images(3)), clip.encode_texts(TOKENS)])


@methods
def test_a_new_adapter_does_not_change_the_features_unless_its_method_does(method, tmp_path):
    clip, _ = started(tmp_path, small(method))
    unchanged = torch.allclose(outputs(clip), outputs(clip_of()), atol=1e-6, rtol=0)
    assert unchanged == method_named(method).starts_at_base


@methods
def test_only_the_adapter_is_trained_and_all_its_parameters_get_gradients(method, tmp_path):
    clip, components = started(tmp_path, small(method))
    disturb(components)
    logits = clip.logit_scale * clip.encode_images(images(3)) @ clip.encode_texts(TOKENS).T
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 3])).backward()
    trained = {name for name, parameter in clip.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in clip.model.named_parameters() if parameter.grad is not None}
    assert not any("base_layer" in name for name in trained)
    assert len(adapter_layers(components)) == 4 * 5


def gradients(clip, components):
    """The gradients of all trainable parameters as one vector."""
    logits = clip.logit_scale * clip.encode_images(images(3)) @ clip.encode_texts(TOKENS).T
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 3])).backward()
    grads = [parameter.grad for parameter in trained_parameters(components)]
    assert {grad.dtype for grad in grads} == {torch.float32}
    return torch.cat([grad.flatten() for grad in grads])


@methods
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_trains_the_same_parameters_in_single_precision(method, autocast, tmp_path):
    clip, components = started(tmp_path, small(method))
    disturb(components)
    expected = gradients(clip, components)
    for parameter in trained_parameters(components):
        parameter.grad = None
    if not autocast:
        for module in clip.model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(clip, components)
    assert torch.cosine_similarity(found, expected, dim=0) > 0.98


@methods
def test_gradient_checkpointing_changes_no_gradient(method, tmp_path):
    clip, components = started(tmp_path, small(method))
    disturb(components)
    expected = gradients(clip, components)
    for parameter in trained_parameters(components):
        parameter.grad = None
    clip.model.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(clip, components), expected)


@methods
def test_a_few_steps_on_images_of_noise_lower_their_loss(method, tmp_path):
    clip, components = started(tmp_path, small(method))
    rate = max(0.05, method_named(method).defaults("few-shot", True).learning_rate)
    optimizer, losses = torch.optim.AdamW(trained_parameters(components), lr=rate), []
    for _ in range(25):
        logits = 10 * clip.encode_images(images(3)) @ clip.encode_texts(TOKENS).T
        losses.append(nn.functional.cross_entropy(logits, torch.tensor([0, 1, 3])))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert min(losses) < 0.8 * losses[0]


LAST = (
    {"layers": "last-1", "projections": ["v", "out"]},
    {f"{block}.attn.{n}_proj" for block in ("image.transformer.resblocks.2", "text.resblocks.1") for n in ("v", "out")},
)


@methods
def test_every_method_adapts_the_chosen_layers_and_no_others(method):
    assert_adapted(method, *LAST)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({"encoders": "image"}, {f"image.transformer.resblocks.{i}.attn.{n}_proj" for i in range(3) for n in "qkv"}),
        ({"encoders": "text"}, {f"text.resblocks.{i}.attn.{n}_proj" for i in range(2) for n in "qkv"}),
        (
            {"layers": "0-1", "projections": ["q"], "encoders": "image"},
            {f"image.transformer.resblocks.{i}.attn.q_proj" for i in (0, 1)},
        ),
    ],
)
@pytest.mark.parametrize("method", ["nora", "lora"])
def test_layers_are_chosen_by_encoder_number_and_projection(method, targets, expected):
    assert_adapted(method, targets, expected)


def assert_adapted(method, targets, expected):
    clip = clip_of()
    if method == "nora" and "projections" not in targets:
        expected = {name for name in expected if name.endswith("v_proj")}
    components = adapters.attach(clip, small(method), TargetLayers(**targets))
    assert set(adapter_layers(components)) == expected
    everywhere = {"image": clip.model.visual, "text": clip.model.transformer}
    assert set(adapter_layers(everywhere)) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"encoders": "audio"}, r"encoders must be one of image, text, both, got 'audio'"),
        ({"projections": ["q", "o"]}, r"projections must be one or more of q, k, v, out, got \['o'\]"),
        ({"projections": []}, r"projections must be one or more of q, k, v, out, got none"),
        ({"layers": "last"}, r"layers must be all, last-N or A-B.*got 'last'"),
        ({"layers": "last-0"}, r"got 'last-0'"),
    ],
)
def test_a_wrong_target_layer_is_refused_before_a_model_is_loaded(targets, message):
    with pytest.raises(InputError, match=message):
        TargetLayers(**targets)


@pytest.mark.parametrize("layers", ["last-3", "1-2", "1-0"])
def test_layers_that_an_encoder_does_not_have_are_refused_by_number(layers):
    with pytest.raises(InputError, match=rf"0-1, the 2 attention layers of the encoder, got '{layers}'"):
        adapters.attach(clip_of(), small(), TargetLayers("text", layers=layers))


def test_a_rank_that_does_not_fit_names_the_encoder():
    with pytest.raises(InputError, match=r"does not fit the text encoder of tiny: .*r must be in"):
        adapters.attach(clip_of(), AdapterOptions(rank=20), TargetLayers(encoders="text"))


def test_an_encoder_without_attention_blocks_is_refused_by_name():
    resnet = tiny_clip(vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "image_size": 32})
    with pytest.raises(InputError, match="The image encoder of tiny has no attention"):
        adapters.attach(clip_of(resnet), small(), TargetLayers())
    assert set(adapters.attach(clip_of(resnet), small(), TargetLayers("text"))) == {"text"}


# Calibration


def statistics(folder, name="text"):
    return ActivationStatistics.load(folder / f"{name}.safetensors")


def test_q_k_and_v_of_a_block_share_one_scale(tmp_path):
    _, components = started(tmp_path)
    for name in ("image", "text"):
        scales = statistics(tmp_path, name)
        for q in [layer for layer in scales if layer.endswith("q_proj")]:
            for other in "kv":
                assert torch.equal(scales[q], scales[q.replace("q_proj", f"{other}_proj")])
            assert not torch.equal(scales[q], scales[q.replace("q_proj", "out_proj")])
    assert len(nora_layers(components["text"])) == 8


def test_statistics_cover_every_token_up_to_the_end_token(tmp_path):
    """The oracle computes the sum of squares at the first block's queries by hand."""
    started(tmp_path)
    model, total = tiny_clip(), torch.zeros(16, dtype=torch.float64)
    for row in TOKENS:
        length = row.tolist().index(END) + 1
        hidden = model.transformer.resblocks[0].ln_1(model.token_embedding(row) + model.positional_embedding)
        total += hidden[:length].double().square().sum(dim=0)
    torch.testing.assert_close(statistics(tmp_path)["resblocks.0.attn.q_proj"], total.sqrt().float())


def test_tokens_after_the_end_token_do_not_change_the_statistics(tmp_path):
    places = torch.arange(TOKENS.shape[1])
    other = torch.where(places > TOKENS.argmax(dim=-1, keepdim=True), 7, TOKENS)
    assert not torch.equal(other, TOKENS)
    started(tmp_path / "zeros")
    started(tmp_path / "sevens", tokens=other)
    ours, theirs = statistics(tmp_path / "zeros"), statistics(tmp_path / "sevens")
    for name, scale in ours.items():
        assert torch.equal(scale, theirs[name])


def test_a_text_encoder_that_reads_padding_is_calibrated_on_it(tmp_path):
    model = tiny_clip(custom_text=True, text_cfg={"no_causal_mask": True, "pool_type": "last"})
    started(tmp_path, clip=clip_of(model))
    hidden = model.text.transformer.resblocks[0].ln_1(model.text.token_embedding(TOKENS) + model.text.positional_embedding)
    expected = hidden.flatten(0, 1).double().square().sum(dim=0).sqrt().float()
    torch.testing.assert_close(statistics(tmp_path)["resblocks.0.attn.q_proj"], expected)


def test_calibration_runs_in_evaluation_mode_and_restores_the_mode(tmp_path):
    model = tiny_clip(vision_cfg={"patch_dropout": 0.5})
    started(tmp_path / "eval", clip=clip_of(model))
    model = tiny_clip(vision_cfg={"patch_dropout": 0.5}).train()
    started(tmp_path / "train", clip=clip_of(model))
    assert model.visual.training
    ours, theirs = statistics(tmp_path / "eval", "image"), statistics(tmp_path / "train", "image")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@methods
def test_the_same_seed_gives_the_same_initial_parameters(method, tmp_path):
    starts = []
    for place, seed in enumerate((0, 0, 1)):
        _, components = started(tmp_path / str(place), small(method), seed=seed)
        state = (tensor for layer in adapter_layers(components).values() for tensor in state_of(layer))
        starts.append(torch.cat([tensor.detach().flatten() for tensor in state]))
    assert torch.equal(starts[0], starts[1])
    assert not (method_named(method).samples_start and torch.equal(starts[0], starts[2]))


# Scale


@pytest.mark.parametrize("method", ["nora", "lora"])
def test_scale_multiplies_every_weight_change(method, tmp_path):
    _, components = started(tmp_path, small(method))
    disturb(components)
    layer = next(iter(adapter_layers(components).values()))
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        full = layer(x) - layer.get_base_layer()(x)
        adapters.set_scale(components, 0.25)
        torch.testing.assert_close(layer(x) - layer.get_base_layer()(x), 0.25 * full, atol=1e-6, rtol=1e-5)


@methods
def test_scale_0_is_the_base_model_and_scale_1_the_trained_adapter(method, tmp_path):
    clip, components = started(tmp_path, small(method))
    disturb(components)
    trained, count = outputs(clip), len(trained_parameters(components))
    adapters.set_scale(components, 0.0)
    base = clip_of()
    separate(base.model)
    assert torch.equal(outputs(clip), outputs(base))
    adapters.set_scale(components, 1.0)
    assert torch.equal(outputs(clip), trained)
    assert (trained - outputs(base)).abs().max() > 1e-2
    assert len(trained_parameters(components)) == count


def test_invalid_scales_are_refused(tmp_path):
    _, components = started(tmp_path, small("dora"))
    with pytest.raises(InputError, match=r"weight change of this adapter cannot be scaled: .*got 0.5"):
        adapters.set_scale(components, 0.5)
    with pytest.raises(InputError, match=r"scale must be in \[0, 1\], got 1.5"):
        adapters.set_scale(components, 1.5)
    assert not adapters.allows_any_scale(components)


# Files


PLACES, ENCODERS = [".", "full", "compact"], ["image", "text", "both"]
# Every method in one case, the default one in all; only that has the compact layout.
SAVED = [(DEFAULT, *case) for case in product(PLACES, ENCODERS)]
SAVED += [(name, "full", "both") for name in full_precision_methods() if name != DEFAULT]


@pytest.mark.parametrize(("method", "place", "encoders"), SAVED)
def test_a_saved_adapter_gives_the_same_features(method, place, encoders, tmp_path):
    clip, components = started(tmp_path, small(method), TargetLayers(encoders=encoders))
    disturb(components)
    adapter_files.save(components, tmp_path / "adapter")
    fresh = clip_of()
    loaded = adapters.load(fresh, tmp_path if place == "." else tmp_path / "adapter" / place)
    assert set(loaded) == set(components)
    torch.testing.assert_close(outputs(fresh), outputs(clip), atol=1e-5 if place == "compact" else 1e-6, rtol=0)


# Another width for every method, since each has tensors of its own; fewer layers than the adapter has are the same for all.
OTHERS = [*((name, {"width": 40}) for name in full_precision_methods()), (DEFAULT, {"layers": 2}), ("lora", {"layers": 2})]


@pytest.mark.parametrize(("method", "change"), OTHERS)
def test_an_adapter_of_another_model_is_refused_by_its_folder(method, change, tmp_path):
    _, components = started(tmp_path, small(method))
    adapter_files.save(components, tmp_path / "adapter")
    with pytest.raises((InputError, AdapterFileError), match=r"full/image.* does not fit"):
        adapters.load(clip_of(tiny_clip(vision_cfg=change)), tmp_path)


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(InputError, match="no adapter of a CLIP model at"):
        adapters.load(clip_of(), tmp_path)


@pytest.mark.parametrize(("method", "layout"), [("nora", "full"), ("nora", "compact"), ("lora", "full"), ("dora", "full")])
def test_a_damaged_file_is_refused_or_gives_the_same_features(method, layout, tmp_path):
    options = small(method)
    _, components = started(tmp_path, options)
    disturb(components)
    adapter_files.save(components, tmp_path / "saved")
    clip = clip_of()
    adapters.load(clip, tmp_path / "saved" / layout)
    expected, refused = outputs(clip), 0
    for seed in range(12):
        random = Random(f"{method} {layout} {seed}")
        shutil.copytree(tmp_path / "saved" / layout, tmp_path / "damaged", dirs_exist_ok=True)
        mutation = mutate(random, tmp_path / "damaged" / random.choice(("image", "text")))
        clip = clip_of()
        try:
            adapters.load(clip, tmp_path / "damaged")
            assert torch.equal(outputs(clip), expected), (seed, mutation)
        except (AdapterFileError, InputError):
            refused += 1
    assert refused >= 6


def test_an_adapter_file_of_an_unknown_method_is_refused(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "adapter_config.json").write_text(json.dumps({"peft_type": "DREAMFUSION"}))
    write_tensors(tmp_path / "image" / "adapter_model.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(InputError, match="got 'dreamfusion'"):
        adapters.load(clip_of(), tmp_path)


# PEFT on packed attention, and why attention is separated


class Block(nn.Module):
    """One attention in a model, as PEFT expects it."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


@torch.no_grad()
def changed_by_output_factors(block, target, change):
    """The outputs of the block with LoRA, whose factors are zero but for `change` (16, 16) of the output projection."""
    model = get_peft_model(block, LoraConfig(r=16, lora_alpha=16, target_modules=[target]))
    for name, parameter in model.named_parameters():
        if "out_proj" in name and "lora_A" in name:
            parameter.copy_(torch.eye(16))
        elif "out_proj" in name and "lora_B" in name:
            parameter.copy_(change)
    return model(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2)))


def test_lora_on_separate_layers_adds_the_change_of_the_output_once_and_peft_on_packed_ones_does_not():
    def block():
        torch.manual_seed(0)
        return Block(nn.MultiheadAttention(16, 2, batch_first=True)).eval()

    change = torch.randn(16, 16)
    oracle = block()
    oracle.attn.out_proj.weight.data += change
    expected = oracle(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2)))
    apart = block()
    separate(apart)
    torch.testing.assert_close(changed_by_output_factors(apart, "attn.out_proj", change), expected)
    packed = changed_by_output_factors(block(), "attn", change)
    twice = block()
    twice.attn.out_proj.weight.data += 2 * change
    torch.testing.assert_close(packed, twice(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))))


def test_adapters_fit_the_attention_of_the_next_release(monkeypatch, tmp_path):
    model = tiny_clip()
    for block in (*model.transformer.resblocks, *model.visual.transformer.resblocks):
        old, block.attn = block.attn, NextAttention(block.attn.embed_dim, block.attn.num_heads)
        block.attn.load_state_dict(old.state_dict())
        block.attention = lambda q_x, k_x=None, v_x=None, attn_mask=None, block=block: block.attn(
            q_x, k_x=k_x, v_x=v_x, attn_mask=attn_mask
        )
    monkeypatch.setattr("open_clip.transformer.Attention", NextAttention)
    clip, components = started(tmp_path, clip=clip_of(model))
    reference, own = started(tmp_path / "other")
    disturb(components)
    disturb(own)
    torch.testing.assert_close(outputs(clip), outputs(reference), atol=1e-5, rtol=0)
