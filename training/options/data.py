"""Options of the pictures and words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipelines.errors import InputError
from pipelines.subject.base_model import ASSETS
from pipelines.subject.data import SizeConditioning
from training.options.checks import at_least

SAMPLE_SUBJECT = ASSETS / "sample-subject"
SAMPLE_PROMPT = "a photo of sks toy"


@dataclass
class DataOptions:
    """The subject's pictures and words."""

    instance_data_dir: str = field(
        default=str(SAMPLE_SUBJECT), metadata={"help": "Folder with pictures of the subject. The bundled toy unless said."}
    )
    instance_prompt: str | None = field(
        default=None, metadata={"help": "What the pictures show: a rare word and a class word, as in 'a photo of sks dog'."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Side in pixels that pictures are resized and cropped to; the model's own unless said."}
    )
    random_flip: bool = field(
        default=False, metadata={"help": "Mirror pictures at random. Not for subjects with a left and a right, or with writing."}
    )
    size_conditioning: SizeConditioning | None = field(
        default=None,
        metadata={
            "help": "What SDXL is told of a picture's size and crop: picture, the truth; target, nothing, which is all that the "
            "built-in model knows and its default."
        },
    )
    heldout_image: str | None = field(
        default=None, metadata={"help": "File name of one of the pictures, left out of training to measure the loss on."}
    )

    _argument_group_name = "data"

    def __post_init__(self) -> None:
        if self.instance_prompt is None:
            if Path(self.instance_data_dir).resolve() != SAMPLE_SUBJECT.resolve():
                raise InputError(
                    "Pictures of your own need --instance_prompt: a rare word and a class word, as in 'a photo of sks dog'."
                )
            self.instance_prompt = SAMPLE_PROMPT
        if not self.instance_prompt.strip():
            raise InputError("instance_prompt must not be empty. Name the subject, as in 'a photo of sks dog'.")
        at_least(self, 8, "resolution")
        if self.resolution is not None and self.resolution % 8:
            raise InputError(f"resolution must be a multiple of 8, got {self.resolution}.")
