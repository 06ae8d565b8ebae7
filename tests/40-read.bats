#!/usr/bin/env bats
# Reading: the right bytes, in every way to read, and what the cache promises
# about how often they are fetched and by whom they are served.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2010,SC2012,SC2016,SC2030,SC2031,SC2034,SC2164,SC2317

load helpers

check() { # HOW FILE [ARG...]: read $MNT/FILE so and compare
	local how=$1 file=$2
	shift 2
	timeout $((120 * SLOW)) "$TESTS/readcheck.py" "$how" "$MNT/$file" \
	    "$EXPORT/$file" "$@"
}

# ------------------------------------------------------------ right bytes

# Files of every size that ends in, at, or beside a boundary of blocks of BS.
around_blocks() { # BS
	local bs=$1 size
	for size in 0 1 511 512 513 4095 4096 4097 $((bs - 1)) "$bs" \
	    $((bs + 1)) $((bs + 4096)) $((2 * bs - 1)) $((2 * bs)) \
	    $((3 * bs + 777)); do
		[ -e "$EXPORT/s$size" ] || make_file "$EXPORT/s$size" "$size"
	done
}

sizes_read_right() { # BLOCK_SIZE [OPT...]
	local f bs
	bs=$(numfmt --from=iec "$1")
	around_blocks "$bs"
	start_kind "${KIND:-v3}" "cache_block_size=$1" "${@:2}"
	for f in "$EXPORT"/*; do
		same "$f" "$MNT/${f##*/}"
		[ "$(stat -c %s "$MNT/${f##*/}")" = "$(stat -c %s "$f")" ]
	done
	for f in "$EXPORT"/*; do
		wait_complete "$MNT/${f##*/}"
		same "$f" "$MNT/${f##*/}"
	done
	stop_cachefs
	# And once more from the cache that was left.
	start_kind "${KIND:-v3}" "cache_block_size=$1" "${@:2}"
	for f in "$EXPORT"/*; do
		same "$f" "$MNT/${f##*/}"
	done
	[ "$(stat_of backend_read_bytes)" = 0 ]
	stop_cachefs
}

@test "files of all sizes around block boundaries read right, with blocks of 4K" {
	sizes_read_right 4K
}

@test "files of all sizes around block boundaries read right, with blocks of 256K" {
	sizes_read_right 256K
}

@test "files of all sizes around block boundaries read right, with blocks of 1M" {
	sizes_read_right 1M
}

@test "files of all sizes around block boundaries read right, with blocks of 4M" {
	sizes_read_right 4M
}

@test "files of all sizes read right by NFSv4 and from a directory" {
	KIND=v4 CACHE=$WORK/cache4 sizes_read_right 64K
	KIND=dir CACHE=$WORK/cachedir sizes_read_right 64K
}

@test "random reads, some beyond the end, give the right bytes, cold and hot" {
	make_file "$EXPORT/f" 20000001
	start_nfs
	for bs in 4K 256K 4M; do
		CACHE=$WORK/cache.$bs
		start_cachefs "cache_block_size=$bs" cache_fill=100
		check random f -s 1
		check random f -s 2 -b 5000
		cache_file f
		check random f -s 3
		stop_cachefs
	done
}

@test "O_DIRECT reads give the right bytes, the odd tail too, cold and hot" {
	make_file "$EXPORT/f" 10000001
	start_nfs
	start_cachefs
	check direct f
	check direct f -b 4096
	cache_file f
	check direct f
	check direct f -b 8192
}

@test "mappings give the right bytes, cold and hot" {
	make_file "$EXPORT/f" 10000001
	make_file "$EXPORT/g" 10000001
	start_nfs
	start_cachefs
	check mmap f
	wait_complete "$MNT/f"
	check mmap f
	cache_file g
	check mmap g
}

@test "a program runs from the mount, cold and hot" {
	cp "$(command -v bash)" "$EXPORT/shell"
	start_nfs
	start_cachefs
	[ "$("$MNT/shell" -c 'echo $((6 * 7))')" = 42 ]
	cache_file shell
	[ "$("$MNT/shell" -c 'echo $((6 * 7))')" = 42 ]
}

