"""The reader of images and the reader of labels for training, `--check-data` and predict.py.

A file is read as it is stored and turned upright by its EXIF orientation. If its values would have to be guessed, it is
refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
IGNORE = 255
MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)
GREY = (0.449,), (0.226,)  # the same of one channel
Colour = tuple[int, int, int]

# EXIF orientation -> (transpose, flip rows, flip columns), in this order.
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_LOSSY = {"JPEG", "MPO", "JPEG2000", "WEBP", "AVIF"}
_BANDS = "SCIQ"  # the axes of a TIFF that can be bands: samples, channels, unnamed pages


class Decoded(NamedTuple):
    """The stored values of a file, turned upright."""

    pixels: np.ndarray  # (H, W, bands)
    mode: str  # what the file says it is: RGB, L, P, I;16, 5 bands ...
    orientation: int = 1  # EXIF; 1 is upright
    alpha: bool = False  # the last band is transparency
    lossy: str = ""  # the format, where its compression changes values

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def depth(self) -> str:
        """The type of the values in words: "8 bit", "16 bit", "float32"."""
        kind = self.pixels.dtype
        return "1 bit" if kind == np.bool_ else f"{8 * kind.itemsize} bit" if kind.kind == "u" else str(kind)


@dataclass(frozen=True)
class ImageFormat:
    """How image files are turned into tensors (channels, H, W): uint8 as stored, or float32 in 0..255 by a given range.

    `value_range` are the values that become 0 and 255; values outside are clipped. Files with more than 8 bits need it.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None  # of the channels, where 0 is black and 1 is white
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"Expected `channels` to be at least 1, but got {self.channels}.")
        for name, given in (("mean", self.mean), ("std", self.std)):
            if given is not None and len(given) != self.channels:
                wanted = f"{self.channels} numbers, one per channel"
                raise ValueError(f"Expected `{name}` to hold {wanted}, but got {given}.")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"Expected `std` to be positive, but got {self.std}.")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"Expected a value range (low, high) with low < high, but got {self.value_range}.")

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation for normalisation: as given, or those of ImageNet for one or three channels."""
        known = {1: GREY, 3: (MEAN, STD)}.get(self.channels)
        if known is None and (self.mean is None or self.std is None):
            raise ValueError(
                f"Expected `data.mean` and `data.std` for images of {self.channels} channels, but got {self.mean} and "
                f"{self.std}. `--check-data --data.channels {self.channels}` prints those of your images."
            )
        mean, std = known or ((), ())
        return self.mean or mean, self.std or std

    def read(self, path: Path) -> Tensor:
        """Decode an image; its channels are innermost in memory, as files have them."""
        return self.of(decode(path), path)

    def of(self, found: Decoded, path: Path) -> Tensor:
        """Channels and values as the net takes them; `path` is for the messages."""
        pixels = self._values(self._channels(found, path), path)
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)

    def _channels(self, found: Decoded, path: Path) -> np.ndarray:
        pixels = found.pixels
        if pixels.shape[2] != self.channels and found.alpha:
            if (pixels[..., -1] != pixels[..., -1].max(initial=0)).any():
                raise ValueError(
                    f"Expected the image {path} to be opaque, but its alpha channel is not: flatten it first, or set "
                    f"`data.channels` to {pixels.shape[2]} if transparency is meant to be a channel."
                )
            pixels = pixels[..., :-1]
        count = pixels.shape[2]
        if count == self.channels:
            return pixels
        if count == 1 and self.channels == 3:
            return np.repeat(pixels, 3, axis=2)
        if count == 3 and self.channels == 1 and (pixels == pixels[..., :1]).all():
            return pixels[..., :1]  # a grey image that was saved as colours
        raise ValueError(
            f"Expected the image {path} to have {self.channels} channel{'s' * (self.channels > 1)}, but it has {count} "
            f"({found.mode}). Set `data.channels` to the number of channels for the net."
        )

    def _values(self, pixels: np.ndarray, path: Path) -> np.ndarray:
        if pixels.dtype == np.bool_:
            pixels = pixels.astype(np.uint8) * 255
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise ValueError(f"Expected the image {path} to hold numbers, but it also holds NaN or infinity.")
        if self.value_range is None:
            if pixels.dtype == np.uint8:
                return pixels
            low, high = float(pixels.min(initial=0)), float(pixels.max(initial=0))
            likely = str([0, 1] if 0 <= low <= high <= 1 else [low, high])
            if pixels.dtype == np.uint16:
                bits = max(9, int(high).bit_length())
                likely = "[0, 65535]" + (f", or [0, {2**bits - 1}] of a camera of {bits} bits" if bits < 16 else "")
            raise ValueError(
                f"Expected the image {path} to have 8 bits per channel or a given range, but it holds {pixels.dtype} "
                f"from {low:g} to {high:g}. Set the values of black and white with `data.source_range` or "
                f"`data.target_range` (--value_range of predict.py), for example {likely}."
            )
        low, high = self.value_range
        exact = pixels.astype(np.float32 if pixels.dtype.itemsize <= 2 else np.float64)
        return np.clip((exact - low) * (255 / (high - low)), 0, 255).astype(np.float32)


class ColourTable:
    """Reads colour-coded labels with a table `{(r, g, b): class id or 255}`. Any other colour is refused."""

    def __init__(self, ids: Mapping[Colour, int]) -> None:
        codes = sorted((_code(np.array(colour)).item(), train) for colour, train in ids.items())
        self.codes = np.array([code for code, _ in codes])
        self.ids = np.array([train for _, train in codes], np.uint8)

    def __call__(self, path: Path) -> np.ndarray:
        """Class ids (H, W)."""
        found = _label(path, decode(path))
        pixels = found.pixels[..., :3] if found.alpha else found.pixels
        if pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ValueError(
                f"Expected the label {path} to be of colours, as classes.yaml says, but it is {found.mode}."
            )
        code = _code(pixels)
        place = np.searchsorted(self.codes, code).clip(max=len(self.codes) - 1)
        if (unknown := self.codes[place] != code).any():
            colours, counts = np.unique(code[unknown], return_counts=True)
            most = [
                f"[{c >> 16}, {c >> 8 & 255}, {c & 255}] at {n} pixels" for c, n in zip(colours, counts, strict=True)
            ][:4]
            raise ValueError(
                f"Expected the label {path} to hold only the colours of classes.yaml, but it also holds "
                f"{len(colours)} other{'s' * (len(colours) > 1)}: {', '.join(most)}. "
                "List colours to ignore under `ignore` of its `colors`."
            )
        return self.ids[place]


def read_image(path: Path) -> Tensor:
    """Decode an image of 8 bits as uint8 (3, H, W)."""
    return ImageFormat().read(path).contiguous()


def read_ids(path: Path) -> np.ndarray:
    """Decode a one-channel label file (H, W): the indices of a palette PNG as they are stored, never its colours."""
    found = _label(path, decode(path, palette=False))
    if found.pixels.shape[2] != 1:
        raise ValueError(
            f"Expected the label {path} to hold one class id per pixel (palette or grey PNG), but its mode is "
            f"{found.mode}. If its colours mean classes, list them under `colors` in classes.yaml."
        )
    ids: np.ndarray = found.pixels[..., 0]
    if ids.dtype.kind == "f":
        if not np.isfinite(ids).all() or (ids != np.round(ids)).any():
            raise ValueError(f"Expected the label {path} to hold whole numbers, but it holds fractions or NaN.")
        ids = ids.clip(-1, 2**31 - 1).astype(np.int64)
    return ids.astype(np.uint8) if ids.dtype == np.bool_ else ids


def decode(path: Path, *, palette: bool = True) -> Decoded:
    """Read a file as it is stored and turn it upright. `palette=False` leaves the indices of a palette image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, but still read
            return _decode(Path(path), palette)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Cannot read {path}: no such file (a broken link?).") from error
    except Image.DecompressionBombError as error:
        raise OSError(
            f"Cannot read {path}: it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels, Pillow's "
            "limit. Cut it into tiles."
        ) from error
    except MemoryError as error:
        raise OSError(f"Cannot read {path}: it does not fit into memory. Cut it into tiles.") from error
    except Refused as error:
        raise ValueError(str(error)) from error
    except UnidentifiedImageError as error:
        raise OSError(f"Cannot read {path}: it is no image of a known kind, whatever its name says.") from error
    except Exception as error:  # decoders of broken files raise anything: struct.error, SyntaxError, zlib.error ...
        raise OSError(f"Cannot read {path}: {error or type(error).__name__}") from error


