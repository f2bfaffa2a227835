"""fsspec's file systems of stores, with their limits of time, and S3's own calls for what they answer differently."""

import errno
import os
import re
from typing import Any

import fsspec

from features.errors import UserError
from pipeline.storage.object_files import S3
from pipeline.storage.patience import time_limit

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # environment: where S3 is


def stripped(system: fsspec.AbstractFileSystem, path: str) -> str:
    """A path as a file system takes it: without the scheme, which fsspec's own method for it does."""
    return str(system._strip_protocol(path))


def file_system(url: str) -> fsspec.AbstractFileSystem:
    """The file system of a URL, one a process and host or account that its URLs name.

    Raises:
        OSError: its package is missing.
        UserError: the environment names an endpoint of S3 that is no URL.
    """
    scheme, options = url.partition("://")[0], dict[str, Any](use_listings_cache=False)
    if scheme in S3:
        for name in ENDPOINTS:
            endpoint = os.environ.get(name)  # may hold a password
            if endpoint and not re.match(r"https?://[^/\s]+(/\S*)?$", endpoint):
                raise UserError(f"{name} in the environment is no URL with http:// or https://: change or unset it.")
        # The patience is ours: one request waits half of it for an answer at most, in two tries.
        wait = max(1.0, min(30.0, time_limit() / 4))
        tries = {"total_max_attempts": 2, "mode": "standard"}
        options["config_kwargs"] = {
            "connect_timeout": min(5.0, wait), "read_timeout": wait, "retries": tries, "max_pool_connections": 32,
        }  # fmt: skip
    try:
        if scheme not in S3:  # a host of Hadoop, an account of Azure
            options |= fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(url)
        system = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise OSError(errno.ENOPKG, f"{scheme}:// needs a package: {error}", scheme) from None
    if scheme in S3:
        system.retries = 1
    return system


def s3_info(system: Any, bucket: str, key: str) -> dict[str, Any] | None:
    """As s3fs's info, for which a folder is also what a server lists as a prefix after its last key was deleted."""
    try:
        found = system.call_s3("head_object", Bucket=bucket, Key=key)
        return {"name": f"{bucket}/{key}", "type": "file", "size": found["ContentLength"], **found}
    except FileNotFoundError:
        pass
    start = key.rstrip("/") + "/"
    named: dict[str, Any] = {}
    while True:
        page = system.call_s3("list_objects_v2", Bucket=bucket, Prefix=start, MaxKeys=10, **named)
        # Keys that end in / are markers of empty folders.
        if any(not each["Key"].endswith("/") for each in page.get("Contents", ())):
            return {"name": f"{bucket}/{key}", "type": "directory", "size": 0}
        if not page.get("IsTruncated"):
            return None
        named = {"ContinuationToken": page["NextContinuationToken"]}


def s3_delete(system: Any, keys: list[str]) -> None:
    """Deletes objects of one bucket, up to 1000, those that are there. Raises OSError where one could not be deleted."""
    bucket = keys[0].partition("/")[0]
    objects = [{"Key": name} for key in dict.fromkeys(keys) if (name := key.partition("/")[2])]
    done = system.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
    if errors := done.get("Errors"):
        number = errno.EACCES if errors[0].get("Code") == "AccessDenied" else errno.EBUSY
        raise OSError(
            number, f"{len(errors):,} objects cannot be deleted: {errors[0].get('Message')}", errors[0].get("Key")
        )
