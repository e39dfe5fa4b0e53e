"""HRDA around a net, and a vision transformer of timm, in the loop's frame: random weights, tiny."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gta2cs.loading import Batch
from gta2cs.nets import build_net, param_groups
from gta2cs.recipes import Dacs, Draws
from udakit import copy_net, crop_detail, cross_entropy, fuse_scales, sliding_logits

CLASSES = 4
FPN = {
    "arch": "fpn",
    "num_classes": CLASSES,
    "weights": "random",
    "scale_attention": True,
    "decoder_pyramid_channels": 16,
    "decoder_segmentation_channels": 32,
}
VIT = {"arch": "vit", "encoder": "vit_tiny_patch16_224", "num_classes": CLASSES, "weights": "random"}


def batch(size: tuple[int, int] = (64, 128)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 2, 3, *size, generator=generator)
    return Batch(images[0], torch.randint(CLASSES, (2, *size), generator=generator), None, images[1], None, None)


def test_hrda_fuses_context_and_detail() -> None:
    torch.manual_seed(0)
    net = build_net(**FPN).train()
    net.net.eval()  # neither dropout nor batch statistics, so that the parts can be compared
    images = batch().source_images
    output = net(images)
    logits, box = output.detail
    assert output.logits.shape == (2, CLASSES, 64, 128)
    assert (box.size, box.image) == ((32, 64), (64, 128))
    context = net.net(F.interpolate(images, (32, 64), mode="bilinear"))
    attention = net.attention(context.features).sigmoid()
    with torch.no_grad():
        own = net.net(crop_detail(images, box)).head_logits
        expected = fuse_scales(context.head_logits, own, attention, box)
    torch.testing.assert_close(logits.detach(), own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.head_logits.detach(), expected, rtol=1e-4, atol=1e-5)
    labels = batch().source_labels
    fused_loss = cross_entropy(output.logits, labels)
    full = F.interpolate(logits, (32, 64), mode="bilinear")
    expected_loss = 0.9 * fused_loss + 0.1 * cross_entropy(full, crop_detail(labels, box))
    torch.testing.assert_close(output.cross_entropy(labels), expected_loss, rtol=1e-4, atol=1e-5)


def test_hrda_sees_the_whole_image_in_detail_at_test_time() -> None:
    torch.manual_seed(0)
    net = build_net(**FPN).eval()
    images = batch().source_images
    with torch.no_grad():
        output = net(images)
        assert output.detail is None
        detail = sliding_logits(lambda x: net.net(x).logits, images, (32, 64))
        context = net.net(F.interpolate(images, (32, 64), mode="bilinear"))
        expected = fuse_scales(context.head_logits, detail, net.attention(context.features).sigmoid())
    torch.testing.assert_close(output.logits, expected)


@pytest.mark.parametrize("options", [FPN, {**VIT, "layer_decay": 0.5}], ids=["hrda", "vit"])
def test_param_groups_hold_every_parameter_once(options: dict[str, object]) -> None:
    net = build_net(**options)
    groups = param_groups(net, lr=1.0, head_multiplier=10.0)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in net.parameters()}
    assert {group["lr"] for group in groups if group["name"] != "encoder"} == {10.0}


def test_earlier_blocks_learn_more_slowly() -> None:
    net = build_net(**VIT, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in param_groups(net, lr=1.0) for p in group["params"]}
    blocks = [rate[id(block.attn.qkv.weight)] for block in net.encoder.blocks]
    assert blocks == pytest.approx([blocks[-1] * 0.5 ** (len(blocks) - 1 - k) for k in range(len(blocks))])
    assert rate[id(net.encoder.pos_embed)] == pytest.approx(blocks[0] * 0.5)


@pytest.mark.parametrize("size", [(64, 96), (70, 50)])
def test_vit_takes_any_size(size: tuple[int, int]) -> None:
    net = build_net(**VIT).eval()
    output = net(torch.randn(1, 3, *size))
    assert output.logits.shape == (1, CLASSES, *size)
    rows, columns = (-(-side // 16) for side in size)
    assert output.encoded.shape == (1, 192, rows, columns)
    assert net.token_count(*size) == rows * columns


def test_replaced_tokens_hide_their_patches() -> None:
    """With every token replaced the image does not matter; a copy of the net has a hook of its own."""
    torch.manual_seed(0)
    net = copy_net(build_net(**VIT).eval())
    one, other = torch.randn(2, 1, 3, 32, 32)
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(net(one, token_mask=everything).head_logits, net(other, token_mask=everything).head_logits)
    assert not torch.equal(net(one).head_logits, net(other).head_logits)
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert torch.equal(net(one, token_mask=nothing).head_logits, net(one).head_logits)
    net(one, token_mask=everything).head_logits.sum().backward()
    assert net.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        (FPN, {"mask_weight": 1.0, "selector": "argmax"}),
        (FPN, {"batch_norm": "joint", "selector": "argmax"}),
        (VIT, {"mask_weight": 1.0, "mask_tokens": True, "selector": "argmax"}),
    ],
    ids=["hrda", "hrda joint", "vit"],
)
def test_self_training_with_them(options: dict[str, object], recipe: dict[str, object]) -> None:
    torch.manual_seed(0)
    net = build_net(**options)
    made = Dacs.build(net, CLASSES, recipe, lambda: build_net(**options)).train()
    losses = made(batch(), Draws(0, 0, range(2), torch.device("cpu")))
    losses.total.backward()
    without = [name for name, p in net.named_parameters() if p.grad is None]
    assert not [name for name in without if "mask_token" not in name], without
    made.after_step()
