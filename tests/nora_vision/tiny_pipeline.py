"""A StableDiffusionXLPipeline of the real classes with random weights, which runs in a fraction of a second."""

import warnings

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nora_vision import NoraConfig, NoraLayer

MAX_LENGTH = 16
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# Linear layers and convolutions, with different choices in the text encoders.
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj"],
    "text_encoder": ["q_proj", "v_proj", "out_proj", "fc1"],
    "text_encoder_2": ["k_proj", "fc2"],
}


def byte_tokenizer() -> CLIPTokenizer:
    """CLIPTokenizer that spells every word letter by letter: 256 bytes, the same at a word's end, and two marks."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=MAX_LENGTH)


def _text_config(hidden_size: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=hidden_size,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_unet(cross_attention_dim: int = 40, pooled_dim: int = 24, levels: int = 2) -> UNet2DConditionModel:
    """A small UNet with SDXL's layout: a plain block, then blocks with transformers, text_time conditioning.

    SDXL has 3 `levels`, which take almost three times as long as 2.
    """
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")[:levels]
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 24)[:levels],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        transformer_layers_per_block=(1, 1, 2)[:levels],
        attention_head_dim=(1, 2, 3)[:levels],
        cross_attention_dim=cross_attention_dim,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=pooled_dim + 6 * 8,
    )


def tiny_pipeline(seed: int = 0, levels: int = 2) -> StableDiffusionXLPipeline:
    """The whole pipeline with the UNet of so many `levels`; the same seed gives the same weights. Images are 16 x 16."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer()
        pipe = StableDiffusionXLPipeline(
            vae=AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
                              down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
            text_encoder=CLIPTextModel(_text_config(16, tokenizer)),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(24, tokenizer)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=tiny_unet(levels=levels),
            scheduler=EulerDiscreteScheduler(),
            add_watermarker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    for component in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.unet):
        component.eval().requires_grad_(False)
    return pipe


def image(pipe: StableDiffusionXLPipeline, prompt: str = "a red star", seed: int = 0) -> torch.Tensor:
    """One image of two steps with a fixed start, (16, 16, 3) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    output = pipe(prompt, num_inference_steps=2, guidance_scale=3.0, height=16, width=16, generator=generator, output_type="np")
    return torch.from_numpy(output.images[0])


def add_nora(
    pipe: StableDiffusionXLPipeline,
    adapter_name: str = "default",
    seed: int = 0,
    components: tuple[str, ...] = COMPONENTS,
    **options: object,
) -> None:
    """Add a NoRA adapter with random inner factors that change the images clearly; `options` go to NoraConfig."""
    generator = torch.Generator().manual_seed(seed)
    for component in components:
        model = getattr(pipe, component)
        config = NoraConfig(**({"r": 6, "inner_r": 3, "alpha": 6.0, "target_modules": TARGETS[component]} | options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter(config, adapter_name)
        randomise_inner_factors(model, adapter_name, generator, std=0.3 if component == "unet" else 1.0)


@torch.no_grad()
def randomise_inner_factors(model: torch.nn.Module, adapter_name: str, generator: torch.Generator, std: float) -> None:
    """Randomise the inner factors, as after training."""
    for layer in model.modules():
        if isinstance(layer, NoraLayer) and adapter_name in layer.r:
            for factors in (layer.nora_inner_A[adapter_name], layer.nora_inner_B[adapter_name]):
                factors.copy_(std * torch.randn(factors.shape, generator=generator))


def weight_changes(pipe: StableDiffusionXLPipeline, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The adapter's weight changes by component and layer, for NoRA and LoRA."""
    return {
        f"{component}.{name}": layer.get_delta_weight(adapter_name).detach()
        for component in COMPONENTS
        for name, layer in getattr(pipe, component).named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter_name in layer.r
    }
