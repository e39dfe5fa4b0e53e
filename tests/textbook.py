"""Textbook versions of the public operations: vectorised PyTorch as people write it from the formula.

They are what `benchmarks/operators.py` times the operations against, and `test_textbook.py` holds each of them to the
operation in value and gradient. Unlike the loops a formula that are the oracles of the other tests they are meant to be
quick: what a careful user would have in a training script without the library. They may do what the library may not:
wait for the device, index with a mask, hold the matrix of all pairs.

A textbook takes the tensors and the options of the operation's entry in the registry. An operation without one says
why in `NO_TEXTBOOK`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import kornia
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255
TEXTBOOK: dict[str, Callable[..., Any]] = {}
NO_TEXTBOOK = {
    "binary_logits": "it concatenates zeros and the logits, as the textbook would",
    "binary_probabilities": "it concatenates 1 - p and p, as the textbook would",
    "draw_token_mask": "it only draws one random number for each token",
    "adapt_batch_norm": "its time is that of the net's forward passes",
    "draw_detail_box": "it only draws two random numbers for each image",
    "draw_strong_augment": "it only draws ten random numbers for each image",
    "check_images": "it runs once, on the first batch of a loader",
    "RareClassSampler": "it draws an image number in microseconds, far less than it takes to read the image",
}


def textbook(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        TEXTBOOK[name] = function
        return function

    return keep


# --- losses ---------------------------------------------------------------------------------------


def single(x: Tensor) -> Tensor:
    """Where torch has no half-precision kernel people cast."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def masked_mean(loss: Tensor, valid: Tensor) -> Tensor:
    return (loss * valid).sum() / valid.sum()


@textbook("cross_entropy")
def cross_entropy(
    logits: Tensor, labels: Tensor, *, pixel_weight: Tensor, class_weight: Tensor, reduction: str = "mean"
) -> Tensor:
    loss = F.cross_entropy(logits, labels, weight=class_weight, ignore_index=IGNORE, reduction="none")
    return (loss * pixel_weight).sum() / (labels != IGNORE).sum()


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q = F.softmax(teacher.detach() / temperature, dim=1)
    return -(q * F.log_softmax(student / temperature, dim=1)).sum(dim=1) * temperature**2


@textbook("kd_loss")
def kd_loss(
    student: Tensor, teacher: Tensor, *, valid: Tensor, pixel_weight: Tensor, temperature: float, divergence: str
) -> Tensor:
    assert divergence == "kl"
    log_p = F.log_softmax(student / temperature, dim=1)
    q = F.softmax(teacher.detach() / temperature, dim=1)
    loss = F.kl_div(log_p, q, reduction="none").sum(dim=1) * temperature**2
    return masked_mean(loss * pixel_weight, valid)


@textbook("symmetric_kd_loss")
def symmetric_kd_loss(
    clean: Tensor,
    mixed: Tensor,
    teacher_clean: Tensor,
    teacher_mixed: Tensor,
    *,
    valid: Tensor,
    reverse_weight: float,
    temperature: float,
) -> Tensor:
    there = masked_mean(soft_cross_entropy(mixed, teacher_clean, temperature), valid)
    back = masked_mean(soft_cross_entropy(clean, teacher_mixed, temperature), valid)
    return there + reverse_weight * back


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


@textbook("upsampled_cross_entropy")
def upsampled_cross_entropy(logits: Tensor, labels: Tensor, *, pixel_weight: Tensor, class_weight: Tensor) -> Tensor:
    full = upsample(logits, labels.shape[1:])
    return cross_entropy(full, labels, pixel_weight=pixel_weight, class_weight=class_weight)


@textbook("upsampled_kd_loss")
def upsampled_kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    valid: Tensor,
    pixel_weight: Tensor,
    size: tuple[int, int],
    temperature: float,
    divergence: str,
) -> Tensor:
    return kd_loss(
        upsample(student, size),
        upsample(teacher, size),
        valid=valid,
        pixel_weight=pixel_weight,
        temperature=temperature,
        divergence=divergence,
    )


@textbook("feature_distance_loss")
def feature_distance_loss(features: Tensor, reference: Tensor, *, valid: Tensor, reduction: str = "mean") -> Tensor:
    return masked_mean(torch.norm(features - reference.detach(), dim=1), valid)


@textbook("feature_distillation_loss")
def feature_distillation_loss(features: Tensor, reference: Tensor, *, valid: Tensor, cosine_weight: float) -> Tensor:
    reference = reference.detach()
    smooth = F.smooth_l1_loss(features, reference, reduction="none").mean(1)
    apart = 1 - F.cosine_similarity(features, reference, dim=1)
    return masked_mean((1 - cosine_weight) * smooth + cosine_weight * apart, valid)


