"""Draw the gallery of the toy pair that the documentation shows: `python docs/make_toy_pictures.py [folder]`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gta2cs.toy import PALETTE, render


def gallery(domain: str, seeds: range, columns: int = 3, size: tuple[int, int] = (128, 192)) -> Image.Image:
    """Scenes with their label maps below, `columns` in a row."""
    colours = np.concatenate([PALETTE, np.zeros((256 - len(PALETTE), 3), np.uint8)])
    cells = []
    for seed in seeds:
        image, label = render(domain, seed, size)
        cells.append(np.concatenate([image, colours[label]]))
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return Image.fromarray(np.concatenate(rows))


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "images")
    folder.mkdir(parents=True, exist_ok=True)
    for domain in ("game", "camera"):
        gallery(domain, range(6)).save(folder / f"toy_{domain}.png")
