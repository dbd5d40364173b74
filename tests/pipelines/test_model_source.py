"""The base model that images are generated with, and errors about runs whose base model is unknown."""

import json

import pytest

from pipelines.built_in import BUILT_IN, BUILT_IN_MODEL, is_built_in, model_path, recorded_name
from pipelines.errors import InputError
from pipelines.run_options import check_task, run_options, task_of
from pipelines.subject.generate import GenerationOptions, main
from pipelines.subject.model_source import ModelSource
from training.options import SubjectOptions
from training.options.fewshot import FewShotOptions
from training.runs.provenance import model_identity

GONE = "/another/checkout/assets/mini-sdxl"


def run_of(folder, **model):
    """A run with these options for its base model."""
    folder.mkdir(exist_ok=True)
    (folder / "options.json").write_text(json.dumps({"model": model}))
    return str(folder)


def source(run, **given):
    return GenerationOptions(adapter=[run], **given).source()


@pytest.mark.parametrize("name", [BUILT_IN, str(BUILT_IN_MODEL), GONE])
def test_the_built_in_model_has_one_name_in_every_folder(name):
    assert is_built_in(name)
    assert recorded_name(name) == BUILT_IN
    assert model_path(name) == str(BUILT_IN_MODEL)


def test_another_folder_of_that_name_is_another_model(tmp_path):
    other = tmp_path / "assets" / "mini-sdxl"
    other.mkdir(parents=True)
    assert not is_built_in(str(other))
    assert recorded_name(str(other)) == model_path(str(other)) == str(other)
    assert recorded_name("owner/model") == "owner/model"


def test_a_runs_base_model_is_used_and_given_values_take_precedence(tmp_path):
    said = {"revision": "v2", "variant": "fp16", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    run = run_of(tmp_path / "run", pretrained_model_name_or_path="owner/model", quantize="nf4", **said)
    assert source(run) == ModelSource("owner/model", **said)
    assert source(run, variant="bf16").variant == "bf16"
    # Another model is loaded with its given options, but with the prediction type that the adapter was trained for.
    of_training = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert source(run, pretrained_model_name_or_path="other/model") == ModelSource("other/model", **of_training)
    assert source(run, rescale_betas_zero_snr=False, prediction_type="epsilon").prediction_type == "epsilon"


def test_without_a_run_the_built_in_model_is_used(tmp_path):
    assert GenerationOptions().source() == source(str(tmp_path)) == ModelSource(BUILT_IN)


def test_a_run_of_the_built_in_model_in_a_deleted_checkout_still_works(tmp_path):
    assert source(run_of(tmp_path / "run", pretrained_model_name_or_path=GONE)) == ModelSource(BUILT_IN)


def test_a_run_of_another_version_of_the_built_in_model_names_the_option(tmp_path, pipe):
    run = run_of(tmp_path / "run", pretrained_model_name_or_path=GONE)
    provenance = {"base_model": model_identity(BUILT_IN, pipe)}
    (tmp_path / "run" / "provenance.json").write_text(json.dumps(provenance))
    assert source(run).pretrained_model_name_or_path == BUILT_IN
    files = provenance["base_model"]["files"]
    files[next(iter(files))] = "0" * 64
    (tmp_path / "run" / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(InputError, match=r"another version of the built-in model.*--pretrained_model_name_or_path"):
        source(run)
    assert source(run, pretrained_model_name_or_path="owner/model").pretrained_model_name_or_path == "owner/model"


@pytest.mark.parametrize("part", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "single_file_config"])
def test_a_moved_part_is_reported_with_its_option(tmp_path, part):
    run = run_of(tmp_path / "run", **{"pretrained_model_name_or_path": "owner/model", part: str(tmp_path / "gone")})
    with pytest.raises(InputError, match=rf"was trained with {part} '.*gone', which no longer exists\. Give --{part}"):
        source(run)
    assert getattr(source(run, **{part: "owner/other"}), part) == "owner/other"


def test_a_model_that_cannot_be_loaded_is_reported_with_the_run_and_the_option(tmp_path):
    run = run_of(tmp_path / "run", pretrained_model_name_or_path="./models/gone.safetensors")
    with pytest.raises(InputError, match=r"of the run '.*run' cannot be loaded: .*gone.*--pretrained_model_name_or_path"):
        main(GenerationOptions(adapter=[run], prompt=["a star"], output_dir=str(tmp_path)))


def test_a_runs_task_is_recognised_by_its_options():
    assert task_of(SubjectOptions().to_dict()) == "subject"
    assert task_of(FewShotOptions().to_dict()) == "few-shot"
    assert task_of({}) is None


def test_a_run_of_the_other_task_names_the_command_that_takes_it(tmp_path):
    (tmp_path / "options.json").write_text(json.dumps(FewShotOptions().to_dict()))
    with pytest.raises(InputError, match=r"is a few-shot run, not a subject run: .*pipelines\.fewshot\.classify "):
        source(str(tmp_path))
    (tmp_path / "options.json").write_text(json.dumps(SubjectOptions().to_dict()))
    with pytest.raises(InputError, match=r"is a subject run, not a few-shot run: .*pipelines\.subject\.generate --adapter "):
        check_task(tmp_path, "few-shot")


@pytest.mark.parametrize("text", ["{", "[1]", '{"model": 3}'])
def test_invalid_options_files_are_refused(tmp_path, text):
    (tmp_path / "options.json").write_text(text)
    with pytest.raises(InputError, match=r"options\.json.* .*Restore the file that the run wrote"):
        run_options(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": "x.foo"}, r"--grid must be a \.png"),
        ({"output_dir": "file"}, r"--output_dir must be a folder"),
        ({"output_dir": "file/x"}, r"--output_dir must be a folder"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be in \[0, 1\], got 1\.5"),
    ],
)
def test_unwritable_outputs_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelSource, "load", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=message):
        main(GenerationOptions(prompt=["a star"], **given))
