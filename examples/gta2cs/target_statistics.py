"""The BatchNorm statistics of the net to deploy: those of its training, which saw both domains, or those of target.

The chosen net of the whole run is compared with itself: as it is, with the statistics of target, and with half of each.
A net that `last` or `source_or_last` chose stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from rich.markup import escape
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gta2cs import choosing
from gta2cs.checkpoints import load_checkpoint
from gta2cs.choosing import STATISTICS
from gta2cs.evaluation import Score
from gta2cs.label_free import BY_CLASS, NoScoreError, collapsed
from gta2cs.stage import Run
from udakit import adapt_batch_norm, copy_net


def try_target_statistics(run: Run, net: nn.Module, images: Iterable[Tensor], history: dict[str, Any]) -> nn.Module:
    """Give the chosen net all or half of target's BatchNorm statistics where `BY_CLASS` says so.

    No weight changes. It helps where the domains look different, and harms where classes have other shares in target,
    which are part of the statistics. `history` is the last stage's.

    Returns:
        The net to deploy; `best.pt` holds it.
    """
    choice = run.choice
    if run.source_only is None or run.config.select in ("last", "source_or_last") or not has_statistics(net):
        return net
    if choice.target_statistics:  # before the run was resumed
        history[STATISTICS] = json.loads(load_checkpoint(choosing.best_path(run))["history"])[STATISTICS]
        return net
    tried = with_shares(net, images)
    found = {}
    for share, candidate in tried.items():
        whose = f"the {replace(choice, target_statistics=share).title}"
        try:
            found[share] = choosing.score_without_labels(run, candidate, whose=whose, views=run.config.score_views)
        except NoScoreError as error:
            run.console.print(f"[yellow]{escape(str(error))}[/]")
            return net
    kept = [share for share in found if not share or not collapsed(run.source_only.shares, found[share].shares)]
    taken = max(kept, key=lambda share: found[share].scores[BY_CLASS])  # of equal ones, those of training
    values = {share: found[share].scores[BY_CLASS] for share in found}
    value = found[taken].scores[choice.score] if taken else choice.value
    run.choice = replace(choice, target_statistics=taken, value=value, trained=choice.value if taken else None)
    history[STATISTICS] = {
        "choice": asdict(run.choice),
        "values": [*values.items()],
        "collapsed": [share for share in found if share not in kept],
        **found[taken].to_json(),
        **({"trained": found[0.0].to_json()} if taken else {}),
    }
    run.console.print(said_of_statistics(history[STATISTICS]), markup=False)
    if taken and run.is_main:
        choosing.save_choice(run, tried[taken], choice.step, history)
    return tried[taken]


def has_statistics(net: nn.Module) -> bool:
    """Whether a net has BatchNorm layers with running statistics."""
    return any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in net.modules())


def with_shares(net: nn.Module, images: Iterable[Tensor]) -> dict[float, nn.Module]:
    """Share of target's statistics -> the net itself for 0, and copies in eval mode for a half and for all of them."""
    target = adapt_batch_norm(net, images).eval()
    return {0.0: net, 0.5: halfway(net, target), 1.0: target}


def halfway(net: nn.Module, other: nn.Module) -> nn.Module:
    """A copy of a net with the mean of its own BatchNorm statistics and those of another copy."""
    between = copy_net(net)
    for layer, theirs in zip(between.modules(), other.modules(), strict=True):
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            for mine, given in ((layer.running_mean, theirs.running_mean), (layer.running_var, theirs.running_var)):
                mine.lerp_(given, 0.5)
    return between.eval()


def note_truth(history: dict[str, Any], truth: Score) -> None:
    """Keep the truth of the chosen net, if it has statistics of target."""
    if history.get(STATISTICS, {"choice": {}})["choice"].get("target_statistics"):
        history[STATISTICS]["truth"] = truth.to_json()


def said_of_statistics(tried: dict[str, Any]) -> str:
    """The line about BatchNorm statistics in the log and in the report."""
    lost = dict.fromkeys(tried.get("collapsed", ()), " (has lost a class)")
    listed = ", ".join(f"{share:.0%}: {100 * value:.1f}{lost.get(share, '')}" for share, value in tried["values"])
    return (
        f"share of target's BatchNorm statistics in the chosen net by {BY_CLASS.replace('_', ' ')}, %: {listed}; "
        f"{tried['choice']['target_statistics']:.0%} is taken"
    )
