"""FeatureTap on small nets of three libraries, and what must not stay behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from udakit import FeatureTap


class Small(nn.Module):
    """A net whose layers give and take more than one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.both = Both()
        self.named = Named()
        self.head = nn.Conv2d(4, 2, 1)
        self.unused = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        low, _, high = self.both(self.encoder(images), scale=torch.tensor(2.0))
        return self.head(self.named(low + high)["out"])


class Both(nn.Module):
    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, str, Tensor]:
        return x, "no tensor", x * scale


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x + 1, "aux": x - 1}


class Silent(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def by_hand(net: Small) -> dict[str, Tensor]:
    x = net.encoder(IMAGES)
    return {"encoder": x, "high": 2 * x, "out": 3 * x + 1, "aux": 3 * x - 1, "logits": net.head(3 * x + 1)}


@pytest.mark.parametrize(
    ("layer", "options", "name"),
    [
        ("encoder.1", {}, "encoder"),
        ("both", {}, "high"),  # the last tensor of a tuple
        ("both", {"index": 0}, "encoder"),
        ("both", {"when": "input", "index": 0}, "encoder"),
        ("named", {}, "aux"),
        ("named", {"index": "out"}, "out"),
        ("head", {"when": "input"}, "out"),
        ("", {}, "logits"),
    ],
)
def test_what_a_layer_gives_and_takes(layer: str, options: dict[str, Any], name: str) -> None:
    net = Small()
    expected = by_hand(net)
    logits, features = FeatureTap(net, layer, **options)(IMAGES)
    torch.testing.assert_close(logits, expected["logits"])
    torch.testing.assert_close(features, expected[name])
    assert hooks(net) == 0


def test_keyword_inputs() -> None:
    _, scale = FeatureTap(Small(), "both", when="input", index="scale")(IMAGES)
    assert scale == 2
    _, scale = FeatureTap(Small(), "both", when="input")(IMAGES)
    assert scale == 2  # positional first, keywords after


def test_gradients_flow_through_the_features() -> None:
    net = Small()
    _, features = FeatureTap(net, "encoder")(IMAGES)
    features.sum().backward()
    assert net.encoder[0].weight.grad is not None
    assert net.head.weight.grad is None


# --- real nets, from their configurations ------------------------------------------------------------------------


def smp_net() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=5, aux_params={"classes": 2})


def fpn_net() -> nn.Module:
    return pytest.importorskip("segmentation_models_pytorch").FPN("resnet18", encoder_weights=None, classes=5)


def torchvision_net() -> nn.Module:
    nets = pytest.importorskip("torchvision").models.segmentation
    return nets.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


def transformers_net() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_labels=5, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, decoder_hidden_size=12, num_attention_heads=[1] * 4
    )
    return transformers.SegformerForSemanticSegmentation(config)


@pytest.mark.parametrize(
    ("make", "layer", "when", "logits_shape", "features_shape"),
    [
        (smp_net, "segmentation_head", "input", (2, 5, 64, 64), (2, 256, 16, 16)),
        (smp_net, "encoder", "output", (2, 5, 64, 64), (2, 512, 4, 4)),  # the last of a list
        (fpn_net, "decoder", "output", (2, 5, 64, 64), (2, 128, 16, 16)),
        (torchvision_net, "backbone", "output", (2, 5, 64, 64), (2, 960, 4, 4)),  # an ordered dict
        (transformers_net, "segformer", "output", (2, 5, 16, 16), (2, 16, 2, 2)),  # an output object
        (transformers_net, "decode_head.classifier", "input", (2, 5, 16, 16), (2, 12, 16, 16)),
    ],
)
def test_real_nets(
    make: Callable[[], nn.Module], layer: str, when: Any, logits_shape: tuple[int, ...], features_shape: tuple[int, ...]
) -> None:
    net = make().eval()
    net(torch.rand(2, 3, 64, 64))  # transformers hangs hooks of its own on at the first call
    before = hooks(net)
    logits, features = FeatureTap(net, layer, when=when)(torch.rand(2, 3, 64, 64))
    assert logits.shape == logits_shape
    assert features.shape == features_shape
    assert hooks(net) == before


# --- what stays behind -------------------------------------------------------------------------------------------


def test_no_tensor_is_kept() -> None:
    net = Small()
    tap = FeatureTap(net, "encoder")
    with tap:
        kept = [weakref.ref(x) for x in tap(IMAGES)]
        gc.collect()
        assert not any(ref() is not None for ref in kept)
        net(IMAGES)
        kept = [weakref.ref(tap.pop())]
        gc.collect()
        assert kept[0]() is None
        net(IMAGES)
    assert tap._features is None
    assert hooks(net) == 0


def test_a_context_listens_to_the_net_itself_until_it_ends() -> None:
    net = Small()
    with FeatureTap(net, "encoder") as tap:
        logits = net(IMAGES)
        torch.testing.assert_close(tap.pop(), by_hand(net)["encoder"])
        torch.testing.assert_close(tap(IMAGES)[0], logits)
        assert hooks(net) == 1  # a call inside does not close it
        tap.pop  # noqa: B018
    assert hooks(net) == 0


