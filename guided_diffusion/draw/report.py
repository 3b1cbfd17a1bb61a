"""report.html: all scores and pictures of an evaluation in one page, which asks nothing of any network."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from ..metrics import score_names
from . import montage, style
from .scored import ScoredCase, ensemble_sizes

MEMBERS = 16  # of a case that the page holds
SIDE = 256  # pixels; larger pictures are thinned out to at most this
THUMBNAIL = 64  # pixels
PAGE, STYLE, SCRIPT = (Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8")
                       for kind in ("html", "css", "js"))  # PAGE is a string.Template; the others are taken as they are
_GREYS = 48  # levels in a thumbnail
_RATERS = style.OUTLINES[0]  # the colour of all of them together


def pictures(image: np.ndarray, raters: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    """What the page shows of a case, small enough to keep for thousands: texts, of which some are PNGs in base64.

    :param image: [C, H, W] in [0, 1], of which the first channel is shown.
    :param raters, predictions: [m, H, W] and [n, H, W] bool.
    """
    step = -(-max(image.shape[1:]) // SIDE)
    grey, raters, members = (x[..., ::step, ::step] for x in (image[0], raters, predictions))
    grey = np.round(np.clip(grey, 0, 1) * 255.0).astype(np.uint8)
    masks = np.concatenate([raters, members[:MEMBERS]])
    height, width = grey.shape
    mean = members.mean(0)
    return {"thumbnail": _thumbnail(grey, raters.mean(0), mean), "image": _png(Image.fromarray(grey)),
            "masks": _png(Image.fromarray(masks.reshape(-1, width))), "height": height, "width": width, "step": step,
            "mean": _png(Image.fromarray(np.round(mean * 255.0).astype(np.uint8)))}


def _png(picture):
    return base64.b64encode(montage.png(picture)).decode()


def _thumbnail(grey, raters, ensemble):
    """The scan with outlines of what half of the raters, and half of the members, mark; dashes where both agree."""
    scale = THUMBNAIL / max(grey.shape)
    size = tuple(max(1, round(side * scale)) for side in grey.shape[::-1])
    how = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    pixels = np.round(np.asarray(Image.fromarray(grey).resize(size, how)) * ((_GREYS - 1) / 255)).astype(np.uint8)
    dashes = np.add(*np.indices(pixels.shape)) // 2 % 2 == 0
    edges = [_rim(np.asarray(Image.fromarray(share.astype(np.float32)).resize(size, how)) >= 0.5)
             for share in (raters, ensemble)]
    pixels[edges[1]] = _GREYS + 1
    pixels[edges[0] & (dashes | ~edges[1])] = _GREYS
    picture = Image.fromarray(pixels)
    levels = np.linspace(0, 255, _GREYS).round().astype(int)
    picture.putpalette([int(value) for level in levels for value in [level] * 3] + [*_RATERS, *style.ENSEMBLE])
    return _png(picture)


def _rim(mask):
    """The pixels of a mask, [h, w] bool, that have a neighbour outside it."""
    inside = np.pad(mask, 1)
    return mask & ~(inside[1:-1, :-2] & inside[1:-1, 2:] & inside[:-2, 1:-1] & inside[2:, 1:-1])


def page(rows: Sequence[ScoredCase], patients: Sequence[str], counts: str, tables: Sequence[Sequence[Sequence[str]]],
         figure: bytes | None, independent: bool = True) -> bytes:
    """The page, in UTF-8.

    :param rows, patients: those of an evaluation.Evaluation.
    :param counts: what was scored, in words.
    :param tables: of the summary, each a list of rows of words with the head first.
    :param figure: the PNG of plots.score_figure; None leaves it out.
    :param independent: False leaves out the scores that need independent draws.
    """
    sizes, scores = ensemble_sizes(rows), score_names(independent)
    names = ["case", "patient", "raters", "members", *scores, *(f"GED_{size}" for size in sizes)]
    blocks = {"colours": {"map": style.MAP.tolist(), "outlines": style.OUTLINES, "ensemble": style.ENSEMBLE,
                          "line": style.BLUE, "axis": style.GREY},
              **{f"case{i}": _case(row, scores) for i, row in enumerate(rows)}}
    css = f":root {{ --focus: {style.BLUE} }}\n{STYLE}"
    text = Template(PAGE).substitute(
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(css)}'; script-src '{_hash(SCRIPT)}';"
               f" base-uri 'none'; form-action 'none'",
        style=css, script=SCRIPT, counts=html.escape(counts), count=len(rows), tables="".join(map(_table, tables)),
        figure="" if figure is None else _figure(figure), heads="".join(map(_head, names)),
        body="\n".join(_row(row, patient, scores, sizes) for row, patient in zip(rows, patients)),
        blocks="\n".join(_block(name, values) for name, values in blocks.items()),
        raters=f"rgb{_RATERS}", ensemble=f"rgb{style.ENSEMBLE}")
    return text.encode(errors="xmlcharrefreplace")


def _hash(text):
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _figure(png):
    return ('<img class="figure" alt="distribution of scores, calibration, and GED against the number of masks"\n'
            f' src="data:image/png;base64,{base64.b64encode(png).decode()}">')


def _block(name, values):
    """Values for the script, as JSON; text in them cannot end the block."""
    text = json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _head(name):
    words = html.escape(name)
    return (f'<th scope="col" aria-sort="{"ascending" if name == "case" else "none"}"><button>'
            f'{words.replace("_", "_<wbr>") if len(name) > 10 else words}</button></th>')


def _table(rows):
    head, *rows = [[html.escape(word) for word in row] for row in rows]
    lines = ["".join(f'<th scope="col">{word}</th>' for word in head)]
    lines += [f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{word}</td>" for word in row[1:]) for row in rows]
    return f'<table class="summary">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def _row(row, patient, scores, sizes):
    values = [*(row.score(name) for name in scores), *(row.score("GED", size) for size in sizes)]
    cells = [f'<td data-v="{value}">{value}</td>' for value in (row.raters, row.members)]
    cells += ["<td></td>" if value is None else f'<td data-v="{float(value)!r}">{value:.3f}</td>' for value in values]
    source = f"data:image/png;base64,{row.pictures['thumbnail']}"
    return (f'<tr><td><img width="{THUMBNAIL}" alt="" decoding="async" src="{source}"></td>'
            f'<th scope="row">{html.escape(row.case)}</th><td>{html.escape(patient)}</td>{"".join(cells)}</tr>')


def _case(row, scores):
    """What opening a case needs beside its row of the table."""
    what = {key: value for key, value in row.pictures.items() if key != "thumbnail"}
    return {**what, "raters": row.raters, "members": row.members, "scores": {name: row.score(name) for name in scores},
            "calibration": np.round(row.calibration, 4).tolist()}
