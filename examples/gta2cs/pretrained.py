"""Load foreign weights: whole nets of segmentation_models_pytorch, torchvision and transformers, or only an encoder.

`load_weights(net, "my_unet.pth")` finds out by name and shape which tensor goes where. It reads a file of `torch.save`
or of safetensors, or the folder of `save_pretrained`, also inside a training checkpoint and under any prefix
("module.", "student."). One line says what was and was not loaded, and too little is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from gta2cs.checkpoints import load_net, read_tensors

if TYPE_CHECKING:
    from gta2cs.nets import SegNet

Take = Literal["all", "encoder", "some"]
TAKES = get_args(Take)
ENOUGH = 0.95
PARTS = ("encoder", "decoder", "head")
NESTED = ("state_dict", "model_state_dict", "model", "net", "weights", "recipe")  # where training code keeps tensors
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# A segmentation net's second half, in smp and transformers; torchvision's begins behind a backbone.
DECODER = re.compile(r"(^|\.)(decoder|segmentation_head|decode_head|aux_classifier)\.")
BACKBONE = re.compile(r"(^|\.)backbone\.")


class WeightsError(RuntimeError):
    """The weights do not exist or do not belong to this net."""


@dataclass(frozen=True)
class Loaded:
    """Which tensors of a net were found in a file, under their names in the net."""

    path: Path
    found: dict[str, Tensor]
    missing: dict[str, str]  # name: why
    unused: list[str]  # names in the file
    whole: bool  # the file is of a segmentation net, not of an encoder alone

    def share(self, part: str = "") -> float:
        """Share of the tensors of a part, or of the net, that were found."""
        found, missing = (sum(name.startswith(part) for name in names) for names in (self.found, self.missing))
        return found / max(found + missing, 1)

    def __str__(self) -> str:
        counts = []
        for part in PARTS:
            found, missing = (sum(n.startswith(f"{part}.") for n in names) for names in (self.found, self.missing))
            counts.append(f"{part} {found} of {found + missing}")
        text = f"{self.path}: loaded {', '.join(counts)} tensors"
        if self.missing:
            name, why = next(iter(self.missing.items()))
            text += f"; not, for example, {name} ({why})"
        if self.unused:
            text += f"; {len(self.unused)} of the file have no place, for example {self.unused[0]}"
        return f"{text}."


def load_weights(net: SegNet, path: Path | str, *, take: Take = "all") -> Loaded:
    """Copy the weights of a file or folder into a net of `build_net`, and print what was loaded.

    Args:
        net: the net, which is changed in place.
        path: a file of `torch.save` or safetensors, or a folder of `save_pretrained`.
        take: "all" needs the whole net, or the whole encoder if the file holds no more; "encoder" does not change
            decoder and head; "some" takes all that fits, however little.

    Raises:
        FileNotFoundError: there is nothing to read at `path`.
        ValueError: `take` is unknown, or the file has no tensors.
        WeightsError: fewer than 95 % of the tensors were found.
    """
    if take not in TAKES:
        raise ValueError(f"Expected `take` to be one of {TAKES}, but got {take!r}.")
    net = getattr(net, "net", net)  # HRDA's own
    loaded = match(net, net.convert(read_weights(Path(path))), Path(path))
    layer, first = net.first_convolution()
    if f"{layer}.weight" in loaded.missing and take != "some":
        raise WeightsError(
            f"Expected the first convolution of {path} to be that of this net, {first}, but got {loaded} Check "
            "`encoder` and `data.channels`. `take: some` takes what fits."
        )
    if take == "encoder":
        kept = {name: value for name, value in loaded.found.items() if name.startswith("encoder.")}
        left = {name: "left out" for name in loaded.found if name not in kept}
        loaded = Loaded(loaded.path, kept, {**loaded.missing, **left}, loaded.unused, whole=False)
    enough = loaded.share("" if loaded.whole else "encoder.") >= ENOUGH and loaded.share("encoder.") >= ENOUGH
    if take != "some" and not enough:
        advice = (
            " `take: encoder` takes the encoder alone." if loaded.whole and loaded.share("encoder.") >= ENOUGH else ""
        )
        raise WeightsError(
            f"Expected at least {ENOUGH:.0%} of the {'net' if loaded.whole else 'encoder'}'s tensors in a file for "
            f"this net, but got {loaded} Check `arch`, `encoder` and `options`.{advice} `take: some` takes what fits."
        )
    own = net.state_dict()  # detached views: copying into them changes the net
    for name, value in loaded.found.items():
        own[name].copy_(value)
    net.head_loaded = loaded.share() >= ENOUGH and loaded.share("head.") == 1
    if int(os.environ.get("RANK", "0")) == 0:
        print(loaded)
    return loaded


def load_init(net: SegNet, path: Path, *, take: Take = "all") -> None:
    """Load the start of a run: the student of a checkpoint of train_gta2cs.py, or a foreign net."""
    if take == "all" and path.is_file() and path.suffix != ".safetensors":
        value = read_tensors(path)
        if isinstance(value, dict) and "recipe" in value:
            try:
                load_net(net, path)
            except ValueError as error:
                raise ValueError(f"{error} `net.take: some` takes what fits.") from None
            getattr(net, "net", net).head_loaded = True
            return
    load_weights(net, path, take=take)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or of a folder, with their names there."""
    if path.is_dir():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"Expected one of {FILES} in the folder {path}, but there is none.")
        path = found
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file or folder of weights, but there is no {path}.")
    if path.suffix == ".json":
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        return {name: value for file in files for name, value in read_weights(path.parent / file).items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state: Any = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error} Of a net, `net.state_dict()` is what should be saved.") from None
    while isinstance(state, Mapping) and (inner := next((k for k in NESTED if _is_mapping(state.get(k))), None)):
        state = state[inner]
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise ValueError(f"Expected {path} to hold a state_dict, but found no tensor in it.")
    return tensors


