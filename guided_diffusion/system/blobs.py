"""Objects in gs:// and az://, through blobfile."""

from types import ModuleType

from . import packages


def _blobfile() -> ModuleType:
    return packages.require("blobfile", "a path with ://")


def exists(path: str) -> bool:
    return _blobfile().exists(path)


def read_bytes(path: str) -> bytes:
    with _blobfile().BlobFile(path, "rb") as file:
        return file.read()


def write_bytes(path: str, data: bytes) -> None:
    """Write an object, which appears when its upload is complete."""
    with _blobfile().BlobFile(path, "wb") as file:
        file.write(data)


def write_new(path: str, data: bytes) -> bool:
    """Write an object unless there is one; whether it was written. blobfile has no such call, but the stores have: it
    is made with blobfile's credentials.

    Sources: Google Cloud Storage, request preconditions (ifGenerationMatch 0); Azure, Put Blob (If-None-Match *).
    """
    blobfile = _blobfile()
    from blobfile import _azure, _gcp
    from blobfile._common import Request

    conf = blobfile.create_context()._conf
    if path.startswith("gs://"):
        bucket, name = _gcp.split_path(path)
        request = Request("POST", _gcp.build_url("/upload/storage/v1/b/{bucket}/o", bucket=bucket), data=data,
                          params={"uploadType": "media", "name": name, "ifGenerationMatch": "0"},
                          headers={"Content-Type": "application/octet-stream"}, success_codes=(200, 412))
        return _gcp.execute_api_request(conf, request).status == 200
    account, container, name = _azure.split_path(path)
    request = Request("PUT", _azure.build_url(account, "/{container}/{name}", container=container, name=name),
                      data=data, headers={"x-ms-blob-type": "BlockBlob", "If-None-Match": "*"},
                      success_codes=(201, 409, 412))
    return _azure.execute_api_request(conf, request).status == 201


def write_over(path: str, old: bytes, data: bytes) -> bool:
    """Write an object in the place of one that holds `old`; whether it did. Nothing keeps another from writing between
    the look and the write."""
    try:
        if read_bytes(path) != old:
            return False
    except FileNotFoundError:
        return False
    write_bytes(path, data)
    return True


def remove(path: str) -> None:
    _blobfile().remove(path)


def names_in(folder: str) -> set[str]:
    return set(_blobfile().listdir(folder)) if exists(folder) else set()


def check_writable(folder: str) -> None:
    """Nothing: blobfile says it when something is written."""
