"""Class draws, masks and pasting against loops; the traps of the released codes."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit
from udakit import SegBatch


def random_labels(
    seed: int, n: int = 2, h: int = 4, w: int = 5, c: int = 6, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Few classes an image, ignored pixels, and ids that are no class."""
    g = torch.Generator().manual_seed(seed)
    pool = torch.cat([torch.randint(c, (4,), generator=g), torch.tensor([255, 200, c])])
    return pool[torch.randint(len(pool), (n, 4, 5), generator=g)].to(dtype)


def batch(seed: int, *, n: int = 2, w: int = 5, weight: bool = True) -> SegBatch:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (n, 4, w), generator=g)
    return SegBatch(torch.randn(n, 3, 4, w, generator=g), labels, torch.rand(n, 4, w, generator=g) if weight else None)


# --- draw_classes ------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 4),
    c=st.integers(1, 8),
    fraction=st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.7, 1.0]),
    rounding=st.sampled_from(["up", "down"]),
    scope=st.sampled_from(["image", "batch"]),
    include_ignore=st.booleans(),
    candidates=st.sampled_from([None, (0,), (0, 0), "all", "mask"]),
    dtype=st.sampled_from([torch.int64, torch.uint8]),
)
def test_draw_counts(seed, n, c, fraction, rounding, scope, include_ignore, candidates, dtype):
    """Only present candidates, and exactly the share of them that was asked for."""
    labels = random_labels(seed, n=n, c=c, dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    allowed = set(range(c))
    if candidates == "all":
        candidates = range(c)
    elif candidates == "mask":
        candidates = torch.rand(c, generator=g) < 0.5
        allowed = {k for k in range(c) if candidates[k]}
    elif candidates is not None:
        allowed = set(candidates)
    chosen = udakit.draw_classes(
        labels, num_classes=c, fraction=fraction, rounding=rounding, scope=scope, candidates=candidates,
        include_ignore=include_ignore, generator=g,
    )  # fmt: skip
    assert chosen.shape == (n, c + include_ignore)
    assert chosen.dtype == torch.bool
    for i in range(n):
        ids = (labels if scope == "batch" else labels[i]).unique().tolist()
        present = {k for k in ids if k in allowed}
        if include_ignore and any(k >= c for k in ids):
            present.add(c)
        share = round(fraction * len(present), 6)
        drawn = set(chosen[i].nonzero().flatten().tolist())
        assert drawn <= present
        assert len(drawn) == (math.ceil(share) if rounding == "up" else math.floor(share))


@pytest.mark.parametrize(
    ("fraction", "n", "up", "down"), [(0.1, 30, 3, 3), (0.7, 10, 7, 7), (1 / 3, 3, 1, 1), (0.5, 7, 4, 3)]
)
def test_draw_rounds_what_was_meant(fraction, n, up, down):
    """0.1 * 30 is 3.0000000000000004 and 1/3 * 3 in float32 may miss 1: neither changes the count."""
    labels = torch.arange(n).view(1, 1, n)
    for rounding, count in (("up", up), ("down", down)):
        chosen = udakit.draw_classes(labels, num_classes=n, fraction=fraction, rounding=rounding)
        assert chosen.sum().item() == count


def test_every_class_can_be_drawn():
    """EHTDI's released draw never picks the largest present id; here each of five is drawn equally often."""
    labels = torch.arange(5).view(1, 1, 5).expand(4000, 1, 5)
    rates = udakit.draw_classes(
        labels, num_classes=5, rounding="down", generator=torch.Generator().manual_seed(0)
    ).float().mean(0)  # fmt: skip
    torch.testing.assert_close(rates, torch.full((5,), 0.4), atol=0.04, rtol=0)


def test_images_draw_by_themselves():
    """Two equal images in a batch do not share one draw (DAFormer#85 used mask[0] for all)."""
    labels = torch.arange(16).view(1, 4, 4).expand(2, 4, 4)
    chosen = udakit.draw_classes(labels, num_classes=16, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(chosen[0], chosen[1])


def test_scope():
    """scope="image" never draws a class of another image; scope="batch" does."""
    labels = torch.stack([torch.full((2, 2), k) for k in range(4)])
    own = udakit.draw_classes(labels, num_classes=4, fraction=1.0)
    assert torch.equal(own, torch.eye(4, dtype=torch.bool))
    assert udakit.draw_classes(labels, num_classes=4, fraction=1.0, scope="batch").all()


def test_ignore_index_may_be_a_class_id():
    labels = torch.tensor([[[0, 1, 2]]])
    chosen = udakit.draw_classes(labels, num_classes=3, fraction=1.0, ignore_index=0)
    assert chosen.tolist() == [[False, True, True]]
    mask = udakit.class_mask(labels, torch.ones(1, 3, dtype=torch.bool), ignore_index=0)
    assert mask.tolist() == [[[False, True, True]]]


def test_nothing_present():
    labels = torch.full((2, 3, 3), 255)
    assert not udakit.draw_classes(labels, num_classes=4).any()
    assert udakit.draw_classes(labels, num_classes=4, include_ignore=True)[:, 4].all()
    assert not udakit.class_mask(labels, udakit.draw_classes(labels, num_classes=4)).any()


@pytest.mark.parametrize("candidates", [[4], [-1], torch.tensor([0, 1]), torch.ones(3, dtype=torch.bool)])
def test_draw_candidates_are_checked(candidates):
    with pytest.raises(ValueError, match="Expected `candidates` to be class ids"):
        udakit.draw_classes(torch.zeros(1, 2, 2, dtype=torch.int64), num_classes=4, candidates=candidates)
    with pytest.raises(ValueError, match="Expected `candidates` to be class ids"):
        udakit.ClassMix(4, candidates=candidates)


@pytest.mark.parametrize(
    ("option", "value"), [("fraction", 1.5), ("rounding", "half"), ("scope", "world"), ("num_classes", 0)]
)
def test_draw_options_are_checked(option, value):
    options = {"num_classes": 4, option: value}
    with pytest.raises(ValueError, match=f"Expected `{option}` to be"):
        udakit.draw_classes(torch.zeros(1, 2, 2, dtype=torch.int64), **options)
    with pytest.raises(ValueError, match=f"Expected `{option}` to be"):
        udakit.ClassMix(**options)


# --- class_mask, paste, class_mix --------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 3),
    c=st.integers(1, 7),
    extra=st.booleans(),
    paste_ignore=st.booleans(),
    dtype=st.sampled_from([torch.int64, torch.uint8]),
)
def test_class_mask_covers_exactly_the_chosen(seed, n, c, extra, paste_ignore, dtype):
    labels = random_labels(seed, n=n, c=c, dtype=dtype)
    chosen = torch.rand(n, c + extra, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = udakit.class_mask(labels, chosen, num_classes=c, paste_ignore=paste_ignore)
    for i in range(n):
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                k = int(labels[i, y, x])
                is_class = k < c
                expected = bool(chosen[i, k]) if is_class else paste_ignore or (extra and bool(chosen[i, c]))
                assert bool(mask[i, y, x]) == expected


@pytest.mark.parametrize("columns", [3, 6])
def test_class_mask_columns(columns):
    with pytest.raises(ValueError, match=r"Expected `chosen` to be \(N, 4 or 5\) matching `labels` \(1, 2, 2\)"):
        udakit.class_mask(
            torch.zeros(1, 2, 2, dtype=torch.int64), torch.ones(1, columns, dtype=torch.bool), num_classes=4
        )


@given(seed=st.integers(0, 2**31))
def test_paste_all_or_nothing(seed):
    a, b = batch(seed), batch(seed + 1)
    for x, y in zip(a, b, strict=True):
        everywhere = torch.ones(2, 4, 5, dtype=torch.bool)
        assert torch.equal(udakit.paste(everywhere, x, y), x)
        assert torch.equal(udakit.paste(~everywhere, x, y), y)
        assert torch.equal(udakit.paste(everywhere, x, x), x)


@pytest.mark.parametrize(
    ("foreground", "background", "result"),
    [
        (torch.int64, torch.int64, torch.int64),
        (torch.uint8, torch.uint8, torch.uint8),
        (torch.int64, torch.uint8, torch.int64),
        (torch.uint8, torch.int64, torch.int64),
    ],
)
def test_label_dtypes(foreground, background, result):
    mask = torch.tensor([[[True, False]]])
    mixed = udakit.paste(
        mask, torch.tensor([[[7, 7]]], dtype=foreground), torch.tensor([[[255, 255]]], dtype=background)
    )
    assert mixed.dtype == result
    assert mixed.tolist() == [[[7, 255]]]


def test_masks_never_pass_through_float():
    """Large ids survive: in float32 the first two of these would be one number."""
    ids = torch.tensor([[[2**24 + 1, 2**24, 26001, 255]]])
    mask = torch.tensor([[[True, False, True, False]]])
    assert torch.equal(udakit.paste(mask, ids, ids), ids)


def test_nan_stays_on_its_side():
    """A mask times an image would carry NaN over; a choice does not, and neither does its gradient."""
    mask = torch.tensor([[[True, False]]])
    good = torch.ones(1, 3, 1, 2, requires_grad=True)
    bad = torch.full((1, 3, 1, 2), float("nan"))
    mixed = udakit.paste(mask, good, torch.where(mask.unsqueeze(1), bad, 0.0))
    assert mixed.isfinite().all()
    mixed.sum().backward()
    assert torch.equal(good.grad, mask[:, None].expand(1, 3, 1, 2).float())


@pytest.mark.parametrize("weights", [(True, True), (True, False), (False, True), (False, False)])
def test_missing_weight_counts_as_one(weights):
    source, target = batch(0, weight=weights[0]), batch(1, weight=weights[1])
    mask = torch.rand(2, 4, 5) < 0.5
    mixed = udakit.class_mix(source, target, mask)
    if not any(weights):
        assert mixed.weight is None
        return
    one = torch.ones(2, 4, 5)
    expected = torch.where(mask, source.weight if weights[0] else one, target.weight if weights[1] else one)
    assert torch.equal(mixed.weight, expected)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 5))
