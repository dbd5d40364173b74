"""Images from prompts: equal settings give equal bytes, and the files contain the settings."""

import dataclasses
from contextlib import nullcontext

import diffusers
import numpy as np
import pytest
import torch
from command_line import exit_status
from PIL import Image
from shared_cases import case_folder
from tiny_pipeline import tiny_pipeline
from transformers import HfArgumentParser

from pipelines.adapter_method import trained_parameters
from pipelines.adapter_options import AdapterOptions
from pipelines.deprecated_flags import current_arguments
from pipelines.errors import InputError
from pipelines.images import labelled_grid, read_settings, save_image
from pipelines.subject import adapters
from pipelines.subject.generate import SHEET_PROMPTS, GenerationOptions, Sampling, contact_sheet, generate, main
from pipelines.subject.generation_request import SAMPLERS


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory):
    """A run directory with a LoRA that changes images visibly."""
    folder = tmp_path_factory.mktemp("run")
    pipe, options = tiny_pipeline(), AdapterOptions(method="lora")
    components = adapters.attach(pipe, options)
    with torch.no_grad():
        for parameter in trained_parameters(components):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    adapters.save_everywhere(pipe, components, folder, "subject")
    return folder


def options(tiny_model, folder, **changes):
    return GenerationOptions(
        pretrained_model_name_or_path=str(tiny_model),
        output_dir=str(folder),
        num_inference_steps=2,
        **{"prompt": ["a star"], **changes},
    )


def first_pixels(tiny_model, folder, **changes):
    """The first image's pixels."""
    return np.asarray(Image.open(main(options(tiny_model, folder, **changes))[0])).astype(int)


