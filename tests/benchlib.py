"""What tests/bench is built on: figures and tables, charts, processes, ways to
read, and the systems under test.  What is measured is there."""
import csv
import glob
import itertools
import json
import mmap
import multiprocessing
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHEFS = os.environ.get("CACHEFS", TOP + "/cachefs")
NFS_SERVER = TOP + "/tests/nfs-server.sh"
MIB, GIB = 1 << 20, 1 << 30


# --- Figures, bars and rows ------------------------------------------------

def num(x):
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"


class Series(list):
    """One figure, measured several times."""

    @cached_property
    def mid(self):
        return statistics.median(self)

    def over(self, other):
        """The ratio in each repetition; its middle is that of the medians."""
        many = len(self) == len(other)
        ratio = Series(a / (b or 1e-9) for a, b in zip(
            self, other if many else [other.mid] * len(self)))
        ratio.mid = self.mid / (other.mid or 1e-9)
        return ratio

    def spread(self):
        return [self.mid, min(self), max(self)] if self else [""] * 3

    def __str__(self):
        if not self or min(self) == max(self):
            return num(self[0]) if self else ""
        return f"{num(self.mid)} ({num(min(self))}..{num(max(self))})"


def gather(results):
    """A Series of numbers; of dicts of numbers, a dict of Series."""
    if isinstance(results[0], dict):
        return {k: Series(r[k] for r in results) for k in results[0]}
    return Series(results)


class Bar(NamedTuple):
    """What is demanded of a row."""
    text: str
    ok: callable            # (value, ratio): is it met?
    every: bool = False     # in every run, not just in the median


class Row(NamedTuple):
    """A line of a table: a figure, perhaps with its peer's and a bar."""
    scenario: str
    what: str
    unit: str = ""
    mine: Series = Series()
    peer: str = ""
    theirs: Series = Series()
    bar: Bar = None
    brief: bool = False     # belongs into the summary
    note: str = ""          # why there is no figure

    columns = ["what", "cachefs", "beside", "ratio", "bar", "verdict"]
    fields = ["scenario", "what", "unit", "median", "min", "max",
              "peer", "peer median", "peer min", "peer max",
              "ratio", "ratio min", "ratio max", "bar", "verdict",
              "runs", "peer runs"]

    @property
    def ratio(self):
        return self.mine.over(self.theirs) if self.theirs else Series()

    def verdict(self):
        if not self.bar or self.note:
            return self.note
        ok, ratios = self.bar.ok, self.ratio or self.mine
        runs = [ok(*run) for run in zip(self.mine, ratios)]
        met = all(runs) if self.bar.every else ok(self.mine.mid, ratios.mid)
        odd = f"in {runs.count(not met)} of {len(runs)} runs"
        if len(set(runs)) == 1 and runs[0] == met:
            return "met" if met else "missed"
        return f"met, but not {odd}" if met else f"missed, but met {odd}"

    def cells(self):
        return [self.what, f"{self.mine} {self.unit}".strip() or self.note,
                f"{self.peer} {self.theirs}".strip(), self.ratio,
                self.bar.text if self.bar else "",
                "" if self.note else self.verdict()]

    def record(self):
        return [self.scenario, self.what, self.unit, *self.mine.spread(),
                self.peer, *self.theirs.spread(), *self.ratio.spread(),
                self.bar.text if self.bar else "", self.verdict(),
                " ".join(map(num, self.mine)), " ".join(map(num, self.theirs))]


def table(head, lines):
    """It in Markdown."""
    def line(cells):
        return "| " + " | ".join(map(str, cells)) + " |\n"
    return line(head) + "|---" * len(head) + "|\n" + "".join(map(line, lines))


# --- Charts ----------------------------------------------------------------

