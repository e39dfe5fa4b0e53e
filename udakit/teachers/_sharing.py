"""What a teacher takes from its student: values, and the parameters that both share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from udakit._checks import kind_of
from udakit.teachers._held import place_of
from udakit.teachers._matching import check_match, local
from udakit.teachers.copying import FROZEN, is_frozen, named_modules, unsaved_buffers
from udakit.teachers.unwrap import named_state, unwrap_model, without_wrappers


def take(module: nn.Module, model: nn.Module, shared: Iterable[str]) -> nn.Module:
    """Use a net that the user made, with the student's state."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"Expected `module` to be an nn.Module, but got {kind_of(module)}.")
    module = without_wrappers(module)
    for name, part in named_modules(module):
        if isinstance(part, torch.jit.ScriptModule):
            where = f"its submodule '{name}'" if name else "it"
            raise TypeError(
                f"Expected `module` to be a net in Python, but {where} is a TorchScript module, whose layers Python "
                "cannot reach. The student may be one."
            )
    unsaved = set(unsaved_buffers(module))
    student = {name: x for name, x, _ in named_state(model) if name not in unsaved}
    own = {name: x for name, x, _ in named_state(module)}
    check_not_frozen(model, own)
    check_match(own, student, apart=True)
    common = [name for name, x in own.items() if x is student[name]]
    if common or module is model:
        raise ValueError(
            f"Expected `module` to be a separate net, but got one that shares {common[0] if common else 'everything'} "
            "with `model`. Make it with a second call of the function that made `model`."
        )
    with torch.no_grad():
        for target, source in grouped([(x, student[name]) for name, x in own.items()]):
            torch._foreach_copy_(target, source)
    for name in shared:
        _put(module, name, student[name])
    return module


def check_not_frozen(model: nn.Module, own: Iterable[str]) -> None:
    """Raise if weights of the averaged net are constants of frozen TorchScript in `model`."""
    for name, part in named_modules(model):
        if is_frozen(part) and any(key.startswith(f"{name}." if name else "") for key in own):
            raise ValueError(
                "Expected `model` to have the parameters and buffers of the averaged net, but "
                f"{place_of(name)} is frozen TorchScript. {FROZEN}"
            )


def own_when_loaded(model: nn.Module, shared: Iterable[str]) -> None:
    """Give the teacher its own copy of a shared parameter before other values are loaded into it."""
    leaves: dict[str, list[str]] = {}
    for name in shared:
        path, _, leaf = name.rpartition(".")
        leaves.setdefault(path, []).append(leaf)
    for path, names in leaves.items():
        _at(model, path).register_load_state_dict_pre_hook(partial(_make_own, names))  # type: ignore[no-untyped-call]


def _make_own(
    names: list[str], module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *args: object
) -> None:
    for name in names:
        x, loaded = module._parameters[name], state_dict.get(prefix + name)
        if x is not None and loaded is not None and not (loaded.shape == x.shape and torch.equal(loaded.to(x), x)):
            module._parameters[name] = nn.Parameter(x.detach().clone(), requires_grad=False)


def _at(module: nn.Module, path: str) -> nn.Module:
    for step in path.split(".") if path else ():
        module = unwrap_model(module._modules[step])  # type: ignore[arg-type]
    return module


def _put(module: nn.Module, name: str, parameter: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    _at(module, path)._parameters[leaf] = parameter  # type: ignore[assignment]


def grouped(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Split (target, source) pairs by device and dtype, with the source cast, for one fused call per group."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        targets, sources = groups.setdefault((target.device, target.dtype), ([], []))
        targets.append(local(target))
        sources.append(local(source).to(target.device, target.dtype))
    yield from groups.values()