def test_class_mix_any_batch_size(seed, n):
    """One mask for image, label and weight, whatever the batch size (DACS#21 worked for two images only)."""
    source, target = batch(seed, n=n), batch(seed + 1, n=n)
    mixed, mask = udakit.ClassMix(5)(source, target, generator=torch.Generator().manual_seed(seed))
    for i in range(n):
        drawn = source.labels[i][mask[i]].unique()
        present = source.labels[i].unique()
        assert len(drawn) == math.ceil(len(present) / 2)
        assert not torch.isin(source.labels[i][~mask[i]], drawn).any()
        for got, a, b in zip(mixed, source, target, strict=True):
            assert torch.equal(got[i][..., mask[i]], a[i][..., mask[i]])
            assert torch.equal(got[i][..., ~mask[i]], b[i][..., ~mask[i]])


def test_diga_setting_always_pastes_ignored():
    labels = torch.tensor([[[0, 1, 2, 255]]])
    source = SegBatch(torch.ones(1, 3, 1, 4), labels)
    target = SegBatch(torch.zeros(1, 3, 1, 4), torch.full((1, 1, 4), 9))
    for paste_ignore in (True, False):
        mix = udakit.ClassMix(3, rounding="down", include_ignore=True, paste_ignore=paste_ignore)
        counts = set()
        for seed in range(20):
            mask = mix(source, target, generator=torch.Generator().manual_seed(seed))[1][0, 0]
            assert not paste_ignore or mask[3]
            counts.add(int(mask.sum()))
        # Four things present, two drawn: with the ignored pixels always in, they may come as a third.
        assert counts == ({2, 3} if paste_ignore else {2})


