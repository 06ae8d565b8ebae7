/*
 * badfs - a file system that fails or stalls when it is told to.
 *
 * usage: badfs -f -o src=DIR,flag=FILE[,cached] MOUNTPOINT
 *
 * Shows DIR, for reading and writing; cached: by way of the page cache.  While
 * FILE exists, every call of the kinds that are named in it, after the errno,
 * fails with that: "5 rwm" is EIO for all reads of data (r), writes of data (w),
 * and changes of names, sizes and times, and fsync (m).  With s in it, reads of
 * files whose names begin with "stall" do not return, nor does stat() of
 * "stallstat".
 */
#define FUSE_USE_VERSION 31
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static struct {
	char *src;
	char *flag;
	int cached;
} conf;

static int srcfd = -1;

/* What a call of that kind is to fail with, or 0.  Of kind s: 1, it stalls. */
static int
fault(char kind)
{
	FILE *f = fopen(conf.flag, "re");
	char kinds[8] = "";
	int err = 0;

	if (f == NULL)
		return 0;
	if (fscanf(f, "%d %7s", &err, kinds) != 2 || !strchr(kinds, kind))
		err = 0;
	else if (kind == 's')
		err = -1;
	fclose(f);
	return -err;
}

static const char *
rel(const char *path)
{
	return path[1] != '\0' ? path + 1 : ".";
}

static int
result(long r)
{
	return r < 0 ? -errno : (int)r;
}

static int
bad_getattr(const char *path, struct stat *st, struct fuse_file_info *fi)
{
	while (strcmp(path, "/stallstat") == 0 && fault('s'))
		usleep(20000);
	return result(fi ? fstat((int)fi->fh, st) :
	    fstatat(srcfd, rel(path), st, AT_SYMLINK_NOFOLLOW));
}

static int
open_as(const char *path, int flags, mode_t mode, struct fuse_file_info *fi)
{
	int fd = openat(srcfd, rel(path), (flags & ~O_DIRECT) | O_NOFOLLOW,
	    mode);

	fi->fh = (uint64_t)fd;
	fi->direct_io = !conf.cached;	/* no pages to hide behind */
	return fd < 0 ? -errno : 0;
}

static int
bad_open(const char *path, struct fuse_file_info *fi)
{
	return open_as(path, fi->flags & ~(O_CREAT | O_EXCL), 0, fi);
}

static int
bad_create(const char *path, mode_t mode, struct fuse_file_info *fi)
{
	int r = fault('m');

	return r ? r : open_as(path, fi->flags | O_CREAT, mode, fi);
}

static int
bad_release(const char *path, struct fuse_file_info *fi)
{
	(void)path;
	close((int)fi->fh);
	return 0;
}

static int
bad_read(const char *path, char *buf, size_t len, off_t off,
    struct fuse_file_info *fi)
{
	const char *name = strrchr(path, '/') + 1;
	int r = fault('r');

	while (strncmp(name, "stall", 5) == 0 && fault('s')) {
		if (fuse_interrupted())
			return -EINTR;
		usleep(20000);
	}
	return r ? r : result(pread((int)fi->fh, buf, len, off));
}

static int
bad_write(const char *path, const char *buf, size_t len, off_t off,
    struct fuse_file_info *fi)
{
	int r = fault('w');

	(void)path;
	return r ? r : result(pwrite((int)fi->fh, buf, len, off));
}

static int
bad_truncate(const char *path, off_t size, struct fuse_file_info *fi)
{
	int r = fault('m'), fd;

	if (r || fi)
		return r ? r : result(ftruncate((int)fi->fh, size));
	fd = openat(srcfd, rel(path), O_WRONLY | O_NOFOLLOW);
	if (fd < 0)
		return -errno;
	r = result(ftruncate(fd, size));
	close(fd);
	return r;
}

static int
bad_fsync(const char *path, int data, struct fuse_file_info *fi)
{
	int r = fault('m');

	(void)path;
	(void)data;
	return r ? r : result(fdatasync((int)fi->fh));
}

