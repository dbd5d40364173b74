"""Latents and prompt embeddings, computed once and cached on disk."""

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
from pipelines.randomness import RandomStream, keyed_generator
from pipelines.subject.base_model import PromptEmbeddings, encode_images, encode_prompts, text_encoders_of, tokenize
from pipelines.subject.data import CropVariant, Example, SizeConditioning, TrainingImage, image_size, preprocess

# An image's moments and time_ids.
MomentsAndTimeIds = tuple[torch.Tensor, torch.Tensor]
MOMENTS, TIME_IDS, HIDDEN, POOLED = "moments", "time_ids", "hidden", "pooled"


@dataclass(frozen=True)
class CropConfig:
    """How images are resized and cropped.

    Args:
        sizes: (height, width) buckets in pixels; each image gets the one with the nearest aspect ratio.
        random_crops: random crops of each image; 0 for the centre crop alone.
        mirror: also use each crop mirrored.
        size_conditioning: as in `preprocess`.
        seed: of the crops.
    """

    sizes: tuple[Size, ...]
    random_crops: int = 0
    mirror: bool = False
    size_conditioning: SizeConditioning = "image"
    seed: int = 0

    def crop_variants(self, index: int, size: Size) -> tuple[CropVariant, ...]:
        """The crops of image `index` at `size`."""
        crops = [None]
        if self.random_crops:
            generator = keyed_generator(self.seed, RandomStream.CROPS, index)
            offsets = torch.rand((self.random_crops, 2), generator=generator, dtype=torch.float64)
            crops = [(top, left) for top, left in offsets.tolist()]
        return tuple(
            CropVariant(size, crop, mirrored) for mirrored in ((False, True) if self.mirror else (False,)) for crop in crops
        )


@dataclass(frozen=True)
class CachedLatents:
    """Latents of images with their prompts, read from the cache on demand; on the CPU.

    Args:
        sizes: each image's height and width in pixels.
        variants: the number of crops of each image, mirrored ones included.
        read: `read(index, variant)` returns the moments (2, channels, height, width), the scaled mean and standard deviation of
            the latents, and the time_ids (6,), as in `Example`.
        prompt_of: (images,) int64: the index of each image's prompt.
        tokens: (prompts, encoders, tokens) int64.
        prompts: the embeddings of `tokens` by the base model.
    """

    sizes: tuple[Size, ...]
    variants: int
    read: Callable[[int, int], MomentsAndTimeIds]
    prompt_of: torch.Tensor
    tokens: torch.Tensor
    prompts: PromptEmbeddings

    def __len__(self) -> int:
        return len(self.sizes)

    def mean(self, index: int) -> torch.Tensor:
        """(channels, height, width): the mean latents of an image's first variant."""
        return self.read(index, 0)[0][0]

    def time_ids(self, index: int) -> torch.Tensor:
        """(6,): the time_ids of an image's first variant."""
        return self.read(index, 0)[1]

    def buckets(self, sizes: Iterable[Size] | None = None) -> tuple[tuple[int, ...], ...]:
        """The indices of the images of each size, in the order of `sizes`; None for all sizes in ascending order."""
        wanted = sorted(set(self.sizes)) if sizes is None else sizes
        return tuple(tuple(index for index, size in enumerate(self.sizes) if size == bucket) for bucket in wanted)

    def only(self, indices: Sequence[int]) -> CachedLatents:
        """The subset of images at `indices`."""
        sizes = tuple(self.sizes[index] for index in indices)
        return replace(self, sizes=sizes, read=_At(self.read, tuple(indices)), prompt_of=self.prompt_of[list(indices)])


@dataclass(frozen=True)
class _At:
    read: Callable[[int, int], MomentsAndTimeIds]
    indices: tuple[int, ...]

    def __call__(self, index: int, variant: int) -> MomentsAndTimeIds:
        return self.read(self.indices[index], variant)


class CachedImages:
    """Reads latents from the cache; the `max_in_memory` most recent ones stay in memory.

    Args:
        keys: for each image, the cache keys of its variants.
    """

    def __init__(self, keys: Sequence[Sequence[str]], cache: TensorCache, max_in_memory: int = 512) -> None:
        self.keys, self.cache, self.max_in_memory = keys, cache, max_in_memory
        self.memory: dict[str, MomentsAndTimeIds] = {}

    def __call__(self, index: int, variant: int) -> MomentsAndTimeIds:
        """The moments and time_ids of an image, as `CachedLatents.read` returns them.

        Raises: InputError if the cached file was removed or damaged during the run.
        """
        key = self.keys[index][variant]
        moments_and_time_ids = self.memory.pop(key, None)
        if moments_and_time_ids is None:
            tensors = self.cache.read(key)
            if tensors is None:
                raise InputError(
                    f"An entry of the latents cache {str(self.cache.folder)!r} was removed or damaged during the run. "
                    "Resume with --resume_from_checkpoint latest, which computes it again."
                )
            moments_and_time_ids = tensors[MOMENTS], tensors[TIME_IDS]
        self.memory[key] = moments_and_time_ids
        if len(self.memory) > self.max_in_memory:
            del self.memory[next(iter(self.memory))]
        return moments_and_time_ids


