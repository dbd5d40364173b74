"""What the built-in CLIP is pretrained by: photographs against all class names, scenes against right and wrong captions."""

from __future__ import annotations

import torch
from open_clip import CLIP
from torch import nn
from torch.nn import functional as F

from pipelines.mini_clip import EMBED_DIM, encode_texts

MAX_LOGIT_SCALE = 100.0


class ClassNameLoss(nn.Module):
    """Cross-entropy of every picture over the texts of its batch, and of photographs and names over one anchor for each class.

        logits = exp(t) f(picture) . g(text);   texts: the name of every class, every scene's caption, and wrong captions

    Photographs are to choose the name of their class, scenes their caption (equal captions share it). Against all names at
    once a small batch suffices, where CLIP's own loss needs thousands of pairs. The anchors are free vectors that both towers
    can follow from the first step: names alone were still alike (mean cosine 0.91) after a whole epoch, and taught little.

    Args:
        model: trained, both towers.
        names: (templates, classes, tokens) int64, the name of every class in every template.
        smoothing: the share of the target that all texts share.
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
        names, texts = self.names[template[0]], torch.cat([captions[scenes], wrong[scenes].flatten(0, 1)])
        target = self._target(labels, captions[scenes], texts)
        pictures = self.model.encode_image(pixels.contiguous(memory_format=torch.channels_last), normalize=True)
        # Apart, because the names are shorter.
        features = torch.cat([encode_texts(self.model, part) for part in (names, texts) if len(part)])
        with torch.autocast(pixels.device.type, enabled=False):
            pictures, features = pictures.float(), features.float()
            scale = self.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
            logits = scale * pictures @ features.T
            by_text = -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
            return by_text + self._by_anchor(scale, pictures[~scenes], features[: len(names)], labels[~scenes])

    def _by_anchor(self, scale: torch.Tensor, photos: torch.Tensor, names: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of photographs (count, width) with `labels` (count,), plus that of names (classes, width)."""
        anchors = scale * F.normalize(self.anchors, dim=-1)
        own = torch.arange(len(names), device=names.device)
        parts = [(photos, labels), (names, own)] if len(photos) else [(names, own)]
        return sum(F.cross_entropy(part @ anchors.T, right, label_smoothing=self.smoothing) for part, right in parts)

    def _target(self, labels: torch.Tensor, captions: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """What each picture is to choose of the classes, then of `texts`, smoothed: (batch, classes + texts), rows of sum 1."""
        classes = self.names.shape[1]
        right = torch.zeros(len(labels), classes + len(texts), device=texts.device)
        photos = labels >= 0
        right[photos, labels[photos]] = 1.0
        said = (captions[:, None] == texts[None]).all(dim=-1).float()
        right[~photos, classes:] = said / said.sum(dim=-1, keepdim=True)
        return (1 - self.smoothing) * right + self.smoothing / right.shape[1]
