"""Decodes untrusted image files in child processes, which end when a picture takes too long."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

from PIL import Image

from gemel_engine.errors import ImageError
from gemel_engine.vision.decoder import ACCEPTED_FORMATS, REPLY, REQUEST

__all__ = ["ACCEPTED_FORMATS", "MAX_SECONDS", "decode_image", "decoder_peak_bytes"]

MAX_SECONDS = 10.0  # CPU time for one picture; 50 million pixels take up to 2 s
_ATTEMPTS = 3


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode untrusted bytes into an upright RGB picture, as `decoder.decode` does; thread-safe.

    Raises:
        ImageError: The bytes are not an accepted picture, or decoding them takes more than
            `MAX_SECONDS` of CPU time, or has ended three processes.
    """
    return _decoders.decode(data, max_pixels)


def decoder_peak_bytes() -> int:
    """Return the largest peak memory of this process's decoding processes, in bytes."""
    return _decoders.peak_bytes


class _Decoder:
    """A process that decodes one picture after another.

    Attributes:
        peak_bytes: Peak memory of the process, in bytes.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._pixels = os.memfd_create("pixels")  # a pipe would transfer them in pieces
        weakref.finalize(self, os.close, self._pixels)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "gemel_engine.vision.decoder", str(self._pixels)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._pixels],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            process_group=0,  # Ctrl-C goes to this process alone, which then ends the child
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout

    def decode(self, data: bytes, max_pixels: int) -> Image.Image:
        """Decode one picture.

        Raises:
            ImageError: The bytes are not an accepted picture.
            EOFError: The process has ended.
        """
        try:
            self._requests.write(REQUEST.pack(len(data), max_pixels, MAX_SECONDS))
            self._requests.write(data)
            self._requests.flush()
        except BrokenPipeError as error:
            raise EOFError from error
        width, height, message_bytes, self.peak_bytes = REPLY.unpack(self._read(REPLY.size))
        if message_bytes:
            raise ImageError(self._read(message_bytes).decode())
        return Image.frombytes("RGB", (width, height), os.pread(self._pixels, 3 * width * height, 0))

    def _read(self, num_bytes: int) -> bytes:
        content = self._replies.read(num_bytes)
        if len(content) < num_bytes:
            raise EOFError
        return content

    def end(self) -> int:
        """End the process; return its exit status, which is negative for a signal."""
        self._process.kill()
        status = self._process.wait()
        for stream in (self._requests, self._replies):
            with suppress(BrokenPipeError):  # a request was not read to its end
                stream.close()
        return status


class _Decoders:
    """A pool of decoding processes: started on demand, at most one for each CPU, and kept."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._idle: list[_Decoder] = []
        self._slots = threading.BoundedSemaphore(os.cpu_count() or 1)

    def decode(self, data: bytes, max_pixels: int) -> Image.Image:
        """See `decode_image`."""
        status = 0
        with self._slots:
            for _ in range(_ATTEMPTS):
                decoder = self._take()
                try:
                    image = decoder.decode(data, max_pixels)
                except ImageError:
                    self._put_back(decoder)
                    raise
                except EOFError:
                    status = decoder.end()
                    if status == -signal.SIGPROF:
                        break
                except BaseException:  # a late reply would be taken for that to the next request
                    decoder.end()
                    raise
                else:
                    self._put_back(decoder)
                    return image
        if status == -signal.SIGPROF:
            raise ImageError(f"decoding takes more than {MAX_SECONDS:g} s; scale the picture down, or save it again")
        raise ImageError(f"{_ATTEMPTS} processes ended while they decoded the picture (status {status}); save it again")

    def _take(self) -> _Decoder:
        try:
            return self._idle.pop()
        except IndexError:
            return _Decoder()

    def _put_back(self, decoder: _Decoder) -> None:
        self.peak_bytes = max(self.peak_bytes, decoder.peak_bytes)
        self._idle.append(decoder)

    def end(self) -> None:
        """End all idle processes."""
        while self._idle:
            self._idle.pop().end()


_decoders = _Decoders()


def _forget_decoders() -> None:
    """Start with an empty pool after a fork; the parent keeps its processes."""
    global _decoders
    _decoders = _Decoders()


os.register_at_fork(after_in_child=_forget_decoders)
atexit.register(lambda: _decoders.end())
