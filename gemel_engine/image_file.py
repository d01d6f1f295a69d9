"""Untrusted image files to pictures: what is read, how large it may be, which way is up."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gemel_engine.errors import ImageError

ACCEPTED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_ELONGATION = 100  # times that a picture may be as long as wide: its short side is scaled up to the encoder's
# A file of some bytes a scan could take hours: every scan goes over all pixels. Pictures have about ten.
_MAX_JPEG_SCANS = 500
_START_OF_SCAN = b"\xff\xda"

# What Pillow's readers raise for bytes that are not what they claim to be.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode untrusted bytes into an upright RGB picture; of an animation, the first frame.

    The format is told from the bytes, and the size is read from the header and checked before any pixel is decoded.
    Transparent parts become white. Decoding takes up to 16 bytes of memory a pixel.

    Raises:
        ImageError: The bytes are not a whole picture in one of `ACCEPTED_FORMATS`, or it has more than `max_pixels`, is
            more than `MAX_ELONGATION` times as long as wide, or is a JPEG of more scans than any picture needs.
    """
    try:
        with Image.open(io.BytesIO(data), formats=ACCEPTED_FORMATS) as image:
            _check_header(image, data, max_pixels)
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise ImageError(f"{len(data)} bytes are not a picture; accepted are {', '.join(ACCEPTED_FORMATS)}") from error
    except _PILLOW_ERRORS as error:
        raise ImageError(f"the picture is damaged or too large ({error}); save it again") from error


def _check_header(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """See that decoding and scaling a picture takes bounded memory and time."""
    size = f"{image.width} x {image.height} pixels"
    if image.width * image.height > max_pixels:
        raise ImageError(f"{size} exceed the limit of {max_pixels}; scale the picture down")
    if max(image.size) > MAX_ELONGATION * min(image.size):
        raise ImageError(f"{size}: more than {MAX_ELONGATION} times as long as wide; cut the picture")
    if image.format == "JPEG" and data.count(_START_OF_SCAN) > _MAX_JPEG_SCANS:
        raise ImageError(f"the JPEG has more than {_MAX_JPEG_SCANS} scans; save it again")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip 16 bits at 255 instead of scaling them.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")
