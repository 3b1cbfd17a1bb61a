"""One picture of a case: the scan, its raters, the ensemble, and where they agree."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, TITLE = 10, 22  # pixels
FONT = ImageFont.load_default(15)
# colour-blind-safe: the sequential map runs from dark blue to yellow, the outlines are Okabe and Ito's colours
MAP = np.array([[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]], float)
OUTLINES = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167)]


def case_montage(name, image, masks, ensemble, max_members=24):
    """The montage of one case, as a PIL picture.

    First row: scan, raters' outlines, share of raters, share of the ensemble (probability), twice its spread (at most
    0.5); below, every rater's mask in the colour of their outline, then the members' (the first max_members).

    :param image: [C, H, W] in [0, 1], of which the first channel is shown.
    :param masks: [R, H, W] bool, R may be 0.
    :param ensemble: [n, H, W] bool.
    """
    side = image.shape[-1]
    scale = max(1, -(-160 // side))
    scan = _grey(image[0], scale)
    top = [("scan", scan)]
    if len(masks):
        top += [("raters' outlines", _outlined(scan, masks, scale)),
                ("share of raters", _coloured(masks.mean(0), scale))]
    top += [("probability", _coloured(ensemble.mean(0), scale)),
            ("2 x spread", _coloured(2 * ensemble.std(0), scale)), (None, _colour_bar(side * scale))]
    rows = [top]
    raters = [(f"rater {i}", _tinted(mask, i, scale)) for i, mask in enumerate(masks)]
    members = [(f"member {i}", _grey(mask, scale)) for i, mask in enumerate(ensemble[:max_members])]
    columns = max(len(top) - 1, min(8, max(len(raters), len(members))))
    for cells in (raters, members):
        rows += [cells[i:i + columns] for i in range(0, len(cells), columns)]
    if len(ensemble) > max_members:
        name = f"{name}: the first {max_members} of {len(ensemble)} members"
    return _grid(name, rows, side * scale, columns)


def stack(pages):
    """Pictures one below the other."""
    whole = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), "white")
    y = 0
    for page in pages:
        whole.paste(page, (0, y))
        y += page.height
    return whole


def png(picture):
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _grid(title, rows, cell, columns):
    """Rows of (title, [H, W, 3] uint8) on a white page."""
    width = MARGIN + columns * (cell + MARGIN) + 70  # room for the colour bar
    width = max(width, 2 * MARGIN + int(FONT.getlength(title)) + 1)
    height = TITLE + 2 * MARGIN + len(rows) * (cell + TITLE + MARGIN)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, "black", FONT)
    for i, row in enumerate(rows):
        y = TITLE + 2 * MARGIN + i * (cell + TITLE + MARGIN)
        for j, (text, pixels) in enumerate(row):
            x = MARGIN + j * (cell + MARGIN)
            if text is None:
                _paste_bar(page, draw, pixels, x, y + TITLE)
                continue
            draw.text((x, y), text, "black", FONT)
            page.paste(Image.fromarray(pixels), (x, y + TITLE))
            draw.rectangle([x - 1, y + TITLE - 1, x + cell, y + TITLE + cell], outline=(170, 170, 170))
    return page


def _paste_bar(page, draw, pixels, x, y):
    page.paste(Image.fromarray(pixels), (x, y))
    for share, label in ((0, "1"), (0.5, "0.5"), (1, "0")):
        draw.text((x + pixels.shape[1] + 5, y + share * (len(pixels) - 16)), label, "black", FONT)


def _enlarge(pixels, scale):
    return pixels.repeat(scale, 0).repeat(scale, 1)


def _grey(values, scale):
    """[H, W] in [0, 1] or bool -> [sH, sW, 3] uint8."""
    pixels = np.round(np.clip(values, 0, 1) * 255.0).astype(np.uint8)
    return _enlarge(pixels, scale)[..., None].repeat(3, 2)


def _tinted(mask, i, scale):
    """[H, W] bool -> [sH, sW, 3] uint8, foreground in the colour of outline i."""
    return _enlarge(mask[..., None] * np.array(OUTLINES[i % len(OUTLINES)], np.uint8), scale)


def _coloured(values, scale):
    """[H, W] in [0, 1] -> [sH, sW, 3] uint8."""
    place = np.clip(values, 0, 1) * (len(MAP) - 1)
    low = np.minimum(place.astype(int), len(MAP) - 2)
    pixels = MAP[low] + (place - low)[..., None] * (MAP[low + 1] - MAP[low])
    return _enlarge(pixels.round().astype(np.uint8), scale)


def _colour_bar(height, width=18):
    return _coloured(np.linspace(1, 0, height)[:, None].repeat(width, 1), 1)


def _outlined(scan, masks, scale):
    """The enlarged scan with the border of every mask in a colour of its own."""
    pixels = scan.copy()
    for i, mask in enumerate(masks):
        inside = np.pad(_enlarge(mask, scale), 1)
        core = inside[1:-1, :-2] & inside[1:-1, 2:] & inside[:-2, 1:-1] & inside[2:, 1:-1]
        pixels[inside[1:-1, 1:-1] & ~core] = OUTLINES[i % len(OUTLINES)]
    return pixels
