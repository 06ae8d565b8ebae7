#!/usr/bin/env python3
"""treecheck - compare the names and metadata of two directory trees.

usage: treecheck.py [-i FIELD,...] TREE ORIGINAL

Compares type and mode, links, owner, size, modification and change time,
device number and symbolic link target of everything below the two, and that
hard links are hard links; -i ignores some of: mode nlink uid gid size mtime_ns
ctime_ns rdev.  Ends with 0 if all is equal, else names what is not.
"""
import os
import stat
import sys

FIELDS = "mode nlink uid gid size mtime_ns ctime_ns rdev".split()


def walk(top):
    """{name: (stat, link target)} of everything below TOP, and TOP itself."""
    seen, todo = {b"": (os.lstat(top), None)}, [b""]
    while todo:
        path = todo.pop()
        for name in os.listdir(os.path.join(top, path) if path else top):
            rel = os.path.join(path, name)
            full = os.path.join(top, rel)
            st = os.lstat(full)
            link = os.readlink(full) if stat.S_ISLNK(st.st_mode) else None
            if rel in seen:
                sys.exit(f"treecheck: {rel} is listed twice")
            seen[rel] = st, link
            if stat.S_ISDIR(st.st_mode):
                todo.append(rel)
    return seen


def groups(tree):
    """The sets of names that are links to one file."""
    by_ino = {}
    for name, (st, _) in tree.items():
        if not stat.S_ISDIR(st.st_mode):
            by_ino.setdefault((st.st_dev, st.st_ino), []).append(name)
    return sorted(sorted(g) for g in by_ino.values())


def main():
    args, skip = sys.argv[1:], []
    if args[:1] == ["-i"]:
        skip, args = args[1].split(","), args[2:]
    if len(args) != 2:
        sys.exit(__doc__)
    got, want = (walk(os.fsencode(a)) for a in args)
    bad = [f"{n}: only in {args[0]}" for n in got.keys() - want.keys()]
    bad += [f"{n}: missing" for n in want.keys() - got.keys()]
    for name in got.keys() & want.keys():
        (a, alink), (b, blink) = got[name], want[name]
        for field in FIELDS:
            x, y = (getattr(s, "st_" + field) for s in (a, b))
            if stat.S_ISDIR(b.st_mode) and field in ("size", "rdev"):
                continue            # a directory's size is its server's affair
            if field == "rdev" and stat.S_IFMT(b.st_mode) not in (
                    stat.S_IFBLK, stat.S_IFCHR):
                continue
            if x != y and field not in skip:
                bad.append(f"{name}: {field} is {x:#o}, not {y:#o}"
                           if field == "mode" else
                           f"{name}: {field} is {x}, not {y}")
        if alink != blink:
            bad.append(f"{name}: links to {alink}, not {blink}")
    if groups(got) != groups(want):
        bad.append("hard links differ")
    if bad:
        sys.exit("treecheck:\n" + "\n".join(sorted(bad)[:40]))


if __name__ == "__main__":
    main()
