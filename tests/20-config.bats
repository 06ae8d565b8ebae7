#!/usr/bin/env bats
# The configuration: whatever is wrong with it, or with what it names, is said
# in one line, with the right exit status, and nothing stays mounted.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2010,SC2012,SC2030,SC2031,SC2034,SC2164,SC2317

load helpers

setup() {
	common_setup
	INI=$WORK/cachefs.ini
	GOOD=nfs_backend=$EXPORT,cache_dir=$CACHE
}

# The ini file, from standard input, after a backend and a cache that are good.
ini() {
	printf '[nfs]\nbackend = %s\n[cache]\ndir = %s\n' "$EXPORT" "$CACHE" >"$INI"
	cat >>"$INI"
}

# The option NAME refuses each VALUE, wherever it is written: status 2, and the
# line names it, the value and, if there is one, the file.
bad_values() { # NAME VALUE...
	local name=$1 value
	shift
	for value; do
		refuses 2 "$name" "$value" -- -o "$GOOD,$name=$value" "$MNT"
		printf '[nfs]\nbackend = %s\n[cache]\ndir = %s\n[%s]\n%s = %s\n' \
		    "$EXPORT" "$CACHE" "${name%%_*}" "${name#*_}" "$value" |
			merged >"$INI"
		refuses 2 "$INI" "${name#*_}" "$value" -- -c "$INI" "$MNT"
	done
	[ ! -e "$CACHE" ]
}

# An ini with each section once: iniparser may or may not take them twice.
merged() {
	awk '/^\[/ { s = $0; if (!(s in seen)) order[++n] = s; seen[s] = 1; next }
	    { body[s] = body[s] $0 "\n" }
	    END { for (i = 1; i <= n; i++) printf "%s\n%s", order[i], body[order[i]] }'
}

# The mount fails at run time: status 1, WORDs named.
cannot_mount() { # WORD... -- ARG...
	refuses 1 "$@"
}

# ------------------------------------------------------------ the file

@test "a missing ini file is named" {
	refuses 2 "$WORK/none.ini" -- -c "$WORK/none.ini" "$MNT"
}

@test "an ini file that can't be read is named" {
	mkdir "$WORK/dir.ini"
	refuses 2 "$WORK/dir.ini" -- -c "$WORK/dir.ini" "$MNT"
	ln -s loop.ini "$WORK/loop.ini"
	refuses 2 "$WORK/loop.ini" -- -c "$WORK/loop.ini" "$MNT"
}

@test "an unknown key is named with its file" {
	ini <<<'colour = blue'
	refuses 2 "$INI" colour -- -c "$INI" "$MNT"
}

@test "an unknown section is named with its file" {
	ini <<<$'[cach]\nsize = 1G'
	refuses 2 "$INI" cach -- -c "$INI" "$MNT"
}

@test "a key in another section's place is unknown there" {
	ini <<<$'[fuse]\nblock_size = 64K'
	refuses 2 "$INI" block_size -- -c "$INI" "$MNT"
}

@test "a line that is none of ini's is refused with its file" {
	ini <<<$'this is no setting'
	refuses 2 "$INI" -- -c "$INI" "$MNT"
}

@test "a configuration without backend says so" {
	printf '[cache]\ndir = %s\n' "$CACHE" >"$INI"
	refuses 2 backend -- -c "$INI" "$MNT"
	refuses 2 backend -- -o "cache_dir=$CACHE" "$MNT"
}

@test "a configuration without cache directory says so" {
	printf '[nfs]\nbackend = %s\n' "$EXPORT" >"$INI"
	refuses 2 dir -- -c "$INI" "$MNT"
	refuses 2 cache_dir -- -o "nfs_backend=$EXPORT" "$MNT"
}

# ------------------------------------------------------------ values

@test "words that an option doesn't know are refused" {
	bad_values nfs_version 2 5 three
	bad_values cache_eviction fifo
	bad_values cache_consistency sometimes
	bad_values cache_offline maybe
	bad_values nvme_use_io_uring perhaps
	bad_values nvme_splice perhaps
	bad_values fuse_passthrough perhaps
	bad_values log_level loud
	bad_values log_target printer
}

