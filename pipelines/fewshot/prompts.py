"""The prompts of the classes, the same in training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.errors import InputError
from pipelines.lazy_modules import functional as F
from pipelines.lazy_modules import torch

BLANK = "{}"
PHOTO = "a photo of a {}."
# Templates by name; those of the eleven datasets are CoOp's.  [Zhou et al. 2022, table 5]
TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": (PHOTO,),
    "imagenet": (PHOTO,),
    "caltech101": (PHOTO,),
    "oxford_pets": ("a photo of a {}, a type of pet.",),
    "stanford_cars": (PHOTO,),
    "oxford_flowers": ("a photo of a {}, a type of flower.",),
    "food101": ("a photo of {}, a type of food.",),
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.",),
    "sun397": (PHOTO,),
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "ucf101": ("a photo of a person doing {}.",),
    "digits": ('a photo of the number: "{}".',),
}
# Ensembles by name, with their names in open_clip.
ENSEMBLES = {"ensemble": "SIMPLE_IMAGENET_TEMPLATES", "ensemble80": "OPENAI_IMAGENET_TEMPLATES"}
TEMPLATE_NAMES = ("photo", *ENSEMBLES, *(name for name in TEMPLATES if name != "photo"))


def templates_named(name: str) -> tuple[str, ...]:
    """The templates called `name`, one of `TEMPLATE_NAMES`."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    # Imported here: open_clip takes seconds to import, and --help needs only the names.
    import open_clip

    return tuple(template(BLANK) for template in getattr(open_clip, ENSEMBLES[name]))


def clean_name(name: str) -> str:
    """A class name as used in prompts: underscores become spaces."""
    return " ".join(name.replace("_", " ").split())


@dataclass(frozen=True)
class Prompts:
    """The prompts of all classes: every template with every class name.

    Args:
        classes: names of the classes.
        templates: with {} in place of the class name, such as "a photo of a {}.".
    Raises: InputError for a template without {} or with several.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...] = TEMPLATES["photo"]

    def __post_init__(self) -> None:
        if not self.templates:
            raise InputError("templates must contain at least one prompt template, got none. Use one such as 'a photo of a {}.'")
        for template in self.templates:
            if template.count(BLANK) != 1:
                raise InputError(
                    f"A prompt template must contain {BLANK} once, in place of the class name, got {template!r}. Write it like "
                    f"{PHOTO!r}, or use one of the names {', '.join(TEMPLATE_NAMES)}."
                )

    def of_each_class(self) -> tuple[tuple[str, ...], ...]:
        """The prompts of each class, in the order of the templates."""
        return tuple(tuple(template.replace(BLANK, clean_name(name)) for template in self.templates) for name in self.classes)

    def texts(self) -> list[str]:
        """All prompts, class by class."""
        return [text for class_prompts in self.of_each_class() for text in class_prompts]

    def class_features(self, features: torch.Tensor) -> torch.Tensor:
        """The mean over the prompts of each class, normalised to length 1.  [Radford et al. 2021, section 3.1.4]

        Args:
            features: (classes * templates, d), of `texts()`.
        Returns: (classes, d) of length 1.
        """
        by_class = F.normalize(features, dim=-1).unflatten(0, (len(self.classes), len(self.templates)))
        return F.normalize(by_class.mean(dim=1), dim=-1)

    def with_classes(self, *more: str) -> Prompts:
        """The prompts with further classes appended.

        Raises: InputError for an empty name, or the name of an existing class.
        """
        names_before = {clean_name(name) for name in self.classes}
        for name in more:
            if clean_name(name) in names_before or not clean_name(name):
                raise InputError(f"The name of a new class must not be empty or in use, got {name!r}. Choose another.")
            names_before.add(clean_name(name))
        return replace(self, classes=(*self.classes, *more))


def make_prompts(classes: Sequence[str], templates: str | Sequence[str] = "photo") -> Prompts:
    """The prompts of `classes`.

    Args:
        templates: one of `TEMPLATE_NAMES`, one template, or several.
    Raises: InputError for an unknown name or a template without {}.
    """
    if isinstance(templates, str):
        templates = templates_named(templates) if templates in TEMPLATE_NAMES else (templates,)
    return Prompts(tuple(classes), tuple(templates))
