"""Pickles of cases are read exactly, and none of them runs anything."""

import os
import pickle

import numpy as np
import pytest
from helpers.refusals import refusal

from guided_diffusion.prepare.pickles import load
from guided_diffusion.prepare.runner import Job, prepare, said


def cases_of(count=4, raters=4, size=8):
    rng = np.random.default_rng(0)
    return {f"LIDC-IDRI-000{i // 2}_slice{i}": {
        "image": rng.integers(0, 65536, (size, size)) / 65535, "masks": [
            (rng.random((size, size)) > 0.6).astype(np.uint8) for _ in range(raters)],
        "series_uid": f"1.3.6.{i // 2}"} for i in range(count)}


def job(path, **fields):
    return Job("pickle", path, {"patient_pattern": fields.pop("patient_pattern", "")}, **fields)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("raters", [4, 7])
def test_a_pickle_is_read_back_exactly(tmp_path, prepared, protocol, raters):
    written = cases_of(raters=raters)
    (tmp_path / "data.pickle").write_bytes(pickle.dumps(written, protocol))
    outcome = prepare(job(tmp_path / "data.pickle", split="1:0:1"), tmp_path / "out")
    assert outcome.split_by == "series" and {*outcome.parts} == {"1.3.6.0", "1.3.6.1"}
    found = {**prepared(tmp_path / "out" / "train"), **prepared(tmp_path / "out" / "test")}
    assert found.keys() == written.keys()
    for name, (image, masks, row) in found.items():
        assert np.array_equal(image[0], np.round(written[name]["image"] * 65535))
        assert np.array_equal(masks, np.stack(written[name]["masks"]) > 0)
        assert (row["series"], row["patient"]) == (written[name]["series_uid"], "")


def test_the_old_paths_of_numpy_are_known_too(tmp_path):
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    data = pickle.dumps(cases_of(), 2)
    assert new in data
    (tmp_path / "old.pickle").write_bytes(data.replace(new, old))
    assert np.array_equal(load(tmp_path / "old.pickle")["LIDC-IDRI-0000_slice0"]["image"],
                          cases_of()["LIDC-IDRI-0000_slice0"]["image"])


def test_python_2_and_arrays_of_every_order_of_numbers_are_read(tmp_path):
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    python_2 = (b"(dp0\nS'a'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\n"
                b"tp6\nRp7\n(I1\n(I2\nI3\ntp8\ncnumpy\ndtype\np9\n(S'f4'\np10\nI0\nI1\ntp11\nRp12\n(I3\nS'>'\np13\n"
                b"NNNI-1\nI-1\nI0\ntp14\nbI00\nS'" + repr(array.tobytes())[2:-1].encode() + b"'\np15\ntp16\nbs.")
    (tmp_path / "old.p").write_bytes(python_2)
    assert np.array_equal(load(tmp_path / "old.p")["a"], array)
    many = {"fortran": np.asfortranarray(array), "big": array, "bool": array > 2, "scalar": np.float64(0.25),
            "one": np.uint16(7), "view": array[:, ::2], "zero": np.zeros((0, 3)), "list": [array, (1, "a", None)]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "many.p").write_bytes(pickle.dumps(many, protocol))
        found = load(tmp_path / "many.p")
        assert all(np.array_equal(found[name], many[name]) for name in many.keys() - {"list"})
        assert np.array_equal(found["list"][0], array) and found["list"][1] == [1, "a", None]


