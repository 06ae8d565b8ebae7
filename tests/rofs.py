#!/usr/bin/env python3
"""rofs - try everything that would modify a file system; all must be EROFS.

usage: rofs.py DIR      DIR holds file, link -> file, dir/, full/file
"""
import errno
import os
import stat
import sys

os.chdir(sys.argv[1])


def opened(flags, path="file"):
    return lambda: os.close(os.open(path, flags, 0o644))


TRIES = {
    "open to write": opened(os.O_WRONLY),
    "open to read and write": opened(os.O_RDWR),
    "open to append": opened(os.O_WRONLY | os.O_APPEND),
    "truncate by open": opened(os.O_RDWR | os.O_TRUNC),
    "write by link": opened(os.O_WRONLY, "link"),
    "create": opened(os.O_WRONLY | os.O_CREAT, "new"),
    "create exclusively": opened(os.O_RDWR | os.O_CREAT | os.O_EXCL, "new"),
    "create in a directory": opened(os.O_WRONLY | os.O_CREAT, "dir/new"),
    "unnamed file": opened(os.O_RDWR | os.O_TMPFILE, "dir"),
    "truncate": lambda: os.truncate("file", 0),
    "extend": lambda: os.truncate("file", 100),
    "unlink": lambda: os.unlink("file"),
    "unlink link": lambda: os.unlink("link"),
    "rename": lambda: os.rename("file", "new"),
    "replace": lambda: os.rename("file", "full/file"),
    "rename directory": lambda: os.rename("dir", "newdir"),
    "link": lambda: os.link("file", "new"),
    "symlink": lambda: os.symlink("file", "new"),
    "mkdir": lambda: os.mkdir("new"),
    "rmdir": lambda: os.rmdir("dir"),
    "rmdir of a full one": lambda: os.rmdir("full"),
    "mkfifo": lambda: os.mkfifo("new"),
    "mknod": lambda: os.mknod("new", stat.S_IFREG | 0o600),
    "chmod": lambda: os.chmod("file", 0o777),
    "chmod of directory": lambda: os.chmod("dir", 0o777),
    "chown": lambda: os.chown("file", 1, 1),
    "chown of link": lambda: os.chown("link", 1, 1, follow_symlinks=False),
    "set times": lambda: os.utime("file", (1, 1)),
    "touch": lambda: os.utime("file"),
    "setxattr": lambda: os.setxattr("file", "user.mine", b"x"),
    "setxattr of ours": lambda: os.setxattr("file", "user.cachefs.state", b"x"),
    "removexattr": lambda: os.removexattr("file", "user.cachefs.state"),
    "fchmod": lambda: os.fchmod(fd, 0o777),
    "fchown": lambda: os.fchown(fd, 1, 1),
    "futimes": lambda: os.utime(fd, (1, 1)),
    "fsetxattr": lambda: os.setxattr(fd, "user.mine", b"x"),
}

fd = os.open("file", os.O_RDONLY)
bad = ["access to write: allowed"] if os.access("file", os.W_OK) else []
for name, attempt in TRIES.items():
    try:
        attempt()
        bad.append(f"{name}: succeeded")
    except OSError as e:
        if e.errno != errno.EROFS:
            bad.append(f"{name}: {e.strerror}")
if bad:
    sys.exit("rofs:\n" + "\n".join(bad))
