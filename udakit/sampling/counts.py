"""Pixel counts of each class in each image of a data set, counted or read from a converter's file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from udakit._checks import check_callable, check_integer, kind_of


def count_classes(
    labels: Iterable[Any],
    *,
    num_classes: int,
    load: Callable[[Any], Any] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Int64[Tensor, "images c"]:
    """Count the pixels of each class in each image of a data set.

    **Convention.** Ids outside 0..C-1, such as the ignored one, are not counted. This function is meant for the start
    of a run: it reads files and tensors one by one and returns the counts on the CPU.

    Args:
        labels: label maps (tensors or arrays of any shape), paths of label images, or a data set of items for `load`.
        num_classes: C, the number of classes.
        load: function that makes a label map from an item, for example `lambda path:
            map_ids(np.asarray(Image.open(path)), GTA5_IDS)` or `lambda item: item[1]`. Without it, Pillow opens a path
            and its values are the ids (indices for a palette image).
        progress: function that is called after each image with the number of images done.

    Returns:
        The pixel counts, one row for each image.

    Raises:
        TypeError: a label map does not hold integers.

    Example:
        >>> count_classes([torch.tensor([[0, 0], [2, 255]]), torch.tensor([[1, 1], [1, 1]])], num_classes=3)
        tensor([[2, 0, 1],
                [0, 4, 0]])
    """
    check_integer("num_classes", num_classes)
    if isinstance(labels, (str, os.PathLike)) or not (isinstance(labels, Iterable) or hasattr(labels, "__getitem__")):
        raise TypeError(
            f"Expected `labels` to be an iterable of label maps or paths, but got {kind_of(labels)}. "
            'List the files of a folder with sorted(Path(folder).glob("*.png")).'
        )
    if load is not None:
        check_callable("load", load, "load(item)")
    if progress is not None:
        check_callable("progress", progress, "progress(images_done)")
    rows: list[Tensor] = []
    for item in _items(labels):
        found = load(item) if load else _read(item)
        try:
            ids = found if isinstance(found, Tensor) else torch.as_tensor(found, device="cpu")
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"Expected `labels` to hold integer maps, but got {kind_of(found)} in item {len(rows)}. "
                "Pass `load=` to make a map from an item, for example load=lambda item: item[1]."
            ) from error
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"Expected `labels` to hold integer maps, but got {ids.dtype} in item {len(rows)}.")
        ids = ids.flatten().long()
        inside = (ids >= 0) & (ids < num_classes)
        counts = torch.bincount(torch.where(inside, ids, num_classes), minlength=num_classes + 1)[:num_classes]
        rows.append(counts.cpu())  # a data set is counted once, before training
        if progress:
            progress(len(rows))
    return torch.stack(rows) if rows else torch.zeros(0, num_classes, dtype=torch.int64, device="cpu")


def _items(labels: Any) -> Iterator[Any]:
    # A map-style data set may not raise IndexError at its end, so iter() on it may never stop.
    if hasattr(labels, "__len__") and hasattr(labels, "__getitem__"):
        return (labels[i] for i in range(len(labels)))
    return iter(labels)


def _read(item: Any) -> Any:
    if not isinstance(item, (str, os.PathLike)):
        return item
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Reading label images by path needs Pillow. Install it with `pip install pillow`, or pass `load=`."
        ) from error
    with Image.open(item) as image:
        ids = np.array(image)
    if ids.ndim != 2:
        raise ValueError(
            f"Expected `labels` item {os.fspath(item)!r} to be a one-channel label image, but got shape {ids.shape}. "
            "Pass `load=` to turn colours into class ids."
        )
    return ids.astype(np.int64)


def read_class_stats(path: str | os.PathLike[str], *, num_classes: int) -> tuple[list[str], Int64[Tensor, "images c"]]:
    """Read the class statistics that DAFormer's converters write next to a data set.

    Both `sample_class_stats.json` (a list of {"<train id>": pixels, "file": path}) and `sample_class_stats_dict.json`
    ({path: {"<train id>": pixels}}) can be read.

    **Convention.** File names are returned as the converter wrote them, so compare only their base names. Ids outside
    0..C-1 are not counted.

    Args:
        path: path of the JSON file.
        num_classes: C, the number of classes.

    Returns:
        The label files and their pixel counts (images, C), for `RareClassSampler`.

    Raises:
        ValueError: the file does not have one of these forms.
    """
    stored = Path(path).read_bytes()
    try:
        content = json.loads(stored.decode("utf-8-sig"))  # with or without a byte order mark
        if isinstance(content, dict):
            pairs = list(content.items())
        else:
            pairs = [(entry["file"], {k: n for k, n in entry.items() if k != "file"}) for entry in content]
        counts = torch.zeros(len(pairs), num_classes, dtype=torch.int64, device="cpu")
        for row, (_, stats) in enumerate(pairs):
            for label_id, pixels in stats.items():
                if 0 <= int(label_id) < num_classes:
                    counts[row, int(label_id)] = int(pixels)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'Expected `path` {os.fspath(path)!r} to be a list of {{"<train id>": pixels, "file": path}} or a mapping '
            f"path -> {{train id: pixels}}, but got another form ({error})."
        ) from error
    return [str(name) for name, _ in pairs], counts
