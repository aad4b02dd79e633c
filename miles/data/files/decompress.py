"""The content of a file, decompressed, in pieces of bounded size.

    rows.jsonl           its bytes, by ranges
    rows.jsonl.gz, .zst  all members or frames, one after the other
    rows.jsonl.bz2, .xz  all streams
    a gzip cut off       SourceError: damaged or cut off behind byte 4,096 of 9,000 …
    text named .gz       SourceError: not a gzip file, as its name says, but …

Memory is bounded by what a file asks for, up to `MAX_WINDOW_BYTES`: how far back a compressed file
may refer.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from typing import IO

import zstandard

from miles.common import storage
from miles.common.file_errors import in_own_words
from miles.data.files import contents
from miles.errors import MilesError, SourceError

MAX_WINDOW_BYTES = 512 << 20
"""A zstd file that was written with a larger window (`--long=30` and above) is refused, as is an xz
file that needs more memory: each loader would hold as much."""
_PIECE_BYTES = 1 << 10
"""Decompressed at once of zstd: 32 MiB at most, since four bytes can stand for 128 KiB of one
character."""
_NEEDS_MEMORY = ("requires too much memory", "Memory usage limit")
"""In the errors of zstandard and of lzma: neither has a type of its own for it."""
_Decompressor = bz2.BZ2Decompressor | lzma.LZMADecompressor
"""The decompressor of one stream."""


def chunks_of(url: str, compression: str | None, buffer_bytes: int) -> Iterator[bytes]:
    """Yield a file's content, decompressed, in pieces of about `buffer_bytes`.

    Args:
        compression: None, "gzip", "zstd", "bz2" or "xz".

    Raises:
        SourceError: the file is missing, damaged, cut off, or not compressed so.
    """
    raw = storage.RangeFile(url)
    if compression is None:
        while chunk := raw.read(buffer_bytes):
            yield chunk
        return

    buffered = io.BufferedReader(raw, max(buffer_bytes, contents.HEAD_BYTES))
    head = buffered.peek()[: contents.HEAD_BYTES]
    contents.require_compression(url, compression, head)
    pieces = {
        "gzip": _gzip_pieces,
        "zstd": _zstd_pieces,
        "bz2": _bz2_pieces,
        "xz": _xz_pieces,
    }[compression](buffered, buffer_bytes)
    with _naming(url, compression, head, buffered):
        yield from pieces


@contextlib.contextmanager
def _naming(url: str, compression: str, head: bytes, raw: IO[bytes]) -> Iterator[None]:
    """Turn an error of decompressing into one that names the file, the place and the remedy.

    Args:
        head: the first bytes of the compressed file.
        raw: the compressed file, which stands where it was read up to.
    """
    try:
        yield
    except MilesError:
        raise
    # zlib.error, BadGzipFile, ZstdError, LZMAError, EOFError, OSError, …
    except Exception as error:
        # Neither of these moves anything but the place: no byte is read again.
        place = raw.tell()
        num_bytes = raw.seek(0, io.SEEK_END)

        if any(words in str(error) for words in _NEEDS_MEMORY):
            raise SourceError(f"{url}: {_too_large(head, compression)}") from error
        raise SourceError(
            f"{url}: damaged or cut off ({in_own_words(error)}), within the first {place:,} of its "
            f"{num_bytes:,} bytes of {compression} data. Copy or write it again"
        ) from error


def _too_large(head: bytes, compression: str) -> str:
    """Return what a compressed file asks for, the limit, and the remedy: the end of a sentence."""
    limit = f"at most {MAX_WINDOW_BYTES >> 20} MiB are given, since every loader holds them"
    if compression == "xz":
        return f"its xz data needs more memory than that: {limit}. Compress it again: xz -6"
    window = zstandard.get_frame_parameters(head).window_size
    long = max(window - 1, 1).bit_length()
    return (
        f"its zstd window has {window >> 20:,} MiB, and {limit}. Compress it again with a smaller "
        f"one: zstd -d --long={long} --stdout OLD | zstd -o NEW"
    )


def _gzip_pieces(raw: IO[bytes], buffer_bytes: int) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=raw)
    while piece := stream.read(buffer_bytes):
        yield piece


def _bz2_pieces(raw: IO[bytes], buffer_bytes: int) -> Iterator[bytes]:
    return _stream_pieces(raw, buffer_bytes, bz2.BZ2Decompressor, b"")


def _xz_pieces(raw: IO[bytes], buffer_bytes: int) -> Iterator[bytes]:
    def decompressor() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=MAX_WINDOW_BYTES)

    return _stream_pieces(raw, buffer_bytes, decompressor, b"\0")


def _stream_pieces(
    raw: IO[bytes], buffer_bytes: int, make: Callable[[], _Decompressor], padding: bytes
) -> Iterator[bytes]:
    """Yield the content of all streams of a file.

    Python's own file objects of these take junk behind the first stream for the end of the file.

    Args:
        make: the decompressor of one stream.
        padding: bytes that may stand between streams.
    """
    stream: _Decompressor | None = None
    data = b""
    while True:
        if not data and (stream is None or stream.eof or stream.needs_input):
            data = raw.read(buffer_bytes)
            if not data:
                break
        if stream is None or stream.eof:
            data = data.lstrip(padding) if padding else data
            if not data:
                continue
            stream = make()

        piece = stream.decompress(data, buffer_bytes)
        data = stream.unused_data if stream.eof else b""
        if piece:
            yield piece

    if stream is not None and not stream.eof:
        raise EOFError("the file ends within a stream")


def _zstd_pieces(raw: IO[bytes], buffer_bytes: int) -> Iterator[bytes]:
    """Yield the content of all frames of a zstd file.

    zstandard's own stream reader ends at the first frame's end, and where a truncated file ends it
    reports no error.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    frame = decompressor.decompressobj()
    has_begun = False
    ready = bytearray()

    while piece := raw.read(_PIECE_BYTES):
        has_begun = True
        while piece:
            if frame.eof:
                frame = decompressor.decompressobj()
            ready += frame.decompress(piece)
            piece = frame.unused_data
        if len(ready) >= buffer_bytes:
            yield bytes(ready)
            ready.clear()

    if has_begun and not frame.eof:
        raise EOFError("the file ends within a zstd frame")
    if ready:
        yield bytes(ready)
