"""What a GPU has to do for a call, counted without one: kernels, bytes, memory and arithmetic, on fake CUDA tensors.

`count` runs a call on tensors that have a shape and a device but no memory, and records every operator that reaches
the dispatcher. Views and allocations are no kernels (`FREE`), composite and custom operators are several (`OPENED`),
whatever torch calls pointwise is one, and so is what is in the lists below. An operator that no rule knows is an error.
Every operand and every result of a kernel is counted once, whole (a gather may read less, from a cache or not), and an
expanded axis as one entry. `fuse` groups the kernels of a trace as a compiler would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Key = tuple[int, int]  # a storage and how often it was written to

# Allocations and others that launch nothing; views are found by their memory.
FREE = (
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "lift_fresh", "resize_",
    "set_", "sym_size", "sym_numel", "sym_stride", "is_same_size", "broadcast_in_dim",
)  # fmt: skip
REDUCTIONS = (
    "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "any", "all", "nansum", "var", "var_mean",
    "std", "std_mean", "linalg_vector_norm", "norm", "aminmax", "_softmax", "_log_softmax", "softmax", "log_softmax",
    "_softmax_backward_data",
    "_log_softmax_backward_data", "cumsum", "cumprod", "count_nonzero",
)  # fmt: skip
# Read an operand at places that another kernel has to have written.
GATHERS = (
    "index", "_unsafe_index", "gather", "index_select", "take", "embedding", "flip", "roll", "cat", "stack",
    "upsample_bilinear2d", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_linear1d",
    "upsample_trilinear3d", "upsample_nearest1d",
    "avg_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices", "_adaptive_avg_pool2d", "reflection_pad2d",
    "replication_pad2d", "reflection_pad1d", "replication_pad1d", "reflection_pad3d", "replication_pad3d",
    "searchsorted", "bucketize", "nll_loss_forward", "nll_loss2d_forward", "grid_sampler_2d", "_unsafe_masked_index",
)  # fmt: skip
SCATTERS = ("index_add_", "scatter_add_", "scatter_", "scatter_reduce_", "index_put_", "index_copy_", "index_fill_")
MATMULS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "addbmm", "addmv", "mv", "dot")
# One kernel each, beside those above and every operator that torch calls pointwise.
ONE = (
    "clone", "copy_", "_to_copy", "fill_", "fill", "zero_", "zeros", "ones", "full", "zeros_like", "ones_like",
    "full_like", "new_zeros", "new_ones", "new_full", "scalar_tensor", "arange", "linspace", "rand", "rand_like",
    "randn", "randint",
    "randn_like", "uniform_", "normal_", "random_", "bernoulli_", "bernoulli", "exponential_", "tril", "triu", "repeat",
    "where", "clamp", "masked_fill_", "_fft_r2c", "_fft_c2c", "_fft_c2r",
    "native_dropout", "convert_element_type", "iota", "log_sigmoid_forward", "im2col", "col2im", "avg_pool2d_backward",
    "unfold_backward", "linalg_cross", "_cdist_forward", "floor_divide", "polar", "copy", "upsample_nearest2d_backward",
    "softplus_backward", "sigmoid_backward", "tanh_backward", "threshold_backward", "gelu_backward", "silu_backward",
    "hardtanh_backward", "elu_backward", "leaky_relu_backward", "log_sigmoid_backward", "mse_loss", "mse_loss_backward",
    "smooth_l1_loss", "smooth_l1_loss_backward", "huber_loss", "huber_loss_backward", "_trilinear",
)  # fmt: skip
# Write an operand without reading it.
OVERWRITES = ("copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "bernoulli_", "exponential_")
OPAQUE = (
    *MATMULS,
    "_cdist_forward",
    "_cdist_backward",
    "cudnn_batch_norm",
    "native_batch_norm",
    "_fft_r2c",
    "_fft_c2c",
    "_fft_c2r",
    "sort_pass",
    "cumsum",
    "cumprod",
)
FOREACH_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36}  # that one launch takes, by the number of lists
FOREACH_CHUNKS, CHUNK = 320, 65536  # blocks of one launch, elements of a block
SHORT_SORT = 4096  # a longer axis is sorted by radix, a byte a pass
SPLIT = (1024, 2**16)  # a reduction to fewer results of more elements takes two kernels when compiled


@dataclass(frozen=True)
class Kernel:
    """One launch: what it reads and writes, in bytes by buffer, and what a fusion has to know of it."""

    name: str
    kind: str  # "pointwise", "reduction", "gather", "scatter" or "opaque"
    reads: dict[Key, int]
    writes: dict[Key, int]
    numel: int  # points that it runs over
    rows: int  # results of a reduction
    flops: int = 0
    part: int = 0  # 0 forward, 1 backward
    sources: frozenset[Key] = frozenset()  # of a gather: what it reads at other places

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


# --- what launches several kernels ------------------------------------------------------------------------------


def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    top = x.amax(dim, True)
    top.masked_fill_(top.abs() == math.inf, 0)
    result = (x - top).exp_().sum(dim, keepdim)
    return result.log_().add_(top if keepdim else top.view_as(result))


def _euclidean(a: Tensor, b: Tensor) -> Tensor:
    a_norm, b_norm = a.pow(2).sum(-1, True), b.pow(2).sum(-1, True)
    left = torch.cat([a * -2, a_norm, torch.ones_like(a_norm)], -1)
    right = torch.cat([b, torch.ones_like(b_norm), b_norm], -1)
    return (left @ right.mT).clamp_min_(0).sqrt_()


def _cdist(a: Tensor, b: Tensor, p: float, mode: int | None = None) -> Any:
    if p == 2 and (mode == 1 or (mode in (None, 0) and max(a.shape[-2], b.shape[-2]) > 25)):
        return _euclidean(a, b)
    return NotImplemented  # one kernel


def _copy_then(name: str) -> Callable[..., Tensor]:
    def functional(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copied = x.clone()
        return getattr(aten, name)(copied, *args, **kwargs)

    return functional


def _zero_then_write(x: Tensor, shape: Sequence[int], of: Callable[[Tensor], Tensor]) -> Tensor:
    whole = x.new_zeros(shape)
    of(whole).copy_(x)
    return whole


def _copy_part(x: Tensor, source: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    copied = x.clone()
    of(copied).copy_(source)
    return copied


def _pad(x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    shape = list(x.shape)
    inner = x
    for i in range(len(pad) // 2):
        axis, (before, after) = x.ndim - 1 - i, pad[2 * i : 2 * i + 2]
        shape[axis] += before + after
        inner = inner.narrow(axis, max(-before, 0), x.shape[axis] - max(-before, 0) - max(-after, 0))
    if all(p <= 0 for p in pad):
        return inner.clone()
    whole = x.new_full(shape, value)
    target = whole
    for i in range(len(pad) // 2):
        axis, before = x.ndim - 1 - i, pad[2 * i]
        target = target.narrow(axis, max(before, 0), inner.shape[axis])
    target.copy_(inner)
    return whole


def _eye(n: int, m: int | None = None, **options: Any) -> Tensor:
    whole = torch.zeros(n, n if m is None else m, **{k: v for k, v in options.items() if k in ("dtype", "device")})
    whole.diagonal().fill_(1)
    return whole


OPENED: dict[str, Callable[..., Any]] = {
    "logsumexp": _logsumexp,
    "_euclidean_dist": _euclidean,
    "_cdist_forward": _cdist,
    "masked_fill": _copy_then("masked_fill_"),
    "index_add": _copy_then("index_add_"),
    "index_copy": _copy_then("index_copy_"),
    "index_fill": _copy_then("index_fill_"),
    "index_put": _copy_then("index_put_"),
    "scatter": _copy_then("scatter_"),
    "scatter_add": _copy_then("scatter_add_"),
    "scatter_reduce": _copy_then("scatter_reduce_"),
    "constant_pad_nd": _pad,
    "eye": _eye,
    "slice_backward": lambda g, shape, *at: _zero_then_write(g, shape, lambda x: aten.slice(x, *at)),
    "select_backward": lambda g, shape, *at: _zero_then_write(g, shape, lambda x: x.select(*at)),
    "diagonal_backward": lambda g, shape, *at: _zero_then_write(g, shape, lambda x: x.diagonal(*at)),
}
OPENED |= {
    "select_scatter": lambda x, source, *at: _copy_part(x, source, lambda y: y.select(*at)),
    "slice_scatter": lambda x, source, *at, **by: _copy_part(x, source, lambda y: aten.slice(y, *at, **by)),
    "diagonal_scatter": lambda x, source, *at: _copy_part(x, source, lambda y: y.diagonal(*at)),
}
# These a compiler writes in one pass.
ONE_COMPILED = ("constant_pad_nd", "select_scatter", "slice_scatter", "diagonal_scatter", "eye")
# Zero what they return, then add to it.
ZERO_FIRST = (
    "upsample_bilinear2d_backward", "upsample_linear1d_backward", "upsample_trilinear3d_backward",
    "max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward", "replication_pad2d_backward",
    "reflection_pad2d_backward", "grid_sampler_2d_backward", "nll_loss2d_backward", "nll_loss_backward",
    "_cdist_backward",
    "cudnn_batch_norm",
    "native_batch_norm",
)  # fmt: skip


# --- the meter --------------------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Records the kernels of what runs inside, and the bytes that live at once.

    `decompose` takes composite operators apart as `torch.compile` does before it fuses.
    """

    def __init__(self, *, decompose: bool = False) -> None:
        super().__init__()
        self.decompose = decompose
        self.kernels: list[Kernel] = []
        self.peak = 0
        self.part = 0
        self.lenient = False  # take an operator that no rule knows for one kernel, as inside a net
        self._inside = 0  # a custom operator, which a compiler leaves as it is
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._versions: dict[int, int] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """These were there before the call: they are in no peak."""
        for x in tensors:
            self._storage(x)

    def key(self, x: Tensor) -> Key:
        number = self._storage(x)
        return number, self._versions.get(number, 0)

    def _storage(self, x: Tensor) -> int:
        storage = x.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = len(self._storages), StorageWeakRef(storage)
        return self._storages[storage._cdata][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None  # nothing is drawn
        namespace, name = func.namespace, func._schema.name.partition("::")[2]
        if namespace == "prim":  # x.device and the like
            return func(*args, **kwargs)
        if namespace not in ("aten", "prims"):
            return self._custom(func, args, kwargs)
        eager = not self.decompose or self._inside
        # Torch's C++ makes one kernel of an upsampling; what it is in Python is for compilers.
        if func._can_decompose() and not (eager and "upsample" in name):
            with self:  # what autograd takes apart on its way arrives whole where there is no autograd
                return func.decompose(*args, **kwargs)
        if self.decompose and not self._inside and func in _decompositions():
            with self:
                result = _decompositions()[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        whole = self.decompose and not self._inside and name in ONE_COMPILED
        if name in OPENED and not whole and kwargs.get("out") is None:
            with self:
                result = OPENED[name](*args, **{k: v for k, v in kwargs.items() if k not in ("layout", "pin_memory")})
            if result is not NotImplemented:
                return result
        before = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        given = {self._storage(x) for x in before}
        result = func(*args, **kwargs)
        produced = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in produced:
            if self._storage(x) not in given and self._storage(x) not in self._made:
                storage = x.untyped_storage()
                self._made[self._storage(x)] = StorageWeakRef(storage), storage.nbytes()
        self._look_at_memory()
        on_gpu = any(x.device.type != "cpu" for x in (*before, *produced))
        mutable = func._schema.is_mutable
        view = not mutable and bool(produced) and all(self._storage(x) in given for x in produced)
        if on_gpu and not view and name not in FREE:
            self._record(func, name, args, kwargs, result, mutable)
        return result

    def _custom(self, func: Any, args: Any, kwargs: Any) -> Any:
        definition = OPDEFS.get(func._schema.name)
        if definition is None:
            raise NotImplementedError(f"Expected an operator of aten or of torch.library.custom_op, but got {func}.")
        self._inside += 1
        try:
            with self:
                return definition._init_fn(*args, **kwargs)
        finally:
            self._inside -= 1

    def _look_at_memory(self) -> None:
        self._made = {k: v for k, v in self._made.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, mutable: bool) -> None:
        schema = list(func._schema.arguments)
        named = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        written_names = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
        out_names = {a.name for a in schema if a.is_out} | ({schema[0].name} if name in OVERWRITES else set())
        operands = _tensors(v for k, v in named.items() if k not in out_names)
        written = _tensors(v for k, v in named.items() if k in written_names)
        results = written if written else _tensors([result])
        base = name.removesuffix("_") if name.removesuffix("_") in (*REDUCTIONS, *MATMULS) else name
        if name.startswith("_foreach"):
            return self._foreach(name, named, written_names, result)
        if name in ("sort", "argsort", "topk", "randperm"):
            return self._sort(named, results)
        if name == "convolution_backward":
            return self._convolution_backward(operands, results, kwargs or named)
        if name in ZERO_FIRST:
            self._add("zero_", "pointwise", [], results, sum(x.numel() for x in results), 0)
        if name == "index_put_" or name == "_index_put_impl_":
            if named.get("accumulate") and not self.decompose:
                indices = _tensors([named["indices"]])
                self._sort({"self": indices[0]}, [])
            name = base = "index_put_"
        kind = "opaque" if self.lenient else _kind(func, base)
        sizes = [x.numel() for x in (*operands, *results)]
        rows = max((x.numel() for x in results), default=0)
        flops = 0
        if func._overloadpacket in flop_registry:
            flops = int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))
        sources = _tensors([args[0]]) if kind == "gather" and args else []
        self._add(base, kind, operands, results, max(sizes, default=0), rows, flops, sources)

    def _add(
        self,
        name: str,
        kind: str,
        operands: list[Tensor],
        results: list[Tensor],
        numel: int,
        rows: int,
        flops: int = 0,
        sources: Sequence[Tensor] = (),
    ) -> None:
        reads: dict[Key, int] = {}
        for x in _different(operands):
            if x.device.type != "cpu":
                reads[self.key(x)] = reads.get(self.key(x), 0) + _bytes(x)
        source_keys = frozenset(self.key(x) for x in sources)
        writes: dict[Key, int] = {}
        for x in _different(results):
            number = self._storage(x)
            self._versions[number] = self._versions.get(number, 0) + 1
            writes[self.key(x)] = writes.get(self.key(x), 0) + _bytes(x)
        if kind == "scatter" and operands:
            numel = max((x.numel() for x in operands[1:]), default=numel)
        kind = "opaque" if self._inside else kind
        self.kernels.append(Kernel(name, kind, reads, writes, numel, rows, flops, self.part, source_keys))

    def _foreach(self, name: str, named: dict[str, Any], written_names: set[str], result: Any) -> None:
        lists = [v for v in named.values() if isinstance(v, (list, tuple)) and v and isinstance(v[0], Tensor)]
        written = [v for k, v in named.items() if k in written_names]
        results = written[0] if written else list(result)
        fast = all(x.dtype == results[0].dtype for v in lists for x in v)
        reads = [v for v in lists if not (name == "_foreach_copy_" and v is results)]
        groups = [slice(i, i + 1) for i in range(len(results))]
        if fast:
            limit = FOREACH_TENSORS[min(len(lists) + (not written), 4)]
            groups, start, blocks = [], 0, 0
            for i, x in enumerate(results):
                blocks += math.ceil(x.numel() / CHUNK)
                if i + 1 - start == limit or blocks >= FOREACH_CHUNKS:
                    groups += [slice(start, i + 1), *[slice(i, i)] * max(math.ceil(blocks / FOREACH_CHUNKS) - 1, 0)]
                    start, blocks = i + 1, 0
            groups += [slice(start, len(results))] if start < len(results) else []
        for at in groups:
            operands = [x for v in reads for x in v[at]]
            self._add(name, "opaque", operands, list(results[at]), sum(x.numel() for x in results[at]), 0)

    def _sort(self, named: dict[str, Any], results: list[Tensor]) -> None:
        x = next((v for v in named.values() if isinstance(v, Tensor)), results[0] if results else None)
        assert x is not None
        axis = x.shape[int(named.get("dim", -1))] if x.ndim else 1
        passes = 3 if axis <= SHORT_SORT else 2 + x.element_size()
        made = results or [x]
        for _ in range(passes):
            self._add("sort_pass", "opaque", [x], made if results else [], x.numel(), 0)

    def _convolution_backward(self, operands: list[Tensor], results: list[Tensor], named: dict[str, Any]) -> None:
        for x in results:  # one launch for each gradient that is wanted
            self._add("convolution", "opaque", operands[:3], [x], x.numel(), 0)