def test_the_same_settings_give_the_same_bytes(tiny_model, tmp_path):
    first, second = (main(options(tiny_model, tmp_path / name))[0] for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_an_image_does_not_depend_on_the_others_in_its_batch(pipe):
    sampling = Sampling(num_inference_steps=2)
    alone = next(generate(pipe, ["snow"], [8], sampling))
    among = list(generate(pipe, ["a star", "snow", "sea"], [7, 8, 9], sampling))[1]
    assert np.abs(np.asarray(alone).astype(int) - np.asarray(among)).max() <= 1


def test_an_image_can_be_reproduced_from_its_settings(tiny_model, lora_dir, tmp_path):
    file = main(options(tiny_model, tmp_path / "a", adapter=[str(lora_dir)], scale=[0.7], negative_prompt="fog", seed=5))[0]
    settings = read_settings(file)
    assert settings["sampler"] == "EulerDiscrete"
    again = GenerationOptions(
        prompt=[settings["prompt"]],
        negative_prompt=settings["negative_prompt"],
        seed=settings["seed"],
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance_scale"],
        resolution=settings["resolution"],
        pretrained_model_name_or_path=settings["model"],
        adapter=[adapter["path"] for adapter in settings["adapters"]],
        scale=[adapter["scale"] for adapter in settings["adapters"]],
        output_dir=str(tmp_path / "b"),
    )
    assert main(again)[0].read_bytes() == file.read_bytes()


def test_an_image_has_its_settings_in_a1111s_format(tiny_model, tmp_path):
    file = main(options(tiny_model, tmp_path, negative_prompt="fog", seed=5))[0]
    lines = Image.open(file).info["parameters"].splitlines()
    assert lines[:2] == ["a star", "Negative prompt: fog"]
    assert "Steps: 2, Sampler: EulerDiscrete, CFG scale: 4.0, Seed: 5, Size: 16x16, Model: tiny" in lines[2]


def test_scale_goes_from_the_base_model_to_the_adapter(tiny_model, lora_dir, tmp_path):
    base = first_pixels(tiny_model, tmp_path / "base")
    off, half, full = (first_pixels(tiny_model, tmp_path / str(s), adapter=[str(lora_dir)], scale=[s]) for s in (0.0, 0.5, 1.0))
    assert np.abs(off - base).max() <= 1
    assert np.abs(full - base).max() > np.abs(half - base).max() * 0.5 > 1


def test_two_adapters_of_half_scale_are_one(tiny_model, lora_dir, tmp_path):
    one = first_pixels(tiny_model, tmp_path / "one", adapter=[str(lora_dir)])
    two = first_pixels(
        tiny_model, tmp_path / "two", adapter=[str(lora_dir), str(lora_dir / "adapter" / "full")], scale=[0.5, 0.5]
    )
    assert np.abs(one - two).max() <= 1


def test_a_negative_prompt_changes_the_image(tiny_model, tmp_path):
    assert (
        np.abs(first_pixels(tiny_model, tmp_path / "a") - first_pixels(tiny_model, tmp_path / "b", negative_prompt="fog")).max()
        > 0
    )


def test_prompts_are_read_from_a_file_and_images_put_into_a_grid(tiny_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a star\n\nsnow\n  sea  \n")
    sheet = tmp_path / "sheets" / "grid.png"
    files = main(
        options(tiny_model, tmp_path, prompt=None, prompts_file=str(tmp_path / "prompts.txt"), grid=str(sheet), columns=2)
    )
    assert [read_settings(file)["prompt"] for file in files] == ["a star", "snow", "sea"]
    assert [read_settings(file)["seed"] for file in files] == [0, 1, 2]
    assert Image.open(sheet).size == (32, 32)


def test_the_byte_order_mark_of_a_prompts_file_is_removed(tmp_path):
    (tmp_path / "prompts.txt").write_text("a café\na star\n", encoding="utf-8-sig")
    assert GenerationOptions(prompts_file=str(tmp_path / "prompts.txt")).prompts() == ["a café", "a star"]


@pytest.mark.parametrize(("name", "said"), [("bom.txt", None), ("ansi.txt", "cp1252"), ("utf16.txt", "is UTF-16 text")])
def test_prompts_in_another_encoding_are_refused_with_the_remedy(name, said):
    given = GenerationOptions(prompts_file=str(case_folder("prompts-file-encodings") / name))
    with pytest.raises(InputError, match=rf"{said}.*Save it as UTF-8") if said else nullcontext():
        assert not any("\ufeff" in prompt for prompt in given.prompts())


def test_a_prompt_in_a1111s_syntax_is_used_as_text_with_a_warning(tiny_model, tmp_path, caplog):
    file = main(options(tiny_model, tmp_path, prompt=["a star <lora:toy:0.8>"], negative_prompt="(fog:1.4)"))[0]
    assert read_settings(file)["prompt"] == "a star <lora:toy:0.8>"
    assert "--adapter PATH/toy.safetensors --scale 0.8" in caplog.text
    assert "'(fog:1.4)'" in caplog.text


def test_guidance_is_rescaled_as_stock_diffusers_does(pipe):
    sampling = Sampling(num_inference_steps=2, guidance_scale=7.5, guidance_rescale=0.7, resolution=16)
    ours = np.asarray(next(generate(pipe, ["a star"], [3], sampling)))
    stock = pipe(
        "a star", num_inference_steps=2, guidance_scale=7.5, guidance_rescale=0.7, generator=torch.Generator().manual_seed(3)
    ).images[0]
    assert np.array_equal(ours, np.asarray(stock))
    plain = np.asarray(next(generate(pipe, ["a star"], [3], dataclasses.replace(sampling, guidance_rescale=0.0))))
    assert not np.array_equal(ours, plain)


def test_without_a_prompt_the_built_in_models_prompts_are_used(pipe):
    assert GenerationOptions().prompts() == list(SHEET_PROMPTS)
    assert contact_sheet(pipe, SHEET_PROMPTS, steps=1).size == (64, 64)


def test_images_of_the_same_prompt_have_different_seeds(tiny_model, tmp_path):
    files = main(options(tiny_model, tmp_path, num_images_per_prompt=2))
    assert [read_settings(file)["seed"] for file in files] == [0, 1]
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts_file": "x"}, r"--prompt or --prompts_file, not both"),
        ({"scale": [1.0, 1.0]}, r"scale must be one value or one for each of 0 adapters, got 2"),
        ({"num_images_per_prompt": 0}, r"num_images_per_prompt must be at least 1, got 0"),
        ({"columns": 0}, r"columns must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
        ({"num_inference_steps": 0}, r"num_inference_steps must be at least 1, got 0"),
        ({"guidance_scale": -1.0}, r"guidance_scale must be at least 0, got -1.0"),
        ({"resolution": 12}, r"resolution must be a positive multiple of 8, got 12"),
        ({"prompt": None, "prompts_file": "nowhere.txt"}, r"prompts_file 'nowhere.txt' does not exist"),
    ],
)
def test_a_wrong_setting_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        main(GenerationOptions(**{"prompt": ["a star"], **changes}))


def test_an_empty_file_of_prompts_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match=r"empty\.txt' holds no prompt"):
        GenerationOptions(prompts_file=str(tmp_path / "empty.txt")).prompts()