def match(net: SegNet, state: Mapping[str, Tensor], path: Path) -> Loaded:
    """Find each tensor of the net in a file, by our names or the foreign ones, with one prefix for all."""
    own = {name: value for name, value in net.state_dict().items() if name.startswith(tuple(f"{p}." for p in PARTS))}
    own = {name: value for name, value in own.items() if value.is_floating_point()}
    schemes = [{name: name for name in own}, {name: net.foreign_name(name) for name in own}]
    whole = any(DECODER.search(name) for name in state) or (
        any(BACKBONE.search(name) for name in state) and any(".classifier." in f".{name}" for name in state)
    )
    if not whole:  # an encoder alone: ImageNet's, timm's, a backbone's
        schemes = []
    schemes.append({name: name.removeprefix("encoder.") for name in own if name.startswith("encoder.")})
    places = max((_with_prefix(names, state) for names in schemes), key=lambda places: len(places))
    if whole:  # another decoder's file: its encoder may still be ours
        encoder = _with_prefix(schemes[-1], state)
        if len(encoder) > sum(name.startswith("encoder.") for name in places):
            places = {**{n: p for n, p in places.items() if not n.startswith("encoder.")}, **encoder}
    found, missing = {}, {}
    first = f"{net.first_convolution()[0]}.weight"
    for name, value in own.items():
        if name not in places:
            missing[name] = "not in the file"
        elif name == first and fits_colours(state[places[name]], value):
            found[name] = of_colours(state[places[name]], value.shape[1])
        elif state[places[name]].shape != value.shape:
            missing[name] = f"{tuple(state[places[name]].shape)} there, {tuple(value.shape)} here"
        else:
            found[name] = state[places[name]]
    used = {places[name] for name in places}
    unused = [k for k, v in state.items() if k not in used and v.is_floating_point()]
    return Loaded(path, found, missing, unused, whole)


def of_colours(weight: Tensor, channels: int) -> Tensor:
    """Weights (N, 3, h, w) of a convolution of RGB images for `channels`: their mean, times 3 / channels."""
    return (weight.sum(1, keepdim=True) / channels).repeat(1, channels, 1, 1)


def fits_colours(there: Tensor, here: Tensor) -> bool:
    """Whether one is a convolution of RGB images and the other the same for another number of channels."""
    alike = there.ndim == here.ndim == 4 and there.shape[0] == here.shape[0] and there.shape[2:] == here.shape[2:]
    return alike and there.shape[1] == 3 != here.shape[1]


def _with_prefix(names: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, str]:
    """Where each name is in the file, by the prefix that most of them have there."""
    votes: Counter[str] = Counter()
    by_end: dict[str, list[str]] = {}
    for key in state:
        by_end.setdefault(_end(key), []).append(key)
    for name in names.values():
        votes.update(key.removesuffix(name) for key in _under(name, by_end.get(_end(name), ())))
    if not votes:
        return {}
    prefix = max(votes, key=lambda p: votes[p])  # of equals the first in the file: a student before its teacher
    return {own: prefix + name for own, name in names.items() if prefix + name in state}


def _under(name: str, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key == name or key.endswith(f".{name}")]


def _end(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value)