def _kind(func: Any, name: str) -> str:
    if name in OPAQUE:
        return "opaque"
    if name in REDUCTIONS and func._overloadname not in ("other", "out_other"):  # max of two tensors is pointwise
        return "reduction"
    if name in GATHERS:
        return "gather"
    if name in SCATTERS or (name in ZERO_FIRST):
        return "scatter"
    if torch.Tag.pointwise in func.tags or name in (*ONE, *ONE_COMPILED) or func.namespace == "prims":
        return "pointwise"
    base = name.removesuffix("_")
    packet = getattr(aten, base, None)
    if packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads()):
        return "pointwise"
    raise NotImplementedError(f"No rule says how many kernels {func} launches: add one to {__name__}.")


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    import torch._inductor.lowering  # noqa: F401  (some decompositions look there)
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in tree_leaves(list(values)) if isinstance(x, Tensor)]


def _different(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each part of memory once."""
    found = {}
    for x in tensors:
        found[x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), tuple(x.stride())] = x
    return list(found.values())


def _bytes(x: Tensor) -> int:
    """Bytes of memory behind a tensor: an expanded axis has one entry."""
    entries = math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)
    return entries * x.element_size() if x.numel() else 0


# --- fusion -----------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Kernels that a compiler makes one of."""

    part: int
    numel: int
    rows: int | None = None
    opaque: bool = False
    members: list[Kernel] = field(default_factory=list)
    after: set[int] = field(default_factory=set)  # groups that have to come first, all of them
    made: set[Key] = field(default_factory=set)
    read: set[Key] = field(default_factory=set)
    sealed: set[Key] = field(default_factory=set)  # there only when the kernel has ended

    @property
    def launches(self) -> int:
        return 1 + (self.rows is not None and split(self.numel, self.rows))


def split(numel: int, rows: int) -> bool:
    """Whether so few results of so many elements are summed in two steps."""
    return rows < SPLIT[0] and numel > SPLIT[1]


def fuse(kernels: Sequence[Kernel], results: Iterable[Key]) -> list[tuple[int, int, int]]:
    """(launches, bytes, flops) of each kernel after fusion.

    The rules: operators that run over the same points become one kernel when one feeds the other or both read the same
    tensor, and no third stands between. A reduction takes in what runs over its elements and what runs over its
    results, and also what follows over its elements again (a softmax is one kernel), unless it is split: fewer than
    1024 results of more than 65536 elements take two kernels, and what needs the results over the elements comes
    later. A gather fuses with what follows it, not with what makes its source; a scatter with what makes its values,
    not with what follows. Matrix products, sorting, cumulated sums, Fourier transforms and the inside of custom
    operators fuse with nothing. Forward and backward are two graphs, and nothing is computed twice.
    """
    groups: list[Group] = []
    maker: dict[Key, int] = {}
    for kernel in kernels:
        needed = {maker[k] for k in kernel.reads if k in maker}
        chosen = None
        if kernel.kind != "opaque":
            for i in range(len(groups) - 1, -1, -1):
                if _fits(kernel, groups[i]) and not any(i in groups[p].after for p in needed - {i}):
                    chosen = i
                    break
        if chosen is None:
            groups.append(Group(kernel.part, kernel.numel, opaque=kernel.kind == "opaque"))
            chosen = len(groups) - 1
        group = groups[chosen]
        group.members.append(kernel)
        for p in needed - {chosen}:
            group.after |= {p} | groups[p].after
        if chosen < len(groups) - 1 and needed - {chosen}:
            for other in groups:  # what waits for this group waits for what it has come to wait for
                if chosen in other.after:
                    other.after |= group.after
        if kernel.kind == "reduction":
            group.rows, group.numel = kernel.rows, max(group.numel, kernel.numel)
        group.made |= set(kernel.writes)
        group.read |= set(kernel.reads)
        if kernel.kind == "scatter" or (kernel.kind == "reduction" and split(kernel.numel, kernel.rows)):
            group.sealed |= set(kernel.writes)
        maker.update(dict.fromkeys(kernel.writes, chosen))
    readers: dict[Key, set[int]] = {}
    for i, group in enumerate(groups):
        for k in group.read:
            readers.setdefault(k, set()).add(i)
    kept = set(results)
    found = []
    for i, group in enumerate(groups):
        reads: dict[Key, int] = {}
        for kernel in group.members:
            for k, size in kernel.reads.items():
                if k not in group.made:
                    reads[k] = max(reads.get(k, 0), size)
        writes = {
            k: size
            for kernel in group.members
            for k, size in kernel.writes.items()
            if group.opaque or k in kept or readers.get(k, set()) - {i}
        }
        moved = sum(reads.values()) + sum(writes.values())
        found.append((group.launches, moved, sum(m.flops for m in group.members)))
    return found


def _fits(kernel: Kernel, group: Group) -> bool:
    if group.opaque or group.part != kernel.part:
        return False
    if not any(k in group.read or k in group.made for k in kernel.reads):
        return False
    if kernel.sources & group.made:
        return False
    over_results = group.rows is not None and kernel.numel == group.rows
    sealed = set(kernel.reads) & group.sealed
    if sealed and not (over_results and all(m.kind != "scatter" for m in group.members if set(m.writes) & sealed)):
        return False
    if kernel.kind == "reduction":
        same = kernel.numel == group.numel and group.rows in (None, kernel.rows)
        prologue = group.rows is None and group.numel == kernel.rows and not any(k in group.made for k in kernel.reads)
        return same or prologue
    return kernel.numel == group.numel or over_results


# --- backward without a card ------------------------------------------------------------------------------------


def backward(
    outputs: Sequence[Tensor],
    incoming: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    around: Callable[[Any], AbstractContextManager[None]] | None = None,
) -> list[Tensor | None]:
    """`torch.autograd.grad` node by node: the engine wants a driver for tensors that say they are on a card.

    `around(node)` is entered while a node works, and while gradients that arrive at it are added.
    """
    around = (lambda node: nullcontext()) if around is None else around
    ends = [torch.autograd.graph.get_gradient_edge(x).node for x in inputs]  # kept, or their ids would be given again
    leaves = {id(node): i for i, node in enumerate(ends)}
    waiting: dict[int, int] = {}
    nodes: dict[int, Any] = {}
    pending: dict[int, list[Tensor | None]] = {}
    found: list[Tensor | None] = [None] * len(inputs)

    stack = [x.grad_fn for x in outputs]
    while stack:
        node = stack.pop()
        if id(node) in nodes:
            continue
        nodes[id(node)] = node
        for following, _ in node.next_functions:
            if following is not None:
                waiting[id(following)] = waiting.get(id(following), 0) + 1
                stack.append(following)

    def arrive(node: Any, slot: int, grad: Tensor | None) -> None:
        slots = pending.setdefault(id(node), [None] * len(node._input_metadata))
        if grad is None:
            return
        with around(node):
            meant = node._input_metadata[slot]
            grad = grad.sum_to_size(meant.shape) if grad.shape != meant.shape else grad
            grad = grad.to(meant.dtype) if grad.dtype != meant.dtype else grad
            known = slots[slot]
            slots[slot] = grad if known is None else known + grad

    with torch.no_grad():
        for x, grad in zip(outputs, incoming, strict=True):
            arrive(x.grad_fn, x.output_nr, grad)
        ready = [n for i, n in nodes.items() if not waiting.get(i)]
        while ready:
            ready.sort(key=lambda n: n._sequence_nr())
            node = ready.pop()
            grads = pending.pop(id(node), [None] * len(node._input_metadata))
            if id(node) in leaves:
                found[leaves[id(node)]] = grads[0]
                continue
            with around(node):
                edges, results = _apply(node, grads)
            del grads
            for (following, slot), grad in zip(edges, results, strict=True):
                if following is None:
                    continue
                arrive(following, slot, grad)
                waiting[id(following)] -= 1
                if not waiting[id(following)]:
                    ready.append(following)
            del results
    return found


def _apply(node: Any, grads: list[Tensor | None]) -> tuple[list[Any], list[Any]]:
    edges = list(node.next_functions)
    if all(g is None for g in grads) or type(node).__name__ == "AccumulateGrad":
        return edges, [None] * len(edges)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        if getattr(node, "materialize_grads", True):
            with_zeros = zip(grads, node._input_metadata, strict=True)
            grads = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g for g, m in with_zeros]
        results = node.apply(*grads)
        results = results if isinstance(results, tuple) else (results,)
        # Gradients of all arguments, edges of the tensors alone: the wanted ones of both are the same, in order.
        wanted = [r for r, need in zip(results, node.needs_input_grad, strict=False) if need]
        edges = [e for e in edges if e[0] is not None]
        return edges, wanted
    results = node(*grads)
    return edges, list(results) if isinstance(results, tuple) else [results]


