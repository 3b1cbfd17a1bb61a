"""Synthetic lung nodules on CT whose distribution over expert outlines is known exactly.

Real data show four raters a case, never the distribution those four were drawn from. A phantom has both:
a picture, and every outline an expert could draw with the probability of drawing it. Lengths are in units of
1/128 of the patch's side (pixels of a 128 x 128 patch), so a phantom has the same anatomy at every size; contrasts
are in grey levels (0-255) above the lung.

How an expert decides: whether to mark the nodule at all, then, independently of each other, whether to include
its ground-glass halo, its spicules and the flare of the vessel that feeds it. Each chance is a logistic function
of one visible feature (`CHOICES`), so the probability of every outline is in closed form.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from ..system.errors import InputError
from .phantom_scenery import SIDE, TURN, blur, draw_background, draw_textures

REACH = 26.5        # no outline goes further from the patch's centre, units: the central half has +-32
NEGLIGIBLE = 2e-3   # outlines rarer than this are left out
JPEG_QUALITY = 95   # labels come back exactly when thresholded at half of full scale
MAX_PIXELS = 1 << 26  # of all outlines of one case; a truth.npz that claims to hold more is refused

# An expert says yes to a choice with probability 1 / (1 + exp(-(feature - midpoint) / scale)).
# choice: (feature, midpoint, scale), in the feature's unit
CHOICES = {
    "mark": ("core_contrast", 36.0, 7.0),        # grey levels; faint nodules go unmarked
    "halo": ("halo_contrast", 38.0, 7.0),        # grey levels
    "spicules": ("spicule_length", 0.62, 0.11),  # core radii
    "vessel": ("vessel_ratio", 0.8, 0.09),       # vessel contrast / core contrast; alike, they look like one
}


@dataclass(frozen=True, eq=False)
class Phantom:
    """One case: what is seen, and how often an expert would draw what.

    image: uint8 [H, W]. outlines: bool [K, H, W], all distinct, most likely first, the empty one possibly among
    them. probabilities: float64 [K], sum 1. features: the numbers `CHOICES` reads, 0 for a part that is absent,
    and `core_radius` in units.
    """

    image: np.ndarray
    outlines: np.ndarray
    probabilities: np.ndarray
    features: dict[str, float]

    @property
    def mean(self) -> np.ndarray:
        """Probability that an expert counts a pixel as nodule, float64 [H, W] in [0, 1]."""
        return np.tensordot(self.probabilities, self.outlines, 1)

    def draw(self, n: int, rng: np.random.Generator | int) -> np.ndarray:
        """Outlines of n independent experts, bool [n, H, W]. rng: a numpy Generator or a seed."""
        rng = np.random.default_rng(rng)
        return self.outlines[rng.choice(len(self.probabilities), size=n, p=self.probabilities)]


def choice_probabilities(features: Mapping[str, float]) -> dict[str, float]:
    """Chance of each of `CHOICES`, in (0, 1). One about a part that is absent changes no outline."""
    return {
        choice: 1 / (1 + math.exp((midpoint - features[feature]) / scale))
        for choice, (feature, midpoint, scale) in CHOICES.items()
    }


def make_phantom(seed: int, index: int, size: int = 128) -> Phantom:
    """Phantom number `index` of the series `seed` (both >= 0), independent of all others.

    size: side in pixels, a multiple of 16 from 32 up (InputError otherwise); the anatomy does not depend on it.
    """
    if size < 32 or size % 16:
        raise InputError(f"--size {size} is not a multiple of 16 from 32 up; use 32, 64 or 128")
    rng = np.random.default_rng([seed, index])
    nodule = _Nodule(rng)
    canvas = draw_background(rng, nodule, size)  # float32 [size, size], grey levels above the lung
    lung, texture_sd, noise_sd = rng.uniform(13, 27), rng.uniform(2, 3.5), rng.uniform(3.0, 5.0)
    texture, noise = draw_textures(rng, size)

    centre = slice(size // 4, 3 * size // 4)
    parts, contrast = nodule.rasterise(size, texture[centre, centre])
    canvas[centre, centre] = np.maximum(canvas[centre, centre], contrast)
    image = lung + texture_sd * texture + blur(canvas) + noise_sd * noise

    outlines, probabilities = _distribution(parts, choice_probabilities(nodule.features))
    full = np.zeros((len(outlines), size, size), bool)
    full[:, centre, centre] = outlines
    return Phantom(np.clip(np.rint(image), 0, 255).astype(np.uint8), full, probabilities, nodule.features)


def write_case(folder: str | Path, phantom: Phantom, num_raters: int, rng: np.random.Generator | int, number: int = 0
               ) -> None:
    """Write image_<number>.jpg, label0_.jpg ... (num_raters experts drawn with rng) and truth.npz into folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(phantom.image).save(folder / f"image_{number}.jpg", quality=JPEG_QUALITY)
    for stale in folder.glob("label*_.jpg"):  # an earlier run may have had more raters
        stale.unlink()
    for rater, mask in enumerate(phantom.draw(num_raters, rng)):
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"label{rater}_.jpg", quality=JPEG_QUALITY)
    np.savez_compressed(folder / "truth.npz", outlines=np.packbits(phantom.outlines),
                        shape=np.array(phantom.outlines.shape), probabilities=phantom.probabilities)


