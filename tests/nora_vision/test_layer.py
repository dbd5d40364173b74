import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from small_models import MODELS, change_weights, config_for, output
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from nora_vision import NoraConfig, NoraLayer
from nora_vision.layer import nora_layers


def adapted(layer, **fields):
    """The NoRA layer around `layer`, with random factors by default."""
    model = inject_adapter_in_model(config_for(["0"], **fields), nn.Sequential(layer))
    return model[0]


def matrix(layer, A, inner_A, inner_B, B, scaling):
    """s B B' A' A as written in the paper, in the shape of the layer's weight."""
    product = scaling * B @ inner_B @ inner_A @ A
    base = layer.get_base_layer()
    return product.T if isinstance(base, Conv1D) else product.reshape(base.weight.shape)


@pytest.fixture(params=["linear", "conv1d", "conv2d", "strided"])
def layer_and_input(request):
    torch.manual_seed(0)
    return {
        "linear": lambda: (nn.Linear(20, 30), torch.randn(4, 7, 20)),
        "conv1d": lambda: (Conv1D(30, 20), torch.randn(4, 7, 20)),
        "conv2d": lambda: (nn.Conv2d(6, 10, 3, padding=1), torch.randn(4, 6, 8, 8)),
        "strided": lambda: (
            nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding=(1, 2), dilation=2, padding_mode="reflect"),
            torch.randn(4, 6, 9, 8),
        ),
    }[request.param]()


def with_weight(base, weight, x):
    """The base layer's output with another `weight`."""
    return torch.func.functional_call(base, {"weight": weight}, (x,))


