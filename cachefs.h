/*
 * cachefs.h - constants, the on-disk format and the core structures of
 * cachefs, for a reader who wants the data before the code.
 *
 * Lock keys on structure fields: [I] immutable after creation, [a] atomic,
 * [o] owner thread only, else the letter of the lock that guards the field:
 * [n] names.lock, [s] store.lock, [b] the object's lock, [p] pool.lock.
 */
#ifndef CACHEFS_H
#define CACHEFS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/queue.h>

#define CACHEFS_VERSION "0.1.0"

#define KiB ((uint64_t)1 << 10)
#define MiB ((uint64_t)1 << 20)
#define GiB ((uint64_t)1 << 30)
#define TiB ((uint64_t)1 << 40)

#define EXIT_USAGE	2		/* wrong usage or configuration */
#define DIO_ALIGN	4096u		/* O_DIRECT: memory, offset, length */
#define IO_MAX		(1u * MiB)	/* largest READ and cache write */
#define THREAD_STACK	(16u * MiB)	/* see sys_thread() */
#define CONN_MAX	64		/* nfs_connections */
#define CONN_WINDOW	8		/* prefetch READs in flight per connection: */
#define CONN_START	2		/* at most; and at first */
#define NFS_FHSIZE	64		/* NFS3_FHSIZE, RFC 1813 2.4 */
#define LIST_MAX	(4u << 20)	/* names in a directory */
#define NAMES_MAX	24576		/* names remembered without open files */
#define TOKENS		4096		/* LOOKUPs remembered for their OPENs */
#define TOKEN_MS	5		/* an OPEN this soon belongs to its LOOKUP */
#define RETRY_MS	10000		/* the same for the kernel's ESTALE retry */
#define RETRY_ATTR_MS	1000		/* of a GETATTR, which may not come at all */
#define ASIDE_PREFIX	"/.cachefs-aside."
#define CTL_DIR		"/.cachefs"
#define CTL_STATS	"/.cachefs/stats"

/*
 * On disk.  All little-endian.  A cache directory holds
 *	CACHEFS			struct disk_super
 *	lock			flock'd by the daemon, its pid as text
 *	objects/xx/KEY		data: sparse, exactly as long as the server's
 *	objects/xx/KEY.idx	struct disk_index, then body
 *	tree/xx/KEY		struct disk_tree, then entries: a directory
 *	tree/server		the server's NFS version, as text
 * An object's KEY is 16 hex digits of fsid and 16 of fileid, xx the low byte of
 * the xxh3 of these; a directory's the 128 bits of its path's xxh3.  The index
 * file's mtime is the time of last use to the millisecond, with the number of
 * uses below it, as nanoseconds; tree/server's, when the server was last there.
 */
#define DISK_VERSION	1u
#define SUPER_MAGIC	"CACHEFS\n"
#define INDEX_MAGIC	"CFSINDX\n"
#define TREE_MAGIC	"CFSTREE\n"

struct disk_super {
	char magic[8];
	uint32_t version;
	uint32_t size;			/* of this structure */
	char backend[1008];		/* canonical name, NUL padded */
	uint64_t xxh3;			/* of all before it */
};
_Static_assert(sizeof(struct disk_super) == 1032, "on-disk format");

/* What tells one version of one file from all others. */
struct version {
	uint64_t fsid, fileid;		/* the file */
	uint64_t size;			/* the validator: bytes, */
	int64_t mtime, ctime;		/* nanoseconds since the epoch */
};
_Static_assert(sizeof(struct version) == 40, "on-disk format");

#define IDX_COMPLETE	1u		/* no bitmap in the body: all present */
#define IDX_SUMS	2u		/* the body ends with the checksums */
#define IDX_PINNED	4u

struct disk_index {
	char magic[8];
	uint32_t version;
	uint32_t size;			/* of this structure */
	struct version ver;
	uint32_t block_size;		/* unit of the bitmap, bytes */
	uint32_t flags;			/* IDX_* */
	uint64_t blocks;		/* in the file */
	uint64_t present;		/* of them in the cache */
	uint64_t body_size;		/* bytes after this structure */
	uint64_t body_xxh3;
	uint64_t reserved[3];
	uint64_t xxh3;			/* of all before it in this structure */
};
_Static_assert(sizeof(struct disk_index) == 128, "on-disk format");

