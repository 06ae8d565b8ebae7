/*
 * mkcache - make a cache directory of many small objects, as cachefs would
 * leave it, for tests/scale.
 *
 * usage: mkcache BACKEND SUBDIR CACHE_DIR COUNT
 *
 * The first objects are of the files of BACKEND/SUBDIR, with what these hold,
 * used just now; the others, up to COUNT together, are of files that BACKEND
 * does not have, 100 bytes each, used at various times of the last month.
 */
#pragma GCC diagnostic ignored "-Wunused-function"	/* main() calls them */
#include "../cachefs.c"

#define MADE_SIZE	100u		/* bytes of an object of no file */
#define MADE_FILEID	((uint64_t)1 << 40)	/* no inode number is as big */
#define MADE_AGE	(UINT64_C(30) * 24 * 3600)	/* seconds, at most */

/* One whole object of a single block, last used so many seconds ago. */
static int
make_object(const struct attr *a, const char *data, uint64_t age)
{
	struct timespec used = { .tv_sec = time(NULL) - (time_t)age };
	struct obj *o = obj_new(a);
	struct idx_job j = { .o = o };
	char p[64];
	int r;

	if (!o || o->nblk != 1 || obj_map(o, true))
		return -EINVAL;
	bit_set(o->map, 0);
	o->present = 1;
	o->sums[0] = XXH3_64bits(data, a->ver.size);
	idx_snapshot(&j);
	r = j.r ?: store_write(store.objects, key_path(&a->ver, "", p), data,
	    a->ver.size, SYNC_LATER) ?:
	    store_write(store.objects, key_path(&a->ver, ".idx", p), j.h,
	    j.size, SYNC_LATER);
	if (!r && utimensat(store.objects, p,
	    (struct timespec[2]){ used, used }, 0))
		r = -errno;
	free(j.h);
	obj_free(o);
	return r;
}

/* That of a file of the backend. */
static int
make_of_file(const char *path)
{
	int fd = sys_openat(bdir.root, bdir_rel(path), O_RDONLY, 0);
	char data[4096];
	struct attr a;
	int r = bdir_attr(fd, "", path, &a);

	if (!r && (a.ver.size > sizeof(data) ||
	    sys_pread(fd, data, a.ver.size, 0) != (ssize_t)a.ver.size))
		r = -EFBIG;
	sys_close(&fd);
	return r ?: make_object(&a, data, 0);
}

/* That of the i-th file that there is not. */
static int
make_of_none(uint64_t i)
{
	struct attr a = { .ver = { .fileid = MADE_FILEID + i,
		.size = MADE_SIZE, .mtime = (int64_t)i } };
	char data[MADE_SIZE] = "";

	memcpy(data, &i, sizeof(i));
	return make_object(&a, data, 3600 + key_hash(&a.ver) / 256 % MADE_AGE);
}

/* Those of all files of the backend's directory; how many, or -errno. */
static int
make_of_dir(const char *dir)
{
	struct dirlist l = { 0 };
	int r = be->readdir(dir, &l), n = 0;

	for (size_t i = 0; !r && i < l.n; i++, n++) {
		char *path = path_join(dir, l.v[i].name);

		r = path ? make_of_file(path) : -ENOMEM;
		free(path);
	}
	return r ?: n;
}

int
main(int argc, char **argv)
{
	char name[1000], sub[PATH_MAX], xx[3];
	uint64_t n;
	int r;

	if (argc != 5 || conf_defaults(&conf)) {
		fprintf(stderr, "usage: mkcache BACKEND SUBDIR CACHE_DIR "
		    "COUNT\n");
		return EXIT_USAGE;
	}
	umask(077);
	conf.nfs_backend = argv[1];
	conf.cache_dir = argv[3];
	n = strtoull(argv[4], NULL, 10);
	snprintf(sub, sizeof(sub), "/%s", argv[2]);
	r = backend_choose(name) ?: be->start() ?: store_open(name);
	for (int i = 0; !r && i < 256; i++) {
		snprintf(xx, sizeof(xx), "%02x", i);
		r = xx_make(store.objects, xx);
	}
	r = r ?: make_of_dir(sub);
	for (uint64_t i = (uint64_t)MAX(r, 0); r >= 0 && i < n; i++)
		r = make_of_none(i);
	if (r >= 0 && syncfs(store.dir))
		r = -errno;
	if (r < 0)
		fprintf(stderr, "mkcache: %s: %s\n", conf.cache_dir,
		    strerror(-r));
	return r < 0;
}
