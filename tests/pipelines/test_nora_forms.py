"""NoRA's forms through the options of the recipes: what is saved and exported makes the same images."""

from typing import get_args

import pytest
import torch
from tiny_pipeline import image, tiny_pipeline

from nora_vision.config import OuterDtype
from nora_vision.inner import InnerFormName, InnerInit
from nora_vision.outer import OuterScaling
from nora_vision.weighting import NOT_DIAGONAL, WEIGHTINGS
from pipelines import inner_forms
from pipelines.adapter_method import trained_parameters
from pipelines.adapter_options import AdapterOptions
from pipelines.subject import adapters

FORMS = [
    {"inner_form": "parallel", "outer_scaling": "split", "preserve_output": True, "inner_init": "singular_values"},
    {"inner_form": "block_diagonal", "inner_blocks": 2, "inner_init": "orthogonal"},
    {"inner_form": "sparse_low_rank", "sparse_entries": 7, "outer_scaling": "mean", "inner_init": "uniform"},
]


def trained(**options):
    """A pipeline with a started and changed adapter on the UNet, and its components."""
    pipe = tiny_pipeline()
    chosen = AdapterOptions(method="nora", rank=6, inner_r=2, **options)
    components = adapters.attach(pipe, chosen)
    return pipe, components, chosen


def start(pipe, components, options, folder):
    adapters.start(options, components, {"unet": lambda: image(pipe)}, folder / "cache", seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(components):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def loaded(path):
    pipe = tiny_pipeline()
    adapters.load_adapter(pipe, path, "loaded")
    pipe.set_adapters("loaded")
    return image(pipe)


def test_the_choices_are_those_of_the_library():
    assert get_args(InnerFormName) == inner_forms.INNER_FORMS
    assert get_args(InnerInit) == inner_forms.INNER_INITS
    assert get_args(OuterScaling) == inner_forms.OUTER_SCALINGS
    assert get_args(OuterDtype) == inner_forms.OUTER_DTYPES
    assert (*WEIGHTINGS, *NOT_DIAGONAL) == (*inner_forms.WEIGHTINGS, *inner_forms.NOT_DIAGONAL)


@pytest.mark.parametrize("options", FORMS, ids=lambda options: options["inner_form"])
def test_every_file_of_a_form_makes_the_same_image(options, tmp_path):
    pipe, components, chosen = trained(**options)
    start(pipe, components, chosen, tmp_path)
    adapters.save_everywhere(pipe, components, tmp_path, "subject")
    expected = image(pipe)
    assert (expected - image(tiny_pipeline())).abs().max() > 1 / 255
    for file in ("adapter/full", "adapter/compact", "diffusers/pytorch_lora_weights.safetensors", "kohya/subject.safetensors"):
        torch.testing.assert_close(loaded(tmp_path / file), expected, atol=1 / 255, rtol=0)


def test_a_mixture_of_subspaces_is_saved_natively_and_the_log_says_why_it_is_not_exported(tmp_path, caplog):
    pipe, components, chosen = trained(num_subspaces=3)
    start(pipe, components, chosen, tmp_path)
    adapters.save_everywhere(pipe, components, tmp_path, "subject")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "cache"]
    assert "This adapter is a mixture of subspaces" in caplog.text
    assert "no files for other programs" in caplog.text
    expected = image(pipe)
    for layout in ("full", "compact"):
        torch.testing.assert_close(loaded(tmp_path / "adapter" / layout), expected, atol=1 / 255, rtol=0)
    with pytest.raises(ValueError, match="is a mixture of subspaces"):
        pipe.fuse_lora()
