"""The pretraining loss of the built-in CLIP: photographs against class names, scenes against right and wrong captions."""

from __future__ import annotations

import torch
from open_clip import CLIP
from torch import nn
from torch.nn import functional as F

from pipelines.mini_clip import EMBED_DIM, encode_texts

MAX_LOGIT_SCALE = 100.0


class ClassNameLoss(nn.Module):
    """Cross-entropy of images over the texts of their batch, and of photographs and class names over one anchor per class.

        logits = exp(t) f(image) . g(text);   texts: names of the batch's classes, captions of its scenes, wrong captions

    The target of a photograph is the name of its class, or the names of both classes that CutMix put into it, and that of a
    scene its caption; equal captions share the target. The anchors are free vectors, one per class, which both encoders can
    follow from the first step: without them the features of names were still similar after an epoch (mean cosine 0.91) and gave
    little signal.

    Args:
        model: both encoders are trained.
        names: (templates, classes, tokens) int64, the name of every class in every template.
        smoothing: label smoothing over all texts, or all anchors.
    """

    def __init__(self, model: CLIP, names: torch.Tensor, smoothing: float = 0.1) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.register_buffer("names", names, persistent=False)
        self.anchors = nn.Parameter(F.normalize(torch.randn(names.shape[1], EMBED_DIM), dim=-1))
        self.smoothing = smoothing

    def forward(
        self, pixels: torch.Tensor, classes: torch.Tensor, template: torch.Tensor, captions: torch.Tensor, wrong: torch.Tensor
    ) -> torch.Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            pixels: (batch, 3, size, size) in [-1, 1].
            classes: (batch, classes), the share of each class in a photograph, which sum to 1; zeros for a scene.
            template: (batch,) int64, all equal: index of the template of the class names.
            captions: (batch, tokens) int64; those of photographs are ignored.
            wrong: (batch, count, tokens) int64, captions that contradict the scene; those of photographs are ignored.
        """
        scenes = classes.sum(dim=-1) == 0
        present = classes.sum(dim=0).nonzero().flatten()
        names, scene_captions = self.names[template[0], present], torch.cat([captions[scenes], wrong[scenes].flatten(0, 1)])
        images = self.model.encode_image(pixels.contiguous(memory_format=torch.channels_last), normalize=True)
        # Encoded separately, because names are shorter than captions.
        texts = torch.cat([encode_texts(self.model, part) for part in (names, scene_captions) if len(part)])
        target = torch.zeros(len(classes), len(texts), device=classes.device)
        target[:, : len(names)] = classes[:, present]
        equal = (captions[scenes, None] == scene_captions[None]).all(dim=-1).float()
        target[scenes, len(names) :] = equal / equal.sum(dim=-1, keepdim=True)
        with torch.autocast(pixels.device.type, enabled=False):
            images, texts = images.float(), texts.float()
            scale = self.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
            loss = F.cross_entropy(scale * images @ texts.T, target, label_smoothing=self.smoothing)
            if len(present):
                anchors = scale * F.normalize(self.anchors, dim=-1)
                for features, anchor in ((images[~scenes], classes[~scenes]), (texts[: len(names)], present)):
                    loss = loss + F.cross_entropy(features @ anchors.T, anchor, label_smoothing=self.smoothing)
            return loss
