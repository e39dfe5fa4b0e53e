"""Draw docs/gallery.md's pictures: run the blocks of the page, then lay out what they computed.

`python docs/make_gallery.py [folder]`

`--translator FILE` draws docs/methods/diga.md's picture of the translators instead, with the learned one of FILE: the
`translator.pt` of a run on the built-in pair or, where there is no such file, one that is first trained there: minutes.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gta2cs.toy import PALETTE

DOCS = Path(__file__).parent
TITLE, GAP = 20, 4
BAR, INK = (48, 44, 66), (244, 242, 250)
COLOURS = np.concatenate([PALETTE, np.zeros((256 - len(PALETTE), 3), np.uint8)])

Panel = tuple[str, np.ndarray]


def photo(image: Tensor) -> np.ndarray:
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def classes(labels: Tensor, scale: int = 1) -> np.ndarray:
    return COLOURS[labels.numpy()].repeat(scale, 0).repeat(scale, 1)


def grey(values: Tensor) -> np.ndarray:
    return (values.float() * 255).byte().numpy()[..., None].repeat(3, 2)


def sheet(rows: list[list[Panel]]) -> Image.Image:
    """Panels in rows, each under its title; an empty title leaves out the row's bar."""
    font = ImageFont.load_default(size=13)
    heights = [max(p.shape[0] for _, p in row) + (TITLE if any(t for t, _ in row) else 0) for row in rows]
    width = max(sum(p.shape[1] + GAP for _, p in row) - GAP for row in rows)
    page = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) - 1)), BAR)
    draw = ImageDraw.Draw(page)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left, below = 0, top + height - max(p.shape[0] for _, p in row)
        for title, panel in row:
            draw.text((left + 5, top + TITLE // 2), title, fill=INK, font=font, anchor="lm")
            page.paste(Image.fromarray(panel), (left, below))
            left += panel.shape[1] + GAP
        top += height + GAP
    return page


def run(page: Path) -> dict[str, Any]:
    """Everything that the Python blocks of a page define."""
    namespace: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(code, str(page), "exec"), namespace)
    return namespace


def pictures(v: dict[str, Any]) -> dict[str, list[list[Panel]]]:
    source, target = v["source"], v["target"]
    image, label = ("source", photo(source.images[0])), ("its labels", classes(source.labels[0]))
    other, truth = ("target", photo(target.images[0])), ("truth", classes(target.labels[0]))
    domains = [
        row
        for name in ("game", "camera")
        for row in (
            [(f"{name} {i}", photo(x)) for i, x in enumerate(v[name].images)],
            [("", classes(y)) for y in v[name].labels],
        )
    ]
    jitter = [(f"draw {i + 1}", photo(x)) for i, x in enumerate(v["strong"])]
    return {
        "domains": domains,
        "class_mix": [
            [image, other, ("mask: drawn classes", grey(v["class_mask"][0]))],
            [
                ("mixed image", photo(v["mixed"].images[0])),
                ("mixed labels", classes(v["mixed"].labels[0])),
                ("weight: 1 and 0.6", grey(v["mixed"].weight[0])),
            ],
        ],
        "boxes": [
            [
                ("draw_box_mask", grey(v["box"][0])),
                ("box mix", photo(v["boxed"].images[0])),
                ("its labels", classes(v["boxed"].labels[0])),
            ],
            [
                ("draw_block_mask: removed", grey(v["removed"][0])),
                other,
                ("blocks removed", photo(v["masked"][0])),
            ],
        ],
        "stylings": [
            [image, ("style: a target image", photo(v["camera"].images[0])), ("histogram", photo(v["histogram"][0]))],
            [
                ("Fourier, beta 0.01", photo(v["fourier"][0])),
                ("Fourier, beta 0.05", photo(v["fourier_wide"][0])),
                ("colour statistics", photo(v["colour"][0])),
            ],
        ],
        "augment": [jitter[:3], jitter[3:]],
        "cross_domain": [
            [image, ("augmented", photo(v["augmented"][0])), ("translated", photo(v["colour"][0]))],
            [label, ("mask: drawn classes", grey(v["drawn"][0])), ("mixture", photo(v["crossed"][0]))],
        ],
        "selectors": [
            [other, truth, ("confidence", grey(v["everything"].confidence[0]))],
            [
                ("ArgmaxSelector", classes(v["everything"].labels[0])),
                ("ThresholdSelector(0.9)", classes(v["threshold"].labels[0])),
                ("ClassQuantileSelector, share 0.5", classes(v["quantile"].labels[0])),
            ],
            [
                ("nearest centroid", classes(v["nearest"][0])),
                ("BilateralConsensus", classes(v["consensus"].labels[0])),
                ("kept by the consensus", grey(v["consensus"].weight[0])),
            ],
        ],
        "target_paste": [
            [image, other, ("confidence", grey(v["everything"].confidence[0]))],
            [
                ("pasted image", photo(v["pasted"].images[0])),
                ("pasted labels", classes(v["pasted"].labels[0])),
                ("boundary band", grey(v["band"][0])),
            ],
        ],
        "downscale": [
            [
                ("labels", classes(source.labels[0])),
                ("majority, min_ratio 0.75", classes(v["strict"][0], 8)),
            ],
            [
                ("majority, min_ratio 0", classes(v["lenient"][0], 8)),
                ("nearest", classes(v["picked"][0], 8)),
            ],
        ],
    }


def translations(path: Path) -> list[list[Panel]]:
    """Source and target images of the built-in pair, and the one in the style of the other by every translator."""
    import torch
    from rich.console import Console

    from gta2cs.datasets import build_pair
    from gta2cs.learned_translator import Translator, train_translator
    from gta2cs.loading import MEAN, STD, StepData, normalise, step_loader
    from gta2cs.nets import build_net
    from gta2cs.translators import TRANSLATORS

    pair = build_pair("toy")
    if not path.is_file():
        data = StepData(pair.source_train, pair.target_train, batch_size=4, crop=(128, 192))
        torch.manual_seed(0)
        translator, net = Translator(), build_net("fpn", num_classes=len(pair.classes))
        train_translator(
            translator,
            lambda start, stop: step_loader(data, start=start, stop=stop),
            net,
            steps=200,
            lr=2e-3,
            path=path,
            console=Console(),
        )
    learned = Translator()
    learned.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["translator"])
    source = normalise(torch.stack([pair.source_train[i][0] for i in (3, 120)]))
    target = normalise(torch.stack([pair.target_train[i] for i in (60, 130)]))
    names = ("color", "fourier", "histogram")
    columns = {"source": source, "target": target} | {name: TRANSLATORS[name](source, target) for name in names}
    with torch.no_grad():
        columns["learned"] = learned(source, target)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    shown = {name: images * std + mean for name, images in columns.items()}
    rows = []
    for i in range(len(source)):
        panels = [(name, photo(images[i])) for name, images in shown.items()]
        rows += [panels[:3], panels[3:]]
    return rows


def save(rows: list[list[Panel]], path: Path) -> None:
    """Write a sheet with 256 colours: photographs with camera noise would be three times as large without."""
    sheet(rows).quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DOCS / "pictures")
    parser.add_argument("--translator", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.translator is not None:
        save(translations(options.translator), options.folder / "diga_translators.png")
        sys.exit()
    for name, rows in pictures(run(DOCS / "gallery.md")).items():
        save(rows, options.folder / f"gallery_{name}.png")