def test_class_mix_errors():
    source, target = batch(0), batch(1, w=6)
    with pytest.raises(ValueError, match=r"Expected `target.images` to have the shape of `source.images` \(2, 3"):
        udakit.ClassMix(5)(source, target)
    with pytest.raises(ValueError, match=r"Expected `source.labels` to be \(N, H, W\) matching `source.images`"):
        udakit.ClassMix(5)(source._replace(labels=source.labels[:, None]), source)
    with pytest.raises(TypeError, match=r"Expected `target.labels` to be an int64 or uint8 tensor"):
        udakit.ClassMix(5)(source, source._replace(labels=source.labels.float()))
    with pytest.raises(ValueError, match=r"Expected `target.weight` to be \(N, H, W\)"):
        udakit.ClassMix(5)(source, source._replace(weight=torch.ones(2)))
    with pytest.raises(ValueError, match="Expected `background` to have the shape of `foreground`"):
        udakit.paste(torch.ones(2, 4, 5, dtype=torch.bool), source.images, target.images)


def test_layout_is_kept():
    images = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    mixed = udakit.paste(torch.rand(2, 4, 5) < 0.5, images, images.clone(memory_format=torch.preserve_format))
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("space", [(20,), (2, 5, 2)])
@given(seed=st.integers(0, 2**31))
def test_signals_and_volumes_are_mixed_like_flattened_images(space, seed):
    """Every pixel by itself: the same as for the pixels in a row of one image, for any number of channels."""
    g = torch.Generator().manual_seed(seed)
    pool = torch.tensor([0, 1, 2, 3, 4, 255])

    def made() -> SegBatch:
        labels = pool[torch.randint(6, (2, 20), generator=g)]
        return SegBatch(torch.randn(2, 4, 20, generator=g), labels, torch.rand(2, 20, generator=g))

    def shaped(batch: SegBatch, size: tuple[int, ...]) -> SegBatch:
        return SegBatch(*(x.unflatten(-1, size) for x in batch))

    source, target = made(), made()
    flat = [shaped(x, (4, 5)) for x in (source, target)]
    ours = [shaped(x, space) for x in (source, target)]
    mix = udakit.ClassMix(5, include_ignore=True)
    (want, want_mask), (got, mask) = (
        mix(*pair, generator=torch.Generator().manual_seed(seed)) for pair in (flat, ours)
    )
    assert mask.shape == (2, *space)
    assert torch.equal(mask.flatten(1), want_mask.flatten(1))
    confidence = torch.rand(2, 20, generator=g)
    pasted, pasted_mask = udakit.target_paste(*ours, confidence.unflatten(1, space), threshold=0.5, extra_mask=mask)
    want_pasted, _ = udakit.target_paste(*flat, confidence.unflatten(1, (4, 5)), threshold=0.5, extra_mask=want_mask)
    crossed = udakit.cross_domain_mix(ours[0].images, ours[1].images, pasted_mask)
    assert torch.equal(crossed, udakit.paste(pasted_mask, ours[0].images, ours[1].images))
    for a, b in zip((*got, *pasted), (*want, *want_pasted), strict=True):
        assert torch.equal(a.flatten(a.ndim - len(space)), b.flatten(b.ndim - 2))


