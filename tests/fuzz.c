/*
 * fuzz.c - libFuzzer harnesses for what cachefs.c reads from others.  Each is a
 * program of its own, chosen by a macro: `make check-fuzz`.
 *
 *	FUZZ_index	an object's index file
 *	FUZZ_tree	two images of one directory of the tree, and their merger
 *	FUZZ_conf	an ini file, a -o argument
 *	FUZZ_ioctl	what the subcommands hand to the daemon
 *
 * The first byte of an input says how the rest is taken: with FIX the checksums
 * (and sizes) of the file format are set right, or nothing would get past them.
 */
#pragma GCC diagnostic ignored "-Wunused-function"
#define fuse_get_context fuzz_context	/* there is no session */
#include "../cachefs.c"

#define FIX	1			/* of the first byte */
#define MORE	2			/* each harness its own */
#define THIRD	4

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What must hold whatever the input. */
#define HOLDS(cond) \
	((void)((cond) || (fprintf(stderr, "fuzz.c:%d: not so: %s\n", \
	    __LINE__, #cond), abort(), 0)))

struct fuse_context *
fuzz_context(void)
{
	static struct fuse_context c;

	c.uid = geteuid();
	return &c;
}

/* A file in memory with these bytes. */
static int
in_memory(const void *data, size_t size)
{
	static int fd = -1;

	if (fd < 0)
		fd = memfd_create("fuzz", MFD_CLOEXEC);
	HOLDS(fd >= 0 && !ftruncate(fd, 0) &&
	    (!size || pwrite(fd, data, size, 0) == (ssize_t)size));
	return fd;
}

/* === index === */

#ifdef FUZZ_index
#define MANY	(1u << 20)		/* blocks: more would only take longer */

static void
fuzz(unsigned how, uint8_t *data, size_t size)
{
	struct disk_index *h = (void *)data;
	struct attr a = { .mode = S_IFREG | 0644, .ver = { 7, 42, 12345678, 1,
		1 } };
	uint64_t last, *map = (uint64_t *)(h + 1);
	struct obj *o;
	int r;

	if (size < sizeof(*h)) {
		idx_parse(in_memory(data, size), &(struct obj){ .attr = a });
		return;
	}
	conf.cache_checksum = !(how & MORE);
	if (how & FIX) {
		h->body_size = size - sizeof(*h);
		last = how & THIRD ? MIN((h->blocks + 63) / 64,
		    h->body_size / 8) : 0;
		h->present = last ? 0 : h->present;
		for (uint64_t i = 0; i < last; i++)
			h->present += (uint64_t)__builtin_popcountll(map[i]);
		h->body_xxh3 = XXH3_64bits(h + 1, h->body_size);
		h->xxh3 = XXH3_64bits(h, offsetof(struct disk_index, xxh3));
	}
	if (h->ver.size <= INT64_MAX)
		a.ver = h->ver;		/* as the server has it */
	if (h->block_size && a.ver.size / h->block_size > MANY)
		return;
	o = obj_new(&a);
	HOLDS(o != NULL);
	r = idx_parse(in_memory(data, size), o);
	HOLDS(r == 0 || r == -EBADMSG || r == -ESTALE || r == -ENOMEM);
	if (!r) {
		HOLDS(o->bs >= DIO_ALIGN && o->bs <= IO_MAX &&
		    !(o->bs & (o->bs - 1)));
		last = o->nblk - 1;
		HOLDS(o->nblk && last * o->bs < a.ver.size &&
		    a.ver.size - last * o->bs <= o->bs);
		HOLDS(o->present && o->present <= o->nblk);
		last = 0;
		for (uint64_t i = 0; i < o->nblk; i++)
			last += bit_get(o->map, i);
		HOLDS(last == o->present);
		HOLDS(!o->sums || conf.cache_checksum);
		HOLDS(!o->sums || o->sums[o->nblk - 1] || !o->checked[0]);
	}
	obj_free(o);
}
#endif

/* === tree === */

#ifdef FUZZ_tree
/* Take size bytes as an image; false: it is none. */
static bool
take(struct image *im, const uint8_t *data, size_t size, bool fix)
{
	struct disk_tree *h;
	uint64_t n = 0;
	int r;

	*im = (struct image){ .buf = malloc(size + 1), .size = size };
	HOLDS(im->buf);
	memcpy(im->buf, data, size);
	h = (void *)im->buf;
	if (fix && size >= sizeof(*h)) {
		h->body_size = size - sizeof(*h);
		for (size_t at = sizeof(*h); at + sizeof(struct disk_entry) <=
		    size; n++) {
			struct disk_entry *e = (void *)(im->buf + at);

			if (!e->size || e->size % 8)
				break;
			at += e->size;
		}
		h->entries = n;
		h->body_xxh3 = XXH3_64bits(h + 1, h->body_size);
		h->xxh3 = XXH3_64bits(h, offsetof(struct disk_tree, xxh3));
	}
	r = image_parse(im);
	HOLDS(r == 0 || r == -EBADMSG);
	if (r)
		image_free(im);
	return !r;
}

static void
good_name(const char *s)
{
	HOLDS(*s && strlen(s) < 256 && !strchr(s, '/'));
}

/* Ask im, which is that of /d, about all that it has. */
static void
ask(const struct image *im)
{
	struct dirlist l = { 0 };
	char path[3 + 256], link[64];
	struct attr a;
	int r;

	tree.last = *im;
	tree.last_dir = strdup("/d");
	r = tree_list("/d", &l);
	HOLDS(r == (im->h->flags & TREE_WHOLE ? 0 : -EHOSTDOWN));
	for (size_t i = 0; i < l.n; i++) {
		good_name(l.v[i].name);
		HOLDS(strcmp(l.v[i].name, ".") && strcmp(l.v[i].name, ".."));
	}
	HOLDS(l.n <= im->n);
	dirlist_free(&l);
	for (size_t i = 0; i < im->n; i++) {
		good_name(im->v[i]->text);
		snprintf(path, sizeof(path), "/d/%s", im->v[i]->text);
		r = tree_get(path, &a, NULL, 0);
		HOLDS(r == (im->v[i]->flags & ENTRY_GONE ? -ENOENT :
		    im->v[i]->flags & ENTRY_ATTR ? 0 : -EHOSTDOWN));
		r = tree_get(path, NULL, link, sizeof(link));
		HOLDS(r || (*link && strlen(link) < sizeof(link)));
	}
	HOLDS(tree_get("/d/" "\xff\xfe none", &a, NULL, 0) == -EHOSTDOWN ||
	    im->n);
	free(tree.last_dir);
	tree.last_dir = NULL;
	tree.last = (struct image){ 0 };
}

static void
fuzz(unsigned how, uint8_t *data, size_t size)
{
	struct image old = { 0 }, new = { 0 }, im = { 0 }, again = { 0 };
	size_t cut = size > 2 ? data[0] | (size_t)data[1] << 8 : 0;
	bool good;

	if (size <= 2)
		return;
	data += 2;
	size -= 2;
	cut = MIN(cut, size);
	if (cut)			/* else there is no file yet */
		take(&old, data, cut, how & FIX);
	good = take(&new, data + cut, size - cut, how & FIX);
	if (old.h)
		ask(&old);
	if (good) {
		ask(&new);
		HOLDS(!image_merge(&old, &new, &im));
		ask(&im);
		HOLDS(im.n <= old.n + new.n);
		HOLDS(!image_merge(&im, &new, &again));
		HOLDS(im.size == again.size &&
		    !memcmp(im.buf, again.buf, im.size));
	}
	image_free(&old);
	image_free(&new);
	image_free(&im);
	image_free(&again);
}
#endif

/* === conf === */

#ifdef FUZZ_conf
static void
in_range(const struct conf *c, const struct copt *o)
{
	const void *at = (const char *)c + o->at;
	const struct amount *am = at;
	unsigned words = 0;

	switch (o->type) {
	case C_STR:
		break;
	case C_BOOL:
		HOLDS(*(const unsigned *)at <= YES);
		break;
	case C_TRI:
		HOLDS(*(const unsigned *)at <= AUTO);
		break;
	case C_WORD:
		while (o->words[words])
			words++;
		HOLDS(*(const unsigned *)at < words);
		break;
	case C_SIZE:
		HOLDS((double)*(const uint64_t *)at >= o->min &&
		    (double)*(const uint64_t *)at <= o->max);
		break;
	case C_AMOUNT:
		HOLDS(am->percent >= 0 && am->percent <= 100 &&
		    (double)am->bytes <= o->max);
		break;
	case C_SECS:
		HOLDS(*(const double *)at >= o->min &&
		    *(const double *)at <= o->max);
		break;
	default:
		if (o->def)		/* nfs_uid and nfs_gid may be any */
			HOLDS(*(const unsigned *)at >= o->min &&
			    *(const unsigned *)at <= o->max);
	}
}

/* The first line's end parts a -o argument from an ini file. */
static void
fuzz(unsigned how, uint8_t *data, size_t size)
{
	char *text = malloc(size + 1), path[32], *ini;
	struct conf c;
	int r = 0;

	HOLDS(text != NULL);
	memcpy(text, data, size);
	text[size] = '\0';
	ini = how & MORE ? memchr(text, '\n', size) : NULL;
	HOLDS(!conf_defaults(&c));
	if (!(how & FIX) || ini) {
		char *from = how & FIX ? ini + 1 : text;

		if (how & FIX)
			*ini = '\0';
		snprintf(path, sizeof(path), "/proc/self/fd/%d",
		    in_memory(from, (size_t)(text + size - from)));
		r = conf_ini(&c, path);
	}
	if (!r && how & FIX)
		r = conf_options(&c, text);
	HOLDS(r == 0 || r == -EINVAL);
	if (!r)
		conf_check(&c);
	for (size_t i = 0; i < NCOPTS; i++) {
		in_range(&c, &copts[i]);
		if (copts[i].type == C_STR)
			free(*(char **)(void *)((char *)&c + copts[i].at));
	}
	HOLDS(!(c.cache_block_size & (c.cache_block_size - 1)));
	free(c.fsname);
	free(text);
}
#endif

/* === ioctl === */

#ifdef FUZZ_ioctl
#define BLOCK	4096u
#define BLOCKS	67u			/* the last of one byte */

static struct obj *object;
static char dir[64];

/* The server is away. */
static int
away_open(struct obj *o, const char *path, struct attr *now)
{
	HOLDS(o == object && !strcmp(path, "/f"));
	*now = o->attr;
	return -EHOSTDOWN;
}

static const struct backend away_backend = { .open = away_open };

static void
clean(void)
{
	char cmd[96];

	snprintf(cmd, sizeof(cmd), "rm -rf '%s'", dir);
	if (system(cmd))
		fprintf(stderr, "%s is left\n", dir);
}

/* Have all blocks of the object, but damage those with bits in bad. */
static void
restore(unsigned bad)
{
	object->present = object->nblk;
	object->complete = true;
	for (unsigned i = 0; i < BLOCKS; i++) {
		bit_set(object->map, i);
		object->sums[i] &= ~UINT64_C(1);
		object->sums[i] |= (bad >> i % 8 & 1) && i % 5 == 0;
	}
}

static void
prepare(void)
{
	const struct attr a = { .mode = S_IFREG | 0644, .ver = { 7, 42,
		(BLOCKS - 1) * BLOCK + 1, 1, 1 } };
	const char *t = getenv("TMPDIR");
	char path[64], xx[3] = "", *data;

	snprintf(dir, sizeof(dir), "%.40s/cachefs-fuzz.XXXXXX",
	    t && *t ? t : "/var/tmp");
	HOLDS(mkdtemp(dir));
	atexit(clean);
	conf.cache_dir = dir;
	conf.cache_block_size = BLOCK;
	conf.cache_checksum = YES;
	conf.cache_fill = 100;
	conf.queue_depth = 8;
	conf.use_io_uring = NO;
	conf.cache_include = conf.cache_exclude = (char *)(uintptr_t)"";
	be = &away_backend;
	for (int i = 0; i < KEY_STRIPES; i++)
		pthread_mutex_init(&store.key[i], NULL);
	HOLDS(!pool_start(8 * MiB, BLOCK) && !exec_start(-1));
	HOLDS(!store_open("fuzz"));
	store.min_free = UINT64_MAX / 4;	/* what is lost stays lost */
	object = obj_get(&a, "/f");
	HOLDS(object && !obj_map(object, true));
	memcpy(xx, key_path(&a.ver, "", path), 2);
	HOLDS(!mkdirat(store.objects, xx, 0700) || errno == EEXIST);
	data = calloc(BLOCKS, BLOCK);
	HOLDS(data);
	for (unsigned n = 1; ; n++) {	/* all the same, with an even sum */
		memcpy(data, &n, sizeof(n));
		if (!(XXH3_64bits(data, BLOCK) & 1) &&
		    !(XXH3_64bits(data, 1) & 1))
			break;
	}
	for (unsigned i = 0; i < BLOCKS; i++) {
		memcpy(data + (size_t)i * BLOCK, data, BLOCK);
		object->sums[i] = XXH3_64bits(data, i < BLOCKS - 1 ? BLOCK : 1);
	}
	HOLDS(!store_write(store.objects, path, data, a.ver.size,
	    SYNC_BEGUN));
	object->rfd = key_open(&a.ver, "", O_RDWR);
	HOLDS(object->rfd >= 0);
	free(data);
}

static void
fuzz(unsigned how, uint8_t *data, size_t size)
{
	static struct file f;
	struct fuse_file_info fi = { .fh = (uintptr_t)&f };
	union {				/* as large as libfuse makes it */
		struct cachefs_verify v;
		struct cachefs_file w;
	} u = { 0 };
	uint32_t cmd = size % 2 ? CACHEFS_IOC_FILE : CACHEFS_IOC_VERIFY;
	uint64_t was;
	int r;

	if (!object)
		prepare();
	f.o = object;
	restore(how & MORE ? how >> 3 : 0);
	if (how & FIX && size >= sizeof(cmd))
		memcpy(&cmd, data, sizeof(cmd));
	memcpy(&u, data, MIN(size, sizeof(u)));
	was = u.v.damaged;
	if (cmd == CACHEFS_IOC_FILE && u.w.op == CACHEFS_EVICT)
		u.w.op = 0;		/* the object is for all inputs */
	r = op_ioctl("/f", cmd, NULL, &fi, how & THIRD ? FUSE_IOCTL_DIR : 0,
	    &u);
	if (cmd == CACHEFS_IOC_FILE) {
		HOLDS(r <= 0 && (r || u.w.op != CACHEFS_WARM ||
		    (!*u.w.why && u.w.cached == object->attr.ver.size)));
		return;
	}
	HOLDS(cmd == CACHEFS_IOC_VERIFY || r == -ENOTTY);
	HOLDS(r || (u.v.off == object->attr.ver.size &&
	    u.v.damaged - was <= BLOCKS));
	HOLDS(r || how & MORE || u.v.damaged == was);
	HOLDS(object->present + (u.v.damaged - was) >= object->nblk);
	HOLDS(object->refs <= 2 && !pool.used);	/* the list of the dirty */
}
#endif

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	logs.level = getenv("FUZZ_VERBOSE") ? LOG_DBG : -1;
	conf.cache_block_size = 256 * KiB;
	store_policy(EVICT_LRU);
	return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t *copy;

	if (size < 1)
		return 0;
	copy = malloc(size - 1);	/* aligned, of just this size */
	HOLDS(copy);
	memcpy(copy, data + 1, size - 1);
	fuzz(data[0], copy, size - 1);
	free(copy);
	return 0;
}