# --- counting a call --------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """What one call costs. `kernels` are (launches, bytes, flops) each, `names` the operators of an eager call."""

    kernels: list[tuple[int, int, int]]
    peak: int
    names: list[str]
    result_bytes: int = 0

    @property
    def launches(self) -> int:
        return sum(n for n, _, _ in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(b for _, b, _ in self.kernels)


def on_card(value: Any) -> Any:
    """The same shapes on a fake card: tensors, Modules, devices and "cpu" among options."""

    def like(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    def move(x: Any) -> Any:
        if isinstance(x, Tensor):
            return like(x).requires_grad_(x.requires_grad)
        if isinstance(x, nn.Module):
            for part in x.modules():
                for name, p in part._parameters.items():
                    part._parameters[name] = p if p is None else nn.Parameter(like(p), p.requires_grad)
                for name, b in part._buffers.items():
                    part._buffers[name] = b if b is None else move(b)
            return x
        if isinstance(x, torch.device):
            return torch.device("cuda")
        return "cuda" if x == "cpu" and isinstance(x, str) else x

    return tree_map(move, value)


def count(
    call: Callable[[], Any], *, held: Iterable[Tensor] = (), inputs: Sequence[Tensor] = (), compiled: bool = False
) -> Cost:
    """Run a call on fake tensors (inside a `FakeTensorMode`) and count it; with `inputs`, their gradients as well."""
    meter = Meter(decompose=compiled)
    held = list(held)
    meter.hold(held)
    with _as_if_compiled() if compiled else nullcontext(), torch.set_grad_enabled(bool(inputs)):
        with meter:
            out = [x for x in tree_leaves(call()) if isinstance(x, Tensor)]
        if inputs:
            reached = [x for x in out if x.requires_grad]
            incoming = [torch.empty_like(x) for x in reached]
            meter.hold(incoming)
            meter.part = 1
            with meter:
                gradients = backward(reached, incoming, inputs)
            out = [*(x.detach() for x in out), *(g for g in gradients if g is not None)]
    names = [k.name for k in meter.kernels]
    result_bytes = sum(_bytes(x) for x in out)
    if compiled:
        results = {meter.key(x) for x in (*out, *held)}
        return Cost(fuse(meter.kernels, results), meter.peak, names, result_bytes)
    return Cost([(1, k.bytes, k.flops) for k in meter.kernels], meter.peak, names, result_bytes)


@contextmanager
def _as_if_compiled() -> Iterator[None]:
    with mock.patch.object(torch.compiler, "_is_compiling_flag", True):
        yield


@contextmanager
def fake_card() -> Iterator[FakeTensorMode]:
    """Fake tensors that may say they are on a card."""
    with FakeTensorMode() as mode:
        yield mode
