"""Class means and prototypes against loops over pixels, images and classes in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import udakit
from udakit import ClassPrototypes, class_means
from udakit._reduce import cut_evenly, divisor
from udakit.prototypes import means

seeds = st.integers(0, 2**20)
IGNORE = 255


def _batch(seed: int, n: int = 3, c: int = 4, d: int = 5, h: int = 4, w: int = 5) -> tuple[Tensor, Tensor]:
    """Features and labels with ignored pixels, ids beyond C, and classes missing in some of the images."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, h, w, generator=generator)
    labels = torch.randint(c + 1, (n, h, w), generator=generator)
    present = torch.rand(n, c + 1, generator=generator) < 0.6
    labels = torch.where(present.gather(1, labels.flatten(1)).view_as(labels), labels, IGNORE)
    return features, labels


def textbook_means(
    features: Tensor, labels: Tensor, num_classes: int, min_pixels: int = 1, ignore_index: int = IGNORE
) -> tuple[Tensor, Tensor]:
    """Per image (N, C, D) and (N, C), one pixel after another."""
    n, d, h, w = features.shape
    sums, counts = torch.zeros(n, num_classes, d).double(), torch.zeros(n, num_classes, dtype=torch.int64)
    for i in range(n):
        for y in range(h):
            for x in range(w):
                c = int(labels[i, y, x])
                if c != ignore_index and 0 <= c < num_classes:
                    sums[i, c] += features[i, :, y, x].double()
                    counts[i, c] += 1
    for i in range(n):
        for c in range(num_classes):
            sums[i, c] *= 0 if counts[i, c] < min_pixels else 1 / int(counts[i, c])
    return sums, counts


class TextbookPrototypes:
    """One vector after another, in float64."""

    def __init__(self, num_classes: int, dim: int, momentum: float, mode: str, per_image: bool, min_pixels: int):
        self.prototypes = torch.zeros(num_classes, dim).double()
        self.counts = [0] * num_classes
        self.momentum, self.mode, self.per_image, self.min_pixels = momentum, mode, per_image, min_pixels

    def update(self, features: Tensor, labels: Tensor) -> None:
        if not self.per_image:  # one long image
            features = features.transpose(0, 1).flatten(1, 2).unsqueeze(0)
            labels = labels.flatten(0, 1).unsqueeze(0)
        means, counts = textbook_means(features, labels, len(self.counts), self.min_pixels)
        for i in range(len(means)):
            for c in range(len(self.counts)):
                if counts[i, c] >= self.min_pixels:
                    m = 1 / (self.counts[c] + 1) if self.mode == "mean" else self.momentum
                    m = m if self.counts[c] else 1.0
                    self.prototypes[c] = (1 - m) * self.prototypes[c] + m * means[i, c]
                    self.counts[c] += 1


# --- class_means -------------------------------------------------------------------------------------------------


@given(seed=seeds, per_image=st.booleans(), min_pixels=st.integers(1, 4))
def test_class_means_against_a_loop(seed: int, per_image: bool, min_pixels: int) -> None:
    features, labels = _batch(seed)
    given_features, given_labels = features, labels
    if not per_image:
        features, labels = features.transpose(0, 1).flatten(1, 2)[None], labels.flatten(0, 1)[None]
    expected, expected_counts = textbook_means(features, labels, 4, min_pixels)
    if not per_image:
        expected, expected_counts = expected[0], expected_counts[0]
    means, counts = udakit.class_means(
        given_features, given_labels, num_classes=4, per_image=per_image, min_pixels=min_pixels
    )
    torch.testing.assert_close(means, expected.float())
    assert torch.equal(counts, expected_counts)


@given(seed=seeds)
def test_gradient_of_class_means_against_a_loop(seed: int) -> None:
    features, labels = _batch(seed)
    features = features.double().requires_grad_()
    weight = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed)).double()
    means, counts = udakit.class_means(features, labels, num_classes=4, per_image=True, min_pixels=2)
    (means * weight).sum().backward()
    expected = torch.zeros_like(features)
    for i in range(3):
        for y in range(4):
            for x in range(5):
                c = int(labels[i, y, x])
                if c < 4 and counts[i, c] >= 2:
                    expected[i, :, y, x] = weight[i, c] / counts[i, c]
    torch.testing.assert_close(features.grad, expected)