@test "booleans are yes no true false on off 1 0 and nothing else" {
	for name in cache_checksum nvme_polling_mode nvme_io_poll \
	    nvme_fixed_buffers nvme_use_hugepages nvme_direct_io \
	    fuse_allow_other fuse_no_open fuse_io_uring; do
		bad_values "$name" maybe 2
	done
	for value in yes no true false on off 1 0; do
		BACKEND=$EXPORT start_cachefs "cache_checksum=$value"
		stop_cachefs
	done
}

@test "numbers must be numbers, whole, and nothing after them" {
	for name in nfs_port nfs_mount_port nfs_connections nfs_timeout nfs_uid \
	    nfs_gid nvme_queue_depth nvme_sq_poll_idle_ms fuse_threads \
	    cache_ttl cache_offline_max_age; do
		bad_values "$name" many 7x
		bad_values "$name" -1
		bad_values "$name" 99999999999999999999
	done
}

@test "numbers out of range are refused" {
	bad_values nfs_port 65536
	bad_values nfs_mount_port 65536
	bad_values nfs_connections 0
	bad_values nvme_queue_depth 0
	bad_values fuse_threads 0
	bad_values fuse_attr_timeout -1
}

@test "sizes must be sizes" {
	for name in cache_size cache_min_free cache_block_size \
	    cache_min_file_size cache_max_file_size nvme_buffer_memory \
	    fuse_readahead; do
		bad_values "$name" big 1Q -1 1GG
		bad_values "$name" 99999999999999999999
		bad_values "$name" 99999999T
	done
}

@test "block_size is a power of two from 4K to 64M" {
	bad_values cache_block_size 0 1K 2K 5K 3M 128M 100000
	echo text >"$EXPORT/f"
	for value in 4096 4K 64M; do
		CACHE=$WORK/cache.$value
		BACKEND=$EXPORT start_cachefs "cache_block_size=$value" \
		    nvme_buffer_memory=256M
		same "$EXPORT/f" "$MNT/f"
		stop_cachefs
	done
}

@test "percentages are from 0 to 100, and only where they mean something" {
	bad_values cache_fill 101% -1% 101 -1
	bad_values cache_min_free 101%
	bad_values cache_size 101%
	bad_values cache_block_size 10%
	bad_values nvme_buffer_memory 10%
}

@test "contradictions are named" {
	refuses 2 min_file_size max_file_size -- \
	    -o "$GOOD,cache_min_file_size=2M,cache_max_file_size=1M" "$MNT"
	refuses 2 io_poll direct_io -- \
	    -o "$GOOD,nvme_io_poll=yes,nvme_direct_io=no" "$MNT"
	refuses 2 no_open immutable -- -o "$GOOD,fuse_no_open=yes" "$MNT"
	refuses 2 no_open passthrough -- -o "$GOOD,fuse_no_open=yes" \
	    -o cache_consistency=immutable,fuse_passthrough=yes "$MNT"
	refuses 2 io_poll io_uring -- \
	    -o "$GOOD,nvme_io_poll=yes,nvme_use_io_uring=no" "$MNT"
	refuses 2 polling_mode use_io_uring -- \
	    -o "$GOOD,nvme_polling_mode=yes,nvme_use_io_uring=no" "$MNT"
	[ ! -e "$CACHE" ]
}

@test "sizes take K M G T, and the command line wins over the file" {
	ini <<<$'size = 64M'
	launch -f -c "$INI" "$MNT"
	[ "$(stat_of cache_limit_bytes)" = $((64 << 20)) ]
	stop_cachefs
	launch -f -c "$INI" -o cache_size=128M "$MNT"
	[ "$(stat_of cache_limit_bytes)" = $((128 << 20)) ]
	stop_cachefs
	launch -f -o cache_size=65536K -c "$INI" "$MNT"
	[ "$(stat_of cache_limit_bytes)" = $((64 << 20)) ]
	stop_cachefs
	launch -f -c "$INI" -o cache_size=1G "$MNT"
	[ "$(stat_of cache_limit_bytes)" = $((1 << 30)) ]
}

@test "cache_size as a percentage is that of the cache's file system" {
	BACKEND=$EXPORT start_cachefs cache_size=1%
	disk=$(($(stat -f -c '%b * %S' "$CACHE") / 100))
	limit=$(stat_of cache_limit_bytes)
	[ "$limit" -ge $((disk * 99 / 100)) ]
	[ "$limit" -le $((disk * 101 / 100)) ]
}