class Runs:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Sets:
    """Changes an attribute of what a pickle may call."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return np.dtype, ("f8",), self.state


def hostile(marker):
    text = f"open({str(marker)!r}, 'w').close()"
    array = np.array([Runs(exec, text)], object)
    yield "exec", pickle.dumps({"a": Runs(exec, text)})
    yield "system", pickle.dumps({"a": Runs(os.system, f"touch '{marker}'")}, 0)
    yield "in an array", pickle.dumps({"a": {"image": array, "masks": [array]}})
    yield "numpy", pickle.dumps({"a": Runs(np.fromfile, str(marker))})
    yield "load", pickle.dumps({"a": Runs(np.load, str(marker))})
    yield "attribute", b"cnumpy\nndarray.tofile\n."
    yield "dotted", b"\x80\x04\x8c\x05numpy\x8c\x16core.multiarray.os.name\x93."
    yield "encode", b"c_codecs\ndecode\n(S'a'\nS'rot13'\ntR."
    yield "codec", b"c_codecs\nencode\n(Va\nVrot13\ntR."
    yield "set", b"cnumpy\ndtype\n}Vfunction\nI1\nsb."
    yield "slots", b"cnumpy\ndtype\n(N}Vfunction\nI1\nstb."
    yield "state", pickle.dumps({"a": Sets({"text": "O"})})
    yield "persistent", b"Pname\n."
    yield "extension", b"\x80\x02\x82\x01."
    yield "instance", b"(inumpy\nndarray\n."
    yield "length", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f."
    yield "shape", pickle.dumps({"a": np.zeros(4)}, 2).replace(b"K\x04\x85", b"K\x7f\x85")
    yield "laughs", b"]" + b"".join(b"q%c](" % i + b"h%c" % i * 9 + b"e" for i in range(60)) + b"."


@pytest.mark.parametrize("name", [name for name, _ in hostile("x")])
def test_a_hostile_pickle_runs_nothing_and_is_refused_in_a_line(tmp_path, name):
    path, marker = tmp_path / "data.pickle", tmp_path / "marker"
    path.write_bytes(dict(hostile(marker))[name])
    message = refusal(load, path)
    assert str(path) in message and not marker.exists()
    (tmp_path / "good.pickle").write_bytes(pickle.dumps(cases_of()))  # and nothing of the reader has changed
    assert len(load(tmp_path / "good.pickle")) == 4


def test_a_pickle_that_asks_for_a_huge_memory_of_objects_gets_none(tmp_path):
    (tmp_path / "data.pickle").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")  # 32 GB in the C implementation
    assert load(tmp_path / "data.pickle") == {}


def test_truncated_pickles_are_refused(tmp_path):
    data = pickle.dumps(cases_of(count=1, size=2))
    for length in range(0, len(data), 7):
        (tmp_path / "cut.pickle").write_bytes(data[:length])
        assert "cut.pickle" in refusal(load, tmp_path / "cut.pickle")


def test_what_is_no_case_is_left_out_and_the_rest_goes_on(tmp_path):
    good = cases_of(count=1)
    case, = good.values()
    wrong = {
        "bare": {"image": case["image"]}, 7: case, "list": [1], "large": {**case, "image": case["image"] * 300},
        "objects": {**case, "masks": "all"}, "values": {**case, "masks": [np.full((8, 8), 3)]},
        "ints": {**case, "image": np.zeros((8, 8), np.int64)}, "sizes": {**case, "masks": [np.zeros((8, 7), bool)]}}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.pickle").write_bytes(pickle.dumps(good))
    (tmp_path / "in" / "b.pkl").write_bytes(pickle.dumps(wrong))
    (tmp_path / "in" / "c.pickle").write_bytes(b"junk")
    outcome = prepare(job(tmp_path / "in"), tmp_path / "out")
    assert [row["case"] for row in outcome.rows] == [*good]
    assert sorted(left.what for left in outcome.left_out) == [
        "b.pkl, '" + "bare'", "b.pkl, 'list'", "b.pkl, 7", "c.pickle", "ints", "large", "objects", "sizes", "values"]
    assert "values from 0" in "\n".join(map(said, outcome.left_out))


def test_patients_are_taken_from_the_names_where_a_pattern_says_so(tmp_path):
    (tmp_path / "data.pickle").write_bytes(pickle.dumps(cases_of()))
    outcome = prepare(job(tmp_path / "data.pickle", patient_pattern=r"LIDC-IDRI-\d+", split="1:0:1"), tmp_path / "out")
    assert {*outcome.parts} == {"LIDC-IDRI-0000", "LIDC-IDRI-0001"}
    assert {row["patient"] for row in outcome.rows} == {*outcome.parts}
    assert "--patient_pattern (" in refusal(prepare, job(tmp_path / "data.pickle", patient_pattern="("), tmp_path / "b")
