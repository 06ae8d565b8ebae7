#!/usr/bin/env bats
# When things go wrong: readers get right bytes or an error in time, every
# process stays killable, and all recovers by itself.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2010,SC2012,SC2016,SC2030,SC2031,SC2034,SC2164,SC2317

load helpers

fetched() { # BYTES
	[ "$(stat_of backend_read_bytes)" -ge "$1" ]
}

# Reading FILE fails with EIO, after no more than SECS.
fails_within() { # SECS FILE [OFFSET]
	local result tenths
	read -r result tenths < <(attempt "${@:2}")
	echo "${*:2}: $result after $tenths/10 s"
	[ "$result" = EIO ]
	[ "$tenths" -le $(($1 * 10 * SLOW)) ]
}

# ------------------------------------------------------------ the server

survives_restart() { # HOW
	make_file "$EXPORT/f" 96M
	start_nfs
	start_proxy -r 400
	start_cachefs nfs_timeout=60
	background cmp "$EXPORT/f" "$MNT/f"
	reader=$!
	for mib in 8 40; do
		wait_until 30 fetched $((mib << 20))
		"$1"
		restart_nfs
		running "$reader"
	done
	wait "$reader"
	[ "$(stat_of backend_reconnects)" -ge 1 ]
	wait_complete "$MNT/f"
	drop_caches
	same "$EXPORT/f" "$MNT/f"
	state_is online
}

@test "a server that crashes and comes back under a reader costs it no byte" {
	survives_restart kill_nfs
}

@test "a server that is restarted under a reader costs it no byte, by NFSv4 too" {
	NFS_VERSION=4
	survives_restart stop_nfs
}

@test "connections reset under a reader cost it no byte" {
	make_file "$EXPORT/f" 96M
	start_nfs
	start_proxy -r 400
	start_cachefs nfs_timeout=60
	background cmp "$EXPORT/f" "$MNT/f"
	reader=$!
	for mib in 4 12 20 28 36 44 52; do
		wait_until 30 fetched $((mib << 20))
		proxy_signal USR1
	done
	wait "$reader"
	[ "$(stat_of backend_reconnects)" -ge 1 ]
	# Nor many bytes twice: what was in flight, at most.
	[ "$(stat_of backend_read_bytes)" -le $((192 << 20)) ]
}

