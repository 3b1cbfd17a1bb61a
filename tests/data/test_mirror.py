"""Data in a bucket are copied to this machine, and again where they have changed."""

import os
import time

import pytest
from helpers.files import tree
from helpers.refusals import refusal

from guided_diffusion.data import mirror
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.system import s3


@pytest.fixture
def upload(store):
    """upload(folder, to): the client that has put the files of a folder into the bucket `shared`."""
    def put(folder, to):
        client = store.client()
        for name, data in tree(folder).items():
            client.put_object(Bucket="shared", Key=f"{to}/{name}", Body=data)
        return client

    return put


@pytest.fixture(autouse=True)
def cache(login, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shown(folder):
    return {name: data for name, data in tree(folder).items() if not name.startswith(".")}


def test_cases_of_a_bucket_are_those_of_the_folder(upload, make_cases, tmp_path):
    data = make_cases(tmp_path / "data", count=3)
    upload(data, "cases")
    there, here = (SegmentationCases(folder, 16, 1) for folder in ("s3://shared/cases/", data))
    assert len(there) == len(here) == 3
    for one, other in zip(there, here):
        assert one.name == other.name and (one.image == other.image).all() and (one.raters == other.raters).all()


def test_only_what_has_changed_is_copied_again(upload, make_cases, tmp_path, monkeypatch):
    data = make_cases(tmp_path / "data", count=3)
    client = upload(data, "again")
    copy = mirror.local_folder("s3://shared/again")
    assert shown(copy) == shown(data)
    fetched, fetch = [], s3.fetch
    monkeypatch.setattr(s3, "fetch", lambda path, to: (fetched.append(path), fetch(path, to)))
    assert mirror.local_folder("s3://shared/again") == copy and not fetched
    time.sleep(1)  # times of objects are in whole seconds
    image, = (data / "case0").glob("image*")
    image.write_bytes(bytes(reversed(image.read_bytes())))
    upload(data / "case0", "again/case0")
    for name in tree(data / "case2"):
        client.delete_object(Bucket="shared", Key=f"again/case2/{name}")
    client.put_object(Bucket="shared", Key="again/.hidden/../../../x.png", Body=b"")
    (copy / ".decoded_16_error").write_bytes(b"of a run")
    (copy / "case1" / f"label0_.png.{os.getpid()}").write_bytes(b"no file of the bucket")
    assert mirror.local_folder("s3://shared/again") == copy
    assert sorted(fetched) == [f"s3://shared/again/case0/{name}" for name in sorted(tree(data / "case0"))]
    assert shown(copy) == {name: data for name, data in shown(data).items() if not name.startswith("case2")}
    assert not (copy / "case2").exists() and (copy / ".decoded_16_error").exists()


@pytest.mark.parametrize("user, path, said", [
    ("owner", "s3://absent/data", "there is no bucket absent; mend the name, or create it"),
    ("owner", "s3://shared/nothing", "--val_dir s3://shared/nothing: nothing is there; mend the name"),
    ("guest", "s3://shared/data", "the store gives no rights to it"),
    ("owner", "gs://shared/data", "--val_dir gs://shared/data: data are read from folders of this machine and")])
def test_data_that_cannot_be_copied_are_refused_in_one_line(login, user, path, said):
    login(user)
    message = refusal(SegmentationCases, path, 16, 1, flag="--val_dir")
    assert path in message and said in message and "\n" not in message


def test_a_copy_that_cannot_be_written_is_refused_with_what_to_do(upload, make_cases, tmp_path):
    upload(make_cases(tmp_path / "data", count=1), "full")
    (tmp_path / "cache").write_bytes(b"")
    message = refusal(mirror.local_folder, "s3://shared/full")
    assert message.startswith("--data_dir s3://shared/full: cannot be copied to") and "XDG_CACHE_HOME" in message
