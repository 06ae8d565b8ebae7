#!/usr/bin/env bats
# What stays: the cache over restarts and crashes, and each version of a file
# for whom has it open.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2010,SC2012,SC2016,SC2030,SC2031,SC2034,SC2164,SC2317

load helpers

# A new version of FILE on the server, under the same inode; and under a new one.
rewrite() { # FILE SIZE SEED
	make_file "$WORK/${1##*/}" "$2" "$3"
	cat "$WORK/${1##*/}" >"$EXPORT/$1"
}

replace() { # FILE SIZE SEED
	make_file "$WORK/${1##*/}" "$2" "$3"
	cp "$WORK/${1##*/}" "$EXPORT/.new"
	mv "$EXPORT/.new" "$EXPORT/$1"
}

# ------------------------------------------------------------ restarts

still_warm() {
	same "$EXPORT/f" "$MNT/f"
	same "$EXPORT/g" "$MNT/g"
	[ "$(stat_of backend_read_bytes)" = 0 ]
}

@test "the cache is warm after a remount, by every backend" {
	make_file "$EXPORT/f" 20000001
	make_file "$EXPORT/g" 10000
	for KIND in v3 v4 dir; do
		CACHE=$WORK/cache.$KIND
		start_kind "$KIND"
		cache_file f
		cache_file g
		stop_cachefs
		drop_caches
		start_kind "$KIND"
		[ "$(state_of "$MNT/f")" = complete ]
		still_warm
		stop_cachefs
	done
}

@test "a complete file is passthrough at its first open after a remount" {
	make_file "$EXPORT/f" 4M
	start_nfs
	start_cachefs
	need passthrough
	cache_file f
	stop_cachefs
	start_cachefs
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of opens_passthrough)" = 1 ]
	[ "$(stat_of hit_bytes)" = 0 ]
}

@test "a half cached file is still half cached after a remount" {
	make_file "$EXPORT/f" 32M
	start_nfs
	start_cachefs cache_fill=100 cache_block_size=256K
	head -c 8M "$MNT/f" >/dev/null
	wait_quiet
	cached=$(cached_of "$MNT/f")
	[ "$cached" -ge $((8 << 20)) ]
	stop_cachefs
	start_cachefs cache_fill=100 cache_block_size=256K
	[ "$(cached_of "$MNT/f")" = "$cached" ]
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of backend_read_bytes)" -le $(((32 << 20) - cached)) ]
}

@test "the cache is warm after kill -9, and the next start cleans the dead mount" {
	make_file "$EXPORT/f" 20000001
	make_file "$EXPORT/g" 10000
	start_nfs
	start_cachefs
	cache_file f
	cache_file g
	kill_cachefs KILL
	is_mounted
	not ls "$MNT"
	start_cachefs
	[ "$(grep -cF " $MNT " /proc/self/mountinfo)" = 1 ]
	still_warm
}

@test "the daemonizing form cleans a dead mount of its own, too" {
	make_file "$EXPORT/f" 1M
	start_nfs
	mount_cachefs
	cache_file f
	kill_cachefs KILL
	is_mounted
	mount_cachefs
	same "$EXPORT/f" "$MNT/f"
}

@test "kill -9 at any moment of a fill leaves right bytes" {
	make_file "$EXPORT/f" 64M
	start_nfs
	start_proxy -r 800
	fetched() { [ "$(stat_of backend_read_bytes)" -ge "$1" ]; }
	for mib in 1 5 11 23 40; do
		start_cachefs cache_block_size=256K
		background cat "$MNT/f" >/dev/null 2>&1
		reader=$!
		wait_until 30 fetched $((mib << 20))
		kill_cachefs KILL
		wait "$reader" || :
		start_cachefs cache_block_size=256K
		same "$EXPORT/f" "$MNT/f"
		wait_complete "$MNT/f"
		drop_caches
		same "$EXPORT/f" "$MNT/f"
		stop_cachefs
		rm -rf "$CACHE"
	done
}

@test "what was fetched some seconds before kill -9 is not lost" {
	make_file "$EXPORT/f" 64M
	start_nfs
	start_cachefs cache_fill=100
	head -c 32M "$MNT/f" >/dev/null
	wait_quiet
	# The index is on disk when it stops changing: nothing tells us sooner.
	wait_until 30 index_settled
	kill_cachefs KILL
	start_cachefs cache_fill=100
	[ "$(cached_of "$MNT/f")" -ge $((31 << 20)) ]
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of backend_read_bytes)" -le $((33 << 20)) ]
}

