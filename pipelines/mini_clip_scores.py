"""How well the built-in CLIP names images: held-out photographs, and scenes that it never saw."""

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
    """The share of images that got their own of `classes` names."""

    accuracy: float
    classes: int

    @property
    def chance(self) -> float:
        """The share that guessing gets."""
        return 1 / self.classes


def zero_shot_labels(model: CLIP, pixels: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """The best class of every image, (count,) int64.

    Args:
        pixels: (count, 3, size, size) in [-1, 1].
        names: (templates, classes, tokens).
    """
    return (image_features(model, pixels) @ zero_shot_weights(model, names).T).argmax(dim=-1)


def held_out_accuracy(model: CLIP, photos: Corpus, labels: np.ndarray, names: torch.Tensor) -> float:
    """The share of `photos` whose best class is that of `labels` (count,)."""
    chunks = [photos.images[start : start + CHUNK] for start in range(0, len(photos), CHUNK)]
    predicted = torch.cat([zero_shot_labels(model, to_pixels(chunk), names) for chunk in chunks])
    return float((predicted.numpy() == labels).mean())


def scene_questions() -> dict[str, dict[str, str]]:
    """For every part of a scene that is asked for, the name of each of its values in words."""
    return {
        "kind": {kind: with_article(kind) for kind in KINDS},
        "colour": {colour: f"{with_article(colour)} thing" for colour in COLOURS},
        "background": {name: f"a thing {background.phrase}".strip() for name, background in BACKGROUNDS.items()},
    }


def scene_accuracies(
    model: CLIP, pixels: torch.Tensor, scenes: list[Scene], tokenizer: CLIPTokenizer
) -> dict[str, ZeroShotScores]:
    """How often the model names the kind, the colour and the place of scenes.

    Args:
        pixels: (count, 3, size, size) in [-1, 1].
        scenes: what each of them shows.
    """
    scores = {}
    for field, words in scene_questions().items():
        predicted = zero_shot_labels(model, pixels, class_tokens(tokenizer, list(words.values())))
        right = [list(words).index(getattr(scene, field)) for scene in scenes]
        scores[field] = ZeroShotScores(float((predicted.numpy() == np.asarray(right)).mean()), len(words))
    return scores