/* Configuration: one field per option; immutable once main validated it. */
enum tri { NO, YES, AUTO };
enum eviction { EVICT_LRU, EVICT_LFU, EVICT_SIEVE };
enum consistency { CONS_STRICT, CONS_OPEN, CONS_TTL, CONS_IMMUTABLE };

struct amount {				/* bytes, or a share of the disk */
	uint64_t bytes;
	double percent;			/* used when > 0 */
};

/* The options.  Atomic are those that SIGHUP may change while others read them;
 * of its own kind is what has a lock, or only the main thread looks at. */
struct conf {
	char *nfs_backend;
	unsigned nfs_version;		/* 0 = auto */
	unsigned nfs_port, nfs_mount_port, nfs_connections;
	_Atomic unsigned nfs_timeout;
	unsigned nfs_uid, nfs_gid;
	char *cache_dir;
	struct amount cache_size, cache_min_free, cache_pin_max;
	uint64_t cache_block_size;
	_Atomic unsigned cache_fill;	/* percent */
	unsigned cache_eviction, cache_consistency;
	_Atomic unsigned cache_ttl, cache_offline, cache_offline_max_age;
	_Atomic uint64_t cache_min_file_size, cache_max_file_size;
	char *cache_include, *cache_exclude;	/* under conf_lock */
	uint64_t cache_scrub;
	unsigned cache_checksum;
	unsigned use_io_uring, queue_depth, polling_mode, sq_poll_idle_ms;
	unsigned io_poll, fixed_buffers, use_hugepages, direct_io, splice;
	uint64_t buffer_memory;
	unsigned fuse_allow_other, fuse_passthrough, fuse_no_open;
	unsigned fuse_io_uring;
	unsigned fuse_threads;
	double fuse_attr_timeout, fuse_entry_timeout, fuse_negative_timeout;
	uint64_t fuse_readahead;
	unsigned log_level, log_target;
	/* not options of the table */
	char *source, *mountpoint, *fsname;
	unsigned foreground, debug, remount, mount_flags;
};

/* A file as the server shows it. */
struct attr {
	struct version ver;
	uint64_t used, rdev;		/* bytes; makedev(3) */
	int64_t atime;
	uint32_t mode, nlink, uid, gid;
};

#define TREE_WHOLE	1u		/* all that the directory holds */
#define ENTRY_ATTR	1u		/* attr is known */
#define ENTRY_GONE	2u		/* it was asked for, and not there */

struct disk_tree {
	char magic[8];
	uint32_t version;
	uint32_t size;			/* of this structure */
	uint32_t flags;			/* TREE_* */
	uint32_t reserved;
	uint64_t entries;
	uint64_t body_size;		/* bytes after this structure */
	uint64_t body_xxh3;
	uint64_t xxh3;			/* of all before it in this structure */
};
_Static_assert(sizeof(struct disk_tree) == 56, "on-disk format");

struct disk_entry {
	struct attr attr;
	uint16_t size;			/* of all of it, a multiple of 8 */
	uint16_t flags;			/* ENTRY_* */
	uint16_t name_len, link_len;	/* without the NUL behind each: */
	char text[];			/* name, what it links to */
};
_Static_assert(sizeof(struct attr) == 80 && sizeof(struct disk_entry) == 88,
    "on-disk format");

/* The server's handle of a file; empty where a backend goes by path. */
struct handle {
	uint8_t len, data[NFS_FHSIZE];
};

struct dirent_plus {
	char *name;
	struct attr attr;
	bool have_attr;
};

struct dirlist {
	struct dirent_plus *v;
	size_t n, room;
};

/* One I/O on the cache disk.  Owned by the executor from exec_submit()
 * until done() is called, in an executor thread that must not block. */
struct exec_req {
	enum { EXEC_READ, EXEC_WRITE } op;
	int fd;
	uint64_t file;			/* of an O_DIRECT fd: see exec_file() */
	char *buf;
	size_t len, did;		/* asked for; done so far */
	uint64_t off;
	bool slotted;			/* executor's: by a registered file */
	int res;			/* bytes or -errno, set before done() */
	void (*done)(struct exec_req *);
	STAILQ_ENTRY(exec_req) next;	/* executor's */
};

/* What `cachefs verify` asks of the daemon, by ioctl(2) on a file: to check it
 * from off on, for a while. */
