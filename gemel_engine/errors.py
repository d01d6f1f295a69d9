"""The errors that this project raises, and removal of secrets from their messages.

    GemelError
    ├── ConfigurationError      a setting is unknown, malformed or contradicts another   exit code 2
    ├── InputError              a table lacks a column, repeats an id, is not readable   exit code 3
    ├── ArtifactError           a directory on disk is missing, damaged, of another
    │                           format version, or does not fit its neighbours           exit code 4
    ├── TooManyFailuresError    more rows failed than `max_failed_fraction` allows       exit code 5
    ├── EngineDiedError         a process of the language model's engine has ended      exit code 1
    └── MentionError            one row cannot be linked: it becomes the row's `error`
        ├── InvalidMentionError     empty surface form, offset outside the text, ...
        ├── InvalidDocumentError    the text of a document is empty or not UTF-8
        ├── PromptTooLongError      the surface form exceeds the prompt limit
        ├── ImageError              the image's bytes are not a decodable picture
        └── ImageFetchError         the image's address is not allowed or not reachable

A bad *row* is data: its `MentionError` is written to the row's `error` column as ``kind: message``
and counted. A bad *job* raises, before any work if possible. A message names the invalid value and
the remedy. Addresses in it are formatted by `shown`, and texts of other libraries by `redacted`.
"""

from __future__ import annotations

import os
import re
from typing import ClassVar
from urllib.parse import quote, quote_plus

_SHOWN_CHARACTERS = 200
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s\"'<>`]+", re.IGNORECASE)
# A secret query parameter, also where a text repeats it without its address; `=` may be escaped.
_SECRET_PARAMETER = re.compile(
    r"([\w-]*(?:signature|credential|token|secret|password|passwd|api_?key|keyid|\bsig)(?:=|%3D))[^&\s\"'<>,;)]+",
    re.IGNORECASE,
)


def shown(address: str) -> str:
    """Quote an address for a message or log, cut to a maximum length and without secrets.

    Removed are user name and password and, except in an absolute local path, the query, which
    contains the signature of a presigned address.
    """
    if not address.startswith("/") or address.startswith("//"):
        address = _without_secrets(address)
    return repr(address if len(address) <= _SHOWN_CHARACTERS else f"{address[:_SHOWN_CHARACTERS]}...")


def redacted(text: str, *addresses: str) -> str:
    """Remove possible secrets from a text of another library, such as the message of an exception.

    Args:
        text: Text; each `scheme://...` in it is treated as an address.
        addresses: Addresses that the text may repeat in part; their queries are removed wherever
            they occur.
    """
    for address in addresses:
        query = re.split("[?#]", address, maxsplit=1)[1:]
        query = [part for part in query if len(part) > 3]  # a shorter one is not secret
        for secret in (*query, *map(quote, query), *map(quote_plus, query)):
            text = text.replace(secret, "...")
    text = _ADDRESS.sub(lambda found: _without_secrets(found[0], "[?#]|%3F"), text)
    return _SECRET_PARAMETER.sub(r"\1...", text)


def _without_secrets(address: str, query_marks: str = "[?#]") -> str:
    address, *query = re.split(query_marks, address, maxsplit=1)
    user, _, place = address.rpartition("@")
    start = user.find("//") + 2 if "//" in user else 0
    # A password may contain an unescaped slash.
    if ":" in user[start:] or (user and "/" not in user[start:]):
        address = f"{user[:start]}...@{place}"
    return f"{address}?..." if query else address


class GemelError(Exception):
    """Base class of all errors that this project raises."""

    exit_code: ClassVar[int] = 1


class ConfigurationError(GemelError):
    """A setting is unknown, malformed or contradicts another one."""

    exit_code = 2


class InputError(GemelError):
    """An input table does not have the required form or content."""

    exit_code = 3


class ArtifactError(GemelError):
    """An artifact is missing, damaged, of another format version, or incompatible with others."""

    exit_code = 4


def not_loadable(what: str, name_or_path: str, error: Exception) -> ArtifactError:
    """Return the error for a model that loads neither from a local directory nor from the hub."""
    missing = (
        "" if os.path.isdir(name_or_path) else ", which is no directory here, and so taken for a name on the model hub"
    )
    return ArtifactError(
        f"no {what} can be loaded from {shown(name_or_path)}{missing}: {redacted(str(error), name_or_path)}"
    )


class TooManyFailuresError(GemelError):
    """The job finished, but a larger fraction of rows failed than the configuration allows."""

    exit_code = 5


class EngineDiedError(GemelError):
    """A process of the language model's engine has ended; the linking job restarts the engine."""


class MentionError(GemelError):
    """One mention cannot be linked; the error is stored in the row's column `error`.

    Attributes:
        kind: Prefix of the message, by which errors are counted.
    """

    kind: ClassVar[str] = "mention"

    def __str__(self) -> str:
        return f"{self.kind}: {super().__str__()}"


def error_kind(error: str) -> str:
    """Return the kind of a row's `error`, which is written as ``kind: message``."""
    return error.partition(":")[0]


class InvalidMentionError(MentionError):
    """The row's own text, surface form, offset or candidates are unusable."""

    kind = "invalid_mention"


class InvalidDocumentError(MentionError):
    """The text of a document is unusable, so that no mention is found in it."""

    kind = "invalid_document"


class PromptTooLongError(MentionError):
    """The surface form does not fit into the prompt, even without text and demonstrations."""

    kind = "prompt_too_long"


class ImageError(MentionError):
    """The image's bytes are not a picture of an accepted format and size."""

    kind = "image"


class ImageFetchError(MentionError):
    """The image's address is not allowed, or could not be read."""

    kind = "image_fetch"
