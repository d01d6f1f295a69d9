"""Image files made to cost, and those whose pixels are whole though their metadata are not."""

from __future__ import annotations

import io
import os
import signal
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gemel_engine.errors import ImageError
from gemel_engine.vision import decode as image_file
from gemel_engine.vision.decode import decode_image
from gemel_engine.vision.encoder import ImageEncoder, PictureEncoder

MAX_PIXELS = 50_000_000
ORIENTATION, GPS, RATIONAL, SHORT, LONG = 0x0112, 0x8825, 10, 3, 4


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def halves(size: int = 16) -> Image.Image:
    """White above, black below."""
    image = Image.new("L", (size, size))
    image.paste(255, (0, 0, size, size // 2))
    return image


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: bytes, size: tuple[int, int], depth: int, colour: int, *between: bytes, after: bytes = b"") -> bytes:
    """Rows of `pixels`, each with its filter; chunks before and after them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    image = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(between) + image + after + chunk(b"IEND", b"")


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def exif(*, orientation: int = 6, gps: bool = True) -> bytes:
    """Exif data, with a latitude of -1/0."""
    entries = [struct.pack("<HHIHH", ORIENTATION, SHORT, 1, orientation, 0)]
    entries += [struct.pack("<HHII", GPS, LONG, 1, 38)] * gps
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    latitude = struct.pack("<HHHIII", 1, 2, RATIONAL, 1, 56, 0) + struct.pack("<ii", -1, 0)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory + (latitude if gps else b"")


def run_lengths(side: int) -> bytes:
    """A BMP of a few bytes a row, each of which takes as many steps as the row has pixels."""
    rows = b"\1\0\0\0" * side
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078) + header + bytes(1024) + rows


def many_scans(image_format: str, number: int, side: int = 64) -> bytes:
    images = {"save_all": True, "append_images": [Image.new("L", (8, 8))]} if image_format == "MPO" else {}
    data = encoded(Image.new("L", (side, side)), image_format, progressive=True, **images)
    end = data.index(b"\xff\xd9")
    last_scan = data[data.rindex(b"\xff\xda", 0, end) : end]
    return data[:end] + last_scan * number + data[end:]


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[image_file._Decoders]:
    """Those that the test starts."""
    ours = image_file._Decoders()
    monkeypatch.setattr(image_file, "_decoders", ours)
    yield ours
    ours.end()


SLOW = {
    "BMP": run_lengths(7_000),
    "GIF": encoded(Image.new("L", (8, 8)), "GIF")[:-1] + b"",
    "JPEG": many_scans("JPEG", 400, 3_000),
    "PNG": png(b"\0", (1, 1), 8, 0)[:-12] + chunk(b"IDAT", b"") * 1_000_000,
    "WEBP": encoded(Image.effect_noise((3_000, 3_000), 200).convert("RGB"), "WEBP", lossless=True, quality=0, method=0),
}
SLOW["GIF"] = SLOW["GIF"][:13] + b"!\xfe\x01x\0" * 1_000_000 + SLOW["GIF"][13:]


@pytest.mark.parametrize("image_format", SLOW)
def test_a_slow_picture_is_an_error_whatever_its_format_and_the_others_go_on(
    image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_file, "MAX_SECONDS", 0.2)
    with pytest.raises(ImageError, match=r"^image: decoding takes more than 0.2 s; scale the picture down"):
        decode_image(SLOW[image_format], MAX_PIXELS)
    assert decode_image(encoded(halves(), image_format), MAX_PIXELS).size == (16, 16)


@pytest.mark.parametrize("image_format", ["JPEG", "MPO"])
def test_scans_are_counted_in_every_container_of_jpeg_data(image_format: str) -> None:
    assert decode_image(many_scans(image_format, 400), MAX_PIXELS).size == (64, 64)
    data = many_scans(image_format, 600)
    for disguised in (data, data[:2] + b"\0" + data[2:], data.replace(b"\xff\xda", b"\xff\xff\xda")):
        with pytest.raises(ImageError, match=r"more than 500 scans|damaged|not a picture"):
            decode_image(disguised, MAX_PIXELS)


def test_the_rows_beside_a_slow_picture_get_their_features(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_file, "MAX_SECONDS", 0.2)
    encoder = PictureEncoder(ImageEncoder(str(artifacts["image_encoder"])), MAX_PIXELS, 2)
    honest = encoded(halves(), "PNG")
    first, slow, last = encoder.encode([honest, SLOW["BMP"], honest])
    assert str(slow).startswith("image: decoding takes more than")
    assert isinstance(first, np.ndarray)
    np.testing.assert_array_equal(first, last)


def test_a_decoding_process_that_was_killed_is_replaced(decoders: image_file._Decoders) -> None:
    data = encoded(halves(), "PNG")
    decode_image(data, MAX_PIXELS)
    (decoder,) = decoders._idle
    os.kill(decoder._process.pid, signal.SIGKILL)
    assert decode_image(data, MAX_PIXELS).size == (16, 16)
    assert decoders._idle != [decoder]
    assert decoders.peak_bytes > 1_000_000


@pytest.mark.usefixtures("decoders")
def test_a_picture_over_which_processes_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ImageError, match="3 processes ended while they decoded the picture"):
        decode_image(encoded(halves(), "PNG"), MAX_PIXELS)


def test_an_interrupt_leaves_no_answer_behind(decoders: image_file._Decoders) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    decode_image(encoded(halves(), "PNG"), MAX_PIXELS)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            decode_image(SLOW["BMP"], MAX_PIXELS)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert decoders._idle == []
    assert decode_image(encoded(halves(24), "PNG"), MAX_PIXELS).size == (24, 24)


def test_every_thread_gets_its_own_picture(decoders: image_file._Decoders) -> None:
    sizes = range(2, 66, 2)
    with ThreadPoolExecutor(8) as threads:
        images = threads.map(lambda size: decode_image(encoded(halves(size), "PNG"), MAX_PIXELS), sizes)
    assert [image.width for image in images] == list(sizes)
    assert 1 <= len(decoders._idle) <= (os.cpu_count() or 1)


def test_a_forked_process_starts_decoders_of_its_own(decoders: image_file._Decoders) -> None:
    decode_image(encoded(halves(), "PNG"), MAX_PIXELS)
    image_file._forget_decoders()
    assert decode_image(encoded(halves(), "PNG"), MAX_PIXELS).size == (16, 16)
    assert image_file._decoders is not decoders
    image_file._decoders.end()


def test_decoders_end_with_the_process_that_started_them(decoders: image_file._Decoders) -> None:
    decode_image(encoded(halves(), "PNG"), MAX_PIXELS)
    (decoder,) = decoders._idle
    decoder._requests.close()  # which is what the end of this process does
    assert decoder._process.wait(60) == 0


TEXT = b"key\0\0" + zlib.compress(b"x" * 2_000_000)
BROKEN_CHUNKS = {
    "a long text": chunk(b"zTXt", TEXT),
    "a long text in any language": chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)),
    "much text": chunk(b"zTXt", b"key\0\0" + zlib.compress(b"x" * 1_000_000)) * 70,
    "a colour profile of another compression": chunk(b"iCCP", b"name\0\7junk"),
    "a long colour profile": chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2_000_000))),
    "a wrong checksum": chunk(b"tEXt", b"key\0text")[:-1] + b"?",
    "a short gamma": chunk(b"gAMA", b"\0"),
    "a broken animation": chunk(b"acTL", b"\0") + chunk(b"fcTL", b"\0"),
    "an unknown chunk": chunk(b"a\0\xffb", b"?"),
    "Exif data with a wrong checksum": chunk(b"eXIf", exif()[6:])[:-1] + b"?",
    "Exif data that are none": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "many chunks": chunk(b"abCd", b"") * 50_000,
}
ROWS = b"".join(bytes([0]) + bytes([value] * 16) for value in [255] * 8 + [0] * 8)


@pytest.mark.parametrize("broken", BROKEN_CHUNKS)
def test_a_png_is_decoded_whatever_its_metadata_are(broken: str) -> None:
    metadata, good = BROKEN_CHUNKS[broken], chunk(b"eXIf", exif(gps=False)[6:])
    for data in (png(ROWS, (16, 16), 8, 0, metadata), png(ROWS, (16, 16), 8, 0, after=metadata)):
        assert decode_image(data, MAX_PIXELS).tobytes() == halves().convert("RGB").tobytes()
    if "Exif" not in broken:
        turned = decode_image(png(ROWS, (16, 16), 8, 0, metadata, good), MAX_PIXELS)
        assert turned.tobytes() == halves().convert("RGB").transpose(Image.Transpose.ROTATE_270).tobytes()


BROKEN_SEGMENTS = {
    "Exif data that end": segment(0xE1, exif()[:12]),
    "Exif data that are none": segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "an orientation that is none": segment(0xE1, exif(orientation=99, gps=False)),
    "an index of pictures that is none": segment(0xE2, b"MPF\0MM\0*\xff\xff\xff\xff"),
    "an index of pictures without their number": segment(0xE2, b"MPF\0" + exif(gps=False)[6:]),
    "a colour profile in pieces that lack": segment(0xE2, b"ICC_PROFILE\0\2\7junk"),
    "resources that end": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff\xff\xff"),
    "a comment": segment(0xFE, b"\xff\xd9"),
}


@pytest.mark.parametrize("broken", BROKEN_SEGMENTS)
def test_a_jpeg_is_decoded_whatever_its_metadata_are(broken: str) -> None:
    plain = encoded(halves(), "JPEG")
    expected = decode_image(plain, MAX_PIXELS)
    assert decode_image(plain[:2] + BROKEN_SEGMENTS[broken] + plain[2:], MAX_PIXELS).tobytes() == expected.tobytes()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_though_its_place_is_no_number(image_format: str, orientation: int) -> None:
    upright = Image.new("L", (32, 16))
    upright.paste(255, (0, 0, 8, 8))
    as_stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = upright.transpose(as_stored[orientation]) if orientation > 1 else upright
    decoded = decode_image(encoded(turned.convert("RGB"), image_format, exif=exif(orientation=orientation)), MAX_PIXELS)
    assert decoded.size == upright.size
    assert np.abs(np.asarray(decoded.convert("L"), float) - np.asarray(upright, float)).mean() < 8


TRANSPARENT = {
    "1 bit of grey": png(b"\0\x80", (2, 1), 1, 0, chunk(b"tRNS", b"\0\0")),
    "2 bits of grey": png(b"\0\x40", (2, 1), 2, 0, chunk(b"tRNS", b"\0\0")),
    "2 bits of grey, transparent grey": png(b"\0\x60", (2, 1), 2, 0, chunk(b"tRNS", b"\0\2")),
    "4 bits of grey": png(b"\0\x5a", (2, 1), 4, 0, chunk(b"tRNS", b"\0\x0a")),
    "8 bits of grey": png(b"\0\x55\x0a", (2, 1), 8, 0, chunk(b"tRNS", b"\0\x0a")),
    "16 bits of grey": png(b"\0\x55\x0a\0\0", (2, 1), 16, 0, chunk(b"tRNS", b"\0\0")),
    "16 bits of grey, low byte alone": png(b"\0\x55\0\x55\x01", (2, 1), 16, 0, chunk(b"tRNS", b"\x55\x01")),
    "8 bits of colour": png(b"\0\x55\x55\x55\1\2\3", (2, 1), 8, 2, chunk(b"tRNS", b"\0\1\0\2\0\3")),
    "16 bits of colour": png(b"\0" + b"\x55\x77" * 3 + b"\1\2" * 3, (2, 1), 16, 2, chunk(b"tRNS", b"\1\2" * 3)),
    "16 bits of grey and as many of cover": png(b"\0\x55\0\xff\xff\0\0\0\0", (2, 1), 16, 4),
}


@pytest.mark.parametrize("colours", TRANSPARENT)
def test_a_transparent_colour_becomes_white_at_every_depth(colours: str) -> None:
    first, second = np.asarray(decode_image(TRANSPARENT[colours], MAX_PIXELS))[0, :, 0].tolist()
    assert second == 255
    assert first == {"1 bit of grey": 255}.get(colours, 0x55)


def test_many_chunks_of_metadata_cost_little() -> None:
    started = time.process_time()
    assert decode_image(png(ROWS, (16, 16), 8, 0, chunk(b"tEXt", b"k\0t") * 1_500_000), MAX_PIXELS).size == (16, 16)
    assert time.process_time() - started < 5
