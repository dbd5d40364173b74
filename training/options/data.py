"""Options of the images and words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.built_in import ASSETS
from pipelines.errors import InputError
from pipelines.option_checks import at_least
from pipelines.subject.captions import SUBJECT_FIELD, find_captioned, subject_folders, subject_name
from pipelines.subject.data import SizeConditioning

SAMPLE_SUBJECT = ASSETS / "sample-subject"
SAMPLE_PROMPT, SAMPLE_CLASS_PROMPT = "a photo of sks toy", "a photo of a toy"


@dataclass
class DataOptions:
    """The subject's images and words."""

    instance_data_dir: str = field(
        default=str(SAMPLE_SUBJECT),
        metadata={
            "help": "Folder with images of the subject, or with a folder of images for each of several subjects. The bundled "
            "toy unless said."
        },
    )
    instance_prompt: str | None = field(
        default=None,
        metadata={
            "help": "What the images show: a rare word and a class word, as in 'a photo of sks dog'; {subject} becomes the "
            "name of its folder. Images with a caption of their own (metadata.jsonl or metadata.csv, or a .txt or "
            ".caption file of their name) keep it; where all have one, it may be left out."
        },
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Side in pixels that images are resized and cropped to; the model's own unless said."}
    )
    aspect_ratio_buckets: str | None = field(
        default=None,
        metadata={
            "help": "Sizes that images are brought to instead of one square, as 'height,width;height,width', or auto for a "
            "range of shapes of about the square's area."
        },
    )
    center_crop: bool = field(
        default=True, metadata={"help": "Crop the middle of images; with --no_center_crop, places drawn at random."}
    )
    crops_per_picture: int = field(default=4, metadata={"help": "With --no_center_crop, different crops of each image."})
    random_flip: bool = field(
        default=False, metadata={"help": "Mirror images at random. Not for subjects with a left and a right, or with writing."}
    )
    size_conditioning: SizeConditioning | None = field(
        default=None,
        metadata={
            "help": "What SDXL is told of an image's size and crop: image, the truth; target, nothing, which is all that the "
            "built-in model knows and its default."
        },
    )
    heldout_image: str = field(
        default="auto",
        metadata={
            "help": "What the loss is measured on: the file name of an image that is left out of training; leave_one_out, each "
            "in turn, in short trainings before the real one; none; or auto: one of five or more, leave_one_out of fewer."
        },
    )
    with_prior_preservation: bool = field(
        default=False, metadata={"help": "Also train on images of the subject's class, so that the model's idea of it stays."}
    )
    class_prompt: str | None = field(
        default=None,
        metadata={
            "help": "What class images show, as in 'a photo of a dog'; a class_prompt.txt in a subject's folder comes first."
        },
    )
    class_data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of class images; those missing are made by the base model and kept for other runs. In the run's "
            "directory unless said."
        },
    )
    num_class_images: int = field(default=100, metadata={"help": "Images of each class."})
    prior_loss_weight: float = field(default=1.0, metadata={"help": "How much the loss of class images counts."})
    sample_batch_size: int = field(default=4, metadata={"help": "Class images drawn at once."})
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Precision in which class images are drawn; that of the training unless said."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for encoded images and prompts, which several runs may share; in the run's directory unless said."
        },
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that decode images and make batches ahead; 0 for the main one."}
    )

    _argument_group_name = "data"

    def __post_init__(self) -> None:
        if self.instance_prompt is None:
            own = Path(self.instance_data_dir).resolve() != SAMPLE_SUBJECT.resolve()
            self.instance_prompt = _first_caption(self.instance_data_dir, self.class_data_dir) if own else SAMPLE_PROMPT
            self.class_prompt = self.class_prompt or (None if own else SAMPLE_CLASS_PROMPT)
        if not self.instance_prompt.strip():
            raise InputError("instance_prompt must not be empty. Name the subject, as in 'a photo of sks dog'.")
        at_least(self, 8, "resolution")
        at_least(self, 0, "dataloader_num_workers", "prior_loss_weight")
        at_least(self, 1, "crops_per_picture", "num_class_images", "sample_batch_size")
        if self.resolution is not None and self.resolution % 8:
            raise InputError(f"resolution must be a multiple of 8, got {self.resolution}.")

    def subject_prompts(self) -> list[str]:
        """The instance prompt, with the name of each subject in its place if it has one."""
        if SUBJECT_FIELD not in self.instance_prompt:
            return [self.instance_prompt]
        names = map(subject_name, subject_folders(self.instance_data_dir, self.class_data_dir))
        return [self.instance_prompt.replace(SUBJECT_FIELD, name) for name in names]


def _first_caption(folder: str, class_data_dir: str | None) -> str:
    """The caption of the first image in `folder`, for images that all have one."""
    try:
        return find_captioned(folder, None, class_data_dir)[0].prompt
    except InputError as error:
        raise InputError(
            "Images of your own need --instance_prompt, a rare word and a class word, as in 'a photo of sks dog', or a caption "
            f"each. {error}"
        ) from error