CHART = """set terminal svg size {width},460 font "sans-serif,12" \
    background "white"
set output "{path}"
set style fill solid
set grid y
set key above
set rmargin 3
set multiplot layout 1,{panels}
"""
PANEL = """$bars << END
{bars}END
set title "{title}"
set ylabel "{unit}"
set xtics rotate by 35 right scale 0 noenhanced ({labels})
set xrange [-0.7:{end}]
{scale}
plot $bars using 1:2:5:6 with boxes lc rgb variable notitle, \
    "" using 1:3:(0):($4-$3) with vectors heads size graph 0.01,90 \
    lc rgb "#404040" notitle, \
    NaN with boxes lc rgb 0x{mine:06x} title "cachefs", \
    NaN with boxes lc rgb 0x{theirs:06x} title "beside"
"""
MINE, THEIRS = 0x2b6ca3, 0xb0b0b0


def panel(title, unit, groups, log=False):
    """gnuplot's commands for groups of bars, {label: [(Series, colour)]}."""
    bars, labels = "", []
    for at, (label, group) in enumerate(groups.items()):
        labels.append(f'"{label}" {at}')
        width = 0.8 / len(group)
        for i, (series, colour) in enumerate(group):
            spread = " ".join(map(str, series.spread()))
            x = at + width * (i - (len(group) - 1) / 2)
            bars += f"{x} {spread} {width} {colour}\n"
    return PANEL.format(
        title=title, unit=unit, bars=bars, labels=", ".join(labels),
        end=len(groups) - 0.3, mine=MINE, theirs=THEIRS,
        scale="set logscale y; set yrange [*:*]; set format y '%.0f'" if log
        else "unset logscale y; set yrange [0:*]; set format y '%g'")


def chart(path, groups, *panels):
    """Draw panels, side by side, for so many groups at most, into PATH."""
    width = len(panels) * max(400, 150 + 45 * groups)
    run("gnuplot", input=CHART.format(path=path, panels=len(panels),
                                      width=width) + "".join(panels))


# --- The report ------------------------------------------------------------

class Report:
    """Collects rows, prints them as they come, and writes the folder."""

    def __init__(self, folder, title, metrics):
        self.folder, self.title, self.metrics = folder, title, metrics
        self.texts = {}             # scenario: what it is
        self.rows = []
        self.side = {}              # system: {metric: Series}
        self.colours = {}           # system: of its bars

    def begin(self, scenario, text):
        self.texts[scenario] = text
        print(f"\n{scenario}: {text}\n\n" + table(Row.columns, []), end="",
              flush=True)

    def add(self, row):
        self.rows.append(row)
        print(table([], [row.cells()]).split("\n", 2)[2], end="", flush=True)

    def side_rows(self):
        """A row for each figure of the side by side table."""
        raw = self.side.get("raw", {})
        for system, figures in self.side.items():
            for metric, mine in figures.items():
                what, unit = self.metrics[metric]
                beside = Series() if system == "raw" else \
                    raw.get(metric, Series())
                yield system, metric, Row("side by side", f"{what}: {system}",
                                          unit, mine, "raw", beside)

    def side_table(self):
        cells = {}
        for system, metric, row in self.side_rows():
            ratio = f", **{num(row.ratio.mid)} x**" if row.ratio else ""
            cells[system, metric] = f"{row.mine}{ratio}"
        return table([""] + [", ".join(m) for m in self.metrics.values()],
                     [[s] + [cells.get((s, m), "") for m in self.metrics]
                      for s in self.side])

    def write(self):
        os.makedirs(self.folder, exist_ok=True)
        with open(self.folder + "/results.csv", "w", newline="") as f:
            out = csv.writer(f)
            out.writerow(Row.fields)
            out.writerows(r.record() for r in self.rows)
            out.writerows(r.record() for _, _, r in self.side_rows())
        side = "Side by side, in bold the ratio to raw" \
            " (what is cold comes from the server, not from disk):\n\n" + \
            self.side_table() if self.side else ""
        with open(self.folder + "/results.md", "w") as f:
            f.write(f"# cachefs, measured\n\n{self.title}\n")
            for name, text in self.texts.items():
                rows = [r.cells() for r in self.rows if r.scenario == name]
                f.write(f"\n## {name}\n\n{text}\n\n" +
                        table(Row.columns, rows))
            f.write(f"\n## side by side\n\n{side}")
        with open(self.folder + "/summary.md", "w") as f:
            brief = [r.cells() for r in self.rows if r.brief]
            f.write(f"{self.title}\n\n{table(Row.columns, brief)}\n"
                    f"![read again](contrib/bench.svg)\n\n{side}")

    def draw(self):
        if not shutil.which("gnuplot"):
            print("bench: no charts: gnuplot is not installed",
                  file=sys.stderr)
            return
        for name in self.texts:
            rows = [r for r in self.rows if r.scenario == name and r.theirs]
            groups = {r.what: [(r.mine, MINE), (r.theirs, THEIRS)]
                      for r in rows if r.unit == rows[0].unit}
            if len(groups) > 2:
                chart(f"{self.folder}/{name}.svg", len(groups),
                      panel(name, rows[0].unit, groups,
                            name in ("hot", "tree")))
        panels = {}
        for metric, (what, unit) in self.metrics.items():
            bars = {system: [(figures[metric], self.colours[system])]
                    for system, figures in self.side.items()
                    if metric in figures}
            if bars:
                panels[metric] = panel(what, unit, bars, "rand" in metric)
                chart(f"{self.folder}/side-{metric}.svg", len(bars),
                      panels[metric])
        if panels:
            chart(self.folder + "/summary.svg", 8, *list(panels.values())[:2])


