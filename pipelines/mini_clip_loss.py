"""What the built-in CLIP is pretrained by: photographs against all class names, scenes against right and wrong captions."""

from __future__ import annotations

import torch
from open_clip import CLIP
from torch import nn

from pipelines.mini_clip import encode_texts

MAX_LOGIT_SCALE = 100.0


class ClassNameLoss(nn.Module):
    """Cross-entropy of every picture over the texts of its batch.

        logits = exp(t) f(picture) . g(text);   texts: the name of every class, every scene's caption, and wrong captions

    Photographs are to choose the name of their class, scenes their caption (equal captions share it). Against all names at
    once a small batch suffices, where CLIP's own loss needs thousands of pairs.

    Args:
        model: trained, both towers.
        names: (templates, classes, tokens) int64, the name of every class in every template.
        smoothing: the share of the target that all texts share.
    """

    def __init__(self, model: CLIP, names: torch.Tensor, smoothing: float = 0.1) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.register_buffer("names", names, persistent=False)
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
            scale = self.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
            logits = scale * pictures.float() @ features.float().T
        return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()

    def _target(self, labels: torch.Tensor, captions: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """What each picture is to choose of the classes, then of `texts`, smoothed: (batch, classes + texts), rows of sum 1."""
        classes = self.names.shape[1]
        right = torch.zeros(len(labels), classes + len(texts), device=texts.device)
        photos = labels >= 0
        right[photos, labels[photos]] = 1.0
        said = (captions[:, None] == texts[None]).all(dim=-1).float()
        right[~photos, classes:] = said / said.sum(dim=-1, keepdim=True)
        return (1 - self.smoothing) * right + self.smoothing / right.shape[1]
