"""Decodes untrusted image files: accepted formats, size limits, orientation.

Runs in a process of its own, `python -m gemel_engine.vision.decoder`, which answers requests on its
standard input until that ends: a picture can take any time, and a decoder written in C is only
stopped by ending its process.
"""

from __future__ import annotations

import io
import os
import re
import resource
import signal
import struct
import sys
import zlib

from PIL import Image, ImageChops, UnidentifiedImageError

from gemel_engine.errors import ImageError

ACCEPTED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_ELONGATION = 100  # largest ratio of the sides: the short side is scaled up to the encoder's
# Number of bytes of the image file, which follows; largest number of pixels; seconds of CPU time.
REQUEST = struct.Struct("<QQd")
# Width and height of the picture; number of bytes of an error message, which follows; bytes of
# peak memory.
REPLY = struct.Struct("<QQQQ")

# Every scan, even one of a few bytes, costs a pass over all pixels. Pictures have about ten.
_MAX_JPEG_SCANS = 500
_START_OF_SCAN = re.compile(rb"\xff\xda\0(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # of 1 to 4 components
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_JPEG_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # without APP0 and APP14, which define the colours
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode untrusted bytes into an upright RGB picture; of an animation, the first frame.

    The format is detected from the bytes, and the size is read from the header and checked before
    any pixel is decoded. Transparent parts become white. Of the metadata only the Exif orientation
    is read, and ignored if it is unreadable. Decoding takes up to 16 bytes of memory per pixel, and
    its time is not bounded here.

    Raises:
        ImageError: The bytes are not a whole picture in one of `ACCEPTED_FORMATS`, or it has more
            than `max_pixels` pixels, is more than `MAX_ELONGATION` times as long as wide, or is a
            JPEG with too many scans.
    """
    exif = None
    try:
        if data.startswith(_PNG):
            pixels, exif = _split_png(data)
        elif data.startswith(_JPEG):
            pixels, exif = _split_jpeg(data)
        else:
            pixels = data
        with Image.open(io.BytesIO(pixels), formats=ACCEPTED_FORMATS) as image:
            _check_header(image, pixels, max_pixels)
            if data.startswith(_PNG):
                _scale_transparency(image, bit_depth=pixels[24])
            turn = _UPRIGHT.get(_orientation(exif or image.info.get("exif", b"")))
            rgb = _to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{len(data)} bytes are not a picture; accepted are {', '.join(ACCEPTED_FORMATS)}") from error
    except Exception as error:  # Pillow raises a dozen types of exception for malformed files
        raise ImageError(f"the picture is damaged or too large ({error}); save it again") from error
    return rgb if turn is None else rgb.transpose(turn)


def _split_png(data: bytes) -> tuple[bytes, bytes | None]:
    """Return a PNG without its metadata, and its Exif data if they are intact."""
    kept, exif, start = [_PNG], None, len(_PNG)
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        stop = start + 12 + length
        if kind in _PNG_PIXELS:
            kept.append(data[start:stop])
        elif kind == b"eXIf" and zlib.crc32(data[start + 4 : stop - 4]) == int.from_bytes(data[stop - 4 : stop]):
            exif = data[start + 8 : stop - 4]
        if kind == b"IEND":
            break
        start = stop
    return b"".join(kept), exif


def _split_jpeg(data: bytes) -> tuple[bytes, bytes | None]:
    """Return a JPEG without the metadata before its first scan, and its Exif data if any."""
    kept, exif, start = [_JPEG], None, len(_JPEG)
    while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] >= 0xC0:
        marker = data[start + 1]
        if marker == 0xFF:  # padding
            start += 1
            continue
        if 0xD0 <= marker <= 0xDA:  # the first scan, or a marker without a length
            break
        stop = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        if marker not in _JPEG_METADATA:
            kept.append(data[start:stop])
        elif marker == 0xE1 and exif is None and data.startswith(b"Exif\0\0", start + 4):
            exif = data[start + 4 : stop]
        start = stop
    kept.append(data[start:])
    return b"".join(kept), exif


def _check_header(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Raise ImageError if decoding or scaling a picture would take too much memory or time."""
    size = f"{image.width} x {image.height} pixels"
    if image.width * image.height > max_pixels:
        raise ImageError(f"{size} exceed the limit of {max_pixels}; scale the picture down")
    if max(image.size) > MAX_ELONGATION * min(image.size):
        raise ImageError(f"{size}: more than {MAX_ELONGATION} times as long as wide; cut the picture")
    if data.startswith(_JPEG) and len(_START_OF_SCAN.findall(data)) > _MAX_JPEG_SCANS:
        raise ImageError(f"the JPEG has more than {_MAX_JPEG_SCANS} scans; save it again")


def _orientation(exif: bytes) -> int:
    """Return the orientation in Exif data; 1 (upright) if it is missing or unreadable."""
    metadata = Image.Exif()
    try:
        metadata.load(exif)
        return int(metadata.get(_EXIF_ORIENTATION, 1))
    except Exception:  # the same dozen types; the pixels are usable without the metadata
        return 1


def _scale_transparency(image: Image.Image, bit_depth: int) -> None:
    """Scale a PNG's transparent colour from the file's bit depth to that of Pillow's pixels."""
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int):
        image.info["transparency"] = colour * 255 // (2**bit_depth - 1)
    elif image.mode == "RGB" and bit_depth == 16 and isinstance(colour, tuple):
        image.info["transparency"] = tuple(channel >> 8 for channel in colour)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":  # Pillow would clip 16 bits at 255 instead of scaling them
        return _high_byte(image).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    """Return a grey picture of 16 bits as one of 8 bits; its transparent value becomes white."""
    content = image.tobytes()
    low, high = (Image.frombytes("L", image.size, content[place::2]) for place in (0, 1))
    colour = image.info.get("transparency")
    if colour is not None:
        is_low, is_high = ([255 * (value == byte) for value in range(256)] for byte in (colour & 0xFF, colour >> 8))
        high.paste(255, mask=ImageChops.darker(low.point(is_low), high.point(is_high)))
    return high


def main(pixels: int) -> None:
    """Answer requests until there are no more; a picture that takes too long ends the process.

    Args:
        pixels: Descriptor of the file in memory to which the pixels of each picture are written.
    """
    Image.MAX_IMAGE_PIXELS = None  # each request brings its own limit
    Image.init()  # imports the formats' readers before the first picture is timed
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody waits for an answer any more
    while len(header := sys.stdin.buffer.read(REQUEST.size)) == REQUEST.size:
        num_bytes, max_pixels, seconds = REQUEST.unpack(header)
        data = sys.stdin.buffer.read(num_bytes)
        size, message = (0, 0), b""
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            image = decode(data, max_pixels)
            size, content = image.size, image.tobytes()
            os.ftruncate(pixels, len(content))
            os.pwrite(pixels, content, 0)
        except ImageError as error:
            message = str(error.args[0]).encode(errors="replace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
        sys.stdout.buffer.write(REPLY.pack(*size, len(message), peak) + message)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
