/*
 * evictsim.c - what each cache_eviction keeps: replays traces of accesses with
 * cachefs's own code (evict_one() and what is below it) and prints the share
 * of hits beside that of Belady's optimum, which knows the future.
 *
 * usage: evictsim [TRACE]
 *
 * All objects have one size.  TRACE is a file with a number a line, of the
 * object that is opened, for a cache of a tenth of the distinct ones.  Without,
 * these are made:
 *	zipf	a few are opened often, most rarely: object i by 1/i
 *	shift	the same, but every so often others are the popular ones
 *	loop	all in turn, again and again, a quarter more than fit
 *	scan	a hot set of 80 % of the cache; then one pass over ten times the
 *		cache, with an access to the hot set between every two
 *	pass	the same pass with nothing in between, and the hot set after it
 * For the last two only accesses to the hot set count, from where the pass
 * begins.  Ends with 1 if sieve keeps less than 90 % of what it hit before.
 */
#pragma GCC diagnostic ignored "-Wunused-function"	/* main() calls them */
#include "../cachefs.c"
#include <err.h>

#define CAP 2000u			/* objects that fit */
#define LEN 400000u			/* accesses */
#define HOT (CAP * 8 / 10)
#define NEVER UINT32_MAX

static struct trace {
	uint32_t v[2 * LEN];
	bool counts[2 * LEN];
	uint32_t n, cap;
} t;

static uint64_t
rnd(void)				/* xorshift64: the same every time */
{
	static uint64_t x = 88172645463325252u;

	x ^= x << 13;
	x ^= x >> 7;
	return x ^= x << 17;
}

static void
add(uint32_t id, bool counts)
{
	t.v[t.n] = id;
	t.counts[t.n++] = counts;
}