static int
bad_mkdir(const char *path, mode_t mode)
{
	int r = fault('m');

	return r ? r : result(mkdirat(srcfd, rel(path), mode));
}

static int
bad_unlink(const char *path)
{
	int r = fault('m');

	return r ? r : result(unlinkat(srcfd, rel(path), 0));
}

static int
bad_rmdir(const char *path)
{
	int r = fault('m');

	return r ? r : result(unlinkat(srcfd, rel(path), AT_REMOVEDIR));
}

static int
bad_rename(const char *from, const char *to, unsigned flags)
{
	int r = fault('m');

	return r ? r : result(renameat2(srcfd, rel(from), srcfd, rel(to),
	    flags));
}

static int
bad_chmod(const char *path, mode_t mode, struct fuse_file_info *fi)
{
	int r = fault('m');

	(void)fi;
	return r ? r : result(fchmodat(srcfd, rel(path), mode, 0));
}

static int
bad_utimens(const char *path, const struct timespec ts[2],
    struct fuse_file_info *fi)
{
	int r = fault('m');

	(void)fi;
	return r ? r : result(utimensat(srcfd, rel(path), ts,
	    AT_SYMLINK_NOFOLLOW));
}

static int
bad_readdir(const char *path, void *buf, fuse_fill_dir_t fill, off_t off,
    struct fuse_file_info *fi, enum fuse_readdir_flags flags)
{
	int fd = openat(srcfd, rel(path), O_RDONLY | O_DIRECTORY);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *d;

	(void)off;
	(void)fi;
	(void)flags;
	if (dir == NULL)
		return -errno;
	while ((d = readdir(dir)) != NULL)
		fill(buf, d->d_name, NULL, 0, (enum fuse_fill_dir_flags)0);
	closedir(dir);
	return 0;
}

static int
bad_statfs(const char *path, struct statvfs *st)
{
	(void)path;
	return result(fstatvfs(srcfd, st));
}

static void *
bad_init(struct fuse_conn_info *conn, struct fuse_config *cfg)
{
	conn->max_background = 10000;	/* one that stalls must not stall us */
	conn->congestion_threshold = 10000;
	cfg->use_ino = 1;
	cfg->attr_timeout = cfg->entry_timeout = cfg->negative_timeout = 0;
	return NULL;
}

static const struct fuse_operations ops = {
	.init = bad_init, .getattr = bad_getattr, .open = bad_open,
	.create = bad_create, .release = bad_release, .read = bad_read,
	.write = bad_write, .truncate = bad_truncate, .fsync = bad_fsync,
	.mkdir = bad_mkdir, .unlink = bad_unlink, .rmdir = bad_rmdir,
	.rename = bad_rename, .chmod = bad_chmod, .utimens = bad_utimens,
	.readdir = bad_readdir, .statfs = bad_statfs,
};

static const struct fuse_opt opts[] = {
	{ "src=%s", offsetof(__typeof__(conf), src), 0 },
	{ "flag=%s", offsetof(__typeof__(conf), flag), 0 },
	{ "cached", offsetof(__typeof__(conf), cached), 1 },
	FUSE_OPT_END
};

int
main(int argc, char **argv)
{
	struct fuse_args args = FUSE_ARGS_INIT(argc, argv);

	if (fuse_opt_parse(&args, &conf, opts, NULL) < 0 ||
	    conf.src == NULL || conf.flag == NULL) {
		fprintf(stderr, "usage: badfs -f -o src=DIR,flag=FILE[,cached] "
		    "MOUNTPOINT\n");
		return 2;
	}
#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 12)
	fuse_opt_add_arg(&args, "-omax_threads=1000");	/* older: no limit */
#endif
	srcfd = open(conf.src, O_RDONLY | O_DIRECTORY);
	if (srcfd < 0) {
		perror(conf.src);
		return 1;
	}
	umask(0);
	return fuse_main(args.argc, args.argv, &ops, NULL);
}
