"""The few-shot trainer: from class folders to a report, resumed, with checks of the input and of the adapter's scale."""

import hashlib
import io
import json
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from image_sets import class_files, write_files

from pipelines.clip import Clip, load_clip
from pipelines.errors import InputError
from pipelines.fewshot.classifier import FewShotClassifier
from pipelines.fewshot.data import LabelledImage, LabelledImageDataset
from pipelines.fewshot.loading import load_images
from pipelines.fewshot.metric_values import ClassificationMetrics, Interval, Reliability
from pipelines.fewshot.metrics import interval_over_seeds
from pipelines.fewshot.prompts import make_prompts
from pipelines.fewshot.sources import ImageBytes
from pipelines.scenes import render, sample_scene
from training import fewshot_nora
from training.fewshot.prediction_file import prediction_file
from training.fewshot.report import below_zero_shot, phases
from training.fewshot.trials import Trial, largest_within_error
from training.fewshot.validation import FittingClock
from training.fewshot_nora import main
from training.options.fewshot import ClipOptions, FewShotOptions, parse_fewshot_options
from training.runs.card_text import as_text
from training.runs.fewshot_files import FewShotReport, TrialResult, ValidationResult

COUNTS = {"cats": 12, "dogs": 12, "red_birds": 12, "fish": 12}
FOUR = ("--shots", "2", "--seeds", "0", "1", "--method", "zeroshot", "pixels", "lora", "nora", "--rank", "4", "--inner_r", "2")
QUICK = ("--min_train_steps", "3", "--iterations_per_shot", "1", "--train_batch_size", "4", "--views", "1", "--report_to", "none")


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    """Four classes of twelve random images."""
    return write_files(tmp_path_factory.mktemp("classes"), class_files(COUNTS))


