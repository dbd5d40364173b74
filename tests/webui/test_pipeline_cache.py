"""The cache generates the images of the command line, combines and merges adapters exactly, and cancels within a step."""

import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from small_runs import small_run

from nora_vision.files import read_header, read_tensors, tensor_hash, write_tensors
from pipelines.errors import InputError
from pipelines.images import read_settings
from pipelines.subject.adapters import load_adapter
from pipelines.subject.generate import GenerationOptions, main
from pipelines.subject.generation_request import (
    SAMPLERS,
    BlockScales,
    GeneratedImage,
    GenerationProgress,
    GenerationRequest,
    ScaledAdapter,
)
from pipelines.subject.pipeline_cache import MAX_MODELS, PipelineCache
from training.runs.naming import set_title
from webui.generation import (
    MAX_IMAGES_KEPT,
    GeneratedImages,
    delete_image,
    find_adapter,
    others,
    request_for,
    steps_of,
    toggle_favourite,
)
from webui.inference_worker import WORKER
from webui.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    for run_id, method in (("first", "lora"), ("second-nora", "nora"), ("third-dora", "dora")):
        small_run(folder / "runs", tiny_model, run_id, method)
    return Workspace(folder / "runs", folder / "sets", is_local=True)


@pytest.fixture(scope="module")
def cache():
    return PipelineCache()


def asked(workspace, *references, scales=None, **changes):
    """A request with the adapters of these references."""
    scales = scales or [1.0] * len(references)
    adapters = [(reference, scale, None) for reference, scale in zip(references, scales, strict=True)]
    return request_for(workspace, adapters, **{"prompt": "a star", "seed": 5, "steps": 4, **changes})


def with_adapters(*adapters):
    return GenerationRequest(prompt="a star", adapters=adapters, seed=5, steps=4)


def events_of(cache, wanted):
    events = []
    cache.generate(wanted, events.append)
    return events


def generated(cache, wanted):
    return [event for event in events_of(cache, wanted) if isinstance(event, GeneratedImage)]


def pixels(image):
    return np.asarray(image).astype(int)


def one(cache, wanted):
    return pixels(generated(cache, wanted)[0].image)


def apart(first, second):
    return np.abs(first - second).max()


def commanded(tiny_model, tmp_path, adapter_paths, scales, **changes):
    given = {"prompt": ["a star"], "seed": 5, "num_inference_steps": 4, "output_dir": str(tmp_path / "commanded"), **changes}
    options = GenerationOptions(
        pretrained_model_name_or_path=str(tiny_model), adapter=[str(p) for p in adapter_paths], scale=scales, **given
    )
    return pixels(Image.open(main(options)[0]))


@pytest.mark.parametrize("references", [["first@4"], ["second-nora@4"], ["first@2"], ["first@4", "second-nora@2"]])
def test_the_command_line_generates_the_same_pixels(cache, workspace, tiny_model, tmp_path, references):
    scales = [0.7, 0.4][: len(references)]
    wanted = asked(workspace, *references, scales=scales)
    paths = [each.path for each in wanted.adapters]
    assert apart(one(cache, wanted), commanded(tiny_model, tmp_path, paths, scales)) == 0


def test_a_seed_gives_the_same_image_whatever_else_is_generated(cache, workspace):
    alone = one(cache, asked(workspace, "first@4"))
    generated(cache, asked(workspace, "second-nora@4", scales=[0.3]))
    among = generated(cache, asked(workspace, "first@4", seed=4, count=3))
    assert apart(alone, pixels(among[1].image)) == 0
    assert [each.settings["seed"] for each in among] == [4, 5, 6]


def test_scale_zero_and_no_adapter_are_the_base_model(cache, workspace, tiny_model, tmp_path):
    base = commanded(tiny_model, tmp_path, [], [1.0])
    of_run = asked(workspace, "first@4", scales=[0.0], with_base=True)
    adapted, beside = generated(cache, of_run)
    assert apart(base, pixels(adapted.image)) == apart(base, pixels(beside.image)) == 0
    assert beside.settings["adapters"] == []
    full = generated(cache, asked(workspace, "first@4", with_base=True))
    assert apart(base, pixels(full[1].image)) == 0
    assert apart(base, pixels(full[0].image)) > 1