def test_the_output_is_that_of_the_base_weight_plus_s_B_B1_A1_A(layer_and_input):
    base, x = layer_and_input
    layer = adapted(base, alpha=6.0)
    A, B = layer.nora_A["default"], layer.nora_B["default"]
    change = matrix(layer, A, layer.nora_inner_A["default"], layer.nora_inner_B["default"], B, scaling=6.0 / 4)
    torch.testing.assert_close(layer(x), with_weight(base, base.weight + change, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.get_delta_weight("default"), change.detach(), rtol=1e-4, atol=1e-5)


def test_with_preserve_output_the_frozen_start_is_subtracted(layer_and_input):
    base, x = layer_and_input
    layer = adapted(base, init_weights=True, preserve_output=True, inner_init="gaussian", inner_std=0.5)
    change_weights(layer)
    A, B = layer.nora_A["default"], layer.nora_B["default"]
    now = matrix(layer, A, layer.nora_inner_A["default"], layer.nora_inner_B["default"], B, scaling=1.0)
    start = matrix(layer, A, layer.nora_inner_A0["default"], layer.nora_inner_B0["default"], B, scaling=1.0)
    torch.testing.assert_close(layer(x), with_weight(base, base.weight + now - start, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.get_delta_weight("default"), (now - start).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preserve_output", [False, True])
def test_low_rank_factors_are_the_change_of_the_weight_with_the_scaling_folded_in(layer_and_input, preserve_output):
    layer = adapted(layer_and_input[0], preserve_output=preserve_output)
    up, down = layer.low_rank_factors("default")
    rank = 8 if preserve_output else 4
    assert up.shape == (layer.out_features, rank)
    assert down.shape == (rank, layer.in_features)
    assert up.dtype == down.dtype == torch.float32
    product = up @ down
    product = product.T if isinstance(layer.base_layer, Conv1D) else product.reshape(layer.base_layer.weight.shape)
    torch.testing.assert_close(layer.get_delta_weight("default"), product)


@pytest.mark.parametrize(
    ("fields", "gradients"),
    [
        ({"inner_init": "zero"}, (False, True)),
        ({"inner_init": "zero", "preserve_output": True}, (False, True)),
        ({"inner_init": "gaussian", "preserve_output": True}, (True, True)),
    ],
)
def test_step_zero_is_the_base_model_to_the_bit_and_trains(layer_and_input, fields, gradients):
    base, x = layer_and_input
    expected = base(x)
    layer = adapted(base, init_weights=True, **fields)
    actual = layer(x)
    assert torch.equal(actual, expected)
    assert not layer.get_delta_weight("default").any()
    actual.square().sum().backward()
    assert (bool(layer.nora_inner_A["default"].grad.any()), bool(layer.nora_inner_B["default"].grad.any())) == gradients


def test_a_gaussian_start_moves_the_base_model_and_trains_both_factors(layer_and_input):
    base, x = layer_and_input
    layer = adapted(base, init_weights=True, inner_init="gaussian")
    assert not torch.allclose(layer(x), base(x))
    layer(x).square().sum().backward()
    assert layer.nora_inner_A["default"].grad.any()
    assert layer.nora_inner_B["default"].grad.any()


def test_plain_svd_factors_approximate_the_weight(layer_and_input):
    layer = adapted(layer_and_input[0], init_weights=True)
    weight = layer.finite_weight_matrix("0")
    error = (weight - layer.nora_B["default"] @ layer.nora_A["default"]).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight)[8:].norm(), rtol=1e-4, atol=1e-5)


def test_only_two_r_inner_r_parameters_are_trained_in_a_layer(layer_and_input):
    layer = adapted(layer_and_input[0])
    layer.base_layer.requires_grad_(False)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * 8 * 4


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor created."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_forward_and_backward_never_form_a_matrix_of_the_weights_size():
    layer = adapted(nn.Linear(256, 192))
    layer.base_layer.requires_grad_(False)
    x = torch.randn(3, 256, requires_grad=True)
    with LargestTensor() as alone:
        layer._change_of_output(x, "default", torch.float32).sum().backward()
    assert alone.elements < 256 * 192 / 10


def saved_bytes(layer, x):
    """Bytes that `layer` after a LayerNorm saves for backward, without its parameters and buffers."""
    norm = nn.LayerNorm(x.shape[-1])
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    hidden = norm(x.requires_grad_())
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = layer(hidden)
    assert result.requires_grad
    return sum(size for _, size in saved.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_saves_at_most_an_eighth_of_what_lora_saves_for_backward(dropout):
    lora = LoraConfig(r=16, target_modules=["0"], lora_dropout=dropout)
    nora = config_for(["0"], r=64, inner_r=16, dropout=dropout)
    lora_layer, nora_layer = (
        inject_adapter_in_model(config, nn.Sequential(nn.Linear(1280, 1280)))[0].train() for config in (lora, nora)
    )
    x = torch.randn(1024, 1280)
    assert 8 * saved_bytes(nora_layer, x.clone()) <= saved_bytes(lora_layer, x.clone())


def test_a_layer_in_half_precision_saves_no_cast_copy_of_its_outer_factors():
    layer = adapted(nn.Linear(128, 128).bfloat16(), r=64, inner_r=4)
    # The copy of B in float32 would have 4 * 128 * 64 bytes.
    assert saved_bytes(layer.train(), torch.randn(64, 128).bfloat16()) < 4 * 128 * 64


def test_one_token_costs_only_products_with_vectors():
    layer = adapted(nn.Linear(48, 40), r=16, inner_r=8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, 48))
    assert counter.get_total_flops() == 2 * (48 * 40 + 48 * 16 + 16 * 8 + 8 * 16 + 16 * 40)


def test_outer_factors_beyond_the_range_of_the_weights_dtype_are_refused():
    layer = adapted(nn.Linear(20, 30).half())
    B, A = torch.ones(30, 8), torch.full((8, 20), 7e4)
    with pytest.raises(ValueError, match=r"must be at most 6.55e\+04 for torch.float16 weights, got 7e\+04. Use bfloat16"):
        layer.set_outer_factors("default", B, A)


def test_dropout_changes_training_but_not_evaluation():
    layer = adapted(nn.Linear(20, 30), dropout=0.5)
    x = torch.randn(4, 20)
    assert not torch.allclose(layer.train()(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    merged = nn.functional.linear(x, layer.base_layer.weight + layer.get_delta_weight("default"), layer.base_layer.bias)
    torch.testing.assert_close(layer(x), merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_trained_factors_are_float32_and_outer_factors_take_the_base_dtype(base_dtype):
    layer = adapted(nn.Linear(20, 30).to(base_dtype))
    assert layer.nora_A["default"].dtype == layer.nora_B["default"].dtype == base_dtype
    assert layer.nora_inner_A["default"].dtype == layer.nora_inner_B["default"].dtype == torch.float32
    x = torch.randn(4, 20).to(base_dtype)
    assert layer(x).dtype == base_dtype
    reference = x.double() @ (layer.base_layer.weight.double() + layer.get_delta_weight("default").double()).T
    reference += layer.base_layer.bias.double()
    torch.testing.assert_close(layer(x).double(), reference, rtol=0.02, atol=0.05)


def test_autocast_runs_the_products_in_half_precision_and_keeps_float32_gradients():
    layer = adapted(nn.Linear(20, 30))
    x = torch.randn(4, 20)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), layer(x), rtol=0.05, atol=0.1)
    result.float().sum().backward()
    assert layer.nora_inner_A["default"].grad.dtype == torch.float32


def test_set_scale_and_scale_layer_multiply_the_change():
    layer = adapted(nn.Linear(20, 30))
    change = layer.get_delta_weight("default")
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * change)
    layer.scale_layer(3.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 1.5 * change)
    layer.unscale_layer(3.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * change)
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), change)
    layer.set_scale("absent", 2.0)
    assert "absent" not in layer.scaling


