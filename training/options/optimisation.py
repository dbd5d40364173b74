"""Options of the optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffusers.optimization import SchedulerType

from pipelines.errors import InputError
from training.options.checks import above_zero, at_least


@dataclass
class OptimisationOptions:
    """How the adapter is trained."""

    max_train_steps: int = field(default=400, metadata={"help": "Optimisation steps."})
    train_batch_size: int = field(default=4, metadata={"help": "Pictures a batch on each process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches an optimisation step."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate; on SDXL 3e-4 for nora and 1e-4 for lora unless said."}
    )
    lr_scheduler: str = field(
        default="cosine", metadata={"help": f"Schedule of the learning rate: {', '.join(kind.value for kind in SchedulerType)}."}
    )
    lr_warmup_steps: int = field(default=10, metadata={"help": "Steps over which the learning rate rises to its peak."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's decay of the gradient's mean."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's decay of the gradient's square."})
    adam_weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's weight decay."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    snr_gamma: float | None = field(default=None, metadata={"help": "Gamma of min-SNR weighting, such as 5; none unless said."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})

    _argument_group_name = "optimisation"

    def __post_init__(self) -> None:
        at_least(self, 1, "max_train_steps", "train_batch_size", "gradient_accumulation_steps")
        at_least(self, 0, "lr_warmup_steps", "seed", "adam_weight_decay")
        above_zero(self, "learning_rate", "max_grad_norm", "snr_gamma", "adam_epsilon")
        allowed = [kind.value for kind in SchedulerType]
        if self.lr_scheduler not in allowed:
            raise InputError(f"lr_scheduler must be one of {', '.join(allowed)}, got {self.lr_scheduler!r}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
