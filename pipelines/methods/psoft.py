"""PSOFT: h = W x + B (diag(b) R diag(a) - I) A x,  R orthogonal, B A the rank-r SVD of W, by PEFT  [Wu et al. 2026]."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipelines.adapter_method import TaskDefaults, option, tuner_layers
from pipelines.lazy_modules import nn, torch
from pipelines.option_checks import at_least, below_one
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft.tuners.psoft.layer import PsoftLayer

# Metadata key: by layer, values of the basis that a file does not hold.
BASIS = "psoft_basis"
# The largest difference of these values between two computations of the basis, relative to the largest singular value.
TOLERANCE = 1e-3


@dataclass
class PsoftOptions:
    """Options of PSOFT."""

    rank: int | None = option(None, "rank of the adapted subspace of each weight", **{"few-shot": "psoft_rank"})
    dropout: float = option(0.0, "dropout probability within the adapter")

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        below_one(self, "dropout")


class Psoft(PeftMethod):
    """PSOFT, which rotates the leading singular subspace of each weight. A and B come from its SVD and are not in the file.

    The signs of singular vectors differ between machines. So the file has signs of A and a few values of B, from which the same
    basis is restored, or another one is recognised.
    """

    name = "psoft"
    title = "PSOFT"
    reference = "Wu et al. 2026, Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation"
    parameters = "rank * (rank - 1) // 2 + 2 * rank"
    Options = PsoftOptions
    config_class = "PsoftConfig"
    rank_option = None
    samples_start = False
    fields: ClassVar = {"rank": "r", "dropout": "psoft_dropout"}
    adapts_convolutions = False
    is_low_rank = True

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """PEFT's rank; on the narrow built-in models half of it."""
        return TaskDefaults(1e-3, {"rank": 16 if built_in else 32})

    def misfit_of_size(self, m: int, n: int) -> str | None:
        """A subspace cannot be larger than the weight."""
        rank = self.options.rank
        return None if rank <= min(m, n) else f"rank must be at most {min(m, n)}, got {rank}. Lower rank."

    @classmethod
    def file_metadata(cls, model: nn.Module, adapter_name: str) -> dict[str, str]:
        """The largest entry of each row of A, with its sign, and its place, by layer."""
        return {BASIS: json.dumps({name: _marks(A) for name, (A, _) in _bases(model, adapter_name).items()})}

    @classmethod
    def check_loaded(cls, model: nn.Module, adapter_name: str, metadata: Mapping[str, str], source: Path) -> None:
        """Give the rows of A and the columns of B the signs that they had in training.

        Raises: AdapterFileError if A has other entries here than in training, or the metadata is malformed.
        """
        from nora_vision.files import AdapterFileError

        for name, (A, B) in _bases(model, adapter_name).items():
            marks = _read_marks(metadata.get(BASIS, "{}"), name, A)
            if marks is None:
                raise AdapterFileError(f"{source} does not say which basis the layer {name!r} was trained in. Export it again.")
            positions, values = marks
            here = A.gather(1, positions[:, None])[:, 0]
            if (here.abs() - values.abs()).abs().max() > TOLERANCE:
                raise AdapterFileError(
                    f"{source} does not fit this model: the singular vectors of {name!r} are not those of its training. "
                    "Load it onto the model that it was trained on, or use the file exported for diffusers."
                )
            signs = torch.where(here * values < 0, -1.0, 1.0)
            A.mul_(signs[:, None])
            B.mul_(signs)


def _bases(model: nn.Module, adapter_name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A (r, n) and B (m, r) by layer."""
    from nora_vision.calibration import base_name

    layers: dict[str, PsoftLayer] = {
        base_name(name): layer for name, layer in tuner_layers(model).items() if adapter_name in getattr(layer, "psoft_R", ())
    }
    return {name: layer._get_psoft_ab_cache_buffers(adapter_name) for name, layer in layers.items()}


def _marks(A: torch.Tensor) -> tuple[list[int], list[float]]:
    """For each row of A (r, n), the place of its largest entry and that entry."""
    positions = A.abs().argmax(dim=1)
    return positions.tolist(), [round(value, 5) for value in A.gather(1, positions[:, None])[:, 0].tolist()]


def _read_marks(text: str, name: str, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The `_marks` of the layer called `name` in the metadata `text`; None if there are none for A (r, n)."""
    try:
        positions, values = json.loads(text)[name]
        marks = torch.tensor(positions, device=A.device), torch.tensor(values, device=A.device)
    except (KeyError, RuntimeError, TypeError, ValueError):
        return None
    fit = all(part.shape == A.shape[:1] for part in marks) and not marks[0].is_floating_point()
    return marks if fit and bool(((marks[0] >= 0) & (marks[0] < A.shape[1])).all()) else None


METHOD = Psoft
