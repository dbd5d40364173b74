"""DoRA against its equation, and the base weight under it."""

import pytest
import torch
from tiny_pipeline import image, tiny_pipeline
from torch import nn

from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, Probe, adapters_off, trained_parameters
from pipelines.adapter_options import AdapterOptions
from pipelines.methods.dora import Dora
from pipelines.methods.lora import LoraOptions
from pipelines.subject import adapters
from pipelines.subject.generate import load_adapters

OUT, IN, RANK, ALPHA = 6, 5, 2, 3.0


def started(seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"layer": nn.Linear(IN, OUT)})
    method = Dora(LoraOptions(rank=RANK, alpha=ALPHA))
    method.add(model, ["layer"], torch.Generator().manual_seed(seed))
    method.start(model, Probe(None, None, torch.Generator().manual_seed(seed), None), ADAPTER_NAME)
    return model


def disturb(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters({"model": model}):
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def adapted_weight(layer):
    """m (W + s B A) / ||W + s B A||, with the norm of each row."""
    A, B = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    weight = layer.get_base_layer().weight + ALPHA / RANK * B @ A
    return layer.lora_magnitude_vector[ADAPTER_NAME].weight[:, None] * weight / weight.norm(dim=1, keepdim=True)


def test_the_output_is_that_of_the_equation():
    model = started()
    disturb(model)
    layer, x = model["layer"], torch.randn(4, IN)
    expected = x @ adapted_weight(layer).T + layer.get_base_layer().bias
    torch.testing.assert_close(layer(x), expected)


def test_the_base_weight_stays_and_is_what_remains_without_the_adapter():
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT)
    model = started()
    disturb(model)
    layer, x = model["layer"], torch.randn(4, IN)
    layer(x).square().mean().backward()
    assert torch.equal(layer.get_base_layer().weight, base.weight)
    assert layer.get_base_layer().weight.grad is None
    with adapters_off([model]):
        assert torch.equal(layer(x), base(x))


def test_the_change_depends_on_the_base_weight_so_that_fusing_another_adapter_changes_it():
    model = started()
    disturb(model)
    layer, x = model["layer"], torch.randn(4, IN)
    with torch.no_grad():
        before = adapted_weight(layer) - layer.get_base_layer().weight
        layer.get_base_layer().weight.add_(torch.randn(OUT, IN))
        change = adapted_weight(layer) - layer.get_base_layer().weight
        assert (change - before).norm() > 0.1 * before.norm()
        torch.testing.assert_close(layer(x), x @ adapted_weight(layer).T + layer.get_base_layer().bias)


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_scale_that_the_row_norms_do_not_have_is_said(method, scale, tmp_path, caplog):
    trained, fresh = tiny_pipeline(), tiny_pipeline()
    components = adapters.attach(trained, AdapterOptions(method, rank=RANK))
    disturb(components["unet"])
    adapter_files.save(components, tmp_path)
    base = image(fresh)
    load_adapters(fresh, [str(tmp_path / "full")], [scale])
    said = "has trained norms of rows, which have no scale" in caplog.text
    assert said == (method == "dora" and scale != 1)
    if scale == 0:
        assert torch.allclose(image(fresh), base, atol=1e-4) != said
