#!/usr/bin/env python3
"""readcheck - compare a file read in some way with its original.

usage: readcheck.py HOW FILE ORIGINAL [-n COUNT] [-s SEED] [-b BYTES]

HOW:  random  COUNT reads (200) of up to BYTES (300000) at random offsets, some
              of them beyond the end, by one descriptor
      direct  the whole file front to back with O_DIRECT, BYTES at a time (1 MiB)
      twice   the same twice over by one descriptor; between the two rounds a
              line is printed and one awaited on standard input
      mmap    the whole file through a shared and a private mapping, backwards
      threads the whole file by COUNT threads (8) with a descriptor each, O_DIRECT

Ends with 0 if every byte and every length was right, else says what was not.
"""
import argparse
import mmap
import os
import random
import sys
import threading


def differs(what, off, got, want):
    at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b),
              min(len(got), len(want)))
    sys.exit(f"readcheck: {what} at {off}: {len(got)} bytes instead of "
             f"{len(want)}, the first difference at {off + at}")


def randoms(args, fd, orig):
    rnd = random.Random(args.seed)
    size = os.fstat(orig).st_size
    for _ in range(args.count or 200):
        off = rnd.randrange(size + args.bytes // 4 + 1)
        n = rnd.randrange(1, args.bytes + 1)
        got, want = os.pread(fd, n, off), os.pread(orig, n, off)
        if got != want:
            differs("read", off, got, want)


def direct(fd, orig, step):
    buf = mmap.mmap(-1, step)       # as aligned as O_DIRECT may ask
    off = 0
    while True:
        n = os.preadv(fd, [buf], off)
        want = os.pread(orig, step, off)
        if buf[:n] != want:
            differs("direct read", off, buf[:n], want)
        off += n
        if n < step:
            return


def mapped(fd, orig):
    size = os.fstat(orig).st_size
    if os.fstat(fd).st_size != size:
        sys.exit(f"readcheck: size {os.fstat(fd).st_size} instead of {size}")
    if not size:
        return
    step = 1 << 20
    for flags in mmap.MAP_SHARED, mmap.MAP_PRIVATE:
        m = mmap.mmap(fd, size, flags, mmap.PROT_READ)
        for off in reversed(range(0, size, step)):
            got, want = m[off:off + step], os.pread(orig, step, off)
            if got != want:
                differs("mapping", off, got, want)


def threads(args, orig):
    bad = []

    def one():
        fd = os.open(args.file, os.O_RDONLY | os.O_DIRECT)
        try:
            direct(fd, orig, args.bytes)
        except BaseException as e:
            bad.append(e)
        os.close(fd)
    ts = [threading.Thread(target=one) for _ in range(args.count or 8)]
    for t in ts:
        t.start()
    for t in ts:
        t.join()
    if bad:
        raise bad[0]


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("how", choices="random direct twice mmap threads".split())
    ap.add_argument("file")
    ap.add_argument("original")
    ap.add_argument("-n", "--count", type=int)
    ap.add_argument("-s", "--seed", type=int, default=1)
    ap.add_argument("-b", "--bytes", type=int)
    args = ap.parse_args()
    args.bytes = args.bytes or (300000 if args.how == "random" else 1 << 20)
    orig = os.open(args.original, os.O_RDONLY)
    if args.how == "threads":
        threads(args, orig)
        return
    flags = os.O_DIRECT if args.how in ("direct", "twice") else 0
    fd = os.open(args.file, os.O_RDONLY | flags)
    if args.how == "random":
        randoms(args, fd, orig)
    elif args.how == "mmap":
        mapped(fd, orig)
    else:
        direct(fd, orig, args.bytes)
    if args.how == "twice":
        print("once", flush=True)
        sys.stdin.readline()
        direct(fd, orig, args.bytes)


if __name__ == "__main__":
    main()
