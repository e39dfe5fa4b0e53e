"""Get the features of any layer together with the logits, from any net, without changing its code."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.hooks import RemovableHandle

from udakit._checks import check_option, is_integer, kind_of, net_logits
from udakit.teachers import unwrap_model

__all__ = ["FeatureTap"]

When = Literal["output", "input"]
_WRAPPERS = ("module", "_orig_mod")


class FeatureTap:
    """Call a net and get (logits, features), where the features are the output or the input of a named layer.

    As a wrapper, `tap(images)` adds a hook for a single call. As a context, `with FeatureTap(...) as tap`, it keeps the
    hook until the end of the block. Inside the block, calls of the net itself are tapped, too, and `tap.pop()` returns
    their features. In both cases the tap keeps no tensor, and the net is unchanged afterwards.

    **Convention.** Nothing is detached, so gradients flow through the features. If a layer runs several times in a
    call, you get its last features. If it is followed by an in-place layer (`ReLU(inplace=True)`), you get the changed
    features. The logits are the output itself, its `.logits` (transformers), its "out" or "logits" entry (torchvision),
    or the first tensor of a tuple (smp with an auxiliary head). Features keep the shape that the layer gives them, for
    example (N, L, D) for tokens.

    **Wrappers.** The wrappers of `torch.compile`, DataParallel and DistributedDataParallel are called, not bypassed,
    and their names are left out of `layer`. A compiled net is traced with its hooks, so make its first call inside the
    tap. Layers inside a checkpoint can be tapped if the checkpoint is not reentrant. A reentrant one cuts off the
    gradients, which raises an error.

    Args:
        model: any net.
        layer: dotted name of a submodule, as in `model.named_modules()`, for example "encoder.layer4"; "" is the net
            itself.
        when: whether to take the "output" or the "input" of the layer.
        index: which tensor to take if there are several: a position among the tensors (by default the last), or a
            key, of a dict-like output or of the keyword arguments of the layer with `when="input"`.

    Raises:
        TypeError: `layer` is not a name, `model` is not a Module, or `index` is neither an integer nor a key.
        ValueError: `layer` does not exist (the message lists similar names), or `when` is unknown.
        RuntimeError: in a call, the layer did not run, or it ran inside a reentrant checkpoint.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
        >>> logits, features = FeatureTap(net, "1")(torch.rand(2, 3, 4, 4))
        >>> logits.shape, features.shape
        (torch.Size([2, 5, 4, 4]), torch.Size([2, 8, 4, 4]))
    """

    def __init__(self, model: nn.Module, layer: str, *, when: When = "output", index: int | str = -1) -> None:
        check_option("when", when, get_args(When))
        if not isinstance(layer, str):
            raise TypeError(
                f"Expected `layer` to be the dotted name of a submodule, but got {kind_of(layer)}. "
                "model.named_modules() lists the names."
            )
        self.model = model
        self.layer = layer
        self.when: When = when
        if not isinstance(index, str) and not is_integer(index):
            raise TypeError(f"Expected `index` to be an integer or a name, but got {kind_of(index)}.")
        self.index = index
        self._module = _find(model, layer)
        self._handle: RemovableHandle | None = None
        self._features: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Call the net and return its logits and the features of the layer."""
        opened = self._handle is None
        if opened:
            self.__enter__()
        try:
            output = self.model(*args, **kwargs)
            return net_logits(output), self.pop()
        finally:
            self._features = None
            if opened:
                self.__exit__(None, None, None)

    def pop(self) -> Tensor:
        """Return the features of the last call and forget them.

        Raises:
            RuntimeError: the layer has not run since the last `pop`.
        """
        features, self._features = self._features, None
        if features is None:
            raise RuntimeError(
                f"Expected `layer` {self.layer!r} to run in the call, but it did not. A compiled net that was called "
                "before the tap was opened does not see the tap: make its first call inside the tap."
            )
        return _pick(features, self.index, f"the {self.when} of `layer` {self.layer!r}")

    def __enter__(self) -> FeatureTap:
        """Open the tap: add the hook to the layer."""
        if self._handle is None:
            if self.when == "output":
                self._handle = self._module.register_forward_hook(self._take_output)
            else:
                self._handle = self._module.register_forward_pre_hook(self._take_input, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the tap: remove the hook and forget the features."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._features = None

    def _take_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._take(output)

    def _take_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._take((*args, *kwargs.values()) if isinstance(self.index, int) else kwargs)

    def _take(self, features: Any) -> None:
        if torch.compiler.is_compiling():
            self._features = features
            return
        if not torch.is_grad_enabled() and _loses_gradients():
            raise RuntimeError(
                f"Expected `layer` {self.layer!r} to run with gradients, but it runs inside a reentrant checkpoint, "
                "which cuts them off. Checkpoint with use_reentrant=False (transformers: gradient_checkpointing_kwargs="
                '{"use_reentrant": False}), or tap a layer outside of it.'
            )
        if torch._C._current_graph_task_id() == -1:  # a checkpoint runs the layer again in the backward pass
            self._features = features


def _loses_gradients() -> bool:
    """Whether the caller is the forward of an autograd function with inputs that need gradients."""
    frame = sys._getframe(1)
    while (back := frame.f_back) is not None:
        frame = back
        if frame.f_code.co_name == "forward" and isinstance(ctx := frame.f_locals.get("ctx"), FunctionCtx):
            return any(ctx.needs_input_grad)  # type: ignore[attr-defined]
    return False


def _find(model: nn.Module, layer: str) -> nn.Module:
    """Follow a dotted name, ignoring wrappers in the net and in the name."""
    module = unwrap_model(model)
    if not layer:
        return module
    parts = layer.split(".")
    for part in parts:
        child = module._modules.get(part)
        if child is not None:
            module = unwrap_model(child)
        elif part not in _WRAPPERS:
            names = list(_names(unwrap_model(model)))
            last = [n for n in names if n.rsplit(".", 1)[-1] == parts[-1]]
            near = difflib.get_close_matches(layer, names, n=5, cutoff=0.5) or last[:5]
            near = near or [n for n in names if "." not in n]
            raise ValueError(
                f"Expected `layer` to be a submodule of {type(unwrap_model(model)).__name__}, but got {layer!r}. "
                f"Similar names: {', '.join(near)}."
            )
    return module


def _names(module: nn.Module, prefix: str = "") -> list[str]:
    names = []
    for name, child in module._modules.items():
        if child is not None:
            names += [prefix + name, *_names(unwrap_model(child), f"{prefix}{name}.")]
    return names


def _pick(found: Any, index: int | str, what: str) -> Tensor:
    if isinstance(found, Tensor):
        return found
    if isinstance(index, str):
        chosen = found.get(index) if isinstance(found, Mapping) else getattr(found, index, None)
        if isinstance(chosen, Tensor):
            return chosen
        keys = list(found) if isinstance(found, Mapping) else type(found).__name__
        raise TypeError(f"Expected {what} to hold a tensor {index!r}, but got {keys}.")
    tensors = _tensors(found)
    if not -len(tensors) <= index < len(tensors):
        raise TypeError(f"Expected {what} to hold a tensor number {index}, but got {len(tensors)} tensors.")
    return tensors[index]


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, Mapping):
        found = list(found.values())
    return [x for entry in found for x in _tensors(entry)] if isinstance(found, (list, tuple)) else []
