/*
 * baddisk - a file system that fails when it is told to.
 *
 * usage: baddisk -f -o src=DIR,flag=FILE MOUNTPOINT
 *
 * Shows DIR, for reading and writing.  While FILE exists, every call of the
 * kinds that are named in it, after the errno, fails with that: "5 rwm" is EIO
 * for all reads of data (r), writes of data (w), and changes of names, sizes
 * and times, and fsync (m).
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
} conf;

static int srcfd = -1;

/* What a call of that kind is to fail with, or 0. */
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
bd_getattr(const char *path, struct stat *st, struct fuse_file_info *fi)
{
	return result(fi ? fstat((int)fi->fh, st) :
	    fstatat(srcfd, rel(path), st, AT_SYMLINK_NOFOLLOW));
}

static int
open_as(const char *path, int flags, mode_t mode, struct fuse_file_info *fi)
{
	int fd = openat(srcfd, rel(path), (flags & ~O_DIRECT) | O_NOFOLLOW,
	    mode);

	fi->fh = (uint64_t)fd;
	fi->direct_io = 1;		/* no pages to hide behind */
	return fd < 0 ? -errno : 0;
}

static int
bd_open(const char *path, struct fuse_file_info *fi)
{
	return open_as(path, fi->flags & ~(O_CREAT | O_EXCL), 0, fi);
}

static int
bd_create(const char *path, mode_t mode, struct fuse_file_info *fi)
{
	int r = fault('m');

	return r ? r : open_as(path, fi->flags | O_CREAT, mode, fi);
}

static int
bd_release(const char *path, struct fuse_file_info *fi)
{
	(void)path;
	close((int)fi->fh);
	return 0;
}

static int
bd_read(const char *path, char *buf, size_t len, off_t off,
    struct fuse_file_info *fi)
{
	int r = fault('r');

	(void)path;
	return r ? r : result(pread((int)fi->fh, buf, len, off));
}

static int
bd_write(const char *path, const char *buf, size_t len, off_t off,
    struct fuse_file_info *fi)
{
	int r = fault('w');

	(void)path;
	return r ? r : result(pwrite((int)fi->fh, buf, len, off));
}

static int
bd_truncate(const char *path, off_t size, struct fuse_file_info *fi)
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
bd_fsync(const char *path, int data, struct fuse_file_info *fi)
{
	int r = fault('m');

	(void)path;
	(void)data;
	return r ? r : result(fdatasync((int)fi->fh));
}

static int
bd_mkdir(const char *path, mode_t mode)
{
	int r = fault('m');

	return r ? r : result(mkdirat(srcfd, rel(path), mode));
}

static int
bd_unlink(const char *path)
{
	int r = fault('m');

	return r ? r : result(unlinkat(srcfd, rel(path), 0));
}

static int
bd_rmdir(const char *path)
{
	int r = fault('m');

	return r ? r : result(unlinkat(srcfd, rel(path), AT_REMOVEDIR));
}

static int
bd_rename(const char *from, const char *to, unsigned flags)
{
	int r = fault('m');

	return r ? r : result(renameat2(srcfd, rel(from), srcfd, rel(to),
	    flags));
}

static int
bd_chmod(const char *path, mode_t mode, struct fuse_file_info *fi)
{
	int r = fault('m');

	(void)fi;
	return r ? r : result(fchmodat(srcfd, rel(path), mode, 0));
}

static int
bd_utimens(const char *path, const struct timespec ts[2],
    struct fuse_file_info *fi)
{
	int r = fault('m');

	(void)fi;
	return r ? r : result(utimensat(srcfd, rel(path), ts,
	    AT_SYMLINK_NOFOLLOW));
}

static int
bd_readdir(const char *path, void *buf, fuse_fill_dir_t fill, off_t off,
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
bd_statfs(const char *path, struct statvfs *st)
{
	(void)path;
	return result(fstatvfs(srcfd, st));
}

static void *
bd_init(struct fuse_conn_info *conn, struct fuse_config *cfg)
{
	(void)conn;
	cfg->use_ino = 1;
	cfg->attr_timeout = cfg->entry_timeout = cfg->negative_timeout = 0;
	return NULL;
}

static const struct fuse_operations ops = {
	.init = bd_init, .getattr = bd_getattr, .open = bd_open,
	.create = bd_create, .release = bd_release, .read = bd_read,
	.write = bd_write, .truncate = bd_truncate, .fsync = bd_fsync,
	.mkdir = bd_mkdir, .unlink = bd_unlink, .rmdir = bd_rmdir,
	.rename = bd_rename, .chmod = bd_chmod, .utimens = bd_utimens,
	.readdir = bd_readdir, .statfs = bd_statfs,
};

static const struct fuse_opt opts[] = {
	{ "src=%s", offsetof(__typeof__(conf), src), 0 },
	{ "flag=%s", offsetof(__typeof__(conf), flag), 0 },
	FUSE_OPT_END
};

int
main(int argc, char **argv)
{
	struct fuse_args args = FUSE_ARGS_INIT(argc, argv);

	if (fuse_opt_parse(&args, &conf, opts, NULL) < 0 ||
	    conf.src == NULL || conf.flag == NULL) {
		fprintf(stderr,
		    "usage: baddisk -f -o src=DIR,flag=FILE MOUNTPOINT\n");
		return 2;
	}
	srcfd = open(conf.src, O_RDONLY | O_DIRECTORY);
	if (srcfd < 0) {
		perror(conf.src);
		return 1;
	}
	umask(0);
	return fuse_main(args.argc, args.argv, &ops, NULL);
}
