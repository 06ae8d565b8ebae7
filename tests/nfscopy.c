/*
 * nfscopy - copy one file from an NFS server with bare libnfs: the yardstick
 * that a cold read through cachefs is measured by.
 *
 * usage: nfscopy [-c CONNS] [-w WINDOW] URL OUTFILE
 *        nfscopy -n [-c CONNS] [-w WINDOW] URL
 *        nfscopy -l COUNT URL
 * where URL is nfs://HOST/EXPORT/FILE?nfsport=P&mountport=Q
 *
 * CONNS connections (4), each with its own context and thread, keep WINDOW (8)
 * reads of 1 MiB in flight.  The bytes go to OUTFILE with O_DIRECT, or nowhere
 * with -n.  The clock starts when all connections stand and stops when the
 * last write returned.
 *
 * With -l, COUNT reads of 256 KiB at random places, one after the other on one
 * connection, go nowhere; how long they took is printed.
 */
#define _GNU_SOURCE
#include <sys/time.h>	/* libnfs.h wants it first */
#include <sys/resource.h>

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <nfsc/libnfs.h>

#define CHUNK	((size_t)1 << 20)
#define BLOCK	((size_t)256 << 10)	/* of -l: what cachefs fetches */
#define ALIGN	((size_t)4096)
#define SILENCE	30000		/* ms that a server may say nothing */
#define CONNMAX	64

struct conn {
	struct nfs_context *nfs;
	struct nfsfh *fh;
	pthread_t thread;
	int inflight;
};

/* One read on its way: a chunk of the file and the buffer that it fills. */
struct slot {
	struct conn *conn;
	char *buf;
	off_t off;
	size_t want;
	size_t got;
	double asked;	/* when */
};

static const char *url;
static off_t size;
static int out = -1;
static int window = 8;
static size_t chunk = CHUNK;
static _Atomic off_t next;	/* first byte that nobody has asked for */
static double *times;		/* of -l: how long each read took */
static int ntimes, nreads;

static void next_chunk(struct slot *);

static double
now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static double
seconds(struct timeval tv)
{
	return (double)tv.tv_sec + (double)tv.tv_usec / 1e6;
}

static int
number(const char *s, int max)
{
	char *end;
	long n = strtol(s, &end, 10);

	if (*s == '\0' || *end != '\0' || n < 1 || n > max)
		errx(2, "%s: not a number from 1 to %d", s, max);
	return (int)n;
}

/* Write a whole chunk; the file's padded last block is cut at the end. */
static void
put(const struct slot *s)
{
	size_t len = (s->want + ALIGN - 1) & ~(ALIGN - 1), done = 0;

	memset(s->buf + s->want, 0, len - s->want);
	while (out >= 0 && done < len) {
		ssize_t n = pwrite(out, s->buf + done, len - done,
		    s->off + (off_t)done);

		if (n < 0 && errno != EINTR)
			err(1, "cannot write at %lld", (long long)s->off);
		done += n > 0 ? (size_t)n : 0;
	}
}

static void
read_done(int status, struct nfs_context *nfs, void *data, void *priv)
{
	struct slot *s = priv;

	if (status < 0)
		errx(1, "cannot read %s at %lld: %s", url, (long long)s->off,
		    status == -EINTR ? "connection lost" : nfs_get_error(nfs));
	if (status == 0 || (size_t)status > s->want - s->got)
		errx(1, "%s: changed size while it was read", url);
#ifdef LIBNFS_API_V2
	(void)data;	/* it was received where it belongs */
#else
	if (out >= 0)
		memcpy(s->buf + s->got, data, (size_t)status);
#endif
	s->got += (size_t)status;
	s->conn->inflight--;
	next_chunk(s);
}

/* Where the next chunk is; past the end when there are no more. */
static off_t
next_offset(void)
{
	if (times == NULL)
		return atomic_fetch_add(&next, (off_t)chunk);
	if (nreads == ntimes)
		return size;
	return lrand48() % (long)((size_t)size / chunk) * (off_t)chunk;
}

/* Ask for what is missing of the chunk, or write it and go on to the next. */
static void
next_chunk(struct slot *s)
{
	struct conn *c = s->conn;
	uint64_t off;
	int r;

	if (s->got == s->want) {
		if (s->want > 0 && times != NULL)
			times[nreads++] = now() - s->asked;
		if (s->want > 0)
			put(s);
		s->off = next_offset();
		if (s->off >= size)
			return;
		s->got = 0;
		s->want = size - s->off < (off_t)chunk ?
		    (size_t)(size - s->off) : chunk;
		s->asked = now();
	}
	off = (uint64_t)s->off + s->got;
#ifdef LIBNFS_API_V2
	r = nfs_pread_async(c->nfs, c->fh, s->buf + s->got, s->want - s->got,
	    off, read_done, s);
#else
	r = nfs_pread_async(c->nfs, c->fh, off, s->want - s->got,
	    read_done, s);
#endif
	if (r < 0)
		errx(1, "cannot read %s: %s", url, nfs_get_error(c->nfs));
	c->inflight++;
}

