"""Pretrain the built-in models from scratch: SDXL's autoencoder, then its UNet with both text encoders; and CLIP.

    accelerate launch training/pretrain_mini.py --images_dir IMAGES --output_dir OUT
    accelerate launch training/pretrain_mini.py --images_dir IMAGES --output_dir OUT --stages clip export_clip

A run that was stopped resumes from its newest checkpoint when it is started again. `--stages` selects the stages.
"""

from __future__ import annotations

from training.engine.console import configure_logging
from training.engine.stopping import exit_codes
from training.options.pretraining import PretrainOptions, parse_pretrain_options

if __name__ == "__main__":
    # Before the slow imports of model libraries, so that --help and wrong flags are answered at once.
    with configure_logging(), exit_codes():
        given_options = parse_pretrain_options()

# isort: split
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTokenizer

from pipelines import mini_sdxl
from pipelines.backgrounds import BACKGROUNDS
from pipelines.corpus import Corpus, to_pixels
from pipelines.mini_losses import AutoencoderLoss, PatchBasis, PretrainingDenoisingLoss
from pipelines.scenes import COLOURS, PATTERNS, SHAPES
from pipelines.subject.generate import SHEET_PROMPTS, contact_sheet
from training.engine.checkpoints import load_checkpoint
from training.engine.loop import LoopOptions, Periodic, Trainable
from training.pretraining.clip import export_clip, train_clip
from training.pretraining.mini_card import CardFacts, write_card
from training.pretraining.stages import (
    PretrainingSampler,
    load_corpus,
    newest_step,
    train_here,
    warmup_stable_decay,
)
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory
from training.runs.run_files import CHECKPOINTS, step_name

BASIS_FILE = "patch-basis.safetensors"


