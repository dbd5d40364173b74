"""TinyLoRA, Uni-LoRA and VB-LoRA: their equations, values shared by all layers, and what is generated from a seed."""

import numpy as np
import pytest
import torch
from peft.tuners.unilora import UniLoraModel
from safetensors.torch import load_file
from torch import nn

from nora_vision import AdapterFileError
from nora_vision.factors import low_rank_factors
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, Probe, no_losses, trained_parameters
from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.methods import method_named
from pipelines.optimizers import Rates, parameter_groups

NAMES = ("tinylora", "unilora", "vblora")
SIZES = {"wide": (16, 24), "tall": (40, 8), "square": (8, 8)}


class Layers(nn.Module):
    """Three layers whose outputs are added up."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        for name, (m, n) in SIZES.items():
            setattr(self, name, nn.Linear(n, m, dtype=dtype))
        self.requires_grad_(False)

    def forward(self, x):
        return sum(getattr(self, name)(x[..., :n]).sum() for name, (_, n) in SIZES.items())


def adapted(name, model=None, seed=0, **changes):
    """A model with the adapter, whose trained values are random, and the layers."""
    model = Layers() if model is None else model
    method = AdapterOptions(name, **{"rank": 4, **changes}).create()
    method.add(model, list(SIZES), torch.Generator().manual_seed(seed))
    method.start(model, None, ADAPTER_NAME)
    disturb(model)
    return model, method_named(name).layers_of(model)


def disturb(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters({"": model}):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def changes_of(layers):
    """The weight change of each layer by its output for the unit vectors, with the bias taken out."""
    unit = {name: torch.eye(layer.in_features) for name, layer in layers.items()}
    return {name: (layer(unit[name]) - layer.get_base_layer()(unit[name])).T.detach() for name, layer in layers.items()}


def assert_factors(layers, expected):
    for name, change in changes_of(layers).items():
        torch.testing.assert_close(change, expected[name], atol=1e-4, rtol=1e-4)
        factors = low_rank_factors(layers[name], ADAPTER_NAME)
        torch.testing.assert_close(factors.up @ factors.down, expected[name], atol=1e-4, rtol=1e-4)
        assert factors.relative_error == 0.0


def test_tinylora_adds_the_singular_directions_times_a_random_combination():
    model, layers = adapted("tinylora", rank=2, u=5)
    expected = {}
    for index, (name, layer) in enumerate(layers.items()):
        U, S, Vh = torch.linalg.svd(getattr(model, name).base_layer.weight)
        v, P = layer.tinylora_v[ADAPTER_NAME][str(index)], layer.tinylora_P[ADAPTER_NAME]
        root = S[:2].sqrt().diag()
        expected[name] = U[:, :2] @ root @ sum(v[i] * P[i] for i in range(5)).detach() @ root @ Vh[:2]
    assert_factors(layers, expected)


def test_unilora_spreads_one_vector_over_all_factors_by_an_isometry():
    _, layers = adapted("unilora", theta_d_length=37)
    theta = next(iter(layers.values())).unilora_theta_d[ADAPTER_NAME].detach()
    every = [part[ADAPTER_NAME] for layer in layers.values() for part in (layer.unilora_indices_A, layer.unilora_indices_B)]
    counts = np.bincount(torch.cat([part.flatten() for part in every]).numpy(), minlength=37)
    assert counts.min() > 0
    scaled = theta / torch.from_numpy(counts).float().sqrt()
    expected, entries = {}, []
    for name, layer in layers.items():
        A, B = scaled[layer.unilora_indices_A[ADAPTER_NAME]], scaled[layer.unilora_indices_B[ADAPTER_NAME]]
        expected[name] = B @ A
        entries += [A.flatten(), B.flatten()]
    torch.testing.assert_close(torch.cat(entries).norm(), theta.norm())
    assert_factors(layers, expected)


def test_vblora_mixes_the_k_most_likely_vectors_of_the_bank_in_each_part_of_a_factor():
    _, layers = adapted("vblora", num_vectors=6, topk=3)
    bank = next(iter(layers.values())).vblora_vector_bank[ADAPTER_NAME].detach()
    assert bank.shape == (6, 8)

    def mixed(logits):
        kept = logits >= logits.sort(descending=True).values[2]
        return torch.where(kept, logits, -torch.inf).softmax(0) @ bank

    expected = {}
    for name, layer in layers.items():
        A = [torch.cat([mixed(part) for part in row]) for row in layer.vblora_logits_A[ADAPTER_NAME].detach()]
        logits_B = layer.vblora_logits_B[ADAPTER_NAME].detach()
        B = [torch.cat([mixed(part) for part in logits_B[:, column]]) for column in range(4)]
        expected[name] = torch.stack(B, dim=1) @ torch.stack(A)
    assert_factors(layers, expected)


SHARED = {"tinylora": {"weight_tying": 1.0, "u": 7}, "unilora": {"theta_d_length": 37}, "vblora": {"num_vectors": 6}}
VALUES = {"tinylora": 7, "unilora": 37, "vblora": 6 * 8}


def shared_by(name, layers):
    layer = next(iter(layers.values()))
    values = getattr(layer, method_named(name).shared[0])[ADAPTER_NAME]
    return values["0"] if name == "tinylora" else values


@pytest.mark.parametrize("name", NAMES)
def test_what_all_layers_share_is_trained_once_with_the_sum_of_their_gradients(name):
    model, layers = adapted(name, **SHARED[name])
    shared = shared_by(name, layers)
    assert shared.numel() == VALUES[name]
    trained = [parameter for group in parameter_groups(model, Rates(1.0)) for parameter in group["params"]]
    assert sum(parameter is shared for parameter in trained) == 1
    assert len({id(parameter) for parameter in trained}) == len(trained)
    x = torch.randn(5, 24)
    (together,) = torch.autograd.grad(model(x), shared)
    apart = [torch.autograd.grad(getattr(model, key)(x[..., :n]).sum(), shared)[0] for key, (_, n) in SIZES.items()]
    assert all(gradient.any() for gradient in apart)
    torch.testing.assert_close(together, sum(apart))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_a_half_precision_model_holds_what_is_shared_once_and_loads_onto_one_of_single_precision(name, tmp_path):
    half, layers = adapted(name, Layers(torch.bfloat16), **SHARED[name])
    adapter_files.save({"image": half}, tmp_path)
    tensors = load_file(tmp_path / "full" / "image" / "adapter_model.safetensors")
    (key,) = (key for key in tensors if method_named(name).shared[0] in key)
    assert torch.equal(tensors[key], shared_by(name, layers))
    fresh = Layers()
    adapter_files.load({"image": fresh}, tmp_path / "full", "loaded")
    for layer_name, layer in layers.items():
        factors = low_rank_factors(layer, ADAPTER_NAME)
        change = getattr(fresh, layer_name).get_delta_weight("loaded")
        torch.testing.assert_close(change, factors.up @ factors.down, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vera", "randlora"])
def test_random_matrices_are_the_same_on_weights_of_every_precision(name, trained, tmp_path):
    """PEFT rounds them to the precision of the weights, so that a file would load in that precision at most."""
    model, method = Layers(trained), AdapterOptions(name, rank=4).create()
    method.add(model, list(SIZES), torch.Generator().manual_seed(0))
    method.start(model, Probe(lambda: None, no_losses, torch.Generator().manual_seed(1), tmp_path), ADAPTER_NAME)
    disturb(model)
    adapter_files.save({"image": model}, tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fresh = Layers(dtype)
        adapter_files.load({"image": fresh}, tmp_path / "full", "loaded")
        for layer_name in SIZES:
            expected = getattr(model, layer_name).get_delta_weight(ADAPTER_NAME).detach()
            difference = getattr(fresh, layer_name).get_delta_weight("loaded").float() - expected
            # What is trained is rounded when it is loaded.
            assert difference.norm() <= 2 * torch.finfo(dtype).eps * expected.norm()
            assert expected.norm() > 0.1


def test_other_random_indices_than_in_training_are_refused(tmp_path, monkeypatch):
    model, _ = adapted("unilora")
    adapter_files.save({"image": model}, tmp_path)
    monkeypatch.setattr(UniLoraModel, "generate_index", staticmethod(lambda count, length, seed: torch.arange(count) % length))
    with pytest.raises(AdapterFileError, match=r"the key \d+ gives other shared random matrices.*file exported for diffusers"):
        adapter_files.load({"image": Layers()}, tmp_path / "full", "loaded")


def test_a_model_with_layers_of_other_sizes_is_refused_although_the_file_names_none(tmp_path):
    model, _ = adapted("unilora")
    adapter_files.save({"image": model}, tmp_path)
    other = Layers()
    other.square = nn.Linear(8, 16)
    with pytest.raises(InputError, match=r"does not fit this model: the adapted layers were 6 matrices of 416 entries"):
        adapter_files.load({"image": other}, tmp_path / "full", "loaded")


@pytest.mark.parametrize("name", ["tinylora", "unilora"])
def test_the_seed_chooses_what_is_generated(name):
    first, second, other = (entries_of_changes(name, seed) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


def entries_of_changes(name, seed):
    _, layers = adapted(name, seed=seed)
    changes = changes_of(layers)
    return torch.cat([change.flatten() for change in changes.values()])


def test_the_vectors_of_a_bank_are_as_long_as_the_sizes_of_the_layers_allow():
    for targets, length in ((["wide"], 8), (["tall"], 8), (["square"], 8)):
        model = Layers()
        AdapterOptions("vblora", rank=2).create().add(model, targets, torch.Generator())
        assert model.peft_config[ADAPTER_NAME].vector_length == length
    model = nn.ModuleDict({"big": nn.Linear(1280, 640)})
    AdapterOptions("vblora", rank=2).create().add(model, ["big"], torch.Generator())
    assert model.peft_config[ADAPTER_NAME].vector_length == 160
    with pytest.raises(ValueError, match=r"cannot adapt 'wide': vector_length must divide its sizes, 16 and 24, got 16"):
        AdapterOptions("vblora", rank=2, vector_length=16).create().add(Layers(), ["wide"], torch.Generator())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tinylora", {"weight_tying": 1.5}, r"weight_tying must be in \[0, 1\], got 1.5"),
        ("tinylora", {"u": 0}, "u must be at least 1, got 0"),
        ("unilora", {"theta_d_length": 0}, "theta_d_length must be at least 1, got 0"),
        ("unilora", {"init_theta_d_bound": 0.0}, "init_theta_d_bound must be above 0, got 0"),
        ("vblora", {"topk": 9, "num_vectors": 8}, "topk must be at most num_vectors=8, got 9"),
        ("vblora", {"num_vectors": 0}, "num_vectors must be at least 1, got 0"),
        *((name, {"dropout": 1.5}, r"dropout must be in .*got 1.5") for name in NAMES),
    ],
)
def test_wrong_options_are_refused(name, changes, message):
    with pytest.raises(InputError, match=message):
        AdapterOptions(name, **changes)
