"""Contrast of prototypes and of sampled pixels against textbook loops in float64."""

import math
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit
from udakit.losses._unit import lengths, unit_vectors
from udakit.losses.supervised_pixel_contrast import _draw_anchors

IGNORE = 255


def draw(seed: int, n: int, d: int, c: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, d, h, w, generator=g, dtype=torch.float64)
    labels = torch.randint(c + 1, (n, h, w), generator=g)
    return a.requires_grad_(), b.requires_grad_(), torch.where(labels == c, IGNORE, labels)


def info_nce(z: Tensor, anchor: int, positive: int, others: list[int], temperature: float) -> Tensor:
    s = z @ z[anchor] / temperature
    return torch.logsumexp(s[others], 0) - s[positive]


# prototype_contrast_loss


def image_prototype_contrast(a: Tensor, b: Tensor, labels: Tensor, temperature: float) -> Tensor | None:
    """Loss of one image (d, h, w), None without a class."""
    classes = sorted(set(labels.flatten().tolist()) - {IGNORE})
    if not classes:
        return None
    q = torch.stack([view[:, labels == c].mean(1).softmax(0) for view in (a, b) for c in classes])
    k = len(classes)
    rows = [info_nce(q, i, (i + k) % (2 * k), [j for j in range(2 * k) if j != i], temperature) for i in range(2 * k)]
    return torch.stack(rows).mean()


@given(seed=st.integers(0, 10_000), n=st.integers(1, 3), c=st.integers(2, 5), h=st.integers(1, 3), w=st.integers(1, 3))
def test_prototype_contrast_value_and_gradient(seed: int, n: int, c: int, h: int, w: int) -> None:
    a, b, labels = draw(seed, n, c, c, h, w)
    images = [image_prototype_contrast(a[k], b[k], labels[k], 1 / 7) for k in range(n)]
    counted = [x for x in images if x is not None]
    loss = udakit.prototype_contrast_loss(a, b, labels, num_classes=c)
    none = udakit.prototype_contrast_loss(a, b, labels, num_classes=c, reduction="none")
    assert none.shape == (n,)
    actual = torch.autograd.grad(loss, (a, b))
    if not counted:
        assert loss.item() == 0
        assert all((x == 0).all() for x in actual)
        return
    expected = torch.stack(counted).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(none, torch.stack([none.new_zeros(()) if x is None else x for x in images]))
    for x, e in zip(actual, torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(x, e)


def test_prototype_contrast_counts_an_image_of_one_class_and_drops_foreign_ids() -> None:
    a, b, labels = draw(0, 2, 4, 4, 3, 3)
    labels[1] = 2
    first = udakit.prototype_contrast_loss(a[:1], b[:1], labels[:1], num_classes=4)
    assert first > 0
    torch.testing.assert_close(udakit.prototype_contrast_loss(a, b, labels, num_classes=4), first / 2)
    foreign = torch.where(labels == IGNORE, 77, labels)
    torch.testing.assert_close(udakit.prototype_contrast_loss(a, b, foreign, num_classes=4), first / 2)


# pixel_prototype_contrast_loss


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 2),
    d=st.integers(1, 4),
    c=st.integers(1, 4),
    h=st.integers(1, 3),
    normalize=st.booleans(),
)
def test_pixel_prototype_value_and_gradient(seed: int, n: int, d: int, c: int, h: int, normalize: bool) -> None:
    features, _, labels = draw(seed, n, d, c + 1, h, 3)  # id c is no class
    g = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(c, d, generator=g, dtype=torch.float64)
    prototypes = prototypes * (torch.rand(c, 1, generator=g) < 0.7)
    seen = [i for i in range(c) if prototypes[i].any()]
    class_weight = torch.rand(c, generator=g, dtype=torch.float64)
    total, count = features.sum() * 0, 0
    for k in range(n):
        for y in range(h):
            for x in range(3):
                label = int(labels[k, y, x])
                if label in seen:
                    f = features[k, :, y, x]
                    rows = prototypes[seen]
                    if normalize:
                        f, rows = f / f.norm(), rows / rows.norm(dim=1, keepdim=True)
                    total = total - class_weight[label] * (rows @ f / 0.1).log_softmax(0)[seen.index(label)]
                    count += 1
    expected = total / max(count, 1)
    loss = udakit.pixel_prototype_contrast_loss(
        features, labels, prototypes, normalize=normalize, class_weight=class_weight
    )
    torch.testing.assert_close(loss, expected)
    actual, wanted = (torch.autograd.grad(v, features)[0] for v in (loss, expected))
    torch.testing.assert_close(actual, wanted)
    given_seen = torch.zeros(c, dtype=torch.bool)
    given_seen[seen] = True
    junk = torch.where(given_seen[:, None], prototypes, 9.0)  # what an unseen row holds does not matter
    other = udakit.pixel_prototype_contrast_loss(
        features, labels, junk, seen=given_seen, normalize=normalize, class_weight=class_weight
    )
    torch.testing.assert_close(other, loss)


