#!/usr/bin/env bats
# The command line: what it prints, what it refuses, with what status.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2010,SC2012,SC2030,SC2031,SC2034,SC2164,SC2317

load helpers

# Every option, as DESIGN.md's table has them.
OPTIONS="nfs_backend nfs_version nfs_port nfs_mount_port nfs_connections
nfs_timeout nfs_uid nfs_gid cache_dir cache_size cache_min_free
cache_block_size cache_fill cache_eviction cache_consistency cache_ttl
cache_min_file_size cache_max_file_size cache_include cache_exclude
cache_checksum cache_scrub cache_offline cache_offline_max_age nvme_use_io_uring
nvme_queue_depth nvme_polling_mode nvme_sq_poll_idle_ms nvme_io_poll
nvme_fixed_buffers nvme_use_hugepages nvme_direct_io nvme_buffer_memory
nvme_splice fuse_allow_other fuse_passthrough fuse_no_open fuse_io_uring
fuse_threads fuse_attr_timeout fuse_entry_timeout fuse_negative_timeout fuse_readahead
log_level log_target"

# cachefs ARG...; $status, $output (stdout) and $stderr.
invoke() {
	status=0
	timeout 60 "$CACHEFS" "$@" >"$WORK/out" 2>"$WORK/err" </dev/null ||
		status=$?
	output=$(cat "$WORK/out")
	stderr=$(cat "$WORK/err")
	echo "cachefs $*: status $status"
	echo "stdout: $output"
	echo "stderr: $stderr"
}

# Wrong usage: status 2, nothing on stdout, on stderr what REGEX matches.
misused() { # REGEX ARG...
	local regex=$1
	shift
	invoke "$@"
	[ "$status" = 2 ]
	[ -z "$output" ]
	grep -qiE -e "$regex" "$WORK/err"
}

@test "-h prints the usage on stdout, succeeds, and says nothing on stderr" {
	invoke -h
	[ "$status" = 0 ]
	[ -z "$stderr" ]
	grep -qi '^usage: *cachefs' "$WORK/out"
	for word in stats MOUNTPOINT; do
		grep -qw -- "$word" "$WORK/out"
	done
}

@test "-h names every option, and the manual and the example do too" {
	invoke -h
	for o in $OPTIONS; do
		grep -qw -- "$o" "$WORK/out" || fail "-h lacks $o"
	done
	[ -s "$ROOT/cachefs.8" ]
	[ -s "$ROOT/cachefs.ini.example" ]
	for o in $OPTIONS; do
		grep -qE "^\.It .*\b(${o%%_*}_)?${o#*_}\b" "$ROOT/cachefs.8" ||
			fail "cachefs.8 lacks $o"
		sed -n "/^\[${o%%_*}\]/,/^\[/p" "$ROOT/cachefs.ini.example" |
			grep -qE "^[#; ]*${o#*_} *=" ||
			fail "cachefs.ini.example lacks $o"
	done
}

@test "-V prints one line: the name and the version of cachefs.h" {
	version=$(sed -n 's/^#define[[:space:]]*CACHEFS_VERSION[[:space:]]*"\(.*\)".*/\1/p' \
	    "$ROOT/cachefs.h")
	[ -n "$version" ]
	invoke -V
	[ "$status" = 0 ]
	[ -z "$stderr" ]
	[ "$(wc -l <"$WORK/out")" = 1 ]
	[[ $output == cachefs*"$version"* ]]
}

@test "without arguments it says what is missing and exits 2" {
	misused 'usage|mount ?point'
}

@test "an unknown flag is named and exits 2" {
	misused '\bZ\b' -Z "$MNT"
}

@test "a flag without its argument is named and exits 2" {
	misused "(-|')c\\b" -c
	misused "(-|')o\\b" -o
}

@test "too many operands exit 2 and mount nothing" {
	misused surplus "$EXPORT" "$MNT" "$WORK/surplus" -o "cache_dir=$CACHE"
	not is_mounted
	[ ! -e "$CACHE" ]
}

@test "an unknown option is named in one line and exits 2" {
	refuses 2 cache_sise -- \
	    -o "nfs_backend=$EXPORT,cache_dir=$CACHE,cache_sise=1G" "$MNT"
	refuses 2 bogus -- -o "nfs_backend=$EXPORT,bogus,cache_dir=$CACHE" "$MNT"
	[ ! -e "$CACHE" ]
}

@test "an option without a value is named in one line and exits 2" {
	refuses 2 cache_size -- \
	    -o "nfs_backend=$EXPORT,cache_dir=$CACHE,cache_size" "$MNT"
	refuses 2 cache_size -- \
	    -o "nfs_backend=$EXPORT,cache_dir=$CACHE,cache_size=" "$MNT"
	refuses 2 cache_dir -- -o "nfs_backend=$EXPORT,cache_dir=" "$MNT"
}

@test "a subcommand without its operand exits 2" {
	invoke stats
	[ "$status" = 2 ]
	[ -z "$output" ]
	[ -n "$stderr" ]
}

@test "a subcommand's unknown flag is named and exits 2" {
	misused '\bZ\b' stats -Z "$MNT"
}

@test "a subcommand on what is no cachefs mount names it in one line and exits 1" {
	refuses 1 "$EXPORT" -- stats "$EXPORT"
	refuses 1 "$WORK/nothing" -- stats "$WORK/nothing"
}

@test "stats -j gives the statistics of the mount, all of DESIGN's names" {
	BACKEND=$EXPORT start_cachefs
	"$CACHEFS" stats -j "$MNT" >"$WORK/json"
	for name in state io_engine passthrough uptime_s objects \
	    objects_complete cache_used_bytes cache_limit_bytes hit_bytes \
	    miss_bytes backend_read_bytes backend_requests backend_errors \
	    backend_reconnects cache_write_bytes opens_passthrough \
	    opens_buffered set_aside fills_started fills_completed \
	    fills_failed evicted_objects evicted_bytes invalidated \
	    checksum_errors bypass buffer_bytes_used buffer_waits \
	    latency_us.miss.p50 latency_us.miss.p99 latency_us.miss.max \
	    latency_us.hit.p50 latency_us.hit.p99 latency_us.hit.max \
	    queue_depth_max sqe_submitted cqe_completed submit_calls; do
		jq -e ".$name != null" "$WORK/json" >/dev/null ||
			fail "stats -j lacks $name"
	done
	[ "$(stat_of state)" = online ]
	"$CACHEFS" stats -j "$MNT" | jq -S 'keys' >"$WORK/a"
	jq -S 'keys' "$MNT/.cachefs/stats" >"$WORK/b"
	same "$WORK/a" "$WORK/b"
}

