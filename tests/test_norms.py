"""Normalisation layers: statistics of target as an average over batches, and the parameters that learn there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import udakit


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm2d(4))
    made[1].running_mean.fill_(7.0)
    made[1].running_var.fill_(3.0)
    return made


def batches(number: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 + k, 3, 5, 6, generator=generator) + k for k in range(number)]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_statistics_are_the_average_over_batches(share: float) -> None:
    model = net().train()
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    empty = batches()[0][:0]  # does not count
    adapted = udakit.adapt_batch_norm(model, [empty, *batches(), empty], source_share=share)
    seen = [model[0](x).movedim(1, -1).flatten(0, -2) for x in batches()]
    mean = torch.stack([x.mean(0) for x in seen]).mean(0)
    variance = torch.stack([x.var(0) for x in seen]).mean(0)
    torch.testing.assert_close(adapted[1].running_mean, share * 7.0 + (1 - share) * mean)
    torch.testing.assert_close(adapted[1].running_var, share * 3.0 + (1 - share) * variance)
    normalised = [(x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in seen]  # no dropout in between
    expected = torch.stack([x.var(0) for x in normalised]).mean(0)
    torch.testing.assert_close(adapted[3].running_var, share * 1.0 + (1 - share) * expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in adapted.modules()] == [m.training for m in model.modules()]
    assert adapted[1].momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), model.parameters(), strict=True))


def test_empty_batches_alone_leave_the_statistics_of_source() -> None:
    model = net()
    adapted = udakit.adapt_batch_norm(model, [batches()[0][:0]])
    for name, x in model[1].named_buffers():
        if name != "num_batches_tracked":
            torch.testing.assert_close(adapted[1].get_buffer(name), x)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.BatchNorm3d(4)])
def test_signals_and_volumes(layer: nn.Module) -> None:
    space = {nn.BatchNorm1d: (9,), nn.BatchNorm3d: (2, 3, 4)}[type(layer)]
    images = torch.randn(2, 4, *space) + 5
    adapted = udakit.adapt_batch_norm(layer, [images])
    torch.testing.assert_close(adapted.running_mean, images.transpose(0, 1).flatten(1).mean(1))


def test_parameters_of_every_normalisation_once() -> None:
    layer = nn.LayerNorm(4)
    model = nn.ModuleDict(
        {
            "a": nn.BatchNorm2d(4),
            "b": nn.Sequential(layer, nn.Linear(4, 4), nn.GroupNorm(2, 4)),
            "tied": layer,
            "plain": nn.BatchNorm2d(4, affine=False),
        }
    )
    found = udakit.norm_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in found] == ["a.weight", "a.bias", "b.0.weight", "b.0.bias", "b.2.weight", "b.2.bias"]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"Expected `batches` to have at least one batch, but got none"):
        udakit.adapt_batch_norm(net(), [])
    with pytest.raises(ValueError, match=r"Expected `model` to have BatchNorm layers .* LayerNorm"):
        udakit.adapt_batch_norm(nn.LayerNorm(3), batches())
    with pytest.raises(TypeError, match=r"Expected `batches` to be an iterable of tensors"):
        udakit.adapt_batch_norm(net(), [batches()])
    with pytest.raises(TypeError, match=r"Expected `batches` to be an iterable of batches, .* Pass \[images\]"):
        udakit.adapt_batch_norm(net(), batches()[0])
    with pytest.raises(ValueError, match=r"Expected `model` to have a BatchNorm, LayerNorm or GroupNorm"):
        udakit.norm_parameters(nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match=r"Expected `model` to be a Module"):
        udakit.norm_parameters(torch.zeros(3))
