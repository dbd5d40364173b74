"""What the tests of LoRA files share: a tiny model on which they load and delete."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipeline import tiny_pipeline

from nora_vision.components import adapters_by_component
from pipelines.subject.adapters import load_adapter


@pytest.fixture(scope="module")
def model():
    """The tiny model, on which every test loads and deletes."""
    torch.manual_seed(0)
    return tiny_pipeline()


@pytest.fixture
def loaded(model, tmp_path):
    """Loads tensors as a file, and leaves the model as it was."""
    torch.manual_seed(0)

    def load(tensors, metadata=None, name="some.safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name, metadata)
        return load_adapter(model, tmp_path / name, "x")

    yield load
    if any("x" in names for names in adapters_by_component(model).values()):
        model.delete_adapters(["x"])