# No index file younger than ten seconds, and there is one.
index_settled() {
	[ -n "$(find "$CACHE/objects" -name '*.idx')" ] &&
		[ -z "$(find "$CACHE/objects" -name '*.idx' -newermt '-10 seconds')" ]
}

# ------------------------------------------------------------ damage

# Do CMD to every index, behind a stopped daemon's back.
damage() { # CMD...: "{}" is the index
	[ -n "$(find "$CACHE/objects" -name '*.idx')" ]
	# shellcheck disable=SC2150	# each CMD is a program
	find "$CACHE/objects" -name '*.idx' -exec "$@" \;
}

survives_damage() { # CMD...
	start_cachefs
	cache_file f
	cache_file g
	stop_cachefs
	damage "$@"
	start_cachefs
	same "$EXPORT/f" "$MNT/f"
	same "$EXPORT/g" "$MNT/g"
	[ "$(stat_of backend_read_bytes)" -ge 5000001 ]
	wait_complete "$MNT/f"
	stop_cachefs
}

@test "a torn, garbled, empty or missing index is dropped with its data" {
	make_file "$EXPORT/f" 5000001
	make_file "$EXPORT/g" 100
	start_nfs
	survives_damage truncate -s 50 {}
	survives_damage truncate -s 0 {}
	survives_damage dd if=/dev/urandom of={} bs=64 count=1 conv=notrunc status=none
	survives_damage rm {}
}

@test "any single flipped byte of an index is noticed" {
	make_file "$EXPORT/f" 300000
	start_nfs
	start_cachefs cache_block_size=64K
	cache_file f
	stop_cachefs
	idx=$(find "$CACHE/objects" -name '*.idx')
	cp "$idx" "$WORK/good.idx"
	data=${idx%.idx}
	cp "$data" "$WORK/good.data"
	size=$(stat -c %s "$idx")
	for ((at = 0; at < size; at += size / 12 + 1)); do
		cp "$WORK/good.idx" "$idx"
		cp "$WORK/good.data" "$data"
		python3 - "$idx" "$at" <<-'END'
			import sys
			with open(sys.argv[1], "r+b") as f:
			    f.seek(int(sys.argv[2]))
			    c = f.read(1)[0]
			    f.seek(int(sys.argv[2]))
			    f.write(bytes([c ^ 0x41]))
		END
		start_cachefs cache_block_size=64K
		same "$EXPORT/f" "$MNT/f"
		[ "$(stat_of backend_read_bytes)" -ge 300000 ] ||
			fail "byte $at of $size of the index does not matter"
		stop_cachefs
		find "$CACHE/objects" -type f -delete
	done
}

@test "an index without its data, or with data of another length, is dropped" {
	make_file "$EXPORT/f" 5000001
	start_nfs
	for cmd in 'rm "$1"' 'truncate -s 1000000 "$1"' 'truncate -s +4096 "$1"'; do
		start_cachefs
		cache_file f
		stop_cachefs
		find "$CACHE/objects" -type f ! -name '*.idx' -exec sh -c "$cmd" - {} \;
		start_cachefs
		same "$EXPORT/f" "$MNT/f"
		[ "$(stat_of backend_read_bytes)" -ge 5000001 ]
		stop_cachefs
	done
}

# ------------------------------------------------------------ whose cache

@test "another backend's cache is refused and not wiped" {
	make_file "$EXPORT/f" 1M
	mkdir "$WORK/other"
	make_file "$WORK/other/f" 1M other
	BACKEND=$EXPORT start_cachefs
	cache_file f
	stop_cachefs
	(cd "$CACHE" && find . -type f -exec md5sum {} + | sort) >"$WORK/before"
	refuses 1 "$CACHE" -- -o "nfs_backend=$WORK/other,cache_dir=$CACHE" "$MNT"
	(cd "$CACHE" && find . -type f -exec md5sum {} + | sort) >"$WORK/after"
	grep -v /lock "$WORK/before" >"$WORK/a"
	grep -v /lock "$WORK/after" >"$WORK/b"
	same "$WORK/a" "$WORK/b"
	BACKEND=$EXPORT start_cachefs
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of backend_read_bytes)" = 0 ]
}

