#!/usr/bin/env python3
"""kernel - what of cachefs differs from kernel to kernel, and power cuts.

usage: kernel.py suite
       kernel.py cut ROUND [fill]

Runs in tests/guest's guests (in Python, as bats takes minutes there) and
prints TAP without numbers.  It wants $CACHEFS, root, and two disks mounted on
/run/cache and /run/source.

cut: compare all files of the source as the mount has them, with what is in the
cache from before the guest was killed.  With `fill', say CUT then and go on
reading files and replacing them until killed.  A new version is written and
synced under another name first: once it can be seen it survives a power cut.
"""
import json
import os
import platform
import random
import re
import subprocess
import sys
import threading
import time
import traceback

sys.dont_write_bytecode = True
TESTS = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path.append(TESTS)
import readcheck                                        # noqa: E402

CACHEFS, CACHE, SOURCE = os.environ["CACHEFS"], "/run/cache", "/run/source"
MNT, LOG, STRACE = "/run/mnt", "/run/cachefs.log", "/run/strace.log"
PASSTHROUGH = tuple(map(int, re.findall(r"\d+", platform.release())[:2])) >= (6, 9)
SYSCTL = "/proc/sys/kernel/io_uring_disabled"


class Skip(Exception):
    pass


def say(*words):
    print("#", *words, flush=True)


def wait(cond, what, secs=120):
    end = time.monotonic() + secs
    while not cond():
        if time.monotonic() > end:
            raise AssertionError(f"not within {secs} s: {what}")
        time.sleep(0.1)


def log():
    with open(LOG) as f:
        return f.read()


def stats():
    with open(MNT + "/.cachefs/stats") as f:
        return json.load(f)


class Mount:
    """cachefs in the foreground, with OPTS; by is a command that runs it."""

    def __init__(self, cache, *opts, backend=None, by=()):
        o = [f"nfs_backend={backend or SOURCE + '/f'}",
             f"cache_dir={CACHE}/{cache}", *opts]
        self.args = [*by, CACHEFS, "-f", "-o", ",".join(o), MNT]

    def __enter__(self):
        with open(LOG, "w") as f:
            self.proc = subprocess.Popen(self.args, stdout=f, stderr=f)
        wait(lambda: self.proc.poll() is not None or os.path.ismount(MNT) and
             os.path.exists(MNT + "/.cachefs/stats"), "mounted")
        assert self.proc.returncode is None, f"does not mount: {log()}"
        return self

    def __exit__(self, failed, *_):
        subprocess.run(["umount", *(["-l"] if failed else []), MNT], check=True)
        assert self.proc.wait(60) == 0, "cachefs did not end well"

    def refused(self):
        r = subprocess.run(self.args, capture_output=True, text=True)
        assert r.returncode == 1 and not os.path.ismount(MNT), r
        return r.stderr.strip()


def make(name, size, seed=0):
    """A new version of a file of the source, in one step and durably."""
    path, tmp = f"{SOURCE}/f/{name}", f"{SOURCE}/tmp"
    with open(tmp, "wb") as f:
        f.write(random.Random(f"{name} {seed}").randbytes(size))
        os.fsync(f.fileno())
    os.rename(tmp, path)
    dirfd = os.open(SOURCE + "/f", os.O_RDONLY)
    os.fsync(dirfd)
    os.close(dirfd)


def same(name, fd=None):
    with open(f"{SOURCE}/f/{name}", "rb") as a, \
            open(f"{MNT}/{name}" if fd is None else fd, "rb") as b:
        return a.read() == b.read()


def state(name):
    return os.getxattr(f"{MNT}/{name}", "user.cachefs.state").decode()


def cold(name):
    assert same(name), "cold: other bytes"
    wait(lambda: state(name) == "complete", name + " is complete")


def hot(name):
    """Every way to read, with no page cache to begin with; no byte fetched."""
    was = stats()
    with open("/proc/sys/vm/drop_caches", "w") as f:
        f.write("3")
    orig = os.open(f"{SOURCE}/f/{name}", os.O_RDONLY)
    fd = os.open(f"{MNT}/{name}", os.O_RDONLY | os.O_DIRECT)
    readcheck.direct(fd, orig, 1 << 20)
    os.close(fd)
    fd = os.open(f"{MNT}/{name}", os.O_RDONLY)
    size = os.fstat(orig).st_size
    for _ in range(50):
        off, n = random.randrange(size + 5000), random.randrange(1, 300000)
        assert os.pread(fd, n, off) == os.pread(orig, n, off), (off, n)
    readcheck.mapped(fd, orig)
    os.close(fd)
    os.close(orig)
    now = stats()
    assert now["backend_read_bytes"] == was["backend_read_bytes"], now
    assert now["checksum_errors"] == 0, now
    return was, now


