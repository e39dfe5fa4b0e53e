"""A generator of files as people have them: what is read, with the values that must come out, and what is refused."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

SIZE = (5, 7)


def noise(*bands: int, high: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(sum(bands)).integers(0, high, (*SIZE, *bands)).astype(dtype)


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]


def save_turned(path: Path, pixels: np.ndarray, orientation: int, **options: object) -> None:
    """Store `pixels` as they are, with an EXIF orientation that says how to hold them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(path, pixels, exif=exif.tobytes(), **options)


def save_png16(path: Path, pixels: np.ndarray) -> None:
    """A 16-bit RGB PNG by hand: (H, W, 3) uint16, big-endian, no filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def save_huge(path: Path, size: tuple[int, int] = (20000, 10000)) -> None:
    """A PNG of 200 megapixels in some kilobytes."""
    save(path, noise())
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(content)


def jpeg_inside(path: Path, pixels: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def tiff(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Odd:
    """A file: how it is written, and what must come of it."""

    name: str
    write: Callable[[Path], object]
    value: np.ndarray | str  # (K, H, W), or what the message says
    channels: int = 3
    value_range: tuple[float, float] | None = None


def planes(pixels: np.ndarray) -> np.ndarray:
    return np.moveaxis(pixels if pixels.ndim == 3 else pixels[..., None], -1, 0)


def spread(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    return planes(np.clip((pixels.astype(float) - low) * 255 / (high - low), 0, 255))


def _images() -> list[Odd]:
    grey, colours, five, four = noise(), noise(3), noise(5), noise(4)
    deep, deep3 = noise(high=4096, dtype=np.uint16), noise(3, high=65536, dtype=np.uint16)
    real = noise().astype(np.float32) / 300
    nan = real.copy()
    nan[1, 2] = np.nan
    opaque = np.dstack([colours, np.full(SIZE, 255, np.uint8)])
    near_infrared, volume = {"photometric": "rgb", "extrasamples": [0]}, {"metadata": {"axes": "ZYX"}, "photometric": 1}
    thrice = np.repeat(planes(grey), 3, 0)
    return [
        Odd("colours.png", lambda p: save(p, colours), planes(colours)),
        Odd("colours.tif", lambda p: save(p, colours), planes(colours)),
        Odd("grey.png", lambda p: save(p, grey), thrice),
        Odd("grey.bmp", lambda p: save(p, grey), thrice),
        Odd("one.png", lambda p: save(p, grey), planes(grey), channels=1),
        Odd("grey_as_colours.png", lambda p: save(p, np.dstack([grey] * 3)), planes(grey), channels=1),
        Odd("opaque.png", lambda p: save(p, opaque), planes(colours)),
        Odd("transparency_as_channel.png", lambda p: save(p, four), planes(four), channels=4),
        Odd("deep.png", lambda p: save(p, deep), spread(deep, 100, 4000), 1, (100, 4000)),
        Odd("deep.tif", lambda p: tiff(p, deep), np.repeat(spread(deep, 0, 4095), 3, 0), 3, (0, 4095)),
        Odd("deep_colours.png", lambda p: save_png16(p, deep3), spread(deep3, 0, 65535), 3, (0, 65535)),
        Odd("deep_colours.tif", lambda p: tiff(p, deep3), spread(deep3, 0, 65535), 3, (0, 65535)),
        Odd("float.tif", lambda p: tiff(p, real), spread(real, 0, 1), 1, (0, 1)),
        Odd("five.tif", lambda p: tiff(p, five, planarconfig="contig"), planes(five), 5),
        Odd("planes.tif", lambda p: tiff(p, planes(five), planarconfig="separate"), planes(five), 5),
        Odd("pages.tif", lambda p: tiff(p, planes(five), photometric="minisblack"), planes(five), 5),
        Odd("four.tif", lambda p: tiff(p, four, **near_infrared), planes(four), 4),
        *(
            Odd(f"turned_{o}.png", lambda p, o=o: save_turned(p, colours, o), planes(upright(colours, o)))
            for o in range(1, 9)
        ),
        Odd("turned.jpg", lambda p: save_turned(p, np.full((4, 8, 3), 90, np.uint8), 6), np.full((3, 8, 4), 90)),
        # refused
        Odd("no_range.png", lambda p: save(p, deep), "8 bits per channel or a given range, but it holds uint16 from"),
        Odd("no_range_colours.png", lambda p: save_png16(p, deep3), "or a given range, but it holds uint16 from"),
        Odd("no_range_float.tif", lambda p: tiff(p, real), "or a given range, but it holds float32 from 0"),
        Odd("no_range_float32.tif", lambda p: save(p, real), "or a given range, but it holds float32 from 0"),
        Odd("no_range_colours.tif", lambda p: tiff(p, deep3), "or a given range, but it holds uint16 from"),
        Odd("nan.tif", lambda p: tiff(p, nan), "but it also holds NaN or infinity", 1, (0, 1)),
        Odd("fourth_band.tif", lambda p: tiff(p, four, **near_infrared), "3 channels, but it has 4"),
        Odd("five_bands.tif", lambda p: tiff(p, five, planarconfig="contig"), "3 channels, but it has 5"),
        Odd("stack.tif", lambda p: tiff(p, planes(noise(3)), **volume), "a stack with the axes ZYX"),
        Odd("transparent.png", lambda p: save(p, four), "to be opaque, but its alpha channel is not"),
        Odd("one_of_three.png", lambda p: save(p, colours), "to have 1 channel, but it has 3", 1),
        Odd("huge.png", save_huge, "it has more than 178 megapixels"),
        Odd("cut.png", lambda p: (save(p, noise(3)), p.write_bytes(p.read_bytes()[:70])), "Cannot read"),
        Odd("text.jpg", lambda p: p.write_text("no image"), "Cannot read"),
        Odd("empty.tif", lambda p: p.write_bytes(b""), "Cannot read"),
        Odd("link.png", lambda p: p.symlink_to("nowhere.png"), "no such file"),
        Odd("loop.png", lambda p: p.symlink_to(p.name), "Cannot read"),
    ]  # fmt: skip


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """By the standard's words: where row 0 and column 0 of the file are in the picture."""
    places = "top left, top right, bottom right, bottom left, left top, right top, right bottom, left bottom"
    row, column = places.split(", ")[orientation - 1].split()
    height, width = pixels.shape[:2]
    shape = (height, width) if row in ("top", "bottom") else (width, height)
    out = np.zeros((*shape, *pixels.shape[2:]), pixels.dtype)
    for r in range(height):
        for c in range(width):
            place = {row: r, column: c}
            y = place["top"] if "top" in place else shape[0] - 1 - place["bottom"]
            x = place["left"] if "left" in place else shape[1] - 1 - place["right"]
            out[y, x] = pixels[r, c]
    return out


