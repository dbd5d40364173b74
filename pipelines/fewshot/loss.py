"""The training loss of few-shot adapters: images against the prompts of all classes."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from pipelines.clip import Clip
from pipelines.fewshot.prompts import Prompts


class ClassificationLoss(nn.Module):
    """Cross-entropy over the classes, as zero-shot CLIP classifies.

        logits = exp(t) f(image) . g(class);   g(class): the mean over the class's prompts, of length 1  [Radford et al. 2021]

    Frozen modules stay in evaluation mode during training, so batch normalisation keeps its statistics. Only the modules of
    adapters, such as dropout, are in training mode.

    Args:
        clip: with an adapter on one or both encoders.
        prompts: of all classes.
        class_features: (classes, d) of length 1 if the text encoder is frozen; None if it is trained.
        images_are_features: whether `forward` takes features (n, d) of length 1, computed by a frozen image encoder.
    """

    def __init__(
        self, clip: Clip, prompts: Prompts, class_features: torch.Tensor | None = None, images_are_features: bool = False
    ) -> None:
        super().__init__()
        self.model = clip.model
        self.clip, self.prompts, self.images_are_features = clip, prompts, images_are_features
        tokens = clip.tokenizer(prompts.texts()) if class_features is None else None
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("class_features", class_features, persistent=False)
        self.to(clip.device)

    def train(self, mode: bool = True) -> ClassificationLoss:
        """Put only the modules of adapters in training mode."""
        super().train(False)
        self.training = mode
        for module in self.modules():
            if mode and isinstance(module, BaseTunerLayer):
                module.train()
                module.get_base_layer().eval()
        return self

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) float32 of `images` (n, 3, h, w), or of their features (n, d)."""
        features = images if self.images_are_features else self.clip.encode_images(images)
        classes = self.class_features
        if classes is None:
            classes = self.prompts.class_features(self.clip.encode_texts(self.tokens))
        return self.clip.logit_scale * features.float() @ classes.float().T

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss () of a batch; `images` as in `logits`, `labels` (n,) int64."""
        return F.cross_entropy(self.logits(images), labels)
