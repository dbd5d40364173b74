"""DyLoRA: one rank for all layers in each step, and the smaller adapters that are cut from a trained one."""

import pytest
import torch
from tiny_pipeline import image, tiny_pipeline
from torch import nn

from nora_vision.factors import low_rank_factors
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, Probe, no_losses, trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.methods.dylora import main
from pipelines.native_files import read_native
from pipelines.subject import adapters

RANK = 4


class Layers(nn.Module):
    """A linear layer and a convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv = nn.Linear(6, 5, bias=False), nn.Conv2d(3, 4, 3, bias=False)
        self.requires_grad_(False)


def adapted(model, method="dylora", targets=("linear", "conv"), **changes):
    chosen = AdapterOptions(method, rank=RANK, **changes).create()
    chosen.add(model, list(targets), torch.Generator().manual_seed(0))
    chosen.start(model, Probe(lambda: None, no_losses, torch.Generator().manual_seed(1), None), ADAPTER_NAME)
    return chosen


def disturb(model):
    with torch.no_grad():
        for index, parameter in enumerate(trained_parameters({"": model})):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))


def ranks(steps, seed=0):
    """The rank of each step, by the number of rows of A that get a gradient."""
    model = Layers()
    training = adapted(model, targets=["linear"]).training([model], steps)
    disturb(model)
    (layer,) = tuner_layers(model).values()
    found = []
    for step in range(1, steps + 1):
        training.before_step(step, torch.Generator().manual_seed(1000 * seed + step))
        (gradient,) = torch.autograd.grad(layer(torch.randn(7, 6)).square().sum(), layer.lora_A[ADAPTER_NAME].weight)
        training.after_backward(step)
        found.append(int(gradient.abs().sum(dim=1).count_nonzero()))
        assert gradient[found[-1] :].count_nonzero() == 0
    return found


def test_a_step_trains_the_first_b_rows_and_columns_with_b_uniform_and_chosen_by_seed_and_step():
    found = ranks(60)
    assert set(found) == {1, 2, 3, 4}
    assert min(found.count(rank) for rank in range(1, 5)) > 5
    assert found == ranks(60)
    assert found != ranks(60, seed=1)


def test_within_a_step_all_layers_compute_alpha_over_b_times_the_product_of_the_first_b_components_and_all_after_it():
    model = Layers()
    training = adapted(model, alpha=3.0).training([model], 10)
    disturb(model)
    inputs = {"linear": torch.randn(7, 6), "conv": torch.randn(2, 3, 5, 5)}
    full = {name: getattr(model, name)(x) for name, x in inputs.items()}
    training.before_step(1, torch.Generator().manual_seed(1))
    kept = int(torch.randint(1, RANK + 1, (), generator=torch.Generator().manual_seed(1)))
    assert kept < RANK
    for name, x in inputs.items():
        layer = getattr(model, name)
        A, B = (part[ADAPTER_NAME].weight for part in (layer.lora_A, layer.lora_B))
        change = 3.0 / kept * B.flatten(1)[:, :kept] @ A.flatten(1)[:kept]
        base = layer.get_base_layer()
        weight = base.weight + change.view_as(base.weight)
        expected = nn.functional.linear(x, weight) if name == "linear" else nn.functional.conv2d(x, weight)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    training.after_backward(1)
    for name, x in inputs.items():
        assert torch.equal(getattr(model, name)(x), full[name])


def test_an_adapter_cut_to_rank_b_is_the_sum_of_the_first_b_components(tmp_path):
    model = Layers()
    adapted(model, alpha=3.0)
    disturb(model)
    adapter_files.save({"image": model}, tmp_path / "run" / "adapter")
    for rank in range(1, RANK + 1):
        main([str(tmp_path / "run"), "--rank", str(rank), "--output_dir", str(tmp_path / f"rank{rank}")])
        smaller = Layers()
        adapter_files.load({"image": smaller}, tmp_path / f"rank{rank}" / "adapter" / "full")
        for name, layer in tuner_layers(model).items():
            A, B = (part[ADAPTER_NAME].weight.flatten(1) for part in (layer.lora_A, layer.lora_B))
            factors = low_rank_factors(getattr(smaller, name), ADAPTER_NAME)
            assert factors.down.shape[0] == rank
            torch.testing.assert_close(factors.up @ factors.down, 3.0 / rank * B[:, :rank] @ A[:rank])
    assert read_native(tmp_path / "rank2" / "adapter" / "full" / "image").config.r == 2


def test_a_cut_run_generates_the_images_of_the_first_components(tmp_path):
    pipe = tiny_pipeline()
    components = adapters.attach(pipe, AdapterOptions("dylora", rank=RANK))
    disturb(components["unet"])
    adapter_files.save(components, tmp_path / "adapter")
    main([str(tmp_path), "--rank", "2", "--output_dir", str(tmp_path / "cut")])
    for layer in tuner_layers(pipe.unet).values():
        with torch.no_grad():
            layer.lora_B[ADAPTER_NAME].weight[:, 2:] = 0
            layer.lora_B[ADAPTER_NAME].weight *= RANK / 2
    fresh = tiny_pipeline()
    adapters.load_adapter(fresh, tmp_path / "cut", "cut")
    torch.testing.assert_close(image(fresh), image(pipe), atol=1 / 255, rtol=0)


def losses_of_every_rank(method):
    """Fit a matrix of rank 4 from 8 inputs; the loss of the first b components for each b."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(8, 8, bias=False).requires_grad_(False)})
    target = model["linear"].weight + torch.randn(8, RANK) @ torch.randn(RANK, 8)
    chosen = adapted(model, method, targets=["linear"], **({"alpha": 4.0} if method == "dylora" else {}))
    training = chosen.training([model], 400)
    optimizer = torch.optim.Adam(trained_parameters({"": model}), lr=0.02)
    for step in range(1, 401):
        training.before_step(step, torch.Generator().manual_seed(step))
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        (model["linear"](x) - x @ target.T).square().mean().backward()
        training.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
    layer = model["linear"]
    A, B = (part[ADAPTER_NAME].weight.detach() for part in (layer.lora_A, layer.lora_B))
    difference = target - layer.get_base_layer().weight
    scale = (lambda rank: 4.0 / rank) if method == "dylora" else (lambda rank: 1.0)
    return [float((difference - scale(b) * B[:, :b] @ A[:b]).norm() / difference.norm()) for b in range(1, RANK + 1)]


