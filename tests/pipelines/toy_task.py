"""A few-shot task of random unit features as wide as a tiny CLIP's, and that CLIP."""

import torch
from tiny_clip import END, tiny_clip
from torch.nn import functional as F

from pipelines.clip import Clip
from pipelines.fewshot.baselines.task import Examples, FewShotTask
from pipelines.fewshot.projection import ImageProjection

CLASSES, WIDTH, START = ("cat", "grey_dog", "teapot"), 24, 48


def directions(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def toy_task(shots=6, noise=0.6, poisoned=False, clip=None, views=2, class_features=None, scale=20.0):
    """Images around a centre of each class, prompts that point there roughly. Test images lie behind in the same tensors.

    Args:
        poisoned: whether all that is known of the test images is NaN.
    """
    centres = directions(len(CLASSES), WIDTH, seed=0)
    counts = {"train": shots, "validation": min(shots, 4), "test": 20}
    labels = torch.cat([torch.arange(len(CLASSES)).repeat(count) for count in counts.values()])
    spread = noise * torch.randn(1 + views, len(labels), WIDTH, generator=torch.Generator().manual_seed(1))
    features = F.normalize(centres[labels] + spread / WIDTH**0.5, dim=-1)
    pixels = centres[labels].repeat(1, 2) + torch.rand(len(labels), 2 * WIDTH, generator=torch.Generator().manual_seed(2))
    train, validation = len(CLASSES) * shots, len(CLASSES) * (shots + counts["validation"])
    if poisoned:
        features[:, validation:] = torch.nan
        pixels[validation:] = torch.nan

    def part(start, stop, views=None):
        # As if the projection were the identity.
        embeddings = 5 * (features if views is not None else features[:1])[:, start:stop]
        return Examples(features[0, start:stop], labels[start:stop], pixels[start:stop], views, embeddings)

    prompts = F.normalize(centres + 0.5 * directions(len(CLASSES), WIDTH, seed=3), dim=-1)
    return FewShotTask(
        CLASSES,
        prompts if class_features is None else class_features,
        scale,
        part(0, train, features[1:, :train] if views else None),
        part(train, validation),
        clip,
        ImageProjection(torch.eye(WIDTH), torch.zeros(WIDTH)),
    )


def held_out(task, count=50):
    """Images of the same classes that no fit has seen, and their labels."""
    centres, labels = directions(len(CLASSES), WIDTH, seed=0), torch.arange(len(CLASSES)).repeat(count)
    spread = 0.6 * torch.randn(len(labels), WIDTH, generator=torch.Generator().manual_seed(9))
    return F.normalize(centres[labels] + spread / WIDTH**0.5, dim=-1), labels


def words_to_tokens(texts, context=12):
    """Words as tokens between a start and an end token, cut off behind `context` as open_clip does, padded with zeros."""
    known = ["X", "cat.", "grey", "dog.", "teapot.", "a"]
    rows = []
    for text in texts:
        row = [START, *(1 + known.index(word) for word in text.split()), END][:context]
        row[-1] = END
        rows.append(row + [0] * (context - len(row)))
    return torch.tensor(rows)


def toy_clip(context=12):
    """A CLIP whose features are as wide as the toy's."""
    model = tiny_clip(text_cfg={"context_length": context})
    return Clip(model, preprocess=None, tokenizer=lambda texts: words_to_tokens(texts, context), name="tiny")
