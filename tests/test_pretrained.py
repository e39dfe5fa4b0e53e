"""Nets of other makes arrive whole, and what did not arrive is said."""

from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large, resnet18
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from gta2cs.checkpoints import save_checkpoint
from gta2cs.nets import SegNet, build_net
from gta2cs.pretrained import Loaded, load_init, load_weights, read_weights

TINY_MIT = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 8, 16, 16), "decoder_hidden_size": 16}
TINY_MIT |= {"num_attention_heads": (1, 1, 2, 2)}


def images(n: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(0))


def unet(classes: int = 5) -> nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, classes=classes).eval()


def built(**changes: object) -> SegNet:
    return build_net(**{"arch": "unet", "encoder": "resnet18", "num_classes": 5, "weights": "random", **changes}).eval()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
        lambda state: {
            "model": {f"{net}.{k}": s * v for net, s in (("student", 1), ("ema", 2)) for k, v in state.items()}
        },
    ],
    ids=["plain", "lightning", "student_and_teacher"],
)
def test_a_whole_net_of_smp(tmp_path: Path, wrap, capsys) -> None:
    whole = unet()
    torch.save(wrap(whole.state_dict()), tmp_path / "net.pth")
    net = built(weights=tmp_path / "net.pth")
    with torch.no_grad():
        torch.testing.assert_close(net(images()).logits, whole(images()))
    line = capsys.readouterr().out
    assert "loaded encoder 100 of 100, decoder 50 of 50, head 2 of 2 tensors" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(("there", "here"), [(5, 5), (3, 1), (3, 5)])
def test_weights_for_images_of_other_channels(tmp_path: Path, there: int, here: int) -> None:
    whole = smp.Unet("resnet18", encoder_weights=None, classes=5, in_channels=there).eval()
    torch.save(whole.state_dict(), tmp_path / "net.pth")
    net = built(weights=tmp_path / "net.pth", channels=here)
    net.image_scale.fill_(1.0)
    net.image_shift.zero_()
    pixels = torch.rand(1, there, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = pixels if there == here else pixels[:, :1].expand(-1, here, -1, -1)
    with torch.no_grad():
        expected = whole(seen if there == here else pixels[:, :1].expand(-1, 3, -1, -1))
        torch.testing.assert_close(net(seen).logits, expected, rtol=1e-3, atol=1e-4)


def test_weights_whose_first_convolution_does_not_fit_are_refused(tmp_path: Path) -> None:
    whole = smp.Unet("resnet18", encoder_weights=None, classes=5, in_channels=4)
    torch.save(whole.state_dict(), tmp_path / "net.pth")
    with pytest.raises(
        RuntimeError, match=r"first convolution of .*net\.pth .*\(64, 4, 7, 7\) there, \(64, 3, 7, 7\) here"
    ):
        built(weights=tmp_path / "net.pth")


def test_a_whole_net_of_smp_saved_as_a_folder(tmp_path: Path) -> None:
    whole = unet()
    whole.save_pretrained(tmp_path)
    net = built(weights=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(net(images()).logits, whole(images()))


def test_a_whole_net_of_torchvision(tmp_path: Path) -> None:
    whole = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5, aux_loss=True).eval()
    save_file(whole.state_dict(), tmp_path / "net.safetensors")
    net = built(arch="torchvision", encoder="deeplabv3_mobilenet_v3_large", weights=tmp_path / "net.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(net(images()).logits, whole(images())["out"])
    assert net(images(1, 50, 70)).logits.shape == (1, 5, 50, 70)
    assert net.feature_dim == 256


@pytest.mark.parametrize("file", [True, False])
def test_a_whole_net_of_transformers(tmp_path: Path, file: bool) -> None:
    whole = SegformerForSemanticSegmentation(SegformerConfig(num_labels=5, **TINY_MIT)).eval()
    whole.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors" if file else tmp_path
    net = built(arch="hf_segformer", encoder=str(tmp_path), weights=weights)
    with torch.no_grad():
        logits = nn.functional.interpolate(whole(images()).logits, (64, 96), mode="bilinear", align_corners=False)
        torch.testing.assert_close(net(images()).logits, logits)


@pytest.mark.parametrize("kind", ["transformers", "training"])
def test_an_encoder_of_transformers(tmp_path: Path, kind: str) -> None:
    whole = SegformerForSemanticSegmentation(SegformerConfig(num_labels=7, **TINY_MIT))
    net = built(arch="hf_segformer", encoder="mit_b0", **TINY_MIT)
    if kind == "transformers":
        whole.segformer.save_pretrained(tmp_path)
        loaded = load_weights(net, tmp_path)
        assert not loaded.whole
    else:
        torch.save({f"student.{k}": v for k, v in whole.state_dict().items()}, tmp_path / "net.pth")
        loaded = load_weights(net, tmp_path / "net.pth")
        assert list(loaded.missing) == ["head.weight", "head.bias"]  # another number of classes
    assert all(torch.equal(v, whole.segformer.state_dict()[k]) for k, v in net.encoder.state_dict().items())


def test_shards_are_read_together(tmp_path: Path) -> None:
    whole = SegformerForSemanticSegmentation(SegformerConfig(num_labels=5, **TINY_MIT))
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert len(read_weights(tmp_path)) == len(whole.state_dict())


def test_another_number_of_classes_leaves_the_head_as_it_was(tmp_path: Path, capsys) -> None:
    torch.save(unet(classes=7).state_dict(), tmp_path / "net.pth")
    net = built()
    head = net.head.weight.clone()
    loaded = load_weights(net, tmp_path / "net.pth")
    assert torch.equal(net.head.weight, head)
    assert not net.head_loaded
    assert loaded.missing == {
        "head.weight": "(7, 16, 3, 3) there, (5, 16, 3, 3) here",
        "head.bias": "(7,) there, (5,) here",
    }
    assert "head 0 of 2 tensors; not, for example, head.weight ((7, 16, 3, 3) there" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "backbone.", "model.encoder."])