def test_a_batch_of_no_image():
    empty = SegBatch(torch.rand(0, 3, 4, 5), torch.zeros(0, 4, 5, dtype=torch.int64))
    mixed, mask = udakit.ClassMix(5)(empty, empty)
    assert mixed.images.shape == (0, 3, 4, 5)
    assert mask.shape == (0, 4, 5)
    assert udakit.boundary_band(mask).shape == (0, 4, 5)
    assert udakit.draw_box_mask(0, (4, 5)).shape == udakit.draw_block_mask(0, (4, 5)).shape == (0, 4, 5)
    augment = udakit.StrongAugment(mean=None, std=None)
    assert udakit.CrossDomainMix(5, udakit.fourier_transfer, augment)(*empty[:2], empty.images)[0].shape == (0, 3, 4, 5)


def test_messages_that_used_to_mislead():
    source, target = batch(0, w=8), batch(1, w=8)
    small = target._replace(labels=target.labels[:, ::4, ::4])
    message = r"Expected `target.labels` to be \(N, H, W\) matching `target.images` .* upsample the logits before"
    with pytest.raises(ValueError, match=message):
        udakit.ClassMix(5)(source, small)
    with pytest.raises(TypeError, match=r"Expected `mask` to be a bool tensor, .* comparison .* with \.squeeze\(1\)"):
        udakit.class_mix(source, target, torch.rand(2, 1, 4, 8))
    with pytest.raises(
        TypeError, match=r"Expected `background` to be float .* Paste images onto images and labels onto"
    ):
        udakit.paste(torch.ones(2, 4, 8, dtype=torch.bool), source.images, target.labels)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_classes", 0),
        ("num_classes", -2),
        ("num_classes", 2.0),
        ("num_classes", True),
        ("ignore_index", None),
        ("ignore_index", "255"),
        ("ignore_index", 255.0),
        ("paste_ignore", "no"),
        ("include_ignore", 1),
        ("fraction", math.nan),
    ],
)
def test_every_option_is_checked(option, value):
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    calls = [lambda **o: udakit.ClassMix(**{"num_classes": 3, **o})]
    if option not in ("include_ignore", "fraction"):
        calls.append(lambda **o: udakit.class_mask(labels, torch.ones(1, 3, dtype=torch.bool), **o))
    if option != "paste_ignore":
        calls.append(lambda **o: udakit.draw_classes(labels, **{"num_classes": 3, **o}))
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=f"Expected `{option}` to be"):
            call(**{option: value})


