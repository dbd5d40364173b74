"""The input of every baseline: features of the training and validation images by the frozen encoders, no test images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipelines.clip import Clip
from pipelines.errors import InputError
from pipelines.fewshot.projection import ImageProjection

# Largest error of a feature's length in half precision.
LENGTH_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Examples:
    """Labelled images.

    Args:
        features: (n, d), of length 1.
        labels: (n,) int64, indices of the task's classes.
        pixels: (n, p), from `raw_pixels`; only used by the method `pixels`.
        views: (v, n, d), features of length 1 of augmented views of the same images; None for no augmentation.
        embeddings: (1 + v, n, p), the embeddings before the projection of all views; only used by methods that train it.
    Raises: InputError if the sizes differ, or a feature is not finite and of length 1.
    """

    features: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor | None = None
    views: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {"features": self.features.shape[:1], "labels": self.labels.shape}
        if self.pixels is not None:
            shapes["pixels"] = self.pixels.shape[:1]
        if self.views is not None:
            shapes["views"] = self.views.shape[1:2]
        if self.embeddings is not None:
            shapes["embeddings"] = self.embeddings.shape[1:2]
        if len(set(shapes.values())) > 1:
            described = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
            raise InputError(f"features, labels, pixels, views and embeddings must be of the same images, got {described}.")
        lengths = self.all_views().norm(dim=-1)
        # Also refuses NaN.
        if not bool(((lengths - 1).abs() < LENGTH_TOLERANCE).all()):
            raise InputError(
                f"features must be finite and of length 1, got lengths from {float(lengths.min())} to {float(lengths.max())}. "
                "Normalise the output of the encoder."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def all_views(self) -> torch.Tensor:
        """(1 + v, n, d): the images as they are, then the augmented views."""
        plain = self.features[None]
        return plain if self.views is None else torch.cat([plain, self.views])


@dataclass(frozen=True)
class FewShotTask:
    """A few labelled images of each class, and the features of the class prompts.

    Args:
        classes: names of the classes, as used in prompts.
        class_features: (classes, d), of length 1.
        logit_scale: CLIP's factor of the cosine similarities: the exponential of the model's parameter, such as 100.
        train: the training images.
        validation: the images to choose hyperparameters on.
        clip: the model, for methods that train through its text encoder.
        projection: of the image encoder, for methods that train it.
    Raises: InputError if the fields do not fit each other, or a class has no training image.
    """

    classes: tuple[str, ...]
    class_features: torch.Tensor
    logit_scale: float
    train: Examples
    validation: Examples
    clip: Clip | None = None
    projection: ImageProjection | None = None

    def __post_init__(self) -> None:
        count, width = self.class_features.shape
        if len(self.classes) != count or count < 2:
            raise InputError(
                f"classes must be at least two, with one feature each, got {len(self.classes)} and {count} features."
            )
        for name, part in (("train", self.train), ("validation", self.validation)):
            if len(part) == 0:
                raise InputError(f"{name} must hold at least one image, got none.")
            if part.features.shape[1] != width:
                raise InputError(f"{name} features must have the width {width} of class_features, got {part.features.shape[1]}.")
            if not 0 <= int(part.labels.min()) <= int(part.labels.max()) < count:
                raise InputError(f"{name} labels must be in [0, {count - 1}], got {sorted(set(part.labels.tolist()))}.")
        missing = [self.classes[label] for label, images in enumerate(self.counts().tolist()) if images == 0]
        if missing:
            raise InputError(f"Every class needs a training image, but there are none of {', '.join(map(repr, missing))}.")

    def counts(self) -> torch.Tensor:
        """The number of training images of each class: (classes,) int64."""
        return torch.bincount(self.train.labels, minlength=len(self.classes))

    @property
    def shots(self) -> int:
        """The number of training images of the smallest class."""
        return int(self.counts().min())

    def zero_shot_weight(self) -> torch.Tensor:
        """The weight (classes, d) of zero-shot classification: its logits are CLIP's."""
        return self.logit_scale * self.class_features
