"""Images and prompts as the UNet takes them, computed once: decoded in workers, encoded one by one, kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from pipelines.buckets import Size, nearest_bucket
from pipelines.cache import TensorCache, key_of, module_digest
from pipelines.digests import file_digest
from pipelines.errors import InputError
from pipelines.images import READING_VERSION, read_image_with_notes
from pipelines.randomness import Draw, keyed_generator
from pipelines.subject.base_model import PromptEmbeddings, encode_images, encode_prompts, text_encoders_of, tokenize
from pipelines.subject.data import CropVariant, Example, SizeConditioning, TrainingImage, image_size, take

# An image's moments and time_ids.
MomentsAndTimeIds = tuple[torch.Tensor, torch.Tensor]
MOMENTS, TIME_IDS, HIDDEN, POOLED = "moments", "time_ids", "hidden", "pooled"


@dataclass(frozen=True)
class CropConfig:
    """How images are brought to size.

    Args:
        sizes: heights and widths in pixels to choose from; each image gets the one nearest to its shape.
        random_crops: crops of each image, drawn at random; 0 for the one in the middle.
        mirror: also show each image mirrored.
        size_conditioning: as in `take`.
        seed: of the crops.
    """

    sizes: tuple[Size, ...]
    random_crops: int = 0
    mirror: bool = False
    size_conditioning: SizeConditioning = "image"
    seed: int = 0

    def shots(self, index: int, size: Size) -> tuple[CropVariant, ...]:
        """The variants of the `index`-th image at `size`."""
        crops = [None]
        if self.random_crops:
            generator = keyed_generator(self.seed, Draw.CROPS, index)
            offsets = torch.rand((self.random_crops, 2), generator=generator, dtype=torch.float64)
            crops = [(top, left) for top, left in offsets.tolist()]
        return tuple(
            CropVariant(size, crop, mirrored) for mirrored in ((False, True) if self.mirror else (False,)) for crop in crops
        )


@dataclass(frozen=True)
class CachedLatents:
    """Images with their prompts, as the UNet takes them, each read when it is needed; everything lies on the CPU.

    Args:
        sizes: each image's height and width in pixels.
        variants: how many there are of each image: its mirror image, crops.
        read: `read(place, variant)` gives an image's moments (2, channels, height, width), scaled means and deviations of
            its latents, and its time_ids (6,), as in `Example`.
        prompt_of: (images,) int64: which of the prompts is each image's.
        tokens: (prompts, encoders, tokens) int64.
        prompts: the same, encoded by the base model.
    """

    sizes: tuple[Size, ...]
    variants: int
    read: Callable[[int, int], MomentsAndTimeIds]
    prompt_of: torch.Tensor
    tokens: torch.Tensor
    prompts: PromptEmbeddings

    @classmethod
    def in_memory(
        cls, latents: torch.Tensor, time_ids: torch.Tensor, tokens: torch.Tensor, prompts: PromptEmbeddings
    ) -> CachedLatents:
        """Images of one size, each with a prompt of its own.

        Args:
            latents: (images, variants, 2, channels, height, width).
            time_ids: (images, 6), the same for all variants.
            tokens: (images, encoders, tokens) int64.
            prompts: the same, encoded.
        """
        count, variants = latents.shape[:2]
        size = (latents.shape[-2], latents.shape[-1])
        return cls((size,) * count, variants, _InMemory(latents, time_ids), torch.arange(count), tokens, prompts)

    def __len__(self) -> int:
        return len(self.sizes)

    def mean(self, index: int) -> torch.Tensor:
        """(channels, height, width): the mean latents of an image's first variant."""
        return self.read(index, 0)[0][0]

    def time_ids(self, index: int) -> torch.Tensor:
        """(6,): of an image's first variant."""
        return self.read(index, 0)[1]

    def buckets(self, sizes: Iterable[Size] | None = None) -> tuple[tuple[int, ...], ...]:
        """The places of the images of each size, in the order of `sizes`, which are all there are unless given."""
        wanted = sorted(set(self.sizes)) if sizes is None else sizes
        return tuple(tuple(index for index, size in enumerate(self.sizes) if size == bucket) for bucket in wanted)

    def only(self, indices: Sequence[int]) -> CachedLatents:
        """The images at `indices` alone."""
        sizes = tuple(self.sizes[index] for index in indices)
        return replace(self, sizes=sizes, read=_At(self.read, tuple(indices)), prompt_of=self.prompt_of[list(indices)])