class Refused(Exception):
    """A readable file with unsuitable content; its message is shown to the user unchanged."""


def viewable(image: Tensor) -> np.ndarray:
    """An image (K, H, W) for display: uint8 (H, W, 3), grey or with its first three channels, brighter if very dark."""
    shown = (image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)).float()
    if 0 < (top := float(shown.max())) < 64:  # of 255
        shown = shown * (255 / top)
    return shown.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, ...) upright, by an EXIF orientation."""
    transpose, rows, columns = _TURNS.get(orientation, _TURNS[1])
    pixels = np.swapaxes(pixels, 0, 1) if transpose else pixels
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def decode_png(path: Path) -> np.ndarray:
    """(channels, H, W) at the file's own bit depth, which Pillow does not give for 16-bit colour."""
    try:
        from torchvision.io import ImageReadMode
        from torchvision.io import decode_png as torchvision_decode
    except ImportError as error:
        raise RuntimeError(f"{path} needs a torchvision that decodes 16-bit PNGs (0.21 or newer): {error}.") from error
    try:
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels = torchvision_decode(data, ImageReadMode.UNCHANGED).numpy()
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"Cannot read the label {path}: {error}") from error
    if content[24] == 16 and pixels.dtype == np.uint8:  # the bit depth in the file's header
        raise RuntimeError(f"{path} has 16 bits, but this torchvision decodes 8: version 0.21 or newer is needed.")
    return pixels  # type: ignore[no-any-return]


