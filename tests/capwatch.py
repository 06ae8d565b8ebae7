#!/usr/bin/env python3
"""capwatch - is a cache ever larger than it may be?

usage: capwatch.py PID CACHE MOUNT CAP SAMPLES

Each 10 ms, and SAMPLES times after something was evicted: what do the files
below CACHE/objects take on disk, and what are the cache_used_bytes of MOUNT?
The daemon PID stands still while its files are counted: else one that is
evicted meanwhile would count beside those that got its room.  Says how many
samples there were and what was the most; ends with 0 if that was never above
CAP, but above half of it.
"""
import contextlib
import json
import os
import signal
import sys
import time


@contextlib.contextmanager
def stopped(pid):
    """No thread of the process runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            while state(pid, tid) not in "TtZX":
                time.sleep(0.0002)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def state(pid, tid):
    try:
        with open(f"/proc/{pid}/task/{tid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"                      # it has ended meanwhile


def on_disk(cache):
    """{name: bytes} of the files below objects/."""
    files = {}
    for xx in os.scandir(cache + "/objects"):
        for entry in os.scandir(xx.path):
            with contextlib.suppress(FileNotFoundError):
                files[f"{xx.name}/{entry.name}"] = entry.stat(
                    follow_symlinks=False).st_blocks * 512
    return files


def main(pid, cache, mount, cap, samples):
    most = said = over = n = full = 0
    while full < samples:
        with stopped(pid):
            files = on_disk(cache)
        used = sum(files.values())
        if used > max(most, cap):
            print(f"{used - cap} bytes too many:", files)
        over += used > cap
        most = max(most, used)
        with open(mount + "/.cachefs/stats") as f:
            stats = json.load(f)
        said = max(said, stats["cache_used_bytes"])
        n += 1
        full += stats["evicted_objects"] > 0
        time.sleep(0.01)
    print(f"{n} samples, {over} of them above the cap of {cap}: at most "
          f"{most} bytes on disk and {said} by the statistics")
    return not (cap / 2 < most <= cap and said <= cap)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:])))