def test_progress_counts_every_step_to_the_end(cache, workspace):
    events = events_of(cache, asked(workspace, "first@4", seed=1, count=2))
    told = [event for event in events if isinstance(event, GenerationProgress)]
    assert [event.done for event in told if "Image" in event.words] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert {event.total for event in told} == {8}
    assert [event.preview is not None for event in told if "Image" in event.words] == [False, True, True, True, False] * 2


@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_error_of_the_report_stops_at_that_step_and_does_not_change_the_next_image(cache, workspace, monkeypatch, step):
    expected, done = one(cache, asked(workspace, "first@4")), []
    unet = next(iter(cache._models.values())).pipeline.unet
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda *args, **named: (done.append(1), forward(*args, **named))[1])

    def report(event):
        if "Image" in event.words and event.done >= step:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        cache.generate(asked(workspace, "first@4", steps=100), report)
    assert len(done) == step
    monkeypatch.undo()
    assert apart(one(cache, asked(workspace, "first@4")), expected) == 0


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_merged_file_gives_the_same_images_in_stock_diffusers(cache, workspace, tiny_model, tmp_path, layout):
    wanted = asked(workspace, "first@4", "second-nora@2", scales=[0.4, -0.3])
    file = cache.merge(wanted, tmp_path / "mix.safetensors", layout)
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_model, add_watermarker=False)
    stock.load_lora_weights(file.parent, weight_name=file.name)
    generator = torch.Generator().manual_seed(5)
    image = stock("a star", num_inference_steps=4, guidance_scale=4.0, generator=generator).images[0]
    expected = one(cache, wanted)
    assert apart(pixels(image), expected) <= 1
    assert apart(one(cache, asked(workspace, "first@4", scales=[0.0])), expected) > 4


def test_the_scale_of_a_dora_comes_with_a_warning(cache, workspace):
    def warnings(reference, scale):
        return [each for event in events_of(cache, asked(workspace, reference, scales=[scale])) for each in event_warnings(event)]

    def event_warnings(event):
        return event.warnings if isinstance(event, GenerationProgress) else ()

    (warning,) = warnings("third-dora@4", 0.5)
    assert "a star, step 4: It has trained norms of rows, which have no scale: at 0.5" in warning
    assert warnings("third-dora@4", 1.0) == warnings("first@4", 0.5) == []


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_downloaded_file_has_the_present_title_of_its_run_and_the_tensors_of_the_exported_file(workspace, tmp_path, layout):
    run, path = workspace.run("first"), tmp_path / "duck.safetensors"
    (exported,) = (run.path / layout).glob("*.safetensors")
    set_title(run.path, "Rubber duck")
    try:
        WORKER.call("adapter_file", workspace, find_adapter(workspace, "first@4"), layout, path)
    finally:
        set_title(run.path, "")
    metadata = read_header(path).metadata
    assert (metadata["modelspec.title"], metadata["modelspec.trigger_phrase"]) == ("Rubber duck, step 4", "a star")
    assert metadata.get("ss_output_name") == ("Rubber-duck-step4" if layout == "kohya" else None)
    assert tensor_hash(read_tensors(path)) == tensor_hash(read_tensors(exported))


def test_a_dora_cannot_be_merged(cache, workspace, tmp_path):
    with pytest.raises(InputError, match=r"cannot be merged.*has a DoRA, which cannot be added.*Leave the DoRA out"):
        cache.merge(asked(workspace, "first@4", "third-dora@4"), tmp_path / "mix.safetensors", "diffusers")
    assert cache.merge(asked(workspace, "third-dora@4"), tmp_path / "dora.safetensors", "diffusers").is_file()