@test "many files read at once by many processes are all right" {
	mkdir "$EXPORT/many"
	for i in {1..200}; do
		make_file "$EXPORT/many/$i" $((i * 1500))
	done
	start_nfs
	start_cachefs
	find "$MNT/many" -type f -printf '%f\n' |
		xargs -P 8 -I{} cmp "$EXPORT/many/{}" "$MNT/many/{}"
	diff -r "$EXPORT/many" "$MNT/many"
}

@test "with a small buffer pool all still read right, and none waits for ever" {
	make_file "$EXPORT/f" 48M
	start_nfs
	start_cachefs nvme_buffer_memory=8M cache_block_size=1M
	check threads f -n 16
	[ "$(stat_of buffer_bytes_used)" -le $((8 << 20)) ]
	cache_file f
	check direct f
}

# ------------------------------------------------------------ what is fetched

@test "a second read makes no backend call at all" {
	keep_caches
	make_file "$EXPORT/f" 32M
	start_nfs
	# Looking at the statistics must not make the kernel ask for attributes.
	start_cachefs fuse_attr_timeout=3600 fuse_entry_timeout=3600
	coproc READER { check twice f; }
	pid=$READER_PID
	read -r -u "${READER[0]}" -t $((60 * SLOW)) line
	[ "$line" = once ]
	wait_quiet
	bytes=$(stat_of backend_read_bytes)
	calls=$(stat_of backend_requests)
	[ "$bytes" -ge $((32 << 20)) ]
	echo >&"${READER[1]}"
	wait "$pid"
	[ "$(stat_of backend_read_bytes)" = "$bytes" ]
	[ "$(stat_of backend_requests)" = "$calls" ]
}

@test "a second open fetches no byte" {
	make_file "$EXPORT/f" 32M
	start_nfs
	start_cachefs
	cache_file f
	bytes=$(stat_of backend_read_bytes)
	drop_caches
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of backend_read_bytes)" = "$bytes" ]
}

@test "four readers of a cold file cost its bytes once" {
	make_file "$EXPORT/f" 64M
	start_nfs
	# Slow enough that all four are at it together; O_DIRECT, so that the
	# kernel's page cache can't be what makes it once.
	start_proxy -r 400
	start_cachefs
	check threads f -n 4
	[ "$(stat_of backend_read_bytes)" -ge $((64 << 20)) ]
	[ "$(stat_of backend_read_bytes)" -le $(((64 << 20) * 101 / 100)) ]
}

@test "four processes that read a cold file cost its bytes once" {
	make_file "$EXPORT/f" 64M
	start_nfs
	start_proxy -r 400
	start_cachefs
	pids=()
	for i in 1 2 3 4; do
		background cmp "$EXPORT/f" "$MNT/f"
		pids+=($!)
	done
	for pid in "${pids[@]}"; do
		wait "$pid"
	done
	[ "$(stat_of backend_read_bytes)" -le $(((64 << 20) * 101 / 100)) ]
}

@test "a random 4 KiB read of a cold 10 GiB file fetches one block at most" {
	truncate -s 10G "$EXPORT/huge"
	printf needle | dd of="$EXPORT/huge" bs=1 seek=7000000000 conv=notrunc \
	    status=none
	start_nfs
	start_cachefs cache_block_size=256K
	n=0
	for off in 7000000000 123456789 9999999999 5368709120 2222222222; do
		off=$((off / 262144 * 262144 + 131072))	# mid-block
		n=$((n + 1))
		dd if="$MNT/huge" of="$WORK/out" bs=4096 count=1 \
		    skip="$off" iflag=skip_bytes status=none
		[ "$(stat -c %s "$WORK/out")" = 4096 ]
		wait_quiet
		[ "$(stat_of backend_read_bytes)" -ge $((n * 4096)) ]
		[ "$(stat_of backend_read_bytes)" -le $((n * 262144)) ]
	done
	[ "$(dd if="$MNT/huge" bs=1 skip=7000000000 count=6 status=none)" = needle ]
	[ "$(state_of "$MNT/huge")" = partial ]
	[ "$(stat_of fills_started)" = 0 ]
	# The cache is sparse: what was not read takes no room in it.
	[ "$(du -sk "$CACHE" | cut -f1)" -lt 8192 ]
}