@given(seed=seeds)
def test_ignoring_pixels_equals_removing_them(seed: int) -> None:
    features, labels = _batch(seed, n=1, h=1, w=12)
    stay = (labels[0, 0] != IGNORE).nonzero().squeeze(1)
    a, counts = udakit.class_means(features, labels, num_classes=4)
    b, counts_of_rest = udakit.class_means(features[..., stay], labels[..., stay], num_classes=4)
    torch.testing.assert_close(a, b)
    assert torch.equal(counts, counts_of_rest)


def test_ignore_index_may_be_a_class_id_and_labels_uint8() -> None:
    features = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 1, 3)
    labels = torch.tensor([[[0, 1, 1]]], dtype=torch.uint8)
    means, counts = udakit.class_means(features, labels, num_classes=2, ignore_index=0)
    assert means.flatten().tolist() == [0, 3]
    assert counts.tolist() == [0, 2]


def test_sums_of_half_features_run_in_float32() -> None:
    features = torch.full((1, 1, 64, 64), 100.0, dtype=torch.float16)  # the sum is 409600, beyond float16
    means, _ = udakit.class_means(features, torch.zeros(1, 64, 64, dtype=torch.int64), num_classes=1)
    assert means.dtype == torch.float32
    assert means.item() == 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: udakit.class_means(x, y, num_classes=0), "Expected `num_classes` to be at least 1"),
        (lambda x, y: udakit.class_means(x, y, num_classes=3, min_pixels=0), "Expected `min_pixels` to be at least 1"),
        (
            lambda x, y: udakit.class_means(x, y[:, 1:], num_classes=3),
            r"Expected `labels` to be \(N, H, W\) matching `features` \(3, 5, 4, 5\), but got \(3, 3, 5\)",
        ),
        (lambda x, y: udakit.class_means(x.long(), y, num_classes=3), "Expected `features` to be a float tensor"),
        (lambda x, y: udakit.class_means(x, y.float(), num_classes=3), "Expected `labels` to be an int64 or uint8"),
        (lambda x, y: udakit.ClassPrototypes(3, 5, mode="median"), "Expected `mode` to be one of"),
        (lambda x, y: udakit.ClassPrototypes(3, 5, momentum=1.1), r"Expected `momentum` to be in \[0, 1\]"),
        (lambda x, y: udakit.ClassPrototypes(3, 6).update(x, y), r"with D = 6, but got \(3, 5, 4, 5\)"),
        (lambda x, y: udakit.ClassPrototypes(3, 6).distances(x), r"with D = 6, but got \(3, 5, 4, 5\)"),
        (lambda x, y: udakit.ClassPrototypes(3, 5).update(x, y[..., 1:]), "Expected `labels` to be"),
        (
            lambda x, y: udakit.ClassPrototypes(3, 5).set_(torch.zeros(3, 4)),
            r"Expected `prototypes` to be \(C, D\) = \(3, 5\), but got \(3, 4\)",
        ),
        (
            lambda x, y: udakit.ClassPrototypes(3, 5).set_(torch.zeros(3, 5), torch.zeros(4).long()),
            r"Expected `counts` to be \(C,\) = \(3,\), but got \(4,\)",
        ),
        (
            lambda x, y: udakit.ClassPrototypes(3, 5).set_(torch.zeros(3, 5), torch.zeros(3)),
            "Expected `counts` to be an integer tensor",
        ),
    ],
)
def test_errors(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, TypeError), match=message):
        call(*_batch(0))


# --- updates -----------------------------------------------------------------------------------------------------