def test_a_file_with_norms_can_be_used_and_combined_but_not_merged(cache, workspace, tmp_path):
    layer, width = "mid_block.attentions.0", 16
    tensors = {f"lora_unet_{layer.replace('.', '_')}_transformer_blocks_0_norm1.w_norm": torch.full((width,), 2.0)}
    tensors |= {
        f"unet.{layer}.proj_in.lora_A.weight": torch.ones(2, width),
        f"unet.{layer}.proj_in.lora_B.weight": torch.ones(width, 2),
    }
    write_tensors(tmp_path / "norms.safetensors", tensors)
    part = ScaledAdapter(reference="file@norms", name="norms", path=tmp_path / "norms.safetensors", scale=0.5)
    alone = one(cache, asked(workspace, "first@4"))
    mix = with_adapters(*asked(workspace, "first@4").adapters, part)
    assert apart(one(cache, mix), alone) > 1
    with pytest.raises(InputError, match=r"cannot be merged.*norm1 has a change of a bias or a norm.*Leave this adapter out"):
        cache.merge(mix, tmp_path / "mix.safetensors", "kohya")
    assert apart(one(cache, asked(workspace, "first@4")), alone) == 0


def test_adapters_of_two_base_models_are_not_mixed(workspace):
    first, second = (find_adapter(workspace, name) for name in ("first@4", "second-nora@4"))
    other = second.model_copy(update={"model": {"pretrained_model_name_or_path": "stabilityai/sdxl"}})
    with pytest.raises(
        InputError, match=r"a star, step 4 \(of tiny\) and a star, step 4 \(of stabilityai/sdxl\).*different base models"
    ):
        with_adapters(first, other)


def test_a_file_for_another_model_is_refused_and_the_cache_stays_usable(cache, workspace, tmp_path):
    expected = one(cache, asked(workspace, "first@4"))
    built_in = ScaledAdapter(reference="file@x", name="<b>other</b>", path=tmp_path / "other.safetensors")
    torch_file = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(4, 999)}
    torch_file |= {"unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(999, 4)}
    write_tensors(built_in.path, torch_file)
    with pytest.raises(InputError, match=r"<b>other</b> does not fit this base model"):
        one(cache, with_adapters(built_in))
    one_with_run = asked(workspace, "first@4").adapters
    with pytest.raises(InputError, match=r"does not fit this base model"):
        one(cache, with_adapters(*one_with_run, built_in))
    assert apart(one(cache, asked(workspace, "first@4")), expected) == 0


def test_an_adapter_whose_file_changed_is_loaded_again(cache, workspace, tiny_model, tmp_path):
    changing = Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    small_run(changing.runs, tiny_model, "same")
    before = one(cache, asked(changing, "same@4"))
    shutil.rmtree(changing.runs / "same")
    small_run(changing.runs, tiny_model, "same", strength=1.0)
    assert apart(one(cache, asked(changing, "same@4")), before) > 1


def test_the_number_of_loaded_models_is_limited(workspace, tiny_model, tmp_path):
    cache = PipelineCache()
    for name in ("a", "b", "c"):
        shutil.copytree(tiny_model, tmp_path / name)
        small_run(tmp_path / "runs", tmp_path / name, f"run-{name}")
        own = Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
        generated(cache, asked(own, f"run-{name}@4", steps=1))
    assert len(cache._models) == MAX_MODELS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, r"prompt is empty"),
        ({"prompt": "a" * 3000}, r"Prompt must have at most 2000 characters, got 3000"),
        ({"count": 0}, r"Images must be in \[1, 16\], got 0. Choose a value"),
        ({"seed": -1}, r"Seed must be in \[0, 4294967295\], got -1"),
        ({"steps": 500}, r"Steps must be in \[1, 150\], got 500"),
        ({"steps": None}, r"Steps must be a whole number, got nothing"),
        ({"seed": 1.5}, r"Seed must be a whole number, got 1.5"),
        ({"guidance_scale": float("nan")}, r"Guidance scale must be a number, got nan"),
        ({"prompt": 5}, r"Prompt must be text, got 5"),
        ({"size": (64, 100)}, r"Width and height must be multiples of 8 in \[64, 2048\], got 64 x 100"),
        ({"size": "wide"}, r"Image size must be a width and a height, got 'wide'"),
        ({"sampler": "Magic"}, r"Sampler must be one of Euler, .*got 'Magic'"),
    ],
)
def test_an_invalid_request_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        GenerationRequest(**{"prompt": "a star", **changes})


