"""Base models from the hub: downloads, the cache, and the message of each failure."""

import errno
import re

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from hub_server import TOKEN, model_files
from huggingface_hub import constants, snapshot_download
from single_file import save_single_file
from tiny_pipeline import tiny_pipeline

from pipelines.errors import InputError
from pipelines.hub import Failure, failure_of
from pipelines.subject.base_model import load_base_model

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The folder of a tiny SDXL model with weights that differ from those of `tiny_model`."""
    folder = tmp_path_factory.mktemp("models") / "other"
    tiny_pipeline(seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def sdxl(hub_server, tiny_model):
    """The stand-in hub with the tiny model under SDXL's name, in full precision and as fp16."""
    hub_server.add(SDXL, model_files(tiny_model, None, "fp16"))
    return hub_server


def weights_of(pipeline):
    return pipeline.unet.conv_in.weight


def refused(name=SDXL, **options):
    """The message of the error that loading raises, on one line."""
    with pytest.raises(InputError) as caught:
        load_base_model(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "Error" not in message
    assert len(re.findall(r"\.(?: [A-Z]|$)", message)) <= 2, message
    return message


def test_only_the_files_of_a_variant_are_downloaded_and_only_once(sdxl):
    pipeline = load_base_model(SDXL, variant="fp16")
    torch.testing.assert_close(weights_of(pipeline), weights_of(tiny_pipeline()))
    weights = [name for name in sdxl.downloads() if name.endswith(".safetensors")]
    assert sorted(set(weights)) == ["diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"]
    sdxl.requests.clear()
    load_base_model(SDXL, variant="fp16")
    assert sdxl.downloads() == []
    assert len(sdxl.requests) <= 8


def test_without_a_variant_the_plain_files_are_downloaded(sdxl):
    load_base_model(SDXL)
    assert {name for name in sdxl.downloads() if "fp16" in name} == set()


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub_server, tiny_model, other_model):
    repository = hub_server.add(SDXL, model_files(tiny_model))
    commit = repository.commit(model_files(other_model), "v2", "refs/pr/1")
    expected = weights_of(tiny_pipeline(seed=1))
    for revision in ("v2", "refs/pr/1", commit):
        assert torch.equal(weights_of(load_base_model(SDXL, revision=revision)), expected)
    assert torch.equal(weights_of(load_base_model(SDXL)), weights_of(tiny_pipeline()))
    message = refused(revision="v9")
    page = f"{hub_server.endpoint}/{SDXL}/tree/main"
    assert f"has no revision 'v9'. Give --revision one of the branches, tags and commits on {page}, or leave it out" in message


def test_a_new_commit_on_the_branch_is_fetched(hub_server, tiny_model, other_model):
    repository = hub_server.add(SDXL, model_files(tiny_model))
    load_base_model(SDXL)
    repository.commit(model_files(other_model), "main")
    assert torch.equal(weights_of(load_base_model(SDXL)), weights_of(tiny_pipeline(seed=1)))


@pytest.mark.parametrize(
    ("served", "asked", "message"),
    [
        (
            (None, "fp16"),
            "fp32",
            r"no files of the variant 'fp32'\. Give --variant fp16 or no --variant",
        ),
        ((None,), "fp16", r"has no files of the variant 'fp16'\. Give no --variant"),
        (("fp16",), None, r"has weights only in variants\. Give --variant fp16"),
    ],
)
def test_a_missing_variant_is_reported_with_the_available_ones(hub_server, tiny_model, served, asked, message):
    hub_server.add(SDXL, model_files(tiny_model, *served))
    assert re.search(message, refused(variant=asked))
    assert not [name for name in hub_server.downloads() if name.endswith(".safetensors")]


def test_a_model_with_only_pickles_is_refused_before_the_download(hub_server, tiny_model):
    files = {name.replace(".safetensors", ".bin"): content for name, content in model_files(tiny_model).items()}
    hub_server.add(SDXL, files)
    assert re.search(r"unet/ has no \.safetensors weights, only pickles such as diffusion_pytorch_model\.bin", refused())
    assert not [name for name in hub_server.downloads() if name.endswith(".bin")]


