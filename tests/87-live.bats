#!/usr/bin/env bats
# The configuration of a mount that runs, or is to be: SIGHUP, SIGUSR1, check.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

setup() {
	common_setup
	INI=$WORK/cachefs.ini
	BACKEND=$EXPORT
}

# The ini file, with LINE... (section.key=value) in their sections.
ini() { # LINE...
	local line
	printf '[nfs]\nbackend = %s\n[cache]\ndir = %s\n' "$BACKEND" "$CACHE" \
	    >"$INI"
	for line; do
		printf '[%s]\n%s\n' "${line%%.*}" "${line#*.}" >>"$INI"
	done
}

logged() { grep -qE -e "$1" "$LOG"; }

# Have the file read again, and see REGEX in the log for it.
reread() { # REGEX
	: >"$LOG"
	kill -HUP "$CACHEFS_PID"
	wait_until 10 logged "$1"
}

@test "SIGHUP changes the cap at once, down and up" {
	for i in 1 2 3 4; do make_file "$EXPORT/$i" 2M; done
	ini cache.size=32M
	launch -f -c "$INI" "$MNT"
	"$CACHEFS" warm -q "$MNT"
	[ "$(stat_of cache_limit_bytes)" = $((32 << 20)) ]
	ini cache.size=5M
	reread 'cache_size has changed'
	[ "$(stat_of cache_limit_bytes)" = $((5 << 20)) ]
	fits() { [ "$(stat_of cache_used_bytes)" -le $((5 << 20)) ]; }
	wait_until 20 fits
	ini cache.size=32M
	reread 'cache_size has changed'
	"$CACHEFS" warm -q "$MNT"
	for i in 1 2 3 4; do same "$EXPORT/$i" "$MNT/$i"; done
}

@test "SIGHUP changes filters, sizes and fill for what is opened next" {
	for f in a.bin b.tmp c.bin d.bin; do make_file "$EXPORT/$f" 1M; done
	ini cache.exclude='*.bin' cache.fill=100
	launch -f -c "$INI" "$MNT"
	cat "$MNT/a.bin" >/dev/null
	[ "$(state_of "$MNT/a.bin")" = absent ]
	ini cache.exclude='*.tmp' cache.fill=0
	reread 'cache_exclude has changed'
	logged 'cache_fill has changed'
	head -c 1 "$MNT/c.bin" >/dev/null
	wait_complete "$MNT/c.bin"
	cat "$MNT/b.tmp" >/dev/null
	[ "$(state_of "$MNT/b.tmp")" = absent ]
	ini cache.fill=0 cache.min_file_size=2M
	reread 'cache_min_file_size has changed'
	cat "$MNT/d.bin" >/dev/null
	[ "$(state_of "$MNT/d.bin")" = absent ]
	[ "$(stat_of bypass.too_small)" -ge 1 ]
}

@test "SIGHUP changes the policy of eviction, with what it knows of use" {
	for f in a b c d e; do make_file "$EXPORT/$f" 4M; done
	ini cache.size=18M cache.fill=0 cache.scrub=0
	launch -f -c "$INI" "$MNT"
	for f in a a a b c d; do
		cat "$MNT/$f" >/dev/null
		wait_complete "$MNT/$f"
	done
	for f in 'a 3' 'b 1' 'c 1' 'd 1'; do
		# shellcheck disable=SC2086 # two words
		wait_until 20 used_is $f
	done
	ini cache.size=18M cache.fill=0 cache.scrub=0 cache.eviction=lfu
	reread 'cache_eviction has changed'
	cat "$MNT/e" >/dev/null
	wait_complete "$MNT/e"
	[ "$(state_of "$MNT/a")" = complete ]
	[ "$(state_of "$MNT/b")" = absent ]
}

