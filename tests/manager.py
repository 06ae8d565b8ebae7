#!/usr/bin/env python3
"""manager.py - as much of systemd as cachefs@.service needs, for tests.

usage: manager.py DIR CACHEFS ARG...

Mounts with `CACHEFS -m ARG...`, as ExecStartPre does, then starts `CACHEFS -f
ARG...`, as ExecStart does: in a mount namespace of its own, from which nothing is seen outside, and
with the descriptor that came to the store.  Each message of both is a line of DIR/said, "pre: " or "main: " in
front, its lines joined by " | ".  Ends, with the daemon's status, when that ends;
SIGTERM is passed on to it.
"""
import array
import os
import signal
import socket
import subprocess
import sys

here, args = sys.argv[1], sys.argv[2:]
path = os.path.join(here, "notify")
said = open(os.path.join(here, "said"), "w", buffering=1)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.bind(path)
os.environ["NOTIFY_SOCKET"] = path


def receive(who, timeout):
    """The next message's lines and descriptors; None: none came."""
    sock.settimeout(timeout)
    try:
        data, anc, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(16))
    except (TimeoutError, BlockingIOError):
        return None
    fds = array.array("i")
    for level, kind, text in anc:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(text)
    lines = data.decode().split("\n")
    said.write(f"{who}: {' | '.join(lines)}\n")
    return lines, list(fds)


pre = subprocess.run([args[0], "-m", *args[1:]])
if pre.returncode:
    sys.exit(pre.returncode)
lines, fds = receive("pre", 5) or ([], [])
if "FDSTORE=1" not in lines or len(fds) != 1:
    sys.exit("no descriptor came to the store")
name = next(line[7:] for line in lines if line.startswith("FDNAME="))


def child():
    os.dup2(fds[0], 3)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1",
                      LISTEN_FDNAMES=name, WATCHDOG_USEC="400000",
                      WATCHDOG_PID=str(os.getpid()))


main = subprocess.Popen(
    ["unshare", "-m", "--propagation", "slave", args[0], "-f", *args[1:]],
    preexec_fn=child, pass_fds=[3])
os.close(fds[0])                # of the store's, the daemon has its own
signal.signal(signal.SIGTERM, lambda n, frame: main.send_signal(n))
while main.poll() is None:
    receive("main", 0.1)
while receive("main", 0):
    pass
sys.exit(main.returncode)
