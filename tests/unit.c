/*
 * unit.c - tests of what can be tested in cachefs.c without mounting it: each
 * claim is a line of TAP.  The cache's files lie in a directory of their own
 * below $TMPDIR or /var/tmp, which should be on a disk that takes O_DIRECT.
 */
#pragma GCC diagnostic ignored "-Wunused-function"	/* main() calls them */
#include "../cachefs.c"
#include <ftw.h>

#define COUNTOF(a) (sizeof(a) / sizeof((a)[0]))
/* A condition of the claim that is being tested; says which one failed. */
#define T(cond) TS(cond, "")
#define TS(cond, what) \
	((void)((cond) || t_failed(__LINE__, #cond, what)))

static unsigned claims, failures;
static atomic_uint failed;
static char tmp[PATH_MAX];

static bool
t_failed(int line, const char *cond, const char *what)
{
	if (failed++ < 5)
		printf("# unit.c:%d: %s  %s\n", line, cond, what);
	return false;
}

/* All T() since the last claim were about this one. */
static void
claim(const char *text)
{
	printf("%sok %u - %s\n", failed ? "not " : "", ++claims, text);
	fflush(stdout);
	failures += failed > 0;
	failed = 0;
}

static uint64_t
rnd(void)				/* xorshift64: the same every time */
{
	static _Thread_local uint64_t x = 88172645463325252u;

	x ^= x << 13;
	x ^= x >> 7;
	return x ^= x << 17;
}

static char *
in_tmp(const char *name)
{
	static char path[PATH_MAX + 64];

	snprintf(path, sizeof(path), "%s/%s", tmp, name);
	return path;
}

/* === conf === */

/* The number that an option has in c: bytes, percent, an index of words. */
static double
conf_value(const struct conf *c, const struct copt *o)
{
	const void *at = (const char *)c + o->at;
	const struct amount *a = at;

	switch (o->type) {
	case C_STR:
		return 0;
	case C_SIZE:
		return (double)*(const uint64_t *)at;
	case C_AMOUNT:
		return a->percent > 0 ? a->percent : (double)a->bytes;
	case C_SECS:
		return *(const double *)at;
	default:
		return *(const unsigned *)at;
	}
}

static void
test_conf_sizes(void)
{
	static const struct { const char *s; double want; } v[] = {
		{ "0", 0 }, { "4096", 4096 }, { "64K", 65536 },
		{ "64k", 65536 }, { "1M", 1048576 }, { "1.5G", 1610612736. },
		{ "1GiB", 1073741824. }, { "2gb", 2147483648. },
		{ "3T", 3298534883328. }, { "5 ", 5 }, { "0.5K", 512 },
		{ "", -1 }, { "M", -1 }, { "-1", -1 }, { "+1", -1 },
		{ " 1", -1 }, { "1X", -1 }, { "1 M", -1 }, { "64MM", -1 },
		{ "64Mi", -1 }, { "64MiBs", -1 }, { "1B", -1 }, { ".5", -1 },
		{ "inf", -1 }, { "nan", -1 }, { "1,5M", -1 }, { "10%", -1 },
	};
	double d;

	for (size_t i = 0; i < COUNTOF(v); i++) {
		d = -1;
		TS(conf_size(v[i].s, &d) == (v[i].want >= 0), v[i].s);
		TS(v[i].want < 0 || d == v[i].want, v[i].s);
	}
	claim("sizes have units of powers of 1024, and nothing else");
}

static const struct { const char *opts, *name; double want; } conf_good[] = {
	{ "nfs_port=2049", "nfs_port", 2049 },
	{ "nfs_version=4", "nfs_version", 2 },
	{ "nfs_uid=4294967294", "nfs_uid", 4294967294. },
	{ "cache_size=10G", "cache_size", 10737418240. },
	{ "cache_size=25%", "cache_size", 25 },
	{ "cache_size=0.5%", "cache_size", 0.5 },
	{ "cache_fill=50", "cache_fill", 50 },
	{ "cache_fill=50%", "cache_fill", 50 },
	{ "cache_block_size=64M", "cache_block_size", 67108864 },
	{ "cache_max_file_size=none", "cache_max_file_size", 0 },
	{ "cache_checksum=Off", "cache_checksum", NO },
	{ "cache_checksum=FALSE", "cache_checksum", NO },
	{ "cache_checksum=0", "cache_checksum", NO },
	{ "nvme_polling_mode", "nvme_polling_mode", YES },
	{ "nvme_polling_mode=on", "nvme_polling_mode", YES },
	{ "nvme_use_io_uring=Auto", "nvme_use_io_uring", AUTO },
	{ "fuse_attr_timeout=0.25", "fuse_attr_timeout", 0.25 },
	{ "nfs_port=1,,nfs_port=2,", "nfs_port", 2 },	/* the last counts */
	/* the Rust ancestor's names */
	{ "cache_size_gb=1.5", "cache_size", 1610612736. },
	{ "block_size_mb=4", "cache_block_size", 4194304 },
	{ "min_cache_file_size_mb=1", "cache_min_file_size", 1048576 },
	{ "readahead_mb=2", "fuse_readahead", 2097152 },
	{ "ttl_hours=2", "cache_ttl", 7200 },
	{ "ttl_hours=0.5", "cache_consistency", CONS_TTL },
	{ "checksum=no", "cache_checksum", NO },
	{ "eviction=lfu", "cache_eviction", 1 },
	{ "eviction=arc", "cache_eviction", 2 },
	{ "direct_io=no", "nvme_direct_io", NO },
	{ "allow_other", "fuse_allow_other", YES },
	{ "max_concurrent=64,max_concurrent", "nfs_port", 0 },
	/* mount(8)'s words */
	{ "ro,_netdev,nofail,noauto,defaults,relatime,user", "nfs_port", 0 },
	{ "x-systemd.automount,X-y=1,comment=a b,uhelper=z", "nfs_port", 0 },
	{ "rw", "nfs_port", 0 },
};
static const char *const conf_bads[] = { "nfs_port=65536", "nfs_port=1.5",
	"nfs_port=", "nfs_port", "nfs_port=-1", "nfs_port=20 49",
	"nfs_port=nan",
	"nfs_port=inf", "nfs_version=2", "nfs_uid=4294967295", "cache_size=0%",
	"cache_size=101%", "cache_size=%", "cache_size=5%%", "cache_size=nan%",
	"cache_size=-5%", "cache_size=9000000T", "cache_size=none",
	"cache_fill=101%", "cache_fill=5%5", "cache_ttl=60%",
	"cache_block_size=384K", "cache_block_size=2K", "cache_block_size=128M",
	"cache_eviction=LRU", "cache_eviction=", "cache_checksum=2",
	"cache_checksum=auto", "nvme_use_io_uring=maybe",
	"nvme_buffer_memory=4M", "fuse_attr_timeout=-0.1",
	"fuse_attr_timeout=1s", "cache_size_gb=10G", "cache_size_gb",
	"block_size_mb=3", "eviction", "sync", "user=root", "port=1",
	"nfs:port=1", "nfsport=1", "nfs_", "=1", "nfs_port2=1", "foreground=2",
	"ttl_hours=soon", "ttl_hours=" };

static void
test_conf_options(void)
{
	struct conf c, was;

	for (size_t i = 0; i < COUNTOF(conf_good); i++) {
		const char *n = conf_good[i].name;

		conf_defaults(&c);
		TS(!conf_options(&c, conf_good[i].opts), conf_good[i].opts);
		TS(conf_value(&c, conf_find(n, '_')) ==
		    conf_good[i].want, conf_good[i].opts);
		conf_free(&c);
	}
	claim("-o sets what it says");
	for (size_t i = 0; i < COUNTOF(conf_bads); i++) {
		conf_defaults(&c);
		was = c;
		TS(conf_options(&c, conf_bads[i]), conf_bads[i]);
		TS(!memcmp(&c, &was, sizeof(c)), conf_bads[i]);
		conf_free(&c);
	}
	claim("a bad -o is refused, and sets nothing");

	conf_defaults(&c);
	T(!conf_options(&c, "cache_exclude=*.a\\,b *\\c,fsname=x\\,y=z,"
	    "cache_dir=/a=b,nfs_backend="));
	T(!strcmp(c.cache_exclude, "*.a,b *\\c"));
	T(!strcmp(c.fsname, "x,y=z"));
	T(!strcmp(c.cache_dir, "/a=b") && !strcmp(c.nfs_backend, ""));
	claim("only \\, is a comma inside a value, and = may be in it");
	T(c.mount_flags == (MS_NOSUID | MS_NODEV));
	T(!conf_options(&c, "suid,dev,noexec") && c.mount_flags == MS_NOEXEC);
	T(!conf_options(&c, "exec,nosuid,nodev"));
	T(c.mount_flags == (MS_NOSUID | MS_NODEV));
	claim("the last of suid, nosuid, dev, nodev, exec and noexec counts");
	T(!conf_options(&c, "foreground,debug") && c.foreground && c.debug);
	T(!conf_options(&c, "foreground=no,debug=off"));
	T(!c.foreground && !c.debug);
	claim("foreground and debug are -f and -d");
	conf_free(&c);
}

/* What holds for every line of the table. */
static void
test_conf_table(void)
{
	struct conf c, d;
	char text[64];

	conf_defaults(&c);
	for (size_t i = 0; i < NCOPTS; i++) {
		const struct copt *o = &copts[i];
		bool number = o->type == C_UINT || o->type == C_PERCENT ||
		    o->type == C_SECS || o->type == C_SIZE;

		snprintf(text, sizeof(text), "%s:%s", o->sect, o->key);
		TS(conf_find(text, ':') == o, text);
		TS(!conf_find(text, '_'), text);
		text[strlen(text) - 1] = '\0';
		TS(!conf_find(text, ':'), text);
		TS(strlen(conf_range(o)) < 127, o->key);
		if (o->type == C_STR)
			continue;
		TS(conf_set(&c, o, "") && conf_set(&c, o, "x"), o->key);
		TS(conf_set(&c, o, "-1") && conf_set(&c, o, "1e99"), o->key);
		for (int w = 0; o->words && o->words[w]; w++)
			TS(!conf_set(&c, o, o->words[w]) &&
			    conf_value(&c, o) == w, o->key);
		if (!number)
			continue;
		snprintf(text, sizeof(text), "%.0f", o->min);
		TS(!conf_set(&c, o, text) && conf_value(&c, o) == o->min, text);
		if (o->max < 9e18) {
			snprintf(text, sizeof(text), "%.0f", o->max);
			TS(!conf_set(&c, o, text) &&
			    conf_value(&c, o) == o->max, text);
		}
		snprintf(text, sizeof(text), "%.0f", o->max * 2);
		TS(conf_set(&c, o, text), text);
		snprintf(text, sizeof(text), "%.0f", o->min - 1);
		TS(conf_set(&c, o, text), text);
	}
	claim("every option takes its least and greatest value and no other");
	conf_free(&c);

	FILE *f = fopen(in_tmp("all.ini"), "w");

	for (size_t i = 0; f && i < NCOPTS; i++)
		if (copts[i].def)
			fprintf(f, "[%s]\n%s = %s\n", copts[i].sect,
			    copts[i].key, copts[i].def);
	T(f && !fclose(f));
	memset(&c, 0, sizeof(c));
	conf_defaults(&d);
	T(!conf_ini(&c, in_tmp("all.ini")));
	for (size_t i = 0; i < NCOPTS; i++)
		TS(!copts[i].def || conf_value(&c, &copts[i]) ==
		    conf_value(&d, &copts[i]), copts[i].key);
	claim("an ini file of all defaults gives the defaults");
	conf_free(&c);
	conf_free(&d);
}

static void
test_conf_ini(void)
{
	static const struct { const char *text; bool ok; } v[] = {
		{ "", true }, { "# nothing\n; at all\n", true },
		{ "[nfs]\nport = 7\n", true }, { "[nfs]\nport=7", true },
		{ "[NFS]\nPort = 7\n", true },
		{ "[nfs]\r\nport = 7\r\n", true },
		{ "[nfs]\nport = 7 ; why\n", true },
		{ "[nfs]\nport = \"7\"\n", true },
		{ "[cache]\ndir = /x\n[nfs]\nport = 7\n[nvme]\n", true },
		{ "[nfs]\nport = 70000\n", false },
		{ "[nfs]\nport =\n", false }, { "[nfs]\nport\n", false },
		{ "[nfs]\nprot = 7\n", false }, { "[nsf]\n", false },
		{ "[nfs]\nnfs_port = 7\n", false },
		{ "port = 7\n", false }, { "[nfs\nport = 7\n", false },
		{ "[cache]\nport = 7\n", false },
		{ "[nfs]\nport = 7\nwhat is this\n", false },
	};
	struct conf c;

	for (size_t i = 0; i < COUNTOF(v); i++) {
		FILE *f = fopen(in_tmp("one.ini"), "w");

		T(f && fputs(v[i].text, f) >= 0 && !fclose(f));
		conf_defaults(&c);
		TS(!conf_ini(&c, in_tmp("one.ini")) == v[i].ok, v[i].text);
		if (v[i].ok && strchr(v[i].text, '7'))
			TS(c.nfs_port == 7, v[i].text);
		conf_free(&c);
	}
	conf_defaults(&c);
	T(conf_ini(&c, in_tmp("none.ini")) && conf_ini(&c, tmp));
	conf_free(&c);
	claim("an ini file is read, or refused for one unknown or bad line");
}

static void
test_conf_check(void)
{
	static const struct { const char *opts; bool ok; } v[] = {
		{ "", true }, { "nfs_backend=", false },
		{ "cache_dir=", false },
		{ "cache_min_file_size=2M,cache_max_file_size=1M", false },
		{ "cache_min_file_size=1M,cache_max_file_size=1M", true },
		{ "cache_min_file_size=2M,cache_max_file_size=none", true },
		{ "nvme_use_io_uring=no,nvme_polling_mode=yes", false },
		{ "nvme_use_io_uring=no", true },
		{ "nvme_io_poll=yes,nvme_direct_io=no", false },
		{ "nvme_splice=yes", false },
		{ "nvme_use_io_uring=yes", WITH_URING },
	};
	struct conf c;

	for (size_t i = 0; i < COUNTOF(v); i++) {
		conf_defaults(&c);
		T(!conf_options(&c, "nfs_backend=/a,cache_dir=/b"));
		T(!conf_options(&c, v[i].opts));
		TS((conf_check(&c) == 0) == v[i].ok, v[i].opts);
		conf_free(&c);
	}
	conf_defaults(&c);
	T(conf_check(&c));
	conf_free(&c);
	claim("options that contradict each other are refused");
}

/* === util === */

static void
test_util(void)
{
	static const int64_t ns[] = { 0, 1, -1, 999999999, 1000000000,
		-999999999, -1000000000, -1000000001, INT64_MAX, INT64_MIN,
		1700000000123456789 };
	struct version a = { 1, 2, 3, 4, 5 }, b = a;
	struct dirlist l = { 0 };
	char name[300];
	uint64_t map[4] = { 0 };

	for (size_t i = 0; i < COUNTOF(ns); i++) {
		struct timespec t = nanos_ts(ns[i]);

		T(t.tv_nsec >= 0 && t.tv_nsec < 1000000000);
		T(ns[i] == INT64_MIN || nanos(t.tv_sec, t.tv_nsec) == ns[i]);
	}
	T(nanos(-1, 999999999) == -1);
	claim("times before and after 1970 survive as nanoseconds");
	T(nanos(INT64_MAX, 0) == INT64_MAX && nanos(INT64_MIN, 0) == INT64_MIN);
	T(nanos(9223372036, 999999999) == INT64_MAX);
	T(nanos(-9223372037, 0) == INT64_MIN);
	claim("times that do not fit stick to the first or last that does");

	for (uint64_t i = 0; i < 256; i += 1 + i % 3)
		bit_set(map, i);
	for (uint64_t i = 0, next = 0; i < 256; i++) {
		T(bit_get(map, i) == (i == next));
		next += i == next ? 1 + i % 3 : 0;
	}
	claim("setting a bit sets that bit");

	T(version_same(&a, &b) && version_same_file(&a, &b));
	for (size_t i = 0; i < sizeof(a); i++) {
		b = a;
		((char *)&b)[i] ^= 1;
		T(!version_same(&a, &b));
		T(version_same_file(&a, &b) == (i >= 16));
	}
	claim("a version differs in any byte, a file in fsid or fileid");

	memset(name, 'x', sizeof(name));
	name[256] = '\0';
	T(!dirlist_add(&l, name, NULL) && l.n == 0);
	name[255] = '\0';
	T(!dirlist_add(&l, name, NULL) && l.n == 1);
	T(!dirlist_add(&l, "", NULL) && !dirlist_add(&l, ".", NULL) &&
	    !dirlist_add(&l, "..", NULL) && !dirlist_add(&l, "a/b", NULL) &&
	    !dirlist_add(&l, "/", NULL) && l.n == 1);
	T(!dirlist_add(&l, "...", NULL) && !dirlist_add(&l, "\xff\n", NULL));
	for (int i = 0; i < 1000; i++)
		T(!dirlist_add(&l, "again", &(struct attr){ .nlink = 7 }));
	T(l.n == 1003 && l.v[1002].have_attr && l.v[1002].attr.nlink == 7 &&
	    !l.v[0].have_attr && !strcmp(l.v[1].name, "..."));
	dirlist_free(&l);
	T(!l.v && !l.n && !l.room);
	claim("names that can't be names are left out of a listing");
}

/* === pool === */

static char *kept[64];			/* what pool.reclaim gives back */
static atomic_int nkept;

static bool
take_back(void)
{
	int i = atomic_fetch_sub(&nkept, 1);

	if (i <= 0)
		atomic_fetch_add(&nkept, 1);
	else
		pool_put(kept[i - 1], MiB);
	return i > 0;
}

static int
by_address(const void *a, const void *b)
{
	const char *x = *(char *const *)a, *y = *(char *const *)b;

	return (x > y) - (x < y);
}

static void
pool_restart(size_t size, size_t block)
{
	pool_stop();
	T(!pool_start(size, block));
	pool.reclaim = take_back;
}

static void
test_pool(void)
{
	static const size_t blocks[] = { 4 * KiB, 64 * KiB, MiB, 16 * MiB };
	static char *b[2048];
	char *p, *q;

	for (size_t i = 0; i < COUNTOF(blocks); i++) {
		size_t gran = MIN(blocks[i], MiB), n = 0;

		pool_restart(8 * MiB, blocks[i]);
		while (n < COUNTOF(b) && (b[n] = pool_try(gran, 0)))
			n++;
		T(n == MIN(8 * MiB / gran, COUNTOF(b)));
		qsort(b, n, sizeof(*b), by_address);
		for (size_t k = 0; k < n; k++)
			T((uintptr_t)b[k] % DIO_ALIGN == 0 &&
			    (k == 0 || b[k] >= b[k - 1] + gran));
		T(b[0] >= pool.base);
		T(b[n - 1] + gran <= pool.base + pool.size);
		T(pool.used == 8 * MiB && !pool_try(1, 0));
		while (n)
			pool_put(b[--n], gran);
		T(pool.used == 0);
	}
	claim("the whole pool can be had, aligned and without overlap");

	pool_restart(2 * MiB, 256 * KiB);
	p = pool_try(MiB, 0);
	q = pool_try(700 * KiB, 0);
	T(p && q && (size_t)(p - pool.base) % MiB == 0);
	T(pool.used == 2 * MiB - 256 * KiB && !pool_try(300 * KiB, 0));
	pool_put(p, MiB);
	T((p = pool_try(512 * KiB, 0)) && (b[0] = pool_try(512 * KiB, 0)));
	T(!pool_try(512 * KiB, 0));	/* 256K left, in the other slab */
	pool_put(p, 512 * KiB);
	T(!pool_try(600 * KiB, 0));	/* 768K free, but not in a row */
	T((p = pool_try(512 * KiB, 0)));
	pool_put(p, 512 * KiB);
	pool_put(b[0], 512 * KiB);
	T(!pool_try(MiB, 512 * KiB) && (p = pool_try(MiB, 256 * KiB)));
	pool_put(p, MiB);
	pool_put(q, 700 * KiB);
	T(pool.used == 0);
	claim("a run of granules lies in one slab, and `spare` stays free");

	pool_restart(2 * MiB, MiB);
	kept[0] = pool_try(MiB, 0);
	kept[1] = pool_try(MiB, 0);
	nkept = 2;
	T((p = pool_try(MiB, 0)) && nkept == 1);
	T((q = pool_get(MiB)) && nkept == 0 && p != q);
	T(!pool_try(MiB, 0));
	pool_put(p, MiB);
	pool_put(q, MiB);
	claim("a kept buffer is taken back when the pool is empty");
}

static struct waiter {
	pthread_t tid;
	struct req rq;
	char *got;
	atomic_bool over;
} waiters[4];

static void *
wait_for_buffer(void *arg)
{
	struct waiter *w = arg;

	cur = &w->rq;
	w->got = pool_get(MiB);
	cur = NULL;
	w->over = true;
	return NULL;
}

static unsigned
pool_waiting(void)
{
	struct pool_waiter *w;
	unsigned n = 0;

	pthread_mutex_lock(&pool.lock);
	TAILQ_FOREACH(w, &pool.waiters, next)
		n++;
	pthread_mutex_unlock(&pool.lock);
	return n;
}

static void
test_pool_fifo(void)
{
	pid_t reader = fork();		/* on whose behalf one of them waits */
	char *p, *q;

	if (reader == 0)
		for (;;)
			pause();
	pool_restart(2 * MiB, MiB);
	p = pool_get(MiB);
	q = pool_get(MiB);
	memset(waiters, 0, sizeof(waiters));
	for (unsigned i = 0; i < 4; i++) {
		waiters[i].rq.unique = i + 1;
		waiters[i].rq.pid = i == 1 ? (uint32_t)reader : 0;
		T(!sys_thread(&waiters[i].tid, wait_for_buffer, &waiters[i]));
		while (pool_waiting() != i + 1)
			usleep(1000);
	}
	T(reader > 0 && !kill(reader, SIGKILL) &&
	    waitpid(reader, NULL, 0) == reader);
	for (uint64_t end = now_ms() + 30000; !waiters[1].over &&
	    now_ms() < end; usleep(1000))
		req_interrupt(2);
	T(waiters[1].over && pool_waiting() == 3);
	T(waiters[1].over && !waiters[1].got);
	pthread_join(waiters[1].tid, NULL);
	claim("who waits for a buffer and is killed leaves the queue");

	pool_put(p, MiB);
	pthread_join(waiters[0].tid, NULL);
	T(waiters[0].got == p && !waiters[2].over && !waiters[3].over);
	T(!pool_try(MiB, 0));
	pool_put(q, MiB);
	pthread_join(waiters[2].tid, NULL);
	T(waiters[2].got == q && !waiters[3].over);
	pool_put(p, MiB);
	pthread_join(waiters[3].tid, NULL);
	T(waiters[3].got == p && pool_waiting() == 0);
	pool_put(p, MiB);
	pool_put(q, MiB);
	T(pool.used == 0 && TAILQ_EMPTY(&pool.waiters));
	claim("buffers go to those who wait in the order they came");
}

static void *
hammer(void *arg)
{
	char id = (char)(intptr_t)arg;

	for (intptr_t i = 0; i < (intptr_t)arg * 777; i++)
		rnd();
	for (int i = 0; i < 1500; i++) {
		size_t len = 1 + rnd() % MiB, step = 64 * KiB;
		char *p = rnd() % 4 ? pool_get(len) : pool_try(len, 0);

		for (size_t k = 0; p && k < len; k += step)
			p[k] = p[MIN(k + step, len) - 1] = id;
		if (i % 8 == 0)
			sched_yield();
		for (size_t k = 0; p && k < len; k += step)
			if (p[k] != id || p[MIN(k + step, len) - 1] != id)
				return arg;
		if (p)
			pool_put(p, len);
	}
	return NULL;
}

static void
test_pool_hammer(void)
{
	pthread_t t[6];
	void *bad;

	pool_restart(3 * MiB, 64 * KiB);
	for (intptr_t i = 0; i < 6; i++)
		T(!sys_thread(&t[i], hammer, (void *)(i + 1)));
	for (int i = 0; i < 6; i++) {
		pthread_join(t[i], &bad);
		T(!bad);
	}
	T(pool.used == 0 && TAILQ_EMPTY(&pool.waiters));
	claim("no buffer has two owners, and every waiter gets one");
}

/* === exec === */

static atomic_int ndone;

static void
count_done(struct exec_req *r)
{
	T(r->res == (int)r->len);
	ndone++;
}

static void
keep_res(struct exec_req *r)
{
	(void)r;
	ndone++;
}

static void
wait_done(int n)
{
	while (ndone < n)
		usleep(200);
	ndone = 0;
}

/* Restart the engine; false (and a skipped claim) if it can't be had. */
static bool
exec_restart(enum tri uring, bool fixed, const char *text)
{
	exec.quit = exec.kicked = exec.fixed = false;
	conf.use_io_uring = uring;
	conf.queue_depth = 8;
	conf.fixed_buffers = fixed;
	if ((WITH_URING || uring != YES) && !exec_start(-1))
		return true;
	printf("ok %u - %s # SKIP no io_uring here\n", ++claims, text);
	return false;
}

/* Bytes this process has read, by read(2) and its like; proc_pid_io(5). */
static uint64_t
rchar(void)
{
	uint64_t n = 0;
	FILE *f = fopen("/proc/self/io", "re");

	if (f && fscanf(f, "rchar: %" SCNu64, &n) != 1)
		n = 0;
	if (f)
		fclose(f);
	return n;
}

static void
test_exec(enum tri uring, bool direct, const char *text)
{
	enum { N = 64 };
	static struct exec_req rq[N];
	int fd, dfd, bad = 0, flags = direct ? O_DIRECT : 0;
	char *p, *q, small[16];
	uint64_t before;

	pool_restart(8 * MiB, 64 * KiB);
	if (!exec_restart(uring, direct, text))
		return;
	T(exec.uring == (uring == YES));
	fd = open(in_tmp("exec"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	dfd = open(in_tmp("exec"), O_RDWR | O_CLOEXEC | flags);
	T(fd >= 0 && (dfd >= 0 || errno == EINVAL));
	if (dfd < 0)			/* no O_DIRECT on this disk */
		dfd = dup(fd);
	p = pool_get(MiB);
	q = pool_get(MiB);
	for (size_t i = 0; i < MiB; i++)
		p[i] = (char)rnd();
	for (int i = 0; i < N; i++) {
		rq[i] = (struct exec_req){ .op = EXEC_WRITE, .fd = dfd,
			.buf = p + i * 16 * KiB, .len = 16 * KiB,
			.off = (uint64_t)i * 16 * KiB, .done = count_done,
			.file = direct ? 1 + (uint64_t)i % 3 : 0 };
		exec_submit(&rq[i]);
	}
	wait_done(N);
	for (int i = N - 1; i >= 0; i--) {
		rq[i].op = EXEC_READ;
		rq[i].buf = q + i * 16 * KiB;
		exec_submit(&rq[i]);
	}
	wait_done(N);
	T(!memcmp(p, q, MiB));
	memset(q, 0, MiB);
	before = rchar();
	T(exec_read(fd, q, MiB, 0) == MiB && !memcmp(p, q, MiB));
	T(rchar() - before < 2 * MiB);	/* read once, that is */
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	T(exec_read(fd, small, sizeof(small), 12345) == sizeof(small) &&
	    !memcmp(small, p + 12345, sizeof(small)));
	T(exec_read(fd, q, MiB, MiB - 100) == 100);
	T(exec_read(fd, q, MiB, MiB) == 0 && exec_read(fd, q, 1, TiB) == 0);
	for (int op = EXEC_READ; op <= EXEC_WRITE; op++) {
		rq[0] = (struct exec_req){ .op = op, .fd = -1, .buf = p,
			.len = 4096, .done = keep_res };
		exec_submit(&rq[0]);
		wait_done(1);
		T(rq[0].res == -EBADF);
	}
	T(exec_read(-1, q, 10, 0) == -EBADF);
	for (int i = 0; i < N; i++) {
		rq[i] = (struct exec_req){ .op = i % 2 ? EXEC_READ : EXEC_WRITE,
			.fd = dfd, .buf = (i % 2 ? q : p) + i * 16 * KiB,
			.len = 16 * KiB, .off = (uint64_t)i * 16 * KiB,
			.done = keep_res, .res = 1 };
		exec_submit(&rq[i]);
	}
	exec_stop(&exec);
	for (int i = 0; i < N; i++)
		bad += rq[i].res != 16 * KiB;
	T(ndone == N && bad == 0 && exec.ntid == 0);
	ndone = 0;
	pool_put(p, MiB);
	pool_put(q, MiB);
	close(fd);
	close(dfd);
	claim(text);
}

/* A ring may keep a file registered, but not longer than we want it to. */
static void
test_exec_files(void)
{
	const char *text = "files share a slot of the ring, which closes what "
	    "it is to forget";
	enum { N = 256 };
	static struct exec_req rq[N];
	uint64_t file = exec_file(), other = file + EXEC_FILES;
	struct pollfd pfd;
	int p[2], q[2];
	char byte[3], x[] = "x", y[] = "y";

	if (!exec_restart(YES, false, text))
		return;
	T(!pipe2(p, O_CLOEXEC | O_NONBLOCK) &&
	    !pipe2(q, O_CLOEXEC | O_NONBLOCK));
	for (int i = 0; i < 2; i++)	/* both want one slot, in turn */
		for (int k = 0; k < 2; k++)
			T(exec_do(&(struct exec_req){ .op = EXEC_WRITE,
			    .fd = k ? q[1] : p[1], .file = k ? other : file,
			    .buf = x, .len = 1 }) == 1);
	T(read(p[0], byte, 3) == 2 && read(q[0], byte, 3) == 2);
	for (int i = 0; i < N; i++) {	/* or at the same time */
		rq[i] = (struct exec_req){ .op = EXEC_WRITE, .buf = i % 2 ? y :
			x, .len = 1, .fd = i % 2 ? q[1] : p[1],
			.file = i % 2 ? other : file, .done = count_done };
		exec_submit(&rq[i]);
	}
	wait_done(N);
	for (int i = 0; i < N; i++)
		T(read(i % 2 ? q[0] : p[0], byte, 1) == 1 &&
		    byte[0] == (i % 2 ? 'y' : 'x'));
	close(p[1]);
	close(q[1]);
	exec_forget(file);
	exec_forget(other);
	pfd = (struct pollfd){ .fd = q[0], .events = POLLIN };
	T(poll(&pfd, 1, 20000) == 1 && pfd.revents & POLLHUP);
	exec_stop(&exec);
	close(p[0]);
	close(q[0]);
	claim(text);
}

/* Not every disk polls: then each write says so, and does nothing else. */
static void
test_exec_polled(void)
{
	const char *text = "a polled ring writes, or says that it can't";
	struct exec_req r = { .op = EXEC_WRITE, .file = exec_file(),
		.len = 64 * KiB };
	int res = 0, fd;
	char *p, *q;

	pool_restart(8 * MiB, 64 * KiB);
	if (!exec_restart(YES, true, text))
		return;
	fd = open(in_tmp("polled"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	r.fd = open(in_tmp("polled"), O_WRONLY | O_DIRECT | O_CLOEXEC);
	exec_polled.polled = true;
	if (r.fd >= 0 && !exec_ring_init(&exec_polled)) {
		exec_polled.uring = true;
		T(!exec_run(&exec_polled));
		p = pool_get(64 * KiB);
		q = pool_get(64 * KiB);
		memset(p, 'p', 64 * KiB);
		r.buf = p;
		for (int i = 0; i < 100 && res >= 0; i++) {
			r.off = (uint64_t)i * 64 * KiB;
			res = exec_do(&r);
			T(res == 64 * KiB || res == -EOPNOTSUPP);
			T(res < 0 || (exec_read(fd, q, 64 * KiB, r.off) ==
			    64 * KiB && !memcmp(p, q, 64 * KiB)));
		}
		exec_forget(r.file);
		pool_put(p, 64 * KiB);
		pool_put(q, 64 * KiB);
	}
	exec_stop(&exec_polled);
	exec_polled.polled = false;
	exec_stop(&exec);
	close(fd);
	close(r.fd);
	claim(text);
}

/* === index files === */

static struct obj *
make_obj(uint64_t size, uint32_t bs)
{
	struct obj *o;

	conf.cache_block_size = bs;
	o = obj_new(&(struct attr){ .mode = S_IFREG | 0644, .ver = {
		.fsid = 7, .fileid = 42, .size = size, .mtime = 1 }});
	o->path = strdup("/f");
	o->rfd = open(in_tmp("data"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	T(!obj_map(o, conf.cache_checksum));
	o->ent = ent_get_locked(&o->attr.ver, true);
	return o;
}

static void
have_block(struct obj *o, uint64_t i)
{
	o->present += !bit_get(o->map, i);
	bit_set(o->map, i);
	if (o->sums)
		o->sums[i] = rnd();
}

static int
idx_write(struct obj *o)
{
	struct idx_job j = { .o = o };

	idx_commit(&j, 1);
	return j.r;
}

/* What idx_read() gets for o's version; 0 and *same: o's contents. */
static int
read_back(const struct obj *o, bool *same)
{
	struct obj *n = obj_new(&o->attr);
	int r;

	n->ent = o->ent;
	r = idx_read(n);
	*same = !r && n->bs == o->bs && n->nblk == o->nblk && n->present ==
	    o->present && n->pinned == o->pinned &&
	    !memcmp(n->map, o->map, map_size(o->nblk)) && (!o->sums ||
	    !memcmp(n->sums, o->sums, o->nblk * 8));
	T(r || n->map);
	obj_free(n);
	return r;
}

static void
test_index(void)
{
	static const uint64_t sizes[] = { 1, 4096, 4097, 64 * 4096,
		64 * 4096 + 1, 1000 * 4096, 12345678 };
	struct version v = { .fsid = 7, .fileid = 42 };
	char path[64], full[128];
	struct obj *o;
	struct stat st;
	bool same;
	int fd;

	T(!mkdir(in_tmp("objects"), 0700));
	store.objects = open(in_tmp("objects"), O_RDONLY | O_DIRECTORY);
	snprintf(full, sizeof(full), "%.2s", key_path(&v, "", path));
	T(!mkdirat(store.objects, full, 0700));
	key_path(&v, ".idx", path);
	for (size_t i = 0; i < COUNTOF(sizes) * 4; i++) {
		conf.cache_checksum = i & 1;
		o = make_obj(sizes[i / 4], i & 4 ? 4096 : 65536);
		T(idx_write(o) == 0 && read_back(o, &same) == -ENOENT);
		o->pinned = i & 2;
		for (uint64_t b = 0; b < o->nblk; b++)
			if (i & 2 || b % 3 == 0)
				have_block(o, b);
		T(idx_write(o) == 0 && o->saved == o->present);
		T(read_back(o, &same) == 0 && same);
		obj_free(o);
	}
	claim("an index is read as it was written");

	conf.cache_checksum = YES;
	o = make_obj(5 * 4096 - 1, 4096);
	have_block(o, 0);
	have_block(o, 4);
	T(!idx_write(o));
	o->attr.ver.mtime++;
	T(read_back(o, &same) == -ESTALE);
	o->attr.ver.mtime--;
	o->attr.ver.fileid++;
	T(read_back(o, &same) == -ENOENT);
	o->attr.ver.fileid--;
	T(read_back(o, &same) == 0 && same);
	claim("an index is only of its own version");

	fd = openat(store.objects, path, O_RDWR | O_CLOEXEC);
	T(fd >= 0 && !fstat(fd, &st) && st.st_size == 128 + 8 + 40);
	for (off_t i = 0; i < st.st_size * 2; i++) {
		unsigned char c, was;

		T(pread(fd, &was, 1, i / 2) == 1);
		c = was ^ (i % 2 ? 0xff : 1 << i / 2 % 8);
		T(pwrite(fd, &c, 1, i / 2) == 1);
		T(read_back(o, &same) == -EBADMSG);
		T(pwrite(fd, &was, 1, i / 2) == 1);
	}
	T(read_back(o, &same) == 0 && same);
	claim("an index with a damaged byte is refused");
	for (off_t i = st.st_size - 1; i >= 0; i--)
		T(!ftruncate(fd, i) && read_back(o, &same) == -EBADMSG);
	claim("a torn index is refused");
	close(fd);

	T(!idx_write(o));
	o->present--;
	o->superseded = true;
	T(!idx_write(o));
	o->present++;
	T(read_back(o, &same) == 0 && same);
	key_path(&v, ".tmp", path);
	T(faccessat(store.objects, path, F_OK, 0) && errno == ENOENT);
	claim("a superseded version's index is not written, nor left half");
	obj_free(o);
	sys_close(&store.objects);
}

/* === names and tokens === */

static bool
known(const char *path)
{
	return *name_slot(path) != NULL;
}

static void
test_names(void)
{
	struct handle fh = { .len = 3 };
	struct attr a = { .ver.fileid = 3 }, b = { .ver.fileid = 4 };
	struct obj o = { .attr = a };
	struct name *n, *open;
	uint64_t id = 0;
	char path[32];

	open = name_find_locked("/open", true);
	T(open && name_find_locked("/open", false) == open);
	open->opens = 1;		/* as open_bind() does */
	open->obj = &o;
	name_busy_locked(open);
	T(!name_find_locked("/none", false));
	for (int i = 0; i < NAMES_MAX + 1000; i++) {
		snprintf(path, sizeof(path), "/n%d", i);
		T(name_find_locked(path, true) != NULL);
		T(name_find_locked("/n0", false) != NULL);
	}
	T(names.nidle == NAMES_MAX && known("/n0") && known("/open"));
	T(!known("/n1") && !known("/n1000") && known("/n1001"));
	claim("the names last used are remembered, and those of open files");

	T(!name_handle("/n0", &fh, &id) && name_validated("/n0", &a,
	    &(struct handle){ .len = 5 }, 100, NULL));
	T(name_handle("/n0", &fh, &id) && fh.len == 5 &&
	    id == a.ver.fileid);
	name_doubt("/n0", false);
	T(!name_handle("/n0", &fh, &id));
	T(!name_validated("/n0", &b, &fh, 100, NULL));
	T(name_validated("/n0", &a, &fh, 100, NULL));
	T(name_validated("/n0", &b, &fh, now_us() + 1, NULL));
	claim("of two answers that overlap and differ, none is believed");

	open->told = a.ver;
	T(op_rename("/open", "/.cachefs-aside.7", 0) == -EROFS);
	aside_for = &a;
	T(op_rename("/open", "/.cachefs-aside.7", 0) == -EAGAIN);
	T(op_rename("/n0", "/.cachefs-aside.7", 0) == -EAGAIN);
	T(op_rename("/none", "/.cachefs-aside.7", 0) == -EAGAIN);
	aside_for = &b;
	T(op_rename("/open", "/.cachefs-aside.7", 0) == 0);
	aside_for = NULL;
	n = name_find_locked("/.cachefs-aside.7", false);
	T(n == open && !known("/open") && !strcmp(n->origin, "/open"));
	T(name_find_locked("/open", true) != open && known("/open"));
	claim("a name whose inode shows another version can be set aside");

	open->opens = 0;
	name_idle_locked(open);
	while (!TAILQ_EMPTY(&names.idle))
		name_free_locked(TAILQ_FIRST(&names.idle));
	T(names.nidle == 0 && !known("/open"));
	for (int i = 0; i < NAME_BUCKETS; i++)
		T(!names.tab[i]);
	claim("forgotten names leave nothing behind");
}

/* Does this process's own LOOKUP of path, if there was one, count now? */
static bool
token(const char *path, uint64_t size)
{
	struct version got;
	bool retry;

	return token_find_locked(path, &got, &retry) && got.size == size;
}

/* As token(), but that it was too late to ask is no failure. */
static bool
token_soon(const char *path, uint64_t size)
{
	return token(path, size) ||
	    now_ms() - token_slot(hash_str(path))->at > TOKEN_MS;
}

static void
token_age(const char *path, uint64_t ms)
{
	token_slot(hash_str(path))->at -= ms;
}

static void
test_tokens(void)
{
	struct version v = { .size = 5 }, w = { .size = 6 };
	struct req me = { .pid = 100 }, other = { .pid = 101 };
	struct token *mine;
	char path[32];

	conf.cache_consistency = CONS_OPEN;
	cur = &me;
	T(!token("/a", 5));
	token_leave_locked("/a", &v);
	T(!token("/b", 5) && token_soon("/a", 5));
	cur = &other;
	T(!token("/a", 5));
	claim("a token is for the same process and path");

	cur = &me;
	conf.cache_consistency = CONS_STRICT;
	token_age("/a", 1);
	T(!token("/a", 5));
	conf.cache_consistency = CONS_OPEN;
	T(token_soon("/a", 5));
	token_age("/a", TOKEN_MS + 1);
	T(!token("/a", 5));
	me.opcode = FUSE_GETATTR;
	T(token_estale_locked("/a") == -ESTALE);
	token_leave_locked("/a", &w);
	T(token("/a", 6));
	token_age("/a", TOKEN_MS + 1);
	T(token("/a", 6));
	token_slot(hash_str("/a"))->shown = true;
	T(!token("/a", 6));
	token_slot(hash_str("/a"))->shown = false;
	token_age("/a", RETRY_ATTR_MS);
	T(!token("/a", 6));
	me.opcode = FUSE_OPEN;
	T(!token("/a", 6));
	T(token_estale_locked("/a") == -ESTALE && !token("/a", 5));
	me.opcode = FUSE_LOOKUP;
	token_leave_locked("/a", &w);
	token_age("/a", TOKEN_MS + 1);
	T(token("/a", 6));
	token_age("/a", RETRY_MS);
	T(!token("/a", 6));
	claim("a token lasts 5 ms, that of a second try longer");

	token_estale_locked("/a");
	mine = token_slot(hash_str("/a"));
	for (int i = 0;; i++) {		/* another path in the same slot */
		snprintf(path, sizeof(path), "/p%d", i);
		cur = &other;
		if (token_slot(hash_str(path)) == mine)
			break;
	}
	token_leave_locked(path, &v);
	T(!token(path, 5));
	cur = &me;
	token_leave_locked("/a", &w);
	T(token("/a", 6));
	token_age("/a", RETRY_MS);
	cur = &other;
	token_leave_locked(path, &v);
	T(token_soon(path, 5));
	cur = NULL;
	claim("a second try's token is not overwritten while it counts");
}

/* === paths === */

static void
test_paths(void)
{
	static const struct { const char *path, *dir, *base; } v[] = {
		{ "/a", "/", "a" }, { "/a/b", "/a", "b" },
		{ "/a/b/c.d", "/a/b", "c.d" }, { "/ /\n", "/ ", "\n" },
	};
	static const struct { const char *in, *out, *path; bool want; } w[] = {
		{ "", "", "/a/b", true }, { "", "*.iso", "/a/b.iso", false },
		{ "*.iso", "", "/a/b.iso", true }, { "*.iso", "", "/b", false },
		{ "/a/*", "", "/a/b", true }, { "/a/*", "", "/b/b", false },
		{ "*.c *.h", "x.*", "/q/y.h", true },
		{ "*.c\t*.h", "x.*", "/q/x.h", false },
		{ "", "/a/*", "/a/b/c", false }, { " ", "", "/a", false },
	};
	const char *base;
	char *s, *j;

	for (size_t i = 0; i < COUNTOF(v); i++) {
		s = path_parent(v[i].path, &base);
		TS(!strcmp(s, v[i].dir) && !strcmp(base, v[i].base), v[i].path);
		j = path_join(s, base);
		TS(!strcmp(j, v[i].path), v[i].path);
		free(s);
		free(j);
	}
	T(!strcmp(bdir_rel("/"), ".") && !strcmp(bdir_rel("/a/b"), "a/b"));
	T(path_is_aside("/.cachefs-aside.1") && !path_is_aside("/.cachefs"));
	T(is_ctl("/.cachefs/stats") && !is_ctl("/.cachefs/statsx"));
	claim("a path is its parent and its last name");

	for (size_t i = 0; i < COUNTOF(w); i++) {
		conf.cache_include = (char *)(uintptr_t)w[i].in;
		conf.cache_exclude = (char *)(uintptr_t)w[i].out;
		TS(store_wants(w[i].path) == w[i].want, w[i].path);
	}
	conf.cache_include = conf.cache_exclude = NULL;
	claim("include and exclude choose by name, or with a / by path");
}

static void
test_parse(void)
{
	static const struct { const char *s, *host, *export; unsigned port; }
	v[] = {
		{ "nfs://h/e", "h", "/e", 0 }, { "h:/e", "h", "/e", 0 },
		{ "nfs://h/", "h", "/", 0 }, { "h:/", "h", "/", 0 },
		{ "nfs://h/e/d/", "h", "/e/d", 0 }, { "h:/e//", "h", "/e", 0 },
		{ "nfs://h.x:20049/e", "h.x", "/e", 20049 },
		{ "nfs://h/e:/f", "h", "/e:/f", 0 },
		{ "h:/e:/f", "h", "/e:/f", 0 },
		{ "nfs://10.0.0.1:65535/e", "10.0.0.1", "/e", 65535 },
		{ "nfs://[::1]/e", "::1", "/e", 0 },
		{ "nfs://[fe80::1%eth0]:1/e", "fe80::1%eth0", "/e", 1 },
		{ "[2001:db8::2]:/e", "2001:db8::2", "/e", 0 },
		{ "2001:db8::2:/e", "2001:db8::2", "/e", 0 },
		{ "nfs://h", NULL, NULL, 0 }, { "nfs:///e", NULL, NULL, 0 },
		{ "nfs://:1/e", NULL, NULL, 0 }, { ":/e", NULL, NULL, 0 },
		{ "nfs://h:/e", NULL, NULL, 0 },
		{ "nfs://h:0/e", NULL, NULL, 0 },
		{ "nfs://h:65536/e", NULL, NULL, 0 },
		{ "nfs://h:1x/e", NULL, NULL, 0 },
		{ "nfs://h:-1/e", NULL, NULL, 0 },
		{ "nfs://h:4294967297/e", NULL, NULL, 0 },
		{ "nfs://h/e?version=3", NULL, NULL, 0 },
		{ "nfs://[::1/e", NULL, NULL, 0 },
		{ "nfs://[]/e", NULL, NULL, 0 },
		{ "nfs://[::1]x/e", NULL, NULL, 0 },
		{ "h", NULL, NULL, 0 }, { "/e", NULL, NULL, 0 },
		{ "h:e", NULL, NULL, 0 }, { "/a/h:/e", NULL, NULL, 0 },
		{ "", NULL, NULL, 0 },
	};

	for (size_t i = 0; i < COUNTOF(v); i++) {
		bool ok;

		conf.nfs_port = 0;
		bnfs.host = bnfs.export = NULL;
		ok = bnfs_parse(v[i].s);
		TS(ok == (v[i].host != NULL), v[i].s);
		if (ok && v[i].host)
			TS(!strcmp(bnfs.host, v[i].host) && !strcmp(bnfs.export,
			    v[i].export) && conf.nfs_port == v[i].port, v[i].s);
		free(bnfs.host);
		free(bnfs.export);
	}
	conf.nfs_port = 0;
	bnfs.host = bnfs.export = NULL;
	claim("a backend's host, port and export are found, or it is refused");
}

/* === histogram === */

static void
test_histogram(void)
{
	struct histogram h;
	uint64_t got;

	for (uint64_t us = 0; us < UINT64_C(1) << 31; us += 1 + us / 5) {
		memset(&h, 0, sizeof(h));
		lat_add(&h, us);
		got = lat_percentile(&h, 0.5);
		T(got <= us && us - got <= us / 8 && h.max == us);
		T(us >= 8 || got == us);
	}
	memset(&h, 0, sizeof(h));
	T(lat_percentile(&h, 0.5) == 0);
	lat_add(&h, UINT64_MAX);	/* the last bucket takes all the rest */
	T(lat_percentile(&h, 0.99) > UINT64_C(1) << 30);
	claim("a latency is reported within an eighth");

	memset(&h, 0, sizeof(h));
	for (int i = 0; i < 98; i++)
		lat_add(&h, 100);
	lat_add(&h, 8000);
	lat_add(&h, 64000);
	T(lat_percentile(&h, 0.5) == 96 && lat_percentile(&h, 0.97) == 96);
	T(lat_percentile(&h, 0.985) == 7680);
	T(lat_percentile(&h, 0.99) == 61440 && h.max == 64000);
	claim("percentiles are of the samples");
}

/* === fetch: which blocks to ask for === */

/* An object whose blocks are as the map says: . absent, # present, and runs
 * of the same letter one fetch. */
static struct obj *
map_obj(const char *map, uint32_t bs, uint64_t size)
{
	static struct fetch f[64];
	struct obj *o = make_obj(size, bs);
	unsigned n = 0;

	o->tab = calloc(OBJ_BUCKETS, sizeof(*o->tab));
	for (uint64_t i = 0; map[i]; i++) {
		if (map[i] == '#')
			have_block(o, i);
		if (map[i] == '.' || map[i] == '#')
			continue;
		if (i && map[i] == map[i - 1] && i * bs % MiB) {
			f[n - 1].len = MIN(f[n - 1].len + bs,
			    size - f[n - 1].off);
			continue;
		}
		f[n] = (struct fetch){ .o = o, .off = i * bs, .len =
			MIN(bs, size - i * bs) };
		LIST_INSERT_HEAD(fetch_bucket(o, i * bs), &f[n], hash);
		n++;
	}
	return o;
}

static void
test_gap(void)
{
	enum { K = 1024 };
	static const struct { const char *map; unsigned bs; uint64_t size, from,
	    to, off; size_t len; } v[] = {
		{ "........", 256 * K, 2 * MiB, 0, 2 * MiB, 0, MiB },
		{ "........", 256 * K, 2 * MiB, 300 * K, 2 * MiB, 256 * K,
			768 * K },
		{ "........", 256 * K, 2 * MiB, MiB - 1, 2 * MiB, 768 * K,
			256 * K },
		{ "........", 256 * K, 2 * MiB, MiB, 2 * MiB, MiB, MiB },
		{ "........", 256 * K, 2 * MiB, 0, 1, 0, 256 * K },
		{ "........", 256 * K, 2 * MiB, 0, 0, 0, 0 },
		{ "##..####", 256 * K, 2 * MiB, 0, 2 * MiB, 512 * K, 512 * K },
		{ "##.a####", 256 * K, 2 * MiB, 0, 2 * MiB, 512 * K, 256 * K },
		{ "aa..bb..", 256 * K, 2 * MiB, 0, 2 * MiB, 512 * K, 512 * K },
		{ "aa##bb..", 256 * K, 2 * MiB, 0, 2 * MiB, MiB + 512 * K,
			512 * K },
		{ "aa##bb..", 256 * K, 2 * MiB, 0, MiB + 512 * K, 0, 0 },
		{ "########", 256 * K, 2 * MiB, 0, 2 * MiB, 0, 0 },
		{ "##.", 256 * K, 513 * K, 0, 513 * K, 512 * K, K },
		{ "a.", 256 * K, 257 * K, 5, 257 * K, 256 * K, K },
		{ ".", 256 * K, 1, 0, 1, 0, 1 },
		{ "...", MiB, 2 * MiB + 5, 0, 2 * MiB + 5, 0, MiB },
		{ "##.", MiB, 2 * MiB + 5, MiB, 2 * MiB + 5, 2 * MiB, 5 },
	};
	uint64_t off;
	struct obj *o;
	size_t len;
	char map[41];

	for (size_t i = 0; i < COUNTOF(v); i++) {
		o = map_obj(v[i].map, v[i].bs, v[i].size);
		off = v[i].from;
		len = fetch_gap_locked(o, &off, v[i].to);
		TS(len == v[i].len && (!len || off == v[i].off), v[i].map);
		obj_free(o);
	}
	claim("a gap ends at present blocks, fetches, MiB and the file's end");

	for (int i = 0; i < 2000; i++) {
		uint64_t size = 39 * 256 * KiB + 1 + rnd() % (256 * KiB), at, b;

		for (int k = 0; k < 40; k++)
			map[k] = rnd() % 3 ? '.' : rnd() % 2 ? '#' : 'a';
		map[40] = '\0';
		o = map_obj(map, 256 * KiB, size);
		for (at = 0; at < size && (len = fetch_gap_locked(o, &at,
		    size)); at += len) {
			T(at + len <= size && at / MiB == (at + len - 1) / MiB);
			for (b = at / o->bs; b * o->bs < at + len; b++) {
				TS(map[b] == '.', map);
				map[b] = '!';
			}
		}
		TS(!strchr(map, '.'), map);
		obj_free(o);
	}
	claim("the gaps are all absent blocks, each once");

	o = map_obj("###.##", 256 * KiB, 1400 * KiB);
	T(obj_run_locked(o, 5, 1400 * KiB) == 768 * KiB - 5);
	T(obj_run_locked(o, MiB, 1400 * KiB) == 376 * KiB);
	T(obj_run_locked(o, 768 * KiB, MiB) == 0);
	T(obj_run_locked(o, 300 * KiB, 301 * KiB) == KiB);
	T(obj_bytes(o, 0, 1) == 256 * KiB && obj_bytes(o, 5, 1) == 120 * KiB);
	T(fetch_find_locked(o, 0) == NULL);
	obj_free(o);
	claim("what is present is read in one run");
}

static void
test_stream(void)
{
	struct stream s = { .lock = PTHREAD_MUTEX_INITIALIZER };
	struct obj o = { .bs = 256 * KiB };
	uint64_t last = 0;
	struct plan p;

	pool_restart(64 * MiB, 256 * KiB);
	p = stream_note(&s, &o, 0, 64 * KiB);
	T(!p.to && !p.n);
	for (uint64_t at = 64 * KiB; at < 64 * MiB; at += 64 * KiB) {
		p = stream_note(&s, &o, at, at + 64 * KiB);
		T(p.to <= p.from || p.from >= at + 64 * KiB);
		T(p.to <= at + 64 * KiB + AHEAD_MAX && !p.n);
		if (p.to > p.from) {
			T(p.to >= last);
			s.ahead = last = p.to;
		}
	}
	T(last > 64 * MiB && s.counted && fill.streams == 1);
	for (int i = 1; i < 9; i++) {
		p = stream_note(&s, &o, i * i * 500 * MiB,
		    (i * i * 500 + 1) * MiB);
		T(i == 1 || (!p.to && !p.n));
	}
	p = stream_note(&s, &o, 3 * MiB, 3 * MiB + 1);
	T(!p.to && !p.n);
	claim("a sequential reader is read ahead of, one that jumps is not");

	for (uint64_t i = 0; i < 8; i++) {	/* tensors, in no order */
		uint64_t from = i * 5 % 8 * 100 * MiB, end = from + 16 * MiB;

		last = 0;
		for (uint64_t at = from; at < end; at += MiB) {
			p = stream_note(&s, &o, at, at + MiB);
			T(i < 2 || p.to <= end + MiB);
			last = MAX(last, p.to);
		}
		T(i < 2 || last >= end);
	}
	claim("one that reads rows of a length is read ahead of that far");

	s.most = 0;
	for (uint64_t at = 0; at < 256 * MiB; at += MiB) {
		p = stream_note(&s, &o, at, at + MiB);
		o.wasted += at == 250 * MiB || at == 251 * MiB;
		if (at == 200 * MiB)
			last = p.to - (at + MiB);
	}
	T(last == AHEAD_MAX && p.to - 256 * MiB < last);
	T(p.to - 256 * MiB > last / 4);
	claim("its window is less when what was fetched was not used");

	for (int dir = -1; dir <= 1; dir += 2) {
		uint64_t at = GiB;

		for (int i = 0; i < 50; i++, at += (uint64_t)(dir * 10) * MiB) {
			p = stream_note(&s, &o, at, at + 4096);
			T(!p.to && p.n <= STRIDE_MAX);
			T(i < 3 ? !p.n : p.n && p.stride == dir * 10 *
			    (int64_t)MiB);
		}
	}
	for (uint64_t at = GiB; at > GiB - MiB; at -= 4096)
		p = stream_note(&s, &o, at, at + 4096);
	T(p.n == STRIDE_MAX && p.stride == -4096);
	for (int i = 0; i < 100; i++) {
		uint64_t at = rnd() % GiB;

		p = stream_note(&s, &o, at, at + 4096);
		T(!p.n || !p.to);
	}
	T(!p.n && !p.to);
	fill.streams = 0;
	claim("reads at equal distances, or backwards, are read ahead of too");
}

/* === fetch: the whole way from a backend to the readers === */

/* A server whose files hold at each 8 bytes their offset, and whose every
 * fake.fail'th READ fails; two threads answer, in no order. */
static struct {
	pthread_mutex_t lock;
	pthread_cond_t cond;
	struct fetch *head;
	pthread_t tid[2];
	struct fetch *held;		/* with hold: the last READ */
	bool quit, hold, refuse;	/* refuse: as without memory */
	unsigned fail, rounds;
	atomic_uint reads;
	atomic_uint_fast64_t bytes;
} fake = { .lock = PTHREAD_MUTEX_INITIALIZER,
	.cond = PTHREAD_COND_INITIALIZER };

static void
fake_read(struct fetch *f)
{
	if (fake.hold) {
		fake.held = f;
		return;
	}
	if (fake.refuse) {
		fetch_arrived(f, -ENOMEM);
		return;
	}
	pthread_mutex_lock(&fake.lock);
	f->queue.tqe_next = fake.head;
	fake.head = f;
	pthread_cond_signal(&fake.cond);
	pthread_mutex_unlock(&fake.lock);
}

static void
fake_raise(struct fetch *f)
{
	(void)f;
}

static void
fake_close(struct bfile *bf)
{
	free(bf);
}

static void *
fake_thread(void *arg)
{
	(void)arg;
	pthread_mutex_lock(&fake.lock);
	while (!fake.quit || fake.head) {
		struct fetch *f = fake.head;

		if (!f) {
			pthread_cond_wait(&fake.cond, &fake.lock);
			continue;
		}
		fake.head = f->queue.tqe_next;
		pthread_mutex_unlock(&fake.lock);
		usleep(rnd() % 300);
		for (size_t i = 0; i < f->len; i += 8) {
			uint64_t v = f->off + i;

			memcpy(f->buf + i, &v, MIN(8, f->len - i));
		}
		fake.bytes += f->len;
		fetch_arrived(f, fake.fail && ++fake.reads % fake.fail == 0 ?
		    -EIO : 0);
		pthread_mutex_lock(&fake.lock);
	}
	pthread_mutex_unlock(&fake.lock);
	return NULL;
}

static const struct backend fake_backend = { .name = "fake",
	.close = fake_close, .read = fake_read, .raise = fake_raise };
static struct attr fake_file = { .mode = S_IFREG | 0444, .nlink = 1,
	.ver = { .fileid = 1, .size = 9 * MiB + 5000 } };

/* As open_object(). */
static struct obj *
fake_open(void)
{
	struct obj *o = obj_get(&fake_file, "/f");

	pthread_mutex_lock(&o->lock);
	if (!o->bf)
		o->bf = calloc(1, sizeof(*o->bf));
	pthread_mutex_unlock(&o->lock);
	return o;
}

/* Is what obj_read() gave right?  Failed READs may be handed on. */
static bool
read_right(const char *buf, ssize_t n, size_t size, uint64_t off)
{
	uint64_t v, left = fake_file.ver.size - off;

	if (n < 0)
		return n == -EIO && fake.fail;
	for (size_t i = -off % 8; i + 8 <= (size_t)n; i += 8) {
		memcpy(&v, buf + i, 8);
		if (v != off + i)
			return false;
	}
	return (size_t)n == MIN(size, left);
}

/* Wait until nobody uses an object any more. */
static void
objects_gone(void)
{
	struct ent *e;
	unsigned n;

	for (int tries = 0; tries < 20000; tries++) {
		while (fetch_reclaim())
			;
		n = 0;
		pthread_mutex_lock(&store.lock);
		TAILQ_FOREACH(e, &store.level[0], turn)
			n += !LIST_EMPTY(&e->objs);
		pthread_mutex_unlock(&store.lock);
		if (n == 0)
			return;
		usleep(1000);
	}
	T(n == 0);
}

/* Open, read some of it here and there or all of it in a row, close. */
static void *
reader(void *arg)
{
	char *buf = malloc(300 * KiB);
	void *bad = NULL;

	for (intptr_t i = 0; i < (intptr_t)arg * 999; i++)
		rnd();
	for (unsigned i = 1; i <= fake.rounds; i++) {
		struct stream st = { .lock = PTHREAD_MUTEX_INITIALIZER };
		struct obj *o = fake_open();
		uint64_t off = 0;

		for (int k = 0; k < 30 && off < fake_file.ver.size; k++) {
			size_t size = i % 4 ? 1 + rnd() % (200 * KiB) :
			    300 * KiB;
			ssize_t n;

			if (i % 4)
				off = rnd() % fake_file.ver.size;
			n = obj_read(o, &st, buf, size, off, NULL);
			if (!read_right(buf, n, size, off))
				bad = arg;
			off += size;
		}
		if (st.counted)
			fill.streams--;
		obj_put(o);
	}
	free(buf);
	return bad;
}

static void
read_by_many(unsigned rounds, unsigned fail, unsigned fill_at)
{
	pthread_t t[4];
	void *bad;

	fake.fail = fail;
	fake.rounds = rounds;
	conf.cache_fill = fill_at;
	fake_file.ver.fileid++;
	fake.bytes = 0;
	for (intptr_t i = 0; i < 4; i++)
		T(!sys_thread(&t[i], reader, (void *)(i + 1)));
	for (int i = 0; i < 4; i++) {
		pthread_join(t[i], &bad);
		T(!bad);
	}
}

static void *
reclaimer(void *arg)
{
	atomic_bool *on = arg;

	while (*on)
		if (!fetch_reclaim())
			usleep(20);
	return NULL;
}

/* Files that are closed before their blocks are written. */
static void
read_and_close(char *buf)
{
	atomic_bool on = true;
	pthread_t t;

	T(!sys_thread(&t, reclaimer, &on));
	for (int i = 0; i < 500; i++) {
		struct stream st = { .lock = PTHREAD_MUTEX_INITIALIZER };
		struct obj *o;

		fake_file.ver.fileid++;
		o = fake_open();
		T(obj_read(o, &st, buf, 10, 0, NULL) == 10);
		obj_put(o);
	}
	on = false;
	pthread_join(t, NULL);
}

/* The server's reply to a READ says that the file ends before its READ. */
static void
read_shrunk(void)
{
	struct conn *c = &bnfs.conn[0];
	READ3res res;
	struct call *k;
	struct obj *o;

	memset(&res, 0, sizeof(res));
	fake_file.ver.fileid++;
	o = fake_open();
	fake.hold = true;
	T(fetch_start(o, 0, 4096, pool_get(4096), 4096, PRIO_DEMAND) == 4096);
	fake.hold = false;
	k = call_new(CALL_READ, NULL);
	k->f = fake.held;
	k->c = c;
	LIST_INSERT_HEAD(&c->flying, k, flying);
	c->nread = 1;
	conn3_reply(NULL, RPC_STATUS_SUCCESS, &res, k);
	T(o->gone && LIST_EMPTY(fetch_bucket(o, 0)) &&
	    LIST_EMPTY(&c->flying) && !c->nread);
	obj_put(o);
}

static void
test_fetch(enum tri uring)
{
	char *buf = malloc(fake_file.ver.size);
	struct stream st = { .lock = PTHREAD_MUTEX_INITIALIZER };
	struct stat sb;
	struct obj *o;
	struct ent *e;
	uint64_t used = 0;
	char path[64];

	conf.cache_dir = strdup(in_tmp("cache"));
	conf.cache_block_size = 64 * KiB;
	conf.cache_checksum = conf.direct_io = YES;
	conf.cache_include = conf.cache_exclude = (char *)(uintptr_t)"";
	conf.cache_min_free = (struct amount){ 0 };
	conf.nfs_connections = 4;
	pool_restart(8 * MiB, conf.cache_block_size);
	be = &fake_backend;
	T(exec_restart(uring, true, "") && !store_open("fake"));
	T(!fill_start() && !store_start());
	for (int i = 0; i < 2; i++)
		T(!sys_thread(&fake.tid[i], fake_thread, NULL));
	read_by_many(24, 0, 100);
	claim("many readers of one file read what the server has");
	read_by_many(24, 3, 100);
	claim("a failed READ fails its readers, and nothing else");
	read_by_many(24, 0, 10);
	objects_gone();
	T(fake.bytes == fake_file.ver.size);
	claim("each byte is fetched once, by readers and fill together");
	read_by_many(24, 4, 0);
	objects_gone();
	claim("a fill survives failures");

	pthread_mutex_lock(&store.lock);
	store.min_free = UINT64_MAX / 4;
	pthread_mutex_unlock(&store.lock);
	for (int i = 0; i < 20; i++)
		read_by_many(1, 0, 0);
	objects_gone();
	pthread_mutex_lock(&store.lock);
	store.min_free = 0;
	pthread_mutex_unlock(&store.lock);
	claim("a full cache disk fails no read");
	conf.cache_fill = 100;
	read_and_close(buf);
	claim("a file can be closed before it is written to the cache");

	read_shrunk();
	claim("a READ beyond the end of a file that shrank is answered once");
	o = fake_open();
	fake.refuse = true;
	T(obj_read(o, &st, buf, 4096, 0, NULL) == -EIO);
	fake.refuse = false;
	obj_put(o);
	claim("READs that can't be queued are not tried for ever");

	fake_file.ver.fileid++;
	fake.fail = 0;
	fake.bytes = 0;
	o = fake_open();
	T(read_right(buf, obj_read(o, &st, buf, fake_file.ver.size, 0, NULL),
	    fake_file.ver.size, 0));
	for (int i = 0; i < 5000 && !o->complete; i++)
		usleep(1000);
	T(o->complete && o->present == o->nblk);
	key_path(&fake_file.ver, "", path);
	T(!fstatat(store.objects, path, &sb, 0));
	T((uint64_t)sb.st_size == fake_file.ver.size);
	T(!ftruncate(o->rfd, 5 * MiB));
	T(read_right(buf, obj_read(o, &st, buf, MiB, 6 * MiB, NULL), MiB, 6 * MiB));
	T(fake.bytes > 0);
	obj_put(o);
	claim("what can't be read from the cache disk is fetched again");

	stopping = true;
	fill_stop();
	pthread_mutex_lock(&fake.lock);
	fake.quit = true;
	pthread_cond_broadcast(&fake.cond);
	pthread_mutex_unlock(&fake.lock);
	pthread_join(fake.tid[0], NULL);
	pthread_join(fake.tid[1], NULL);
	exec_stop(&exec);
	while (fetch_reclaim())
		;
	store_stop();
	T(pool.used == 0 && TAILQ_EMPTY(&pool.kept) &&
	    TAILQ_EMPTY(&pool.waiters) && !store.unwritten);
	TAILQ_FOREACH(e, &store.level[0], turn) {
		T(LIST_EMPTY(&e->objs) && !e->live);
		used += e->bytes;
	}
	T(store.used == used);
	claim("in the end all buffers and objects are free");
	free(buf);
	free(conf.cache_dir);
	conf.cache_dir = NULL;
}

/* === tree === */

/* Flush what was noted, as the noter does. */
static void
tree_learn(void)
{
	tree_flush(tree.notes, tree.n);
	tree.notes = NULL;
	tree.n = tree.room = tree.noted = 0;
	tree_forget();
}

/* A listing of dir with these names, space separated; those with a ! have no
 * attributes. */
static void
tree_listed(const char *dir, const char *names_, int64_t mtime)
{
	struct attr a = { .mode = S_IFREG | 0644, .ver.mtime = mtime };
	struct dirlist l = { 0 };
	char *copy = strdup(names_), *rest = copy, *name;

	while ((name = strsep(&rest, " ")))
		if (*name)
			T(!dirlist_add(&l, name + (*name == '!'),
			    *name == '!' ? NULL : &a));
	tree_note_list(dir, &l);
	dirlist_free(&l);
	free(copy);
}

/* The names that dir is known to have; "-" if it was never listed whole. */
static const char *
tree_names(const char *dir)
{
	static char text[256];
	struct dirlist l = { 0 };

	strcpy(text, tree_list(dir, &l) ? "-" : "");
	for (size_t i = 0; i < l.n; i++)
		strcat(strcat(text, i ? " " : ""), l.v[i].name);
	dirlist_free(&l);
	return text;
}

static void
test_tree(void)
{
	struct attr a = { .mode = S_IFLNK | 0777, .ver.mtime = 5 }, b;
	struct image im;
	char key[64], buf[300];
	struct note *old;

	mkdir(in_tmp("tree"), 0700);
	tree.fd = open(in_tmp("tree"), O_RDONLY | O_DIRECTORY);
	store.dir = open(tmp, O_RDONLY | O_DIRECTORY);
	store.scanned = true;
	store.limit = GiB;
	tree_listed("/d", "b a c", 1);
	tree_learn();
	T(!strcmp(tree_names("/d"), "a b c"));
	T(!tree_get("/d/b", &b, NULL, 0) && b.ver.mtime == 1);
	T(tree_get("/d/x", &b, NULL, 0) == -EHOSTDOWN);
	T(!strcmp(tree_names("/e"), "-"));
	claim("a listing is known; what it lacks is not said to be missing");

	tree_note_name("/d/x", NULL, NULL);
	tree_note_name("/d/b", NULL, NULL);
	tree_note_name("/d/n", &a, NULL);
	tree_learn();
	T(!strcmp(tree_names("/d"), "a c n"));
	T(tree_get("/d/x", &b, NULL, 0) == -ENOENT);
	T(tree_get("/d/b", &b, NULL, 0) == -ENOENT);
	T(!tree_get("/d/n", &b, NULL, 0) && b.ver.mtime == 5);
	claim("single names change a listing: new, and not there");

	tree_note_name("/d/n", NULL, "target");
	tree_note_name("/d/n", &a, NULL);
	tree_learn();
	T(!tree_get("/d/n", NULL, buf, sizeof(buf)) && !strcmp(buf, "target"));
	T(tree_get("/d/n", NULL, buf, 6) == -EHOSTDOWN);
	a.ver.mtime = 6;
	tree_note_name("/d/n", &a, NULL);
	tree_learn();
	T(tree_get("/d/n", NULL, buf, sizeof(buf)) == -EHOSTDOWN);
	claim("a link's target is kept as long as the link is the same");

	tree_listed("/d", "!a d", 2);
	tree_learn();
	T(!strcmp(tree_names("/d"), "a d"));
	T(!tree_get("/d/a", &b, NULL, 0) && b.ver.mtime == 1);
	T(tree_get("/d/x", &b, NULL, 0) == -ENOENT);
	T(tree_get("/d/c", &b, NULL, 0) == -EHOSTDOWN);
	claim("a new listing replaces an old one, and leaves what it does not say");

	for (int i = 0; i < 3000; i++) {
		snprintf(buf, sizeof(buf), "/many/%d", i % 1500);
		a.ver.mtime = i;
		tree_note_name(buf, i % 7 ? &a : NULL, NULL);
	}
	tree_learn();
	for (int i = 1500; i < 3000; i++) {
		snprintf(buf, sizeof(buf), "/many/%d", i % 1500);
		T(tree_get(buf, &b, NULL, 0) == (i % 7 ? 0 : -ENOENT));
		T(i % 7 == 0 || b.ver.mtime == i);
	}
	T(!strcmp(tree_names("/many"), "-"));
	tree_note_name("/", &a, NULL);
	tree_learn();
	T(!tree_get("/", &b, NULL, 0) && b.ver.mtime == 2999);
	claim("of many notes at once the last about a name counts");

	T(tree.bytes == store.used && tree.bytes >= 3 * DIO_ALIGN);
	tree_key("/d", "", key);
	T(!tree_read(key, &im));
	for (size_t i = 0; i < im.size; i++) {
		struct image bad = { .buf = memcpy(malloc(im.size), im.buf,
			im.size), .size = im.size };

		bad.buf[i] ^= 1 << i % 8;
		TS(image_parse(&bad) == -EBADMSG, "flipped");
		free(bad.v);
		bad.v = NULL;
		bad.n = 0;
		memcpy(bad.buf, im.buf, im.size);
		bad.size = i;
		TS(image_parse(&bad) == -EBADMSG, "cut");
		image_free(&bad);
	}
	image_free(&im);
	claim("a listing with any bit flipped, or cut anywhere, is not believed");

	store.limit = 8 * tree.bytes;		/* its share is full */
	old = tree.notes;
	T(!old);
	tree_listed("/full", "a", 1);
	tree_learn();
	T(!strcmp(tree_names("/full"), "-"));
	T(store.used == tree.bytes && tree.bytes == 0);
	T(!strcmp(tree_names("/d"), "-"));
	tree_listed("/full", "a", 1);
	tree_learn();
	T(!strcmp(tree_names("/full"), "a"));
	claim("when its share of the cache is full all is learnt anew");
	tree_clear();
	T(store.used == 0);
	tree_forget();
	close(tree.fd);
	close(store.dir);
	tree.fd = store.dir = -1;
	store.limit = 0;
	store.scanned = false;
}

static void *
sign_of_life(void *arg)
{
	notify_alive();
	return arg;
}

/* A watchdog that barks only if nothing else does would be of no use. */
static void
test_notify(void)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	struct timeval soon = { .tv_usec = 200000 }, later = { .tv_sec = 30 };
	int s = socket(AF_UNIX, SOCK_DGRAM, 0);
	char buf[64];
	pthread_t tid;
	ssize_t n;

	snprintf(un.sun_path, sizeof(un.sun_path), "%.90s/notify",
	    tmp);
	T(!bind(s, (struct sockaddr *)&un, sizeof(un)));
	setenv("NOTIFY_SOCKET", un.sun_path, 1);
	notify_start();
	T(notify.on && !notify.every);
	pthread_mutex_lock(&pool.lock);
	T(!sys_thread(&tid, sign_of_life, NULL));
	setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &soon, sizeof(soon));
	T(recv(s, buf, sizeof(buf), 0) < 0);
	pthread_mutex_unlock(&pool.lock);
	setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &later, sizeof(later));
	n = recv(s, buf, sizeof(buf), 0);
	T(n == 10 && !memcmp(buf, "WATCHDOG=1", 10));
	pthread_join(tid, NULL);
	claim("a lock that is never released keeps the watchdog hungry");

	setenv("WATCHDOG_USEC", "8000000", 1);
	setenv("WATCHDOG_PID", "1", 1);
	notify_start();
	T(!notify.every);		/* another's */
	unsetenv("WATCHDOG_PID");
	notify_start();
	T(notify.every == 2000);
	notify.on = false;
	unsetenv("NOTIFY_SOCKET");
	unsetenv("WATCHDOG_USEC");
	close(s);
	claim("a watchdog is fed four times in its time, if it is ours");

	char pid[16];
	snprintf(pid, sizeof(pid), "%d", getpid());
	setenv("LISTEN_FDNAMES", "a:cachefs:b", 1);
	T(notify_stored() == -1);
	setenv("LISTEN_PID", pid, 1);
	T(notify_stored() == 4);
	setenv("LISTEN_FDNAMES", "a:cachefs2:b", 1);
	T(notify_stored() == -1);
	setenv("LISTEN_FDNAMES", "", 1);
	T(notify_stored() == -1);
	unsetenv("LISTEN_FDNAMES");
	unsetenv("LISTEN_PID");
	claim("of the descriptors handed over ours is known by its name");
}

static int
remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st;
	(void)type;
	(void)ftw;
	return remove(path);
}

int
main(void)
{
	const char *dir = getenv("TMPDIR");

	setvbuf(stdout, NULL, _IOLBF, 0);	/* one that hangs shows where */
	logs.level = getenv("UNIT_VERBOSE") ? LOG_DBG : -1;
	snprintf(tmp, sizeof(tmp), "%s/cachefs-unit.XXXXXX",
	    dir && *dir ? dir : "/var/tmp");
	if (!mkdtemp(tmp)) {
		printf("Bail out! %s: %s\n", tmp, strerror(errno));
		return EXIT_FAILURE;
	}
	for (int i = 0; i < KEY_STRIPES; i++)
		pthread_mutex_init(&store.key[i], NULL);
	store_policy(EVICT_LRU);
	test_conf_sizes();
	test_conf_options();
	test_conf_table();
	test_conf_ini();
	test_conf_check();
	test_util();
	test_pool();
	test_pool_fifo();
	test_pool_hammer();
	test_exec(NO, false, "threads: what was written is read back");
	test_exec(NO, true, "threads: the same by O_DIRECT");
	test_exec(YES, false, "io_uring: what was written is read back");
	test_exec(YES, true, "io_uring: the same by O_DIRECT, fixed buffers");
	test_exec_files();
	test_exec_polled();
	test_index();
	test_names();
	test_tokens();
	test_paths();
	test_parse();
	test_histogram();
	test_gap();
	test_stream();
	test_tree();
	test_fetch(AUTO);
	test_notify();
	printf("1..%u\n", claims);
	nftw(tmp, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