@textbook("entropy_loss")
def entropy_loss(logits: Tensor, *, valid: Tensor, pixel_weight: Tensor, normalize: bool) -> Tensor:
    assert normalize
    p = F.softmax(logits, dim=1)
    entropy = -(p * torch.log(p + 1e-30)).sum(dim=1) / math.log(logits.shape[1])
    return masked_mean(entropy * pixel_weight, valid)


@textbook("max_square_loss")
def max_square_loss(logits: Tensor, *, valid: Tensor, pixel_weight: Tensor, balance: float) -> Tensor:
    p = F.softmax(logits, dim=1)
    predicted = p.argmax(dim=1)
    factors = []
    for labels, mask in zip(predicted, valid, strict=True):
        counts = torch.bincount(labels[mask], minlength=logits.shape[1])
        factors.append(((mask.sum() / counts.clamp(min=1)) ** balance)[labels])
    return masked_mean(-0.5 * (p**2).sum(dim=1) * torch.stack(factors) * pixel_weight, valid)


@textbook("symmetric_cross_entropy")
def symmetric_cross_entropy(logits: Tensor, labels: Tensor, *, pixel_weight: Tensor, ce_weight: float) -> Tensor:
    valid = labels != IGNORE
    ce = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    p = F.softmax(logits, dim=1).clamp(min=1e-7, max=1)
    one_hot = F.one_hot(labels * valid, logits.shape[1]).permute(0, 3, 1, 2).to(p.dtype).clamp(min=1e-4, max=1)
    rce = -(p * torch.log(one_hot)).sum(dim=1)
    return masked_mean((ce_weight * ce + rce) * pixel_weight, valid)


@textbook("class_inconsistency")
def class_inconsistency(student: Tensor, teacher: Tensor, *, valid: Tensor) -> Tensor:
    c = student.shape[1]
    pairs = (student.argmax(dim=1) * c + teacher.argmax(dim=1))[valid]
    confusion = torch.bincount(pairs, minlength=c * c).view(c, c)
    both = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - both
    return torch.where(union > 0, 1 - both / union, 0)


@textbook("inconsistency_loss")
def inconsistency_loss(
    student: Tensor, teacher: Tensor, inconsistency: Tensor, *, valid: Tensor, weight_temperature: float = 1.0
) -> Tensor:
    w = (len(inconsistency) * F.softmax(inconsistency / weight_temperature, dim=0)).clamp(0.5, 2.0)
    weight = w[teacher.argmax(dim=1)]
    weight = weight / weight[valid].mean()
    return masked_mean(soft_cross_entropy(student, teacher, 1.0) * weight, valid)


@textbook("InconsistencyLoss")
def inconsistency_module(
    student: Tensor, teacher: Tensor, *, valid: Tensor, num_classes: int, momentum: float
) -> Tensor:
    # The moving averages start at 0, which their ratio does not see: that of one batch is the batch's.
    d = class_inconsistency(student.detach(), teacher, valid=valid).to(student.dtype)
    return inconsistency_loss(student, teacher, d, valid=valid)


@textbook("ProjectedFeatureLoss")
def projected_feature_loss(
    features: Tensor, reference: Tensor, *, valid: Tensor, dim: int, reference_dim: int
) -> Tensor:
    # The weights of the registry's entry; how they came about is not what is measured.
    weight = torch.linspace(-1, 1, dim * reference_dim).to(features.dtype).view(reference_dim, dim, 1, 1)
    bias = torch.linspace(-1, 1, reference_dim).to(features.dtype)
    x, y = F.normalize(F.conv2d(features, weight, bias), dim=1), F.normalize(reference, dim=1)
    return masked_mean(torch.norm(x - y, dim=1), valid)


# --- contrast -------------------------------------------------------------------------------------


@textbook("pixel_contrast_loss")
def pixel_contrast_loss(
    view_a: Tensor, view_b: Tensor, *, valid: Tensor, temperature: float, chunk_size: int | None = None
) -> Tensor:
    z = torch.cat([view_a.flatten(2), view_b.flatten(2)], dim=2).transpose(1, 2)
    m = z.shape[1] // 2
    similarity = z @ z.transpose(1, 2) / temperature
    anchors = valid.flatten(1).repeat(1, 2)
    left_out = torch.eye(2 * m, dtype=torch.bool) | ~anchors.unsqueeze(1)
    similarity = similarity.masked_fill(left_out, float("-inf"))
    positive = torch.cat([similarity.diagonal(m, 1, 2), similarity.diagonal(-m, 1, 2)], dim=1)
    return (torch.logsumexp(similarity, dim=2) - positive)[anchors].mean()


