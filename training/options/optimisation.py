"""Options of the optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.errors import InputError
from pipelines.methods import method_named, method_names, title_of
from pipelines.optimizers import ADAMW, PRODIGY, optimizer_named
from pipelines.option_checks import above_zero, at_least


def default_rates() -> str:
    """The default learning rates of all methods on SDXL, as text."""
    titles: dict[float, list[str]] = {}
    for name in method_names():
        titles.setdefault(method_named(name).defaults("subject", False).learning_rate, []).append(title_of(name))
    return "; ".join(f"{rate:g} for {', '.join(titles[rate])}" for rate in sorted(titles))


SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass
class OptimisationOptions:
    """Optimiser, schedule and loss."""

    max_train_steps: int = field(default=400, metadata={"help": "Optimisation steps."})
    train_batch_size: int = field(default=4, metadata={"help": "Images per batch on each process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimisation step."})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": f"Peak learning rate. Default on SDXL: {default_rates()}; with Prodigy: 1."},
    )
    text_encoder_lr: list[float] | None = field(
        default=None,
        metadata={"help": "Peak learning rate of the text encoders: one value, or one for each. Default: --learning_rate."},
    )
    stop_text_encoder_training: int | None = field(
        default=None, metadata={"help": "Step after which the text encoders are no longer trained. Default: the last."}
    )
    lr_scheduler: str = field(default="cosine", metadata={"help": f"Schedule of the learning rate: {', '.join(SCHEDULES)}."})
    lr_warmup_steps: int = field(default=10, metadata={"help": "Steps over which the learning rate rises to its peak."})
    lr_num_cycles: int = field(default=1, metadata={"help": "Restarts of the schedule cosine_with_restarts."})
    lr_power: float = field(default=1.0, metadata={"help": "Power of the schedule polynomial."})
    optimizer: str = field(
        default=ADAMW,
        metadata={
            "help": "AdamW; Muon, whose steps on a matrix have equal singular values; or Prodigy (pip install prodigyopt), which "
            "chooses its step size itself."
        },
    )
    use_8bit_adam: bool = field(
        default=False, metadata={"help": "AdamW with 8-bit moments, which need less memory (pip install bitsandbytes)."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "Decay of the optimiser's first moment."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Decay of the optimiser's second moment."})
    adam_weight_decay: float = field(default=1e-4, metadata={"help": "The optimiser's weight decay."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "The optimiser's epsilon."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    use_ema: bool = field(
        default=False, metadata={"help": "Sample, measure and export an exponential moving average of the adapter."}
    )
    ema_decay: float = field(
        default=0.999, metadata={"help": "Largest decay of the moving average; at step k it is at most k / (9 + k)."}
    )
    snr_gamma: float | None = field(
        default=None, metadata={"help": "Gamma of min-SNR weighting, such as 5. Default: no weighting."}
    )
    noise_offset: float = field(
        default=0.0,
        metadata={
            "help": "Standard deviation of a random offset of each channel's noise, such as 0.05, for very dark or bright images."
        },
    )
    do_edm_style_training: bool = field(
        default=False, metadata={"help": "Compute the loss on the denoised image, as EDM does. Always on for EDM models."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all random numbers."})

    _argument_group_name = "optimisation"

    def __post_init__(self) -> None:
        at_least(self, 1, "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "lr_num_cycles")
        at_least(self, 1, "stop_text_encoder_training")
        at_least(self, 0, "lr_warmup_steps", "seed", "adam_weight_decay", "noise_offset")
        above_zero(self, "learning_rate", "lr_power")
        above_zero(self, "max_grad_norm", "snr_gamma", "adam_epsilon")
        if self.lr_scheduler not in SCHEDULES:
            raise InputError(f"lr_scheduler must be one of {', '.join(SCHEDULES)}, got {self.lr_scheduler!r}.")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if self.do_edm_style_training and self.snr_gamma is not None:
            raise InputError(
                "snr_gamma cannot be used with EDM-style training, whose loss has its own weights. Remove one of them."
            )
        self._check_text_encoder_lr()
        self._check_optimizer()

    def _check_text_encoder_lr(self) -> None:
        rates = self.text_encoder_lr
        if rates is not None and not (len(rates) in (1, 2) and all(rate > 0 for rate in rates)):
            given = " ".join(map(str, rates)) or "nothing"
            raise InputError(f"text_encoder_lr must be one or two learning rates above 0, got {given}.")

    def _check_optimizer(self) -> None:
        self.optimizer = optimizer_named(self.optimizer)
        if self.use_8bit_adam and self.optimizer != ADAMW:
            raise InputError(f"use_8bit_adam needs --optimizer AdamW, got {self.optimizer}. Leave one of them out.")
        if self.is_prodigy and self.text_encoder_lr is not None:
            raise InputError(
                "Prodigy adapts one learning rate for all parameters, so text_encoder_lr needs --optimizer AdamW. Leave it out."
            )

    @property
    def images_per_step(self) -> int:
        """Training images of one step on one process."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def is_prodigy(self) -> bool:
        """Whether the optimiser is Prodigy, which chooses its step size itself."""
        return self.optimizer == PRODIGY

    @property
    def text_encoder_batches(self) -> int | None:
        """Number of batches on which the text encoders are trained; None for all."""
        stop = self.stop_text_encoder_training
        return None if stop is None else stop * self.gradient_accumulation_steps
