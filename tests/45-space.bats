#!/usr/bin/env bats
# Room on the cache disk: what the cache may take, what it leaves to others, and
# what does not get in.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

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
		    name = "/f%d" % rnd.randrange(40)
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
