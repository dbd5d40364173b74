"""Recognition of files that are not a LoRA of SDXL, by tensor names, shapes and metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from nora_vision.files import SafetensorsHeader
from pipelines.subject.lora_files.names import PEFT_PREFIX, split_name

READ = "LoRA, DoRA, LoCon, LoHa, LoKr, (IA)^3, weight differences and norms of SDXL can be loaded"
ADAPTER_REMEDY = f"{READ}. Choose such a file, or convert this one with the program that wrote it."
# Files that are not a LoRA: a pattern of their tensor names, their name, and the remedy. The first match counts.
OTHER_KINDS = (
    (r"\bnora_|^nora\.", "a part of a NoRA adapter", "Give its diffusers or kohya file, or the folder that contains it"),
    (r"^lora_controlnet$|^control_model\.|controlnet_|zero_convs|^input_hint_block", "a ControlNet", None),
    (r"^ip_adapter\.|^image_proj\.|to_[kv]_ip\.", "an IP-adapter", None),
    (r"^adapter\.(body|conv_in)\.", "a T2I-Adapter", None),
    (r"\.b?oft_", "an OFT or BOFT adapter", ADAPTER_REMEDY),
    (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "a GLoRA adapter", ADAPTER_REMEDY),
    (r"\.ia3_l\b", "an (IA)^3 adapter of PEFT", ADAPTER_REMEDY),
    (r"vera_lambda", "a VeRA adapter", ADAPTER_REMEDY),
    (r"lora_embedding_[AB]|token_adapter", "a LoRA of token embeddings", ADAPTER_REMEDY),
    (
        r"^(model\.diffusion_model|conditioner\.embedders|first_stage_model|cond_stage_model)\.",
        "a whole checkpoint and not a LoRA",
        "Give it as the base model, with --pretrained_model_name_or_path",
    ),
    (
        r"^(unet\.)?(conv_in|down_blocks\.0\.resnets\.0\.conv1|time_embedding\.linear_1)\.weight$|^input_blocks\.0\.0\.weight$",
        "a whole UNet and not a LoRA",
        "Give the folder of its model with --pretrained_model_name_or_path",
    ),
    (r"^(encoder|decoder)\.(down|up|conv_in|mid)|^quant_conv\.", "a VAE", "Give it with --pretrained_vae_model_name_or_path"),
    (r"^(text_model\.)?(embeddings|encoder\.layers\.\d+)\..*weight$|^transformer\.resblocks\.", "a text encoder", None),
)
EMBEDDINGS = re.compile(r"(bundle_emb\.[^\x00-\x1f]{1,100}\.)?(clip_[lgh]|emb_params|string_to_param\.\*|t5|t5xxl)(_out)?")
NOT_LORA = f"Only LoRA files can be used here: {READ}."
# Base models other than SDXL, by tensor names that only their files have.
ARCHITECTURE_NAMES = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "Flux"),
    (
        r"joint_blocks|lora_te3_|transformer_blocks\.\d+\.(attn\.add_|ff_context)|transformer_blocks_\d+_(attn_add_|ff_context)",
        "SD3",
    ),
    (r"lora_prior_|prior_unet", "Stable Cascade"),
)
TRANSFORMER = re.compile(
    r"^(lora_transformer_|transformer\.)|^(diffusion_model\.|lora_unet_)?(blocks|layers|transformer_blocks)[._]\d+"
)
# Base models by the metadata, in lower case and without punctuation.
ARCHITECTURE_WORDS = (
    (r"sdxl|stablediffusionxl", "SDXL"),
    (r"flux", "Flux"),
    (r"sd3|stablediffusion3|stablediffusionv3", "SD3"),
    (r"sdv2|sd2|stablediffusionv2|stablediffusion2", "Stable Diffusion 2"),
    (r"sdv1|sd1|stablediffusionv1|stablediffusion1", "Stable Diffusion 1.5"),
    (r"cascade", "Stable Cascade"),
    (r"wan|hunyuan|qwen|lumina|hidream|auraflow|chroma|pixart|ltx|zimage|anima", "another diffusion transformer"),
)
# Base models by the width of the text embeddings in cross-attention.
TEXT_WIDTHS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 1280: "the SDXL refiner", 2048: "SDXL"}
TEXT_LAYER = re.compile(r"attn2[._](processor\.)?to_[kv]")
# SDXL has no attention at its highest resolution.
FINEST_ATTENTION = re.compile(r"down_blocks[._]0[._]attentions|input_blocks[._][12][._]1[._]")


def is_embedding(name: str) -> bool:
    """Whether a tensor's name is that of a textual inversion, by itself or bundled with a LoRA."""
    return EMBEDDINGS.fullmatch(name) is not None