class LatentEncoder:
    """Encodes images and prompts with one base model, and caches the results.

    Args:
        pipeline: the base model, without an adapter.
        cache: the cache on disk.
        workers: number of processes that decode images.
        share: rank of this process and number of processes; each encodes its part of the images.
        wait: a barrier across processes; None for a single process.
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
        # Entries with a leading underscore, such as the path, do not affect the latents.
        config = {name: value for name, value in pipeline.vae.config.items() if not name.startswith("_")}
        self.vae = {"vae": module_digest(pipeline.vae), "config": json.dumps(config, default=str, sort_keys=True), **where}
        digests = [module_digest(encoder) for encoder in text_encoders_of(pipeline)]
        self.text = {"text": digests, "zeros": bool(pipeline.config.force_zeros_for_empty_prompt), **where}

    def encode(
        self, images: Sequence[TrainingImage], crop_config: CropConfig, sizes: Sequence[Size] | None = None
    ) -> CachedLatents:
        """Encode all crops of `images` and their prompts; what is in the cache is not computed again.

        Args:
            sizes: (height, width) of each image; None for the nearest of `crop_config.sizes`.
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
            # Other processes have encoded the rest, unless they write to another disk.
            self._encode_missing(jobs)
        unique = list(dict.fromkeys(image.prompt for image in images))
        tokens, prompts = self._prompts(unique)
        prompt_of = torch.tensor([unique.index(image.prompt) for image in images])
        keys = tuple(tuple(key for key, _ in of_image) for of_image in variants)
        return CachedLatents(tuple(sizes), len(keys[0]), CachedImages(keys, self.cache), prompt_of, tokens, prompts)

    def _variants(
        self, images: Sequence[TrainingImage], crop_config: CropConfig, sizes: Sequence[Size]
    ) -> list[list[tuple[str, CropVariant]]]:
        """The crops of each image, each with its cache key."""
        digests = {path: file_digest(path) for path in {image.path for image in images}}
        return [
            [
                (self._key(digests[image.path], variant, crop_config.size_conditioning), variant)
                for variant in crop_config.crop_variants(index, size)
            ]
            for index, (image, size) in enumerate(zip(images, sizes, strict=True))
        ]

    def _key(self, digest: str, variant: CropVariant, conditioning: SizeConditioning) -> str:
        identity = [variant.size, variant.crop, variant.mirrored]
        # The key is called `shot` so that caches of earlier versions stay valid.
        return key_of(image=digest, reading=READING_VERSION, shot=identity, conditioning=conditioning, **self.vae)

    def _encode_missing(self, jobs: Sequence[_Job]) -> None:
        """Encode what is not in the cache, one image at a time, while workers decode the next ones."""
        missing = [replace(job, crop_variants=uncached) for job in jobs if (uncached := self._uncached(job))]
        loader = DataLoader(_Decoded(missing), batch_size=None, num_workers=self.workers)
        for examples in tqdm(loader, desc="encoding images", total=len(missing), delay=5, disable=self.share[0] > 0):
            for key, example in examples.items():
                self.cache.write(key, self._moments(example))

    def _uncached(self, job: _Job) -> dict[str, CropVariant]:
        return {key: variant for key, variant in job.crop_variants.items() if self.cache.read(key) is None}

    def _moments(self, example: Example) -> dict[str, torch.Tensor]:
        # One at a time: in a batch, the last bits would depend on the other images.
        with torch.no_grad():
            return {MOMENTS: encode_images(self.pipeline, example.pixels[None])[0].cpu(), TIME_IDS: example.time_ids}

    def _prompts(self, prompts: Sequence[str]) -> tuple[torch.Tensor, PromptEmbeddings]:
        tokens = tokenize((self.pipeline.tokenizer, self.pipeline.tokenizer_2), prompts).transpose(0, 1)
        embeddings = []
        for prompt, ids in zip(prompts, tokens, strict=True):
            key = key_of(tokens=ids.tolist(), empty=prompt == "", **self.text)
            embeddings.append(self.cache.read_or_make(key, partial(self._embeddings, prompt)))
        hidden, pooled = (torch.stack([entry[name] for entry in embeddings]) for name in (HIDDEN, POOLED))
        return tokens, PromptEmbeddings(hidden, pooled)

    def _embeddings(self, prompt: str) -> dict[str, torch.Tensor]:
        embeddings = encode_prompts(self.pipeline, [prompt])
        return {HIDDEN: embeddings.hidden[0], POOLED: embeddings.pooled[0]}


@dataclass(frozen=True)
class _Job:
    """An image and its crops by cache key."""

    path: Path
    crop_variants: dict[str, CropVariant]
    size_conditioning: SizeConditioning

    def decode(self) -> dict[str, Example]:
        """The preprocessed crops; the file is read once."""
        # Not `read_image`: the image checks have already reported its warnings.
        image = read_image_with_notes(self.path).image
        return {key: preprocess(self.path, image, variant, self.size_conditioning) for key, variant in self.crop_variants.items()}


class _Decoded(Dataset):
    """Decodes images, for worker processes."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> dict[str, Example]:
        return self.jobs[index].decode()
