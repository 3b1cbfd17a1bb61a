"""Objects in s3://, through s3fs: those of AWS, or of any store that $AWS_ENDPOINT_URL names.

Credentials are found as botocore finds them: environment variables, ~/.aws, the role of a machine.
"""

import contextlib
import functools
import os
import secrets
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from . import packages
from .errors import InputError

UNREACHED_SECONDS = 5  # of an attempt to connect


class StoreError(InputError, OSError):
    """A store refused, or did not answer. Where a failed disk can be borne, so can this; else it ends the program."""


class Object(NamedTuple):
    """An entry of a listing."""

    key: str  # its name below the folder that was listed
    size: int  # bytes
    changed: datetime


@functools.cache
def _store() -> Any:
    s3fs = packages.require("s3fs", "a path with s3://")
    return s3fs.S3FileSystem(use_listings_cache=False, config_kwargs={"connect_timeout": UNREACHED_SECONDS})


def _split(path):
    """(bucket, key) of a path."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    if not bucket:
        raise StoreError(f"{path}: names no bucket; give s3://BUCKET/FOLDER")
    return bucket, key


@contextlib.contextmanager
def _asking(path: str) -> Iterator[Any]:
    """The store, whose refusals name this path. What is absent is a FileNotFoundError, unless its bucket is."""
    store = _store()
    from botocore import exceptions

    who = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    try:
        yield store
    except StoreError:
        raise
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
        raise StoreError(f"{path}: no credentials were found; set {who}") from None
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise StoreError(f"{path}: the store cannot be reached ({error}); check the network and AWS_ENDPOINT_URL"
                         ) from None
    except (exceptions.BotoCoreError, ValueError) as error:  # the latter for an address that is none
        raise StoreError(f"{path}: cannot be asked for ({error}); check AWS_ENDPOINT_URL, AWS_REGION and {who}"
                         ) from None
    except PermissionError as error:
        raise StoreError(f"{path}: the store gives no rights to it ({error.strerror or error}); have them given, or"
                         f" set {who} of another user") from None
    except FileNotFoundError as error:
        if _code(error) == "NoSuchBucket":
            raise StoreError(f"{path}: there is no bucket {_split(path)[0]}; mend the name, or create it") from None
        raise FileNotFoundError(2, "no such object", path) from None
    except OSError as error:
        raise StoreError(f"{path}: the store refused ({error}); mend that, or give another path") from error


def _code(error):
    """The store's own word for what was wrong."""
    return getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", "")


def _is_refused(error):
    """Whether a condition of a request was not met."""
    return _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409", "404")


def _pages(path, prefix, **options):
    """Answers to a listing of all keys that begin with a prefix."""
    more = {}
    while more is not None:
        with _asking(path) as store:
            page = store.call_s3("list_objects_v2", Bucket=_split(path)[0], Prefix=prefix, **options, **more)
        yield page
        more = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else None


def exists(path: str) -> bool:
    key = _split(path)[1]
    first = next(_pages(path, key, MaxKeys=1)).get("Contents", ())
    return any(found["Key"] == key for found in first)


def read_bytes(path: str) -> bytes:
    with _asking(path) as store:
        return store.cat_file(path)


def write_bytes(path: str, data: bytes) -> None:
    """Write an object, which appears when its upload is complete."""
    with _asking(path) as store:
        store.pipe_file(path, data)


def write_new(path: str, data: bytes) -> bool:
    """Write an object unless there is one; whether it was written. Source: Amazon S3, conditional writes."""
    return _put(path, data, IfNoneMatch="*")


def write_over(path: str, old: bytes, data: bytes) -> bool:
    """Write an object in the place of one that holds `old`; whether it did. Source: Amazon S3, conditional writes."""
    bucket, key = _split(path)
    try:
        with _asking(path) as store:
            found = store.call_s3("head_object", Bucket=bucket, Key=key)
            is_old = store.cat_file(path) == old
    except FileNotFoundError:
        return False
    return is_old and _put(path, data, IfMatch=found["ETag"])


def _put(path, data, **condition):
    bucket, key = _split(path)
    with _asking(path) as store:
        try:
            store.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as error:
            if _is_refused(error):
                return False
            raise
    return True


def remove(path: str) -> None:
    bucket, key = _split(path)
    with _asking(path) as store:
        store.call_s3("delete_object", Bucket=bucket, Key=key)


def names_in(folder: str) -> set[str]:
    """The names of the objects of a folder, not of those below it."""
    prefix = _prefix(folder)
    return {found["Key"].removeprefix(prefix) for page in _pages(folder, prefix, Delimiter="/")
            for found in page.get("Contents", ())} - {""}


def _prefix(folder):
    key = _split(folder)[1].rstrip("/")
    return key and f"{key}/"


def check_writable(folder: str) -> None:
    """:raises StoreError: if nothing can be written there, or the store takes a second writer for the first."""
    probe = f"{folder.rstrip('/')}/.writable.{secrets.token_hex(8)}"
    write_new(probe, b"probe")
    knows = not write_new(probe, b"probe")
    remove(probe)
    if not knows:
        raise StoreError(f"{folder}: this store overwrites what it is to write only if absent (If-None-Match), so that"
                         f" nothing keeps two runs apart; give another store")


def objects_below(folder: str) -> list[Object]:
    """All objects below a folder, at any depth."""
    prefix = _prefix(folder)
    return [Object(found["Key"].removeprefix(prefix), found["Size"], found["LastModified"])
            for page in _pages(folder, prefix) for found in page.get("Contents", ())]


def fetch(path: str, to: Path) -> None:
    """Copy an object into a file."""
    with _asking(path) as store:
        store.get_file(path, os.fspath(to))
