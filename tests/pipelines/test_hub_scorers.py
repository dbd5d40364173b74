"""CLIP and DINOv2 models from the hub, with open_clip and transformers: downloads, the cache, and failures."""

import json
import re
import shutil

import open_clip
import pytest
import torch
from hub_server import TOKEN, model_files
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny_clip import CONFIG, tiny_clip
from transformers import (
    BertConfig,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from pipelines.built_in import BUILT_IN_MODEL
from pipelines.clip import load_clip
from pipelines.errors import InputError
from pipelines.mini_clip import CONFIG_FILE, WEIGHTS_FILE
from pipelines.subject.embedders import load_embedder

DINO, CLIP, TINY = "facebook/dinov2-tiny", "openai/clip-tiny", "someone/tiny"


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """The files of a tiny DINOv2."""
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14}).save_pretrained(folder)
    return model_files(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The files of a tiny CLIP of transformers."""
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    text, vision = {**small, "vocab_size": 2000}, {**small, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    shutil.copytree(BUILT_IN_MODEL / "tokenizer", folder, dirs_exist_ok=True)
    return model_files(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights of a tiny model of open_clip."""
    file = tmp_path_factory.mktemp("weights") / WEIGHTS_FILE
    save_file(tiny_clip().state_dict(), file)
    return file


@pytest.fixture
def open_clip_hub(hub_server, weights, tmp_path, monkeypatch):
    """The stand-in hub with `weights`, which are a tag of the model tiny-hub in open_clip."""
    (tmp_path / "tiny-hub.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-hub.json")
    tags = {"hub": {"hf_hub": f"{TINY}/"}, "named": {"hf_hub": f"{TINY}/other.bin"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-hub", tags)
    hub_server.add(TINY, {WEIGHTS_FILE: weights, "open_clip_pytorch_model.bin": b"a pickle", "other.safetensors": weights})
    return hub_server


def refused(load, *arguments):
    """The message of the error that loading raises, on one line."""
    with pytest.raises(InputError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cut_off(hub, offline, monkeypatch):
    """Stop the hub, or set HF_HUB_OFFLINE."""
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.stop()


def loads_the_tiny_model(*arguments):
    return torch.equal(load_clip(*arguments).model.visual.conv1.weight, tiny_clip().visual.conv1.weight)


def test_a_tags_weights_are_downloaded_once_and_never_a_pickle(open_clip_hub):
    assert loads_the_tiny_model("tiny-hub", "hub")
    assert set(open_clip_hub.downloads()) == {WEIGHTS_FILE}
    open_clip_hub.requests.clear()
    assert loads_the_tiny_model("tiny-hub", "hub")
    assert open_clip_hub.downloads() == []
    assert loads_the_tiny_model("tiny-hub", "named")


@pytest.mark.parametrize("offline", [False, True])
def test_offline_a_cached_tag_loads_and_the_error_for_another_has_the_remedy(open_clip_hub, monkeypatch, offline):
    load_clip("tiny-hub", "hub")
    cut_off(open_clip_hub, offline, monkeypatch)
    assert loads_the_tiny_model("tiny-hub", "hub")
    remedy = rf"`hf download {TINY}`, or give --pretrained a \.safetensors checkpoint, another tag"
    message = rf"'named' weights of tiny-hub at '{TINY}' could not be fetched.*{remedy}"
    assert re.search(message, refused(load_clip, "tiny-hub", "named"))


def test_each_failure_of_a_tag_says_what_to_do(open_clip_hub, monkeypatch, weights):
    open_clip_hub.wrong_length = {WEIGHTS_FILE}
    assert re.search(
        r"was interrupted \(Consistency check failed.*\)\. Run the command again", refused(load_clip, "tiny-hub", "hub")
    )
    open_clip_hub.wrong_length = set()
    open_clip_hub.repositories[TINY].gated = True
    assert f"Accept its licence on {open_clip_hub.endpoint}/{TINY}, then log in" in refused(load_clip, "tiny-hub", "hub")
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    assert "not accept the access token" in refused(load_clip, "tiny-hub", "hub")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    del open_clip_hub.repositories[TINY]
    assert f"Check the name on {open_clip_hub.endpoint}/{TINY}" in refused(load_clip, "tiny-hub", "hub")
    open_clip_hub.add(TINY, {"open_clip_pytorch_model.bin": b"a pickle"})
    assert "exist only as a pickle, which is not opened" in refused(load_clip, "tiny-hub", "hub")
    open_clip_hub.status = 502
    assert "server error (502)" in refused(load_clip, "tiny-hub", "hub")
    assert "open_clip_pytorch_model.bin" not in open_clip_hub.downloads()


@pytest.mark.parametrize("offline", [False, True])
def test_a_model_of_open_clip_loads_by_its_hub_name_and_then_without_a_network(hub_server, weights, monkeypatch, offline):
    configuration = json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.1] * 3}}).encode()
    files = {CONFIG_FILE: configuration, WEIGHTS_FILE: weights, "open_clip_pytorch_model.bin": b"a pickle"}
    hub_server.add(TINY, files)
    assert loads_the_tiny_model(f"hf-hub:{TINY}")
    assert "open_clip_pytorch_model.bin" not in hub_server.downloads()
    hub_server.add("someone/pickled", {CONFIG_FILE: configuration, "open_clip_pytorch_model.bin": b"a pickle"})
    assert f"'someone/pickled' on the hub must have {WEIGHTS_FILE}" in refused(load_clip, "hf-hub:someone/pickled")
    cut_off(hub_server, offline, monkeypatch)
    assert loads_the_tiny_model(f"hf-hub:{TINY}")
    assert "or give --model a folder with open_clip_config.json, or 'mini'." in refused(load_clip, "hf-hub:someone/else")


