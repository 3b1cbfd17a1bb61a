"""One picture file -> an array.

What a file holds is told from its bytes, not from its name: a whole upright picture is read, all else is refused by
name, before memory is spent on it.
"""

import io
import re
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..system.errors import InputError

MAX_PIXELS = 1 << 26  # of one picture, 8192 x 8192; what claims to hold more is refused
MAX_BYTES = 1 << 28  # of one file

# how files begin that people take for images
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"II*\0": "TIFF", b"MM\0*": "TIFF",
               b"II+\0": "TIFF", b"MM\0+": "TIFF", b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WEBP", b"8BPS": "Photoshop",
               b"%PDF": "PDF", b"%!PS": "PostScript", b"\0\0\0\x0cjP": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000",
               b"\x93NUMPY": "NumPy", b"PK": "ZIP", b"\x1f\x8b": "gzip", b"\x89HDF": "HDF5"}
_TURNED = re.compile(rb"\x01\x12\0\x03\0{3}\x01\0[\x02-\x08]|\x12\x01\x03\0\x01\0{3}[\x02-\x08]\0")  # in EXIF data
warnings.filterwarnings("ignore", module=r"PIL\.")  # pictures it warns of are refused or read all the same


def decode(path: Path, formats: tuple[str, ...] = ("JPEG", "PNG"), any_number: bool = False) -> np.ndarray:
    """One picture as an array: [H, W] or [H, W, 3], uint8 or uint16. For transparency see _without_alpha.

    :param formats: those that are read, whatever the file is called.
    :param any_number: read pictures of int32 and float32, too.
    :raises InputError: naming the file, for anything but a whole, upright picture in one of them.
    """
    data = _read_bytes(path)
    found = _format(data)
    if found not in formats:
        what = f"a {found} file" if found else "no picture" if data else "empty"
        raise InputError(f"{path}: cannot be read, since it is {what}, not one of {', '.join(formats)}; convert it, or"
                         f" remove its case")
    try:
        if found == "PNG":
            _check_sums(data)
        with Image.open(io.BytesIO(data), formats=(found,)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if getattr(picture, "n_frames", 1) > 1:
                raise InputError(f"{path}: holds {picture.n_frames} pictures; save the one that is meant by itself")
            if found == "TIFF" and max(bits := picture.tag_v2.get(258, (1,))) > 8 and len(bits) > 1:
                raise InputError(f"{path}: is a colour picture of {max(bits)} bits; save it with 8 bits, or as one grey"
                                 f" picture a channel")
            picture.load()
            if _TURNED.search(picture.info.get("exif", b"")):
                raise InputError(f"{path}: is stored turned or mirrored (EXIF orientation), so that scan and labels may"
                                 f" not lie on each other; save it upright, without that mark")
            pixels = pixels_of(picture, path)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{path}: claims to be larger than any image this reads ({MAX_PIXELS} pixels); replace it or"
                         f" make it smaller") from None
    except Exception as error:  # Pillow raises almost anything on a damaged file
        reason = "damaged" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{path}: cannot be read ({reason}); replace it or remove its case") from None
    if pixels.dtype.kind in "if" and not any_number:
        kind = "floating-point numbers" if pixels.dtype.kind == "f" else "numbers of more than 16 bits"
        raise InputError(f"{path}: holds {kind}; write it with 8 or 16 bits")
    return pixels


def format_of(path: Path) -> str | None:
    """What kind of file this is, "PNG", "JPEG" or another; None if unknown."""
    return _format(_read_bytes(path))


def _read_bytes(path):
    """The bytes of a file, unless it is none that ends (a pipe, a device) or one of absurd size."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is a pipe, device, folder or socket, not a file; replace it or remove its case")
        if status.st_size > MAX_BYTES:
            raise InputError(f"{path}: is {status.st_size} bytes long, but no image above {MAX_BYTES} is read; replace"
                             f" it or remove its case")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); replace it or remove its case") from None


def _format(data):
    """What kind of file begins with these bytes; None if unknown."""
    if data[128:132] == b"DICM":
        return "DICOM"
    return next((name for signature, name in _SIGNATURES.items() if data.startswith(signature)), None)


def _check_sums(data):
    """Raise ValueError unless this is a whole PNG file whose checksums are right; Pillow checks some of them."""
    place, kind = 8, b""
    while kind != b"IEND":
        if len(data) < place + 12:
            raise ValueError("it is truncated")
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if data[end:end + 4] != zlib.crc32(data[place + 4:end]).to_bytes(4):
            raise ValueError(f"a wrong checksum {place} bytes in" if end + 4 <= len(data) else "it is truncated")
        place = end + 4


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, 3] -> [c, H, W]; a colour picture whose channels are all equal counts as grey."""
    if pixels.ndim == 2:
        return pixels[None]
    if (pixels == pixels[..., :1]).all():
        return pixels[None, ..., 0]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def pixels_of(picture: Image.Image, name: str | Path) -> np.ndarray:
    """A Pillow picture as an array: [H, W] or [H, W, 3], uint8, uint16, int32 for one of numbers that are not of 16
    bits, or float32 for one of floating-point numbers.

    For transparency see _without_alpha; `name` is what messages call the picture.
    """
    if picture.mode == "F":
        return np.asarray(picture)
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow holds some of it in 32 bits
        pixels = np.asarray(picture)
        return pixels.astype(np.uint16 if pixels.min() >= 0 and pixels.max() <= 65535 else np.int32)
    grey = picture.mode in ("1", "L", "LA")
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("L" if grey else "RGB"))
    return _without_alpha(np.asarray(picture.convert("LA" if grey else "RGBA")), name)


def _without_alpha(pixels, path):
    """[H, W, 2 or 4] -> [H, W] or [H, W, 3]. Where all is equally opaque, or what is not shown is black, the colour is
    the picture; where all has one colour, the alpha is; anything else might mean two things.

    :raises InputError: for anything else.
    """
    colour, alpha = pixels[..., :-1], pixels[..., -1]
    if (alpha != alpha[0, 0]).any():
        if (colour == colour[0, 0]).all():
            return alpha
        if colour[alpha == 0].any():
            raise InputError(f"{path}: has colours where it is transparent, so that it shows one picture and holds"
                             f" another; save it without transparency")
    return colour[..., 0] if colour.shape[2] == 1 else colour