# What the daemon holds at rest, as "fds threads bytes-in-buffers".
holds() {
	local fds=("/proc/$CACHEFS_PID/fd"/*) tasks=("/proc/$CACHEFS_PID/task"/*)
	echo "${#fds[@]} ${#tasks[@]} $(stat_of buffer_bytes_used)"
}

holds_again() { # FDS THREADS BYTES
	local fds tasks bytes
	read -r fds tasks bytes < <(holds)
	[ "$fds" = "$1" ] && [ "$tasks" -le "$2" ] && [ "$bytes" -le "$3" ]
}

rss_kib() {
	awk '/^VmRSS/ { print $2 }' "/proc/$CACHEFS_PID/status"
}

reconnects() { # COUNT
	[ "$(stat_of backend_reconnects)" -ge "$1" ]
}

@test "a thousand reconnections with reads in flight leak nothing" {
	make_file "$EXPORT/f" 4M
	start_nfs
	start_proxy
	# It is not cached, so that each read is one of the server's.
	start_cachefs nfs_timeout=60 nfs_connections=32 fuse_threads=8 \
	    cache_max_file_size=1M
	direct() { dd if="$MNT/f" iflag=direct bs=64K status=none; }
	for _ in {1..8}; do
		background direct >/dev/null
		pids+=($!)
	done
	wait "${pids[@]}"
	wait_quiet
	was=$(holds)
	rss=$(rss_kib)
	background eval 'while direct | cmp - "$EXPORT/f"; do :; done' \
	    2>"$WORK/reader.err"
	reader=$!
	total=0
	while [ "$total" -lt 1000 ]; do
		proxy_signal USR1
		wait_until 10 reconnects $((total + 1))
		total=$(stat_of backend_reconnects)
	done
	running "$reader"		# or bytes were wrong
	kill "$reader"
	wait "$reader" || :
	echo "$total reconnections; before: $was, $rss KiB; after: $(holds), $(rss_kib) KiB"
	# shellcheck disable=SC2086	# words
	wait_until 20 holds_again $was
	sanitized || [ "$(rss_kib)" -le $((rss + 8192)) ]
	[ "$(stat_of backend_errors)" -lt 8000 ]
	direct | cmp - "$EXPORT/f"
	state_is online
}

@test "a refused connection is tried again with a pause, not in a storm" {
	make_file "$EXPORT/f" 4M
	start_nfs
	start_proxy
	start_cachefs nfs_timeout=2
	proxy_signal HUP
	fails_within 4 "$MNT/f"
	wait_until 10 state_is offline
	cpu() { awk '{ print $14 + $15 }' "/proc/$CACHEFS_PID/stat"; }
	was=$(cpu)
	fails_within 4 "$MNT/f"
	fails_within 4 "$MNT/f"
	[ $(($(cpu) - was)) -lt $((100 * SLOW)) ]	# ticks: 1 s
	proxy_signal HUP
	wait_until 30 state_is online
	same "$EXPORT/f" "$MNT/f"
}

@test "a hung server: a miss fails with EIO within the timeout and 2 s, and the next one too" {
	make_file "$EXPORT/f" 4M
	make_file "$EXPORT/g" 4M
	start_nfs
	start_proxy
	start_cachefs nfs_timeout=3
	stat "$MNT/f" "$MNT/g" >/dev/null
	proxy_signal USR2
	fails_within 5 "$MNT/f"
	wait_until 5 state_is offline
	fails_within 5 "$MNT/g"
	fails_within 5 "$MNT/f" 1000000
	proxy_signal USR2
	wait_until 30 state_is online
	same "$EXPORT/f" "$MNT/f"
	same "$EXPORT/g" "$MNT/g"
}

@test "an export that is withdrawn fails cleanly and in time, and comes back" {
	make_file "$EXPORT/f" 4M
	make_file "$EXPORT/cold" 4M
	start_nfs
	start_cachefs nfs_timeout=3
	cache_file f
	stat "$MNT/cold" >/dev/null
	stop_nfs
	NFS_ACCESS=None restart_nfs
	for i in {1..5}; do
		read -r result tenths < <(attempt "$MNT/cold")
		echo "cold: $result after $tenths/10 s"
		[[ $result =~ ^(EIO|ESTALE|EACCES)$ ]]
		[ "$tenths" -le $((50 * SLOW)) ]
		read -r result tenths < <(attempt "$MNT/f")
		echo "f: $result after $tenths/10 s"
		[[ $result =~ ^(ok|EIO|ESTALE|EACCES)$ ]]
		[ "$result" != ok ] || same "$EXPORT/f" "$MNT/f"
	done
	restart_nfs
	wait_until 30 same "$EXPORT/cold" "$MNT/cold"
	wait_until 30 same "$EXPORT/f" "$MNT/f"
}

@test "a descriptor that met EIO reads on when the server is back" {
	make_file "$EXPORT/f" 8M
	start_nfs
	start_proxy
	start_cachefs nfs_timeout=2 cache_fill=100
	exec {fd}<"$MNT/f"
	head -c 100000 <&"$fd" | cmp - <(head -c 100000 "$EXPORT/f")
	proxy_signal USR2
	not dd bs=1M of=/dev/null status=none iflag=fullblock <&"$fd" 2>"$WORK/err"
	grep -q 'Input/output error' "$WORK/err"
	proxy_signal USR2
	wait_until 30 state_is online
	python3 - "$fd" "$EXPORT/f" <<-'END'
		import os, sys
		fd, want = int(sys.argv[1]), open(sys.argv[2], "rb").read()
		for off in range(0, len(want), 1 << 20):
		    assert os.pread(fd, 1 << 20, off) == want[off:off + (1 << 20)], off
	END
	exec {fd}<&-
}

# A server may be silent for long, and the way to a file that was looked at
# before needs no word from it.
PATIENT=(nfs_timeout=100 fuse_attr_timeout=3600 fuse_entry_timeout=3600)

# The process has hung in the kernel for a second.
blocked() { # PID
	for _ in {1..10}; do
		grep -qsE 'fuse|folio_wait|lookup' "/proc/$1/stack" || return 1
		sleep 0.1	# the pause of wait_until
	done
}

dies_at_once() { # CMD...
	local pid
	background "$@" >/dev/null 2>&1
	pid=$!
	wait_until 10 blocked "$pid"
	kill -KILL "$pid"
	wait_until 1 gone "$pid"
	wait "$pid" || :
}

@test "with a hung server every reader dies of SIGKILL at once" {
	need root
	make_file "$EXPORT/f" 8M
	make_file "$EXPORT/g" 8M
	mkdir "$EXPORT/d"
	start_nfs
	start_proxy
	start_cachefs "${PATIENT[@]}"
	exec {fd}<"$MNT/f"
	stat "$MNT/g" "$MNT/d" >/dev/null
	proxy_signal USR2
	dies_at_once dd bs=1M of=/dev/null <&"$fd"
	exec {fd}<&-
	dies_at_once dd if="$MNT/f" of=/dev/null bs=1M iflag=direct
	dies_at_once cat "$MNT/g"
	dies_at_once stat "$MNT/unknown"
	dies_at_once ls "$MNT/d"
	stat_of state
	proxy_signal USR2
	same "$EXPORT/f" "$MNT/f"
}

@test "Ctrl-C ends a reader of a hung server" {
	need root
	make_file "$EXPORT/f" 8M
	start_nfs
	start_proxy
	start_cachefs "${PATIENT[@]}"
	proxy_signal USR2
	# A job of a script ignores SIGINT; SIGTERM asks the same of us.
	background cat "$MNT/f" >/dev/null 2>&1
	pid=$!
	wait_until 10 blocked "$pid"
	kill -TERM "$pid"
	wait_until 1 gone "$pid"
	proxy_signal USR2
}

@test "a mount of a hung server can be unmounted, and the daemon ends" {
	make_file "$EXPORT/f" 8M
	start_nfs
	start_proxy
	start_cachefs "${PATIENT[@]}"
	head -c 1000 "$MNT/f" >/dev/null
	proxy_signal USR2
	stop_cachefs
	not is_mounted
}

@test "mounting a silent server gives up with a sentence within its timeout" {
	start_nfs
	start_proxy
	proxy_signal USR2
	start=$SECONDS
	refuses 1 127.0.0.1 -- -o "$(cachefs_opts nfs_timeout=2)" "$MNT"
	[ $((SECONDS - start)) -le $((10 * SLOW)) ]
}

@test "a network that is gone, so that connecting fails at once, comes back" {
	make_file "$EXPORT/f" 4M
	make_file "$EXPORT/cold" 4M
	netns_link up
	start_nfs
	start_cachefs nfs_timeout=2
	cache_file f
	ip link set "$NFS_NETNS" down
	ip route add unreachable "$NFS_BIND"
	undo eval "ip route del unreachable $NFS_BIND 2>/dev/null || :"
	fails_within 4 "$MNT/cold"
	wait_until 20 state_is offline
	grep -q 'connection .*lost' "$LOG"
	same "$EXPORT/f" "$MNT/f"
	for _ in {1..10}; do	# each makes a connection try again
		timeout 10 cat "$MNT/cold" >/dev/null 2>&1 || :
	done
	ip route del unreachable "$NFS_BIND"
	ip link set "$NFS_NETNS" up
	wait_until 30 state_is online
	same "$EXPORT/cold" "$MNT/cold"
}

# The server has given up this many clients: each connection is one.
leases_over() { # COUNT
	[ "$(grep -c 'Expired (done)' "$NFS_STATE/$NFS_PORT/log")" -ge "$1" ]
}

@test "NFSv4: a mount that was idle for longer than its lease reads on" {
	make_file "$EXPORT/f" 3M
	make_file "$EXPORT/cold" 3M
	NFS_VERSION=4
	NFS_LOG=DEBUG start_nfs
	start_cachefs nfs_timeout=5,nfs_connections=3
	same "$EXPORT/f" "$MNT/f"
	wait_until 60 leases_over 3		# of 10 s each
	same "$EXPORT/cold" "$MNT/cold"
	[ "$(stat_of backend_errors)" = 0 ]
}

@test "without the server complete files read on, also by new opens, and unknown is not deleted" {
	make_file "$EXPORT/f" 8M
	make_file "$EXPORT/cold" 8M
	mkdir "$EXPORT/d"
	make_file "$EXPORT/d/g" 100000
	start_nfs
	start_cachefs nfs_timeout=2
	cache_file f
	cache_file d/g
	ls -l "$MNT" "$MNT/d" >/dev/null
	stop_nfs
	same "$EXPORT/f" "$MNT/f"
	wait_until 10 state_is offline
	drop_caches		# attributes and names of the kernel's, too
	same "$EXPORT/f" "$MNT/f"
	same "$EXPORT/d/g" "$MNT/d/g"
	[ "$(stat -c %s "$MNT/f")" = $((8 << 20)) ]
	fails_within 4 "$MNT/cold"
	read -r result _ < <(attempt "$MNT/never-seen")
	[ "$result" != ENOENT ]
	restart_nfs
	wait_until 30 state_is online
	same "$EXPORT/cold" "$MNT/cold"
	read -r result _ < <(attempt "$MNT/never-seen")
	[ "$result" = ENOENT ]
}

@test "offline=fail serves nothing without the server" {
	make_file "$EXPORT/f" 1M
	start_nfs
	start_cachefs nfs_timeout=2 cache_offline=fail
	cache_file f
	stop_nfs
	fails_within 4 "$MNT/f"
	restart_nfs
	wait_until 30 state_is online
	same "$EXPORT/f" "$MNT/f"
}

@test "a fill that the server's death interrupted goes on by itself" {
	make_file "$EXPORT/f" 64M
	start_nfs
	start_proxy -r 400
	start_cachefs nfs_timeout=2
	head -c 10M "$MNT/f" >/dev/null
	wait_until 30 fetched $((16 << 20))
	kill_nfs
	wait_until 20 state_is offline
	[ "$(state_of "$MNT/f")" = partial ]
	restart_nfs
	wait_complete "$MNT/f"
	same "$EXPORT/f" "$MNT/f"
}

# ------------------------------------------------------------ one stalled file

others_go_on() { # STALLED...
	local f i start
	for i in {1..8}; do
		make_file "$EXPORT/good$i" 4M
	done
	for f; do
		make_file "$EXPORT/$f" 16M
	done
	stalling_backend
	start_cachefs nfs_timeout=100
	cache_file good8
	stall_on
	for f; do
		background cat "$MNT/$f" >/dev/null
		wait_until 10 blocked $!
	done
	start=$SECONDS
	for i in {1..8}; do
		same "$EXPORT/good$i" "$MNT/good$i"
	done
	ls -lR "$MNT" >/dev/null
	[ $((SECONDS - start)) -le $((10 * SLOW)) ]
	for i in {1..7}; do
		wait_complete "$MNT/good$i"
	done
	stall_off
	while read -r pid; do
		wait_until 30 gone "$pid"
	done <"$WORK/background"
	for f in "$EXPORT"/*; do
		same "$f" "$MNT/${f##*/}"
	done
}