def test_ranks_cut_from_dylora_fit_better_than_those_cut_from_lora():
    dylora, lora = losses_of_every_rank("dylora"), losses_of_every_rank("lora")
    assert all(ours < 0.9 * theirs for ours, theirs in zip(dylora[:-1], lora[:-1], strict=True))
    assert all(dylora[b] > dylora[b + 1] for b in range(RANK - 1))


def test_only_ranks_of_adapters_of_dylora_are_cut(tmp_path):
    model = Layers()
    adapted(model)
    adapter_files.save({"image": model}, tmp_path)
    for rank in (0, RANK + 1):
        with pytest.raises(InputError, match=rf"rank must be in \[1, r=4\], the rank of the adapter, got {rank}"):
            main([str(tmp_path / "full"), "--rank", str(rank), "--output_dir", str(tmp_path / "out")])
    other = Layers()
    adapted(other, "lora")
    adapter_files.save({"image": other}, tmp_path / "other")
    with pytest.raises(InputError, match="is no adapter of DyLoRA: other methods do not train all smaller ranks"):
        main([str(tmp_path / "other" / "full"), "--rank", "1", "--output_dir", str(tmp_path / "out")])
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(InputError, match=r"--output_dir .*run' already has an adapter, which would be overwritten"):
        main([str(tmp_path / "full"), "--rank", "1", "--output_dir", str(tmp_path / "run")])
    with pytest.raises(InputError, match="There is no native adapter in"):
        main([str(tmp_path / "empty"), "--rank", "1", "--output_dir", str(tmp_path / "out")])
