"""Classes that no image was seen of: named after training, by their prompts alone."""

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
    """`predictor` with the classes that `prompts` are about as well, after those that it knows.

    Their logits are  scale g(prompt) x,  in what the method makes of x; after CoOp's context its names stand in place of
    the templates. A cache of images has none of them.

    Args:
        clip: the model that the predictor was fitted on.
    Raises: InputError if the method does not compare images with prompts.
    """
    if not predictor.open_vocabulary:
        raise InputError(
            f"{', '.join(map(repr, prompts.classes))} cannot be added: this predictor's method needs images of every class. "
            "Fit it with them, or choose one that compares images with prompts, such as zeroshot or coop."
        )
    head = predictor.head
    if isinstance(head, Prompted):
        context = head.context.to(clip.device)
        features = prompts_with_context(clip, prompts.classes, lengths=(len(context),)).features(context).float()
    else:
        features = prompt_features(clip, prompts)
    return replace(predictor, head=head.with_rows(float(clip.logit_scale) * features))
