"""The one-page report: valid HTML, every picture inside it and whole, and shown by a browser where there is one."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gta2cs.evaluation import Score
from gta2cs.html import render, write_html
from gta2cs.report import markdown_table
from gta2cs.samples import ClassSet

CLASSES = ClassSet(("road", "sky & <haze>"), np.array([[128, 64, 128], [70, 130, 180]], np.uint8))
ROWS = {
    "source_only": Score({"road": 50.0, "sky & <haze>": float("nan")}, {"mIoU": 50.0}),
    "dacs, student": Score({"road": 40.0, "sky & <haze>": 80.0}, {"mIoU": 60.0}),
}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Notes tags, attributes and text, and fails on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[tuple[str, str | None, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append((tag, dict(attrs).get("class"), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "th" in self.open or "td" in self.open:
            tag, kind, text = self.cells[-1]
            self.cells[-1] = (tag, kind, text + data)


@pytest.fixture
def report(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name, size in {"panels.png": (120, 300), "curves.png": (90, 240)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / name)
    path = tmp_path / "report.md"
    path.write_text(
        f"# toy: source_only → dacs\n\nSeed 0, **2** steps & `x < 1`.\n\n{markdown_table(ROWS, CLASSES)}\n"
        "Best: 60.0.\n\n![panels](panels.png)\n\n![curves](curves.png)\n",
        encoding="utf-8",
    )
    return path


def test_every_picture_is_inside_and_whole(report):
    page = Page(write_html(report, CLASSES).read_text(encoding="utf-8"))
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [p["alt"] for p in pictures] == ["panels", "curves"]
    for picture in pictures:
        kind, _, data = picture["src"].partition(",")
        assert kind == "data:image/png;base64"
        content = base64.b64decode(data, validate=True)
        assert content == (report.parent / f"{picture['alt']}.png").read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert image.format == "PNG"
            assert image.size == (int(picture["width"]), int(picture["height"]))


def test_the_page_needs_nothing_else(report):
    text = write_html(report, CLASSES).read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name == "srcset" for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert "url(" not in text
    assert "@import" not in text
    assert not list(report.parent.glob("*.tmp"))


def test_the_table_is_the_markdown_table_with_the_best_marked(report):
    page = Page(write_html(report, CLASSES).read_text(encoding="utf-8"))
    assert [text for tag, _, text in page.cells if tag == "th"] == ["net", "mIoU", "road", "sky & <haze>"]
    body = [(text, kind) for tag, kind, text in page.cells if tag == "td"]
    assert body == [
        *(("source_only", None), ("50.0", None), ("50.0", "best"), ("–", None)),
        *(("dacs, student", None), ("60.0", "best"), ("40.0", None), ("80.0", "best")),
    ]
    swatches = [attributes["style"] for _, attributes in page.tags if attributes.get("class") == "swatch"]
    assert swatches == ["background:rgb(128,64,128)", "background:rgb(70,130,180)"]


def test_words_stand_left_and_a_column_of_equals_is_not_marked(tmp_path):
    table = "| net | run | score | seed |\n|---|---|---:|---:|\n| a | plain | 0.4 | 3 |\n| b | slow | 0.5 | 3 |\n"
    page = Page(render(table, tmp_path))
    assert [kind for _, kind, _ in page.cells] == [
        *(None, "words", None, None),
        *(None, "words", None, None),
        *(None, "words", "best", None),
    ]


def test_text_is_shown_as_it_was_written(tmp_path):
    text = render("## A <b> & **bold** `x < 1`\n\n- one\n- two\n\nsee [there](https://example.org/a?b=1)\n", tmp_path)
    assert "<h2>A &lt;b&gt; &amp; <strong>bold</strong> <code>x &lt; 1</code></h2>" in text
    assert "<title>A &lt;b&gt; &amp; bold x &lt; 1</title>" in text
    assert re.search(r"<ul><li>one\s*</li><li>two</li></ul>", text)
    assert '<a href="https://example.org/a?b=1">there</a>' in text
    Page(text)


def test_a_missing_or_wrong_picture_is_named(report):
    (report.parent / "curves.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"curves\.png of the report to be a PNG"):
        write_html(report)
    (report.parent / "curves.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"curves\.png"):
        write_html(report)


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("chromium is not installed: the page is parsed, but not looked at")
    return found


def browse(profile: Path, *arguments: str) -> str:
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}")
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    done = subprocess.run([browser(), *options, *quiet, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_browser_shows_the_pictures(report, tmp_path):
    browser()
    page = write_html(report, CLASSES)
    probe = tmp_path / "probe.html"  # the page itself has no script; its copy here reports what the browser decoded
    script = """<script>onload = () => {
        const sizes = [...document.images].map(i => i.complete ? i.naturalWidth + "x" + i.naturalHeight : "none")
        const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth
        document.title = "seen " + sizes + (wide ? " too wide" : " fits")
    }</script>"""
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8")
    for window in ("1280,900", "400,900"):  # on the narrow one the table scrolls by itself
        dom = browse(tmp_path / "profile", f"--window-size={window}", "--dump-dom", probe.as_uri())
        assert "<title>seen 300x120,240x90 fits</title>" in dom, window

    shot = tmp_path / "shot.png"
    browse(tmp_path / "profile", "--window-size=900,900", f"--screenshot={shot}", page.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 10_000, "the noise of the pictures is not on the screenshot"


def test_the_scale_of_the_losses_is_numbers(tmp_path, monkeypatch):
    from gta2cs import report

    kept = {}
    monkeypatch.setattr(report, "_save", lambda figure, path: kept.update(figure=figure))
    losses = [{"step": k, "terms": {"source": 2.0 / k}} for k in range(1, 20)]
    report.save_curves(tmp_path / "curves.png", [{"name": "dacs", "steps": 20, "losses": losses, "scores": []}])
    axis = kept["figure"].axes[0]
    kept["figure"].canvas.draw()
    labels = [t.get_text() for t in (*axis.get_yticklabels(), *axis.get_yticklabels(minor=True)) if t.get_text()]
    assert labels
    assert all(float(label) > 0 for label in labels)
    assert not any("e" in label for label in labels)