def fit_basis(options: PretrainOptions, corpus: Corpus) -> None:
    """Fit the latent space to scenes and photographs, and save it."""
    scenes, photos = corpus.images[: options.scenes], corpus.images[options.scenes :]
    chosen = [part[:: max(1, len(part) // 2000)] for part in (scenes, photos) if len(part)]
    basis = PatchBasis.fit(to_pixels(np.concatenate(chosen)))
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    save_file(dataclasses.asdict(basis), Path(options.output_dir) / BASIS_FILE)


def load_basis(options: PretrainOptions) -> PatchBasis:
    """Load the latent space that `fit_basis` saved."""
    return PatchBasis(**load_file(Path(options.output_dir) / BASIS_FILE))


def train_vae(options: PretrainOptions, corpus: Corpus) -> None:
    """Train the autoencoder; `trained_vae` loads it."""
    run = RunDirectory.create(Path(options.output_dir) / "vae", dataclasses.asdict(options), PartialState().is_main_process)
    torch.manual_seed(options.seed)
    vae = mini_sdxl.new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.vae_learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    sampler = PretrainingSampler(corpus, options.scenes, min(options.scene_share, 0.5), options.seed)

    def batch_at(index: int) -> dict[str, torch.Tensor]:
        return {"pixels": sampler.draw(index, options.vae_batch_size)[0]}

    loop = LoopOptions(options.vae_steps, seed=options.seed, checkpointing_steps=100)
    trainable = Trainable(
        AutoencoderLoss(vae, load_basis(options)),
        batch_at,
        optimizer,
        warmup_stable_decay(optimizer, options.vae_steps, warmup=50),
    )
    with run.recording():
        train_here(options, run, trainable, loop)


def trained_vae(options: PretrainOptions) -> AutoencoderKL:
    """The autoencoder of the newest checkpoint; its training may still be in progress."""
    module = AutoencoderLoss(mini_sdxl.new_vae(), load_basis(options))
    load_checkpoint(list_checkpoints(Path(options.output_dir) / "vae" / CHECKPOINTS)[-1], module)
    return module.vae.eval()


def caption_tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(count, 2, MAX_TOKENS): each caption as "a photo of ..." and without."""
    bare = [caption.removeprefix("a photo of ") for caption in captions]
    texts = [text for caption in bare for text in (caption, f"a photo of {caption}")]
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.view(len(captions), 2, -1)


def denoising_batches(options: PretrainOptions, corpus: Corpus, tokens: torch.Tensor) -> Callable[[int], dict[str, torch.Tensor]]:
    """The batches of the UNet's training: latents, stratified timesteps, and captions, a tenth of which are dropped."""
    sampler = PretrainingSampler(corpus, options.scenes, options.scene_share, options.seed)
    count, basis = options.unet_batch_size, load_basis(options)

    def batch_at(index: int) -> dict[str, torch.Tensor]:
        pixels, chosen, rng = sampler.draw(index, count)
        latents = basis.encode(pixels)
        as_photo = rng.random(count) < np.where(chosen < options.scenes, 0.3, 0.7)
        timesteps = (rng.permutation(count) + rng.random(count)) * 1000 / count
        return {
            "latents": latents,
            "noise": torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)),
            "timesteps": torch.from_numpy(timesteps.astype(np.int64)),
            "tokens": tokens[chosen, as_photo.astype(np.int64)],
            "keep_caption": torch.from_numpy((rng.random(count) >= 0.1).astype(np.float32)),
        }

    return batch_at


def build_tokenizer(corpus: Corpus) -> CLIPTokenizer:
    """The reduced tokenizer for all words of the corpus and of common prompts."""
    return mini_sdxl.reduced_tokenizer([mini_sdxl.PROMPT_WORDS, *corpus.captions])


def new_denoiser(options: PretrainOptions, tokenizer: CLIPTokenizer) -> PretrainingDenoisingLoss:
    """The untrained UNet and text encoders."""
    torch.manual_seed(options.seed)
    module = PretrainingDenoisingLoss(tokenizer)
    for encoder in (module.text_encoder, module.text_encoder_2):
        # With CLIP's 0.02, the hidden states of a shallow encoder stay near zero, so cross-attention learns nothing for thousands
        # of steps.
        nn.init.normal_(encoder.get_input_embeddings().weight, std=0.5)
    return module


def as_pipeline(
    options: PretrainOptions, module: PretrainingDenoisingLoss, tokenizer: CLIPTokenizer
) -> StableDiffusionXLPipeline:
    """A pipeline of the UNet and text encoders in `module` and the newest autoencoder."""
    return mini_sdxl.assemble(trained_vae(options), module.unet, (module.text_encoder, module.text_encoder_2), tokenizer)


def train_unet(options: PretrainOptions, corpus: Corpus) -> None:
    """Train the UNet and both text encoders on the latents of the finished autoencoder."""
    run = RunDirectory.create(Path(options.output_dir) / "unet", dataclasses.asdict(options), PartialState().is_main_process)
    tokenizer = build_tokenizer(corpus)
    module = new_denoiser(options, tokenizer)
    optimizer = torch.optim.AdamW(module.parameters(), lr=options.unet_learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    batch_at = denoising_batches(options, corpus, caption_tokens(tokenizer, corpus.captions))
    # No moving average: it lags behind while the learning rate falls to zero (checks and dots were worse with a decay of 0.9995).
    trainable = Trainable(module, batch_at, optimizer, warmup_stable_decay(optimizer, options.unet_steps))

    def sample(step: int) -> None:
        contact_sheet(as_pipeline(options, module, tokenizer), SHEET_PROMPTS).save(run.samples / f"{step_name(step)}.png")

    loop = LoopOptions(options.unet_steps, seed=options.seed, checkpointing_steps=100)
    with run.recording():
        train_here(options, run, trainable, loop, [Periodic(options.sample_steps, sample)])


def export(options: PretrainOptions, corpus: Corpus) -> None:
    """Write the weights of the newest checkpoint as a StableDiffusionXLPipeline in fp16 to `mini-sdxl`."""
    folder = Path(options.output_dir)
    tokenizer = build_tokenizer(corpus)
    module = new_denoiser(options, tokenizer)
    load_checkpoint(list_checkpoints(folder / "unet" / CHECKPOINTS)[-1], module)
    pipeline = as_pipeline(options, module, tokenizer)
    pipeline.to(torch.float16).save_pretrained(folder / "mini-sdxl")
    write_card(folder / "mini-sdxl", card_facts(options, corpus, pipeline))


def card_facts(options: PretrainOptions, corpus: Corpus, pipeline: StableDiffusionXLPipeline) -> CardFacts:
    """The facts of the model card; the numbers of steps are those of the newest checkpoints."""
    vae_steps, unet_steps = (newest_step(Path(options.output_dir) / stage) for stage in ("vae", "unet"))
    parts = [(name, part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
    command = "accelerate launch training/pretrain_mini.py --images_dir IMAGES --output_dir OUT"
    return CardFacts(
        parameters="\n".join(f"| {name} | {sum(p.numel() for p in part.parameters()):,} |" for name, part in parts),
        scenes=options.scenes,
        photos=len(corpus) - options.scenes,
        shapes=", ".join(f"{shape}s" if shape != "cross" else "crosses" for shape in SHAPES),
        colours=len(COLOURS),
        patterns=len(PATTERNS),
        num_backgrounds=len(BACKGROUNDS),
        share=options.scene_share if len(corpus) > options.scenes else 1.0,
        vae_steps=vae_steps,
        vae_batch=options.vae_batch_size,
        unet_steps=unet_steps,
        unet_batch=options.unet_batch_size,
        unet_images=unet_steps * options.unet_batch_size,
        rate=options.unet_learning_rate,
        precision=f"mixed precision {options.mixed_precision}" if options.mixed_precision != "no" else "single precision",
        command=f"{command} --unet_steps {unet_steps} --vae_steps {vae_steps} --mixed_precision {options.mixed_precision}",
        note=options.card_note,
        tokens=mini_sdxl.MAX_TOKENS,
    )


STAGES = {
    "basis": fit_basis,
    "vae": train_vae,
    "unet": train_unet,
    "export": export,
    "clip": train_clip,
    "export_clip": export_clip,
}
ALONE = ("basis", "export", "export_clip")


def main(options: PretrainOptions) -> None:
    """Run the stages of the options in order."""
    state = PartialState()
    with state.main_process_first():
        corpus = load_corpus(options)
    for name, stage in STAGES.items():
        if name in options.stages and (state.is_main_process or name not in ALONE):
            stage(options, corpus)
        state.wait_for_everyone()


if __name__ == "__main__":
    with configure_logging(), exit_codes():
        main(given_options)
