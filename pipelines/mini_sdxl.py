"""The built-in model: a real StableDiffusionXLPipeline, small enough for a CPU. Its shapes and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

RESOLUTION = 64
LATENT_CHANNELS, VAE_FACTOR = 8, 4
MAX_TOKENS = 32
TEXT_WIDTHS = (64, 96)
PROMPT_WORDS = """
a an the of in on at with and or by to from under over near inside behind beside between front top into out up down no not
sks photo image photograph painting drawing portrait close view full small large big little tiny old new red orange yellow
green blue purple pink white black brown grey gray golden silver dark bright light colourful colorful shiny soft
striped dotted checkered plain pattern circle square triangle star heart crescent ring cross diamond letter
toy robot doll figure creature monster dog puppy cat kitten bird fish horse bear teddy rabbit duck animal stuffed plushie wolf
backpack bag candle lamp clock vase bowl cup mug glass bottle can box book shoe sneaker boot hat cap sunglasses glasses chair
table floor wall window door house room kitchen garden park street road city town castle bridge tower eiffel
car truck bus train boat ship bicycle bike plane rocket ball guitar piano
snow grass night day beach forest jungle desert mountain hill field river lake sea ocean water sand rock stone brick wooden wood
sky cloud sun moon stars rain fire ice winter summer autumn spring flower tree leaf mushroom fruit apple banana lemon
person man woman boy girl child people face hand standing sitting lying running jumping flying swimming wearing holding
style high quality blurry low detailed studio background
"""
START, END = "<|startoftext|>", "<|endoftext|>"


def reduced_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with only the merges that spell `words`; any other word is spelled in smaller pieces.

    The vocabulary is CLIP's 512 byte tokens, the merges in CLIP's own order, and the two end tokens.
    """
    full = SimpleTokenizer()
    needed: set[tuple[str, str]] = set()
    for word in sorted({part for text in words for part in text.lower().split()}):
        needed |= _merges_of(word, full)
    merges = sorted(needed, key=full.bpe_ranks.__getitem__)
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS, bos_token=START, eos_token=END, unk_token=END, pad_token=END
    )


def _merges_of(word: str, full: SimpleTokenizer) -> set[tuple[str, str]]:
    """The merges that byte-pair encoding applies to `word`, best rank first."""
    letters = bytes_to_unicode()
    parts = [letters[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    applied: set[tuple[str, str]] = set()
    while len(parts) > 1:
        pair = min(pairwise(parts), key=lambda candidate: full.bpe_ranks.get(candidate, float("inf")))
        if pair not in full.bpe_ranks:
            break
        applied.add(pair)
        at = 0
        while at < len(parts) - 1:
            if (parts[at], parts[at + 1]) == pair:
                parts[at : at + 2] = ["".join(pair)]
            at += 1
    return applied


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder: (3, 64, 64) images to (8, 16, 16) latents, 0.8 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        force_upcast=False,
    )


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet with SDXL's text and size conditioning over (8, 16, 16) latents, 7 M parameters."""
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    return UNet2DConditionModel(
        sample_size=RESOLUTION // VAE_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        block_out_channels=(48, 96, 160),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(3, 3, 5),
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * 32,
        norm_num_groups=16,
    )


def _text_config(width: int, tokenizer: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's two text encoders, untrained, 64 and 96 wide; their penultimate hidden states are used."""
    narrow, wide = TEXT_WIDTHS
    return CLIPTextModel(_text_config(narrow, tokenizer, "quick_gelu")), CLIPTextModelWithProjection(
        _text_config(wide, tokenizer, "gelu")
    )


def new_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR: with few latents, noise prediction would wash out dark and bright images."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def assemble(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
) -> StableDiffusionXLPipeline:
    """Assemble a StableDiffusionXLPipeline; both text encoders share the tokenizer."""
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=new_scheduler(),
        add_watermarker=False,
    )
