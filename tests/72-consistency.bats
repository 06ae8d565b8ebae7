#!/usr/bin/env bats
# What each consistency mode promises, while the server's files change.
# `CONSISTENCY_SECONDS=600 bats 72-consistency.bats` is the full measure.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

keeps() { # MODE KIND [OPT...]
	local mode=$1 kind=$2 secs=${CONSISTENCY_SECONDS:-15}
	shift 2
	export CACHEFS_LIMIT=$((secs * 2 + 120))
	start_kind "$kind" cache_consistency="$mode" cache_ttl=2 "$@"
	timeout -s INT $((CACHEFS_LIMIT * SLOW)) "$TESTS/consistency" -t 2 \
	    "$mode" "$MNT" "$EXPORT" "$secs"
	echo "passthrough: $(stat_of opens_passthrough), buffered:" \
	    "$(stat_of opens_buffered), invalidated: $(stat_of invalidated)"
	stop_cachefs
}

@test "strict: no open and no attribute is behind the server, and none is torn" {
	keeps strict v3
}

@test "open: no open is behind the server, and none is torn" {
	keeps open v3
}

@test "ttl: no open is further behind the server than its ttl, and none is torn" {
	keeps ttl v3
}

@test "immutable: a complete file never changes, and none is torn" {
	keeps immutable v3
}
