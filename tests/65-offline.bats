#!/usr/bin/env bats
# The server is away: what was listed and what is complete stays, also after a
# restart; nothing that is unreachable is taken for deleted or empty.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2010,SC2012,SC2016,SC2030,SC2031,SC2034,SC2164,SC2317

load helpers

tree_on_server() {
	mkdir -p "$EXPORT/d/sub" "$EXPORT/empty" "$EXPORT/unlisted"
	make_file "$EXPORT/d/f" 1M
	make_file "$EXPORT/d/g" 300000
	make_file "$EXPORT/d/sub/h" 5000
	: >"$EXPORT/d/zero"
	ln -s ../d/f "$EXPORT/d/link"
	printf x >"$EXPORT/d/$(printf 'odd\n\377name')"
	make_file "$EXPORT/unlisted/u" 100000
}

# How an ls -lR without what changes by looking at it.
listing() { # DIR
	(cd "$1" && find d empty -printf '%p %y %s %m %U %G %n %T@ %l\n' |
	    LC_ALL=C sort)
}

# Ends when all of it is on disk: the noter writes once a second, in order.
use_it_all() {
	listing "$MNT" >"$BATS_TEST_TMPDIR/online"
	cache_file d/f d/g d/sub/h
	cache_file unlisted/u		# which is never listed
	readlink "$MNT/d/link" >/dev/null
	not stat "$MNT/nowhere" 2>/dev/null
	wait_until 10 grep -rq nowhere "$CACHE/tree"
}

# It is as it was, and what is not known is not said to be missing.
as_it_was() {
	listing "$MNT" >"$BATS_TEST_TMPDIR/offline"
	diff "$BATS_TEST_TMPDIR/online" "$BATS_TEST_TMPDIR/offline"
	same "$EXPORT/d/f" "$MNT/d/f"
	same "$EXPORT/d/f" "$MNT/d/link"
	same "$EXPORT/d/g" "$MNT/d/g"
	same "$EXPORT/d/sub/h" "$MNT/d/sub/h"
	same "$EXPORT/unlisted/u" "$MNT/unlisted/u"
	[ "$(attempt "$MNT/unlisted/other" | cut -d' ' -f1)" = EIO ]
	[ "$(attempt "$MNT/d/other" | cut -d' ' -f1)" = EIO ]
	[ "$(attempt "$MNT/nowhere" | cut -d' ' -f1)" = ENOENT ]
	not ls "$MNT/unlisted"
	state_is offline
}

offline_and_back() { # OPT...
	tree_on_server
	start_nfs
	start_cachefs nfs_timeout=2 "$@"
	use_it_all
	stop_nfs
	attempt "$MNT/d/f" >/dev/null
	wait_until 20 state_is offline
	as_it_was
	stop_cachefs
	start_cachefs nfs_timeout=2 "$@"
	grep -q 'starting offline' "$LOG"
	as_it_was
	# The world goes on meanwhile.
	make_file "$EXPORT/d/f" 1M 77
	rm "$EXPORT/d/g"
	make_file "$EXPORT/d/new" 3000
	restart_nfs
	wait_until 30 state_is online
	wait_until 5 same "$EXPORT/d/f" "$MNT/d/f"	# attr_timeout: 1 s
	wait_until 5 missing d/g
	same "$EXPORT/d/new" "$MNT/d/new"
	wait_until 5 all_new
}

all_new() {
	diff <(listing "$EXPORT") <(listing "$MNT")
}

missing() { # FILE
	[ "$(attempt "$MNT/$1" | cut -d' ' -f1)" = ENOENT ]
}

@test "a tree that was listed can be listed and read without the server, also after a restart" {
	offline_and_back
}

@test "the same by NFSv4" {
	offline_and_back nfs_version=4
}

@test "the same in every consistency mode that asks the server" {
	offline_and_back cache_consistency=strict
}

@test "after kill -9 without the server the tree is there as well" {
	tree_on_server
	start_nfs
	start_cachefs nfs_timeout=2
	use_it_all
	kill_cachefs KILL
	stop_nfs
	start_cachefs nfs_timeout=2
	as_it_was
}

