"""Fixtures for the tests of LoRA files: a tiny model onto which they are loaded."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipeline import tiny_pipeline

from nora_vision.components import adapters_by_component
from pipelines.subject.adapters import load_adapter


@pytest.fixture(scope="module")
def model():
    """A tiny model, onto which every test loads adapters and deletes them again."""
    torch.manual_seed(0)
    return tiny_pipeline()


@pytest.fixture
def loaded(model, tmp_path):
    """A function that loads tensors from a file; the adapter is deleted afterwards."""
    torch.manual_seed(0)

    def load(tensors, metadata=None, name="some.safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name, metadata)
        return load_adapter(model, tmp_path / name, "x")

    yield load
    if any("x" in names for names in adapters_by_component(model).values()):
        model.delete_adapters(["x"])