@test "once a tenth of a file has been read the rest is fetched by itself" {
	make_file "$EXPORT/f" 64M
	start_nfs
	start_cachefs
	[ "$(state_of "$MNT/f")" = absent ]
	head -c 8M "$MNT/f" >/dev/null
	wait_complete "$MNT/f"
	[ "$(cached_of "$MNT/f")" = $((64 << 20)) ]
	[ "$(stat_of fills_completed)" -ge 1 ]
	[ "$(stat_of backend_read_bytes)" -le $(((64 << 20) * 101 / 100)) ]
	bytes=$(stat_of backend_read_bytes)
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of backend_read_bytes)" = "$bytes" ]
}

@test "below a tenth nothing is fetched by itself" {
	make_file "$EXPORT/f" 64M
	start_nfs
	start_cachefs cache_block_size=64K
	# 5 %, by single blocks all over the file, so that nothing reads ahead.
	for ((i = 0; i < 50; i++)); do
		dd if="$MNT/f" of=/dev/null bs=4096 count=1 status=none \
		    iflag=skip_bytes skip=$((i * 20 * 65536 + 32768))
	done
	wait_quiet
	[ "$(stat_of fills_started)" = 0 ]
	[ "$(state_of "$MNT/f")" = partial ]
	[ "$(cached_of "$MNT/f")" = $((50 * 65536)) ]
}

@test "fill=100 fetches only what is read" {
	make_file "$EXPORT/f" 64M
	start_nfs
	start_cachefs cache_fill=100 cache_block_size=64K
	# A third of it: far beyond where the default would fill.
	for ((i = 0; i < 340; i++)); do
		dd if="$MNT/f" of=/dev/null bs=4096 count=1 status=none \
		    iflag=skip_bytes skip=$((i * 3 * 65536 + 32768))
	done
	wait_quiet
	[ "$(stat_of fills_started)" = 0 ]
	[ "$(cached_of "$MNT/f")" = $((340 * 65536)) ]
	[ "$(stat_of backend_read_bytes)" = $((340 * 65536)) ]
	check random f
}

@test "fill=0 fetches the whole file at its open" {
	make_file "$EXPORT/f" 16M
	start_nfs
	start_cachefs cache_fill=0
	exec {fd}<"$MNT/f"
	wait_complete "$MNT/f"
	exec {fd}<&-
	[ "$(stat_of miss_bytes)" = 0 ]
	same "$EXPORT/f" "$MNT/f"
}

@test "files outside the size limits are served right and not cached, with a reason counted" {
	make_file "$EXPORT/small" 1000
	make_file "$EXPORT/middle" 1M
	make_file "$EXPORT/large" 8M
	start_nfs
	start_cachefs cache_min_file_size=64K cache_max_file_size=4M
	for f in small middle large; do
		same "$EXPORT/$f" "$MNT/$f"
		drop_caches
		same "$EXPORT/$f" "$MNT/$f"
	done
	wait_complete "$MNT/middle"
	[ "$(state_of "$MNT/small")" = absent ]
	[ "$(state_of "$MNT/large")" = absent ]
	[ "$(jq '[.bypass[]] | add' "$MNT/.cachefs/stats")" -ge 2 ]
}

@test "include and exclude decide by name what is cached" {
	mkdir "$EXPORT/d"
	make_file "$EXPORT/a.bin" 1M
	make_file "$EXPORT/a.tmp" 1M
	make_file "$EXPORT/d/b.bin" 1M
	start_nfs
	launch -f -o "$(cachefs_opts "cache_include=*.bin *.dat" "cache_exclude=a.*")" "$MNT"
	for f in a.bin a.tmp d/b.bin; do
		same "$EXPORT/$f" "$MNT/$f"
	done
	wait_complete "$MNT/d/b.bin"
	wait_quiet
	[ "$(state_of "$MNT/a.bin")" = absent ]
	[ "$(state_of "$MNT/a.tmp")" = absent ]
}