def io(st):
    return [st[k] for k in ("daemon_reads", "hit_bytes", "miss_bytes")]


def t_passthrough():
    "passthrough is on from Linux 6.9; before, it is off with the reason kernel"
    make("p", 8000001)
    with Mount("p"):
        cold("p")
        was, now = hot("p")
        say("passthrough", now["passthrough"] + ", engine", now["io_engine"] +
            ", opens_passthrough", now["opens_passthrough"], "bypass", now["bypass"],
            "daemon_reads while hot", now["daemon_reads"] - was["daemon_reads"])
        if PASSTHROUGH:
            assert now["passthrough"] == "on"
            assert io(was) == io(now), (was, now)
            assert now["opens_passthrough"] == was["opens_passthrough"] + 2
            return
        assert now["passthrough"] == "off:kernel"
        assert "passthrough is off: kernel" in log()
        assert now["opens_passthrough"] == 0
        assert now["bypass"]["passthrough_off"] > 0
        assert now["hit_bytes"] >= was["hit_bytes"] + 8000001
    why = Mount("p", "fuse_passthrough=yes", "log_level=error").refused()
    say(why)
    assert "off here: kernel" in why


def t_remount():
    "the cache is warm after a remount"
    with Mount("p"):
        assert state("p") == "complete"
        hot("p")
        assert stats()["backend_read_bytes"] == 0


def t_configured():
    "passthrough=no is off with the reason configured, and reads right"
    with Mount("p", "fuse_passthrough=no"):
        assert hot("p")[1]["passthrough"] == "off:configured"


def t_aside():
    "a replaced file is set aside: an old descriptor keeps the old version"
    make("a", 3000001)
    with Mount("a", "fuse_attr_timeout=0", "fuse_entry_timeout=0"):
        cold("a")
        olds = []
        for seed in range(1, 6):
            with open(SOURCE + "/f/a", "rb") as f:
                olds.append((os.open(MNT + "/a", os.O_RDONLY), f.read()))
            make("a", 3000001 + seed, seed)
            cold("a")
        for fd, want in olds:
            assert os.pread(fd, len(want) + 1, 0) == want
            assert os.fstat(fd).st_size == len(want)
            os.close(fd)
        hot("a")
        say("set_aside", stats()["set_aside"])
        assert stats()["set_aside"] >= 5


def t_flags():
    "io_uring's flags are dropped as the kernel demands, at last the ring itself"
    make("u", 1000001)
    seen, said = [], set()
    for n in range(12):     # strace has that many calls fail
        inject = [f"-einject=io_uring_setup:error=EINVAL:when=1..{n}"] if n else []
        strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", STRACE,
                  "-e", "trace=io_uring_setup", *inject]
        with Mount(f"u{n}", "fuse_passthrough=no", by=strace):
            cold("u")
            engine = hot("u")[1]["io_engine"]
            text = log()
        with open(STRACE) as f:
            flags = re.findall(r"{flags=([^,}]*)", f.read())[-1]
        say(f"io_uring_setup refused {n} times: engine {engine}" +
            (f", flags {flags}" if engine == "io_uring" else ""),
            *re.findall("(?:io_uring|the kernel refuses).*", text))
        seen.append(flags)
        if engine == "threads":
            break
        said |= set(re.findall("refuses a ring with (.*);", text))
    assert said == {"DEFER_TASKRUN", "SINGLE_ISSUER", "COOP_TASKRUN"}, said
    assert "io_uring is refused here (Invalid argument)" in text
    assert len(set(seen)) >= 4, seen


def t_engines():
    "a polled queue, plain buffers and threads read right too"
    make("e", 2000001)
    for opt, engine in (("polling_mode=yes", "io_uring"),
                        ("fixed_buffers=no", "io_uring"),
                        ("use_io_uring=no", "threads")):
        with Mount("e" + opt, "fuse_passthrough=no", "nvme_" + opt):
            cold("e")
            assert hot("e")[1]["io_engine"] == engine
            say(opt, "engine", engine)


