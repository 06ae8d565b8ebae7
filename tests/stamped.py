"""Files that say of every 64 bytes what they are: which file, which version,
how long it is, and at which offset.  For tests/consistency and tests/soak."""
import os
import random
import struct

RECORD, PAGE = 64, 4096
_HEAD = struct.Struct("<8sIIQ")         # magic, file, version, length
_MAGIC = b"stamped:"
_offsets = []


def content(number, version, length):
    """The bytes of a version of a file."""
    n = -(-length // RECORD)
    while len(_offsets) < n:
        _offsets.append(struct.pack("<Q", len(_offsets) * RECORD))
    head = _HEAD.pack(_MAGIC, number, version, length)
    tail = random.Random(number << 32 | version).randbytes(
        RECORD - len(head) - 8)
    data = head + (tail + head).join(_offsets[:n]) + tail
    return data[:length]


def stamp(data):
    """(file, version, length) that the record says which data begins with."""
    if len(data) < _HEAD.size:
        return None
    magic, *rest = _HEAD.unpack_from(data)
    return tuple(rest) if magic == _MAGIC else None


def describe(data, off):
    """The runs of records in it, for people."""
    runs = []
    for at in range(-off % RECORD, len(data), RECORD):
        s = stamp(data[at:at + _HEAD.size])
        where = data[at + _HEAD.size:at + _HEAD.size + 8]
        what = (f"file {s[0]} v{s[1]} length {s[2]}" if s else "no record") + (
            "" if where == struct.pack("<Q", off + at)[:len(where)]
            else " of another offset")
        if not runs or runs[-1][1] != what:
            runs.append((off + at, what))
    return "; ".join(f"{at}: {what}" for at, what in runs[:12])


def read_at(fd, n, off):
    """pread() that is short at the end of the file only: it also is before an
    error, which the next one meets."""
    data = os.pread(fd, n, off)
    while len(data) < n and (more := os.pread(fd, n - len(data),
                                              off + len(data))):
        data += more
    return data