@test "mount(8)'s own words mount, and rw is warned of and mounts read-only" {
	BACKEND=$EXPORT start_cachefs ro _netdev nofail noauto defaults noatime \
	    nosuid nodev exec user x-systemd.automount x-systemd.requires=a.b \
	    fsname=models
	[ ! -s "$LOG" ] || not grep -qi warn "$LOG"
	stop_cachefs
	BACKEND=$EXPORT start_cachefs rw dev suid
	grep -qw rw "$LOG"
	findmnt -no OPTIONS -M "$MNT" | tr , '\n' >"$WORK/options"
	grep -qx ro "$WORK/options"
}

@test "the ancestor's options mount, with a warning for what does nothing" {
	echo text >"$EXPORT/f"
	BACKEND=$EXPORT start_cachefs cache_size_gb=1 block_size_mb=1 \
	    min_cache_file_size_mb=0 readahead_mb=4 ttl_hours=1 checksum \
	    eviction=lru direct_io max_concurrent=8
	[ "$(stat_of cache_limit_bytes)" = $((1 << 30)) ]
	[ "$EUID" != 0 ] || [ "$(cat "/sys/class/bdi/$(mountpoint -d "$MNT")/read_ahead_kb")" = 4096 ]
	same "$EXPORT/f" "$MNT/f"
	grep -q max_concurrent "$LOG"
	stop_cachefs
	BACKEND=$EXPORT start_cachefs eviction=arc max_read=16777216 \
	    allow_root auto_unmount allow_async_read=false \
	    smart_cache_zero_copy_threshold_mb=4 \
	    nvme_use_memory_mapping=true nvme_numa_aware=false
	for word in eviction=arc max_read allow_root auto_unmount \
	    allow_async_read smart_cache_zero_copy memory_mapping \
	    numa_aware; do
		grep -q "warning: option .*$word" "$LOG" || fail "no $word"
	done
	same "$EXPORT/f" "$MNT/f"
}

@test "the example, uncommented, is a configuration that mounts" {
	sed -E 's/^[#;] ?([a-z_]+ *=)/\1/
		s|^backend *=.*|backend = '"$EXPORT"'|
		s|^dir *=.*|dir = '"$CACHE"'|' "$ROOT/cachefs.ini.example" >"$INI"
	# What it shows for show must not decide here what this machine can.
	[ "$(grep -cE '^[a-z_]+ *=' "$INI")" -ge 40 ]
	launch -f -c "$INI" "$MNT"
	[ "$(stat_of state)" = online ]
}

# ------------------------------------------------------------ the server

@test "a host that doesn't resolve is named" {
	cannot_mount no-such-host.invalid -- \
	    -o "nfs_backend=nfs://no-such-host.invalid/export,cache_dir=$CACHE" "$MNT"
}

@test "a closed port is named with its host" {
	need nfs
	start_nfs
	stop_nfs
	cannot_mount 127.0.0.1 "$NFS_PORT" -- -o "$(cachefs_opts)" "$MNT"
}

@test "a wrong export is named, with v3 and with v4" {
	for NFS_VERSION in 3 4; do
		start_nfs
		NFS_URL=nfs://127.0.0.1/no/such/export
		cannot_mount /no/such/export -- -o "$(cachefs_opts)" "$MNT"
		stop_nfs
	done
}

@test "a backend URL that is none is refused with status 2" {
	for url in nfs:// nfs://host nfs://:1/x nfs://host:notaport/x; do
		refuses 2 "$url" -- -o "nfs_backend=$url,cache_dir=$CACHE" "$MNT"
	done
}

@test "a backend directory that is missing, or none, is named" {
	cannot_mount "$WORK/none" -- -o "nfs_backend=$WORK/none,cache_dir=$CACHE" "$MNT"
	: >"$WORK/file"
	cannot_mount "$WORK/file" -- -o "nfs_backend=$WORK/file,cache_dir=$CACHE" "$MNT"
}

# ------------------------------------------------------------ the cache

@test "a cache directory that can't be made is named" {
	cannot_mount /proc/cache -- -o "nfs_backend=$EXPORT,cache_dir=/proc/cache" "$MNT"
}

@test "a cache directory that is no directory is named" {
	: >"$CACHE"
	cannot_mount "$CACHE" -- -o "$GOOD" "$MNT"
}

@test "a cache directory on a read-only disk is named" {
	loop_disk disk 32M
	mkdir -m 700 "$WORK/disk/cache"
	mount -o remount,ro "$WORK/disk"
	CACHE=$WORK/disk/cache
	cannot_mount "$CACHE" -- -o "nfs_backend=$EXPORT,cache_dir=$CACHE" "$MNT"
}

