"""Pixel-wise losses against textbook loops in float64, and the properties that all of them share."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit

IGNORE = 255


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


# One pixel's loss as a loop over classes: (scores of the pixel, its label or reference vector) -> value.


def ce_pixel(z: list[float], y: int) -> float:
    return -math.log(softmax(z)[y])


def sce_pixel(z: list[float], y: int) -> float:
    p = softmax(z)
    rce = -sum(max(p[c], 1e-7) * math.log(max(float(c == y), 1e-4)) for c in range(len(p)))
    return 0.1 * -math.log(p[y]) + rce


def entropy_pixel(z: list[float], _: Any) -> float:
    return -sum(p * math.log(p) for p in softmax(z)) / math.log(len(z))


def max_square_pixel(z: list[float], _: Any) -> float:
    return -0.5 * sum(p * p for p in softmax(z))


def kd_pixel(z: list[float], t: list[float]) -> float:
    q, p = softmax(t), softmax(z)
    return -sum(a * math.log(b) for a, b in zip(q, p, strict=True))


def distance_pixel(f: list[float], r: list[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(f, r, strict=True)))


# name -> (pixel oracle, what the second argument is)
LOSSES: dict[str, tuple[Callable[..., float], str]] = {
    "cross_entropy": (ce_pixel, "labels"),
    "symmetric_cross_entropy": (sce_pixel, "labels"),
    "entropy_loss": (entropy_pixel, "none"),
    "max_square_loss": (max_square_pixel, "none"),
    "kd_loss": (kd_pixel, "map"),
    "feature_distance_loss": (distance_pixel, "map"),
}
WEIGHTED = [name for name in LOSSES if name != "feature_distance_loss"]
names = pytest.mark.parametrize("name", LOSSES)


def draw(seed: int, n: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "x": (3 * torch.randn(n, c, h, w, generator=g, dtype=torch.float64)).to(dtype),
        "map": (3 * torch.randn(n, c, h, w, generator=g, dtype=torch.float64)).to(dtype),
        "labels": torch.randint(c, (n, h, w), generator=g),
        "valid": torch.rand(n, h, w, generator=g) < 0.6,
        "weight": torch.rand(n, h, w, generator=g, dtype=torch.float64).to(dtype),
    }


def apply(name: str, x: Tensor, data: dict[str, Tensor], *, masked: bool = True, **options: Any) -> Tensor:
    function, kind = getattr(udakit, name), LOSSES[name][1]
    if kind == "labels":
        labels = torch.where(data["valid"], data["labels"], IGNORE) if masked else data["labels"]
        return function(x, labels, **options)
    if masked:
        options["valid"] = data["valid"]
    return function(x, data["map"], **options) if kind == "map" else function(x, **options)


def oracle(name: str, x: Tensor, data: dict[str, Tensor], weight: Tensor | None = None) -> tuple[float, int]:
    """Sum of the losses of the valid pixels, and their number."""
    pixel, kind = LOSSES[name]
    total, count = 0.0, 0
    n, _, h, w = x.shape
    for b in range(n):
        for i in range(h):
            for j in range(w):
                if data["valid"][b, i, j]:
                    second = (
                        int(data["labels"][b, i, j])
                        if kind == "labels"
                        else [float(v) for v in data["map"][b, :, i, j]]
                    )
                    factor = 1.0 if weight is None else float(weight[b, i, j])
                    total += factor * pixel([float(v) for v in x[b, :, i, j]], second)
                    count += 1
    return total, count


@names
@pytest.mark.parametrize("reduction", ["mean", "mean_all", "sum", "none"])
def test_value_of_each_reduction(name: str, reduction: str) -> None:
    data = draw(0, 2, 4, 3, 5)
    total, count = oracle(name, data["x"], data)
    loss = apply(name, data["x"], data, reduction=reduction)
    if reduction == "none":
        assert loss.shape == (2, 3, 5)
        assert (loss[~data["valid"]] == 0).all()
        loss = loss.sum()
    expected = {"mean": total / count, "mean_all": total / 30}.get(reduction, total)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@names
def test_gradient_is_the_oracles_difference_quotient(name: str) -> None:
    data = draw(1, 1, 3, 2, 2)
    x = data["x"].clone().requires_grad_()
    apply(name, x, data, reduction="sum").backward()
    step = 1e-6
    for index in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=torch.float64)
        shift[index] = step
        shift = shift.view_as(x)
        slope = (oracle(name, data["x"] + shift, data)[0] - oracle(name, data["x"] - shift, data)[0]) / (2 * step)
        assert x.grad is not None
        assert x.grad.flatten()[index].item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("name", WEIGHTED)
def test_pixel_weight_enters_the_numerator_only(name: str) -> None:
    data = draw(2, 2, 4, 3, 3)
    total, count = oracle(name, data["x"], data, data["weight"])
    loss = apply(name, data["x"], data, pixel_weight=data["weight"])
    assert loss.item() == pytest.approx(total / count, rel=1e-12)


@names
@given(seed=st.integers(0, 10_000), n=st.integers(1, 2), c=st.integers(2, 5), h=st.integers(1, 3), w=st.integers(1, 3))
def test_masking_equals_removing(name: str, seed: int, n: int, c: int, h: int, w: int) -> None:
    data = draw(seed, n, c, h, w)
    x = data["x"].clone().requires_grad_()
    loss = apply(name, x, data)
    loss.backward()
    keep = data["valid"].flatten()

    def kept(t: Tensor) -> Tensor:  # the valid pixels as one image of one row
        if t.ndim == 4:
            return t.detach().movedim(1, -1).reshape(-1, c)[keep].T.reshape(1, c, 1, -1)
        return t.flatten()[keep].reshape(1, 1, -1)

    small = {k: kept(v) for k, v in data.items()}
    removed = small["x"].clone().requires_grad_()
    assert x.grad is not None
    if not keep.any():
        assert loss.item() == 0
        assert (x.grad == 0).all()
        return
    expected = apply(name, removed, small, masked=False)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert removed.grad is not None
    torch.testing.assert_close(kept(x.grad), removed.grad)
    assert (x.grad.movedim(1, -1)[~data["valid"]] == 0).all()


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_large_scores_stay_finite(name: str, dtype: torch.dtype) -> None:
    data = draw(3, 2, 4, 3, 3, dtype)
    x = (data["x"].sign() * 1e4).to(dtype).requires_grad_()
    data["map"] = -x.detach()
    loss = apply(name, x, data)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert x.grad is not None
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("name", ["cross_entropy", "symmetric_cross_entropy"])
def test_uint8_labels_and_another_ignore_index(name: str) -> None:
    data = draw(4, 2, 4, 3, 3, torch.float32)
    labels = torch.where(data["valid"], data["labels"], IGNORE)
    function = getattr(udakit, name)
    expected = function(data["x"], labels)
    assert function(data["x"], labels.to(torch.uint8)) == expected
    for other in (-1, 250):
        assert function(data["x"], torch.where(data["valid"], data["labels"], other), ignore_index=other) == expected


def test_cross_entropy_mean_all_counts_ignored_pixels_and_class_weight_is_not_divided_by() -> None:
    data = draw(5, 2, 4, 3, 3)
    labels = torch.where(data["valid"], data["labels"], IGNORE)
    none = udakit.cross_entropy(data["x"], labels, reduction="none")
    torch.testing.assert_close(udakit.cross_entropy(data["x"], labels, reduction="mean_all"), none.mean())
    class_weight = torch.tensor([0.5, 0.0, 2.0, 3.0])
    factor = class_weight.double()[torch.where(data["valid"], labels, 0)]
    expected = (factor * none).sum() / data["valid"].sum()
    torch.testing.assert_close(udakit.cross_entropy(data["x"], labels, class_weight=class_weight), expected)
    module = udakit.CrossEntropyLoss(class_weight=class_weight)
    torch.testing.assert_close(module(data["x"], labels), expected)
    assert list(module.state_dict()) == ["class_weight"]


def test_symmetric_cross_entropy_bounds_what_a_wrong_label_costs() -> None:
    wrong = torch.tensor([1e4, 0.0]).reshape(1, 2, 1, 1)
    loss = udakit.symmetric_cross_entropy(wrong, torch.ones(1, 1, 1, dtype=torch.long), ce_weight=0.0)
    assert loss.item() == pytest.approx(-math.log(1e-4), rel=1e-6)


def test_entropy_is_one_on_uniform_pixels_and_zero_on_certain_ones() -> None:
    for c in (2, 19):
        assert udakit.entropy_loss(torch.zeros(1, c, 2, 2)).item() == pytest.approx(1)
        nats = udakit.entropy_loss(torch.zeros(1, c, 2, 2), normalize=False).item()
        assert nats == pytest.approx(math.log(c))
    one_hot = torch.eye(3)[:, :, None, None]
    assert udakit.entropy_loss(one_hot, kind="probabilities").item() == 0


@pytest.mark.parametrize("name", ["entropy_loss", "max_square_loss"])
def test_probabilities_by_name(name: str) -> None:
    x = draw(6, 2, 4, 3, 3)["x"]
    function = getattr(udakit, name)
    torch.testing.assert_close(function(x.softmax(1), kind="probabilities"), function(x))
    one_hot = torch.eye(3).reshape(3, 3, 1, 1).requires_grad_()
    function(one_hot, kind="probabilities").backward()
    assert one_hot.grad is not None
    assert one_hot.grad.isfinite().all()


def test_max_square_balance_weighs_each_predicted_class_of_an_image_by_its_rarity() -> None:
    data = draw(7, 2, 3, 3, 4)
    x, valid = data["x"], data["valid"]
    predicted = x.argmax(1)
    total = 0.0
    for b in range(2):
        n_valid = int(valid[b].sum())
        for i in range(3):
            for j in range(4):
                if valid[b, i, j]:
                    same = int(((predicted[b] == predicted[b, i, j]) & valid[b]).sum())
                    total += (n_valid / same) ** 0.2 * max_square_pixel([float(v) for v in x[b, :, i, j]], None)
    loss = udakit.max_square_loss(x, balance=0.2, valid=valid)
    assert loss.item() == pytest.approx(total / int(valid.sum()), rel=1e-12)
    empty = udakit.max_square_loss(x, balance=1.0, valid=torch.zeros_like(valid))
    assert empty.item() == 0


@pytest.mark.parametrize("magnitude", [1e-15, 1.0, 1e15])
def test_feature_distance_at_any_magnitude(magnitude: float) -> None:
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(1, 6, 2, 2, generator=g)
    features = (magnitude * direction).requires_grad_()
    loss = udakit.feature_distance_loss(features, torch.zeros_like(features))
    loss.backward()
    norm = direction.double().norm(dim=1)
    assert loss.item() == pytest.approx(magnitude * norm.mean().item(), rel=1e-6)
    assert features.grad is not None
    torch.testing.assert_close(features.grad, (direction.double() / norm[:, None] / 4).float())
    close = udakit.feature_distance_loss(features * (1 + 1e-6), features)  # differences near 1e-21
    assert 0 < close.item() < 1e-5 * loss.item()


def test_feature_distance_gradient_is_zero_where_equal() -> None:
    features = torch.ones(1, 3, 1, 2)
    reference = features.clone()
    reference[..., 1] = 0
    features.requires_grad_()
    udakit.feature_distance_loss(features, reference).backward()
    assert features.grad is not None
    assert (features.grad[..., 0] == 0).all()
    assert (features.grad[..., 1] > 0).all()


def test_the_teacher_and_the_reference_get_no_gradient() -> None:
    for name in ("kd_loss", "feature_distance_loss"):
        x, other = torch.randn(1, 3, 2, 2, requires_grad=True), torch.randn(1, 3, 2, 2, requires_grad=True)
        getattr(udakit, name)(x, other).backward()
        assert x.grad is not None
        assert other.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: udakit.cross_entropy(x, torch.zeros(2, 1, 4, 4).long()), r"Expected `labels` to be \(N, H, W\)"),
        (lambda x: udakit.cross_entropy(x, torch.zeros(2, 4, 5).long()), r"matching `logits` \(2, 3, 4, 4\)"),
        (lambda x: udakit.cross_entropy(x, torch.zeros(2, 4, 4)), "Expected `labels` to be an int64 or uint8"),
        (lambda x: udakit.cross_entropy(x.long(), torch.zeros(2, 4, 4).long()), "Expected `logits` to be a float"),
        (lambda x: udakit.symmetric_cross_entropy(x, torch.zeros(2, 5, 4).long()), "Expected `labels`"),
        (lambda _: udakit.SymmetricCrossEntropyLoss(min_label=0.0), r"`min_label` to be in \(0, 1\]"),
        (lambda x: udakit.feature_distance_loss(x, x[:, :2]), "`reference_features` to have the shape of `features`"),
        (lambda x: udakit.feature_distance_loss(x, x, valid=torch.ones(2, 4, 4)), "`valid` to be a bool tensor"),
        (lambda _: udakit.FeatureDistanceLoss(reduction="avg"), "`reduction` to be one of"),
        (lambda x: udakit.entropy_loss(x[0, 0]), r"`logits` to be \(N, C, \*space\) .*, such as \(N, C, H, W\)"),
        (lambda _: udakit.EntropyLoss(kind="probs"), "`kind` to be one of"),
        (lambda _: udakit.MaxSquareLoss(balance=2.0), r"`balance` to be in \[0, 1\]"),
        (lambda x: udakit.max_square_loss(x, pixel_weight=torch.ones(2, 4)), "`pixel_weight` to be"),
        (lambda x: udakit.kd_loss(x, x[:, :, :2]), 'Pass resize="student" or resize="teacher"'),
        (lambda x: udakit.kd_loss(x, x[:, :2]), "`teacher_logits` to have the N and C"),
        (lambda _: udakit.KDLoss(temperature=0.0), r"`temperature` to be above 0"),
    ],
)
def test_errors_name_the_argument(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.randn(2, 3, 4, 4))


# kd_loss beyond the plain cross-entropy


def test_kd_temperature_divergence_and_probabilities() -> None:
    data = draw(8, 2, 4, 3, 3)
    s, t = data["x"].clone().requires_grad_(), data["map"]
    q, log_p = (t / 2).softmax(1), (s / 2).log_softmax(1)
    loss = udakit.kd_loss(s, t, temperature=2.0)
    torch.testing.assert_close(loss, 4 * -(q * log_p).sum(1).mean())
    kl = udakit.kd_loss(s, t, temperature=2.0, divergence="kl")
    torch.testing.assert_close(kl, 4 * (q * (q.log() - log_p)).sum(1).mean())
    (gradient,) = torch.autograd.grad(loss, s, retain_graph=True)
    (gradient_kl,) = torch.autograd.grad(kl, s)
    torch.testing.assert_close(gradient, gradient_kl)
    probabilities = udakit.kd_loss(s, t.softmax(1), temperature=2.0, teacher_kind="probabilities")
    torch.testing.assert_close(probabilities, loss)
    hard = torch.nn.functional.one_hot(t.argmax(1), 4).movedim(-1, 1).double()
    assert udakit.kd_loss(s, hard, divergence="kl", teacher_kind="probabilities").isfinite()


def test_kd_resize_names_whose_size_both_take() -> None:
    s, t = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 6)
    up = torch.nn.functional.interpolate(t, (8, 8), mode="bilinear")
    down = torch.nn.functional.interpolate(s, (4, 6), mode="bilinear")
    assert udakit.kd_loss(s, t, resize="student") == udakit.kd_loss(s, up)
    assert udakit.kd_loss(s, t, resize="teacher") == udakit.kd_loss(down, t)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("name", ["cross_entropy", "entropy_loss", "kd_loss", "symmetric_kd_loss", "max_square_loss"])
@pytest.mark.parametrize("side", [20, 40])
def test_what_arrives_at_a_pixel_that_is_not_valid_is_hidden(
    name: str, large: bool, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is NaN, and many gradients at once; small maps are treated in two ways."""
    monkeypatch.setattr("udakit._reduce.eager.LARGE", 1 if large else 2**30)
    monkeypatch.setattr("udakit.losses.symmetric_kd.LARGE", 1 if large else 2**30)
    x = torch.randn(1, 4, side, side, requires_grad=True)
    valid = torch.rand(1, side, side) > 0.5
    if name == "cross_entropy":
        loss = udakit.cross_entropy(x, torch.randint(4, valid.shape).where(valid, 255), reduction="none")
    else:
        more = {"kd_loss": (torch.randn_like(x),), "symmetric_kd_loss": (x, *torch.randn(2, *x.shape))}.get(name, ())
        loss = getattr(udakit, name)(x, *more, valid=valid, reduction="none")
    assert not torch.signbit(loss[~valid]).any()
    arriving = torch.ones_like(loss).where(valid, float("nan"))
    (found,) = torch.autograd.grad(loss, x, arriving, retain_graph=True)
    assert found.isfinite().all()
    assert (found * ~valid.unsqueeze(1)).eq(0).all()
    slopes = torch.randn(3, *loss.shape)
    (many,) = torch.autograd.grad(loss, x, slopes, is_grads_batched=True, retain_graph=True)
    for slope, own in zip(slopes, many, strict=True):
        torch.testing.assert_close(own, torch.autograd.grad(loss, x, slope, retain_graph=True)[0])


