"""Addresses of pictures in Wikimedia Commons."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import quote, unquote

# Wikimedia refuses or slows down other widths: https://www.mediawiki.org/wiki/Common_thumbnail_sizes
ThumbnailWidth = Literal[20, 40, 60, 120, 250, 330, 500, 960, 1280, 1920, 3840]

_FILE_PATH = re.compile(
    r"https?://(?P<host>[a-z-]+\.wikimedia\.org|[a-z-]+\.wikipedia\.org)/wiki/Special:File[Pp]ath/(?P<name>[^?#]+)"
)


def picture_address(file_name: str, width: ThumbnailWidth, host: str = "commons.wikimedia.org") -> str:
    """Return the address of a picture, which redirects to a JPEG or PNG file of this width.

    Args:
        file_name: Name of the file, without a namespace and not quoted.
        width: Width in pixels; a smaller picture keeps its width.
        host: Host of the wiki that has the file.
    """
    # The page for a name with spaces would first redirect to that with underscores.
    return f"https://{host}/wiki/Special:FilePath/{quote(file_name.replace(' ', '_'), safe='')}?width={width}"


def resized(address: str, width: ThumbnailWidth) -> str:
    """Return the address of the same picture in this width; other addresses are unchanged."""
    found = _FILE_PATH.match(address)
    return address if found is None else picture_address(unquote(found["name"]), width, found["host"])
