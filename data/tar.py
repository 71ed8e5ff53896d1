"""Scanning a tar shard: where its samples lie, what they are labelled, what their images are.

Owns the reading of archives by GNU tar, PAX archivers, webdataset's writer and img2dataset,
uncompressed. A sample is the members of one name up to the base name's first dot; a link is the
member that it leads to. Its label is that of `.cls`, a decimal number; else of the `.json`'s field
`cls` or `label`; else of a `.txt` that holds a number. A field asked for by name is the only place
looked at. Names are bytes, of any encoding: what is not UTF-8 is kept as surrogates.
"""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import PurePosixPath
from typing import IO, Any

from data.base import DataError
from data.columns import MAX_LABEL, Columns, Flag, Torn, describe, hash_key, to_columns
from data.decode import IMAGE_SUFFIXES

_REWRITE = "copy or pack the shard again"
_LABEL_SUFFIXES = ("cls", "json", "txt")  # the first of them that has a label gives it
_LABEL_FIELDS = ("cls", "label")
_NUMBER_BYTES = 64  # a longer text is a caption
_HEADS = (4096, 1 << 16)  # bytes of an image that are read for its header, first and then
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_MAGIC_BYTES = 5  # the longest of them
_BLOCK = 512
_CHUNK = 1 << 20  # bytes read at a time of what follows the end
_MAX_LINKS = 40  # in a row, as Linux follows them


def scan_tar(
    file: IO[bytes], name: str, *, label_field: str | None = None, headers_only: bool = False
) -> Columns:
    """Return the index columns of the tar in a seekable `file`, in the order of its images.

    With `headers_only` of each image just the beginning is read, so that there is no CRC. Hidden
    files and further pictures of a sample are left out. Raises DataError naming the tar and the
    member at fault.
    """
    file.seek(0)
    scan = _Scan(file, name, label_field=label_field, headers_only=headers_only)
    try:
        with _open(file) as archive:
            for member in _members(archive):
                scan.visit(member)
            _check_end(file, name, archive.offset)
    except (tarfile.TarError, EOFError, OSError) as error:
        file.seek(0)
        if file.read(_MAGIC_BYTES).startswith(_COMPRESSED):
            raise DataError(
                f"{name} is compressed; uncompress it: shards are plain tars"
            ) from error
        raise DataError(f"{name} is not a whole tar archive ({error}); {_REWRITE}") from error
    return scan.columns()


def member_name(block: bytes) -> str:
    """Return the name in the 512-byte tar header that precedes a member's data, for messages."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "replace").name
    except tarfile.HeaderError:
        return block[:100].split(b"\0")[0].decode(errors="replace")


def sample_members(file: IO[bytes], key: int) -> tuple[str | None, dict[str, bytes]]:
    """Return the name of a sample and, by suffix, its members in `file`, a part of a tar.

    The part begins with a member's header and may end anywhere; `key` is the hash of the name,
    which is None if the part holds nothing of it.
    """
    name, found = None, dict[str, bytes]()
    with _open(file) as archive, suppress(tarfile.ReadError):  # the last member is cut off
        for member in _members(archive):
            if not member.isreg() or member.issparse() or _is_hidden(member):
                continue
            stem, suffix = _split_name(member.name)
            if hash_key(stem) == key:
                file.seek(member.offset_data)
                name, found[suffix] = stem, file.read(member.size)
    return name, found


def _open(file: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield every member, up to the one that is cut off."""
    for member in iter(archive.next, None):
        vars(archive)["members"].clear()  # it would keep them all: 1 KB each
        yield member


def _is_hidden(member: tarfile.TarInfo) -> bool:
    return PurePosixPath(member.name).name.startswith(".")


