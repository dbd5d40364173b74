"""The base model to generate with: the one given, or the one that an adapter's run was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.built_in import BUILT_IN, BUILT_IN_MODEL, is_built_in, recorded_name
from pipelines.digests import file_digest
from pipelines.errors import InputError
from pipelines.run_file import Provenance
from pipelines.run_options import check_task

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline

NAME = "pretrained_model_name_or_path"
# Settings of the training that also apply if the base model is given by another path.
OF_THE_TRAINING = ("prediction_type", "rescale_betas_zero_snr")
# Options whose values may be local paths.
LOCAL_PARTS = (NAME, "pretrained_vae_model_name_or_path", "single_file_config")
FIELDS = (*LOCAL_PARTS, "revision", "variant", *OF_THE_TRAINING)


@dataclass(frozen=True)
class ModelSource:
    """The parts of a base model and its prediction type, named as in a run's options; see `load_base_model`.

    Args:
        run: the run that recorded them, for error messages; None if the user gave them.
    """

    pretrained_model_name_or_path: str = BUILT_IN
    pretrained_vae_model_name_or_path: str | None = None
    revision: str | None = None
    variant: str | None = None
    single_file_config: str | None = None
    prediction_type: str | None = None
    rescale_betas_zero_snr: bool | None = None
    run: str | None = field(default=None, compare=False)

    @classmethod
    def from_options(cls, model: Mapping[str, Any]) -> ModelSource:
        """The base model of a run, from the group `model` of its options; options that old runs lack are None."""
        given = {name: model.get(name) for name in FIELDS}
        return cls(**given | {NAME: recorded_name(str(given[NAME] or BUILT_IN))})

    def load(self, dtype: torch.dtype, device: torch.device | str) -> StableDiffusionXLPipeline:
        """The pipeline; see `load_base_model`.

        Raises: InputError naming the part that cannot be loaded and, for a run's model, the option for its new path.
        """
        try:
            return self._load(dtype, device)
        except InputError as error:
            if self.run is None:
                raise
            raise InputError(
                f"The base model of the run {self.run!r} cannot be loaded: {error} If it was moved, give --{NAME} its new path."
            ) from error

    def _load(self, dtype: torch.dtype, device: torch.device | str) -> StableDiffusionXLPipeline:
        # Imported here, as `generate --help` reads this file, and diffusers takes seconds to import.
        from pipelines.subject.base_model import load_base_model

        return load_base_model(
            self.pretrained_model_name_or_path,
            dtype,
            device,
            variant=self.variant,
            revision=self.revision,
            vae=self.pretrained_vae_model_name_or_path,
            single_file_config=self.single_file_config,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.rescale_betas_zero_snr,
        )


def source_of(adapters: Sequence[str], given: Mapping[str, Any]) -> ModelSource:
    """The base model to generate with.

    Args:
        adapters: paths. If the first one is a run directory, its base model is the default, and its prediction type applies to
            another base model too.
        given: the user's values, by the names of `FIELDS`; None for values that were not given.
    Raises: InputError for a run of another task, or one whose base model was moved.
    """
    recorded = [check_task(adapter, "subject") for adapter in adapters]
    values = {name: value for name, value in given.items() if value is not None}
    source = ModelSource()
    if recorded and recorded[0] is not None and "model" in recorded[0]:
        source = replace(ModelSource.from_options(recorded[0]["model"]), run=str(adapters[0]))
    if NAME in values:
        source = ModelSource(**{name: getattr(source, name) for name in OF_THE_TRAINING})
    source = replace(source, **values)
    if source.run is not None:
        _check_parts(source, values)
    return source


def _check_parts(source: ModelSource, given: Mapping[str, Any]) -> None:
    """Raise InputError if a run's base model was moved, or is another version of the built-in one."""
    for name in (name for name in LOCAL_PARTS if name not in given):
        value = getattr(source, name)
        if value is not None and Path(value).is_absolute() and not Path(value).exists():
            raise InputError(
                f"The run {source.run!r} was trained with {name} {value!r}, which no longer exists. Give --{name} its new path."
            )
    provenance = Provenance.read(Path(source.run))
    if is_built_in(source.pretrained_model_name_or_path) and provenance is not None:
        _check_version(source, provenance.base_model.get("files", {}))


def _check_version(source: ModelSource, files: Mapping[str, str]) -> None:
    """Raise InputError if a run was trained on another version of the built-in model, by the hashes of its `files`."""
    here = {name: file_digest(file) for name in files if (file := BUILT_IN_MODEL / name).is_file()}
    if here != files:
        raise InputError(
            f"The run {source.run!r} was trained on another version of the built-in model, whose files have a different SHA-256. "
            f"Give --{NAME} the folder assets/{BUILT_IN} of the checkout in which it was trained, or train again."
        )