@test "a file whose reads stall does not stall others" {
	need root
	others_go_on stalled
}

@test "twenty files whose reads stall do not stall others" {
	need root
	others_go_on stalled{1..20}
}

@test "a reader of a stalled backend dies of SIGKILL at once" {
	need root
	make_file "$EXPORT/stalled" 16M
	stalling_backend
	start_cachefs nfs_timeout=100
	stall_on
	dies_at_once cat "$MNT/stalled"
	dies_at_once dd if="$MNT/stalled" of=/dev/null bs=1M iflag=direct
	stall_off
	same "$EXPORT/stalled" "$MNT/stalled"
}

@test "a daemon whose directory hangs ends when it is told to, with what it has" {
	need root
	make_file "$EXPORT/f" 4M
	make_file "$EXPORT/stalled" 4M
	make_file "$EXPORT/stallstat" 4M
	stalling_backend
	start_cachefs nfs_timeout=100
	cache_file f
	stall_on
	background cat "$MNT/stalled" >/dev/null 2>&1
	wait_until 10 blocked $!
	background stat "$MNT/stallstat" >/dev/null 2>&1
	wait_until 10 blocked $!
	kill -TERM "$CACHEFS_PID"
	wait_until 10 grep -q hangs "$LOG"
	not is_mounted
	stall_off		# such a FUSE file system can't be left before
	rm "$MNT.pid"
	wait_until 10 gone "$CACHEFS_PID"
	wait "$CACHEFS_PID" || rc=$?
	[ "$rc" = 1 ]
	start_cachefs
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of backend_read_bytes)" = 0 ]
	same "$EXPORT/stallstat" "$MNT/stallstat"
}