# ------------------------------------------------------------ who serves it

@test "a complete file opens in passthrough and the daemon sees no reads" {
	make_file "$EXPORT/f" 32M
	start_nfs
	start_cachefs
	need passthrough
	cache_file f
	opens=$(stat_of opens_passthrough)
	served=$(jq -c '[.hit_bytes, .miss_bytes, .backend_read_bytes]' "$MNT/.cachefs/stats")
	drop_caches
	same "$EXPORT/f" "$MNT/f"
	check random f
	check direct f
	[ "$(stat_of opens_passthrough)" = $((opens + 3)) ]
	[ "$(jq -c '[.hit_bytes, .miss_bytes, .backend_read_bytes]' "$MNT/.cachefs/stats")" = "$served" ]
}

@test "mmap and exec of a complete file need no read of the daemon" {
	cp "$(command -v bash)" "$EXPORT/shell"
	make_file "$EXPORT/f" 10000001
	start_nfs
	start_cachefs
	need passthrough
	cache_file f
	cache_file shell
	served=$(jq -c '[.hit_bytes, .miss_bytes, .backend_read_bytes]' "$MNT/.cachefs/stats")
	opens=$(stat_of opens_passthrough)
	drop_caches
	check mmap f
	[ "$("$MNT/shell" -c 'echo $((6 * 7))')" = 42 ]
	[ "$(stat_of opens_passthrough)" -ge $((opens + 2)) ]
	[ "$(jq -c '[.hit_bytes, .miss_bytes, .backend_read_bytes]' "$MNT/.cachefs/stats")" = "$served" ]
}

@test "the next open is passthrough although one from before completion is still open" {
	make_file "$EXPORT/f" 16M
	start_nfs
	start_cachefs
	need passthrough
	exec {old}<"$MNT/f"
	head -c 1M <&"$old" >/dev/null
	same "$EXPORT/f" "$MNT/f"
	wait_complete "$MNT/f"
	wait_quiet
	opens=$(stat_of opens_passthrough)
	exec {new}<"$MNT/f"
	[ "$(stat_of opens_passthrough)" = $((opens + 1)) ]
	drop_caches
	cmp "$EXPORT/f" - <&"$new"
	# The old one goes on where it was, beside the new one.
	cmp <(tail -c +$((1048576 + 1)) "$EXPORT/f") - <&"$old"
	exec {old}<&- {new}<&-
}

@test "an open descriptor uses blocks as they land" {
	make_file "$EXPORT/f" 16M
	start_nfs
	start_cachefs cache_fill=100
	exec {fd}<"$MNT/f"
	check direct f
	wait_quiet
	bytes=$(stat_of backend_read_bytes)
	cmp "$EXPORT/f" - <&"$fd"
	exec {fd}<&-
	[ "$(stat_of backend_read_bytes)" = "$bytes" ]
}

@test "passthrough=no serves from the cache by the daemon, and says so" {
	make_file "$EXPORT/f" 16M
	start_nfs
	start_cachefs fuse_passthrough=no
	[[ $(stat_of passthrough) == off:* ]]
	cache_file f
	hits=$(stat_of hit_bytes)
	bytes=$(stat_of backend_read_bytes)
	drop_caches
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of opens_passthrough)" = 0 ]
	[ "$(stat_of hit_bytes)" -ge $((hits + (16 << 20))) ]
	[ "$(stat_of backend_read_bytes)" = "$bytes" ]
}

@test "the thread engine reads and writes the cache right, with no ring" {
	make_file "$EXPORT/f" 20000001
	start_nfs
	start_cachefs nvme_use_io_uring=no fuse_passthrough=no
	[ "$(stat_of io_engine)" = threads ]
	cache_file f
	drop_caches
	check direct f
	check random f
	[ "$(stat_of sqe_submitted)" = 0 ]
}

