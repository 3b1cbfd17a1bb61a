"""Pictures of cases: the scan, its raters, the ensemble, and where they agree.

Beside the whole scan, every tile shows the detail of it that holds all masks. Each rater has a colour, sky blue is the
ensemble's, and a tile of shares has its colour bar below.
"""

import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from .. import metrics
from ..data.cases import Case
from .style import ENSEMBLE, OUTLINES, TEXT, TITLE, coloured, drawable, font

LARGE, SMALL, IN_PANEL = 192, 144, 103  # sides of tiles in pixels
MARGIN, LINE, BAR = 8, 18, 9  # pixels: between tiles, a line of text, a colour bar
FEWEST = 32  # pixels of the scan that a detail shows


def case_montage(name: str, image: np.ndarray, masks: np.ndarray, ensemble: np.ndarray,
                 max_members: int = 24) -> Image.Image:
    """The montage of one case, as a PIL picture.

    First row: scan, raters' outlines, share of raters, the outline of what half of the ensemble marks with a tint on
    what 10 to 90 % mark, probability, spread (standard deviation over members, at most 0.5). Below, every rater's
    outline, then the members' (the first max_members). The heading has the areas, and the scores if there are raters.

    :param image: [C, H, W] in [0, 1], of which the first channel is shown.
    :param masks: [R, H, W] bool, R may be 0.
    :param ensemble: [n, H, W] bool.
    """
    scan, small = (_Scan(image, masks, ensemble, side) for side in (LARGE, SMALL))
    top = [("scan", scan.whole(), None)]
    if len(masks):
        top += [("raters' outlines", scan.outlined(masks), None), scan.share("share of raters", masks.mean(0))]
    top += [("half of the masks, tint: 10-90 %", scan.consensus(ensemble.mean(0)), None), *scan.agreement(ensemble)]
    rows = [cells[i:i + 8] for cells in (small.raters(masks), small.members(ensemble[:max_members]))
            for i in range(0, len(cells), 8)]
    more = f"; the first {max_members} are shown" if len(ensemble) > max_members else ""
    return _page([(name, TITLE), (_facts(masks, ensemble) + more, TEXT), top, *rows])


def panel(cases: Sequence[Case], ensembles: Sequence[np.ndarray], title: str = "") -> Image.Image:
    """Cases below one another, a row each: scan, raters, members, their probability and spread, as a PIL picture.

    Up to 4 raters have a tile each; where a case has more, those of every case share one.

    :param cases: name, image [C, H, W] in [0, 1], masks [R, H, W] bool.
    :param ensembles: [n, H, W] bool, one a case; n may be 0.
    """
    most, members = (max(map(len, group)) for group in ([case.raters for case in cases], ensembles))
    bands = [(title, TITLE)] if title else []
    for i, (case, ensemble) in enumerate(zip(cases, ensembles), 1):
        scan = _Scan(case.image, case.raters, ensemble, IN_PANEL)
        raters = [("raters", scan.outlined(case.raters), None)] if most > 4 else _filled(scan.raters(case.raters), most)
        shares = scan.agreement(ensemble) if len(ensemble) else []
        if i < len(cases):  # one colour bar serves the column
            shares = [(name, tile, None) for name, tile, _ in shares]
        bands += [(f"{case.name}: {_facts(case.raters, ensemble)}", TEXT),
                  [("scan", scan.whole(), None), *raters, *_filled(scan.members(ensemble), members), *shares]]
    return _page(bands)