@test "a cache of a newer or unreadable format is refused and not wiped" {
	make_file "$EXPORT/f" 1M
	BACKEND=$EXPORT start_cachefs
	cache_file f
	stop_cachefs
	cp "$CACHE/CACHEFS" "$WORK/label"
	head -c 3000 /dev/urandom >"$CACHE/CACHEFS"
	refuses 1 "$CACHE" -- -o "nfs_backend=$EXPORT,cache_dir=$CACHE" "$MNT"
	[ "$(find "$CACHE/objects" -type f | wc -l)" = 2 ]
	cp "$WORK/label" "$CACHE/CACHEFS"
	BACKEND=$EXPORT start_cachefs
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of backend_read_bytes)" = 0 ]
}

@test "all names of a file share one cached object" {
	make_file "$EXPORT/f" 4M
	for KIND in v3 dir; do
		CACHE=$WORK/cache.$KIND
		start_kind "$KIND"
		cache_file f
		mkdir "$EXPORT/d"
		mv "$EXPORT/f" "$EXPORT/d/moved"
		ln "$EXPORT/d/moved" "$EXPORT/linked"
		# Both change the ctime, and with it the validator: one more
		# fetch is honest, two are not.
		wait_until 5 test -e "$MNT/linked"
		same "$EXPORT/linked" "$MNT/linked"
		wait_complete "$MNT/linked"
		bytes=$(stat_of backend_read_bytes)
		same "$EXPORT/d/moved" "$MNT/d/moved"
		[ "$(stat_of backend_read_bytes)" = "$bytes" ]
		[ "$(stat_of objects)" = 1 ]
		stop_cachefs
		mv "$EXPORT/d/moved" "$EXPORT/f"
		rm -r "$EXPORT/linked" "$EXPORT/d"
	done
}

# ------------------------------------------------------------ versions

next_open_sees_it() {
	make_file "$EXPORT/f" 3M
	cache_file f
	rewrite f 3M two
	same "$EXPORT/f" "$MNT/f"
	cache_file f
	replace f 3M three
	same "$EXPORT/f" "$MNT/f"
	cache_file f
	truncate -s 1234567 "$EXPORT/f"
	same "$EXPORT/f" "$MNT/f"
	cache_file f
	make_file "$EXPORT/f" 5000001 four
	same "$EXPORT/f" "$MNT/f"
	cache_file f
	printf more >>"$EXPORT/f"
	same "$EXPORT/f" "$MNT/f"
	[ "$(tail -c 4 "$MNT/f")" = more ]
	truncate -s 0 "$EXPORT/f"
	[ "$(wc -c <"$MNT/f")" = 0 ]
	[ "$(cat "$MNT/f")" = '' ]
	# A version that was replaced before its index was written is not one.
	[ "$(stat_of invalidated)" -ge 3 ]
}

@test "a file rewritten, replaced, truncated, grown is seen at the next open, by every backend" {
	each_backend next_open_sees_it
}

@test "a change of one byte with size and mtime as before is seen at the next open" {
	make_file "$EXPORT/f" 3M
	touch -d '2020-01-01 00:00:00 UTC' "$EXPORT/f"
	start_nfs
	start_cachefs
	cache_file f
	printf X | dd of="$EXPORT/f" bs=1 seek=1500000 conv=notrunc status=none
	touch -d '2020-01-01 00:00:00 UTC' "$EXPORT/f"
	same "$EXPORT/f" "$MNT/f"
}

@test "a file changed while nothing was mounted is not served as it was" {
	make_file "$EXPORT/f" 3M
	start_nfs
	start_cachefs
	cache_file f
	stop_cachefs
	rewrite f 3M two
	start_cachefs
	same "$EXPORT/f" "$MNT/f"
}

old_version_stays() { # HOW (rewrite or replace)
	make_file "$EXPORT/f" 3M
	cp "$EXPORT/f" "$WORK/one"
	cache_file f
	exec {old}<"$MNT/f"
	head -c 1000000 <&"$old" | cmp - <(head -c 1000000 "$WORK/one")
	"$1" f 4M two
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat -L -c %s "/proc/self/fd/$old")" = $((3 << 20)) ]
	# The whole of it by the old descriptor, from the front again.
	python3 - "$old" "$WORK/one" <<-'END'
		import os, sys
		fd, want = int(sys.argv[1]), open(sys.argv[2], "rb").read()
		for off in range(0, len(want) + 1, 100000):
		    assert os.pread(fd, 100000, off) == want[off:off + 100000], off
		assert os.pread(fd, 10, len(want)) == b""
		assert os.fstat(fd).st_size == len(want)
	END
	exec {old}<&-
	same "$EXPORT/f" "$MNT/f"
}