# --- Processes and signals -------------------------------------------------

class Refused(Exception):
    """The system can't be had here; the text says why."""


class Signals:
    """SIGINT, SIGTERM and SIGHUP end the program by an exception, once, and
    not while something is half set up or half taken down."""

    def __init__(self):
        self.depth, self.caught, self.raised = 0, 0, False
        for s in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
            signal.signal(s, self.catch)

    def catch(self, number, _):
        self.caught = number
        self.check()

    def check(self):
        if self.caught and not self.depth and not self.raised:
            self.raised = True
            raise SystemExit(128 + self.caught)

    @contextmanager
    def held(self):
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        self.check()


def run(*cmd, **more):
    """Run a command, out of the terminal's reach, and return its output."""
    return subprocess.run(cmd, check=True, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, start_new_session=True,
                          **more).stdout


def wait_for(seconds, what):
    """Is it true within so long?"""
    end = time.monotonic() + seconds
    while not (true := what()) and time.monotonic() < end:
        time.sleep(0.005)
    return true


def proc_stat(pid):
    """The fields of /proc/PID/stat from the state on; none if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def own_cpu():
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


def write_to(path, text):
    with open(path, "w") as f:
        f.write(text)


def drop_caches():
    os.sync()
    write_to("/proc/sys/vm/drop_caches", "1")


# --- Ways to read ----------------------------------------------------------

def read_through(path):
    """Read it like dd bs=1M; the seconds, and the CPU seconds of it."""
    cpu, start = own_cpu(), time.monotonic()
    buf = bytearray(MIB)
    with open(path, "rb", buffering=0) as f:
        while f.readinto(buf):
            pass
    return time.monotonic() - start, own_cpu() - cpu


def fault_all(path):
    """Map it and touch all its pages, tensor after tensor of 16 MiB in no
    order, as a loader of safetensors does; the seconds."""
    start = time.monotonic()
    with open(path, "rb") as f, \
            mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m:
        tensors = list(range(0, len(m), 16 * MIB))
        random.Random(1).shuffle(tensors)
        for t in tensors:
            m[t:t + 16 * MIB:mmap.PAGESIZE]
    return time.monotonic() - start


def fio(jobs, rw="read", bs="1M", seconds=None, engine="psync", **more):
    """Run fio with JOBS (paths, or dicts of fio's settings), through the files
    once or for some seconds; rates, latency and CPU of all together."""
    settings = {"ioengine": engine, "rw": rw, "bs": bs, "thread": 1,
                "invalidate": 0, "group_reporting": 1, "norandommap": 1,
                "allrandrepeat": 0, "randrepeat": 0, "fallocate": "none",
                "percentile_list": 50, **more}
    if seconds:
        settings.update(time_based=1, runtime=f"{int(seconds * 1000)}ms")
    text = ["[global]"] + [f"{k}={v}" for k, v in settings.items()]
    for i, job in enumerate(jobs):
        if isinstance(job, str):
            job = {"filename": job}
        text += [f"[job{i}]"] + [f"{k}={v}" for k, v in job.items()]
    guard = ["--readonly"] if "write" not in rw else []
    out = run("fio", "--output-format=json", *guard, "-",
              input="\n".join(text) + "\n")
    job = json.loads(out[out.index("{"):])["jobs"][0]
    io = job["write" if "write" in rw else "read"]
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    return {"mbps": io["io_bytes"] / max(io["runtime"], 1) / 1e3,
            "iops": io["iops"], "cpu": cpu,
            "p50": io["clat_ns"]["percentile"]["50.000000"] / 1e3}


def open_read_close(path):
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 65536)
    os.close(fd)


def churn(job):
    """Do OP with NAMES, round and round or once, and return the rate."""
    op, names, seconds = job
    start, n = time.monotonic(), 0
    for name in itertools.cycle(names) if seconds else names:
        op(name)
        n += 1
        if seconds and n % 32 == 0 and time.monotonic() - start >= seconds:
            break
    return n / max(time.monotonic() - start, 1e-6)


def by_processes(op, names, seconds=None, processes=8):
    """The rate of OP by so many processes, each with its share of NAMES."""
    names = list(names)
    jobs = [(op, names[i::processes], seconds) for i in range(processes)]
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, plain_signals) as pool:
        return sum(pool.map(churn, jobs, chunksize=1))


def plain_signals():
    """For children: their parent ends them, the terminal does not."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


# --- Systems under test ----------------------------------------------------

class System:
    """A file system under test.  As a context it is there, below root."""

    def __init__(self, bench, root):
        self.bench, self.root = bench, root

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def path(self, name):
        return f"{self.root}/{name}"

    def cpu(self):
        """CPU seconds of its daemon until now."""
        return 0

    def fill(self, names):
        """Read them once."""
        by_processes(read_through, map(self.path, names))


class Mounted(System):
    """One with a daemon: start() mounts it and returns the daemon's pid."""
    pid, process = 0, None

    def __init__(self, bench):
        super().__init__(bench, bench.mnt)

    def __enter__(self):
        self.bench.stack.callback(self.stop)
        try:
            with self.bench.signals.held():
                self.pid = self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def cpu(self):
        ticks = sum(map(int, proc_stat(self.pid)[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def mounted(self):
        with open("/proc/self/mountinfo") as f:
            return any(line.split()[4] == self.root for line in f)

    def spawn(self, *cmd):
        """Mount by a program that stays in the foreground."""
        if not shutil.which(cmd[0]):
            raise Refused(f"{cmd[0]} is not installed")
        with open(f"{self.bench.dir}/{cmd[0]}.log", "w") as log:
            self.process = subprocess.Popen(
                cmd, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)
        self.pid = self.process.pid
        wait_for(20, lambda: self.mounted() or self.gone())
        if not self.mounted():
            with open(log.name) as f:
                raise Refused(f"{cmd[0]}: {f.read().strip()}")
        return self.pid

    def gone(self):
        if self.process:
            return self.process.poll() is not None
        return proc_stat(self.pid)[:1] in ([], ["Z"])

    def stop(self):
        """Unmount it and see its daemon end; it may be gone already."""
        def unmounted():
            return not self.mounted() or not subprocess.run(
                ["umount", self.root], stderr=subprocess.DEVNULL).returncode
        with self.bench.signals.held():
            if not wait_for(10, unmounted):
                subprocess.run(["umount", "-l", self.root])
            if self.pid and not wait_for(60, self.gone):
                os.kill(self.pid, signal.SIGKILL)
                wait_for(5, self.gone)
            self.pid, self.process = 0, None


class Cachefs(Mounted):
    def __init__(self, bench, cache, fresh=False, server=None, **options):
        super().__init__(bench)
        self.cache = f"{bench.dir}/{cache}"
        backend = server.options() if server else {"nfs_backend": bench.src}
        self.options = {**backend, "cache_dir": self.cache,
                        "cache_min_free": "1%", **options}
        if fresh:
            shutil.rmtree(self.cache, ignore_errors=True)

    def start(self):
        words = ",".join(f"{k}={v}" for k, v in self.options.items())
        try:
            run(CACHEFS, "-o", words, self.root)
        except subprocess.CalledProcessError as e:
            why = (e.stderr.strip().splitlines() or ["no reason given"])[-1]
            later = "not supported yet"
            raise Refused(later if later in why else why) from e
        with open(self.cache + "/lock") as f:
            return int(f.read())

    def cache_file(self, name):
        """The file that a hit reads in the end."""
        number = os.stat(self.path(name)).st_ino
        return glob.glob(f"{self.cache}/objects/*/*{number:016x}")[0]

    def stat(self, name):
        with open(self.path(".cachefs/stats")) as f:
            return json.load(f)[name]

    def wait_complete(self, files):
        """Until so many files are, also after a crash."""
        if not wait_for(60 + files / 50,
                        lambda: self.stat("objects_complete") >= files):
            raise RuntimeError(f"{files} files do not become complete")

    def fill(self, names):
        """Read them until all are complete; how many were not at once."""
        def not_yet(paths):
            return [p for p in paths if
                    os.getxattr(p, "user.cachefs.state") != b"complete"]
        left, late = list(map(self.path, names)), []
        while left and len(late) < 20:
            by_processes(read_through, left)
            wait_for(5, lambda: not not_yet(left))
            left = not_yet(left)
            late.append(len(left))
        self.wait_complete(len(names))
        return late[0]


class Rclone(Mounted):
    def __init__(self, bench, cache, fresh=False):
        super().__init__(bench)
        self.cache = f"{bench.dir}/{cache}"
        if fresh:
            shutil.rmtree(self.cache, ignore_errors=True)

    def start(self):
        return self.spawn(
            "rclone", "mount", "--read-only", "--vfs-cache-mode", "full",
            "--config=", "--cache-dir", self.cache, self.bench.src, self.root)


class Bindfs(Mounted):
    def start(self):
        return self.spawn("bindfs", "-f", "-r", self.bench.src, self.root)


class NfsServer:
    """A private NFS server of the origin."""

    def __init__(self, bench, host="127.0.0.1", netns=None):
        self.bench, self.host = bench, host
        self.env = {**os.environ, "NFS_STATE": f"{bench.dir}/nfs-{host}",
                    "NFS_BIND": host, "NFS_NETNS": netns or ""}

    def start(self):
        self.bench.stack.callback(self.stop)
        with self.bench.signals.held():
            self.port = int(run(NFS_SERVER, "start", self.bench.src,
                                env=self.env))
        return self

    def stop(self):
        with self.bench.signals.held():
            run(NFS_SERVER, "stop", env=self.env)

    def options(self):
        return {"nfs_backend": f"nfs://{self.host}{self.bench.src}",
                "nfs_port": self.port, "nfs_mount_port": self.port + 1,
                "nfs_version": 3}

    def url(self, name):
        return (f"nfs://{self.host}{self.bench.src}/{name}?version=3&nfsport="
                f"{self.port}&mountport={self.port + 1}")


def link(bench):
    """The same server behind veth and tbf: a true 1 Gbit/s."""
    ns, net = f"cfb{os.getpid()}", f"198.19.{os.getpid() % 256}."
    tbf = "root tbf rate 1gbit burst 256kb latency 20ms"
    bench.stack.callback(subprocess.run, ["ip", "netns", "del", ns])
    for cmd in (f"ip netns add {ns}",
                f"ip link add {ns} type veth peer name {ns} netns {ns}",
                f"ip addr add {net}1/30 dev {ns}", f"ip link set {ns} up",
                f"ip -n {ns} addr add {net}2/30 dev {ns}",
                f"ip -n {ns} link set {ns} up", f"ip -n {ns} link set lo up",
                f"tc qdisc add dev {ns} {tbf}",
                f"tc -n {ns} qdisc add dev {ns} {tbf}"):
        run(*cmd.split())
    return NfsServer(bench, net + "2", ns).start()