def test_an_encoder_alone(tmp_path: Path, prefix: str, capsys) -> None:
    whole = resnet18()  # torchvision's ImageNet classifier: `fc` has no place in a segmentation net
    torch.save({f"{prefix}{k}": v for k, v in whole.state_dict().items()}, tmp_path / "net.pth")
    net = built(weights=tmp_path / "net.pth")
    assert all(torch.equal(value, whole.state_dict()[k]) for k, value in net.encoder.state_dict().items())
    line = capsys.readouterr().out
    assert "loaded encoder 100 of 100, decoder 0 of 50, head 0 of 2 tensors; not, for example, decoder." in line
    assert f"2 of the file have no place, for example {prefix}fc.weight" in line


def test_an_image_classifier_with_a_classifier_is_an_encoder(tmp_path: Path) -> None:
    whole = mobilenet_v3_large()
    torch.save(whole.state_dict(), tmp_path / "net.pth")
    net = built(arch="torchvision", encoder="deeplabv3_mobilenet_v3_large")
    loaded = load_weights(net, tmp_path / "net.pth", take="some")
    assert not loaded.whole


def test_another_decoder_is_refused_unless_told(tmp_path: Path) -> None:
    torch.save(unet().state_dict(), tmp_path / "net.pth")
    with pytest.raises(
        RuntimeError,
        match=r"at least 95% of the net's tensors .* got .*encoder 100 of 100, decoder 0 of .*`take: encoder`",
    ):
        built(arch="fpn", weights=tmp_path / "net.pth")
    fresh = built(arch="fpn", num_classes=5)
    decoder = {k: v.clone() for k, v in fresh.decoder.state_dict().items()}
    loaded = load_weights(fresh, tmp_path / "net.pth", take="encoder")
    assert loaded.share("encoder.") == 1
    assert all(torch.equal(v, decoder[k]) for k, v in fresh.decoder.state_dict().items())
    assert isinstance(load_weights(built(arch="fpn"), tmp_path / "net.pth", take="some"), Loaded)


def test_another_encoder_is_refused_unless_told(tmp_path: Path) -> None:
    torch.save(unet().state_dict(), tmp_path / "net.pth")
    before = built(encoder="resnet34")
    state = {k: v.clone() for k, v in before.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"got .*net\.pth: loaded encoder \d+ of 180.*`take: some`"):
        load_weights(before, tmp_path / "net.pth")
    assert all(torch.equal(v, state[k]) for k, v in before.state_dict().items()), "refused, and changed all the same"
    assert load_weights(before, tmp_path / "net.pth", take="some").share() > 0.5


def test_init_takes_a_student_or_a_foreign_net(tmp_path: Path) -> None:
    own, net = built(), built()
    save_checkpoint(tmp_path / "last.pt", {"recipe": {f"student.{k}": v for k, v in own.state_dict().items()}})
    assert not net.head_loaded
    load_init(net, tmp_path / "last.pt")
    assert all(torch.equal(v, own.state_dict()[k]) for k, v in net.state_dict().items())
    assert net.head_loaded
    whole = unet()
    torch.save(whole.state_dict(), tmp_path / "net.pth")
    load_init(net, tmp_path / "net.pth")
    assert torch.equal(net.head.weight, whole.segmentation_head[0].weight)
    assert net.head_loaded
    load_init(net, tmp_path / "net.pth", take="encoder")
    assert not net.head_loaded  # the old head does not know the new encoder
    assert built(weights=tmp_path / "net.pth", scale_attention=True).head_loaded


def test_init_takes_what_it_is_told_of_a_student_with_other_classes(tmp_path: Path) -> None:
    own, net = built(), built(num_classes=7)
    tensors = {f"student.{k}": v for k, v in own.state_dict().items()}
    tensors |= {f"candidates.a.student.{k}": torch.zeros_like(v) for k, v in own.state_dict().items()}
    save_checkpoint(tmp_path / "last.pt", {"recipe": tensors})
    with pytest.raises(ValueError, match=r"to be the configured net.*head\.weight.*`net\.take: some` takes what fits"):
        load_init(net, tmp_path / "last.pt")
    head, decoder = net.head.weight.clone(), next(net.decoder.parameters()).clone()
    load_init(net, tmp_path / "last.pt", take="encoder")
    assert all(torch.equal(v, own.encoder.state_dict()[k]) for k, v in net.encoder.state_dict().items())
    assert torch.equal(next(net.decoder.parameters()), decoder)
    load_init(net, tmp_path / "last.pt", take="some")
    assert torch.equal(next(net.decoder.parameters()), next(own.decoder.parameters()))
    assert torch.equal(net.head.weight, head)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    net = built()
    with pytest.raises(FileNotFoundError, match=r"a file or folder of weights, but there is no .*nothing\.pth"):
        load_weights(net, tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match=r"Expected one of \('model\.safetensors', .* in the folder"):
        load_weights(net, tmp_path)
    torch.save(net, tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match=r"which could run code, .* `net\.state_dict\(\)` is what should be saved"):
        load_weights(net, tmp_path / "pickled.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="but found no tensor in it"):
        load_weights(net, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"Expected `take` to be one of \('all', 'encoder', 'some'\), but got 'half'"):
        load_weights(net, tmp_path / "empty.pth", take="half")
