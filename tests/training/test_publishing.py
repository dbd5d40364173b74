"""What is published, what is kept, and the upload."""

import json

import pytest
from hub_server import READ_ONLY_TOKEN, TOKEN, read
from huggingface_hub import constants
from PIL import Image
from subject_runs import SubjectTrainer

from pipelines.errors import InputError
from training.options.validation import ValidationOptions
from training.subject import finishing, publishing

SECRETS = ("zwx", "gizmo", "secretfolder", "privatename", "mymodel", TOKEN)


def uploaded(hub, name):
    """The files that the hub has of a model by now, but for the one that it makes itself."""
    repository = hub.repositories[name]
    return {file: read(content) for file, content in repository.files[repository.revisions["main"]].items()}


@pytest.fixture
def published(tiny_model, tmp_path):
    """A run whose every name is one of `SECRETS`, with the flags given; returns its directory."""
    folder, model = tmp_path / "secretfolder", tmp_path / "mymodel"
    folder.mkdir()
    model.symlink_to(tiny_model)
    for place in range(2):
        Image.effect_noise((20, 20), 60 + 40 * place).convert("RGB").save(folder / f"privatename{place}.png")

    def run(*more):
        given = ("--max_train_steps", "2", "--validation_prompt", "a zwx gizmo", "a zwx gizmo in the snow")
        return SubjectTrainer(model, folder).run(tmp_path / "secretfolder-run", *given, *more, prompt="a zwx gizmo")

    return run


@pytest.mark.parametrize("method", ["nora", "lora"])
def test_a_private_run_publishes_no_caption_path_or_name_in_any_byte(published, hub_server, method):
    run = published("--private", "--push_to_hub", "--hub_token", TOKEN, "--method", method)
    files = [path for path in (run.path / "published").rglob("*") if path.is_file()]
    assert {"README.md", "provenance.json", "before_after.png"} <= {path.name for path in files}
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        leaked = [
            secret for secret in SECRETS if secret.encode() in path.read_bytes() or secret in str(path.relative_to(run.path))
        ]
        assert not leaked, f"{path.name} holds {leaked}"
    record = json.loads((run.path / "published" / "provenance.json").read_text())
    assert len(record["images"]) == 2
    assert hub_server.repositories["me/adapter"].private
    assert uploaded(hub_server, "me/adapter") == {
        path.relative_to(run.path / "published").as_posix(): path.read_bytes() for path in files
    }
    assert run.status().published == f"{hub_server.endpoint}/me/adapter"


def test_without_its_flags_nothing_is_published(lora_run, hub_server):
    publishing.check_can_push(ValidationOptions())
    assert hub_server.requests == []
    assert not (lora_run.path / "published").exists()
    assert lora_run.status().published is None


def test_a_failed_upload_loses_nothing_and_can_be_repeated_later(published, hub_server, tmp_path, monkeypatch):
    def assemble_without_a_network(*arguments):
        hub_server.stop()
        return publishing.assemble(*arguments)

    monkeypatch.setattr(finishing, "assemble", assemble_without_a_network)
    asked = ("--push_to_hub", "--hub_model_id", "me/toy", "--hub_token", TOKEN)
    with pytest.raises(InputError, match=r"upload to the hub failed: .*refused\. The run is complete") as caught:
        published(*asked)
    run, folder = tmp_path / "secretfolder-run", tmp_path / "secretfolder-run" / "published"
    assert f"Later, upload them with `hf upload me/toy {folder}`." in str(caught.value)
    assert (run / "adapter").is_dir()
    for file in ("options.json", "command", "provenance.json", "published/provenance.json", "status.json"):
        assert TOKEN not in (run / file).read_text()
    assert (folder / "README.md").read_bytes() == (run / "README.md").read_bytes()

    hub_server.start()
    publishing.push_to_hub(folder, ValidationOptions(push_to_hub=True, hub_model_id="me/toy", hub_token=TOKEN), "x")
    assert not hub_server.repositories["me/toy"].private
    files = set(uploaded(hub_server, "me/toy"))
    assert {"README.md", "before_after.png", "diffusers/pytorch_lora_weights.safetensors", "provenance.json"} <= files
    assert not {"options.json", "command", "metrics.jsonl"} & files


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (
            None,
            "me/toy",
            r"the access token was not accepted \(401\).*Log in with `hf auth login` and a token with write permission",
        ),
        ("hf_stale", "me/toy", r"the access token was not accepted \(401\).*Log in with `hf auth login`"),
        (
            READ_ONLY_TOKEN,
            "me/toy",
            r"the access token has no write permission for the repository \(403\).*Log in with `hf auth login`",
        ),
        (TOKEN, "other/toy", r"the access token has no write permission for the repository \(403\).*`hf upload other/toy"),
    ],
)
def test_an_upload_that_is_refused_names_the_remedy(hub_server, tmp_path, token, name, message):
    (tmp_path / "README.md").write_text("A card")
    with pytest.raises(InputError, match=f"The upload to the hub failed: .*{message}") as caught:
        publishing.push_to_hub(tmp_path, ValidationOptions(push_to_hub=True, hub_model_id=name, hub_token=token), "x")
    assert "\n" not in str(caught.value)
    assert f"the files to publish are in {str(tmp_path)!r}" in str(caught.value)


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_fails_during_an_upload_is_named(hub_server, tmp_path, status):
    hub_server.status = status
    with pytest.raises(InputError, match=rf"upload to the hub failed: .*{status}.*Later, upload them with `hf upload me/toy"):
        publishing.push_to_hub(tmp_path, ValidationOptions(push_to_hub=True, hub_model_id="me/toy", hub_token=TOKEN), "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs an access token\. Log in with `hf auth login`, or give --hub_token"),
        ({"hub_token": "hf_stale"}, r"the access token was not accepted \(401\)\. Log in with"),
        ({"hub_token": READ_ONLY_TOKEN}, r"can only read\. Log in with `hf auth login` and a token with write permission"),
        ({"hub_token": TOKEN, "hub_model_id": "me/toy/deep"}, r"hub_model_id must have the form OWNER/NAME, got 'me/toy/deep'"),
    ],
)
def test_an_upload_without_permission_is_refused_before_the_training(hub_server, options, message):
    with pytest.raises(InputError, match=message):
        publishing.check_can_push(ValidationOptions(push_to_hub=True, **options))


def test_in_offline_mode_an_upload_is_refused_and_without_a_network_it_is_tried_later(hub_server, monkeypatch, caplog):
    asked = ValidationOptions(push_to_hub=True, hub_token=TOKEN)
    hub_server.stop()
    publishing.check_can_push(asked)
    assert "so permission for the upload is checked after the training" in caplog.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set\. Unset it, or leave --push_to_hub out"):
        publishing.check_can_push(asked)


def test_hub_flags_without_an_upload_are_refused():
    with pytest.raises(InputError, match=r"hub_model_id and hub_token need --push_to_hub"):
        ValidationOptions(hub_model_id="me/toy")
