#!/usr/bin/env bats
# A server that lies (tests/evilnfs): whatever it says, the daemon lives, every
# process ends in time, nothing but the mount and the cache is touched, and what
# the server is honest about is read right.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2010,SC2012,SC2030,SC2031,SC2034,SC2164,SC2317

load helpers

POOL=16			# MiB

setup() {
	common_setup
	make_file "$EXPORT/good" 300K
	make_file "$EXPORT/evil" 200K
	mkdir "$WORK/outside"
	echo untouched >"$WORK/outside/file"
	echo good >"$WORK/mode"
	"$TESTS/evilnfs" "$WORK/mode" "$EXPORT" >"$WORK/evil.port" \
	    2>"$WORK/evil.log" 3>&- 4>&- </dev/null &
	undo end_process $!
	wait_until 10 test -s "$WORK/evil.port"
	NFS_URL=nfs://127.0.0.1/evil
	nfs_opts "$(<"$WORK/evil.port")" "$(<"$WORK/evil.port")"
}

# A mount that keeps nothing of what it was told, on an empty cache.
start_evil() {
	CACHE=$(mktemp -d -p "$WORK" cache.XXXXXX)
	start_cachefs nfs_timeout=1 nvme_buffer_memory=${POOL}M \
	    fuse_attr_timeout=0 fuse_entry_timeout=0 fuse_negative_timeout=0
}

be() { # MODE
	printf '%s' "$1" >"$WORK/mode.new"
	mv "$WORK/mode.new" "$WORK/mode"
}

# CMD ends by itself, well or not.  Its output is in $WORK/said.log.
ends() { # CMD...
	local rc=0
	timeout -k 2 $((40 * SLOW)) "$@" >"$WORK/said.log" 2>&1 || rc=$?
	case $rc in
	124 | 137) fail "mode $(<"$WORK/mode"): does not end: $*" ;;
	esac
}

attack() {
	ends ls -lR "$MNT/"
	ends stat "$MNT/evil" "$MNT/evildir" "$MNT/evillink"
	ends cat "$MNT/evil"
	ends head -c 1 "$MNT/evillink"
	ends readlink "$MNT/evillink"
	ends ls -a "$MNT/evildir"
	ends getfattr -d "$MNT/evil"
	ends df "$MNT"
}

# What is neither the mount nor the cache.
outside() {
	find "$WORK/outside" "$EXPORT" -printf '%p %y %s %T@ %C@\n' | sort
	find "$WORK" -mindepth 1 -maxdepth 1 ! -name 'cache.*' ! -name '*.log' \
	    ! -name 'san.*' ! -name 'mode*' -printf '%f\n' | sort
}

stats_answer() {	# a damaged reply may be in the way to them
	timeout 10 jq -e .state "$MNT/.cachefs/stats" >/dev/null 2>&1
}

alive() {
	running "$CACHEFS_PID"
	wait_until 5 stats_answer
	sanitizers_silent
}

# At its most the daemon has had so many MiB beside the pool.
memory_below() { # MIB
	! sanitized || return 0
	local kib
	kib=$(awk '/^VmHWM/ { print $2 }' "/proc/$CACHEFS_PID/status")
	[ "$kib" -lt $((($1 + POOL) << 10)) ] || fail "$kib KiB of memory"
}

# The cache holds nothing but files of its own names.
cache_is_clean() {
	local all
	all=$(find "$CACHE" -mindepth 1 ! -type d ! -type f)
	all+=$(find "$CACHE" -type f -printf '%P\n' | grep -vE \
	    '^(CACHEFS|lock|tree/server|(objects|tree)/[0-9a-f]{2}/[0-9a-f]{32}(\.idx|\.tmp)?)$') || :
	[ -z "$all" ] || fail "in the cache: $all"
}

