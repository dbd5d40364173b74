"""The built-in CLIP, an open_clip model small enough for a CPU: its configuration, files and features.

The image encoder is timm's MaxViT: inverted bottleneck convolutions down to 8 x 8, then alternating convolutions and global
attention. Only its configuration is changed, so stock open_clip loads the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import CLIP
from torch.nn import functional as F
from transformers import CLIPTokenizer

from pipelines.built_in import CLIP_WEIGHTS
from pipelines.mini_sdxl import MAX_TOKENS, RESOLUTION
from pipelines.text_files import read_text

CONFIG_FILE, WEIGHTS_FILE, VISION_FOLDER = "open_clip_config.json", CLIP_WEIGHTS, "vision"
EMBED_DIM, TEXT_WIDTH, TEXT_LAYERS = 192, 128, 2
# timm resolves a folder against the working directory: this path is right in a checkout.
SHIPPED_VISION = f"local-dir:assets/mini-clip/{VISION_FOLDER}"
TEMPLATES = ("a photo of {}", "{}", "an image of {}", "a blurry photo of {}", "a close photo of {}")

VISION_CONFIG: dict[str, Any] = {
    "architecture": "maxvit_nano_rw_256",
    "model_args": {
        "img_size": RESOLUTION,
        "stem_width": [32, 32],
        "embed_dim": [64, 160],
        "depths": [2, 3],
        "block_type": ["C", "M"],
        "conv_expand_ratio": 3.0,
        "conv_stride_mode": "pool",
        # One window over the whole 8 x 8 map, so that attention is global; q, k and v are packed as in other encoders.
        "transformer_window_size": [8, 8],
        "transformer_no_block_attn": True,
        "transformer_head_first": False,
        "transformer_expand_ratio": 3.0,
        "transformer_act_layer": "silu",
    },
    "pretrained_cfg": {"input_size": [3, RESOLUTION, RESOLUTION], "num_classes": 0, "pool_size": [8, 8]},
}


def model_config(vocabulary: int) -> dict[str, Any]:
    """The contents of open_clip_config.json for a tokenizer of `vocabulary` tokens."""
    return {
        "model_cfg": {
            "embed_dim": EMBED_DIM,
            "vision_cfg": {
                "image_size": RESOLUTION,
                "timm_model_name": SHIPPED_VISION,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
            },
            "text_cfg": {
                "context_length": MAX_TOKENS,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": "assets/mini-clip",
                "width": TEXT_WIDTH,
                "heads": TEXT_WIDTH // 32,
                "layers": TEXT_LAYERS,
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def write_configuration(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Write all files of the model's folder except the weights."""
    (folder / VISION_FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(model_config(len(tokenizer)), indent=2) + "\n", encoding="utf-8")
    (folder / VISION_FOLDER / "config.json").write_text(json.dumps(VISION_CONFIG, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def new_model(folder: Path) -> CLIP:
    """The untrained model that the files in `folder` describe, independent of the working directory."""
    config = json.loads(read_text(folder / CONFIG_FILE))["model_cfg"]
    config["vision_cfg"]["timm_model_name"] = f"local-dir:{(folder / VISION_FOLDER).resolve()}"
    return CLIP(**config)


def load_model(folder: Path) -> CLIP:
    """The trained model in `folder`, in single precision and ready to classify."""
    model = new_model(folder)
    open_clip.load_checkpoint(model, str(folder / WEIGHTS_FILE))
    return model.eval()


def encode_texts(model: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """`model.encode_text(tokens, normalize=True)`, computed only up to the longest text.

    Attention is causal and pools at the end token, so later tokens have no effect.

    Args:
        tokens: (count, MAX_TOKENS) int64, the end token repeated as padding.
    Returns: (count, EMBED_DIM), of length 1.
    """
    ends = tokens.argmax(dim=-1)
    length = int(ends.max()) + 1
    hidden = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(hidden[torch.arange(len(tokens)), ends] @ model.text_projection, dim=-1)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Token ids (count, MAX_TOKENS) int64 of `texts`."""
    return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def class_tokens(tokenizer: CLIPTokenizer, names: Sequence[str]) -> torch.Tensor:
    """Token ids (templates, classes, MAX_TOKENS) of every name, such as "a teapot", in every template."""
    return torch.stack([tokenize(tokenizer, [template.format(name) for name in names]) for template in TEMPLATES])


@torch.no_grad()
def zero_shot_weights(model: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """The mean text feature of every class over its templates, (classes, EMBED_DIM), of length 1.

    Args:
        tokens: (templates, classes, MAX_TOKENS).
    """
    return F.normalize(encode_texts(model, tokens.flatten(0, 1)).view(*tokens.shape[:2], -1).mean(dim=0), dim=-1)


@torch.no_grad()
def image_features(model: CLIP, pixels: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """The features of `pixels` (count, 3, RESOLUTION, RESOLUTION) in [-1, 1]: (count, EMBED_DIM), of length 1."""
    return torch.cat([model.encode_image(chunk, normalize=True) for chunk in pixels.split(batch)])
