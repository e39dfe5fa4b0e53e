"""Source-free adaptation: a source-trained net and target images, without the source data.

    python examples/integrations/source_free.py

There are two steps. First, BatchNorm is given the statistics of the target images, which needs no gradient. Then only
the normalisation layers learn, so that predictions become confident for each pixel and diverse over the batch. Without
labels, a net can collapse: the easiest way to agree with itself is to predict one class everywhere. Each line marked
"hold" works against that, and a score without labels says which net to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from udakit import adapt_batch_norm, copy_net, entropy_loss, mirror_consistency, norm_parameters

CLASSES = 19


class Adapted(NamedTuple):
    """The net to keep, when it was made, and the log of each step."""

    net: nn.Module
    step: int  # 0: only new BatchNorm statistics; -1: the original net
    losses: list[float]
    scores: dict[int, float]  # score of each candidate, by its step
    last: nn.Module  # the net of the last step, kept or not


def has_batch_norm(net: nn.Module) -> bool:
    """Whether there are statistics to re-estimate; transformers have none."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


def mean_entropy(logits: Tensor) -> Tensor:
    """TENT's loss, which makes each pixel confident. It can lose classes."""
    return entropy_loss(logits, normalize=False)


def information_loss(logits: Tensor) -> Tensor:
    """Mean entropy of the pixels minus the entropy of their mean: confident, but not all the same.

    Hold: the second term is 0 for a net that predicts a single class.
    """
    mean = logits.softmax(1).mean((0, *range(2, logits.ndim)))
    return mean_entropy(logits) + (mean * mean.clamp_min(1e-12).log()).sum()


@torch.no_grad()
def restore(net: nn.Module, source: dict[str, Tensor], probability: float) -> None:
    """Reset a few random weights to their source values (CoTTA). Hold: the net cannot drift away permanently."""
    for name, p in net.named_parameters():
        if p.requires_grad:
            p.copy_(torch.where(torch.rand_like(p) < probability, source[name], p))


def score(net: nn.Module, images: Tensor) -> float:
    """How well the net agrees with itself on mirrored images, as an IoU without labels."""
    training = net.training
    with torch.no_grad():
        found = float(mirror_consistency(net.eval(), images, scope="batch"))
    net.train(training)
    return found


def adapt(
    net: nn.Module,
    target: Tensor,
    *,
    steps: int,
    batch_size: int = 2,
    lr: float = 1e-3,
    check_every: int = 20,
    loss_of: Callable[[Tensor], Tensor] = information_loss,
    statistics: bool = True,
    restored: float = 0.01,
) -> Adapted:
    """Adapt a copy of `net` to the images `target` (M, 3, H, W) and return the best candidate.

    Without `statistics`, BatchNorm keeps the source statistics, and only scales and shifts change.
    """
    scored = target[: max(2, len(target) // 4)]  # always the same images
    batches = [target[i : i + batch_size] for i in range(0, len(target), batch_size)]
    scores = {-1: score(net, scored)}
    best, best_step = net, -1
    statistics = statistics and has_batch_norm(net)

    def consider(candidate: nn.Module, step: int) -> None:
        nonlocal best, best_step
        scores[step] = score(candidate, scored)
        if scores[step] > scores[best_step]:
            best, best_step = copy_net(candidate), step

    student = adapt_batch_norm(net, batches) if statistics else copy_net(net)
    consider(student, 0)

    # Hold: train only the scales and shifts of the normalisations. They can undo the effect of light, weather and
    # camera on features, but they cannot forget a class.
    student.requires_grad_(False)
    learning = [p.requires_grad_() for p in norm_parameters(student)]
    source = {name: p.detach().clone() for name, p in student.named_parameters()}
    optimizer = torch.optim.Adam(learning, lr=lr)
    student.train(statistics)  # in training mode BatchNorm uses the batch, and its running statistics follow
    losses = []
    for step in range(1, steps + 1):
        loss = loss_of(student(batches[step % len(batches)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        restore(student, source, probability=restored)
        losses.append(loss.item())
        if step % check_every == 0 or step == steps:
            consider(student, step)
    return Adapted(best, best_step, losses, scores, student)


def main(steps: int = 2, size: int = 64, net: nn.Module | None = None, target: Tensor | None = None) -> list[float]:
    """Adapt and return the losses; stand-ins are made for net and images."""
    if net is None:  # yours: the checkpoint that was trained on the source data
        net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, CLASSES, 1))
    if target is None:
        target = torch.randn(8, 3, size, size)
    adapted = adapt(net, target, steps=steps)
    print(f"kept the net of step {adapted.step}: {adapted.scores}")
    return adapted.losses


if __name__ == "__main__":
    print("loss of each step:", *(f"{loss:.3f}" for loss in main()))
