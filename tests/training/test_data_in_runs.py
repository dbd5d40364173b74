"""Images and words of the subject recipe on a tiny random model: what the batches hold, and what a run keeps."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from subject_runs import EVERYTHING, PRIOR, are_equal

from pipelines.errors import InputError
from pipelines.images import read_settings
from pipelines.subject.base_model import encode_prompts, load_base_model
from pipelines.subject.encoding import LatentEncoder
from pipelines.subject.generate import Sampling
from pipelines.subject.image_checks import check_images
from training.engine.dry_run import DoesNotFitError
from training.engine.prefetch import ProcessBatches
from training.options import SubjectOptions
from training.options.data import SAMPLE_CLASS_PROMPT, SAMPLE_SUBJECT, DataOptions
from training.runs.run import RunDirectory
from training.subject.model_card import model_card
from training.subject.preparing import Preparation, checked_images, record_report


@pytest.fixture
def captioned(images_dir, tmp_path):
    """The three images, of three shapes, each with its own caption."""
    folder = tmp_path / "captioned"
    shutil.copytree(images_dir, folder)
    lines = [{"file_name": f"{place}.png", "text": f"caption {place}"} for place in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_each_image_has_its_own_caption_and_size_in_every_batch(trainer, captioned, tmp_path):
    prepared = trainer.prepare(tmp_path / "run", images=captioned, prompt=None)
    pipe = load_base_model(str(trainer.model))
    # By original height: 40 x 30, 30 x 40 and 33 x 33 pixels, in the order of the files.
    expected = {height: encode_prompts(pipe, [f"caption {place}"]) for place, height in enumerate((30, 40, 33))}
    for batch in prepared.batches():
        for row, height in enumerate(batch["time_ids"][:, 0].int().tolist()):
            torch.testing.assert_close(batch["hidden"][row], expected[height].hidden[0])
            torch.testing.assert_close(batch["pooled"][row], expected[height].pooled[0])


def test_several_subjects_are_trained_at_once_each_by_its_name(trainer, images_dir, tmp_path):
    for place, name in enumerate(("red_cat", "dog")):
        (tmp_path / "many" / name).mkdir(parents=True)
        shutil.copy(images_dir / f"{place}.png", tmp_path / "many" / name / "0.png")
    options = DataOptions(str(tmp_path / "many"), "sks {subject}")
    assert options.subject_prompts() == ["sks dog", "sks red cat"]
    assert SubjectOptions(data=options).output.validation_prompt[:3] == ["sks dog", "sks red cat", "sks dog in the snow"]
    given = {"images": tmp_path / "many", "prompt": "sks {subject}"}
    prepared = trainer.prepare(tmp_path / "run", "--train_text_encoder", **given)
    words = {tuple(row[0].tolist()) for batch in prepared.batches() for row in batch["tokens"]}
    assert len(words) == 2
    prepared.run.update_status(num_trainable_parameters=1, seconds=1.0)
    card = model_card(prepared.run, trainer.options(tmp_path / "run", **given), 2)
    assert "sks dog" in card
    assert "{subject}" not in card


def test_one_of_several_subjects_images_is_held_out_by_folder_and_name(images_dir, tmp_path):
    for name in ("cat", "dog"):
        shutil.copytree(images_dir, tmp_path / name)
    division = checked_images(DataOptions(str(tmp_path), "sks {subject}", heldout_image="dog/1.png"), seed=0)
    assert [image.path for image in division.heldout] == [tmp_path / "dog" / "1.png"]
    assert len(division.train) == 5


def test_images_smaller_than_the_models_own_resolution_are_named_in_the_run(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    record_report(check_images(SAMPLE_SUBJECT), 1024, run)
    entries = json.loads((run.path / "photos.json").read_text())["pictures"]
    assert [[finding["kind"] for finding in entry["findings"]] for entry in entries] == [["small"]] * 5


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ("", {(16, 16)}),
        ("--resolution 24", {(24, 24)}),
        ("--aspect_ratio_buckets 16,24;24,16", {(16, 24), (24, 16)}),
        ("--resolution 32 --aspect_ratio_buckets auto", {(28, 36), (36, 28), (32, 32)}),
    ],
)
def test_batches_have_the_sizes_of_the_flags(trainer, plain, tmp_path, flags, sizes):
    prepared = trainer.prepare(tmp_path / "run", *flags.split()) if flags else plain
    # The tiny model's autoencoder halves images once.
    found = {tuple(2 * side for side in batch["latents"].shape[2:]) for batch in prepared.batches(12)}
    assert found == sizes


def crops(prepared):
    """How many different crops there are of the images in 24 batches, by the images' heights."""
    rows = {tuple(row.int().tolist()) for batch in prepared.batches(24) for row in batch["time_ids"]}
    return {height: sum(row[0] == height for row in rows) for height in {row[0] for row in rows}}