def test_a_text_encoder_of_transformers_is_looked_up_first(hub_server, weights, tmp_path):
    text = {"hf_model_name": "bert-tiny", "hf_tokenizer_name": "bert-tiny"}
    (tmp_path / "bert-hub.json").write_text(json.dumps({**CONFIG, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "bert-hub.json")
    message = r"text encoder's files 'bert-tiny' could not be fetched.*no such model on the hub"
    assert re.search(message, refused(load_clip, "bert-hub", "random"))
    small = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64)
    tokenizer = {path.name: path for path in (BUILT_IN_MODEL / "tokenizer").iterdir()}
    hub_server.add("bert-tiny", {"config.json": small.to_json_string().encode(), **tokenizer, "pytorch_model.bin": b"a pickle"})
    for _ in range(2):
        assert load_clip("bert-hub", "random").tokenizer(["a red star"]).shape[0] == 1
        hub_server.stop()
    assert "pytorch_model.bin" not in hub_server.downloads()


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("name", [DINO, CLIP])
def test_a_model_of_transformers_is_downloaded_once_and_loads_without_a_network(
    hub_server, dino, clip, monkeypatch, name, offline
):
    pickles = {"pytorch_model.bin": b"a pickle", "model.fp16.safetensors": b"", "onnx/model.onnx": b""}
    hub_server.add(DINO, dino | pickles)
    hub_server.add(CLIP, clip | pickles)
    embedder = load_embedder(name)
    assert embedder.reads_text is (name == CLIP)
    weights = [file for file in hub_server.downloads() if file.endswith((".safetensors", ".bin", ".onnx"))]
    assert set(weights) == {"model.safetensors"}
    hub_server.requests.clear()
    load_embedder(name)
    assert hub_server.downloads() == []
    cut_off(hub_server, offline, monkeypatch)
    load_embedder(name)
    message = refused(load_embedder, "facebook/else")
    assert re.search(r"image_scorer 'facebook/else' .*`hf download facebook/else`, or give --image_scorer a folder", message)


def test_each_failure_of_a_model_of_transformers_says_what_to_do(hub_server, dino, monkeypatch):
    assert f"Check the name on {hub_server.endpoint}/{DINO}; if the model is private" in refused(load_embedder, DINO)
    hub_server.add(DINO, {"config.json": dino["config.json"], "pytorch_model.bin": b"a pickle"})
    assert "has no model.safetensors: other weights, such as .bin, can run programs" in refused(load_embedder, DINO)
    hub_server.add(DINO, dino)
    hub_server.wrong_length = {"model.safetensors"}
    assert "the download was interrupted (Consistency check failed" in refused(load_embedder, DINO)
    hub_server.repositories[DINO].gated = True
    assert f"Accept its licence on {hub_server.endpoint}/{DINO}" in refused(load_embedder, DINO)
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    assert "Log in again with `hf auth login`, or unset HF_TOKEN" in refused(load_embedder, DINO)
    hub_server.status = 500
    assert "server error (500)" in refused(load_embedder, DINO)
    assert "pytorch_model.bin" not in hub_server.downloads()
