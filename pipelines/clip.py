"""CLIP models from open_clip: loading one, and the features of images and texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import pretrained as open_clip_pretrained
from open_clip.model import set_model_preprocess_cfg
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F

from nora_vision.files import PICKLE_SUFFIXES, read_json
from pipelines import mini_clip
from pipelines.built_in import BUILT_IN_CLIP, BUILT_IN_CLIP_NAME
from pipelines.errors import InputError
from pipelines.hub import HubModel, fetch, fetch_file, look_up

BUILT_IN, RANDOM = BUILT_IN_CLIP_NAME, "random"
# Before a name on the hub, as in open_clip: "hf-hub:OWNER/NAME".
HUB = "hf-hub:"
TEXT_FILES = ("*.json", "*.txt", "*.model")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run `model` in evaluation mode without gradients and autocast; afterwards the mode of every module is restored."""
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@dataclass
class Clip:
    """An open_clip model with its preprocessing and tokenizer.

    Args:
        model: open_clip's CLIP or CustomTextCLIP, in evaluation mode, with all weights frozen.
        preprocess: maps a PIL image to pixels (3, h, w), without augmentation.
        tokenizer: maps n texts to token ids (n, t) int64.
        name: of the model and its weights, for messages.
        base_sha256: SHA-256 of the weights before quantisation; None for a model in full precision.
        quantization_errors: ||Q(W) - W|| / ||W|| of quantised encoders, by name.
    """

    model: nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenizer: Callable[[Sequence[str]], torch.Tensor]
    name: str
    base_sha256: str | None = None
    quantization_errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.logit_scale.dtype

    @property
    def logit_scale(self) -> torch.Tensor:
        """The factor from cosine similarities to logits: () float32."""
        return self.model.logit_scale.float().exp().reshape(())

    @property
    def text_tower(self) -> nn.Module:
        """The module with the token embedding and the text transformer, which for some models is the model itself."""
        return getattr(self.model, "text", self.model)

    @property
    def reads_up_to_the_end_token(self) -> bool:
        """Whether tokens after the end token have no effect: attention is causal and pools at the end token."""
        text = self.text_tower
        return (
            getattr(text, "attn_mask", None) is not None
            and getattr(text, "cls_emb", None) is None
            and _pooling(text) in ("argmax", "eos")
        )

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (n, d) float32 of length 1 of preprocessed `pixels` (n, 3, h, w)."""
        return F.normalize(self.model.encode_image(pixels.to(self.device, self.dtype)).float(), dim=-1)

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features (n, d) float32 of length 1 of token ids `tokens` (n, t).

        If tokens after the end token have no effect, only as many are computed as the longest text has.
        """
        tokens = tokens.to(self.device)
        if not self.reads_up_to_the_end_token:
            return F.normalize(self.model.encode_text(tokens).float(), dim=-1)
        ends = self.end_positions(tokens)
        return self.encode_embedded_texts(self.text_tower.token_embedding(tokens[:, : int(ends.max()) + 1]), ends)

    def end_positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """The position (n,) of the end token in each row of `tokens` (n, t), as the model determines it."""
        text = self.text_tower
        if _pooling(text) == "argmax":
            return tokens.argmax(dim=-1)
        end = text.text_eos_id if text is self.model else text.eos_id
        return (tokens == end).int().argmax(dim=-1)

    def encode_embedded_texts(self, embedded: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Features (n, d) float32 of length 1 of texts given as token embeddings, such as learned contexts.

        Args:
            embedded: (n, t, width), without position embeddings; t is at most the context length of the model.
            ends: (n,), position of each end token.
        Raises: InputError if tokens after the end token have an effect (see `reads_up_to_the_end_token`).
        """
        text = self.text_tower
        if not self.reads_up_to_the_end_token:
            raise InputError(
                f"Learned contexts need a causal text encoder that pools at the end token, as in CLIP, unlike that of "
                f"{self.name}. Use another model."
            )
        length, dtype = embedded.shape[1], self.dtype
        hidden = embedded.to(dtype) + text.positional_embedding[:length].to(dtype)
        hidden = text.ln_final(text.transformer(hidden, attn_mask=text.attn_mask[:length, :length]))
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), ends]
        projection = text.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection
        return F.normalize(pooled.float(), dim=-1)


def load_clip(
    model: str = "ViT-B-16",
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Clip:
    """Load an open_clip model, frozen and in evaluation mode.

    Args:
        model: "mini", the built-in model; a folder with an open_clip_config.json; "hf-hub:OWNER/NAME", the same on the hub; or a
            name that open_clip knows.
        pretrained: for a name that open_clip knows, one of its tags such as "openai", a .safetensors checkpoint in
            open_clip's layout, or "random" for untrained weights; for a folder a checkpoint in place of its own.
    Raises: InputError if the model or its weights cannot be loaded.
    """
    if model == BUILT_IN or Path(model).is_dir():
        clip = _from_folder(BUILT_IN_CLIP if model == BUILT_IN else Path(model), model, pretrained)
    elif model.startswith(HUB):
        clip = _from_folder(_hub_folder(model.removeprefix(HUB)), model, pretrained)
    elif model in open_clip.list_models():
        clip = _from_open_clip(model, pretrained)
    else:
        model_names = ", ".join(name for name in open_clip.list_models() if name.startswith("ViT-B"))
        raise InputError(
            f"model must be {BUILT_IN!r}, a folder with {mini_clip.CONFIG_FILE}, '{HUB}OWNER/NAME' on the hub, or a name that "
            f"open_clip knows, such as {model_names}; got {model!r}."
        )
    # Convolutions are faster with this memory format: an image of the built-in model takes three quarters of the time.
    clip.model.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    return clip


def checkpoint_metadata(model: nn.Module) -> dict[str, str]:
    """The activation and the preprocessing, which neither the weights nor the name of the model determine."""
    return {
        "quick_gelu": json.dumps(any(isinstance(module, QuickGELU) for module in model.modules())),
        "preprocess_cfg": json.dumps(open_clip.get_model_preprocess_cfg(model)),
    }


def _from_folder(folder: Path, name: str, pretrained: str | None) -> Clip:
    """Load a model from a folder that `training/pretrain_mini.py` or open_clip wrote."""
    for file in (mini_clip.CONFIG_FILE, mini_clip.WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise InputError(
                f"The folder of a CLIP model must contain {file}, but {str(folder)!r} does not. Use another folder, or train a "
                "model with training/pretrain_mini.py."
            )
    weights = _checked_weights(folder / mini_clip.WEIGHTS_FILE)
    other = None if pretrained is None else _checked_weights(Path(pretrained))
    configuration = read_json(folder / mini_clip.CONFIG_FILE)
    # The tokenizer is in the folder itself.
    text = {**configuration.get("model_cfg", {}).get("text_cfg", {}), "hf_tokenizer_name": None}
    tower = {"text_cfg": _with_text_files(text)} if text.get("hf_model_name") else {}
    with _weights_that_fit(weights, name):
        if (folder / mini_clip.VISION_FOLDER).is_dir():
            model = mini_clip.load_model(folder)
        else:
            model = open_clip.create_model(f"local-dir:{folder}", **tower)
    if other is not None:
        with _weights_that_fit(other, name):
            open_clip.load_checkpoint(model, str(other))
    preprocess = _preprocess(model, configuration.get("preprocess_cfg", {}))
    title = name if other is None else f"{name} ({pretrained})"
    return Clip(model, preprocess, open_clip.get_tokenizer(f"local-dir:{folder}"), title)


def _from_open_clip(name: str, pretrained: str | None) -> Clip:
    """Load the open_clip model `name` with the weights of a tag or a file, or with random weights."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    settings = dict(open_clip_pretrained.get_pretrained_cfg(name, pretrained)) if pretrained in tags else {}
    if settings:
        weights = _downloaded(name, pretrained, settings)
    elif pretrained == RANDOM:
        weights = None
    elif pretrained is not None and (Path(pretrained).is_file() or Path(pretrained).suffix):
        weights = _checked_weights(Path(pretrained))
        settings = _settings_in(weights)
    else:
        raise InputError(
            f"pretrained must be one of the tags {', '.join(tags)} of {name}, a .safetensors file, or {RANDOM!r}; "
            f"got {pretrained!r}."
        )
    text = _with_text_files(open_clip.get_model_config(name)["text_cfg"])
    with _weights_that_fit(weights, name):
        model = open_clip.create_model(
            name,
            pretrained=None if weights is None else str(weights),
            # Weights may need another activation than the model's configuration; for tags, open_clip only warns.
            force_quick_gelu=bool(settings.get("quick_gelu", False)),
            **({"text_cfg": text} if text.get("hf_model_name") else {}),
        )
    return Clip(model, _preprocess(model, settings), _tokenizer(name, text), f"{name} ({pretrained})")


def _settings_in(weights: Path) -> dict[str, Any]:
    """The settings that `checkpoint_metadata` wrote into a checkpoint, in the form of a tag's; defaults for other checkpoints."""
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        stored = {name: json.loads(metadata[name]) for name in ("quick_gelu", "preprocess_cfg") if name in metadata}
    except json.JSONDecodeError as error:
        raise InputError(f"{weights} has malformed metadata: {error}. Write the checkpoint again.") from error
    return {**stored.get("preprocess_cfg", {}), "quick_gelu": stored.get("quick_gelu", False)}


def _preprocess(model: nn.Module, settings: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """The preprocessing with `settings`, such as those of a tag; also stored on the model, as open_clip does."""
    preprocess_cfg = merge_preprocess_dict(PreprocessCfg(), open_clip.get_model_preprocess_cfg(model))
    preprocess_cfg = merge_preprocess_dict(preprocess_cfg, {**settings, "size": model.visual.image_size})
    set_model_preprocess_cfg(model, preprocess_cfg)
    return image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)


def _downloaded(name: str, tag: str, settings: dict[str, Any]) -> Path:
    """The safetensors file of a tag's weights, from the hub or its cache.

    Raises: InputError if they are unavailable, or exist only as a pickle.
    """
    instead = f"another tag of {name}, or --model {BUILT_IN}"
    if settings.get("file"):
        return _checked_weights(Path(settings["file"]))
    repository, _, file = settings.get("hf_hub", "").rpartition("/")
    if not repository:
        raise InputError(
            f"The weights {tag!r} of {name} exist only as a pickle, which is not opened. Give a .safetensors checkpoint as "
            f"--pretrained, {instead}."
        )
    # As in open_clip, a file with another suffix holds the same weights in another format.
    file = f"{Path(file).stem}.safetensors" if file else mini_clip.WEIGHTS_FILE
    role, local = f"{tag!r} weights of {name} at", f"give --pretrained a .safetensors checkpoint, {instead}"
    model = HubModel(repository, role=role, local=local)
    lookup = look_up(model, file)
    if file not in lookup.files:
        raise InputError(
            f"The weights {tag!r} of {name} exist only as a pickle, which is not opened: {repository!r} has no {file}. Give a "
            f".safetensors checkpoint as --pretrained, {instead}."
        )
    return _checked_weights(fetch_file(model, file, lookup))


def _hub_folder(name: str) -> Path:
    """The folder in the hub's cache of a model in open_clip's layout; missing files are downloaded.

    Raises: InputError if the model is unavailable, or has no .safetensors weights.
    """
    model = HubModel(name, role="CLIP model", local=f"give --model a folder with {mini_clip.CONFIG_FILE}, or {BUILT_IN!r}")
    lookup = look_up(model, mini_clip.CONFIG_FILE)
    for file in (mini_clip.CONFIG_FILE, mini_clip.WEIGHTS_FILE):
        if file not in lookup.files:
            raise lookup.unavailable or InputError(
                f"The CLIP model {name!r} on the hub must have {file}, but does not. Give --model a name that open_clip knows, "
                f"such as ViT-B-16, or {BUILT_IN!r}."
            )
    return fetch(model, [*TEXT_FILES, mini_clip.WEIGHTS_FILE], lookup)


def _with_text_files(configuration: dict[str, Any]) -> dict[str, Any]:
    """`configuration` of a text encoder with the names of hub repositories replaced by folders in the cache.

    Text encoders from transformers name the repositories of their configuration and tokenizer. Their weights are part of the CLIP
    checkpoint and are not loaded from these repositories, where they may be pickles.

    Raises: InputError if the files are unavailable.
    """
    local = dict(configuration)
    for key, index in (("hf_model_name", "config.json"), ("hf_tokenizer_name", "tokenizer_config.json")):
        name = configuration.get(key)
        if name:
            model = HubModel(name, role="text encoder's files", local="give another --model, such as ViT-B-16")
            local[key] = str(fetch(model, TEXT_FILES, look_up(model, index)))
    return local | ({"hf_model_pretrained": False} if local.get("hf_model_name") else {})


def _tokenizer(name: str, text: Mapping[str, Any]) -> Callable[[Sequence[str]], torch.Tensor]:
    """open_clip's tokenizer for the model `name`, or the tokenizer in the folder that `text` names."""
    folder = text.get("hf_tokenizer_name")
    if not folder:
        return open_clip.get_tokenizer(name)
    length, mode = text.get("context_length", DEFAULT_CONTEXT_LENGTH), text.get("tokenizer_mode")
    return HFTokenizer(folder, context_length=length, tokenizer_mode=mode, **text.get("tokenizer_kwargs", {}))


def _checked_weights(path: Path) -> Path:
    """`path`, after checking that it is a valid safetensors file.

    Raises: InputError if it does not exist, is a pickle, or is damaged.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(
            f"{path} is a pickle by its name, which can run code when opened. Only .safetensors is read. If you trust the "
            "file, convert it: safetensors.torch.save_file(open_clip.factory.load_state_dict(path), 'weights.safetensors')."
        )
    if not path.is_file():
        raise InputError(f"There is no checkpoint {str(path)!r}. Give the path of a .safetensors file.")
    try:
        # This checks the header. Not `read_header`, which refuses integer tensors.
        with safe_open(path, framework="pt"):
            return path
    except SafetensorError as error:
        raise InputError(f"{path} is not a valid safetensors file: {error}. Download or write it again.") from error


@contextmanager
def _weights_that_fit(weights: Path | None, name: str) -> Iterator[None]:
    """Turn an error while the model `name` is loaded from `weights` into one that names both."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(f"{weights} does not contain the weights of {name}: {error}") from error


def _pooling(text: nn.Module) -> str | None:
    """How the text encoder pools the features of its tokens."""
    return getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
