"""LabelFreeScores against loops a formula, in one dimension to three, in pieces, over batches and over ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit
from distributed import run_ranks
from udakit.validation import label_free

seeds = st.integers(0, 2**31 - 1)
EXACT = (
    "confidence", "negative_entropy", "information_maximization", "nuclear_norm", "class_correlation", "matrix_norm",
)  # fmt: skip


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def textbook(logits: Tensor, valid: Tensor | None = None) -> dict[str, float]:
    """Pixel by pixel, with the whole matrix P and its singular values."""
    rows = logits.double().softmax(1).flatten(2).transpose(1, 2).flatten(0, 1)
    if valid is not None:
        rows = rows[valid.flatten()]
    pixels, c = rows.shape
    mean = [float(rows[:, k].mean()) for k in range(c)]
    sure, unsure, fourth = 0.0, 0.0, 0.0
    gram = torch.zeros(c, c, dtype=torch.float64)
    for row in rows:
        p = row.tolist()
        sure += max(p)
        unsure += entropy(p)
        fourth += sum(x**4 for x in p)
        gram += row[:, None] * row[None, :]
    return {
        "confidence": sure / pixels,
        "negative_entropy": -unsure / pixels,
        "information_maximization": entropy(mean) - unsure / pixels,
        "nuclear_norm": float(torch.linalg.svdvals(rows).sum()) / math.sqrt(pixels * c),
        "class_correlation": float(gram.diagonal().sum() / gram.square().sum().sqrt()),
        "matrix_norm": (fourth / (pixels * c)) ** 0.25,
    }


def scores(logits: Tensor, valid: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    module = udakit.LabelFreeScores(logits.shape[1], **options)
    module.update(logits, valid=valid)
    return module.compute()


def assert_scores(found: dict[str, Tensor], expected: dict[str, float], tolerance: float) -> None:
    for key in EXACT:
        assert float(found[key]) == pytest.approx(expected[key], rel=tolerance, abs=tolerance), key


@given(
    seed=seeds,
    space=st.sampled_from([(7,), (3, 4), (2, 3, 2)]),
    c=st.integers(2, 5),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    masked=st.booleans(),
)
def test_against_the_definitions(seed: int, space: tuple[int, ...], c: int, scale: float, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, c, *space, generator=generator, dtype=torch.float64)
    valid = torch.rand(2, *space, generator=generator) < 0.7 if masked else None
    if valid is not None:
        valid.view(-1)[0] = True
    expected = textbook(logits, valid)
    found = scores(logits, valid)
    assert {x.dtype for x in found.values()} == {torch.float64}
    assert_scores(found, expected, 1e-9)
    assert_scores(scores(logits.softmax(1), valid, kind="probabilities"), expected, 1e-9)
    assert_scores(scores(logits.float(), valid), expected, 2e-4)  # the nuclear norm has square roots of sums near 0


def test_keys_and_the_two_ends() -> None:
    """Confident and balanced, and the same class everywhere: values that are known without a computer."""
    balanced = scores(1e4 * torch.eye(4).view(1, 4, 4))
    assert [*balanced] == [*EXACT[:5], "neighbourhood_density", "matrix_norm"]
    assert float(balanced["class_correlation"]) == pytest.approx(2)  # sqrt(C)
    assert float(balanced["information_maximization"]) == pytest.approx(math.log(4))
    assert float(balanced["nuclear_norm"]) == pytest.approx(1)
    assert float(balanced["matrix_norm"]) == pytest.approx(0.25**0.25)
    collapsed = torch.zeros(1, 4, 8)
    collapsed[:, 1] = 1e4
    uniform = scores(torch.zeros(1, 4, 8))
    for found in (scores(collapsed), uniform):
        assert float(found["class_correlation"]) == pytest.approx(1)
        assert float(found["information_maximization"]) == pytest.approx(0, abs=1e-7)
    assert float(uniform["neighbourhood_density"]) == pytest.approx(math.log(100))
    assert float(uniform["negative_entropy"]) == pytest.approx(-math.log(4))


def test_batches_add_up_and_reset_forgets() -> None:
    logits = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, parts = (udakit.LabelFreeScores(5, samples=0) for _ in range(2))
    whole.update(logits)
    for part in logits.split([1, 3, 2]):
        parts.update(part)
    assert_scores(parts.compute(), {k: float(v) for k, v in whole.compute().items()}, 1e-12)
    assert torch.equal(parts.class_pixels, whole.class_pixels)
    assert whole.class_pixels.tolist() == torch.bincount(logits.argmax(1).flatten(), minlength=5).tolist()
    assert torch.equal(whole.class_share, whole.class_pixels.double() / 72)
    whole.reset()
    assert all(not bool(x.any()) for x in whole.buffers())


@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (1, 4, 300), (40, 4, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_in_pieces(shape: tuple[int, ...], masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many images a piece, many pieces an image: each pixel once."""
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    valid = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    whole = udakit.LabelFreeScores(4, samples=0)
    whole.update(logits, valid=valid)
    monkeypatch.setattr(label_free, "_PIECE", 300)
    parts = udakit.LabelFreeScores(4, samples=0)
    parts.update(logits, valid=valid)
    for ours, theirs in zip(parts.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert_scores(parts.compute(), textbook(logits, valid), 1e-9)


@pytest.mark.parametrize("c", [2, 13, 24, 25, 32, 33])
def test_blocks_of_classes_with_logits_of_minus_infinity(c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU multiplies some numbers of classes block by block; logits of minus infinity add nothing to the entropy."""
    logits = 3 * torch.randn(2, c, 700, generator=torch.Generator().manual_seed(c), dtype=torch.float64)
    logits[0, 1, ::3] = -math.inf
    logits[1, 0] = -math.inf
    expected = textbook(logits)
    whole = udakit.LabelFreeScores(c, samples=0)
    whole.update(logits)
    assert_scores(whole.compute(), expected, 1e-9)
    torch.testing.assert_close(whole.gram, whole.gram.mT)
    assert_scores(scores(logits.softmax(1), kind="probabilities"), expected, 1e-9)
    monkeypatch.setattr("udakit._reduce.eager.LOOK", 1)  # as on large maps
    assert_scores(scores(logits), expected, 1e-9)
    monkeypatch.setattr(label_free, "_PIECE", 64 * c)
    parts = udakit.LabelFreeScores(c, samples=0)
    parts.update(logits)
    assert_scores(parts.compute(), expected, 1e-9)
    assert torch.equal(parts.class_pixels, whole.class_pixels)


@pytest.mark.parametrize("c", [2, 19])
def test_rounding_does_not_add_up_where_all_pixels_are_alike(c: int) -> None:
    logits = 2 * torch.randn(1, c, 1, generator=torch.Generator().manual_seed(1)).expand(1, c, 2**18 // c)
    module, exact = (udakit.LabelFreeScores(c, samples=0) for _ in range(2))
    module.update(logits.contiguous())
    exact.update(logits.double())
    for found, expected, tolerance in zip(module.sums, exact.sums, (2e-6, 5e-5, 2e-6), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("size", "shape"), [((6, 8), (24, 4, 6)), ((1, 47), (27, 4, 6))])
@pytest.mark.parametrize("masked", [False, True])
def test_short_rows_of_a_gpu(
    size: tuple[int, int], shape: tuple[int, ...], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image cut into rows of its own, as images of a larger batch; a prime length is filled up."""
    logits = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    valid = torch.rand(3, *size, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    monkeypatch.setattr(label_free, "_ROW", 5)
    maps, inside = label_free._short_rows(logits.flatten(2), None if valid is None else valid.flatten(1))
    assert maps.shape == shape
    module = udakit.LabelFreeScores(4, samples=0)
    module.update(maps, valid=inside)
    assert_scores(module.compute(), textbook(logits, valid), 1e-9)


def test_ties_go_to_the_first_class() -> None:
    module = udakit.LabelFreeScores(3)
    module.update(torch.tensor([[1.0, 1, 0], [0, 2, 2], [3, 3, 3]]).T.view(1, 3, 3).bfloat16())
    assert module.class_pixels.tolist() == [2, 1, 0]


def test_more_than_255_classes() -> None:
    logits = torch.eye(300).view(1, 300, 300)
    module = udakit.LabelFreeScores(300, samples=0)
    module.update(logits)
    assert module.class_pixels.tolist() == [1] * 300


def test_minus_infinity_is_a_probability_of_0() -> None:
    logits = torch.randn(1, 3, 6, dtype=torch.float64)
    logits[:, 1, :3] = -math.inf
    assert_scores(scores(logits), textbook(logits), 1e-9)


def test_density_against_the_definition() -> None:
    """The pixels that the generator draws, in a loop: rows of unit length, self kept, mean over rows and images."""
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = scores(logits, samples=6, generator=torch.Generator().manual_seed(7))["neighbourhood_density"]
    index = torch.randint(2**62, (2, 6), generator=torch.Generator().manual_seed(7)) % 20
    total = 0.0
    for p, drawn in zip(logits.softmax(1).flatten(2), index, strict=True):
        rows = [p[:, k] / p[:, k].square().sum().sqrt() for k in drawn]
        for a in rows:
            similar = torch.tensor([float(a @ b) / 0.05 for b in rows], dtype=torch.float64)
            total += entropy(similar.softmax(0).tolist()) / 6
    assert float(found) == pytest.approx(total / 2, rel=1e-9)


def test_density_draws_valid_pixels_alone() -> None:
    """Noise everywhere but at three equal pixels, which are the valid ones; an image without any takes no part."""
    logits = 5 * torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(3))
    valid = torch.zeros(3, 50, dtype=torch.bool)
    for image, pixels in ((0, [0, 17, 49]), (1, [5])):
        logits[image, :, pixels] = torch.tensor([1.0, 2, 3, 4]).view(4, 1)
        valid[image, pixels] = True
    logits = logits.masked_fill(~valid.unsqueeze(1), math.nan)
    module = udakit.LabelFreeScores(4, samples=40)
    module.update(logits, valid=valid)
    assert int(module.images) == 2
    assert float(module.compute()["neighbourhood_density"]) == pytest.approx(math.log(40), rel=1e-5)
    reached = udakit.LabelFreeScores(4, samples=200, generator=torch.Generator().manual_seed(0))
    reached.update(torch.eye(4).view(1, 4, 4) * 100, valid=torch.tensor([[True, False, True, True]]))
    assert float(reached.compute()["neighbourhood_density"]) == pytest.approx(math.log(200 / 3), abs=0.1)


def test_masking_equals_removing_even_a_nan() -> None:
    logits = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    valid = torch.arange(10).expand(2, -1) < 6
    dirty = logits.masked_fill(~valid.unsqueeze(1), math.nan)
    masked, removed = udakit.LabelFreeScores(3, samples=0), udakit.LabelFreeScores(3, samples=0)
    masked.update(dirty, valid=valid)
    removed.update(logits[..., :6])
    for ours, theirs in zip(masked.buffers(), removed.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_nan_is_an_error_of_compute(bad: float, kind: Any) -> None:
    logits = torch.rand(1, 3, 10)
    logits[0, 1, 4] = bad
    module = udakit.LabelFreeScores(3, kind=kind)
    module.update(logits)
    with pytest.raises(ValueError, match=r"Expected `logits` to be finite at every valid pixel, but got NaN .* 10 pix"):
        module.compute()


def test_errors() -> None:
    module = udakit.LabelFreeScores(3)
    with pytest.raises(ValueError, match="a valid pixel before `compute`, but got none"):
        module.compute()
    module.update(torch.rand(1, 3, 4), valid=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="a valid pixel before `compute`"):
        module.compute()
    with pytest.raises(ValueError, match=r"`logits` to have 3 classes, but got \(1, 4, 4\)"):
        module.update(torch.rand(1, 4, 4))
    with pytest.raises(ValueError, match=r"C of at least 2, but got \(1, 1, 4\)\. .*udakit\.binary_logits"):
        module.update(torch.rand(1, 1, 4))
    with pytest.raises(ValueError, match="`num_classes` to be at least 2, but got 1"):
        udakit.LabelFreeScores(1)
    with pytest.raises(ValueError, match="`kind` to be one of"):
        udakit.LabelFreeScores(3, kind="probs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`valid` to be \(N, L\) matching `logits` \(1, 3, 4\), but got \(4,\)"):
        module.update(torch.rand(1, 3, 4), valid=torch.ones(4, dtype=torch.bool))


def test_state_keeps_its_precision_and_travels() -> None:
    module = udakit.LabelFreeScores(3, samples=0).half()
    logits = torch.randn(1, 3, 8, 8)
    module.update(logits)
    fresh = udakit.LabelFreeScores(3, samples=0)
    fresh.load_state_dict(module.state_dict())
    assert module.gram.dtype == fresh.gram.dtype == torch.float64
    fresh.update(logits)
    assert_scores(fresh.compute(), {k: float(v) for k, v in module.compute().items()}, 1e-12)


# --- ranks ----------------------------------------------------------------------------------------

SPLIT = [slice(0, 3), slice(3, 3), slice(3, 4)]  # one rank has no image


def _batches() -> list[Tensor]:
    return [3 * torch.randn(4, 5, 8, 9, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def _rank(rank: int, world_size: int) -> dict[str, Any]:
    module = udakit.LabelFreeScores(5, samples=0)
    score, agreement = udakit.ConsistencyScore(5), udakit.EnsembleAgreement(2, kind="logits")
    threshold = udakit.ConfidenceThreshold()
    for logits in _batches():
        part = logits[SPLIT[rank]]
        module.update(part)
        score(part, part + part.flip(1))
        agreement([part, part + part.flip(1)])
        threshold.fit(part, part.flip(1).argmax(1), sync=True)
    own = int(module.pixels)
    merged = module.merged()
    return {
        "scores": module.compute(sync=True),
        "share": merged.class_share,
        "kept": int(module.pixels) == own,
        "consistency": score.compute(sync=True),
        "agreement": agreement.compute(sync=True),
        "histogram": threshold.histogram,
        "correct": threshold.correct,
    }


@pytest.mark.slow
def test_ranks_merge(tmp_path: Path) -> None:
    """Counts equal one process's, float sums within 1e-6, on every rank."""
    whole = udakit.LabelFreeScores(5, samples=0)
    score, agreement = udakit.ConsistencyScore(5), udakit.EnsembleAgreement(2, kind="logits")
    threshold = udakit.ConfidenceThreshold()
    for logits in _batches():
        whole.update(logits)
        score(logits, logits + logits.flip(1))
        agreement([logits, logits + logits.flip(1)])
        threshold.fit(logits, logits.flip(1).argmax(1))
    expected = {k: float(v) for k, v in whole.compute().items()}
    for found in run_ranks(_rank, 3, tmp_path=tmp_path):
        assert_scores(found["scores"], expected, 1e-6)
        assert found["kept"]
        assert torch.equal(found["share"], whole.class_share)
        assert torch.equal(found["consistency"], score.compute())
        assert torch.equal(found["agreement"], agreement.compute())
        assert torch.equal(found["histogram"], threshold.histogram)
        assert torch.equal(found["correct"], threshold.correct)


@pytest.mark.parametrize("levels", [3, 10**6], ids=["ties", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("side", [8, 96])  # from some size on the CPU counts in another way
def test_of_equal_logits_the_first_class_is_the_predicted_one(levels: int, masked: bool, side: int) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(levels, (2, 5, side, side), generator=g).float()
    valid = torch.rand(2, side, side, generator=g) < 0.7 if masked else None
    rank = torch.arange(5, 0, -1).view(1, 5, 1, 1)
    first = 5 - ((logits == logits.amax(1, keepdim=True)) * rank).amax(1)
    kept = first if valid is None else first[valid]
    scores = udakit.LabelFreeScores(5)
    scores.update(logits, valid=valid)
    assert scores.class_pixels.tolist() == torch.bincount(kept.flatten(), minlength=5).tolist()


def test_nan_at_a_pixel_of_a_large_map_is_still_named() -> None:
    logits = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    logits[0, 1, 5, 5] = torch.nan
    scores = udakit.LabelFreeScores(3)
    scores.update(logits)
    with pytest.raises(ValueError, match="got NaN or infinity"):
        scores.compute()