@textbook("prototype_contrast_loss")
def prototype_contrast_loss(
    view_a: Tensor, view_b: Tensor, labels: Tensor, *, num_classes: int, temperature: float = 1 / 7
) -> Tensor:
    losses = []
    for a, b, y in zip(view_a, view_b, labels, strict=True):
        classes = [k for k in y.unique().tolist() if k != IGNORE]
        q = torch.stack([view[:, y == k].mean(dim=1) for view in (a, b) for k in classes]).softmax(dim=1)
        k = len(classes)
        similarity = (q @ q.T / temperature).masked_fill(torch.eye(2 * k, dtype=torch.bool), float("-inf"))
        losses.append(F.cross_entropy(similarity, torch.arange(2 * k).roll(k)))
    return torch.stack(losses).mean()


@textbook("pixel_prototype_contrast_loss")
def pixel_prototype_contrast_loss(
    features: Tensor, labels: Tensor, prototypes: Tensor, *, pixel_weight: Tensor, class_weight: Tensor
) -> Tensor:
    logits = torch.einsum("ndhw,cd->nchw", F.normalize(features, dim=1), F.normalize(prototypes, dim=1)) / 0.1
    loss = F.cross_entropy(logits, labels, weight=class_weight, ignore_index=IGNORE, reduction="none")
    return (loss * pixel_weight).sum() / (labels != IGNORE).sum()


def sample_pixels(features: Tensor, labels: Tensor, num_classes: int, max_anchors: int) -> tuple[Tensor, Tensor]:
    """Up to `max_anchors` random pixels of each class: their embeddings and their classes."""
    x, y = features.permute(0, 2, 3, 1).flatten(0, 2), labels.flatten()
    places = [(y == k).nonzero().squeeze(1) for k in range(num_classes)]
    drawn = torch.cat([p[torch.randperm(len(p))[:max_anchors]] for p in places])
    return x[drawn], y[drawn]


@textbook("distribution_contrast_loss")
def distribution_contrast(
    features: Tensor,
    labels: Tensor,
    means: Tensor,
    variances: Tensor,
    *,
    pixel_weight: Tensor,
    temperature: float,
    ratio: float,
) -> Tensor:
    x = F.normalize(features, dim=1).movedim(1, -1).flatten(0, -2)
    labels = labels.flatten()
    valid = labels != IGNORE
    spread = variances * ratio / temperature
    square = x.square() @ spread.T / 2
    logits = (x @ means.T + square) / temperature
    own = square.gather(1, labels.where(valid, 0)[:, None])[:, 0] / temperature
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none") + own * valid
    return (loss * pixel_weight.flatten()).sum() / valid.sum()


@textbook("supervised_pixel_contrast_loss")
def supervised_pixel_contrast_loss(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    max_anchors: int,
    denominator: str = "negatives",
    generator: torch.Generator | None = None,
) -> Tensor:
    z, y = sample_pixels(features, labels, num_classes, max_anchors)
    z = F.normalize(z, dim=1)
    similarity = z @ z.T / 0.1
    same = (y == y.unsqueeze(1)) & ~torch.eye(len(y), dtype=torch.bool)
    exponentials = similarity.exp()
    if denominator == "all":
        total = exponentials.masked_fill(torch.eye(len(y), dtype=torch.bool), 0).sum(dim=1, keepdim=True)
    else:
        total = exponentials + (exponentials * (y != y.unsqueeze(1))).sum(dim=1, keepdim=True)
    loss = ((torch.log(total) - similarity) * same).sum(dim=1)
    count = same.sum(dim=1)
    return (loss[count > 0] / count[count > 0]).mean()


# --- mixing ---------------------------------------------------------------------------------------


def draw_ids(labels: Tensor, fraction: float, include_ignore: bool) -> Tensor:
    """Random share of the ids of one label map, rounded up."""
    ids = labels.unique()
    ids = ids if include_ignore else ids[ids != IGNORE]
    return ids[torch.randperm(len(ids))[: math.ceil(fraction * len(ids) - 1e-4)]]