IMAGES = _images()
READ = [odd for odd in IMAGES if not isinstance(odd.value, str)]
REFUSED = [odd for odd in IMAGES if isinstance(odd.value, str)]


def _labels() -> list[Odd]:
    ids = noise(high=2)
    real = ids.astype(np.float32)
    half = real + 0.5
    return [
        Odd("plain.png", lambda p: save(p, ids), ids),
        Odd("bits.png", lambda p: save(p, ids.astype(bool)), ids),
        Odd("deep.png", lambda p: save(p, ids.astype(np.uint16)), ids),
        Odd("plain.tif", lambda p: tiff(p, ids), ids),
        Odd("deep.tif", lambda p: tiff(p, ids.astype(np.int32)), ids),
        Odd("float.tif", lambda p: tiff(p, real), ids),
        *(Odd(f"turned_{o}.png", lambda p, o=o: save_turned(p, ids, o), upright(ids, o)) for o in (3, 6)),
        Odd("jpeg_inside.png", lambda p: jpeg_inside(p, ids * 255), "but it is a JPEG file inside"),
        Odd("fractions.tif", lambda p: tiff(p, half), "to hold whole numbers, but it holds fractions or NaN"),
        Odd("colours.png", lambda p: save(p, noise(3)), "one class id per pixel .* under `colors` in classes.yaml"),
        Odd("too_high.png", lambda p: save(p, noise(high=300, dtype=np.uint16) + 250), r"label ids in \[0, 255\], but"),
        Odd("unknown.png", lambda p: save(p, ids + 6), "Expected label ids 0-1 or 255, but .* also holds 6-7"),
        Odd("text.png", lambda p: p.write_text("no label"), "Cannot read"),
    ]


LABELS = _labels()
