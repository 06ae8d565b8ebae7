#!/usr/bin/env bats
# kill -9 and power cuts at any moment: the short form of tests/crash, which
# says what is looked at.  By hand, with more rounds, it is the full measure:
#	tests/crash -n 2000
# A failure is repeated by its seed, as far as threads can be.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

crash() { # PART ROUNDS
	CACHEFS_SLOW=$SLOW TMPDIR=$WORK timeout -k 30 $((170 * SLOW)) \
	    "$TESTS/crash" -n $(($2 / SLOW)) -p "$1" "$CACHEFS"
}

@test "what kill -9 leaves of a directory's cache is right, in bounds and cleared" {
	need root fuse
	crash dir 200
}

@test "what kill -9 leaves of an NFS export's cache is right, in bounds and cleared" {
	need root fuse nfs
	crash nfs 200
}

@test "what a power cut leaves of a cache is right, in bounds and cleared" {
	need root fuse loop
	crash power 150
}