@textbook("draw_classes")
def draw_classes(
    labels: Tensor, *, num_classes: int, fraction: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    chosen = torch.zeros(len(labels), num_classes, dtype=torch.bool)
    for row, y in zip(chosen, labels, strict=True):
        row[draw_ids(y, fraction, include_ignore=False)] = True
    return chosen


@textbook("class_mask")
def class_mask(labels: Tensor, chosen: Tensor, *, paste_ignore: bool) -> Tensor:
    masks = [torch.isin(y, row.nonzero().squeeze(1)) for y, row in zip(labels, chosen, strict=True)]
    return torch.stack(masks) | (labels == IGNORE) if paste_ignore else torch.stack(masks)


@textbook("paste")
def paste(mask: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    m = mask.unsqueeze(1).to(foreground.dtype) if foreground.ndim == 4 else mask.to(foreground.dtype)
    return m * foreground + (1 - m) * background


@textbook("class_mix")
def class_mix(source: Any, target: Any, mask: Tensor) -> tuple[Tensor, ...]:
    return tuple(paste(mask, s, t) for s, t in zip(source, target, strict=True))


@textbook("ClassMix")
def class_mix_module(
    source: Any,
    target: Any,
    *,
    num_classes: int,
    include_ignore: bool,
    paste_ignore: bool,
    fraction: float = 0.5,
    generator: torch.Generator | None = None,
) -> tuple[Any, ...]:
    mask = torch.stack([torch.isin(y, draw_ids(y, fraction, include_ignore)) for y in source[1]])
    return *class_mix(source, target, mask), mask


@textbook("target_paste")
def target_paste(
    source: Any, target: Any, confidence: Tensor, *, extra_mask: Tensor, threshold: float
) -> tuple[Tensor, ...]:
    mask = (confidence > threshold) | extra_mask
    return *class_mix(target, source, mask), mask


@textbook("cross_domain_mix")
def cross_domain_mix(augmented: Tensor, translated: Tensor, mask: Tensor) -> Tensor:
    return paste(mask, augmented, translated)


@textbook("CrossDomainMix")
def cross_domain_mix_module(
    images: Tensor,
    labels: Tensor,
    target_images: Tensor,
    *,
    num_classes: int,
    translate: Callable[..., Tensor],
    augment: Callable[..., Tensor],
    blend: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        masks = []
        for y in labels:
            ids = y[y != IGNORE].unique()
            masks.append(torch.isin(y, ids[torch.randperm(len(ids))[: len(ids) // 2]]) | (y == IGNORE))
        mask = torch.stack(masks)
        augmented = blend * augment(images) + (1 - blend) * images
        return paste(mask, augmented, translate(images, target_images)), mask


@textbook("boundary_band")
def boundary_band(mask: Tensor, *, kernel_size: int = 3) -> Tensor:
    x = mask.float().unsqueeze(1)
    reach = kernel_size // 2
    dilated = F.max_pool2d(x, kernel_size, stride=1, padding=reach)
    eroded = -F.max_pool2d(-x, kernel_size, stride=1, padding=reach)
    return (dilated != eroded).squeeze(1)


@textbook("draw_box_mask")
def draw_box_mask(
    n: int, size: tuple[int, int], *, device: str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    masks = torch.zeros(n, *size, dtype=torch.bool, device=device)
    for mask, u in zip(masks, torch.rand(n, 3).tolist(), strict=True):
        h, w = round(size[0] * 0.5 ** u[0]), round(size[1] * 0.5 ** (1 - u[0]))
        top, left = int(u[1] * (size[0] - h + 1)), int(u[2] * (size[1] - w + 1))
        mask[top : top + h, left : left + w] = True
    return masks


@textbook("mask_tokens")
def mask_tokens(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    masked = tokens.clone()
    masked[mask] = mask_token.flatten()
    return masked


@textbook("draw_block_mask")
def draw_block_mask(
    n: int,
    size: tuple[int, int],
    *,
    block_size: int = 64,
    ratio: float = 0.7,
    device: str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    grid = torch.rand(n, 1, max(size[0] // block_size, 1), max(size[1] // block_size, 1), device=device) < ratio
    return F.interpolate(grid.float(), size, mode="nearest").squeeze(1).bool()


@textbook("fourier_transfer")
def fourier_transfer(content: Tensor, style: Tensor, *, beta: float) -> Tensor:
    dtype, content, style = content.dtype, single(content), single(style)
    spectrum = torch.fft.fft2(content)
    amplitude, phase = torch.fft.fftshift(spectrum.abs(), dim=(2, 3)), spectrum.angle()
    wanted = torch.fft.fftshift(torch.fft.fft2(style).abs(), dim=(2, 3))
    h, w = content.shape[2:]
    b = int(beta * min(h, w))
    rows, columns = slice(h // 2 - b, h // 2 + b + 1), slice(w // 2 - b, w // 2 + b + 1)
    amplitude = amplitude.clone()
    amplitude[:, :, rows, columns] = wanted[:, :, rows, columns]
    amplitude = torch.fft.ifftshift(amplitude, dim=(2, 3))
    return torch.fft.ifft2(torch.polar(amplitude, phase)).real.to(dtype)


@textbook("color_transfer")
def color_transfer(content: Tensor, style: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    offset, scale = (torch.tensor(v, dtype=content.dtype).view(1, 3, 1, 1) for v in (mean, std))
    own = kornia.color.rgb_to_lab((content * scale + offset).clamp(0, 1))
    other = kornia.color.rgb_to_lab((style * scale + offset).clamp(0, 1))
    axes = {"dim": (2, 3), "keepdim": True}
    own = (own - own.mean(**axes)) / own.std(**axes, correction=0) * other.std(**axes, correction=0)
    return (kornia.color.lab_to_rgb(own + other.mean(**axes)) - offset) / scale


@textbook("histogram_transfer")
def histogram_transfer(content: Tensor, style: Tensor) -> Tensor:
    x, s = content.flatten(2), style.flatten(2)
    rank = x.argsort(dim=2).argsort(dim=2)
    return s.sort(dim=2).values.gather(2, rank).view(content.shape)


@textbook("strong_augment")
def strong_augment(images: Tensor, draw: Any, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    offset, scale = (torch.tensor(v, dtype=images.dtype).view(1, 3, 1, 1) for v in (mean, std))
    size = 2 * math.ceil(4 * draw.max_sigma) + 1
    result = []
    for i in range(len(images)):
        x = (images[i : i + 1] * scale + offset).clamp(0, 1)
        if draw.jitter is not None and draw.jitter[i]:
            x = kornia.enhance.adjust_brightness(x, draw.brightness[i])
            x = kornia.enhance.adjust_contrast(x, draw.contrast[i])
            x = kornia.enhance.adjust_saturation(x, draw.saturation[i])
            x = kornia.enhance.adjust_hue(x, draw.hue[i]).clamp(0, 1)
        if draw.greyscale is not None and draw.greyscale[i]:
            x = kornia.color.rgb_to_grayscale(x).expand_as(x)
        if draw.sharpness is not None and draw.sharpness[i] != 1:
            x = kornia.enhance.sharpness(x, draw.sharpness[i : i + 1])
        if draw.blur is not None and draw.blur[i]:
            sigma = draw.sigma[i : i + 1].to(x.dtype).expand(1, 2)
            x = kornia.filters.gaussian_blur2d(x, (size, size), sigma)
        result.append((x - offset) / scale)
    return torch.cat(result)


# --- pseudo-labels --------------------------------------------------------------------------------


def selected(labels: Tensor, confidence: Tensor, kept: Tensor, valid: Tensor, classes: int) -> tuple[Tensor, ...]:
    share = torch.bincount(labels[kept], minlength=classes) / torch.bincount(labels[valid], minlength=classes)
    return labels.masked_fill(~kept, IGNORE), confidence, kept.float(), share.nan_to_num()


@textbook("ArgmaxSelector")
def argmax_selector(logits: Tensor, *, valid: Tensor) -> tuple[Tensor, ...]:
    confidence, labels = F.softmax(logits, dim=1).max(dim=1)
    _, _, weight, share = selected(labels, confidence, valid, valid, logits.shape[1])
    return labels, confidence, weight, share


@textbook("ThresholdSelector")
def threshold_selector(logits: Tensor, *, valid: Tensor, threshold: float) -> tuple[Tensor, ...]:
    confidence, labels = F.softmax(logits, dim=1).max(dim=1)
    return selected(labels, confidence, (confidence >= threshold) & valid, valid, logits.shape[1])


@textbook("ConfidentRatioSelector")
def confident_ratio_selector(
    logits: Tensor, *, valid: Tensor, threshold: float, scope: str, ratio_over: str
) -> tuple[Tensor, ...]:
    assert (scope, ratio_over) == ("image", "valid")
    confidence, labels = F.softmax(logits, dim=1).max(dim=1)
    ratio = ((confidence >= threshold) & valid).sum((1, 2)) / valid.sum((1, 2))
    _, _, _, share = selected(labels, confidence, valid, valid, logits.shape[1])
    return labels, confidence, valid * ratio.view(-1, 1, 1), share


@textbook("ClassQuantileSelector")
def class_quantile_selector(
    logits: Tensor, *, valid: Tensor, num_classes: int, share: float, bins: int = 0
) -> tuple[Tensor, ...]:
    confidence, labels = F.softmax(logits, dim=1).max(dim=1)
    kept = torch.zeros_like(valid)
    for k in range(num_classes):
        of_class = (labels == k) & valid
        values = confidence[of_class].sort(descending=True).values
        if len(values):
            kept |= of_class & (confidence >= values[math.ceil(share * len(values)) - 1])
    return selected(labels, confidence, kept, valid, num_classes)


@textbook("BilateralConsensus")
def bilateral_consensus_selector(
    logits: Tensor, features: Tensor, prototypes: Tensor, *, valid: Tensor
) -> tuple[Tensor, ...]:
    confidence, labels = F.softmax(logits, dim=1).max(dim=1)
    similarity = F.softmax(-prototype_distances(features, prototypes=prototypes), dim=1)
    nearest = F.interpolate(similarity, labels.shape[1:], mode="bilinear", align_corners=False).argmax(dim=1)
    return selected(labels, confidence, (labels == nearest) & valid, valid, logits.shape[1])


@textbook("bilateral_consensus")
def bilateral_consensus(labels_a: Tensor, labels_b: Tensor) -> Tensor:
    return torch.where(labels_a == labels_b, labels_a, IGNORE)


@textbook("confident_ratio")
def confident_ratio(confidence: Tensor, *, valid: Tensor, threshold: float, scope: str) -> Tensor:
    assert scope == "image"
    return ((confidence >= threshold) & valid).sum((1, 2)) / valid.sum((1, 2))


@textbook("rectify_probabilities")
def rectify_probabilities(probabilities: Tensor, distances: Tensor, *, temperature: float) -> Tensor:
    p = single(probabilities)
    product = p * (-single(distances) / temperature).softmax(1)
    total = product.sum(1, keepdim=True)
    return torch.where(total > 0, product / total, p)


@textbook("RectifiedSelector")
def rectified_selector(
    logits: Tensor, features: Tensor, prototypes: Tensor, *, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d, h, w = features.shape
    pixels = features.movedim(1, -1).reshape(n, h * w, d).float()
    distances = torch.cdist(pixels, prototypes.float().expand(n, -1, -1)).transpose(1, 2).unflatten(2, (h, w))
    nearness = F.interpolate((-distances).softmax(1), logits.shape[2:], mode="bilinear")
    product = single(logits).softmax(1) * nearness
    confidence, predicted = (product / product.sum(1, keepdim=True)).max(1)
    kept = (confidence >= 0.3) & valid
    counts = torch.bincount(predicted[valid], minlength=logits.shape[1])
    accepted = torch.bincount(predicted[kept], minlength=logits.shape[1]) / counts.clamp_min(1)
    return torch.where(kept, predicted, IGNORE), confidence, kept.float(), accepted


@textbook("AdaptiveThresholdSelector")
def adaptive_threshold(
    logits: Tensor, *, valid: Tensor, num_classes: int, momentum: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A fresh selector's first call."""
    p = single(logits).softmax(1)
    confidence, predicted = p.max(1)
    threshold = momentum / num_classes + (1 - momentum) * confidence[valid].mean()
    share = momentum / num_classes + (1 - momentum) * p.movedim(1, -1)[valid].mean(0)
    kept = (confidence >= (threshold * share / share.max())[predicted]) & valid
    counts = torch.bincount(predicted[valid], minlength=num_classes)
    accepted = torch.bincount(predicted[kept], minlength=num_classes) / counts.clamp_min(1)
    return torch.where(kept, predicted, IGNORE), confidence, kept.float(), accepted


@textbook("align_distribution")
def align_distribution(probabilities: Tensor, source_share: Tensor, target_share: Tensor) -> Tensor:
    weighted = single(probabilities) * (single(source_share) / single(target_share))[None, :, None, None]
    return weighted / weighted.sum(1, keepdim=True)


@textbook("DistributionAlignment")
def distribution_alignment(logits: Tensor, *, valid: Tensor, num_classes: int, source_share: Tensor) -> Tensor:
    p = single(logits).softmax(1)
    return align_distribution(p, source_share, p.movedim(1, -1)[valid].mean(0))


@textbook("sliding_logits")
def sliding_logits(
    model: Callable[[Tensor], Tensor], images: Tensor, window: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """As in mmsegmentation: counts at full size."""
    height, width = images.shape[2:]
    rows, columns = (-(-(a - w) // s) + 1 for a, w, s in zip((height, width), window, stride, strict=True))
    total, count = 0, images.new_zeros(height, width)
    for i in range(rows):
        for j in range(columns):
            y, x = min(i * stride[0], height - window[0]), min(j * stride[1], width - window[1])
            logits = model(images[..., y : y + window[0], x : x + window[1]])
            total = total + F.pad(logits, (x, width - x - window[1], y, height - y - window[0]))
            count[y : y + window[0], x : x + window[1]] += 1
    return total / count


@textbook("crop_detail")
def crop_detail(x: Tensor, box: Any) -> Tensor:
    h, w = box.size
    return torch.stack([image[..., a : a + h, b : b + w] for image, (a, b) in zip(x, box.start.tolist(), strict=True)])


@textbook("fuse_scales")
def fuse_scales(context: Tensor, detail: Tensor, attention: Tensor, box: Any) -> Tensor:
    """As released, with a box an image."""
    (h, w), size = (
        context.shape[2:],
        [i * d // s for i, d, s in zip(box.image, detail.shape[2:], box.size, strict=True)],
    )
    mask, inserted = torch.zeros_like(attention), detail.new_zeros(*detail.shape[:2], *size)
    for i, (y, x) in enumerate(box.start.tolist()):
        top, left = y * h // box.image[0], x * w // box.image[1]
        mask[i, :, top : top + box.size[0] * h // box.image[0], left : left + box.size[1] * w // box.image[1]] = 1
        top, left = y * size[0] // box.image[0], x * size[1] // box.image[1]
        inserted[i, :, top : top + detail.shape[2], left : left + detail.shape[3]] = detail[i]
    attention = attention * mask
    up = [F.interpolate(m, size, mode="bilinear") for m in (attention, (1 - attention) * context)]
    return up[0] * inserted + up[1]


@textbook("hflip_average")
def hflip_average(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    straight, mirrored = (F.softmax(single(model(x)), dim=1) for x in (images, images.flip(-1)))
    return 0.5 * (straight + mirrored.flip(-1))


@textbook("row_mask")
def row_mask(height: int, width: int, top: int, bottom: int, *, device: str = "cpu") -> Tensor:
    mask = torch.ones(height, width, dtype=torch.bool, device=device)
    mask[:top] = False
    mask[height - bottom :] = False
    return mask


# --- prototypes, teachers, labels, sampling, features ---------------------------------------------


@textbook("class_means")
def class_means(features: Tensor, labels: Tensor, *, num_classes: int, min_pixels: int) -> tuple[Tensor, Tensor]:
    one_hot = F.one_hot(torch.where(labels == IGNORE, num_classes, labels), num_classes + 1)[..., :num_classes]
    counts = one_hot.sum((0, 1, 2))
    sums = torch.einsum("nhwc,ndhw->cd", one_hot.to(features.dtype), features)
    return sums / counts.clamp(min=1).unsqueeze(1) * (counts >= min_pixels).unsqueeze(1), counts


@textbook("ClassDistributions.update")
def class_distributions(features: Tensor, labels: Tensor, *, num_classes: int, dim: int) -> tuple[Tensor, Tensor]:
    """A fresh Module's first update: a loop over classes."""
    pixels, labels = single(features).movedim(1, -1).flatten(0, -2), labels.flatten()
    means, variances = features.new_zeros(2, num_classes, dim, dtype=torch.float32)
    for c in labels.unique().tolist():
        if c != IGNORE:
            own = pixels[labels == c]
            means[c], variances[c] = own.mean(0), own.var(0, correction=0)
    return means, variances


@textbook("ClassPrototypes.update")
def update_prototypes(
    features: Tensor, labels: Tensor, *, prototypes: Tensor, momentum: float, min_pixels: int
) -> Tensor:
    """One moving average after another, over images and classes; returns the new bank."""
    bank = prototypes.clone()
    for x, y in zip(features, labels, strict=True):
        for k in range(len(bank)):
            mask = y == k
            if mask.sum() >= min_pixels:
                bank[k] = (1 - momentum) * bank[k] + momentum * x[:, mask].mean(dim=1)
    return bank


@textbook("ClassPrototypes.distances")
def prototype_distances(features: Tensor, *, prototypes: Tensor) -> Tensor:
    n, d, h, w = features.shape
    x = single(features).permute(0, 2, 3, 1).reshape(-1, d)
    # The matrix-product form is quicker and loses the digits of near vectors: exact distances are asked for.
    distance = torch.cdist(x, prototypes.to(x.dtype), compute_mode="donot_use_mm_for_euclid_dist")
    return distance.view(n, h, w, -1).permute(0, 3, 1, 2)


@textbook("EMATeacher.update")
def update_teacher(teacher: nn.Module, student: nn.Module, *, decay: float) -> None:
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.mul_(decay).add_(s, alpha=1 - decay)
        for t, s in zip(teacher.buffers(), student.buffers(), strict=True):
            t.copy_(s)


@textbook("fuse_teachers")
def fuse_teachers(logits: list[Tensor], *, weights: Sequence[float]) -> Tensor:
    w = torch.tensor(weights, dtype=logits[0].dtype)
    p = torch.stack([F.softmax(x, dim=1) for x in logits])
    return (w.view(-1, 1, 1, 1, 1) * p).sum(0) / w.sum()


@textbook("teacher_agreement")
def teacher_agreement(logits: list[Tensor]) -> Tensor:
    labels = torch.stack([x.argmax(dim=1) for x in logits])
    return (labels == labels[0]).all(dim=0)


@textbook("downscale_labels")
def downscale_labels(labels: Tensor, *, factor: int, num_classes: int, min_ratio: float) -> Tensor:
    one_hot = F.one_hot(torch.where(labels == IGNORE, num_classes, labels), num_classes + 1)
    share, winner = F.avg_pool2d(one_hot.permute(0, 3, 1, 2).float(), factor).max(dim=1)
    return torch.where((winner < num_classes) & (share >= min_ratio), winner, IGNORE)


@textbook("resize_labels")
def resize_labels(labels: Tensor, *, size: tuple[int, int]) -> Tensor:
    return F.interpolate(labels.unsqueeze(1).float(), size, mode="nearest").squeeze(1).long()


@textbook("map_ids")
def map_ids(labels: Tensor, *, table: dict[int, int]) -> Tensor:
    result = torch.full_like(labels, IGNORE)
    for old, new in table.items():
        result[labels == old] = new
    return result


@textbook("check_labels")
def check_labels(labels: Tensor, *, num_classes: int) -> Tensor:
    assert set(labels.unique().tolist()) <= {*range(num_classes), IGNORE}
    return labels


@textbook("rare_class_probabilities")
def rare_class_probabilities(class_pixels: Tensor) -> Tensor:
    return F.softmax((1 - class_pixels / class_pixels.sum()) / 0.01, dim=0)


@textbook("count_classes")
def count_classes(labels: Tensor, *, num_classes: int) -> Tensor:
    return torch.stack([(labels == k).sum((1, 2)) for k in range(num_classes)], dim=1)


@textbook("FeatureTap")
def feature_tap(images: Tensor) -> tuple[Tensor, Tensor]:
    """The net of the entry, changed to return its features."""
    features = F.softplus(F.avg_pool2d(images, 2))
    return F.interpolate(features, scale_factor=2.0, mode="nearest"), features


# --- validation -----------------------------------------------------------------------------------


@textbook("LabelFreeScores")
def label_free_scores(logits: Tensor, *, valid: Tensor, num_classes: int, samples: int) -> tuple[Tensor, ...]:
    """The sums that the scores are made of, of the batch and of its logits doubled, under one mask."""
    p = torch.cat([single(x).softmax(1).movedim(1, -1)[valid] for x in (logits, 2 * logits)])
    entropy = -(p * p.clamp_min(1e-30).log()).sum(1)
    predicted = torch.bincount(p.argmax(1), minlength=num_classes)
    sums = torch.stack([p.amax(1).sum(), entropy.sum(), (p**4).sum()])
    zero = torch.zeros(())
    pixels = torch.tensor(float(len(p)))
    state = (predicted.float(), pixels, zero, p.sum(0), p.T @ p, sums, zero, predicted / len(p))
    return tuple(x.float() for x in state)


def mean_iou(a: Tensor, b: Tensor, c: int) -> Tensor:
    confusion = torch.bincount(a * c + b, minlength=c * c).view(c, c)
    both = confusion.diagonal()
    return (both / (confusion.sum(0) + confusion.sum(1) - both)).nanmean()


@textbook("consistency_score")
def consistency_score(logits: Tensor, perturbed_logits: Tensor, *, valid: Tensor) -> Tensor:
    pairs = zip(logits.argmax(1), perturbed_logits.argmax(1), valid, strict=True)
    return torch.stack([mean_iou(a[v], b[v], logits.shape[1]) for a, b, v in pairs])


@textbook("view_consistency")
def view_consistency(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    transform: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    *,
    valid: Tensor,
) -> Tensor:
    return consistency_score(model(images), inverse(model(transform(images))), valid=valid)


@textbook("mirror_consistency")
def mirror_consistency(model: Callable[[Tensor], Tensor], images: Tensor, *, valid: Tensor) -> Tensor:
    return consistency_score(model(images), model(images.flip(-1)).flip(-1), valid=valid)


@textbook("ensemble_agreement")
def ensemble_agreement(probabilities: Sequence[Tensor], *, valid: Tensor) -> Tensor:
    p = torch.stack(list(probabilities))
    same = p.argmax(2) == p.mean(0).argmax(1)
    return same[:, valid].float().mean(1)


@textbook("ConfidenceThreshold")
def confidence_threshold(
    source: Tensor, labels: Tensor, logits: Tensor, *, valid: Tensor, temperature: float, bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The exact quantile of the sorted confidences."""
    confidence, predicted = (single(source) / temperature).softmax(1).max(1)
    known = labels != IGNORE
    accuracy = (predicted == labels)[known].double().mean()
    threshold = confidence[known].quantile(1 - accuracy.to(confidence.dtype))
    target = (single(logits) / temperature).softmax(1).amax(1)[valid]
    return accuracy, threshold, (target > threshold).double().mean()


@textbook("fit_temperature")
def fit_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Newton's method on 1 / T."""
    known = labels != IGNORE
    scores, target = single(logits).movedim(1, -1)[known], labels[known]
    inverse = torch.ones((), dtype=scores.dtype)
    for _ in range(12):
        p = (scores * inverse).softmax(1)
        mean = (p * scores).sum(1)
        slope = (mean - scores.gather(1, target[:, None])[:, 0]).mean()
        inverse = (inverse - slope / ((p * scores.square()).sum(1) - mean.square()).mean()).clamp(1 / 20, 20)
    return 1 / inverse