@dataclass(frozen=True)
class _InMemory:
    latents: torch.Tensor
    time_ids: torch.Tensor

    def __call__(self, index: int, variant: int) -> MomentsAndTimeIds:
        return self.latents[index, variant], self.time_ids[index]


@dataclass(frozen=True)
class _At:
    read: Callable[[int, int], MomentsAndTimeIds]
    indices: tuple[int, ...]

    def __call__(self, index: int, variant: int) -> MomentsAndTimeIds:
        return self.read(self.indices[index], variant)


class CachedImages:
    """Reads images from the cache; the last `max_in_memory` that were read stay in memory.

    Args:
        keys: of each image's variants.
    """

    def __init__(self, keys: Sequence[Sequence[str]], cache: TensorCache, max_in_memory: int = 512) -> None:
        self.keys, self.cache, self.max_in_memory = keys, cache, max_in_memory
        self.memory: dict[str, MomentsAndTimeIds] = {}

    def __call__(self, index: int, variant: int) -> MomentsAndTimeIds:
        """An image's moments and time_ids, as in `CachedLatents.read`.

        Raises: InputError if the file has gone or was damaged since the start of the run.
        """
        key = self.keys[index][variant]
        moments_and_time_ids = self.memory.pop(key, None)
        if moments_and_time_ids is None:
            tensors = self.cache.read(key)
            if tensors is None:
                raise InputError(
                    f"The cache {str(self.cache.folder)!r} has lost an image while the run went on. Go on with "
                    "--resume_from_checkpoint latest, which computes it anew."
                )
            moments_and_time_ids = tensors[MOMENTS], tensors[TIME_IDS]
        self.memory[key] = moments_and_time_ids
        if len(self.memory) > self.max_in_memory:
            del self.memory[next(iter(self.memory))]
        return moments_and_time_ids


