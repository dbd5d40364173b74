"""DoRA: h = m (W + s B A) x / ||W + s B A||,  with row norms and a trained m, by PEFT  [Liu et al. 2024]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.methods.lora import Lora, LoraOptions

if TYPE_CHECKING:
    from peft import PeftConfig

EXPORT_NOTE = """The kohya file holds `dora_scale`, the norm of each row of every adapted weight, as LyCORIS writes it with
`wd_on_output`. Other programs read it differently, so their images differ: stock diffusers and sd-scripts ignore it, A1111 takes
it for column norms, and ComfyUI and Forge divide by the norms of the base model. The diffusers file is the adapter as trained."""

SCALE_NOTE = (
    "The norms of rows that DoRA trains have no weight: at an adapter weight below 1 only the low-rank part is weaker, at 0 the "
    "images are not those of the base model, and a DoRA cannot be merged with other adapters."
)


class Dora(Lora):
    """LoRA that also trains the norm of every row of the weight, which is added to LoRA's files."""

    name = "dora"
    title = "DoRA"
    reference = "Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation"
    parameters = "rank * (m + n) + m"
    Options = LoraOptions
    export_note = EXPORT_NOTE
    scale_note = SCALE_NOTE

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """LoRA's configuration with `use_dora`."""
        config = super().config(target_modules, exclude_modules)
        config.use_dora = True
        return config


METHOD = Dora
