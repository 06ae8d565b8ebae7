#!/usr/bin/env bats
# Everything at once on one mount.  `soak 600` by hand is the full measure.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

soak() { # ARG...
	need root fuse nfs
	export NFS_STATE=$WORK/nfs
	undo stop_nfs			# if it was killed
	TMPDIR=$WORK CACHEFS=$CACHEFS "$TESTS/soak" "$@"
}

@test "a minute of readers, faults, evictions and new versions: right bytes, and nothing leaked" {
	soak "${SOAK_MINUTES:-1}"
}