def test_crops_are_central_or_as_many_as_the_flag_sets(trainer, plain, tmp_path):
    assert set(crops(plain).values()) == {1}
    several = trainer.prepare(tmp_path / "several", "--no_center_crop", "--crops_per_image", "2")
    # The square image is not cropped, and those of one shape may be drawn at one place twice.
    counts = crops(several)
    assert counts[33] == 1
    assert max(counts.values()) == 2


def test_size_conditioning_is_the_original_size_or_the_target_size(trainer, plain, tmp_path):
    target = trainer.prepare(tmp_path / "run", "--size_conditioning", "target")
    told = [{tuple(row.int().tolist()) for batch in each.batches() for row in batch["time_ids"]} for each in (plain, target)]
    assert {row[:2] for row in told[0]} == {(30, 40), (40, 30), (33, 33)}
    assert told[1] == {(16, 16, 0, 0, 16, 16)}


def test_random_flip_mirrors_images_at_random(trainer, plain, tmp_path):
    flipped = trainer.prepare(tmp_path / "run", "--random_flip")
    changed = [
        not torch.equal(*rows)
        for ours, theirs in zip(flipped.batches(), plain.batches(), strict=True)
        for rows in zip(ours["latents"], theirs["latents"], strict=True)
    ]
    assert 0 < sum(changed) < len(changed)


def test_a_held_out_image_is_in_no_batch(trainer, plain, tmp_path):
    heldout = trainer.prepare(tmp_path / "run", "--heldout_image", "2.png")
    heights = [{int(row[0]) for batch in each.batches(12) for row in batch["time_ids"]} for each in (plain, heldout)]
    assert heights == [{30, 40, 33}, {30, 40}]


def test_an_excluded_image_is_in_no_batch_and_is_not_held_out(trainer, tmp_path):
    prepared = trainer.prepare(tmp_path / "run", "--excluded_images", "2.png", "--heldout_image", "1.png")
    assert {int(row[0]) for batch in prepared.batches(12) for row in batch["time_ids"]} == {30}
    report = json.loads((prepared.run.path / "photos.json").read_text())
    assert [Path(entry["path"]).name for entry in report["pictures"]] == ["0.png", "1.png"]
    kinds = {Path(entry["path"]).name: entry["kind"] for entry in report["folder"]["files"]}
    assert kinds == {"0.png": "", "1.png": "", "2.png": "excluded"}
    cached = list((prepared.run.path / "cache").rglob("*.safetensors"))
    assert len(cached) == len(["image 0", "image 1", "prompt"])


def test_an_excluded_image_cannot_be_held_out():
    with pytest.raises(InputError, match=r"heldout_image must not be one of excluded_images, got '2\.png'"):
        DataOptions(excluded_images=["2.png"], heldout_image="2.png")


def test_class_images_are_trained_on_with_the_prior_loss_weight(trainer, tmp_path):
    prepared = trainer.prepare(tmp_path / "run", *PRIOR, "--prior_loss_weight", "0.25")
    for batch in prepared.batches(4):
        assert batch["weights"].tolist() == [2.0, 0.5, 2.0, 0.5]
        # Class images are of the training size and not cropped.
        assert batch["time_ids"][1::2].int().tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_the_number_of_workers_does_not_change_the_adapter(trainer, tmp_path):
    alone, helped = (
        trainer.prepare(
            tmp_path / count, *EVERYTHING, "--class_data_dir", str(tmp_path / "class"), "--dataloader_num_workers", count
        )
        for count in "02"
    )
    for expected, found in zip(alone.batches(4), ProcessBatches(helped.trainable.batch_at, 0, 1).over(range(4), 2), strict=True):
        assert are_equal(expected, found)


def test_runs_that_share_a_cache_train_the_same_adapter(trainer, plain, tmp_path, monkeypatch):
    first = trainer.prepare(tmp_path / "first", "--cache_dir", str(tmp_path / "shared"))
    assert not (first.run.path / "cache").exists()
    assert (plain.run.path / "cache").exists()

    def refuse(*_):
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(LatentEncoder, "_moments", refuse)
    monkeypatch.setattr(LatentEncoder, "_embeddings", refuse)
    second = trainer.prepare(tmp_path / "second", "--cache_dir", str(tmp_path / "shared"))
    assert all(are_equal(*pair) for pair in zip(first.batches(), second.batches(), strict=True))


def test_class_images_are_generated_once_and_used_by_the_next_run(trainer, tmp_path):
    folder = tmp_path / "class"
    first = trainer.prepare(tmp_path / "first", *PRIOR, "--class_data_dir", str(folder))
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(made) == ["00000.png", "00001.png", "00002.png"]
    assert read_settings(folder / "00000.png")["prompt"] == "a toy"
    second = trainer.prepare(tmp_path / "second", *PRIOR, "--class_data_dir", str(folder))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    assert all(are_equal(*pair) for pair in zip(first.batches(), second.batches(), strict=True))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), (None, torch.float32)])
