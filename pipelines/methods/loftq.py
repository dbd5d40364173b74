"""LoftQ: h = Q(W) x + s B A x,  s B_0 A_0 = [W - Q(W)]_r: LoRA that starts from what quantisation removed  [Li et al. 2023].

    W - Q(W) = U diag(sigma) V^T;  B_0 = U_r diag(sqrt(sigma / s)),  A_0 = diag(sqrt(sigma / s)) V_r^T

This is one round of LoftQ's alternation, after which Q(W) is still the quantised weight of the base model. PEFT's own LoftQ for
quantised models has the same equation, but computes on GPUs only and without s. Layers in full precision start as in LoRA.
"""

from __future__ import annotations

from pipelines.adapter_method import Probe, tuner_layers
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, no_grad, torch
from pipelines.methods.lora import Lora


class LoftQ(Lora):
    """LoRA on a quantised base model that starts closer to the model in full precision."""

    name = "loftq"
    title = "LoftQ"
    reference = "Li et al. 2023, LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models"
    starts_at_base = False
    uses_unquantized_weights = True

    @property
    def needs_quantization(self) -> bool:
        """True: without quantisation, the residual is zero."""
        return True

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Set A and B of every quantised layer to the SVD of its residual, reading one unquantised weight at a time.

        Raises: InputError if no weight is quantised.
        """
        from nora_vision import CheckpointWeights
        from nora_vision.calibration import base_name
        from nora_vision.quantization import is_quantized

        if probe.unquantized is None:
            raise InputError(
                "LoftQ starts from what quantisation removes from the weights, but the base model is not quantised. Add "
                "--quantize nf4, or use --method lora."
            )
        super().start(model, probe, adapter_name)
        weights = CheckpointWeights(probe.unquantized)
        for name, layer in tuner_layers(model).items():
            if is_quantized(layer.get_base_layer()):
                start_at_residual(layer, weights(base_name(name)), adapter_name)


@no_grad
def start_at_residual(layer: nn.Module, weight: torch.Tensor, adapter_name: str) -> None:
    """Set A and B of one layer to the best factors of W - Q(W) of their rank; `weight` W is (out, in)."""
    from nora_vision.quantization import dequantized_weight

    quantized = dequantized_weight(layer.get_base_layer()).float()
    U, S, V = torch.linalg.svd(weight.to(quantized) - quantized, full_matrices=False)
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    # A small layer can have fewer singular values than the rank: the rest stays as in LoRA, where B is zero.
    count = min(len(A), len(S))
    root = (S[:count] / layer.scaling[adapter_name]).sqrt()
    A[:count] = (root[:, None] * V[:count]).to(A)
    B[:, :count] = (U[:, :count] * root).to(B)


METHOD = LoftQ