struct cachefs_verify {
	uint64_t off;			/* out: where that ended */
	uint64_t bytes;			/* checked; with those before */
	uint64_t damaged;		/* blocks; with those before */
	int32_t err;			/* errno: why they are not there again */
	uint32_t reserved;
};
#define CACHEFS_IOC_VERIFY _IOWR('C', 1, struct cachefs_verify)

/* What the other subcommands want done with a file. */
struct cachefs_file {
	uint32_t op;
#define CACHEFS_WARM	1u		/* have it fetched; wait, at most 1 s */
#define CACHEFS_EVICT	2u
#define CACHEFS_PIN	3u
#define CACHEFS_UNPIN	4u
	uint32_t kept;			/* out: it is whole, and durably so */
	uint64_t size, cached;		/* out: bytes; in: 0 at first */
	char why[32];			/* out: why it won't be, or "" */
};
#define CACHEFS_IOC_FILE _IOWR('C', 2, struct cachefs_file)

/* What `mount -o remount` asks, of the statistics' file. */
struct cachefs_remount {
	char options[3072];		/* as of -o */
	char why[512];			/* out: why nothing has changed, or "" */
};
#define CACHEFS_IOC_REMOUNT _IOWR('C', 3, struct cachefs_remount)

struct obj;
struct bfile;

/*
 * A READ on its way from the server to its readers and to the cache file.
 * One per run of absent blocks; every reader of these shares it.
 */
enum fetch_state { F_QUEUED, F_ARRIVED, F_KEPT, F_FAILED };
enum fetch_prio { PRIO_META, PRIO_DEMAND, PRIO_AHEAD, PRIO_FILL, PRIO_N };

struct fetch {
	struct obj *o;			/* [I] holds a reference */
	LIST_ENTRY(fetch) hash;		/* [b] bucket of o->tab */
	TAILQ_ENTRY(fetch) queue;	/* backend's */
	TAILQ_ENTRY(fetch) kept;	/* [p] of buffers kept for readers */
	uint64_t off;			/* [I] byte offset, block aligned */
	size_t len, room;		/* [I] bytes to fetch; of buffer */
	char *buf;			/* [I] pool memory; NULL: a copy from
					 * file to file, see fill_step() */
	size_t got;			/* [o] backend: bytes so far */
	size_t used;			/* [b] bytes copied out to readers */
	enum fetch_state state;		/* [b] */
	_Atomic enum fetch_prio prio;	/* [a] at birth; readers may raise it */
	int err;			/* [b] -errno when F_FAILED */
	int refs;			/* [b] readers waiting or copying */
	bool store;			/* [I] space is reserved: goes to disk */
	bool wanted;			/* [b] a fill that a reader will meet */
	bool listed;			/* [p] among the kept */
	uint64_t born;			/* [I] now_us() */
	bool born_ahead, born_fill;	/* [I] counted in o->ahead, o->fills */
	struct exec_req er;		/* the cache write */
	uint64_t sums[];		/* [o] checksum of each block */
};

#define OBJ_BUCKETS 64