def test_class_images_are_those_of_the_stock_pipeline(trainer, tiny_model, tmp_path, precision, dtype):
    more = [] if precision is None else ["--prior_generation_precision", precision]
    more += [*PRIOR, "--sample_batch_size", "1", "--class_data_dir", str(tmp_path / "class")]
    trainer.prepare(tmp_path / "run", *more, "--train_text_encoder")
    pipe = load_base_model(str(tiny_model), dtype)
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16}
    # The first two are drawn before there is an adapter, the last one after.
    for name in ("00001.png", "00002.png"):
        generator = torch.Generator().manual_seed(read_settings(tmp_path / "class" / name)["seed"])
        image = pipe("a toy", generator=generator, **settings).images[0]
        assert image.tobytes() == Image.open(tmp_path / "class" / name).tobytes()


def test_the_dry_run_comes_before_most_class_images_are_generated(trainer, tmp_path):
    with pytest.raises(DoesNotFitError):
        trainer.train(tmp_path / "run", *PRIOR, "--memory_limit_gb", "0.001")
    assert len(list((tmp_path / "run" / "class_pictures").iterdir())) == 2


def test_prior_preservation_without_a_class_is_refused_before_anything_is_loaded(trainer, tmp_path):
    with pytest.raises(InputError, match=r"needs the class of the subject.*--class_prompt"):
        trainer.prepare(tmp_path / "run", "--with_prior_preservation")
    assert not (tmp_path / "run").exists()


def test_the_bundled_subject_has_a_class():
    assert DataOptions().class_prompt == SAMPLE_CLASS_PROMPT
    assert DataOptions("elsewhere", "sks dog").class_prompt is None


def test_sizes_that_do_not_fit_the_model_are_named(trainer, tmp_path):
    with pytest.raises(InputError, match=r"multiples of 4 for this model, got '18,16'"):
        trainer.prepare(tmp_path / "run", "--aspect_ratio_buckets", "18,16")


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("num_class_images", 0, 1), ("crops_per_image", 0, 1), ("sample_batch_size", 0, 1), ("prior_loss_weight", -0.5, 0),
     ("dataloader_num_workers", -1, 0)],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(name, value, least):
    with pytest.raises(InputError, match=rf"{name} must be at least {least}, got {value}"):
        DataOptions(**{name: value})


def test_a_run_names_unused_files_and_truncated_prompts(pipe, images_dir, tmp_path, caplog):
    folder = tmp_path / "10_sks toy"
    shutil.copytree(images_dir, folder)
    shutil.copy(folder / "0.png", folder / "0-masklabel.png")
    (folder / "1.caption").write_text("sks toy " * 60)
    data = DataOptions(str(folder), "sks toy", with_prior_preservation=True, class_prompt="a toy " * 60, heldout_image="none")
    options = SubjectOptions(data=data)
    run = RunDirectory.create(tmp_path / "run", {})
    Preparation(pipe, None, options, Sampling(resolution=16), run, Accelerator()).encode(checked_images(data, seed=0))
    report = json.loads((run.path / "photos.json").read_text())
    uses = {Path(entry["path"]).name: entry["use"] for entry in report["folder"]["files"]}
    assert uses == {**dict.fromkeys(("0.png", "1.png", "2.png"), "image"), "0-masklabel.png": "mask", "1.caption": "caption"}
    cut = {each["role"]: each for each in report["long_prompts"]}
    # The tiny model's tokenizer takes so few that the usual validation prompts are cut too.
    assert set(cut) == {"caption", "class prompt", "validation prompt"}
    assert cut["caption"]["images"] == ["1.png"]
    sentences = [each["summary"] for each in cut.values()]
    for words in ("'0-masklabel.png'. They are masks", "Repeats are ignored", "1 from NAME.caption", *sentences):
        assert words in caplog.text


def test_given_class_images_are_in_the_report(tmp_path, images_dir):
    shutil.copytree(images_dir, tmp_path / "reg" / "1_toy")
    (tmp_path / "reg" / "1_toy" / "0.txt").write_text("a toy")
    options = DataOptions(str(images_dir), "sks toy", with_prior_preservation=True, class_prompt="a toy", num_class_images=2)
    for name, check in (("reg", pytest.raises(InputError, match=r"such as '.*1_toy'")), ("reg/1_toy", nullcontext())):
        options.class_data_dir = str(tmp_path / name)
        with check:
            report = checked_images(options, seed=0).report
    kinds = [entry["kind"] for entry in report.to_dict()["class_folder"]["files"]]
    assert sorted(kinds) == ["", "", "class_caption", "spare"]