def _label(path: Path, found: Decoded) -> Decoded:
    if found.lossy:
        raise ValueError(
            f"Expected the label {path} to be stored without loss, but it is a {found.lossy} file inside, whose "
            "compression changes ids at every boundary. Export it again as PNG."
        )
    return found


def _code(colours: np.ndarray) -> np.ndarray:
    wide = colours.astype(np.int32)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def _decode(path: Path, palette: bool) -> Decoded:
    try:
        opened = Image.open(path)
    except UnidentifiedImageError:  # also what Pillow says of a TIFF with more bands than it knows
        if _head(path, 4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _decode_tiff(path)
        raise
    with opened as image:
        kind = image.format or ""
        if kind == "TIFF" and not _plain_tiff(image):
            return _decode_tiff(path)
        lossy = kind if kind in _LOSSY else "JPEG" if kind == "TIFF" and image.tag_v2.get(259) in (6, 7) else ""  # type: ignore[attr-defined]
        orientation = _orientation(image)
        image.load()
        left = _orientation(image)  # Pillow itself turns some formats upright
        mode = image.mode
        if kind == "PNG" and mode in ("RGB", "RGBA", "LA") and _head(path, 25)[24] == 16:
            pixels, mode = decode_png(path).transpose(1, 2, 0), f"{mode};16"
        else:
            if mode in ("P", "PA") and palette:
                image = image.convert("RGBA" if mode == "PA" or "transparency" in image.info else "RGB")
            elif mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
                image = image.convert("RGB")
            elif mode in ("RGBa", "La"):
                image = image.convert(mode.upper())
            pixels = np.array(image)
            alpha_of = image.mode
        if mode.endswith(";16"):
            alpha_of = mode.removesuffix(";16")
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return Decoded(turn(pixels, left), mode, orientation, alpha_of in ("RGBA", "LA", "PA"), lossy)


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(0x0112, 1)
    return found if found in _TURNS else 1


def _head(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _plain_tiff(image: Any) -> bool:
    """Whether Pillow reads all of it as it is stored: one page, one band of any depth or three of 8 bits."""
    bands = image.tag_v2.get(277, 1)
    bits = image.tag_v2.get(258, (1,))
    return getattr(image, "n_frames", 1) == 1 and (bands == 1 or (bands == 3 and set(bits) == {8}))


def _decode_tiff(path: Path) -> Decoded:
    """Any number of bands at any depth."""
    try:
        import tifffile
    except ImportError as error:
        raise Refused(
            f"{path} is a TIFF with several bands or pages, or with more than 8 bits. Reading it needs tifffile "
            "(pip install tifffile)."
        ) from error
    with tifffile.TiffFile(path) as file:
        series, page = file.series[0], file.pages[0]
        axes, pixels = series.axes, series.asarray()
        orientation = page.tags[274].value if 274 in page.tags else 1
        alpha = any(int(extra) in (1, 2) for extra in getattr(page, "extrasamples", ()))
        lossy = "JPEG" if int(page.compression) in (6, 7) else ""
    kept = [(axis, i) for i, axis in enumerate(axes) if pixels.shape[i] != 1 or axis in "YX"]
    names = "".join(axis for axis, _ in kept)
    pixels = pixels.reshape([pixels.shape[i] for _, i in kept])
    bands = names.replace("Y", "").replace("X", "")
    if sorted(set("YX") & set(names)) != ["X", "Y"] or len(bands) > 1 or (bands and bands not in _BANDS):
        raise Refused(f"Expected {path} to be one picture, but it is a stack with the axes {axes} {series.shape}.")
    order = [names.index("Y"), names.index("X"), *([names.index(bands)] if bands else [])]
    pixels = pixels.transpose(order) if bands else pixels.transpose(order)[..., None]
    orientation = orientation if orientation in _TURNS else 1
    return Decoded(turn(pixels, orientation), f"{pixels.shape[2]} bands", orientation, alpha, lossy)
