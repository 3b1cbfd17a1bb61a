"""CT series of DICOM files that come with pydicom, and how a series without a thickness is measured."""

from pathlib import Path

import numpy as np
import pytest
from helpers.lidc import write_series

from guided_diffusion.prepare.ct_series import find_files, head_of, read_series

pydicom = pytest.importorskip("pydicom")


def test_a_ct_of_another_maker_is_read():
    path = Path(pydicom.data.get_testdata_file("CT_small.dcm", download=False))
    data = pydicom.dcmread(path)
    head = head_of(path)
    assert (head.series, head.patient, head.modality) == (data.SeriesInstanceUID, "1CT1", "CT")
    series, left_out = read_series([path])
    assert not left_out and (series.height, series.width, series.thickness) == (128, 128, 5.0)
    assert np.allclose(series.spacing, 0.661468) and series.places == {data.SOPInstanceUID: 0}
    assert np.array_equal(series.hounsfield(0), data.pixel_array * 1.0 - 1024)


def test_slices_are_in_the_order_of_their_positions_whatever_their_files_are_called(tmp_path):
    pixels = write_series(tmp_path, "1.2", [4, -3.5, 0.5, 0.5])
    (tmp_path / "notes.txt").write_text("no DICOM")
    files = list(find_files(tmp_path))
    assert [head_of(path) is None for path in files] == [False] * 4 + [True]
    series, _ = read_series(reversed(files[:4]))
    assert [each.position for each in series.slices] == [-3.5, 0.5, 0.5, 4]
    assert [each.uid for each in series.slices] == ["1.2.2", "1.2.3", "1.2.4", "1.2.1"]
    assert np.array_equal(series.hounsfield(3), pixels[0] * 2.0 - 1024)


def test_without_a_thickness_the_distance_of_slices_stands_for_it(tmp_path):
    write_series(tmp_path, "1.2", [0, 1.5, 3])
    for path in find_files(tmp_path):
        data = pydicom.dcmread(path)
        data.SliceThickness = None
        data.save_as(path)
    assert read_series(find_files(tmp_path))[0].thickness == 1.5