class Marked(Tensor):
    """A subclass as MONAI's MetaTensor and torchvision's tv_tensors are: its own methods, `new_empty` unlike others."""

    def new_empty(self, size, **options):
        if not isinstance(size, tuple) or isinstance(size, torch.Size):
            raise TypeError("new_empty(): argument 'size' must be tuple of ints")
        return super().new_empty(size, **options)


@pytest.mark.parametrize("size", [(6, 7), (500, 300)])
def test_subclasses_of_tensor_pass(size):
    """The same values as of plain tensors; the larger size takes the ways of the CPU that small ones do not."""

    def marked(x: Tensor) -> Tensor:
        return x.as_subclass(Marked)

    g = torch.Generator().manual_seed(0)
    images, style = torch.rand(2, 2, 3, *size, generator=g)
    labels, weight = torch.randint(5, (2, *size), generator=g), torch.rand(2, *size, generator=g)
    augment = udakit.StrongAugment(
        mean=None, std=None, blur_probability=1.0, sharpness_probability=1.0, noise_probability=1.0, gamma=(0.5, 2.0)
    )
    cross = udakit.CrossDomainMix(5, udakit.color_transfer, augment)
    seeded = {"generator": torch.Generator()}
    for name, call in {
        "ClassMix": lambda x, s, y, w: udakit.ClassMix(5)(SegBatch(x, y, w), SegBatch(s, y, w), **seeded),
        "target_paste": lambda x, s, y, w: udakit.target_paste((x, y), (s, y), w, threshold=0.5),
        "paste": lambda x, s, y, w: udakit.paste(y > 2, x, s),
        "boundary_band": lambda x, s, y, w: udakit.boundary_band(y > 2),
        "fourier": lambda x, s, y, w: udakit.fourier_transfer(x, s),
        "color": lambda x, s, y, w: udakit.color_transfer(x, s),
        "histogram": lambda x, s, y, w: udakit.histogram_transfer(x, s),
        "augment": lambda x, s, y, w: augment(x, **seeded),
        "cross": lambda x, s, y, w: cross(x, y, s, **seeded),
        "check_images": lambda x, s, y, w: udakit.check_images(x),
    }.items():
        results = []
        for make in (marked, lambda x: x):
            seeded["generator"].manual_seed(1)
            out = torch.utils._pytree.tree_leaves(call(*(make(x) for x in (images, style, labels, weight))))
            results.append([x for x in out if isinstance(x, Tensor)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a.as_subclass(Tensor), b), name


# --- target paste ------------------------------------------------------------------------------------------------


def test_target_paste_is_strict():
    source, target = batch(0), batch(1)
    confidence = torch.full((2, 4, 5), 0.5, dtype=torch.float64)
    confidence[0, 0, 0], confidence[0, 0, 1] = 0.95, 0.9500001
    mixed, mask = udakit.target_paste(source, target, confidence)
    assert mask.nonzero().tolist() == [[0, 0, 1]]
    extra = torch.zeros(2, 4, 5, dtype=torch.bool)
    extra[1, 2, 3] = True
    mixed, mask = udakit.TargetPaste()(source, target, confidence, extra_mask=extra)
    assert mask.nonzero().tolist() == [[0, 0, 1], [1, 2, 3]]
    for got, a, b in zip(mixed, source, target, strict=True):
        assert torch.equal(got[1][..., 2, 3], b[1][..., 2, 3])
        assert torch.equal(got[1][..., 0, 0], a[1][..., 0, 0])


# --- cross-domain mix --------------------------------------------------------------------------------------------


def test_cross_domain_mix_formula():
    """x' = M (blend Aug(x) + (1 - blend) x) + (1 - M) T(x, x_t), floor(n / 2) classes, ignored pixels always."""
    images, target = torch.rand(2, 2, 3, 4, 5)
    labels = torch.tensor([0, 1, 2, 3, 255]).expand(2, 4, 5)
    mix = udakit.CrossDomainMix(4, lambda x, t: x - t, lambda x: 2 * x, blend=0.3)
    mixed, mask = mix(images, labels, target)
    assert mask[:, :, 4].all()
    assert mask[:, 0, :4].sum(1).tolist() == [2, 2]
    expected = torch.where(mask[:, None], 0.3 * 2 * images + 0.7 * images, images - target)
    torch.testing.assert_close(mixed, expected)


def test_cross_domain_mix_hands_on_the_generator():
    images, target = torch.rand(2, 2, 3, 8, 8)
    labels = torch.arange(8).expand(2, 8, 8)
    augment = udakit.StrongAugment(mean=None, std=None, jitter_probability=1.0)
    mix = udakit.CrossDomainMix(8, udakit.fourier_transfer, augment)
    first, second = (mix(images, labels, target, generator=torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert any(m is augment for m in mix.modules())


def test_cross_domain_mix_errors():
    images = torch.rand(2, 3, 4, 5)
    labels = torch.zeros(2, 4, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Expected `translate` to return images of the shape \(2, 3, 4, 5\)"):
        udakit.CrossDomainMix(4, lambda x, t: t, lambda x: x)(images, labels, torch.rand(2, 3, 6, 6))
    with pytest.raises(ValueError, match=r"Expected `augment` to return images of the shape"):
        udakit.CrossDomainMix(4, lambda x, t: x, lambda x: x[:1])(images, labels, images)
    with pytest.raises(ValueError, match=r"Expected `labels` to be \(N, H, W\) matching `images`"):
        udakit.CrossDomainMix(4, lambda x, t: x, lambda x: x)(images, labels[:, :2], images)
    with pytest.raises(ValueError, match="Expected `blend` to be in"):
        udakit.CrossDomainMix(4, lambda x, t: x, lambda x: x, blend=1.1)


def test_partial_translators():
    """A styling with options bound is a `translate`."""
    translate = functools.partial(udakit.color_transfer, mean=(0.5,) * 3, std=(0.2,) * 3)
    mix = udakit.CrossDomainMix(4, translate, lambda x: x)
    images = torch.randn(2, 3, 4, 5)
    mixed, _ = mix(images, torch.zeros(2, 4, 5, dtype=torch.int64), torch.randn(2, 3, 7, 6))
    assert mixed.shape == images.shape


def test_the_generator_reaches_a_wrapped_augment_and_a_builtin_needs_none() -> None:
    augment = udakit.StrongAugment(mean=None, std=None)
    images, target = torch.rand(2, 2, 3, 16, 16)
    labels = torch.arange(4).repeat(2, 16, 4)
    for wrapped in (augment, torch.nn.DataParallel(augment)):
        mix = udakit.CrossDomainMix(4, udakit.fourier_transfer, wrapped, 0.3)
        first, second = (mix(images, labels, target, generator=torch.Generator().manual_seed(0))[0] for _ in range(2))
        assert torch.equal(first, second)
    assert (
        udakit.CrossDomainMix(4, udakit.fourier_transfer, torch.clone)(images, labels, target)[0].shape == images.shape
    )


def test_a_list_of_bools_is_no_list_of_ids() -> None:
    with pytest.raises(ValueError, match="Pass a mask as a bool tensor"):
        udakit.ClassMix(3, candidates=[False, False, True])
