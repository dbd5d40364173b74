"""NoRA in training: compilation, gradient checkpointing, copies, and an optimizer."""

import copy

import pytest
import torch
from peft import get_peft_model
from small_models import MODELS, config_for, mlp, output, text_encoder
from tiny_pipeline import tiny_unet
from torch.utils.checkpoint import checkpoint

from nora_vision.layer import nora_layers


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_a_compiled_model_gives_the_same_output_and_gradients(kind):
    model, inputs, targets = MODELS[kind]()
    model = get_peft_model(model, config_for(targets, preserve_output=True))
    expected = output(model, inputs)
    expected.square().sum().backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    result = output(compiled, inputs)
    result.square().sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients(model), expected_gradients, rtol=1e-3, atol=1e-3)


def test_a_layer_compiles_without_a_graph_break():
    model, inputs, targets = mlp()
    model = get_peft_model(model, config_for(targets, dropout=0.1)).train()
    layer = model.base_model.model.first
    torch._dynamo.reset()
    assert torch._dynamo.explain(layer)(inputs[0]).graph_break_count == 0


def test_reentrant_and_other_checkpointing_give_the_same_gradients():
    model, inputs, targets = mlp()
    model = get_peft_model(model, config_for(targets))
    x = inputs[0].requires_grad_()
    model(x).square().sum().backward()
    expected = gradients(model)
    for use_reentrant in (False, True):
        model.zero_grad()
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        torch.testing.assert_close(gradients(model), expected)


def test_gradient_checkpointing_of_transformers_and_diffusers_gives_the_same_gradients():
    encoder, inputs, targets = text_encoder()
    unet = tiny_unet().eval()
    conditions = {"text_embeds": torch.randn(2, 24), "time_ids": torch.randn(2, 6)}
    unet_inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 5]), torch.randn(2, 7, 40))
    encoder.add_adapter(config_for(targets))
    unet.add_adapter(config_for(["to_q", "to_v"]))

    def run(model):
        model.zero_grad()
        if model is encoder:
            output(model.train(), inputs).square().sum().backward()
        else:
            model.train()(*unet_inputs, added_cond_kwargs=conditions).sample.square().sum().backward()
        return gradients(model)

    for model in (encoder, unet):
        expected = run(model)
        assert expected
        (model.gradient_checkpointing_enable if model is encoder else model.enable_gradient_checkpointing)()
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def test_training_fits_a_target_that_the_adapter_can_represent():
    teacher, inputs, targets = mlp()
    teacher = get_peft_model(teacher, config_for(targets))
    with torch.no_grad():
        target = output(teacher, inputs)
    student, _, _ = mlp()
    student = get_peft_model(student, config_for(targets, init_weights=True))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(150):
        loss = (output(student, inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_a_deep_copy_shares_nothing_with_the_original():
    model, inputs, targets = mlp()
    model = get_peft_model(model, config_for(targets))
    twin = copy.deepcopy(model)
    expected = output(model, inputs)
    for layer in nora_layers(twin).values():
        layer.nora_A["default"].zero_()
        layer.nora_inner_A["default"].data.zero_()
        layer.set_scale("default", 3.0)
    assert torch.equal(output(model, inputs), expected)


def test_layers_share_no_state():
    model, _, targets = text_encoder()
    model = get_peft_model(model, config_for(targets))
    tensors = [t for layer in nora_layers(model).values() for n, t in layer.state_dict().items() if "nora_" in n]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