@test "the io_uring engine reads and writes the cache right, by the ring" {
	make_file "$EXPORT/f" 20000001
	start_nfs
	start_cachefs fuse_passthrough=no
	need io_uring
	stop_cachefs
	start_cachefs nvme_use_io_uring=yes fuse_passthrough=no
	[ "$(stat_of io_engine)" = io_uring ]
	cache_file f
	drop_caches
	check direct f
	check random f
	[ "$(stat_of sqe_submitted)" -gt 0 ]
	wait_until 5 all_completed
	# Batched: fewer calls than requests, under eight readers.
	check threads f -n 8 -b 65536
	[ "$(stat_of submit_calls)" -le "$(stat_of sqe_submitted)" ]
}

all_completed() {
	jq -e '.sqe_submitted == .cqe_completed' "$MNT/.cachefs/stats" >/dev/null
}

@test "where io_uring is refused one warning says so, and threads do the work" {
	make_file "$EXPORT/f" 8000001
	start_nfs
	start_cachefs
	need io_uring
	stop_cachefs
	run_by "$(tool denyring fuse3)"
	start_cachefs fuse_passthrough=no
	[ "$(stat_of io_engine)" = threads ]
	[ "$(grep -c 'io_uring is refused' "$LOG")" = 1 ]
	cache_file f
	drop_caches
	check random f
	check direct f
	stop_cachefs
	refuses 1 use_io_uring refused -- \
	    -o "$(cachefs_opts nvme_use_io_uring=yes log_level=error)" "$MNT"
}

@test "where memory can't be registered a message says so, and the ring works" {
	need root
	make_file "$EXPORT/f" 8000001
	start_nfs
	start_cachefs
	need io_uring
	stop_cachefs
	run_by prlimit --memlock=65536 setpriv --bounding-set=-ipc_lock
	start_cachefs fuse_passthrough=no
	[ "$(stat_of io_engine)" = io_uring ]
	[ "$(grep -c 'could not be registered' "$LOG")" = 1 ]
	cache_file f
	drop_caches
	check random f
	check direct f
	[ "$(stat_of sqe_submitted)" -gt 0 ]
}

