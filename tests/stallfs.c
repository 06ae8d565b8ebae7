/*
 * stallfs - a backend that stalls on some of its files.
 *
 * usage: stallfs -f -o src=DIR,flag=FILE MOUNTPOINT
 *
 * Shows DIR, read-only.  While FILE exists, reads of files whose names begin
 * with "stall" do not return, nor does stat() of "stallstat".
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

static const char *
rel(const char *path)
{
	return path[1] != '\0' ? path + 1 : ".";
}

static int
st_getattr(const char *path, struct stat *st, struct fuse_file_info *fi)
{
	(void)fi;
	while (strcmp(path, "/stallstat") == 0 && access(conf.flag, F_OK) == 0)
		usleep(20000);
	return fstatat(srcfd, rel(path), st, AT_SYMLINK_NOFOLLOW) < 0 ?
	    -errno : 0;
}

static int
st_open(const char *path, struct fuse_file_info *fi)
{
	int fd = openat(srcfd, rel(path), O_RDONLY | O_NOFOLLOW);

	if (fd < 0)
		return -errno;
	fi->fh = (uint64_t)fd;
	return 0;
}

static int
st_release(const char *path, struct fuse_file_info *fi)
{
	(void)path;
	close((int)fi->fh);
	return 0;
}

static int
st_read(const char *path, char *buf, size_t len, off_t off,
    struct fuse_file_info *fi)
{
	const char *name = strrchr(path, '/') + 1;
	ssize_t n;

	while (strncmp(name, "stall", 5) == 0 && access(conf.flag, F_OK) == 0) {
		if (fuse_interrupted())
			return -EINTR;
		usleep(20000);
	}
	n = pread((int)fi->fh, buf, len, off);
	return n < 0 ? -errno : (int)n;
}

static int
st_readdir(const char *path, void *buf, fuse_fill_dir_t fill, off_t off,
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
st_statfs(const char *path, struct statvfs *st)
{
	(void)path;
	return fstatvfs(srcfd, st) < 0 ? -errno : 0;
}

static void *
st_init(struct fuse_conn_info *conn, struct fuse_config *cfg)
{
	conn->max_background = 10000;	/* one that stalls must not stall us */
	conn->congestion_threshold = 10000;
	cfg->use_ino = 1;
	return NULL;
}

static const struct fuse_operations ops = {
	.init = st_init,
	.getattr = st_getattr,
	.open = st_open,
	.release = st_release,
	.read = st_read,
	.readdir = st_readdir,
	.statfs = st_statfs,
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
		    "usage: stallfs -f -o src=DIR,flag=FILE MOUNTPOINT\n");
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
	return fuse_main(args.argc, args.argv, &ops, NULL);
}
