"""Pictures and words in whole runs on a tiny random model: what reaches the loss, and what a run keeps."""

import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from pipelines.errors import InputError
from pipelines.pictures import read_settings
from pipelines.subject.base_model import encode_prompts, load_base_model
from pipelines.subject.doctor import examine
from pipelines.subject.encoding import Encoder
from pipelines.subject.generate import Sampling
from pipelines.subject.loss import DenoisingLoss
from training import dreambooth_nora
from training.engine.dry_run import DoesNotFitError
from training.options import SubjectOptions, parse_options
from training.options.data import SAMPLE_CLASS_PROMPT, SAMPLE_SUBJECT, DataOptions
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory
from training.subject import samples
from training.subject.preparing import Preparation, checked_pictures, record_report

FAST = "--rank 6 --inner_r 2 --target_modules to_v --max_train_steps 4 --train_batch_size 2 --lr_warmup_steps 1"
FAST += " --checkpointing_steps 2 --validation_steps 4 --heldout_image none --no_certify --learning_rate 0.01"
PRIOR = ["--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", "3"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Leave out the sample pictures and the export; class pictures are drawn in one step."""
    monkeypatch.setattr(dreambooth_nora, "Sampling", partial(Sampling, num_inference_steps=1))
    picture = Image.new("RGB", (16, 16))
    monkeypatch.setattr(samples, "generate", lambda pipeline, prompts, *_: [picture] * len(prompts))


@pytest.fixture
def trained(tiny_model, pictures_dir, tmp_path):
    """Runs the trainer with the flags given, in a folder of that name."""

    def run(name, *more, pictures=pictures_dir, prompt="sks toy"):
        AcceleratorState._reset_state(reset_partial_state=True)
        flags = [*FAST.split(), "--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures)]
        flags += ["--validation_prompt", "sks toy", "--output_dir", str(tmp_path / name)]
        flags += [] if prompt is None else ["--instance_prompt", prompt]
        return dreambooth_nora.main(parse_options([*flags, *more]))

    return run


@pytest.fixture
def batches(monkeypatch):
    """The batches that the loss is asked for, but for those of a rehearsal."""
    seen = []
    forward = DenoisingLoss.forward

    def remembered(loss, **batch):
        seen.append(batch)
        return forward(loss, **batch)

    monkeypatch.setattr(DenoisingLoss, "forward", remembered)
    return seen


@pytest.fixture(scope="module")
def baselines():
    """What is learned with the flags given, for the tests that compare with it."""
    return {}


def numbers(run):
    return load_file(list_checkpoints(run.checkpoints)[-1] / "trained.safetensors")


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture
def captioned(pictures_dir, tmp_path):
    """The three pictures, of three shapes, each with its own caption."""
    folder = tmp_path / "captioned"
    shutil.copytree(pictures_dir, folder)
    lines = [{"file_name": f"{place}.png", "text": f"caption {place}"} for place in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_each_picture_meets_its_own_caption_and_size_in_every_batch(trained, batches, captioned, tiny_model):
    trained("run", pictures=captioned, prompt=None)
    pipe = load_base_model(str(tiny_model))
    # By original height: 40 x 30, 30 x 40 and 33 x 33 pixels, in the order of the files.
    expected = {height: encode_prompts(pipe, [f"caption {place}"]) for place, height in enumerate((30, 40, 33))}
    assert len(batches) >= 4
    for batch in batches:
        for row, height in enumerate(batch["time_ids"][:, 0].int().tolist()):
            torch.testing.assert_close(batch["hidden"][row], expected[height].hidden[0])
            torch.testing.assert_close(batch["pooled"][row], expected[height].pooled[0])


def test_several_subjects_are_trained_at_once_each_by_its_name(trained, batches, pictures_dir, tmp_path):
    for place, name in enumerate(("red_cat", "dog")):
        (tmp_path / "many" / name).mkdir(parents=True)
        shutil.copy(pictures_dir / f"{place}.png", tmp_path / "many" / name / "0.png")
    options = DataOptions(str(tmp_path / "many"), "sks {subject}")
    assert options.subject_prompts() == ["sks dog", "sks red cat"]
    assert SubjectOptions(data=options).output.validation_prompt[:3] == ["sks dog", "sks red cat", "sks dog in the snow"]
    run = trained("run", "--train_text_encoder", pictures=tmp_path / "many", prompt="sks {subject}")
    words = {tuple(row[0].tolist()) for batch in batches for row in batch["tokens"]}
    assert len(words) == 2
    assert "sks dog" in (run.path / "README.md").read_text()
    assert "{subject}" not in (run.path / "README.md").read_text()


def test_one_of_several_subjects_pictures_is_held_out_by_folder_and_name(pictures_dir, tmp_path):
    for name in ("cat", "dog"):
        shutil.copytree(pictures_dir, tmp_path / name)
    division = checked_pictures(DataOptions(str(tmp_path), "sks {subject}", heldout_image="dog/1.png"), seed=0)
    assert [picture.path for picture in division.heldout] == [tmp_path / "dog" / "1.png"]
    assert len(division.train) == 5


def test_pictures_smaller_than_the_models_own_resolution_are_named_in_the_run(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    record_report(examine(SAMPLE_SUBJECT), 1024, run)
    entries = json.loads((run.path / "photos.json").read_text())["pictures"]
    assert [[finding["kind"] for finding in entry["findings"]] for entry in entries] == [["small"]] * 5


@pytest.mark.parametrize(
    ("base", "more"),
    [
        (["--resolution", "32"], ["--aspect_ratio_buckets", "auto"]),
        ([], ["--aspect_ratio_buckets", "16,24;24,16"]),
        ([], ["--no_center_crop"]),
        (["--no_center_crop"], ["--crops_per_picture", "2"]),
        ([], PRIOR),
        (PRIOR, ["--prior_loss_weight", "0.3"]),
    ],
    ids=" ".join,
)
def test_every_flag_of_the_data_changes_what_is_learned(trained, base, more, baselines):
    if str(base) not in baselines:
        baselines[str(base)] = numbers(trained("base", *base))
    assert not same(numbers(trained("changed", *base, *more)), baselines[str(base)])


EVERYTHING = [*PRIOR, "--no_center_crop", "--random_flip", "--aspect_ratio_buckets", "auto", "--gradient_accumulation_steps", "2"]


def test_a_run_with_all_of_it_stopped_and_resumed_is_the_run_that_was_not(trained, monkeypatch):
    whole = trained("whole", *EVERYTHING)
    at = dreambooth_nora.SubjectBatches.__call__

    def stop(batches, index):
        if index == 7:
            raise KeyboardInterrupt
        return at(batches, index)

    monkeypatch.setattr(dreambooth_nora.SubjectBatches, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        trained("halves", *EVERYTHING)
    monkeypatch.setattr(dreambooth_nora.SubjectBatches, "__call__", at)
    halves = trained("halves", *EVERYTHING, "--resume_from_checkpoint", "latest")
    path = "adapter/full/unet/adapter_model.safetensors"
    assert (whole.path / path).read_bytes() == (halves.path / path).read_bytes()


def test_workers_change_nothing(trained):
    alone, helped = (numbers(trained(name, *EVERYTHING, "--dataloader_num_workers", name)) for name in "02")
    assert same(alone, helped)


def test_runs_share_a_cache_and_learn_the_same_from_it(trained, tmp_path, monkeypatch):
    first = trained("first", "--cache_dir", str(tmp_path / "shared"))
    assert not (first.path / "cache").exists()

    def refuse(*_):
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(Encoder, "_moments", refuse)
    monkeypatch.setattr(Encoder, "_embeddings", refuse)
    assert same(numbers(first), numbers(trained("second", "--cache_dir", str(tmp_path / "shared"))))


def test_class_pictures_are_made_once_and_used_by_the_next_run(trained, tmp_path, batches):
    folder = tmp_path / "class"
    first = trained("first", *PRIOR, "--class_data_dir", str(folder))
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(made) == ["00000.png", "00001.png", "00002.png"]
    assert read_settings(folder / "00000.png")["prompt"] == "a toy"
    second = trained("second", *PRIOR, "--class_data_dir", str(folder))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    assert same(numbers(first), numbers(second))
    assert all(batch["weights"].tolist() == [2.0, 2.0, 2.0, 2.0] for batch in batches)
    # Class pictures are of the training size and not cropped.
    assert all(batch["time_ids"][1::2].int().tolist() == [[16, 16, 0, 0, 16, 16]] * 2 for batch in batches)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), (None, torch.float32)])
def test_class_pictures_are_those_of_the_stock_pipeline(trained, tiny_model, tmp_path, precision, dtype):
    more = [] if precision is None else ["--prior_generation_precision", precision]
    more += [*PRIOR, "--sample_batch_size", "1", "--class_data_dir", str(tmp_path / "class")]
    trained("run", *more, "--train_text_encoder")
    pipe = load_base_model(str(tiny_model), dtype)
    # The first two are drawn before there is an adapter, the last one after.
    for name in ("00001.png", "00002.png"):
        settings = read_settings(tmp_path / "class" / name)
        generator = torch.Generator().manual_seed(settings["seed"])
        picture = pipe("a toy", num_inference_steps=1, guidance_scale=4.0, height=16, width=16, generator=generator).images[0]
        assert picture.tobytes() == Image.open(tmp_path / "class" / name).tobytes()


def test_whether_it_fits_is_told_before_all_class_pictures_are_drawn(trained, tmp_path):
    with pytest.raises(DoesNotFitError):
        trained("run", *PRIOR, "--memory_limit_gb", "0.001")
    assert len(list((tmp_path / "run" / "class_pictures").iterdir())) == 2


def test_prior_preservation_without_a_class_is_refused_before_anything_is_loaded(trained, tmp_path):
    with pytest.raises(InputError, match=r"needs the class of the subject.*--class_prompt"):
        trained("run", "--with_prior_preservation")
    assert not (tmp_path / "run").exists()


def test_the_bundled_subject_has_a_class():
    assert DataOptions().class_prompt == SAMPLE_CLASS_PROMPT
    assert DataOptions("elsewhere", "sks dog").class_prompt is None


def test_sizes_that_do_not_fit_the_model_are_named(trained):
    with pytest.raises(InputError, match=r"multiples of 8 for this model, got '20,16'"):
        trained("run", "--aspect_ratio_buckets", "20,16")


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("num_class_images", 0, 1), ("crops_per_picture", 0, 1), ("sample_batch_size", 0, 1), ("prior_loss_weight", -0.5, 0),
     ("dataloader_num_workers", -1, 0)],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(name, value, least):
    with pytest.raises(InputError, match=rf"{name} must be at least {least}, got {value}"):
        DataOptions(**{name: value})


def test_a_run_names_what_it_does_not_use_and_what_is_cut(pipe, pictures_dir, tmp_path, caplog):
    folder = tmp_path / "10_sks toy"
    shutil.copytree(pictures_dir, folder)
    shutil.copy(folder / "0.png", folder / "0-masklabel.png")
    (folder / "1.caption").write_text("sks toy " * 60)
    data = DataOptions(str(folder), "sks toy", with_prior_preservation=True, class_prompt="a toy " * 60, heldout_image="none")
    options = SubjectOptions(data=data)
    run = RunDirectory.create(tmp_path / "run", {})
    Preparation(pipe, None, options, Sampling(resolution=16), run, Accelerator()).encode(checked_pictures(data, seed=0))
    report = json.loads((run.path / "photos.json").read_text())
    uses = {Path(entry["path"]).name: entry["use"] for entry in report["folder"]["files"]}
    assert uses == {**dict.fromkeys(("0.png", "1.png", "2.png"), "image"), "0-masklabel.png": "mask", "1.caption": "caption"}
    cut = {each["role"]: each for each in report["long_prompts"]}
    # The tiny model's tokenizer takes so few that the usual validation prompts are cut too.
    assert set(cut) == {"caption", "class prompt", "validation prompt"}
    assert cut["caption"]["images"] == ["1.png"]
    sentences = [each["summary"] for each in cut.values()]
    for words in ("'0-masklabel.png'. They are masks", "Repeats are not honoured", "1 from NAME.caption", *sentences):
        assert words in caplog.text


def test_class_images_that_are_given_are_accounted_for(tmp_path, pictures_dir):
    shutil.copytree(pictures_dir, tmp_path / "reg" / "1_toy")
    (tmp_path / "reg" / "1_toy" / "0.txt").write_text("a toy")
    options = DataOptions(str(pictures_dir), "sks toy", with_prior_preservation=True, class_prompt="a toy", num_class_images=2)
    for name, check in (("reg", pytest.raises(InputError, match=r"as in '.*1_toy'")), ("reg/1_toy", nullcontext())):
        options.class_data_dir = str(tmp_path / name)
        with check:
            report = checked_pictures(options, seed=0).report
    kinds = [entry["kind"] for entry in report.to_dict()["class_folder"]["files"]]
    assert sorted(kinds) == ["", "", "class_caption", "spare"]
