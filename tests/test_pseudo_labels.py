"""Selectors against loops over pixels, and what must hold for every one of them."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import udakit

seeds = st.integers(0, 2**20)
IGNORE = 255


def _logits(seed: int, n: int = 2, c: int = 4, h: int = 5, w: int = 6, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed))


def _valid(seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.rand(like.shape[0], *like.shape[2:], generator=generator) < 0.7


def textbook_prediction(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Arg-max and its softmax, pixel by pixel in Python's floats."""
    n, c, h, w = logits.shape
    labels, confidence = torch.zeros(n, h, w, dtype=torch.int64), torch.zeros(n, h, w)
    for i in range(n):
        for y in range(h):
            for x in range(w):
                z = [float(logits[i, k, y, x]) for k in range(c)]
                top = max(range(c), key=lambda k: z[k])
                labels[i, y, x] = top
                confidence[i, y, x] = 1 / sum(math.exp(v - z[top]) for v in z)
    return labels, confidence


def textbook_accepted(labels: Tensor, kept: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    shares = []
    for c in range(num_classes):
        pixels = zip(labels.flatten().tolist(), kept.flatten().tolist(), valid.flatten().tolist(), strict=True)
        predicted = [k for y, k, v in pixels if y == c and v]
        shares.append(sum(predicted) / len(predicted) if predicted else 0.0)
    return torch.tensor(shares)


def _prototypes(num_classes: int = 4, dim: int = 3, seed: int = 0) -> udakit.ClassPrototypes:
    vectors = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(seed))
    return udakit.ClassPrototypes(num_classes, dim).set_(vectors)


def _selectors() -> dict[str, nn.Module]:
    return {
        "argmax": udakit.ArgmaxSelector(),
        "threshold": udakit.ThresholdSelector(0.8),
        "ratio": udakit.ConfidentRatioSelector(0.8),
        "quantile": udakit.ClassQuantileSelector(4, 0.3),
        "consensus": udakit.BilateralConsensus(_prototypes()),
    }


def _features(seed: int, logits: Tensor) -> Tensor:
    return torch.randn(logits.shape[0], 3, 3, 3, generator=torch.Generator().manual_seed(seed + 2))


# --- every selector ----------------------------------------------------------------------------------------------


@given(seed=seeds, name=st.sampled_from(sorted(_selectors())), masked=st.booleans())
def test_a_selector_keeps_or_ignores_and_never_invents(seed: int, name: str, masked: bool) -> None:
    logits = _logits(seed)
    valid = _valid(seed, logits) if masked else None
    result = _selectors()[name](logits, _features(seed, logits), valid=valid)
    labels, confidence = textbook_prediction(logits)
    assert ((result.labels == labels) | (result.labels == IGNORE)).all()
    torch.testing.assert_close(result.confidence, confidence)
    assert (result.weight[result.labels == IGNORE] == 0).all()
    if valid is not None:
        assert (result.weight[~valid] == 0).all()
        if name in ("threshold", "quantile", "consensus"):
            assert (result.labels[~valid] == IGNORE).all()
    assert [x.dtype for x in result] == [torch.int64, torch.float32, torch.float32, torch.float32]
    assert not any(x.requires_grad for x in result)


@pytest.mark.parametrize("name", sorted(_selectors()))
def test_accepted_is_the_share_kept_of_each_predicted_class(name: str) -> None:
    logits = _logits(5)
    logits[:, 3] = -50  # a class that is predicted nowhere
    valid = _valid(5, logits)
    result = _selectors()[name](logits, _features(5, logits), valid=valid)
    labels, _ = textbook_prediction(logits)
    kept = (result.labels != IGNORE) & valid
    torch.testing.assert_close(result.accepted, textbook_accepted(labels, kept, valid, 4))
    assert result.accepted[3] == 0
    by_hand = torch.tensor([int(((result.labels == c) & (result.weight > 0)).sum()) for c in range(4)])
    assert torch.equal(result.kept_pixels, by_hand)