@test "offline_max_age ends it, also for a daemon that was started later" {
	tree_on_server
	start_nfs
	start_cachefs nfs_timeout=2 cache_offline_max_age=6
	use_it_all
	stop_nfs
	attempt "$MNT/d/f" >/dev/null
	wait_until 20 state_is offline
	same "$EXPORT/d/f" "$MNT/d/f"
	eio() { [ "$(attempt "$MNT/d/f" | cut -d' ' -f1)" = EIO ]; }
	wait_until 30 eio
	not ls "$MNT/d"
	stop_cachefs
	not mount_cachefs nfs_timeout=2 cache_offline_max_age=6
	grep -q 'older than cache_offline_max_age' "$LOG"
	start_cachefs nfs_timeout=2
	as_it_was
}

@test "statistics can be read from the moment the server hangs, whatever is to be served" {
	for offline in serve fail; do
		make_file "$EXPORT/f" 1M
		start_nfs
		start_cachefs nfs_timeout=60 cache_offline=$offline \
		    fuse_attr_timeout=0
		server=$("$TESTS/nfs-server.sh" pid "$NFS_PORT")
		kill -STOP "$server"
		"$CACHEFS" stats -p "$MNT" >"$WORK/metrics"	# 5 s at most
		grep -q '^cachefs_up{.*} 1$' "$WORK/metrics"
		# what is asked of the server waits for it
		background timeout $((30 * SLOW)) cmp "$EXPORT/f" "$MNT/f"
		reader=$!
		"$CACHEFS" stats "$MNT" >/dev/null
		kill -CONT "$server"
		wait "$reader"
		stop_cachefs
		stop_nfs
	done
}

@test "statistics can be read while the server is away" {
	make_file "$EXPORT/f" 1M
	start_nfs
	start_cachefs nfs_timeout=2 cache_offline=fail fuse_attr_timeout=0
	stop_nfs
	[ "$(attempt "$MNT/f" | cut -d' ' -f1)" = EIO ]
	wait_until 20 state_is offline
	[ "$(attempt "$MNT/f" | cut -d' ' -f1)" = EIO ]
	not ls "$MNT"
}

@test "without a cache that knows the server nothing starts without it" {
	start_nfs
	stop_nfs
	refuses 1 'cannot connect' -- \
	    -o "$(cachefs_opts nfs_timeout=2)" "$MNT"
	not test -e "$CACHE/CACHEFS"
	refuses 1 'cannot connect' -- \
	    -o "$(cachefs_opts nfs_timeout=2 cache_offline=fail)" "$MNT"
}

@test "a listing that was damaged is not believed, and is learnt again" {
	tree_on_server
	start_nfs
	start_cachefs nfs_timeout=2
	use_it_all
	stop_cachefs
	find "$CACHE/tree" -mindepth 2 -type f -exec \
	    dd of={} bs=1 seek=100 conv=notrunc status=none \; <<<"damaged!"
	start_cachefs nfs_timeout=2
	use_it_all
	wait_until 10 grep -q 'dropped a listing' "$LOG"
	stop_nfs
	attempt "$MNT/d/f" >/dev/null
	wait_until 20 state_is offline
	as_it_was
}

@test "a listing that is damaged is found in the background" {
	tree_on_server
	start_nfs
	start_cachefs cache_scrub=0
	use_it_all
	stop_cachefs
	find "$CACHE/tree" -mindepth 2 -type f | head -n 2 | while read -r f; do
		dd of="$f" bs=1 seek=100 conv=notrunc status=none <<<"damaged!"
	done
	start_cachefs cache_scrub=1G
	wait_until 20 eval '[ "$(stat_of checksum_errors)" = 2 ]'
}

@test "a file that was deleted on the server is not there without it either" {
	tree_on_server
	start_nfs
	start_cachefs nfs_timeout=2
	use_it_all
	rm "$EXPORT/d/g" "$EXPORT/unlisted/u"
	wait_until 5 missing d/g
	wait_until 5 missing unlisted/u
	stop_cachefs
	stop_nfs
	start_cachefs nfs_timeout=2
	missing d/g
	missing unlisted/u
	same "$EXPORT/d/f" "$MNT/d/f"
}
