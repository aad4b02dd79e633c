"""The kind of a file by its first bytes, where that is not what its name says.

b"\\x1f\\x8b…"                      gzip data: name it ….gz
b"PAR1…"                           a Parquet file: name it ….parquet
b"version https://git-lfs…"        a Git LFS pointer: git lfs pull
b"<!DOCTYPE html>…"                an HTML page, such as of a sign-in: download the file again
b"\\xff\\xfe{\\0…"                   UTF-16 text: iconv …
"""

from __future__ import annotations

import codecs
import posixpath
import re
from dataclasses import dataclass

from miles.data.file_formats import FORMATS, format_of
from miles.errors import SourceError

HEAD_BYTES = 1 << 10
"""First bytes of a file that are enough for any function here."""


@dataclass(frozen=True)
class _Magic:
    """A kind of file that begins with certain bytes."""

    begins: tuple[bytes, ...]
    what: str
    suffix: str = ""
    """for a name that says so; "" where miles does not read such a file"""
    remedy: str = ""
    """where there is no such name"""
    at: int = 0
    """the byte at which it "begins\""""


_UNPACK = "Unpack it, and name what was in it"
_EXPORT = "Write its rows as JSON lines or Parquet"
_COMPRESSIONS = {
    "gzip": _Magic((b"\x1f\x8b",), "gzip data", ".gz"),
    "zstd": _Magic(
        (b"\x28\xb5\x2f\xfd", *(bytes([byte]) + b"\x2a\x4d\x18" for byte in range(0x50, 0x60))),
        "zstd data",
        ".zst",
    ),
    "bz2": _Magic((b"BZh",), "bzip2 data", ".bz2"),
    "xz": _Magic((b"\xfd7zXZ\x00",), "xz data", ".xz"),
}
_PARQUET = _Magic((b"PAR1",), "a Parquet file", ".parquet")
_ARROW = _Magic((b"ARROW1", b"\xff\xff\xff\xff"), "Arrow data", ".arrow")
_MAGICS = (
    *_COMPRESSIONS.values(),
    _PARQUET,
    _ARROW,
    _Magic((b"PK\x03\x04", b"PK\x05\x06"), "a zip archive", remedy=_UNPACK),
    _Magic((b"7z\xbc\xaf\x27\x1c",), "a 7z archive", remedy=_UNPACK),
    _Magic((b"ustar",), "a tar archive", remedy=_UNPACK, at=257),
    _Magic((b"\x04\x22\x4d\x18",), "lz4 data", remedy="Unpack it: lz4 -d"),
    _Magic((b"SQLite format 3\0",), "an SQLite database", remedy=_EXPORT),
    _Magic((b"%PDF-",), "a PDF", remedy=_EXPORT),
    _Magic((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a Python pickle", remedy=_EXPORT),
)
_LFS = b"version https://git-lfs.github.com/spec/"
_LFS_SIZE = re.compile(rb"^size (\d+)", re.MULTILINE)
_BOMS = (
    (b"\xff\xfe\0\0", "UTF-32LE"),
    (b"\0\0\xfe\xff", "UTF-32BE"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_HTML = re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_XML = re.compile(rb"<(\?xml|Error>)")
_JSON = re.compile(rb"\s*[{\[]\s*[\"{\[]")
"""JSON's beginning; in CSV the mark would stand within a field."""
_NAME = r"\"?[A-Za-z_][\w .-]{0,40}\"?"
_CSV_HEADER = re.compile(rf"{_NAME}([,;\t|]){_NAME}(?:\1{_NAME})*", re.ASCII)
_DOWNLOAD = (
    "Something else than the file was downloaded: do so again, with the credentials that it needs"
)


def require_text(
    url: str, head: bytes, compression: str | None = None, expected: str = "JSON"
) -> None:
    """Refuse a file of text that begins as something else does.

    Args:
        head: its first bytes, decompressed: `HEAD_BYTES`, or all that there are.
        compression: of the file, as its name says.
        expected: what the text is, by the file's name.

    Raises:
        SourceError: it does; the error says what it is, and what to do.
    """
    found = _text_fault(url, head) or _magic_fault(url, head, compression)
    if found:
        where = f"{url}: " + (f"within the {compression} data: " if compression else "")
        raise SourceError(f"{where}not {expected}, but {found}")


def require_compression(url: str, compression: str, head: bytes) -> None:
    """Refuse a file that is not compressed as its name says.

    Args:
        head: its first bytes, as they are.

    Raises:
        SourceError: it is not; the error says what it is, and what to do.
    """
    own = _COMPRESSIONS[compression]
    if not head or _begins(head, own):
        return
    found = _text_fault(url, head) or _magic_fault(url, head, None)
    if not found and head.lstrip()[:1] in (b"{", b"["):
        found = f"JSON text. Name it {_without(url, own.suffix)}"
    found = found or "something else. Copy or write it again, or give it the name of what it is"
    article = "an" if compression == "xz" else "a"
    raise SourceError(f"{url}: not {article} {compression} file, as its name says, but {found}")


def require_csv(url: str, head: bytes, compression: str | None) -> None:
    """Refuse a file of CSV that is JSON. As `require_text`."""
    begin = head.removeprefix(codecs.BOM_UTF8)
    if _JSON.match(begin):
        packed = _COMPRESSIONS[compression].suffix if compression else ""
        suffix = ".json" if begin.lstrip()[:1] == b"[" else ".jsonl"
        name = _renamed(url, suffix + packed)
        raise SourceError(f"{url}: not CSV, as its name says, but JSON text. Name it {name}")


def csv_suffix(line: str) -> str:
    """Return the suffix of a file of CSV whose header a line may be; "": it looks like none."""
    header = _CSV_HEADER.fullmatch(line.strip().removeprefix("\ufeff"))
    if header is None:
        return ""
    return ".tsv" if header[1] == "\t" else ".csv"


def require_parquet(url: str, head: bytes) -> None:
    """Refuse a file that does not begin as Parquet does.

    Args:
        head: its first bytes.

    Raises:
        SourceError: it does not, and what it is can be told.
    """
    _require_table(url, head, _PARQUET)


def require_arrow(url: str, head: bytes) -> None:
    """Refuse a file that does not begin as Arrow IPC does. As `require_parquet`."""
    _require_table(url, head, _ARROW)


def _require_table(url: str, head: bytes, expected: _Magic) -> None:
    if not head or _begins(head, expected):
        return
    found = _text_fault(url, head) or _magic_fault(url, head, None)
    if not found and head.lstrip()[:1] in (b"{", b"["):
        found = f"JSON text. Name it {_renamed(url, '.jsonl')}"
    if not found and b"\n" in head:
        suffix = csv_suffix(head.partition(b"\n")[0].decode("utf-8", "replace"))
        found = f"CSV text. Name it {_renamed(url, suffix)}" if suffix else ""
    if found:
        raise SourceError(f"{url}: not {expected.what}, as its name says, but {found}")


def _text_fault(url: str, head: bytes) -> str:
    """Return what a text is, if it is no rows, and what to do: "" if nothing can be told."""
    if head.startswith(_LFS):
        size = _LFS_SIZE.search(head)
        held = f" for {int(size[1]):,} bytes" if size else ""
        return (
            f"a Git LFS pointer{held}: the file itself was not downloaded. In its repository: "
            "git lfs pull"
        )

    encoding = _encoding_of(head)
    if encoding:
        name = posixpath.basename(url)
        return (
            f"{encoding} text; UTF-8 was expected. Convert it: iconv -f {encoding} -t UTF-8 "
            f"{name} > NEW"
        )

    begin = head.lstrip()
    if _HTML.match(begin):
        return f"an HTML page, such as of a sign-in or an error. {_DOWNLOAD}"
    if _XML.match(begin):
        return f"XML, such as a store's error. {_DOWNLOAD}"

    if head[:8] == b"\0" * 8:
        return (
            "NUL bytes, as a file has that was cut off by a crash or a full disk. Copy or write it "
            "again"
        )
    return ""


def _encoding_of(head: bytes) -> str:
    """Return the encoding of a text that is UTF-16 or UTF-32, for `iconv`; "" for any other."""
    for bom, encoding in _BOMS:
        if head.startswith(bom):
            return encoding
    # JSON begins with two characters of ASCII, whose zeros lie on one side.
    zeros = tuple(byte == 0 for byte in head[:4])
    encodings: dict[tuple[bool, ...], str] = {
        (False, True, False, True): "UTF-16LE",
        (True, False, True, False): "UTF-16BE",
        (False, True, True, True): "UTF-32LE",
        (True, True, True, False): "UTF-32BE",
    }
    return encodings.get(zeros, "")


def _magic_fault(url: str, head: bytes, compression: str | None) -> str:
    """Return what a file is by its first bytes, and what to do: "" if nothing can be told."""
    for magic in _MAGICS:
        if not _begins(head, magic):
            continue
        if not magic.suffix:
            return f"{magic.what}. {magic.remedy}"
        if compression is not None:
            return f"{magic.what}: it was packed twice. Unpack it once, and name what was in it"
        is_packed = magic in _COMPRESSIONS.values()
        name = _packed(url, magic.suffix) if is_packed else _renamed(url, magic.suffix)
        return f"{magic.what}. Name it {name}"
    return ""


def _begins(head: bytes, magic: _Magic) -> bool:
    return head.startswith(magic.begins, magic.at)


def _packed(url: str, suffix: str) -> str:
    """Return a file's name with the suffix of a compression: rows.jsonl -> rows.jsonl.gz."""
    name = posixpath.basename(url)
    kind, compression = format_of(url)
    if compression is not None:
        return _without(url, "." + name.rpartition(".")[2]) + suffix
    return name + suffix if kind != "parquet" else _renamed(url, ".jsonl" + suffix)


def _without(url: str, suffix: str) -> str:
    name = posixpath.basename(url)
    return name[: -len(suffix)] if name.lower().endswith(suffix.lower()) else name


def _renamed(url: str, suffix: str) -> str:
    """Return a file's name with another suffix: rows.jsonl.gz -> rows.parquet."""
    name = posixpath.basename(url)
    for known in sorted(FORMATS, key=len, reverse=True):
        if name.lower().endswith(known):
            return name[: -len(known)] + suffix
    return name + suffix
