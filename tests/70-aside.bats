#!/usr/bin/env bats
# Files replaced under their readers: no error, no torn, mixed or stale data.
# `aside-stress.py` by hand, for longer, is the full measure.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

stress() { # HOLD [OPT...]
	local hold=$1 lenient=()
	shift
	[ "$KIND" = dir ] || lenient=(-s)
	start_kind "$KIND" "$@"
	timeout $((60 * SLOW)) "$TESTS/aside-stress.py" "${lenient[@]}" "$MNT" \
	    "$EXPORT" "$hold" "${ASIDE_SECONDS:-5}"
	stop_cachefs
}

setup() {
	common_setup
	echo 'version0 ' >"$EXPORT/x"
	KIND=dir
}

@test "opens while a file is being replaced never fail and never mix versions" {
	stress 0
}

@test "opens never fail while many old versions are held" {
	stress 40
}

@test "opens never fail with attribute and entry timeouts of 0" {
	stress 3 fuse_attr_timeout=0 fuse_entry_timeout=0 fuse_negative_timeout=0
}

@test "opens never fail with attribute and entry timeouts of an hour" {
	stress 3 fuse_attr_timeout=3600 fuse_entry_timeout=3600
}

@test "opens never fail where files are never passthrough" {
	stress 3 fuse_passthrough=no
}

@test "opens never fail by NFSv3" {
	KIND=v3
	stress 3
}

@test "opens never fail with every file filled at its open" {
	stress 3 cache_fill=0
}

# Without it: the sentence.  It is switched on for the whole machine, for a while;
# whoever does not ask for it does not get it.
@test "by FUSE over io_uring, too; where that can't be had a sentence says so" {
	local param=/sys/module/fuse/parameters/enable_uring was opts
	opts=nfs_backend=$EXPORT,cache_dir=$CACHE,fuse_io_uring=yes
	if "$CACHEFS" -f -o "$opts" "$WORK/none" 2>&1 | grep -q 'built with'; then
		refuses 2 "fuse_io_uring=yes, but this cachefs was built with" \
		    "3.18" -- -f -o "$opts" "$MNT"
		return
	fi
	was=$(cat $param 2>/dev/null) || was=N
	[ "$was" = Y ] || refuses 1 "fuse_io_uring=yes, but the kernel" "6.14" \
	    "$param" -- -o "$opts,log_level=error" "$MNT"
	[ -w $param ] || return 0
	undo sh -c "echo $was >$param"
	echo Y >$param
	stress 3 fuse_io_uring=yes

	CACHE=$WORK/cache.nfs
	make_file "$EXPORT/f" 5M
	start_nfs
	start_proxy
	KIND=
	BACKEND='' start_cachefs fuse_io_uring=yes nfs_timeout=60 cache_fill=100
	grep -qx 'fuse-ring-0' "/proc/$CACHEFS_PID"/task/*/comm
	head -c 1M "$MNT/f" | cmp -n 1048576 - "$EXPORT/f"
	# Who waits for the server can be killed, and so can the mount.
	proxy_signal USR2
	tail -c 1M "$MNT/f" >/dev/null 2>&1 &
	wait_until 10 blocked $!
	kill -KILL $!
	wait_until 3 gone $!
	tail -c 1M "$MNT/f" >/dev/null 2>&1 &
	wait_until 10 blocked $!
	kill -TERM "$CACHEFS_PID"
	wait_until 10 gone "$CACHEFS_PID"
	wait "$CACHEFS_PID"
	rm "$MNT.pid"
	not wait $!
}

blocked() { # PID: it waits in the kernel, for a request
	grep -qsE 'fuse|folio_wait' "/proc/$1/stack"
}
