#!/usr/bin/env bats
# The unit, and what the daemon tells a service manager.  (`make check-packages`
# has the unit run by a systemd.)
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

# Mount as cachefs@.service does; see manager.py.
start_managed() { # [OPT...]
	need root fuse
	rm -f "$WORK/notify" "$WORK/said"
	# Where systemd runs, all mounts are shared: an unmount is seen inside.
	if [ ! -e "$WORK/shared" ]; then
		mkdir "$WORK/shared"
		mount --bind "$WORK/shared" "$WORK/shared"
		undo umount -l "$WORK/shared"
		mount --make-private "$WORK/shared"	# of its own
		mount --make-shared "$WORK/shared"
		MNT=$WORK/shared/mnt
		mkdir "$MNT"
	fi
	undo force_unmount "$MNT"
	background python3 "$TESTS/manager.py" "$WORK" "$CACHEFS" \
	    -o "$(cachefs_opts "$@")" "$MNT" >>"$LOG" 2>&1
	MANAGER=$!
	wait_until 20 said 'main: READY=1'
	undo end_managed
}

end_managed() {
	local lock=$CACHE/lock
	[ ! -s "$lock" ] || end_process "$(cat "$lock")"
}

said() { # REGEX
	grep -qE -e "$1" "$WORK/said" 2>/dev/null
}

@test "a mount made outside is served by a daemon in a namespace of its own" {
	make_file "$EXPORT/f" 5M
	BACKEND=$EXPORT start_managed
	same "$EXPORT/f" "$MNT/f"
	wait_complete "$MNT/f"
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of opens_passthrough)" -gt 0 ]
	# Not left in the store, where a mount would not die with its daemon.
	said 'main: FDSTOREREMOVE=1 \| FDNAME=cachefs'
	wait_until 10 said 'main: STATUS=Online; passthrough on; .* cached, 1 files, 1 of them whole'
	kill -TERM "$(cat "$CACHE/lock")"
	wait "$MANAGER"
	said 'main: STOPPING=1'
	not grep -i umount "$LOG"
	# What the unit has ExecStopPost for.
	not stat "$MNT/f" 2>"$WORK/error"
	grep -q 'not connected' "$WORK/error"
	umount "$MNT"
	not is_mounted
}

@test "the daemon of such a mount ends when that is unmounted" {
	make_file "$EXPORT/f" 1M
	BACKEND=$EXPORT start_managed
	same "$EXPORT/f" "$MNT/f"
	umount "$MNT"
	wait "$MANAGER"
}

@test "such a mount dies with its daemon, and the next -m clears it" {
	make_file "$EXPORT/f" 1M
	BACKEND=$EXPORT start_managed
	same "$EXPORT/f" "$MNT/f"
	kill -KILL "$(cat "$CACHE/lock")"
	not wait "$MANAGER"
	not cat "$MNT/f" 2>/dev/null
	BACKEND=$EXPORT start_managed
	same "$EXPORT/f" "$MNT/f"
	[ "$(grep -c " $MNT " /proc/self/mountinfo)" = 1 ]
	umount "$MNT"
	wait "$MANAGER"
}

@test "the service manager hears of reloads, of a server that is gone, and that all is well" {
	make_file "$EXPORT/f" 1M
	start_nfs
	start_managed nfs_timeout=1
	same "$EXPORT/f" "$MNT/f"
	kill -HUP "$(cat "$CACHE/lock")"
	wait_until 10 said 'main: RELOADING=1'
	: >"$WORK/said"
	wait_until 10 said 'main: WATCHDOG=1'
	kill_nfs
	wait_until 20 said 'main: STATUS=The server does not answer, serving what is cached; '
	restart_nfs
	wait_until 20 said 'main: STATUS=Online; '
	# A daemon that is stuck gives no sign of life.
	kill -STOP "$(cat "$CACHE/lock")"
	read -r -t 1 <>"$WORK/clock" || :
	: >"$WORK/said"
	read -r -t 2 <>"$WORK/clock" || :
	not said WATCHDOG
	kill -CONT "$(cat "$CACHE/lock")"
	wait_until 10 said 'main: WATCHDOG=1'
	umount "$MNT"
	wait "$MANAGER"
}

@test "-m without a service manager says so, and mounts nothing" {
	unset NOTIFY_SOCKET
	refuses 2 "NOTIFY_SOCKET is not set" -- -m \
	    -o "nfs_backend=$EXPORT,cache_dir=$CACHE" "$MNT"
	[ ! -e "$CACHE" ]
}

@test "the units are whole, and the sandbox's score is 3.0 at most" {
	need systemd-analyze
	mkdir "$WORK/units"
	for u in cachefs@.service cachefs-textfile.service \
	    cachefs-textfile.timer; do
		sed "s|/usr/sbin/cachefs-textfile|$ROOT/contrib/cachefs-textfile|
		    s|/usr/sbin/cachefs|$CACHEFS|" "$ROOT/contrib/$u" \
		    >"$WORK/units/${u/@/@mnt-x}"
	done
	systemd-analyze verify --man=no "$WORK/units"/* 2>"$WORK/said" || :
	not grep -F -e cachefs "$WORK/said"
	systemd-analyze security --offline=true --threshold=30 --no-pager \
	    "$WORK/units/cachefs@mnt-x.service" | tail -n 1
}