@given(
    seed=seeds,
    momentum=st.sampled_from([1e-4, 0.1, 0.9, 1.0]),
    mode=st.sampled_from(["ema", "mean"]),
    per_image=st.booleans(),
    min_pixels=st.integers(1, 3),
)
def test_the_closed_form_is_the_sequence(
    seed: int, momentum: float, mode: str, per_image: bool, min_pixels: int
) -> None:
    ours = udakit.ClassPrototypes(4, 5, momentum, mode, per_image, min_pixels)
    textbook = TextbookPrototypes(4, 5, momentum, mode, per_image, min_pixels)
    for step in range(3):
        features, labels = _batch(seed + step, n=1 + (seed + 2 * step) % 4)
        ours.update(features, labels)
        textbook.update(features, labels)
        torch.testing.assert_close(ours.prototypes, textbook.prototypes.float(), rtol=1e-6, atol=1e-6)
        assert ours.counts.tolist() == textbook.counts


@given(seed=seeds, mode=st.sampled_from(["ema", "mean"]))
def test_a_constant_stays_itself_to_the_last_bit(seed: int, mode: str) -> None:
    vector = torch.randn(1, 5, 1, 1, generator=torch.Generator().manual_seed(seed))
    prototypes = udakit.ClassPrototypes(1, 5, 0.3, mode, min_pixels=1)
    for _ in range(4):
        prototypes.update(vector.expand(3, -1, 1, 1), torch.zeros(3, 1, 1, dtype=torch.int64))
        assert torch.equal(prototypes.prototypes, vector.view(1, 5))


def test_small_steps_keep_their_digits() -> None:
    """1 - (1 - 1e-4) in float32 is off by 2e-4 of itself."""
    prototypes = udakit.ClassPrototypes(1, 1, min_pixels=1).set_(torch.tensor([[1e-8]]))
    prototypes.update(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64))
    assert prototypes.prototypes.item() == pytest.approx(1e-4 + 1e-8, rel=1e-6)


def test_an_empty_batch_and_an_ignored_one_change_nothing() -> None:
    for per_image in (True, False):
        prototypes = udakit.ClassPrototypes(4, 5, per_image=per_image, min_pixels=1)
        prototypes.update(*_batch(0))
        before = copy.deepcopy(prototypes.state_dict())
        prototypes.update(torch.zeros(0, 5, 2, 2), torch.zeros(0, 2, 2, dtype=torch.int64))
        prototypes.update(torch.ones(2, 5, 2, 2), torch.full((2, 2, 2), IGNORE))
        assert all(torch.equal(before[name], x) for name, x in prototypes.state_dict().items())


def test_an_update_is_detached() -> None:
    features, labels = _batch(0)
    prototypes = udakit.ClassPrototypes(4, 5, min_pixels=1)
    prototypes.update(features.requires_grad_(), labels)
    assert not prototypes.prototypes.requires_grad


def test_a_run_cut_in_two_equals_the_whole_one() -> None:
    whole = udakit.ClassPrototypes(4, 5, 0.2, min_pixels=1)
    whole.update(*_batch(0))
    resumed = udakit.ClassPrototypes(4, 5, 0.2, min_pixels=1)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for module in (whole, resumed):
        module.update(*_batch(1))
    assert torch.equal(whole.prototypes, resumed.prototypes)
    assert torch.equal(whole.counts, resumed.counts)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_the_state_stays_float32(cast: torch.dtype) -> None:
    """In bfloat16 a step of 1e-4 would never land."""
    parent = torch.nn.Sequential(torch.nn.Linear(2, 2), udakit.ClassPrototypes(1, 2, 1e-3, min_pixels=1)).to(cast)
    assert parent[0].weight.dtype == cast
    prototypes = parent[1]
    assert prototypes.prototypes.dtype == torch.float32
    zeros = torch.zeros(1, 1, 1, dtype=torch.int64)
    prototypes.update(torch.ones(1, 2, 1, 1, dtype=cast), zeros)
    prototypes.update(2 * torch.ones(1, 2, 1, 1, dtype=cast), zeros)
    torch.testing.assert_close(prototypes.prototypes, torch.full((1, 2), 1.001))


def test_set_makes_every_non_zero_row_seen() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    prototypes = udakit.ClassPrototypes(3, 2).set_(rows)
    assert prototypes.seen.tolist() == [False, True, True]
    assert prototypes.counts.tolist() == [0, 1, 1]
    prototypes.set_(rows, torch.tensor([0, 7, 0]))
    assert prototypes.counts.tolist() == [0, 7, 1]
    rows += 1
    assert prototypes.prototypes[0].tolist() == [0, 0]  # a copy


