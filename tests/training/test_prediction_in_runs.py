"""A checkpoint that says that it predicts v with zero terminal SNR: everything that a run makes and leaves goes by it."""

import json
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from single_file import save_single_file
from tiny_pipeline import tiny_pipeline

from nora_vision.files import read_header
from pipelines.errors import InputError
from pipelines.subject.generate import GenerationOptions, Sampling
from training import dreambooth_nora, fewshot_nora
from training.options import parse_options
from training.options.fewshot import parse_fewshot_options
from training.subject import finishing

FAST = "--method lora --rank 2 --target_modules to_v --max_train_steps 2 --train_batch_size 1 --validation_steps 2"
FAST += " --learning_rate 1 --lr_warmup_steps 0 --heldout_image none --snr_gamma 5 --report_to none --image_scorer base"


@pytest.fixture(autouse=True)
def any_precision():
    """accelerate keeps the precision of a process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)


def flags(model, images_dir, folder, *more):
    data = ("--instance_data_dir", str(images_dir), "--instance_prompt", "sks toy", "--validation_prompt", "sks toy")
    return [*FAST.split(), "--pretrained_model_name_or_path", str(model), *data, "--output_dir", str(folder), *more]


def test_a_run_follows_the_prediction_type_of_its_checkpoint_in_all_its_files(
    tiny_model, images_dir, tmp_path, monkeypatch, certified_here
):
    model = tmp_path / "noob.safetensors"
    save_single_file(tiny_pipeline(), model)
    save_file(load_file(model) | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, model)
    trained = []
    train = dreambooth_nora.train

    def watched(accelerator, run, trainable, *more):
        trained.append(trainable.module.noising.scheduler)
        return train(accelerator, run, trainable, *more)

    monkeypatch.setattr(dreambooth_nora, "train", watched)
    monkeypatch.setattr(dreambooth_nora, "Sampling", partial(Sampling, num_inference_steps=2))
    monkeypatch.setattr(finishing, "CERTIFIED_STEPS", 2)
    given = flags(model, images_dir, tmp_path / "run", "--single_file_config", str(tiny_model))
    run = dreambooth_nora.main(parse_options(given))
    (scheduler,) = trained
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] == 0
    said = read_header(next((run.path / "kohya").iterdir())).metadata
    assert (said["modelspec.prediction_type"], said["ss_zero_terminal_snr"], said["ss_v2"]) == ("v", "True", "False")
    assert json.loads((run.path / "certificate.json").read_text())["passed"]
    base = json.loads((run.path / "provenance.json").read_text())["base_model"]
    assert (base["prediction_type"], base["rescale_betas_zero_snr"]) == ("v_prediction", True)
    card = (run.path / "README.md").read_text()
    assert (
        'pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"' in card
    )
    pipe = GenerationOptions(adapter=[str(run.path)]).source().load(torch.float32, "cpu")
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_a_wrong_target_ends_the_run_before_training_with_both_losses(tmp_path):
    given = "--heldout_image none --report_to none --prediction_type epsilon --rescale_betas_zero_snr False"
    options = parse_options([*given.split(), "--output_dir", str(tmp_path / "run")])
    with pytest.raises(InputError, match=r"predicts v_prediction, not epsilon: .* \d\.\d\d for epsilon and 0\.\d\d for v_pred"):
        dreambooth_nora.main(options)
    assert not (tmp_path / "run" / "samples" / "step-0000000").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output_dir", "FILE"], r"--output_dir must be a folder"),
        (["--cache_dir", "FILE/cache"], r"--cache_dir must be a folder"),
        (
            ["--with_prior_preservation", "--class_prompt", "x", "--class_data_dir", "FILE"],
            r"--class_data_dir must be a folder",
        ),
    ],
)
def test_folders_that_cannot_be_written_are_refused_before_a_model_is_loaded(
    tiny_model, images_dir, tmp_path, monkeypatch, more, message
):
    monkeypatch.setattr(dreambooth_nora, "load_base_model", None)
    file = tmp_path / "file"
    file.write_text("")
    given = [word.replace("FILE", str(file)) for word in more]
    with pytest.raises(InputError, match=message):
        dreambooth_nora.main(parse_options(flags(tiny_model, images_dir, tmp_path / "run", *given)))


def test_foreign_syntax_in_the_prompts_of_a_run_is_named(tiny_model, images_dir, tmp_path, monkeypatch, caplog):
    class Enough(Exception):
        """All that is looked at has been."""

    def stop(*_):
        raise Enough

    monkeypatch.setattr(dreambooth_nora, "open_run", stop)
    given = ("--instance_prompt", "sks (toy:1.2)", "--validation_prompt", "toy <lora:snow:0.8>")
    with pytest.raises(Enough):
        dreambooth_nora.main(parse_options([*flags(tiny_model, images_dir, tmp_path / "run"), *given]))
    assert "'(toy:1.2)'" in caplog.text
    assert "'<lora:snow:0.8>'" in caplog.text
    assert "starts from the base model alone" in caplog.text


def test_the_few_shot_trainers_folder_is_checked_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(fewshot_nora, "load_clip", None)
    (tmp_path / "file").write_text("")
    options = parse_fewshot_options(["--output_dir", str(tmp_path / "file"), "--report_to", "none"])
    with pytest.raises(InputError, match=r"--output_dir must be a folder"):
        fewshot_nora.main(options)


def test_a_missing_dataset_is_named_with_its_option(tmp_path):
    options = parse_fewshot_options(["--data_dir", str(tmp_path / "gone"), "--output_dir", str(tmp_path / "run")])
    with pytest.raises(InputError, match=r"--data_dir must be an existing folder or file, got '.*gone'"):
        fewshot_nora.main(options)


def test_both_flags_are_read_checked_and_recorded(capsys):
    options = parse_options(["--prediction_type", "v_prediction", "--rescale_betas_zero_snr"])
    assert options.model.source["prediction_type"] == options.to_dict()["model"]["prediction_type"] == "v_prediction"
    assert options.model.source["rescale_betas_zero_snr"] is True
    assert parse_options([]).model.rescale_betas_zero_snr is None
    assert parse_options(["--rescale_betas_zero_snr", "false"]).model.rescale_betas_zero_snr is False
    with pytest.raises(SystemExit):
        parse_options(["--prediction_type", "epsilon", "--rescale_betas_zero_snr"])
    assert "needs a model that predicts v" in capsys.readouterr().err