class _Scan:
    """One pass over the members of a tar."""

    def __init__(
        self, file: IO[bytes], name: str, *, label_field: str | None, headers_only: bool
    ) -> None:
        self._file = file
        self._name = name
        self._headers_only = headers_only
        self._label_fields = _LABEL_FIELDS if label_field is None else (label_field,)
        self._label_suffixes = _LABEL_SUFFIXES if label_field is None else ("json",)
        self._rows: dict[str, dict[str, int]] = {}
        self._labels: dict[str, tuple[int, int]] = {}  # by key, with the suffix's rank
        self._unfit: dict[str, list[str]] = {}  # what was seen where no label was found
        self._members: set[tuple[str, str]] = set()
        self._dotted: set[str] = set()

    def visit(self, member: tarfile.TarInfo) -> None:
        """Take in one member."""
        if not (member.isreg() or member.issym() or member.islnk()) or _is_hidden(member):
            return
        key, suffix = _split_name(member.name)
        kind = "image" if suffix in IMAGE_SUFFIXES else suffix
        if (key, kind) in self._members:
            raise self._fault(f"sample {key!r} occurs twice ({member.name})")
        if kind == "image":
            self._rows[key] = self._scan_image(key, self._file_of(member))
        elif suffix in self._label_suffixes:
            self._scan_label(key, suffix, self._file_of(member))
        elif suffix.rpartition(".")[2] in ("cls", *IMAGE_SUFFIXES):
            self._dotted.add(key)  # a further picture of the sample, or a name with a dot
            return
        self._members.add((key, kind))

    def columns(self) -> Columns:
        """Return the columns; raises DataError if an image and a label are not paired."""
        rows, labels = self._rows, self._labels
        # Text and fields without an image are notes of some kind; a .cls is meant for one.
        meant = {key for key, kind in self._members if kind == "cls"} | self._dotted
        lone = meant - rows.keys()
        if lone:
            raise self._fault(f"{min(lone)!r} lacks its image (a name ends at the first dot)")
        if not rows:
            raise self._fault("no samples")
        unlabelled = rows.keys() - labels.keys()
        if unlabelled:
            raise self._unlabelled(min(unlabelled), len(unlabelled))
        return to_columns([{**row, "label": labels[key][1]} for key, row in rows.items()])

    def _file_of(self, member: tarfile.TarInfo) -> tarfile.TarInfo:
        """Return the member that holds the bytes of this one, which may be a link."""
        file = member
        for _ in range(_MAX_LINKS):
            if file.isreg():
                break
            # A hard link names the member as it is called, a symbolic one the way there.
            folder = posixpath.dirname(file.name) if file.issym() else ""
            path = posixpath.normpath(posixpath.join(folder, file.linkname))
            if path not in self._by_path:
                break
            file = self._by_path[path]
        if not file.isreg():
            raise self._fault(
                f"{member.name} is a link to {member.linkname!r}, which is no file in it (GNU "
                "tar's --dereference stores files instead)"
            )
        if file.issparse():
            raise self._fault(f"{member.name} is stored with holes (GNU tar's --sparse)")
        return file

    @cached_property
    def _by_path(self) -> dict[str, tarfile.TarInfo]:
        """All members: read only where there are links, for they are 1 KB each."""
        self._file.seek(0)
        with _open(self._file) as archive:
            return {posixpath.normpath(member.name): member for member in _members(archive)}

    def _scan_image(self, key: str, member: tarfile.TarInfo) -> dict[str, int]:
        if member.size >= 1 << 32:
            raise self._fault(f"{member.name} has {member.size} bytes, more than an image has")
        crc32 = 0
        try:
            if self._headers_only:
                width, height, flags = self._read_head(member)
                flags |= Flag.NO_CRC
            else:
                content = self._read(member, member.size)
                width, height, flags = describe(content, whole=True)
                crc32 = zlib.crc32(content)
        except DataError as error:
            raise DataError(f"{self._name}: {member.name} {error}") from error
        return {
            "offset": member.offset_data,
            "key": hash_key(key),
            "size": member.size,
            "crc32": crc32,
            "width": width,
            "height": height,
            "flags": flags,
        }

    def _read_head(self, member: tarfile.TarInfo) -> tuple[int, int, Flag]:
        for limit in _HEADS:
            if limit < member.size:
                try:
                    return describe(self._read(member, limit), whole=False)
                except Torn:
                    continue
        return describe(self._read(member, member.size), whole=True)

    def _scan_label(self, key: str, suffix: str, member: tarfile.TarInfo) -> None:
        rank = _LABEL_SUFFIXES.index(suffix)
        if key in self._labels and self._labels[key][0] < rank:
            return
        label, seen = self._read_label(suffix, member)
        if label is None:
            self._unfit.setdefault(key, []).append(seen)
        else:
            self._labels[key] = (rank, label)

    def _read_label(self, suffix: str, member: tarfile.TarInfo) -> tuple[int | None, str]:
        """Return the label in a member, if any, and what was seen there."""
        if suffix == "json":
            return self._label_in_json(self._read(member, member.size))
        text = self._read(member, min(member.size, _NUMBER_BYTES))
        label = _as_label(text.decode(errors="replace")) if len(text) == member.size else None
        if suffix == "cls" and label is None:
            raise self._fault(
                f"{member.name} holds {text[:20]!r}, not a class number of at most six digits"
            )
        return label, f".{suffix} that begins {text[:20]!r}"

    def _label_in_json(self, text: bytes) -> tuple[int | None, str]:
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            return None, ".json that cannot be read"
        if not isinstance(fields, dict):
            return None, ".json without fields"
        shown = ", ".join(f"{name}={str(value)[:20]!r}" for name, value in fields.items())
        labels = (_as_label(fields.get(name)) for name in self._label_fields)
        return next(
            (label for label in labels if label is not None), None
        ), f".json with {shown[:300]}"

    def _unlabelled(self, key: str, count: int) -> DataError:
        seen = "; ".join(self._unfit.get(key, [])) or "its image alone"
        others = f", as do {count - 1} more" if count > 1 else ""
        places = ", ".join(f".{suffix}" for suffix in self._label_suffixes)
        return DataError(
            f"{self._name}: {key!r} lacks its class label{others}: no number in {places} (fields "
            f"{', '.join(self._label_fields)}), there is {seen}; add .cls members with the class "
            "number, or name the .json field that holds it with --label-field"
        )

    def _read(self, member: tarfile.TarInfo, count: int) -> bytes:
        self._file.seek(member.offset_data)
        content = self._file.read(count)
        if len(content) != count:
            raise EOFError(f"{member.name} ends after {len(content)} of {member.size} bytes")
        return content

    def _fault(self, text: str) -> DataError:
        return DataError(f"{self._name}: {text}; {_REWRITE}")


