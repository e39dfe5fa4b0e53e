"""Adapt the normalisation layers of a trained net: their statistics and their parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from udakit._checks import check_range, check_tensor, kind_of
from udakit.teachers import copy_net

__all__ = ["adapt_batch_norm", "norm_parameters"]

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the scales and shifts of a net's BatchNorm, LayerNorm and GroupNorm layers, each once.

    **Convention.** Nothing is changed. To adapt only these parameters, freeze the net and let them learn, as in the
    example. They can undo the effect of light, weather and camera on features. Entropy alone still drives them
    to predict one class everywhere: add a term against it, and a stop by a score without labels.

    **Source.** TENT (Wang et al., ICLR 2021) adapts those of BatchNorm. Transformers have LayerNorm instead.

    Args:
        model: any net.

    Returns:
        The parameters, in the order of the net's modules.

    Raises:
        TypeError: `model` is not a Module.
        ValueError: no such layer of the net has a parameter.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))
        >>> net = net.requires_grad_(False)
        >>> for parameter in norm_parameters(net):
        ...     parameter.requires_grad_()
        Parameter containing:
        ...
        >>> net(torch.randn(2, 3, 8, 8)).square().mean().backward()
        >>> [name for name, p in net.named_parameters() if p.grad is not None]
        ['1.weight', '1.bias']
    """
    _check_model(model)
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, NORMS):
            found |= {id(p): p for p in module.parameters(recurse=False)}
    if not found:
        raise ValueError(
            "Expected `model` to have a BatchNorm, LayerNorm or GroupNorm with a scale and a shift, but got none."
        )
    return list(found.values())


def adapt_batch_norm(model: nn.Module, batches: Iterable[Tensor], *, source_share: float = 0.0) -> nn.Module:
    r"""Copy a net and re-estimate its BatchNorm statistics on target images, without changing weights.

    $$\mu = s\, \mu_S + (1 - s)\, \frac{1}{B} \sum_b \mu_b, \qquad
    \sigma^2 = s\, \sigma_S^2 + (1 - s)\, \frac{1}{B} \sum_b \sigma_b^2$$

    **Convention.** The copy has the train and eval modes of the net and no wrappers (see `copy_net`). The net itself
    does not change. During the estimation, BatchNorm layers normalise with the statistics of the batch, and everything
    else is in evaluation mode, without dropout. The result is the plain average over the batches, with unbiased
    variances as in torch. Empty batches are left out; of empty batches alone, the statistics stay those of source.
    Layers without running statistics do not change.

    **Source.** AdaBN (Li et al., 2016) is s = 0. Schneider et al. (NeurIPS 2020) keep a share of the source statistics
    if there are few target images.

    Args:
        model: a net with BatchNorm.
        batches: batches of images (N, K, *space), on the device of the net and normalised as for training. Large and
            mixed batches give better statistics.
        source_share: s in [0, 1], the weight of the source statistics.

    Returns:
        The adapted copy.

    Raises:
        TypeError: `model` is not a Module, or the batches are not tensors.
        ValueError: the net has no BatchNorm statistics, there is no batch, or `source_share` is out of range.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> adapted = adapt_batch_norm(net, [torch.randn(4, 3, 8, 8) for _ in range(3)])
        >>> bool(net[1].running_mean.any()), bool(adapted[1].running_mean.any())
        (False, True)
    """
    check_range("source_share", source_share, 0.0, 1.0)
    if isinstance(batches, Tensor):
        raise TypeError(f"Expected `batches` to be an iterable of batches, but got {kind_of(batches)}. Pass [images].")
    adapted = copy_net(model)
    norms = [m for m in adapted.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError(
            "Expected `model` to have BatchNorm layers with running statistics, but got none. LayerNorm and "
            "GroupNorm have no statistics; norm_parameters lists their parameters."
        )
    modes = {module: module.training for module in adapted.modules()}
    momenta = [norm.momentum for norm in norms]
    source = [(_statistic(norm.running_mean).clone(), _statistic(norm.running_var).clone()) for norm in norms]
    adapted.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
    given, count = False, 0
    with torch.no_grad():
        for batch in batches:
            given = True
            check_tensor("batches", batch, "an iterable of tensors")
            if batch.shape[:1] == (0,):  # without images
                continue
            count += 1
            for norm in norms:
                norm.momentum = 1 / count  # the plain average; with None, torch would read the count from the device
            adapted(batch)
    if not given:
        raise ValueError("Expected `batches` to have at least one batch, but got none.")
    source_share = source_share if count else 1.0
    for module, mode in modes.items():
        module.training = mode
    for norm, momentum, (mean, variance) in zip(norms, momenta, source, strict=True):
        norm.momentum = momentum
        _statistic(norm.running_mean).lerp_(mean, source_share)
        _statistic(norm.running_var).lerp_(variance, source_share)
    return adapted


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be a Module, but got {kind_of(model)}.")


def _statistic(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