@test "fills that stall take no thread from other readers" {
	need root
	make_file "$EXPORT/good" 16M
	for i in 1 2 3; do
		make_file "$EXPORT/stalled$i" 32M
	done
	stalling_backend
	start_cachefs nfs_connections=2 fuse_threads=8 cache_fill=0 \
	    nfs_timeout=100
	stall_on
	for i in 1 2 3; do
		background cat "$MNT/stalled$i" >/dev/null
		wait_until 10 blocked $!
	done
	for i in {1..40}; do
		tail -c "${i}00K" "$EXPORT/good" >"$WORK/want"
		timeout $((20 * SLOW)) tail -c "${i}00K" "$MNT/good" >"$WORK/got"
		same "$WORK/want" "$WORK/got"
	done
	stall_off
	for i in 1 2 3; do
		wait_complete "$MNT/stalled$i"
		same "$EXPORT/stalled$i" "$MNT/stalled$i"
	done
}

# ------------------------------------------------------------ the cache disk

# How often the log complains: once per event, not once per block.
complaints() {
	grep -ciE 'no space|full|input/output|read-only|degraded|uncached' "$LOG" || :
}

full_disk() { # SIZE [xfs]
	loop_disk disk "$@"
	CACHE=$WORK/disk/cache
	make_file "$EXPORT/f" $((2 * ${1%M}))M
	make_file "$EXPORT/g" 1M
	start_nfs
	start_cachefs cache_min_free=0
	same "$EXPORT/f" "$MNT/f"
	drop_caches
	same "$EXPORT/f" "$MNT/f"
	same "$EXPORT/g" "$MNT/g"
	[ "$(complaints)" -le 10 ]
	stop_cachefs
	start_cachefs cache_min_free=0
	same "$EXPORT/f" "$MNT/f"
	same "$EXPORT/g" "$MNT/g"
}

