"""BOFT: h = diag(s) W B_1 ... B_f x,  orthogonal butterfly factors B_i and trained row scales s, by PEFT  [Liu et al. 2024]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.adapter_method import TaskDefaults, option, tuner_layers
from pipelines.block_size import BlockSizeOptions, block_misfit
from pipelines.lazy_modules import nn, torch
from pipelines.option_checks import at_least
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass
class BoftOptions(BlockSizeOptions):
    """Options of BOFT."""

    boft_n_butterfly_factor: int = option(2, "number of butterfly factors; 1 is OFT with row scales", "Butterfly factors")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "boft_n_butterfly_factor")


class Boft(PeftMethod):
    """BOFT. Not on convolutions, for which PEFT keeps square matrices of all in_channels * kh * kw inputs in every layer."""

    name = "boft"
    title = "BOFT"
    reference = "Liu et al. 2024, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization"
    parameters = "boft_n_butterfly_factor * n * block_size + m"
    Options = BoftOptions
    config_class = "BOFTConfig"
    adapts_quantized_layers = True
    samples_start = False
    fields: ClassVar = {"block_size": "boft_block_size"}
    adapts_convolutions = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """PEFT's block size, of which 2^f times divides all widths of SDXL and CLIP for f = 2."""
        return TaskDefaults(1e-4 if task == "subject" else 1e-3, {"block_size": 4})

    def misfit_of_size(self, m: int, n: int) -> str | None:
        """f factors need block_size * 2^(f - 1) to divide in_features."""
        factors, block = self.options.boft_n_butterfly_factor, self.options.block_size
        if factors > 1 and block % 2:
            return f"block_size must be even with {factors} butterfly factors, got {block}."
        # A power that exceeds n, even where 2^(f - 1) itself would need gigabytes.
        span = block * 2 ** min(factors - 1, n.bit_length())
        if n % block == 0 and n % span:
            return (
                f"block_size * 2^(boft_n_butterfly_factor - 1) must divide its in_features of {n}, got {span}. Lower "
                "block_size or boft_n_butterfly_factor."
            )
        return block_misfit(block, in_features=n)

    @classmethod
    def inject(cls, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Add the adapter, with block-diagonal matrices made by PyTorch.

        PEFT compiles a CUDA extension for them; where that fails, it trains one butterfly factor whatever the options say.

        Raises: ValueError for a layer that has a BOFT adapter with other permutations, which PEFT's layer would replace.
        """
        from peft.tuners.boft import layer

        for name, other in tuner_layers(model).items():
            sizes = {size for size in getattr(other, "boft_block_size", {}).values() if size != config.boft_block_size}
            factors = {len(R) for R in getattr(other, "boft_R", {}).values()} - {config.boft_n_butterfly_factor}
            if sizes or factors:
                raise ValueError(
                    f"{name!r} has a BOFT adapter with another block size or number of butterfly factors. Delete it first."
                )
        layer._FBD_CUDA = BlockDiagonal
        super().inject(model, config, adapter_name)
        shared: dict[torch.Size, torch.Tensor] = {}
        for adapted in tuner_layers(model).values():
            if isinstance(adapted, layer.Linear):
                # One matrix of permutations for all layers of a size.
                adapted.boft_P = shared.setdefault(adapted.boft_P.shape, adapted.boft_P)
            if type(adapted) is layer.Linear:
                adapted.__class__ = _rotating_linear()


class BlockDiagonal:
    """Block-diagonal matrices and their gradients, with the interface of PEFT's CUDA extension."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        """(f, k, b, b) to (f, k b, k b)."""
        return [torch.stack([torch.block_diag(*of_factor) for of_factor in blocks])]

    @staticmethod
    def backward(gradient: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
        """The blocks (f, k, b, b) on the diagonal of `gradient` (f, k b, k b)."""
        f, k, b, _ = blocks.shape
        return [gradient.reshape(f, k, b, k, b).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


class Rotating:
    """A mixin in front of PEFT's layer, which rotates the inputs and not the weight, so that it needs no (n, n) matrix.

    h = b + diag(s) (W x + W (B x - x)),  B = B_1 ... B_f,  B_i = P_i D_i^T P_i^T,  D_i block-diagonal, P_i a permutation
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: (..., in_features), h: (..., out_features)."""
        active = [name for name in self.active_adapters if name in self.boft_R]
        if self.disable_adapters or self.merged or len(active) != 1:
            return super().forward(x, *args, **kwargs)
        R, s = self.boft_R[active[0]], self.boft_s[active[0]].flatten()
        rotated = x.to(R.dtype)
        blocks = self.cayley_batch(R.flatten(0, 1)).unflatten(0, R.shape[:2])
        orders = _orders(self.in_features, R.shape[2], len(R))
        for order, D in reversed(list(zip(orders, blocks, strict=True))):
            order = order.to(x.device)
            in_blocks = rotated[..., order.argsort()].unflatten(-1, R.shape[1:3])
            rotated = torch.einsum("...kr,krc->...kc", in_blocks, D).flatten(-2)[..., order]
        result = self.base_layer(x, *args, **kwargs)
        change = self.base_layer((rotated - x).to(x.dtype))
        bias = 0 if self.base_layer.bias is None else self.base_layer.bias
        return result + ((s - 1) * (result - bias) + s * (change - bias)).to(result.dtype)


@cache
def _orders(size: int, block: int, factors: int) -> list[torch.Tensor]:
    """For each butterfly factor, the places (size,) that its permutation P_i reads."""
    from peft.tuners.boft.layer import BOFTLayer

    count = size // block
    return [BOFTLayer.block_butterfly_perm(None, size, count // 2**level, block // 2, factors - 1) for level in range(factors)]


@cache
def _rotating_linear() -> type[nn.Module]:
    """PEFT's linear layer that rotates its inputs; its base takes seconds to import."""
    from peft.tuners.boft.layer import Linear

    return type("RotatingLinear", (Rotating, Linear), {})


METHOD = Boft