def options_for(model, folders, output, *more):
    """Options of a quick run on the CLIP model in the folder `model`."""
    flags = ["--model", str(model), "--data_dir", str(folders), "--output_dir", str(output), *QUICK, *more]
    return parse_fewshot_options([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def finished(random_clip, class_folders, tmp_path_factory):
    """A run of four methods at two shots, two seeds."""
    output = tmp_path_factory.mktemp("runs") / "run"
    main(options_for(random_clip, class_folders, output, *FOUR, "--validation_steps", "2"))
    return output


def report_in(run):
    return json.loads((run / "report.json").read_text())


def trial(run, method, seed=0):
    (result,) = (one for one in report_in(run)["trials"] if (one["method"], one["seed"]) == (method, seed))
    return result


def test_the_summary_lists_every_method(finished):
    report = report_in(finished)
    assert [(row["shots"], row["method"], row["num_seeds"]) for row in report["summary"]] == [
        (2, method, 2) for method in ("zeroshot", "pixels", "lora", "nora")
    ]
    for row in report["summary"]:
        values = [trial(finished, row["method"], seed)["test"]["top1"]["value"] for seed in (0, 1)]
        expected = interval_over_seeds(values)
        assert row["top1"] == pytest.approx({"value": expected.value, "low": expected.low, "high": expected.high})
    assert report["classifier"] == "trials/2-shots/seed-0/nora"
    assert report["dataset"]["classes"] == ["cats", "dogs", "fish", "red_birds"]


def test_every_method_of_a_seed_sees_the_same_images(finished):
    hashes = {seed: {one["split_sha256"] for one in report_in(finished)["trials"] if one["seed"] == seed} for seed in (0, 1)}
    assert len(hashes[0]) == len(hashes[1]) == 1
    assert hashes[0] != hashes[1]
    saved = json.loads((finished / "splits" / "2-shots-seed-0.json").read_text())
    assert {saved["sha256"]} == hashes[0]
    parts = [{name for name, *_ in saved[part]} for part in ("train", "val", "test")]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_the_confusion_matrix_counts_the_test_images(finished):
    tested = trial(finished, "nora")["test"]
    counts = torch.tensor(tested["confusion"])
    # Three tenths of twelve, rounded.
    assert counts.sum(dim=1).tolist() == [4, 4, 4, 4]
    assert tested["top1"]["value"] == pytest.approx(float(counts.diag().sum()) / 16)


def test_the_zero_shot_accuracy_is_that_of_open_clip(finished, class_folders, random_clip):
    clip, labelled = load_clip(str(random_clip)), load_images(class_folders)
    names = {name for name, *_ in json.loads((finished / "splits" / "2-shots-seed-0.json").read_text())["test"]}
    tested = LabelledImageDataset([image for image in labelled.images if image.name in names], clip.preprocess)
    prompts = make_prompts(labelled.classes, "photo").texts()
    with torch.no_grad():
        pixels = torch.stack([tested[place][0] for place in range(len(tested))])
        images = clip.model.encode_image(pixels, normalize=True)
        texts = clip.model.encode_text(clip.tokenizer(prompts), normalize=True)
    right = ((images @ texts.T).argmax(dim=1) == tested.labels).double().mean()
    assert trial(finished, "zeroshot")["test"]["top1"]["value"] == pytest.approx(float(right))


def test_the_run_classifies_as_it_reported(finished, class_folders):
    classifier = FewShotClassifier.from_run(finished)
    labelled = {image.name: image.label for image in load_images(class_folders).images}
    names = [name for name, *_ in json.loads((finished / "splits" / "2-shots-seed-0.json").read_text())["test"]]
    found = classifier.predict([class_folders / name for name in names])
    right = (found.probabilities.argmax(dim=1) == torch.tensor([labelled[name] for name in names])).double().mean()
    assert float(right) == pytest.approx(trial(finished, "nora")["test"]["top1"]["value"])
    assert (finished / "export" / "lora").is_dir()


def test_the_predictions_of_a_trial_add_up_to_its_confusion_matrix(finished, class_folders):
    for one in report_in(finished)["trials"]:
        told = json.loads((finished / one["folder"] / "test.json").read_text())
        counts = torch.zeros(4, 4, dtype=torch.int64)
        for image in told["images"]:
            counts[image["true"], image["predicted"]] += 1
            assert hashlib.sha256((class_folders / image["name"]).read_bytes()).hexdigest() == image["sha256"]
        assert counts.tolist() == one["test"]["confusion"]
        assert told["classes"] == report_in(finished)["dataset"]["classes"]
        assert told["temperature"] == one["temperature"]


def test_the_confidence_of_a_prediction_is_that_of_the_classifier(finished, class_folders):
    told = json.loads((finished / "trials/2-shots/seed-0/nora/test.json").read_text())["images"]
    found = FewShotClassifier.from_run(finished).predict([class_folders / one["name"] for one in told])
    for one, own in zip(told, found.probabilities.tolist(), strict=True):
        assert one["confidence"] == pytest.approx(max(own), abs=1e-5)
        assert dict(map(tuple, one["top"])) == pytest.approx(dict(enumerate(own)), abs=1e-5)


def test_predictions_hold_the_ten_most_likely_classes():
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    images = [LabelledImage(ImageBytes(f"a/{place}.png", b""), place, "a") for place in range(3)]
    classes, digests = [f"class {label}" for label in range(30)], dict.fromkeys(image.name for image in images)
    predictions = prediction_file(images, logits, 2.0, classes, digests)
    expected = (logits.double() / 2).softmax(dim=1).sort(dim=1, descending=True)
    for place, one in enumerate(predictions.images):
        assert [label for label, _ in one.top] == expected.indices[place, :10].tolist()
        assert [value for _, value in one.top] == pytest.approx(expected.values[place, :10].tolist(), abs=1e-6)


def duration(method, seconds):
    """A finished trial of 2 shots with this fitting time."""
    interval = Interval(1.0, 1.0, 1.0)
    metrics = ClassificationMetrics(1, interval, {}, {}, 0.0, 0.0, 1.0, [[1]], Reliability((1.0,), (1.0,), (1,)))
    cost = {"num_trainable_parameters": 0, "stored_bytes": 0, "seconds": seconds, "peak_memory": 0}
    labels = {"shots": 2, "seed": 0, "method": method, "folder": "", "split_sha256": "", "setting": {}}
    validation = ValidationResult(1.0, 1.0, 1)
    return TrialResult(
        **labels,
        scale=1.0,
        scale_reason=None,
        **cost,
        temperature=1.0,
        validation=validation,
        test=metrics,
        calibrated=metrics,
        new_classes=None,
    )


def seconds_of(finished, trials):
    return [phase.seconds for phase in phases(finished, trials)[:-1]]


def test_the_duration_of_a_trial_is_estimated_once_its_method_has_been_fitted():
    finished = [duration("zeroshot", 1.0), duration("nora", 8.0)]
    to_come = [Trial(2, 1, "zeroshot"), Trial(2, 1, "nora")]
    assert seconds_of(finished[:1], to_come) == [1.0, None]
    assert seconds_of(finished, to_come) == [1.0, 8.0]
    assert seconds_of([*finished, duration("nora", 10.0)], to_come) == [1.0, 9.0]
    assert seconds_of(finished, [Trial(4, 0, "nora")]) == [None]


def test_a_finished_run_has_done_all_its_steps(finished):
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["step"], status["total"], status.get("trial")) == ("done", 8, 8, None)


def test_nora_trains_fewer_parameters_than_lora_and_all_are_counted(finished):
    numbers = {method: trial(finished, method)["num_trainable_parameters"] for method in ("zeroshot", "nora", "lora")}
    # Three image layers, 160 wide, and two text layers, 128 wide: NoRA 2 r r' in v, LoRA 2 r width in q, k and v.
    assert numbers == {"zeroshot": 0, "nora": 5 * 2 * 4 * 2, "lora": 9 * 2 * 2 * 160 + 6 * 2 * 2 * 128}


def test_validation_during_the_training_of_an_adapter_does_not_change_it(finished, class_folders, random_clip, tmp_path):
    main(options_for(random_clip, class_folders, tmp_path / "run", "--shots", "2", "--seeds", "0", "--method", "lora"))
    without, folder = trial(tmp_path / "run", "lora"), trial(finished, "lora")["folder"]
    files = list((tmp_path / "run" / folder / "adapter").rglob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        assert path.read_bytes() == (finished / path.relative_to(tmp_path / "run")).read_bytes()
    lines = [json.loads(line) for line in (finished / folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "validation_top1" in line]
    assert [line["step"] for line in measured] == [2, 3]
    assert measured[-1]["validation_top1"] == without["validation"]["top1"]
    assert 0 < measured[0]["seconds"] < measured[1]["seconds"] <= trial(finished, "lora")["seconds"] + 0.01
    assert "validation_top1" not in (tmp_path / "run" / folder / "metrics.jsonl").read_text()


def test_the_time_of_validation_is_not_counted_as_fitting(monkeypatch):
    times = iter([0.0, 5.0, 8.0, 9.0])
    monkeypatch.setattr("training.fewshot.validation.monotonic", lambda: next(times))
    clock = FittingClock()
    with clock.paused():
        pass
    assert clock.seconds == 6.0


def test_each_trial_has_the_zero_shot_accuracy_on_its_test_images_and_the_worse_ones_are_counted(finished):
    report = report_in(finished)
    for one in report["trials"]:
        assert one["zero_shot_top1"] == trial(finished, "zeroshot", one["seed"])["test"]["top1"]["value"]
    for row in report["summary"]:
        same = [one for one in report["trials"] if one["method"] == row["method"]]
        assert row["below_zero_shot"] == sum(one["test"]["top1"]["value"] < one["zero_shot_top1"] for one in same)


def test_trials_of_earlier_versions_count_none_below_zero_shot(finished):
    result = TrialResult.from_json(trial(finished, "lora"))
    worse = replace(result, zero_shot_top1=result.test.top1.value + 0.01)
    assert below_zero_shot([worse, replace(result, zero_shot_top1=result.test.top1.value)]) == 1
    assert below_zero_shot([worse, replace(result, zero_shot_top1=None)]) is None


def test_a_trained_projection_classifies_as_its_run_reported(class_folders, random_clip, tmp_path):
    flags = ("--shots", "2", "--seeds", "0", "--method", "lp_plus_plus", "prolip", "--base_to_new")
    main(options_for(random_clip, class_folders, tmp_path / "run", *flags))
    result = trial(tmp_path / "run", "prolip")
    tested = json.loads((tmp_path / "run" / result["folder"] / "test.json").read_text())["images"]
    predictions = FewShotClassifier.from_run(tmp_path / "run").predict([class_folders / image["name"] for image in tested])
    assert predictions.probabilities.argmax(dim=1).tolist() == [image["predicted"] for image in tested]
    assert result["new_classes"]["count"] == 8
    assert trial(tmp_path / "run", "lp_plus_plus")["new_classes"] is None


def test_runs_with_one_cache_compute_the_features_of_the_model_once(class_folders, random_clip, tmp_path, monkeypatch):
    flags = ("--shots", "2", "--seeds", "0", "--method", "linear_probe", "--cache_dir", tmp_path / "shared")
    main(options_for(random_clip, class_folders, tmp_path / "first", *flags))
    monkeypatch.setattr(Clip, "encode_images", None)
    main(options_for(random_clip, class_folders, tmp_path / "second", *flags))
    assert not (tmp_path / "first" / "cache").exists()
    first, second = (trial(tmp_path / name, "linear_probe") for name in ("first", "second"))
    assert first["test"] == second["test"]


def test_a_run_resumes_where_it_stopped(finished, class_folders, random_clip, tmp_path):
    left = shutil.copytree(finished, tmp_path / "left")
    (left / "report.json").unlink()
    (left / "trials/2-shots/seed-1/nora/result.json").unlink()
    shutil.rmtree(left / "trials/2-shots/seed-1/nora/checkpoints")
    before = (left / "trials/2-shots/seed-0/nora/result.json").read_bytes()
    main(options_for(random_clip, class_folders, left, *FOUR, "--resume_from_checkpoint", "latest"))
    assert (left / "trials/2-shots/seed-0/nora/result.json").read_bytes() == before
    again, first = trial(left, "nora", seed=1), trial(finished, "nora", seed=1)
    assert {**again, "seconds": 0, "peak_memory": 0} == {**first, "seconds": 0, "peak_memory": 0}


def test_a_method_that_fails_is_left_out_with_its_reason_and_the_others_are_reported(
    random_clip, class_folders, tmp_path, monkeypatch
):
    fit = fewshot_nora.fit_trial

    def failing(accelerator, run, images, trial, options):
        if trial.method == "nora":
            raise InputError("rank must be smaller. <Lower> it.")
        return fit(accelerator, run, images, trial, options)

    monkeypatch.setattr(fewshot_nora, "fit_trial", failing)
    two = ("--shots", "2", "--seeds", "0", "1", "--method", "zeroshot", "nora", "lora")
    main(options_for(random_clip, class_folders, tmp_path / "run", *two))
    report = FewShotReport.read(tmp_path / "run")
    assert report.failed == {"nora": "rank must be smaller. <Lower> it."}
    assert [(one.method, one.seed) for one in report.trials] == [("zeroshot", 0), ("lora", 0), ("zeroshot", 1), ("lora", 1)]
    assert report.representative.method == "lora"
    assert "- nora: rank must be smaller." in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(InputError, match="rank must be smaller"):
        main(options_for(random_clip, class_folders, tmp_path / "alone", "--shots", "2", "--seeds", "0", "--method", "nora"))


def test_held_out_classes_are_classified_by_their_prompts_alone(random_clip, class_folders, tmp_path):
    flags = ["--shots", "1", "--seeds", "0", "--method", "linear_probe", "nora", "--rank", "4", "--inner_r", "1", "--base_to_new"]
    main(options_for(random_clip, class_folders, tmp_path / "run", *flags))
    report = report_in(tmp_path / "run")
    assert (report["dataset"]["classes"], report["dataset"]["new_classes"]) == (["cats", "dogs"], ["fish", "red_birds"])
    assert trial(tmp_path / "run", "linear_probe")["new_classes"] is None
    found = trial(tmp_path / "run", "nora")
    base, new = found["test"]["top1"]["value"], found["new_classes"]["top1"]["value"]
    assert found["new_classes"]["count"] == 8
    assert found["new_classes"]["harmonic_mean"] == pytest.approx(2 * base * new / (base + new))


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_only_one_encoder_is_adapted_and_the_other_computed_once(encoder, random_clip, class_folders, tmp_path):
    flags = ["--shots", "2", "--seeds", "0", "--method", "nora", "--rank", "4", "--inner_r", "2", "--encoders", encoder]
    main(options_for(random_clip, class_folders, tmp_path / "run", *flags))
    folder = tmp_path / "run" / "trials/2-shots/seed-0/nora"
    assert [path.name for path in (folder / "adapter" / "full").iterdir()] == [encoder]


def test_a_dataset_of_the_coop_protocol_is_read_with_its_split_and_its_prompt(random_clip, tmp_path):
    names = class_files({"Forest": 6, "River": 6})
    write_files(tmp_path / "sets" / "eurosat" / "2750", names)
    parts = {"train": (0, 1, 2), "val": (3,), "test": (4, 5)}
    listed = {
        part: [[f"{key}/{place}.png", label, key] for label, key in enumerate(("Forest", "River")) for place in places]
        for part, places in parts.items()
    }
    (tmp_path / "sets" / "eurosat" / "split_zhou_EuroSAT.json").write_text(json.dumps(listed))
    flags = ["--dataset", "eurosat", "--shots", "2", "--seeds", "0", "--method", "zeroshot"]
    main(options_for(random_clip, tmp_path / "sets", tmp_path / "run", *flags))
    assert report_in(tmp_path / "run")["templates"] == ["a centered satellite photo of {}."]
    saved = json.loads((tmp_path / "run" / "splits" / "2-shots-seed-0.json").read_text())
    assert saved["test"] == listed["test"]
    assert saved["val"] == listed["val"]
    assert {name for name, *_ in saved["train"]} < {name for name, *_ in listed["train"]}


def test_half_precision_and_accumulation_train_too(random_clip, class_folders, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = [
        "--shots",
        "2",
        "--seeds",
        "0",
        "--method",
        "lora",
        "--mixed_precision",
        "bf16",
        "--gradient_accumulation_steps",
        "2",
    ]
    main(options_for(random_clip, class_folders, tmp_path / "run", *flags))
    AcceleratorState._reset_state(reset_partial_state=True)
    lines = (tmp_path / "run" / "trials/2-shots/seed-0/lora/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)


def test_a_class_with_too_few_images_is_named_before_anything_is_written(random_clip, class_folders, tmp_path):
    few = shutil.copytree(class_folders, tmp_path / "few")
    for place in range(9):
        (few / "dogs" / f"{place}.png").unlink()
    with pytest.raises(InputError, match=r"'dogs'.*fewer shots"):
        main(options_for(random_clip, few, tmp_path / "run", "--shots", "4", "--seeds", "0"))
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_read_is_named_with_its_class(random_clip, class_folders, tmp_path):
    damaged = shutil.copytree(class_folders, tmp_path / "damaged")
    for image in (damaged / "cats").iterdir():
        image.write_bytes(image.read_bytes()[:40] + image.name.encode())
    with pytest.raises(InputError, match=r"cats/.*'cats'"):
        main(options_for(random_clip, damaged, tmp_path / "run", "--shots", "1", "--seeds", "0"))


def test_duplicates_are_reported_and_never_tested_on(random_clip, class_folders, tmp_path):
    doubled = shutil.copytree(class_folders, tmp_path / "doubled")
    shutil.copy(doubled / "cats" / "0.png", doubled / "dogs" / "copy.png")
    main(options_for(random_clip, doubled, tmp_path / "run", "--shots", "1", "--seeds", "0", "--method", "zeroshot"))
    (copy,) = report_in(tmp_path / "run")["dataset"]["duplicates"]
    assert "cats/0.png" in copy
    assert "dogs/copy.png" in copy
    split = (tmp_path / "run" / "splits" / "1-shots-seed-0.json").read_text()
    assert "cats/0.png" not in split
    assert "dogs/copy.png" not in split


def test_the_split_of_a_dataset_is_used_and_its_gaps_are_reported(random_clip, tmp_path):
    files = class_files({"Train/cat": 3, "Train/dog": 3, "Train/fish": 3, "Test/cat": 2, "Test/dog": 2}) | {
        "Train/cat/a.txt": b""
    }
    output = tmp_path / "run"
    flags = ["--shots", "1", "--seeds", "0", "--method", "zeroshot"]
    main(options_for(random_clip, write_files(tmp_path / "set", files), output, *flags))
    report, tested = report_in(output), json.loads((output / "trials/1-shots/seed-0/zeroshot/test.json").read_text())
    assert [one["name"] for one in tested["images"]] == [name for name in files if name.startswith("Test/")]
    assert trial(output, "zeroshot")["test"]["class_counts"] == {"cat": 2, "dog": 2, "fish": 0}
    assert trial(output, "zeroshot")["test"]["per_class"]["fish"] is None
    assert "1 file with the suffix .txt is not used: 1 in class 'cat'." in report["dataset"]["notes"]
    assert "Some classes have no test images, so their accuracy is unknown: 'fish'." in report["dataset"]["notes"]
    assert "**Classes without test images: fish.**" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shots", "0"], "shots must be different numbers of at least 1, or all, got 0"),
        (["--shots", "few"], "got few"),
        (["--num_validation_images", "0"], "num_validation_images must be at least 1, got 0"),
        (["--max_train_steps", "0"], "max_train_steps must be at least 1, got 0"),
        (["--validation_steps", "-1"], "validation_steps must be at least 0, got -1"),
        (["--method", "nora", "magic"], "method must be .*magic"),
        (["--seeds", "1", "1"], "seeds must be .*different"),
        (["--dataset", "mnist"], "dataset must be one of"),
        (["--crop_scale", "0.9", "0.2"], "crop_scale must be two shares"),
        (["--class_names", "cats"], "written as folder=name, got 'cats'"),
        (["--inner_r", "40"], "inner_r"),
        (["--export", "pickle"], "export must be any of"),
        (["--test_share", "1"], "test_share must be between 0 and 1"),
    ],
)
def test_a_wrong_option_ends_with_a_message(flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_fewshot_options(flags)
    assert ended.value.code == 2
    assert re.search(words, " ".join(capsys.readouterr().err.split()))


def test_the_largest_scale_within_one_standard_error_of_the_best_is_chosen():
    # A standard error of 0.6 on 24 images is 0.1.
    assert largest_within_error({1.0: 0.51, 0.5: 0.6, 0.0: 0.3}, 24) == 1.0
    assert largest_within_error({1.0: 0.49, 0.5: 0.6, 0.0: 0.3}, 24) == 0.5
    assert largest_within_error({1.0: 0.1, 0.5: 0.2, 0.0: 0.6}, 24) == 0.0
    assert largest_within_error({1.0: 0.99, 0.0: 1.0}, 100) == 0.0


def scene_files(colour, count, seed):
    """Files of `count` rendered scenes of objects in a colour."""
    rng, files = random.Random(seed), []
    while len(files) < count:
        scene = replace(sample_scene(rng), background="plain", colour=colour, pattern="plain", size="large")
        stored = io.BytesIO()
        render(scene, 64, rng).save(stored, "PNG")
        files.append(stored.getvalue())
    return files


def test_an_adapter_trained_on_wrong_labels_is_scaled_down_with_a_reason(tmp_path):
    other = {"red": "blue", "blue": "red"}
    for part in ("train", "val", "test"):
        for name in other:
            shown = scene_files(other[name] if part == "train" else name, 8, seed=f"{part} {name}")
            write_files(tmp_path / "classes" / part / name, {f"{place}.png": file for place, file in enumerate(shown)})
    flags = ["--shots", "4", "--seeds", "0", "--method", "zeroshot", "nora", "--templates", "a {} thing"]
    main(options_for("mini", tmp_path / "classes", tmp_path / "run", *flags, "--min_train_steps", "60"))
    zero_shot, adapted = (trial(tmp_path / "run", method) for method in ("zeroshot", "nora"))
    assert zero_shot["validation"]["top1"] > 0.75
    assert adapted["scale"] < 1
    assert adapted["validation"]["top1"] > 0.75
    assert "at scale 1" in adapted["scale_reason"]
    assert as_text(adapted["scale_reason"]) in (tmp_path / "run" / "README.md").read_text()


def test_iterations_scale_with_shots():
    optimisation = FewShotOptions().optimisation
    assert optimisation.steps(16) == 16 * optimisation.iterations_per_shot
    assert optimisation.steps(1) == optimisation.min_train_steps
    assert {replace(optimisation, max_train_steps=7).steps(shots) for shots in (1, 16)} == {7}


@pytest.mark.parametrize(
    ("clip", "share", "layers"),
    [
        # Three image layers and two text layers.
        (ClipOptions(), 0.3, [160] * 3 + [128] * 2),
        (ClipOptions("ViT-B-16", "openai"), 0.1, [768] * 12 + [512] * 12),
    ],
)
def test_nora_has_fewer_parameters_and_a_smaller_file_than_lora_by_default(clip, share, layers):
    options = FewShotOptions(clip)
    lora, nora = options.adapter("lora"), options.adapter("nora")
    assert options.target_layers.projections_of("lora") == ["q", "k", "v"]
    assert options.target_layers.projections_of("nora") == ["v"]
    of_lora, of_nora = 3 * lora.rank * sum(2 * width for width in layers), len(layers) * 2 * nora.rank * nora.inner_r
    assert of_nora <= share * of_lora
    # Two outer directions of 4 bits to a byte; trained factors in float32.
    assert nora.basis == "gradient"
    assert nora.outer_dtype == "int4"
    assert nora.rank * sum(2 * width for width in layers) / 2 + 4 * of_nora < 4 * of_lora


def test_a_run_on_a_model_in_4_bits_reports_what_that_lost_and_loads_onto_full_precision(random_clip, class_folders, tmp_path):
    flags = ("--shots", "2", "--seeds", "0", "--method", "linear_probe", "loftq", "nora", "--rank", "4", "--inner_r", "2")
    run = tmp_path / "run"
    main(options_for(random_clip, class_folders, run, *flags, "--quantize", "nf4"))
    errors = report_in(run)["quantization_errors"]
    assert list(errors) == ["image", "text"]
    card = (run / "README.md").read_text()
    for name, error in errors.items():
        assert 0.05 < error < 0.15
        assert f"{name} {error:.1%}" in card
    assert "the result differs from training by W - Q(W)" in card
    assert not (run / "calibration" / "unquantized").exists()
    images = [class_folders / name for name, *_ in json.loads((run / "splits" / "2-shots-seed-0.json").read_text())["test"]]
    # Its base model is recognised by the weights before quantisation.
    assert FewShotClassifier.from_run(run).predict(images).probabilities.shape == (len(images), 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method lora_ga --quantize nf4", "LoRA-GA does not support quantized layers"),
        ("--method loftq", "LoftQ would start from what quantisation removes"),
        ("--method nora --quantize nf4 --export lora merged", "export merged merges the adapter into weights in full precision"),
    ],
)
def test_what_does_not_fit_quantisation_is_refused_before_any_work(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_fewshot_options(flags.split())
    assert message in capsys.readouterr().err
