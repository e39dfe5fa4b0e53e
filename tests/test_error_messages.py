"""What a newcomer reads after the usual mistakes: every message says what was asked, what was given and what to do."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import udakit as u

N, C, D, H, W = 2, 5, 6, 8, 8
LOGITS, FEATURES, IMAGES = torch.zeros(N, C, H, W), torch.zeros(N, D, H, W), torch.zeros(N, 3, H, W)
LABELS, VALID, WEIGHT = torch.zeros(N, H, W).long(), torch.ones(N, H, W).bool(), torch.zeros(N, H, W)
SMALL, SMALL_FEATURES = LOGITS[..., ::4, ::4], FEATURES[..., ::4, ::4]
PROTOTYPES = torch.zeros(C, D)
BATCH = u.SegBatch(IMAGES, LABELS)


def prototypes(**options: Any) -> u.ClassPrototypes:
    return u.ClassPrototypes(C, D, **options)


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.Conv2d(width, C, 1))


def on_fake_gpu(call: Callable[[Callable[[Tensor], Tensor]], Any]) -> Any:
    """Call with a function that makes a fake CUDA tensor like its argument."""
    with FakeTensorMode():
        return call(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))


ce, kd, mix = u.cross_entropy, u.kd_loss, u.class_mix

# (call, the whole message as a pattern; "Expected" and the last full stop are added)
MISTAKES: dict[str, list[tuple[Callable[[], Any], str]]] = {
    "losses": [
        (lambda: ce(LABELS, LOGITS), r"`logits` .* a float tensor, but got torch.int64 \(2, 8, 8\)\. .* swapped\?"),
        (
            lambda: ce(LOGITS, WEIGHT),
            r"`labels` .* int64 or uint8 tensor, but got torch.float32 .*\. .* with \.long\(\)",
        ),
        (
            lambda: ce(LOGITS, LOGITS),
            r"`labels` .* but got torch.float32 \(2, 5, 8, 8\)\. .* swapped\? .*\.argmax\(1\)",
        ),
        (
            lambda: ce(LOGITS, LABELS.int()),
            r"`labels` .* but got torch.int32 \(2, 8, 8\)\. Convert class ids .* \.long\(\)",
        ),
        (
            lambda: ce(LOGITS, LABELS[:, None]),
            r"`labels` to be \(N, H, W\) .* but got \(2, 1, 8, 8\)\. .*\.squeeze\(1\)",
        ),
        (
            lambda: ce(LOGITS[0], LABELS),
            r"`labels` to be \(N, L\) matching `logits` \(5, 8, 8\), but got \(2, 8, 8\)\. .*`logits` .*unsqueeze\(0\)",
        ),
        (
            lambda: ce(SMALL, LABELS),
            r"`labels` to be \(N, H, W\) matching `logits` \(2, 5, 2, 2\), but got \(2, 8, 8\)\. .* F\.interp.*",
        ),
        (
            lambda: ce(LOGITS.movedim(1, -1), LABELS),
            r"`labels` .* `logits` \(2, 8, 8, 5\), but got \(2, 8, 8\)\. .*`logits` are last: .* \.movedim\(-1, 1\)",
        ),
        (
            lambda: ce(WEIGHT, LABELS),
            r"`labels` .* `logits` \(2, 8, 8\), but got \(2, 8, 8\)\. .*unsqueeze\(1\) .*udakit\.binary_logits",
        ),
        (
            lambda: kd(LOGITS, LOGITS.movedim(1, -1)),
            r"`teacher_logits` .* but got \(2, 8, 8, 5\)\. Its channels are last: .* \.movedim\(-1, 1\)",
        ),
        (
            lambda: ce(LOGITS[:, :1], LABELS),
            r"`logits` to be \(N, C, H, W\) with C of at least 2, but got \(2, 1, 8, 8\)\. Use udakit\.binary_logits.*",
        ),
        (
            lambda: u.max_square_loss(LOGITS[:, :1], kind="probabilities"),
            r"`logits` .* Use udakit\.binary_probabilities to turn one probability per pixel into two classes",
        ),
        (
            lambda: kd(LOGITS, LOGITS, valid=WEIGHT[:, None]),
            r"`valid` .* torch.float32 \(2, 1, 8, 8\)\. .*> 0\.5\. Remove the channel axis with .*squeeze\(1\)",
        ),
        (lambda: ce(LOGITS, WEIGHT[:, None]), r"`labels` .* \.long\(\)\. Remove the channel axis with \.squeeze\(1\)"),
        (
            lambda: ce(LOGITS, LABELS, ignore_index=None),
            "`ignore_index` to be an integer, but got None. To ignore nothing, pass -100 .*",
        ),
        (lambda: ce(LOGITS, LABELS, ignore_index="255"), "`ignore_index` to be an integer, but got '255'"),
        (lambda: kd(LOGITS, LOGITS, temperature=float("inf")), "`temperature` to be finite and above 0, but got inf"),
        (lambda: u.EntropyLoss(normalize="no"), "`normalize` to be True or False, but got 'no'"),
        (
            lambda: u.upsampled_cross_entropy(LOGITS.flatten(2), LABELS.flatten(1)),
            r"`logits` to be \(N, C, H, W\), since .* two-dimensional, but got \(2, 5, 64\)\. .* F\.interpolate .*",
        ),
        (lambda: ce(LOGITS, LABELS[:1]), r"`labels` .* matching `logits` \(2, 5, 8, 8\), but got \(1, 8, 8\)"),
        (lambda: ce(LOGITS.numpy(), LABELS), r"`logits` .* but got ndarray\. .* torch\.as_tensor"),
        (lambda: ce(LOGITS, LABELS.numpy()), r"`labels` .* but got ndarray\. .* torch\.as_tensor"),
        (lambda: ce([LOGITS], LABELS), r"`logits` .* but got list\. Pass the tensor in it, for example \[0\]"),
        (lambda: ce({"out": LOGITS}, LABELS), r'`logits` .* but got dict\. Pass the tensor in it: .*\["out"\] .*'),
        (lambda: ce(LOGITS, LABELS + C), r"`labels` to hold ids 0\.\.4 .*255, but got others\. .*check_labels .*"),
        (lambda: ce(LOGITS, LABELS, pixel_weight=VALID), r"`pixel_weight` .* but got torch.bool .* \.float\(\)"),
        (lambda: ce(LOGITS, LABELS, pixel_weight=0.5), "`pixel_weight` to be a float tensor, but got 0.5"),
        (
            lambda: ce(LOGITS, LABELS, pixel_weight=WEIGHT[:, None]),
            r"`pixel_weight` .* \(2, 1, 8, 8\)\. .*squeeze\(1\)",
        ),
        (lambda: ce(LOGITS, LABELS, class_weight=torch.ones(4)), r"`class_weight` to be \(C,\) .* but got \(4,\)"),
        (lambda: u.CrossEntropyLoss(class_weight=[1.0] * C), r"`class_weight` .* but got list\. .* torch\.tensor"),
        (lambda: u.CrossEntropyLoss(reduction="avg"), r"`reduction` to be one of \('mean', .*'none'\), but got 'avg'"),
        (lambda: u.EntropyLoss(kind="probs"), r"`kind` to be one of \('logits', 'probabilities'\), but got 'probs'"),
        (lambda: u.entropy_loss(LOGITS, valid=WEIGHT), r"`valid` .* bool tensor, but got torch.float32 .*\. .*> 0\.5"),
        (lambda: u.max_square_loss(LOGITS, balance="0.2"), "`balance` to be a number, but got '0.2'"),
        (lambda: kd(LOGITS, LABELS), r"`teacher_logits` to be a float tensor, but got torch.int64 .* swapped\?"),
        (lambda: kd(LOGITS, SMALL), '`teacher_logits` to have the size of `student_logits` .* resize="teacher" .*'),
        (lambda: kd(LOGITS, LOGITS[:, 1:]), r"`teacher_logits` to have the N and C of .* but got \(2, 4, 8, 8\)"),
        (lambda: kd(LOGITS, LOGITS, temperature=-1), "`temperature` to be above 0, but got -1"),
        (lambda: kd(LOGITS, LOGITS, temperature=None), "`temperature` to be a number, but got None"),
        (lambda: kd(LOGITS, LOGITS, divergence="KL"), r"`divergence` to be one of \('cross_entropy', 'kl'\), .* 'KL'"),
        (lambda: u.symmetric_kd_loss(LOGITS, LOGITS, SMALL, LOGITS), r"`teacher_clean` to have the shape .*\(2, 5, .*"),
        (lambda: u.class_inconsistency(LOGITS.numpy(), LOGITS), r"`student_logits` .* but got ndarray\. .*as_tensor"),
        (lambda: u.InconsistencyLoss(4)(LOGITS, LOGITS), "`student_logits` to have 4 classes, the `num_classes` .*"),
        (lambda: u.InconsistencyLoss(19.0), r"`num_classes` to be an integer, but got 19\.0"),
        (lambda: u.InconsistencyLoss(4, weight_range=2.0), r"`weight_range` to be \(low, high\) .* but got 2\.0"),
        (
            lambda: on_fake_gpu(lambda gpu: ce(gpu(LOGITS), torch.zeros(N, H, W).long())),
            r"`labels` to be on the device of `logits` 'cuda:0', but got one on 'cpu'\. Move it with .*",
        ),
    ],
    "contrast": [
        (
            lambda: u.pixel_contrast_loss(SMALL, SMALL, valid=VALID),
            r"`valid` .* matching `view_a` .* but got \(2, 8, .*",
        ),
        (
            lambda: u.pixel_contrast_loss(LOGITS, LOGITS, chunk_size=16.0),
            r"`chunk_size` to be an integer, but .* 16\.0",
        ),
        (
            lambda: u.prototype_contrast_loss(SMALL, SMALL, LABELS, num_classes=C),
            r"`labels` to be .* matching `view_a` .* but got \(2, 8, 8\)\. .* with udakit\.downscale_labels or .*",
        ),
        (
            lambda: u.pixel_prototype_contrast_loss(FEATURES, LABELS, PROTOTYPES.T),
            r"`prototypes` to be \(C, D\) matching `features` \(2, 6, 8, 8\), but got \(6, 5\)",
        ),
        (
            lambda: u.pixel_prototype_contrast_loss(FEATURES, LABELS, prototypes()),
            r"`prototypes` to be a float tensor, but got ClassPrototypes\. Pass its \.prototypes",
        ),
        (
            lambda: u.supervised_pixel_contrast_loss(FEATURES, LABELS, num_classes=C, generator=0),
            r"`generator` to be a torch\.Generator or None, but got 0\. Make one with .*manual_seed\(seed\)",
        ),
        (
            lambda: u.feature_distance_loss(FEATURES.flatten(2), FEATURES),
            r"`reference_features` .* `features` \(2, 6, 64\), but got \(2, 6, 8, 8\)\. Turn tokens .* into a map .*",
        ),
        (
            lambda: u.feature_distance_loss(FEATURES, SMALL_FEATURES),
            "`reference_features` .* Resize .* with F.interpolate",
        ),
        (lambda: u.ProjectedFeatureLoss(4, D)(FEATURES, FEATURES), r"`features` to have 4 channels, the `dim` .*"),
    ],
    "mixing": [
        (lambda: u.draw_classes(LOGITS, num_classes=C), r"`labels` .* but got torch.float32 .*\.argmax\(1\)"),
        (lambda: u.draw_classes(LABELS, num_classes=C, fraction=50), r"`fraction` .* but got 50\. .*50 % is 0\.5"),
        (lambda: u.draw_classes(LABELS, num_classes=C, candidates=["car"]), r"`candidates` .* but got \['car'\]"),
        (lambda: u.draw_classes(LABELS, num_classes=C, rounding="floor"), "`rounding` to be one of .* got 'floor'"),
        (
            lambda: on_fake_gpu(lambda gpu: u.draw_classes(gpu(LABELS), num_classes=C, generator=torch.Generator())),
            r"`generator` to be on the input's device 'cuda:0', but got one on 'cpu'\. Make it with .*",
        ),
        (lambda: u.class_mask(LABELS, [1, 2]), r"`chosen` to be a bool tensor, but got list\. .*"),
        (
            lambda: u.class_mask(LABELS, torch.tensor([1])),
            r"`chosen` .* but got torch.int64 \(1,\)\. .*draw_classes .*",
        ),
        (lambda: mix(BATCH, BATCH, WEIGHT), r"`mask` to be a bool tensor, but got torch.float32 .*"),
        (lambda: mix(BATCH, BATCH, VALID[:, None]), r"`mask` .* matching `source.images` .*\. .*\.squeeze\(1\)"),
        (lambda: mix((IMAGES.byte(), LABELS), BATCH, VALID), r"`source.images` .* torch.uint8 .*\.float\(\) / 255"),
        (lambda: mix((LABELS, IMAGES), BATCH, VALID), r"`source.images` .* but got torch.int64 .* swapped\?"),
        (
            lambda: mix(IMAGES, BATCH, VALID),
            r"`source` to be a SegBatch or \(images, labels.*\), but got torch.float32 .*",
        ),
        (
            lambda: mix(BATCH, (IMAGES,), VALID),
            r"`target` to be a SegBatch or .* but got tuple of 1\. Make one with SegBatch.*",
        ),
        (
            lambda: mix(BATCH, (IMAGES[..., ::2], LABELS[..., ::2]), VALID),
            "`target.images` to have the shape of `source.images` .* Crop or resize them to one size before mixing",
        ),
        (
            lambda: u.ClassMix(C)(BATCH, (IMAGES, LABELS[:, ::4, ::4], WEIGHT)),
            r"`target.labels` .* but got \(2, 2, 2\)\. .*resize_labels; for pseudo-labels, upsample the logits .*",
        ),
        (lambda: u.ClassMix("19"), "`num_classes` to be an integer, but got '19'"),
        (lambda: u.TargetPaste(threshold=95), r"`threshold` to be in \[0, 1\], but got 95\. .* 95 % is 0\.95"),
        (lambda: u.target_paste(BATCH, BATCH, LOGITS), r"`confidence` .* but got \(2, 5, 8, 8\)\. .*amax\(1\)"),
        (
            lambda: u.target_paste(BATCH, BATCH, IMAGES),
            r"`confidence` .* \(2, 3, 8, 8\)\. .*\.softmax\(1\)\.amax\(1\) .*",
        ),
        (lambda: u.paste(IMAGES, VALID, IMAGES), r"`mask` to be a bool tensor, but got torch.float32 .*"),
        (
            lambda: u.paste(VALID, BATCH, BATCH),
            r"`foreground` .* but got SegBatch\. .*fields \(images, labels, weight\), .*",
        ),
        (
            lambda: u.paste(VALID, IMAGES, LABELS),
            r"`background` to be float or integer .* got torch.int64\. Paste images onto images and labels onto labels",
        ),
        (
            lambda: u.paste(VALID, IMAGES, IMAGES[..., ::2]),
            r"`background` to have the shape of `foreground` .* Crop or resize .*",
        ),
        (lambda: u.paste(VALID[:, None], IMAGES, IMAGES), r"`mask` to be \(N, H, W\) matching .*\.squeeze\(1\)"),
        (lambda: u.paste(VALID, IMAGES.numpy(), IMAGES), r"`foreground` to be a tensor, but got ndarray\. .*"),
        (lambda: u.boundary_band(WEIGHT), r"`mask` to be a bool tensor, but got torch.float32 .*\. A comparison .*"),
        (lambda: u.boundary_band(VALID, kernel_size=(3, 3)), r"`kernel_size` to be an integer, but got \(3, 3\)"),
        (lambda: u.draw_box_mask(N, 512), r"`size` to be \(height, width\), .* but got 512\. .*\(512, 512\)"),
        (lambda: u.draw_block_mask(N, IMAGES.shape), r"`size` to be \(height, width\), .*\. .*\.shape\[-2:\]"),
        (
            lambda: u.CrossDomainMix(C, "fourier", u.StrongAugment(mean=None, std=None)),
            "`translate` .* but got 'fourier'",
        ),
        (
            lambda: u.CrossDomainMix(C, lambda a, b: None, lambda x: x)(IMAGES, LABELS, IMAGES),
            r"`translate` to return images of the shape \(2, 3, 8, 8\), but got None",
        ),
        (lambda: u.fourier_transfer(IMAGES.byte(), IMAGES), r"`content` .* torch.uint8 .*\.float\(\) / 255"),
        (
            lambda: u.fourier_transfer(IMAGES.movedim(1, 3), IMAGES),
            r"`content` .* \(2, 8, 8, 3\)\. .*permute\(0, 3, 1, 2\)",
        ),
        (lambda: u.fourier_transfer(IMAGES, IMAGES[:1]), r"`style` to have the batch size of `content` .*expand_as.*"),
        (lambda: u.color_transfer(IMAGES, IMAGES, mean=0.5), r"`mean` to be three numbers, .* but got 0\.5"),
        (lambda: u.draw_strong_augment(N, blur_sigma=1.0), r"`blur_sigma` to be \(low, high\) .* but got 1\.0"),
        (lambda: u.draw_strong_augment(IMAGES), r"`n` to be an integer, but got torch.float32 \(2, 3, 8, 8\)"),
        (lambda: u.strong_augment(IMAGES, {}, mean=None, std=None), r"`draw` .* but got dict\. .* draw_strong_augment"),
        (
            lambda: u.StrongAugment(mean=(0.5,) * 3, std=None)(IMAGES[0]),
            r"`mean` to be 8 numbers, .*\. `images` is \(3, 8, 8\): .*unsqueeze\(0\)",
        ),
    ],
    "pseudo_labels": [
        (lambda: u.ArgmaxSelector()((LOGITS, FEATURES)), r"`logits` .* but got tuple\. Pass the tensor .*"),
        (
            lambda: u.ThresholdSelector(95),
            r"`threshold` to be in \[0, 1\], but got 95\. It is a fraction: 95 % is 0\.95",
        ),
        (lambda: u.ThresholdSelector(0.9)(LABELS), r"`logits` .* but got torch.int64 \(2, 8, 8\)\. .*"),
        (lambda: u.ThresholdSelector(0.9)(LOGITS, kind="softmax"), "`kind` to be one of .* but got 'softmax'"),
        (
            lambda: u.ConfidentRatioSelector()(LOGITS, valid=WEIGHT),
            "`valid` to be a bool tensor, but got torch.float32 .*",
        ),
        (
            lambda: u.confident_ratio(LOGITS[..., None]),
            r"`confidence` to be \(N, \*space\) .*, but got \(2, 5, 8, 8, 1\)\. .*amax\(1\)",
        ),
        (
            lambda: u.ClassQuantileSelector(4)(LOGITS),
            r"`logits` to be \(N, C, H, W\) with C = 4, but got \(2, 5, 8, 8\)",
        ),
        (lambda: u.BilateralConsensus(prototypes())(LOGITS), r"`features` .* but got None\. Pass them .*FeatureTap"),
        (lambda: u.BilateralConsensus(PROTOTYPES), r"`prototypes` to be a ClassPrototypes, .*\.set_\(tensor\)"),
        (lambda: u.bilateral_consensus(LABELS, LOGITS), r"`labels_b` .* but got torch.float32 .*\.argmax\(1\)"),
        (lambda: u.hflip_average(lambda x: {"y": x}, IMAGES), r"`model` to return logits .* but got dict\."),
        (
            lambda: u.hflip_average(LOGITS, IMAGES),
            r"`model` to be callable as model\(images\), but got torch.float32 .*",
        ),
        (lambda: u.row_mask((8, 8), 1), r"`height` to be an integer, but got \(8, 8\)"),
    ],
    "prototypes": [
        (lambda: u.class_means(LABELS, FEATURES, num_classes=C), r"`features` .* but got torch.int64 .* swapped\?"),
        (
            lambda: u.class_means(SMALL_FEATURES, LABELS, num_classes=C),
            r"`labels` .* matching `features` .*downscale.*",
        ),
        (lambda: u.class_means(FEATURES, LABELS, num_classes=0), "`num_classes` to be at least 1, but got 0"),
        (lambda: prototypes(momentum=99), r"`momentum` .* but got 99\. It is a fraction: 99 % is 0\.99"),
        (lambda: prototypes().update(LOGITS, LABELS), r"`features` to be .* with D = 6, but got \(2, 5, 8, 8\)"),
        (lambda: prototypes().set_(PROTOTYPES, [1] * C), r"`counts` to be an integer tensor, but got list\. .*"),
        (
            lambda: prototypes().set_(PROTOTYPES, torch.arange(C) - 1),
            "`counts` to have no negative numbers, but got -1",
        ),
        (
            lambda: u.ClassDistributions(C, D).set_(PROTOTYPES, PROTOTYPES * 0 - 0.5),
            "`variances` to have no negative numbers, but got -0.5",
        ),
        (
            lambda: u.ClassDistributions(C, D).set_(PROTOTYPES, PROTOTYPES * 0, torch.arange(C) - 2),
            "`counts` to have no negative numbers, but got -2",
        ),
    ],
    "teachers": [
        (
            lambda: u.EMATeacher(net()).update(nn.Conv2d(3, C, 1)),
            r"`model` to have the parameters .* but got a net of which 0 of 4 match: missing 0\.weight, .* another net",
        ),
        (
            lambda: u.EMATeacher(net()).update(net(6)),
            r"`model` to have the shapes .* but got \(6, 3, 1, 1\).* another net",
        ),
        (
            lambda: u.EMATeacher(net()).update(net().state_dict()),
            r"`model` .* but got OrderedDict\. Pass the net itself.*",
        ),
        (lambda: u.EMATeacher(net(), decay=99.9), r"`decay` to be in \[0, 1\], but got 99\.9\. .* 0\.999"),
        (lambda: u.EMATeacher(net(), mode="test"), "`mode` to be one of .* but got 'test'"),
        (lambda: u.fuse_teachers(LOGITS), r"`logits` to be a non-empty sequence .* but got torch.float32 .*Pass \[.*"),
        (
            lambda: u.fuse_teachers([LOGITS, SMALL]),
            r"`logits\[1\]` to match .* but got .*\. Pass `size=` to interpolate",
        ),
        (lambda: u.fuse_teachers([LOGITS], size=8), r"`size` to be \(height, width\), .* but got 8\. .*\(8, 8\)"),
        (lambda: u.fuse_teachers([LOGITS, LOGITS], weights=[1.0]), r"`weights` to be 2 numbers .* but got \[1\.0\]"),
    ],
    "labels": [
        (
            lambda: u.check_labels(LABELS + C, num_classes=C),
            r"`labels` to hold ids 0\.\.4 .*5 \(128 pixels\)\. .*map_ids.*",
        ),
        (lambda: u.check_labels(LABELS.numpy(), num_classes=C), r"`labels` .* but got ndarray\. .*as_tensor"),
        (lambda: u.map_ids([7, 8], u.GTA5_IDS), r"`labels` to be an integer tensor or array, but got list\. .*asarray"),
        (lambda: u.map_ids(LABELS, {"7": 0}), r"`table` to map integer ids .* but got \{'7': 0\}\. Convert a list .*"),
        (lambda: u.map_ids(LABELS, [7, 8]), r"`table` to map integer ids .* but got list\. .* in enumerate\(ids\)\}"),
        (lambda: u.map_ids(LABELS.byte(), {}, default=-1), r"`labels` to have a dtype .* but got uint8\. Widen it .*"),
        (
            lambda: u.downscale_labels(LABELS, 3, num_classes=C),
            r"`labels` .* `factor` 3 divides, but got .* multiple of 3",
        ),
        (
            lambda: u.downscale_labels(LABELS[:, None], 2, num_classes=C),
            r"`labels` to have sides that `factor` 2 divides, but got \(2, 1, 8, 8\)\. .*\.squeeze\(1\)",
        ),
        (
            lambda: u.resize_labels(LABELS[0], (4, 4)),
            r"`size` to be \(length,\), .* for `labels` \(8, 8\), but got \(4, 4\)\. .*\.unsqueeze\(0\)",
        ),
        (
            lambda: u.teacher_agreement([LOGITS[:, :1], LOGITS[:, :1]]),
            r"`logits\[0\]` .* but got \(2, 1, 8, 8\)\. Use udakit\.binary_logits to turn one logit .*",
        ),
        (lambda: u.resize_labels(LABELS, 16), r"`size` to be \(height, width\), .* but got 16\. .* \(16, 16\)"),
        (
            lambda: u.resize_labels(LABELS[:, None], (4, 4)),
            r"`size` to be \(depth, .* `labels` \(2, 1, 8, 8\), but got \(4, 4\)",
        ),
    ],
    "sampling": [
        (
            lambda: u.count_classes("labels", num_classes=C),
            r"`labels` to be an iterable .* but got 'labels'\. .*glob.*",
        ),
        (
            lambda: u.count_classes([(IMAGES, LABELS)], num_classes=C),
            r"`labels` to hold integer maps, but got tuple in item 0\. Pass `load=` .*",
        ),
        (lambda: u.rare_class_probabilities([1, 2]), r"`class_pixels` .* but got list\. .*torch\.tensor"),
        (
            lambda: u.rare_class_probabilities(torch.ones(2, 3)),
            r"`class_pixels` to be \(C,\), but got \(2, 3\)\. .*sum\(0\)",
        ),
        (lambda: u.RareClassSampler(torch.ones(3)), r"`class_pixels` to be \(images, C\), but got \(3,\)\. .*"),
        (lambda: u.RareClassSampler(torch.ones(2, 3), generator=3), r"`generator` .* but got 3\. .*manual_seed.*"),
    ],
    "features": [
        (
            lambda: u.FeatureTap(net(), "encoder"),
            "`layer` to be a submodule of Sequential, but got 'encoder'. Similar .*",
        ),
        (
            lambda: u.FeatureTap(net(), 0),
            r"`layer` to be the dotted name of a submodule, but got 0\. .*named_modules.*",
        ),
        (lambda: u.FeatureTap(lambda x: x, "0"), "`model` to be an nn.Module, but got function"),
        (lambda: u.FeatureTap(nn.Identity(), "")(None), "`model` to return logits .* but got NoneType"),
        (lambda: u.unwrap_model(nn.Conv2d), "`model` to be an nn.Module, but got the class Conv2d"),
    ],
}
ROWS = [pytest.param(*row, id=f"{family}-{i}") for family, rows in MISTAKES.items() for i, row in enumerate(rows)]

# A private name (`_check`), a namespace of an operator, a Python traceback's words.
LEAKS = re.compile(
    r"(?<![\w.\[])_[a-z]\w*|::|object has no attribute|argument 'self'|positional argument|NotImplemented"
)


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(("call", "pattern"), ROWS)
def test_message(call: Callable[[], Any], pattern: str) -> None:
    message = message_of(call)
    assert re.fullmatch(rf"Expected {pattern}[.?]?", message, re.DOTALL), message


@pytest.mark.parametrize(("call", "pattern"), ROWS)
def test_house_form(call: Callable[[], Any], pattern: str) -> None:
    message = message_of(call)
    assert re.match(r"Expected `[a-z][\w.\[\]()]*` ", message), f"begins with no argument: {message}"
    assert ", but got " in message or " but got " in message, f"does not say what was given: {message}"
    assert message.endswith((".", "?")), f"no whole sentence: {message}"
    assert not LEAKS.search(message), f"leaks {LEAKS.search(message)}: {message}"
    assert len(message) < 600, "too long to be read"


def test_every_family_is_here() -> None:
    assert sum(map(len, MISTAKES.values())) >= 60
    assert all(len(rows) >= 5 for rows in MISTAKES.values())


@pytest.mark.parametrize("given", [0.95, 1, np.float32(0.5), torch.tensor(0.5)])
def test_every_kind_of_number_is_a_number(given: Any) -> None:
    assert u.ThresholdSelector(given).threshold == given


@pytest.mark.parametrize("given", [2, np.int64(2)])
def test_every_kind_of_integer_is_an_integer(given: Any) -> None:
    assert partial(u.class_means, FEATURES, LABELS)(num_classes=given)[1].shape == (2,)


def test_one_hot_labels_hear_of_argmax() -> None:
    logits = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"If it is one-hot, take the ids with \.argmax\(1\)\. If `logits` lacks"):
        u.cross_entropy(logits, torch.zeros(1, 3, 4, 4, dtype=torch.int64))


def test_a_choice_of_no_class_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"`chosen` to be \(N, C\) matching `labels` \(1, 2, 2\), but got \(1, 0\)"):
        u.class_mask(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.bool))
