"""The evaluation after training: what it measures on images that are made for it, and what a run writes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_options import TINY
from tiny_pipeline import tiny_pipeline

from pipelines.adapter_options import AdapterOptions
from pipelines.subject import adapters
from pipelines.subject.data import TrainingImage
from pipelines.subject.generate import Sampling
from pipelines.subject.scores import EmbeddingScorer
from training.options import SubjectOptions
from training.options.data import DataOptions
from training.options.validation import UNRELATED_PROMPTS, ValidationOptions
from training.runs.run import RunDirectory
from training.runs.subject_files import SubjectEvaluation
from training.subject import evaluating, samples
from training.subject.evaluating import (
    ComparedImages,
    EvaluatedSubject,
    compared,
    drift,
    evaluate,
    similarities,
    unrelated_prompts,
)
from training.subject.measured import measured_curve
from training.subject.preparing import DatasetSplit
from training.subject.samples import ValidationSampler


class Pixels:
    """Features are the pixels of thumbnails; those of every text are white."""

    reads_text = True

    def images(self, images):
        pixels = np.stack([np.asarray(image.resize((8, 8)), np.float32) for image in images])
        return torch.nn.functional.normalize(torch.from_numpy(pixels).flatten(1))

    def texts(self, texts):
        return torch.full((len(texts), 3 * 8 * 8), (3 * 8 * 8) ** -0.5)


def photo(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def cosine(first, second):
    first, second = (np.asarray(image, np.float64).ravel() for image in (first, second))
    return first @ second / np.linalg.norm(first) / np.linalg.norm(second)


@pytest.fixture
def subject():
    return EvaluatedSubject(["sks toy"], training=[photo(0), photo(1)], heldout=[photo(2)])


def measured(subject, adapted, base=None):
    images = ComparedImages(["sks toy"] * len(adapted), range(len(adapted)), adapted, base or [photo(8)] * len(adapted))
    return similarities(EmbeddingScorer(Pixels(), subject.training), images, subject)


def test_copies_of_training_images_have_no_greater_similarity_to_the_held_out_image_but_copying(subject):
    fields = measured(subject, subject.training)
    to_heldout = np.mean([cosine(image, subject.heldout[0]) for image in subject.training])
    assert fields["training_similarity"] == pytest.approx(1, abs=1e-5)
    assert fields["image_similarity"] == pytest.approx(to_heldout, abs=1e-5)
    assert fields["copying"] == pytest.approx(1 - to_heldout, abs=1e-5)
    assert fields["training_similarity"] > fields["heldout_to_training"]


def test_an_image_like_the_held_out_one_copies_nothing(subject):
    fields = measured(subject, subject.heldout)
    nearest = max(cosine(subject.heldout[0], image) for image in subject.training)
    assert fields["image_similarity"] == pytest.approx(1, abs=1e-5)
    assert fields["training_similarity"] == pytest.approx(fields["heldout_to_training"]) == pytest.approx(nearest, abs=1e-5)
    assert fields["copying"] < 0


def test_text_similarity_is_that_of_each_image_to_its_prompt(subject):
    white = Image.new("RGB", (8, 8), "white")
    fields = measured(subject, [white, photo(3)], [white, white])
    assert fields["base_text_similarity"] == pytest.approx(1, abs=1e-5)
    assert fields["text_similarity"] == pytest.approx((1 + cosine(white, photo(3))) / 2, abs=1e-5)


def test_drift_is_the_loss_of_similarity_and_the_difference_of_pixels():
    base = Image.new("RGB", (8, 8), (30, 40, 0))
    brighter = Image.new("RGB", (8, 8), (33, 44, 0))
    found = drift(EmbeddingScorer(Pixels(), [base]), ComparedImages(["a"], [0], [brighter], [base]))
    # Features have no length.
    assert found["drift"] == pytest.approx(0, abs=1e-5)
    assert found["drift_pixels"] == pytest.approx(((9 + 16) / 3) ** 0.5)
    turned = Image.new("RGB", (8, 8), (40, 30, 0))
    assert drift(EmbeddingScorer(Pixels(), [base]), ComparedImages(["a"], [0], [turned], [base]))["drift"] == pytest.approx(0.04)


def sampler_of(pipeline):
    return ValidationSampler(pipeline, ["sks"], 0, Sampling(num_inference_steps=2, resolution=16), "tiny", 2)


@pytest.fixture
def unchanged():
    """A pipeline with an adapter that changes nothing yet."""
    pipeline = tiny_pipeline()
    adapters.attach(pipeline, AdapterOptions(method="lora", **TINY))
    return pipeline


def test_an_adapter_that_changes_nothing_has_no_drift(unchanged):
    of_subject, others = compared(sampler_of(unchanged), (["sks"], ["a star", "a bus"]), {}, None)
    assert (of_subject.prompts, list(of_subject.seeds)) == (["sks"], [evaluating.FIRST_SEED])
    assert [image.tobytes() for image in others.adapted] == [image.tobytes() for image in others.base]
    found = drift(EmbeddingScorer(Pixels(), others.base), others)
    assert found["drift_pixels"] == 0
    assert found["drift"] == pytest.approx(0, abs=1e-6)


def test_the_base_model_s_images_are_generated_once_for_runs_with_one_cache(unchanged, tmp_path, monkeypatch):
    made, generate = [], samples.generate
    monkeypatch.setattr(
        samples, "generate", lambda pipeline, prompts, *rest: made.append(1) or generate(pipeline, prompts, *rest)
    )
    first, second = (compared(sampler_of(unchanged), (["a"],), {"name": "tiny"}, str(tmp_path))[0] for _ in range(2))
    assert len(made) == len(["adapter", "base", "adapter again"])
    assert first.base[0].tobytes() == second.base[0].tobytes()
    compared(sampler_of(unchanged), (["a"],), {"name": "another"}, str(tmp_path))
    assert len(made) == 5


def test_unrelated_prompts_share_no_word_with_the_subject():
    assert unrelated_prompts(["a photo of sks toy"]) == list(UNRELATED_PROMPTS)
    assert unrelated_prompts(["a photo of sks Pizza"]) == [prompt for prompt in UNRELATED_PROMPTS if "pizza" not in prompt]


def test_of_several_subjects_that_of_the_held_out_image_is_evaluated(images_dir):
    def image(name, subject):
        return TrainingImage(images_dir / name, "a prompt", subject=subject)

    split = DatasetSplit([image("0.png", "cat"), image("1.png", "dog")], [image("2.png", "dog")], SimpleNamespace())
    found = EvaluatedSubject.of(split, "sks {subject}", 16)
    assert (found.prompts, len(found.training), len(found.heldout)) == (["sks dog"], 1, 1)
    assert found.training[0].size == (16, 16)
    without = EvaluatedSubject.of(DatasetSplit(split.train, [], SimpleNamespace()), "sks {subject}", 16)
    assert (without.prompts, len(without.training), without.heldout) == (["sks cat", "sks dog"], 2, [])


EVALUATED = ("--method", "lora", "--evaluate", "--num_evaluation_images", "1")


def test_an_evaluated_run_writes_figures_and_images_and_trains_the_same_adapter(trainer, lora_run, tmp_path):
    run = trainer.run(tmp_path / "run", *EVALUATED, "--heldout_image", "2.png")
    for file in (path for folder in ("adapter", "diffusers", "kohya") for path in (run.path / folder).rglob("*.safetensors")):
        assert file.read_bytes() == (lora_run.path / file.relative_to(run.path)).read_bytes()
    found, curve = SubjectEvaluation.read(run.path), measured_curve(run)
    assert None not in vars(found).values()
    assert (found.base_heldout_loss, found.heldout_loss) == (curve[0].heldout, curve[-1].heldout)
    assert found.copying == pytest.approx(found.training_similarity - found.image_similarity)
    assert (len(found.prompts), found.images_per_prompt) == (4, 1)
    assert found.unrelated_prompts == list(UNRELATED_PROMPTS)
    counts = {folder.name: len(list(folder.iterdir())) for folder in (run.path / "evaluation").iterdir()}
    assert counts == {"subject": 4, "base_subject": 4, "unrelated": 8, "base_unrelated": 8, "training": 2, "heldout": 1}
    assert found.summary in (run.path / "README.md").read_text()


def test_without_a_held_out_image_the_evaluation_says_what_is_missing(unchanged, images_dir, tmp_path, caplog):
    validation = ValidationOptions(evaluate=True, num_evaluation_images=1)
    options = SubjectOptions(data=DataOptions(str(images_dir), "sks toy"), validation=validation)
    split = DatasetSplit([TrainingImage(images_dir / "0.png", "sks toy")], [], SimpleNamespace())
    run, scorer = RunDirectory.create(tmp_path / "run", {}), EmbeddingScorer(Pixels(), [photo(0)])
    evaluate(run, sampler_of(unchanged), scorer, split, options, {})
    values = json.loads((run.path / "evaluation.json").read_text())
    missing = {name for name, value in values.items() if value is None}
    assert missing == {
        "heldout_loss", "base_heldout_loss", "image_similarity", "base_image_similarity", "heldout_to_training", "copying"
    }  # fmt: skip
    assert "the evaluation has no similarity to held-out images" in caplog.text
