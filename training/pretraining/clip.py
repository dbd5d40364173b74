"""The stages of pretraining the built-in CLIP: training, and writing the folder that open_clip loads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from open_clip import CLIP
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer

from pipelines import mini_clip
from pipelines.corpus import HELD_OUT_SHARE, Corpus, corpus_scenes, join, part, rendered_corpus, split_held_out, to_pixels
from pipelines.mini_clip_data import altered, augment, mix_classes, sample_parts
from pipelines.mini_clip_loss import ClassNameLoss
from pipelines.mini_clip_scores import held_out_accuracy, scene_accuracies
from pipelines.mini_sdxl import PROMPT_WORDS, RESOLUTION, reduced_tokenizer
from pipelines.scenes import Scene
from training.engine.checkpoints import load_checkpoint
from training.engine.loop import LoopOptions, Periodic, Trainable
from training.options.pretraining import PretrainOptions
from training.pretraining.clip_card import ClipFacts, write_clip_card
from training.pretraining.stages import PretrainingSampler, newest_step, train_here, warmup_stable_decay
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory
from training.runs.run_files import CHECKPOINTS

UNSEEN_SCENES = 1000
WRONG_CAPTIONS = 4
A_PHOTO = "a photo of "

logger = get_logger(__name__)


@dataclass(frozen=True)
class ClipData:
    """The images and captions that CLIP is trained and evaluated on.

    Args:
        scenes: of the first `len(scenes)` images of `training`.
        training: rendered scenes, then photographs.
        labels: (len(training),) the class of each image, -1 for scenes.
        held_out, held_out_labels: a tenth of every class's photographs.
        names: of the classes, such as "a teapot".
        tokenizer: covers all captions.
    """

    scenes: list[Scene]
    training: Corpus
    labels: np.ndarray
    held_out: Corpus
    held_out_labels: np.ndarray
    names: list[str]
    tokenizer: CLIPTokenizer


def clip_data(options: PretrainOptions, corpus: Corpus) -> ClipData:
    """Split the photographs of `corpus` and label them by their captions.

    Raises: ValueError if there are no photographs, or other code rendered the cached scenes.
    """
    scenes = corpus_scenes(options.scenes, options.seed)
    if [scene.caption for scene in scenes] != corpus.captions[: options.scenes]:
        raise ValueError(
            f"The scenes cached in {options.output_dir!r} are not those of seed {options.seed}. Delete the cached scenes there."
        )
    photos = part(corpus, np.arange(options.scenes, len(corpus)))
    if not len(photos):
        raise ValueError("images_dir must name a folder of photographs for the stages of CLIP, got none.")
    names, labels = np.unique(photos.captions, return_inverse=True)
    train, held_out = split_held_out(photos.captions, HELD_OUT_SHARE, options.seed)
    return ClipData(
        scenes,
        join(part(corpus, np.arange(options.scenes)), part(photos, train)),
        np.concatenate([np.full(options.scenes, -1), labels[train]]),
        part(photos, held_out),
        labels[held_out],
        [name.removeprefix(A_PHOTO) for name in names],
        reduced_tokenizer([PROMPT_WORDS, "thing close image", *corpus.captions]),
    )


class ClipBatches:
    """The batches of the training; batch k depends only on the seed and k."""

    def __init__(self, options: PretrainOptions, data: ClipData) -> None:
        self.data, self.count, self.cutmix = data, options.clip_batch_size, options.clip_cutmix
        self.sampler = PretrainingSampler(data.training, options.scenes, options.clip_scene_share, options.seed)
        self.tokens_of = lru_cache(maxsize=100_000)(self._tokens_of)

    def _tokens_of(self, caption: str) -> torch.Tensor:
        return mini_clip.tokenize(self.data.tokenizer, [caption])[0]

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        """The keyword arguments of `ClassNameLoss` for the `index`-th batch."""
        pixels, chosen, rng = self.sampler.draw(index, self.count)
        labels = torch.from_numpy(self.data.labels[chosen])
        parts = sample_parts(rng)
        prefix = A_PHOTO if rng.random() < 0.5 else ""
        captions = torch.zeros(self.count, 1 + WRONG_CAPTIONS, mini_clip.MAX_TOKENS, dtype=torch.int64)
        for row in np.flatnonzero(labels.numpy() < 0):
            scene = self.data.scenes[chosen[row]]
            scenes = [scene, *(altered(scene, parts, rng) for _ in range(WRONG_CAPTIONS))]
            captions[row] = torch.stack([self.tokens_of(prefix + other.describe(parts)) for other in scenes])
        pixels = augment(pixels, labels.numpy() >= 0, rng)
        pixels, classes = mix_classes(pixels, labels, len(self.data.names), self.cutmix, rng)
        return {
            "pixels": pixels,
            "classes": classes,
            "template": torch.full((self.count,), int(rng.integers(len(mini_clip.TEMPLATES)))),
            "captions": captions[:, 0],
            "wrong": captions[:, 1:],
        }


def model_folder(options: PretrainOptions) -> Path:
    """The folder of the finished model; its configuration is written before training."""
    return Path(options.output_dir) / "mini-clip"


def new_loss(options: PretrainOptions, data: ClipData) -> ClassNameLoss:
    """Write the configuration; returns the loss with the model before training.

    The weights are random, or those in `options.clip_weights`. The anchors then start at the texts of the class names.
    """
    with PartialState().main_process_first():
        mini_clip.write_configuration(model_folder(options), data.tokenizer)
    torch.manual_seed(options.seed)
    names = mini_clip.class_tokens(data.tokenizer, data.names)
    if options.clip_weights is None:
        return ClassNameLoss(mini_clip.new_model(model_folder(options)), names)
    loss = ClassNameLoss(mini_clip.load_model(Path(options.clip_weights)), names)
    loss.anchors.data.copy_(mini_clip.zero_shot_weights(loss.model, names))
    return loss.train()


def decayed_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups: matrices and kernels with weight decay, all others without."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def train_clip(options: PretrainOptions, corpus: Corpus) -> None:
    """Train both towers on scenes and on nine tenths of the photographs."""
    run = RunDirectory.create(Path(options.output_dir) / "clip", dataclasses.asdict(options), PartialState().is_main_process)
    data = clip_data(options, corpus)
    loss = new_loss(options, data)
    optimizer = torch.optim.AdamW(decayed_groups(loss, 0.05), lr=options.clip_learning_rate, betas=(0.9, 0.98))

    def score(step: int) -> float:
        set_normalisation(loss.model, options, data)
        accuracy = held_out_accuracy(loss.model.eval(), data.held_out, data.held_out_labels, loss.names)
        logger.info(f"step {step}: {accuracy:.1%} of the held-out photographs")
        run.log(step, held_out=accuracy)
        return 1 - accuracy

    loop = LoopOptions(options.clip_steps, seed=options.seed, checkpointing_steps=100)
    schedule = warmup_stable_decay(optimizer, options.clip_steps, warmup=200, decay=options.clip_decay_share)
    trainable = Trainable(loss, ClipBatches(options, data), optimizer, schedule)
    with run.recording():
        train_here(options, run, trainable, loop, [Periodic(options.score_steps, score)])


def set_normalisation(model: CLIP, options: PretrainOptions, data: ClipData) -> None:
    """Measure the batch statistics of the image tower on training images without augmentation.

    Those that training leaves are of images with CutMix: the accuracy on other images is eight points lower with them.
    """
    sampler = PretrainingSampler(data.training, options.scenes, options.clip_scene_share, options.seed)
    estimate_normalisation(model.visual, [sampler.draw(index, options.clip_batch_size)[0] for index in range(40)])


@torch.no_grad()
def estimate_normalisation(module: nn.Module, batches: list[torch.Tensor]) -> None:
    """Measure the statistics of all batch normalisations over `batches` of images; checkpoints do not contain them."""
    normalisations = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in normalisations]
    for layer in normalisations:
        layer.reset_running_stats()
        layer.momentum = None
    module.train()
    for pixels in batches:
        module(pixels)
    for layer, momentum in zip(normalisations, momenta, strict=True):
        layer.momentum = momentum
    module.eval()


def trained_clip(options: PretrainOptions, data: ClipData) -> ClassNameLoss:
    """The model of the newest checkpoint, with batch statistics of training images."""
    loss = new_loss(options, data)
    load_checkpoint(list_checkpoints(Path(options.output_dir) / "clip" / CHECKPOINTS)[-1], loss)
    set_normalisation(loss.model, options, data)
    return loss


def export_clip(options: PretrainOptions, corpus: Corpus) -> None:
    """Write the weights of the newest checkpoint in fp16 to `mini-clip`, evaluate the written model, and write its card."""
    data, folder = clip_data(options, corpus), model_folder(options)
    loss = trained_clip(options, data)
    weights = {name: value.contiguous() for name, value in loss.model.state_dict().items()}
    halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_file(halves, folder / mini_clip.WEIGHTS_FILE)
    model = mini_clip.load_model(folder)
    unseen = rendered_corpus(UNSEEN_SCENES, RESOLUTION, options.seed + 1)
    steps = newest_step(Path(options.output_dir) / "clip")
    facts = ClipFacts(
        parameters=sum(p.numel() for p in model.parameters()),
        image_parameters=sum(p.numel() for p in model.visual.parameters()),
        vocabulary=len(data.tokenizer),
        photos=len(data.training) - options.scenes,
        held_out_photos=len(data.held_out),
        classes=len(data.names),
        scenes=options.scenes,
        share=options.clip_scene_share,
        steps=steps,
        batch=options.clip_batch_size,
        images=steps * options.clip_batch_size,
        rate=options.clip_learning_rate,
        decay=options.clip_decay_share,
        cutmix=options.clip_cutmix,
        precision=options.mixed_precision,
        held_out=held_out_accuracy(model, data.held_out, data.held_out_labels, loss.names),
        zero_shot=scene_accuracies(
            model, to_pixels(unseen.images), corpus_scenes(UNSEEN_SCENES, options.seed + 1), data.tokenizer
        ),
        note=options.card_note,
    )
    write_clip_card(folder, facts)