@test "an old descriptor keeps the whole old version that was cached" {
	start_nfs
	start_cachefs
	old_version_stays replace
	old_version_stays rewrite
}

@test "an old mapping keeps the whole old version that was cached" {
	make_file "$EXPORT/f" 3M
	cp "$EXPORT/f" "$WORK/one"
	start_nfs
	start_cachefs
	cache_file f
	coproc MAPPER { python3 -c '
import mmap, sys
with open(sys.argv[1], "rb") as f:
    m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
print("mapped", m[0], flush=True)
sys.stdin.readline()
sys.exit(m[:] != open(sys.argv[2], "rb").read())' "$MNT/f" "$WORK/one"; }
	pid=$MAPPER_PID
	read -r -u "${MAPPER[0]}" -t $((30 * SLOW)) line
	[[ $line == mapped* ]]
	replace f 2M two
	same "$EXPORT/f" "$MNT/f"
	drop_caches
	echo >&"${MAPPER[1]}"
	wait "$pid"
}

# What was not cached of an old version is gone: each MiB has its bytes to the end,
# or up to one of the ERRORS.  Prints how many had an error.
bytes_or() { # ERRORS FD ORIGINAL
	python3 - "$@" <<-'END'
		import errno, os, sys
		errors = [getattr(errno, name) for name in sys.argv[1].split()]
		fd, want = int(sys.argv[2]), open(sys.argv[3], "rb").read()
		step, failed = 1 << 20, 0
		for off in range(0, len(want), step):
		    part, got = want[off:off + step], b""
		    try:
		        while len(got) < len(part):	# short before an error
		            more = os.pread(fd, step - len(got), off + len(got))
		            assert more, off
		            got += more
		    except OSError as e:
		        assert e.errno in errors, e
		        failed += 1
		    assert got == part[:len(got)], off
		print(failed)
	END
}

@test "two versions are never mixed in one descriptor, cached or not" {
	make_file "$EXPORT/f" 32M
	cp "$EXPORT/f" "$WORK/one"
	start_nfs
	start_cachefs cache_fill=100
	exec {old}<"$MNT/f"
	head -c 1000000 <&"$old" | cmp - <(head -c 1000000 "$WORK/one")
	replace f 32M two
	bytes_or "ESTALE EIO" "$old" "$WORK/one"
	exec {old}<&-
	same "$EXPORT/f" "$MNT/f"
}

removed_while_open() {
	make_file "$EXPORT/f" 64M	# more than is read ahead
	cp "$EXPORT/f" "$WORK/one"
	exec {old}<"$MNT/f"
	head -c 100000 <&"$old" | cmp - <(head -c 100000 "$WORK/one")
	rm "$EXPORT/f"
	wait_until 10 [ ! -e "$MNT/f" ]
	failed=$(bytes_or ESTALE "$old" "$WORK/one")
	case $KIND in
	v3) [ "$failed" -gt 0 ] ;;	# which has no open files
	dir) [ "$failed" = 0 ] ;;	# the daemon's is still open
	esac
	exec {old}<&-
}

@test "a file that is removed while it is open gives its bytes or ESTALE, by every backend" {
	each_backend removed_while_open
}

@test "a file that changes while it is filled is never kept as fresh" {
	make_file "$EXPORT/f" 32M
	start_nfs
	start_proxy -r 200
	start_cachefs
	background cat "$MNT/f" >/dev/null 2>&1
	reader=$!
	fetched() { [ "$(stat_of backend_read_bytes)" -ge "$1" ]; }
	wait_until 30 fetched $((8 << 20))
	rewrite f 32M two
	wait "$reader" || :		# may have met ESTALE
	wait_quiet
	drop_caches
	same "$EXPORT/f" "$MNT/f"
	cache_file f
	same "$EXPORT/f" "$MNT/f"
}

versions_held() { # HOW
	local v fds=() fd size
	for v in 1 2 3 4 5 6 7 8; do
		size=$((1000000 + v * 77777))
		"$1" f "$size" "v$v"
		cp "$EXPORT/f" "$WORK/v$v"
		same "$EXPORT/f" "$MNT/f"
		wait_complete "$MNT/f"
		exec {fd}<"$MNT/f"
		fds[v]=$fd
	done
	for v in 5 1 8 3 2 7 4 6; do
		[ "$(stat -L -c %s "/proc/self/fd/${fds[v]}")" = "$(stat -c %s "$WORK/v$v")" ]
		cmp "$WORK/v$v" - <&"${fds[v]}"
	done
	drop_caches
	for v in 1 2 3 4 5 6 7 8; do
		python3 - "${fds[v]}" "$WORK/v$v" <<-'END'
			import os, sys
			fd, want = int(sys.argv[1]), open(sys.argv[2], "rb").read()
			assert os.pread(fd, len(want) + 1, 0) == want
		END
		fd=${fds[v]}
		exec {fd}<&-
	done
}