def test_a_scale_out_of_range_and_an_adapter_twice_are_refused(workspace):
    with pytest.raises(InputError, match=r"Adapter weight must be a number, got nan"):
        asked(workspace, "first@4", scales=[float("nan")])
    with pytest.raises(InputError, match=r"a star, step 4 is chosen twice"):
        asked(workspace, "first@4", "first@4")


def test_the_recommended_step_is_the_default_and_every_saved_one_can_be_chosen(workspace):
    steps = steps_of(workspace.run("first"))
    assert steps.choices == [("Step 2 of 4 (recommended)", 2), ("Step 4 of 4 (last)", 4)]
    assert steps.chosen == 2
    assert [reference for _, reference in others(workspace, "first")] == ["third-dora@2", "second-nora@2"]


@pytest.mark.parametrize("reference", ["first@99", "first@../..", "../first@2", "nobody@2", "file@../../x", "first", None, "@"])
def test_an_unknown_reference_is_refused(workspace, reference):
    with pytest.raises(InputError):
        find_adapter(workspace, reference)


def test_generated_images_contain_their_settings_and_only_the_newest_are_kept(cache, workspace, tmp_path):
    kept = GeneratedImages(tmp_path / "drawn")
    made = generated(cache, asked(workspace, "first@2", scales=[0.5]))[0]
    path = kept.add(made.image, made.settings)
    settings = read_settings(path)
    assert (settings["prompt"], settings["seed"], settings["num_inference_steps"]) == ("a star", 5, 4)
    assert settings["adapters"] == [
        {"name": "a star, step 2", "reference": "first@2", "scale": 0.5, "blocks": dict(BlockScales())}
    ]
    assert settings["model"] == "tiny"
    for _ in range(MAX_IMAGES_KEPT):
        kept.add(made.image, made.settings)
    assert len(kept.newest()) == MAX_IMAGES_KEPT
    assert path not in kept.newest()
    favourite = kept.newest()[-1]
    toggle_favourite(favourite)
    kept.add(made.image, made.settings)
    kept.add(made.image, made.settings)
    assert kept.newest(only_favourites=True) == [favourite]
    delete_image(favourite)
    assert kept.newest(only_favourites=True) == []
    for name in ("../x.png", path.name, favourite.name, "", None):
        with pytest.raises(InputError, match=r"no longer exists"):
            kept.find(name)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_generates_what_stock_diffusers_does(cache, workspace, tiny_model, sampler):
    kind, changes = SAMPLERS[sampler]
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_model, add_watermarker=False)
    stock.scheduler = getattr(diffusers, kind).from_config(stock.scheduler.config, **changes)
    generator = torch.Generator().manual_seed(5)
    image = stock("a star", num_inference_steps=4, guidance_scale=4.0, width=72, height=64, generator=generator).images[0]
    (made,) = generated(cache, asked(workspace, "first@4", scales=[0.0], sampler=sampler, size=(72, 64)))
    assert apart(pixels(made.image), pixels(image)) <= 1
    assert made.settings["sampler"] == sampler
    assert made.settings["resolution"] == (72, 64)


@pytest.mark.parametrize("reference", ["first@4", "second-nora@4"])
def test_weights_of_blocks_are_those_of_diffusers(cache, workspace, tiny_model, reference):
    blocks = BlockScales(down=0.3, mid=0.0, up=1.4)
    found = find_adapter(workspace, reference, 0.8, blocks)
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_model, add_watermarker=False)
    load_adapter(stock, found.path, "a")
    stock.set_adapters("a", {"unet": {"down": 0.8 * 0.3, "mid": 0.0, "up": 0.8 * 1.4}})
    generator = torch.Generator().manual_seed(5)
    image = stock("a star", num_inference_steps=4, guidance_scale=4.0, generator=generator).images[0]
    blocked = one(cache, with_adapters(found))
    assert apart(blocked, pixels(image)) <= 1
    # The next request has no trace of it.
    assert apart(one(cache, asked(workspace, reference, scales=[0.8])), blocked) > 1
    with pytest.raises(InputError, match=r"one weight for each adapter\. Set the weights of the blocks to 1"):
        cache.merge(with_adapters(found), workspace.sets / "mix.safetensors", "kohya")