def test_unmerge_subtracts_the_merged_change_even_if_the_scale_has_changed():
    layer = adapted(nn.Linear(20, 30))
    before = layer.base_layer.weight.clone()
    layer.merge()
    layer.set_scale("default", 0.1)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, before)


def test_missing_outer_factors_are_an_error_and_not_a_silent_zero():
    layer = adapted(nn.Linear(20, 30), init_weights=True, outer_init="awsvd")
    for use in (lambda: layer(torch.randn(4, 20)), lambda: layer.get_delta_weight("default"), layer.merge):
        with pytest.raises(ValueError, match=r"outer factors of NoRA adapter 'default' are not set. Call initialize_nora"):
            use()
    layer.load_state_dict(adapted(nn.Linear(20, 30)).state_dict())
    assert layer.get_delta_weight("default").any()


@pytest.mark.parametrize("kind", MODELS)
def test_every_targeted_layer_of_a_model_is_replaced_and_no_other(kind):
    model, inputs, targets = MODELS[kind]()
    names = {n for n, m in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets)}
    before = output(model, inputs)
    inject_adapter_in_model(config_for(targets), model)
    assert nora_layers(model).keys() == names
    assert all(isinstance(layer, NoraLayer) for layer in nora_layers(model).values())
    assert not torch.allclose(output(model, inputs), before)


def test_all_linear_and_regular_expressions_are_understood():
    model, _, _ = MODELS["text_encoder"]()
    inject_adapter_in_model(config_for("all-linear"), model)
    assert len(nora_layers(model)) == 12
    model, _, _ = MODELS["text_encoder"]()
    inject_adapter_in_model(config_for(r".*layers\.1\..*(q|v)_proj", exclude_modules=["v_proj"]), model)
    assert [name.rsplit(".", 1)[1] for name in nora_layers(model)] == ["q_proj"]


def test_the_default_targets_of_known_transformers_are_used():
    model, _, _ = MODELS["conv1d"]()
    inject_adapter_in_model(config_for(None), model)
    assert {name.rsplit(".", 1)[1] for name in nora_layers(model)} == {"c_attn"}


def test_patterns_set_the_ranks_of_layers():
    model, inputs, targets = MODELS["linear"]()
    config = NoraConfig(r=8, inner_r=4, alpha=4.0, target_modules=targets, init_weights=False,
                        rank_pattern={"second": 6}, inner_rank_pattern={"second": 2})  # fmt: skip
    inject_adapter_in_model(config, model)
    assert model.first.nora_inner_A["default"].shape == (4, 8)
    assert model.second.nora_inner_A["default"].shape == (2, 6)
    assert model.second.nora_A["default"].shape == (6, 30)
    assert model.first.scaling["default"] == 1.0
    assert model.second.scaling["default"] == 2.0
    assert output(model, inputs).isfinite().all()