def other_kind_message(header: SafetensorsHeader, path: Path) -> str | None:
    """The message about a file at `path` that is not a LoRA, with the remedy; None if it has the tensors of a LoRA."""
    names = header.tensors
    if not names:
        return f"{path} holds no tensors and so no adapter. Download it again, or choose another file."
    if all(map(is_embedding, names)) or _is_one_embedding(header):
        return f"{path} is a textual inversion (an embedding of a word) and not a LoRA. {NOT_LORA}"
    # Tensors of a LoRA can begin like those of a checkpoint, but end in the name of a part.
    others = [name for name in names if split_name(name) is None]
    for pattern, kind, remedy in OTHER_KINDS:
        match = next((name for name in others if re.search(pattern, name)), None)
        if match is not None:
            advice = NOT_LORA if remedy is None else f"{remedy.rstrip('.')}."
            return f"{path} is {kind} ({match!r:.100}). {advice}"
    if len(others) == len(names):
        return f"{path} holds no adapter, but other tensors such as {others[0]!r:.100}. {NOT_LORA}"
    return None


def _is_one_embedding(header: SafetensorsHeader) -> bool:
    """Whether the file holds a single embedding table, as diffusers saves a textual inversion."""
    shapes = [entry.shape for entry in header.tensors.values()]
    return len(shapes) == 1 and shapes[0][-1:] in [(768,), (1024,), (1280,)] and not any(map(split_name, header.tensors))


def architecture(header: SafetensorsHeader) -> str | None:
    """The base model that a LoRA was trained on, by tensor names and shapes or else by the metadata; None if unknown."""
    names = [name.removeprefix(PEFT_PREFIX) for name in header.tensors if split_name(name)]
    by_name = next((model for pattern, model in ARCHITECTURE_NAMES if _any_has(pattern, names)), None)
    if by_name is not None:
        return by_name
    by_metadata = _by_metadata(header.metadata)
    if by_metadata in (None, "SDXL") and _any_has(TRANSFORMER, names):
        return "a diffusion transformer such as SD3, Flux, Wan or Qwen-Image"
    return _by_text_width(header) or by_metadata or _before_sdxl(names)


def _any_has(pattern: str | re.Pattern[str], names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _by_text_width(header: SafetensorsHeader) -> str | None:
    widths = {entry.shape[1] for name, entry in header.tensors.items() if _reads_text(name) and len(entry.shape) > 1}
    return next((TEXT_WIDTHS[width] for width in sorted(widths) if width in TEXT_WIDTHS), None)


def _before_sdxl(names: Iterable[str]) -> str | None:
    old = any(FINEST_ATTENTION.search(name) or name.startswith("lora_te_") for name in names)
    return "Stable Diffusion 1.5 or 2" if old else None


def _reads_text(name: str) -> bool:
    split = split_name(name)
    return split is not None and split[1] == "down" and TEXT_LAYER.search(split[0]) is not None


def _by_metadata(metadata: Mapping[str, str]) -> str | None:
    for key in ("modelspec.architecture", "ss_base_model_version", "ss_base_model", "base_model"):
        value = re.sub(r"[^a-z0-9]", "", metadata.get(key, "").lower())
        for pattern, model in ARCHITECTURE_WORDS:
            if re.search(pattern, value):
                return model
    return None


def misfit_message(path: Path, header: SafetensorsHeader, reason: str) -> str:
    """The message about a LoRA that does not fit the base model, with the model that it was trained on if that is known."""
    model = architecture(header)
    if model is None:
        return f"{path} does not fit this base model: {reason}. Load it onto the base model that it was trained on."
    if model == "SDXL":
        return (
            f"{path} is a LoRA of SDXL and does not fit this base model: {reason}. Use it with SDXL, or with the SDXL finetune "
            "that it was trained on, as the base model (--pretrained_model_name_or_path)."
        )
    return f"{path} is a LoRA of {model} and does not fit this base model: {reason}. Choose a LoRA that was trained on SDXL."
