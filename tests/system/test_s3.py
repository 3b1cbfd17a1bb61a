"""Objects in s3://, of a real server in a process of its own."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from helpers.refusals import refusal

from guided_diffusion.system import s3, storage
from guided_diffusion.system.lease import OneWriter


def test_objects_are_written_found_read_and_removed(login):
    folder = "s3://shared/files"
    assert storage.names_in(folder) == set() and not storage.exists(f"{folder}/a")
    storage.make_folder(folder)
    for name, data in (("a-b", b"first"), ("a/b", b"below"), ("a", b""), ("b", bytes(6 << 20))):
        storage.write_bytes(f"{folder}/{name}", data)
        assert storage.read_bytes(f"{folder}/{name}") == data
    assert storage.names_in(folder) == storage.names_in(folder + "/") == {"a", "a-b", "b"}
    assert storage.exists(f"{folder}/a") and storage.exists(f"{folder}/a-b") and not storage.exists(f"{folder}/")
    storage.write_bytes(f"{folder}/a", b"again")
    assert storage.read_bytes(f"{folder}/a") == b"again"
    storage.remove(f"{folder}/a")
    assert not storage.exists(f"{folder}/a") and storage.exists(f"{folder}/a/b")
    with pytest.raises(FileNotFoundError, match="s3://shared/files/a"):
        storage.read_bytes(f"{folder}/a")


def test_all_pages_of_a_listing_are_read(login, monkeypatch):
    for i in range(5):
        storage.write_bytes(f"s3://shared/pages/{i}", b"")
    assert [len(page["Contents"]) for page in s3._pages("s3://shared/pages", "pages/", MaxKeys=2)] == [2, 2, 1]


def test_only_one_of_several_writes_what_is_absent_or_as_it_was_seen(login):
    path, first = "s3://shared/one", b""
    for over in (False, True):
        write = partial(storage.write_over, path, first) if over else partial(storage.write_new, path)
        data = [b"%d after %s" % (i, first) for i in range(6)]
        with ThreadPoolExecutor(6) as pool:
            done = [*pool.map(write, data)]
        assert done.count(True) == 1
        first = data[done.index(True)]
        assert storage.read_bytes(path) == first
    assert not storage.write_over(path, b"other", b"x") and not storage.write_over(path + "?", b"other", b"x")


def test_a_folder_has_one_writer(login):
    folder = "s3://shared/owned"
    with OneWriter(folder, ".lock", "--results_dir", "is training", 1) as first:
        first.leases.me = first.leases.me._replace(machine="elsewhere")
        first.leases._renew(first.path)
        assert " is training into it; give another folder" in refusal(
            OneWriter, folder, ".lock", "--results_dir", "is training", 1)
    assert storage.names_in(folder) == set()


@pytest.mark.parametrize("user, variables, path, said", [
    ("owner", {}, "s3://absent/run", "there is no bucket absent; mend the name, or create it"),
    ("owner", {}, "s3:///run", "names no bucket; give s3://BUCKET/FOLDER"),
    ("guest", {}, "s3://shared/run", "the store gives no rights to it"),
    ("nobody", {}, "s3://shared/run", "the store gives no rights to it"),
    ("owner", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://shared/run", "the store cannot be reached"),
    ("owner", {"AWS_ENDPOINT_URL": "localhost"}, "s3://shared/run", "check AWS_ENDPOINT_URL")])
def test_what_a_store_refuses_is_one_line_that_names_the_path_and_what_to_do(login, monkeypatch, user, variables, path,
                                                                             said):
    login(user, **variables)
    monkeypatch.setattr(s3._store(), "retries", 1)
    uses = storage.names_in, storage.make_folder, lambda path: storage.write_bytes(f"{path}/a", b"")
    for use in uses[:1] if "reached" in said else uses:  # each tries for some seconds
        message = refusal(use, path)
        assert message.startswith(path) and said in message and "\n" not in message


def test_a_store_that_overwrites_what_must_be_absent_holds_no_results(login, monkeypatch):
    monkeypatch.setattr(s3, "write_new", lambda *args: True)
    assert "give another store" in refusal(storage.make_folder, "s3://shared/run")