# With MODE, of which evil and the other two are another version: CMD, and then
# all is well.
hostile() { # MODE [CMD...]
	local was mode=$1
	shift
	echo "--- $mode"
	is_mounted || start_evil
	be good
	good_is_good
	was=$(outside)
	be "$mode"
	${ATTACK-attack}
	alive
	[ $# = 0 ] || "$@"
	memory_below "${MIB:-64}"
	[ "$(outside)" = "$was" ] || diff <(echo "$was") <(outside)
	cache_is_clean
}

good_is_good() {
	same "$EXPORT/good" "$MNT/good"
	[ "$(cat "$MNT/sub/leaf")" = leaf ]
}

evil_is_right() {
	good_is_good
	same "$EXPORT/evil" "$MNT/evil"
}

# Reading FILE fails, with EIO or ESTALE: it is another file all the time.
evil_fails() { # [ERROR...]
	local result tenths
	good_is_good
	read -r result tenths < <(attempt "$MNT/evil")
	grep -qw "$result" <<<"${*:-EIO}" || fail "evil: $result, not ${*:-EIO}"
}

listing_fails() {
	good_is_good
	not ls "$MNT/evildir" 2>"$WORK/said.log"
	grep -q 'Input/output error' "$WORK/said.log"
}

lists() { # COUNT
	good_is_good
	[ "$(ls -f "$MNT/evildir" | wc -l)" = $(($1 + 2)) ]
}

@test "an honest evilnfs is a server like any other" {
	hostile good evil_is_right
}

possible_names() {
	good_is_good
	python3 - "$MNT/evildir" <<-'END'
		import os, sys
		names = sorted(os.listdir(os.fsencode(sys.argv[1])))
		assert names == [b"new\nline", b"nul", b"ok",
		                 b"\xff\xfe\x1b[2J"], names
	END
}

@test "names that can't be one are not shown, and the others are" {
	hostile names possible_names
	grep -q 'impossible name; skipped' "$LOG"
}

@test "a listing that goes in circles of any length ends with EIO" {
	for mode in stuck cycle:1 cycle:2 cycle:3 cycle:7 tailcycle:1 tailcycle:5
	do
		hostile "$mode" listing_fails
	done
	grep -q "the server's listing has no end" "$LOG"
}

@test "a listing without end ends with EIO, in bounded memory" {
	MIB=1024
	hostile endless listing_fails
}

@test "a reply with many entries is taken, one that is too long is not" {
	ATTACK=''
	hostile many:100000 listing_fails
	be good
	wait_until 10 state_is online
	hostile many:20000 lists 20000
	hostile same lists 100
}

@test "sizes beyond range are errors of that file" {
	for size in 9223372036854775808 18446744073709551615; do
		hostile "size:$size" evil_fails EIO
	done
	hostile size:9223372036854775807 evil_fails EIO ESTALE
	hostile size:200000000000000 evil_fails EIO ESTALE
}

@test "sizes and kinds that change with every reply harm nobody else" {
	hostile shrink evil_fails EIO ESTALE
	hostile flip good_is_good
	hostile fileid good_is_good
	hostile times good_is_good
}

@test "wrong kinds of file are shown as such, or as EIO" {
	hostile kind:2 evil_fails EISDIR
	hostile kind:5 evil_fails ENOENT ELOOP EIO
	for kind in 0 8 9 4294967295; do
		hostile "kind:$kind" evil_fails EIO
	done
	hostile readkind evil_fails EIO
}

@test "a root that is no directory for a while does not end the mount" {
	start_evil
	good_is_good
	for kind in 1 5 0; do
		be "root:$kind"
		ends ls -l "$MNT/"
		not ls "$MNT/good"
		be good
		good_is_good
	done
	alive
}

@test "less or more data than was asked for is no harm, none is an error" {
	hostile short:1000 evil_is_right
	hostile more:8192 evil_is_right
	hostile count:0xffffffff evil_is_right
	hostile noattr evil_is_right
	hostile zero evil_fails EIO ESTALE
	hostile zero:eof evil_fails EIO ESTALE
}

@test "data that comes after its request was given up is not used" {
	hostile late:3.5 evil_fails EIO
	be late:2.5
	ends cat "$MNT/evil"
	be good
	wait_until 10 state_is online
	wait_until 10 same "$EXPORT/evil" "$MNT/evil"
}

@test "file handles may have 0 to 64 bytes" {
	hostile fh:64 evil_is_right
	for len in 65 1000 60000; do
		hostile "fh:$len" evil_fails EIO
	done
	hostile fh:0 evil_fails EIO ESTALE
}

links_to() { # TEXT
	good_is_good
	[ "$(readlink "$MNT/evillink")" = "$1" ]
}

no_link() {
	good_is_good
	not readlink "$MNT/evillink"
}

@test "a link's text ends at a NUL; one that is too long is an error" {
	hostile 'link:go\x00od' links_to go
	hostile link:x:4095 links_to "$(printf 'x%.0s' {1..4095})"
	hostile link:/../../..:1 links_to /../../..
	hostile link::1 links_to ''
	for mode in link:x:4096 link:x:65536 link:a/:32768; do
		hostile "$mode" no_link
	done
	not grep -q 'fuse: writing device' "$LOG"
}

@test "what is no status of NFS is EIO" {
	for status in 5 72 10099 3735928559 0x80000000 0xffffffff; do
		hostile "status:$status" evil_fails EIO
	done
	hostile rtmax:0 evil_is_right
	hostile fsstat evil_is_right
}

few() {
	ends ls "$MNT/evildir"
	ends readlink "$MNT/evillink"
}

@test "lengths beyond the reply's end are errors, not crashes of libnfs" {
	ATTACK=few
	for n in 0x80000000 0x7fffffff 0xfffffff0; do
		hostile "length:$n" evil_fails EIO
	done
}

# A read fails with EIO, after the timeout of 1 s of each of the two requests
# that it takes, and 2 s.
garbage() { # MODE
	local result tenths
	echo "--- $1"
	be "$1"
	read -r result tenths < <(attempt "$MNT/evil")
	echo "$result after $tenths/10 s"
	[ "$result" = EIO ]
	[ "$tenths" -le $((40 * SLOW)) ]
	alive
	be good
	wait_until 10 state_is online
	wait_until 10 good_is_good
}

@test "replies that are none: EIO in time, and all recovers" {
	start_evil
	was=$(outside)
	for mode in truncate:0 truncate:30 mark:0x7fffffff xid garbage accept:4 \
	    deny:1 mute close cut; do
		garbage "$mode"
	done
	be twice
	evil_is_right
	be verifier:100000
	evil_is_right
	memory_below 64
	[ "$(outside)" = "$was" ]
}

@test "a mountd that lies is refused with a sentence" {
	opts="$(cachefs_opts),nfs_timeout=1"
	for mode in mnt:13:8:1 mnt:0x80000000:8:1 mnt:77777:8:1 mnt:0:65:1 \
	    mnt:0:8:0x40000001 mnt:0:8:0xffffffff mnt:0:60000:1; do
		echo "--- $mode"
		be "$mode"
		refuses 1 evil -- -o "$opts" "$MNT"
	done
}

# For so many seconds, and with the sanitizers where that has been built, replies
# are good but for some bytes: FUZZ_S (60; without sanitizers, 10).
fuzz_time() {
	secs=10
	if [ -x "$ROOT/build/asan/cachefs" ]; then
		CACHEFS=$ROOT/build/asan/cachefs
		secs=60
	fi
	export LSAN_OPTIONS=suppressions=$TESTS/lsan.supp:print_suppressions=0
	secs=${FUZZ_S:-$secs}
}

@test "replies with random damage crash nobody" {
	fuzz_time
	start_evil
	was=$(outside)
	end=$((SECONDS + secs)) seed=$((${FUZZ_SEED:-1} - 1))
	while [ "$SECONDS" -lt "$end" ]; do
		seed=$((seed + 1))
		be "mutate:$seed:0.2"
		attack
		ends cat "$MNT/good"
		ends cat "$MNT/sub/leaf"
		running "$CACHEFS_PID" || fail "dead of seed $seed"
	done
	echo "# seeds up to $seed" >&3
	alive
	be good
	wait_until 10 state_is online
	alive
	[ "$(outside)" = "$was" ]
	stop_cachefs
	cache_is_clean
}

# Replies of a real server by the other version, damaged on their way.
@test "NFSv4: replies with random damage crash nobody" {
	fuzz_time
	EXPORT=$WORK/real
	mkdir "$EXPORT" "$EXPORT/evildir" "$EXPORT/sub"
	make_file "$EXPORT/good" 300K
	make_file "$EXPORT/evil" 200K
	ln -s good "$EXPORT/evillink"
	touch "$EXPORT/evildir"/{1..100}
	echo leaf >"$EXPORT/sub/leaf"
	seed=${FUZZ_SEED:-$SRANDOM}
	NFS_VERSION=4
	start_nfs
	start_proxy -g "$seed"
	start_evil
	good_is_good
	was=$(outside)
	proxy_signal CONT
	end=$((SECONDS + secs))
	while [ "$SECONDS" -lt "$end" ]; do
		attack
		ends cat "$MNT/good"
		ends cat "$MNT/sub/leaf"
		running "$CACHEFS_PID" || fail "dead of seed $seed"
	done
	proxy_signal CONT
	wait_until 20 state_is online
	alive
	[ "$(outside)" = "$was" ]
	stop_cachefs
	cache_is_clean
	start_evil			# damage may have been cached as good
	good_is_good
}
