"""Arrays on disk, mapped into memory; an array may be larger than the memory."""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.storage.local import open_regular


def map_array(path: Path, remedy: str) -> NDArray[Any]:
    """Map an array that `numpy.save` wrote, read-only, without unpickling.

    Args:
        path: Local file.
        remedy: What to do if it is unreadable, for the message.

    Raises:
        ArtifactError: The file is missing, damaged or no regular file.
    """
    try:
        open_regular(path).close()
        # Unlike np.load this reads no archives; a plain array, because indexing a memmap is slow.
        return np.asarray(open_memmap(path, mode="r"))  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError, OverflowError, SyntaxError, TokenError) as error:  # the header is Python
        raise ArtifactError(f"{path} is missing or damaged ({error}); {remedy}") from error