@test "SIGHUP changes the ttl, and how much is logged" {
	echo one >"$EXPORT/f"
	ini cache.consistency=ttl cache.ttl=3600 log.level=debug
	launch -f -c "$INI" -o fuse_attr_timeout=0,fuse_entry_timeout=0 "$MNT"
	[ "$(cat "$MNT/f")" = one ]
	echo second >"$EXPORT/new" && mv "$EXPORT/new" "$EXPORT/f"
	[ "$(cat "$MNT/f")" = one ]
	ini cache.consistency=ttl cache.ttl=0 log.level=info
	reread 'cache_ttl has changed'
	[ "$(cat "$MNT/f")" = second ]
	ini cache.consistency=ttl cache.ttl=0 log.level=error
	reread 'log_level has changed'
	: >"$LOG"
	kill -HUP "$CACHEFS_PID"
	kill -USR1 "$CACHEFS_PID"
	cat "$MNT/.cachefs/stats" >/dev/null
	[ ! -s "$LOG" ]
}

@test "SIGHUP names what cannot change without a mount, and -o still wins" {
	ini cache.block_size=1M nvme.queue_depth=7 cache.fill=50
	launch -f -c "$INI" -o cache_fill=20 "$MNT"
	reread 'nothing has changed'
	ini cache.block_size=64K nvme.queue_depth=7 cache.fill=60
	reread 'cache_block_size changes with the next mount'
	not logged cache_fill
	not logged queue_depth
	make_file "$EXPORT/f" 1M
	ini cache.checksum=no
	reread 'cache_checksum changes with the next mount'
	"$CACHEFS" warm -q "$MNT/f"
	"$CACHEFS" verify "$MNT/f" >"$WORK/said.log"
	cat "$WORK/said.log" >&2
	grep -q ' 1048576 bytes checked' "$WORK/said.log"
}

@test "SIGHUP of a broken file changes nothing, and says why" {
	ini cache.size=32M
	launch -f -c "$INI" "$MNT"
	ini cache.size=16M cache.fill=300
	reread 'fill = 300: the value is out of range'
	wait_until 10 logged 'stays as it was'
	[ "$(stat_of cache_limit_bytes)" = $((32 << 20)) ]
	ini cache.size=16M cache.min_file_size=2M cache.max_file_size=1M
	reread 'less than cache_min_file_size'
	rm "$INI"
	reread 'cannot read .*cachefs.ini: No such file'
	[ "$(stat_of cache_limit_bytes)" = $((32 << 20)) ]
	ini cache.size=16M
	reread 'cache_size has changed'
	[ "$(stat_of cache_limit_bytes)" = $((16 << 20)) ]
}

@test "a daemon that was started with a relative path reads the same file again" {
	ini cache.size=32M log.target=syslog
	cd "$WORK"
	need fuse
	undo force_unmount "$MNT"
	"$CACHEFS" -c cachefs.ini "$MNT"
	CACHEFS_PID=$(daemon_of "$MNT")
	echo "$CACHEFS_PID daemon" >"$MNT.pid"
	cd /
	ini cache.size=16M log.target=syslog
	kill -HUP "$CACHEFS_PID"
	changed() { [ "$(stat_of cache_limit_bytes)" = $((16 << 20)) ]; }
	wait_until 10 changed
}

@test "SIGHUP and SIGUSR1 by the hundred while files are read" {
	make_file "$EXPORT/f" 32M
	ini cache.exclude='x y z'
	launch -f -c "$INI" "$MNT"
	for i in $(seq 50); do
		ini cache.exclude="x $i" cache.fill="$i" cache.size=$((64 + i))M
		kill -HUP "$CACHEFS_PID"
		kill -USR1 "$CACHEFS_PID"
		cmp "$EXPORT/f" "$MNT/f"
		"$CACHEFS" evict "$MNT/f"
	done
}

@test "SIGUSR1 logs the statistics, in one line" {
	ini
	launch -f -c "$INI" "$MNT"
	kill -USR1 "$CACHEFS_PID"
	wait_until 10 logged '^cachefs: statistics: \{"state":"online".*\}$'
}

