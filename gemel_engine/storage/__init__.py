"""Files on a local disk or in S3, tables in Parquet, and manifests of artifact directories."""

from gemel_engine.config.addresses import local_path
from gemel_engine.storage.files import (
    ARTIFACT_CACHE,
    InputFile,
    check_apart,
    check_kept,
    create_exclusive,
    download_directory,
    exists,
    list_files,
    list_parquet,
    made_once,
    open_regular,
    partition_keys,
    read_bytes,
    read_json,
    remove_tree,
    resolve,
    write_bytes,
)

__all__ = [
    "ARTIFACT_CACHE",
    "InputFile",
    "check_apart",
    "check_kept",
    "create_exclusive",
    "download_directory",
    "exists",
    "list_files",
    "list_parquet",
    "local_path",
    "made_once",
    "open_regular",
    "partition_keys",
    "read_bytes",
    "read_json",
    "remove_tree",
    "resolve",
    "write_bytes",
]
