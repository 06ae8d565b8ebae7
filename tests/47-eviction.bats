#!/usr/bin/env bats
# Which object goes first: lru, lfu, sieve.  cachefs's own code is replayed on
# long traces by tests/evictsim.c; here are also mounts, and restarts.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

setup() {
	common_setup
	BACKEND=$EXPORT
	for f in a b c d e f g; do
		make_file "$EXPORT/$f" 4M
	done
}

scanned() { [ "$(stat_of objects)" = "$1" ]; }

# Cache FILE..., one after the other.
cached() { # FILE...
	local f
	for f; do
		cat "$MNT/$f" >/dev/null
		wait_complete "$MNT/$f"
	done
}

# Each FILE lies on disk, used COUNT times, and is at rest.
used() { # FILE COUNT...
	while [ $# -gt 0 ]; do
		wait_until 20 used_is "$1" "$2"
		shift 2
	done
}

# Which are cached, without a use of them.
left() {
	(cd "$MNT" && "$CACHEFS" ls -j a b c d e f g) |
		jq -r 'select(.state == "complete") | .path' | tr -d '\n'
}

# Four files fit.  a was opened five times, b three times, c and d once; c and
# d, and then a and b, were used last.  Then, after a restart, come two more, and
# one after another: what has just been cached is still in use for a moment.
history() { # POLICY
	start() {
		start_cachefs cache_size=18M cache_fill=0 cache_scrub=0 \
		    cache_eviction="$1"
	}
	start "$1"
	cached a b c d a a a a b b
	[ "$(left)" = abcd ]
	stop_cachefs
	used a 5 b 3 c 1 d 1
	start "$1"
	wait_until 20 scanned 4
	cached e f
	stop_cachefs
	start "$1"
	wait_until 20 scanned 4
	cached g
}

@test "lru, lfu and sieve beside Belady's optimum; sieve and lfu survive a scan" {
	"$BUILD/evictsim" >"$WORK/table"
	sed "s/^/# /" "$WORK/table" >&3
	[ "$(wc -l <"$WORK/table")" = 6 ]
	share() { # TRACE COLUMN -> per mille
		awk -v t="$1" -v c="$2" '$1 == t { print int($c * 10) }' \
		    "$WORK/table"
	}
	for t in zipf shift loop scan pass; do
		for c in 3 4 5; do
			[ "$(share $t $c)" -le "$(share $t 6)" ]
		done
	done
	for t in scan pass; do
		[ "$(share $t 4)" -ge 900 ]
		[ "$(share $t 5)" -ge 900 ]
		[ "$(share $t 3)" -lt 900 ]
	done
	[ "$(share zipf 4)" -gt "$(share zipf 3)" ]
	[ "$(share zipf 5)" -gt "$(share zipf 3)" ]
}

@test "evictsim takes a trace, and names what is none" {
	seq 1 100 >"$WORK/trace"
	seq 1 10 >>"$WORK/trace"
	"$BUILD/evictsim" "$WORK/trace" | grep -qE '^trace +10 +0.0%'
	echo x >>"$WORK/trace"
	not "$BUILD/evictsim" "$WORK/trace" 2>"$WORK/why.log"
	grep -q 'trace: access 111: no number' "$WORK/why.log"
	not "$BUILD/evictsim" "$WORK/none" 2>"$WORK/why.log"
	grep -q 'none: No such file' "$WORK/why.log"
}

@test "lru: what was not used for longest goes, also after a restart" {
	history lru
	[ "$(left)" = befg ]
}

@test "lfu: what was used least often goes, also after a restart" {
	history lfu
	[ "$(left | tee /dev/stderr)" = abfg ]
}

@test "sieve: what was used since it came is spared, also after a restart" {
	history sieve
	[ "$(left | tee /dev/stderr)" = abfg ]
}

@test "how often a file was used is known after kill -9, too" {
	start_cachefs cache_size=18M cache_fill=0 cache_scrub=0 cache_eviction=lfu
	cached a
	exec 5<"$MNT/a"		# each open is a use, while others have it open, too
	cached a a
	exec 5<&-
	cached b c d
	used a 4 b 1 c 1 d 1
	kill_cachefs KILL
	force_unmount "$MNT"
	start_cachefs cache_size=18M cache_fill=0 cache_scrub=0 cache_eviction=lfu
	wait_until 20 scanned 4
	cached e f
	[[ "$(left)" == a* ]]
}

@test "pinned files are spared by each policy" {
	for p in lru lfu sieve; do
		start_cachefs cache_size=18M cache_fill=0 cache_scrub=0 cache_eviction=$p
		cached a b
		"$CACHEFS" pin "$MNT/a"
		for _ in 1 2 3; do
			cached c d e f g
		done
		[[ "$(left)" == a* ]]
		[ "$(stat_of cache_used_bytes)" -le $((18 << 20)) ]
		stop_cachefs
		rm -rf "$CACHE"
	done
}