/* One version of one file, alive while anything uses it. */
struct obj {
	LIST_ENTRY(obj) versions;	/* [s] of the same file */
	struct ent *ent;		/* [I] its line in the registry */
	uint64_t bytes;			/* [s] on disk: allocated and reserved */
	struct attr attr;		/* [I] */
	char *_Atomic path;		/* [a] by which it was opened first;
					 * NULL: it never was, see obj_name() */
	uint32_t bs;			/* [I] block size on disk */
	uint64_t nblk;			/* [I] */
	int refs;			/* [s] */
	bool room;			/* [s] in bytes there is obj_room() */
	_Atomic bool superseded;	/* [a] no longer the current version */
	_Atomic bool evicted;		/* [a] that, by who asked for it */
	_Atomic bool complete;		/* [a] all blocks are present */
	_Atomic bool pinned;		/* [a] */
	const char *_Atomic bypass;	/* [a] why it is not cached, or NULL */
	_Atomic int64_t used;		/* [a] time() when it was opened last */
	const char *_Atomic fill_why;	/* [a] why the last fill ended early */
	pthread_mutex_t lock;		/* below: may not hold it across I/O */
	pthread_cond_t cond;		/* a fetch changed state */
	int rfd, wfd;			/* [b] data: buffered; O_DIRECT or -1 */
	uint64_t wfile;			/* [b] wfd's exec_file(), or 0 */
	bool ready;			/* [b] these can be written to */
	uint64_t *map;			/* [b] blocks present */
	uint64_t *sums;			/* [b] their checksums behind it, or NULL */
	uint64_t *checked;		/* [b] which of them were compared */
	uint64_t present;		/* [b] bits set in map */
	LIST_HEAD(fetch_list, fetch) *tab; /* [b] OBJ_BUCKETS, once needed */
	struct bfile *_Atomic bf;	/* [a] open on the server */
	_Atomic bool gone;		/* [a] server has another version now */
	int backing_id, backing_users;	/* [b] passthrough */
	_Atomic uint64_t reading;	/* [a] where the last read ended */
	_Atomic uint64_t streamed;	/* [a] now_ms() of a read in a row */
	unsigned ahead, fills;		/* [b] such fetches in flight */
	_Atomic uint64_t wasted;	/* [a] bytes fetched ahead and not read */
	STAILQ_ENTRY(obj) fill_next;	/* fill.lock: queue */
	_Atomic bool filling;		/* fill.lock */
	unsigned fill_tries;		/* [b] fills failed in a row */
	uint64_t fill_pos;		/* [o] filler: next block to look at */
	_Atomic bool dirty;		/* [a] on the list, or about to be */
	SLIST_ENTRY(obj) dirty_next;	/* ckpt.lock */
	_Atomic uint64_t saved;		/* [a] what the index has as present */
	uint64_t saved_ms;		/* [o] checkpointer: when */
};

/* The registry of what lies on the cache disk; small, one per object. */
struct ent {
	LIST_ENTRY(ent) hash;		/* [s] */
	TAILQ_ENTRY(ent) turn;		/* [s] in store.level[] */
	LIST_HEAD(obj_list, obj) objs;	/* [s] its versions in memory */
	uint64_t fsid, fileid;		/* [I] */
	uint64_t bytes;			/* [s] on disk, but for those of objs */
	uint32_t live;			/* [s] who holds it: not evictable */
	uint32_t age;			/* [s] store.age when uses was right */
	uint16_t uses;			/* [s] see evict_pick_locked() */
	bool pinned, complete;		/* [s] */
	uint64_t pinned_bytes;		/* [s] of store.pinned */
	bool found;			/* [s] by the scan, and not used since */
};

/* A name the kernel may know: one per path, as libfuse's own nodes. */
enum mode { M_NONE, M_BUFFERED, M_PASSTHROUGH };

struct name {
	struct name *next;		/* [n] */
	TAILQ_ENTRY(name) idle;		/* [n] */
	char *path;			/* [n] */
	char *origin;			/* [n] set aside: the path it had */
	struct attr attr;		/* [n] latest validated */
	struct handle fh;		/* [n] */
	uint64_t asked, answered;	/* [n] us: when attr was validated */
	bool doubt;			/* [n] and is not right any more */
	unsigned noted;			/* [n] names.era when it was; 0: never */
	struct version told;		/* [n] version of the kernel's inode; a
					 * regular file's never changes */
	struct version pages;		/* [n] version of its cached pages */
	uint64_t seen, listed;		/* [n] a directory: us, see op_opendir() */
	struct obj *obj;		/* [n] version held by the open files */
	unsigned opens;			/* [n] */
	enum mode mode;			/* [n] of these opens */
};

/* Where files come from. Every call may block its thread until the server
 * answered or nfs_timeout passed; all return 0 or -errno, -EHOSTDOWN for
 * an unreachable server.  Paths are absolute below the backend. */
struct backend {
	const char *name;
	int (*start)(void);		/* logs why not */
	int (*run)(void);		/* its threads, once mounted */
	void (*stop)(void);
	int (*getattr)(const char *path, struct attr *, struct handle *);
	int (*open)(struct obj *, const char *path, struct attr *now);
	void (*close)(struct bfile *);
	void (*read)(struct fetch *);	/* ends in fetch_arrived() */
	bool copies;			/* read() takes fetches without buf */
	void (*raise)(struct fetch *);	/* its prio is PRIO_DEMAND now */
	int (*readdir)(const char *path, struct dirlist *);
	int (*readlink)(const char *path, char *buf, size_t size);
	int (*statfs)(struct statvfs *);
};

#endif /* CACHEFS_H */
