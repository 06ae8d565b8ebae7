#!/usr/bin/env python3
"""aside-stress - open a file through cachefs while it is being replaced.

usage: aside-stress.py [-s] MOUNT DATA [HOLD [SECONDS [READERS]]]

DATA is the backend's directory that MOUNT shows.  Fifty times a second the
file DATA/x is replaced by a new version while READERS (6) processes open, read
and fstat MOUNT/x, each keeping its last HOLD (0) descriptors open; a held one
is read again before it is closed.  After SECONDS (15) it prints what happened
and ends with 1 if anything went wrong:

  open/read/fstat ERRNO   a call failed
  torn       what was read is no version as it was written; each reader's first
             is printed
  size       fstat's size is not that of what was read
  changed    a held descriptor no longer gave the version that it gave first
  stale      an open gave a version that had been replaced for over STALE s

-s allows reads to fail with ESTALE: of an NFS server what is gone can't be had
any more, if it wasn't cached.
"""
import collections
import errno
import multiprocessing as mp
import os
import queue
import sys
import time

STALE = 0.5
MAXVERSIONS = 1 << 16


def content(v):
    return b"version%d %s\n" % (v, b"y" * (v % 90))


def version(data):
    """The version that DATA is, whole; None if it is none."""
    word = data.split(b" ")[0]
    if not word.startswith(b"version") or not word[7:].isdigit():
        return None
    v = int(word[7:])
    return v if data == content(v) else None


def read(fd, what, count):
    try:
        return os.pread(fd, 200, 0)
    except OSError as e:
        count[f"{what} {e.errno}"] += 1
        return None


def close(fd, v, count):
    data = read(fd, "read held", count)
    if data is not None and v is not None and data != content(v):
        count["changed"] += 1
    os.close(fd)


def reader(path, hold, stop, born, results):
    count, held = collections.Counter(), collections.deque()
    while not stop.is_set():
        began = time.monotonic()
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as e:
            count[f"open {e.errno}"] += 1
            continue
        count["opens"] += 1
        data, v = read(fd, "read", count), None
        if data is not None:
            v = version(data)
            if v is None:
                if not count["torn"]:
                    print(f"torn: {data!r}", file=sys.stderr)
                count["torn"] += 1
            elif 0 < born[v + 1] < began - STALE:
                count["stale"] += 1
            try:
                if os.fstat(fd).st_size != len(data):
                    count["size"] += 1
            except OSError as e:
                count[f"fstat {e.errno}"] += 1
        held.append((fd, v))
        while len(held) > hold:
            close(*held.popleft(), count)
    for fd, v in held:
        close(fd, v, count)
    results.put(dict(count))


def publish(data, v, born):
    with open(data + "/x.new", "wb") as f:
        f.write(content(v))
    os.rename(data + "/x.new", data + "/x")
    born[v] = time.monotonic()


def main():
    args = sys.argv[1:]
    lenient = args[:1] == ["-s"]
    if len(args) < 2 + lenient:
        sys.exit(__doc__)
    mnt, data, *numbers = args[lenient:]
    hold, seconds, readers = (
        int(a) for a in numbers + ["0", "15", "6"][len(numbers):])
    born = mp.Array("d", MAXVERSIONS, lock=False)
    publish(data, 1, born)
    stop, results = mp.Event(), mp.Queue()
    procs = [mp.Process(target=reader, daemon=True,
                        args=(mnt + "/x", hold, stop, born, results))
             for _ in range(readers)]
    for p in procs:
        p.start()
    v, end = 1, time.monotonic() + seconds
    while time.monotonic() < end and v < MAXVERSIONS - 2:
        v += 1
        publish(data, v, born)
        time.sleep(0.02)
    stop.set()
    total, missing = collections.Counter(), 0
    for _ in procs:
        try:
            total.update(results.get(timeout=30))
        except queue.Empty:
            missing += 1
    opens = total.pop("opens", 0)
    print(f"{v} versions, {opens} opens;",
          ", ".join(f"{k}: {n}" for k, n in sorted(total.items())) or "no errors")
    if lenient:
        for call in "read", "read held":
            total.pop(f"{call} {errno.ESTALE}", None)
    if missing:
        sys.exit(f"aside-stress: {missing} readers hang")
    if total or opens < 100:
        sys.exit("aside-stress: failed")


if __name__ == "__main__":
    main()