@test "eight versions of a file held open at once each give their own bytes" {
	start_nfs
	start_cachefs
	versions_held replace
	rm "$EXPORT/f"
	versions_held rewrite
}

@test "of many versions held open at once each is passthrough" {
	start_nfs
	start_cachefs
	need passthrough
	make_file "$EXPORT/f" 1M
	cache_file f
	exec {fd}<"$MNT/f"
	fds=("$fd")
	for v in 1 2 3 4 5; do
		replace f 1M "v$v"
		same "$EXPORT/f" "$MNT/f"
		wait_complete "$MNT/f"
		wait_quiet
		opens=$(stat_of opens_passthrough)
		exec {fd}<"$MNT/f"
		fds+=("$fd")
		[ "$(stat_of opens_passthrough)" = $((opens + 1)) ]
		served=$(jq -c '[.hit_bytes, .miss_bytes]' "$MNT/.cachefs/stats")
		cmp "$EXPORT/f" - <&"$fd"
		[ "$(jq -c '[.hit_bytes, .miss_bytes]' "$MNT/.cachefs/stats")" = "$served" ]
	done
	[ "$(stat_of set_aside)" -ge 5 ]
	for fd in "${fds[@]}"; do
		exec {fd}<&-
	done
}

@test "a removed file is gone at the next open, and an old descriptor reads on" {
	make_file "$EXPORT/f" 3M
	cp "$EXPORT/f" "$WORK/one"
	start_nfs
	start_cachefs
	cache_file f
	exec {old}<"$MNT/f"
	rm "$EXPORT/f"
	not cat "$MNT/f" 2>"$WORK/err"
	grep -q 'No such file' "$WORK/err"
	cmp "$WORK/one" - <&"$old"
	exec {old}<&-
}

@test "want of descriptors drops nothing from the cache" {
	make_file "$EXPORT/f" 1M
	make_file "$EXPORT/g" 300K
	start_nfs
	start_cachefs
	cache_file f
	cache_file g
	stop_cachefs
	start_cachefs
	while [ -e "/proc/$CACHEFS_PID/fd/$((n))" ]; do
		n=$((n + 1))
	done
	prlimit --pid "$CACHEFS_PID" --nofile="$n:"
	cat "$MNT/f" "$MNT/g" >"$WORK/out" || :
	[ "$(stat_of opens_passthrough)" = 0 ]
	prlimit --pid "$CACHEFS_PID" --nofile=1024:
	stop_cachefs
	start_cachefs
	[ "$(state_of "$MNT/f")" = complete ]
	same "$EXPORT/f" "$MNT/f"
	same "$EXPORT/g" "$MNT/g"
	[ "$(stat_of backend_read_bytes)" = 0 ]
}

@test "a first start that was cut short does not spoil the cache directory" {
	make_file "$EXPORT/f" 1M
	mkdir -m 700 "$CACHE"
	echo CACHE >"$CACHE/CACHEFS.tmp"
	BACKEND=$EXPORT start_cachefs
	same "$EXPORT/f" "$MNT/f"
}

ttl_keeps_its_promise() {
	make_file "$EXPORT/f" 8M
	make_file "$EXPORT/g" 1M
	stop_cachefs
	start_kind "$KIND" cache_consistency=ttl cache_ttl=3600 cache_fill=100 \
	    fuse_attr_timeout=0 fuse_entry_timeout=0
	cache_file g
	head -c 100000 "$MNT/f" >/dev/null
	cp "$EXPORT/g" "$WORK/g.old"
	rewrite f 8M two
	rewrite g 1M two
	before=$(stat_of backend_requests)
	same "$WORK/g.old" "$MNT/g"
	[ "$(stat_of backend_requests)" = "$before" ]
	same "$EXPORT/f" "$MNT/f"
	stop_cachefs
	start_kind "$KIND"
	same "$EXPORT/g" "$MNT/g"
}

@test "consistency=ttl serves what it knows, and asks again where it can't, by every backend" {
	each_backend ttl_keeps_its_promise
}

