"""What outer factors and their ranks are computed from: activations and gradients of the base model, cached in the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.adapter_method import Losses, Probe, adapters_off
from pipelines.errors import InputError
from pipelines.gradients import cached_factors, cached_ranks, check_no_groups, mean_gradients, origin_of
from pipelines.lazy_modules import nn, torch

if TYPE_CHECKING:
    from nora_vision.calibration import ActivationStatistics
    from nora_vision.factors import Factors

logger = logging.getLogger(__name__)


def cached_statistics(
    model: nn.Module, probe: Probe, adapter_name: str, weighting: str, calibration: str
) -> ActivationStatistics | None:
    """The statistics that `weighting` needs, which a resumed run reads from the probe's cache; None without weighting.

    Args:
        calibration: "data" for the probe's inputs, "base" for fixed ones.
    Raises: InputError if there are no fixed inputs for the model.
    """
    from nora_vision import ActivationStatistics
    from nora_vision.moment_groups import StoredMoments, calibrate_in_groups
    from nora_vision.rank_allocation import adapter_layers

    if weighting == "none":
        return None
    base = calibration == "base"
    cache = probe.cache.with_stem(f"{probe.cache.stem}-base") if base else probe.cache
    if cache.exists() and (statistics := ActivationStatistics.load(cache)).supports(weighting):
        return statistics
    if not base:
        statistics = calibrate_in_groups(model, probe.forward, cache, weighting=weighting)
    elif probe.base_calibration is None:
        raise InputError("There is no base calibration for this model. Use --calibration data.")
    else:
        statistics = probe.base_calibration(list(adapter_layers(model, adapter_name)))
    # Those of several groups have files of their own.
    if not isinstance(statistics.moments, StoredMoments):
        statistics.save(cache)
    logger.info(statistics.summary(weighting))
    return statistics


@dataclass(frozen=True)
class GradientBasis:
    """A basis of the outer factors that is taken from gradients of the loss, at least in part.

    Args:
        title: of the method, for messages.
        weighting: of the outer factors.
        share: of the directions that are taken from the gradient, the others being those of the weight.
        scale: "mean" or "gradient", the size of the gradient's directions.
        batches: for the mean gradient; 0 for those of one epoch.
    """

    title: str
    weighting: str
    share: float
    scale: str
    batches: int

    def cached(
        self, model: nn.Module, statistics: ActivationStatistics | None, losses: Losses, adapter_name: str, cache: Path
    ) -> dict[str, Factors]:
        """B and A of every layer from the gradients of `losses`, or from the file `cache`.

        Raises: InputError if a layer cannot be adapted; no loss is computed then.
        """
        from nora_vision.gradient_basis import adapter_factors
        from nora_vision.rank_allocation import adapter_layers

        layers = adapter_layers(model, adapter_name)
        base_layers = {name: layer.get_base_layer() for name, layer in layers.items()}
        check_no_groups(base_layers, f"{self.title}'s basis")
        weights = {name: base.weight for name, base in base_layers.items()}

        def compute() -> Iterator[tuple[str, Factors]]:
            gradients = mean_gradients(base_layers, losses, self.batches)
            form = {"share": self.share, "scale": self.scale}
            return adapter_factors(layers, adapter_name, gradients, statistics, self.weighting, **form)

        ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
        with adapters_off([model]):
            return cached_factors(cache, origin_of(weights, [ranks, *astuple(self)[1:]]), compute)


def set_ranks_under_budget(
    components: Mapping[str, nn.Module],
    probes: Mapping[str, Probe],
    adapter_name: str,
    options: Any,
    start: Callable[[str], None],
) -> None:
    """Set outer and inner ranks of all layers under `options.parameter_budget`, from the cache of a resumed run.

    Args:
        options: a dataclass with `parameter_budget`, `weighting`, `calibration` and `gradient_batches`; ranks of other values of
            any of its options are computed again.
        start: initialises the adapter of a component, by name; the gradients are those of its inner factors.
    Raises: InputError if the budget is below rank 1 in every layer.
    """
    from nora_vision.rank_allocation import adapter_layers, allocated_ranks, set_ranks

    layers = {name: adapter_layers(model, adapter_name) for name, model in components.items()}
    base_layers = {n: {key: layer.get_base_layer() for key, layer in each.items()} for n, each in layers.items()}

    def gradients(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        start(name)
        with adapters_off([components[name]]):
            yield from mean_gradients(base_layers[name], probes[name].losses, options.gradient_batches)

    def compute() -> dict[str, dict[str, tuple[int, int]]]:
        statistics = {
            name: cached_statistics(model, probes[name], adapter_name, options.weighting, options.calibration)
            for name, model in components.items()
        }
        return allocated_ranks(components, adapter_name, statistics, gradients, options.parameter_budget)

    weights = {f"{n}:{key}": base.weight for n, each in base_layers.items() for key, base in each.items()}
    origin = origin_of(weights, [asdict(options)])
    file = next(iter(probes.values())).cache.with_name("ranks.json")
    for name, ranks in cached_ranks(file, origin, compute).items():
        set_ranks(components[name], adapter_name, ranks)