def test_a_uniform_teacher_at_a_low_temperature_teaches_all_the_same() -> None:
    student = torch.randn(1, 19, 2, 2)
    p = torch.full((1, 19, 2, 2), 1 / 19)
    for temperature in (0.05, 0.02, 0.001):
        from_p = udakit.kd_loss(student, p, temperature=temperature, teacher_kind="probabilities")
        torch.testing.assert_close(from_p, udakit.kd_loss(student, p.log(), temperature=temperature))


def test_uint8_labels_do_not_wrap_an_ignored_id() -> None:
    logits, labels = torch.randn(1, 182, 1, 2), torch.tensor([[[156, 3]]])
    for ignore_index in (-100, 256):
        losses = [
            function(logits, y, ignore_index=ignore_index)
            for function in (udakit.cross_entropy, udakit.upsampled_cross_entropy)
            for y in (labels, labels.to(torch.uint8))
        ]
        torch.testing.assert_close(torch.stack(losses), losses[0].expand(4))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["cross_entropy", "kl"])
def test_distillation_in_blocks_is_the_formula(
    temperature: float, reduction: str, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU a large map takes another way to the same value and gradient."""
    student, teacher = torch.randn(2, 2, 5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valid = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    teacher[0, 1, 0] = -float("inf")  # a class that this teacher never predicts: 0 log 0 is 0
    student = torch.where(valid.unsqueeze(1), student, float("nan")).requires_grad_()
    weight = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"temperature": temperature, "valid": valid, "pixel_weight": weight, "reduction": reduction}
    options["divergence"] = divergence

    def derivatives() -> tuple[Tensor, ...]:
        loss = udakit.kd_loss(student, teacher, **options)
        (once,) = torch.autograd.grad((loss * loss).sum(), student, retain_graph=True)
        (first,) = torch.autograd.grad((loss * loss).sum(), student, create_graph=True)
        return loss.detach(), once, first.detach(), torch.autograd.grad(first.square().sum(), student)[0]

    expected = derivatives()
    monkeypatch.setattr("udakit._reduce.eager.LARGE", 0)
    found = derivatives()
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_entropy_in_blocks_is_that_of_one_piece(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large maps on the CPU: values, gradients and second derivatives, with a NaN where nothing counts."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 128, 160, generator=generator, dtype=torch.float64)
    valid = torch.rand(2, 128, 160, generator=generator) > 0.3
    logits[0, 1].masked_fill_(~valid[0], float("nan"))
    logits = logits.to(dtype).requires_grad_()
    grad = torch.rand(2, 128, 160, generator=generator, dtype=torch.float64)

    def derivatives() -> list[Tensor]:
        loss = udakit.entropy_loss(logits, valid=valid, reduction="none")
        (once,) = torch.autograd.grad((loss * grad).sum(), logits)
        loss = udakit.entropy_loss(logits, valid=valid, reduction="none")
        (first,) = torch.autograd.grad((loss * grad).sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), logits)
        return [loss.detach(), once, first.detach(), second]

    blocks = derivatives()
    assert udakit.entropy_loss(logits.detach(), valid=valid) == udakit.entropy_loss(logits, valid=valid)
    monkeypatch.setattr("udakit._reduce.eager.LARGE", 2**40)
    for found, expected in zip(blocks, derivatives(), strict=True):
        torch.testing.assert_close(found, expected)
