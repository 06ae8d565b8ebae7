/*
 * cachefs - a read-only FUSE file system that makes NFS as fast as the
 * local NVMe drive.  See cachefs.8 for users, cachefs.h for the data.
 *
 * A byte crosses the network once.  read() of an absent block waits for a
 * fetch from the server and is answered from its buffer; the same buffer is
 * written to the cache file.  When all blocks of a file are there, further
 * opens are given to the kernel as FUSE passthrough and the daemon does not
 * see their reads.
 *
 * Sections, callees first; `grep -n '=== ' cachefs.c` is the table:
 *	log	messages, with levels and a rate limit
 *	util	time, bytes, interruptible waits
 *	conf	the option table; ini file and -o
 *	pool	aligned buffers: all data memory
 *	exec	cache disk I/O: io_uring or threads
 *	names	what the kernel knows by path; LOOKUP tokens
 *	store	objects, index files, space, eviction, checkpoints
 *	tree	what the server's directories hold, for when it is away
 *	fetch	one READ for all who want a block; read-ahead; background fill
 *	scrub	what is on disk compared with its checksums
 *	bdir	backend: a directory
 *	bnfs	backend: NFS by libnfs, version 3 by handle and 4 by path
 *	stats	counters as JSON
 *	ops	the FUSE operations, set-aside, the session loop
 *	cmd	the subcommands, which run in their caller's process
 *	notify	what the service manager is told
 *	main	usage, mounting, signals
 *
 * Threads and what they own:
 *	main		set-up; then waits for signals; tear-down
 *	fuse workers	one request at a time; may wait for server and disk
 *	exec		the ring (or, without io_uring, one I/O each)
 *	nfs connections	one libnfs context each, nobody else touches it
 *	dir readers	one pread() of the source each
 *	filler		background fills: starts fetches, never reads
 *	checkpointer	writes index files
 *	noter		writes the tree's files
 *	evictor		scans the cache at start, then keeps the watermark, with a
 *			helper, and begins a cache anew that somebody removed
 *	scrubber	compares blocks with their checksums, now and then
 *
 * Lock ranks: a thread that holds one takes only ones further right.
 *	remounts > aside stripe > store.evicting > store key stripe > names > store >
 *	fill/ckpt > object > backend queue > pool > reqs > log
 * No lock but the two stripes is held across backend calls, disk I/O or
 * notifications of the kernel.  An aside stripe is held by a LOOKUP while
 * libfuse moves the node (it may wait for an OPEN of the same file, which
 * takes no stripe), and by a READDIRPLUS while libfuse takes one entry; a key
 * stripe while one object's files are opened, change or go on the cache disk,
 * so that a checkpoint of an old version cannot overwrite a new one.  libnfs's
 * own lock is taken under no other.  Threads start after the daemon has forked.
 *
 * Ownership: an obj lives while refs > 0 (opens, fetches, the fill queue, the
 * dirty list).  A fetch is in its object's table from birth to death; it dies
 * when it is in no queue, has no readers, and its buffer is not kept.
 */
#define _GNU_SOURCE
#ifndef WITH_URING
#define WITH_URING 1
#endif

#include <sys/ioctl.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <ctype.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <ftw.h>
#include <getopt.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/fuse.h>
#include <linux/openat2.h>
#include <malloc.h>
#include <mntent.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#define FUSE_USE_VERSION 317
#include <fuse.h>
#include <fuse_lowlevel.h>
#include <iniparser.h>
#include <nfsc/libnfs.h>
#include <nfsc/libnfs-raw.h>
#include <nfsc/libnfs-raw-mount.h>
#include <nfsc/libnfs-raw-nfs.h>
#include <nfsc/libnfs-raw-nfs4.h>
#if WITH_URING
#include <liburing.h>
#endif
#include <xxhash.h>

#include "cachefs.h"

#ifndef FUSE_RING			/* set by the Makefile */
#define FUSE_RING 0
#endif
#define HAVE_PASSTHROUGH (FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17))

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the on-disk structures are written as they lie in memory"
#endif

static struct conf conf;
static atomic_bool stopping;		/* the file system is going down */
static bool hung;			/* but a thread hangs in the backend */

#define HUNG_MS 2000			/* that long after being told to end */

/* === log: messages ======================================== Begin === */

enum { LOG_ERROR, LOG_WARN, LOG_INFO_, LOG_DBG };

static struct {
	pthread_mutex_t lock;
	bool syslog;
	atomic_int level;
	bool all;			/* however many of a kind */
	struct { const char *fmt; uint64_t since; unsigned n; } recent[32];
} logs = { .lock = PTHREAD_MUTEX_INITIALIZER, .level = LOG_INFO_ };

static _Thread_local char *log_copy;	/* gets this thread's next error, or NULL: */
#define LOG_COPY sizeof(((struct cachefs_remount *)0)->why)

/* Is this the 11th message of its kind within ten seconds? */
static bool
log_too_many(const char *fmt)
{
	struct timespec ts;
	size_t i = ((uintptr_t)fmt >> 3) % 32;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	if (logs.recent[i].fmt != fmt ||
	    (uint64_t)ts.tv_sec - logs.recent[i].since > 10) {
		logs.recent[i].fmt = fmt;
		logs.recent[i].since = (uint64_t)ts.tv_sec;
		logs.recent[i].n = 0;
	}
	return ++logs.recent[i].n > 10;
}

/* One line to stderr or syslog.  Keeps errno; more than ten of a kind in ten
 * seconds are dropped (not at level debug).  Takes logs.lock only. */
__attribute__((format(printf, 2, 3))) static void
log_at(int level, const char *fmt, ...)
{
	static const char *const word[] = { "error", "warning", "info", "debug" };
	static const int prio[] = { LOG_ERR, LOG_WARNING, LOG_INFO, LOG_DEBUG };
	int saved = errno;
	va_list ap;
	char line[2048];

	if (level > logs.level)
		return;
	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	for (char *p = line; *p; p++)	/* names are bytes: one line stays one */
		if ((unsigned char)*p < ' ' || *p == 0x7f)
			*p = '?';
	if (level == LOG_ERROR && log_copy && !*log_copy)
		snprintf(log_copy, LOG_COPY, "%.*s", (int)LOG_COPY - 1, line);
	pthread_mutex_lock(&logs.lock);
	if (logs.all || level == LOG_DBG || !log_too_many(fmt)) {
		if (logs.syslog)
			syslog(prio[level], "%s", line);
		else
			fprintf(stderr, "cachefs: %s%s%s\n",
			    level == LOG_INFO_ ? "" : word[level],
			    level == LOG_INFO_ ? "" : ": ", line);
	}
	pthread_mutex_unlock(&logs.lock);
	errno = saved;
}

#define log_error(...) log_at(LOG_ERROR, __VA_ARGS__)
#define log_warn(...) log_at(LOG_WARN, __VA_ARGS__)
#define log_info(...) log_at(LOG_INFO_, __VA_ARGS__)
#define log_debug(...) log_at(LOG_DBG, __VA_ARGS__)

/* Say what failed and be the value to return: `return fail(-EIO, ...)`. */
#define fail(err, ...) (log_error(__VA_ARGS__), (err))

/* === log ==================================================== End === */

/* === util: time, bytes, interruptible waits =============== Begin === */

/* Hold a lock to the end of the enclosing block, or (WITH_LOCK) for the next
 * statement; it is released however that is left.  WITH_LOCK is a loop of one
 * turn: break and continue inside are its own. */
#define LOCK_GUARD_(m, id) /* NOLINTNEXTLINE(bugprone-macro-parentheses) */ \
	__attribute__((cleanup(lk_release), unused)) pthread_mutex_t *id = \
	    lk_take(m)
#define GUARD_AT_(m, line) LOCK_GUARD_(m, guard_##line)
#define GUARD_AT(m, line) GUARD_AT_(m, line)
#define GUARD(m) GUARD_AT(m, __LINE__)
#define WITH_LOCK(m) \
	for (LOCK_GUARD_(m, with_); with_; lk_release(&with_), with_ = NULL)

static pthread_mutex_t *
lk_take(pthread_mutex_t *m)
{
	pthread_mutex_lock(m);
	return m;
}

static void
lk_release(pthread_mutex_t **m)
{
	if (*m)
		pthread_mutex_unlock(*m);
}

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ROUND_UP(x, to) (((x) + (to) - 1) / (to) * (to))

/* Relaxed counters, one per name that `stats -j` prints by itself. */
#define COUNTERS(X) \
	X(hit_bytes) X(miss_bytes) X(backend_read_bytes) X(backend_requests) \
	X(backend_errors) X(backend_reconnects) X(cache_write_bytes) \
	X(opens_passthrough) X(opens_buffered) X(set_aside) X(fills_started) \
	X(fills_completed) X(fills_failed) X(evicted_objects) \
	X(evicted_bytes) X(invalidated) X(checksum_errors) X(buffer_waits) \
	X(sqe_submitted) X(cqe_completed) X(submit_calls) \
	X(daemon_reads) X(prefetched_bytes) X(prefetch_used_bytes) \
	X(prefetch_wasted_bytes) X(spliced_bytes) X(scrubbed_bytes)

static struct {
#define X(n) _Atomic uint64_t n;
	COUNTERS(X)
#undef X
	_Atomic uint64_t queue_depth_max;
} count;

/*
 * An answer to the kernel comes before what the kernel asks because of it; so a
 * worker that is asked sees what the one that answered had done.  The kernel
 * sees to that, but TSan can't know.
 */
#ifdef __SANITIZE_THREAD__
static atomic_uint answers;
#define ANSWERING() ((void)atomic_fetch_add(&answers, 1))
#define ASKED() ((void)atomic_load(&answers))
#else
#define ANSWERING() ((void)0)
#define ASKED() ((void)0)
#endif

#define COUNT(n, by) \
	atomic_fetch_add_explicit(&count.n, (by), memory_order_relaxed)

static uint64_t
now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000;
}

static uint64_t
now_ms(void)
{
	return now_us() / 1000;
}

static int64_t
nanos(int64_t sec, int64_t nsec)
{
	int64_t r;

	if (__builtin_mul_overflow(sec, (int64_t)1000000000, &r) ||
	    __builtin_add_overflow(r, nsec, &r))
		return sec < 0 ? INT64_MIN : INT64_MAX;
	return r;
}

static struct timespec
nanos_ts(int64_t ns)
{
	int64_t s = ns / 1000000000, n = ns % 1000000000;

	if (n < 0) {
		n += 1000000000;
		s--;
	}
	return (struct timespec){ .tv_sec = s, .tv_nsec = n };
}

/* pread() the whole of buf unless EOF or an error comes first; 0.. or -errno */
static ssize_t
sys_pread(int fd, void *buf, size_t len, uint64_t off)
{
	size_t did = 0;

	while (did < len) {
		ssize_t n = pread(fd, (char *)buf + did, len - did,
		    (off_t)(off + did));
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		did += (size_t)n;
	}
	return (ssize_t)did;
}

/* write all of buf at off; 0 or -errno */
static int
sys_pwrite(int fd, const void *buf, size_t len, uint64_t off)
{
	size_t did = 0;

	while (did < len) {
		ssize_t n = pwrite(fd, (const char *)buf + did, len - did,
		    (off_t)(off + did));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		did += (size_t)n;
	}
	return 0;
}

/* openat() that never leaves dir and follows no symlink; fd or -errno.
 * Before Linux 5.6 only the last component is guarded. */
static int
sys_openat(int dir, const char *path, int flags, mode_t mode)
{
	struct open_how how = {
		.flags = (uint64_t)(flags | O_CLOEXEC | O_NOFOLLOW),
		.mode = mode,
		.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS,
	};
	long fd = syscall(SYS_openat2, dir, path, &how, sizeof(how));

	if (fd < 0 && (errno == ENOSYS || errno == EPERM))
		fd = openat(dir, path, flags | O_CLOEXEC | O_NOFOLLOW, mode);
	return fd < 0 ? -errno : (int)fd;
}

static void
sys_close(int *fd)
{
	if (*fd >= 0 && close(*fd))
		log_warn("close: %s", strerror(errno));
	*fd = -1;
}

/* Start a thread with all signals blocked; they are main's.  The stack is
 * only address space until it is used: libnfs takes one frame for each entry of
 * a listing, up to 32,000 in its largest reply.  0, or -errno after a
 * message. */
static int
sys_thread(pthread_t *tid, void *(*fn)(void *), void *arg)
{
	pthread_attr_t a;
	int r;

	if (pthread_attr_init(&a))
		return -ENOMEM;
	pthread_attr_setstacksize(&a, THREAD_STACK);
	r = pthread_create(tid, &a, fn, arg);
	pthread_attr_destroy(&a);
	if (r)
		log_error("cannot start a thread: %s", strerror(r));
	return -r;
}

/* Have the thread that waits on cond see *quit, which is lock's, and join it if
 * it was started. */
static void
sys_thread_end(pthread_t tid, pthread_mutex_t *lock, pthread_cond_t *cond,
    bool *quit)
{
	WITH_LOCK(lock) {
		*quit = true;
		pthread_cond_signal(cond);
	}
	if (tid)
		pthread_join(tid, NULL);
}

/*
 * The FUSE request that a worker thread is processing.  While the worker
 * waits it is on a list, so that the FUSE_INTERRUPT for it finds what it
 * waits on.
 */
struct req {
	uint64_t unique, nodeid;	/* fuse_in_header */
	uint32_t opcode, pid;
	pthread_cond_t *cond;		/* reqs.lock: waited on */
	bool interrupted;		/* reqs.lock */
	struct req *next;		/* reqs.lock */
	uint64_t until;			/* the server's answer is not waited for any
					 * longer (now_ms()); 0: no matter how long */
};

static _Thread_local struct req *cur;
static struct {
	pthread_mutex_t lock;
	struct req *waiting;
} reqs = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* A FUSE_INTERRUPT arrived: wake whoever waits on behalf of that request. */
static void
req_interrupt(uint64_t unique)
{
	GUARD(&reqs.lock);
	for (struct req *r = reqs.waiting; r; r = r->next)
		if (r->unique == unique) {
			r->interrupted = true;
			pthread_cond_broadcast(r->cond);
		}
}

/* Is the thread that sent this request about to die?  The kernel interrupts
 * for any signal; but read(2) of a regular file may not fail with EINTR for
 * one that is handled, so only a fatal one counts.  proc_pid_status(5); a
 * fatal signal is turned into a pending SIGKILL by the kernel. */
static bool
req_dying(uint32_t pid)
{
	char path[32], line[128];
	bool dying = true;		/* nobody there: nobody to answer */
	FILE *f;

	if (pid == 0)
		return false;		/* of a foreign pid namespace */
	snprintf(path, sizeof(path), "/proc/%u/status", pid);
	f = fopen(path, "re");
	if (!f)				/* or not shown to us, proc(5) hidepid */
		return errno == ENOENT && kill((pid_t)pid, 0) && errno == ESRCH;
	while (fgets(line, sizeof(line), f)) {
		if (!strncmp(line, "SigPnd:", 7)) {
			dying = strtoull(line + 7, NULL, 16) & 1u << 8;
			break;
		}
	}
	fclose(f);
	return dying;
}

/* Wait on cond until signalled or `until` (now_ms(), 0 = no limit), at most a
 * second at a time: callers loop over their condition.  0, -ETIMEDOUT, or
 * -EINTR when the process waiting for this request is being killed. */
static int
wait_on(pthread_cond_t *cond, pthread_mutex_t *m, uint64_t until)
{
	uint64_t now = now_ms(), t = now + 1000;
	struct timespec ts;
	bool check = false;
	int r;

	if (until && until <= now)
		return -ETIMEDOUT;
	if (until && until < t)
		t = until;
	ts = (struct timespec){ (time_t)(t / 1000), (long)(t % 1000) * 1000000 };
	if (cur) {
		GUARD(&reqs.lock);
		cur->cond = cond;
		cur->next = reqs.waiting;
		reqs.waiting = cur;
	}
	r = pthread_cond_clockwait(cond, m, CLOCK_MONOTONIC, &ts);
	if (cur) {
		struct req **p;

		GUARD(&reqs.lock);
		for (p = &reqs.waiting; *p != cur; p = &(*p)->next)
			;
		*p = cur->next;
		check = cur->interrupted || r == ETIMEDOUT;
		cur->interrupted = false;
	}
	if (stopping && cur)
		return -EINTR;
	if (check && req_dying(cur->pid))
		return -EINTR;
	return until && r == ETIMEDOUT && now_ms() >= until ? -ETIMEDOUT : 0;
}

static uint64_t
hash_str(const char *s)
{
	return XXH3_64bits(s, strlen(s));
}

static bool
version_same(const struct version *a, const struct version *b)
{
	return memcmp(a, b, sizeof(*a)) == 0;
}

/* Same file on the server, whatever its version? */
static bool
version_same_file(const struct version *a, const struct version *b)
{
	return a->fsid == b->fsid && a->fileid == b->fileid;
}

static bool
bit_get(const uint64_t *map, uint64_t i)
{
	return map[i / 64] >> i % 64 & 1;
}

static void
bit_set(uint64_t *map, uint64_t i)
{
	map[i / 64] |= (uint64_t)1 << i % 64;
}

static void
bit_clear(uint64_t *map, uint64_t i)
{
	map[i / 64] &= ~((uint64_t)1 << i % 64);
}

static void
dirlist_free(struct dirlist *l)
{
	for (size_t i = 0; i < l->n; i++)
		free(l->v[i].name);
	free(l->v);
	*l = (struct dirlist){ 0 };
}

/* Append an entry; names come from the server and are not trusted: those
 * that can't be a name are dropped with a message.  0 or -ENOMEM. */
static int
dirlist_add(struct dirlist *l, const char *name, const struct attr *a)
{
	size_t len = strnlen(name, 256);

	if (!strcmp(name, ".") || !strcmp(name, ".."))
		return 0;
	if (len == 0 || len > 255 || memchr(name, '/', len)) {
		log_warn("readdir: the server sent an impossible name; skipped");
		return 0;
	}
	if (l->n == l->room) {
		size_t room = l->room ? l->room * 2 : 64;
		void *v = reallocarray(l->v, room, sizeof(*l->v));

		if (!v)
			return -ENOMEM;
		l->v = v;
		l->room = room;
	}
	l->v[l->n].name = strdup(name);
	if (!l->v[l->n].name)
		return -ENOMEM;
	l->v[l->n].have_attr = a != NULL;
	if (a)
		l->v[l->n].attr = *a;
	l->n++;
	return 0;
}

/* === util =================================================== End === */

/* === conf: options from one table ========================= Begin === */

/* One option.  The ini key is sect:key, the -o name sect_key. */
struct copt {
	const char *sect, *key;
	size_t at;			/* in struct conf */
	enum { C_STR, C_BOOL, C_TRI, C_WORD, C_UINT, C_SIZE, C_AMOUNT, C_SECS,
		C_PERCENT } type;
	double min, max;		/* in the option's own unit */
	const char *const *words;
	const char *def, *help;
	bool live;			/* can change while it is mounted */
};
#define LIVE .live = true

#define ROW(s, k, field, ...) \
	{ .sect = s, k, offsetof(struct conf, field), __VA_ARGS__ }
#define NFS(key, ...) ROW("nfs", #key, nfs_##key, __VA_ARGS__)
#define CACHE(key, ...) ROW("cache", #key, cache_##key, __VA_ARGS__)
#define NVME(key, ...) ROW("nvme", #key, key, __VA_ARGS__)
#define FUSE(key, ...) ROW("fuse", #key, fuse_##key, __VA_ARGS__)
#define LOGS(key, ...) ROW("log", #key, log_##key, __VA_ARGS__)
#define STR C_STR, 0, 0, NULL
#define BOOL C_BOOL, 0, 0, NULL
#define TRI C_TRI, 0, 0, NULL
#define WORD(...) C_WORD, 0, 0, (const char *const[]){ __VA_ARGS__, NULL }
#define NUM(min, max) C_UINT, min, max, NULL
#define ID C_UINT, 0, UINT32_MAX - 1, NULL
#define SIZE(min, max) C_SIZE, min, max, NULL
#define SIZE_LIMIT 9e18
#define ANY_SIZE C_SIZE, 0, SIZE_LIMIT, NULL
#define AMOUNT C_AMOUNT, 0, SIZE_LIMIT, NULL
#define SECS C_SECS, 0, 1e9, NULL
#define PERCENT C_PERCENT, 0, 100, NULL

/* Every option, in the order of cachefs.8. */
static const struct copt copts[] = {
NFS(backend, STR, NULL,
	"nfs://host[:port]/export[/dir], host:/export[/dir] or a directory"),
NFS(version, WORD("auto", "3", "4"), "auto",
	"protocol version; auto = 3 where the server offers it, else 4"),
NFS(port, NUM(0, 65535), "0",
	"NFS port; 0 = ask the portmapper (v3), 2049 (v4)"),
NFS(mount_port, NUM(0, 65535), "0", "MOUNT port (v3); 0 = ask the portmapper"),
NFS(connections, NUM(1, CONN_MAX), "4", "parallel connections to the server"),
NFS(timeout, NUM(1, 86400), "30",
	"seconds a request may wait for a silent server", LIVE),
NFS(uid, ID, NULL, "AUTH_SYS user; the daemon's unless set"),
NFS(gid, ID, NULL, "AUTH_SYS group; the daemon's unless set"),
CACHE(dir, STR, NULL, "directory of the cache; mode 0700, the daemon's own"),
CACHE(size, AMOUNT, "0",
	"hard cap on bytes used, or % of the disk; 0 = only min_free", LIVE),
CACHE(min_free, AMOUNT, "5%",
	"bytes and inodes of the cache file system left free", LIVE),
CACHE(block_size, SIZE(4 * KiB, 64 * MiB), "256K",
	"unit of presence, a power of two"),
CACHE(fill, PERCENT, "10%",
	"share read after which the rest is fetched; 0 = at open, 100 = never",
	LIVE),
CACHE(eviction, WORD("lru", "lfu", "sieve"), "lru",
	"which object goes first", LIVE),
CACHE(consistency, WORD("strict", "open", "ttl", "immutable"), "open",
	"when the server is asked"),
CACHE(ttl, NUM(0, 31536000), "60", "seconds, for consistency=ttl", LIVE),
CACHE(min_file_size, ANY_SIZE, "0", "smaller files are served uncached", LIVE),
CACHE(max_file_size, ANY_SIZE, "none", "larger files are served uncached",
	LIVE),
CACHE(pin_max, AMOUNT, "50%",
	"bytes of pinned files, or % of what the cache may take", LIVE),
CACHE(include, STR, "", "globs: only these paths are cached", LIVE),
CACHE(exclude, STR, "", "globs: these paths are served uncached", LIVE),
CACHE(checksum, BOOL, "yes", "keep the xxh3 of each block"),
CACHE(scrub, SIZE(0, 1 * TiB), "4M",
	"bytes a second compared with their checksums"),
CACHE(offline, WORD("serve", "fail"), "serve",
	"when the server is unreachable", LIVE),
CACHE(offline_max_age, NUM(0, UINT32_MAX), "0", "seconds; 0 = without limit",
	LIVE),
NVME(use_io_uring, TRI, "auto",
	"yes = fail without it; auto = threads instead"),
NVME(queue_depth, NUM(1, 4096), "128", "I/Os in flight on the cache disk"),
NVME(polling_mode, BOOL, "no", "SQPOLL: a kernel thread takes the submissions"),
NVME(sq_poll_idle_ms, NUM(1, 3600000), "1000",
	"after which that thread sleeps"),
NVME(io_poll, BOOL, "no", "IOPOLL: completions are polled for"),
NVME(fixed_buffers, BOOL, "yes", "register the buffer pool with the ring"),
NVME(use_hugepages, BOOL, "no", "the buffer pool in huge pages"),
NVME(direct_io, BOOL, "yes", "O_DIRECT cache writes"),
NVME(buffer_memory, SIZE(8 * MiB, 1 * TiB), "64M", "size of the buffer pool"),
NVME(splice, TRI, "auto", "zero-copy fills from a directory"),
FUSE(allow_other, BOOL, "no", "let other users in (permissions are checked)"),
FUSE(passthrough, TRI, "auto",
	"kernel reads complete files itself; yes = fail if it can't"),
FUSE(no_open, BOOL, "no",
	"the kernel opens files unasked; needs consistency=immutable"),
FUSE(io_uring, BOOL, "no", "FUSE over io_uring"),
FUSE(threads, NUM(2, 1024), "64", "requests processed at a time"),
FUSE(attr_timeout, SECS, "1", "seconds the kernel keeps attributes"),
FUSE(entry_timeout, SECS, "1", "seconds the kernel keeps names"),
FUSE(negative_timeout, SECS, "1", "seconds the kernel keeps missing names"),
FUSE(readahead, SIZE(0, 1 * GiB), "1M", "kernel read-ahead of the mount"),
LOGS(level, WORD("error", "warn", "info", "debug"), "info",
	"least severe level that is logged", LIVE),
LOGS(target, WORD("auto", "stderr", "syslog"), "auto",
	"auto = stderr in the foreground, else syslog"),
};
#define NCOPTS (sizeof(copts) / sizeof(copts[0]))

/* Names of the Rust ancestor's mount options, as globs, and the unit of their
 * values (h: hours, to be seconds).  Without ours nothing remains to set. */
static const struct alias { const char *theirs, *ours, *unit; } aliases[] = {
	{ "cache_size_gb", "cache_size", "G" },
	{ "block_size_mb", "cache_block_size", "M" },
	{ "min_cache_file_size_mb", "cache_min_file_size", "M" },
	{ "readahead_mb", "fuse_readahead", "M" },
	{ "ttl_hours", "cache_ttl", "h" },
	{ "checksum", "cache_checksum", "" },
	{ "eviction", "cache_eviction", "" },
	{ "direct_io", "nvme_direct_io", "" },
	{ "allow_other", "fuse_allow_other", "" },
	{ "max_concurrent", NULL, NULL },
	{ "max_read", NULL, NULL },
	{ "allow_root", NULL, NULL },
	{ "auto_unmount", NULL, NULL },
	{ "allow_async_read", NULL, NULL },
	{ "smart_cache_*", NULL, NULL },
	{ "nvme_use_memory_mapping", NULL, NULL },
	{ "nvme_numa_aware", NULL, NULL },
	{ NULL, NULL, NULL },
};

/* mount(8)'s own words, as globs: never an error. */
static const char *const mount_words[] = { "ro", "_netdev", "nofail", "auto",
	"noauto", "defaults", "atime", "noatime", "relatime", "norelatime",
	"strictatime", "diratime", "nodiratime", "user", "users", "nouser",
	"owner", "group", "async", "default_permissions", "x-*", "X-*",
	"comment=*", "uhelper=*", "helper=*", "user_id=*", "group_id=*",
	"remount", NULL };

/* A number with a unit of powers of 1024 ("64M", "1.5G", "1GiB"); false if it
 * is none. */
static bool
conf_size(const char *s, double *out)
{
	static const char units[] = "KMGT";
	const char *unit;
	char *end;

	if (!isdigit((unsigned char)*s))
		return false;
	*out = strtod(s, &end);
	if (end[strspn(end, " ")] == '\0')
		return true;
	unit = strchr(units, toupper((unsigned char)*end));
	if (!unit)
		return false;
	*out *= (double)(KiB << 10 * (unit - units));
	end++;
	return !*end || !strcasecmp(end, "B") || !strcasecmp(end, "iB");
}

/* NO, YES, or -1 if s is none of their spellings. */
static int
conf_bool(const char *s)
{
	static const char *const w[] = { "no", "yes", "false", "true", "off",
		"on", "0", "1" };

	for (int i = 0; i < 8; i++)
		if (!strcasecmp(s, w[i]))
			return i & 1;
	return -1;
}

/* The number that val is, within the option's range; share: "5%" of the disk.
 * NULL, or why it is refused. */
static const char *
conf_number(const struct copt *o, const char *val, bool share, double *d)
{
	char *end;

	if (share) {
		*d = strtod(val, &end);
		if (strcmp(end, "%"))
			return "is not a size (like 64M or 2G) or a percentage";
		return *d > 0 && *d <= 100 ? NULL : "is out of range";
	}
	if (o->type == C_SIZE || o->type == C_AMOUNT) {
		if (!conf_size(val, d))
			return "is not a size (like 64M or 2G)";
	} else {
		*d = strtod(val, &end);
		if (o->type == C_PERCENT && end > val && !strcmp(end, "%"))
			end++;
		if (end == val || *end || (o->type != C_SECS && *d >= o->min &&
		    *d <= o->max && *d != (double)(int64_t)*d))
			return "is not a number";
	}
	return *d >= o->min && *d <= o->max ? NULL : "is out of range";
}

/* Set one option from text.  NULL, or why the value is refused. */
static const char *
conf_set(struct conf *c, const struct copt *o, const char *val)
{
	void *at = (char *)c + o->at;
	size_t len = strlen(val);
	bool share = o->type == C_AMOUNT && len > 1 && val[len - 1] == '%';
	const char *why = NULL;
	double d = -1;
	char *s;

	switch (o->type) {
	case C_STR:
		s = strdup(val);
		if (!s)
			return "does not fit into memory";
		free(*(char **)at);
		*(char **)at = s;
		return NULL;
	case C_BOOL:
		d = conf_bool(val);
		why = d < 0 ? "is neither yes nor no" : NULL;
		break;
	case C_TRI:
		d = strcasecmp(val, "auto") ? conf_bool(val) : AUTO;
		why = d < 0 ? "is none of yes, no, auto" : NULL;
		break;
	case C_WORD:
		for (int i = 0; o->words[i]; i++)
			if (!strcmp(val, o->words[i]))
				d = i;
		why = d < 0 ? "is not one of its values" : NULL;
		break;
	case C_SIZE:
		if (!strcmp(val, "none"))
			val = "0";
		why = conf_number(o, val, false, &d);
		if (!why && at == &c->cache_block_size &&
		    (uint64_t)d & ((uint64_t)d - 1))
			why = "is not a power of two";
		break;
	default:
		why = conf_number(o, val, share, &d);
	}
	if (why)
		return why;
	if (share)
		*(struct amount *)at = (struct amount){ .percent = d };
	else if (o->type == C_AMOUNT)
		*(struct amount *)at = (struct amount){ .bytes = (uint64_t)d };
	else if (o->type == C_SIZE)
		*(uint64_t *)at = (uint64_t)d;
	else if (o->type == C_SECS)
		*(double *)at = d;
	else
		*(unsigned *)at = (unsigned)d;
	return NULL;
}

/* What the value may be: " (4096 to 67108864)", " (lru, lfu, sieve)" or "";
 * until the next call. */
static const char *
conf_range(const struct copt *o)
{
	static char s[128];
	size_t n = 0;

	s[0] = '\0';
	if (o->max > 0 && o->max < SIZE_LIMIT)
		snprintf(s, sizeof(s), " (%.0f to %.0f)", o->min, o->max);
	for (int i = 0; o->words && o->words[i]; i++)
		n += (size_t)snprintf(s + n, sizeof(s) - n, "%s%s%s",
		    i ? ", " : " (", o->words[i], o->words[i + 1] ? "" : ")");
	return s;
}

/* The option "sect_key", or whatever sep stands between the two. */
static const struct copt *
conf_find(const char *name, char sep)
{
	for (const struct copt *o = copts; o < copts + NCOPTS; o++) {
		size_t n = strlen(o->sect);

		if (!strncmp(name, o->sect, n) && name[n] == sep &&
		    !strcmp(name + n + 1, o->key))
			return o;
	}
	return NULL;
}

static int
conf_defaults(struct conf *c)
{
	*c = (struct conf){ .mount_flags = MS_NOSUID | MS_NODEV,
		.nfs_uid = geteuid(), .nfs_gid = getegid() };
	for (const struct copt *o = copts; o < copts + NCOPTS; o++)
		if (o->def && conf_set(c, o, o->def))
			return -ENOMEM;
	return 0;
}

static char ini_error[256];

/* iniparser's own messages would go to stderr without the program's name */
__attribute__((format(printf, 1, 2))) static int
conf_ini_error(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(ini_error, sizeof(ini_error), fmt, ap);
	va_end(ap);
	ini_error[strcspn(ini_error, "\n")] = '\0';
	return 0;
}

/* One entry of the ini file: "section" or "section:key".  0, or -EINVAL after
 * a sentence. */
static int
conf_ini_entry(struct conf *c, const char *file, const char *name,
    const char *val)
{
	const char *colon = strchr(name, ':'), *why;
	const struct copt *o = conf_find(name, ':');

	if (o) {
		why = conf_set(c, o, val);
		return !why ? 0 : fail(-EINVAL, "%s: [%s] %s = %s: the value "
		    "%s%s", file, o->sect, o->key, val, why, conf_range(o));
	}
	if (colon)
		return fail(-EINVAL, "%s: unknown key '%s' in section [%.*s]",
		    file, colon + 1, (int)(colon - name), name);
	for (o = copts; o < copts + NCOPTS; o++)
		if (!strcmp(o->sect, name))
			return 0;
	return fail(-EINVAL, "%s: unknown section [%s]", file, name);
}

/* Read the ini file over c.  0, or -EINVAL after a sentence on stderr. */
static int
conf_ini(struct conf *c, const char *file)
{
	int fd = open(file, O_RDONLY | O_CLOEXEC), r = 0;
	dictionary *d;

	if (fd < 0 || read(fd, NULL, 0))	/* iniparser won't say why */
		r = fail(-EINVAL, "cannot read %s: %s", file, strerror(errno));
	sys_close(&fd);
	if (r)
		return r;
	iniparser_set_error_callback(conf_ini_error);
	d = iniparser_load(file);
	if (!d)
		return fail(-EINVAL, "%s: %s", file,
		    ini_error[0] ? ini_error : "not an ini file");
	for (ssize_t i = 0; i < (ssize_t)d->size && !r; i++)
		if (d->key[i])
			r = conf_ini_entry(c, file, d->key[i],
			    d->val[i] ? d->val[i] : "");
	iniparser_freedict(d);
	return r;
}

/* Is opt (with its value) one of mount(8)'s own words?  Then it is done. */
static bool
conf_mount_word(struct conf *c, const char *opt)
{
	bool no = !strncmp(opt, "no", 2);
	const char *word = opt + (no ? 2 : 0);
	unsigned flag = !strcmp(word, "dev") ? MS_NODEV :
	    !strcmp(word, "suid") ? MS_NOSUID :
	    !strcmp(word, "exec") ? MS_NOEXEC : 0;

	if (flag) {
		c->mount_flags &= ~flag;
		c->mount_flags |= no ? flag : 0;
		return true;
	}
	for (const char *const *w = mount_words; *w; w++)
		if (!fnmatch(*w, opt, 0))
			return true;
	if (strcmp(opt, "rw"))
		return false;
	log_warn("option rw: cachefs is read-only; mounting read-only");
	return true;
}

/* One -o option, "name" or "name=value".  0, or -EINVAL after a sentence. */
static int
conf_option(struct conf *c, char *opt)
{
	const struct alias *a = aliases;
	const struct copt *o;
	char *val = strchr(opt, '='), buf[64];
	const char *name = opt, *why;
	bool arc;
	int b;

	if (!strncmp(opt, "fsname=", 7)) {
		free(c->fsname);
		c->fsname = strdup(opt + 7);
		return c->fsname ? 0 : -ENOMEM;
	}
	c->remount |= !strcmp(opt, "remount");
	if (conf_mount_word(c, opt))
		return 0;
	if (val)
		*val++ = '\0';
	if (!strcmp(opt, "foreground") || !strcmp(opt, "debug")) {
		b = val ? conf_bool(val) : YES;
		if (b < 0)
			return fail(-EINVAL, "option %s=%s: the value is "
			    "neither yes nor no", opt, val);
		*(*opt == 'f' ? &c->foreground : &c->debug) = (unsigned)b;
		return 0;
	}
	while (a->theirs && fnmatch(a->theirs, opt, 0))
		a++;
	if (a->theirs && !a->ours) {
		log_warn("option %s: nothing remains to set; ignored", opt);
		return 0;
	}
	if (a->ours)
		name = a->ours;
	arc = val && !strcmp(opt, "eviction") && !strcmp(val, "arc");
	if (arc)
		log_warn("option eviction=arc: sieve takes its place");
	if (a->ours && val) {
		if (*a->unit == 'h' && isdigit((unsigned char)*val))
			snprintf(buf, sizeof(buf), "%.0f", 3600 * atof(val));
		else
			snprintf(buf, sizeof(buf), "%s%s", arc ? "sieve" : val,
			    a->unit);
		val = buf;
	}
	o = conf_find(name, '_');
	if (!o)
		return fail(-EINVAL, "unknown option '%s'", name);
	if (!val && o->type != C_BOOL && o->type != C_TRI)
		return fail(-EINVAL, "option %s needs a value", name);
	why = conf_set(c, o, val ? val : "yes");
	if (why)
		return fail(-EINVAL, "option %s=%s: the value %s%s", name, val,
		    why, conf_range(o));
	if (a->ours && *a->unit == 'h')
		c->cache_consistency = CONS_TTL;
	return 0;
}

/* A whole -o argument: options between commas; "\," is a comma. */
static int
conf_options(struct conf *c, const char *arg)
{
	char *opt = arg ? strdup(arg) : NULL, *end = opt;
	int r = opt ? 0 : -ENOMEM;

	for (; !r; arg++) {
		if (*arg == '\\' && arg[1] == ',') {
			*end++ = *++arg;
		} else if (*arg && *arg != ',') {
			*end++ = *arg;
		} else {
			*end = '\0';
			r = *opt ? conf_option(c, opt) : 0;
			end = opt;
			if (!*arg)
				break;
		}
	}
	free(opt);
	return r;
}

/* Everything that one value alone can't show.  0, or -EINVAL after a
 * sentence on stderr. */
static int
conf_check(const struct conf *c)
{
	const struct { bool bad; const char *why; } rules[] = {
		{ !c->nfs_backend || !*c->nfs_backend, "no backend: set [nfs] "
		    "backend in the ini file or -o nfs_backend=" },
		{ !c->cache_dir || !*c->cache_dir, "no cache directory: set "
		    "[cache] dir in the ini file or -o cache_dir=" },
		{ c->cache_max_file_size &&
		    c->cache_max_file_size < c->cache_min_file_size,
		    "cache_max_file_size is less than cache_min_file_size: "
		    "nothing would be cached" },
		{ !WITH_URING && c->use_io_uring == YES, "nvme_use_io_uring="
		    "yes, but this cachefs was built without io_uring" },
		{ c->use_io_uring == NO && c->polling_mode, "nvme_polling_mode="
		    "yes needs io_uring, but nvme_use_io_uring=no" },
		{ c->io_poll && !c->direct_io,
		    "nvme_io_poll=yes needs nvme_direct_io=yes" },
		{ c->io_poll && (!WITH_URING || c->use_io_uring == NO),
		    "nvme_io_poll=yes needs io_uring, which is off" },
		{ c->fuse_no_open && c->cache_consistency != CONS_IMMUTABLE,
		    "fuse_no_open=yes needs cache_consistency=immutable: "
		    "nobody would see that a file has changed" },
		{ c->fuse_no_open && c->fuse_passthrough == YES,
		    "fuse_no_open=yes and fuse_passthrough=yes: without an "
		    "open there is nothing to pass through" },
		{ c->splice == YES && c->cache_checksum,
		    "nvme_splice=yes needs cache_checksum=no: spliced data is "
		    "never seen by the daemon" },
		{ c->fuse_io_uring && !FUSE_RING, "fuse_io_uring=yes, but this "
		    "cachefs was built with a libfuse that can't: it takes "
		    "3.18, linked statically" },
	};

	for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++)
		if (rules[i].bad)
			return fail(-EINVAL, "%s", rules[i].why);
	return 0;
}

static pthread_mutex_t conf_lock = PTHREAD_MUTEX_INITIALIZER;

/* Do a and b have the same value of this option? */
static bool
conf_same(const struct copt *o, const struct conf *a, const struct conf *b)
{
	const void *x = (const char *)a + o->at, *y = (const char *)b + o->at;
	const char *s, *t;

	if (o->type == C_STR) {
		s = *(char *const *)x ?: "";
		t = *(char *const *)y ?: "";
		return !strcmp(s, t);
	}
	return !memcmp(x, y, o->type == C_AMOUNT ? sizeof(struct amount) :
	    o->type == C_SIZE || o->type == C_SECS ? 8 : sizeof(unsigned));
}

/* Let the option in c, which others read, be as in new, which gets the old
 * value. */
static void
conf_take(const struct copt *o, struct conf *c, struct conf *new)
{
	void *to = (char *)c + o->at, *from = (char *)new + o->at;
	char *old;

	if (o->type == C_STR) {
		GUARD(&conf_lock);
		old = *(char **)to;
		*(char **)to = *(char **)from;
		*(char **)from = old;
	} else if (o->type == C_AMOUNT) {
		*(struct amount *)to = *(struct amount *)from;
	} else if (o->type == C_SIZE) {
		*(_Atomic uint64_t *)to = *(uint64_t *)from;
	} else {
		*(_Atomic unsigned *)to = *(unsigned *)from;
	}
}

static void
conf_free(struct conf *c)
{
	for (const struct copt *o = copts; o < copts + NCOPTS; o++)
		if (o->type == C_STR)
			free(*(char **)((char *)c + o->at));
	free(c->mountpoint);
	free(c->fsname);
}

/* === conf =================================================== End === */

/* === pool: aligned buffers ================================ Begin === */

/*
 * One mapping in slabs of 1 MiB; a slab hands out runs of granules (the block
 * size, at most 1 MiB), so that buffers are aligned for O_DIRECT and lie in
 * the region registered with the ring.  A buffer has one owner at a time.
 * Who finds the pool empty waits in order; before waiting, the oldest buffer
 * that is kept only because its reader may still come is taken back.
 */
#define SLAB_WORDS (IO_MAX / DIO_ALIGN / 64)

struct pool_waiter {
	pthread_cond_t cond;
	TAILQ_ENTRY(pool_waiter) next;
};

static struct {
	char *base;			/* [I] */
	size_t size, gran;		/* [I] bytes */
	unsigned nslab, per;		/* [I] slabs; granules in each */
	bool (*reclaim)(void);		/* [I] frees a kept buffer; takes [b] */
	pthread_mutex_t lock;		/* the rest; nothing is taken under it */
	uint64_t (*map)[SLAB_WORDS];	/* granules in use */
	unsigned *nfree;		/* granules free in each slab */
	size_t used;			/* bytes */
	TAILQ_HEAD(pool_queue, pool_waiter) waiters; /* in order */
	TAILQ_HEAD(pool_kept, fetch) kept; /* oldest first, see fetch */
} pool = { .lock = PTHREAD_MUTEX_INITIALIZER,
	.waiters = TAILQ_HEAD_INITIALIZER(pool.waiters),
	.kept = TAILQ_HEAD_INITIALIZER(pool.kept) };

/* Map and cut the pool.  0, or -errno after a sentence. */
static int
pool_start(size_t size, size_t block)
{
	const int prot = PROT_READ | PROT_WRITE;
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS;

	pool.gran = MIN(MAX(block, DIO_ALIGN), IO_MAX);
	pool.per = (unsigned)(IO_MAX / pool.gran);
	pool.nslab = (unsigned)(size / IO_MAX);
	pool.size = (size_t)pool.nslab * IO_MAX;
	pool.map = calloc(pool.nslab, sizeof(*pool.map));
	pool.nfree = calloc(pool.nslab, sizeof(*pool.nfree));
	if (!pool.map || !pool.nfree)
		return fail(-ENOMEM, "out of memory");
	for (unsigned i = 0; i < pool.nslab; i++)
		pool.nfree[i] = pool.per;
	pool.base = MAP_FAILED;
	if (conf.use_hugepages) {
		pool.size = ROUND_UP(pool.size, 2 * MiB);
		pool.base = mmap(NULL, pool.size, prot, flags | MAP_HUGETLB,
		    -1, 0);
		if (pool.base == MAP_FAILED)
			log_info("no huge pages are reserved (vm.nr_hugepages); "
			    "asking for transparent ones");
	}
	if (pool.base == MAP_FAILED) {
		pool.base = mmap(NULL, pool.size, prot, flags, -1, 0);
		if (pool.base == MAP_FAILED)
			return fail(-ENOMEM, "nvme_buffer_memory: cannot map "
			    "%zu MiB: %s", pool.size >> 20, strerror(errno));
		if (conf.use_hugepages)
			madvise(pool.base, pool.size, MADV_HUGEPAGE);
	}
	return 0;
}

static void
pool_stop(void)
{
	if (pool.base && pool.base != MAP_FAILED)
		munmap(pool.base, pool.size);
	free(pool.map);
	free(pool.nfree);
	pool.base = NULL;
}

/* Granules that hold len bytes. */
static unsigned
pool_granules(size_t len)
{
	return (unsigned)((len + pool.gran - 1) / pool.gran);
}

static void
pool_wake_locked(void)
{
	if (!TAILQ_EMPTY(&pool.waiters))
		pthread_cond_signal(&TAILQ_FIRST(&pool.waiters)->cond);
}

/* n free granules in a row, or NULL. */
static char *
pool_take_locked(unsigned n)
{
	for (unsigned s = 0; s < pool.nslab; s++) {
		if (pool.nfree[s] < n)
			continue;
		for (unsigned i = 0, run = 0; i < pool.per; i++) {
			run = bit_get(pool.map[s], i) ? 0 : run + 1;
			if (run < n)
				continue;
			for (unsigned k = i + 1 - n; k <= i; k++)
				bit_set(pool.map[s], k);
			pool.nfree[s] -= n;
			pool.used += n * pool.gran;
			return pool.base + (size_t)s * IO_MAX +
			    (i + 1 - n) * pool.gran;
		}
	}
	return NULL;
}

/* A buffer of at least len bytes (at most 1 MiB) if there is one at once and
 * `spare` bytes of the pool stay free or reclaimable; else NULL. */
static char *
pool_try(size_t len, size_t spare)
{
	unsigned n = pool_granules(len);
	bool wait;

	do {
		GUARD(&pool.lock);
		char *buf = NULL;

		wait = !TAILQ_EMPTY(&pool.waiters);
		if (!wait && pool.used + n * pool.gran + spare <= pool.size)
			buf = pool_take_locked(n);
		if (buf)
			return buf;
	} while (!wait && pool.reclaim());
	return NULL;
}

/* The same, waiting in turn.  NULL only if the caller's process is being
 * killed.  Callers hold no lock and no other buffer. */
static char *
pool_get(size_t len)
{
	struct pool_waiter me = { .cond = PTHREAD_COND_INITIALIZER };
	char *buf = pool_try(len, 0);
	int r = 0;

	if (buf)
		return buf;
	COUNT(buffer_waits, 1);
	pthread_mutex_lock(&pool.lock);
	TAILQ_INSERT_TAIL(&pool.waiters, &me, next);
	while (r != -EINTR) {
		bool first = TAILQ_FIRST(&pool.waiters) == &me, freed = false;

		if (first && (buf = pool_take_locked(pool_granules(len))))
			break;
		if (first && !TAILQ_EMPTY(&pool.kept)) {
			pthread_mutex_unlock(&pool.lock);
			freed = pool.reclaim();
			pthread_mutex_lock(&pool.lock);
			if (!freed)
				buf = pool_take_locked(pool_granules(len));
			if (buf)
				break;
		}
		if (!freed)
			r = wait_on(&me.cond, &pool.lock, 0);
	}
	TAILQ_REMOVE(&pool.waiters, &me, next);
	pool_wake_locked();
	pthread_mutex_unlock(&pool.lock);
	pthread_cond_destroy(&me.cond);
	return buf;
}

/* Give a buffer of len bytes back; wakes the first who waits. */
static void
pool_put(char *buf, size_t len)
{
	size_t at = (size_t)(buf - pool.base);
	unsigned n = pool_granules(len), s = (unsigned)(at / IO_MAX);
	unsigned i = (unsigned)(at % IO_MAX / pool.gran);

	GUARD(&pool.lock);
	for (unsigned k = i; k < i + n; k++)
		bit_clear(pool.map[s], k);
	pool.nfree[s] += n;
	pool.used -= n * pool.gran;
	pool_wake_locked();
}

/* === pool =================================================== End === */

/* === exec: I/O on the cache disk ========================== Begin === */

/*
 * One interface, two kinds of engine.  io_uring: exec_submit() queues, the one
 * thread of the ring takes the whole queue, submits it with one system call
 * and reaps in batches.  Threads: each takes one request and does it.  done()
 * runs in an engine's thread and does not block.  With nvme_io_poll direct
 * writes have a ring of their own, whose thread asks the device for
 * completions as long as there are any to come, instead of being interrupted.
 */
#define EXEC_THREADS 8
#define EXEC_FILES 256			/* registered with a ring */

STAILQ_HEAD(exec_list, exec_req);

struct engine {
	bool uring;			/* [I] */
	bool polled;			/* [I] IOPOLL */
	bool fixed;			/* [I] the pool is registered */
	pthread_t tid[EXEC_THREADS];	/* [I] */
	unsigned ntid;			/* [I] */
	pthread_mutex_t lock;		/* the rest */
	bool files;			/* files can be registered */
	pthread_cond_t cond;		/* threads: something is queued */
	struct exec_list queue;
	bool quit;
	int wake;			/* [I] eventfd: ring has work */
	bool kicked;			/* wake was written, not yet read */
	bool forget;			/* some of gone[] are new */
	uint64_t gone[EXEC_FILES];	/* latest file closed, by slot */
#if WITH_URING
	struct io_uring ring;		/* [o] ring thread, as all below */
	unsigned inflight;
	bool armed;			/* the eventfd is being read */
	uint64_t wakebuf;
	uint64_t slot[EXEC_FILES];	/* exec_req.file registered there */
	unsigned busy[EXEC_FILES];	/* requests in flight by it */
#endif
};

#define ENGINE(name) { .lock = PTHREAD_MUTEX_INITIALIZER, .wake = -1, \
	.cond = PTHREAD_COND_INITIALIZER, \
	.queue = STAILQ_HEAD_INITIALIZER((name).queue) }
static struct engine exec = ENGINE(exec);
static struct engine exec_polled = ENGINE(exec_polled);	/* or unused */

static void
exec_kick(struct engine *e)
{
	if (eventfd_write(e->wake, 1))
		log_error("exec: eventfd: %s", strerror(errno));
}

/* Hand r to its engine; r->done(r) is called when it is over. */
static void
exec_submit(struct exec_req *r)
{
	struct engine *e = r->file && exec_polled.polled ? &exec_polled : &exec;
	bool kick = false;

	r->did = 0;
	WITH_LOCK(&e->lock) {
		STAILQ_INSERT_TAIL(&e->queue, r, next);
		if (!e->uring)
			pthread_cond_signal(&e->cond);
		else if (!e->kicked)
			kick = e->kicked = true;
	}
	if (kick)
		exec_kick(e);
}

/* A number for an O_DIRECT file that is to be written, for exec_req.file. */
static uint64_t
exec_file(void)
{
	static _Atomic uint64_t last;

	return ++last;
}

/* That file is closed.  A ring must not keep it, and its space, any longer. */
static void
exec_forget(uint64_t file)
{
	struct engine *e = exec_polled.polled ? &exec_polled : &exec;
	uint64_t *gone = &e->gone[file % EXEC_FILES];

	GUARD(&e->lock);
	if (!e->files)			/* or no more: it has been stopped */
		return;
	*gone = MAX(*gone, file);
	e->forget = true;
	if (!e->kicked)
		exec_kick(e);
	e->kicked = true;
}

static void
exec_finish(struct exec_req *r, int res)
{
	r->res = res;
	r->done(r);
}

static void *
exec_thread(void *arg)
{
	struct engine *e = arg;

	pthread_mutex_lock(&e->lock);
	for (;;) {
		struct exec_req *r = STAILQ_FIRST(&e->queue);
		ssize_t n;

		if (!r && e->quit)
			break;
		if (!r) {
			pthread_cond_wait(&e->cond, &e->lock);
			continue;
		}
		STAILQ_REMOVE_HEAD(&e->queue, next);
		pthread_mutex_unlock(&e->lock);
		if (r->op == EXEC_READ) {
			n = sys_pread(r->fd, r->buf, r->len, r->off);
		} else {
			n = sys_pwrite(r->fd, r->buf, r->len, r->off);
			if (n == 0)
				n = (ssize_t)r->len;
		}
		exec_finish(r, (int)n);
		pthread_mutex_lock(&e->lock);
	}
	pthread_mutex_unlock(&e->lock);
	return NULL;
}

#if WITH_URING
/* Prepare r's remaining bytes on a free SQE. */
static void
exec_prep(struct engine *e, struct exec_req *r, struct io_uring_sqe *sqe)
{
	char *buf = r->buf + r->did;
	unsigned len = (unsigned)(r->len - r->did);
	unsigned slot = (unsigned)(r->file % EXEC_FILES);
	uint64_t off = r->off + r->did;
	bool fixed = e->fixed && r->buf >= pool.base &&
	    r->buf < pool.base + pool.size;

	if (r->op == EXEC_READ && fixed)
		io_uring_prep_read_fixed(sqe, r->fd, buf, len, off, 0);
	else if (r->op == EXEC_READ)
		io_uring_prep_read(sqe, r->fd, buf, len, off);
	else if (fixed)
		io_uring_prep_write_fixed(sqe, r->fd, buf, len, off, 0);
	else
		io_uring_prep_write(sqe, r->fd, buf, len, off);
	/* SQEs that are not submitted yet name a slot, not its file */
	if (e->files && r->file && e->slot[slot] != r->file && !e->busy[slot])
		e->slot[slot] = io_uring_register_files_update(&e->ring, slot,
		    &r->fd, 1) == 1 ? r->file : 0;
	r->slotted = e->files && r->file && e->slot[slot] == r->file;
	if (r->slotted) {
		e->busy[slot]++;
		sqe->fd = (int)slot;
		io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
	}
	io_uring_sqe_set_data(sqe, r);
	e->inflight++;
	COUNT(sqe_submitted, 1);
	if (e->inflight > count.queue_depth_max)
		count.queue_depth_max = e->inflight;
}

/* One completion: an error, the end, or short and to go on; then it is queued
 * on todo. */
static void
exec_complete(struct engine *e, struct exec_req *r, int res,
    struct exec_list *todo)
{
	e->inflight--;
	e->busy[r->file % EXEC_FILES] -= r->slotted;
	COUNT(cqe_completed, 1);
	if (res > 0)
		r->did += (size_t)res;
	if ((res > 0 && r->did < r->len) || res == -EAGAIN || res == -EINTR) {
		STAILQ_INSERT_TAIL(todo, r, next);
		return;
	}
	if (res == 0 && r->op == EXEC_WRITE)
		res = -EIO;
	exec_finish(r, res < 0 ? res : (int)r->did);
}

/* Take what others left: requests to todo, and files to forget.  Another file
 * of the same slot may be unregistered too if it is idle: the next write
 * registers it. */
static bool
exec_take(struct engine *e, struct exec_list *todo)
{
	int none = -1;

	GUARD(&e->lock);
	STAILQ_CONCAT(todo, &e->queue);
	for (unsigned i = 0; e->forget && i < EXEC_FILES; i++)
		if (e->slot[i] && e->slot[i] <= e->gone[i] && !e->busy[i]) {
			io_uring_register_files_update(&e->ring, i, &none, 1);
			e->slot[i] = 0;
		}
	e->forget = false;
	return !e->quit;
}

/* The work of exec_ring() between two looks at the queue: submit, wait for
 * something, reap. */
static void
exec_turn(struct engine *e, struct exec_list *todo)
{
	struct io_uring_cqe *cqe;
	struct io_uring_sqe *sqe;
	struct exec_req *q;
	unsigned head, n = 0;
	bool some = false;
	int r;

	if (!e->armed && !e->polled && (sqe = io_uring_get_sqe(&e->ring))) {
		io_uring_prep_read(sqe, e->wake, &e->wakebuf,
		    sizeof(e->wakebuf), 0);
		io_uring_sqe_set_data(sqe, NULL);
		e->armed = true;
	}
	while ((q = STAILQ_FIRST(todo)) && e->inflight < conf.queue_depth &&
	    (sqe = io_uring_get_sqe(&e->ring))) {
		STAILQ_REMOVE_HEAD(todo, next);
		exec_prep(e, q, sqe);
		some = true;
	}
	if (e->polled && !e->inflight) {	/* such a ring can't wait */
		if (eventfd_read(e->wake, &e->wakebuf))
			log_error("exec: eventfd: %s", strerror(errno));
		WITH_LOCK(&e->lock)
			e->kicked = false;
		return;
	}
	r = io_uring_submit_and_wait(&e->ring, 1);
	COUNT(submit_calls, some);
	if (r < 0 && r != -EINTR && r != -EAGAIN && r != -EBUSY)
		log_error("io_uring_submit_and_wait: %s", strerror(-r));
	io_uring_for_each_cqe(&e->ring, head, cqe) {
		n++;
		if ((q = io_uring_cqe_get_data(cqe))) {
			exec_complete(e, q, cqe->res, todo);
			continue;
		}
		e->armed = false;
		WITH_LOCK(&e->lock)
			e->kicked = false;
	}
	io_uring_cq_advance(&e->ring, n);
}

/* The ring's one owner.  The eventfd is read through the ring itself, so that
 * one wait covers completions and new work. */
static void *
exec_ring(void *arg)
{
	struct exec_list todo = STAILQ_HEAD_INITIALIZER(todo);
	struct engine *e = arg;

	/* Debian 12's liburing forgets to export io_uring_enable_rings(). */
	syscall(SYS_io_uring_register, e->ring.ring_fd,
	    IORING_REGISTER_ENABLE_RINGS, NULL, 0);
	while (exec_take(e, &todo) || !STAILQ_EMPTY(&todo) || e->inflight)
		exec_turn(e, &todo);
	return NULL;
}

/* Set e's ring up with the best flags that this kernel takes.  0 or -errno. */
static int
exec_ring_init(struct engine *e)
{
	static const unsigned flags[] = {	/* Linux 6.1, 6.0, 5.19, any */
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_R_DISABLED |
		    IORING_SETUP_DEFER_TASKRUN,
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_R_DISABLED |
		    IORING_SETUP_COOP_TASKRUN,
		IORING_SETUP_COOP_TASKRUN, 0 };
	static const char *const without[] = { NULL, "DEFER_TASKRUN",
		"SINGLE_ISSUER", "COOP_TASKRUN" };	/* than the one before */
	struct iovec iov = { pool.base, pool.size };
	int r = -EINVAL;

	e->armed = false;
	memset(e->slot, 0, sizeof(e->slot));
	for (size_t i = 0; i < 4 && r == -EINVAL; i++) {
		struct io_uring_params p = { .flags = flags[i] };

		if (conf.polling_mode) {	/* has no task work to defer */
			p.flags &= IORING_SETUP_SINGLE_ISSUER |
			    IORING_SETUP_R_DISABLED;
			p.flags |= IORING_SETUP_SQPOLL;
			p.sq_thread_idle = conf.sq_poll_idle_ms;
		}
		p.flags |= e->polled ? IORING_SETUP_IOPOLL : 0;
		r = io_uring_queue_init_params(conf.queue_depth + 1, &e->ring,
		    &p);
		if (!r && i)
			log_info("the kernel refuses a ring with %s; going on "
			    "without", without[i]);
	}
	if (r)
		return r;
	e->wake = eventfd(0, EFD_CLOEXEC);
	if (e->wake < 0) {
		r = -errno;
		io_uring_queue_exit(&e->ring);
		return r;
	}
	e->files = !io_uring_register_files_sparse(&e->ring, EXEC_FILES);
	if (conf.fixed_buffers) {
		r = io_uring_register_buffers(&e->ring, &iov, 1);
		if (r)
			log_info("the buffer pool could not be registered (%s); "
			    "going on with plain buffers", strerror(-r));
		e->fixed = r == 0;
	}
	return 0;
}
#else
static int
exec_ring_init(struct engine *e)
{
	(void)e;
	return -ENOSYS;
}
#define exec_ring exec_thread
#endif

/* Start e's threads.  0, or -errno after a message. */
static int
exec_run(struct engine *e)
{
	int r = 0;

	for (unsigned n = e->uring ? 1 : EXEC_THREADS; !r && e->ntid < n;) {
		r = sys_thread(&e->tid[e->ntid], e->uring ? exec_ring :
		    exec_thread, e);
		e->ntid += r == 0;
	}
	return r;
}

/* Let what is queued and in flight end, then stop the engine. */
static void
exec_stop(struct engine *e)
{
	WITH_LOCK(&e->lock) {
		e->quit = true;
		pthread_cond_broadcast(&e->cond);
	}
	if (e->ntid && e->uring)
		exec_kick(e);
	for (unsigned i = 0; i < e->ntid; i++)
		pthread_join(e->tid[i], NULL);
#if WITH_URING
	if (e->uring)
		io_uring_queue_exit(&e->ring);
#endif
	e->uring = false;
	e->ntid = 0;
	GUARD(&e->lock);
	e->files = false;
	sys_close(&e->wake);
}

struct exec_wait {
	struct exec_req er;
	pthread_mutex_t lock;
	pthread_cond_t cond;
	bool over;
};

static void
exec_wait_done(struct exec_req *r)
{
	struct exec_wait *w = (struct exec_wait *)r;	/* er is first */

	GUARD(&w->lock);
	w->over = true;
	pthread_cond_signal(&w->cond);
}

/* Do r and wait for it.  Bytes or -errno. */
static int
exec_do(const struct exec_req *r)
{
	struct exec_wait w = { .lock = PTHREAD_MUTEX_INITIALIZER,
		.cond = PTHREAD_COND_INITIALIZER, .er = *r };

	w.er.done = exec_wait_done;
	exec_submit(&w.er);
	WITH_LOCK(&w.lock)
		while (!w.over)
			pthread_cond_wait(&w.cond, &w.lock);
	return w.er.res;
}

/* Read from a cache file and wait for it: what the page cache has is copied
 * here and now, the rest goes through the engine.  Bytes or -errno. */
static ssize_t
exec_read(int fd, char *buf, size_t len, uint64_t off)
{
	struct iovec iov = { buf, len };
	ssize_t n = preadv2(fd, &iov, 1, (off_t)off, RWF_NOWAIT);
	int r;

	if (n == (ssize_t)len)
		return n;
	n = MAX(n, 0);
	r = exec_do(&(struct exec_req){ .op = EXEC_READ, .fd = fd,
	    .buf = buf + n, .len = len - (size_t)n, .off = off + (size_t)n });
	return r < 0 ? r : n + r;
}

/* Does the block device of dir poll for completions?  Linux accepts such I/O
 * where it does not, and then waits for interrupts.  sysfs-block. */
static bool
exec_device_polls(int dir)
{
	static const char *const up[] = { "", "../" };	/* of a partition */
	char path[80], c = '1';
	struct stat st;
	int fd = -1;

	if (fstat(dir, &st))
		return true;
	for (int i = 0; i < 2 && fd < 0; i++) {
		snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%squeue/"
		    "io_poll", major(st.st_dev), minor(st.st_dev), up[i]);
		fd = open(path, O_RDONLY | O_CLOEXEC);
	}
	if (fd >= 0 && read(fd, &c, 1) != 1)
		c = '1';
	sys_close(&fd);
	return c != '0';
}

/* Start a ring for nvme_io_poll and try it with a file in dir.  0, or -errno
 * after a sentence: not every device polls, nor every file system. */
static int
exec_poll_start(int dir)
{
	int fd, r;

	if (!exec_device_polls(dir))
		return fail(-EOPNOTSUPP, "nvme_io_poll=yes, but the disk of "
		    "cache_dir %s does not poll (an NVMe drive does with the "
		    "kernel parameter nvme.poll_queues)", conf.cache_dir);
	exec_polled.polled = true;
	r = exec_ring_init(&exec_polled);
	exec_polled.uring = r == 0;
	if (!r)
		r = exec_run(&exec_polled);
	if (!r) {
		r = fd = sys_openat(dir, "polled.tmp",
		    O_WRONLY | O_CREAT | O_DIRECT, 0600);
		if (fd >= 0) {
			memset(pool.base, 0, DIO_ALIGN);
			r = exec_do(&(struct exec_req){ .op = EXEC_WRITE,
			    .fd = fd, .file = exec_file(), .buf = pool.base,
			    .len = DIO_ALIGN });
			unlinkat(dir, "polled.tmp", 0);
			sys_close(&fd);
		}
	}
	return r >= 0 ? 0 : fail(r, "nvme_io_poll=yes, but the disk of "
	    "cache_dir %s can't be polled: %s", conf.cache_dir, strerror(-r));
}

/* Start the engine; dir is the cache's.  0 or -errno after a message. */
static int
exec_start(int dir)
{
	int r = conf.use_io_uring == NO ? -ENOSYS : exec_ring_init(&exec);

	if (r && (conf.use_io_uring == YES || conf.io_poll))
		return fail(r, "nvme_%s=yes, but io_uring is refused here: %s",
		    conf.io_poll ? "io_poll" : "use_io_uring", strerror(-r));
	if (r && WITH_URING && conf.use_io_uring == AUTO)
		log_warn("io_uring is refused here (%s); using the thread "
		    "engine", strerror(-r));
	exec.uring = r == 0;
	r = exec_run(&exec);
	return !r && conf.io_poll ? exec_poll_start(dir) : r;
}

/* === exec =================================================== End === */

/* === names: what the kernel knows by path ================= Begin === */

/*
 * One struct name for each path that matters: it holds the mode and version
 * of the path's open files, the attributes that the kernel was told, and the
 * server's handle.  Names without open files are kept for speed only, the
 * NAMES_MAX last used; a forgotten one costs a walk from the root.
 */
#define NAME_BUCKETS 16384

static struct {
	pthread_mutex_t lock;		/* held briefly: no I/O under it */
	struct name *tab[NAME_BUCKETS];
	TAILQ_HEAD(name_lru, name) idle; /* those without open files, by use */
	unsigned nidle;
	unsigned era;			/* of what is noted: see names_unnote() */
	struct token {
		uint64_t hash;		/* of the path */
		uint64_t at;		/* now_ms() */
		uint32_t pid;
		bool looked;		/* LOOKUP seen; else: ESTALE given */
		bool retry;		/* this is the kernel's second try */
		bool opening;		/* at an OPEN, not a GETATTR */
		bool shown;		/* a GETATTR was answered by it */
		struct version ver;	/* what the LOOKUP showed */
	} tokens[TOKENS];
} names = { .lock = PTHREAD_MUTEX_INITIALIZER, .era = 1,
	.idle = TAILQ_HEAD_INITIALIZER(names.idle) };

static struct name **
name_slot(const char *path)
{
	struct name **p = &names.tab[hash_str(path) % NAME_BUCKETS];

	while (*p && strcmp((*p)->path, path))
		p = &(*p)->next;
	return p;
}

/* n has an open file now: it is not forgotten. */
static void
name_busy_locked(struct name *n)
{
	TAILQ_REMOVE(&names.idle, n, idle);
	names.nidle--;
}

static void
name_free_locked(struct name *n)
{
	*name_slot(n->path) = n->next;
	name_busy_locked(n);
	free(n->path);
	free(n->origin);
	free(n);
}

/* n has no open file: the newest of these; the oldest may be forgotten. */
static void
name_idle_locked(struct name *n)
{
	TAILQ_INSERT_TAIL(&names.idle, n, idle);
	if (++names.nidle > NAMES_MAX)
		name_free_locked(TAILQ_FIRST(&names.idle));
}

/* The name for path, or NULL: unknown, or out of memory when creating. */
static struct name *
name_find_locked(const char *path, bool create)
{
	struct name **p = name_slot(path), *n = *p;

	if (n && !n->opens)
		name_busy_locked(n);
	else if (n || !create)
		return n;
	if (!n) {
		n = calloc(1, sizeof(*n));
		if (!n || !(n->path = strdup(path))) {
			free(n);
			return NULL;
		}
		*p = n;
	}
	name_idle_locked(n);
	return n;
}

/* Copy the server's handle of path to fh if it is known, and the file's number
 * to id. */
static bool
name_handle(const char *path, struct handle *fh, uint64_t *id)
{
	GUARD(&names.lock);
	struct name *n = name_find_locked(path, false);
	if (n) {
		*fh = n->fh;
		*id = n->attr.ver.fileid;
	}
	return n && fh->len > 0;
}

/* Forget the handle of path: the server no longer knows it.  attr: nor has it
 * that version any more. */
static void
name_doubt(const char *path, bool attr)
{
	GUARD(&names.lock);
	struct name *n = name_find_locked(path, false);
	if (n) {
		n->fh.len = 0;
		n->doubt |= attr;
	}
}

/*
 * Note that the server, asked at `asked`, showed a and fh for path.  False
 * when an overlapping question got another version, and so nobody can tell
 * which is the newer: ask again.  Sets *news, unless news is NULL, if that has
 * yet to be noted for offline use, which is the caller's to do then.
 */
static bool
name_validated(const char *path, const struct attr *a, const struct handle *fh,
    uint64_t asked, bool *news)
{
	GUARD(&names.lock);
	struct name *n = name_find_locked(path, true);
	if (n && n->answered > asked && n->asked &&
	    !version_same(&n->attr.ver, &a->ver))
		return false;
	if (n) {
		if (memcmp(&n->attr, a, sizeof(*a)))
			n->noted = 0;
		n->attr = *a;
		n->fh = *fh;
		n->asked = asked;
		n->answered = now_us();
		n->doubt = false;
	}
	if (news) {
		*news = n && n->noted != names.era;
		if (n)
			n->noted = names.era;
	}
	return true;
}

/* What was noted for offline use is lost: everything is news again. */
static void
names_unnote(void)
{
	GUARD(&names.lock);
	names.era++;
}

/* The token of this request's thread for the path with this hash. */
static struct token *
token_slot(uint64_t hash)
{
	return &names.tokens[(hash ^ cur->pid * UINT64_C(0x9e3779b97f4a7c15)) %
	    TOKENS];
}

static bool
token_mine(const struct token *t, uint64_t hash)
{
	return t->pid == cur->pid && t->hash == hash;
}

/* A LOOKUP by this request's thread showed it version ver of path. */
static void
token_leave_locked(const char *path, const struct version *ver)
{
	uint64_t hash = hash_str(path), now = now_ms();
	struct token *t = token_slot(hash);
	bool retry = t->retry && now - t->at < RETRY_MS;
	bool opening = retry && t->opening;

	/* another's second try, still expected, is not overwritten */
	if (!retry || token_mine(t, hash))
		*t = (struct token){ .hash = hash, .at = now, .pid = cur->pid,
			.looked = true, .ver = *ver, .retry = retry,
			.opening = opening };
}

/* This LOOKUP of path failed.  If it was an OPEN's second try, that comes only
 * if the kernel's next LOOKUP, of a name that it has forgotten now, does not. */
static void
token_failed(const char *path)
{
	uint64_t hash = hash_str(path);

	GUARD(&names.lock);
	struct token *t = token_slot(hash);
	if (token_mine(t, hash))
		t->opening = false;
}

/* Is there a recent LOOKUP of path by this request's thread?  Then what comes
 * now belongs to it and need not ask the server again.  Sets *retry if this may
 * be the kernel's second try.  It is for certain if that is for an OPEN, whose
 * LOOKUP is recent however old; a GETATTR's second try may never come. */
static bool
token_find_locked(const char *path, struct version *ver, bool *retry)
{
	uint64_t hash = hash_str(path);
	struct token *t = token_slot(hash);
	uint64_t age = now_ms() - t->at,
	    most = t->retry && t->opening ? RETRY_MS :
	    t->retry && !t->shown && cur->opcode == FUSE_GETATTR ?
	    RETRY_ATTR_MS :
	    conf.cache_consistency == CONS_STRICT ? 0 : TOKEN_MS;
	bool mine = token_mine(t, hash) && t->looked;

	*retry = mine && t->retry && age <= RETRY_MS;
	if (mine && age <= most)
		*ver = t->ver;
	return mine && age <= most;
}

/* The request answers ESTALE: the kernel will look the path up and try once
 * more, and that second try must succeed. */
static int
token_estale_locked(const char *path)
{
	uint64_t hash = hash_str(path);

	*token_slot(hash) = (struct token){ .hash = hash, .at = now_ms(),
		.pid = cur->pid, .retry = true,
		.opening = cur->opcode == FUSE_OPEN };
	return -ESTALE;
}

/* Split "/a/b" into its parent "/a" (allocated) and "b" (inside path). */
static char *
path_parent(const char *path, const char **base)
{
	const char *slash = strrchr(path, '/');

	*base = slash + 1;
	return slash == path ? strdup("/") :
	    strndup(path, (size_t)(slash - path));
}

/* "/a" and "b" to "/a/b", allocated; NULL out of memory. */
static char *
path_join(const char *dir, const char *name)
{
	char *p;

	return asprintf(&p, "%s/%s", dir[1] ? dir : "", name) < 0 ? NULL : p;
}

static bool
path_is_aside(const char *path)
{
	return !strncmp(path, ASIDE_PREFIX, sizeof(ASIDE_PREFIX) - 1);
}

/* === names ================================================== End === */

/* === store: objects on the cache disk ===================== Begin === */

/*
 * An object is a data file and an index file (cachefs.h).  struct obj is one
 * version of it in memory while somebody uses it, struct ent the registry's
 * line about it whether used or not.  The order on disk: data is synced, then
 * the index replaced; only what an index says is believed after a restart.
 * Space is charged to store.used and to its owner, an obj in memory or else
 * the ent; superseded versions have lost their files, but not their space.
 */
#define STORE_BUCKETS 65536
#define KEY_STRIPES 1024
#define CHECKPOINT_MS 5000
#define IDX_BATCH 256			/* indexes written together, at most */
#define IDX_MANY 16			/* syncfs() for so many */
#define LEVELS 16			/* of use: a power of two each */
#define USES_MAX UINT16_MAX
#define LFU_HALVE 8			/* evictions for each that is cached */
#define OBJ_FILES 3			/* data, index and the next index */
#define EXTENT_BYTES 32			/* of ext4 and xfs, in trees half full */

static const struct backend *be;
static atomic_bool backend_down;	/* the server does not answer */

static struct {
	int dir, objects, lockfd;	/* [I] the numbers: see store_renew() */
	char backend[1000];		/* [I] whose bytes these are */
	bool look;			/* [I] for `cachefs check`: use nothing */
	_Atomic uint64_t limit;		/* bytes; 0 = only min_free */
	_Atomic uint64_t min_free, min_inodes;
	_Atomic uint64_t room;		/* what the disk can hold of us */
	pthread_mutex_t key[KEY_STRIPES];
	pthread_mutex_t lock;		/* the rest */
	LIST_HEAD(ent_list, ent) ents[STORE_BUCKETS];
	TAILQ_HEAD(ent_queue, ent) level[LEVELS]; /* see evict_pick_locked() */
	struct ent *hand;		/* sieve's */
	unsigned policy;		/* EVICT_* */
	uint32_t age;			/* how often uses were halved */
	uint64_t evictions;		/* since then */
	uint64_t used;			/* bytes, reservations included */
	uint64_t unwritten;		/* of these not on disk yet */
	uint64_t leaving;		/* of these being evicted now */
	uint64_t roomy;			/* objects that may yet make files */
	uint64_t nents, ncomplete;
	uint64_t pinned, pin_max;	/* bytes of pinned files */
	atomic_bool scanned;		/* [a] `used` knows the whole cache */
	struct found { struct ent *ent; int64_t used; } *found; /* the scan's: */
	size_t nfound;			/* held until they are sorted by use */
	_Atomic enum disk_state { DISK_WORKS, DISK_FULL, DISK_FAILS }
	    disk;			/* [a] nothing is stored; nor read, maybe */
	_Atomic uint64_t retry_at;	/* now_ms() when it is tried again */
	pthread_t evictor;
	pthread_cond_t evict;		/* somebody needs room */
	pthread_mutex_t evicting;	/* one file goes at a time */
} store = { .dir = -1, .objects = -1, .lockfd = -1,
	.key = { [0 ... KEY_STRIPES - 1] = PTHREAD_MUTEX_INITIALIZER },
	.lock = PTHREAD_MUTEX_INITIALIZER, .evict = PTHREAD_COND_INITIALIZER,
	.evicting = PTHREAD_MUTEX_INITIALIZER };

static struct {
	pthread_mutex_t lock;
	pthread_cond_t cond;
	SLIST_HEAD(dirty_list, obj) dirty; /* wait for their index */
	pthread_t tid;
	bool quit;
} ckpt = { .lock = PTHREAD_MUTEX_INITIALIZER,
	.cond = PTHREAD_COND_INITIALIZER };

/* Reasons why something went past the cache or past passthrough, counted. */
#define REASONS(X) \
	X(too_small) X(too_big) X(excluded) X(no_space) X(degraded) X(scan) \
	X(changing) X(partial) X(passthrough_off) X(passthrough_refused) \
	X(open_buffered)
#define REASON_ID(n) R_##n,
#define REASON_NAME(n) #n,
enum reason { REASONS(REASON_ID) R_MAX };
static const char *const reason_name[] = { REASONS(REASON_NAME) };
static _Atomic uint64_t reason_count[R_MAX];

static void
bypass(enum reason r)
{
	atomic_fetch_add_explicit(&reason_count[r], 1, memory_order_relaxed);
}

/* The hash of v's file; all its versions share it. */
static uint64_t
key_hash(const struct version *v)
{
	uint64_t k[2] = { v->fsid, v->fileid };

	return XXH3_64bits(k, sizeof(k));
}

/* "xx/KEY", its directory being chosen by hash, and a suffix. */
static const char *
xx_path(uint64_t hash, uint64_t high, uint64_t low, const char *suffix,
    char buf[64])
{
	snprintf(buf, 64, "%02x/%016" PRIx64 "%016" PRIx64 "%s",
	    (unsigned)(hash & 0xff), high, low, suffix);
	return buf;
}

/* Make the xx of such a path in dir.  0 or -errno. */
static int
xx_make(int dir, const char *path)
{
	char xx[3] = { path[0], path[1], '\0' };

	return mkdirat(dir, xx, 0700) && errno != EEXIST ? -errno : 0;
}

/* That of v's file; suffix: "" data, ".idx", ".tmp". */
static const char *
key_path(const struct version *v, const char *suffix, char buf[64])
{
	return xx_path(key_hash(v), v->fsid, v->fileid, suffix, buf);
}

/* The stripe that is held while v's file is opened or its files change. */
static pthread_mutex_t *
key_lock(const struct version *v)
{
	return &store.key[(key_hash(v) >> 8) % KEY_STRIPES];
}

static int
key_open(const struct version *v, const char *suffix, int flags)
{
	char p[64];

	return sys_openat(store.objects, key_path(v, suffix, p), flags,
	    flags & O_CREAT ? 0600 : 0);
}

/* Remove an object's files, index first: data without an index is never
 * believed.  Caller holds the key's stripe. */
static void
store_unlink(const struct version *v)
{
	char p[64];

	unlinkat(store.objects, key_path(v, ".idx", p), 0);
	unlinkat(store.objects, key_path(v, "", p), 0);
}

/* How far is a new file to be on its way to the disk? */
enum sync {
	SYNC_LATER,			/* the caller sees to it */
	SYNC_BEGUN,			/* so far that on ext4 no name outlives */
					/* a power cut without its data, which */
					/* it would with blocks not allocated */
	SYNC_DONE			/* durable, but for its name */
};

/* Write the whole of a new file.  0 or -errno. */
static int
store_write(int dir, const char *name, const void *data, size_t len,
    enum sync sync)
{
	int fd = sys_openat(dir, name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	int r = fd < 0 ? fd : sys_pwrite(fd, data, len, 0);

	if (!r && sync == SYNC_DONE && fsync(fd))
		r = -errno;
	else if (!r && sync == SYNC_BEGUN)
		sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE);
	if (fd >= 0 && close(fd) && !r)
		r = -errno;
	return r;
}

/* The same for one that takes the place of another, if there is one.  0, or
 * -errno: the other is still there. */
static int
store_replace(int dir, const char *tmp, const char *name, const void *data,
    size_t len, enum sync sync)
{
	int r = store_write(dir, tmp, data, len, sync);

	if (!r && renameat(dir, tmp, dir, name))
		r = -errno;
	if (r)
		unlinkat(dir, tmp, 0);
	return r;
}

/* The cache disk failed: serve from the server for a while.  Logged once. */
static void
store_degrade(const char *what, int err)
{
	enum disk_state was = store.disk, now = err == -ENOSPC ||
	    err == -EDQUOT || err == -EROFS ? DISK_FULL : DISK_FAILS;

	store.retry_at = now_ms() + 5000;
	if (now > was)
		was = atomic_exchange(&store.disk, now);
	if (was == DISK_WORKS)
		log_error("cache %s: %s: %s; serving from the server meanwhile",
		    conf.cache_dir, what, strerror(-err));
}

static void
store_recovered(void)
{
	if (store.disk != DISK_WORKS &&
	    atomic_exchange(&store.disk, DISK_WORKS) != DISK_WORKS)
		log_info("cache %s: works again", conf.cache_dir);
}

/* Bytes that blocks [blk, blk+n) of o take on disk. */
static uint64_t
obj_bytes(const struct obj *o, uint64_t blk, uint64_t n)
{
	uint64_t end = MIN((blk + n) * o->bs, o->attr.ver.size);

	return ROUND_UP(end - blk * o->bs, DIO_ALIGN);
}

static size_t
map_size(uint64_t nblk)
{
	return (size_t)((nblk + 63) / 64 * 8);
}

/* Of o's index: map and checksums. */
static size_t
body_size(const struct obj *o)
{
	return map_size(o->nblk) + (o->sums ? (size_t)o->nblk * 8 : 0);
}

/* The queue that e is in, or would be put in.  Brings e->uses up to date. */
static struct ent_queue *
ent_level_locked(struct ent *e)
{
	e->uses = (uint16_t)(e->uses >> MIN(store.age - e->age, 16));
	e->age = store.age;
	return &store.level[store.policy == EVICT_LFU && e->uses ?
	    31 - __builtin_clz(e->uses) : 0];
}

/* Take e out of its queue. */
static void
ent_unqueue_locked(struct ent *e)
{
	if (store.hand == e)
		store.hand = TAILQ_NEXT(e, turn);
	TAILQ_REMOVE(ent_level_locked(e), e, turn);
}

/* e is, or was, used so many times more; now it is the newest of its level. */
static void
ent_use_locked(struct ent *e, unsigned times)
{
	bool stay = store.policy == EVICT_SIEVE && e->uses;

	if (!stay)
		ent_unqueue_locked(e);
	e->uses = (uint16_t)MIN(e->uses + times, USES_MAX);
	if (!stay)
		TAILQ_INSERT_TAIL(ent_level_locked(e), e, turn);
}

/* The registry's line of v's file; NULL: none, or out of memory to create it
 * as the newest.  One with no bytes that nothing holds is not left behind. */
static struct ent *
ent_get_locked(const struct version *v, bool create)
{
	struct ent_list *l = &store.ents[key_hash(v) % STORE_BUCKETS];
	struct ent *e;

	LIST_FOREACH(e, l, hash)
		if (e->fsid == v->fsid && e->fileid == v->fileid)
			return e;
	if (create && (e = calloc(1, sizeof(*e)))) {
		e->fsid = v->fsid;
		e->fileid = v->fileid;
		e->age = store.age;
		LIST_INSERT_HEAD(l, e, hash);
		TAILQ_INSERT_TAIL(ent_level_locked(e), e, turn);
		store.nents++;
	}
	return e;
}

/* Have eviction spare e, of a file of so many bytes, or no longer. */
static void
ent_pin_locked(struct ent *e, bool pin, uint64_t bytes)
{
	store.pinned -= e->pinned_bytes;
	e->pinned = pin;
	e->pinned_bytes = pin ? bytes : 0;
	store.pinned += e->pinned_bytes;
}

/* No object of e has files any more. */
static void
ent_empty_locked(struct ent *e)
{
	struct obj *o;

	LIST_FOREACH(o, &e->objs, versions)
		o->superseded = o->evicted = true;
	store.ncomplete -= e->complete;
	e->complete = false;
}

/* One that held e lets go. */
static void
ent_drop_locked(struct ent *e)
{
	if (--e->live || e->bytes)
		return;
	LIST_REMOVE(e, hash);
	ent_unqueue_locked(e);
	store.nents--;
	store.ncomplete -= e->complete;
	ent_pin_locked(e, false, 0);
	free(e);
}

/* Can e go?  Then the stripe of its key is held. */
static bool
ent_evictable_locked(const struct ent *e)
{
	const struct version v = { .fsid = e->fsid, .fileid = e->fileid };

	return !e->live && !e->pinned && !pthread_mutex_trylock(key_lock(&v));
}

/* The next in turn that nobody uses, of EVICT_LRU and EVICT_LFU.  What is pinned
 * is put behind, so that it is not looked at each time. */
static struct ent *
evict_oldest_locked(size_t *left)
{
	for (struct ent_queue *q = store.level; q < store.level + LEVELS; q++)
		for (struct ent *e = TAILQ_FIRST(q), *next; e && *left; e = next) {
			--*left;
			next = TAILQ_NEXT(e, turn);
			if (ent_evictable_locked(e))
				return e;
			if (e->pinned) {
				TAILQ_REMOVE(q, e, turn);
				TAILQ_INSERT_TAIL(q, e, turn);
			}
		}
	*left = 0;
	return NULL;
}

/* That of EVICT_SIEVE: the first from the hand on which was not used since the
 * hand passed it. */
static struct ent *
evict_sieve_locked(size_t *left)
{
	for (int n = 0; n < 1000 && *left; n++) {
		struct ent *e = store.hand ?: TAILQ_FIRST(&store.level[0]);

		*left = e ? *left - 1 : 0;
		if (!e)
			break;
		store.hand = TAILQ_NEXT(e, turn);
		if (ent_level_locked(e) && e->uses > 1)
			e->uses = 1;
		else if (ent_evictable_locked(e))
			return e;
	}
	return NULL;
}

/*
 * Which object goes first (cache_eviction).  Its first open is a use, and each
 * later one.
 *	lru	One queue; a use puts it last; the first one goes.
 *	lfu	Level l is for those of 2^l to 2^(l+1) - 1 uses, a queue as lru's.
 *		Now and then (LFU_HALVE) all uses are halved, so that what was
 *		popular can go: each level becomes the one below it.
 *	sieve	One queue in the order of arrival, and a hand that goes through
 *		it: it spares once what was used since it came by (Zhang et al.,
 *		SIEVE is Simpler than LRU, NSDI 2024).
 * Returns one whose key's stripe is held.  NULL: none can go, or with *left,
 * which is how many are still to be looked at, ask again.
 */
static struct ent *
evict_pick_locked(size_t *left)
{
	struct ent *e = store.policy == EVICT_SIEVE ? evict_sieve_locked(left) :
	    evict_oldest_locked(left);

	if (e && store.policy == EVICT_LFU &&
	    ++store.evictions >= LFU_HALVE * store.nents) {
		store.evictions = 0;
		store.age++;
		for (int l = 1; l < LEVELS; l++)
			TAILQ_CONCAT(&store.level[l - 1], &store.level[l], turn);
	}
	return e;
}

/* Evict the object that is next; false: there is none. */
static bool
evict_one(void)
{
	struct version v = { 0 };
	struct ent *e = NULL;
	size_t left = 0;

	WITH_LOCK(&store.lock)
		left = 2 * store.nents + 1;
	while (!e && left)
		WITH_LOCK(&store.lock) {
			e = evict_pick_locked(&left);
			if (!e)
				break;
			v.fsid = e->fsid;
			v.fileid = e->fileid;
			e->live++;
			store.leaving += e->bytes;
		}
	if (!e)
		return false;
	store_unlink(&v);		/* by its stripe nobody can open it */
	WITH_LOCK(&store.lock) {
		store.leaving -= e->bytes;
		COUNT(evicted_objects, 1);
		COUNT(evicted_bytes, e->bytes);
		store.used -= e->bytes;
		e->bytes = 0;
		ent_drop_locked(e);
	}
	pthread_mutex_unlock(key_lock(&v));
	return true;
}

/* Another policy: the order of all is made anew from their uses, and the order
 * that they had. */
static void
store_policy(unsigned policy)
{
	struct ent_queue all = TAILQ_HEAD_INITIALIZER(all);
	struct ent *e;

	GUARD(&store.lock);
	for (int l = 0; l < LEVELS; l++)
		if (TAILQ_FIRST(&store.level[l]))
			TAILQ_CONCAT(&all, &store.level[l], turn);
		else
			TAILQ_INIT(&store.level[l]);
	store.policy = policy;
	store.hand = NULL;
	while ((e = TAILQ_FIRST(&all))) {
		TAILQ_REMOVE(&all, e, turn);
		TAILQ_INSERT_TAIL(ent_level_locked(e), e, turn);
	}
}

/* May `bytes` more be stored?  Bytes missing, 0 = it fits. */
static uint64_t
store_missing_locked(uint64_t bytes)
{
	struct statvfs sv;
	uint64_t avail, need = store.unwritten + bytes + store.min_free;

	if (store.limit && store.used + bytes > store.limit)
		return store.used + bytes - store.limit;
	if (fstatvfs(store.dir, &sv))
		return 0;		/* the write itself will tell */
	avail = (uint64_t)sv.f_bavail * sv.f_frsize;
	if (sv.f_files && sv.f_favail < store.min_inodes +
	    (store.roomy + 1) * OBJ_FILES)
		return bytes;
	return avail < need ? need - avail : 0;
}

static bool fetch_forget(struct obj *o, bool stored);
static void obj_put(struct obj *o);

/* Nothing can be evicted: have the objects that buffers hold, kept for readers
 * who may never come, do without those that lie on disk.  False: there are none. */
static bool
evict_release(void)
{
	struct obj *held[64];
	struct ent *e;
	size_t n = 0;
	bool any = false;

	WITH_LOCK(&store.lock)
		for (int l = 0; l < LEVELS; l++)
			for (e = TAILQ_FIRST(&store.level[l]); e && n < 64;
			    e = TAILQ_NEXT(e, turn))
				if (!e->pinned && !LIST_EMPTY(&e->objs)) {
					held[n] = LIST_FIRST(&e->objs);
					held[n++]->refs++;
				}
	for (size_t i = 0; i < n; i++) {
		any = any || fetch_forget(held[i], true);
		obj_put(held[i]);
	}
	return any;
}

/* Evict the object that is next, if need be one that buffers hold; false: there is
 * none. */
static bool
evict_next(void)
{
	return evict_one() || (evict_release() && evict_one());
}

/* Evict the next object if so many bytes don't fit now.  Many may want room at
 * once, which one file often makes.  False: there is none. */
static bool
evict_for(uint64_t bytes)
{
	bool fits = false;

	GUARD(&store.evicting);
	WITH_LOCK(&store.lock)
		fits = !store_missing_locked(bytes);
	return fits || evict_next();
}

/* What o may take on disk beside its data: its index and the one that this
 * replaces, and what the file system has to note where each block lies. */
static uint64_t
obj_room(const struct obj *o)
{
	return 2 * ROUND_UP(sizeof(struct disk_index) + map_size(o->nblk) +
	    (conf.cache_checksum ? o->nblk * 8 : 0), DIO_ALIGN) +
	    ROUND_UP(o->nblk * EXTENT_BYTES, DIO_ALIGN);
}

/* Reserve room for bytes of o before they are fetched, and with the first ones
 * for what goes with them; obj_charge() knows better later.  0, or -ENOSPC and
 * why not. */
static int
store_reserve(struct obj *o, uint64_t bytes, enum reason *why)
{
	uint64_t room = 0;

	*why = store.disk && now_ms() < store.retry_at ? R_degraded :
	    store.limit && !store.scanned ? R_scan : R_no_space;
	for (int tries = 0; tries < 2 && *why == R_no_space; tries++) {
		if (tries && !evict_for(bytes + room))
			break;
		GUARD(&store.lock);
		room = o->room ? 0 : obj_room(o);
		if (!store_missing_locked(bytes + room)) {
			store.roomy += !o->room;
			o->room = true;
			o->bytes += bytes + room;
			store.used += bytes + room;
			store.unwritten += bytes;
			return 0;
		}
		pthread_cond_broadcast(&store.evict);
	}
	return -ENOSPC;
}

/* Reserved bytes have been written, or (lost) will never be. */
static void
store_settle(struct obj *o, uint64_t bytes, bool lost)
{
	GUARD(&store.lock);
	store.unwritten -= bytes;
	if (lost) {
		o->bytes -= bytes;
		store.used -= bytes;
	}
}

/* How many blocks of o are present? */
static uint64_t
obj_present(struct obj *o)
{
	GUARD(&o->lock);
	return o->present;
}

/* Charge o for its index and the bytes that its data takes on disk, no longer
 * for what it had reserved, and note if that is all of it.  Not if it was not
 * charged was bytes any more: there is a new reservation in it. */
static void
obj_charge(struct obj *o, uint64_t was, uint64_t data)
{
	uint64_t bytes = obj_present(o) == 0 ? 0 : data +
	    ROUND_UP(sizeof(struct disk_index) + body_size(o), DIO_ALIGN);
	struct ent *e = o->ent;
	bool complete = o->complete;

	GUARD(&store.lock);
	if (o->bytes != was)
		return;
	store.used += bytes - was;
	o->bytes = bytes;
	store.roomy -= o->room;
	o->room = false;
	if (o->superseded)
		return;
	store.ncomplete += (uint64_t)complete - e->complete;
	e->complete = complete;
	if (o->pinned && !e->pinned)	/* the scan has not seen it yet */
		ent_pin_locked(e, true, o->attr.ver.size);
}

/* Give o a map of blocks, none present, and room for checksums: one piece of
 * memory, as in the index, and behind it what is not kept.  0 or -ENOMEM. */
static int
obj_map(struct obj *o, bool sums)
{
	size_t map = map_size(o->nblk);

	o->map = calloc(1, map + (sums ? o->nblk * 8 + map : 0) + 1);
	o->sums = o->map && sums ? o->map + map / 8 : NULL;
	o->checked = o->sums ? o->sums + o->nblk : NULL;
	return o->map ? 0 : -ENOMEM;
}

/* Read the header of an index file; false: torn, damaged or foreign. */
static bool
idx_header(int fd, struct disk_index *h)
{
	return sys_pread(fd, h, sizeof(*h), 0) == sizeof(*h) &&
	    !memcmp(h->magic, INDEX_MAGIC, 8) && h->version == DISK_VERSION &&
	    h->size == sizeof(*h) &&
	    h->xxh3 == XXH3_64bits(h, offsetof(struct disk_index, xxh3));
}

/* Read the index file fd into o, which owns what it gets even on failure.
 * Errors as idx_read(). */
static int
idx_parse(int fd, struct obj *o)
{
	struct disk_index h;
	uint64_t map, skip;
	char *body;

	if (!idx_header(fd, &h))
		return -EBADMSG;
	if (!version_same(&h.ver, &o->attr.ver))
		return -ESTALE;
	if (h.block_size < DIO_ALIGN || h.block_size > IO_MAX ||
	    h.block_size & (h.block_size - 1))
		return -EBADMSG;
	o->bs = h.block_size;
	o->nblk = h.ver.size / o->bs + (h.ver.size % o->bs != 0);
	map = map_size(o->nblk);
	skip = h.flags & IDX_COMPLETE ? map : 0;
	if (h.blocks != o->nblk || !h.present || h.present > o->nblk ||
	    h.body_size + skip != map + (h.flags & IDX_SUMS ? o->nblk * 8 : 0))
		return -EBADMSG;
	if (obj_map(o, h.flags & IDX_SUMS))
		return -ENOMEM;
	body = (char *)o->map + skip;
	if (sys_pread(fd, body, h.body_size, sizeof(h)) !=
	    (ssize_t)h.body_size || XXH3_64bits(body, h.body_size) != h.body_xxh3)
		return -EBADMSG;
	for (uint64_t i = 0; skip && i < o->nblk; i++)
		bit_set(o->map, i);
	for (uint64_t i = 0; i < map / 8; i++)
		o->present += (uint64_t)__builtin_popcountll(o->map[i]);
	if (o->nblk % 64 && o->map[o->nblk / 64] >> o->nblk % 64)
		return -EBADMSG;	/* blocks behind the end */
	if (!conf.cache_checksum)
		o->sums = NULL;
	o->pinned |= (h.flags & IDX_PINNED) != 0;
	return o->present == h.present ? 0 : -EBADMSG;
}

/* How often a file was used of which the index has this time; 0: unknown. */
static unsigned
idx_uses(const struct stat *idx)
{
	unsigned n = (unsigned)(idx->st_mtim.tv_nsec % 1000000);

	return n <= USES_MAX ? n : 0;
}

/* Read o's index file.  0; -ENOENT: none; -ESTALE: of another version;
 * -EBADMSG: torn, damaged or foreign; else -errno. */
static int
idx_read(struct obj *o)
{
	int fd = key_open(&o->attr.ver, ".idx", O_RDONLY);
	int r = fd < 0 ? fd : idx_parse(fd, o);
	struct stat st;

	if (!r && !store.scanned && !fstat(fd, &st))
		WITH_LOCK(&store.lock)
			if (o->ent->uses <= 1)	/* the scan has not seen it */
				ent_use_locked(o->ent, idx_uses(&st));
	sys_close(&fd);
	return r;
}

/* An index on its way to the disk. */
struct idx_job {
	struct obj *o;
	struct disk_index *h;		/* allocated */
	size_t size;			/* of h and the body behind it */
	int r;				/* 0 or -errno */
};

/* The index of j->o as it is now, in memory. */
static void
idx_snapshot(struct idx_job *j)
{
	struct obj *o = j->o;
	size_t skip = 0, body = body_size(o);
	struct disk_index *h = j->h = malloc(sizeof(*h) + body);

	j->r = h ? 0 : -ENOMEM;
	if (!h)
		return;
	*h = (struct disk_index){ .magic = INDEX_MAGIC, .version = DISK_VERSION,
		.size = sizeof(*h), .ver = o->attr.ver, .block_size = o->bs,
		.flags = (o->sums ? IDX_SUMS : 0) | (o->pinned ? IDX_PINNED : 0),
		.blocks = o->nblk };
	WITH_LOCK(&o->lock) {
		h->present = o->present;
		if (o->present == o->nblk) {
			h->flags |= IDX_COMPLETE;
			skip = map_size(o->nblk);
		}
		memcpy(h + 1, (char *)o->map + skip, body - skip);
	}
	h->body_size = body - skip;
	h->body_xxh3 = XXH3_64bits(h + 1, h->body_size);
	h->xxh3 = XXH3_64bits(h, offsetof(struct disk_index, xxh3));
	j->size = sizeof(*h) + body - skip;
}

/* Let the time of o's index file, with this suffix, be when it was used last: now,
 * and how often below the milliseconds. */
static void
idx_stamp(const struct obj *o, const char *suffix)
{
	struct timespec t[2] = { { .tv_nsec = UTIME_OMIT } };
	char p[64];

	clock_gettime(CLOCK_REALTIME, &t[1]);
	t[1].tv_nsec -= t[1].tv_nsec % 1000000;
	WITH_LOCK(&store.lock) {
		ent_level_locked(o->ent);	/* its uses by now */
		t[1].tv_nsec += o->ent->uses;
	}
	utimensat(store.objects, key_path(&o->attr.ver, suffix, p), t, 0);
}

/* The index lies on disk under its temporary name: let it replace the old one,
 * or go if it is of no use. */
static void
idx_publish(struct idx_job *j)
{
	const struct version *v = &j->o->attr.ver;
	bool use = !j->r && j->h->present && !j->o->superseded;
	char tmp[64], p[64];

	key_path(v, ".tmp", tmp);
	key_path(v, ".idx", p);
	if (use)
		idx_stamp(j->o, ".tmp");
	if (use && renameat(store.objects, tmp, store.objects, p))
		j->r = -errno;
	if (!use || j->r)
		unlinkat(store.objects, tmp, 0);
	if (!j->r && !use && !j->o->superseded)		/* nothing is left */
		unlinkat(store.objects, p, 0);
	if (!j->r)
		j->o->saved = j->h->present;
}

/*
 * Write the indexes of n objects: data durable, then the index, which replaces
 * the old one in one step.  Of many the disk is told at once: a tree of small
 * files would cost it two commits each.  Only the checkpointer calls it.
 */
static void
idx_commit(struct idx_job *jobs, size_t n)
{
	struct idx_job *end = jobs + n;
	bool many = n >= IDX_MANY;
	char tmp[64];
	int r = 0;

	for (struct idx_job *j = jobs; j < end; j++)
		idx_snapshot(j);
	many = many && !syncfs(store.dir);
	for (struct idx_job *j = jobs; j < end; j++)
		if (!j->r)
			j->r = !many && fdatasync(j->o->rfd) ? -errno :
			    store_write(store.objects, key_path(&j->o->attr.ver,
			    ".tmp", tmp), j->h, j->size,
			    many ? SYNC_LATER : SYNC_DONE);
	if (many && syncfs(store.dir))
		r = -errno;
	for (struct idx_job *j = jobs; j < end; j++) {
		j->r = j->r ? j->r : r;
		WITH_LOCK(key_lock(&j->o->attr.ver))
			idx_publish(j);
		free(j->h);
	}
}

/* Is this path one that the configuration wants cached?  A glob without a
 * slash is for the last component, as gitignore's. */
static bool
store_wants(const char *path)
{
	char *lists[2] = { NULL, NULL };
	bool in = false;

	WITH_LOCK(&conf_lock) {
		lists[0] = strdup(conf.cache_include);
		lists[1] = strdup(conf.cache_exclude);
		in = !*conf.cache_include;
	}
	for (int i = 0; i < 2; i++) {
		char *list = lists[i], *rest = list, *glob;

		while ((glob = strsep(&rest, " \t")))
			if (!fnmatch(glob, strchr(glob, '/') ? path :
			    strrchr(path, '/') + 1, 0))
				in = i == 0;
		free(list);
	}
	return in;
}

/* Why may this file not be cached?  NULL: it may. */
static const char *
store_refuses(const char *path, uint64_t size)
{
	uint64_t limit = store.limit, most = limit ? limit - limit / 10 :
	    store.room, max = conf.cache_max_file_size;
	enum reason r;

	if (max)
		most = MIN(most, max);
	r = size < conf.cache_min_file_size ? R_too_small :
	    size > most ? R_too_big : !store_wants(path) ? R_excluded : R_MAX;
	if (r == R_MAX)
		return NULL;
	bypass(r);
	return reason_name[r];
}

/* Fill a fresh object from the disk, or clear what stands in its place.  A
 * version that replaces another one removes the other's files; those who
 * have them open keep them.  Caller holds the key's stripe. */
static void
obj_load(struct obj *o)
{
	const struct version *v = &o->attr.ver;
	struct stat st = { 0 };
	char p[64];
	int r = idx_read(o);

	if (!r) {
		o->rfd = key_open(v, "", O_RDWR);
		if (o->rfd < 0 && o->rfd != -ENOENT)
			r = o->rfd;
		else if (o->rfd < 0 || fstat(o->rfd, &st) ||
		    !S_ISREG(st.st_mode) || st.st_nlink != 1 ||
		    (uint64_t)st.st_size != v->size)
			r = -EBADMSG;
	}
	if (r == -EBADMSG)
		log_warn("cache: dropped object %s: its index or data is "
		    "damaged", key_path(v, "", p));
	if (r == -ESTALE)
		COUNT(invalidated, 1);
	if (!store.scanned)		/* the scan leaves alone what is used */
		unlinkat(store.objects, key_path(v, ".tmp", p), 0);
	if (r) {
		if (r == -EBADMSG || r == -ESTALE || r == -ENOENT)
			store_unlink(v);
		sys_close(&o->rfd);
		free(o->map);
		o->map = o->sums = NULL;
		o->present = 0;
	}
	if (r && r != -ENOENT && r != -EBADMSG && r != -ESTALE) {
		store_degrade("open", r);	/* its files stay, unused */
		o->bypass = reason_name[R_degraded];
		return;
	}
	o->saved = o->present;
	o->complete = o->present && o->present == o->nblk;
	obj_charge(o, o->bytes, (uint64_t)st.st_blocks * 512);
}

static void bfile_close(struct bfile *bf);

/* No more is written to o by O_DIRECT. */
static void
obj_close_direct(struct obj *o)
{
	sys_close(&o->wfd);
	if (o->wfile)
		exec_forget(o->wfile);
	o->wfile = 0;
	o->ready = false;
}

static void
obj_free(struct obj *o)
{
	sys_close(&o->rfd);
	obj_close_direct(o);
	bfile_close(o->bf);
	free(o->map);
	free(o->tab);
	free(o->path);
	free(o);
}

static struct obj *
obj_new(const struct attr *a)
{
	uint32_t bs = (uint32_t)MIN(conf.cache_block_size, IO_MAX);
	struct obj *o = malloc(sizeof(*o));

	if (o)
		*o = (struct obj){ .attr = *a, .refs = 1, .rfd = -1, .wfd = -1,
			.bs = bs,
			.nblk = a->ver.size / bs + (a->ver.size % bs != 0),
			.lock = PTHREAD_MUTEX_INITIALIZER,
			.cond = PTHREAD_COND_INITIALIZER };
	return o;
}

/* Somebody opens o, which so far was only in memory to be checked: now it gets
 * the rest of its attributes and its path.  Caller holds the key's stripe.
 * 0 or -ENOMEM. */
static int
obj_name(struct obj *o, const struct attr *a, const char *path)
{
	char *copy;

	if (!path || o->path)
		return 0;
	copy = strdup(path);
	if (!copy)
		return -ENOMEM;
	o->attr.used = a->used;		/* its version is the same */
	o->attr.rdev = a->rdev;
	o->attr.atime = a->atime;
	o->attr.mode = a->mode;
	o->attr.nlink = a->nlink;
	o->attr.uid = a->uid;
	o->attr.gid = a->gid;
	o->bypass = o->bypass ? o->bypass :
	    store_refuses(copy, a->ver.size);
	o->path = copy;
	return 0;
}

/* The object for this version of a file, with a reference; loaded from the
 * cache if it is there, and then the current version.  path NULL: it is not
 * opened, only to be checked.  Caller holds the key's stripe.  NULL: out of
 * memory. */
static struct obj *
obj_get_locked(const struct attr *a, const char *path)
{
	struct obj *o = NULL, *old;
	struct ent *e;

	WITH_LOCK(&store.lock) {
		e = ent_get_locked(&a->ver, true);
		if (!e)
			return NULL;
		LIST_FOREACH(o, &e->objs, versions)
			if (!o->evicted && version_same(&o->attr.ver, &a->ver)) {
				o->refs++;
				o->gone = false;	/* it was just seen */
				if (path)
					ent_use_locked(e, 1);
				return o;
			}
		e->live++;
		o = obj_new(a);
		if (!o) {
			ent_drop_locked(e);
			return NULL;
		}
		LIST_FOREACH(old, &e->objs, versions)
			old->superseded = true;
		LIST_INSERT_HEAD(&e->objs, o, versions);
		o->ent = e;
		if (e->pinned)		/* the file is, whatever its version */
			ent_pin_locked(e, true, a->ver.size);
		o->pinned = e->pinned;
		o->bytes = e->bytes;	/* it answers for the files now */
		e->bytes = 0;
		if (!path)
			break;
		e->found = false;
		ent_use_locked(e, 1);
	}
	obj_load(o);
	return o;
}

static struct obj *
obj_ref(struct obj *o)
{
	GUARD(&store.lock);
	o->refs++;
	return o;
}

/* Nothing of v, whose registry line e the caller holds, came to be stored: its
 * files go, unless somebody has begun anew. */
static void
obj_undo(struct ent *e, const struct version *v)
{
	bool used = false;

	GUARD(key_lock(v));
	WITH_LOCK(&store.lock)
		used = !LIST_EMPTY(&e->objs);
	if (!used)
		store_unlink(v);
}

/* o was used until now: note it on disk, for the next start.  Takes its key
 * stripe, so that the last note is the newest. */
static void
obj_used(const struct obj *o)
{
	GUARD(key_lock(&o->attr.ver));
	if (o->saved && !o->superseded)
		idx_stamp(o, ".idx");
}

/* Drop a reference; the last one frees o.  Callers hold no lock. */
static void
obj_put(struct obj *o)
{
	struct version v = o->attr.ver;
	struct ent *e = o->ent;
	bool empty = false;
	uint64_t bytes;

	WITH_LOCK(&store.lock) {
		if (--o->refs > 0)
			return;
		LIST_REMOVE(o, versions);
		store.roomy -= o->room;
		/* or it was but room for an index that was not written */
		if (!o->superseded && (o->present || o->saved || o->bypass)) {
			e->bytes = o->bytes;
			o->bytes = 0;
		} else {
			empty = !o->superseded && o->rfd >= 0;
		}
	}
	bytes = o->bytes;
	obj_free(o);
	if (empty)
		obj_undo(e, &v);
	GUARD(&store.lock);
	store.used -= bytes;
	ent_drop_locked(e);
}

/* obj_get_locked() for who opens it. */
static struct obj *
obj_get(const struct attr *a, const char *path)
{
	struct obj *o = NULL;
	bool failed = false;

	WITH_LOCK(key_lock(&a->ver)) {
		o = obj_get_locked(a, path);
		failed = o && obj_name(o, a, path);
		if (o && path)
			o->used = time(NULL);
	}
	if (failed)
		obj_put(o);
	return failed ? NULL : o;
}

/* Have o's data file open, made as long as the server's if need be.  0, or
 * -errno: o's blocks can't be stored.  Any thread that may wait for the disk. */
static int
obj_create(struct obj *o)
{
	const struct version *v = &o->attr.ver;
	int fd = -1, wfd = -1, r;
	char p[64];

	WITH_LOCK(&o->lock)
		if (o->ready)
			return 0;
	GUARD(key_lock(v));
	WITH_LOCK(&o->lock) {
		fd = o->rfd;
		if (o->ready)
			return 0;
		if (!o->map && obj_map(o, conf.cache_checksum))
			return -ENOMEM;
	}
	if (o->superseded)
		return -ESTALE;
	if (fd < 0) {
		fd = key_open(v, "", O_RDWR | O_CREAT | O_EXCL);
		if (fd == -ENOENT &&
		    (r = xx_make(store.objects, key_path(v, "", p))))
			return r;
		if (fd == -EEXIST)		/* a crash has left it */
			store_unlink(v);
		if (fd == -ENOENT || fd == -EEXIST)
			fd = key_open(v, "", O_RDWR | O_CREAT | O_EXCL);
		if (fd < 0)
			return fd;
		if (ftruncate(fd, (off_t)v->size)) {
			r = -errno;
			sys_close(&fd);
			return r;
		}
	}
	if (conf.direct_io)
		wfd = key_open(v, "", O_WRONLY | O_DIRECT);
	GUARD(&o->lock);
	if (o->rfd < 0)			/* else somebody may be reading by it */
		o->rfd = fd;
	o->wfd = wfd;
	o->ready = true;
	/* of one that is written at once a ring need not know */
	if (wfd >= 0 && (v->size > IO_MAX || conf.io_poll))
		o->wfile = exec_file();
	return 0;
}

/* Have the files of o go, for who asks for it.  Who has it open keeps them.
 * -EBUSY: it is pinned. */
static int
obj_evict(struct obj *o)
{
	struct ent *e = o->ent;
	uint64_t present = obj_present(o);

	GUARD(key_lock(&o->attr.ver));
	WITH_LOCK(&store.lock) {
		if (e->pinned)
			return -EBUSY;
		if (o->superseded)
			return 0;	/* it has none */
		ent_empty_locked(e);
		COUNT(evicted_objects, present > 0);
		COUNT(evicted_bytes, o->bytes);
	}
	store_unlink(&o->attr.ver);
	return 0;
}

/* Put o on the checkpointer's list. */
static void
obj_dirty(struct obj *o)
{
	bool new = !atomic_exchange(&o->dirty, true);

	if (new)
		obj_ref(o);
	GUARD(&ckpt.lock);
	if (new)
		SLIST_INSERT_HEAD(&ckpt.dirty, o, dirty_next);
	if (o->complete)
		pthread_cond_signal(&ckpt.cond);
}

/* Have eviction spare o's file, or no longer.  -ENOSPC: pins would hold more than
 * they may; -ENODATA: nothing of it is cached. */
static int
obj_pin(struct obj *o, bool pin)
{
	struct ent *e = o->ent;
	uint64_t size = o->attr.ver.size, present = obj_present(o);

	if (pin && (o->superseded || !present))
		return -ENODATA;
	WITH_LOCK(&store.lock) {
		if (pin && !e->pinned && store.pinned + size > store.pin_max)
			return -ENOSPC;
		ent_pin_locked(e, pin, size);
		o->pinned = pin;
	}
	if (present)
		obj_dirty(o);
	return 0;
}

/* Is it time to write o's index? */
static bool
ckpt_due(struct obj *o, bool quit)
{
	bool last = false;

	WITH_LOCK(&store.lock)
		last = o->refs == 1;
	return o->complete || last || quit ||
	    now_ms() - o->saved_ms >= CHECKPOINT_MS;
}

/* j's index was written, or not: is there nothing more to do for its object?
 * Else it goes on the list again. */
static bool
ckpt_done(const struct idx_job *j, bool quit)
{
	struct obj *o = j->o;
	bool same = false, last = false;
	struct stat st = { 0 };
	uint64_t bytes = 0;

	o->saved_ms = now_ms();
	if (j->r) {
		store_degrade("index", j->r);
		WITH_LOCK(&store.lock)
			last = o->refs == 1;
		return quit || last;
	}
	WITH_LOCK(&store.lock)
		bytes = o->bytes;	/* a damaged block may be reserved anew */
	WITH_LOCK(&o->lock) {
		same = o->present == o->saved;
		if (same && o->complete)
			obj_close_direct(o);
	}
	if (same && o->complete) {
		fstat(o->rfd, &st);	/* some count blocks only later */
		obj_charge(o, bytes, MAX((uint64_t)st.st_blocks * 512,
		    obj_bytes(o, 0, o->nblk)));
	}
	return same;
}

/* Write the indexes that are due, of the first objects of the list. */
static void
ckpt_batch(struct dirty_list *list, bool quit)
{
	static struct idx_job jobs[IDX_BATCH];	/* [o] */
	struct obj *o;
	size_t n = 0, size = 0;

	while (n < IDX_BATCH && size < MiB && (o = SLIST_FIRST(list))) {
		SLIST_REMOVE_HEAD(list, dirty_next);
		o->dirty = false;	/* what comes now lists it anew */
		if (!o->superseded && ckpt_due(o, quit)) {
			size += body_size(o);
			jobs[n++] = (struct idx_job){ .o = o };
			continue;
		}
		if (!o->superseded)
			obj_dirty(o);
		obj_put(o);
	}
	idx_commit(jobs, n);
	for (size_t i = 0; i < n; i++) {
		if (!ckpt_done(&jobs[i], quit))
			obj_dirty(jobs[i].o);
		obj_put(jobs[i].o);
	}
}

/* Takes the list once a second, or when an object got complete. */
static void *
ckpt_thread(void *arg)
{
	struct dirty_list list = SLIST_HEAD_INITIALIZER(list);
	bool quit = false;

	(void)arg;
	while (!quit) {
		WITH_LOCK(&ckpt.lock) {
			if (!ckpt.quit)
				wait_on(&ckpt.cond, &ckpt.lock, now_ms() + 1000);
			quit = ckpt.quit;
			list = ckpt.dirty;
			SLIST_INIT(&ckpt.dirty);
		}
		while (!SLIST_EMPTY(&list))
			ckpt_batch(&list, quit);
	}
	return NULL;
}

/* Call fn for each file of dir's xx/; its name is "xx/NAME". */
static void
store_walk(int dir, void (*fn)(const char *name))
{
	for (int i = 0; i < 256 && !stopping; i++) {
		struct dirent *d;
		char name[4 + NAME_MAX + 1];
		DIR *xx;

		snprintf(name, sizeof(name), "%02x", i);
		xx = fdopendir(sys_openat(dir, name, O_RDONLY | O_DIRECTORY,
		    0));
		while (xx && !stopping && (d = readdir(xx))) {
			if (*d->d_name == '.')
				continue;
			snprintf(name, sizeof(name), "%02x/%s", i, d->d_name);
			fn(name);
		}
		if (xx)
			closedir(xx);
	}
}

/* Add one object found on disk to the registry; clear what a crash left. */
static void
scan_object(const char *name)
{
	struct version v = { 0 };
	struct disk_index h;
	struct stat idx, data;
	struct found *f;
	struct ent *e = NULL;
	char p[64];
	const char *file = name + 3;
	int used = 0, fd;
	bool whole, tmp, known = false;

	if (sscanf(file, "%16" SCNx64 "%16" SCNx64 "%n", &v.fsid, &v.fileid,
	    &used) != 2 || used != 32 || strlen(file) > 36)
		return;
	tmp = !strcmp(file + 32, ".tmp");
	GUARD(key_lock(&v));
	WITH_LOCK(&store.lock) {
		e = ent_get_locked(&v, false);
		known = e && !(tmp && LIST_EMPTY(&e->objs));
	}
	if (known)
		return;			/* seen, or in use: see obj_load() */
	fd = key_open(&v, ".idx", O_RDONLY);
	if (fd < 0 && fd != -ENOENT)
		return;			/* that says nothing of it */
	whole = idx_header(fd, &h) && version_same_file(&h.ver, &v) &&
	    !fstat(fd, &idx) && !fstatat(store.objects, key_path(&v, "", p),
	    &data, AT_SYMLINK_NOFOLLOW);
	sys_close(&fd);
	if (!whole || tmp) {
		unlinkat(store.objects, key_path(&v, file + 32, p), 0);
		return;
	}
	GUARD(&store.lock);
	f = reallocarray(store.found, store.nfound + 1, sizeof(*f));
	store.found = f ? f : store.found;
	e = f ? ent_get_locked(&v, true) : NULL;
	if (!e)
		return;
	ent_use_locked(e, idx_uses(&idx));
	f[store.nfound++] = (struct found){ e,
		nanos(idx.st_mtim.tv_sec, idx.st_mtim.tv_nsec) };
	e->found = true;
	e->live = 1;
	e->bytes = (uint64_t)data.st_blocks * 512 +	/* as obj_charge() */
	    ROUND_UP((uint64_t)idx.st_size, DIO_ALIGN);
	ent_pin_locked(e, h.flags & IDX_PINNED, h.ver.size);
	e->complete = h.flags & IDX_COMPLETE;
	store.ncomplete += e->complete;
	store.used += e->bytes;
}

static int
scan_newer_first(const void *a, const void *b)
{
	const struct found *x = a, *y = b;

	return (x->used < y->used) - (x->used > y->used);
}

/* Walk objects/xx/ once: rebuild use and recency, remove orphans. */
static void
store_scan(void)
{
	store_walk(store.objects, scan_object);
	if (store.nfound)
		qsort(store.found, store.nfound, sizeof(*store.found),
		    scan_newer_first);
	GUARD(&store.lock);
	for (size_t i = 0; i < store.nfound; i++) {
		struct ent *e = store.found[i].ent;

		if (e->found) {		/* else it was used since: newer */
			ent_unqueue_locked(e);
			TAILQ_INSERT_HEAD(ent_level_locked(e), e, turn);
		}
		ent_drop_locked(e);
	}
	free(store.found);
}

/* Say why the cache directory can't be used, and be the value to return. */
#define refuse(err, fmt, ...) \
	fail(err, "cache_dir %s: " fmt, conf.cache_dir, ##__VA_ARGS__)

/* Is the directory empty but for what mkfs and we put there? */
static bool
store_dir_empty(int dir)
{
	DIR *d = fdopendir(sys_openat(dir, ".", O_RDONLY | O_DIRECTORY,
	    0));
	bool empty = d != NULL;
	struct dirent *e;

	while (d && (e = readdir(d)))
		if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..") &&
		    strcmp(e->d_name, "lost+found") &&
		    strcmp(e->d_name, "lock") && strcmp(e->d_name,
		    "CACHEFS.tmp"))
			empty = false;
	if (d)
		closedir(d);
	return empty;
}

/* Check that this cache is ours and of this backend; mark a fresh one.  ours:
 * the directory is known to be.  0, or -errno after a sentence. */
static int
store_super(int dir, bool ours)
{
	struct disk_super s, want = { .magic = SUPER_MAGIC,
		.version = DISK_VERSION, .size = sizeof(want) };
	int fd, r;

	snprintf(want.backend, sizeof(want.backend), "%s", store.backend);
	want.xxh3 = XXH3_64bits(&want, offsetof(struct disk_super, xxh3));
	fd = sys_openat(dir, "CACHEFS", O_RDONLY, 0);
	if (fd >= 0) {
		bool whole = sys_pread(fd, &s, sizeof(s), 0) == sizeof(s) &&
		    !memcmp(s.magic, SUPER_MAGIC, 8);

		close(fd);
		if (whole && s.version > DISK_VERSION)
			return refuse(-EINVAL, "its format %u is newer than "
			    "this cachefs knows", s.version);
		if (!whole || s.xxh3 != XXH3_64bits(&s,
		    offsetof(struct disk_super, xxh3)))
			return refuse(-EINVAL, "its file CACHEFS is damaged");
		if (strcmp(s.backend, want.backend))
			return refuse(-EINVAL, "holds the cache of another "
			    "backend, %s", s.backend);
		return 0;
	}
	if (!ours && !store_dir_empty(dir))
		return refuse(-EINVAL, "is not empty and not a cache; refused");
	if (store.look)
		return 0;
	r = store_replace(dir, "CACHEFS.tmp", "CACHEFS", &want,
	    sizeof(want), SYNC_DONE);
	return r ? refuse(r, "cannot be written: %s", strerror(-r)) : 0;
}

/* Open a directory in the cache's, made if need be.  Its fd, or -errno after a
 * sentence. */
static int
store_subdir(int dir, const char *name)
{
	int r = mkdirat(dir, name, 0700) && errno != EEXIST ? -errno :
	    sys_openat(dir, name, O_RDONLY | O_DIRECTORY, 0);

	return r < 0 ? refuse(r, "%s: %s", name, strerror(-r)) : r;
}

/* Open, check and lock the cache directory: itself, its objects and the lock.
 * before: by what it was open before, or -1.  0, or -errno after a sentence;
 * the caller closes in either case. */
static int
store_fds(int before, int *dir, int *objects, int *lockfd)
{
	char pid[32] = "another process";
	struct stat st, was;
	int r;

	if (mkdir(conf.cache_dir, 0700) && errno != EEXIST)
		return refuse(-EINVAL, "cannot be made: %s", strerror(errno));
	*dir = open(conf.cache_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (*dir < 0 || fstat(*dir, &st))
		return refuse(-EINVAL, "%s", strerror(errno));
	if (st.st_uid != geteuid())
		return refuse(-EINVAL, "belongs to user %u, not to user %u who "
		    "runs cachefs; refused", st.st_uid, geteuid());
	if (st.st_mode & 077)
		return refuse(-EINVAL, "mode %04o lets others in, it must be "
		    "0700; refused", st.st_mode & 07777);
	*lockfd = sys_openat(*dir, "lock", O_RDWR | O_CREAT, 0600);
	if (*lockfd < 0)
		return refuse(*lockfd, "cannot be written: %s",
		    strerror(-*lockfd));
	if (flock(*lockfd, LOCK_EX | LOCK_NB)) {
		sys_pread(*lockfd, pid, sizeof(pid) - 1, 0);
		pid[strcspn(pid, "\n")] = '\0';
		if (!store.look)
			return refuse(-EBUSY, "in use by process %s", pid);
		log_info("cache_dir %s: in use by process %s", conf.cache_dir,
		    pid);
	}
	r = store_super(*dir, !fstat(before, &was) && was.st_ino == st.st_ino &&
	    was.st_dev == st.st_dev);
	if (r || store.look)
		return r;
	*objects = store_subdir(*dir, "objects");
	return MIN(*objects, 0);
}

/* The same at the start; store_stop() closes. */
static int
store_open(const char *backend)
{
	snprintf(store.backend, sizeof(store.backend), "%s", backend);
	store_policy(conf.cache_eviction);
	return store_fds(-1, &store.dir, &store.objects, &store.lockfd);
}

/* Leave word of who holds the lock.  0 or -errno. */
static int
store_sign(void)
{
	if (ftruncate(store.lockfd, 0) ||
	    dprintf(store.lockfd, "%d\n", (int)getpid()) < 0)
		return -errno;
	return 0;
}

/* Has somebody removed this directory of ours? */
static bool
store_removed(int fd)
{
	struct stat st;

	return !fstat(fd, &st) && st.st_nlink == 0;
}

/* No object of the registry has files any more. */
static void
store_forget(void)
{
	GUARD(&store.lock);
	for (size_t i = 0; i < STORE_BUCKETS; i++) {
		struct ent *e = LIST_FIRST(&store.ents[i]), *next;

		for (; e; e = next) {
			next = LIST_NEXT(e, hash);
			ent_empty_locked(e);
			store.used -= e->bytes;
			ent_pin_locked(e, false, 0);
			e->bytes = 0;
			e->live++;
			ent_drop_locked(e);
		}
	}
}

/*
 * Somebody removed the cache under us: begin a new one.  Who reads goes on with
 * the files that he has open.  The new directories take the numbers of the old
 * ones, by which other threads may be using them; nothing can be made in those
 * any more.  False after a sentence.
 */
static bool
store_renew(void)
{
	int dir = -1, objects = -1, lockfd = -1;
	bool ok;

	store_forget();
	flock(store.lockfd, LOCK_UN);	/* it may be there still */
	ok = !store_fds(store.dir, &dir, &objects, &lockfd) &&
	    dup3(dir, store.dir, O_CLOEXEC) >= 0 &&
	    dup3(lockfd, store.lockfd, O_CLOEXEC) >= 0 &&
	    dup3(objects, store.objects, O_CLOEXEC) >= 0;
	sys_close(&dir);
	sys_close(&lockfd);
	sys_close(&objects);
	if (ok) {
		store_sign();
		store.retry_at = now_ms();
		log_warn("cache %s: was removed; begun anew", conf.cache_dir);
	}
	return ok;
}

static void tree_scan(void);

/* Evict one object if use is above the watermark, 95 % of the limit; wait a second
 * for that unless there was more to do.  Is there now? */
static bool
evict_turn(bool more)
{
	uint64_t slack;

	WITH_LOCK(&store.lock) {
		if (!more && !stopping)
			wait_on(&store.evict, &store.lock, now_ms() + 1000);
		slack = (store.limit ? store.limit : store.min_free) / 20;
		more = store_missing_locked(slack) > store.leaving;
	}
	return more && evict_next();
}

/* Helps the evictor: unlink(2) waits for the disk. */
static void *
evict_helper(void *arg)
{
	(void)arg;
	for (bool more = false; !stopping;)
		more = evict_turn(more);
	return NULL;
}

/* Scans once, then keeps use below the watermark, and has a cache directory. */
static void *
evict_thread(void *arg)
{
	uint64_t next = 0, wait = 1000;
	pthread_t helper = 0;
	bool more = true;

	(void)arg;
	tree_scan();
	store_scan();
	store.scanned = true;
	if (sys_thread(&helper, evict_helper, NULL))
		helper = 0;
	while (!stopping) {
		more = evict_turn(more);
		if (now_ms() < next)
			continue;
		if (!store_removed(store.objects) || store_renew())
			wait = 1000;
		else
			wait = MIN(wait * 2, 60000);
		next = now_ms() + wait;
	}
	if (helper)
		pthread_join(helper, NULL);
	return NULL;
}

/* What an amount is of a disk of so many bytes. */
static uint64_t
amount_of(const struct amount *a, uint64_t total)
{
	return a->percent > 0 ?
	    (uint64_t)(a->percent / 100 * (double)total) : a->bytes;
}

/* What conf lets the cache take of its disk; the evictor sees to it.  0 or
 * -errno. */
static int
store_limits(void)
{
	struct statvfs sv;
	uint64_t total;

	if (fstatvfs(store.dir, &sv))
		return -errno;
	total = (uint64_t)sv.f_blocks * sv.f_frsize;
	GUARD(&store.lock);
	store.limit = amount_of(&conf.cache_size, total);
	store.min_free = amount_of(&conf.cache_min_free, total);
	store.room = total - MIN(total, store.min_free);
	store.pin_max = amount_of(&conf.cache_pin_max, store.limit ?
	    store.limit : store.room);
	/* of the inodes the same share */
	store.min_inodes = (uint64_t)((double)(total - store.room) /
	    (double)MAX(total, 1) * (double)sv.f_files);
	pthread_cond_broadcast(&store.evict);
	return 0;
}

/* Start the store's threads (after the fork).  0, or -errno after a sentence. */
static int
store_start(void)
{
	int r = store_limits() ?: store_sign();

	if (r)
		return refuse(r, "%s", strerror(-r));
	r = sys_thread(&ckpt.tid, ckpt_thread, NULL);
	return r ? r : sys_thread(&store.evictor, evict_thread, NULL);
}

/* Write all indexes out and stop; nobody uses an object any more. */
static void
store_stop(void)
{
	sys_thread_end(ckpt.tid, &ckpt.lock, &ckpt.cond, &ckpt.quit);
	WITH_LOCK(&store.lock)
		pthread_cond_broadcast(&store.evict);
	if (store.evictor)
		pthread_join(store.evictor, NULL);
	if (hung)
		return;			/* that thread may use these */
	sys_close(&store.objects);
	sys_close(&store.dir);
	sys_close(&store.lockfd);
}

/* === store ================================================== End === */

/* === tree: the server's names, for offline use ============ Begin === */

/*
 * What was listed and looked up, one file a directory (cachefs.h), for when the
 * server is away, also after a restart.  What is learnt is noted as the image
 * of such a file; the noter merges it into the file once a second.  A note that
 * finds no room is lost: then the name is not known offline, that is all.
 */
#define NOTES_MAX (4 * MiB)		/* of memory, until they are written */
#define LISTS_MAX (32 * MiB)		/* with whole listings */
#define GONE_MAX 4096			/* names that a directory has not */
#define HEARD_S 10			/* how often tree/server is touched */

struct image {				/* a directory's file in memory */
	char *buf;			/* allocated, or NULL: there is none */
	size_t size;
	const struct disk_tree *h;	/* what it begins with */
	const struct disk_entry **v;	/* allocated; sorted by name */
	size_t n;
};

struct note {
	char *dir;			/* a path; "" holds the root, as "." */
	struct image im;
	uint64_t seq;			/* which of two was first */
};

static struct {
	int fd;				/* [I] the number: see tree_renew() */
	unsigned version;		/* [I] the NFS server's, or 0 */
	_Atomic int64_t heard;		/* time() when the server was there */
	pthread_mutex_t lock;		/* the notes */
	pthread_cond_t cond;
	struct note *notes;
	size_t n, room, noted;		/* noted: bytes */
	uint64_t seq;			/* of the next one */
	bool quit;
	pthread_t tid;
	uint64_t bytes;			/* store.lock: on disk */
	pthread_mutex_t last_lock;	/* held while the disk is read, but */
	char *last_dir;			/* only offline: what was asked last */
	struct image last;
} tree = { .fd = -1, .lock = PTHREAD_MUTEX_INITIALIZER,
	.cond = PTHREAD_COND_INITIALIZER,
	.last_lock = PTHREAD_MUTEX_INITIALIZER };

static void
image_free(struct image *im)
{
	free(im->buf);
	free(im->v);
	*im = (struct image){ 0 };
}

/* An entry's text is two C strings; see struct disk_entry. */
static const char *
entry_link(const struct disk_entry *e)
{
	return e->text + e->name_len + 1;
}

static bool
entry_whole(const struct disk_entry *e, size_t room)
{
	size_t len = sizeof(*e) + 2;

	if (room < len)
		return false;
	len += (size_t)e->name_len + e->link_len;
	return e->size <= room && e->size % 8 == 0 && len <= e->size &&
	    e->name_len && strnlen(e->text, e->name_len + 1u) == e->name_len &&
	    e->name_len < 256 && !memchr(e->text, '/', e->name_len) &&
	    strnlen(entry_link(e), e->link_len + 1u) == e->link_len;
}

/* Take the image that lies in im->buf.  0, -ENOMEM, or -EBADMSG: torn, damaged
 * or foreign. */
static int
image_parse(struct image *im)
{
	const struct disk_tree *h = (const void *)im->buf;
	const char *at = (const char *)(h + 1), *end = im->buf + im->size;
	const struct disk_entry *e;

	if (im->size < sizeof(*h) || memcmp(h->magic, TREE_MAGIC, 8) ||
	    h->version != DISK_VERSION || h->size != sizeof(*h) ||
	    h->xxh3 != XXH3_64bits(h, offsetof(struct disk_tree, xxh3)) ||
	    h->body_size != im->size - sizeof(*h) ||
	    h->entries > h->body_size / sizeof(*e) ||
	    h->body_xxh3 != XXH3_64bits(h + 1, h->body_size))
		return -EBADMSG;
	im->v = calloc(h->entries + 1, sizeof(*im->v));
	if (!im->v)
		return -ENOMEM;
	im->h = h;
	for (; at < end; at += e->size) {
		e = (const void *)at;
		if (im->n == h->entries || !entry_whole(e, (size_t)(end - at)) ||
		    (im->n && strcmp(im->v[im->n - 1]->text, e->text) >= 0))
			return -EBADMSG;
		im->v[im->n++] = e;
	}
	return im->n == h->entries ? 0 : -EBADMSG;
}

/* An image is written to a memory stream: begin, entries by name, end. */
static FILE *
image_begin(struct image *im)
{
	static const struct disk_tree blank;
	FILE *f = open_memstream(&im->buf, &im->size);

	if (f)
		fwrite(&blank, sizeof(blank), 1, f);
	return f;
}

static void
image_add(FILE *f, const char *name, const struct attr *a, const char *link,
    unsigned flags)
{
	static const char zero[8];
	size_t nlen = strlen(name), llen = strlen(link);
	size_t len = sizeof(struct disk_entry) + nlen + llen + 2;
	struct disk_entry e = { .size = (uint16_t)ROUND_UP(len, 8),
		.flags = (uint16_t)(flags | (a ? ENTRY_ATTR : 0)),
		.name_len = (uint16_t)nlen, .link_len = (uint16_t)llen };

	if (a)
		e.attr = *a;
	fwrite(&e, sizeof(e), 1, f);
	fwrite(name, nlen + 1, 1, f);
	fwrite(link, llen + 1, 1, f);
	fwrite(zero, e.size - len, 1, f);
}

/* 0, -ENOMEM, or -EBADMSG if that was not a good one. */
static int
image_end(FILE *f, struct image *im, unsigned flags, size_t entries)
{
	struct disk_tree *h;
	bool failed = ferror(f);

	if (fclose(f) || failed || !im->buf)
		return -ENOMEM;
	h = (void *)im->buf;
	*h = (struct disk_tree){ .magic = TREE_MAGIC, .version = DISK_VERSION,
		.size = sizeof(*h), .flags = flags, .entries = entries,
		.body_size = im->size - sizeof(*h),
		.body_xxh3 = XXH3_64bits(h + 1, im->size - sizeof(*h)) };
	h->xxh3 = XXH3_64bits(h, offsetof(struct disk_tree, xxh3));
	return image_parse(im);
}

/* What is known of one name: what y says, and of x what y leaves open. */
static void
entry_merge(FILE *f, const struct disk_entry *x, const struct disk_entry *y)
{
	const struct attr *a = y->flags & ENTRY_ATTR ? &y->attr :
	    x->flags & ENTRY_ATTR ? &x->attr : NULL;
	bool same = !(x->flags & y->flags & ENTRY_ATTR) ||
	    version_same(&x->attr.ver, &y->attr.ver);

	if (y->flags & ENTRY_GONE)
		image_add(f, y->text, NULL, "", ENTRY_GONE);
	else
		image_add(f, y->text, a, x->link_len && !y->link_len && same ?
		    entry_link(x) : entry_link(y), 0);
}

/* Old and newer knowledge of one directory as one image.  0 or -errno. */
static int
image_merge(const struct image *old, const struct image *new, struct image *to)
{
	unsigned flags = (old->h ? old->h->flags : 0) | new->h->flags;
	bool anew = new->h->flags & TREE_WHOLE;
	FILE *f = image_begin(to);
	size_t i = 0, j = 0, n = 0, gone = 0;

	while (f && (i < old->n || j < new->n)) {
		const struct disk_entry *x = i < old->n ? old->v[i] : NULL;
		const struct disk_entry *y = j < new->n ? new->v[j] : NULL;
		int c = !x ? 1 : !y ? -1 : strcmp(x->text, y->text);
		const struct disk_entry *e = c < 0 ? x : y;

		if (!e)			/* for clang's analyzer */
			break;
		i += c <= 0;
		j += c >= 0;
		if (e->flags & ENTRY_GONE ? ++gone > GONE_MAX : c < 0 && anew)
			continue;	/* a whole listing would have it */
		if (c < 0)
			fwrite(e, e->size, 1, f);
		else
			entry_merge(f, c ? y : x, y);
		n++;
	}
	return f ? image_end(f, to, flags, n) : -ENOMEM;
}

/* Take over an image of dir; one that finds no room is dropped. */
static void
tree_note(const char *dir, struct image *im)
{
	size_t most = im->h->flags & TREE_WHOLE ? LISTS_MAX : NOTES_MAX;
	char *copy = strdup(dir);

	WITH_LOCK(&tree.lock) {
		if (tree.n == tree.room) {
			size_t room = tree.room ? tree.room * 2 : 64;
			void *v = reallocarray(tree.notes, room,
			    sizeof(*tree.notes));

			tree.notes = v ? v : tree.notes;
			tree.room = v ? room : tree.room;
		}
		if (!copy || tree.n == tree.room ||
		    (tree.n && tree.noted + im->size > most))
			break;
		tree.notes[tree.n++] = (struct note){ copy, *im, tree.seq++ };
		tree.noted += im->size;
		*im = (struct image){ 0 };
		copy = NULL;
	}
	free(copy);
	image_free(im);
}

/* The path of the directory that has path, and its name there; allocated. */
static char *
tree_parent(const char *path, const char **name)
{
	if (path[1])
		return path_parent(path, name);
	*name = ".";
	return strdup("");
}

/* The server showed a for path, or that it links to link; neither: that it is
 * not there. */
static void
tree_note_name(const char *path, const struct attr *a, const char *link)
{
	struct image im = { 0 };
	const char *name;
	char *dir = tree_parent(path, &name);
	FILE *f = dir && tree.fd >= 0 ? image_begin(&im) : NULL;

	if (f) {
		image_add(f, name, a, link ? link : "",
		    a || link ? 0 : ENTRY_GONE);
		if (!image_end(f, &im, 0, 1))
			tree_note(dir, &im);
	}
	image_free(&im);
	free(dir);
}

static int
dirent_by_name(const void *a, const void *b)
{
	const struct dirent_plus *const *x = a, *const *y = b;

	return strcmp((*x)->name, (*y)->name);
}

/* The server listed l for path. */
static void
tree_note_list(const char *path, const struct dirlist *l)
{
	const struct dirent_plus **v = calloc(l->n + 1, sizeof(*v));
	struct image im = { 0 };
	FILE *f = v && tree.fd >= 0 ? image_begin(&im) : NULL;
	size_t n = 0;

	for (size_t i = 0; v && i < l->n; i++)
		v[i] = &l->v[i];
	if (v)
		qsort(v, l->n, sizeof(*v), dirent_by_name);
	for (size_t i = 0; f && i < l->n; i++) {
		if (i && !strcmp(v[i]->name, v[i - 1]->name))
			continue;
		image_add(f, v[i]->name, v[i]->have_attr ? &v[i]->attr : NULL,
		    "", 0);
		n++;
	}
	if (f && !image_end(f, &im, TREE_WHOLE, n))
		tree_note(path, &im);
	image_free(&im);
	free(v);
}

/* The file of a directory, by its path; suffix: "" or ".tmp". */
static const char *
tree_key(const char *dir, const char *suffix, char buf[64])
{
	XXH128_hash_t h = XXH3_128bits(dir, strlen(dir));

	return xx_path(h.low64, h.high64, h.low64, suffix, buf);
}

/* Read a file of the tree.  0; -ENOENT; -EBADMSG: torn, damaged or foreign; or
 * -errno. */
static int
tree_read(const char *key, struct image *im)
{
	int fd = sys_openat(tree.fd, key, O_RDONLY, 0);
	struct stat st;
	ssize_t n;
	int r = fd < 0 ? fd : fstat(fd, &st) ? -errno : 0;

	*im = (struct image){ 0 };
	if (!r) {
		im->size = (size_t)st.st_size;
		im->buf = malloc(im->size + 1);
		n = im->buf ? sys_pread(fd, im->buf, im->size, 0) : -ENOMEM;
		r = n < 0 ? (int)n : n != (ssize_t)im->size ? -EBADMSG :
		    image_parse(im);
	}
	sys_close(&fd);
	if (r)
		image_free(im);
	return r;
}

/* Charge what the tree takes on disk.  False: it may not have so much. */
static bool
tree_charge(uint64_t before, uint64_t after)
{
	uint64_t share = (store.limit ? store.limit : store.room) / 8;

	before = ROUND_UP(before, DIO_ALIGN);
	after = ROUND_UP(after, DIO_ALIGN);
	GUARD(&store.lock);
	if (after > before && (!store.scanned ||
	    tree.bytes + after - before > share ||
	    store_missing_locked(after - before)))
		return false;
	tree.bytes += after - before;
	store.used += after - before;
	return true;
}

static void
tree_unlink(const char *name)
{
	unlinkat(tree.fd, name, 0);
}

/* Remove one file of the tree that is damaged; it is learnt anew. */
static void
tree_check(const char *name)
{
	struct image im;
	struct stat st;

	if (tree_read(name, &im) == -EBADMSG) {
		if (!fstatat(tree.fd, name, &st, AT_SYMLINK_NOFOLLOW))
			tree_charge((uint64_t)st.st_size, 0);
		COUNT(checksum_errors, 1);
		log_warn("cache: dropped a listing, tree/%s: it is damaged",
		    name);
		tree_unlink(name);
	}
	image_free(&im);
}

/* Those of dir.  Errors as tree_read(). */
static int
tree_load(const char *dir, struct image *im)
{
	char key[64];
	int r = tree_read(tree_key(dir, "", key), im);

	if (r == -EBADMSG)
		tree_check(key);
	return r;
}

/* Remove all that is known: a new start costs little, and bounds it. */
static void
tree_clear(void)
{
	store_walk(tree.fd, tree_unlink);
	tree_charge(tree.bytes, 0);
	names_unnote();
	log_info("cache: forgot the listings for offline use: too many");
}

/* Merge what was noted of dir into its file.  Noter only. */
static void
tree_update(const char *dir, const struct image *new)
{
	struct image old, im = { 0 };
	char key[64], tmp[64];
	uint64_t before;
	int r = tree_load(dir, &old), i;

	before = old.size;
	if (r == -ENOMEM || image_merge(&old, new, &im) ||
	    (old.buf && old.size == im.size && !memcmp(old.buf, im.buf,
	    im.size)))
		goto done;
	if (!tree_charge(before, im.size)) {
		if (tree.bytes > before + im.size)
			tree_clear();
		goto done;
	}
	tree_key(dir, "", key);
	tree_key(dir, ".tmp", tmp);
	for (i = 0, r = -ENOENT; i < 2 && r == -ENOENT; i++)
		r = (i ? xx_make(tree.fd, key) : 0) ?: store_replace(tree.fd,
		    tmp, key, im.buf, im.size, SYNC_BEGUN);
	if (r) {
		tree_charge(im.size, before);
		store_degrade("listing", r);
	}
done:
	image_free(&old);
	image_free(&im);
}

static int
note_by_dir(const void *a, const void *b)
{
	const struct note *x = a, *y = b;
	int c = strcmp(x->dir, y->dir);

	return c ? c : x->seq < y->seq ? -1 : 1;
}

/* Merge v[0..n), of one directory, into v[0].im.  0 or -errno. */
static int
notes_fold(struct note *v, size_t n)
{
	struct image im = { 0 };
	int r = 0;

	if (n < 2)
		return 0;
	r = notes_fold(v, n / 2) ?: notes_fold(v + n / 2, n - n / 2) ?:
	    image_merge(&v[0].im, &v[n / 2].im, &im);
	image_free(&v[n / 2].im);
	if (!r) {
		image_free(&v[0].im);
		v[0].im = im;
	} else {
		image_free(&im);
	}
	return r;
}

static void
tree_flush(struct note *v, size_t n)
{
	size_t end;

	if (n)
		qsort(v, n, sizeof(*v), note_by_dir);
	for (size_t i = 0; i < n; i = end) {
		for (end = i + 1; end < n && !strcmp(v[i].dir, v[end].dir);)
			end++;
		if (!notes_fold(v + i, end - i))
			tree_update(v[i].dir, &v[i].im);
	}
	for (size_t i = 0; i < n; i++) {
		image_free(&v[i].im);
		free(v[i].dir);
	}
	free(v);
}

/* Charge one file that lies there already, or clear it if a crash left it. */
static void
tree_found(const char *name)
{
	struct stat st;

	if (strchr(name, '.')) {
		tree_unlink(name);
	} else if (!fstatat(tree.fd, name, &st, AT_SYMLINK_NOFOLLOW)) {
		GUARD(&store.lock);
		tree.bytes += ROUND_UP((uint64_t)st.st_size, DIO_ALIGN);
		store.used += ROUND_UP((uint64_t)st.st_size, DIO_ALIGN);
	}
}

static void
tree_scan(void)
{
	store_walk(tree.fd, tree_found);
}

/* While the server is there tree/server's mtime says so. */
static void
tree_touch(void)
{
	static int64_t touched;		/* [o] */

	if (backend_down)
		return;
	tree.heard = time(NULL);
	if (tree.heard - touched >= HEARD_S) {
		touched = tree.heard;
		utimensat(tree.fd, "server", NULL, 0);
	}
}

/* Leave word of the server's version in tree/server. */
static void
tree_sign(void)
{
	char text[32];
	int n = snprintf(text, sizeof(text), "version %u\n", tree.version);
	int r = store_write(tree.fd, "server", text, (size_t)n, SYNC_BEGUN);

	if (r)
		store_degrade("tree/server", r);
}

/* Somebody removed the tree: begin a new one.  As store_renew(). */
static void
tree_renew(void)
{
	static uint64_t next;		/* [o] not a sentence a second */
	int fd;

	if (now_ms() < next || !store_removed(tree.fd) ||
	    store_removed(store.dir))
		return;			/* the latter is store_renew()'s */
	next = now_ms() + HEARD_S * 1000;
	fd = store_subdir(store.dir, "tree");
	if (fd >= 0 && dup3(fd, tree.fd, O_CLOEXEC) >= 0) {
		tree_charge(tree.bytes, 0);
		names_unnote();
		if (tree.version)
			tree_sign();
	}
	sys_close(&fd);
}

static void *
tree_thread(void *arg)
{
	bool quit = false;

	(void)arg;
	while (!quit) {
		struct note *batch = NULL;
		size_t n = 0;

		WITH_LOCK(&tree.lock) {
			if (!tree.quit)
				wait_on(&tree.cond, &tree.lock,
				    now_ms() + 1000);
			quit = tree.quit;
			if (!store.scanned && !quit)
				break;		/* see tree_charge() */
			batch = tree.notes;
			n = tree.n;
			tree.notes = NULL;
			tree.n = tree.room = tree.noted = 0;
		}
		tree_renew();
		tree_flush(batch, n);
		tree_touch();
	}
	return NULL;
}

/* May what is known be served although the server is away? */
static bool
tree_serves(void)
{
	return conf.cache_offline == 0 && (!conf.cache_offline_max_age ||
	    !backend_down ||
	    time(NULL) - tree.heard <= conf.cache_offline_max_age);
}

static void
tree_forget_locked(void)
{
	free(tree.last_dir);
	image_free(&tree.last);
	tree.last_dir = NULL;
}

/* The server is back: what was read while it was away is old from now on. */
static void
tree_forget(void)
{
	GUARD(&tree.last_lock);
	tree_forget_locked();
}

/* Have tree.last be dir's.  0; -EHOSTDOWN: it is not known, or may not be
 * served; or -ENOMEM. */
static int
tree_last_locked(const char *dir)
{
	if (!tree_serves())
		return -EHOSTDOWN;
	if (tree.last_dir && !strcmp(tree.last_dir, dir))
		return 0;
	tree_forget_locked();
	if (tree.fd < 0 || tree_load(dir, &tree.last))
		return -EHOSTDOWN;
	tree.last_dir = strdup(dir);
	return tree.last_dir ? 0 : -ENOMEM;
}

static int
entry_by_name(const void *name, const void *e)
{
	return strcmp(name, (*(const struct disk_entry *const *)e)->text);
}

/* What the server last showed of path: its attributes, or with link its
 * target.  0; -ENOENT: it was asked for and not there; -EHOSTDOWN: not known; or
 * -ENOMEM. */
static int
tree_get(const char *path, struct attr *a, char *link, size_t size)
{
	const struct disk_entry **p, *e;
	const char *name;
	char *dir = tree_parent(path, &name);
	int r;

	if (!dir)
		return -ENOMEM;
	GUARD(&tree.last_lock);
	r = tree_last_locked(dir);
	free(dir);
	if (r)
		return r;
	p = tree.last.n ? bsearch(name, tree.last.v, tree.last.n,
	    sizeof(*tree.last.v), entry_by_name) : NULL;
	e = p ? *p : NULL;
	if (!e)		/* not even a whole listing says: it may be new */
		return -EHOSTDOWN;
	if (e->flags & ENTRY_GONE)
		return -ENOENT;
	if (link ? !e->link_len || e->link_len >= size :
	    !(e->flags & ENTRY_ATTR))
		return -EHOSTDOWN;
	if (link)
		memcpy(link, entry_link(e), e->link_len + 1u);
	else if (a)
		*a = e->attr;
	return 0;
}

/* The names that path last had.  0, -EHOSTDOWN: not known, or -ENOMEM. */
static int
tree_list(const char *path, struct dirlist *l)
{
	int r;

	GUARD(&tree.last_lock);
	r = tree_last_locked(path);
	if (!r && !(tree.last.h->flags & TREE_WHOLE))
		r = -EHOSTDOWN;
	for (size_t i = 0; !r && i < tree.last.n; i++) {
		const struct disk_entry *e = tree.last.v[i];

		if (!(e->flags & ENTRY_GONE))
			r = dirlist_add(l, e->text, e->flags & ENTRY_ATTR ?
			    &e->attr : NULL);
	}
	if (r)
		dirlist_free(l);
	return r;
}

/* Open dir/tree.  0 or -errno after a sentence. */
static int
tree_open(void)
{
	struct stat st;

	tree.fd = store_subdir(store.dir, "tree");
	if (tree.fd < 0)
		return tree.fd;
	tree.heard = fstatat(tree.fd, "server", &st, AT_SYMLINK_NOFOLLOW) ? 0 :
	    st.st_mtime;
	return 0;
}

/* Start the noter.  version: the NFS server's, or 0. */
static int
tree_start(unsigned version)
{
	tree.version = version;
	if (version)
		WITH_LOCK(&store.lock)
			store.used += DIO_ALIGN;	/* of that file */
	if (version && !backend_down)
		tree_sign();
	return sys_thread(&tree.tid, tree_thread, NULL);
}

/* The version of the server, as it was when it was there; 0: not known. */
static unsigned
tree_server_version(void)
{
	int fd = sys_openat(tree.fd, "server", O_RDONLY, 0);
	char text[32] = "";
	unsigned version = 0;

	if (fd >= 0 && sys_pread(fd, text, sizeof(text) - 1, 0) > 0)
		sscanf(text, "version %u", &version);
	sys_close(&fd);
	return version;
}

static void
tree_stop(void)
{
	sys_thread_end(tree.tid, &tree.lock, &tree.cond, &tree.quit);
	tree_forget();
	if (!hung)
		sys_close(&tree.fd);
}

/* === tree =================================================== End === */

/* === fetch: one READ for all who want a block ============= Begin === */

/*
 * A reader finds each block of its range present on disk, in a fetch's buffer
 * or on its way there, or it starts the fetch itself.  The life of a fetch:
 *	F_QUEUED   with the backend
 *	F_ARRIVED  readers copy from the buffer, the executor writes it
 *	F_KEPT     written (or not to be stored); the buffer stays for readers
 *		   to come until all of it was read or the pool wants it back
 *	F_FAILED   out of the table; freed by its last reader
 * A reader that waits for a buffer holds none, so the pool can't deadlock; one
 * that is lent buffers waits only for fetches, which have theirs.
 */
#define AHEAD_MAX (32 * MiB)		/* read-ahead window of one stream */
#define AHEAD_START (128 * KiB)		/* read in a row before any */
#define STRIDE_MIN 2			/* equal distances before any */
#define STRIDE_MAX 32			/* reads ahead */
#define FILL_INFLIGHT 8			/* fetches of one background fill */
#define FILL_TRIES 10			/* rounds without room before it ends */
#define FETCH_SLOW 500000		/* us; then fewer at a time */

struct stream {				/* the reads of one open file */
	pthread_mutex_t lock;
	uint64_t next;			/* where a sequential reader goes on */
	uint64_t run, before;		/* bytes read in a row; the last time */
	uint64_t ahead;			/* fetched ahead up to here */
	uint64_t most;			/* window at most; 0: not known yet */
	uint64_t wasted;		/* o->wasted when that was last set */
	uint64_t last;			/* offset of the last read */
	int64_t stride;			/* from the one before to that */
	unsigned strides;		/* how often in a row */
	bool counted;			/* in fill.streams */
};

static struct {
	pthread_mutex_t lock;		/* the fill queue */
	pthread_cond_t cond;
	STAILQ_HEAD(fill_list, obj) queue;
	bool kicked;			/* there may be something to do */
	pthread_t tid;
	bool quit;
	atomic_uint streams;		/* sequential readers that look ahead */
} fill = { .lock = PTHREAD_MUTEX_INITIALIZER,
	.cond = PTHREAD_COND_INITIALIZER,
	.queue = STAILQ_HEAD_INITIALIZER(fill.queue) };

static _Atomic uint64_t fetch_us;	/* how long a fetch takes, smoothed */

/* Latencies in buckets of 1/8 octave of a microsecond. */
struct histogram {
	_Atomic uint64_t n[256];
	_Atomic uint64_t max;
};
static struct histogram lat_miss, lat_hit;

static void
lat_add(struct histogram *h, uint64_t us)
{
	unsigned b = us < 8 ? (unsigned)us : (unsigned)(
	    (63 - __builtin_clzll(us)) * 8 - 16 +
	    (us >> (60 - __builtin_clzll(us)) & 7));

	atomic_fetch_add_explicit(&h->n[MIN(b, 255)], 1, memory_order_relaxed);
	if (us > h->max)
		h->max = us;
}

static struct fetch_list *
fetch_bucket(struct obj *o, uint64_t off)
{
	return &o->tab[off / IO_MAX % OBJ_BUCKETS];
}

/* The fetch whose range holds off, or NULL. */
static struct fetch *
fetch_find_locked(struct obj *o, uint64_t off)
{
	struct fetch *f = o->tab ? LIST_FIRST(fetch_bucket(o, off)) : NULL;

	while (f && (off < f->off || off >= f->off + f->len))
		f = LIST_NEXT(f, hash);
	return f;
}

static bool
obj_present_locked(struct obj *o, uint64_t off)
{
	return o->map && bit_get(o->map, off / o->bs);
}

/* Neither present nor being fetched? */
static bool
obj_absent_locked(struct obj *o, uint64_t off)
{
	return !obj_present_locked(o, off) && !fetch_find_locked(o, off);
}

/*
 * Find the first run of blocks in [*off, end) that are neither present nor
 * being fetched; set *off to its start.  Returns its bytes, 0 = none; a run
 * ends at the next multiple of 1 MiB.
 */
static size_t
fetch_gap_locked(struct obj *o, uint64_t *off, uint64_t end)
{
	uint64_t at = *off - *off % o->bs, stop;

	while (at < end && !obj_absent_locked(o, at))
		at += o->bs;
	if (at >= end)
		return 0;
	*off = at;
	stop = MIN(ROUND_UP(at + 1, IO_MAX), o->attr.ver.size);
	do
		at += o->bs;
	while (at < end && at < stop && obj_absent_locked(o, at));
	return (size_t)(MIN(at, stop) - *off);
}

static void
fetch_free(struct fetch *f)
{
	struct obj *o = f->o;

	if (f->born_ahead && f->state == F_KEPT) {
		COUNT(prefetch_wasted_bytes, f->len - MIN(f->used, f->len));
		if (!f->used)
			o->wasted += f->len;
	}
	if (f->buf)
		pool_put(f->buf, f->room);
	free(f);
	obj_put(o);
}

static void
fetch_keep(struct fetch *f)
{
	GUARD(&pool.lock);
	TAILQ_INSERT_TAIL(&pool.kept, f, kept);
	f->listed = true;
	pool_wake_locked();
}

static void
fetch_unkeep_locked(struct fetch *f)	/* pool.lock is held */
{
	TAILQ_REMOVE(&pool.kept, f, kept);
	f->listed = false;
}

/* Take f, of which the buffer is kept, out of its table; false: fetch_reclaim()
 * has it. */
static bool
fetch_unhook_locked(struct fetch *f)
{
	WITH_LOCK(&pool.lock) {
		if (!f->listed)
			return false;
		fetch_unkeep_locked(f);
	}
	LIST_REMOVE(f, hash);
	return true;
}

/* Is f of no more use?  Then it is out of the table, and the caller frees it
 * once it has released o->lock. */
static bool
fetch_over_locked(struct fetch *f)
{
	if (f->refs || f->state == F_QUEUED || f->state == F_ARRIVED)
		return false;
	if (f->state == F_FAILED)
		return true;		/* unhooked when it failed */
	if (f->buf && f->used < f->len && (f->prio != PRIO_FILL || f->wanted))
		return false;
	return fetch_unhook_locked(f);
}

/* The pool is empty: free the oldest kept buffer that nobody is copying from.
 * Takes object locks; false if there is none. */
static bool
fetch_reclaim(void)
{
	for (int tries = 0; tries < 64; tries++) {
		struct fetch *f = NULL;
		bool idle = false;

		WITH_LOCK(&pool.lock)
			if ((f = TAILQ_FIRST(&pool.kept)))
				fetch_unkeep_locked(f);
		if (!f)
			return false;
		WITH_LOCK(&f->o->lock)
			if ((idle = f->refs == 0))
				LIST_REMOVE(f, hash);
			else
				fetch_keep(f);
		if (idle) {
			fetch_free(f);
			return true;
		}
	}
	return false;
}

/* Free what is kept of o, or only what is stored, too.  False: nothing is. */
static bool
fetch_forget(struct obj *o, bool stored)
{
	LIST_HEAD(, fetch) gone = LIST_HEAD_INITIALIZER(gone);
	struct fetch *f, *next;
	bool any = false;

	WITH_LOCK(&o->lock)
		for (int i = 0; o->tab && i < OBJ_BUCKETS; i++)
			for (f = LIST_FIRST(&o->tab[i]); f; f = next) {
				next = LIST_NEXT(f, hash);
				if (!f->refs && f->state == F_KEPT &&
				    (f->store || !stored) &&
				    fetch_unhook_locked(f))
					LIST_INSERT_HEAD(&gone, f, hash);
			}
	for (; (f = LIST_FIRST(&gone)); any = true) {
		LIST_REMOVE(f, hash);
		fetch_free(f);
	}
	return any;
}

/* Have o's source open: that of a complete object is not, until its cache file
 * fails.  0; -ESTALE with *now set if the server has another version; or
 * -errno. */
static int
obj_source(struct obj *o, struct attr *now)
{
	return o->bf ? 0 : be->open(o, o->path, now);
}

/* The same for a READ, of a file that may be gone from its path.  again: the last
 * one said that the server has another version now; it may have this one under
 * another handle, for those of some servers do not outlive a restart.  0, -ESTALE
 * or -errno. */
static int
obj_reopen(struct obj *o, bool again)
{
	struct attr now;
	int r = again ? be->open(o, o->path, &now) : obj_source(o, &now);

	return r == -ENOENT || r == -ENOTDIR || r == -ELOOP ? -ESTALE : r;
}

/* Tell the filler that something changed. */
static void
fill_kick(void)
{
	GUARD(&fill.lock);
	fill.kicked = true;
	pthread_cond_signal(&fill.cond);
}

/* Ask for the rest of o in the background. */
static void
fill_queue(struct obj *o)
{
	WITH_LOCK(&fill.lock) {
		if (o->filling || fill.quit)
			return;
		o->filling = true;
	}
	obj_ref(o);
	o->fill_why = NULL;
	COUNT(fills_started, 1);
	WITH_LOCK(&fill.lock)
		STAILQ_INSERT_TAIL(&fill.queue, o, fill_next);
	fill_kick();
}

/* Has enough of o been read to fetch the rest? */
static void
fill_consider(struct obj *o)
{
	bool want = false;

	if (conf.cache_fill >= 100 || o->complete || o->bypass || o->gone ||
	    o->filling)
		return;
	WITH_LOCK(&o->lock)
		want = o->bf && o->nblk &&
		    o->present * 100 >= conf.cache_fill * o->nblk;
	if (want)
		fill_queue(o);
}

/* Have o whole, for `cachefs warm`: its fill goes on if nobody asks again.  Waits
 * a second at most.  0 or -errno; w->why if there is no use in asking again. */
static int
fill_warm(struct obj *o, struct cachefs_file *w)
{
	uint64_t until = now_ms() + 1000;
	const char *why = NULL;

	if (o->superseded || (o->gone && obj_reopen(o, true)))
		return -ESTALE;
	if (!o->complete && !o->bypass && !w->size)
		fill_queue(o);
	GUARD(&o->lock);
	while (!o->complete && !o->bypass && o->filling && now_ms() < until)
		if (wait_on(&o->cond, &o->lock, MIN(until, now_ms() + 50)) ==
		    -EINTR)
			return -EINTR;
	w->size = o->attr.ver.size;
	w->cached = MIN(o->present * o->bs, w->size);
	w->kept = o->nblk == 0 || o->saved == o->nblk;
	if (!o->complete && o->nblk)
		why = o->bypass ? o->bypass : backend_down ? "offline" :
		    o->filling ? NULL : o->fill_why ? o->fill_why :
		    "unreadable";
	snprintf(w->why, sizeof(w->why), "%s", why ? why : "");
	return 0;
}

/* The cache write of f is over.  Once it is kept others may free it, and with
 * it the last reference to o: hence our own. */
static void
fetch_written(struct exec_req *er)
{
	struct fetch *f = (struct fetch *)((char *)er -
	    offsetof(struct fetch, er));
	struct obj *o = obj_ref(f->o);
	uint64_t blk = f->off / o->bs, n = (f->len + o->bs - 1) / o->bs;
	bool over = false, failed = er->res < 0, fills = f->born_fill;

	store_settle(o, obj_bytes(o, blk, n), failed);
	if (failed) {
		store_degrade("write", er->res);
	} else {
		COUNT(cache_write_bytes, f->len);
		store_recovered();
	}
	WITH_LOCK(&o->lock) {
		for (uint64_t i = 0; i < n && !failed; i++) {
			bit_set(o->map, blk + i);
			o->present++;
			if (o->sums)
				o->sums[blk + i] = f->sums[i];
		}
		if (!failed && o->present == o->nblk) {
			o->complete = true;
			COUNT(fills_completed, 1);
		}
		f->wanted = f->off + f->len > o->reading &&
		    f->off < o->reading + AHEAD_MAX;
		o->fills -= fills;
		f->state = f->buf ? F_KEPT : F_FAILED;	/* nothing to keep */
		if (f->buf) {
			fetch_keep(f);
		} else {
			LIST_REMOVE(f, hash);
			pthread_cond_broadcast(&o->cond);
		}
		over = fetch_over_locked(f);
	}
	if (!failed) {
		obj_dirty(o);
		fill_consider(o);	/* the last read may have been before */
	}
	if (fills)
		fill_kick();
	if (over)
		fetch_free(f);
	obj_put(o);
}

/* Send an arrived buffer to the cache file, while its readers copy from it.
 * The unaligned end of a file can't be written directly; it goes through the
 * page cache. */
static void
fetch_write(struct fetch *f)
{
	struct obj *o = f->o;

	for (size_t at = 0; conf.cache_checksum && at < f->len; at += o->bs)
		f->sums[at / o->bs] = XXH3_64bits(f->buf + at,
		    MIN(o->bs, f->len - at));
	f->er = (struct exec_req){ .op = EXEC_WRITE, .buf = f->buf,
		.len = f->len, .off = f->off, .done = fetch_written };
	WITH_LOCK(&o->lock)
		if (o->wfd >= 0 && f->len % DIO_ALIGN == 0) {
			f->er.fd = o->wfd;
			f->er.file = o->wfile;
		} else {
			f->er.fd = o->rfd;
		}
	exec_submit(&f->er);
}

/*
 * The backend is done with f: all of f->len is in f->buf, or err (-errno).
 * -ESTALE: the server has another version now, this one can't be completed.
 * Called once for each be->read(), by a thread of the backend.
 */
static void
fetch_arrived(struct fetch *f, int err)
{
	struct obj *o = obj_ref(f->o);	/* others may free f and its own */
	uint64_t blk = f->off / o->bs, n = (f->len + o->bs - 1) / o->bs;
	bool over = false, keep = f->store && !err;

	if (!err)
		fetch_us = (fetch_us * 7 + now_us() - f->born) / 8;
	if (err)
		log_debug("fetch: %" PRIu64 "+%zu of file %" PRIx64 ": %s",
		    f->off, f->len, o->attr.ver.fileid, strerror(-err));
	else
		COUNT(backend_read_bytes, f->len);
	if (!err && f->born_ahead)
		COUNT(prefetched_bytes, f->len);
	if (err && f->store)
		store_settle(o, obj_bytes(o, blk, n), true);
	if (err == -ESTALE)
		name_doubt(o->path, true);
	WITH_LOCK(&o->lock) {
		o->ahead -= f->born_ahead;
		if (!keep)
			o->fills -= f->born_fill;
		f->err = err;
		if (err == -ESTALE)
			o->gone = true;
		if (f->born_fill)
			o->fill_tries = err && err != -EHOSTDOWN ?
			    o->fill_tries + 1 : 0;
		f->state = err ? F_FAILED : keep ? F_ARRIVED : F_KEPT;
		if (f->state == F_FAILED)
			LIST_REMOVE(f, hash);
		else if (f->state == F_KEPT)
			fetch_keep(f);
		over = fetch_over_locked(f);
	}
	pthread_cond_broadcast(&o->cond);	/* who wakes finds it unlocked */
	if (keep && f->buf) {
		fetch_write(f);
	} else if (keep) {
		COUNT(spliced_bytes, f->len);
		f->er.res = (int)f->len;
		fetch_written(&f->er);
	} else if (over) {
		fetch_free(f);
	}
	obj_put(o);
}

/* Reserve room on disk for what f will bring, and have the file to write it
 * to.  0: f->store is set; else it can't be stored, which is counted. */
static int
fetch_reserve(struct fetch *f)
{
	struct obj *o = f->o;
	uint64_t bytes = obj_bytes(o, f->off / o->bs,
	    (f->len + o->bs - 1) / o->bs);
	enum reason why = R_changing;
	int r = o->bypass || o->gone ? -ENOSPC : store_reserve(o, bytes, &why);

	if (!r && (r = obj_create(o))) {
		store_settle(o, bytes, true);
		why = r == -ESTALE ? R_changing : R_degraded;
		if (why == R_degraded)
			store_degrade("create", r);
	}
	f->store = r == 0;
	if (r && !o->bypass) {		/* that one was counted before */
		bypass(why);
		o->fill_why = reason_name[why];
	}
	return r;
}

/*
 * Start fetching the first gap in [off, end) into buf, which has room bytes
 * and becomes the fetch's, or the pool's again; NULL: see struct fetch.  Returns
 * the bytes asked for, 0 = there was no gap any more, or -errno: a fill that
 * could not be stored.
 */
static ssize_t
fetch_start(struct obj *o, uint64_t off, uint64_t end, char *buf, size_t room,
    enum fetch_prio prio)
{
	uint64_t n = (room + o->bs - 1) / o->bs;
	struct fetch *f = calloc(1, sizeof(*f) + n * sizeof(f->sums[0]));
	size_t len = 0;

	WITH_LOCK(&o->lock) {
		if (!o->tab)
			o->tab = calloc(OBJ_BUCKETS, sizeof(*o->tab));
		if (f && o->tab)
			len = fetch_gap_locked(o, &off, MIN(end, off + room));
		if (len) {
			len = MIN(len, room);
			*f = (struct fetch){ .o = o, .off = off, .len = len,
				.room = room, .buf = buf, .prio = prio,
				.born = now_us(),
				.born_ahead = prio == PRIO_AHEAD,
				.born_fill = prio == PRIO_FILL };
			LIST_INSERT_HEAD(fetch_bucket(o, off), f, hash);
			o->ahead += f->born_ahead;
			o->fills += f->born_fill;
		}
	}
	if (!len) {
		n = f && o->tab;
		free(f);
		if (buf)
			pool_put(buf, room);
		return n ? 0 : -ENOMEM;
	}
	obj_ref(o);
	/* Between here and be->read() only this thread may end f. */
	if (fetch_reserve(f) && prio == PRIO_FILL) {
		fetch_arrived(f, -ENOSPC);
		return -ENOSPC;
	}
	be->read(f);
	return (ssize_t)len;
}

/* The end of the block_size region around end: its blocks of up to 1 MiB are
 * fetched apart, but together. */
static uint64_t
fetch_round(const struct obj *o, uint64_t end)
{
	uint64_t b = MAX(conf.cache_block_size, o->bs);

	return MIN(ROUND_UP(end, b), o->attr.ver.size);
}

/* What a reader is expected to want next. */
struct plan {
	uint64_t from, to;		/* this range, or */
	int64_t stride;			/* n more reads like its last one */
	unsigned n;
};

/* s reads no more. */
static void
stream_end(const struct stream *s)
{
	fill.streams -= s->counted;
}

/* The window that s may have: half as much when something of what was fetched
 * for the object was thrown out unread, more again while that does not happen.
 * Sequential readers share half of the pool. */
static uint64_t
stream_most_locked(struct stream *s, const struct obj *o)
{
	uint64_t wasted = o->wasted;

	if (!s->counted)
		fill.streams++;
	s->counted = true;
	s->most = !s->most ? AHEAD_MAX : wasted != s->wasted ?
	    MAX(s->most / 2, MiB) : MIN(s->most + s->most / 16, AHEAD_MAX);
	s->wasted = wasted;
	return MIN(s->most, pool.size / 2 / MAX(fill.streams, 1));
}

/*
 * Note a read of [off, end) and plan what to read ahead.  Sequential: a window
 * that grows with what was read in a row, or up to the length of the row before
 * (tensors, tiles).  The kernel sends the requests of one reader in any order,
 * hence the tolerance.  Else, when the distance
 * between reads repeats (a column of a table, or backwards): so many more as
 * there were.
 */
static struct plan
stream_note(struct stream *s, const struct obj *o, uint64_t off, uint64_t end)
{
	uint64_t window, most;
	struct plan p = { 0 };
	int64_t stride;

	GUARD(&s->lock);
	stride = (int64_t)(off - s->last);
	s->strides = stride && stride == s->stride ? s->strides + 1 : 0;
	s->stride = stride;
	s->last = off;
	if (s->strides >= STRIDE_MIN && (stride < 0 ||
	    (uint64_t)stride > end - off)) {
		most = stream_most_locked(s, o) / MAX(end - off, o->bs);
		p.stride = stride;
		p.n = (unsigned)MIN(MIN(s->strides, STRIDE_MAX), most);
		s->run = s->before = 0;
		s->next = end;
		s->ahead = 0;
		return p;
	}
	if (off <= s->next + MiB && end + 2 * MiB > s->next) {
		s->run += end - off;
	} else {
		s->before = s->run;
		s->run = s->before < 4 * MiB ? 0 : end - off;
		s->ahead = 0;
		s->next = end;
	}
	s->next = MAX(s->next, end);
	if (s->run >= AHEAD_START) {
		window = s->run <= s->before + MiB && s->before ?
		    s->before - MIN(s->run, s->before) :
		    MAX((s->run - s->before) * 2, MiB);
		window = MIN(window, stream_most_locked(s, o));
		p.from = MAX(s->next, s->ahead);
		p.to = s->next + window;
	}
	return p;
}

/* Of how many fetches at a time that nobody waits for, with `most` at best: on
 * a slow link what is wanted now must not wait for them for too long. */
static unsigned
fetch_share(unsigned most)
{
	return (unsigned)MAX(most * (uint64_t)FETCH_SLOW /
	    MAX(fetch_us, FETCH_SLOW), 1);
}

/* Start fetching the first gap in [*from, to), ahead of a reader, and set *from
 * to its end.  Never waits; false: there is none, or no buffer for it now. */
static bool
fetch_ahead_one(struct obj *o, uint64_t *from, uint64_t to)
{
	unsigned most = fetch_share(MAX(conf.nfs_connections * CONN_WINDOW / 2,
	    4));
	size_t size = 0;
	char *buf;

	WITH_LOCK(&o->lock)
		size = o->ahead >= most ? 0 :
		    fetch_gap_locked(o, from, fetch_round(o, to));
	buf = size ? pool_try(size, pool.size / 4) : NULL;
	if (!buf || fetch_start(o, *from, *from + size, buf, size,
	    PRIO_AHEAD) < 0)
		return false;
	*from += size;
	return true;
}

/* Start fetches for what the reader of [off, end) will want next, as far as
 * buffers go round.  Never waits. */
static void
fetch_ahead(struct obj *o, struct stream *s, struct plan p, uint64_t off,
    uint64_t end)
{
	uint64_t size = o->attr.ver.size;

	/* whole READs, but for the end of the file */
	p.to = p.to < size ? p.to / IO_MAX * IO_MAX : size;
	while (p.from < p.to && fetch_ahead_one(o, &p.from, p.to))
		WITH_LOCK(&s->lock)
			s->ahead = MAX(s->ahead, p.from);
	for (; p.n > 0; p.n--) {
		off += (uint64_t)p.stride;	/* wraps below 0: then beyond */
		end += (uint64_t)p.stride;
		for (uint64_t at = off; at < size && at < end;)
			if (!fetch_ahead_one(o, &at, MIN(end, size)))
				break;
	}
}

/* Keep FILL_INFLIGHT fetches of o going.  False when o needs no more. */
static bool
fill_step(struct obj *o)
{
	while (!o->complete && !o->gone && !stopping) {
		bool from_start = o->fill_pos == 0;
		unsigned busy = 0, tries = 0;
		bool copies = be->copies && conf.splice != NO &&
		    !conf.cache_checksum;
		size_t size = 0;
		char *buf = NULL;

		WITH_LOCK(&o->lock) {
			size = fetch_gap_locked(o, &o->fill_pos,
			    o->attr.ver.size);
			tries = o->fill_tries;
			/* a reader that is as fast as the server fetches by
			 * itself, and must not find on disk what could be in
			 * a buffer */
			busy = o->ahead && now_ms() - o->streamed < 200 ?
			    FILL_INFLIGHT : o->fills;
		}
		if (tries >= FILL_TRIES) {
			WITH_LOCK(&o->lock)
				o->fill_tries = 0;	/* for the next fill */
			COUNT(fills_failed, 1);
			return false;
		}
		/* look once more for what failed, or is kept but not stored */
		if (!size) {
			o->fill_pos = 0;
			if (from_start && (busy || !fetch_forget(o, false)))
				return busy > 0;
			continue;
		}
		if (busy >= fetch_share(FILL_INFLIGHT) || backend_down)
			return true;
		/* From file to file the data needs none of our memory, and the
		 * file systems may share it.  If that failed: by a buffer. */
		if ((!copies || tries) &&
		    !(buf = pool_try(size, pool.size / 2)))
			return true;
		if (fetch_start(o, o->fill_pos, o->fill_pos + size, buf, size,
		    PRIO_FILL) < 0)
			return true;	/* eviction may make room */
	}
	return false;
}

/* Called about once a second: the heap that libfuse and libnfs had for a burst
 * of reads goes back to the system when that is over. */
static void
heap_trim(void)
{
	static uint64_t seen, trimmed;
	uint64_t reads = count.daemon_reads;

	if (reads == seen && reads != trimmed) {
		malloc_trim(0);
		trimmed = reads;
	}
	seen = reads;
}

/* Goes round the objects that are being filled. */
static void *
fill_thread(void *arg)
{
	struct fill_list round = STAILQ_HEAD_INITIALIZER(round);
	struct obj *o;

	(void)arg;
	pthread_mutex_lock(&fill.lock);
	for (;;) {
		if (!fill.kicked && !fill.quit && wait_on(&fill.cond,
		    &fill.lock, now_ms() + 1000) == -ETIMEDOUT)
			heap_trim();
		fill.kicked = false;
		STAILQ_CONCAT(&round, &fill.queue);
		if (fill.quit && STAILQ_EMPTY(&round))
			break;
		while ((o = STAILQ_FIRST(&round))) {
			bool more;

			STAILQ_REMOVE_HEAD(&round, fill_next);
			pthread_mutex_unlock(&fill.lock);
			more = fill_step(o);
			pthread_mutex_lock(&fill.lock);
			if (more && !fill.quit) {
				STAILQ_INSERT_TAIL(&fill.queue, o, fill_next);
				continue;
			}
			o->filling = false;
			pthread_mutex_unlock(&fill.lock);
			obj_put(o);
			pthread_mutex_lock(&fill.lock);
		}
	}
	pthread_mutex_unlock(&fill.lock);
	return NULL;
}

static int
fill_start(void)
{
	pool.reclaim = fetch_reclaim;
	return sys_thread(&fill.tid, fill_thread, NULL);
}

static void
fill_stop(void)
{
	WITH_LOCK(&fill.lock)
		fill.quit = true;
	fill_kick();
	if (fill.tid)
		pthread_join(fill.tid, NULL);
}

/* Is there nothing of f to be had yet?  What has no buffer is had from disk. */
static bool
fetch_due_locked(const struct fetch *f)
{
	return f->state == F_QUEUED || (f->state == F_ARRIVED && !f->buf);
}

/* Take a reference on f and wait until it has arrived.  Caller holds o->lock,
 * which is released.  1: it has its bytes; 0: it has none, and the caller
 * starts its own fetch or finds them on disk (a fill that never asked the
 * server, or went from file to file); or -errno. */
static int
fetch_wait_locked(struct fetch *f)
{
	struct obj *o = f->o;
	int r = 0;

	f->refs++;
	if (f->state == F_QUEUED && f->prio > PRIO_DEMAND) {
		f->prio = PRIO_DEMAND;
		pthread_mutex_unlock(&o->lock);
		be->raise(f);
		pthread_mutex_lock(&o->lock);
	}
	while (fetch_due_locked(f) && r != -EINTR)
		r = wait_on(&o->cond, &o->lock, 0);
	r = fetch_due_locked(f) ? -EINTR : f->state == F_FAILED ? f->err : 1;
	if (r != -EINTR && (!f->buf || (r == -ENOSPC && f->born_fill)))
		r = 0;
	pthread_mutex_unlock(&o->lock);
	return r;
}

/* Give that reference back, having read n bytes of f. */
static void
fetch_release(struct fetch *f, size_t n)
{
	bool over = false, idle = false;

	WITH_LOCK(&f->o->lock) {
		f->refs--;
		if (f->born_ahead && f->used < f->len)
			COUNT(prefetch_used_bytes, MIN(n, f->len - f->used));
		f->used += n;
		over = fetch_over_locked(f);
		idle = !over && !f->refs;
	}
	if (idle)			/* it can be reclaimed now */
		WITH_LOCK(&pool.lock)
			pool_wake_locked();
	if (over)
		fetch_free(f);
}

#define LOANS 8

struct loan {				/* a reader's use of buffers */
	unsigned n;
	struct fetch *f[LOANS];
	struct iovec iov[LOANS];
};

static void
loan_return(struct loan *l, bool used)
{
	for (unsigned i = 0; i < l->n; i++)
		fetch_release(l->f[i], used ? l->iov[i].iov_len : 0);
	l->n = 0;
}

/*
 * Lend the reader of [off, end) the buffers of the fetches that have it: l->n
 * of them, for it to give back.  It waits for fetches only, which need no more
 * buffers to arrive.  1; 0: not all is to be had in this way; or -errno.
 */
static int
obj_lend(struct obj *o, uint64_t off, uint64_t end, struct loan *l)
{
	struct fetch *f = NULL;
	int r = 1;

	for (l->n = 0; off < end && r > 0; off = f->off + f->len) {
		pthread_mutex_lock(&o->lock);
		f = l->n < LOANS ? fetch_find_locked(o, off) : NULL;
		if (!f) {
			pthread_mutex_unlock(&o->lock);
			r = 0;
			break;
		}
		r = fetch_wait_locked(f);
		l->f[l->n] = f;
		l->iov[l->n++] = (struct iovec){ f->buf + (off - f->off),
			MIN(end, f->off + f->len) - off };
	}
	if (r <= 0)
		loan_return(l, false);
	return r;
}

/* Bytes from off on that are present on disk, without a gap, up to end. */
static size_t
obj_run_locked(struct obj *o, uint64_t off, uint64_t end)
{
	uint64_t at = off;

	while (at < end && obj_present_locked(o, at))
		at += o->bs - at % o->bs;
	return (size_t)(MIN(at, end) - off);
}

/* The cache file could not be read: its blocks are absent from now on. */
static void
obj_forget(struct obj *o, uint64_t off, size_t len)
{
	WITH_LOCK(&o->lock) {
		for (uint64_t b = off / o->bs; b <= (off + len - 1) / o->bs; b++)
			if (bit_get(o->map, b)) {
				bit_clear(o->map, b);
				if (o->sums)
					bit_clear(o->checked, b);
				o->present--;
			}
		o->complete = false;
	}
	obj_dirty(o);
}

/* Block b of o is not what its checksum says. */
static void
obj_damaged(struct obj *o, uint64_t b)
{
	char p[64];

	COUNT(checksum_errors, 1);
	log_warn("cache: block %" PRIu64 " of object %s is damaged; it is "
	    "fetched again", b, key_path(&o->attr.ver, "", p));
	obj_forget(o, b * o->bs, 1);
}

/*
 * Compare the blocks of [off, off + len), which was read from disk to buf, with
 * their checksums, each once in the life of o; one that is there in part is read
 * whole.  False: some were damaged, and are absent now.
 */
static bool
obj_verify(struct obj *o, const char *buf, uint64_t off, size_t len)
{
	bool good = true;

	for (uint64_t b = off / o->bs; o->sums && b * o->bs < off + len; b++) {
		uint64_t at = b * o->bs, sum = 0;
		size_t n = MIN(o->bs, o->attr.ver.size - at);
		const char *data = buf;
		char *whole = NULL;
		bool ok = false;

		WITH_LOCK(&o->lock) {
			ok = bit_get(o->checked, b);
			sum = o->sums[b];
		}
		if (ok)
			continue;
		if (at < off || at + n > off + len) {
			data = whole = malloc(n);
			ok = !whole || exec_read(o->rfd, whole, n, at) !=
			    (ssize_t)n;		/* another time */
		} else {
			data += at - off;
		}
		if (!ok && XXH3_64bits(data, n) == sum) {
			ok = true;
			WITH_LOCK(&o->lock)
				bit_set(o->checked, b);
		}
		free(whole);
		if (ok)
			continue;
		obj_damaged(o, b);
		good = false;
	}
	return good;
}

/* Start fetches for all gaps of [off, end) while there are buffers. */
static void
fetch_demand(struct obj *o, uint64_t off, uint64_t end)
{
	uint64_t stop = fetch_round(o, end);
	size_t size = 0;
	char *buf;

	off -= off % MAX(conf.cache_block_size, o->bs);
	for (; off < stop && !o->complete; off += size) {
		WITH_LOCK(&o->lock)
			size = fetch_gap_locked(o, &off, stop);
		buf = size ? pool_try(size, 0) : NULL;
		if (!buf || fetch_start(o, off, off + size, buf, size,
		    off < end ? PRIO_DEMAND : PRIO_AHEAD) < 0)
			return;
	}
}

/*
 * One step of obj_read(): some bytes from pos on, from a fetch, from disk, or
 * (0 bytes) by starting the fetch, which is counted in *starts.  Sets *missed
 * when the server was waited for.  Bytes or -errno.
 */
static ssize_t
obj_read_some(struct obj *o, char *buf, uint64_t pos, uint64_t end,
    bool *missed, unsigned *starts)
{
	struct fetch *f;
	uint64_t from = pos - pos % o->bs, to;
	size_t run;
	ssize_t n;
	char *fresh;

	pthread_mutex_lock(&o->lock);
	f = fetch_find_locked(o, pos);
	if (f) {
		n = fetch_wait_locked(f);
		*missed = true;
		if (n > 0) {
			n = (ssize_t)(MIN(end, f->off + f->len) - pos);
			memcpy(buf, f->buf + (pos - f->off), (size_t)n);
			COUNT(miss_bytes, (size_t)n);
		}
		fetch_release(f, (size_t)MAX(n, 0));
		return n;
	}
	run = obj_run_locked(o, pos, end);
	pthread_mutex_unlock(&o->lock);
	if (run) {
		n = exec_read(o->rfd, buf, run, pos);
		if (n != (ssize_t)run) {
			store_degrade("read", n < 0 ? (int)n : -EIO);
			obj_forget(o, pos, run);
		} else if (obj_verify(o, buf, pos, run)) {
			COUNT(hit_bytes, run);
			return n;
		}
		return obj_reopen(o, false);
	}
	if (o->gone)
		return -ESTALE;
	n = obj_reopen(o, false);	/* the cache file may have failed since */
	if (n < 0)
		return n;
	to = MIN(MIN(ROUND_UP(from + 1, IO_MAX), ROUND_UP(end, o->bs)),
	    o->attr.ver.size);
	fresh = pool_get(to - from);
	n = fresh ? fetch_start(o, from, to, fresh, to - from, PRIO_DEMAND) :
	    -EINTR;
	*starts += n > 0;
	return MIN(n, 0);
}

#define VAIN_MAX 100	/* fetches that end before one can wait for them */

/* Read [off, off+size) of o for the open file s: all of it up to the end of
 * the file, or -errno (a short read would mean end of file).  To buf, or, with
 * lent->n set, lent.  May wait for server and disk; callers hold no lock. */
static ssize_t
obj_read(struct obj *o, struct stream *s, char *buf, size_t size, uint64_t off,
    struct loan *lent)
{
	uint64_t end = MIN(off + size, o->attr.ver.size), pos = off;
	uint64_t began = now_us();
	struct plan plan;
	bool missed = false, again = false;
	unsigned starts = 0;
	ssize_t n = 0;

	if (off >= end)
		return 0;
	if (!o->complete) {
		n = obj_reopen(o, false);
		if (n < 0)
			return n;
		fetch_demand(o, off, end);
		o->reading = end;
		plan = stream_note(s, o, off, end);
		if (plan.to > plan.from)
			o->streamed = began / 1000;
		if (plan.to > plan.from || plan.n)
			fetch_ahead(o, s, plan, off, end);
	}
	n = lent ? obj_lend(o, off, end, lent) : 0;
	if (n < 0 && n != -ESTALE)
		return n;
	missed = n > 0;
	if (missed) {
		COUNT(miss_bytes, end - off);
		pos = end;
	}
	for (; pos < end; pos += (size_t)n) {
		n = obj_read_some(o, buf + (pos - off), pos, end, &missed,
		    &starts);
		if (n == -ESTALE && !again) {
			again = true;
			n = obj_reopen(o, true);
		}
		if (n < 0)
			return n;
		if (n > 0)
			starts = 0;
		if (starts > VAIN_MAX)
			return -EIO;
	}
	lat_add(missed ? &lat_miss : &lat_hit, now_us() - began);
	fill_consider(o);
	return (ssize_t)(end - off);
}

/* === fetch ================================================== End === */

/* === scrub: damage found before it is read ================ Begin === */

/*
 * Blocks on disk are compared with their checksums, past the page cache: those
 * of a file when `cachefs verify` asks, and all that is cached, from time to
 * time, at a bounded rate.  The scrubber holds an object for a slice of it at a
 * time, so that it can be evicted; to have been checked is no use of it.
 */
#define SCRUB_SLICE (64 * MiB)
#define SCRUB_BAD 256			/* damaged blocks of a slice, at most */
#define SCRUB_EVERY_MS (24 * 3600 * 1000)	/* from start to start */

static struct {
	pthread_mutex_t lock;
	pthread_cond_t cond;
	pthread_t tid;
	bool quit;
} scrub = { .lock = PTHREAD_MUTEX_INITIALIZER,
	.cond = PTHREAD_COND_INITIALIZER };

/* Wait until then, or the end.  False: it is the end. */
static bool
scrub_pause(uint64_t until)
{
	GUARD(&scrub.lock);
	while (!scrub.quit && wait_on(&scrub.cond, &scrub.lock, until) !=
	    -ETIMEDOUT)
		;
	return !scrub.quit;
}

/* Compare block b of o with what fd, its data file, holds; buf has room for
 * it.  0: it is not there, or has no checksum; 1: good; 2: damaged, and absent
 * now; or -errno: it can't be read. */
static int
scrub_block(struct obj *o, int fd, uint64_t b, char *buf)
{
	size_t len = MIN(o->bs, o->attr.ver.size - b * o->bs);
	uint64_t sum = 0;
	struct fetch *f;
	bool there = false;
	ssize_t n;

	for (int tries = 0; tries < 2; tries++) {
		WITH_LOCK(&o->lock) {
			f = fetch_find_locked(o, b * o->bs);
			there = o->sums && obj_present_locked(o, b * o->bs) &&
			    (!f || (f->state == F_KEPT && f->store));
			sum = there ? o->sums[b] : 0;
		}
		if (!there)
			return 0;
		n = sys_pread(fd, buf, ROUND_UP(len, DIO_ALIGN), b * o->bs);
		if (n < 0)
			return (int)n;
		if ((size_t)n >= len && XXH3_64bits(buf, len) == sum)
			return 1;	/* else it may just have been written */
	}
	obj_damaged(o, b);
	return 2;
}

/* Compare the blocks of o from v->off on, at most a slice, and set v->off to
 * where that ended.  rate: bytes a second, or 0.  Counts in v; bad gets the
 * damaged blocks, SCRUB_BAD at most.  0 or -errno. */
static int
scrub_slice(struct obj *o, uint64_t rate, struct cachefs_verify *v,
    uint64_t *bad)
{
	uint64_t end = MIN(v->off + SCRUB_SLICE, o->attr.ver.size), nbad = 0;
	int fd = key_open(&o->attr.ver, "", O_RDONLY |
	    (conf.direct_io ? O_DIRECT : 0));
	char *buf = NULL;
	int r = 0;

	if (fd == -ENOENT)		/* nothing of it is cached */
		v->off = end;
	if (fd < 0)
		return fd == -ENOENT ? 0 : fd;
	while (r >= 0 && !(buf = pool_try(o->bs, pool.size / 2)))
		if (!scrub_pause(now_ms() + 50))
			r = -EINTR;
	for (; r >= 0 && v->off < end && nbad < SCRUB_BAD; v->off += o->bs) {
		uint64_t before = v->bytes;

		r = stopping ? -EINTR : scrub_block(o, fd, v->off / o->bs, buf);
		if (r > 0)
			v->bytes += MIN(o->bs, o->attr.ver.size - v->off);
		if (r > 1)
			bad[nbad++] = v->off / o->bs;
		if (rate && v->bytes / rate > before / rate &&
		    !scrub_pause(now_ms() + 1000))
			r = -EINTR;
	}
	v->damaged += nbad;
	v->off = MIN(v->off, o->attr.ver.size);
	if (!conf.direct_io)
		posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	if (buf)
		pool_put(buf, o->bs);
	sys_close(&fd);
	return MIN(r, 0);
}

/* The current object of a file, to be checked; NULL: there is none with
 * checksums. */
static struct obj *
scrub_get(const struct version *key)
{
	struct disk_index h;
	struct obj *o = NULL;
	struct ent *e;
	int fd;

	GUARD(key_lock(key));
	WITH_LOCK(&store.lock) {
		e = ent_get_locked(key, false);
		if (!e)
			return NULL;
		o = LIST_FIRST(&e->objs);
		if (o && o->superseded)
			return NULL;
		if (o) {
			o->refs++;
			return o;
		}
	}
	fd = key_open(key, ".idx", O_RDONLY);
	if (fd >= 0 && idx_header(fd, &h) && version_same_file(&h.ver, key) &&
	    h.flags & IDX_SUMS)
		o = obj_get_locked(&(struct attr){ .ver = h.ver }, NULL);
	sys_close(&fd);
	return o;
}

/* Check all of one object, in slices; v: see scrub_slice(). */
static void
scrub_object(const struct version *key, struct cachefs_verify *v)
{
	uint64_t bad[SCRUB_BAD];
	bool more = true;

	for (v->off = 0; more && !stopping;) {
		struct obj *o = scrub_get(key);
		uint64_t before = v->bytes;

		if (!o)
			return;
		more = !scrub_slice(o, conf.cache_scrub, v, bad) &&
		    v->off < o->attr.ver.size && !o->superseded;
		COUNT(scrubbed_bytes, v->bytes - before);
		obj_put(o);
	}
}

/* The files in one bucket of the registry; how many of the room ones. */
static size_t
scrub_bucket(size_t i, struct version *v, size_t room)
{
	struct ent *e;
	size_t n = 0;

	GUARD(&store.lock);
	LIST_FOREACH(e, &store.ents[i], hash)
		if (n < room)
			v[n++] = (struct version){ .fsid = e->fsid,
				.fileid = e->fileid };
	return n;
}

static void *
scrub_thread(void *arg)
{
	static struct version key[1024]; /* [o] more than a bucket ever has */
	struct cachefs_verify v = { 0 };
	uint64_t began;

	(void)arg;
	while (!store.scanned)
		if (!scrub_pause(now_ms() + 100))
			return NULL;
	do {
		began = now_ms();
		for (size_t i = 0; i < STORE_BUCKETS && !stopping; i++) {
			size_t n = scrub_bucket(i, key, 1024);

			while (n > 0 && !stopping)
				scrub_object(&key[--n], &v);
		}
		store_walk(tree.fd, tree_check);
	} while (scrub_pause(began + SCRUB_EVERY_MS));
	return NULL;
}

static int
scrub_start(void)
{
	return conf.cache_scrub ? sys_thread(&scrub.tid, scrub_thread, NULL) :
	    0;
}

static void
scrub_stop(void)
{
	sys_thread_end(scrub.tid, &scrub.lock, &scrub.cond, &scrub.quit);
}

/* One slice of `cachefs verify`: check it, and fetch anew what is damaged.
 * v->err: why a block could not be fetched.  0 or -errno. */
static int
scrub_verify(struct obj *o, struct cachefs_verify *v)
{
	struct stream s = { .lock = PTHREAD_MUTEX_INITIALIZER };
	uint64_t bad[SCRUB_BAD], before = v->damaged;
	bool some = false, sums = false;
	char *buf;
	ssize_t got, n = 0;
	int r;

	WITH_LOCK(&o->lock) {
		some = o->present > 0;
		sums = o->sums != NULL;
	}
	if (!some)
		v->off = o->attr.ver.size;
	r = !some ? 0 : sums ? scrub_slice(o, 0, v, bad) : -EOPNOTSUPP;
	buf = v->damaged > before ? malloc(o->bs) : NULL;
	for (uint64_t i = 0; !r && buf && i < v->damaged - before; i++) {
		got = obj_read(o, &s, buf, o->bs, bad[i] * o->bs, NULL);
		n = MIN(got, n);
	}
	if (n < 0)
		v->err = (int32_t)-n;
	stream_end(&s);
	free(buf);
	return r;
}

/* === scrub ================================================== End === */

/* === bdir: a directory as the backend ===================== Begin === */

/*
 * The directory may be a kernel mount of anything.  Metadata is asked for in
 * place; data is read by a pool of threads, so that a stalled file stalls
 * nobody else and its readers stay killable: there is always a thread for a
 * read that somebody waits for.
 */
struct bfile {
	struct bfile *older;		/* [I] which this one replaced, or NULL */
	int fd;				/* bdir: the source, open */
	char *path;			/* bnfs version 4 */
	struct open4 *open;		/* the same, per connection */
	struct handle fh;		/* bnfs version 3 */
};

static struct {
	int root;			/* [I] O_PATH */
	pthread_mutex_t lock;		/* the rest */
	pthread_cond_t cond;
	TAILQ_HEAD(fetches, fetch) queue;
	unsigned queued, idle, threads;
	unsigned ahead;			/* threads at what nobody waits for */
	bool quit;
	struct { dev_t dev; uint64_t fsid; } devs[256];
	unsigned ndevs;
	cpu_set_t cpus;			/* [I] of this process */
} bdir = { .root = -1, .lock = PTHREAD_MUTEX_INITIALIZER,
	.cond = PTHREAD_COND_INITIALIZER,
	.queue = TAILQ_HEAD_INITIALIZER(bdir.queue) };

/* Close bf, which may be NULL, and those that it replaced. */
static void
bfile_close(struct bfile *bf)
{
	for (struct bfile *older; bf; bf = older) {
		older = bf->older;
		be->close(bf);
	}
}

/* The end of a backend's open(): o has bf for its source from now on, unless
 * err or it has one already that is good; then bf is closed.  Others may still
 * read by the one that it had.  Returns err. */
static int
bfile_settle(struct obj *o, struct bfile *bf, int err)
{
	WITH_LOCK(&o->lock)
		if (!err && (!o->bf || o->gone)) {
			bf->older = o->bf;
			o->bf = bf;
			o->gone = false;
			bf = NULL;
		}
	bfile_close(bf);
	return err;
}

static const char *
bdir_rel(const char *path)
{
	return path[1] ? path + 1 : ".";
}

/*
 * The file system that st_dev stands for, by where below the backend it is
 * mounted: 0 for the backend's own, else the hash of the mount point's path.
 * st_dev itself changes from mount to mount.
 */
static uint64_t
bdir_fsid(const char *path, dev_t dev)
{
	char prefix[PATH_MAX], *p = prefix;
	uint64_t fsid = 0;
	struct stat st;
	bool found;
	int fd;

	WITH_LOCK(&bdir.lock)
		for (unsigned i = 0; i < bdir.ndevs; i++)
			if (bdir.devs[i].dev == dev)
				return bdir.devs[i].fsid;
	if (!fstat(bdir.root, &st) && st.st_dev != dev) {
		snprintf(prefix, sizeof(prefix), "%s/", path);
		for (; (p = strchr(p + 1, '/')); *p = '/') {
			*p = '\0';
			fd = sys_openat(bdir.root, bdir_rel(prefix), O_PATH, 0);
			found = !fstat(fd, &st) && st.st_dev == dev;
			sys_close(&fd);
			if (found)
				break;
		}
		fsid = hash_str(p ? prefix : path);
	}
	GUARD(&bdir.lock);
	if (bdir.ndevs < 256) {
		bdir.devs[bdir.ndevs].dev = dev;
		bdir.devs[bdir.ndevs++].fsid = fsid;
	}
	return fsid;
}

/* Does an error of the file system that is cached say that its server is away?
 * A soft NFS mount says EIO. */
static int
bdir_errno(int r)
{
	switch (-r) {
	case EIO: case ENOTCONN: case ECONNABORTED: case ECONNREFUSED:
	case ECONNRESET: case EHOSTUNREACH: case ENETUNREACH: case ENETDOWN:
	case ETIMEDOUT:
		return -EHOSTDOWN;
	default:
		return r;
	}
}

/* The attributes of path, that is of name in the open fd or, with "", of fd
 * itself.  fd may be an error, which is returned. */
static int
bdir_attr(int fd, const char *name, const char *path, struct attr *a)
{
	struct stat st;

	if (fd < 0)
		return fd;
	if (fstatat(fd, name, &st, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW))
		return -errno;
	*a = (struct attr){
		.ver = { .fsid = bdir_fsid(path, st.st_dev),
			.fileid = st.st_ino, .size = (uint64_t)st.st_size,
			.mtime = nanos(st.st_mtim.tv_sec, st.st_mtim.tv_nsec),
			.ctime = nanos(st.st_ctim.tv_sec, st.st_ctim.tv_nsec) },
		.used = (uint64_t)st.st_blocks * 512, .rdev = st.st_rdev,
		.atime = nanos(st.st_atim.tv_sec, st.st_atim.tv_nsec),
		.mode = st.st_mode, .nlink = (uint32_t)st.st_nlink,
		.uid = st.st_uid, .gid = st.st_gid };
	return 0;
}

static int
bdir_getattr(const char *path, struct attr *a, struct handle *fh)
{
	int fd = sys_openat(bdir.root, bdir_rel(path), O_PATH, 0);
	int r = bdir_attr(fd, "", path, a);

	COUNT(backend_requests, 1);
	fh->len = 0;
	sys_close(&fd);
	return bdir_errno(r);
}

static void
bdir_close(struct bfile *bf)
{
	sys_close(&bf->fd);
	free(bf);
}

/* Open o's source; -ESTALE with *now set if the path has another version. */
static int
bdir_open(struct obj *o, const char *path, struct attr *now)
{
	struct bfile *bf = calloc(1, sizeof(*bf));
	int r;

	if (!bf)
		return -ENOMEM;
	/* O_NONBLOCK: the path may have become a fifo */
	bf->fd = sys_openat(bdir.root, bdir_rel(path), O_RDONLY | O_NONBLOCK |
	    O_NOCTTY, 0);
	if (bf->fd == -EAGAIN)		/* no fifo, but leased: wait */
		bf->fd = sys_openat(bdir.root, bdir_rel(path), O_RDONLY, 0);
	COUNT(backend_requests, 1);
	r = bdir_attr(bf->fd, "", path, now);
	if (!r && !version_same(&now->ver, &o->attr.ver))
		r = -ESTALE;
	return bfile_settle(o, bf, r);
}

/* Copy what f wants from the source to the cache file: by the file systems, or
 * where these differ through a pipe.  Bytes, short at the end of the file, or
 * -errno. */
static ssize_t
bdir_copy(struct fetch *f)
{
	int from = f->o->bf->fd, to = f->o->rfd, p[2] = { -1, -1 };
	off_t in = (off_t)f->off, out = in, end = in + (off_t)f->len;
	ssize_t n = 1;

	while (in < end && n > 0)
		n = copy_file_range(from, &in, to, &out, (size_t)(end - in), 0);
	if (n >= 0 || (errno != EXDEV && errno != EINVAL && errno != ENOSYS &&
	    errno != EOPNOTSUPP))
		return n < 0 ? -errno : in - (off_t)f->off;
	if (pipe2(p, O_CLOEXEC))
		return -errno;
	fcntl(p[1], F_SETPIPE_SZ, (int)IO_MAX);	/* or stays at 64 KiB */
	for (n = 1; in < end && n > 0;) {
		n = splice(from, &in, p[1], NULL, (size_t)(end - in), 0);
		while (n > 0 && out < in)
			n = splice(p[0], NULL, to, &out, (size_t)(in - out), 0);
	}
	n = n < 0 ? -errno : out - (off_t)f->off;
	close(p[0]);
	close(p[1]);
	return n;
}

/* Read what f wants; -ESTALE if the file is not the version it was, before
 * or after. */
static int
bdir_fetch(struct fetch *f)
{
	struct obj *o = f->o;
	ssize_t n = f->buf ? sys_pread(o->bf->fd, f->buf, f->len, f->off) :
	    bdir_copy(f);
	struct attr now = { 0 };
	int r = n < 0 ? (int)n : bdir_attr(o->bf->fd, "", o->path, &now);

	COUNT(backend_requests, 1);
	if (r < 0) {
		COUNT(backend_errors, 1);
		return r;
	}
	if ((size_t)n < f->len)
		return -ESTALE;
	if (now.nlink == 0)		/* unlinking changes the ctime */
		now.ver.ctime = o->attr.ver.ctime;
	return version_same(&now.ver, &o->attr.ver) ? 0 : -ESTALE;
}

/* Take the first of the most urgent READs; NULL: there is none, or what nobody
 * waits for has its share of threads already. */
static struct fetch *
bdir_next_locked(void)
{
	struct fetch *best = TAILQ_FIRST(&bdir.queue), *f;

	TAILQ_FOREACH(f, &bdir.queue, queue)
		if (f->prio < best->prio)
			best = f;
	if (!best || (best->prio > PRIO_DEMAND &&
	    bdir.ahead >= conf.nfs_connections * 2))
		return NULL;
	TAILQ_REMOVE(&bdir.queue, best, queue);
	bdir.queued--;
	return best;
}

static void *
bdir_thread(void *arg)
{
	struct fetch *f;
	bool ahead;

	(void)arg;
	if (conf.fuse_io_uring)		/* who starts us may be bound to one */
		sched_setaffinity(0, sizeof(bdir.cpus), &bdir.cpus);
	pthread_mutex_lock(&bdir.lock);
	while ((f = bdir_next_locked()) || !bdir.quit) {
		if (!f) {
			bdir.idle++;
			pthread_cond_wait(&bdir.cond, &bdir.lock);
			bdir.idle--;
			continue;
		}
		ahead = f->prio > PRIO_DEMAND;
		bdir.ahead += ahead;
		pthread_mutex_unlock(&bdir.lock);
		fetch_arrived(f, stopping ? -EINTR : bdir_fetch(f));
		pthread_mutex_lock(&bdir.lock);
		bdir.ahead -= ahead;
	}
	bdir.threads--;
	pthread_cond_broadcast(&bdir.cond);
	pthread_mutex_unlock(&bdir.lock);
	return NULL;
}

/* Start one more thread; 0 or -errno. */
static int
bdir_spawn_locked(void)
{
	pthread_t tid;
	int r = sys_thread(&tid, bdir_thread, NULL);

	if (!r) {
		pthread_detach(tid);
		bdir.threads++;
	}
	return r;
}

/* A READ was queued, or raised: see to a thread for it. */
static void
bdir_kick_locked(bool demand)
{
	unsigned most = conf.nfs_connections * 2 +
	    (demand ? conf.fuse_threads : 0);

	if (bdir.idle < bdir.queued && bdir.threads < most)
		bdir_spawn_locked();
	pthread_cond_signal(&bdir.cond);
}

static void
bdir_read(struct fetch *f)
{
	GUARD(&bdir.lock);
	TAILQ_INSERT_TAIL(&bdir.queue, f, queue);
	bdir.queued++;
	bdir_kick_locked(f->prio == PRIO_DEMAND);
}

static void
bdir_raise(struct fetch *f)
{
	(void)f;			/* the queue looks at its prio */
	GUARD(&bdir.lock);
	bdir_kick_locked(true);
}

static int
bdir_readdir(const char *path, struct dirlist *l)
{
	int fd = sys_openat(bdir.root, bdir_rel(path), O_RDONLY | O_DIRECTORY,
	    0), r = 0;
	DIR *d = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *e;

	COUNT(backend_requests, 1);
	if (!d) {
		r = fd < 0 ? fd : -errno;
		sys_close(&fd);
		return bdir_errno(r);
	}
	while (!r && (errno = 0, e = readdir(d))) {
		struct attr a;
		char *child;
		int bad;

		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
			continue;
		child = path_join(path, e->d_name);
		if (!child)
			r = -ENOMEM;
		else if ((bad = bdir_attr(fd, e->d_name, child, &a)) != -ENOENT)
			r = dirlist_add(l, e->d_name, bad ? NULL : &a);
		free(child);
	}
	if (!r && errno)
		r = -errno;
	closedir(d);
	return bdir_errno(r);
}

static int
bdir_readlink(const char *path, char *buf, size_t size)
{
	int fd = sys_openat(bdir.root, bdir_rel(path), O_PATH, 0), r = fd;

	COUNT(backend_requests, 1);
	if (fd >= 0) {
		ssize_t n = readlinkat(fd, "", buf, size - 1);

		r = n < 0 ? -errno : 0;
		buf[MAX(n, 0)] = '\0';
	}
	sys_close(&fd);
	return bdir_errno(r);
}

static int
bdir_statfs(struct statvfs *sv)
{
	return fstatvfs(bdir.root, sv) ? -errno : 0;
}

static int
bdir_start(void)
{
	bdir.root = open(conf.nfs_backend, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (bdir.root < 0)
		return fail(-EIO, "backend %s: %s", conf.nfs_backend,
		    strerror(errno));
	return 0;
}

static int
bdir_run(void)
{
	GUARD(&bdir.lock);
	return bdir_spawn_locked();
}

static void
bdir_stop(void)
{
	uint64_t until = now_ms() + HUNG_MS;

	WITH_LOCK(&bdir.lock) {
		bdir.quit = true;
		pthread_cond_broadcast(&bdir.cond);
		while (bdir.threads && wait_on(&bdir.cond, &bdir.lock, until) !=
		    -ETIMEDOUT)
			;
		hung |= bdir.threads > 0;
	}
	if (!hung)
		sys_close(&bdir.root);
}

static const struct backend bdir_backend = { "directory", bdir_start,
	bdir_run, bdir_stop, bdir_getattr, bdir_open, bdir_close, bdir_read,
	true, bdir_raise, bdir_readdir, bdir_readlink, bdir_statfs };

/* === bdir =================================================== End === */

/* === bnfs: NFS by libnfs ================================== Begin === */

/*
 * One thread per connection owns one libnfs context and serves the common
 * queue: metadata first, then reads that somebody waits for, read-ahead,
 * fills; the latter two only while fewer than the connection's window are under
 * way, which grows to CONN_WINDOW while answers come in good time.
 * Version 3 speaks raw RPC by file handle, a LOOKUP being one round trip from
 * its parent's handle, which the names remember.  Version 4 goes by path
 * (one compound) and libnfs's open files.  A lost connection's calls go back
 * to the queue; each has a deadline after which it fails with -EHOSTDOWN.
 * libnfs's own reconnect and timeouts stay off: see NFS.md.
 */
enum call_op { CALL_LOOKUP, CALL_GETATTR, CALL_READDIR, CALL_READLINK,
	CALL_STATFS, CALL_READ, CALL_CLOSE };

/* A file as one connection has it open, version 4.  [o] */
struct open4 {
	struct nfsfh *fh;
	uint64_t epoch;			/* of the connection then */
	SLIST_HEAD(waiting, call) waiting;	/* READs that wait for the OPEN */
};

/* What a call brings. */
struct answer {
	struct attr attr;
	struct handle fh;		/* v3 */
	char *link;			/* allocated */
	struct dirlist list;
	struct statvfs sv;
};

struct call {
	TAILQ_ENTRY(call) queue;	/* bnfs.lock */
	LIST_ENTRY(call) flying;	/* [o] */
	SLIST_ENTRY(call) waiting;	/* [o] */
	enum call_op op;
	struct conn *only;		/* [I] no other can issue it, or NULL */
	struct conn *c;			/* [o] on which it is under way */
	uint64_t deadline, not_before;	/* now_ms() */
	uint64_t sent;			/* [o] the same */
	uint64_t wanted;		/* since when; bnfs.lock, once queued */
	atomic_int refs;		/* caller and connection */
	bool over;			/* bnfs.lock */
	int err;			/* set before over */
	pthread_cond_t cond;
	/* arguments */
	struct handle fh;
	uint64_t id;			/* v3: the number of its file, 0: unknown */
	char *path;			/* v3: a name; v4: the whole path */
	struct fetch *f;
	struct open4 close;
	/* how far it is */
	size_t got;			/* READ: of f->len */
	bool reopened;			/* READ, v4: has been tried again */
	READDIRPLUS3args page;		/* READDIR, v3: where to go on */
	cookie3 mark;			/* where that was, */
	unsigned pages, lap;		/* so many pages ago; at most */
	struct answer ans;
};

struct conn {
	int idx;
	pthread_t tid;
	int wake;			/* eventfd */
	_Atomic enum conn_state { DOWN, MOUNTD, EXPORT, CONNECT, FSINFO, MOUNT,
		UP } state;		/* DOWN and UP: set under bnfs.lock */
	struct nfs_context *nfs;	/* version 4 */
	struct rpc_context *rpc;	/* version 3, or that of nfs */
	uint64_t epoch;			/* counts contexts */
	uint64_t lost_at, retry_at, deadline; /* now_ms() */
	uint64_t heard, up_at;		/* when the server last answered; first */
	unsigned backoff;		/* ms */
	int err;			/* why it must be given up, or 0 */
	char addr[64];			/* the server's, numeric */
	LIST_HEAD(flying, call) flying;	/* issued */
	unsigned nread, window;		/* READs among them; see bnfs_take() */
};

static const char *const conn_state_name[] = { "down", "mountd", "export",
	"connect", "fsinfo", "mount", "up" };

static struct {
	char *host, *export;		/* [I] */
	unsigned version;		/* [I] once started */
	struct conn conn[CONN_MAX];
	pthread_mutex_t lock;		/* the rest; taken under object locks */
	TAILQ_HEAD(calls, call) queue;
	unsigned turn;			/* who is woken next */
	unsigned up;			/* connections in state UP */
	uint64_t silent;		/* now_ms() since when it is, 0: not */
	atomic_bool quit;
	struct handle root;		/* version 3 */
	_Atomic uint64_t readmax;
	_Atomic uint64_t heard;		/* now_ms() of the latest answer */
	_Atomic uint64_t expired;	/* and of the latest lost lease */
} bnfs = { .lock = PTHREAD_MUTEX_INITIALIZER,
	.queue = TAILQ_HEAD_INITIALIZER(bnfs.queue) };

/* Creating contexts and mounting touch unlocked statics of libnfs.  Taken under
 * no other lock; the calls of a context destroyed under it are but queued. */
static pthread_mutex_t libnfs_lock = PTHREAD_MUTEX_INITIALIZER;

/* libnfs 6 renamed the raw calls, and READs into the caller's buffer. */
#ifdef LIBNFS_API_V2
#define RPC(call, ...) (rpc_##call##_task(__VA_ARGS__) != NULL)
#else
#define RPC(call, ...) (rpc_##call##_async(__VA_ARGS__) == 0)
#endif

/*
 * libnfs before 7 takes a length of 2 GiB and more in a reply for a negative
 * one, which fits, and reads (or writes) far from the reply: a broken server
 * could crash us (libnfs issue 308).  The functions libnfs_zdr_* here take the
 * place of its own, which it calls by name, and look first; zdr_COMPOUND4res()
 * looks at what came of it.  Not static for that reason.
 */
static bool
reply_holds(const ZDR *z, uint32_t unit)
{
	uint32_t n;

	if (z->x_op != ZDR_DECODE)
		return true;
	if (z->pos < 0 || z->size - z->pos < (int)sizeof(n))
		return false;
	memcpy(&n, z->buf + z->pos, sizeof(n));
	return ntohl(n) <= ((uint32_t)(z->size - z->pos) - sizeof(n)) / unit;
}

#ifdef LIBNFS_STATIC			/* `make static` has named them so */
#define LIBNFS_OWN(fn) \
	extern typeof(fn) own_##fn; \
	typeof(fn) *const own = own_##fn
#else
/* libnfs's own; called once a process and function, or twice. */
static void *
libnfs_own(const char *name)
{
	void *f = dlsym(RTLD_NEXT, name);

	if (!f)
		log_error("nfs: libnfs has no %s", name);
	return f;
}

#define LIBNFS_OWN(fn) \
	static typeof(fn) *_Atomic found; \
	typeof(fn) *own = found; \
	if (!own) \
		found = own = (typeof(fn) *)libnfs_own(#fn)
#endif

bool_t
libnfs_zdr_bytes(ZDR *z, char **buf, uint32_t *size, uint32_t max)
{
	LIBNFS_OWN(libnfs_zdr_bytes);

#ifndef LIBNFS_API_V2
	if (z->x_op == ZDR_DECODE)
		memset(buf, 0, sizeof(*buf));	/* or a verifier is copied, */
					/* without bounds; perhaps misaligned */
#endif
	return own && reply_holds(z, 1) && own(z, buf, size, max);
}

bool_t
libnfs_zdr_string(ZDR *z, char **s, uint32_t max)
{
	LIBNFS_OWN(libnfs_zdr_string);

	return own && reply_holds(z, 1) && own(z, s, max);
}

bool_t
libnfs_zdr_array(ZDR *z, char **v, uint32_t *n, uint32_t max, uint32_t each,
    zdrproc_t proc)
{
	LIBNFS_OWN(libnfs_zdr_array);

	return own && reply_holds(z, 4) && own(z, v, n, max, each, proc);
}

/* What it decodes lies on the heap, but 4 bytes off where that has 8. */
#define LIBNFS_ALIGNS __attribute__((no_sanitize("alignment")))

/* Is this what libnfs takes it for, the attributes of a file that it asks for?
 * It believes the lengths of owner and group, and looks for a NUL behind them
 * (RFC 7530 5: they come in the order of their numbers). */
LIBNFS_ALIGNS static bool
attrs4_hold(const fattr4 *f)
{
	const char *p = f->attr_vals.attrlist4_val;
	const char *end = p + f->attr_vals.attrlist4_len;
	uint64_t len = 28;		/* type, size, fileid, mode, numlinks */
	uint32_t n;

	for (int i = 0; i < 3; i++) {
		if (len > (size_t)(end - p))
			return false;
		p += len;
		if (i == 2 || end - p < 4 || !memchr(p + 4, '\0',
		    (size_t)(end - p) - 4))
			break;
		memcpy(&n, p, sizeof(n));
		len = 4 + ROUND_UP((uint64_t)ntohl(n), 4);
	}
	return end - p >= 44;		/* space_used and three times */
}

static _Thread_local const struct conn *conn_served; /* by rpc_service() */

/* May the reply be one to STATFS, whose attributes are others? */
static bool
reply_is_statfs(void)
{
	const struct call *k;

	LIST_FOREACH(k, &conn_served->flying, flying)
		if (k->op == CALL_STATFS)
			return true;
	return false;
}

/* Have the text of a link end with a NUL; libnfs counts on one, though it gives
 * a pointer into the reply. */
LIBNFS_ALIGNS static bool
link4_holds(linktext4 *link)
{
	static _Thread_local char text[PATH_MAX + 1];	/* 1 too many tells */
	size_t len = MIN(link->utf8string_len, PATH_MAX);

	if (!link->utf8string_val)
		return false;
	memcpy(text, link->utf8string_val, len);
	text[len] = '\0';
	link->utf8string_val = text;
	return true;
}

/* Is this operation's result what libnfs goes on to use unseen? */
LIBNFS_ALIGNS static bool
result4_holds(nfs_resop4 *r)
{
	const struct entry4 *e;

	switch (r->resop) {
	case OP_GETATTR:
		return reply_is_statfs() || attrs4_hold(&r->nfs_resop4_u.
		    opgetattr.GETATTR4res_u.resok4.obj_attributes);
	case OP_READLINK:
		return link4_holds(&r->nfs_resop4_u.opreadlink.
		    READLINK4res_u.resok4.link);
	case OP_READDIR:
		e = r->nfs_resop4_u.opreaddir.READDIR4res_u.resok4.reply.
		    entries;
		while (e && e->name.utf8string_val && attrs4_hold(&e->attrs))
			e = e->nextentry;
		return !e;
	default:
		return true;
	}
}

/* The same for all of version 4: each operation but the last succeeded, and the
 * last as the whole (RFC 7530 15.2); libnfs looks at the whole only. */
LIBNFS_ALIGNS uint32_t
zdr_COMPOUND4res(ZDR *z, COMPOUND4res *res)
{
	nfs_resop4 *r;
	LIBNFS_OWN(zdr_COMPOUND4res);

	if (!own || !own(z, res))
		return FALSE;
	for (u_int i = 0; z->x_op == ZDR_DECODE &&
	    i < res->resarray.resarray_len; i++) {
		r = &res->resarray.resarray_val[i];
		/* every result begins with its status */
		if (r->nfs_resop4_u.opgetattr.status != (i + 1 <
		    res->resarray.resarray_len ? NFS4_OK : res->status) ||
		    (r->nfs_resop4_u.opgetattr.status == NFS4_OK &&
		    !result4_holds(r)))
			return FALSE;
	}
	return TRUE;
}

static void call_send(struct call *k);

static void
call_put(struct call *k)
{
	if (--k->refs > 0)
		return;
	pthread_cond_destroy(&k->cond);
	free(k->path);
	free(k->ans.link);
	dirlist_free(&k->ans.list);
	free(k);
}

/* A request waits nfs_timeout for a silent server; when it has been silent
 * that long already, only for a connection that comes up at once. */
static struct call *
call_new(enum call_op op, const char *path)
{
	struct call *k = calloc(1, sizeof(*k));
	uint64_t now = now_ms(), timeout = conf.nfs_timeout * 1000;

	if (!k || (path && !(k->path = strdup(path)))) {
		free(k);
		return NULL;
	}
	k->op = op;
	k->refs = 1;
	k->wanted = now;
	pthread_cond_init(&k->cond, NULL);
	WITH_LOCK(&bnfs.lock)
		k->deadline = bnfs.silent ? MAX(bnfs.silent + timeout,
		    now + 300) : now + timeout;
	return k;
}

/* Wake the connection that is to look at the queue: `only` or, when that is
 * NULL, the next one that is up. */
static void
bnfs_wake(struct conn *only)
{
	unsigned n = MAX(conf.nfs_connections, 1);
	struct conn *c = only ? only : &bnfs.conn[0];

	WITH_LOCK(&bnfs.lock)
		for (unsigned i = 0; i < n && !only; i++) {
			c = &bnfs.conn[bnfs.turn++ % n];
			if (c->state == UP)
				break;
		}
	eventfd_write(c->wake, 1);
}

/* Queue k, as the first of its kind or the last, and wake a connection. */
static void
call_queue(struct call *k, bool front)
{
	struct conn *only = k->only;

	WITH_LOCK(&bnfs.lock) {
		if (front)
			TAILQ_INSERT_HEAD(&bnfs.queue, k, queue);
		else
			TAILQ_INSERT_TAIL(&bnfs.queue, k, queue);
	}
	bnfs_wake(only);
}

/* The server has been silent since then.  Caller holds bnfs.lock. */
static void
bnfs_silent_locked(uint64_t since)
{
	if (!bnfs.silent)
		bnfs.silent = since;
	backend_down = true;
}

/* k is over, with err: tell its caller.  Called by the connection's thread,
 * or by whoever expires the queue. */
static void
call_over(struct call *k, int err)
{
	struct fetch *f = k->f;

	WITH_LOCK(&bnfs.lock) {
		if (err == -EHOSTDOWN && !bnfs.up)
			bnfs_silent_locked(now_ms() - conf.nfs_timeout * 1000);
		k->err = err;
		k->over = true;
	}
	pthread_cond_broadcast(&k->cond);	/* who wakes finds it unlocked */
	if (err == -EHOSTDOWN)
		COUNT(backend_errors, 1);
	call_put(k);
	if (f)
		fetch_arrived(f, err);
}

/* k is no longer under way. */
static void
call_land(struct call *k)
{
	LIST_REMOVE(k, flying);
	k->c->nread -= k->op == CALL_READ;
	k->c = NULL;
}

/* The connection broke under k, or the server is busy: again, on any one. */
static void
call_again(struct call *k)
{
	call_land(k);
	if (k->op == CALL_CLOSE)
		call_over(k, -EINTR);
	else
		call_queue(k, true);	/* or bnfs_expire() has it */
}

/* The server answers.  Did it not, before? */
static bool
bnfs_answers(void)
{
	bool was = false;

	WITH_LOCK(&bnfs.lock) {
		bnfs.silent = 0;
		was = atomic_exchange(&backend_down, false);
	}
	if (was)
		tree_forget();
	return was;
}

/* READ k was answered: may more of them be under way at a time, or fewer?  On a
 * slow link they queue behind each other, until all of them are late. */
static void
conn_pace(struct conn *c, const struct call *k)
{
	if (now_ms() - k->sent < conf.nfs_timeout * 1000 / 8)
		c->window = MIN(c->window + 1, CONN_WINDOW);
	else
		c->window = MAX(c->window / 2, 1);
}

/* The server answered k: with err or, if that is 1, with a part of what was
 * asked for, the rest of which is asked for now. */
static void
call_answered(struct call *k, int err)
{
	if (backend_down)
		bnfs_answers();		/* not so silent after all */
	k->c->heard = now_ms();
	bnfs.heard = k->c->heard;
	if (k->op == CALL_READ)
		conn_pace(k->c, k);
	if (err > 0) {
		COUNT(backend_requests, 1);
		call_send(k);
		return;
	}
	call_land(k);
	call_over(k, err);
}

/* Has k waited for too long, when the server was last heard of then?  A slow
 * server is not a silent one: while it answers others, k has twice as long, from
 * `since` on. */
static bool
call_late(const struct call *k, uint64_t heard, uint64_t since)
{
	uint64_t now = now_ms(), timeout = conf.nfs_timeout * 1000;

	return now >= k->deadline && (now >= heard + timeout ||
	    now >= since + 2 * timeout);
}

/* Send k and wait.  0, and its answer is *ans, or -errno.  k is no more the
 * caller's. */
static int
call_wait(struct call *k, struct answer *ans)
{
	int r = 0;

	k->refs++;
	COUNT(backend_requests, 1);
	call_queue(k, false);
	WITH_LOCK(&bnfs.lock) {
		while (!k->over && !r)
			r = wait_on(&k->cond, &bnfs.lock, cur ? cur->until : 0);
		r = k->over ? k->err : r == -ETIMEDOUT ? -EHOSTDOWN : r;
	}
	if (!r) {
		*ans = k->ans;
		k->ans = (struct answer){ 0 };
	}
	call_put(k);
	return r;
}

/* What both versions do with the bytes of a READ: 1 if there is more to come,
 * 0 if k has all, or -ESTALE.  data is NULL if they are in place. */
static int
read_took(struct call *k, const void *data, size_t n)
{
	n = MIN(n, k->f->len - k->got);
	if (n && data)
		memcpy(k->f->buf + k->got, data, n);
	k->got += n;
	return n == 0 ? -ESTALE : k->got < k->f->len;
}

/* a is 0 if a file can have these attributes, else -EIO. */
static int
attr_check(const struct attr *a)
{
	return (a->mode & S_IFMT) && a->ver.size <= INT64_MAX ? 0 : -EIO;
}

static struct nfs_fh3
fh3(const struct handle *h)
{
	struct nfs_fh3 fh;

	fh.data.data_len = h->len;
	fh.data.data_val = (char *)(uintptr_t)h->data;	/* only read */
	return fh;
}

static bool
handle_from(struct handle *h, const char *data, size_t len)
{
	if (len > NFS_FHSIZE)
		return false;
	h->len = (uint8_t)len;
	memcpy(h->data, data, len);
	return true;
}

static struct handle
root3(void)
{
	GUARD(&bnfs.lock);
	return bnfs.root;
}

static int
attr_from3(struct attr *a, const struct fattr3 *f)
{
	static const mode_t type[] = { 0, S_IFREG, S_IFDIR, S_IFBLK, S_IFCHR,
		S_IFLNK, S_IFSOCK, S_IFIFO };

	*a = (struct attr){
		.ver = { .fsid = f->fsid, .fileid = f->fileid, .size = f->size,
			.mtime = nanos(f->mtime.seconds, f->mtime.nseconds),
			.ctime = nanos(f->ctime.seconds, f->ctime.nseconds) },
		.used = f->used,
		.rdev = makedev(f->rdev.specdata1, f->rdev.specdata2),
		.atime = nanos(f->atime.seconds, f->atime.nseconds),
		.mode = (f->mode & 07777) |
		    ((unsigned)f->type < 8 ? type[f->type] : 0),
		.nlink = f->nlink, .uid = f->uid, .gid = f->gid };
	return attr_check(a);
}

static int
status3(int st)
{
	int r;

	if (st == NFS3ERR_STALE || st == NFS3ERR_BADHANDLE)
		return -ESTALE;
	r = st == NFS3ERR_SERVERFAULT ? -EIO : nfsstat3_to_errno(st);
	return r == -ERANGE || r >= 0 ? -EIO : r;	/* no such status */
}

/* Is k's listing endless?  Its place after a page is compared with an earlier
 * one, of which there is a new one after 1, 2, 4... pages (Brent): that finds
 * circles of any length. */
static bool
readdir3_circles(struct call *k)
{
	if (k->page.cookie == k->mark || k->ans.list.n > LIST_MAX)
		return true;
	if (k->pages++ == k->lap) {
		k->mark = k->page.cookie;
		k->lap = 2 * k->lap + 1;
		k->pages = 0;
	}
	return false;
}

/* Read the entries of one READDIRPLUS reply into k.  libnfs aligns them to 4
 * bytes: they are copied out. */
static int
readdir3_took(struct call *k, const READDIRPLUS3resok *ok)
{
	const struct post_op_attr *pa;
	struct entryplus3 e;
	struct attr a;
	int r = 0;

	memcpy(k->page.cookieverf, ok->cookieverf, NFS3_COOKIEVERFSIZE);
	for (const void *p = ok->reply.entries; p && !r; p = e.nextentry) {
		memcpy(&e, p, sizeof(e));
		pa = &e.name_attributes;
		k->page.cookie = e.cookie;
		r = dirlist_add(&k->ans.list, e.name, pa->attributes_follow &&
		    !attr_from3(&a, &pa->post_op_attr_u.attributes) ? &a :
		    NULL);
	}
	if (r || ok->reply.eof)
		return r;
	if (readdir3_circles(k)) {
		log_warn("readdir: the server's listing has no end");
		return -EIO;
	}
	k->deadline = now_ms() + conf.nfs_timeout * 1000;
	return k->refs > 1 ? 1 : -EINTR;	/* if still wanted */
}

static int
read3_same(const struct call *k, const struct fattr3 *f)
{
	struct attr now;

	if (attr_from3(&now, f) || !S_ISREG(now.mode))
		return -EIO;
	return version_same(&now.ver, &k->f->o->attr.ver) ? 0 : -ESTALE;
}

/* Attributes are optional in the reply: then they are asked for, last of all,
 * to know that the bytes are of the version that they are wanted of. */
static int
read3_took(struct call *k, const READ3resok *ok)
{
	const struct post_op_attr *pa = &ok->file_attributes;
	int r = pa->attributes_follow ?
	    read3_same(k, &pa->post_op_attr_u.attributes) : 0;

	if (r)
		return r;
#ifdef LIBNFS_API_V2
	r = read_took(k, NULL, ok->count);
#else
	r = read_took(k, ok->data.data_val, ok->data.data_len);
#endif
	return r ? r : !pa->attributes_follow;
}

/* Take what the server says to k: 0, 1 if more is to be asked, or -errno. */
static int
conn3_took(struct call *k, void *data)
{
	switch (k->op) {
	case CALL_LOOKUP: {
		LOOKUP3resok *ok = &((LOOKUP3res *)data)->LOOKUP3res_u.resok;
		struct post_op_attr *pa = &ok->obj_attributes;

		if (!handle_from(&k->ans.fh, ok->object.data.data_val,
		    ok->object.data.data_len))
			return -EIO;
		if (pa->attributes_follow)
			return attr_from3(&k->ans.attr,
			    &pa->post_op_attr_u.attributes);
		k->op = CALL_GETATTR;
		k->fh = k->ans.fh;
		return 1;
	}
	case CALL_GETATTR:
		k->ans.fh = k->fh;
		return attr_from3(&k->ans.attr, &((GETATTR3res *)data)->
		    GETATTR3res_u.resok.obj_attributes);
	case CALL_READDIR:
		return readdir3_took(k, &((READDIRPLUS3res *)data)->
		    READDIRPLUS3res_u.resok);
	case CALL_READLINK:
		k->ans.link = strdup(((READLINK3res *)data)->
		    READLINK3res_u.resok.data);
		return k->ans.link ? 0 : -ENOMEM;
	case CALL_STATFS: {
		FSSTAT3resok *ok = &((FSSTAT3res *)data)->FSSTAT3res_u.resok;

		k->ans.sv = (struct statvfs){ .f_bsize = 4096, .f_frsize = 4096,
			.f_blocks = ok->tbytes / 4096,
			.f_bfree = ok->fbytes / 4096,
			.f_bavail = ok->abytes / 4096, .f_files = ok->tfiles,
			.f_ffree = ok->ffiles, .f_favail = ok->afiles };
		return 0;
	}
	case CALL_READ:
		return k->got == k->f->len ? read3_same(k,
		    &((GETATTR3res *)data)->GETATTR3res_u.resok.
		    obj_attributes) :
		    read3_took(k, &((READ3res *)data)->READ3res_u.resok);
	default:
		return -EIO;
	}
}

/* The attributes that a reply has, good or bad, of what k's handle stands for;
 * NULL: those of such a call are no matter, or its own result. */
static const struct post_op_attr *
conn3_about(const struct call *k, void *data)
{
	bool good = *(nfsstat3 *)data == NFS3_OK;
	LOOKUP3res *l = data;
	READDIRPLUS3res *d = data;
	READLINK3res *s = data;

	switch (k->op) {
	case CALL_LOOKUP:
		return good ? &l->LOOKUP3res_u.resok.dir_attributes :
		    &l->LOOKUP3res_u.resfail.dir_attributes;
	case CALL_READDIR:
		return good ? &d->READDIRPLUS3res_u.resok.dir_attributes :
		    &d->READDIRPLUS3res_u.resfail.dir_attributes;
	case CALL_READLINK:
		return good ? &s->READLINK3res_u.resok.symlink_attributes :
		    &s->READLINK3res_u.resfail.symlink_attributes;
	default:
		return NULL;
	}
}

/* Does k's handle stand for another file now?  A server that has restarted may
 * give its handles anew: those of FUSE are numbers. */
static bool
conn3_mistook(const struct call *k, void *data)
{
	const struct post_op_attr *pa = k->id ? conn3_about(k, data) : NULL;

	return pa && pa->attributes_follow &&
	    pa->post_op_attr_u.attributes.fileid != k->id;
}

/* The reply to k, version 3.  Runs in c's thread, also while its context is
 * destroyed (status is not success then). */
static void
conn3_reply(struct rpc_context *rpc, int status, void *data, void *arg)
{
	struct call *k = arg;
	nfsstat3 st;

	(void)rpc;
	if (status != RPC_STATUS_SUCCESS || !data) {
		if (status == RPC_STATUS_ERROR)	/* perhaps it was refused */
			k->not_before = now_ms() + 100;
		call_again(k);
		return;
	}
	st = *(nfsstat3 *)data;		/* first in each result */
	if (st == NFS3ERR_JUKEBOX) {
		k->not_before = now_ms() + 200;
		call_again(k);
	} else {
		call_answered(k, conn3_mistook(k, data) ? -ESTALE :
		    st ? status3(st) : conn3_took(k, data));
	}
}

/* Send k, version 3; false if that can't be done. */
static bool
conn3_send(struct rpc_context *rpc, struct call *k)
{
	struct nfs_fh3 fh = fh3(&k->fh);
	LOOKUP3args lookup = { { fh, k->path } };
	READ3args read;

	switch (k->op) {
	case CALL_LOOKUP:
		return RPC(nfs3_lookup, rpc, conn3_reply, &lookup, k);
	case CALL_GETATTR:
		return RPC(nfs3_getattr, rpc, conn3_reply,
		    &(GETATTR3args){ fh }, k);
	case CALL_READDIR:
		k->page.dir = fh;
		k->page.dircount = 64 * KiB;
		k->page.maxcount = 256 * KiB;
		return RPC(nfs3_readdirplus, rpc, conn3_reply, &k->page, k);
	case CALL_READLINK:
		return RPC(nfs3_readlink, rpc, conn3_reply,
		    &(READLINK3args){ fh }, k);
	case CALL_STATFS:
		return RPC(nfs3_fsstat, rpc, conn3_reply,
		    &(FSSTAT3args){ fh }, k);
	case CALL_READ:
		fh = fh3(&k->f->o->bf->fh);
		if (k->got == k->f->len)
			return RPC(nfs3_getattr, rpc, conn3_reply,
			    &(GETATTR3args){ fh }, k);
		read = (READ3args){ fh, k->f->off + k->got,
			(count3)MIN(k->f->len - k->got, bnfs.readmax) };
#ifdef LIBNFS_API_V2
		return RPC(nfs3_read, rpc, conn3_reply, k->f->buf + k->got,
		    read.count, &read, k);
#else
		return RPC(nfs3_read, rpc, conn3_reply, &read, k);
#endif
	default:
		return false;
	}
}

static int
attr_from4(struct attr *a, const struct nfs_stat_64 *s)
{
	*a = (struct attr){
		.ver = { .fsid = s->nfs_dev, .fileid = s->nfs_ino,
			.size = s->nfs_size,
			.mtime = nanos((int64_t)s->nfs_mtime,
			    (int64_t)s->nfs_mtime_nsec),
			.ctime = nanos((int64_t)s->nfs_ctime,
			    (int64_t)s->nfs_ctime_nsec) },
		.used = s->nfs_used, .rdev = s->nfs_rdev,
		.atime = nanos((int64_t)s->nfs_atime,
			(int64_t)s->nfs_atime_nsec),
		.mode = (uint32_t)s->nfs_mode, .nlink = (uint32_t)s->nfs_nlink,
		.uid = (uint32_t)s->nfs_uid, .gid = (uint32_t)s->nfs_gid };
	return attr_check(a);
}

static struct open4 *
open4(const struct call *k)
{
	return &k->f->o->bf->open[k->c->idx];
}

/* Did the connection break, rather than the server answer?  libnfs says EFAULT
 * when it fails all requests of a lost one, and EINTR when it is destroyed. */
static bool
broke4(int err)
{
	return err == -EINTR || err == -EFAULT || err == -ETIMEDOUT ||
	    err == -ECONNRESET || err == -EPIPE;
}

/* k failed or, if err >= 0, was answered, as call_answered() has it.  libnfs
 * says EAGAIN for NFS4ERR_DELAY, and ERANGE for what it knows no errno for: of
 * a READ, that our lease has expired (it does not renew them) or the server is
 * in its grace period; a new context asks for a new one. */
static void
conn4_over(struct call *k, int err)
{
	bool lease = k->op == CALL_READ && err == -ERANGE;
	uint64_t pause = err == -EFAULT ? 50 : k->not_before ? 300 : 0;
	/* of the root: each path is walked from there.  A new mount has it */
	bool stale = k->path && (err == -ESTALE || (err == -EIO &&
	    !k->path[1])) && now_ms() - k->c->up_at > 1000;

	if (!broke4(err) && !lease && !stale && err != -EAGAIN) {
		call_answered(k, err);
		return;
	}
	if (stale)
		k->c->err = -ESTALE;
	if (lease) {			/* then the others' have, too */
		k->c->err = -EKEYEXPIRED;
		bnfs.expired = now_ms();
	}
	k->got = 0;			/* from the start */
	k->reopened = false;
	if (lease || err == -EAGAIN || (k->op == CALL_READ && err == -EFAULT))
		k->not_before = now_ms() + pause;
	call_again(k);
}

/* The reply to k, version 4, unless that is of READ or OPEN. */
static void
conn4_reply(int err, struct nfs_context *nfs, void *data, void *arg)
{
	struct call *k = arg;
	struct nfsdirent *e;

	if (err < 0) {
		conn4_over(k, err);
		return;
	}
	err = 0;
	if (k->op == CALL_READDIR) {
		while (!err && (e = nfs_readdir(nfs, data)))
			err = dirlist_add(&k->ans.list, e->name, NULL);
		nfs_closedir(nfs, data);
	} else if (k->op == CALL_STATFS) {
		k->ans.sv = *(struct statvfs *)data;
	} else if (k->op == CALL_READLINK) {
		k->ans.link = strdup(data);
		err = k->ans.link ? 0 : -ENOMEM;
	} else if (k->op != CALL_CLOSE) {
		err = attr_from4(&k->ans.attr, data);
		/* only if they are still the same after a READ, its bytes are
		 * of the version that was asked for */
		if (k->op == CALL_READ && !version_same(&k->ans.attr.ver,
		    &k->f->o->attr.ver))
			err = -ESTALE;
	}
	call_answered(k, err);
}

static void
conn4_read(int err, struct nfs_context *nfs, void *data, void *arg)
{
	struct call *k = arg;
	int r = err;

#ifdef LIBNFS_API_V2
	data = NULL;
#endif
	if (err < 0 && !broke4(err) && !k->reopened) {
		/* perhaps the server lost the open file's state: open it anew,
		 * once; not from here, where the context may be about to go */
		k->reopened = true;
		open4(k)->fh = NULL;
		call_again(k);
		return;
	}
	if (err >= 0)
		r = read_took(k, data, (size_t)err);
	if (r)
		conn4_over(k, r);
	else if (!open4(k)->fh)		/* another READ has given it up */
		conn4_over(k, -EINTR);
	else if (nfs_fstat64_async(nfs, open4(k)->fh, conn4_reply, k))
		call_answered(k, -ENOMEM);
}

/* This connection has a file open now (or not): go on with the READs that
 * waited for it.  The last of them may take the open4 with it. */
static void
conn4_opened(int err, struct nfs_context *nfs, void *data, void *arg)
{
	struct open4 *op = open4(arg), now = *op;
	struct call *k;

	(void)nfs;
	op->fh = err < 0 ? NULL : data;
	SLIST_INIT(&op->waiting);
	while ((k = SLIST_FIRST(&now.waiting))) {
		SLIST_REMOVE_HEAD(&now.waiting, waiting);
		if (err < 0)
			conn4_over(k, err == -ENOENT ? -ESTALE : err);
		else
			call_send(k);
	}
}

/* READ by an open file, which is opened first. */
static bool
conn4_send_read(struct conn *c, struct call *k)
{
	struct open4 *op = open4(k);

	if (op->epoch != c->epoch)	/* all that went with the old context */
		*op = (struct open4){ .epoch = c->epoch };
	if (op->fh)
#ifdef LIBNFS_API_V2
		return !nfs_pread_async(c->nfs, op->fh, k->f->buf + k->got,
		    MIN(k->f->len - k->got, bnfs.readmax), k->f->off + k->got,
		    conn4_read, k);
#else
		return !nfs_pread_async(c->nfs, op->fh, k->f->off + k->got,
		    MIN(k->f->len - k->got, bnfs.readmax), conn4_read, k);
#endif
	if (SLIST_EMPTY(&op->waiting) && nfs_open_async(c->nfs,
	    k->f->o->bf->path, O_RDONLY | O_NOFOLLOW, conn4_opened, k))
		return false;
	SLIST_INSERT_HEAD(&op->waiting, k, waiting);
	return true;
}

/* Send k on c, version 4; false if that can't be done. */
static bool
conn4_send(struct conn *c, struct call *k)
{
	switch (k->op) {
	case CALL_READDIR:
		return !nfs_opendir_async(c->nfs, k->path, conn4_reply, k);
	case CALL_READLINK:
		return !nfs_readlink_async(c->nfs, k->path, conn4_reply, k);
	case CALL_STATFS:
		return !nfs_statvfs_async(c->nfs, k->path, conn4_reply, k);
	case CALL_READ:
		return conn4_send_read(c, k);
	case CALL_CLOSE:		/* unless it went with its context */
		return k->close.epoch == c->epoch &&
		    !nfs_close_async(c->nfs, k->close.fh, conn4_reply, k);
	default:
		break;
	}
	return !nfs_lstat64_async(c->nfs, k->path, conn4_reply, k);
}

/* Send k, for the first time or once more, on the connection that it has. */
static void
call_send(struct call *k)
{
	k->sent = now_ms();
	if (!(bnfs.version == 4 ? conn4_send(k->c, k) :
	    conn3_send(k->c->rpc, k)))
		call_answered(k, -ENOMEM);
}

/* Give c's context up, whatever its state; its calls are queued again.  why is
 * NULL when the server is there, and c will be up again at once. */
static void
conn_lose(struct conn *c, const char *why)
{
	struct call *k, *next;
	bool others = false;

	if (c->state == UP && !bnfs.quit && why)
		log_warn("nfs: connection %d lost: %s", c->idx, why);
	WITH_LOCK(&bnfs.lock) {
		if (c->state == UP && --bnfs.up == 0 && why)
			bnfs_silent_locked(now_ms());
		c->state = DOWN;
		others = bnfs.up > 0;
	}
	WITH_LOCK(&libnfs_lock) {
		if (c->nfs)
			nfs_destroy_context(c->nfs);
		else if (c->rpc)
			rpc_destroy_context(c->rpc);
	}
	c->nfs = NULL;
	c->rpc = NULL;
	c->epoch++;
	for (k = LIST_FIRST(&c->flying); k; k = next) {	/* not called back */
		next = LIST_NEXT(k, flying);
		call_again(k);
	}
	c->backoff = MIN(MAX(c->backoff * 2, 50), 5000);
	c->lost_at = now_ms();
	c->retry_at = c->lost_at + c->backoff;
	if (others)			/* what c was woken for */
		bnfs_wake(NULL);
}

/* c is connected, to a server that READs up to readmax bytes at once. */
static void
conn_is_up(struct conn *c, uint64_t readmax)
{
	if (readmax >= DIO_ALIGN)
		bnfs.readmax = MIN(IO_MAX, readmax);
	c->backoff = 0;
	c->window = CONN_START;
	c->up_at = c->heard = now_ms();
	bnfs.heard = c->heard;
	WITH_LOCK(&bnfs.lock) {
		c->state = UP;
		bnfs.up++;
	}
	if (c->epoch)
		COUNT(backend_reconnects, 1);
	if (bnfs_answers())
		log_info("nfs: the server answers again");
}

static void conn3_step(struct rpc_context *, int, void *, void *);

/* Connect to mountd (state MOUNTD) or nfsd (CONNECT). */
static bool
conn3_connect(struct conn *c, enum conn_state state)
{
	int program = state == MOUNTD ? MOUNT_PROGRAM : NFS_PROGRAM;
	int port = (int)(state == MOUNTD ? conf.nfs_mount_port : conf.nfs_port);

	c->state = state;
	return !(port ? rpc_connect_port_async(c->rpc, c->addr, port, program,
	    3, conn3_step, c) : rpc_connect_program_async(c->rpc, c->addr,
	    program, 3, conn3_step, c));
}

/* Next step of connecting, version 3: to mountd, MNT, to nfsd, FSINFO. */
static void
conn3_step(struct rpc_context *rpc, int status, void *data, void *arg)
{
	struct conn *c = arg;
	struct mountres3 *m = data;
	FSINFO3res *fs = data;
	struct handle root;
	bool ok = false;

	if (c->state == DOWN || c->state == UP)
		return;			/* being destroyed */
	switch (status == RPC_STATUS_SUCCESS ? c->state : DOWN) {
	case MOUNTD:
		c->state = EXPORT;
		ok = RPC(mount3_mnt, rpc, conn3_step, bnfs.export, c);
		break;
	case EXPORT: {
		fhandle3 *fh = &m->mountres3_u.mountinfo.fhandle;

		if (m->fhs_status != MNT3_OK) {
			c->err = m->fhs_status > 0 && m->fhs_status < 4096 ?
			    -(int)m->fhs_status : -EIO;
			return;
		}
		WITH_LOCK(&bnfs.lock)
			ok = handle_from(&bnfs.root, fh->fhandle3_val,
			    fh->fhandle3_len);
		rpc_disconnect(rpc, "next: nfsd");
		ok = ok && conn3_connect(c, CONNECT);
		break;
	}
	case CONNECT:
		root = root3();
		c->state = FSINFO;
		ok = RPC(nfs3_fsinfo, rpc, conn3_step,
		    &(FSINFO3args){ fh3(&root) }, c);
		break;
	case FSINFO:
		if (fs->status && status3(fs->status) == -ESTALE) {
			WITH_LOCK(&bnfs.lock)
				bnfs.root.len = 0;	/* ask mountd again */
			c->err = -ESTALE;
			return;
		}
		conn_is_up(c, fs->status ? 0 : fs->FSINFO3res_u.resok.rtmax);
		ok = true;
		break;
	default:
		break;
	}
	if (!ok)
		c->err = -EIO;
}

static void
conn4_mounted(int err, struct nfs_context *nfs, void *data, void *arg)
{
	struct conn *c = arg;

	(void)data;
	if (c->state != MOUNT)
		return;			/* being destroyed */
	if (err)
		c->err = err;
	else
		conn_is_up(c, nfs_get_readmax(nfs));
}

/* Mount, version 4, with an identity of our own: connections that share one
 * steal each other's state. */
static bool
conn4_mount(struct conn *c)
{
	char id[128], url[64];
	struct nfs_url *u;

	c->state = MOUNT;
	nfs_set_version(c->nfs, 4);
	if (conf.nfs_port) {		/* 4.0 takes the port by URL only */
		snprintf(url, sizeof(url), "nfs://h/?nfsport=%u",
		    conf.nfs_port);
		u = nfs_parse_url_dir(c->nfs, url);
		if (u)
			nfs_destroy_url(u);
	}
	nfs_set_autoreconnect(c->nfs, 0);
	nfs_set_dircache(c->nfs, 0);
	snprintf(id, sizeof(id), "cachefs %d %d %" PRIu64 " %" PRIu64,
	    (int)getpid(), c->idx, c->epoch, now_us());
	nfs4_set_client_name(c->nfs, id);
	snprintf(id, sizeof(id), "%08" PRIx64, now_us() & 0xffffffff);
	nfs4_set_verifier(c->nfs, id);
	return !nfs_mount_async(c->nfs, c->addr, bnfs.export, conn4_mounted, c);
}

/* Look the server up, outside of libnfs and its lock: that can be slow.  When
 * it fails c keeps the address it has.  0 or EAI_*. */
static int
conn_resolve(struct conn *c)
{
	struct addrinfo *ai, hint = { .ai_socktype = SOCK_STREAM };
	int r = getaddrinfo(bnfs.host, NULL, &hint, &ai);

	if (r)
		return r;
	r = getnameinfo(ai->ai_addr, ai->ai_addrlen, c->addr, sizeof(c->addr),
	    NULL, 0, NI_NUMERICHOST);
	freeaddrinfo(ai);
	return r;
}

/* Start connecting; the callbacks go on from there. */
static void
conn_begin(struct conn *c)
{
	bool ok;

	c->err = 0;
	if (c->epoch || !*c->addr)
		conn_resolve(c);
	c->deadline = now_ms() + conf.nfs_timeout * 1000;
	GUARD(&libnfs_lock);
	if (bnfs.version == 4) {
		c->nfs = nfs_init_context();
		c->rpc = c->nfs ? nfs_get_rpc_context(c->nfs) : NULL;
	} else {
		c->rpc = rpc_init_context();
	}
	if (c->rpc && conf.nfs_uid != geteuid())
		rpc_set_uid(c->rpc, (int)conf.nfs_uid);
	if (c->rpc && conf.nfs_gid != getegid())
		rpc_set_gid(c->rpc, (int)conf.nfs_gid);
	ok = c->rpc && (bnfs.version == 4 ? conn4_mount(c) :
	    conn3_connect(c, root3().len ? CONNECT : MOUNTD));
	if (!ok)
		c->err = -EIO;
}

/* Take the most urgent call that c may issue from the queue or, with NULL, one
 * that has waited for too long.  NULL if there is none. */
static struct call *
bnfs_take(const struct conn *c)
{
	int end = !c || c->nread < c->window ? PRIO_N : PRIO_AHEAD;
	struct call *k = NULL, *best = NULL;	/* NULL: for cppcheck */
	uint64_t now = now_ms();

	GUARD(&bnfs.lock);
	TAILQ_FOREACH(k, &bnfs.queue, queue) {
		bool mine = !k->only || k->only == c;
		/* as it is now: a reader may have raised it */
		int prio = k->f ? (int)k->f->prio : PRIO_META;
		/* what nobody waits for has its turn when it comes */
		bool late = bnfs.quit || call_late(k, k->not_before ? 0 :
		    bnfs.heard, prio < PRIO_AHEAD ? k->wanted : now);

		if (prio < end && (c ? mine && !late && k->not_before <= now :
		    late)) {
			best = k;
			end = prio;
		}
	}
	if (best)
		TAILQ_REMOVE(&bnfs.queue, best, queue);
	return best;
}

/* Fail what has waited in the queue for too long. */
static void
bnfs_expire(void)
{
	struct call *k;

	while ((k = bnfs_take(NULL)))
		call_over(k, bnfs.quit || k->op == CALL_CLOSE ? -EINTR :
		    -EHOSTDOWN);
}

/* One turn of c's event loop, at most `wait` milliseconds. */
static void
conn_turn(struct conn *c, int wait)
{
	struct pollfd p[2] = { { .fd = c->wake, .events = POLLIN },
		{ .fd = -1 } };
	bool late = false;
	eventfd_t drop;
	struct call *k;
	uint64_t now;

	conn_served = c;
	if (c->rpc) {
		p[1].fd = rpc_get_fd(c->rpc);
		p[1].events = (short)rpc_which_events(c->rpc);
	}
	if (poll(p, 2, wait) < 0 && errno != EINTR)
		log_error("nfs: poll: %s", strerror(errno));
	if (p[0].revents) {
		eventfd_read(c->wake, &drop);
		if (c->state == DOWN)	/* somebody wants it up: sooner */
			c->retry_at = MIN(c->retry_at, c->lost_at + 250);
	}
	/* after an error libnfs may have freed what its callbacks want */
	if (p[1].revents && !c->err && rpc_service(c->rpc, p[1].revents) < 0 &&
	    !c->err)
		c->err = -ECONNRESET;
	while (c->state == UP && !c->err && (k = bnfs_take(c))) {
		k->c = c;
		LIST_INSERT_HEAD(&c->flying, k, flying);
		c->nread += k->op == CALL_READ;
		call_send(k);
	}
	now = now_ms();
	LIST_FOREACH(k, &c->flying, flying)
		late |= call_late(k, c->heard, k->sent);
	if (c->state != DOWN && c->state != UP && now >= c->deadline)
		c->err = -ETIMEDOUT;
	if (late) {
		WITH_LOCK(&bnfs.lock)
			bnfs_silent_locked(now - conf.nfs_timeout * 1000);
		conn_lose(c, "no answer in time");
	}
}

static void *
conn_thread(void *arg)
{
	struct conn *c = arg;
	bool idle = false;

	while (!bnfs.quit) {
		if (c->state == UP && !c->err && c->up_at < bnfs.expired)
			c->err = -EKEYEXPIRED;
		if (c->err && c->state != DOWN) {
			if (c->state != UP)
				log_debug("nfs: connection %d: %s: %s", c->idx,
				    conn_state_name[c->state],
				    strerror(-c->err));
			conn_lose(c, c->err == -EKEYEXPIRED ? NULL :
			    c->err == -ESTALE ? "its root handle is stale" :
			    "reset by the server");
		}
		if (c->state == DOWN && now_ms() >= c->retry_at)
			conn_begin(c);
		WITH_LOCK(&bnfs.lock)
			idle = c->state == UP && LIST_EMPTY(&c->flying) &&
			    TAILQ_EMPTY(&bnfs.queue);
		conn_turn(c, idle ? 1000 : 200);
		bnfs_expire();
	}
	conn_lose(c, "shutting down");
	bnfs_expire();
	return NULL;
}

/*
 * Ask the server about path and wait.  Version 4 goes by the path.  Version 3
 * needs its handle or, for the attributes of all but the root, its parent's;
 * one that the names don't know is found the same way first.  fresh: nor do
 * we believe them.  0, with *ans the caller's, or -errno.
 */
static int
bnfs_ask(enum call_op op, const char *path, bool fresh, struct answer *ans)
{
	bool v3 = bnfs.version == 3;
	const char *of = path, *name = path;
	struct handle fh = { 0 };
	uint64_t id = 0;
	char *parent = NULL;
	struct call *k;
	int r = 0;

	if (v3 && op == CALL_GETATTR && path[1]) {
		op = CALL_LOOKUP;
		of = parent = path_parent(path, &name);
		if (!parent)
			return -ENOMEM;
	}
	if (v3 && !of[1]) {
		fh = root3();
	} else if (v3 && (fresh || !name_handle(of, &fh, &id))) {
		uint64_t asked = now_us();

		r = bnfs_ask(CALL_GETATTR, of, fresh, ans);
		if (!r) {
			fh = ans->fh;
			id = ans->attr.ver.fileid;
			name_validated(of, &ans->attr, &fh, asked, NULL);
		}
	}
	free(parent);
	if (r)
		return r;
	k = call_new(op, name);
	if (!k)
		return -ENOMEM;
	k->fh = fh;
	k->id = id;
	return call_wait(k, ans);
}

/* Ask about path; once more from the root if a handle has gone stale. */
static int
bnfs_call(enum call_op op, const char *path, struct answer *ans)
{
	int r = bnfs_ask(op, path, false, ans);

	if (r != -ESTALE || bnfs.version != 3)
		return r;
	name_doubt(path, false);
	return bnfs_ask(op, path, true, ans);
}

static int
bnfs_getattr(const char *path, struct attr *a, struct handle *fh)
{
	struct answer ans = { 0 };
	int r = bnfs_call(CALL_GETATTR, path, &ans);

	if (!r)
		*a = ans.attr;
	*fh = ans.fh;
	return r;
}

/* Forget an open file; nobody reads it any more.  Each connection closes what
 * it opened. */
static void
bnfs_close(struct bfile *bf)
{
	for (unsigned i = 0; bf->open && i < conf.nfs_connections; i++) {
		struct call *k = bf->open[i].fh ? call_new(CALL_CLOSE, NULL) :
		    NULL;

		if (!k)
			continue;
		k->only = &bnfs.conn[i];
		k->close = bf->open[i];
		call_queue(k, false);
	}
	free(bf->open);
	free(bf->path);
	free(bf);
}

/* Nothing is opened on the server yet: version 3 has no OPEN, version 4 does
 * it per connection with the first READ. */
static int
bnfs_open(struct obj *o, const char *path, struct attr *now)
{
	struct bfile *bf = calloc(1, sizeof(*bf));
	uint64_t id;
	int r = 0;

	if (!bf)
		return -ENOMEM;
	if (bnfs.version == 4 && o->bf) {	/* which it opens anew by itself */
		r = -ESTALE;
	} else if (bnfs.version == 4) {
		bf->path = strdup(path);
		bf->open = calloc(conf.nfs_connections, sizeof(*bf->open));
		if (!bf->path || !bf->open)
			r = -ENOMEM;
	} else if (!name_handle(path, &bf->fh, &id)) {
		r = bnfs_getattr(path, now, &bf->fh);
		if (!r && !version_same(&now->ver, &o->attr.ver))
			r = -ESTALE;
	}
	return bfile_settle(o, bf, r);
}

static void
bnfs_read(struct fetch *f)
{
	struct call *k = call_new(CALL_READ, NULL);

	if (!k) {
		fetch_arrived(f, -ENOMEM);
		return;
	}
	k->f = f;
	COUNT(backend_requests, 1);
	call_queue(k, false);
}

static void
bnfs_raise(struct fetch *f)
{
	struct call *k;

	WITH_LOCK(&bnfs.lock)
		TAILQ_FOREACH(k, &bnfs.queue, queue)
			if (k->f == f)
				k->wanted = now_ms();
	bnfs_wake(NULL);
}

static int
bnfs_readdir(const char *path, struct dirlist *l)
{
	struct answer ans;
	int r = bnfs_call(CALL_READDIR, path, &ans);

	if (!r)
		*l = ans.list;
	return r;
}

static int
bnfs_readlink(const char *path, char *buf, size_t size)
{
	struct answer ans;
	int r = bnfs_call(CALL_READLINK, path, &ans);

	if (r)
		return r;
	r = (size_t)snprintf(buf, size, "%s", ans.link) < size ? 0 :
	    -ENAMETOOLONG;
	free(ans.link);
	return r;
}

static int
bnfs_statfs(struct statvfs *sv)
{
	struct answer ans;
	int r = bnfs_call(CALL_STATFS, "/", &ans);

	if (!r)
		*sv = ans.sv;
	return r;
}

/* Split "nfs://host[:port]/export" or "host:/export"; [v6] addresses too.
 * False if it is neither. */
static bool
bnfs_parse(const char *s)
{
	bool url = !strncmp(s, "nfs://", 6);
	const char *host = url ? s + 6 : s, *path = strchr(host, '/');
	const char *end = path ? path - 1 : NULL;	/* of the host */
	size_t len = path ? strlen(path) : 0;
	unsigned port = 0;
	int n = 0;			/* bytes of ":port" */

	if (!path || path == host ||
	    (url ? strchr(s, '?') != NULL : *end != ':'))
		return false;
	if (url) {
		end = host + strcspn(host, *host == '[' ? "]/" : ":/");
		end += *end == ']';
		if (*end == ':' && isdigit((unsigned char)end[1]))
			sscanf(end, ":%5u%n", &port, &n);
		if (end + n != path || (n && (port < 1 || port > 65535)))
			return false;
	}
	if (*host == '[' && *--end != ']')
		return false;
	host += *host == '[';
	if (end <= host)
		return false;
	if (port)
		conf.nfs_port = port;
	while (len > 1 && path[len - 1] == '/')
		len--;
	bnfs.host = strndup(host, (size_t)(end - host));
	bnfs.export = strndup(path, len);
	return bnfs.host && bnfs.export;
}

/* Is the server there, and refuses the export? */
static bool
conn_refused(const struct conn *c)
{
	return c->state == EXPORT || (c->state == MOUNT &&
	    (c->err == -ENOENT || c->err == -EACCES));
}

/* Why the first connection failed, as a sentence. */
static void
bnfs_explain(const struct conn *c)
{
	char at[80] = "its portmapper", *p = at;

	if (bnfs.version == 3 && conf.nfs_mount_port)
		p += sprintf(p, "mount port %u, ", conf.nfs_mount_port);
	if (bnfs.version == 4 || conf.nfs_port)
		sprintf(p, "NFS port %u", conf.nfs_port ? conf.nfs_port : 2049);
	if (c->err == -ETIMEDOUT)
		log_error("backend %s: the server %s did not answer within %u "
		    "seconds", conf.nfs_backend, bnfs.host, conf.nfs_timeout);
	else if (conn_refused(c))
		log_error("backend %s: the server %s does not export %s to us: "
		    "%s", conf.nfs_backend, bnfs.host, bnfs.export,
		    strerror(-c->err));
	else
		log_error("backend %s: cannot connect to the server %s (%s)",
		    conf.nfs_backend, bnfs.host, at);
}

/* Connect once, before anything is mounted; tries version 3, then 4, when
 * that is left open.  0, or after a sentence: -EHOSTDOWN: the server is not
 * there; or -errno. */
static int
bnfs_start(void)
{
	struct conn *c = &bnfs.conn[0];
	int r;

	for (unsigned i = 0; i < conf.nfs_connections; i++) {
		bnfs.conn[i].idx = (int)i;
		bnfs.conn[i].wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (bnfs.conn[i].wake < 0)
			return fail(-errno, "eventfd: %s", strerror(errno));
	}
	r = conn_resolve(c);
	if (r)
		return fail(-EHOSTDOWN, "backend %s: cannot resolve host %s: "
		    "%s", conf.nfs_backend, bnfs.host, gai_strerror(r));
	bnfs.readmax = IO_MAX;
	for (bnfs.version = conf.nfs_version == 2 ? 4 : 3; ; bnfs.version = 4) {
		bool last = conf.nfs_version || bnfs.version == 4;
		bool there;

		conn_begin(c);
		while (c->state != UP && !c->err)
			conn_turn(c, 100);
		if (c->state == UP)
			return 0;
		there = conn_refused(c);
		last |= there;
		if (last)
			bnfs_explain(c);
		conn_lose(c, "");
		if (last)
			return there ? -EIO : -EHOSTDOWN;
		c->epoch = 0;
	}
}

/* Start the connections' threads: the first is up or, if the server is away,
 * none.  0, or -errno after a message. */
static int
bnfs_run(void)
{
	int r = 0;

	if (backend_down) {
		bnfs.readmax = IO_MAX;
		WITH_LOCK(&bnfs.lock)
			bnfs_silent_locked(now_ms());
	}
	log_info("nfs: %s:%s, version %u, %u connections", bnfs.host,
	    bnfs.export, bnfs.version, conf.nfs_connections);
	for (unsigned i = 1; i < conf.nfs_connections; i++)
		memcpy(bnfs.conn[i].addr, bnfs.conn[0].addr,
		    sizeof(bnfs.conn[i].addr));
	for (unsigned i = 0; !r && i < conf.nfs_connections; i++)
		r = sys_thread(&bnfs.conn[i].tid, conn_thread, &bnfs.conn[i]);
	return r;
}

static void
bnfs_stop(void)
{
	bnfs.quit = true;
	for (unsigned i = 0; i < conf.nfs_connections; i++)
		if (bnfs.conn[i].tid) {
			eventfd_write(bnfs.conn[i].wake, 1);
			pthread_join(bnfs.conn[i].tid, NULL);
		}
	for (unsigned i = 0; i < conf.nfs_connections; i++)
		if (bnfs.conn[i].tid)	/* they wake each other until then */
			sys_close(&bnfs.conn[i].wake);
}

static const struct backend bnfs_backend = { "nfs", bnfs_start, bnfs_run,
	bnfs_stop, bnfs_getattr, bnfs_open, bnfs_close, bnfs_read, false,
	bnfs_raise, bnfs_readdir, bnfs_readlink, bnfs_statfs };

/* === bnfs =================================================== End === */

/* === stats: counters as JSON ============================== Begin === */

static uint64_t started_ms;
static const char *_Atomic passthrough_off = "not negotiated"; /* NULL: it is on */

/* The latency in us below which a share of the samples lies. */
static uint64_t
lat_percentile(const struct histogram *h, double share)
{
	uint64_t sum = 0, want;

	for (int i = 0; i < 256; i++)
		sum += h->n[i];
	want = (uint64_t)((double)sum * share);
	for (unsigned i = 0; i < 256; i++) {
		if (sum && want < h->n[i])
			return i < 8 ? i : (uint64_t)(8 + i % 8) << (i / 8 - 1);
		want -= h->n[i];
	}
	return 0;
}

static void
stats_latency(FILE *f, const char *name, const struct histogram *h)
{
	fprintf(f, "\"%s\":{\"p50\":%" PRIu64 ",\"p99\":%" PRIu64 ",\"max\":%"
	    PRIu64 "}", name, lat_percentile(h, 0.5), lat_percentile(h, 0.99),
	    (uint64_t)h->max);
}

/* All statistics (DESIGN 9) as one JSON object; allocated, NULL out of memory.
 * Takes store.lock and pool.lock. */
static char *
stats_json(size_t *len)
{
	const char *off = passthrough_off;
	char *s = NULL;
	FILE *f = open_memstream(&s, len);

	if (!f)
		return NULL;
	fprintf(f, "{\"state\":\"%s\",\"io_engine\":\"%s\",\"passthrough\":"
	    "\"%s%s\",\"uptime_s\":%" PRIu64, backend_down ? "offline" :
	    store.disk ? "degraded" : "online",
	    exec.uring ? "io_uring" : "threads", off ? "off:" : "on",
	    off ? off : "", (now_ms() - started_ms) / 1000);
	WITH_LOCK(&store.lock)
		fprintf(f, ",\"objects\":%" PRIu64 ",\"objects_complete\":%"
		    PRIu64 ",\"cache_used_bytes\":%" PRIu64
		    ",\"cache_limit_bytes\":%" PRIu64, store.nents,
		    store.ncomplete, store.used, (uint64_t)store.limit);
#define X(n) fprintf(f, ",\"" #n "\":%" PRIu64, (uint64_t)count.n);
	COUNTERS(X)
	X(queue_depth_max)
#undef X
	WITH_LOCK(&pool.lock)
		fprintf(f, ",\"buffer_bytes_used\":%zu", pool.used);
	fprintf(f, ",\"bypass\":{");
	for (int i = 0, n = 0; i < R_MAX; i++)
		if (reason_count[i])
			fprintf(f, "%s\"%s\":%" PRIu64, n++ ? "," : "",
			    reason_name[i], (uint64_t)reason_count[i]);
	fprintf(f, "},\"latency_us\":{");
	stats_latency(f, "miss", &lat_miss);
	fputc(',', f);
	stats_latency(f, "hit", &lat_hit);
	fprintf(f, "}}\n");
	return fclose(f) ? NULL : s;
}

/* === stats ================================================== End === */

/* === ops: the FUSE operations ============================= Begin === */

/*
 * The kernel wants all open files of an inode in one mode (KERNEL.md), and a
 * descriptor keeps the version it was opened with.  So a name has one object
 * and one mode while it has open files.  Nor does an inode ever change its
 * version: attributes, pages and what is read would not change together, and
 * replies overtake each other.  A LOOKUP that finds another version, or open
 * files in the way of passthrough, sets the name aside: libfuse moves its node
 * to /.cachefs-aside.N, where the open files live on, and the LOOKUP makes a
 * fresh node.  An OPEN or GETATTR that meets a conflict answers ESTALE; the
 * kernel then repeats it once, with a LOOKUP, and that second try always
 * succeeds.
 */
#define ASIDE_STRIPES 256
#define STATS_ROOM 8192			/* see op_read_path() */
#define TICK_US 50000			/* of a server's clock, at most */

struct file {				/* an open file */
	struct obj *o;			/* [I] NULL: the statistics */
	struct name *n;			/* [I] pinned while open */
	bool passthrough;		/* [I] */
	bool keep;			/* [I] the kernel's pages are right */
	bool moved;			/* [I] its inode showed another version */
	struct stream stream;
	char *text;			/* [I] statistics */
	size_t text_len;
};

struct dir {				/* an open directory */
	char *path;
	bool loaded;
	struct dirlist list;
};

static struct fuse *the_fuse;
static struct fuse_session *session;
static pthread_mutex_t aside_lock[ASIDE_STRIPES];
static _Thread_local const struct attr *aside_for; /* set while we rename */
static _Thread_local struct {		/* the LOOKUP that this worker processes */
	uint64_t parent;
	const char *name;
	pthread_mutex_t *stripe;	/* held until it is answered */
} looking_up;

/* Internal -errno to what an application understands. */
static int
op_errno(int r)
{
	return r == -EHOSTDOWN ? -EIO : r;
}

static void
attr_stat(const struct attr *a, struct stat *st)
{
	*st = (struct stat){ .st_ino = a->ver.fileid, .st_mode = a->mode,
		.st_nlink = a->nlink, .st_uid = a->uid, .st_gid = a->gid,
		.st_rdev = a->rdev, .st_size = (off_t)a->ver.size,
		.st_blksize = 4096, .st_blocks = (blkcnt_t)(a->used / 512),
		.st_atim = nanos_ts(a->atime), .st_mtim = nanos_ts(a->ver.mtime),
		.st_ctim = nanos_ts(a->ver.ctime) };
}

static bool
is_ctl(const char *path)
{
	return !strcmp(path, CTL_DIR) || !strcmp(path, CTL_STATS);
}

/* The server is away: what is known of path, from this run or an earlier one.
 * 0, -ENOENT, or -EHOSTDOWN: nothing, or it may not be served. */
static int
op_offline(const char *path, struct attr *a, bool known)
{
	int r;

	if (!tree_serves())
		return -EHOSTDOWN;
	if (known)
		return 0;
	r = tree_get(path, a, NULL, 0);
	if (r)
		return r;
	GUARD(&names.lock);
	struct name *n = name_find_locked(path, true);
	if (n && !n->answered) {	/* long ago */
		n->attr = *a;
		n->asked = n->answered = 1;
		n->noted = names.era;
	}
	return 0;
}

/*
 * The attributes of path as fresh as the consistency mode wants them: asks
 * the server, unless the mode or its absence lets us use what we know.
 * 0 or -errno (-EHOSTDOWN: unreachable and unknown).
 */
static int
op_validate(const char *path, struct attr *a)
{
	struct handle fh;
	int r = -EIO;

	for (int tries = 0; tries < 8; tries++) {
		uint64_t asked = now_us(), age = 0;
		struct attr fresh;
		bool known = false, news = false;

		WITH_LOCK(&names.lock) {
			struct name *n = name_find_locked(path, false);

			known = n && n->answered && !n->doubt;
			if (known) {
				*a = n->attr;
				age = asked - MIN(n->asked, asked);
			}
		}
		if (backend_down) {
			r = op_offline(path, a, known);
			if (r != -EHOSTDOWN)
				return r;
		} else if (known && (conf.cache_consistency ==
		    CONS_IMMUTABLE || (conf.cache_consistency == CONS_TTL &&
		    age < conf.cache_ttl * UINT64_C(1000000)))) {
			return 0;
		}
		r = be->getattr(path, &fresh, &fh);
		if (r == -ESTALE)
			continue;	/* replaced while it was looked up */
		if (!r && !path[1] && !S_ISDIR(fresh.mode))
			r = -EIO;	/* the kernel would give it up for good */
		if (r == -EHOSTDOWN)
			return op_offline(path, a, known);
		if (r == -ENOENT)
			tree_note_name(path, NULL, NULL);
		if (r)
			return r;
		*a = fresh;
		if (name_validated(path, a, &fh, asked, &news)) {
			if (news)
				tree_note_name(path, a, NULL);
			return 0;
		}
	}
	return r;			/* it changes faster than we can ask */
}

/* May o's data file be handed to the kernel? */
static bool
obj_whole(const struct obj *o)
{
	return o->complete && o->nblk;
}

/* Are complete files given to the kernel?  Not while the cache disk fails: it
 * would give its errors to the readers. */
static bool
passthrough_on(void)
{
	return !passthrough_off && store.disk != DISK_FAILS;
}

/* Can n's inode not be opened in version v as a new open would want it? */
static bool
name_conflict_locked(const struct name *n, const struct version *v)
{
	return n && ((n->told.fileid && !version_same(&n->told, v)) ||
	    (n->opens && n->obj->evicted) ||
	    (n->opens && (obj_whole(n->obj) && passthrough_on()) !=
	    (n->mode == M_PASSTHROUGH)));
}

/* libfuse renames only for us; the kernel never asks on a read-only mount. */
static int
op_rename(const char *from, const char *to, unsigned flags)
{
	struct name *n;
	char *path;

	(void)flags;
	if (!aside_for)
		return -EROFS;
	path = strdup(to);
	if (!path)
		return -ENOMEM;
	GUARD(&names.lock);
	n = name_find_locked(from, false);
	if (!name_conflict_locked(n, &aside_for->ver)) {
		free(path);
		return -EAGAIN;
	}
	*name_slot(from) = n->next;
	free(n->origin);
	n->origin = n->path;
	n->path = path;
	n->next = NULL;
	*name_slot(path) = n;
	COUNT(set_aside, 1);
	return 0;
}

/*
 * Give libfuse a RENAME that the kernel never sent and never hears of (its
 * answer is dropped: no such request), so that the name being looked up gets
 * a fresh node.  Waits for OPENs of the old node that are under way; these
 * take no stripe.  Caller holds the name's stripe.
 */
static void
op_set_aside(const struct attr *a)
{
	static atomic_uint serial;
	struct {
		struct fuse_in_header h;
		struct fuse_rename_in r;
		char names[2 * 256 + 64];
	} m = { 0 };
	size_t len = strlen(looking_up.name) + 1;
	struct fuse_buf fb = { .mem = &m };
	unsigned n = serial++;

	if (len > 256)
		return;
	memcpy(m.names, looking_up.name, len);
	len += (size_t)snprintf(m.names + len, 64, "%s%u", &ASIDE_PREFIX[1],
	    n) + 1;
	fb.size = offsetof(typeof(m), names) + len;
	m.h = (struct fuse_in_header){ .len = (uint32_t)fb.size,
		.opcode = FUSE_RENAME, .nodeid = looking_up.parent,
		.unique = UINT64_C(1) << 62 | (uint64_t)n << 1,
		.uid = getuid(), .gid = getgid(), .pid = (uint32_t)getpid() };
	m.r.newdir = FUSE_ROOT_ID;
	aside_for = a;
	fuse_session_process_buf(session, &fb);
	aside_for = NULL;
}

/*
 * The server shows path as *a: settle what this LOOKUP tells, which may be a
 * later answer to somebody else.  Takes the name's stripe until the LOOKUP is
 * answered: libfuse finds the node after our op has returned, and by then it
 * must not be another one.
 */
static void
op_looked_up(const char *path, struct attr *a)
{
	uint64_t asked = 0, answered = 0;
	struct name *n;
	bool conflict = false;

	looking_up.stripe = &aside_lock[hash_str(path) % ASIDE_STRIPES];
	pthread_mutex_lock(looking_up.stripe);
	WITH_LOCK(&names.lock) {
		n = name_find_locked(path, true);
		if (n && n->answered) {
			*a = n->attr;
			asked = n->asked;
			answered = n->answered;
		}
		conflict = name_conflict_locked(n, &a->ver);
	}
	if (conflict)
		op_set_aside(a);
	GUARD(&names.lock);
	n = name_find_locked(path, true);
	if (n && conflict && !n->answered) {
		n->attr = *a;
		n->asked = asked;	/* it is no younger by that */
		n->answered = answered;
	}
	if (n)
		n->told = S_ISREG(a->mode) ? a->ver : (struct version){ 0 };
	token_leave_locked(path, &a->ver);
}

/* Attributes of the virtual files and of nodes set aside.  1 = none of these;
 * else 0 or -errno. */
static int
op_getattr_special(const char *path, struct stat *st, bool lookup)
{
	struct name *n;

	if (is_ctl(path)) {
		bool dir = !strcmp(path, CTL_DIR);

		*st = (struct stat){ .st_mode = dir ? S_IFDIR | 0555 :
			S_IFREG | 0444, .st_nlink = dir ? 2 : 1,
			.st_uid = geteuid(), .st_gid = getegid(),
			.st_ino = UINT64_MAX - dir };
		if (conf.fuse_no_open && !dir) {	/* read by its size */
			st->st_size = STATS_ROOM;
			clock_gettime(CLOCK_REALTIME, &st->st_mtim);
		}
		return 0;
	}
	if (!path_is_aside(path))
		return 1;
	if (lookup)
		return -ENOENT;
	GUARD(&names.lock);
	n = name_find_locked(path, false);
	if (n)
		attr_stat(n->opens ? &n->obj->attr : &n->attr, st);
	return n ? 0 : -ESTALE;
}

/* Answer a GETATTR with what the inode's open files hold, or what its own
 * LOOKUP has just shown; a second try with what the inode shows by now. */
static bool
op_getattr_known(const char *path, struct stat *st)
{
	struct version seen;
	struct attr a;
	bool retry;

	GUARD(&names.lock);
	struct name *n = name_find_locked(path, false);
	if (n && n->opens) {
		attr_stat(&n->obj->attr, st);
		return true;
	}
	if (!n || !n->told.fileid || !S_ISREG(n->attr.mode) || !cur ||
	    !token_find_locked(path, &seen, &retry))
		return false;
	if (!retry && (!version_same(&seen, &n->told) ||
	    !version_same(&n->attr.ver, &n->told)))
		return false;
	a = n->attr;			/* may be newer than the inode */
	a.ver = n->told;
	attr_stat(&a, st);
	token_slot(hash_str(path))->shown = true;
	return true;
}

/* May an answer that shows version v of path be given to its inode?  Not if
 * that has another one. */
static bool
name_may_show(const char *path, const struct version *v)
{
	GUARD(&names.lock);
	struct name *n = name_find_locked(path, false);
	return !n || !n->told.fileid || version_same(&n->told, v);
}

/* Answer ESTALE to a request on path. */
static int
op_estale(const char *path)
{
	GUARD(&names.lock);
	return token_estale_locked(path);
}

/* The root's attributes.  Who wants to see .cachefs needs them, above all while the
 * server does not answer: a second later those last seen do. */
static int
op_getattr_root(struct attr *a)
{
	struct name *n;
	int r;

	if (cur)
		cur->until = now_ms() + 1000;
	r = op_validate("/", a);
	if (cur)
		cur->until = 0;
	if (r != -EHOSTDOWN)
		return r;
	GUARD(&names.lock);
	n = name_find_locked("/", false);
	if (!n || !n->answered)
		return r;
	*a = n->attr;
	return 0;
}

static int
op_getattr(const char *path, struct stat *st, struct fuse_file_info *fi)
{
	struct file *f = fi ? (struct file *)(uintptr_t)fi->fh : NULL;
	bool lookup = cur && cur->opcode == FUSE_LOOKUP && !fi;
	struct attr a;
	int r;

	if (f && f->o) {
		attr_stat(&f->o->attr, st);
		return 0;
	}
	if (!path || f)
		path = CTL_STATS;
	r = op_getattr_special(path, st, lookup);
	if (r <= 0)
		return r;
	if (!lookup && op_getattr_known(path, st))
		return 0;
	r = path[1] ? op_validate(path, &a) : op_getattr_root(&a);
	if (r && lookup)
		token_failed(path);
	if (r)
		return op_errno(r);
	if (lookup)
		op_looked_up(path, &a);
	else if (S_ISREG(a.mode) && !name_may_show(path, &a.ver))
		return op_estale(path);
	attr_stat(&a, st);
	return 0;
}

/* The backing id for o's data, registered by its first user; -errno when the
 * kernel refuses. */
static int
obj_backing_get(struct obj *o)
{
#if HAVE_PASSTHROUGH
#ifndef FUSE_DEV_IOC_BACKING_OPEN	/* linux/fuse.h before 6.9 */
	struct fuse_backing_map { int32_t fd; uint32_t flags; uint64_t pad; };
#define FUSE_DEV_IOC_BACKING_OPEN _IOW(229, 1, struct fuse_backing_map)
#define FUSE_DEV_IOC_BACKING_CLOSE _IOW(229, 2, uint32_t)
#endif
	GUARD(&o->lock);
	if (!o->backing_users) {
		struct fuse_backing_map m = { .fd = o->rfd };
		int r = ioctl(fuse_session_fd(session),
		    FUSE_DEV_IOC_BACKING_OPEN, &m);

		o->backing_id = r > 0 ? r : r < 0 ? -errno : -EIO;
	}
	if (o->backing_id > 0)
		o->backing_users++;
	return o->backing_id;
#else
	(void)o;
	return -ENOSYS;
#endif
}

static void
obj_backing_put(struct obj *o)
{
#if HAVE_PASSTHROUGH
	GUARD(&o->lock);
	uint32_t id = (uint32_t)o->backing_id;
	if (--o->backing_users == 0 && ioctl(fuse_session_fd(session),
	    FUSE_DEV_IOC_BACKING_CLOSE, &id))
		log_debug("backing close: %s", strerror(errno));
#else
	(void)o;
#endif
}

/* o, which is to be opened, has to be fetched: is it still there?  Asked in the
 * modes that do not ask the server at each open.  Errors as obj_source(). */
static int
open_source(struct obj *o, const char *path, struct attr *now)
{
	uint64_t asked = now_us();
	struct handle fh;
	int r = 0;

	if (conf.cache_consistency >= CONS_TTL) {
		r = be->getattr(path, now, &fh);
		if (!r)
			name_validated(path, now, &fh, asked, NULL);
		if (!r && !version_same(&now->ver, &o->attr.ver))
			r = -ESTALE;
	}
	return r && r != -EHOSTDOWN ? r : obj_source(o, now);
}

/* The object to open for path in version *a, with its source open where it
 * still has to be fetched.  force: when the server has another version by now,
 * take that; else the answer is -ESTALE.  0 or -errno. */
static int
open_object(const char *path, struct attr *a, bool force, struct obj **op)
{
	int r = -ESTALE;

	for (int tries = 0; r == -ESTALE && tries < (force ? 16 : 1); tries++) {
		struct attr now = *a;
		struct obj *o;

		if (!S_ISREG(a->mode))
			return -ESTALE;
		o = obj_get(a, path);
		if (!o)
			return -ENOMEM;
		r = o->complete ? 0 : open_source(o, path, &now);
		if (!r) {
			*op = o;
			return 0;
		}
		obj_put(o);
		*a = now;
	}
	return r;
}

/*
 * Bind an open of o to the name at path, choosing the mode.  force: the
 * kernel's second try, which takes what it finds.  0 with n->opens counted and
 * f filled; -ESTALE; or -EAGAIN with *other, whose reference is the caller's,
 * to be bound instead of o.
 */
static int
open_bind(const char *path, struct obj *o, bool force, struct file *f,
    struct obj **other)
{
	bool pt = obj_whole(o) && passthrough_on();
	struct name *n;
	int r = 0;

	if (pt && obj_backing_get(o) < 0) {
		bypass(R_passthrough_refused);
		pt = false;
	}
	WITH_LOCK(&names.lock) {
		n = name_find_locked(path, true);
		/* made whole meanwhile: registered by who has it open */
		if (n && n->opens && n->obj == o && n->mode == M_PASSTHROUGH &&
		    !pt && (force || obj_whole(o)))
			pt = obj_backing_get(o) > 0;
		if (!n) {
			r = -ENOMEM;
		} else if (n->opens && n->obj != o && force) {
			*other = obj_ref(n->obj);
			r = -EAGAIN;
		} else if (n->opens && (n->obj != o || (n->mode ==
		    M_PASSTHROUGH ? !pt : pt && !force &&
		    !path_is_aside(path)))) {
			r = -ESTALE;	/* the LOOKUP to come makes room */
		} else {
			if (!n->opens++) {
				name_busy_locked(n);
				n->obj = obj_ref(o);
				n->mode = pt ? M_PASSTHROUGH : M_BUFFERED;
			}
			f->n = n;
			f->o = o;
			f->passthrough = n->mode == M_PASSTHROUGH;
			f->moved = !version_same(&n->told, &o->attr.ver);
			f->keep = !f->passthrough &&
			    version_same(&n->pages, &o->attr.ver);
			if (!f->passthrough)
				n->pages = o->attr.ver;
			n->told = o->attr.ver;
		}
	}
	if (pt && (r || !f->passthrough))
		obj_backing_put(o);
	return r;
}

/*
 * What an OPEN of path may start from: what its own LOOKUP showed, or else the
 * server's version if that is what the inode has.  *force: this is the
 * kernel's second try, or nobody remembers what the inode shows; then it may
 * also change its version in place.  0, -ESTALE or -errno.
 */
static int
open_version(const char *path, const char *origin, struct attr *a, bool *force)
{
	struct version seen;
	struct name *n;
	bool token = false;
	int r;

	WITH_LOCK(&names.lock) {
		token = token_find_locked(origin, &seen, force);
		if (token || *force)	/* an OPEN uses it up */
			*token_slot(hash_str(origin)) = (struct token){ 0 };
		n = name_find_locked(path, false);
		if (token && n && version_same(&seen, &n->told) &&
		    (n->opens || version_same(&n->attr.ver, &seen))) {
			*a = n->opens ? n->obj->attr : n->attr;
			return 0;
		}
	}
	r = token && !*force ? -ESTALE : op_validate(origin, a);
	/* with strict each OPEN has a LOOKUP before it, however old */
	if (r || (*force && (token || conf.cache_consistency == CONS_STRICT)))
		return r;
	GUARD(&names.lock);
	n = name_find_locked(path, false);
	if (n && n->told.fileid && (n->opens || !*force))
		return version_same(&n->told, &a->ver) ? 0 : -ESTALE;
	*force = true;
	return 0;
}

/* The server's path of what the kernel knows as path; allocated, or NULL. */
static char *
op_origin(const char *path)
{
	struct name *n;

	if (!path_is_aside(path))
		return strdup(path);
	GUARD(&names.lock);
	n = name_find_locked(path, false);
	return n && n->origin ? strdup(n->origin) : NULL;
}

static int
op_open_stats(struct fuse_file_info *fi)
{
	struct file *f = calloc(1, sizeof(*f));

	if (!f || !(f->text = stats_json(&f->text_len))) {
		free(f);
		return -ENOMEM;
	}
	fi->fh = (uintptr_t)f;
	fi->direct_io = 1;
	return 0;
}

static int
op_open(const char *path, struct fuse_file_info *fi)
{
	char *origin;
	struct file *f;
	struct obj *o = NULL, *other;
	struct attr a;
	bool force;
	int r;

	if ((fi->flags & O_ACCMODE) != O_RDONLY)
		return -EROFS;
	if (conf.fuse_no_open)
		return -ENOSYS;		/* that was the last one */
	if (!strcmp(path, CTL_STATS))
		return op_open_stats(fi);
	origin = op_origin(path);
	if (!origin)
		return -ESTALE;
	f = calloc(1, sizeof(*f));
	r = f ? open_version(path, origin, &a, &force) : -ENOMEM;
	if (!r)
		r = open_object(origin, &a, force, &o);
	while (!r && (r = open_bind(path, o, force, f, &other)) == -EAGAIN) {
		obj_put(o);
		o = other;
		r = 0;
	}
	if (r == -ESTALE)
		op_estale(origin);
	free(origin);
	if (r) {
		if (o)
			obj_put(o);
		free(f);
		return op_errno(r);
	}
	pthread_mutex_init(&f->stream.lock, NULL);
	fi->fh = (uintptr_t)f;
#if HAVE_PASSTHROUGH
	if (f->passthrough)
		fi->backing_id = o->backing_id;
#endif
	fi->keep_cache = f->keep;
	if (f->passthrough) {
		COUNT(opens_passthrough, 1);
	} else {
		COUNT(opens_buffered, 1);
		bypass(!o->complete ? R_partial : passthrough_on() ?
		    R_open_buffered : R_passthrough_off);
	}
	if (f->moved) {		/* its size, above all */
		fuse_lowlevel_notify_inval_inode(session, cur->nodeid, -1, 0);
		fi->direct_io = !f->passthrough;
	}
	if (conf.cache_fill == 0)
		fill_consider(o);
	ANSWERING();
	return 0;
}

static int
op_release(const char *path, struct fuse_file_info *fi)
{
	struct file *f = (struct file *)(uintptr_t)fi->fh;
	struct obj *o = NULL;

	(void)path;
	if (f->o) {
		WITH_LOCK(&names.lock)
			if (--f->n->opens == 0) {
				o = f->n->obj;
				f->n->obj = NULL;
				f->n->mode = M_NONE;
				name_idle_locked(f->n);
			}
		if (f->passthrough)
			obj_backing_put(f->o);
		stream_end(&f->stream);
		pthread_mutex_destroy(&f->stream.lock);
		obj_used(f->o);
		obj_put(f->o);
		if (o)
			obj_put(o);
	}
	free(f->text);
	free(f);
	return 0;
}

static _Atomic uint64_t stats_node;	/* of which the kernel keeps pages */

/* Called about once a second: statistics that were read without an open, and
 * so through the page cache, are old now. */
static void
op_stats_age(void)
{
	uint64_t node = atomic_exchange(&stats_node, 0);

	if (node)
		fuse_lowlevel_notify_inval_inode(session, node, 0, 0);
}

/* A read of a file that the kernel has opened by itself (fuse_no_open).  The
 * statistics are padded to a size that can be told beforehand. */
static ssize_t
op_read_path(const char *path, char *buf, size_t size, uint64_t off)
{
	struct stream s = { .lock = PTHREAD_MUTEX_INITIALIZER };
	char text[STATS_ROOM], *json;
	struct attr a;
	struct obj *o;
	size_t len;
	ssize_t n;

	if (is_ctl(path)) {
		stats_node = cur->nodeid;
		json = stats_json(&len);
		snprintf(text, sizeof(text), "%-*s", STATS_ROOM - 1,
		    json ? json : "");
		free(json);
		text[STATS_ROOM - 1] = '\n';
		n = off < STATS_ROOM ? (ssize_t)MIN(size, STATS_ROOM - off) : 0;
		memcpy(buf, text + off, (size_t)n);
		return n;
	}
	COUNT(daemon_reads, 1);
	n = op_validate(path, &a);
	if (n)
		return n;
	o = obj_get(&a, path);
	if (!o)
		return -ENOMEM;
	n = obj_read(o, &s, buf, size, off, NULL);
	stream_end(&s);
	obj_used(o);
	obj_put(o);
	return n;
}

static int
op_read(const char *path, char *buf, size_t size, off_t off,
    struct fuse_file_info *fi)
{
	struct file *f = (struct file *)(uintptr_t)fi->fh;

	if (!f)
		return op_errno((int)op_read_path(path, buf, size,
		    (uint64_t)off));
	if (!f->o) {
		size_t n = (size_t)off < f->text_len ? MIN(size, f->text_len -
		    (size_t)off) : 0;

		if (n)
			memcpy(buf, f->text + off, n);
		return (int)n;
	}
	COUNT(daemon_reads, 1);		/* from a ring; else see op_read_open() */
	return op_errno((int)obj_read(f->o, &f->stream, buf, size,
	    (uint64_t)off, NULL));
}

/* Answer a request with the n bytes in data's cnt pieces, or n = -errno. */
static void
op_reply(uint64_t unique, const struct iovec *data, unsigned cnt, ssize_t n)
{
	struct fuse_out_header h = { .unique = unique,
		.len = (uint32_t)(sizeof(h) + (size_t)MAX(n, 0)),
		.error = (int32_t)MIN(n, 0) };
	struct iovec iov[1 + LOANS] = { { &h, sizeof(h) } };

	memcpy(iov + 1, data, cnt * sizeof(*iov));
	ANSWERING();
	if (writev(fuse_session_fd(session), iov, n > 0 ? 1 + (int)cnt : 1) < 0
	    && errno != ENOENT && n > 0)   /* ENOENT: nobody waits any more */
		op_reply(unique, data, 0, -errno);
}

/*
 * READs of open files are answered past libfuse, which would have a copy of
 * them first: a fifth of what a cold read costs.  False: this is none.
 */
static bool
op_read_open(const struct fuse_in_header *h)
{
	const struct fuse_read_in *in = (const void *)(h + 1);
	struct file *f = (struct file *)(uintptr_t)in->fh;
	struct loan lent = { 0 };
	struct iovec whole;
	char *buf;
	ssize_t n;

	if (h->opcode != FUSE_READ || !f || !f->o)
		return false;
	COUNT(daemon_reads, 1);
	buf = malloc(in->size);
	n = buf ? obj_read(f->o, &f->stream, buf, in->size, in->offset,
	    &lent) : -ENOMEM;
	whole = (struct iovec){ buf, (size_t)MAX(n, 0) };
	op_reply(h->unique, lent.n ? lent.iov : &whole, MAX(lent.n, 1),
	    n < 0 ? op_errno((int)n) : n);
	loan_return(&lent, true);
	free(buf);
	return true;
}

/* Is the listing that the kernel may have of path the whole one of version v?
 * Else it takes a new one.  Several changes within one tick of the server's
 * clock look alike: only what is listed later than that is known to be whole. */
static bool
dir_unchanged(const char *path, const struct version *v)
{
	uint64_t now = now_us();

	GUARD(&names.lock);
	struct name *n = name_find_locked(path, true);
	if (!n)
		return false;
	if (!version_same(&n->pages, v))
		n->seen = n->listed = now;
	n->pages = *v;
	if (n->listed - n->seen >= TICK_US)
		return true;
	n->listed = now;
	return false;
}

/* The kernel keeps listings, and asks at each opendir if they are still right.
 * What has been looked up just now need not be asked for again. */
static int
op_opendir(const char *path, struct fuse_file_info *fi)
{
	struct dir *d = calloc(1, sizeof(*d));
	bool fresh = false;
	struct attr a;

	if (!d || !(d->path = strdup(path))) {
		free(d);
		return -ENOMEM;
	}
	fi->fh = (uintptr_t)d;
	if (is_ctl(path))
		return 0;
	WITH_LOCK(&names.lock) {
		struct name *n = name_find_locked(path, false);

		fresh = n && n->answered &&
		    conf.cache_consistency != CONS_STRICT &&
		    now_us() - n->answered < TOKEN_MS * UINT64_C(1000);
		if (fresh)
			a = n->attr;
	}
	if (!fresh && op_validate(path, &a))
		return 0;		/* readdir will say what is wrong */
	fi->cache_readdir = 1;
	fi->keep_cache = dir_unchanged(path, &a.ver);
	return 0;
}

static int
op_releasedir(const char *path, struct fuse_file_info *fi)
{
	struct dir *d = (struct dir *)(uintptr_t)fi->fh;

	(void)path;
	dirlist_free(&d->list);
	free(d->path);
	free(d);
	return 0;
}

/* May READDIRPLUS tell the kernel these attributes of path?  Not where the
 * inode has another version. */
static bool
readdir_may_tell(const char *path, const struct attr *a)
{
	GUARD(&names.lock);
	struct name *n = name_find_locked(path, true);
	bool ok = n && (!n->told.fileid || version_same(&n->told, &a->ver));

	if (ok && S_ISREG(a->mode))
		n->told = a->ver;
	return ok;
}

/* Give libfuse the entry e, the next one being at off.  Takes the name's
 * stripe, so that a LOOKUP does not make another node of it in between.  False
 * when there is no room left. */
static bool
readdir_tell(const struct dir *d, const struct dirent_plus *e, bool plus,
    void *buf, fuse_fill_dir_t fn, off_t off)
{
	char *path = path_join(d->path, e->name);
	struct stat st;
	bool full;

	attr_stat(&e->attr, &st);
	if (!path)
		return !fn(buf, e->name, NULL, off, 0);
	GUARD(&aside_lock[hash_str(path) % ASIDE_STRIPES]);
	plus = plus && e->have_attr && readdir_may_tell(path, &e->attr);
	full = fn(buf, e->name, e->have_attr ? &st : NULL, off,
	    plus ? FUSE_FILL_DIR_PLUS : 0);
	free(path);
	return !full;
}

/* The names of d, from the server or as they were when it was there; these the
 * kernel may not take for those of the version that it knows.  0 or -errno. */
static int
dir_load(struct dir *d)
{
	int r = backend_down ? tree_list(d->path, &d->list) : -EHOSTDOWN;
	bool known = !r;

	if (!known)
		r = be->readdir(d->path, &d->list);
	if (!known && !r)
		tree_note_list(d->path, &d->list);
	if (r == -EHOSTDOWN)
		known = !(r = tree_list(d->path, &d->list));
	GUARD(&names.lock);
	struct name *n = known ? name_find_locked(d->path, false) : NULL;
	if (n)
		n->pages = (struct version){ 0 };
	return r;
}

/* Offsets are positions in the listing taken at the first call (or rewind);
 * 0 and 1 are . and .. . */
static int
op_readdir(const char *path, void *buf, fuse_fill_dir_t fn, off_t off,
    struct fuse_file_info *fi, enum fuse_readdir_flags flags)
{
	struct dir *d = (struct dir *)(uintptr_t)fi->fh;
	int r;

	(void)path;
	if (!strcmp(d->path, CTL_DIR)) {
		d->loaded = true;
	} else if (!d->loaded || off == 0) {
		dirlist_free(&d->list);
		r = dir_load(d);
		if (r)
			return op_errno(r);
		d->loaded = true;
	}
	for (size_t i = (size_t)off; i < d->list.n + 2; i++) {
		const struct dirent_plus *e = i < 2 ? NULL : &d->list.v[i - 2];

		if (e ? !readdir_tell(d, e, flags & FUSE_READDIR_PLUS, buf, fn,
		    (off_t)i + 1) :
		    fn(buf, i ? ".." : ".", NULL, (off_t)i + 1, 0))
			break;
	}
	return 0;
}

static int
op_readlink(const char *path, char *buf, size_t size)
{
	int r = -EHOSTDOWN;

	size = MIN(size, PATH_MAX);	/* libfuse gives more than it can send */
	if (backend_down)
		r = tree_get(path, NULL, buf, size);
	if (r != -EHOSTDOWN)
		return r;
	r = be->readlink(path, buf, size);
	if (!r)
		tree_note_name(path, NULL, buf);
	if (r == -EHOSTDOWN)
		r = tree_get(path, NULL, buf, size);
	return op_errno(r);
}

/* While the server is away: as it was. */
static int
op_statfs(const char *path, struct statvfs *sv)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	static struct statvfs last;
	int r;

	(void)path;
	memset(sv, 0, sizeof(*sv));
	r = be->statfs(sv);
	GUARD(&lock);
	if (r == -EHOSTDOWN && tree_serves()) {
		*sv = last;
		r = 0;
	}
	sv->f_namemax = 255;
	last = *sv;
	return op_errno(r);
}

/* The object of a path as it is known now, for the xattrs; NULL: none, or *err.
 * That of a node set aside is ESTALE: the kernel looks its name up anew. */
static struct obj *
op_object(const char *path, int *err)
{
	struct attr a;
	struct obj *o = NULL;

	WITH_LOCK(&names.lock) {
		struct name *n = name_find_locked(path, false);

		if (n && n->opens)
			o = obj_ref(n->obj);
	}
	if (o || is_ctl(path))
		return o;
	*err = path_is_aside(path) ? -ESTALE :
	    op_errno(op_validate(path, &a));
	/* to be looked at is no use of it */
	return *err || !S_ISREG(a.mode) ? NULL : obj_get(&a, NULL);
}

static const char *const object_words[] = { "state", "cached", "pinned" };

/* What the xattrs say of o, word by word as in object_words[], then when it was
 * used last: user.cachefs, for `cachefs ls`.  Its length. */
static int
object_text(struct obj *o, char *text, size_t size)
{
	/* who has one open that was evicted has it still; the cache has not */
	uint64_t present = o->superseded ? 0 : obj_present(o);
	struct stat st;
	char p[64];

	if (o->used || fstatat(store.objects, key_path(&o->attr.ver, ".idx", p),
	    &st, AT_SYMLINK_NOFOLLOW))
		st.st_mtime = (time_t)o->used;
	return snprintf(text, size, "%s %" PRIu64 " %d %" PRId64,
	    present == o->nblk ? "complete" : present ? "partial" : "absent",
	    MIN(present * o->bs, o->attr.ver.size), o->pinned,
	    (int64_t)st.st_mtime);
}

static int
op_getxattr(const char *path, const char *name, char *value, size_t size)
{
	static const char ours[] = "user.cachefs";
	const char *sub = name + strlen(ours);
	char text[100], *word = text, *rest = text;
	struct obj *o;
	int n, err = 0;

	if (strncmp(name, ours, strlen(ours)))
		return -ENODATA;
	o = op_object(path, &err);
	if (!o)
		return err ? err : -ENODATA;
	n = object_text(o, text, sizeof(text));
	obj_put(o);
	if (*sub) {
		n = -ENODATA;
		for (int i = 0; n < 0 && i < 3; i++) {
			word = strsep(&rest, " ");
			if (*sub == '.' && !strcmp(sub + 1, object_words[i]))
				n = (int)strlen(word);
		}
	}
	if (n >= 0 && size && size < (size_t)n)
		return -ERANGE;
	if (n >= 0 && size)
		memcpy(value, word, (size_t)n);
	return n;
}

static int
op_listxattr(const char *path, char *list, size_t size)
{
	static const char all[] = "user.cachefs.state\0user.cachefs.cached\0"
	    "user.cachefs.pinned";
	struct obj *o;
	int err = 0;

	o = op_object(path, &err);
	if (!o)
		return err;
	obj_put(o);
	if (size && size < sizeof(all))
		return -ERANGE;
	if (size)
		memcpy(list, all, sizeof(all));
	return (int)sizeof(all);
}

static struct {				/* what the main thread is asked by a worker */
	pthread_mutex_t lock;		/* main holds it while it does that: */
	pthread_cond_t cond;		/* outermost */
	struct cachefs_remount *asked;	/* NULL: nothing, or no more */
} remounts = { .lock = PTHREAD_MUTEX_INITIALIZER,
	.cond = PTHREAD_COND_INITIALIZER };

/* Have the main thread take more options, see args_again(), and wait.  0, m->why
 * says if they were taken, or -EINTR. */
static int
op_remount(struct cachefs_remount *m)
{
	int r = 0;

	m->options[sizeof(m->options) - 1] = '\0';
	m->why[0] = '\0';
	GUARD(&remounts.lock);
	while (remounts.asked && r != -EINTR)
		r = wait_on(&remounts.cond, &remounts.lock, 0);
	if (r == -EINTR)
		return r;
	remounts.asked = m;
	kill(getpid(), SIGHUP);
	while (remounts.asked == m && r != -EINTR)
		r = wait_on(&remounts.cond, &remounts.lock, 0);
	if (remounts.asked == m) {
		remounts.asked = NULL;
		pthread_cond_broadcast(&remounts.cond);
		return -EINTR;
	}
	return 0;
}

/* The requests of the subcommands, for whom the daemon runs. */
static int
op_ioctl(const char *path, unsigned cmd, void *arg, struct fuse_file_info *fi,
    unsigned flags, void *data)
{
	struct file *f = (struct file *)(uintptr_t)fi->fh;
	uid_t uid = fuse_get_context()->uid;

	(void)path;
	(void)arg;
	struct cachefs_file *w = data;
	bool remount = cmd == CACHEFS_IOC_REMOUNT;
	int r;

	if ((cmd != CACHEFS_IOC_VERIFY && cmd != CACHEFS_IOC_FILE && !remount) ||
	    flags & FUSE_IOCTL_DIR || !f || (f->o == NULL) != remount)
		return -ENOTTY;
	if (cmd == CACHEFS_IOC_FILE && w->op == CACHEFS_WARM)
		return op_errno(fill_warm(f->o, w));
	if (uid != 0 && uid != geteuid())
		return -EPERM;
	if (remount)
		return op_remount(data);
	if (cmd == CACHEFS_IOC_VERIFY)
		return op_errno(scrub_verify(f->o, data));
	if (w->op == CACHEFS_EVICT) {
		r = obj_evict(f->o);
		if (!r)
			fetch_forget(f->o, false);
		return r;
	}
	return w->op == CACHEFS_PIN || w->op == CACHEFS_UNPIN ?
	    obj_pin(f->o, w->op == CACHEFS_PIN) : -EINVAL;
}

/*
 * FUSE over io_uring (fuse_io_uring): libfuse has a thread for each CPU, which
 * takes requests from a ring and processes them one by one, past our workers.
 * These still have what the kernel sends by /dev/fuse: INIT, FORGET, INTERRUPT,
 * and all until the rings are ready.  The linker puts a function of ours in front
 * of libfuse's own (ld --wrap), so that these requests are noted, too.
 */
static struct {
	atomic_bool offered;		/* by the kernel */
	atomic_uint busy;		/* requests that such threads process */
} ring;

/* One feature flag of the connection on or off, in whichever way this libfuse
 * has.  False if the kernel does not offer it. */
static bool
op_feature(struct fuse_conn_info *c, uint64_t flag, bool on)
{
#if HAVE_PASSTHROUGH
	if (!on) {
		fuse_unset_feature_flag(c, flag);
		return true;
	}
	return fuse_set_feature_flag(c, flag);
#else
	if (!on)
		c->want &= ~(unsigned)flag;
	else if (c->capable & flag)
		c->want |= (unsigned)flag;
	return !on || (c->capable & flag);
#endif
}

static void *
op_init(struct fuse_conn_info *c, struct fuse_config *cfg)
{
	bool strict = conf.cache_consistency == CONS_STRICT;

	op_feature(c, FUSE_CAP_SPLICE_READ, false);
	op_feature(c, FUSE_CAP_SPLICE_WRITE, false);
	op_feature(c, FUSE_CAP_SPLICE_MOVE, false);
#if HAVE_PASSTHROUGH
	/* op_open() may want direct_io, and mmap() works all the same */
	op_feature(c, FUSE_CAP_DIRECT_IO_ALLOW_MMAP, true);
	struct statfs { long type; long rest[31]; } sfs = { 0 };

	if (conf.fuse_no_open) {
		op_feature(c, FUSE_CAP_NO_OPEN_SUPPORT, true);
		op_feature(c, FUSE_CAP_AUTO_INVAL_DATA, true);
		passthrough_off = "no_open";
	} else if (conf.fuse_passthrough != NO &&
	    op_feature(c, FUSE_CAP_PASSTHROUGH, true)) {
		/* a cache on overlayfs is one level deeper; 0x794c7630 is its
		 * magic, linux/magic.h */
		if (syscall(SYS_fstatfs, store.dir, &sfs) == 0)
			c->max_backing_stack_depth = sfs.type == 0x794c7630;
		passthrough_off = NULL;
	} else {
		passthrough_off = conf.fuse_passthrough == NO ?
		    "configured" : "kernel";
	}
#else
	passthrough_off = "libfuse older than 3.17";
#endif
#if FUSE_RING
	ring.offered = conf.fuse_io_uring &&
	    op_feature(c, FUSE_CAP_OVER_IO_URING, true);
#endif
	/* the kernel's read-ahead of a stalled file must not use them all up */
	c->max_background = (unsigned)MIN(conf.fuse_threads * 2, 1024);
	c->congestion_threshold = c->max_background * 3 / 4;
	cfg->use_ino = 1;
	cfg->nullpath_ok = !conf.fuse_no_open;
	cfg->hard_remove = 1;
	cfg->kernel_cache = cfg->auto_cache = 0;
	cfg->attr_timeout = strict ? 0 : conf.fuse_attr_timeout;
	cfg->entry_timeout = strict ? 0 : conf.fuse_entry_timeout;
	cfg->negative_timeout = strict ? 0 : conf.fuse_negative_timeout;
	return NULL;
}

static const struct fuse_operations ops = {
	.init = op_init, .getattr = op_getattr, .readlink = op_readlink,
	.open = op_open, .read = op_read, .release = op_release,
	.opendir = op_opendir, .readdir = op_readdir,
	.releasedir = op_releasedir, .statfs = op_statfs,
	.getxattr = op_getxattr, .listxattr = op_listxattr,
	.rename = op_rename, .ioctl = op_ioctl,
};

/*
 * The session loop is our own: each request's header is noted while libfuse
 * processes it (LOOKUP and GETATTR are one op to the high-level API), and
 * interrupts reach waiting workers.  A worker that takes a request when no
 * other is free starts one more, up to fuse_threads.
 */
static struct {
	pthread_mutex_t lock;
	pthread_cond_t cond;		/* a worker ended */
	pthread_t tid[1024];
	unsigned n, idle, ended;
	pthread_t main;
} workers = { .lock = PTHREAD_MUTEX_INITIALIZER,
	.cond = PTHREAD_COND_INITIALIZER };

/* This thread processes a request with this header, of which name begins with the
 * name that it is about if it is about one. */
static void
request_begin(struct req *rq, const struct fuse_in_header *h, const char *name)
{
	*rq = (struct req){ .unique = h->unique, .nodeid = h->nodeid,
		.opcode = h->opcode, .pid = h->pid };
	looking_up.parent = h->nodeid;
	looking_up.name = name;
	cur = rq;
	ASKED();
}

/* It is answered. */
static void
request_end(void)
{
	cur = NULL;
	if (looking_up.stripe)
		pthread_mutex_unlock(looking_up.stripe);
	looking_up.stripe = NULL;
}

#if FUSE_RING
struct fuse_req;
void __real_fuse_session_process_uring_cqe(struct fuse_session *,
    struct fuse_req *, struct fuse_in_header *, void *, void *, size_t);
void __wrap_fuse_session_process_uring_cqe(struct fuse_session *,
    struct fuse_req *, struct fuse_in_header *, void *, void *, size_t);
int fuse_uring_stop(struct fuse_session *);	/* of libfuse, as those */

/* In front of libfuse's own: a request came by a ring, with its arguments at in
 * and what follows them, the name of a LOOKUP, at payload. */
void
__wrap_fuse_session_process_uring_cqe(struct fuse_session *se,
    struct fuse_req *fr, struct fuse_in_header *h, void *in, void *payload,
    size_t len)
{
	struct req rq;

	ring.busy++;
	request_begin(&rq, h, payload);
	__real_fuse_session_process_uring_cqe(se, fr, h, in, payload, len);
	request_end();
	ring.busy--;
}
#endif

static void *worker(void *);

/* Start one more worker if none is idle.  Caller holds workers.lock. */
static int
worker_spawn_locked(void)
{
	int r = 0;

	if (!workers.idle && workers.n < conf.fuse_threads && !stopping) {
		r = sys_thread(&workers.tid[workers.n], worker, NULL);
		workers.n += r == 0;
	}
	return r;
}

static void *
worker(void *arg)
{
	struct fuse_buf fb = { 0 };
	sigset_t usr2;

	(void)arg;
	sigemptyset(&usr2);
	sigaddset(&usr2, SIGUSR2);	/* only interrupts the read() below */
	pthread_sigmask(SIG_UNBLOCK, &usr2, NULL);
	while (!fuse_session_exited(session)) {
		struct fuse_in_header *h;
		struct req rq;
		int r;

		WITH_LOCK(&workers.lock)
			workers.idle++;
		r = fuse_session_receive_buf(session, &fb);
		WITH_LOCK(&workers.lock) {
			workers.idle--;
			if (r > 0)
				worker_spawn_locked();
		}
		if (r == -ENOMEM)	/* it may be over soon */
			usleep(10000);
		if (r == -EINTR || r == -ENOMEM)
			continue;
		if (r <= 0)
			break;
		h = fb.mem;
		if (h->opcode == FUSE_INTERRUPT) {
			req_interrupt(((struct fuse_interrupt_in *)(h + 1))->
			    unique);
			continue;
		}
		request_begin(&rq, h, (const char *)(h + 1));
		if (!op_read_open(h))
			fuse_session_process_buf(session, &fb);
		request_end();
	}
	fuse_session_exit(session);
	free(fb.mem);
	pthread_kill(workers.main, SIGTERM);
	GUARD(&workers.lock);
	workers.ended++;
	pthread_cond_signal(&workers.cond);
	return NULL;
}

/* End all workers: wake those that read the device or wait for a server.  One
 * that hangs in a system call on the backend is given up. */
static void
workers_stop(void)
{
	uint64_t until = now_ms() + HUNG_MS;

	stopping = true;
	fuse_session_exit(session);
	pthread_mutex_lock(&workers.lock);
	while ((workers.ended < workers.n || ring.busy) && now_ms() < until) {
		struct timespec ts;
		uint64_t t = now_ms() + 50;

		WITH_LOCK(&reqs.lock)
			for (struct req *r = reqs.waiting; r; r = r->next)
				pthread_cond_broadcast(r->cond);
		for (unsigned i = 0; i < workers.n; i++)
			pthread_kill(workers.tid[i], SIGUSR2);
		ts = (struct timespec){ (time_t)(t / 1000),
			(long)(t % 1000) * 1000000 };
		pthread_cond_clockwait(&workers.cond, &workers.lock,
		    CLOCK_MONOTONIC, &ts);
	}
	hung = workers.ended < workers.n || ring.busy;
	pthread_mutex_unlock(&workers.lock);
	for (unsigned i = 0; i < workers.n; i++)
		if (hung)
			pthread_detach(workers.tid[i]);
		else
			pthread_join(workers.tid[i], NULL);
}

/* === ops ==================================================== End === */

/* === cmd: the subcommands ================================= Begin === */

/*
 * These run in the caller's process and reach the daemon by files of the mount
 * only.  One thread, but for those of warm.
 */
#define MISUSED (-1)			/* its synopsis is to be shown */
#define STATS_MS 5000			/* stats -p waits for its mounts */

struct value {				/* of the statistics */
	char name[64];			/* of an inner object's: joined by dots */
	char text[64];
	double num;
};

struct shot {				/* the statistics at one time */
	const char *mnt;
	struct value v[256];
	unsigned n;
	uint64_t at;			/* now_ms() */
	char json[8192];
};

/* Take the JSON object at p apart.  What follows it. */
static const char *
shot_object(struct shot *s, const char *p, const char *prefix)
{
	struct value *v;
	char name[64];
	int len;

	for (p += strspn(p, "{\""); *p && *p != '}'; p += strspn(p, "\",")) {
		len = (int)strcspn(p, "\"");
		snprintf(name, sizeof(name), "%s%s%.*s", prefix,
		    *prefix ? "." : "", len, p);
		p += len;
		p += strspn(p, "\":");
		if (*p == '{') {
			p = shot_object(s, p, name);
			continue;
		}
		len = (int)strcspn(p, "\",}");
		if (s->n == sizeof(s->v) / sizeof(s->v[0]))
			break;
		v = &s->v[s->n++];
		snprintf(v->name, sizeof(v->name), "%s", name);
		snprintf(v->text, sizeof(v->text), "%.*s", len, p);
		v->num = strtod(v->text, NULL);
		p += len;
	}
	return p + (*p == '}');
}

/* Take s->json apart. */
static void
shot_parse(struct shot *s)
{
	s->n = 0;
	shot_object(s, s->json, "");
}

/* Ask the daemon of mnt.  0, or EXIT_FAILURE after a sentence. */
static int
shot_take(struct shot *s, const char *mnt)
{
	char path[PATH_MAX];
	ssize_t n;
	int fd;

	s->mnt = mnt;
	snprintf(path, sizeof(path), "%s" CTL_STATS, mnt);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return fail(EXIT_FAILURE, "%s: %s", mnt,
		    errno == ENOENT || errno == ENOTDIR ?
		    "is not a cachefs mount" : errno == ENOTCONN ?
		    "the daemon of this mount has ended" : strerror(errno));
	s->at = now_ms();
	n = sys_pread(fd, s->json, sizeof(s->json) - 1, 0);
	close(fd);
	if (n < 0)
		return fail(EXIT_FAILURE, "%s: %s", path, strerror((int)-n));
	s->json[n] = '\0';
	shot_parse(s);
	return 0;
}

/* Have a child ask the daemon of mnt.  The descriptor from which its JSON can
 * be read, or -errno. */
static int
shot_ask(struct shot *s, const char *mnt, pid_t *pid)
{
	int fds[2], r;

	if (pipe2(fds, O_CLOEXEC))
		return -errno;
	*pid = fork();
	if (*pid == 0) {
		close(STDOUT_FILENO);	/* or its reader may wait for us */
		r = shot_take(s, mnt);
		if (!r && write(fds[1], s->json, strlen(s->json)) < 0)
			r = EXIT_FAILURE;
		_exit(r);
	}
	r = *pid < 0 ? -errno : fds[0];
	close(fds[1]);
	if (r < 0)
		close(fds[0]);
	return r;
}

/* Read into s->json what the child has, until the time comes.  0 or -errno. */
static int
shot_answer(struct shot *s, int fd, uint64_t until)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	size_t len = 0;
	ssize_t n;

	do {
		uint64_t now = now_ms();

		if (poll(&p, 1, now < until ? (int)(until - now) : 0) <= 0)
			return -ETIMEDOUT;
		n = read(fd, s->json + len, sizeof(s->json) - 1 - len);
		if (n < 0)
			return -errno;
		len += (size_t)n;
	} while (n > 0);
	s->json[len] = '\0';
	return len ? 0 : -ENODATA;
}

/*
 * Ask the daemons of n mounts, all at once.  How many have answered in time:
 * these are in s, in order; for each of the others there was a sentence.  One
 * that hangs holds whoever asks it in the kernel, hence the children, and
 * nobody waits for their end.
 */
static int
shots_take(struct shot *s, char **mnt, int n)
{
	uint64_t until = now_ms() + STATS_MS;
	struct { int fd; pid_t pid; } *child = calloc((size_t)n,
	    sizeof(*child));
	int answered = 0, r;

	if (!child)
		return fail(0, "out of memory");
	for (int i = 0; i < n; i++)
		child[i].fd = shot_ask(s, mnt[i], &child[i].pid);
	for (int i = 0; i < n; i++) {
		r = child[i].fd;
		if (r >= 0) {
			r = shot_answer(&s[answered], child[i].fd, until);
			close(child[i].fd);
		}
		if (r == -ETIMEDOUT)
			kill(child[i].pid, SIGKILL);
		if (r < 0 && r != -ENODATA)	/* that child has said why */
			log_error("%s: %s", mnt[i], r == -ETIMEDOUT ?
			    "the daemon does not answer" : strerror(-r));
		if (r < 0)
			continue;
		s[answered].mnt = mnt[i];
		shot_parse(&s[answered++]);
	}
	free(child);
	return answered;
}

static const struct value *
shot_value(const struct shot *s, const char *name)
{
	static const struct value none;

	for (unsigned i = 0; i < s->n; i++)
		if (!strcmp(s->v[i].name, name))
			return &s->v[i];
	return &none;
}

static double
shot_num(const struct shot *s, const char *name)
{
	return shot_value(s, name)->num;
}

/* The next value from *i on whose name begins with prefix; NULL: none. */
static const struct value *
shot_next(const struct shot *s, unsigned *i, const char *prefix)
{
	while (*i < s->n) {
		const struct value *v = &s->v[(*i)++];

		if (!strncmp(v->name, prefix, strlen(prefix)))
			return v;
	}
	return NULL;
}

/* A number in at most five characters, in powers of step; one of eight buffers
 * in turn. */
static const char *
human(double x, double step)
{
	static char bufs[8][16];
	static unsigned turn;
	char *buf = bufs[turn++ % 8];
	int unit = 0;

	for (; x >= 999.5 && unit < 5; unit++)
		x /= step;
	snprintf(buf, sizeof(bufs[0]), "%.*f%.*s", unit && x < 9.95, x,
	    unit > 0, &" KMGTP"[unit]);
	return buf;
}

#define BYTES(x) human(x, 1024)
#define COUNT_OF(x) human(x, 1000)

/* A part of the whole as a bar and per cent; one of two buffers in turn. */
static const char *
bar(double part, double whole)
{
	static char bufs[2][64];
	static unsigned turn;
	char *buf = bufs[turn++ % 2];
	double share = whole > 0 ? MIN(part / whole, 1) : 0;
	int n = (int)(share * 20 + 0.5);

	snprintf(buf, sizeof(bufs[0]), "[%.*s%.*s] %3d%%", n,
	    "####################", 20 - n, "--------------------",
	    (int)(share * 100));
	return buf;
}

/* One line of print_glance(): what begins with prefix. */
static void
print_inner(const struct shot *s, const char *label, const char *prefix)
{
	const struct value *v;
	bool any = false;

	for (unsigned i = 0; (v = shot_next(s, &i, prefix)); any = true)
		printf("%s %s %s", any ? "," : label, v->name + strlen(prefix),
		    COUNT_OF(v->num));
	if (any)
		putchar('\n');
}

/* The statistics at a glance. */
static void
print_glance(const struct shot *s, const char *mnt)
{
#define N(name) shot_num(s, #name)
	double hit = N(hit_bytes), read = hit + N(miss_bytes);
	double opens = N(opens_passthrough) + N(opens_buffered);
	double limit = N(cache_limit_bytes);
	unsigned long up = (unsigned long)N(uptime_s);

	printf("%s: %s, passthrough %s, %s, up %lu:%02lu:%02lu\n", mnt,
	    shot_value(s, "state")->text, shot_value(s, "passthrough")->text,
	    shot_value(s, "io_engine")->text, up / 3600, up % 3600 / 60,
	    up % 60);
	printf("space   %s of %s: %s files, %s of them whole\n", limit > 0 ?
	    bar(N(cache_used_bytes), limit) : BYTES(N(cache_used_bytes)),
	    limit > 0 ? BYTES(limit) : "no cap", COUNT_OF(N(objects)),
	    COUNT_OF(N(objects_complete)));
	printf("opens   %s of %s in passthrough; set aside %s\n",
	    bar(N(opens_passthrough), opens), COUNT_OF(opens),
	    COUNT_OF(N(set_aside)));
	printf("hits    %s of %s that the daemon was asked for\n",
	    bar(hit, read), BYTES(read));
	printf("server  %s read in %s requests; %s errors, %s reconnects\n",
	    BYTES(N(backend_read_bytes)), COUNT_OF(N(backend_requests)),
	    COUNT_OF(N(backend_errors)), COUNT_OF(N(backend_reconnects)));
	printf("fills   %s started, %s files completed, %s failed; "
	    "%s evicted, %s out of date\n", COUNT_OF(N(fills_started)),
	    COUNT_OF(N(fills_completed)), COUNT_OF(N(fills_failed)),
	    COUNT_OF(N(evicted_objects)), COUNT_OF(N(invalidated)));
	printf("ahead   %s prefetched: %s used, %s wasted\n",
	    BYTES(N(prefetched_bytes)), BYTES(N(prefetch_used_bytes)),
	    BYTES(N(prefetch_wasted_bytes)));
	printf("damage  %s blocks; %s checked in the background\n",
	    COUNT_OF(N(checksum_errors)), BYTES(N(scrubbed_bytes)));
	print_inner(s, "miss us", "latency_us.miss.");
	print_inner(s, "hit us ", "latency_us.hit.");
	print_inner(s, "bypass ", "bypass.");
#undef N
}

/* One line of what went on from a to b, with a heading above each 20th. */
static void
print_rates(const struct shot *a, const struct shot *b, unsigned line)
{
	double secs = (double)MAX(b->at - a->at, 1) / 1000;
#define RATE(name) ((shot_num(b, #name) - shot_num(a, #name)) / secs)
	double direct = RATE(opens_passthrough), all = direct +
	    RATE(opens_buffered);

	if (line % 20 == 0)
		printf("%-8s %6s %6s %6s %6s %6s %6s %6s %6s %6s\n", "state",
		    "hit/s", "miss/s", "net/s", "disk/s", "reqs/s", "opens/s",
		    "pass%", "used", "errs/s");
	printf("%-8s %6s %6s %6s %6s %6s %6s %6.0f %6s %6s\n",
	    shot_value(b, "state")->text, BYTES(RATE(hit_bytes)),
	    BYTES(RATE(miss_bytes)), BYTES(RATE(backend_read_bytes)),
	    BYTES(RATE(cache_write_bytes)), COUNT_OF(RATE(backend_requests)),
	    COUNT_OF(all), all > 0 ? 100 * direct / all : 0,
	    BYTES(shot_num(b, "cache_used_bytes")),
	    COUNT_OF(RATE(backend_errors)));
#undef RATE
}

/* Begin a metric: the text format of Prometheus, version 0.0.4. */
static void
print_metric(const char *name, const char *type, const char *help)
{
	printf("# HELP cachefs_%s %s\n# TYPE cachefs_%s %s\n", name, help, name,
	    type);
}

/* Begin a sample: the metric and its label mount. */
static void
print_sample(const char *metric, const char *mnt)
{
	printf("cachefs_%s{mount=\"", metric);
	for (const char *p = mnt; *p; p++) {
		if (strchr("\\\"\n", *p))
			putchar('\\');
		putchar(*p == '\n' ? 'n' : *p);
	}
	putchar('"');
}

/* From s to end; all of a metric stands together. */
static void
print_prometheus(const struct shot *shots, const struct shot *end)
{
	static const struct { const char *ours, *theirs, *type, *help; } m[] = {
#define X(n) { #n, #n "_total", "counter", "See " #n " in cachefs(8)." },
	COUNTERS(X)
#undef X
	{ "queue_depth_max", "queue_depth_max", "gauge",
	    "See queue_depth_max in cachefs(8)." },
	{ "uptime_s", "uptime_seconds", "gauge", "Since the daemon started." },
	{ "objects", "objects", "gauge", "Files of which something is kept." },
	{ "objects_complete", "objects_complete", "gauge", "Whole files." },
	{ "cache_used_bytes", "cache_used_bytes", "gauge", "Space taken." },
	{ "cache_limit_bytes", "cache_limit_bytes", "gauge",
	    "Space that may be taken, 0 without cap." },
	{ "buffer_bytes_used", "buffer_used_bytes", "gauge",
	    "Of the pool's memory." },
	};
	static const struct { const char *ours, *kind, *share; } lat[] = {
		{ "latency_us.miss.p50", "miss", "0.5" },
		{ "latency_us.miss.p99", "miss", "0.99" },
		{ "latency_us.miss.max", "miss", "1" },
		{ "latency_us.hit.p50", "hit", "0.5" },
		{ "latency_us.hit.p99", "hit", "0.99" },
		{ "latency_us.hit.max", "hit", "1" },
	};
	static const char *const states[] = { "online", "offline", "degraded" };
	static const char bypassed[] = "bypass.";
	const struct shot *s;
	const struct value *v;

	for (size_t i = 0; i < sizeof(m) / sizeof(m[0]); i++) {
		print_metric(m[i].theirs, m[i].type, m[i].help);
		for (s = shots; s < end; s++) {
			print_sample(m[i].theirs, s->mnt);
			printf("} %s\n", shot_value(s, m[i].ours)->text);
		}
	}
	print_metric("bypass_total", "counter",
	    "What went past the cache or passthrough.");
	for (s = shots; s < end; s++)
		for (unsigned i = 0; (v = shot_next(s, &i, bypassed));) {
			print_sample("bypass_total", s->mnt);
			printf(",reason=\"%s\"} %s\n",
			    v->name + strlen(bypassed), v->text);
		}
	print_metric("read_latency_seconds", "gauge",
	    "Reads by the daemon since it started.");
	for (s = shots; s < end; s++)
		for (size_t i = 0; i < sizeof(lat) / sizeof(lat[0]); i++) {
			print_sample("read_latency_seconds", s->mnt);
			printf(",kind=\"%s\",share=\"%s\"} %.6f\n", lat[i].kind,
			    lat[i].share, shot_num(s, lat[i].ours) / 1e6);
		}
	print_metric("state", "gauge", "1 for the state that the mount is in.");
	for (s = shots; s < end; s++)
		for (size_t i = 0; i < sizeof(states) / sizeof(states[0]); i++) {
			print_sample("state", s->mnt);
			printf(",state=\"%s\"} %d\n", states[i],
			    !strcmp(shot_value(s, "state")->text, states[i]));
		}
	print_metric("info", "gauge", "How the mount works.");
	for (s = shots; s < end; s++) {
		print_sample("info", s->mnt);
		printf(",io_engine=\"%s\",passthrough=\"%s\",version=\"%s\"} "
		    "1\n", shot_value(s, "io_engine")->text,
		    shot_value(s, "passthrough")->text, CACHEFS_VERSION);
	}
}

/* stats -p of n mounts: those that do not answer are in cachefs_up only. */
static int
stats_prometheus(char **mnt, int n)
{
	struct shot *shots = calloc((size_t)n, sizeof(*shots));
	const struct shot *s = shots, *end;

	if (!shots)
		return fail(EXIT_FAILURE, "out of memory");
	end = shots + shots_take(shots, mnt, n);
	print_metric("up", "gauge", "1 if the mount's daemon has answered.");
	for (int i = 0; i < n; i++) {
		bool up = s < end && s->mnt == mnt[i];

		print_sample("up", mnt[i]);
		printf("} %d\n", up);
		s += up;
	}
	if (end > shots)
		print_prometheus(shots, end);
	n -= (int)(end - shots);
	free(shots);
	return n ? EXIT_FAILURE : EXIT_SUCCESS;
}

/* cachefs stats [-j] [-w SECONDS] MOUNTPOINT | -p MOUNTPOINT... */
static int
cmd_stats(int argc, char **argv)
{
	static struct shot shots[2];
	double every = 0;
	bool json = false, prom = false;
	char *end = NULL;
	int c, r = 0;

	while ((c = getopt(argc, argv, "jpw:")) != -1) {
		json |= c == 'j';
		prom |= c == 'p';
		if (c == 'w')
			every = strtod(optarg, &end);
		if (c == '?')
			return EXIT_USAGE;
		if (c == 'w' && (*end || !(every >= 0.01 && every <= 1e6)))
			return MISUSED;
	}
	if (prom ? json || every > 0 || argc == optind : argc - optind != 1)
		return MISUSED;
	if (prom)
		return stats_prometheus(argv + optind, argc - optind);
	for (unsigned line = 0; !r; line++) {
		struct shot *s = &shots[line % 2];

		r = shot_take(s, argv[optind]);
		if (r)
			break;
		if (json)
			fputs(s->json, stdout);
		else if (every == 0)
			print_glance(s, argv[optind]);
		else if (line)
			print_rates(&shots[(line - 1) % 2], s, line - 1);
		if (fflush(stdout))
			return fail(EXIT_FAILURE, "standard output: %s",
			    strerror(errno));
		if (every == 0)
			break;
		usleep((useconds_t)(every * 1e6));
	}
	return r;
}

/* Is what is mounted at exactly this path, or (below) at the nearest one above
 * it, a cachefs? */
static bool
mounted_at(const char *path, bool below)
{
	FILE *f = setmntent("/proc/self/mounts", "re");
	char buf[4 * PATH_MAX];
	size_t n, most = 0;
	struct mntent m;
	bool ours = false;

	while (f && getmntent_r(f, &m, buf, sizeof(buf))) {
		n = strcmp(m.mnt_dir, "/") ? strlen(m.mnt_dir) : 0;
		if (n >= most && !strncmp(m.mnt_dir, path, n) &&
		    (!path[n] || (below && path[n] == '/'))) {
			most = n;
			ours = !strcmp(m.mnt_type, "fuse.cachefs");
		}
	}
	if (f)
		endmntent(f);
	return ours;
}

/* Is this directory in one? */
static bool
in_cachefs(const char *path)
{
	char *real = realpath(path, NULL);
	bool ours = real && mounted_at(real, true);

	free(real);
	return ours;
}

static struct {				/* a walk over what the caller named */
	int depth;			/* how far below a directory */
	void (*fn)(const char *path, const struct stat *st);
	atomic_bool failed;		/* something was complained of */
} walk;

static void
complain(const char *path, const char *why)
{
	walk.failed = true;
	log_error("%s: %s", path, why);
}

static void
complain_err(const char *path, int err)
{
	complain(path, err == ENODATA || err == ENOTTY || err == EOPNOTSUPP ?
	    "is not a file of a cachefs mount" : err == ENOTCONN ?
	    "the daemon of this mount has ended" : strerror(err));
}

static int
walk_entry(const char *path, const struct stat *st, int type, struct FTW *w)
{
	if (type == FTW_DNR || type == FTW_NS) {
		complain_err(path, errno);
	} else if (type == FTW_D && !w->level && !in_cachefs(path)) {
		/* without files it would be taken for one that has been done */
		complain(path, "is not in a cachefs mount");
		return FTW_SKIP_SUBTREE;
	} else if (type == FTW_D && w->level >= walk.depth) {
		if (!w->level)
			complain(path, "is a directory; -r goes into it");
		return FTW_SKIP_SUBTREE;
	} else if (type == FTW_F && S_ISREG(st->st_mode)) {
		walk.fn(path, st);
	} else if (!w->level && type != FTW_D) {
		complain(path, "is not a regular file");
	}
	return FTW_CONTINUE;
}

/* Call walk.fn for path if it is a file, and for those below it. */
static void
walk_path(const char *path)
{
	if (nftw(path, walk_entry, 64, FTW_PHYS | FTW_ACTIONRETVAL) < 0)
		complain_err(path, errno);
}

/* All of argv from optind on.  The exit status. */
static int
walk_args(int argc, char **argv)
{
	for (int i = optind; i < argc; i++)
		walk_path(argv[i]);
	return walk.failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

/* Open a file for what is asked of it by ioctl(2).  fd, or -1. */
static int
file_open(const char *path)
{
	return open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
}

static struct {				/* what `cachefs verify` has found */
	uint64_t files, bytes, damaged;
} verified;

/* Have the daemon check one file. */
static void
verify_file(const char *path, const struct stat *st)
{
	struct cachefs_verify v = { 0 };
	uint64_t size = (uint64_t)st->st_size, from;
	int fd, r;

	if (!size)
		return;
	fd = file_open(path);
	r = fd < 0 ? errno : 0;
	while (!r && v.off < size) {
		from = v.off;
		r = ioctl(fd, CACHEFS_IOC_VERIFY, &v) ? errno : 0;
		if (v.off <= from)
			break;
	}
	sys_close(&fd);
	if (r == EOPNOTSUPP)
		complain(path, "is cached without checksums");
	else if (r)
		complain_err(path, r);
	if (v.damaged)
		printf("%s: %" PRIu64 " damaged block%s, %s%s\n", path,
		    v.damaged, v.damaged == 1 ? "" : "s", v.err ?
		    "to be fetched again: " : "fetched again",
		    v.err ? strerror(v.err) : "");
	verified.files++;
	verified.bytes += v.bytes;
	verified.damaged += v.damaged;
	walk.failed |= v.err != 0;
}

/* cachefs verify [-r] PATH... */
static int
cmd_verify(int argc, char **argv)
{
	int c, r;

	walk.fn = verify_file;
	while ((c = getopt(argc, argv, "r")) != -1) {
		if (c != 'r')
			return EXIT_USAGE;
		walk.depth = INT_MAX;
	}
	if (optind == argc)
		return MISUSED;
	r = walk_args(argc, argv);
	printf("%" PRIu64 " files, %" PRIu64 " bytes checked, %" PRIu64
	    " damaged blocks\n", verified.files, verified.bytes,
	    verified.damaged);
	return r;
}

static bool ls_json;

/* Print s as a JSON string (RFC 8259 7). */
static void
print_string(const char *s)
{
	putchar('"');
	for (; *s; s++)
		if (*s == '"' || *s == '\\')
			printf("\\%c", *s);
		else if ((unsigned char)*s < ' ' || *s == 127)
			printf("\\u%04x", (unsigned)*s);
		else
			putchar(*s);
	putchar('"');
}

static void
ls_file(const char *path, const struct stat *st)
{
	char text[100], state[16], when[32] = "never";
	ssize_t n = lgetxattr(path, "user.cachefs", text, sizeof(text) - 1);
	uint64_t cached, size = (uint64_t)st->st_size;
	int64_t used;
	struct tm tm;
	time_t t;
	int pinned;

	text[MAX(n, 0)] = '\0';
	if (n < 0 || sscanf(text, "%15s %" SCNu64 " %d %" SCNd64, state,
	    &cached, &pinned, &used) != 4) {
		complain_err(path, n < 0 ? errno : ENODATA);
		return;
	}
	if (ls_json) {
		printf("{\"path\":");
		print_string(path);
		printf(",\"state\":\"%s\",\"cached\":%" PRIu64 ",\"size\":%"
		    PRIu64 ",\"pinned\":%s,\"used\":%" PRId64 "}\n", state,
		    cached, size, pinned ? "true" : "false", used);
		return;
	}
	t = (time_t)used;
	if (used && localtime_r(&t, &tm))
		strftime(when, sizeof(when), "%Y-%m-%d %H:%M", &tm);
	printf("%-8s %3d%% %5s %-6s %-16s %s\n", state,
	    size ? (int)((double)cached * 100 / (double)size) : 100,
	    BYTES((double)size), pinned ? "pinned" : "-", when, path);
}

/* cachefs ls [-r] [-j] PATH... */
static int
cmd_ls(int argc, char **argv)
{
	int c;

	walk.fn = ls_file;
	walk.depth = 1;
	while ((c = getopt(argc, argv, "rj")) != -1) {
		if (c == '?')
			return EXIT_USAGE;
		if (c == 'r')
			walk.depth = INT_MAX;
		ls_json |= c == 'j';
	}
	return optind == argc ? MISUSED : walk_args(argc, argv);
}

static unsigned file_op;		/* of file_do() */

static void
file_do(const char *path, const struct stat *st)
{
	struct cachefs_file w = { .op = file_op };
	int fd = file_open(path), r = fd < 0 ? errno : 0;

	if (!r && st->st_size)		/* else nothing of it could be cached */
		r = ioctl(fd, CACHEFS_IOC_FILE, &w) ? errno : 0;
	sys_close(&fd);
	if (r == EBUSY)
		complain(path, "is pinned");
	else if (r == ENOSPC)
		complain(path, "pinned files would take more than "
		    "cache_pin_max");
	else if (r == ENODATA)
		complain(path, "nothing of it is cached; cachefs warm fetches "
		    "it");
	else if (r)
		complain_err(path, r);
}

/* cachefs evict | pin | unpin PATH... */
static int
cmd_file(int argc, char **argv)
{
	walk.fn = file_do;
	walk.depth = INT_MAX;
	file_op = *argv[0] == 'e' ? CACHEFS_EVICT : *argv[0] == 'p' ?
	    CACHEFS_PIN : CACHEFS_UNPIN;
	if (getopt(argc, argv, "") != -1)
		return EXIT_USAGE;
	return optind == argc ? MISUSED : walk_args(argc, argv);
}

static struct {				/* what `cachefs warm` has to do */
	struct item { char *path; uint64_t size; bool kept; } *v;
	size_t n, room;
	uint64_t bytes;			/* of all */
	_Atomic size_t next, over;	/* items begun; done with */
	_Atomic uint64_t cached;	/* bytes */
	bool quiet, terminal;
} warm;

static void
warm_add(const char *path, const struct stat *st)
{
	if (warm.n == warm.room) {
		size_t room = warm.room ? warm.room * 2 : 1024;
		void *v = reallocarray(warm.v, room, sizeof(*warm.v));

		if (!v) {
			complain_err(path, ENOMEM);
			return;
		}
		warm.v = v;
		warm.room = room;
	}
	warm.v[warm.n].path = strdup(path);
	warm.v[warm.n].size = (uint64_t)st->st_size;
	warm.v[warm.n].kept = false;
	if (!warm.v[warm.n].path) {
		complain_err(path, ENOMEM);
		return;
	}
	warm.n++;
	warm.bytes += (uint64_t)st->st_size;
}

/* Say what became of an item; nothing of why: it is cached. */
static void
warm_say(const struct item *it, const char *why)
{
	char text[80];

	if (why) {
		snprintf(text, sizeof(text), "not cached: %s", why);
		for (char *p = text; *p; p++)
			*p = *p == '_' ? ' ' : *p;
		if (warm.terminal)
			fputc('\n', stderr);
		complain(it->path, text);
	} else if (!warm.quiet && !warm.terminal) {
		printf("%" PRIu64 " %s\n", it->size, it->path);
	}
}

/* Have the daemon fetch one file. */
static void
warm_file(struct item *it)
{
	struct cachefs_file w = { .op = CACHEFS_WARM };
	int fd = file_open(it->path), r = fd < 0 ? errno : 0;
	uint64_t before = 0;

	while (!r && it->size && !w.kept && !*w.why) {
		r = ioctl(fd, CACHEFS_IOC_FILE, &w) ? errno : 0;
		warm.cached += w.cached - before;
		before = w.cached;
	}
	it->kept = !r && !*w.why;
	sys_close(&fd);
	if (r == ENOTTY)
		complain_err(it->path, r);
	else
		warm_say(it, r ? strerror(r) : *w.why ? w.why : NULL);
	warm.over++;
}

static void *
warm_thread(void *arg)
{
	size_t i;

	while ((i = warm.next++) < warm.n)
		warm_file(&warm.v[i]);
	return arg;
}

/* The line of progress. */
static void
warm_progress(uint64_t began)
{
	double secs = (double)MAX(now_ms() - began, 1) / 1000;
	double rate = (double)warm.cached / secs;
	double left = rate > 0 ? (double)(warm.bytes - MIN(warm.cached,
	    warm.bytes)) / rate : 0;

	fprintf(stderr, "\r%zu/%zu files, %s of %s, %.2f GB/s, ETA %d:%02d ",
	    warm.over, warm.n, BYTES((double)warm.cached),
	    BYTES((double)warm.bytes), rate / 1e9, (int)left / 60,
	    (int)left % 60);
}

/* Warm what was added, by so many threads at a time. */
static void
warm_all(unsigned jobs)
{
	uint64_t began = now_ms();
	pthread_t tid[64];
	unsigned n = 0;
	char text[100];

	while (n < jobs && n < warm.n && !sys_thread(&tid[n], warm_thread,
	    NULL))
		n++;
	while (n && warm.terminal && warm.over < warm.n) {
		warm_progress(began);
		usleep(200000);
	}
	while (n > 0)
		pthread_join(tid[--n], NULL);
	if (warm.terminal) {
		warm_progress(began);
		fputc('\n', stderr);
	}
	/* what came first may have made room for what came last */
	for (size_t i = 0; i < warm.n; i++)
		if (warm.v[i].kept && warm.v[i].size &&
		    lgetxattr(warm.v[i].path, "user.cachefs.state", text,
		    sizeof(text)) != (ssize_t)strlen("complete"))
			warm_say(&warm.v[i], "evicted again, the cache is too "
			    "small");
}

/* The paths that a file lists, one a line; "-": standard input. */
static void
warm_list(const char *list)
{
	FILE *f = strcmp(list, "-") ? fopen(list, "re") : stdin;
	char *line = NULL;
	size_t room = 0;

	while (f && getline(&line, &room, f) > 0) {
		line[strcspn(line, "\n")] = '\0';
		if (*line)
			walk_path(line);
	}
	if (!f || ferror(f))
		complain_err(list, errno);
	free(line);
	if (f && f != stdin)
		fclose(f);
}

/* cachefs warm [-q] [-n JOBS] [-T LISTFILE] PATH... */
static int
cmd_warm(int argc, char **argv)
{
	unsigned long jobs = 8;
	const char *list = NULL;
	char *end = NULL;
	int c;

	while ((c = getopt(argc, argv, "qn:T:")) != -1) {
		warm.quiet |= c == 'q';
		if (c == 'T')
			list = optarg;
		if (c == 'n')
			jobs = strtoul(optarg, &end, 10);
		if (c == '?')
			return EXIT_USAGE;
		if (c == 'n' && (*end || jobs < 1 || jobs > 64)) {
			log_error("-n %s: 1 to 64", optarg);
			return EXIT_USAGE;
		}
	}
	if (optind == argc && !list)
		return MISUSED;
	walk.fn = warm_add;
	walk.depth = INT_MAX;
	if (list)
		warm_list(list);
	walk_args(argc, argv);
	warm.terminal = !warm.quiet && isatty(STDERR_FILENO);
	warm_all((unsigned)jobs);
	if (!warm.quiet)
		printf("%zu files, %" PRIu64 " bytes cached of %" PRIu64 "\n",
		    warm.n, (uint64_t)warm.cached, warm.bytes);
	return walk.failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

static int cmd_check(int argc, char **argv);	/* see main */

static const struct cmd {
	const char *name, *synopsis;
	int (*run)(int argc, char **argv);	/* the exit status, or MISUSED */
} cmds[] = {
	{ "stats", "[-j] [-w SECONDS] MOUNTPOINT | -p MOUNTPOINT...",
	    cmd_stats },
	{ "ls", "[-r] [-j] PATH...", cmd_ls },
	{ "warm", "[-q] [-n JOBS] [-T LISTFILE] PATH...", cmd_warm },
	{ "evict", "PATH...", cmd_file },
	{ "pin", "PATH...", cmd_file },
	{ "unpin", "PATH...", cmd_file },
	{ "verify", "[-r] PATH...", cmd_verify },
	{ "check", "[-c FILE] [-o opt[,opt...]] [SOURCE]", cmd_check },
};
#define NCMDS (sizeof(cmds) / sizeof(cmds[0]))

/* Run the subcommand that argv[0] names.  The exit status; -1: it is none. */
static int
cmd_run(int argc, char **argv)
{
	const struct cmd *c = cmds;
	int r;

	while (c < cmds + NCMDS && strcmp(argv[0], c->name))
		c++;
	if (c == cmds + NCMDS)
		return -1;
	logs.all = true;
	r = c->run(argc, argv);
	if (r == MISUSED) {
		fprintf(stderr, "usage: cachefs %s %s\n", c->name, c->synopsis);
		return EXIT_USAGE;
	}
	return (fflush(stdout) || ferror(stdout)) && !r ?
	    fail(EXIT_FAILURE, "standard output: %s", strerror(errno)) : r;
}

/* === cmd ==================================================== End === */

/* === notify: the service manager ========================== Begin === */

/*
 * sd_notify(3): a datagram to $NOTIFY_SOCKET says what goes on.  A daemon that
 * systemd gave a mount namespace of its own could mount nothing that others see.
 * So `cachefs -m` mounts outside of it and leaves the descriptor of the mount in
 * systemd's store, from where the daemon gets it (sd_listen_fds(3)).  Main
 * thread only.
 */
#define STORED "cachefs"		/* the descriptor's name there */

static struct {
	bool on;			/* somebody listens */
	uint64_t every;			/* ms between two signs of life, 0: none */
	uint64_t last;			/* now_ms() of the latest */
	char status[160];		/* the latest one */
} notify;

/* Send text and, unless it is -1, fd.  0 or -errno, after a sentence. */
static int
notify_send(const char *text, int fd)
{
	const char *path = getenv("NOTIFY_SOCKET");
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	size_t len = path ? strlen(path) : 0;
	union { struct cmsghdr h; char room[CMSG_SPACE(sizeof(int))]; } c = {
		.h = { .cmsg_len = CMSG_LEN(sizeof(int)),
		.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
	struct iovec iov = { (char *)(uintptr_t)text, strlen(text) };
	struct msghdr m = { .msg_name = &to, .msg_iov = &iov, .msg_iovlen = 1,
		.msg_namelen = (socklen_t)(offsetof(struct sockaddr_un,
		    sun_path) + len),
		.msg_control = fd >= 0 ? &c : NULL,
		.msg_controllen = fd >= 0 ? sizeof(c) : 0 };
	int s = -1, r = 0;

	if (!len || len >= sizeof(to.sun_path))
		return fail(-EINVAL, "NOTIFY_SOCKET is not set, or too long");
	memcpy(to.sun_path, path, len);
	if (*path == '@')		/* abstract, unix(7) */
		to.sun_path[0] = '\0';
	memcpy(CMSG_DATA(&c.h), &fd, sizeof(fd));
	s = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (s < 0 || sendmsg(s, &m, MSG_NOSIGNAL) < 0)
		r = fail(-errno, "NOTIFY_SOCKET %s: %s", path, strerror(errno));
	sys_close(&s);
	return r;
}

/* The descriptor of a mount that systemd has for this process; else -1. */
static int
notify_stored(void)
{
	const char *pid = getenv("LISTEN_PID"), *name = getenv("LISTEN_FDNAMES");
	size_t len;

	if (!pid || atol(pid) != getpid() || !name)
		return -1;
	for (int fd = 3; *name; fd++, name += len + (name[len] == ':')) {
		len = strcspn(name, ":");
		if (len == strlen(STORED) && !strncmp(name, STORED, len))
			return fd;
	}
	return -1;
}

/* Take part if we are what somebody listens to. */
static void
notify_start(void)
{
	const char *usec = getenv("WATCHDOG_USEC"), *pid = getenv("WATCHDOG_PID");

	notify.on = getenv("NOTIFY_SOCKET") != NULL;
	if (notify.on && usec && (!pid || atol(pid) == getpid()))
		notify.every = strtoull(usec, NULL, 10) / 1000 / 4;
}

/* Something is to be told: `what`, or "". */
static void
notify_tell(const char *what)
{
	if (notify.on && *what)
		notify_send(what, -1);
}

/* A sign of life, which a daemon that hangs can't give: each lock of its own was
 * to be had. */
static void
notify_alive(void)
{
	static pthread_mutex_t *const locks[] = { &names.lock, &store.lock,
		&ckpt.lock, &tree.lock, &fill.lock, &scrub.lock, &bdir.lock,
		&bnfs.lock, &exec.lock, &pool.lock, &reqs.lock, &workers.lock };

	for (size_t i = 0; i < sizeof(locks) / sizeof(locks[0]); i++)
		WITH_LOCK(locks[i])
			;
	notify_tell("WATCHDOG=1");
	notify.last = now_ms();
}

/* Called about once a second: how things stand, if that has changed. */
static void
notify_status(void)
{
	char text[sizeof(notify.status)];
	uint64_t n = 0, whole = 0, used = 0;

	if (!notify.on)
		return;
	if (notify.every && now_ms() - notify.last >= notify.every)
		notify_alive();
	WITH_LOCK(&store.lock) {
		n = store.nents;
		whole = store.ncomplete;
		used = store.used;
	}
	snprintf(text, sizeof(text), "STATUS=%s; passthrough %s; %s%s%s cached, "
	    "%s files, %s of them whole", backend_down ? "The server does not "
	    "answer, serving what is cached" : store.disk ? "The cache disk "
	    "fails, serving from the server" : "Online",
	    passthrough_off ? "off" : "on", BYTES((double)used),
	    store.limit ? " of " : "", store.limit ?
	    BYTES((double)store.limit) : "", COUNT_OF((double)n),
	    COUNT_OF((double)whole));
	if (strcmp(text, notify.status))
		notify_tell(text);
	memcpy(notify.status, text, sizeof(text));
}

/* === notify ================================================= End === */

/* === main: usage, mounting ================================ Begin === */

static void
usage(void)
{
	printf("usage: cachefs [-dfhmV] [-c FILE] [-o opt[,opt...]] [SOURCE] "
	    "MOUNTPOINT\n");
	for (const struct cmd *c = cmds; c < cmds + NCMDS; c++)
		printf("       cachefs %s %s\n", c->name, c->synopsis);
	printf("\n"
	    "  -c FILE    read the configuration from this ini file\n"
	    "  -o OPT     set an option; wins over the file\n"
	    "  -f         stay in the foreground\n"
	    "  -d         log what happens (level debug)\n"
	    "  -m         mount only, for the service manager\n"
	    "  -h, -V     show this help; the version\n"
	    "\n"
	    "Options (in the ini file: the part before the first _ is the "
	    "section):\n");
	for (const struct copt *o = copts; o < copts + NCOPTS; o++) {
		int n = printf("  %s_%s=%s", o->sect, o->key,
		    o->def ? o->def : "...");
		printf("%*s%s%s\n", MAX(32 - n, 1), "", o->help,
		    o->words ? conf_range(o) : "");
	}
	printf("\nSee cachefs(8).\n");
}

/* Check the mount point, and clear a dead mount of our own.  0 or -errno
 * after a sentence. */
static int
mountpoint_check(void)
{
	char *path = conf.mountpoint;
	struct stat st;
	pid_t pid;
	int r;

	if (mounted_at(path, false)) {
		char *ctl = path_join(path, &CTL_STATS[1]);
		int fd = ctl ? open(ctl, O_RDONLY | O_CLOEXEC) : -1;

		r = fd < 0 ? -errno : 0;	/* stat() may be cached */
		sys_close(&fd);
		free(ctl);
		if (r != -ENOTCONN && r != -ECONNABORTED)
			return fail(-EBUSY, "mount point %s: a cachefs is "
			    "already mounted there", path);
		if (umount2(path, MNT_DETACH)) {
			pid = fork();
			if (pid == 0) {
				execlp("fusermount3", "fusermount3", "-uz",
				    path, (char *)NULL);
				_exit(127);
			}
			waitpid(pid, NULL, 0);
		}
		log_info("mount point %s: cleared the mount of a cachefs that "
		    "died", path);
	}
	r = stat(path, &st) ? -errno : S_ISDIR(st.st_mode) ? 0 : -ENOTDIR;
	return !r ? 0 : fail(r, "mount point %s: %s", path, strerror(-r));
}

/* The backend's table and canonical name, by which a cache knows it.  0, or
 * -EINVAL after a sentence. */
static int
backend_choose(char name[1000])
{
	const char *b = conf.nfs_backend;
	char *real;

	if (strncmp(b, "nfs://", 6) && (*b == '/' || !strstr(b, ":/"))) {
		be = &bdir_backend;
		real = realpath(b, NULL);
		snprintf(name, 1000, "%s", real ? real : b);
		free(real);
		return 0;
	}
	if (!bnfs_parse(b))
		return fail(-EINVAL, "backend %s: is neither nfs://host[:port]/"
		    "export nor host:/export nor a directory%s", b,
		    strchr(b, '?') ? " (URL parameters are options here: "
		    "nfs_version, nfs_port, ...)" : "");
	be = &bnfs_backend;
	snprintf(name, 1000, "%s:%s", bnfs.host, bnfs.export);
	return 0;
}

/* Make the kernel read ahead as configured; needs root. */
static void
set_readahead(dev_t dev)
{
	char path[128];
	FILE *f;

	snprintf(path, sizeof(path), "/sys/class/bdi/%u:%u/read_ahead_kb",
	    major(dev), minor(dev));
	f = fopen(path, "we");
	if (!f || fprintf(f, "%" PRIu64, conf.fuse_readahead / 1024) < 0 ||
	    fclose(f))
		log_info("read-ahead stays at the kernel's 128K: %s: %s", path,
		    strerror(errno));
}

/* Does the kernel take a backing file from us?  Asked once, with a file of the
 * cache disk, so that "passthrough" in the statistics tells the truth. */
static int
passthrough_probe(void)
{
	struct obj o = { .lock = PTHREAD_MUTEX_INITIALIZER };
	int r;

	if (passthrough_on()) {
		o.rfd = sys_openat(store.dir, "lock", O_RDONLY, 0);
		r = obj_backing_get(&o);
		if (r > 0)
			obj_backing_put(&o);
		else
			passthrough_off = r == -EPERM ? "needs CAP_SYS_ADMIN" :
			    r == -ELOOP ? "stacked file systems" : "refused";
		sys_close(&o.rfd);
	}
	if (passthrough_off && conf.fuse_passthrough == YES)
		return fail(-EOPNOTSUPP, "fuse_passthrough=yes, but it is off "
		    "here: %s", passthrough_off);
	if (passthrough_off)
		log_info("passthrough is off: %s", passthrough_off);
	if (conf.fuse_io_uring && !ring.offered)
		return fail(-EOPNOTSUPP, "fuse_io_uring=yes, but the kernel does not "
		    "offer it: Linux 6.14, and Y in "
		    "/sys/module/fuse/parameters/enable_uring");
	return 0;
}

static bool mounted_by_us;		/* then it is ours to unmount, too */

/* fuse_new() and fuse_mount() with our options; of a mount that is there already
 * stored is the descriptor, else -1.  0 or -errno after a sentence. */
static int
mount_fuse(int stored)
{
	struct fuse_args args = FUSE_ARGS_INIT(0, NULL);
	const char *source = conf.fsname && *conf.fsname ? conf.fsname :
	    conf.source ? conf.source : conf.nfs_backend;
	unsigned flags = conf.mount_flags;
	char *fsname = NULL, *opts = NULL, dev[32];
	bool failed = asprintf(&fsname, "fsname=%s", source) < 0 ||
	    fuse_opt_add_opt_escaped(&opts, fsname) ||
	    fuse_opt_add_opt(&opts, "ro,default_permissions,subtype=cachefs") ||
	    fuse_opt_add_opt(&opts, flags & MS_NOSUID ? "nosuid" : "suid") ||
	    fuse_opt_add_opt(&opts, flags & MS_NODEV ? "nodev" : "dev") ||
	    fuse_opt_add_opt(&opts, flags & MS_NOEXEC ? "noexec" : "exec") ||
	    (conf.fuse_allow_other && fuse_opt_add_opt(&opts, "allow_other")) ||
	    (conf.fuse_io_uring && fuse_opt_add_opt(&opts, "io_uring")) ||
	    fuse_opt_add_arg(&args, "cachefs") ||
	    fuse_opt_add_arg(&args, "-o") || fuse_opt_add_arg(&args, opts);

	free(fsname);
	free(opts);
	if (failed)
		return fail(-ENOMEM, "out of memory");
	the_fuse = fuse_new(&args, &ops, sizeof(ops), NULL);
	fuse_opt_free_args(&args);
	if (!the_fuse)
		return fail(-EIO, "libfuse refused to start");
	session = fuse_get_session(the_fuse);
	snprintf(dev, sizeof(dev), "/dev/fd/%d", stored);	/* libfuse's way */
	if (fuse_mount(the_fuse, stored < 0 ? conf.mountpoint : dev))
		return fail(-EIO, "cannot mount on %s", conf.mountpoint);
	mounted_by_us = stored < 0;
	return 0;
}

/* Tell the parent, which waits at the pipe, that the file system answers; from
 * now on the daemon is alone. */
static void
detach(int ready)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
	sys_close(&null);
	logs.syslog |= conf.log_target == 0;
	if (write(ready, "", 1) != 1)
		log_warn("the parent is gone");
}

static struct {				/* the command line */
	int argc;
	char **argv;
	char *file;			/* -c, absolute once it was read */
	bool check;			/* of `cachefs check` */
	bool helper;			/* of mount(8), which has flags of its own */
	bool fake, store;		/* -f of these; -m */
	char *more;			/* options of remounts, or NULL */
	struct conf conf;		/* as it was parsed at the start */
} args;

/* Parse the command line into c: the file first, then -o over it, wherever they
 * stand.  -1 = go on; else the exit status. */
static int
args_parse(struct conf *c)
{
	/* mount(8), EXTERNAL HELPERS */
	const char *flags = args.helper ? "c:o:dfhVnsvN:t:" : "c:o:dfhmVnsv";
	char **argv = args.argv, *cwd;
	const char *file = NULL;
	int argc = args.argc, opt, n, r;

	if (conf_defaults(c))
		return fail(EXIT_FAILURE, "out of memory");
	for (optind = 1; (opt = getopt(argc, argv, flags)) != -1;) {
		if (opt == 'c')
			file = args.file ?: optarg;
		if (opt == 'h')
			usage();
		if (opt == 'V')
			printf("cachefs %s\n", CACHEFS_VERSION);
		if (opt == 'h' || opt == 'V')
			return fflush(stdout) ? EXIT_FAILURE : EXIT_SUCCESS;
		if (opt == 'N')
			log_error("-N %s: not supported; use nsenter(1)", optarg);
		if (opt == '?' || opt == 'N')
			goto misused;
	}
	r = file ? conf_ini(c, file) : 0;
	for (optind = 1; !r && (opt = getopt(argc, argv, flags)) != -1;) {
		if (opt == 'o')
			r = conf_options(c, optarg);
		c->debug |= opt == 'd';
		c->foreground |= opt == 'f' && !args.helper;
		args.fake |= opt == 'f' && args.helper;
		args.store |= opt == 'm';
	}
	if (!r && args.more)
		r = conf_options(c, args.more);
	if (r)
		return EXIT_USAGE;
	n = argc - optind + args.check;	/* which has no mount point */
	if (n == 0)
		log_error("no mount point given");
	if (n > 2)
		log_error("too many arguments: %s", argv[optind + 2 -
		    args.check]);
	if (n == 0 || n > 2)
		goto misused;
	c->mountpoint = strdup(args.check ? "" : argv[argc - 1]);
	c->source = n == 2 ? argv[optind] : NULL;
	if (c->source && !c->nfs_backend)
		c->nfs_backend = strdup(c->source);
	if (file && !args.file) {	/* the daemon changes its directory */
		cwd = getcwd(NULL, 0);
		args.file = *file == '/' || !cwd ? strdup(file) :
		    path_join(cwd, file);
		free(cwd);
	}
	return c->mountpoint && (c->remount || !conf_check(c)) ? -1 : EXIT_USAGE;
misused:
	fprintf(stderr, "Try 'cachefs -h'.\n");
	return EXIT_USAGE;
}

/* Let what is new in the configuration, and can change, do so; the rest is named.
 * all: nothing does unless all can.  False: nothing has, which was said. */
static bool
args_take(struct conf *new, bool all)
{
	bool changed = false;

	for (int turn = !all; turn < 2; turn++)
		for (const struct copt *o = copts; o < copts + NCOPTS; o++) {
			if (conf_same(o, new, o->live ? &conf : &args.conf))
				continue;
			if (turn == 0 && !o->live)
				return fail(false, "%s_%s can't change without a new "
				    "mount; nothing has changed", o->sect, o->key);
			if (turn == 0)
				continue;
			if (o->live)
				conf_take(o, &conf, new);
			changed = true;
			log_info("configuration: %s_%s %s", o->sect, o->key,
			    o->live ? "has changed" : "changes with the next mount");
		}
	if (!changed)
		log_info("configuration: nothing has changed");
	return true;
}

/* SIGHUP: the configuration is read again and, if all of it is good, taken; of a
 * remount with its options, which stay.  Main thread. */
static void
args_again(void)
{
	GUARD(&remounts.lock);
	struct cachefs_remount *m = remounts.asked;
	char *before = args.more, *more = NULL;
	struct conf new;
	bool good;

	notify_tell("RELOADING=1");
	log_copy = m ? m->why : NULL;
	if (m && asprintf(&more, "%s%s%s", before ? before : "",
	    before ? "," : "", m->options) >= 0)
		args.more = more;
	good = args_parse(&new) < 0 && (!new.remount || !conf_check(&new)) &&
	    args_take(&new, m != NULL);
	if (!good)
		log_error("the configuration stays as it was");
	conf_free(&new);
	if (m) {
		free(good ? before : more);
		args.more = good ? more : before;
		remounts.asked = NULL;
		pthread_cond_broadcast(&remounts.cond);
	}
	notify_tell("READY=1");
	log_copy = NULL;
	if (!good)
		return;
	logs.level = conf.debug ? LOG_DBG : (int)conf.log_level;
	if (conf.cache_eviction != store.policy)
		store_policy(conf.cache_eviction);
	if (store_limits())
		log_error("cache_dir %s: %s", conf.cache_dir, strerror(errno));
	fill_kick();
}

static void
log_stats(void)
{
	size_t len;
	char *json = stats_json(&len);

	if (json)
		log_info("statistics: %.*s", (int)strcspn(json, "\n"), json);
	free(json);
}

/* Start the first worker, and see what it answers.  0 with *st the root's, or
 * -errno after a sentence. */
static int
serve_start(struct stat *st)
{
	int r = 0;

	workers.main = pthread_self();
	WITH_LOCK(&workers.lock)
		r = worker_spawn_locked();
	if (!r && stat(conf.mountpoint, st))
		r = -errno;
	return !r ? 0 : fail(r, "%s does not answer: %s", conf.mountpoint,
	    strerror(-r));
}

/* Serve until a signal or an unmount ends it.  ready: see detach(), or -1. */
static int
serve(int ready)
{
	const struct timespec second = { 1, 0 };
	bool watch = conf.fuse_no_open || notify.on;
	struct stat st;
	sigset_t set;
	int sig, r;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	sigaddset(&set, SIGUSR1);
	r = serve_start(&st) ?: passthrough_probe();
	if (!r) {
		set_readahead(st.st_dev);
		log_info("%s mounted on %s", conf.nfs_backend, conf.mountpoint);
		if (ready >= 0)
			detach(ready);
		notify_tell("READY=1");
		do {
			notify_status();
			sig = sigtimedwait(&set, NULL, watch ? &second : NULL);
			op_stats_age();
			if (sig == SIGHUP)
				args_again();
			if (sig == SIGUSR1)
				log_stats();
		} while (sig < 0 || sig == SIGHUP || sig == SIGUSR1);
	}
	notify_tell("STOPPING=1");
	workers_stop();
	return r;
}

/* SIGUSR2 only interrupts a worker's read() of the device. */
static void
on_usr2(int sig)
{
	(void)sig;
}

/*
 * Keep of root's capabilities those to unmount and for passthrough; to register
 * the pool, whatever RLIMIT_MEMLOCK is; to read what others may not, of a
 * directory; and, of NFS, to connect from a port that exports(5) calls secure.
 * Of this thread and those that it starts.
 */
static void
drop_capabilities(void)
{
	struct __user_cap_header_struct h = {
		.version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct d[2];
	uint32_t keep = 1u << CAP_SYS_ADMIN | 1u << CAP_IPC_LOCK |
	    (be == &bnfs_backend ? 1u << CAP_NET_BIND_SERVICE :
	    1u << CAP_DAC_READ_SEARCH);

	if (syscall(SYS_capget, &h, d) || !((d[0].permitted & ~keep) |
	    d[0].inheritable | d[1].permitted | d[1].inheritable))
		return;			/* a kernel without; or nothing to drop */
	d[0].effective &= keep;
	d[0].permitted &= keep;
	d[0].inheritable = 0;
	d[1] = (struct __user_cap_data_struct){ 0 };
	if (syscall(SYS_capset, &h, d))
		log_warn("capabilities stay as they are: %s", strerror(errno));
}

/* The server is not there.  Start all the same if this cache knows what it
 * looked like.  0 or -errno; why the server is not there was said. */
static int
start_away(const char *backend)
{
	char *known = path_join(conf.cache_dir, "tree/server");
	bool was = known && !access(known, R_OK);
	unsigned version;
	struct attr root;
	int r;

	free(known);
	if (!was || conf.cache_offline != 0)
		return -EHOSTDOWN;
	r = store_open(backend) ?: tree_open();
	if (r)
		return r;
	backend_down = true;
	version = conf.nfs_version ? conf.nfs_version + 2 :
	    tree_server_version();
	if (!tree_serves())
		return fail(-EHOSTDOWN, "what is cached is older than "
		    "cache_offline_max_age");
	if (!version || tree_get("/", &root, NULL, 0))
		return -EHOSTDOWN;
	log_warn("starting offline, with what the cache knows");
	bnfs.version = version;
	return 0;
}

/* Make this process ready to serve. */
static void
run_prepare(void)
{
	struct rlimit rl;
	sigset_t all;

	umask(077);
	sched_getaffinity(0, sizeof(bdir.cpus), &bdir.cpus);
	mallopt(M_ARENA_MAX, 2);
	mallopt(M_MMAP_THRESHOLD, 4 * (int)MiB);
	mallopt(M_TRIM_THRESHOLD, 4 * (int)MiB);
	if (!getrlimit(RLIMIT_NOFILE, &rl)) {
		rl.rlim_cur = rl.rlim_max;
		setrlimit(RLIMIT_NOFILE, &rl);
	}
	sigfillset(&all);		/* sigwait()ed for, or SIGUSR2 */
	sigdelset(&all, SIGSEGV);	/* a sanitizer's */
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGABRT);	/* systemd's, of a watchdog */
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	signal(SIGPIPE, SIG_IGN);
	sigaction(SIGUSR2, &(struct sigaction){ .sa_handler = on_usr2 }, NULL);
	for (int i = 0; i < ASIDE_STRIPES; i++)
		pthread_mutex_init(&aside_lock[i], NULL);
	started_ms = now_ms();
}

/* Stop and release what was started, in any order of failure. */
static void
run_end(const char *backend)
{
	stopping = true;
	if (mounted_by_us)
		fuse_unmount(the_fuse);
#if FUSE_RING
	if (ring.offered && !hung)
		fuse_uring_stop(session);
#endif
	if (the_fuse && !hung)
		fuse_destroy(the_fuse);
	scrub_stop();
	fill_stop();
	be->stop();
	exec_stop(&exec);
	exec_stop(&exec_polled);
	while (pool.base && fetch_reclaim())
		;
	tree_stop();
	store_stop();
	if (hung) {			/* it has buffers, and more, of ours */
		log_error("backend %s hangs; ending without it", backend);
		_exit(EXIT_FAILURE);
	}
	pool_stop();
}

/* Everything between a valid configuration and the end; in the daemon's own
 * process.  Returns the exit status. */
static int
run(int ready)
{
	char backend[1000];
	int r, stored = notify_stored();

	run_prepare();
	notify_start();
	if (stored >= 0) {		/* or it would outlive us there */
		fcntl(stored, F_SETFD, FD_CLOEXEC);
		notify_tell("FDSTOREREMOVE=1\nFDNAME=" STORED);
	}
	if (backend_choose(backend))
		return EXIT_USAGE;
	r = (stored < 0 ? mountpoint_check() : 0) ?: be->start();
	if (r == -EHOSTDOWN)
		r = start_away(backend);
	else
		r = r ?: store_open(backend) ?: tree_open();
	if (!r && !(r = mount_fuse(stored)))
		drop_capabilities();	/* no thread has been started yet */
	r = r ?: be->run() ?:
	    pool_start(conf.buffer_memory, conf.cache_block_size) ?:
	    exec_start(store.dir) ?: fill_start() ?: store_start() ?:
	    tree_start(bnfs.version) ?: scrub_start() ?: serve(ready);
	run_end(backend);
	return r ? EXIT_FAILURE : EXIT_SUCCESS;
}

/* -m: mount, and leave the rest to the daemon that gets the descriptor.  The exit
 * status. */
static int
mount_and_store(void)
{
	char backend[1000];

	if (!getenv("NOTIFY_SOCKET"))
		return fail(EXIT_USAGE, "-m is for a service manager: "
		    "NOTIFY_SOCKET is not set");
	if (backend_choose(backend))
		return EXIT_USAGE;
	return mountpoint_check() || mount_fuse(-1) || notify_send("FDSTORE=1\n"
	    "FDPOLL=0\nFDNAME=" STORED, fuse_session_fd(session)) ?
	    EXIT_FAILURE : EXIT_SUCCESS;
}

/* mount -o remount: have the daemon take the options, and the kernel its own.
 * The exit status. */
static int
remount(void)
{
	static struct cachefs_remount m;	/* [o] */
	const char *mnt = args.conf.mountpoint;
	char *ctl = path_join(mnt, &CTL_STATS[1]);
	size_t len = 0;
	int fd, opt, r;

	for (optind = 1; (opt = getopt(args.argc, args.argv, "c:o:dfhmVnsvN:t:")) !=
	    -1;)
		if (opt == 'o' && len < sizeof(m.options))
			len += (size_t)snprintf(m.options + len,
			    sizeof(m.options) - len, "%s%s", len ? "," : "",
			    optarg);
	if (len >= sizeof(m.options))
		return fail(EXIT_USAGE, "more options than a remount takes");
	fd = ctl ? open(ctl, O_RDONLY | O_CLOEXEC) : -1;
	r = fd < 0 || ioctl(fd, CACHEFS_IOC_REMOUNT, &m) ? errno : 0;
	sys_close(&fd);
	free(ctl);
	if (r)
		return fail(EXIT_FAILURE, "%s: %s", mnt, r == ENOENT ||
		    r == ENOTDIR || r == ENOTTY ? "is not a cachefs mount" :
		    strerror(r));
	if (*m.why)
		return fail(EXIT_FAILURE, "%s: %s", mnt, m.why);
	if (geteuid() == 0 && mount(NULL, mnt, NULL, MS_REMOUNT | MS_BIND |
	    MS_RDONLY | args.conf.mount_flags, NULL))
		return fail(EXIT_FAILURE, "%s: %s", mnt, strerror(errno));
	return EXIT_SUCCESS;
}

/* Close what the caller had open, which may be locked, or on what we mount over:
 * all but the first three and fd. */
static void
close_others(int fd)
{
	unsigned u = (unsigned)fd;

	if (!syscall(SYS_close_range, u + 1, ~0u, 0)) {
		syscall(SYS_close_range, 3, u - 1, 0);
		return;
	}
	for (int i = 3; i < 1024; i++)	/* Linux before 5.9 */
		if (i != fd)
			close(i);
}

/* Fork the daemon and wait until it answers or ends.  The exit status. */
static int
daemonize(void)
{
	int p[2], status;
	char byte;
	pid_t pid;

	if (pipe2(p, O_CLOEXEC))
		return fail(EXIT_FAILURE, "pipe: %s", strerror(errno));
	pid = fork();
	if (pid < 0)
		return fail(EXIT_FAILURE, "fork: %s", strerror(errno));
	if (pid == 0) {
		close_others(p[1]);
		setsid();
		if (chdir("/"))
			log_warn("chdir: %s", strerror(errno));
		exit(run(p[1]));
	}
	close(p[1]);
	if (read(p[0], &byte, 1) == 1)
		return EXIT_SUCCESS;
	if (waitpid(pid, &status, 0) == pid && WIFEXITED(status) &&
	    WEXITSTATUS(status))
		return WEXITSTATUS(status);
	return fail(EXIT_FAILURE, "the daemon ended unexpectedly");
}

/* The absolute form of a path, allocated; of one that is not there, or a dead
 * mount, only what is above it is resolved. */
static char *
absolute(const char *path)
{
	char *real = realpath(path, NULL), *above = NULL, *last;
	char dir[PATH_MAX], name[PATH_MAX];

	snprintf(dir, sizeof(dir), "%s", path);
	snprintf(name, sizeof(name), "%s", path);
	last = basename(name);
	if (!real && (above = realpath(dirname(dir), NULL)))
		real = path_join(above, last);
	if (!real && *path != '/' && (above = getcwd(NULL, 0)))
		real = path_join(above, path);
	free(above);
	return real ?: strdup(path);
}

/* What the daemon goes by: as it was parsed, but that it changes its
 * directory. */
static void
conf_start(void)
{
	conf = args.conf;
	conf.mountpoint = absolute(conf.mountpoint);
	conf.cache_dir = absolute(conf.cache_dir);
	conf.nfs_backend = strstr(conf.nfs_backend, ":/") ?
	    strdup(conf.nfs_backend) : absolute(conf.nfs_backend);
	conf.cache_include = strdup(conf.cache_include);
	conf.cache_exclude = strdup(conf.cache_exclude);
	logs.level = conf.debug ? LOG_DBG : (int)conf.log_level;
	logs.syslog = conf.log_target == 2;
}

/* One line of `cachefs check`. */
__attribute__((format(printf, 3, 4))) static bool
verdict(const char *what, bool good, const char *fmt, ...)
{
	va_list ap;

	printf("%-14s %-7s", what, good ? "ok" : "FAILED");
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	putchar('\n');
	fflush(stdout);
	return good;
}

/* The verdict on the cache disk; made: its directory is there for that only. */
static bool
check_disk(const char *backend, bool made)
{
	struct statvfs sv;
	bool good;

	store.look = true;
	good = !store_open(backend) && !store_limits() &&
	    !fstatvfs(store.dir, &sv);
	if (!good)
		return verdict("cache disk", false, "%s", conf.cache_dir);
	return verdict("cache disk", true, "%s%s: %s of %s may be taken, %s are "
	    "free", conf.cache_dir, made ? " (to be made)" : "",
	    BYTES((double)(store.limit ? store.limit : store.room)),
	    BYTES((double)sv.f_blocks * (double)sv.f_frsize),
	    BYTES((double)sv.f_bavail * (double)sv.f_frsize));
}

/* The verdicts on a mount with this cache disk; run_end() unmounts. */
static bool
check_mount(void)
{
	struct stat st;
	bool good = true;
	int r;

	if (!conf.debug)		/* the verdicts say the rest */
		logs.level = MIN(logs.level, (int)LOG_WARN);
	r = mount_fuse(-1) ?: be->run() ?:
	    pool_start(conf.buffer_memory, conf.cache_block_size);
	if (!r) {
		good = !exec_start(store.dir);
		verdict("io_uring", good, "%s", exec.uring ? "on" :
		    "off, threads do it");
		r = serve_start(&st);
	}
	good &= verdict("mount", !r, "%s", r ? "" : "answers");
	if (!r)
		good &= verdict("passthrough", !passthrough_probe(), "%s%s",
		    passthrough_off ? "off: " : "on", passthrough_off ?: "");
	workers_stop();
	return good;
}

/* cachefs check [-c FILE] [-o opt[,opt...]] [SOURCE]: what a mount with this
 * configuration would meet, a verdict a line; nothing of it stays. */
static int
cmd_check(int argc, char **argv)
{
	char backend[1000], dir[] = "/tmp/cachefs-check.XXXXXX";
	bool good, made;
	int r;

	args.argc = argc;
	args.argv = argv;
	args.check = true;
	r = args_parse(&args.conf);
	if (r >= 0)
		return r;
	conf_start();
	logs.syslog = false;
	run_prepare();
	if (backend_choose(backend))
		return EXIT_USAGE;
	verdict("configuration", true, "%s", args.file ?: "");
	r = be->start();
	good = verdict("server", !r, "%s%s", conf.nfs_backend, r ||
	    be != &bnfs_backend ? "" : bnfs.version == 3 ? ", NFSv3" :
	    ", NFSv4");
	made = !mkdir(conf.cache_dir, 0700);
	good &= check_disk(backend, made);
	if (good && !mkdtemp(dir)) {
		log_error("%s: %s", dir, strerror(errno));
		good = false;
	}
	free(conf.mountpoint);
	conf.mountpoint = strdup(dir);
	good = good && check_mount();
	if (made && store.dir >= 0)
		unlinkat(store.dir, "lock", 0);
	if (made)
		rmdir(conf.cache_dir);
	run_end(backend);
	rmdir(dir);
	return good ? EXIT_SUCCESS : EXIT_FAILURE;
}

#ifndef CACHEFS_NO_MAIN
int
main(int argc, char **argv)
{
	const char *name = argc ? strrchr(*argv, '/') : NULL;
	int r;

	name = name ? name + 1 : argc ? *argv : "";
	args.helper = !strncmp(name, "mount.", 6);
	r = argc > 1 && !args.helper ? cmd_run(argc - 1, argv + 1) : -1;
	if (r >= 0)
		return r;
	args.argc = argc;
	args.argv = argv;
	r = args_parse(&args.conf);
	if (r >= 0)
		return r;
	if (args.fake)
		return EXIT_SUCCESS;
	if (args.conf.remount)
		return remount();
	conf_start();
	return args.store ? mount_and_store() : conf.foreground ? run(-1) :
	    daemonize();
}
#endif

/* === main =================================================== End === */
