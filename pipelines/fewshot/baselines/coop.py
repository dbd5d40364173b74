"""CoOp: learned context vectors before the class name in the prompts  [Zhou et al. 2022].

"Learning to prompt for vision-language models", arXiv 2109.01134.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.clip import Clip
from pipelines.errors import InputError
from pipelines.fewshot.baselines.choosing import choose_predictor
from pipelines.fewshot.baselines.predictors import Predictor, Prompted
from pipelines.fewshot.baselines.task import FewShotTask
from pipelines.fewshot.baselines.training import Schedule, sgd, train
from pipelines.fewshot.prompts import clean_name
from pipelines.randomness import keyed_generator

# Context lengths in tokens; the first that leaves room for the longest class name is used.
LENGTHS = (16, 8, 4)
PLACEHOLDER, SPREAD, BATCH_SIZE = "X", 0.02, 32
# The authors' rate first; less confident models need higher rates.
LEARNING_RATES = (2e-3, 2e-2, 2e-1)


@dataclass(frozen=True)
class ContextPrompts:
    """The prompts of the classes, with room for a context after the start token.

    Args:
        clip: the model.
        tokens: (classes, tokens) int64, with placeholders for the context.
        length: length of the context in tokens.
    """

    clip: Clip
    tokens: torch.Tensor
    length: int

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding of the text encoder."""
        return self.clip.text_tower.token_embedding

    def features(self, context: torch.Tensor) -> torch.Tensor:
        """Class features (classes, d) of length 1 with `context` (length, token width), differentiable."""
        ends = self.clip.end_positions(self.tokens)
        embedded = self.embedding(self.tokens[:, : int(ends.max()) + 1])
        expanded = context.to(embedded.dtype).expand(len(embedded), -1, -1)
        embedded = torch.cat([embedded[:, :1], expanded, embedded[:, 1 + self.length :]], dim=1)
        return self.clip.encode_embedded_texts(embedded, ends)


def prompts_with_context(clip: Clip, classes: Sequence[str], lengths: Sequence[int] = LENGTHS) -> ContextPrompts:
    """The prompts "X X ... name." with the first of `lengths` that leaves room for every name.

    Raises: InputError if none does, or the tokenizer does not encode the placeholder as one token.
    """
    names = [clean_name(name) + "." for name in classes]
    ends = clip.end_positions(clip.tokenizer(names))
    for length in lengths:
        tokens = clip.tokenizer([" ".join([PLACEHOLDER] * length) + " " + name for name in names])
        if int(ends.max()) + length >= tokens.shape[1]:
            continue
        if not torch.equal(clip.end_positions(tokens), ends + length) or len(tokens[:, 1 : 1 + length].unique()) != 1:
            raise InputError(
                f"coop needs a tokenizer with a start token and one token for {PLACEHOLDER!r}, unlike that of {clip.name}. "
                "Use another model."
            )
        return ContextPrompts(clip, tokens.to(clip.device), length)
    raise InputError(
        f"coop needs room for {min(lengths)} tokens before every class name, but {classes[int(ends.argmax())]!r} is too long. "
        "Shorten this name."
    )


def fit(task: FewShotTask, seed: int) -> Predictor:
    """min over v of  mean -log softmax(scale cos(x, g([v_1] ... [v_M] name)))[y],  v drawn from N(0, 0.02^2).

    All classes share one context, followed by the class name. Only the context is trained; it is saved with the classifier.
    The learning rate is chosen on the validation images.

    Raises: InputError if the task has no `clip`, its text encoder is not supported, or a class name is too long.
    """
    if task.clip is None:
        raise InputError(
            "The method 'coop' trains through the text encoder, got a task without a model. Set clip of FewShotTask."
        )
    if not task.clip.reads_up_to_the_end_token:
        raise InputError(
            f"coop needs a causal text encoder that pools at the end token, as in CLIP, unlike that of {task.clip.name}. "
            "Use another model."
        )
    prompts = prompts_with_context(task.clip, task.classes)
    predictors = (learned(task, prompts, seed, rate) for rate in LEARNING_RATES)
    return choose_predictor(predictors, len(LEARNING_RATES), task.validation)


def learned(task: FewShotTask, prompts: ContextPrompts, seed: int, learning_rate: float) -> Predictor:
    """Train the predictor of one learning rate."""
    generator, embedded = keyed_generator(seed), prompts.embedding.weight
    initial_context = SPREAD * torch.randn(prompts.length, embedded.shape[1], generator=generator)
    context = initial_context.to(embedded.device).requires_grad_()

    def loss_of(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of features (batch, d) and labels (batch,)."""
        texts = prompts.features(context).float()
        return F.cross_entropy(task.logit_scale * features.to(texts) @ texts.T, labels.to(texts.device))

    train([context], loss_of, task.train, Schedule(sgd(learning_rate), epochs_for(task.shots), BATCH_SIZE), generator)
    with torch.no_grad():
        weight = task.logit_scale * prompts.features(context).float().to(task.class_features.device)
    head = Prompted(weight=weight, bias=torch.zeros_like(weight[:, 0]), context=context.to(weight.device))
    setting = {"learning_rate": learning_rate, "length": prompts.length}
    return Predictor(head, context.numel(), setting, open_vocabulary=True)


def epochs_for(shots: int) -> int:
    """The authors' number of epochs for `shots` images per class."""
    if shots == 1:
        return 50
    return 100 if shots <= 4 else 200