@test "a full cache disk: right bytes from the server, few words, and all goes on" {
	full_disk 64M
}

@test "the same with xfs" {
	need mkfs.xfs
	full_disk 300M xfs
}

@test "a cache disk that others fill and free again: right bytes, then a cache again" {
	loop_disk disk 64M
	CACHE=$WORK/disk/cache
	for f in f g h; do
		make_file "$EXPORT/$f" 16M
	done
	start_nfs
	start_cachefs cache_min_free=0
	cache_file f
	not dd if=/dev/zero of="$WORK/disk/filler" bs=64K status=none 2>"$WORK/err"
	grep -q 'No space' "$WORK/err"
	same "$EXPORT/g" "$MNT/g"
	same "$EXPORT/f" "$MNT/f"
	rm "$WORK/disk/filler"
	caches_again() { same "$EXPORT/h" "$MNT/h" && is_complete "$MNT/h"; }
	wait_until 60 caches_again
	state_is online
}

@test "the room that min_free wants is left free" {
	loop_disk disk 64M
	CACHE=$WORK/disk/cache
	make_file "$EXPORT/f" 128M
	make_file "$EXPORT/g" 20M
	start_nfs
	start_cachefs cache_min_free=24M
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat -f -c '%a * %S' "$WORK/disk" | xargs -I{} sh -c 'echo $(({}))')" -ge $((23 << 20)) ]
	cache_file g
	[ "$(stat -f -c '%a * %S' "$WORK/disk" | xargs -I{} sh -c 'echo $(({}))')" -ge $((23 << 20)) ]
}

# From now on every access to the disk fails, as that of a dying drive.
disk_dies() { # DIR
	python3 - "$1" <<-'END'
		import fcntl, os, struct, sys
		EXT4_IOC_SHUTDOWN, NOLOGFLUSH = 0x8004587d, 2
		fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), EXT4_IOC_SHUTDOWN,
		            struct.pack("I", NOLOGFLUSH))
	END
	not touch "$1/probe" 2>/dev/null
}

@test "a cache disk that dies under a fill: right bytes from the server" {
	loop_disk disk 128M
	CACHE=$WORK/disk/cache
	make_file "$EXPORT/f" 64M
	make_file "$EXPORT/g" 16M
	make_file "$EXPORT/h" 4M
	start_nfs
	start_proxy -r 400
	start_cachefs fuse_passthrough=no
	cache_file h
	background cmp "$EXPORT/f" "$MNT/f"
	reader=$!
	wait_until 30 fetched $((16 << 20))
	disk_dies "$WORK/disk"
	wait "$reader"
	same "$EXPORT/g" "$MNT/g"
	drop_caches "$MNT/h"
	same "$EXPORT/h" "$MNT/h"
	same "$EXPORT/f" "$MNT/f"
	state_is degraded
	[ "$(complaints)" -le 20 ]
}

@test "a read-only cache disk: right bytes from the server" {
	loop_disk disk 64M
	CACHE=$WORK/disk/cache
	make_file "$EXPORT/f" 8M
	start_nfs
	start_cachefs
	# As after an ext4 error; a plain remount would find the disk busy.
	echo test >"/sys/fs/ext4/$(basename "$(findmnt -no SOURCE "$WORK/disk")")/trigger_fs_error"
	not touch "$WORK/disk/probe" 2>/dev/null
	same "$EXPORT/f" "$MNT/f"
	same "$EXPORT/f" "$MNT/f"
	stat_of state
}