def test_an_error_in_the_net_closes_the_tap() -> None:
    net = Small()
    with pytest.raises(RuntimeError):
        FeatureTap(net, "head")(torch.rand(1, 7, 4, 4))
    with pytest.raises(KeyError), FeatureTap(net, "head"):
        raise KeyError
    assert hooks(net) == 0


# --- wrappers ----------------------------------------------------------------------------------------------------


def test_wrappers_are_called_and_do_not_appear_in_the_name() -> None:
    net = Small()
    expected = by_hand(net)["encoder"]
    calls: list[int] = []

    class Counted(nn.DataParallel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super().forward(*args, **kwargs)

    for layer in ("encoder", "encoder.1", "module.encoder.1"):
        torch.testing.assert_close(FeatureTap(Counted(net), layer)(IMAGES)[1], expected)
    assert len(calls) == 3
    net.encoder = nn.DataParallel(net.encoder)
    torch.testing.assert_close(FeatureTap(net, "encoder.1")(IMAGES)[1], expected)


def test_a_compiled_net() -> None:
    torch._dynamo.reset()
    net = Small().eval()
    tap = FeatureTap(torch.compile(net, backend="eager"), "_orig_mod.encoder")
    for shift in (0.0, 1.0):
        logits, features = tap(IMAGES + shift)
        torch.testing.assert_close(features, net.encoder(IMAGES + shift))
        torch.testing.assert_close(logits, net(IMAGES + shift))
    torch._dynamo.reset()
    called_before = torch.compile(net, backend="eager")
    called_before(IMAGES)
    with pytest.raises(RuntimeError, match=r"compiled net that was called before the tap was opened"):
        FeatureTap(called_before, "encoder")(IMAGES)


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_missing_layer_lists_near_names() -> None:
    with pytest.raises(
        ValueError, match=r"submodule of Small, but got 'encodr\.1'\. Similar names: encoder\.1, encoder"
    ):
        FeatureTap(Small(), "encodr.1")
    with pytest.raises(ValueError, match=r"Similar names: encoder, both, named, head, unused\."):
        FeatureTap(Small(), "xyz")
    with pytest.raises(ValueError, match=r"got 'model\.head'\. Similar names: head"):
        FeatureTap(Small(), "model.head")


def test_errors() -> None:
    with pytest.raises(ValueError, match="`when` to be one of"):
        FeatureTap(Small(), "head", when="before")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Expected `layer` 'unused' to run in the call, but it did not"):
        FeatureTap(Small(), "unused")(IMAGES)
    with pytest.raises(TypeError, match=r"the output of `layer` 'both' to hold a tensor number 5, but got 2 tensors"):
        FeatureTap(Small(), "both", index=5)(IMAGES)
    with pytest.raises(TypeError, match=r"to hold a tensor 'low', but got \['out', 'aux'\]"):
        FeatureTap(Small(), "named", index="low")(IMAGES)
    with pytest.raises(TypeError, match=r"`index` to be an integer or a name, but got 1\.5"):
        FeatureTap(Small(), "both", index=1.5)  # type: ignore[arg-type]
    silent = nn.Sequential(nn.Identity(), Silent())
    with pytest.raises(TypeError, match=r"`model` to return logits .* but got NoneType"):
        FeatureTap(silent, "0")(IMAGES)


class Checkpointed(Small):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, images: Tensor) -> Tensor:
        x = images if images.requires_grad else images + 0 * self.head.weight.sum()
        x = torch.utils.checkpoint.checkpoint(self.encoder, x, use_reentrant=self.reentrant)
        return self.head(x)


def test_a_reentrant_checkpoint_is_refused() -> None:
    """Its features have no gradient, which would go unnoticed."""
    net = Checkpointed(reentrant=True)
    for when in ("output", "input"):
        with pytest.raises(RuntimeError, match=r"`layer` 'encoder\.0' to run with gradients.*use_reentrant=False"):
            FeatureTap(net, "encoder.0", when=when)(IMAGES)
        assert hooks(net) == 0
    with FeatureTap(net, "encoder"), pytest.raises(RuntimeError, match="reentrant checkpoint"):
        net(IMAGES)
    with torch.no_grad():  # nobody asks for gradients
        _, features = FeatureTap(net, "encoder")(IMAGES)
    assert torch.equal(features, net.encoder(IMAGES))
    _, features = FeatureTap(net, "head", when="input")(IMAGES)  # outside the checkpoint
    features.sum().backward()
    assert net.encoder[0].weight.grad is not None


def test_features_of_a_checkpoint_have_gradients_and_are_not_taken_twice() -> None:
    net, plain = Checkpointed(reentrant=False), Checkpointed(reentrant=False)
    plain.load_state_dict(net.state_dict())
    with FeatureTap(net, "encoder") as tap:
        logits = net(IMAGES)
        features = tap.pop()
        (logits.sum() + features.square().sum()).backward()
        with pytest.raises(RuntimeError, match="did not"):
            tap.pop()  # the backward pass ran the layer once more
    x = plain.encoder(IMAGES)
    (plain.head(x).sum() + x.square().sum()).backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