def film(title: str, frames: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> Image.Image:
    """What a sampler makes of noise, as a PIL picture: x_t above, the x_0 predicted from it below.

    :param frames: (number of the step, x_t, x_0), both [H, W] float, a mask being from 0 to 1.
    """
    rows = [[], []]
    for step, x_t, x_start in frames:
        for row, name, values in ((rows[0], "x_t", (x_t + 2) / 4), (rows[1], "x_0", x_start)):  # noise is within +-2
            tile = _scaled(np.round(np.clip(values, 0, 1) * 255.0).astype(np.uint8), SMALL)
            row.append((f"{name} at step {step}", tile[..., None].repeat(3, 2), None))
    return _page([(title, TITLE), *rows])


def stack(pages: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    whole = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), "white")
    y = 0
    for page in pages:
        whole.paste(page, (0, y))
        y += page.height
    return whole


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    """The picture in the bytes of a PNG file."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def _facts(masks, ensemble):
    """What a heading says: how many, how large, how good."""
    text = f"{len(masks)} rater{'s' * (len(masks) != 1)}"
    if len(ensemble):
        text += f", {len(ensemble)} mask{'s' * (len(ensemble) != 1)}"
    if len(ensemble) > 1:
        low, middle, high = np.percentile(ensemble.sum((1, 2)), [5, 50, 95])
        text += f"; median area {middle:.0f} px, 90 % within {low:.0f} to {high:.0f}"
    if len(masks) and len(ensemble):
        scores = metrics.Agreement(ensemble, masks)
        text += f"; GED {scores.ged():.3f}, D_max {scores.d_max():.3f}, CI {scores.ci():.3f}"
    return text


# ---- tiles: [h, w, 3] uint8, the longer side as asked for; cells: (title, tile, end of its colour bar or None) ----

class _Scan:
    """The scan of a case, and whatever is shown over it."""

    def __init__(self, image, masks, ensemble, side):
        self.grey = np.round(np.clip(image[0], 0, 1) * 255.0).astype(np.uint8)
        self.side, self.window = side, _window(masks.any(0) | ensemble.any(0))
        self.detail = _scaled(self.grey[self.window], side)[..., None].repeat(3, 2)

    def whole(self):
        """The whole scan, with a frame around the detail."""
        picture = Image.fromarray(_scaled(self.grey, self.side)).convert("RGB")
        scale = self.side / max(self.grey.shape)
        (top, bottom), (left, right) = ((round(part.start * scale), round(part.stop * scale)) for part in self.window)
        if self.grey[self.window].size < self.grey.size:
            ImageDraw.Draw(picture).rectangle([left, top, right - 1, bottom - 1], outline="white")
        return np.asarray(picture)

    def raters(self, masks):
        return [(f"rater {i}: {_area(mask)}", self.outlined([mask], first=i), None) for i, mask in enumerate(masks)]

    def members(self, masks):
        return [(f"mask {i}: {_area(mask)}", self.outlined([mask], [ENSEMBLE]), None) for i, mask in enumerate(masks)]

    def agreement(self, ensemble):
        return [self.share("probability", ensemble.mean(0)), self.share("spread (std)", ensemble.std(0), 0.5)]

    def outlined(self, masks, colours=OUTLINES, first=0):
        """The detail with the border of every mask, in colours[first] and on. Where several meet, they take turns;
        those in the second round of colours are dashed."""
        pixels = self.detail.copy()
        if len(masks):
            y, x = np.indices(pixels.shape[:2])
            place = (x + 2 * y) // 9  # which changes along any border
            borders = np.stack([_edge(self._nearest(mask)) & (place % (1 + i // len(colours)) == 0)
                                for i, mask in enumerate(masks)])  # [masks, h, w]
            count = borders.sum(0)
            chosen = (borders.cumsum(0) > place % np.maximum(count, 1)).argmax(0)  # [h, w], number of a mask
            palette = np.array([colours[i % len(colours)] for i in range(first, first + len(masks))], np.uint8)
            pixels[count > 0] = palette[chosen[count > 0]]
        return pixels

    def consensus(self, mean):
        """The detail with the border of where mean [H, W] is 0.5 or more, and a tint where it is 0.1 to 0.9."""
        pixels, unsure = self.detail.copy(), self._nearest((mean >= 0.1) & (mean <= 0.9))
        pixels[unsure] = pixels[unsure] * 0.6 + np.array(ENSEMBLE) * 0.4
        pixels[_edge(self._nearest(mean >= 0.5))] = ENSEMBLE
        return pixels

    def share(self, title, values, most=1):
        """The cell of values [H, W] from 0 to `most`."""
        return title, coloured(self._nearest(values) / most), most

    def _nearest(self, values):
        """[H, W] -> the detail of it at the size of a tile, [h, w]; where that is smaller, the least speck stays."""
        values = values[self.window]
        step = -(-max(values.shape) // self.side)
        for axis in (0, 1):
            values = np.maximum.reduceat(values, range(0, values.shape[axis], step), axis)
        rows, columns = (np.arange(size) * length // size for size, length in zip(self.detail.shape, values.shape))
        return values[rows[:, None], columns]


def _scaled(grey, side):
    """[H, W] uint8 -> [h, w], max(h, w) = side, smooth."""
    size = [max(1, round(length * side / max(grey.shape))) for length in grey.shape[::-1]]
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC))


def _window(marked):
    """Slices of a square around all that is marked, [H, W] bool, cut off at the edges; of everything, if nothing is."""
    if not marked.any():
        return tuple(slice(0, length) for length in marked.shape)
    bounds = [np.flatnonzero(marked.any(axis))[[0, -1]] + [0, 1] for axis in (1, 0)]
    side = max(FEWEST, round(1.5 * max(high - low for low, high in bounds)))
    starts = [int(max(0, min((low + high - side) // 2, length - side)))
              for (low, high), length in zip(bounds, marked.shape)]
    return tuple(slice(start, min(start + side, length)) for start, length in zip(starts, marked.shape))


def _edge(mask):
    """The pixels on both sides of the edge of a mask, [h, w] bool."""
    near = np.pad(mask, 1)
    parts = near[1:-1, :-2], near[1:-1, 2:], near[:-2, 1:-1], near[2:, 1:-1], mask
    return np.logical_or.reduce(parts) & ~np.logical_and.reduce(parts)


def _area(mask):
    area = mask.sum()
    return f"{area / 1000:.0f}k px" if area >= 100_000 else f"{area} px" if area else "empty"


def _filled(cells, count):
    return cells + [None] * (count - len(cells))


# ---- the page ----

def _page(bands):
    """Bands below one another on white: (text, size of letters), or a list of cells, of which None leaves a gap."""
    sides = [max(max(cell[1].shape) for cell in band if cell) if isinstance(band, list) else 0 for band in bands]
    width = max(600, *(MARGIN + len(band) * (side + MARGIN) for band, side in zip(bands, sides) if side))
    bands = [band if side else (_lines(*band, width - 2 * MARGIN), band[1]) for band, side in zip(bands, sides)]
    heights = [LINE + MARGIN + max(len(cell[1]) + (cell[2] is not None) * (BAR + LINE) for cell in band if cell)
               if side else len(band[0]) * (band[1] + 6) for band, side in zip(bands, sides)]
    page = Image.new("RGB", (width, 2 * MARGIN + sum(heights)), "white")
    draw, y = ImageDraw.Draw(page), MARGIN
    for band, side, height in zip(bands, sides, heights):
        if side:
            for j, cell in enumerate(band):
                if cell:
                    _draw_cell(page, draw, MARGIN + j * (side + MARGIN), y, *cell)
        else:
            for i, line in enumerate(band[0]):
                draw.text((MARGIN, y + i * (band[1] + 6)), line, "black", font(band[1]))
        y += height
    return page


def _draw_cell(page, draw, x, y, title, tile, most):
    draw.text((x, y), title, "black", font(TEXT))
    (height, width), y = tile.shape[:2], y + LINE
    page.paste(Image.fromarray(tile), (x, y))
    draw.rectangle([x - 1, y - 1, x + width, y + height], outline=(170, 170, 170))
    if most is not None:
        y += height + 3
        page.paste(Image.fromarray(coloured(np.linspace(0, 1, width)[None].repeat(BAR, 0))), (x, y))
        for share, anchor in ((0, "la"), (0.5, "ma"), (1, "ra")):
            draw.text((x + share * width, y + BAR + 1), f"{share * most:g}", "black", font(TEXT), anchor)


def _lines(text, size, width):
    """The text in lines of at most this many pixels, broken anywhere."""
    lines = [""]
    for letter in map(drawable, text):
        if lines[-1] and font(size).getlength(lines[-1] + letter) > width:
            lines.append("")
        lines[-1] += letter
    return lines
