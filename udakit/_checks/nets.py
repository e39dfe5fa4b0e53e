"""How to read the output of a net, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def net_logits(output: Any) -> Tensor:
    """Return the logits in a net's output: a tensor, an object or a dict that holds them, or a tuple's first tensor."""
    if isinstance(output, Tensor):
        return output
    entries = [getattr(output, "logits", None)]
    if isinstance(output, Mapping):
        entries += [output.get("out"), output.get("logits")]
    elif isinstance(output, Sequence):
        entries += output
    for entry in entries:
        if isinstance(entry, Tensor):
            return entry
    raise TypeError(
        "Expected `model` to return logits (a tensor, an object with `.logits`, a dict with 'out' or 'logits', or a "
        f"tuple of tensors), but got {type(output).__name__}."
    )