def test_a_model_of_another_kind_is_refused_before_its_weights_are_downloaded(hub_server, tiny_model):
    files = model_files(tiny_model) | {"model_index.json": b'{"_class_name": "StableDiffusion3Pipeline"}'}
    hub_server.add("stabilityai/sd3", files)
    assert "'stabilityai/sd3' must hold a StableDiffusionXLPipeline, got StableDiffusion3Pipeline" in refused("stabilityai/sd3")
    hub_server.add("me/lora", {"pytorch_lora_weights.safetensors": b""})
    assert "'me/lora' is not a diffusers model: it has no model_index.json" in refused("me/lora")
    assert not [name for name in hub_server.downloads() if name.endswith(".safetensors")]


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_model_names_the_page_of_its_licence_and_the_login(sdxl, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    sdxl.repositories[SDXL].gated = True
    who = "the account that is logged in has no access" if token else "you are not logged in"
    assert re.search(rf"it is gated, and {who}.*licence on {sdxl.endpoint}/{SDXL}, then log in with `hf auth login`", refused())


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_missing_model_is_reported_with_its_page_and_the_login(hub_server, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = rf"'me/nothing' .*no such model on the hub.*Check the name on {hub_server.endpoint}/me/nothing; if.*`hf auth login`"
    assert re.search(message, refused("me/nothing"))


def test_a_private_model_loads_with_a_token_that_no_other_host_gets(sdxl, monkeypatch):
    sdxl.repositories[SDXL].private = True
    assert "if the model is private, log in with `hf auth login`" in refused()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load_base_model(SDXL)


def test_an_invalid_token_is_reported(sdxl, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    assert re.search(r"not accept the access token \(401\)\. Log in again with `hf auth login`, or unset HF_TOKEN", refused())


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, r"no permission to read it \(403\)\. Log in with `hf auth login`"),
        (429, r"too many requests.*\(429\)\. Wait a few minutes, or log in with `hf auth login`"),
        (500, r"server error \(500\).*Try again later, or give --pretrained_model_name_or_path a folder"),
        (503, r"server error \(503\).*Try again later"),
    ],
)
def test_an_error_status_is_reported_with_the_remedy_unless_the_model_is_cached(sdxl, caplog, status, message):
    sdxl.status = status
    assert re.search(message, refused())
    sdxl.status = None
    load_base_model(SDXL)
    sdxl.status = status
    load_base_model(SDXL)
    assert f"{SDXL!r} is loaded from the cache, as the hub failed" in caplog.text


def test_an_interrupted_download_is_resumed(sdxl):
    sdxl.cut_after = {"diffusion_pytorch_model.safetensors": [1000]}
    assert torch.equal(weights_of(load_base_model(SDXL)), weights_of(tiny_pipeline()))


def test_a_file_of_the_wrong_length_is_reported_and_downloaded_again_by_the_next_try(sdxl):
    sdxl.wrong_length = {"diffusion_pytorch_model.safetensors"}
    assert re.search(r"the download was interrupted \(Consistency check failed: .*\)\. Run the command again", refused())
    sdxl.wrong_length = set()
    sdxl.requests.clear()
    assert torch.equal(weights_of(load_base_model(SDXL)), weights_of(tiny_pipeline()))
    assert "model_index.json" not in sdxl.downloads()


@pytest.mark.parametrize("offline", [False, True])
def test_offline_a_cached_model_loads_and_the_error_for_another_has_the_remedy(sdxl, monkeypatch, offline):
    load_base_model(SDXL, variant="fp16")
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        sdxl.stop()
    sdxl.requests.clear()
    assert torch.equal(weights_of(load_base_model(SDXL, variant="fp16")), weights_of(tiny_pipeline()))
    reason = "HF_HUB_OFFLINE is set" if offline else r"cannot be reached \(.*refused\)"
    # The plain files were never downloaded, nor was any other revision or model.
    for name, options in ((SDXL, {}), (SDXL, {"revision": "v2"}), ("stabilityai/other", {})):
        message = refused(name, **options)
        assert re.search(rf"{name!r} could not be fetched: .*{reason}", message)
        revision = r" --revision v2" if options else ""
        assert re.search(rf"Download it once where there is a network, with `hf download {name}{revision}`, or give", message)
    message = refused(SDXL, variant="fp32")
    assert "`hf download stabilityai/stable-diffusion-xl-base-1.0 --include '*.json' '*.txt' '*.fp32*.safetensors'`" in message
    assert sdxl.requests == []


