"""lossydisk - a block device that loses its power.

A loop device on a file that a child process serves by FUSE, from memory.  So
the child sees each write and each flush: what was flushed is safe, what was not
is lost at a cut, or kept, or kept in part.
"""
import errno
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess

MIB = 1 << 20
SECTOR = 4096                   # never torn


class Disk:
    """.path is the block device, with an empty ext4."""

    def __init__(self, dev, size, undo):
        """DEV: a file to be made; what it leads to is registered with UNDO."""
        self.dev, self.size = dev, size
        with open(dev, "wb") as f:
            f.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", dev], check=True)
        with open(dev, "rb") as f:
            self.now = bytearray(f.read())      # what a read gets
        self.safe = bytearray(self.now)         # what was flushed
        self.pending = []                       # (offset, data) written since
        fuse = os.open("/dev/fuse", os.O_RDWR)
        undo.callback(subprocess.run, ["umount", "-l", dev])
        subprocess.run(["mount", "-i", "-t", "fuse", "-o", f"fd={fuse},rootmode="
                        "100000,user_id=0,group_id=0", "lossydisk", dev],
                       pass_fds=[fuse], check=True)
        self.control, theirs = socket.socketpair(socket.AF_UNIX,
                                                 socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for sig in signal.SIGINT, signal.SIGTERM:
                    signal.signal(sig, signal.SIG_IGN)
                self.control.close()
                self.serve(fuse, theirs)
            finally:
                os._exit(0)
        os.close(fuse)
        theirs.close()
        del self.now, self.safe                 # the child's
        undo.callback(os.waitpid, self.pid, 0)
        undo.callback(self.control.close)       # that ends it
        self.path = subprocess.run(
            ["losetup", "-f", "--show", "--direct-io=on", dev], check=True,
            stdout=subprocess.PIPE, text=True).stdout.strip()
        undo.callback(subprocess.run, ["losetup", "-d", self.path])

    def cut(self, image, keep, seed):
        """Have in the file IMAGE what the disk would hold after a power cut now,
        with a share KEEP of what was not flushed, drawn by SEED."""
        self.control.send(json.dumps([image, keep, seed]).encode())
        if self.control.recv(64) != b"done":
            raise OSError(errno.EIO, "the disk's server died", self.dev)

    def serve(self, fuse, control):
        while True:
            ready = select.select([fuse, control], [], [])[0]
            if control in ready:
                order = control.recv(4096)
                if not order:
                    return
                self.copy(*json.loads(order))
                control.send(b"done")
            else:
                self.answer(fuse, os.read(fuse, MIB + 8192))

    def answer(self, fuse, request):
        """One request; <linux/fuse.h> has the structures."""
        op, unique = struct.unpack_from("<4xIQ", request)
        err, out = 0, b""
        if op == 26:                    # INIT: big writes, max_pages
            out = struct.pack("<IIIIHHIIHHII24x", 7, 31, MIB, 1 << 5 | 1 << 22,
                              64, 48, MIB, 1, 256, 0, 0, 0)
        elif op == 3:                   # GETATTR
            out = struct.pack("<QII6Q10I", 3600, 0, 0, 1, self.size,
                              self.size >> 9, 0, 0, 0, 0, 0, 0, 0o100600, 1, 0,
                              0, 0, SECTOR, 0)
        elif op == 14:                  # OPEN: direct I/O
            out = struct.pack("<QIi", 1, 1, 0)
        elif op in (15, 16):            # READ, WRITE
            off, size = struct.unpack_from("<QI", request, 48)
            if op == 15:
                out = bytes(self.now[off:off + size])
            else:
                data = request[80:80 + size]
                self.now[off:off + size] = data
                self.pending.append((off, data))
                out = struct.pack("<II", size, 0)
        elif op == 20:                  # FSYNC
            for off, data in self.pending:
                self.safe[off:off + len(data)] = data
            self.pending.clear()
        elif op in (2, 36, 42):         # FORGET, INTERRUPT, BATCH_FORGET
            return
        elif op not in (18, 25, 38):    # RELEASE, FLUSH, DESTROY
            err = -errno.ENOSYS
        os.write(fuse, struct.pack("<IiQ", 16 + len(out), err, unique) + out)

    def copy(self, image, keep, seed):
        rng, disk, zero = random.Random(seed), bytearray(self.safe), bytes(65536)
        for off, data in self.pending:
            for at in range(0, len(data), SECTOR):
                if rng.random() < keep:
                    part = data[at:at + SECTOR]
                    disk[off + at:off + at + len(part)] = part
        with open(image, "wb") as f:
            f.truncate(self.size)
            for at in range(0, self.size, len(zero)):
                if disk[at:at + len(zero)] != zero:
                    f.seek(at)
                    f.write(disk[at:at + len(zero)])
