"""Options of validation, the compatibility certificate and publishing."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.built_in import BASE_SCORER, BUILT_IN_CLIP, BUILT_IN_CLIP_NAME, CLIP_WEIGHTS
from pipelines.errors import InputError
from pipelines.option_checks import at_least

# On the bundled toy and on photographs, comparing four recommends the same step as comparing all ten; two nearly always do.
BUILT_IN_CANDIDATES, CANDIDATES = 4, 2
# What every base model can generate and no subject is; the built-in one was trained on such captions.
UNRELATED_PROMPTS = (
    "a photo of a school bus",
    "a photo of a goldfish",
    "a photo of a barn",
    "a photo of a pizza",
    "a large red star in the snow",
    "a large blue circle on the grass",
    "a yellow crescent at night",
    "a large white heart in the forest",
)


@dataclass
class ValidationOptions:
    """How a run measures its checkpoints, and what it publishes."""

    heldout_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps between two measurements of the held-out loss. The adapter is saved at each. Default: a tenth of "
            "all steps."
        },
    )
    image_scorer: str | None = field(
        default=None,
        metadata={
            "help": "Model that scores the validation images: 'mini', the built-in CLIP; 'open_clip:MODEL/WEIGHTS'; a CLIP or "
            "DINOv2 model of transformers (hub name or folder); or 'base', the base model itself. Default: mini for the "
            "built-in base model, base for others."
        },
    )
    num_candidate_images: int | None = field(
        default=None,
        metadata={
            "help": "How many saved adapters, those with the lowest held-out loss, are compared by their validation images "
            "before a step is recommended. Missing images are generated after training. Default: 4 for the built-in base "
            "model, 2 for others; 0 generates none."
        },
    )
    evaluate: bool = field(
        default=False,
        metadata={
            "help": "After training, compare images of the last step with held-out and training images, with their prompts, and "
            "with the base model's, also for prompts without the subject."
        },
    )
    num_evaluation_images: int = field(
        default=4, metadata={"help": "Images that --evaluate generates for each of its prompts with the subject."}
    )
    certify: bool = field(
        default=True,
        metadata={"help": "Load the exported files in plain diffusers, in a separate process, and compare the generated images."},
    )
    private: bool = field(
        default=False,
        metadata={"help": "Leave captions, paths, names and images out of all files meant for publishing."},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the published files to the Hugging Face hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository on the hub, as owner/name. Default: the run's name."}
    )
    hub_token: str | None = field(
        default=None, metadata={"help": "Token for the hub; it is never saved. Default: the token of `hf auth login`."}
    )

    _argument_group_name = "validation"

    def __post_init__(self) -> None:
        at_least(self, 1, "heldout_steps", "num_evaluation_images")
        at_least(self, 0, "num_candidate_images")
        if self.image_scorer is not None and not self.image_scorer.strip():
            raise InputError(
                "image_scorer must be 'mini', 'base', 'open_clip:MODEL/WEIGHTS', a hub name or a folder, got an empty text."
            )
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_token is not None):
            raise InputError("hub_model_id and hub_token need --push_to_hub: nothing is uploaded without it.")

    def fill_in(self, built_in: bool, with_images: bool = True) -> None:
        """Set the defaults that depend on whether the base model is `built_in` and there are validation images.

        The built-in CLIP was trained on 64-pixel images like those of the built-in base model. Other base models generate
        images unlike its training data, and a better CLIP is not downloaded unasked, so the base model itself scores them.
        They also take longer to generate, so fewer are compared.

        Raises: InputError if checkpoints are to be compared without validation images.
        """
        if self.image_scorer is None:
            has_scorer = built_in and (BUILT_IN_CLIP / CLIP_WEIGHTS).is_file()
            self.image_scorer = BUILT_IN_CLIP_NAME if has_scorer else BASE_SCORER
        if self.num_candidate_images is None:
            self.num_candidate_images = (BUILT_IN_CANDIDATES if built_in else CANDIDATES) if with_images else 0
        if self.num_candidate_images and not with_images:
            raise InputError(
                f"num_candidate_images must be 0 with --no_validation_images, got {self.num_candidate_images}: saved adapters "
                "are compared by their validation images. Leave one of the two out."
            )

    def measured_every(self, max_train_steps: int) -> int:
        """Steps between two measurements in a training of `max_train_steps`."""
        return self.heldout_steps or max(1, max_train_steps // 10)
