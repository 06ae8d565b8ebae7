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