@pytest.mark.parametrize("magnitude", [1e-15, 1.0, 1e15])
def test_unit_vectors_of_any_magnitude(magnitude: float) -> None:
    features, _, labels = draw(1, 1, 4, 3, 3, 3)
    prototypes = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = udakit.pixel_prototype_contrast_loss(features.float(), labels, prototypes)
    scaled = (features.detach().float() * magnitude).requires_grad_()
    loss = udakit.pixel_prototype_contrast_loss(scaled, labels, prototypes * magnitude)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert scaled.grad is not None
    assert scaled.grad.isfinite().all()
    assert (scaled.grad != 0).any()
    udakit.pixel_prototype_contrast_loss(
        zeros := torch.zeros_like(scaled).requires_grad_(), labels, prototypes
    ).backward()
    assert zeros.grad is not None
    assert (zeros.grad == 0).all()


# supervised_pixel_contrast_loss


def supervised(features: Tensor, labels: Tensor, c: int, temperature: float, denominator: str) -> Tensor:
    """Mean over the anchors with a positive, all pixels taken."""
    z = features.movedim(1, -1).reshape(-1, features.shape[1])
    z = z / z.norm(dim=1, keepdim=True)
    y = labels.flatten().tolist()
    pixels = [p for p in range(len(y)) if y[p] < c]
    losses = []
    for i in pixels:
        positives = [j for j in pixels if j != i and y[j] == y[i]]
        negatives = [j for j in pixels if y[j] != y[i]]
        if positives:
            others = [j for j in pixels if j != i]
            terms = [
                info_nce(z, i, j, others if denominator == "all" else [j, *negatives], temperature) for j in positives
            ]
            losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean() if losses else features.sum() * 0


