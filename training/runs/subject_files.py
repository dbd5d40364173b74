"""The file of a subject run's evaluation. No model library is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipelines.run_file import RunFile

EVALUATION = "evaluation"


@dataclass(frozen=True)
class SubjectEvaluation(RunFile):
    """The adapter of the last step compared with the base model, which gets the same prompts and noise.

    Similarities are cosines of the image scorer's features, at most 1 (see `pipelines.subject.scores`), and comparable only
    between runs with the same scorer and the same images. With CLIP features they are CLIP-I and CLIP-T, with DINOv2 features
    DINO  [DreamBooth, Ruiz et al. 2023, section 4.1], but against held-out photos instead of those that were trained on, so
    that memorised photos earn nothing. What needs a held-out image is None without one.

    The generated images show the subject in new scenes. A photo that was not trained on has the similarity
    `heldout_to_training` to its nearest training photo. Generated images whose `training_similarity` is above it are closer to a
    training photo than a new photo of the subject is: they copy.

    Args:
        heldout_loss, base_heldout_loss: mean denoising loss on the held-out image with fixed noise, at least 0
            (see `pipelines.subject.evaluation.mean_denoising_loss`).
        image_similarity, base_image_similarity: of the generated images to the held-out images, mean of all pairs.
        text_similarity, base_text_similarity: of the generated images to their prompts, mean. With the base model as scorer, how
            much better their prompts fit than the others.
        training_similarity: of the generated images to the nearest training image, mean.
        heldout_to_training: of the held-out images to the nearest training image, mean.
        copying: `training_similarity` - `image_similarity`. It compares adapters of the same images: the nearest of several
            images is more similar than a single one, so it is above 0 without copying too.
        drift: mean of 1 - similarity between the adapter's and the base model's image of each unrelated prompt; 0 if the adapter
            leaves these images as they are.
        drift_pixels: the root mean square difference of these images, in levels of 255.
        scorer: the model, as in --image_scorer.
        images_per_prompt: of the subject; unrelated prompts have one image each.
        prompts, seeds: of each generated image of the subject.
        unrelated_prompts, unrelated_seeds: of each image without the subject.
    """

    NAME: ClassVar[str] = f"{EVALUATION}.json"

    heldout_loss: float | None
    base_heldout_loss: float | None
    image_similarity: float | None
    base_image_similarity: float | None
    text_similarity: float
    base_text_similarity: float
    training_similarity: float
    heldout_to_training: float | None
    copying: float | None
    drift: float
    drift_pixels: float
    scorer: str
    images_per_prompt: int
    prompts: list[str]
    seeds: list[int]
    unrelated_prompts: list[str]
    unrelated_seeds: list[int]

    @property
    def summary(self) -> str:
        """The main figures as one sentence each."""
        sentences = []
        if self.image_similarity is not None:
            sentences += [
                f"Similarity to the held-out image {self.image_similarity:.3f} (base model {self.base_image_similarity:.3f}).",
                f"Similarity to the nearest training image {self.training_similarity:.3f}; "
                f"that of the held-out image is {self.heldout_to_training:.3f}.",
            ]
        else:
            sentences.append(f"Similarity to the nearest training image {self.training_similarity:.3f}.")
        sentences += [
            f"Similarity to the prompts {self.text_similarity:.3f} (base model {self.base_text_similarity:.3f}).",
            f"Drift on unrelated prompts {self.drift:.3f}, {self.drift_pixels:.1f} of 255 levels.",
        ]
        return " ".join(sentences)