removed_and_back() { # HOW
	for f in f g h; do
		make_file "$EXPORT/$f" 8M
	done
	start_nfs
	start_cachefs
	cache_file f
	exec 5<"$MNT/f"		# who has it open keeps it
	"$@"
	same "$EXPORT/g" "$MNT/g"
	drop_caches
	same "$EXPORT/g" "$MNT/g"
	same "$EXPORT/f" "$MNT/f"
	cmp "$EXPORT/f" <(cat <&5)
	exec 5<&-
	[ "$(complaints)" -le 20 ]
	wait_until 30 log_has "was removed; begun anew"
	wait_until 60 kept_again f g h
	state_is online
	stop_cachefs
	start_cachefs
	for f in f g h; do
		same "$EXPORT/$f" "$MNT/$f"
	done
	[ "$(stat_of backend_read_bytes)" = 0 ]
	[ -e "$CACHE/tree/server" ]
}

# When these files, and no others, are read again: has each its index then?
kept_again() { # FILE...
	local f
	drop_caches
	for f; do
		cat "$MNT/$f" >/dev/null
	done
	[ "$(find "$CACHE/objects" -name '*.idx' | wc -l)" = $# ]
}

log_has() {
	grep -q "$1" "$LOG"
}

@test "a cache directory that is removed: right bytes, and a new one, by the running daemon" {
	removed_and_back eval 'rm -rf "$CACHE"'
}

@test "the same where only what is in it is removed" {
	removed_and_back eval 'rm -rf "$CACHE"/*'
}

# ------------------------------------------------------------ a bad disk

# Put the cache on a disk that fails while disk_fails says so.
bad_disk() {
	bad_fs "$WORK/good" disk
	CACHE=$WORK/disk/cache
}

disk_fails() { # ERRNO KINDS
	echo "$(python3 -c "import errno; print(errno.$1)") $2" >"$WORK/flag.new"
	mv "$WORK/flag.new" "$WORK/disk.flag"
}

disk_recovers() {
	rm "$WORK/disk.flag"
}

# From the first miss on the disk fails in that way; then it is well again.
survives_bad_disk() { # ERRNO KINDS
	for f in f g h i; do
		make_file "$EXPORT/$f" 8M
	done
	bad_disk
	start_nfs
	start_cachefs
	cache_file f
	disk_fails "$@"
	same "$EXPORT/g" "$MNT/g"
	drop_caches
	same "$EXPORT/f" "$MNT/f"
	same "$EXPORT/g" "$MNT/g"
	state_is degraded
	not is_complete "$MNT/g"
	[ "$(complaints)" -le 20 ]
	disk_recovers
	n=0
	caches_again() {
		make_file "$EXPORT/h" 8M "$((n++))"
		same "$EXPORT/h" "$MNT/h" && wait_quiet &&
			is_complete "$MNT/h" && state_is online
	}
	wait_until 60 caches_again
	drop_caches
	for f in f g h i; do
		same "$EXPORT/$f" "$MNT/$f"
	done
	wait_complete "$MNT/i"
	stop_cachefs
	start_cachefs
	for f in f g h i; do
		same "$EXPORT/$f" "$MNT/$f"
	done
	[ "$(stat_of checksum_errors)" = 0 ]
}

@test "a cache disk with I/O errors: right bytes, degraded, then a cache again" {
	survives_bad_disk EIO rwm
}

@test "a cache disk that can't be written: right bytes, degraded, then a cache again" {
	survives_bad_disk EIO w
}

@test "a cache disk that turns read-only: right bytes, degraded, then a cache again" {
	survives_bad_disk EROFS wm
}

@test "a disk quota that is used up: right bytes, degraded, then a cache again" {
	survives_bad_disk EDQUOT w
}

no_objects() {
	[ -z "$(find "$CACHE/objects" -type f)" ]
}

@test "a file of which nothing could be stored leaves nothing on the disk" {
	make_file "$EXPORT/f" 8M
	bad_disk
	start_nfs
	start_cachefs
	disk_fails EIO w
	same "$EXPORT/f" "$MNT/f"
	wait_until 20 no_objects
	disk_recovers
	[ "$(stat_of cache_used_bytes)" -le 65536 ]	# tree/server
}