def test_the_download_command_of_the_message_suffices_offline(sdxl):
    snapshot_download(SDXL, allow_patterns=["*.json", "*.txt", "*.fp16*.safetensors"])
    sdxl.stop()
    load_base_model(SDXL, variant="fp16")


def test_a_server_that_is_not_a_hub_is_recognised(sdxl):
    sdxl.login_page = True
    assert re.search(r"does not answer like the Hugging Face hub\. Check HF_ENDPOINT, and whether a proxy", refused())


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, r"is full\. Free some space, or set HF_HOME"), (errno.EACCES, r"cannot be written \(.*\)\. Set HF_HOME")],
)
def test_a_full_or_read_only_cache_is_reported(sdxl, monkeypatch, number, message):
    def fail(*_, **__):
        raise OSError(number, "the reason")

    monkeypatch.setattr(StableDiffusionXLPipeline, "download", fail)
    assert re.search(message, refused())


def test_a_failure_is_recognised_in_the_causes_of_other_errors():
    error = OSError("We couldn't connect, and a long text")
    error.__cause__ = OSError(errno.ENOSPC, "full")
    assert failure_of(error) == (Failure.DISK_FULL, error.__cause__)
    assert failure_of(OSError("something else")) is None


def test_an_autoencoder_and_a_configuration_come_from_the_hub(hub_server, tiny_model, other_model, tmp_path, monkeypatch):
    files = {name.removeprefix("vae/"): file for name, file in model_files(other_model).items() if name.startswith("vae/")}
    hub_server.add("me/vae", files | {"sdxl_vae.safetensors": b"not needed", "diffusion_pytorch_model.bin": b"nor this"})
    hub_server.add(SDXL, model_files(tiny_model))
    save_single_file(tiny_pipeline(), tmp_path / "model.safetensors")
    for _ in range(2):
        for config in (None, SDXL):
            pipeline = load_base_model(str(tmp_path / "model.safetensors"), vae="me/vae", single_file_config=config)
            assert torch.equal(weights_of(pipeline), weights_of(tiny_pipeline()))
            assert torch.equal(pipeline.vae.quant_conv.weight, tiny_pipeline(seed=1).vae.quant_conv.weight)
        # Again, from the cache only.
        hub_server.stop()
    weights = [name for name in hub_server.downloads() if name.endswith((".safetensors", ".bin"))]
    assert set(weights) == {"diffusion_pytorch_model.safetensors"}
    # Stock diffusers, which the certificate runs offline, also loads everything from the cache.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    vae = AutoencoderKL.from_pretrained("me/vae", use_safetensors=True)
    StableDiffusionXLPipeline.from_single_file(str(tmp_path / "model.safetensors"), config=SDXL, vae=vae)


def test_an_unavailable_autoencoder_or_configuration_is_reported_with_its_option(hub_server, tiny_model, tmp_path):
    save_single_file(tiny_pipeline(), tmp_path / "model.safetensors")
    file = str(tmp_path / "model.safetensors")
    hub_server.add("me/pickled", {"config.json": b"{}", "diffusion_pytorch_model.bin": b""})
    assert re.search(r"autoencoder 'me/pickled'.*only pickles such as diff.*\.bin", refused(str(tiny_model), vae="me/pickled"))
    assert "autoencoder 'me/nothing' could not be fetched: there is no" in refused(str(tiny_model), vae="me/nothing")
    assert "no folder './nowhere' for --single_file_config" in refused(file, single_file_config="./nowhere")
    hub_server.stop()
    assert re.search(r"autoencoder.*or give --pretrained_vae_model_name_or_path a folder", refused(str(tiny_model), vae="me/vae"))
    assert re.search(rf"configuration '{SDXL}'.*or give --single_file_config the folder of an SDXL", refused(file))
