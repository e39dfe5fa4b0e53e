"""Sliding windows against a sum and a count at full size; HRDA's fusion against loops with slices."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import udakit
from udakit.resolution import fusion


def net(dimensions: int = 2, stride: int = 1) -> nn.Module:
    torch.manual_seed(0)
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return convolution(3, 4, 3, stride=stride, padding=1).double()


def averaged(model: nn.Module, images: Tensor, window: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Every window by itself; HRDA's grid, written as released."""
    space = images.shape[2:]
    sides = [min(w, length) for w, length in zip(window, space, strict=True)]
    grids = [max(-(-(length - w) // s), 0) + 1 for length, w, s in zip(space, sides, stride, strict=True)]
    total, count = 0, torch.zeros(space, dtype=torch.float64)
    for cell in product(*(range(g) for g in grids)):
        at = tuple(
            slice(begin := min(k * s, length - w), begin + w)
            for k, s, w, length in zip(cell, stride, sides, space, strict=True)
        )
        part = torch.zeros(len(images), 4, *space, dtype=torch.float64)
        part[(slice(None), slice(None), *at)] = model(images[(slice(None), slice(None), *at)])
        total = total + part
        count[at] += 1
    return total / count


CASES = [
    ((20, 30), (8, 8), (4, 4)),
    ((20, 30), (8, 12), (8, 12)),  # windows that meet only where the last one is pushed back
    ((23, 17), (9, 7), (2, 3)),  # more than two windows over a pixel
    ((23, 17), (23, 5), (1, 5)),
    ((6, 5), (8, 8), (3, 3)),  # smaller than a window
    ((8, 9), (8, 8), (4, 4)),
    ((29,), (8,), (3,)),
    ((7, 9, 5), (4, 4, 4), (2, 3, 4)),
]


@pytest.mark.parametrize(("size", "window", "stride"), CASES)
def test_windows_value_and_gradient(size: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...]) -> None:
    model = net(len(size))
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours, theirs = udakit.sliding_logits(model, images, window, stride), averaged(model, images, window, stride)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = (images, *model.parameters())
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("size", "window", "stride"), CASES)
def test_bands_are_the_same_and_never_large(
    size: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        bands = list(udakit.sliding_bands(net(len(size)), images, window, stride))
        torch.testing.assert_close(
            torch.cat([band for _, band in bands], 2), udakit.sliding_logits(net(len(size)), images, window, stride)
        )
    assert all(band.shape[2] <= window[0] for _, band in bands)
    ends = [0]
    for top, band in bands:
        assert top == ends[-1]
        ends.append(top + band.shape[2])


def test_any_net_and_any_stride() -> None:
    """Nets in dicts, objects and tuples; small logits are brought to the window."""
    model, images = net(stride=2), torch.randn(1, 3, 16, 24, dtype=torch.float64)
    expected = udakit.sliding_logits(lambda x: F.interpolate(model(x), x.shape[2:], mode="bilinear"), images, (8, 8))
    for wrapped in (model, lambda x: {"out": model(x)}, lambda x: (model(x), None)):
        torch.testing.assert_close(udakit.sliding_logits(wrapped, images, (8, 8)), expected)


def test_a_net_sees_one_window_at_a_time() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    udakit.sliding_logits(model, torch.zeros(2, 3, 20, 30), (8, 8))
    assert set(seen) == {(2, 3, 8, 8)}
    assert len(seen) == 4 * 7


# --- HRDA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_every_place_is_drawn_and_lies_inside(scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    box = udakit.draw_detail_box(400, (64, 50), detail=(32, 50), scope=scope, generator=generator)
    assert box.start.shape == (400, 2)
    if scope == "batch":
        assert len(box.start.unique(dim=0)) == 1
    else:
        assert sorted(box.start[:, 0].unique().tolist()) == [0, 8, 16, 24, 32]
    assert box.start[:, 1].unique().tolist() == [0]


def test_crop_of_images_and_labels() -> None:
    x, labels = torch.randn(2, 3, 6, 8, requires_grad=True), torch.randint(9, (2, 6, 8), dtype=torch.uint8)
    box = udakit.DetailBox(torch.tensor([[0, 3], [2, 4]]), (4, 4), (6, 8))
    crops = udakit.crop_detail(x, box)
    assert torch.equal(crops, torch.stack([x[0, :, 0:4, 3:7], x[1, :, 2:6, 4:8]]))
    found = udakit.crop_detail(labels, box)
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.stack([labels[0, 0:4, 3:7], labels[1, 2:6, 4:8]]))
    crops.sum().backward()
    assert float(x.grad.sum()) == crops.numel()


def released(context: Tensor, detail: Tensor, attention: Tensor, start: tuple[int, int]) -> Tensor:
    """Stride 4, half the scale, one place for the batch: slices, as in HRDA's head."""
    n, c, h, w = context.shape
    y, x = (v // 8 for v in start)
    half = detail.shape[2] // 2, detail.shape[3] // 2
    mask = torch.zeros(n, 1, h, w, dtype=context.dtype)
    mask[:, :, y : y + half[0], x : x + half[1]] = 1
    attention = attention * mask
    low = F.interpolate((1 - attention) * context, scale_factor=2, mode="bilinear", align_corners=False)
    up = F.interpolate(attention, scale_factor=2, mode="bilinear", align_corners=False)
    inserted = torch.zeros(n, c, 2 * h, 2 * w, dtype=context.dtype)
    y, x = (v // 4 for v in start)
    inserted[:, :, y : y + detail.shape[2], x : x + detail.shape[3]] = detail
    return up * inserted + low


@pytest.mark.parametrize("start", [(0, 0), (8, 24), (32, 64)])
def test_fusion_is_that_of_the_released_code(start: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(2, 3, 8, 16, dtype=torch.float64, generator=generator).requires_grad_()
    detail = torch.randn(2, 3, 8, 16, dtype=torch.float64, generator=generator).requires_grad_()
    attention = torch.rand(2, 3, 8, 16, dtype=torch.float64, generator=generator).requires_grad_()
    box = udakit.DetailBox(torch.tensor([start, start]), (32, 64), (64, 128))
    ours, theirs = udakit.fuse_scales(context, detail, attention, box), released(context, detail, attention, start)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    inputs = (context, detail, attention)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_fusion_of_whole_images(dimensions: int) -> None:
    small, large = (2, 3, *[4] * dimensions), (2, 3, *[8] * dimensions)
    context, attention, detail = torch.randn(small), torch.rand(small), torch.randn(large)
    mode = ("linear", "bilinear", "trilinear")[dimensions - 1]
    expected = F.interpolate(attention, large[2:], mode=mode) * detail
    expected = expected + F.interpolate((1 - attention) * context, large[2:], mode=mode)
    torch.testing.assert_close(udakit.fuse_scales(context, detail, attention), expected)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_crops_and_fusion_in_other_dimensions(dimensions: int) -> None:
    """Half of each axis at full scale, stride 1, other places in each image."""
    generator = torch.Generator().manual_seed(0)
    box = udakit.draw_detail_box(
        2, (8,) * dimensions, detail=(4,) * dimensions, divisor=2, scope="image", generator=generator
    )
    x = torch.randn(2, 3, *box.image, generator=generator)
    context, attention = (torch.rand(2, 3, *[4] * dimensions, generator=generator) for _ in range(2))
    crops = udakit.crop_detail(x, box)
    fused = udakit.fuse_scales(context, crops, attention, box)
    mode = {1: "linear", 3: "trilinear"}[dimensions]
    for i, start in enumerate(box.start.tolist()):
        at = tuple(slice(k, k + 4) for k in start)
        small = tuple(slice(k // 2, k // 2 + 2) for k in start)
        assert torch.equal(crops[i], x[(i, slice(None), *at)])
        trusted, placed = torch.zeros_like(attention[i : i + 1]), torch.zeros(1, 3, *box.image)
        trusted[(0, slice(None), *small)] = attention[(i, slice(None), *small)]
        placed[(0, slice(None), *at)] = crops[i]
        up = [F.interpolate(m, box.image, mode=mode) for m in (trusted, (1 - trusted) * context[i : i + 1])]
        torch.testing.assert_close(fused[i], (up[0] * placed + up[1])[0])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("classes", [3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_crop_alone_is_fused_as_the_whole_map_would_be(axes: int, classes: int, dtype: torch.dtype) -> None:
    """Value, gradients, many of them at once, those of a single map, and second derivatives; torch's operators know."""
    g = torch.Generator().manual_seed(0)
    box = udakit.draw_detail_box(3, (9,) * axes, detail=(6,) * axes, divisor=1, scope="image", generator=g)
    maps = [torch.rand(3, classes, *[side] * axes, generator=g).to(dtype).requires_grad_() for side in (5, 7, 5)]
    if axes == 2:
        maps[0] = maps[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    ours, theirs = udakit.fuse_scales(*maps, box), fusion._fused(*maps, box)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    incoming = torch.rand(2, *ours.shape, generator=g, dtype=ours.dtype)
    found = torch.autograd.grad(ours, maps, incoming[0], retain_graph=True)
    expected = torch.autograd.grad(theirs, maps, incoming[0], retain_graph=True)
    torch.testing.assert_close(found, expected, **tolerance)
    many = torch.autograd.grad(ours, maps, incoming, is_grads_batched=True)
    torch.testing.assert_close([x[0] for x in many], list(expected), **tolerance)
    for i, x in enumerate(maps):
        alone = [y if i == j else y.detach() for j, y in enumerate(maps)]
        (slope,) = torch.autograd.grad(udakit.fuse_scales(*alone, box), x, incoming[0])
        torch.testing.assert_close(slope, expected[i], **tolerance)
    if dtype == torch.bfloat16:  # rounded at every step
        return
    twice = []
    for fuse in (udakit.fuse_scales, fusion._fused):
        (slope,) = torch.autograd.grad(
            fuse(maps[0], maps[1], maps[0], box).square(), maps[0], incoming[0], create_graph=True
        )
        twice.append(torch.autograd.grad(slope.square().sum(), maps[:2]))
    torch.testing.assert_close(*twice, **tolerance)


@pytest.mark.parametrize("start", [[-2, 0], [0, 6]])
def test_a_box_outside_of_its_image_fuses_nothing(start: list[int]) -> None:
    box = udakit.DetailBox(torch.tensor([[0, 0], start]), (4, 4), (8, 8))
    maps = torch.zeros(2, 3, 4, 4)
    with pytest.raises(IndexError, match="out of range"):
        udakit.fuse_scales(maps, maps, maps, box)


@pytest.mark.parametrize("size", [(2, 3), (4, 8), (1, 1)])
def test_crops_do_not_depend_on_the_memory_format(size: tuple[int, int]) -> None:
    """A crop is copied from the memory as it lies, and its gradient is written to a new map."""
    whole = torch.arange(4 * 5 * 6 * 12.0).view(4, 5, 6, 12)
    forms = (
        *(whole[1:, 1:4, 1:5, 2:10], whole[1:, 1:4, :4, :8].contiguous(memory_format=torch.channels_last)),
        *(
            whole[::2, ::2, ::2, 3::1][:, :, :3].repeat(2, 1, 2, 1)[:3, :, :4, :8],
            whole[:1, :1, :4, :8].expand(3, 3, 4, 8),
        ),
        *(
            whole[0, :3, :4, :8],
            whole[1:, 0, :4, :8].long(),
            whole[1:, :2, :4, :8] > 200,
            whole.mT[1:, :, :4, :6].mT[..., :4, :],
        ),
    )
    for x in forms:
        image = tuple(x.shape[-2:])
        room = [i - d + 1 for i, d in zip(image, size, strict=True)]
        if min(room) < 1:
            continue
        start = torch.stack([torch.tensor([0, 5, 3]) % r for r in room], 1)
        box = udakit.DetailBox(start, size, image)
        expected = torch.stack(
            [y[..., a : a + size[0], b : b + size[1]] for y, (a, b) in zip(x, start.tolist(), strict=True)]
        )
        assert torch.equal(udakit.crop_detail(x, box), expected)
        if x.is_floating_point():
            learned = x.detach().requires_grad_()
            crops = udakit.crop_detail(learned, box)
            assert torch.equal(crops, expected)
            crops.backward(expected)
            inside = udakit.crop_detail(learned.grad, box)
            assert torch.equal(inside, expected)
            assert learned.grad.abs().sum() == inside.abs().sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_of_a_crop_is_one_copy(dtype: torch.dtype) -> None:
    """It is the incoming one bit for bit, and no map is converted; a second derivative is that of torch's operators."""
    box = udakit.DetailBox(torch.tensor([[0, 3], [2, 4]]), (4, 4), (8, 8))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    incoming = torch.full((2, 3, 4, 4), -0.0, dtype=dtype)
    incoming[0, 0] = float("nan")
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        (grad,) = torch.autograd.grad(udakit.crop_detail(x, box), x, incoming)
    calls = {event.key: event.count for event in recorded.key_averages()}
    assert not {"aten::scatter_add_", "aten::_to_copy"} & calls.keys()
    assert calls["aten::copy_"] == len(x)
    assert torch.equal(udakit.crop_detail(grad, box).view(torch.uint8), incoming.view(torch.uint8))
    (grad,) = torch.autograd.grad((udakit.crop_detail(x, box) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    with torch.no_grad():
        assert torch.equal(udakit.crop_detail(second, box), 6 * udakit.crop_detail(x, box))
        assert second.abs().sum() == udakit.crop_detail(second, box).abs().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_gradients_of_a_crop_at_once(dtype: torch.dtype) -> None:
    box = udakit.DetailBox(torch.tensor([[0, 3], [2, 4]]), (4, 4), (8, 8))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    crops = udakit.crop_detail(x, box)
    incoming = torch.stack([torch.ones_like(crops), crops.detach()])
    (found,) = torch.autograd.grad(crops, x, incoming, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(crops, x, one, retain_graph=True)[0] for one in incoming]
    assert torch.equal(found, torch.stack(alone))


def test_windows_of_a_leaf_have_gradients_of_their_own() -> None:
    """The net gives its own leaf as the logits of both windows: no `.grad` may lie in another's memory."""
    leaves = [torch.randn(1, 1, 4, 5, requires_grad=True) for _ in range(2)]
    parts = iter(leaves)
    total = udakit.sliding_logits(lambda x: next(parts), torch.zeros(1, 3, 6, 5), (4, 5), (2, 5))
    total.sum().backward()
    first, second = (leaf.grad for leaf in leaves)
    assert first is not None
    assert second is not None
    first.zero_()
    expected = torch.tensor([0.5, 0.5, 1.0, 1.0]).view(4, 1).expand(1, 1, 4, 5)
    torch.testing.assert_close(second, expected)


def test_windows_in_half_take_many_gradients_at_once() -> None:
    images = torch.randn(1, 3, 8, 10).bfloat16().requires_grad_()
    total = udakit.sliding_logits(lambda x: 2 * x, images, (4, 4))
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, 2 * images.float())
    (slopes,) = torch.autograd.grad(total, images, torch.ones(2, *total.shape), is_grads_batched=True)
    torch.testing.assert_close(slopes, torch.full_like(slopes, 2.0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("length", [8, 20])
def test_a_subclass_in_sliding_windows_has_its_gradient(length: int) -> None:
    """Also in one window alone, whose sum torch takes for a leaf after it was written to through a view."""
    model, images = net(), torch.randn(1, 3, length, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for x in (images, images.as_subclass(type("Subclass", (torch.Tensor,), {}))):
        model.zero_grad()
        (udakit.sliding_logits(model, x, (8, 8)) ** 2).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert found[0]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("start", [[-1, 0], [0, -1], [0, 5], [5, 0], [3, 99]])
def test_a_crop_outside_of_its_image_is_an_error(start: list[int], learns: bool) -> None:
    box = udakit.DetailBox(torch.tensor([[0, 0], start, [0, 0]]), (4, 4), (8, 8))
    with pytest.raises(IndexError, match="out of range"):
        udakit.crop_detail(torch.zeros(3, 2, 8, 8, requires_grad=learns), box)


def test_errors() -> None:
    images, box = torch.zeros(2, 3, 8, 8), udakit.DetailBox(torch.zeros(2, 2).long(), (4, 4), (8, 8))
    with pytest.raises(ValueError, match=r"Expected `stride` to be at most `window` \(4, 4\)"):
        udakit.sliding_logits(net(), images, (4, 4), (5, 4))
    with pytest.raises(ValueError, match=r"Expected `window` to be \(height, width\)"):
        udakit.sliding_logits(net(), images, 4)
    with pytest.raises(TypeError, match=r"Expected `model` to return logits"):
        udakit.sliding_logits(lambda x: {"y": x}, images, (4, 4))
    with pytest.raises(ValueError, match=r"Expected `detail` to be at most `size`"):
        udakit.draw_detail_box(1, (8, 8), detail=(9, 8))
    with pytest.raises(ValueError, match=r"Expected `x` to hold 2 maps of the size \(8, 8\)"):
        udakit.crop_detail(images[..., :7], box)
    with pytest.raises(TypeError, match=r"Expected `box` to be a DetailBox"):
        udakit.fuse_scales(images, images, images, (0, 0, 4, 4))
    with pytest.raises(ValueError, match=r"Expected `attention` to have the shape of `context_logits`"):
        udakit.fuse_scales(images, images, images[:, :1], box)
    with pytest.raises(ValueError, match=r"Expected `context_logits` to have pixels, since .* to \(8, 8\)"):
        udakit.fuse_scales(images[:, :, :0], images, images[:, :, :0])
