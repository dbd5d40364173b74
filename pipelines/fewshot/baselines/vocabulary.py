"""Add classes to a fitted predictor by their prompts, without training images."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipelines.clip import Clip
from pipelines.errors import InputError
from pipelines.fewshot.baselines.coop import prompts_with_context
from pipelines.fewshot.baselines.predictors import Predictor, Prompted
from pipelines.fewshot.features import prompt_features
from pipelines.fewshot.prompts import Prompts


@torch.no_grad()
def with_classes(predictor: Predictor, clip: Clip, prompts: Prompts) -> Predictor:
    """`predictor` with the classes of `prompts` appended.

    Their logits are  scale g(prompt) x,  with x as the method transforms it. CoOp replaces the templates by its learned context.
    A key-value cache has no images of the new classes.

    Args:
        clip: the model that the predictor was fitted on.
    Raises: InputError if the method does not compare images with prompts.
    """
    if not predictor.open_vocabulary:
        raise InputError(
            f"{', '.join(map(repr, prompts.classes))} cannot be added: the method of this predictor needs images of every "
            "class. Train with such images, or use a method that compares images with prompts, such as zeroshot or coop."
        )
    head = predictor.head
    if isinstance(head, Prompted):
        context = head.context.to(clip.device)
        features = prompts_with_context(clip, prompts.classes, lengths=(len(context),)).features(context).float()
    else:
        features = prompt_features(clip, prompts)
    return replace(predictor, head=head.with_rows(float(clip.logit_scale) * features))
