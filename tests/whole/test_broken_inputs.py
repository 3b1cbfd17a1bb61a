"""A corpus of odd and broken files: each is read as it was meant, or refused by name with a remedy."""

import io
import os
import re
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.files import ROOT, save
from helpers.refusals import problems_of
from PIL import Image

from guided_diffusion.data.cases import SegmentationCases

SIZE = 16
GREY = np.arange(256, dtype=np.uint8).reshape(SIZE, SIZE)
DISC = np.hypot(*(np.mgrid[:SIZE, :SIZE] - np.array([8, 7]).reshape(2, 1, 1))) < 5
LABEL = DISC * np.uint8(255)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], -1)
SMOOTH = np.broadcast_to(np.arange(60, 220, 10, dtype=np.uint8), (SIZE, SIZE))  # survives JPEG


# ---- writers of files ----

def good(case):
    """A case that is read; the rows below spoil it."""
    save(case / "image_0.png", GREY)
    save(case / "label0_.png", LABEL)


def encoded(pixels, format, **options):
    """The bytes of pixels, or of a Pillow picture, as a file."""
    buffer = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, interlace=0, extra=b""):
    """A PNG with a header of one's own choice; rows are its bytes before compression, or so many zeros."""
    squeeze = zlib.compressobj(9)
    parts = [bytes(1 << 16)] * -(-rows >> 16) if isinstance(rows, int) else [rows]
    data = b"".join([*map(squeeze.compress, parts), squeeze.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def rows_of(pixels):
    """The rows of a PNG before compression, each after its filter, none."""
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def interlaced(pixels):
    """A grey PNG in Adam7's seven passes."""
    passes = (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)
    return png(SIZE, SIZE, 8, 0, b"".join(rows_of(pixels[y::dy, x::dx]) for y, x, dy, dx in passes), interlace=1)


def jpeg_of_size(width, height):
    """A JPEG whose header claims another size."""
    data = bytearray(encoded(SMOOTH, "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5:place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_alpha(colour, alpha):
    """A Pillow picture of mode LA or RGBA."""
    picture = Image.fromarray(colour)
    picture.putalpha(Image.fromarray(alpha))
    return picture


def palette(indices, colours, **options):
    """The bytes of a palette PNG."""
    picture = Image.fromarray(indices.astype(np.uint8)).convert("P")
    picture.putpalette(sum(colours, []))
    return encoded(picture, "PNG", **options)


def frames(format):
    return encoded(GREY, format, save_all=True, append_images=[Image.fromarray(255 - GREY)], duration=50)


def image(data):
    """A row's writer: this is the scan."""
    return lambda case: (case / "image_0.png").write_bytes(data)


def label(data, name="label0_.png"):
    """A row's writer: this is the mask."""
    return lambda case: ((case / "label0_.png").unlink(), (case / name).write_bytes(data))


def both(scan, mask):
    return lambda case: (image(scan)(case), label(mask)(case))


def jpegs(data):
    """A row's writer: this is the scan, called .jpg."""
    return lambda case: ((case / "image_0.png").unlink(), (case / "image_0.jpg").write_bytes(data))


def put(name, make, instead_of=None):
    """A row's writer: make(path) for a file of this name, in the place of another."""
    def write(case):
        if instead_of:
            (case / instead_of).unlink()
        make(case / name)
    return write


def link_to(target):
    return lambda path: path.symlink_to(target)


def renamed(name):
    return lambda case: case.rename(case.parent / name)


def unreadable(case):
    (case / "image_0.png").chmod(0)
    if os.access(case / "image_0.png", os.R_OK):
        pytest.skip("this user may read every file")


# ---- outcomes ----

def read(scan=GREY / 255, masks=DISC, off=1e-6):
    """A row's outcome: scan [H, W] or [H, W, C] up to `off`, as JPEG is lossy, and masks [H, W] or [R, H, W]."""
    def check(case):
        image = np.atleast_3d(np.asarray(scan, np.float32)).transpose(2, 0, 1)
        found, = SegmentationCases(case.parent, SIZE, image_channels=len(image))
        assert np.abs(found.image - image).max() <= off
        assert np.array_equal(found.raters, np.reshape(masks, (-1, SIZE, SIZE)))
    return check


def refused(where, why):
    """A row's outcome: the file or folder at `where`, seen from the case, is named, followed by words that match."""
    def check(case):
        message = problems_of(case.parent, SIZE)
        path = os.path.normpath(case / where)
        assert re.search(rf"(^|\n  ){re.escape(path if path.isprintable() else repr(path))}: .*{why}", message), message
        assert all(line.isprintable() for line in message.split("\n"))
    return check


# ---- the corpus ----

PNG, JPEG = encoded(GREY, "PNG"), encoded(SMOOTH, "JPEG", quality=95)
MASK = encoded(LABEL, "PNG")
OPAQUE, CLEAR = np.full((SIZE, SIZE), 255, np.uint8), np.zeros((SIZE, SIZE), np.uint8)
GREY16 = GREY * np.uint16(257) + np.uint16(3) * (GREY < 200)
CMYK = np.stack([255 - SMOOTH] * 3 + [CLEAR], -1)
BOMB = png(30_000, 30_000, 1, 0, 30_000 * 3751)  # true to its word, in 110 kB
DICOM = bytes(128) + b"DICM" + bytes(64)
FLIPPED = bytearray(MASK)
FLIPPED[MASK.index(b"IDAT") + 14] ^= 4

# each row: what is written over a good case, and what comes of it
CORPUS = {
    # pictures of other kinds that say what they mean
    "16-bit grey": (image(encoded(GREY16, "PNG")), read(GREY16 / 65535)),
    "16-bit label": (label(encoded(DISC * np.uint16(65535), "PNG")), read()),
    "16-bit colour": (image(png(SIZE, SIZE, 16, 2, rows_of((COLOURS * np.uint16(257)).astype(">u2")))),
                      read(COLOURS / 255)),
    "1-bit label": (label(encoded(DISC, "PNG")), read()),
    "1-bit scan": (image(encoded(DISC, "PNG")), read(DISC)),
    "4-bit grey": (image(png(SIZE, SIZE, 4, 0, b"".join(b"\0" + bytes(range(1, 16, 2)) for _ in range(SIZE)))),
                   read(np.tile(np.stack([np.zeros(8), np.arange(1, 16, 2)], -1).reshape(-1) / 15, (SIZE, 1)))),
    "palette scan": (image(palette(GREY, [[255 - i] * 3 for i in range(256)])), read((255 - GREY) / 255)),
    "palette label": (label(palette(DISC, [[0, 0, 0], [200, 0, 0]])), read()),
    "palette label with a clear background": (label(palette(DISC, [[0, 0, 0], [0, 255, 0]], transparency=0)), read()),
    "palette label with alpha as bytes": (label(palette(DISC, [[9, 9, 9], [0, 255, 0]], transparency=b"\0\xff")),
                                          refused("label0_.png", "has colours where it is transparent")),
    "grey label with a transparent value": (label(encoded(LABEL, "PNG", transparency=0)), read()),
    "RGB scan whose channels are equal": (image(encoded(np.stack([GREY] * 3, -1), "PNG")), read()),
    "RGB scan": (image(encoded(COLOURS, "PNG")), read(COLOURS / 255)),
    "interlaced PNG": (both(interlaced(GREY), interlaced(LABEL)), read()),
    "progressive JPEG": (jpegs(encoded(SMOOTH, "JPEG", quality=95, progressive=True)), read(SMOOTH / 255, off=0.02)),
    "CMYK JPEG": (jpegs(encoded(Image.fromarray(CMYK, "CMYK"), "JPEG", quality=95)), read(SMOOTH / 255, off=0.03)),
    "colour JPEG": (jpegs(encoded(np.stack([SMOOTH] * 3, -1), "JPEG", quality=95)), read(SMOOTH / 255, off=0.02)),
    "JPEG label": (label(encoded(LABEL, "JPEG", quality=95), "label0_.jpg"), read()),
    "PNG with bytes after its end": (image(PNG + b"tail"), read()),
    "JPEG with bytes after its end": (jpegs(JPEG + bytes(99)), read(SMOOTH / 255, off=0.02)),

    # transparency
    "LA scan, opaque": (image(encoded(with_alpha(GREY, OPAQUE), "PNG")), read()),
    "RGBA scan, opaque": (image(encoded(with_alpha(COLOURS, OPAQUE), "PNG")), read(COLOURS / 255)),
    "RGBA scan, all of it clear": (image(encoded(with_alpha(COLOURS, CLEAR), "PNG")), read(COLOURS / 255)),
    "LA scan, clear where it is black": (image(encoded(with_alpha(GREY * DISC, LABEL), "PNG")),
                                         read(GREY * DISC / 255)),
    "LA scan, clear where it is not": (image(encoded(with_alpha(GREY, LABEL), "PNG")),
                                       refused("image_0.png", "has colours where it is transparent.* save it without")),
    "label in the alpha of white": (label(encoded(with_alpha(OPAQUE, LABEL), "PNG")), read()),
    "label in the alpha of black": (label(encoded(with_alpha(CLEAR, LABEL), "PNG")), read()),
    "label in the alpha of red": (label(encoded(with_alpha(np.uint8([[[255, 0, 0]]]) + np.zeros_like(COLOURS), LABEL),
                                                "PNG")), read()),
    "red label on clear black": (label(encoded(with_alpha(LABEL[..., None] * np.uint8([1, 0, 0]), LABEL), "PNG")),
                                 read()),
    "red label on clear white": (label(encoded(with_alpha(np.where(DISC[..., None], [255, 0, 0], 255).astype(np.uint8),
                                                          LABEL), "PNG")),
                                 refused("label0_.png", "has colours where it is transparent.* save it without")),
    "empty label, clear": (label(encoded(with_alpha(CLEAR, CLEAR), "PNG")), read(masks=DISC & False)),

    # labels with other values
    "label of 0 and 1": (label(encoded(DISC.astype(np.uint8), "PNG")),
                         refused("label0_.png", "its brightest value is 1 of 255, .* write masks as 0 and 255")),
    "label of 0 and 1, a PNG called .jpg": (label(encoded(DISC.astype(np.uint8), "PNG"), "label0_.jpg"),
                                            refused("label0_.jpg", "its brightest value is 1 of 255")),
    "16-bit label of 0 and 255": (label(encoded(DISC * np.uint16(255), "PNG")),
                                  refused("label0_.png", "its brightest value is 255 of 65535")),
    "label of 0, 127 and 255": (label(encoded(np.where(GREY < 99, np.uint8(127), LABEL), "PNG")),
                                read(masks=DISC & (GREY >= 99))),  # above half of full scale
    "grey levels as a label": (label(PNG), read(masks=GREY > 127)),  # thresholded, as soft labels are
    "inverted label": (label(encoded(255 - LABEL, "PNG")), read(masks=~DISC)),  # nothing tells it from a large lesion
    "empty label": (label(encoded(CLEAR, "PNG")), read(masks=DISC & False)),
    "label of another size": (label(encoded(LABEL[:8], "PNG")),
                              refused("label0_.png", "is 16 x 8 pixels, but its image image_0.png is 16 x 16")),

    # sizes
    "1 x 1": (both(encoded(GREY[:1, :1], "PNG"), encoded(LABEL[:1, :1], "PNG")),
              refused("image_0.png", "is 1 x 1 pixels, but --image_size is 16; give --fit")),
    "65536 x 1": (image(encoded(np.zeros((1, 65536), np.uint8), "PNG")),
                  refused("label0_.png", "is 16 x 16 pixels, but its")),
    "65536 x 1, label as well": (both(*[encoded(np.zeros((1, 65536), np.uint8), "PNG")] * 2),
                                 refused("image_0.png", "is 65536 x 1 pixels, but --image_size is 16; give --fit")),
    "header of 30000 x 30000": (image(png(30_000, 30_000, 8, 2, b"")), refused("image_0.png", "claims to be larger")),
    "label's header of 30000 x 30000": (label(png(30_000, 30_000, 8, 6, b"")),
                                        refused("label0_.png", "claims to be larger")),
    "bomb of 30000 x 30000": (image(BOMB), refused("image_0.png", "claims to be larger than any.* make it smaller")),
    "bomb below the limit of Pillow": (image(png(9000, 9000, 1, 0, 9000 * 1126)),
                                       refused("image_0.png", "claims to be larger")),
    "header of 2147483647 x 2147483647": (image(png(2 ** 31 - 1, 2 ** 31 - 1, 16, 6, b"")),
                                          refused("image_0.png", "claims to be larger")),
    "JPEG's header of 65500 x 65500": (jpegs(jpeg_of_size(65500, 65500)),
                                       refused("image_0.jpg", "claims to be larger")),
    "PNG of 0 x 16": (image(png(0, 16, 8, 0, bytes(16))), refused("image_0.png", "cannot be read")),
    "PNG of 16 x 0": (image(png(16, 0, 8, 0, b"")), refused("image_0.png", "cannot be read")),
    "JPEG of 0 x 16": (jpegs(jpeg_of_size(0, 16)), refused("image_0.jpg", "cannot be read")),
    "a text of 20 MB in a PNG": (image(png(SIZE, SIZE, 8, 0, bytes(272), extra=chunk(
        b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20 << 20))))), refused("image_0.png", "cannot be read")),
    "a sparse file of 1 TB": (put("image_0.png", lambda path: os.truncate(path, 1 << 40)),
                              refused("image_0.png", "is 1099511627776 bytes long")),
    "zeros after the start of a JPEG": (image(b"\xff\xd8\xff" + bytes(10 ** 6)),
                                        refused("image_0.png", "cannot be read")),

    # other formats, and names that say otherwise
    "JPEG called .png": (image(JPEG), read(SMOOTH / 255, off=0.02)),
    "PNG called .jpg": (jpegs(PNG), read()),
    "empty JPEG label called .png": (label(encoded(CLEAR + np.uint8(9), "JPEG")), read(masks=DISC & False)),
    "text called .jpg": (jpegs(b"label0_, label1_\n" * 40),
                         refused("image_0.jpg", "cannot be read, since it is no picture")),
    "TIFF called .png": (image(encoded(GREY, "TIFF")),
        refused("image_0.png", "cannot be read, since it is a TIFF file, not one of JPEG, PNG; convert it")),
    "float TIFF called .png": (image(encoded(GREY.astype(np.float32), "TIFF")),
                               refused("image_0.png", "cannot .* TIFF file")),
    "BMP called .png": (image(encoded(GREY, "BMP")), refused("image_0.png", "cannot be read, since it is a BMP file")),
    "WebP called .png": (image(b"RIFF\x1a\0\0\0WEBPVP8L\r\0\0\0\x2f\0\0\0\x10\7\x10\x11\x11\x88\x88\xfe\7\0"),
                         refused("image_0.png", "cannot be read, since it is a WEBP file")),
    "DICOM called .png": (image(DICOM), refused("image_0.png", "cannot be read, since it is a DICOM file")),
    "NumPy called .png": (image(b"\x93NUMPY\1\0"), refused("image_0.png", "cannot be read, since it is a NumPy file")),
    "NIfTI called .png": (image(b"\x1f\x8b\x08\0" + bytes(90)), refused("image_0.png", "since it is a gzip file")),
    "PostScript called .png": (image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n"),
                               refused("image_0.png", "since it is a PostScript file")),
    "TIFF": (put("image_0.tif", lambda path: save(path, GREY), "image_0.png"), read()),
    "GIF called .png": (image(encoded(GREY, "GIF")), refused("image_0.png", "cannot be read, since it is a GIF file")),
    "animated GIF called .png": (image(frames("GIF")),
                                 refused("image_0.png", "cannot be read, since it is a GIF file")),
    "animated PNG": (image(frames("PNG")), refused("image_0.png", "holds 2 pictures; save the one that is meant")),
    "animated PNG as label": (label(frames("PNG")), refused("label0_.png", "holds 2 pictures")),
    "several pictures in a JPEG": (jpegs(frames("MPO")), refused("image_0.jpg", "holds 2 pictures")),
    "animated PNG of no pictures": (image(png(SIZE, SIZE, 8, 0, rows_of(GREY),
                                              extra=chunk(b"acTL", bytes(8)))), read()),

    # EXIF: viewers and annotation tools disagree about it, so nobody can know which way the label lies
    "JPEG that EXIF turns": (jpegs(encoded(SMOOTH, "JPEG", exif=turned(6))),
                             refused("image_0.jpg", "is stored turned or mirrored .EXIF.* save it upright")),
    "PNG that EXIF mirrors": (image(encoded(GREY, "PNG", exif=turned(2))), refused("image_0.png", "is stored turned")),
    "label that EXIF turns": (label(encoded(LABEL, "PNG", exif=turned(3))), refused("label0_.png", "is stored turned")),
    "EXIF that says upright": (image(encoded(GREY, "PNG", exif=turned(1))), read()),
    "damaged EXIF": (jpegs(encoded(SMOOTH, "JPEG", quality=95, exif=turned(1).tobytes()[:-9])),
                     read(SMOOTH / 255, off=0.02)),

    # damage
    "no bytes": (image(b""), refused("image_0.png", "cannot be read, since it is empty")),
    "label of no bytes": (label(b""), refused("label0_.png", "cannot be read, since it is empty")),
    "a signature and no more": (image(PNG[:8]), refused("image_0.png", r"cannot be read \(it is truncated\)")),
    "PNG cut in its header": (image(PNG[:20]),
                              refused("image_0.png", r"cannot be read \(it is truncated\); replace it")),
    "PNG cut in its pixels": (image(PNG[:70]), refused("image_0.png", r"cannot be read \(it is truncated\)")),
    "PNG cut before its end": (image(PNG[:-12]), refused("image_0.png", r"cannot be read \(it is truncated\)")),
    "JPEG cut in its header": (jpegs(JPEG[:100]),
                               refused("image_0.jpg", "cannot be read .*; replace it or remove its case")),
    "JPEG cut in its pixels": (jpegs(JPEG[:-60]), refused("image_0.jpg", "cannot be read .*[Tt]runcated")),
    "one bit flipped in the pixels of a PNG": (label(bytes(FLIPPED)),
                                               refused("label0_.png", "cannot be read .a wrong checksum")),
    "header flipped": (image(PNG[:17] + b"\xff" + PNG[18:]),
                       refused("image_0.png", "cannot be read .a wrong checksum")),
    "PNG without pixels": (image(PNG[:33] + PNG[-12:]), refused("image_0.png", "cannot be read")),
    "unknown colour type": (image(png(SIZE, SIZE, 8, 5, bytes(272))), refused("image_0.png", "cannot be read")),
    "line ends converted": (image(PNG.replace(b"\r\n", b"\n")),
                            refused("image_0.png", "cannot be read, since it is no picture")),

    # what is no file
    "unreadable": (unreadable, refused("image_0.png", "cannot be read .Permission denied")),
    "dangling link": (put("label0_.png", link_to("gone.png"), "label0_.png"),
                      refused("label0_.png", "cannot be read .No such")),
    "link to itself": (put("label0_.png", link_to("label0_.png"), "label0_.png"),
                       refused("label0_.png", "cannot be read")),
    "link to a good file": (put("label1_.png", link_to("label0_.png")), read(masks=[DISC, DISC])),
    "dangling link to a case": (lambda case: (case.parent / "b").symlink_to("gone"),
                                refused("../b", "is a link to nothing")),
    "folder that links back": (lambda case: (case / "loop").symlink_to(".."),
                               refused("loop", "is a link to a folder that it")),
    "folders that link to each other": (lambda case: (good(case.parent / "b"), (case / "x").symlink_to("../b"),
                                                      (case.parent / "b" / "y").symlink_to("../case")),
                                        refused("x/y", "is a link to a folder that it lies in; remove it")),
    "folder called image_0.png": (put("image_0.png", Path.mkdir, "image_0.png"), refused("image_0.png", "no image")),
    "pipe": (put("label0_.png", os.mkfifo, "label0_.png"), refused("label0_.png", "is a pipe, device, folder")),
    "pipe as scan": (put("image_0.png", os.mkfifo, "image_0.png"), refused("image_0.png", "is a pipe, device, folder")),
    "link to /dev/zero": (put("image_0.png", link_to("/dev/zero"), "image_0.png"),
                          refused("image_0.png", "is a pipe, device")),

    # names
    "spaces": (renamed("Fall 7 (links)"), read()),
    "composed letters": (renamed(unicodedata.normalize("NFC", "größer é")), read()),
    "decomposed letters": (renamed(unicodedata.normalize("NFD", "größer é")), read()),
    "composed beside decomposed": (lambda case: [good(case.parent / name) for name in ("\u00e9", "e\u0301")],
                                   refused("../\u00e9", "names the same case as .*; rename one")),
    "leading dashes": (renamed("--help"), read()),
    "two dots and more": (renamed("a..b.."), read()),
    "backslashes": (renamed("a\\..\\b"), read()),
    "a name of 200 bytes": (renamed("n" * 200), read()),
    "a name of 201 bytes": (renamed("n" * 199 + "é"),
                            refused(f"../{'n' * 199}é", "names its case by 201 bytes; rename it")),
    "names that add up to too much": (lambda case: good(case.parent / ("n" * 150) / ("m" * 60)),
                                      refused(f"../{'n' * 150}/{'m' * 60}", "names its case by 211 bytes")),
    "newline in a case": (renamed("a\nb"), refused("../a\nb", "has control characters in its name.* rename it")),
    "escape sequence in a case": (renamed("a\x1b[2J"), refused("../a\x1b[2J", "has control characters")),
    "newline in a file": (put("label1_\n.png", lambda path: save(path, LABEL)),
                          refused("label1_\n.png", "has control char")),
    "bytes that are no UTF-8": (renamed(os.fsdecode(b"caf\xe9")),
                                refused(os.fsdecode(b"../caf\xe9"), "bytes that are not UTF-8")),
    "names that meet when joined": (lambda case: (good(case.parent / "a_b"), good(case.parent / "a" / "b")),
                                    refused("../a_b", "names the same case as .*; rename one")),

    # folders
    "empty folder": (lambda case: (case.parent / "b").mkdir(), refused("../b", "no image .a file called")),
    "folder with labels only": (lambda case: (case / "image_0.png").unlink(),
                                refused("", "no image .a file called image_")),
    "folder with a scan only": (lambda case: (case / "label0_.png").unlink(),
                                refused("", "no labels .files called label0_")),
    "grey and colour files together": (put("image_1.png", lambda path: save(path, COLOURS)),
                                       read(np.concatenate([GREY[..., None], COLOURS], -1) / 255)),
    "too many channels": (lambda case: [save(case / f"image_{i}.png", COLOURS) for i in (1, 2)],
                          refused("image_0.png", "7 channels in the image.s. of this case, but --image_channels is")),
    "image files of different sizes": (put("image_1.png", lambda path: save(path, GREY[:8])),
                                       refused("image_1.png", "is 16 x 8 pixels, but the first image of its case")),
    "two files of one rater": (put("label0_b.png", lambda path: save(path, LABEL)),
                               refused("label0_b.png", "second label0")),
}


@pytest.mark.parametrize("spoil, outcome", CORPUS.values(), ids=list(CORPUS))
@pytest.mark.filterwarnings("error", "ignore::UserWarning:PIL")  # as datasets has it, which pytest forgets
def test_each_input_is_read_as_meant_or_refused_by_name(tmp_path, capfd, spoil, outcome):
    good(tmp_path / "data" / "case")
    spoil(tmp_path / "data" / "case")
    outcome(tmp_path / "data" / "case")
    assert capfd.readouterr() == ("", "")


def test_the_corpus_is_large_and_shows_both_outcomes():
    outcomes = [outcome.__qualname__.split(".")[0] for _, outcome in CORPUS.values()]
    assert len(outcomes) >= 120 and min(outcomes.count("read"), outcomes.count("refused")) >= 40


def test_all_broken_files_among_good_ones_are_named_at_once(tmp_path):
    rows = ["bomb of 30000 x 30000", "pipe", "link to /dev/zero", "dangling link", "animated PNG", "TIFF called .png",
            "label of 0 and 1", "red label on clear white", "PNG that EXIF mirrors", "JPEG cut in its pixels",
            "empty folder", "folder with a scan only", "DICOM called .png", "no bytes"]
    for i, row in enumerate(rows):
        good(tmp_path / f"{i:02}" / "case")
        good(tmp_path / f"{i:02}" / "good")
        CORPUS[row][0](tmp_path / f"{i:02}" / "case")
    first, *lines = problems_of(tmp_path, SIZE).split("\n")
    assert first == f"{len(rows)} problems in {tmp_path}:" and len(lines) == len(rows)
    for i, line in enumerate(lines):
        assert line.startswith(f"  {tmp_path / f'{i:02}'}{os.sep}") and "good" not in line


def test_all_wrong_names_are_named_at_once(tmp_path):
    for row in ("newline in a case", "a name of 201 bytes", "names that meet when joined", "dangling link to a case",
                "folder that links back", "bytes that are no UTF-8", "newline in a file"):
        good(tmp_path / row / "case")
        CORPUS[row][0](tmp_path / row / "case")
    assert problems_of(tmp_path, SIZE).startswith(f"7 problems in {tmp_path}:\n")


# ---- the scripts ----

RUN = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open("peak", "w") as file:
        file.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10))
