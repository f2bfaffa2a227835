"""Files that are not the text they are taken for, recognised by their first bytes before any work starts."""

import codecs
from pathlib import PurePosixPath

from features.errors import UserError
from pipeline.ingest.files import codec_of

COMPRESSED = {b"\x1f\x8b": ("gzip", ".gz"), b"\x28\xb5\x2f\xfd": ("zstd", ".zst"), b"BZh": ("bzip2", ".bz2"),
              b"\x04\x22\x4d\x18": ("lz4", ".lz4")}  # fmt: skip
OTHERS = {
    b"PAR1\x15": "is Parquet: set format: parquet", b"Obj\x01": "is Avro: set format: avro",
    b"PK\x03\x04": "is a ZIP archive or an Excel workbook: unpack it, or save it as CSV",
    b"\xfd7zXZ\0": "is packed with xz: unpack it, or pack it with gzip or zstd",
    b"ARROW1\0\0": "is Arrow IPC: write it as Parquet",
    b"\x89PNG\r\n": "is a picture", b"%PDF-": "is a PDF",
    b"SQLite format 3\0": "is an SQLite database: export its table as CSV",
    b"\0\0\xfe\xff": "is UTF-32: convert it with iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe\0\0": "is UTF-32: convert it with iconv -f UTF-32 -t UTF-8",
    b"\xfe\xff": "is UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
    b"\xff\xfe": "is UTF-16: convert it with iconv -f UTF-16 -t UTF-8",
}  # fmt: skip
PROBED_BYTES = 4096
ORC_BYTES = 64  # text may begin with ORC, too, as ORCID does, but has no NUL so soon
TEXT_BYTES = bytes(byte for byte in range(256) if byte >= 32 or byte in b"\t\n\v\f\r")
FEW_CONTROLS = 3  # that a line of text may have
BZIP2_BLOCK = slice(4, 10), (b"1AY&SY", b"\x17rE8P\x90")  # of the first block, or the end where there is none


def check_text(path: str, head: bytes) -> None:
    """Checks the first bytes of a text file, decompressed by its name.

    Raises:
        UserError: they are of another format, of another encoding than UTF-8, or no text, or lines end with CR alone.
    """
    if reason := _other(path, head) or _wide(head):
        raise UserError(f"{path}: {reason}.")
    line = head.partition(b"\n")[0]
    controls = line.translate(None, TEXT_BYTES)
    if len(controls) > FEW_CONTROLS and (b"\0" in controls or not _is_utf8(line)):
        found = "NUL bytes" if b"\0" in controls else "control characters, and is not UTF-8"
        raise UserError(
            f"{path}: is no text: its first line has {found}. Leave it out of the schema's files, or fix it."
        )
    if b"\n" not in head and b"\r" in head.rstrip(b"\r"):
        raise UserError(f"{path}: its lines end with CR alone. Convert it with tr '\\r' '\\n'.")


def _is_utf8(start: bytes) -> bool:
    """Whether bytes are UTF-8, of which the last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return True


def check_packed(path: str, head: bytes) -> None:
    """Checks the first bytes, as they are, of a file that cannot be decompressed as its name says. Raises UserError."""
    own = next((magic for magic, (_, ending) in COMPRESSED.items() if path.endswith(ending)), b"")
    if not head.startswith(own):
        plain = f"is not {codec_of(path)}: rename it to {PurePosixPath(path).stem} if it is plain text"
        raise UserError(f"{path}: {_other(path, head) or plain}.")


def _other(path: str, head: bytes) -> str | None:
    """What to do with a file that is compressed in another way than its name says, or no text."""
    for magic, (name, ending) in COMPRESSED.items():
        if head.startswith(magic) and (name != "bzip2" or head[BZIP2_BLOCK[0]] in BZIP2_BLOCK[1]):
            file = PurePosixPath(path)
            if file.name.endswith(ending):
                return f"is {name}, packed twice: unpack it once"
            plain = file.stem if codec_of(path) else file.name
            return f"is {name} under the name {file.name}: rename it to {plain}{ending}"
    if head.startswith(b"ORC") and b"\0" in head[:ORC_BYTES]:
        return "is ORC: write it as Parquet"
    return next((reason for magic, reason in OTHERS.items() if head.startswith(magic)), None)


def _wide(head: bytes) -> str | None:
    """The reason for text of two or four bytes a character, without a mark, that is mostly ASCII."""
    probe = head[: PROBED_BYTES - PROBED_BYTES % 4]
    nulls = [probe[place::4].count(0) / max(len(probe[place::4]), 1) for place in range(4)]
    patterns = {
        "UTF-32LE": (0, 1, 1, 1), "UTF-32BE": (1, 1, 1, 0), "UTF-16LE": (0, 1, 0, 1), "UTF-16BE": (1, 0, 1, 0)
    }  # fmt: skip
    for name, zeros in patterns.items():
        if len(probe) >= 4 and all(
            share > 0.5 if zero else share < 0.1 for share, zero in zip(nulls, zeros, strict=True)
        ):
            return f"is {name}: convert it with iconv -f {name} -t UTF-8"
    return None
