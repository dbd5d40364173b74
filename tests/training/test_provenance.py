"""Where a run comes from, recorded: hashes that change with what they are of."""

import hashlib
import json
import shutil
import subprocess

import pytest
import torch
from tiny_pipeline import tiny_pipeline

from pipelines.digests import file_digest
from pipelines.run_file import Provenance
from training.options import parse_options
from training.runs.provenance import (
    code_identity,
    command_line,
    file_records,
    files_hash,
    library_versions,
    model_identity,
    write_provenance,
)
from training.runs.run import RunDirectory


def test_the_hash_of_a_large_file_is_its_sha256(tmp_path):
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_the_hash_of_files_depends_on_names_and_bytes_but_not_on_order_or_folder(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    files = [tmp_path / "a", tmp_path / "b"]
    first = files_hash(tmp_path, files)
    assert files_hash(tmp_path, files[::-1]) == first
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    assert files_hash(moved, [moved / "a", moved / "b"]) == first
    (moved / "b").rename(moved / "c")
    assert files_hash(moved, [moved / "a", moved / "c"]) != first
    files[0].write_text("x")
    assert files_hash(tmp_path, files) != first


@pytest.fixture
def sources(tmp_path):
    """A copy of nothing but three packages, in git."""
    for package in ("nora_vision", "pipelines", "training"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "code.py").write_text("x = 1\n")
    return tmp_path


def test_the_code_is_identified_by_its_commit_and_sources(sources):
    plain = code_identity(sources)
    assert plain["commit"] is None
    git = ["git", "-C", str(sources), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    committed = code_identity(sources)
    assert (len(committed["commit"]), committed["changed"]) == (40, False)
    assert committed["sources_sha256"] == plain["sources_sha256"]
    (sources / "training" / "code.py").write_text("x = 2\n")
    changed = code_identity(sources)
    assert changed["changed"]
    assert changed["sources_sha256"] != plain["sources_sha256"]


def test_the_base_model_is_identified_by_all_its_weight_files(tiny_model, tmp_path):
    found = model_identity(str(tiny_model), tiny_pipeline())
    assert set(found["files"]) == {path.relative_to(tiny_model).as_posix() for path in tiny_model.rglob("*.safetensors")}
    assert not found["public"]
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert found["files"][unet] == file_digest(tiny_model / unet)
    single = model_identity(str(tiny_model / unet), tiny_pipeline())
    assert list(single["files"].values()) == [found["files"][unet]]


def test_the_files_of_a_hub_model_are_those_in_the_cache(tiny_model):
    pipe = tiny_pipeline()
    pipe.unet.register_to_config(_name_or_path=str(tiny_model / "unet"))
    found = model_identity("owner/model", pipe)
    assert (found["name"], found["public"]) == ("owner/model", True)
    assert found["files"] == model_identity(str(tiny_model), pipe)["files"]


@pytest.mark.parametrize("given", [["--hub_token", "hf_abc"], ["--hub_token=hf_abc"]])
def test_the_hub_token_is_not_recorded(given):
    shown = command_line(["train.py", *given, "--seed", "3"])
    assert "hf_abc" not in shown
    assert shown.startswith("train.py --hub_token")
    assert shown.endswith("--seed 3")


def test_versions_cover_the_libraries_that_results_depend_on():
    found = library_versions()
    assert torch.__version__.startswith(found["torch"])
    assert {"python", "diffusers", "peft", "transformers"} <= {name for name, value in found.items() if value}


def test_the_provenance_is_complete_and_its_private_form_has_no_names(tiny_model, images_dir, tmp_path):
    paths = sorted(images_dir.iterdir())
    run = RunDirectory.create(tmp_path / "run", {})
    options = parse_options(
        ["--instance_data_dir", str(images_dir), "--instance_prompt", "zwx", "--pretrained_model_name_or_path", str(tiny_model)]
    )
    parts = {"images": file_records(paths[1:]), "heldout": file_records(paths[:1])}
    base = model_identity(str(tiny_model), tiny_pipeline())
    write_provenance(run, options.to_dict(), base, torch.device("cpu"), parts, seed=0)
    record = json.loads((run.path / "provenance.json").read_text())
    assert [image["sha256"] for image in record["images"]] == [file_digest(path) for path in paths[1:]]
    assert record["heldout"][0]["file"] == str(paths[0])
    assert record["options"]["data"]["instance_prompt"] == "zwx"
    assert record["device"]["type"] == "cpu"
    public = json.dumps(Provenance.read(run.path).without_names().to_json())
    assert not any(secret in public for secret in ("zwx", images_dir.name, tiny_model.name, ".png"))
    assert record["code"]["sources_sha256"] in public
    assert all(image["sha256"] in public for image in record["images"])