def write_cases(out_dir: str | Path, count: int, seed: int, size: int = 128, num_raters: int = 4, first_index: int = 0,
                progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> list[Path]:
    """Write phantoms first_index ... first_index + count - 1 of the series, one folder `phantom-<index>` each.

    progress wraps the iterable of indices, as tqdm does. Returns the folders. InputError on arguments out of range.
    """
    for name, value, least in (("count", count, 1), ("num_raters", num_raters, 1),
                               ("seed", seed, 0), ("first_index", first_index, 0)):
        if value < least:
            raise InputError(f"--{name} {value} is too small; the least possible is {least}")
    folders = []
    for index in progress(range(first_index, first_index + count)):
        phantom = make_phantom(seed, index, size)
        folders.append(Path(out_dir) / f"phantom-{index:06d}")
        # The third number keeps the experts' draws apart from the draws that made the anatomy.
        write_case(folders[-1], phantom, num_raters, np.random.default_rng([seed, index, 1]), number=index)
    return folders


def load_truth(case_folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The distribution that the raters of a case were drawn from: outlines bool [K, H, W], probabilities [K].

    :raises InputError: naming the file, unless it is whole and of the kind and size that write_case writes.
    """
    path = Path(case_folder) / "truth.npz"
    try:
        if not path.is_file() or path.stat().st_size > MAX_PIXELS:
            raise ValueError(f"there is no file of at most {MAX_PIXELS} bytes")
        with np.load(path, allow_pickle=False) as truth:
            if sum(entry.file_size for entry in truth.zip.infolist()) > MAX_PIXELS:
                raise ValueError(f"it unpacks to more than {MAX_PIXELS} bytes")
            packed, shape, probabilities = (truth[name] for name in ("outlines", "shape", "probabilities"))
        shape = tuple(map(int, shape))
        pixels = math.prod(shape)
        if len(shape) != 3 or min(shape) < 1 or pixels > MAX_PIXELS or packed.size != -(-pixels // 8):
            raise ValueError(f"its outlines are said to be {list(shape)}")
        if probabilities.shape != shape[:1] or probabilities.min() < 0 or not np.isclose(probabilities.sum(), 1):
            raise ValueError("its probabilities are not one an outline that add up to 1")
        return np.unpackbits(packed, count=pixels).reshape(shape).astype(bool), probabilities
    except Exception as error:  # numpy, zipfile and zlib raise almost anything on a damaged file
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise InputError(f"{path}: cannot be read ({reason}); write its case again with make_phantoms.py") from None


def _distribution(parts, chance):
    """Outlines bool [K, H, W] and probabilities [K] from masks of the parts and chances of including them."""
    core = parts["core"]
    table = {np.zeros_like(core).tobytes(): 1 - chance["mark"]}
    optional = [name for name in parts if name != "core"]
    for included in product((False, True), repeat=len(optional)):
        outline, probability = core, chance["mark"]
        for name, yes in zip(optional, included):
            outline = outline | parts[name] if yes else outline
            probability *= chance[name] if yes else 1 - chance[name]
        # Outlines can coincide: spicules that stay inside the halo add nothing to it.
        key = outline.tobytes()
        table[key] = table.get(key, 0.0) + probability
    kept = sorted((item for item in table.items() if item[1] >= NEGLIGIBLE), key=lambda item: -item[1])
    outlines = np.stack([np.frombuffer(key, bool).reshape(core.shape) for key, _ in kept])
    probabilities = np.array([probability for _, probability in kept])
    return outlines, probabilities / probabilities.sum()


class _Nodule:
    """Shape and contrasts of one nodule, drawn from rng, in units and grey levels."""

    def __init__(self, rng):
        faint = rng.random() < 0.3
        core_contrast = rng.uniform(20, 52) if faint else rng.uniform(52, 150)
        has_halo, has_spicules, has_vessel = (rng.random(3) < (0.65, 0.5, 0.5)) & (core_contrast > 45)
        halo_contrast = rng.uniform(18, min(75, 0.65 * max(core_contrast, 45)))
        spicule_length, vessel_ratio = rng.uniform(0.35, 0.95), rng.uniform(0.5, 1.1)

        self.centre = rng.uniform(-3, 3, 2)
        self.edge = rng.uniform(1.0, 2.5)  # width of the soft rim, units
        # Radii are R |1 + c_2 u^2 + ... + c_6 u^6| with u = exp(i angle): low orders only, so lobes and no noise.
        orders = np.arange(2, 7)
        wobble = rng.normal(size=(2, 5, 2)) @ (1, 1j) / orders * rng.uniform(0.08, 0.2)
        self.core_shape = np.concatenate([[1, 0], wobble[0]])
        self.halo_shape = rng.uniform(1.25, 1.55) * np.concatenate([[1, 0], 0.6 * wobble[0] + 0.4 * wobble[1]])

        # Lengths along a ray are in core radii.
        count = rng.integers(3, 7)
        self.spicule_angles = 2 * np.pi * (np.arange(count) + rng.uniform(-0.4, 0.4, count) + rng.random()) / count
        self.spicule_bends = rng.normal(0, 0.15, count)  # radians per core radius
        lengths = rng.uniform(0.6, 1.3, count)
        self.spicule_tips = _radius(self.core_shape, np.exp(1j * self.spicule_angles)) \
            + spicule_length * lengths / lengths.mean()
        self.vessel_angle = rng.uniform(0, 2 * np.pi)
        self.vessel_end = _radius(self.core_shape, np.exp(1j * self.vessel_angle)) + rng.uniform(0.8, 1.2)
        self.vessel_base, self.vessel_neck = rng.uniform(0.4, 0.6), rng.uniform(1.2, 2.0)  # half widths: radii; units

        around = np.exp(1j * TURN)
        extent = max(_radius(self.core_shape, around).max(),
                     has_halo * _radius(self.halo_shape, around).max(),
                     has_spicules * self.spicule_tips.max(),
                     has_vessel * self.vessel_end)
        self.radius = min(rng.uniform(7, 12.5), (REACH - np.hypot(*self.centre)) / extent)
        self.extent = extent * self.radius
        self.features = {name: float(value) for name, value in (
            ("core_contrast", core_contrast), ("core_radius", self.radius),
            ("halo_contrast", halo_contrast * has_halo),
            ("spicule_length", spicule_length * has_spicules), ("vessel_ratio", vessel_ratio * has_vessel))}

    def rasterise(self, size, texture):
        """Parts present as bool masks and the contrast of all of them, both on the central half [size/2, size/2].

        texture: unit variance, same shape, mottles the ground glass.
        """
        axis = (np.arange(size // 2) + 0.5 - size / 4) * SIDE / size
        z = (axis - self.centre[0]) + 1j * (axis - self.centre[1])[:, None]  # [size/2, size/2], units
        r = np.abs(z) / self.radius
        u = np.exp(1j * np.angle(z))
        # How far inside each part a pixel lies, in units: the outline is the zero level.
        inside = {"core": self.radius * (_radius(self.core_shape, u) - r)}
        strength = {"core": self.features["core_contrast"] * (1 + 0.04 * texture)}
        if self.features["halo_contrast"]:
            inside["halo"] = np.maximum(self.radius * (_radius(self.halo_shape, u) - r), inside["core"])
            strength["halo"] = self.features["halo_contrast"] * (1 + 0.15 * texture)
        if self.features["spicule_length"]:
            tips = self.radius * self.spicule_tips[:, None, None]
            angles, bends = self.spicule_angles[:, None, None], self.spicule_bends[:, None, None]
            rays = z * np.exp(-1j * (angles + bends * (r - 1)))  # [count, size/2, size/2], each ray on the real axis
            inside["spicules"] = _taper(rays, 0, 0.34 * self.radius, tips, 0.6).max(0)
            strength["spicules"] = 0.85 * self.features["core_contrast"]
        if self.features["vessel_ratio"]:
            ray = z * np.exp(-1j * self.vessel_angle)
            inside["vessel"] = _taper(ray, 0.7 * self.radius, self.vessel_base * self.radius,
                                      self.vessel_end * self.radius, self.vessel_neck)
            strength["vessel"] = self.features["vessel_ratio"] * self.features["core_contrast"]
        contrast = np.zeros_like(r)
        for name, depth in inside.items():
            rim = max(self.edge if name in ("core", "halo") else 1.0, SIDE / size)
            np.maximum(contrast, strength[name] * np.clip(0.5 + depth / rim, 0, 1), out=contrast)
        return {name: depth > 0 for name, depth in inside.items()}, contrast


def _radius(shape, u):
    """Radius of a contour in core radii; shape: complex Fourier coefficients, u = exp(i angle) of any shape."""
    return np.abs(np.polynomial.polynomial.polyval(u, shape))


def _taper(ray, start, start_half_width, end, end_half_width):
    """Depth inside a tube along the positive real axis that narrows linearly from start to end and is cut there."""
    fraction = np.clip((ray.real - start) / (end - start), 0, 1)
    depth = start_half_width + (end_half_width - start_half_width) * fraction - np.abs(ray.imag)
    return np.minimum(depth, np.minimum(ray.real, end - ray.real))
