"""Source-free adaptation: a net that was trained on source, target images, and no source data any more.

    python examples/integrations/source_free.py

Without labelled batches nothing holds a net to its classes, and the easiest way to agree with oneself is to predict
one class everywhere. Each line below that says "hold" is there against that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from udakit import ClassQuantileSelector, EMATeacher, StrongAugment, cross_entropy, entropy_loss

CLASSES = 19
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def adaptable(net: nn.Module) -> list[nn.Parameter]:
    """Scales and shifts of the normalisations, and nothing else.

    Hold: they can undo what light, weather and camera do to features, but cannot forget a class.
    """
    net.requires_grad_(False)
    found = []
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
            found += [p.requires_grad_() for p in module.parameters()]
    return found


def main(steps: int = 2, size: int = 64, net: nn.Module | None = None, target: Tensor | None = None) -> list[float]:
    """Adapt `net` to the images `target` (M, 3, H, W) and return the losses; stand-ins are made for both."""
    if net is None:  # yours: the checkpoint of whoever had the source data
        net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, CLASSES, 1))
    if target is None:
        target = torch.randn(8, 3, size, size)
    student = net.train()  # BatchNorm on statistics of target: an adaptation that needs no gradient at all
    optimizer = torch.optim.SGD(adaptable(student), lr=1e-4, momentum=0.9)

    # Hold: a slow teacher that starts as the source net. warmup=False: with it the first updates would copy the student
    # and throw away the one thing that knows source. `share_frozen`: only what is adapted exists twice.
    teacher = EMATeacher(student, decay=0.999, warmup=False, share_frozen=True)
    # Hold: a share of every predicted class, so that rare classes stay among the pseudo-labels.
    select = ClassQuantileSelector(CLASSES, share=0.3, momentum=0.9)
    augment = StrongAugment(mean=MEAN, std=STD)

    losses = []
    for step in range(steps):
        images = target[(2 * step + torch.arange(2)) % len(target)]
        pseudo = select(teacher(images))
        logits = student(augment(images))
        loss = cross_entropy(logits, pseudo.labels)
        # Entropy where the selector trusts nothing: a decision is asked for, without saying which. A small weight, for
        # this is the term that collapses first.
        loss = loss + 0.01 * entropy_loss(logits, valid=pseudo.weight == 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
        losses.append(loss.item())
        # `accepted` is the kept share of each predicted class: log it. A class that goes to 0 and stays is dying.
        if step % 100 == 0:
            print(f"step {step}: {int((pseudo.accepted > 0).sum())} of {CLASSES} classes among the pseudo-labels")
    return losses


if __name__ == "__main__":
    print(main())
