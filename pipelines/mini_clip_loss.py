"""What the built-in CLIP is pretrained by: photographs against all class names, scenes against right and wrong captions."""

from __future__ import annotations

import torch
from open_clip import CLIP
from torch import nn
from torch.nn import functional as F

from pipelines.mini_clip import EMBED_DIM, encode_texts

MAX_LOGIT_SCALE = 100.0


class ClassNameLoss(nn.Module):
    """Cross-entropy of every image over the texts of its batch, and of photographs and names over one anchor for each class.

        logits = exp(t) f(image) . g(text);   texts: the names of the batch's classes, its scenes' captions, wrong captions

    Photographs are to choose the name of their class, scenes their caption (equal captions share it). The anchors are free
    vectors for all classes, which both towers can follow from the first step: without them names were still alike (mean cosine
    0.91) after a whole epoch, and taught little.

    Args:
        model: trained, both towers.
        names: (templates, classes, tokens) int64, the name of every class in every template.
        smoothing: the share of the target that all texts, or all anchors, share.
    """

    def __init__(self, model: CLIP, names: torch.Tensor, smoothing: float = 0.1) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.register_buffer("names", names, persistent=False)
        self.anchors = nn.Parameter(F.normalize(torch.randn(names.shape[1], EMBED_DIM), dim=-1))
        self.smoothing = smoothing

    def forward(
        self, pixels: torch.Tensor, labels: torch.Tensor, template: torch.Tensor, captions: torch.Tensor, wrong: torch.Tensor
    ) -> torch.Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            pixels: (batch, 3, size, size) in [-1, 1].
            labels: (batch,) int64, the class of a photograph, -1 for a scene.
            template: (batch,) int64, all equal: the template of the classes' names.
            captions: (batch, tokens) int64; those of photographs are not read.
            wrong: (batch, count, tokens) int64, captions that contradict the scene; those of photographs are not read.
        """
        scenes = labels < 0
        present, class_positions = labels[~scenes].unique(return_inverse=True)
        names, said = self.names[template[0], present], torch.cat([captions[scenes], wrong[scenes].flatten(0, 1)])
        images = self.model.encode_image(pixels.contiguous(memory_format=torch.channels_last), normalize=True)
        # Apart, because the names are shorter.
        texts = torch.cat([encode_texts(self.model, part) for part in (names, said) if len(part)])
        right = torch.zeros(len(labels), len(texts), device=labels.device)
        right[~scenes, : len(names)] = torch.eye(len(names), device=labels.device)[class_positions]
        equal = (captions[scenes, None] == said[None]).all(dim=-1).float()
        right[scenes, len(names) :] = equal / equal.sum(dim=-1, keepdim=True)
        with torch.autocast(pixels.device.type, enabled=False):
            images, texts = images.float(), texts.float()
            scale = self.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
            loss = F.cross_entropy(scale * images @ texts.T, right, label_smoothing=self.smoothing)
            if len(present):
                anchors = scale * F.normalize(self.anchors, dim=-1)
                for features, class_labels in ((images[~scenes], labels[~scenes]), (texts[: len(names)], present)):
                    loss = loss + F.cross_entropy(features @ anchors.T, class_labels, label_smoothing=self.smoothing)
            return loss