"""


@pytest.fixture
def script(environment, tmp_path, trained, tiny):
    """script(name) runs a script on tmp_path/data; returns code, stderr and the most memory it had, in MB."""
    flags = {"segmentation_sample.py": ["--model_path", trained / "savedmodel.pt", "--num_ensemble", "1",
                                        "--sampling_steps", "2"],
             "segmentation_train.py": [*tiny, "--num_filters", "4,8", "--max_steps", "1"]}

    def run(name):
        argv = [sys.executable, "-c", RUN, ROOT / "scripts" / name, *flags[name], "--data_dir", tmp_path / "data",
                "--results_dir", tmp_path / "results", "--visdom_port", "0"]
        result = subprocess.run(list(map(str, argv)), env=environment, cwd=tmp_path, capture_output=True, text=True,
                                timeout=60)
        return result.returncode, result.stderr, int((tmp_path / "peak").read_text())

    return run


@pytest.mark.parametrize("name, others", [
    ("segmentation_train.py", ""),
    pytest.param("segmentation_sample.py", "; all other cases (3) are complete in {}", marks=pytest.mark.long)])
def test_the_nastiest_end_a_script_without_a_traceback_or_much_memory(script, tmp_path, name, others):
    rows = ["pipe", "link to /dev/zero", "bomb of 30000 x 30000", "JPEG's header of 65500 x 65500",
            "zeros after the start of a JPEG", "a sparse file of 1 TB"]
    data = tmp_path / "data"
    for row in ("PNG called .jpg", "damaged EXIF", "animated PNG of no pictures"):  # Pillow warns of some of these
        good(data / row / "case")
        CORPUS[row][0](data / row / "case")
    code, err, usual = script(name)
    assert code == 0 and "Warning" not in err
    for row in rows:
        good(data / row / "case")
        CORPUS[row][0](data / row / "case")
    code, err, peak = script(name)
    others = others.format(tmp_path / "results")
    assert code == 2 and "Traceback" not in err and f": error: {len(rows)} problems in {data}{others}:\n" in err
    assert err.count("\n") == len(rows) + 1 and "Warning" not in err
    assert peak < usual + 100
