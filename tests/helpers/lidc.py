"""LIDC-IDRI in small: DICOM series, XML files and outlines as The Cancer Imaging Archive ships them."""

from xml.sax.saxutils import escape

import numpy as np

SIZE = 40, 48  # (rows, columns)
SPACING = 0.75, 0.5  # mm (row, column)
THICKNESS = 2.5
SLOPE, INTERCEPT = 2, -1024
RATINGS = ("subtlety", "internalStructure", "calcification", "sphericity", "margin", "lobulation", "spiculation",
           "texture", "malignancy")


def write_slice(path, series, image, position, number, patient="LIDC-IDRI-0001", modality="CT", pixels=None,
                spacing=SPACING, orientation=(1, 0, 0, 0, 1, 0)):
    """Write a DICOM file; returns its stored pixels, [H, W] int16, of which Hounsfield units follow by SLOPE and
    INTERCEPT."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    if pixels is None:
        pixels = np.random.default_rng(number).integers(0, 900, SIZE, dtype=np.int16)
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CTImageStorage, image, series
    data.StudyInstanceUID, data.Modality, data.PatientID, data.PatientName = "1.2.3", modality, patient, "Doe^Jane"
    data.Rows, data.Columns = pixels.shape
    data.PixelSpacing, data.SliceThickness, data.InstanceNumber = list(spacing), THICKNESS, number
    data.ImagePositionPatient, data.ImageOrientationPatient = [-100.0, -80.0, position], list(orientation)
    data.RescaleSlope, data.RescaleIntercept = SLOPE, INTERCEPT
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation, data.PixelData = 15, 1, pixels.tobytes()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return pixels


def write_series(folder, series, positions, **options):
    """Write a series with a slice at each position in mm, of the UIDs <series>.1, <series>.2, ...; returns the stored
    pixels of each."""
    return [write_slice(folder / f"{series}-{number:03}.dcm", series, f"{series}.{number}", position, number, **options)
            for number, position in enumerate(positions, 1)]


def roi(image, points, inclusion=True):
    """The XML of an outline, points (x, y), on a slice."""
    edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
    return (f"<roi><imageZposition>-1.0</imageZposition><imageSOP_UID> {image} </imageSOP_UID>"
            f"<inclusion>{str(inclusion).upper()}</inclusion>{edges}</roi>")


def nodule(name, *rois, ratings=3):
    """The XML of a nodule. `ratings` of all characteristics; None: it has none."""
    rated = "" if ratings is None else "".join(f"<{each}>{ratings}</{each}>" for each in RATINGS)
    return (f"<unblindedReadNodule><noduleID>{escape(name)}</noduleID>"
            f"{f'<characteristics>{rated}</characteristics>' if rated else ''}{''.join(rois)}</unblindedReadNodule>")


def non_nodule(image, x, y):
    """The XML of a mark that is no nodule."""
    return (f"<nonNodule><nonNoduleID>9</nonNoduleID><imageZposition>1</imageZposition><imageSOP_UID>{image}"
            f"</imageSOP_UID><locus><xCoord>{x}</xCoord><yCoord>{y}</yCoord></locus></nonNodule>")


def reading(series, *sessions, root="LidcReadMessage", namespace="http://www.nih.gov"):
    """The XML of a series; a session is the XML of its marks."""
    read = "".join(f"<readingSession><annotationVersion>3.12</annotationVersion>"
                   f"<servicingRadiologistID>anonymous</servicingRadiologistID>{session}</readingSession>"
                   for session in sessions)
    return (f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} uid="1.3.6" xmlns="{namespace}"><ResponseHeader>'
            f"<Version>1.7</Version><SeriesInstanceUid>{series}</SeriesInstanceUid>"
            f"<StudyInstanceUID>1.2.3</StudyInstanceUID></ResponseHeader>{read}</{root}>")


def box(left, top, right, bottom):
    """The closed outline just outside the lesion of columns left to right and rows top to bottom, both included."""
    x0, y0, x1, y1 = left - 1, top - 1, right + 1, bottom + 1
    ring = [*((x, y0) for x in range(x0, x1)), *((x1, y) for y in range(y0, y1)),
            *((x, y1) for x in range(x1, x0, -1)), *((x0, y) for y in range(y1, y0, -1))]
    return [*ring, ring[0]]


def flooded(size, *outlines):
    """The lesion of outlines, (points, inclusion) each, by a flood fill of its own: [H, W] bool."""
    height, width = size
    plane = [(x, y) for y in range(-2, height + 2) for x in range(-2, width + 2)]  # outlines may reach -1
    inside, outside = set(), set()
    for points, inclusion in outlines:
        if len(points) == 1:
            continue
        wall = {pixel for a, b in zip(points, [*points[1:], points[0]]) for pixel in _line(a, b)}
        dry, todo = set(plane) - wall - {(-2, -2)}, [(-2, -2)]
        while todo:
            x, y = todo.pop()
            reached = dry & {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)}
            dry -= reached
            todo += reached
        (inside if inclusion else outside).update(dry)
        outside |= wall
    return np.array([[(x, y) in inside - outside for x in range(width)] for y in range(height)])


def _line(a, b):
    steps = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    for k in range(steps):
        yield tuple(int(np.floor(p + (q - p) * k / steps + 0.5)) for p, q in zip(a, b))