def _split_name(name: str) -> tuple[str, str]:
    """Split at the base name's first dot, as webdataset does: `a/b.c.jpg` -> `a/b`, `c.jpg`."""
    folder, slash, base = posixpath.normpath(name).rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix.lower()


def _as_label(value: Any) -> int | None:
    """Return a class number that is an integer or spelled as one, else None."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,6}\s*", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LABEL:
        return value
    return None


def _check_end(file: IO[bytes], name: str, offset: int) -> None:
    """A whole tar ends in two zero blocks or more, the first where its last member ends.

    One cut between two members has none, one with a damaged header has something else there, and
    of two tars in one file the second begins later.
    """
    file.seek(offset)
    first = file.read(2 * _BLOCK)
    if any(first[:_BLOCK]):
        raise DataError(f"{name} is damaged: no member begins at byte {offset}; {_REWRITE}")
    if len(first) < 2 * _BLOCK:
        raise DataError(f"{name} is truncated: its end mark is missing; {_REWRITE}")
    rest = first[_BLOCK:]
    while rest:
        if rest.strip(b"\0"):
            raise DataError(
                f"{name} goes on after its end, at byte {offset}: it is several tars in one file, "
                f"or damaged; {_REWRITE}"
            )
        rest = file.read(_CHUNK)