# --- distances ---------------------------------------------------------------------------------------------------


def textbook_distances(features: Tensor, vectors: Tensor) -> Tensor:
    return (features.double().unsqueeze(1) - vectors.double()[None, :, :, None, None]).square().sum(2).sqrt()


@given(seed=seeds, scale=st.sampled_from([1e-15, 1e-3, 1.0, 1e6, 1e15]), offset=st.sampled_from([0.0, 100.0]))
def test_distances_and_gradient_against_the_definition(seed: int, scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = scale * (offset + torch.randn(4, 5, generator=generator))
    features = (scale * (offset + torch.randn(2, 5, 3, 4, generator=generator))).requires_grad_()
    prototypes = udakit.ClassPrototypes(4, 5).set_(vectors)
    distances = prototypes.distances(features)
    exact = textbook_distances(features, vectors)
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances / scale, (exact / scale).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(prototypes(features), distances)
    assert torch.equal(prototypes.assign(features), exact.argmin(1))
    weight = torch.randn(exact.shape, generator=generator)
    (gradient,) = torch.autograd.grad((distances * weight).sum(), features)
    (expected,) = torch.autograd.grad((exact * weight).sum(), features)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_the_distance_to_itself_is_nothing(size: float) -> None:
    """Float32 would lose half of the digits here: 1e-3 of the norm."""
    vectors = size * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    features = vectors.T.reshape(1, 64, 2, 2).clone().requires_grad_()
    distances = udakit.ClassPrototypes(4, 64).set_(vectors).distances(features)
    own = distances.flatten(2)[0].diagonal()
    assert own.abs().max() < 1e-6 * size
    own.sum().backward()
    assert features.grad.isfinite().all()
    assert features.grad.abs().max() < 1e-5


def test_a_zero_distance_has_no_slope() -> None:
    features = torch.zeros(1, 2, 1, 1, requires_grad=True)
    prototypes = udakit.ClassPrototypes(1, 2)
    prototypes.distances(features, include_unseen=True).sum().backward()
    assert features.grad.flatten().tolist() == [0, 0]


def test_distances_in_several_pieces() -> None:
    dim = 2**15  # four pixels a piece
    features = torch.randn(2, dim, 3, 3, generator=torch.Generator().manual_seed(0))
    vectors = torch.randn(3, dim, generator=torch.Generator().manual_seed(1))
    distances = udakit.ClassPrototypes(3, dim).set_(vectors).distances(features)
    torch.testing.assert_close(distances, textbook_distances(features, vectors).float())


def test_classes_never_seen_attract_nobody() -> None:
    """A zero vector is the nearest of all to a small feature."""
    prototypes = udakit.ClassPrototypes(3, 2)
    features = torch.full((1, 2, 1, 1), 0.1)
    assert prototypes.assign(features).tolist() == [[[IGNORE]]]
    prototypes.set_(torch.tensor([[0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]))
    assert prototypes.assign(features).tolist() == [[[1]]]
    assert prototypes.distances(features).flatten().isinf().tolist() == [True, False, True]
    assert prototypes.assign(features, include_unseen=True).tolist() == [[[0]]]
    far = prototypes.distances(features, include_unseen=True).flatten()
    torch.testing.assert_close(far, torch.tensor([math.sqrt(0.02), math.sqrt(2 * 4.9**2), math.sqrt(0.02)]))


def test_a_second_derivative_of_distances_is_refused_rather_than_wrong() -> None:
    prototypes = udakit.ClassPrototypes(2, 3).set_(torch.eye(2, 3))
    x = torch.rand(1, 3, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(prototypes.distances(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative .* of distances"):
        (x.sum() + gradient.square().sum()).backward()


# --- any number of dimensions, any precision, any pixel ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pixels", [1, 700, 6000])
def test_pieces_and_whole_maps_agree(dtype: torch.dtype, pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU works in pieces (two blocks and a rest) and by pixel, a GPU on whole maps: same values and gradients."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 200, pixels, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 6, (2, pixels), generator=generator)
    prototypes = ClassPrototypes(5, 200, min_pixels=1)
    prototypes.set_(torch.randn(5, 200, generator=generator).mul_(torch.tensor([1.0, 1, 1, 0, 1])[:, None]))
    weights = torch.randn(2, 5, pixels, generator=generator, dtype=torch.float64)

    def run() -> list[torch.Tensor]:
        found = []
        for part in ("distances", "means"):
            x = values.clone().requires_grad_()
            if part == "distances":
                out = prototypes.distances(x)
                assert bool((out[:, 3] == float("inf")).all())
                (out[:, [0, 1, 2, 4]] * weights[:, [0, 1, 2, 4]]).sum().backward()
            else:
                out = class_means(x, labels, num_classes=5)[0]
                (out * weights[0, :, :1]).sum().backward()
            found += [out.detach(), x.grad]
        return found

    monkeypatch.setattr("udakit.prototypes._distances.SMALL", 0)
    in_pieces = run()
    monkeypatch.setattr("udakit.prototypes._distances.in_pieces", lambda values: False)
    monkeypatch.setattr("udakit.prototypes.means._sums_if_finite", lambda *_: None)
    monkeypatch.setattr("udakit.prototypes.means._sums_by_pixel", means._sums_by_product)
    for a, b in zip(in_pieces, run(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pixels", [5, 1024, 4096, 3 * 1100, 4099])  # 4099 is a prime
def test_sums_by_product_are_those_by_pixel(pixels: int) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, pixels, generator=g, dtype=torch.float64)
    ids = torch.randint(5, (pixels, 2), generator=g).t()  # as of labels (H, W, N) that were permuted
    values[:, :, ::7], ids[:, ::7] = torch.nan, 4  # no class
    sums = means._sums_by_product(values, ids, 4)
    torch.testing.assert_close(sums, means._sums_by_pixel(values, ids, 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pixels", [1024, 4096, 9001])
def test_a_product_that_is_not_finite_is_not_used(pixels: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    values, ids = torch.randn(2, 3, pixels, generator=g).to(dtype), torch.randint(5, (2, pixels), generator=g)
    exact = means._sums_by_pixel(values.double(), ids, 4)
    found = means._sums_if_finite(values, ids, 4)
    assert found is not None
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    for odd in (torch.nan, torch.inf, -torch.inf):
        spoilt = torch.where((ids == 4).unsqueeze(1), odd, values)  # 4 is no class
        assert means._sums_if_finite(spoilt, ids, 4) is None
        torch.testing.assert_close(means._sums(spoilt, ids, 4).double(), exact, rtol=1e-5, atol=1e-4)
        one = values.clone()
        one[0, 0, (ids[0] == 1).nonzero()[0]] = odd  # a class of its own keeps it to itself
        sums = means._sums(one, ids, 4)
        assert not sums[0, 1, 0].isfinite()
        assert int(sums.isfinite().sum()) == sums.numel() - 1


@pytest.mark.parametrize("pixels", [1024, 4099])
def test_sums_of_channels_last_are_those_of_channels_first(pixels: int) -> None:
    """Value and gradient; pixels without a class may be NaN."""
    values, ids = torch.randn(2, 3, pixels, dtype=torch.float64), torch.randint(5, (2, pixels))
    values = torch.where((ids == 4).unsqueeze(1), torch.nan, values)
    rows = values.transpose(1, 2).contiguous().transpose(1, 2)
    weight, found = torch.randn(2, 4, 3, dtype=torch.float64), []
    for x in (values, rows):
        leaf = x.detach().requires_grad_()
        sums = means._SumMembers.apply(leaf, ids, 4)
        found.append((sums, torch.autograd.grad((sums * weight).sum(), leaf)[0]))
    assert found[1][1].stride() == rows.stride()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_long_sum_compiles_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(means, "LENGTH", 128)  # 32 parts
    features, labels = torch.arange(4096.0).view(1, 1, 64, 64), torch.arange(64).expand(1, 64, 64)
    compiled = torch.compile(lambda x, y: class_means(x, y, num_classes=64)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, labels), class_means(features, labels, num_classes=64)[0])


def test_images_of_other_sizes_do_not_need_a_graph_each() -> None:
    """A compiler gives up after eight."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    cut = torch.compile(lambda x: x + divisor(x.shape[0], 4), fullgraph=True, backend=backend)
    for count in range(60, 250):
        assert int(cut(torch.zeros(count))[0]) == (32 if count in (128, 160, 192, 224) else 1)
    assert len(graphs) <= 4


@pytest.mark.parametrize(("count", "parts"), [(1023, 1), (2048, 2), (2**18, 256), (65 * 129, 5), (4099, 1), (0, 1)])
def test_a_long_sum_is_cut_into_equal_parts(count: int, parts: int) -> None:
    assert divisor(count, 1024) == parts


@pytest.mark.parametrize(
    ("count", "parts", "more"),
    [(0, 1, 0), (1023, 1, 0), (2053, 1, 0), (4099, 4, 1), (65 * 129, 5, 0), (127 * 257, 31, 4), (2**18, 256, 0)],
)
def test_a_long_sum_of_any_length_is_cut(count: int, parts: int, more: int) -> None:
    assert cut_evenly(count, 1024) == (parts, more)
    assert (count + more) % parts == 0


@pytest.mark.parametrize("pixels", [61, 64, 127])
def test_parts_of_a_prime_length_add_up(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, ids = torch.randn(2, 3, pixels, dtype=torch.float64), torch.randint(6, (2, pixels))
    whole = means._sums_by_product(values, ids, 5)
    monkeypatch.setattr(means, "LENGTH", 8)
    torch.testing.assert_close(means._sums_by_product(values, ids, 5), whole)


def test_sums_by_pixel_keep_what_a_long_sum_in_float32_loses() -> None:
    """A class of 200,000 pixels around 1: added one after another in float32 the fifth digit would be gone."""
    generator = torch.Generator().manual_seed(0)
    values = 1 + 0.1 * torch.randn(1, 1, 200_000, generator=generator, dtype=torch.float64)
    labels = torch.zeros(1, 200_000, dtype=torch.int64)
    found = class_means(values.float(), labels, num_classes=2)[0]
    torch.testing.assert_close(found[0].double(), values.mean(2)[0], rtol=3e-7, atol=0)


def test_nothing_at_ignored_pixels_poisons_the_state() -> None:
    features = torch.randn(2, 4, 3, 5)
    labels = torch.randint(0, 3, (2, 3, 5))
    labels[:, 0] = 255
    labels[:, 1, 0] = 99  # no class either
    clean, spoilt = (ClassPrototypes(3, 4, min_pixels=1) for _ in range(2))
    clean.update(features, labels)
    features[:, :, 0] = float("nan")
    features[:, :, 1, 0] = float("inf")
    spoilt.update(features, labels)
    assert torch.equal(clean.prototypes, spoilt.prototypes)
    x = features.requires_grad_()
    class_means(x, labels, num_classes=3)[0].sum().backward()
    assert bool((x.grad[:, :, 0] == 0).all())
    assert bool(x.grad.isfinite().all())


def test_the_mode_is_saved() -> None:
    """A run that is resumed after its pass in "mean" goes on in "ema"."""
    first = ClassPrototypes(2, 3, mode="mean")
    first.mode = "ema"
    resumed = ClassPrototypes(2, 3, mode="mean")
    resumed.load_state_dict(first.state_dict())
    assert resumed.mode == "ema"
    first.mode = "mean"
    resumed.load_state_dict(first.state_dict(), assign=True)
    assert resumed.mode == "mean"
    old = {name: x for name, x in first.state_dict().items() if name != "averaging"}
    resumed.load_state_dict(old)  # saved before the mode was
    assert resumed.mode == "mean"
    with pytest.raises(ValueError, match=r"`mode` to be one of \('ema', 'mean'\), but got 'median'"):
        first.mode = "median"


def test_assigned_checkpoints_keep_float32() -> None:
    prototypes = ClassPrototypes(2, 3)
    half = {k: x.bfloat16() if x.is_floating_point() else x for k, x in prototypes.state_dict().items()}
    prototypes.load_state_dict(half, assign=True)
    assert prototypes.prototypes.dtype == torch.float32
    assert prototypes.counts.dtype == torch.int64