class LatentEncoder:
    """Encodes images and prompts with one base model, and keeps them in a cache.

    Args:
        pipeline: the base model, without any adapter.
        cache: where to keep what is computed.
        workers: processes that decode images.
        share: this process, and how many there are, each of which encodes its part of the images.
        wait: waits until all processes have come so far.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        cache: TensorCache,
        workers: int = 0,
        share: tuple[int, int] = (0, 1),
        wait: Callable[[], None] | None = None,
    ) -> None:
        self.pipeline, self.cache, self.workers, self.share, self.wait = pipeline, cache, workers, share, wait
        where = {"device": pipeline.device.type, "dtype": str(pipeline.dtype)}
        # What begins with an underscore says where the model lies, not what it is.
        config = {name: value for name, value in pipeline.vae.config.items() if not name.startswith("_")}
        self.vae = {"vae": module_digest(pipeline.vae), "config": json.dumps(config, default=str, sort_keys=True), **where}
        digests = [module_digest(encoder) for encoder in text_encoders_of(pipeline)]
        self.text = {"text": digests, "zeros": bool(pipeline.config.force_zeros_for_empty_prompt), **where}

    def encode(
        self, images: Sequence[TrainingImage], crop_config: CropConfig, sizes: Sequence[Size] | None = None
    ) -> CachedLatents:
        """Encode images in every variant, and their prompts, as far as they are not in the cache.

        Args:
            sizes: of each image; the nearest of `framing.sizes` unless given.
        Raises: InputError naming an image that cannot be read.
        """
        if sizes is None:
            sizes = [nearest_bucket(image_size(image.path), crop_config.sizes) for image in images]
        variants = self._variants(images, crop_config, sizes)
        conditioning = crop_config.size_conditioning
        jobs = [_Job(image.path, dict(of_image), conditioning) for image, of_image in zip(images, variants, strict=True)]
        self._encode_missing(jobs[self.share[0] :: self.share[1]])
        if self.wait is not None:
            self.wait()
            # What others have made is there now, unless their disk is another.
            self._encode_missing(jobs)
        unique = list(dict.fromkeys(image.prompt for image in images))
        tokens, prompts = self._prompts(unique)
        prompt_of = torch.tensor([unique.index(image.prompt) for image in images])
        keys = tuple(tuple(key for key, _ in of_image) for of_image in variants)
        return CachedLatents(tuple(sizes), len(keys[0]), CachedImages(keys, self.cache), prompt_of, tokens, prompts)

    def _variants(
        self, images: Sequence[TrainingImage], crop_config: CropConfig, sizes: Sequence[Size]
    ) -> list[list[tuple[str, CropVariant]]]:
        """The shots of each image, each with its key in the cache."""
        digests = {path: file_digest(path) for path in {image.path for image in images}}
        return [
            [
                (self._key(digests[image.path], shot, crop_config.size_conditioning), shot)
                for shot in crop_config.shots(index, size)
            ]
            for index, (image, size) in enumerate(zip(images, sizes, strict=True))
        ]

    def _key(self, digest: str, shot: CropVariant, conditioning: SizeConditioning) -> str:
        identity = [shot.size, shot.crop, shot.mirrored]
        return key_of(image=digest, reading=READING_VERSION, shot=identity, conditioning=conditioning, **self.vae)

    def _encode_missing(self, jobs: Sequence[_Job]) -> None:
        """Encode what is not in the cache, one image after the other, while workers decode those that come next."""
        missing = [replace(job, shots=left) for job in jobs if (left := self._not_kept(job))]
        loader = DataLoader(_Decoded(missing), batch_size=None, num_workers=self.workers)
        for examples in tqdm(loader, desc="encoding images", total=len(missing), delay=5, disable=self.share[0] > 0):
            for key, example in examples.items():
                self.cache.write(key, self._moments(example))

    def _not_kept(self, job: _Job) -> dict[str, CropVariant]:
        return {key: shot for key, shot in job.shots.items() if self.cache.read(key) is None}

    def _moments(self, example: Example) -> dict[str, torch.Tensor]:
        # One by one: in batches, the last bits would depend on what else is in the batch.
        with torch.no_grad():
            return {MOMENTS: encode_images(self.pipeline, example.pixels[None])[0].cpu(), TIME_IDS: example.time_ids}

    def _prompts(self, prompts: Sequence[str]) -> tuple[torch.Tensor, PromptEmbeddings]:
        tokens = tokenize((self.pipeline.tokenizer, self.pipeline.tokenizer_2), prompts).transpose(0, 1)
        token_ids = []
        for prompt, ids in zip(prompts, tokens, strict=True):
            key = key_of(tokens=ids.tolist(), empty=prompt == "", **self.text)
            token_ids.append(self.cache.read_or_make(key, partial(self._embeddings, prompt)))
        hidden, pooled = (torch.stack([entry[name] for entry in token_ids]) for name in (HIDDEN, POOLED))
        return tokens, PromptEmbeddings(hidden, pooled)

    def _embeddings(self, prompt: str) -> dict[str, torch.Tensor]:
        embeddings = encode_prompts(self.pipeline, [prompt])
        return {HIDDEN: embeddings.hidden[0], POOLED: embeddings.pooled[0]}


@dataclass(frozen=True)
class _Job:
    """An image and the shots of it, by their keys in the cache."""

    path: Path
    shots: dict[str, CropVariant]
    size_conditioning: SizeConditioning

    def decode(self) -> dict[str, Example]:
        """The shots, from one reading of the file."""
        # Without the warnings of `read_image`: the doctor has told them.
        image = read_image_with_notes(self.path).image
        return {key: take(self.path, image, shot, self.size_conditioning) for key, shot in self.shots.items()}


class _Decoded(Dataset):
    """Decodes images, for worker processes."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> dict[str, Example]:
        return self.jobs[index].decode()
