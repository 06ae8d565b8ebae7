#!/bin/bash
# run-tests.sh BINARY [BATS-FILE...]: the unit tests, then the bats files (all
# of tests/ unless named), against BINARY.  Prints their TAP, a file's when that is
# through; the last line is "N passed, N failed", and the exit status is 0 only if
# none failed and some passed.  The same line is left in build/result.
#
#	LANES			files that run beside each other (4: tests mostly
#				wait; two cores are busy then)
#	UNIT			unit test program (build/unit; empty: none)
#	BATSFLAGS		more arguments for bats
#	BATS_TEST_TIMEOUT	seconds for one test (180)
#	CACHEFS_ALLOW_SKIP	ERE: skips with such a reason count as neither
#				passed nor failed; every other is a failure
#	SANITIZER_LOG		sanitizer log_path: each report is a failure
#
# The tests find the program in $CACHEFS, and one with fault hooks in
# $CACHEFS_TEST_BIN; both paths are absolute.
set -u

binary=$(realpath "${1:?usage: run-tests.sh BINARY [BATS-FILE...]}") || exit 2
[ -x "$binary" ] || { echo "$binary: cannot be executed" >&2; exit 2; }
shift
files=()
for f; do
	files+=("$(realpath "$f")")
done
cd "$(dirname "$0")/.." || exit 2
# What takes longest begins first.  What goes on at random for a time is short, or
# left to `make check-long`.
if [ ${#files[@]} -eq 0 ]; then
	files=(tests/60-fault.bats tests/75-hostile.bats tests/50-persist.bats
	    tests/40-read.bats tests/65-offline.bats tests/55-crash.bats)
	for f in tests/*.bats; do
		[[ " ${files[*]} tests/75-soak.bats " == *" $f "* ]] ||
			files+=("$f")
	done
	export CONSISTENCY_SECONDS=${CONSISTENCY_SECONDS:-5}
fi

unit=${UNIT-build/unit}
export CACHEFS=$binary CACHEFS_TEST_BIN=${CACHEFS_TEST_BIN:-$binary}
export BATS_TEST_TIMEOUT=${BATS_TEST_TIMEOUT:-180}
allow=${CACHEFS_ALLOW_SKIP:-}
log=${SANITIZER_LOG:-}
passed=0 failed=0 skipped=0 failures=()

fail() { failed=$((failed + 1)); failures+=("$1"); }

# Stream TAP from standard input and count it.
count()
{
	local line plan=-1 seen=0 reason
	local plan_re='^1\.\.([0-9]+)'
	local skip_re='^ok [0-9]+ .*# [Ss][Kk][Ii][Pp] *(.*)$'
	while IFS= read -r line || [ -n "$line" ]; do
		printf '%s\n' "$line"
		if [[ $line =~ $plan_re ]]; then
			plan=${BASH_REMATCH[1]}
		elif [[ $line =~ $skip_re ]]; then
			seen=$((seen + 1))
			reason=${BASH_REMATCH[1]}
			if [ -n "$allow" ] && [[ $reason =~ $allow ]]; then
				skipped=$((skipped + 1))
			else
				fail "$line"
			fi
		elif [[ $line =~ ^ok\ [0-9]+ ]]; then
			seen=$((seen + 1))
			passed=$((passed + 1))
		elif [[ $line =~ ^not\ ok\ [0-9]+ ]]; then
			seen=$((seen + 1))
			fail "$line"
		fi
	done
	if [ "$plan" -gt "$seen" ]; then
		fail "$((plan - seen)) planned tests did not run"
		failed=$((failed + plan - seen - 1))
	fi
}

# Run NAME's command, count its TAP; a failure it does not own up to is one too.
run()
{
	local name=$1 before=$failed rc
	shift
	count < <("$@" 2>&1 </dev/null)
	wait $!
	rc=$?
	if [ $rc -ne 0 ] && [ "$failed" -eq "$before" ]; then
		fail "$name exited with status $rc"
	fi
}

[ -z "$log" ] || rm -f "$log".*
if [ -n "$unit" ]; then
	echo "# $unit"
	run "$unit" timeout -k 5 600 "$unit"
fi
# Where the tests are.  Mounts there are shared where they can be (root): what one
# test unmounts does not live on in the mount namespace of another.
TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/cf.XXXXXX") || exit 2
export TMPDIR
chmod 711 "$TMPDIR"
mount --bind "$TMPDIR" "$TMPDIR" 2>/dev/null && mount --make-shared "$TMPDIR"
declare -A lane=()			# which file a process runs
next=0
cleanup() {
	kill "${!lane[@]}" 2>/dev/null
	! mountpoint -q "$TMPDIR" || umount -l "$TMPDIR"
	rm -rf --one-file-system "$TMPDIR"
}
trap cleanup EXIT
trap 'exit 1' HUP INT TERM
echo "# bats, CACHEFS=$CACHEFS"
while [ "$next" -lt ${#files[@]} ] || [ ${#lane[@]} -gt 0 ]; do
	if [ "$next" -lt ${#files[@]} ] && [ ${#lane[@]} -lt "${LANES:-4}" ]; then
		# shellcheck disable=SC2086
		bats --tap --timing ${BATSFLAGS:-} "${files[next]}" \
		    >"$TMPDIR/$next.tap" 2>&1 </dev/null &
		lane[$!]=$next
		next=$((next + 1))
		continue
	fi
	wait -n -p ended "${!lane[@]}"
	rc=$?
	i=${lane[$ended]}
	unset "lane[$ended]"
	echo "# ${files[i]}"
	# shellcheck disable=SC2016	# for the other shell
	run "${files[i]}" sh -c 'cat "$1"; exit "$2"' - "$TMPDIR/$i.tap" "$rc"
done
while read -r p; do
	fail "left running: $p"
done < <(pgrep -af "$TMPDIR/")
if [ -n "$log" ]; then
	for f in "$log".*; do
		[ -s "$f" ] || continue
		fail "sanitizer report $f"
		sed 's/^/# /' "$f"
	done
fi

for f in "${failures[@]+"${failures[@]}"}"; do
	echo "# FAILED: $f"
done
[ $skipped -eq 0 ] || echo "# $skipped skipped, as allowed"
mkdir -p build
echo "$passed passed, $failed failed" | tee build/result
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