static void *
run(void *arg)
{
	struct conn *c = arg;
	struct slot *slots = calloc((size_t)window, sizeof(*slots));

	if (slots == NULL)
		err(1, "no memory");
	for (int i = 0; i < window; i++) {
		slots[i].conn = c;
		slots[i].buf = aligned_alloc(ALIGN, CHUNK);
		if (slots[i].buf == NULL)
			err(1, "no memory");
		next_chunk(&slots[i]);
	}
	while (c->inflight > 0) {
		struct pollfd p = { .fd = nfs_get_fd(c->nfs),
		    .events = (short)nfs_which_events(c->nfs) };
		int n = poll(&p, 1, SILENCE);

		if (n < 0 && errno != EINTR)
			err(1, "poll");
		if (n == 0)
			errx(1, "%s: the server is silent", url);
		if (n > 0 && nfs_service(c->nfs, p.revents) < 0)
			errx(1, "%s: connection lost", url);
	}
	for (int i = 0; i < window; i++)
		free(slots[i].buf);
	free(slots);
	return NULL;
}

/* Make a connection and open the file on it; not for two threads at once. */
static void
dial(struct conn *c)
{
	struct nfs_stat_64 st;
	struct nfs_url *u;

	if ((c->nfs = nfs_init_context()) == NULL)
		errx(1, "no memory");
	if ((u = nfs_parse_url_full(c->nfs, url)) == NULL)
		errx(2, "%s: %s", url, nfs_get_error(c->nfs));
	nfs_set_autoreconnect(c->nfs, 0);
	nfs_set_timeout(c->nfs, SILENCE);
	if (nfs_mount(c->nfs, u->server, u->path) != 0)
		errx(1, "cannot mount %s: %s", url, nfs_get_error(c->nfs));
	if (nfs_open(c->nfs, u->file, O_RDONLY, &c->fh) != 0 ||
	    nfs_fstat64(c->nfs, c->fh, &st) != 0)
		errx(1, "cannot open %s: %s", url, nfs_get_error(c->nfs));
	size = (off_t)st.nfs_size;
	nfs_destroy_url(u);
}

static int
compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void
print_times(void)
{
	qsort(times, (size_t)nreads, sizeof(*times), compare);
	printf("%d reads of %zu KiB: p50 %.1f us, p99 %.1f us\n", nreads,
	    chunk >> 10, times[nreads / 2] * 1e6,
	    times[(long long)nreads * 99 / 100] * 1e6);
}

int
main(int argc, char **argv)
{
	static struct conn conns[CONNMAX];
	struct rusage use0, use1;
	int nconns = 4, discard = 0, opt, e;
	double start, took, cpu;

	while ((opt = getopt(argc, argv, "c:l:w:n")) != -1) {
		if (opt == 'c')
			nconns = number(optarg, CONNMAX);
		else if (opt == 'l')
			ntimes = number(optarg, 1000000);
		else if (opt == 'w')
			window = number(optarg, 1024);
		else if (opt == 'n')
			discard = 1;
		else
			return 2;
	}
	if (ntimes > 0)
		nconns = window = discard = 1;
	if (argc - optind != 2 - discard)
		errx(2, "usage: nfscopy [-c CONNS] [-w WINDOW] URL OUTFILE | "
		    "nfscopy -n [-c CONNS] [-w WINDOW] URL | "
		    "nfscopy -l COUNT URL");
	url = argv[optind];
	for (int i = 0; i < nconns; i++)
		dial(&conns[i]);
	if (ntimes > 0) {
		chunk = BLOCK;
		if ((size_t)size < chunk)
			errx(1, "%s: shorter than %zu bytes", url, chunk);
		if ((times = calloc((size_t)ntimes, sizeof(*times))) == NULL)
			err(1, "no memory");
	}
	if (!discard) {
		const char *path = argv[optind + 1];

		out = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_DIRECT, 0644);
		if (out < 0 || ftruncate(out, size) < 0)
			err(1, "cannot create %s", path);
	}

	getrusage(RUSAGE_SELF, &use0);
	start = now();
	for (int i = 0; i < nconns; i++)
		if ((e = pthread_create(&conns[i].thread, NULL, run,
		    &conns[i])) != 0)
			errx(1, "no thread: %s", strerror(e));
	for (int i = 0; i < nconns; i++)
		pthread_join(conns[i].thread, NULL);
	if (out >= 0 && (ftruncate(out, size) < 0 || close(out) < 0))
		err(1, "cannot finish %s", argv[optind + 1]);
	took = now() - start;
	getrusage(RUSAGE_SELF, &use1);

	cpu = seconds(use1.ru_utime) + seconds(use1.ru_stime) -
	    seconds(use0.ru_utime) - seconds(use0.ru_stime);
	if (times != NULL)
		print_times();
	else
		printf("%lld bytes in %.3f s, %.1f MB/s, %.3f s CPU\n",
		    (long long)size, took, (double)size / took / 1e6, cpu);
	for (int i = 0; i < nconns; i++) {
		nfs_close(conns[i].nfs, conns[i].fh);
		nfs_destroy_context(conns[i].nfs);
	}
	return 0;
}
