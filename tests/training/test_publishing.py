"""What is published, what is kept, and the upload."""

import json
from functools import partial
from typing import ClassVar

import httpx
import pytest
from accelerate.state import AcceleratorState
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from pipelines.errors import InputError
from pipelines.subject.generate import Sampling
from training import dreambooth_nora
from training.options import parse_options
from training.options.judging import JudgingOptions
from training.subject import publishing

SECRETS = ("zwx", "gizmo", "secretfolder", "privatename", "mymodel", "hf_abc")
FAST = "--rank 6 --inner_r 2 --target_modules to_v --max_train_steps 2 --train_batch_size 2 --lr_warmup_steps 1 --no_certify"
FAST += " --learning_rate 0.1 --checkpointing_steps 2 --validation_steps 2 --heldout_image none"


class FakeHub:
    """Stands in for HfApi and remembers what it is asked."""

    calls: ClassVar[list] = []

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return type("Url", (str,), {"repo_id": f"me/{repo_id.split('/')[-1]}"})(f"https://hub/{repo_id}")

    def upload_folder(self, **options):
        files = {path.relative_to(options["folder_path"]).as_posix() for path in options["folder_path"].rglob("*")}
        self.calls.append(("upload", options["repo_id"], files))


@pytest.fixture
def hub(monkeypatch):
    """The fake hub's calls."""
    monkeypatch.setattr(publishing, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    return FakeHub.calls


@pytest.fixture
def published(tiny_model, tmp_path, monkeypatch):
    """A run whose every name is one of `SECRETS`, with the flags given; returns its directory."""
    monkeypatch.setattr(dreambooth_nora, "Sampling", partial(Sampling, num_inference_steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    folder, model = tmp_path / "secretfolder", tmp_path / "mymodel"
    folder.mkdir()
    model.symlink_to(tiny_model)
    for place in range(2):
        Image.effect_noise((20, 20), 60 + 40 * place).convert("RGB").save(folder / f"privatename{place}.png")

    def run(*more):
        given = ["--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(folder)]
        given += ["--instance_prompt", "a zwx gizmo", "--output_dir", str(tmp_path / "secretfolder-run"), *more]
        return dreambooth_nora.main(parse_options([*FAST.split(), *given]))

    return run


@pytest.mark.parametrize("method", ["nora", "lora"])
def test_a_private_run_publishes_no_caption_path_or_name_in_any_byte(published, hub, method):
    run = published("--private", "--push_to_hub", "--hub_token", "hf_abc", "--method", method)
    files = [path for path in (run.path / "published").rglob("*") if path.is_file()]
    assert {"README.md", "provenance.json", "before_after.png"} <= {path.name for path in files}
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        leaked = [
            secret for secret in SECRETS if secret.encode() in path.read_bytes() or secret in str(path.relative_to(run.path))
        ]
        assert not leaked, f"{path.name} holds {leaked}"
    record = json.loads((run.path / "published" / "provenance.json").read_text())
    assert len(record["pictures"]) == 2
    assert ("create", "adapter", {"exist_ok": True, "private": True}) in hub


def test_a_run_that_is_not_private_publishes_the_card_as_it_is_and_all_weights(published, hub):
    run = published("--push_to_hub", "--hub_model_id", "me/toy", "--hub_token", "hf_abc")
    assert hub[0] == ("token", "hf_abc")
    assert hub[1] == ("create", "me/toy", {"exist_ok": True, "private": False})
    kind, repository, files = hub[2]
    assert (kind, repository) == ("upload", "me/toy")
    assert {"README.md", "before_after.png", "diffusers/pytorch_lora_weights.safetensors", "provenance.json"} <= files
    assert not {"options.json", "command", "metrics.jsonl"} & files
    assert (run.path / "published" / "README.md").read_bytes() == (run.path / "README.md").read_bytes()
    assert run.status()["published"] == "https://hub/me/toy"
    for file in ("options.json", "command", "provenance.json", "published/provenance.json"):
        assert "hf_abc" not in (run.path / file).read_text()


def test_without_being_asked_nothing_is_gathered_or_uploaded(published, hub):
    run = published()
    assert not (run.path / "published").exists()
    assert hub == []


def test_a_hub_that_refuses_is_an_error_that_says_how_to_upload_later(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise HfHubHTTPError("401 Unauthorized", response=httpx.Response(401, request=httpx.Request("POST", "https://hub")))

    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    monkeypatch.setattr(publishing, "HfApi", FakeHub)
    with pytest.raises(InputError, match=r"The hub took no upload.*hf auth login.*hf upload me/toy"):
        publishing.push_to_hub(tmp_path, JudgingOptions(push_to_hub=True, hub_model_id="me/toy"), "x")


def test_hub_flags_without_an_upload_are_refused():
    with pytest.raises(InputError, match=r"hub_model_id and hub_token need --push_to_hub"):
        JudgingOptions(hub_model_id="me/toy")