@test "SIGTERM during fills ends within 5 s, and what was cached stays so" {
	make_file "$EXPORT/f" 512M
	cached() { "$CACHEFS" ls -j "$MNT/f" | jq .cached; }
	some() { [ "$(cached)" -gt $((64 << 20)) ]; }
	BACKEND=$EXPORT
	start_cachefs cache_fill=0
	head -c 1 "$MNT/f" >/dev/null	# and then it is not open any more
	wait_until 20 some
	before=$(cached)
	rm "$MNT.pid"
	kill -TERM "$CACHEFS_PID"
	wait_until 5 gone "$CACHEFS_PID"
	wait "$CACHEFS_PID"
	not is_mounted
	start_cachefs cache_fill=100
	[ "$(cached)" -ge "$before" ]
}

@test "check says ok for all that a mount needs, and leaves nothing" {
	need fuse
	start_nfs
	for b in "$EXPORT" "$NFS_URL"; do
		BACKEND=$b
		"$CACHEFS" check -o "$(cachefs_opts)" >"$WORK/said.log" \
		    2>"$WORK/stderr"
		cat "$WORK/said.log" >&2
		for what in configuration server 'cache disk' io_uring mount \
		    passthrough; do
			grep -qE "^$what +ok " "$WORK/said.log"
		done
		[ "$(wc -l <"$WORK/said.log")" = 6 ]
		[ ! -s "$WORK/stderr" ]
	done
	[ ! -e "$CACHE" ]
	not grep cachefs-check /proc/self/mounts
	ini
	"$CACHEFS" check -c "$INI" | grep -q "^configuration  *ok *$INI$"
}

@test "check of a cache in use says so, and does not disturb" {
	echo one >"$EXPORT/f"
	start_cachefs
	[ "$(cat "$MNT/f")" = one ]
	"$CACHEFS" check -o "$(cachefs_opts)" >"$WORK/said.log" 2>"$WORK/stderr"
	grep -q "in use by process $CACHEFS_PID" "$WORK/stderr"
	not grep FAILED "$WORK/said.log"
	[ "$(cat "$MNT/f")" = one ]
	stop_cachefs
	start_cachefs
}

@test "check names what fails, goes on, and ends with 1; with 2 if it is misused" {
	failed() { # WHAT SENTENCE OPTS
		local rc=0
		timeout 60 "$CACHEFS" check -o "$3" >"$WORK/said.log" \
		    2>"$WORK/stderr" || rc=$?
		cat "$WORK/said.log" "$WORK/stderr" >&2
		[ "$rc" = 1 ]
		grep -qE "^$1 +FAILED" "$WORK/said.log"
		grep -qE "$2" "$WORK/stderr"
	}
	failed server 'cannot connect' \
	    "nfs_backend=nfs://127.0.0.1:1/x,cache_dir=$CACHE,nfs_timeout=5"
	grep -qE '^cache disk +ok' "$WORK/said.log"
	mkdir "$WORK/open"
	chmod 755 "$WORK/open"
	failed 'cache disk' 'lets others in' \
	    "nfs_backend=$EXPORT,cache_dir=$WORK/open"
	[ -z "$(ls -A "$WORK/open")" ]
	refuses 2 'no backend' -- check -o cache_dir="$CACHE"
	refuses 2 'out of range' -- check -o cache_fill=101
	not "$CACHEFS" check a b 2>"$WORK/stderr"
	grep -q 'too many arguments: b' "$WORK/stderr"
	start_cachefs
	stop_cachefs
	failed 'cache disk' 'another backend' \
	    "nfs_backend=$WORK,cache_dir=$CACHE"
}

@test "check tells a mount that is refused from passthrough that is" {
	need root fuse
	not setpriv --bounding-set -sys_admin env PATH=/nonexistent \
	    "$(realpath "$CACHEFS")" check -o "$(cachefs_opts)" \
	    >"$WORK/said.log" 2>"$WORK/stderr"
	cat "$WORK/said.log" >&2
	grep -qE '^mount +FAILED' "$WORK/said.log"
	not grep ^passthrough "$WORK/said.log"
	[ ! -e "$CACHE" ]
	"$CACHEFS" check -o "$(cachefs_opts fuse_passthrough=no)" |
	    grep -qE '^passthrough +ok +off: configured'
}
