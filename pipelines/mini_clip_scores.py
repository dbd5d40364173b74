"""Zero-shot accuracy of the built-in CLIP on held-out photographs and new scenes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from open_clip import CLIP
from transformers import CLIPTokenizer

from pipelines.backgrounds import BACKGROUNDS
from pipelines.corpus import Corpus, to_pixels
from pipelines.mini_clip import class_tokens, image_features, zero_shot_weights
from pipelines.mini_clip_data import KINDS
from pipelines.scenes import COLOURS, Scene
from pipelines.wording import with_article

CHUNK = 500


@dataclass(frozen=True)
class ZeroShotScores:
    """Zero-shot accuracy among `classes` names."""

    accuracy: float
    classes: int

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.classes


def zero_shot_labels(model: CLIP, pixels: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """The predicted class of every image: (count,) int64.

    Args:
        pixels: (count, 3, size, size) in [-1, 1].
        names: (templates, classes, tokens).
    """
    return (image_features(model, pixels) @ zero_shot_weights(model, names).T).argmax(dim=-1)


def held_out_accuracy(model: CLIP, photos: Corpus, labels: np.ndarray, names: torch.Tensor) -> float:
    """Zero-shot accuracy on `photos` with the classes `labels` (count,); `names` is (templates, classes, tokens)."""
    chunks = [photos.images[start : start + CHUNK] for start in range(0, len(photos), CHUNK)]
    predicted = torch.cat([zero_shot_labels(model, to_pixels(chunk), names) for chunk in chunks])
    return float((predicted.numpy() == labels).mean())


def scene_questions() -> dict[str, dict[str, str]]:
    """For every evaluated part of a scene, the name of each of its values for the prompts."""
    return {
        "kind": {kind: with_article(kind) for kind in KINDS},
        "colour": {colour: f"{with_article(colour)} thing" for colour in COLOURS},
        "background": {name: f"a thing {background.phrase}".strip() for name, background in BACKGROUNDS.items()},
    }


def scene_accuracies(
    model: CLIP, pixels: torch.Tensor, scenes: list[Scene], tokenizer: CLIPTokenizer
) -> dict[str, ZeroShotScores]:
    """Zero-shot accuracy on the kind, the colour and the background of scenes.

    Args:
        pixels: (count, 3, size, size) in [-1, 1].
        scenes: the scene of each image.
    """
    scores = {}
    for field, words in scene_questions().items():
        predicted = zero_shot_labels(model, pixels, class_tokens(tokenizer, list(words.values())))
        right = [list(words).index(getattr(scene, field)) for scene in scenes]
        scores[field] = ZeroShotScores(float((predicted.numpy() == np.asarray(right)).mean()), len(words))
    return scores