@pytest.mark.parametrize("denominator", ["negatives", "all"])
@given(seed=st.integers(0, 10_000), n=st.integers(1, 2), d=st.integers(2, 4), c=st.integers(1, 4), h=st.integers(1, 3))
def test_supervised_value_and_gradient_without_a_cap(
    denominator: str, seed: int, n: int, d: int, c: int, h: int
) -> None:
    features, _, labels = draw(seed, n, d, c, h, 3)
    loss = udakit.supervised_pixel_contrast_loss(
        features, labels, num_classes=c, max_anchors=30, denominator=denominator
    )
    expected = supervised(features, labels, c, 0.1, denominator)
    torch.testing.assert_close(loss, expected)
    actual, wanted = (torch.autograd.grad(v, features)[0] for v in (loss, expected))
    torch.testing.assert_close(actual, wanted, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("function", [unit_vectors, lengths])
def test_lengths_and_directions_are_differentiated_twice(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@given(seed=st.integers(0, 10_000), cap=st.integers(1, 6))
def test_supervised_draws_distinct_pixels_of_each_class_up_to_the_cap(seed: int, cap: int) -> None:
    _, _, labels = draw(seed, 2, 2, 4, 3, 4)
    pixels, classes, rank, count = _draw_anchors(labels, 4, cap, IGNORE, torch.Generator().manual_seed(seed))
    drawn = rank < count
    assert len(pixels) == min(4 * cap, labels.numel())
    for c in range(4):
        chosen = pixels[drawn & (classes == c)].tolist()
        assert sorted(rank[drawn & (classes == c)].tolist()) == list(range(len(chosen)))
        assert len(chosen) == len(set(chosen)) == min(cap, int((labels == c).sum()))
        assert (labels.flatten()[chosen] == c).all()


@pytest.mark.parametrize("denominator", ["negatives", "all"])
@given(seed=st.integers(0, 10_000), cap=st.integers(1, 6))
def test_supervised_value_and_gradient_on_the_pixels_that_are_drawn(denominator: str, seed: int, cap: int) -> None:
    features, _, labels = draw(seed, 2, 3, 4, 3, 4)
    pixels, _, rank, count = _draw_anchors(labels, 4, cap, IGNORE, torch.Generator().manual_seed(seed))
    chosen = pixels[rank < count]
    loss = udakit.supervised_pixel_contrast_loss(
        features,
        labels,
        num_classes=4,
        max_anchors=cap,
        denominator=denominator,
        generator=torch.Generator().manual_seed(seed),
    )
    alone = features.transpose(0, 1).flatten(1)[:, chosen].view(1, 3, 1, -1)
    expected = supervised(alone, labels.flatten()[chosen].view(1, 1, -1), 4, 0.1, denominator)
    torch.testing.assert_close(loss, expected)
    actual, wanted = (torch.autograd.grad(v, features)[0] for v in (loss, expected))
    torch.testing.assert_close(actual, wanted, atol=1e-7, rtol=1e-5)


def test_supervised_draw_is_even_and_seeded() -> None:
    labels = torch.zeros(1, 1, 8, dtype=torch.uint8)
    g = torch.Generator().manual_seed(0)
    hits = torch.zeros(8)
    for _ in range(2000):
        hits[_draw_anchors(labels, 1, 2, IGNORE, g)[0]] += 1
    assert (hits - 500).abs().max() < 100  # five standard deviations
    features = torch.randn(1, 4, 8, 8)
    labels = torch.randint(3, (1, 8, 8))
    first, again, other = (
        udakit.supervised_pixel_contrast_loss(
            features, labels, num_classes=3, max_anchors=4, generator=torch.Generator().manual_seed(s)
        )
        for s in (1, 1, 2)
    )
    assert first == again != other


def test_supervised_none_marks_empty_slots_with_zero() -> None:
    features, _, _ = draw(3, 1, 4, 3, 2, 3)
    labels = torch.tensor([[[0, 0, 1], [0, IGNORE, 77]]])
    loss = udakit.supervised_pixel_contrast_loss(features, labels, num_classes=3, max_anchors=5, reduction="none")
    assert loss.shape == (3, 5)
    assert (loss != 0).sum(1).tolist() == [3, 0, 0]  # class 1 has no positive
    alone = udakit.supervised_pixel_contrast_loss(features, labels.clamp_max(0), num_classes=3)
    assert alone.item() == 0  # no negatives
    empty = features[:0].detach().requires_grad_()
    udakit.supervised_pixel_contrast_loss(empty, labels[:0], num_classes=3).backward()


MEMORY = """
import re, torch, udakit
torch.set_num_threads(1)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def run(anchors, side=64):
    features = torch.randn(1, 16, side, side, requires_grad=True)
    labels = torch.randint(19, (1, side, side))
    udakit.supervised_pixel_contrast_loss(features, labels, num_classes=19, max_anchors=anchors).backward()
run(4)
before = peak()
run(160)
print((peak() - before) / (4 * (19 * 160) ** 2))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_supervised_memory_is_at_most_the_documented_number_of_matrices() -> None:
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    documented = re.search(r"at most (\d+) \(C A\)\^2", udakit.supervised_pixel_contrast_loss.__doc__ or "")
    assert documented is not None
    assert 1 < float(out.stdout) <= int(documented[1])


# ProjectedFeatureLoss


def test_projected_feature_is_the_distance_of_unit_vectors_after_a_1x1_convolution() -> None:
    criterion = udakit.ProjectedFeatureLoss(3, 5, resize="student").double()
    features, _, _ = draw(4, 2, 3, 2, 4, 4)
    reference = torch.randn(2, 5, 2, 2, dtype=torch.float64)
    x = criterion.projection(features)
    up = torch.nn.functional.interpolate(reference, (4, 4), mode="bilinear")
    expected = (x / x.norm(dim=1, keepdim=True) - up / up.norm(dim=1, keepdim=True)).norm(dim=1).mean()
    torch.testing.assert_close(criterion(features, reference), expected)
    plain = udakit.ProjectedFeatureLoss(3, 5, normalize=False).double()
    plain.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(plain(features, up), (x - up).norm(dim=1).mean())


def test_identical_prototypes_leave_the_logarithm_of_their_number() -> None:
    loss = udakit.pixel_prototype_contrast_loss(
        torch.ones(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), torch.ones(5, 2)
    )
    assert loss.item() == pytest.approx(math.log(5))


def test_errors_name_the_argument() -> None:
    a, b, labels = draw(5, 2, 3, 3, 4, 4)
    with pytest.raises(ValueError, match="`view_b` to have the shape of `view_a`"):
        udakit.prototype_contrast_loss(a, b[..., :2], labels, num_classes=3)
    with pytest.raises(ValueError, match=r"`labels` to be \(N, H, W\) matching `view_a`"):
        udakit.prototype_contrast_loss(a, b, labels[:, :2], num_classes=3)
    with pytest.raises(ValueError, match=r"`prototypes` to be \(C, D\) matching `features`"):
        udakit.pixel_prototype_contrast_loss(a, labels, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"`class_weight` to be \(C,\) matching `prototypes`"):
        udakit.pixel_prototype_contrast_loss(a, labels, torch.zeros(3, 3), class_weight=torch.ones(4))
    with pytest.raises(TypeError, match="`seen` to be a bool tensor"):
        udakit.pixel_prototype_contrast_loss(a, labels, torch.zeros(3, 3), seen=torch.ones(3))
    with pytest.raises(ValueError, match="`denominator` to be one of"):
        udakit.SupervisedPixelContrastLoss(3, denominator="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`max_anchors` to be at least 1"):
        udakit.SupervisedPixelContrastLoss(3, max_anchors=0)
    with pytest.raises(ValueError, match="`features` to have 4 channels"):
        udakit.ProjectedFeatureLoss(4, 3)(a, b)
    with pytest.raises(ValueError, match='Pass resize="student" or resize="teacher"'):
        udakit.ProjectedFeatureLoss(3, 3)(a, b[..., :2])
