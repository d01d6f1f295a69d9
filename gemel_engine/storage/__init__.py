"""Files on a local disk or in S3, tables in Parquet, and manifests of artifact directories."""

from gemel_engine.config.addresses import local_path
from gemel_engine.storage.cache import ARTIFACT_CACHE, download_directory, made_once, publish_directory
from gemel_engine.storage.files import (
    InputFile,
    check_apart,
    check_kept,
    create_exclusive,
    exists,
    find_file,
    list_files,
    list_parquet,
    list_tables,
    partition_keys,
    read_bytes,
    read_json,
    remove_tree,
    resolve,
    write_bytes,
)
from gemel_engine.storage.local import open_regular

__all__ = [
    "ARTIFACT_CACHE",
    "InputFile",
    "check_apart",
    "check_kept",
    "create_exclusive",
    "download_directory",
    "exists",
    "find_file",
    "list_files",
    "list_parquet",
    "list_tables",
    "local_path",
    "made_once",
    "open_regular",
    "partition_keys",
    "publish_directory",
    "read_bytes",
    "read_json",
    "remove_tree",
    "resolve",
    "write_bytes",
]
