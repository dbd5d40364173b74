"""What tests of several packages share: a tiny SDXL model on disk, and a folder of images."""

import gc
import os
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import PartialState
from hub_server import HubServer, point_clients_at
from PIL import Image
from safetensors.torch import save_file
from tiny_pipeline import tiny_pipeline

from pipelines import mini_clip
from pipelines.mini_sdxl import PROMPT_WORDS, reduced_tokenizer

SIZES = ((40, 30), (30, 40), (33, 33))
# Test processes share the cores out, with all that they start: threads that are more than the cores wait for each other. The
# process that starts them sets nothing, which they would inherit.
if WORKERS := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(WORKERS))))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    """The slowest modules first: begun last, they would leave all processes but their own with nothing to do.

    The tests of a module stay together, so that each process starts a module's server once.
    """
    seconds = Counter()
    for item in items:
        seconds[item.path] += seconds_of(item)
    items.sort(key=lambda item: seconds[item.path], reverse=True)


def seconds_of(item):
    """What a slow test says that it takes."""
    slow = item.get_closest_marker("slow")
    return slow.args[0] if slow and slow.args else 0


def pytest_collection_finish():
    """Have garbage collections pass over what was imported: accelerate asks for one after every training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def accelerate_state():
    """Every test starts as a recipe does: with accelerate's state, which its loggers need, whatever ran before it."""
    PartialState()


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """A stand-in for the hub that all clients in this process ask, without any model yet; the cache is empty."""
    hub = HubServer()
    point_clients_at(hub, tmp_path / "cache", monkeypatch)
    yield hub
    hub.stop()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a random SDXL model whose images are 16 x 16."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_clip(tmp_path_factory):
    """The folder of a CLIP as large as the built-in one, with random weights."""
    folder = tmp_path_factory.mktemp("models") / "random-clip"
    mini_clip.write_configuration(folder, reduced_tokenizer([PROMPT_WORDS]))
    torch.manual_seed(0)
    save_file(mini_clip.new_model(folder).state_dict(), folder / mini_clip.WEIGHTS_FILE)
    return folder


@pytest.fixture
def pipe():
    """The same model, loaded."""
    return tiny_pipeline()


@pytest.fixture(scope="session")
def images_dir(tmp_path_factory):
    """A folder of three small images, wide, tall and square."""
    folder = tmp_path_factory.mktemp("subject")
    rng = np.random.default_rng(0)
    for place, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    return folder