@test "a cache directory of somebody else's is refused and left alone" {
	need root
	mkdir -m 700 "$CACHE"
	echo mine >"$CACHE/file"
	chown 65534 "$CACHE"
	cannot_mount "$CACHE" -- -o "$GOOD" "$MNT"
	[ "$(ls -A "$CACHE")" = file ]
}

@test "a cache directory that others may enter is refused" {
	mkdir -m 755 "$CACHE"
	cannot_mount "$CACHE" -- -o "$GOOD" "$MNT"
	[ "$(stat -c %a "$CACHE")" = 755 ]
}

@test "somebody's files in the cache directory survive whatever we make of it" {
	mkdir -m 700 "$CACHE" "$CACHE/objects"
	echo precious >"$CACHE/thesis"
	echo precious >"$CACHE/objects/thesis"
	make_file "$EXPORT/f" 8M
	if BACKEND=$EXPORT start_cachefs cache_size=4M cache_block_size=64K; then
		same "$EXPORT/f" "$MNT/f"
		wait_quiet
		stop_cachefs
	fi
	[ "$(cat "$CACHE/thesis")" = precious ]
	[ "$(cat "$CACHE/objects/thesis")" = precious ]
}

@test "the cache directory is made with mode 0700 and its files with 0600" {
	make_file "$EXPORT/f" 1M
	umask 0
	BACKEND=$EXPORT start_cachefs
	umask 022
	same "$EXPORT/f" "$MNT/f"
	wait_complete "$MNT/f"
	[ "$(stat -c %a "$CACHE")" = 700 ]
	find "$CACHE" -type f -perm /077 >"$WORK/open"
	find "$CACHE" -type d -perm /077 >>"$WORK/open"
	[ ! -s "$WORK/open" ] || fail "open to others: $(cat "$WORK/open")"
	[ "$(find "$CACHE" -type f | wc -l)" -ge 3 ]
}

@test "a cache in use is refused, and the line says by whom" {
	BACKEND=$EXPORT start_cachefs
	first=$MNT
	MNT=$WORK/mnt2
	mkdir "$MNT"
	cannot_mount "$CACHE" "$CACHEFS_PID" -- -o "$GOOD" "$MNT"
	MNT=$first
	stat_of state
}

# ------------------------------------------------------------ the mount point

@test "a missing mount point is named" {
	MNT=$WORK/missing
	cannot_mount "$MNT" -- -o "$GOOD" "$MNT"
}

@test "a mount point that is a file is named" {
	MNT=$WORK/file
	: >"$MNT"
	cannot_mount "$MNT" -- -o "$GOOD" "$MNT"
}

@test "a mount point with a live cachefs on it is refused and goes on" {
	echo text >"$EXPORT/f"
	BACKEND=$EXPORT start_cachefs
	rc=0
	timeout 60 "$CACHEFS" -o "nfs_backend=$EXPORT,cache_dir=$WORK/cache2" \
	    "$MNT" >"$WORK/out" 2>&1 || rc=$?
	[ "$rc" = 1 ]
	[ "$(wc -l <"$WORK/out")" = 1 ]
	grep -qF "$MNT" "$WORK/out"
	[ "$(grep -cF " $MNT " /proc/self/mountinfo)" = 1 ]
	same "$EXPORT/f" "$MNT/f"
}

@test "after a refusal the same mount with the fault mended works" {
	mkdir -m 755 "$CACHE"
	cannot_mount "$CACHE" -- -o "$GOOD" "$MNT"
	chmod 700 "$CACHE"
	BACKEND=$EXPORT start_cachefs
}

@test "the daemonizing form returns when the mount answers, and ends on umount" {
	echo text >"$EXPORT/f"
	BACKEND=$EXPORT mount_cachefs
	same "$EXPORT/f" "$MNT/f"
	stop_cachefs
	not is_mounted
}

@test "SIGTERM and SIGINT unmount and end with status 0" {
	for sig in TERM INT; do
		BACKEND=$EXPORT start_cachefs
		rm "$MNT.pid"
		kill "-$sig" "$CACHEFS_PID"
		wait_until 10 gone "$CACHEFS_PID"
		wait "$CACHEFS_PID"
		not is_mounted
	done
}