/* The index of a random object of n, i with a weight of 1 / (i + 1). */
static uint32_t
zipf(uint32_t n)
{
	static double sum[20 * CAP];
	static uint32_t of;
	double x;
	uint32_t low = 0, high = n - 1;

	for (uint32_t i = 0; of != n && i < n; i++)
		sum[i] = (i ? sum[i - 1] : 0) + 1.0 / (i + 1);
	of = n;
	x = (double)(rnd() >> 11) / (double)(UINT64_C(1) << 53) * sum[n - 1];
	while (low < high) {
		uint32_t mid = (low + high) / 2;

		if (sum[mid] < x)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

static void
make_trace(const char *name)
{
	bool pass = !strcmp(name, "pass");

	t.n = 0;
	t.cap = CAP;
	if (!strcmp(name, "zipf"))
		for (uint32_t i = 0; i < LEN; i++)
			add(zipf(10 * CAP), true);
	else if (!strcmp(name, "shift"))
		for (uint32_t i = 0; i < LEN; i++)
			add((zipf(10 * CAP) + i / (LEN / 8) * CAP) % (10 * CAP),
			    true);
	else if (!strcmp(name, "loop"))
		for (uint32_t i = 0; i < LEN; i++)
			add(i % (CAP * 5 / 4), true);
	else {
		for (uint32_t i = 0; i < 10 * HOT; i++)
			add((uint32_t)(rnd() % HOT), false);
		for (uint32_t i = 0; i < 10 * CAP; i++) {
			add(HOT + i, false);
			if (!pass)
				add((uint32_t)(rnd() % HOT), true);
		}
		for (uint32_t i = 0; pass && i < HOT; i++)
			add((uint32_t)(rnd() % HOT), true);
	}
}

/* The share of hits of the counted accesses. */
static double
replay(unsigned policy)
{
	uint64_t hits = 0, all = 0, cached = 0;

	store_policy(policy);
	for (uint32_t i = 0; i < t.n; i++) {
		const struct version v = { .fileid = t.v[i] + 1 };
		struct ent *e = ent_get_locked(&v, true);

		e->live++;
		ent_use_locked(e, 1);
		all += t.counts[i];
		hits += t.counts[i] && e->bytes;
		if (!e->bytes) {
			if (cached == t.cap && evict_one())
				cached--;
			e->bytes = store.used = 1;
			cached++;
		}
		ent_drop_locked(e);
	}
	while (evict_one())
		;
	return (double)hits / (double)MAX(all, 1);
}

static uint32_t heap[2 * LEN + 1], nheap;	/* of accesses, by their next */
static uint32_t next_use[2 * LEN];

static bool
later(uint32_t a, uint32_t b)
{
	return next_use[a] > next_use[b];
}

static void
heap_push(uint32_t access)
{
	uint32_t i = nheap++;

	for (; i && later(access, heap[(i - 1) / 2]); i = (i - 1) / 2)
		heap[i] = heap[(i - 1) / 2];
	heap[i] = access;
}

static uint32_t
heap_pop(void)
{
	uint32_t top = heap[0], last = heap[--nheap], i = 0, c;

	while ((c = 2 * i + 1) < nheap) {
		if (c + 1 < nheap && later(heap[c + 1], heap[c]))
			c++;
		if (!later(heap[c], last))
			break;
		heap[i] = heap[c];
		i = c;
	}
	heap[i] = last;
	return top;
}

/* The same of Belady's: that one goes which is wanted last. */
static double
optimum(void)
{
	uint32_t top = 0, cached = 0, *last;
	uint64_t hits = 0, all = 0;

	for (uint32_t i = 0; i < t.n; i++)
		top = MAX(top, t.v[i]);
	last = malloc((top + 1) * sizeof(*last));	/* the access that has it */
	if (!last)
		err(EXIT_FAILURE, NULL);
	memset(last, 0xff, (top + 1) * sizeof(*last));
	for (uint32_t i = t.n; i-- > 0;) {
		next_use[i] = last[t.v[i]];
		last[t.v[i]] = i;
	}
	memset(last, 0xff, (top + 1) * sizeof(*last));
	nheap = 0;
	for (uint32_t i = 0; i < t.n; i++) {
		bool hit = last[t.v[i]] != NEVER;

		all += t.counts[i];
		hits += hit && t.counts[i];
		while (!hit && cached == t.cap) {
			uint32_t a = heap_pop(), id = t.v[a];

			if (last[id] == a) {	/* else it was used since */
				last[id] = NEVER;
				cached--;
			}
		}
		cached += !hit;
		last[t.v[i]] = i;
		heap_push(i);
	}
	free(last);
	return (double)hits / (double)MAX(all, 1);
}

static int
by_number(const void *a, const void *b)
{
	const uint32_t *x = a, *y = b;

	return (*x > *y) - (*x < *y);
}

static void
read_trace(const char *file)
{
	static uint32_t sorted[2 * LEN];
	FILE *f = fopen(file, "r");
	unsigned id;
	uint32_t distinct = 0;

	if (!f)
		err(EXIT_FAILURE, "%s", file);
	while (t.n < 2 * LEN && fscanf(f, "%u", &id) == 1)
		add(id, true);
	if (!feof(f))
		errx(EXIT_FAILURE, "%s: access %u: no number, or one too many",
		    file, t.n + 1);
	fclose(f);
	memcpy(sorted, t.v, t.n * sizeof(*sorted));
	qsort(sorted, t.n, sizeof(*sorted), by_number);
	for (uint32_t i = 0; i < t.n; i++)
		distinct += !i || sorted[i] != sorted[i - 1];
	t.cap = MAX(distinct / 10, 1);
}

int
main(int argc, char **argv)
{
	static const char *const made[] = { "zipf", "shift", "loop", "scan",
		"pass" };
	bool given = argc > 1, kept = true;

	printf("%-8s %8s %8s %8s %8s %8s\n", "trace", "capacity", "lru", "lfu",
	    "sieve", "optimum");
	for (int i = 0; i < (given ? 1 : 5); i++) {
		double hit[3];

		if (given)
			read_trace(argv[1]);
		else
			make_trace(made[i]);
		for (unsigned p = EVICT_LRU; p <= EVICT_SIEVE; p++)
			hit[p] = replay(p);
		printf("%-8s %8u %7.1f%% %7.1f%% %7.1f%% %7.1f%%\n",
		    given ? basename(argv[1]) : made[i], t.cap,
		    100 * hit[EVICT_LRU], 100 * hit[EVICT_LFU],
		    100 * hit[EVICT_SIEVE], 100 * optimum());
		kept &= given || i < 3 || hit[EVICT_SIEVE] >= 0.9;
	}
	if (fflush(stdout))
		err(EXIT_FAILURE, "standard output");
	return kept ? EXIT_SUCCESS : EXIT_FAILURE;
}
