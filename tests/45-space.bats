#!/usr/bin/env bats
# Room on the cache disk: what the cache may take, what it leaves to others, and
# what does not get in.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

# How often so far?
bypassed() { # REASON
	jq ".bypass.$1 // 0" "$MNT/.cachefs/stats"
}

data_files() {
	find "$CACHE/objects" -type f ! -name '*.*' | wc -l
}

# ------------------------------------------------------------ cache_size

# 40 files of 1 to 8 MiB, many with an odd end.
cap_files() {
	local i
	for ((i = 0; i < 40; i++)); do
		make_file "$EXPORT/f$i" $(((i * 5 % 8 + 1) * 1048576 - i % 3 * 1234))
	done
}

# While PID runs: fetch all by warm, or read files, whole or up to 300 pieces of
# 4K, and compare.
load_while() { # PID warm|whole|pieces SEED
	while [ "$2" = warm ] && running "$1"; do
		timeout 1 "$CACHEFS" warm -q -n 4 "$MNT" 2>"$WORK/warm" || :
	done
	python3 - "$@" "$MNT" "$EXPORT" <<-'END'
		import os, random, sys
		pid, how, seed, mnt, export = sys.argv[1:]
		rnd = random.Random(seed)
		while os.path.exists(f"/proc/{pid}"):
		    name = "/f%d" % rnd.randrange(len(os.listdir(export)))
		    got, want = (os.open(top + name, os.O_RDONLY)
		                 for top in (mnt, export))
		    size = os.fstat(want).st_size
		    todo = [(off, 1 << 20) for off in range(0, size, 1 << 20)]
		    if how == "pieces":
		        todo = [(rnd.randrange(size // 8192) * 8192, 4096)
		                for _ in range(rnd.choice([1, 50, 300]))]
		    for off, n in todo:
		        if os.pread(got, n, off) != os.pread(want, n, off):
		            sys.exit(f"{name}: wrong bytes at {off}")
		    os.close(got)
		    os.close(want)
	END
}

# 180 MB are read through a cache of 32M by LOADS at once.
stays_below_cap() { # OPTS LOAD...
	local watch load pids=()
	start_cachefs "cache_size=32M,cache_min_free=0${1:+,$1}"
	shift
	background "$TESTS/capwatch.py" "$CACHEFS_PID" "$CACHE" "$MNT" \
	    $((32 << 20)) 120 >>"$WORK/capwatch.log"
	watch=$!
	for load; do
		background load_while "$watch" "$load" ${#pids[@]}
		pids+=($!)
	done
	for load in "${pids[@]}"; do
		wait "$load"
	done
	wait "$watch"
	stop_cachefs
}

@test "cache_size is never exceeded, sampled each 10 ms, fills in flight included" {
	loop_disk disk 128M ext4 -b 4096
	CACHE=$WORK/disk/cache
	cap_files
	start_nfs
	stays_below_cap '' whole whole pieces warm
}

@test "nor by files in pieces, begun before or not, of which no checksums are kept" {
	loop_disk disk 128M ext4 -b 4096
	CACHE=$WORK/disk/cache
	cap_files
	BACKEND=$EXPORT
	for _ in 1 2; do
		stays_below_cap \
		    cache_block_size=4K,cache_fill=100,cache_checksum=no \
		    pieces pieces pieces
	done
}

@test "a file too large for the cache streams through and evicts nothing" {
	make_file "$EXPORT/a" 5M
	make_file "$EXPORT/b" 5M
	make_file "$EXPORT/big" 15M
	BACKEND=$EXPORT start_cachefs cache_size=16M
	"$CACHEFS" warm -q "$MNT/a" "$MNT/b"
	drop_caches "$EXPORT/big"
	same "$EXPORT/big" "$MNT/big"
	[ "$(state_of "$MNT/big")" = absent ]
	[ "$(bypassed too_big)" -gt 0 ]
	[ "$(stat_of evicted_objects)" = 0 ]
	is_complete "$MNT/a"
	is_complete "$MNT/b"
	[ "$(data_files)" = 2 ]
}

# ------------------------------------------------------------ cache_min_free

free_bytes() { # DIR
	echo $(($(stat -f -c '%a * %S' "$1")))
}

has_free() { # DIR BYTES
	[ "$(free_bytes "$1")" -ge "$2" ]
}

# Another's file grows to 16M more than there is room for.
grow() { # FILE
	local dir=${1%/*} more
	more=$(($(free_bytes "$dir") + (4 << 20)))
	while [ "$more" -gt 0 ]; do
		head -c 4M /dev/zero >>"$1"
		more=$((more - (4 << 20)))
		wait_until 10 has_free "$dir" $((12 << 20))
	done
}

@test "min_free stays free while another file grows, and the cache grows again after" {
	local i
	loop_disk disk 80M	# what is being written counts twice
	CACHE=$WORK/disk/cache
	for ((i = 0; i < 12; i++)); do
		make_file "$EXPORT/f$i" $((3 << 20))
	done
	BACKEND=$EXPORT start_cachefs cache_min_free=12M
	"$CACHEFS" warm -q "$MNT"
	[ "$(stat_of evicted_objects)" = 0 ]
	background grow "$WORK/disk/other"
	grower=$!
	background load_while "$grower" whole 1
	reader=$!
	wait "$grower"
	wait "$reader"
	[ "$(stat_of evicted_objects)" -ge 5 ]
	diff -r "$EXPORT" "$MNT"
	wait_until 10 has_free "$WORK/disk" $((12 << 20))
	rm "$WORK/disk/other"
	wait_until 20 "$CACHEFS" warm -q "$MNT" 2>"$WORK/why.log"
	state_is online
}

@test "of the inodes, too, the share of min_free stays free, and readers do not fail" {
	local i
	loop_disk disk 64M ext4 -N 1024
	CACHE=$WORK/disk/cache
	for ((i = 0; i < 600; i++)); do
		echo "$i" >"$EXPORT/f$i"
	done
	BACKEND=$EXPORT start_cachefs cache_min_free=25%
	python3 - "$MNT" "$WORK/disk" <<-'END'
		import json, os, sys
		mnt, disk = sys.argv[1:]
		least, stats = 1024, {"evicted_objects": 0}
		while stats["evicted_objects"] < 100:
		    for i in range(600):
		        with open(f"{mnt}/f{i}") as f:
		            assert f.read() == f"{i}\n"
		        least = min(least, os.statvfs(disk).f_favail)
		    with open(mnt + "/.cachefs/stats") as f:
		        stats = json.load(f)
		print(least, "inodes were free;", stats["objects"], "objects")
		sys.exit(least < 256 or stats["objects"] < 100)
	END
	state_is online
}

# ------------------------------------------------------------ who does not get in

@test "what sizes and globs keep out leaves nothing on disk, and is counted by reason" {
	for f in in.bin small.bin out.bin other; do
		make_file "$EXPORT/$f" 100K
	done
	truncate -s 4095 "$EXPORT/small.bin"
	make_file "$EXPORT/big.bin" 1M
	BACKEND=$EXPORT
	launch -f -o "$(cachefs_opts cache_min_file_size=4K \
	    cache_max_file_size=512K "cache_include=*.bin" "cache_exclude=/out*")" "$MNT"
	count() { # REASON FILE N
		same "$EXPORT/$2" "$MNT/$2"
		[ "$(state_of "$MNT/$2")" = absent ]
		[ "$(bypassed "$1")" = "$3" ]
	}
	count too_small small.bin 1
	count too_big big.bin 1
	count excluded other 1
	count excluded out.bin 2
	same "$EXPORT/in.bin" "$MNT/in.bin"
	wait_complete "$MNT/in.bin"
	[ "$(data_files)" = 1 ]
	[ "$(jq '[.bypass | .too_small, .too_big, .excluded] | add' \
	    "$MNT/.cachefs/stats")" = 4 ]
}

@test "pinned files outlast every pressure; what finds no room for them is counted" {
	for f in a b c d; do
		make_file "$EXPORT/$f" 3M
	done
	BACKEND=$EXPORT
	start_cachefs cache_size=8M,cache_pin_max=100%
	"$CACHEFS" warm -q "$MNT/a" "$MNT/b"
	"$CACHEFS" pin "$MNT/a" "$MNT/b"
	stop_cachefs			# no buffers hold them now
	start_cachefs cache_size=8M,cache_pin_max=100%
	for _ in 1 2 3; do
		same "$EXPORT/c" "$MNT/c"
		same "$EXPORT/d" "$MNT/d"
	done
	[ "$(bypassed no_space)" -gt 0 ]
	[ "$(stat_of cache_used_bytes)" -le $((8 << 20)) ]
	is_complete "$MNT/a"
	is_complete "$MNT/b"
}

@test "what comes before the scan is over is served uncached, and counted" {
	make_file "$EXPORT/f" 1M
	make_file "$EXPORT/g" 1M
	BACKEND=$EXPORT
	start_cachefs cache_size=16M
	"$CACHEFS" warm -q "$MNT/f"
	stop_cachefs
	index=$(find "$CACHE/objects" -name '*.idx')
	rm "$index" "${index%.idx}"
	mkfifo "$index"			# which the scan can't open
	start_cachefs cache_size=16M
	same "$EXPORT/g" "$MNT/g"
	[ "$(bypassed scan)" -gt 0 ]
	[ "$(state_of "$MNT/g")" = absent ]
	: >"$index"			# now it can
	wait_until 10 "$CACHEFS" warm -q "$MNT/g"
}

@test "a file that is replaced or evicted under its reader is not a fault of the disk" {
	make_file "$EXPORT/f" 1M
	BACKEND=$EXPORT start_cachefs
	exec 5<"$MNT/f"
	"$CACHEFS" evict "$MNT/f"
	same "$EXPORT/f" - <&5
	exec 5<&-
	[ "$(bypassed degraded)" = 0 ]
	[ "$(bypassed changing)" -gt 0 ]
	[ "$(bypassed partial)" -gt 0 ]
}

@test "opens and fetches tell why they went past passthrough and the disk" {
	loop_disk disk 64M
	CACHE=$WORK/disk/cache
	make_file "$EXPORT/f" 1M
	make_file "$EXPORT/g" 1M
	BACKEND=$EXPORT start_cachefs fuse_passthrough=no
	"$CACHEFS" warm -q "$MNT/f"
	same "$EXPORT/f" "$MNT/f"
	[ "$(bypassed passthrough_off)" -gt 0 ]
	echo test >"/sys/fs/ext4/$(basename "$(findmnt -no SOURCE "$WORK/disk")")/trigger_fs_error"
	not touch "$WORK/disk/probe" 2>/dev/null
	same "$EXPORT/g" "$MNT/g"
	[ "$(bypassed degraded)" -gt 0 ]
}

@test "an open for which the kernel refuses passthrough is buffered, and counted" {
	make_file "$EXPORT/f" 2M
	BACKEND=$EXPORT start_cachefs cache_fill=0
	need root passthrough
	cat "$MNT/f" >/dev/null
	wait_complete "$MNT/f"
	before=$(stat_of opens_passthrough)
	strace -f -o "$WORK/strace.log" -e trace=ioctl \
	    -e inject=ioctl:error=ENOMEM -p "$CACHEFS_PID" 2>"$WORK/said.log" &
	tracer=$!
	undo kill "$tracer"
	wait_until 10 grep -q attached "$WORK/said.log"
	same "$EXPORT/f" "$MNT/f"
	kill "$tracer"
	wait_until 10 gone "$tracer"
	[ "$(bypassed passthrough_refused)" -gt 0 ]
	[ "$(bypassed open_buffered)" -gt 0 ]
	[ "$(stat_of opens_passthrough)" = "$before" ]
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of opens_passthrough)" -gt "$before" ]
}