@pytest.mark.parametrize("name", sorted(_selectors()))
def test_probabilities_select_as_their_logits_do(name: str) -> None:
    logits = _logits(2).double()
    features = _features(2, logits)
    a = _selectors()[name](logits, features)
    b = _selectors()[name](logits.softmax(1), features, kind="probabilities")
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", sorted(_selectors()))
def test_one_row_mask_serves_every_image(name: str) -> None:
    logits = _logits(3)
    rows = udakit.row_mask(5, 6, 1, 2)
    for mask in (rows, rows.expand(2, -1, -1)):
        result = _selectors()[name](logits, _features(3, logits), valid=mask)
        assert (result.weight[:, :1] == 0).all()
        assert (result.weight[:, 3:] == 0).all()
        assert (result.weight[:, 1:3] > 0).any()


def test_confidence_is_exact_at_large_logits() -> None:
    """exp(max - logsumexp) would round at the logits' size: 1e-3 at 1e4."""
    logits = torch.tensor([1e4, 1e4 - 0.5]).view(1, 2, 1, 1)
    confidence = udakit.ArgmaxSelector()(logits).confidence
    torch.testing.assert_close(confidence.squeeze(), torch.tensor(1 / (1 + math.exp(-0.5))))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s(torch.zeros(4, 3)), r"Expected `logits` to be \(N, C, \*space\) .*, but got \(4, 3\)"),
        (lambda s: s(torch.zeros(1, 4, 2, 2), kind="log"), r"Expected `kind` to be one of .* but got 'log'"),
        (lambda s: s(torch.zeros(1, 4, 2, 2), valid=torch.ones(2, 3, dtype=torch.bool)), r"Expected `valid` to be"),
        (lambda s: s(torch.zeros(1, 4, 2, 2), valid=torch.ones(1, 2, 2)), r"Expected `valid` to be a bool tensor"),
    ],
)
@pytest.mark.parametrize("name", ["argmax", "threshold", "ratio", "quantile"])
def test_errors_of_all(name: str, call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, TypeError), match=message):
        call(_selectors()[name])


# --- threshold, ratio --------------------------------------------------------------------------------------------


def test_a_confidence_equal_to_the_threshold_is_kept() -> None:
    confidence = torch.tensor([0.968, 0.9679]).view(1, 1, 1, 2)
    probabilities = torch.cat([confidence, 1 - confidence], dim=1)
    result = udakit.ThresholdSelector(0.968)(probabilities, kind="probabilities")
    assert result.labels.tolist() == [[[0, IGNORE]]]
    assert result.accepted.tolist() == [0.5, 0.0]


@given(seed=seeds, scope=st.sampled_from(["batch", "image"]), masked=st.booleans())
def test_confident_ratio_against_a_loop(seed: int, scope: str, masked: bool) -> None:
    logits = _logits(seed, n=3)
    _, confidence = textbook_prediction(logits)
    valid = _valid(seed, logits)
    groups = [range(3)] if scope == "batch" else [[0], [1], [2]]
    expected = []
    for group in groups:
        hits = total = 0
        for i in group:
            for p, v in zip(confidence[i].flatten().tolist(), valid[i].flatten().tolist(), strict=True):
                if v or not masked:
                    total += 1
                    hits += p >= 0.7
        expected.append(hits / max(total, 1))
    ratio = udakit.confident_ratio(confidence, threshold=0.7, scope=scope, valid=valid if masked else None)
    assert ratio.shape == (() if scope == "batch" else (3,))
    torch.testing.assert_close(ratio.reshape(-1), torch.tensor(expected))


def test_confident_ratio_of_nothing_is_zero() -> None:
    nothing = torch.zeros(2, 3, 3, dtype=torch.bool)
    assert udakit.confident_ratio(torch.ones(2, 3, 3), valid=nothing) == 0
    assert udakit.confident_ratio(torch.ones(2, 3, 3), valid=nothing, scope="image").tolist() == [0, 0]