@test "all ways to set up the ring and the pool read right" {
	make_file "$EXPORT/f" 8000001
	start_nfs
	start_cachefs
	need io_uring
	stop_cachefs
	for opts in nvme_polling_mode=yes nvme_fixed_buffers=no \
	    nvme_direct_io=no nvme_queue_depth=1 nvme_use_hugepages=yes \
	    nvme_polling_mode=yes,nvme_sq_poll_idle_ms=1,nvme_fixed_buffers=no; do
		CACHE=$WORK/cache.$opts
		CACHE=${CACHE//[=,]/-}
		start_cachefs "$opts" fuse_passthrough=no
		cache_file f
		drop_caches
		check random f
		check direct f
		stop_cachefs
	done
}

# Read 4 KiB at each of 40 offsets, by one descriptor and past the page cache.
read_at() { # PYTHON-EXPRESSION of i
	python3 - "$MNT/f" "$EXPORT/f" "$1" <<-'END'
	import mmap, os, random, sys
	fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
	orig = os.open(sys.argv[2], os.O_RDONLY)
	buf = mmap.mmap(-1, 4096)
	random.seed(7)
	for i in range(40):
	    at = eval(sys.argv[3])
	    assert os.preadv(fd, [buf], at) == 4096
	    assert buf[:] == os.pread(orig, 4096, at)
	END
}

@test "reads at equal distances and backwards are fetched ahead of, random ones are not" {
	make_file "$EXPORT/f" 64M
	start_nfs
	start_cachefs cache_fill=100 cache_block_size=64K
	read_at '(i * 400) << 12'
	used=$(stat_of prefetch_used_bytes)
	[ "$used" -ge $((30 * 4096)) ]
	[ "$used" -le "$(stat_of prefetched_bytes)" ]
	stop_cachefs
	CACHE=$WORK/cache2
	start_cachefs cache_fill=100 cache_block_size=64K
	read_at '(16000 - i * 399) << 12'
	[ "$(stat_of prefetch_used_bytes)" -ge $((30 * 4096)) ]
	stop_cachefs
	CACHE=$WORK/cache3
	start_cachefs cache_fill=100 cache_block_size=64K
	read_at 'random.randrange(16000) << 12'
	[ "$(stat_of prefetched_bytes)" = 0 ]
}

@test "with fuse_no_open the kernel opens, and reads again, without the daemon" {
	keep_caches
	make_file "$EXPORT/f" 3000001
	make_file "$EXPORT/g" 10
	: >"$EXPORT/empty"
	start_nfs
	start_cachefs fuse_no_open=yes cache_consistency=immutable \
	    fuse_attr_timeout=3600 fuse_entry_timeout=3600
	for file in f g empty; do
		same "$EXPORT/$file" "$MNT/$file"
	done
	[ "$(stat_of passthrough)" = off:no_open ]
	# The page cache keeps the statistics for a second.
	wait_until 10 reads_are_new 0
	[ "$(stat_of opens_buffered)" = 0 ]
	reads=$(stat_of daemon_reads)
	for file in f g empty f g empty; do
		same "$EXPORT/$file" "$MNT/$file"
	done
	drop_caches
	# The kernel may reclaim a page at any time.
	again=$(($(stat_of daemon_reads) - reads))
	echo "$reads reads, then $again"
	[ "$again" -le $((reads / 4)) ]
	same "$EXPORT/f" "$MNT/f"
	wait_until 10 reads_are_new "$reads"
	[ "$(stat_of backend_read_bytes)" = 3000011 ]
}

reads_are_new() { # OLD
	[ "$(stat_of daemon_reads)" -gt "$1" ]
}

# Fill $BACKEND/f in the background, and compare.
fills() { # [OPT...]
	start_cachefs cache_fill=0 "$@"
	head -c 1 "$MNT/f" >/dev/null
	wait_complete "$MNT/f"
	same "$BACKEND/f" "$MNT/f"
	spliced=$(stat_of spliced_bytes)
	drop_caches
	same "$BACKEND/f" "$MNT/f"
	stop_cachefs
}

@test "without checksums a directory's files are filled from file to file" {
	loop_disk disk 600M xfs
	BACKEND=$WORK/disk/src
	mkdir "$BACKEND"
	make_file "$BACKEND/f" 50000001
	fills
	[ "$spliced" = 0 ]
	CACHE=$WORK/cache-ext4	# another file system than the source's
	fills cache_checksum=no nvme_splice=no
	[ "$spliced" = 0 ]
	rm -r "$CACHE"
	fills cache_checksum=no
	# A reader's block may have come by a buffer.
	[ "$spliced" -ge 49000000 ]
	CACHE=$WORK/disk/cache	# the same one, which can share extents
	fills cache_checksum=no nvme_splice=yes
	[ "$spliced" -ge 49000000 ]
	filefrag -v "$CACHE"/objects/*/????????????????????????????????* |
	    grep shared
}

@test "a disk that does not poll is not polled, one that does is" {
	make_file "$EXPORT/f" 8000001
	start_nfs
	start_cachefs
	need io_uring
	stop_cachefs
	dev=/sys/dev/block/$(mountpoint -d "$(stat -c %m "$CACHE")" || :)
	[ -e "$dev/queue" ] || dev=$dev/..
	if [ "$(cat "$dev/queue/io_poll" 2>/dev/null)" = 0 ]; then
		refuses 1 io_poll "does not poll" -- \
		    -o "$(cachefs_opts nvme_io_poll=yes log_level=error)" "$MNT"
		return
	fi
	# What has no block device of its own may say so when it is tried.
	if ! start_cachefs nvme_io_poll=yes; then
		grep "can't be polled" "$LOG"
		return
	fi
	cache_file f
	same "$EXPORT/f" "$MNT/f"
}