def test_an_image_without_settings_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(InputError, match=r"plain\.png' holds no generation settings"):
        read_settings(tmp_path / "plain.png")


def test_a_labelled_grid_has_a_cell_for_every_label_and_enlarges_small_images():
    image = Image.new("RGB", (16, 16), "red")
    sheet = labelled_grid([("before", [image] * 2), ("after", [image])], ["a star", "snow"])
    red = np.asarray(sheet)[..., 1] == 0
    assert sheet.width > 2 * 192
    assert red.sum() > 3 * 190 * 190


def test_the_command_writes_the_image_of_its_python_function(tiny_model, lora_dir, tmp_path, monkeypatch):
    model = ("--pretrained_model_name_or_path", str(tiny_model))
    given = ("--adapter", str(lora_dir), "--scale", "0.5", "--num_inference_steps", "2", "--output_dir", "made", "--seed", "3")
    monkeypatch.chdir(tmp_path)
    assert exit_status("pipelines.subject.generate", "--prompt", "a star", *model, *given) == 0
    expected = main(options(tiny_model, tmp_path / "b", adapter=[str(lora_dir)], scale=[0.5], seed=3))[0]
    assert (tmp_path / "made" / "00003.png").read_bytes() == expected.read_bytes()


def test_a_wrong_setting_ends_the_command_with_its_message(capsys):
    assert exit_status("pipelines.subject.generate", "--prompts_file", "nowhere.txt") == 2
    assert "The prompts_file 'nowhere.txt' does not exist" in capsys.readouterr().err.splitlines()[-1]


def test_settings_of_earlier_versions_are_read_under_current_keys(tmp_path):
    settings = {
        "prompt": "a star", "negative_prompt": "", "seed": 0, "num_inference_steps": 2, "guidance_scale": 1.0, "sampler": "Euler",
        "model": "mini", "adapters": [{"path": "runs/a", "strength": 0.5}],
    }  # fmt: skip
    save_image(Image.new("RGB", (4, 4)), tmp_path / "old.png", settings)
    assert read_settings(tmp_path / "old.png")["adapters"] == [{"path": "runs/a", "scale": 0.5}]


def test_the_deprecated_flag_for_the_scale_is_read(caplog):
    parser = HfArgumentParser(GenerationOptions, allow_abbrev=False)
    assert current_arguments(["--adapter", "a", "--strength", "0.5"], parser) == ["--adapter", "a", "--scale", "0.5"]
    assert "--strength is deprecated; use --scale." in caplog.text


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_step_of_each_sampler_predicts_the_latents_to_which_known_noise_was_added(pipe, monkeypatch, sampler, kind):
    name, changes = SAMPLERS[sampler]
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changes, prediction_type=kind)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    clean, told = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), []

    def perfect(_, sample, *args, **named):
        """What a UNet predicts that knows the clean latents x: with z = c x + d e, e = (z - c x) / d and v = c e - d x."""
        if hasattr(scheduler, "sigmas"):
            sigma = scheduler.sigmas[scheduler.step_index or 0]
            c, d = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        else:
            signal = scheduler.alphas_cumprod[args[0]]
            c, d = signal.sqrt(), (1 - signal).sqrt()
        noise = (sample - c * clean) / d
        return ({"epsilon": noise, "v_prediction": c * noise - d * clean}[kind],)

    monkeypatch.setattr(type(pipe.unet), "forward", perfect)
    next(generate(pipe, ["a star"], [0], Sampling(5), on_step=lambda _, latents: told.append(latents)))
    assert len(told) == 5
    for latents in told:
        torch.testing.assert_close(latents, clean, rtol=0, atol=2e-3)
    assert "step" not in vars(scheduler)