def test_daformer_counts_its_zeroed_rows_in_the_ratio() -> None:
    probabilities = torch.full((1, 2, 4, 3), 0.01)
    probabilities[:, 0] = 0.99
    probabilities[:, 0, 0] = 0.6  # the row that is left out is not confident
    rows = udakit.row_mask(4, 3, 1, 0)
    weight = udakit.ConfidentRatioSelector()(probabilities, kind="probabilities", valid=rows).weight
    assert weight[0, :, 0].tolist() == [0, 0.75, 0.75, 0.75]
    own = udakit.ConfidentRatioSelector(ratio_over="valid")
    assert own(probabilities, kind="probabilities", valid=rows).weight[0, :, 0].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: udakit.ThresholdSelector(1.5), r"Expected `threshold` to be in \[0, 1\], but got 1.5"),
        (lambda: udakit.ConfidentRatioSelector(scope="pixel"), "Expected `scope` to be one of"),
        (lambda: udakit.ConfidentRatioSelector(ratio_over="none"), "Expected `ratio_over` to be one of"),
        (lambda: udakit.ClassQuantileSelector(4, 0.0), r"Expected `share` to be in \(0, 1\], but got 0.0"),
        (lambda: udakit.ClassQuantileSelector(4, 0.5, 1.0), r"Expected `momentum` to be in \[0, 1\), but got 1.0"),
        (lambda: udakit.BilateralConsensus(torch.zeros(3, 2)), "Expected `prototypes` to be a ClassPrototypes"),
        (lambda: udakit.row_mask(4, 4, 2, 2), "Expected `top` \\+ `bottom` to leave at least one"),
        (lambda: udakit.row_mask(4, 4, -1, 2), "Expected `top` to be at least 0"),
        (lambda: udakit.ClassQuantileSelector(3)(torch.zeros(1, 4, 2, 2)), "with C = 3, but got"),
        (lambda: udakit.BilateralConsensus(_prototypes())(torch.zeros(1, 4, 2, 2)), "Expected `features` to be"),
        (
            lambda: udakit.BilateralConsensus(_prototypes())(torch.zeros(1, 5, 2, 2), torch.zeros(1, 3, 2, 2)),
            r"with C = 4, but got \(1, 5, 2, 2\)",
        ),
        (
            lambda: udakit.BilateralConsensus(_prototypes())(torch.zeros(1, 4, 2, 2), torch.zeros(2, 3, 2, 2)),
            r"Expected `features` to be \(N, D, H, W\) for `logits` \(1, 4, 2, 2\), but got \(2, 3, 2, 2\)",
        ),
        (
            lambda: udakit.bilateral_consensus(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 3).long()),
            "Expected `labels_b` to have the shape of `labels_a`",
        ),
    ],
)
def test_errors_of_one(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# --- class quantile ----------------------------------------------------------------------------------------------


@given(seed=seeds, share=st.sampled_from([0.1, 0.33, 0.5, 1.0]), masked=st.booleans())
def test_quantile_keeps_the_most_confident_share_of_each_class(seed: int, share: float, masked: bool) -> None:
    logits = _logits(seed, n=2, c=3, h=12, w=12)
    valid = _valid(seed, logits) if masked else torch.ones(2, 12, 12, dtype=torch.bool)
    result = udakit.ClassQuantileSelector(3, share, bins=2**16)(logits, valid=valid if masked else None)
    labels, confidence = textbook_prediction(logits)
    for c in range(3):
        own = sorted(confidence[(labels == c) & valid].tolist(), reverse=True)
        if not own:
            continue
        needed = math.ceil(share * len(own) - 1e-6)
        kept = sorted(result.confidence[result.labels == c].tolist(), reverse=True)
        assert needed <= len(kept) <= needed + 1  # a bin is kept whole
        assert kept == pytest.approx(own[: len(kept)])


def test_saturated_confidences_are_told_apart() -> None:
    """Bins evenly spaced in the confidence would hold all of these in one."""
    gap = torch.logspace(-6, -2, 100)
    probabilities = torch.stack([1 - gap, gap]).view(1, 2, 10, 10)
    result = udakit.ClassQuantileSelector(2, 0.2)(probabilities, kind="probabilities")
    assert result.weight.sum() == pytest.approx(20, abs=1)


def test_quantile_averages_histograms_and_stores_thresholds() -> None:
    def batch(confidence: float, count: int) -> Tensor:
        p = torch.full((1, 1, 1, count), confidence)
        return torch.cat([p, 1 - p, 0 * p], dim=1)

    selector = udakit.ClassQuantileSelector(3, 0.5, momentum=0.75)
    assert torch.isinf(selector.thresholds).all()
    selector(batch(0.9, 8), kind="probabilities")
    selector(batch(0.6, 8), kind="probabilities")
    assert selector.histogram[0].sum() == pytest.approx(0.25 * 8 * (1 + 0.75))
    # Weights 3 : 4 of the confidences 0.9 and 0.6: the better half ends inside 0.6.
    assert 0.58 < selector.thresholds[0] <= 0.6
    assert torch.isinf(selector.thresholds[1:]).all()
    selector(batch(0.9, 8), kind="probabilities")
    assert 0.88 < selector.thresholds[0] <= 0.9

    selector.eval()
    before = selector.histogram.clone()
    assert selector(batch(0.8, 8), kind="probabilities").weight.sum() == 0
    assert selector(batch(0.95, 8), kind="probabilities").weight.sum() == 8
    unseen = batch(0.95, 8).roll(1, 1)
    assert selector(unseen, kind="probabilities").weight.sum() == 0  # no history, nothing kept
    assert torch.equal(selector.histogram, before)


def test_an_absent_class_keeps_its_history() -> None:
    selector = udakit.ClassQuantileSelector(2, 0.5, momentum=0.5)
    p = torch.rand(1, 1, 8, 8) * 0.4 + 0.55
    selector(torch.cat([p, 1 - p], 1), kind="probabilities")
    before = selector.thresholds[0].clone()
    for _ in range(300):  # 0.5^300 would be 0 in float32
        selector(torch.cat([1 - p, p], 1), kind="probabilities")
    assert selector.thresholds[0] == before


def test_a_run_cut_in_two_selects_as_the_whole_one() -> None:
    whole = udakit.ClassQuantileSelector(4, 0.3, 0.9)
    for seed in range(3):
        whole(_logits(seed))
    resumed = udakit.ClassQuantileSelector(4, 0.3, 0.9)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for a, b in zip(whole(_logits(9)), resumed(_logits(9)), strict=True):
        assert torch.equal(a, b)


# --- bilateral consensus -----------------------------------------------------------------------------------------


def textbook_nearest(features: Tensor, vectors: Tensor, seen: list[bool], size: tuple[int, int], align: bool) -> Tensor:
    n, _, h, w = features.shape
    weights = torch.zeros(n, len(vectors), h, w)
    for i in range(n):
        for y in range(h):
            for x in range(w):
                e = [
                    math.exp(-float((features[i, :, y, x] - v).double().square().sum().sqrt())) if s else 0.0
                    for v, s in zip(vectors, seen, strict=True)
                ]
                weights[i, :, y, x] = torch.tensor(e) / sum(e)
    return nn.functional.interpolate(weights, size, mode="bilinear", align_corners=align).argmax(1)


@given(seed=seeds, align=st.booleans(), released=st.booleans())
def test_consensus_against_a_loop(seed: int, align: bool, released: bool) -> None:
    logits = _logits(seed, scale=1.0)
    features = 0.5 * _features(seed, logits)
    prototypes = _prototypes(seed=seed)
    prototypes.prototypes[1] = 0
    prototypes.counts[1] = 0  # never seen: a zero vector that is near to everything
    seen = [True, released, True, True]
    nearest = textbook_nearest(features, prototypes.prototypes, seen, (5, 6), align)
    labels, _ = textbook_prediction(logits)
    selector = udakit.BilateralConsensus(prototypes, align, include_unseen=released)
    result = selector(logits, features)
    assert torch.equal(result.labels, udakit.bilateral_consensus(labels, nearest))
    assert torch.equal(result.weight, (labels == nearest).float())
    if not released:
        assert (result.labels != 1).all()
        assert result.accepted[1] == 0


def test_no_class_seen_no_consensus() -> None:
    selector = udakit.BilateralConsensus(udakit.ClassPrototypes(4, 3))
    result = selector(_logits(0), torch.randn(2, 3, 2, 2))
    assert (result.labels == IGNORE).all()
    assert (result.accepted == 0).all()


def test_consensus_refers_to_the_prototypes_without_owning_them() -> None:
    prototypes = _prototypes()
    selector = udakit.BilateralConsensus(prototypes)
    assert selector.prototypes is prototypes
    assert not list(selector.children())
    assert not selector.state_dict()
    both = nn.ModuleDict({"prototypes": prototypes, "selector": selector})
    assert set(both.state_dict()) == {f"prototypes.{name}" for name in ("prototypes", "counts", "averaging")}
    twin = copy.deepcopy(both)
    assert twin["selector"].prototypes is twin["prototypes"]


def test_bilateral_consensus_of_maps() -> None:
    a = torch.tensor([[[0, 1, IGNORE, 3]]], dtype=torch.uint8)
    b = torch.tensor([[[0, 2, IGNORE, IGNORE]]])
    assert udakit.bilateral_consensus(a, b).tolist() == [[[0, IGNORE, IGNORE, IGNORE]]]
    assert udakit.bilateral_consensus(a, b).dtype == torch.int64
    assert udakit.bilateral_consensus(b, b, ignore_index=-1).tolist() == b.tolist()


# --- helpers -----------------------------------------------------------------------------------------------------


class _Net(nn.Module):
    def __init__(self, *, features: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.features = features

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.conv(x)
        return (y, x) if self.features else y


def test_hflip_average_of_both_kinds() -> None:
    torch.manual_seed(0)
    net, images = _Net().train(), torch.rand(2, 3, 5, 6)
    straight, mirrored = net(images), net(images.flip(3)).flip(3)
    p = udakit.hflip_average(net, images)
    torch.testing.assert_close(p, (straight.softmax(1) + mirrored.softmax(1)).detach() / 2)
    torch.testing.assert_close(udakit.hflip_average(net, images, average="logits"), (straight + mirrored).detach() / 2)
    assert not p.requires_grad
    assert net.training
    torch.testing.assert_close(udakit.hflip_average(net, images.flip(3)), p.flip(3))


def test_hflip_average_takes_whatever_holds_the_logits() -> None:
    torch.manual_seed(0)
    net = _Net(features=True)
    images = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(udakit.hflip_average(net, images), udakit.hflip_average(net.conv, images))
    torch.testing.assert_close(
        udakit.hflip_average(lambda x: {"out": net.conv(x)}, images), udakit.hflip_average(net.conv, images)
    )
    with pytest.raises(TypeError, match="Expected `model` to return logits"):
        udakit.hflip_average(lambda x: {"y": x}, images)


@given(height=st.integers(1, 9), top=st.integers(0, 4), bottom=st.integers(0, 4))
def test_row_mask_counts_the_rows_between(height: int, top: int, bottom: int) -> None:
    if top + bottom >= height:
        with pytest.raises(ValueError, match="leave at least one"):
            udakit.row_mask(height, 3, top, bottom)
        return
    mask = udakit.row_mask(height, 3, top, bottom)
    assert mask.shape == (height, 3)
    assert mask.dtype == torch.bool
    assert mask[:, 0].tolist() == [top <= row < height - bottom for row in range(height)]