def t_sysctl():
    "kernel.io_uring_disabled=2: threads do the work, and a warning says why"
    if not os.path.exists(SYSCTL):
        raise Skip("this kernel has no such sysctl")
    make("s", 2000001)
    with open(SYSCTL, "w") as f:
        f.write("2")
    try:
        with Mount("s"):
            cold("s")
            assert hot("s")[1]["io_engine"] == "threads"
            say(log().splitlines()[0])
            assert "io_uring is refused here (Operation not permitted)" in log()
        why = Mount("s", "nvme_use_io_uring=yes", "log_level=error").refused()
        assert "not permitted" in why, why
    finally:
        with open(SYSCTL, "w") as f:
            f.write("0")


def t_nfs():
    "NFS versions 3 and 4: cold, hot, warm after a remount"
    make("n", 4000001)
    os.environ["NFS_STATE"] = "/run/nfs"
    server = TESTS + "/nfs-server.sh"
    port = int(subprocess.run([server, "start", SOURCE + "/f"], check=True,
                              stdout=subprocess.PIPE).stdout)
    try:
        for v in 3, 4:
            args = (f"n{v}", f"nfs_version={v}", f"nfs_port={port}",
                    f"nfs_mount_port={port + 1}")
            with Mount(*args, backend=f"nfs://127.0.0.1{SOURCE}/f"):
                cold("n")
                hot("n")
            with Mount(*args, backend=f"nfs://127.0.0.1{SOURCE}/f"):
                hot("n")
                assert same("n") and stats()["backend_read_bytes"] == 0
    finally:
        subprocess.run([server, "stop"], check=True)


def run(test):
    try:
        test()
        print("ok -", test.__doc__, flush=True)
    except Skip as e:
        print("ok -", test.__doc__, "# skip", e, flush=True)
    except BaseException:
        for line in (traceback.format_exc() + log()).splitlines():
            say(line)
        print("not ok -", test.__doc__, flush=True)


def suite():
    for name, test in list(globals().items()):
        if name.startswith("t_"):
            run(test)


FILES = [f"c{i}" for i in range(24)]


def read_on(seed):
    rnd = random.Random(seed)
    while True:
        try:
            with open(f"{MNT}/{rnd.choice(FILES)}", "rb") as f:
                f.read() if rnd.randrange(3) else f.read(300000)
        except OSError as e:
            print("not ok - files that are being replaced can be read:", e)
            return


def cut(nth, fill=False):
    def compare():
        whole = [n for n in FILES if state(n) == "complete"]
        some = [n for n in FILES if state(n) == "partial"]
        wrong = [n for n in FILES if not same(n)]
        st = stats()
        say(f"in the cache: {len(whole)} files whole, {len(some)} in part, of "
            f"{len(FILES)}; engine {st['io_engine']}, {st['opens_passthrough']}"
            f" opens in passthrough, {st['hit_bytes']} bytes by the daemon, "
            f"{st['backend_read_bytes']} fetched")
        assert not wrong, f"other bytes: {wrong}, whole were {whole}"
        assert st["checksum_errors"] == 0, st
    compare.__doc__ = (f"power cut {nth}: all bytes are right" if nth != "0"
                       else "before the power cuts all bytes are right")
    if nth == "0":
        for n in FILES:
            make(n, random.randrange(1, 4000000))
    # every other round without background fills, so that parts stay parts
    with Mount("c", "cache_fill=100" if int(nth) % 2 else "cache_fill=10"):
        run(compare)
        if not fill:
            return
        for n in random.sample(FILES, len(FILES) // 2):
            make(n, random.randrange(1, 4000000), time.time_ns())
        for i in range(4):
            threading.Thread(target=read_on, args=(f"{nth} {i}",)).start()
        print("CUT", flush=True)
        while True:
            time.sleep(0.2)
            make(random.choice(FILES), random.randrange(1, 4000000), time.time_ns())


if __name__ == "__main__":
    for d in MNT, SOURCE + "/f":
        os.makedirs(d, exist_ok=True)
    {"suite": suite, "cut": cut}[sys.argv[1]](*sys.argv[2:])