damage_data() { # OFFSET: of all big files in the cache
	find "$CACHE/objects" -type f -size +2M | while read -r f; do
		dd of="$f" bs=1 seek="$1" conv=notrunc status=none <<<"damaged!"
	done
}

@test "a block that was damaged on the disk is found when it is read, and fetched again" {
	make_file "$EXPORT/f" 8M
	start_nfs
	start_cachefs fuse_passthrough=no
	cache_file f
	stop_cachefs
	damage_data 3000000
	damage_data 7000000
	start_cachefs fuse_passthrough=no
	cmp -n 4096 -i 2998272 "$EXPORT/f" "$MNT/f"
	[ "$(stat_of checksum_errors)" = 1 ]
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of checksum_errors)" = 2 ]
	[ "$(grep -c 'is damaged; it is fetched' "$LOG")" = 2 ]
	[ "$(stat_of backend_read_bytes)" -le $((2 << 20)) ]
	wait_complete "$MNT/f"
	stop_cachefs
	start_cachefs fuse_passthrough=no
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of checksum_errors)" = 0 ]
	[ "$(stat_of backend_read_bytes)" = 0 ]
}

@test "verify finds damaged blocks of complete files, and fetches them again" {
	mkdir "$EXPORT/d"
	make_file "$EXPORT/d/f" 8M
	make_file "$EXPORT/g" 100000
	make_file "$EXPORT/cold" 3M
	start_nfs
	start_cachefs cache_scrub=0
	cache_file d/f
	cache_file g
	run "$CACHEFS" verify -r "$MNT"
	[ "$status" = 0 ]
	[ "$output" = "3 files, $(((8 << 20) + 100000)) bytes checked, 0 damaged blocks" ]
	damage_data 3000000
	damage_data 7000000
	not same "$EXPORT/d/f" "$MNT/d/f"	# by passthrough nobody looks
	run "$CACHEFS" verify "$MNT/d/f"
	[ "$status" = 0 ]
	[ "${lines[0]}" = "$MNT/d/f: 2 damaged blocks, fetched again" ]
	[ "$(stat_of checksum_errors)" = 2 ]
	wait_complete "$MNT/d/f"
	same "$EXPORT/d/f" "$MNT/d/f"
	run "$CACHEFS" verify "$MNT/d/f" "$MNT/g"
	[ "$status" = 0 ]
	[ "$output" = "2 files, $(((8 << 20) + 100000)) bytes checked, 0 damaged blocks" ]
	run "$CACHEFS" verify "$MNT/d" "$EXPORT/g" "$MNT/none"
	[ "$status" = 1 ]
	[[ $output == *"$MNT/d: is a directory"*"$EXPORT/g: is not a file of a cachefs"*"$MNT/none: No such file"* ]]
}

@test "verify says what it can't fetch again, and it is not served" {
	make_file "$EXPORT/f" 8M
	start_nfs
	start_cachefs nfs_timeout=2 cache_scrub=0
	cache_file f
	stop_nfs
	damage_data 3000000
	run "$CACHEFS" verify "$MNT/f"
	[ "$status" = 1 ]
	[[ ${lines[0]} == "$MNT/f: 1 damaged block, to be fetched again: "* ]]
	not cmp "$EXPORT/f" "$MNT/f"
	restart_nfs
	wait_until 30 same "$EXPORT/f" "$MNT/f"
	wait_complete "$MNT/f"
}

@test "damage on the disk is found in the background, of files in use and of others" {
	make_file "$EXPORT/f" 8M
	make_file "$EXPORT/g" 3M
	start_nfs
	start_cachefs cache_scrub=0
	cache_file f
	cache_file g
	stop_cachefs
	damage_data 1000000		# in both
	start_cachefs cache_scrub=1G
	exec 8<"$MNT/g"
	wait_until 20 eval '[ "$(stat_of checksum_errors)" = 2 ]'
	exec 8<&-
	same "$EXPORT/f" "$MNT/f"
	same "$EXPORT/g" "$MNT/g"
	[ "$(stat_of backend_read_bytes)" -le $((2 << 20)) ]
	wait_complete "$MNT/f"
	wait_complete "$MNT/g"
	stop_cachefs
	start_cachefs cache_scrub=1G
	wait_until 20 eval '[ "$(stat_of scrubbed_bytes)" -ge $((11 << 20)) ]'
	[ "$(stat_of checksum_errors)" = 0 ]
}
