#!/bin/bash
# run-fuzz.sh NAME...: run build/fuzz/NAME on tests/corpus/NAME for FUZZ_S
# seconds (60), all at once; a line of TAP each, and at the end "N passed, N
# failed".  A crash, a leak, an input that takes longer than 10 s or 1 GB of
# memory is a failure; the input lies beside the log then.
set -u
cd "$(dirname "$0")/../build/fuzz" || exit 2
corpus=../../tests/corpus
secs=${FUZZ_S:-60}
passed=0 failed=0 pids=()

trap 'kill "${pids[@]}" 2>/dev/null' EXIT
for name; do
	mkdir -p "$name.found"
	rm -f "$name"-*
	timeout -k 10 $((secs + 120)) "./$name" -max_total_time="$secs" \
	    -timeout=10 -rss_limit_mb=1024 -max_len=4096 \
	    -print_final_stats=1 -artifact_prefix="$name-" "$name.found" \
	    "$corpus/$name" >"$name.log" 2>&1 </dev/null &
	pids+=($!)
done
for name; do
	if wait "${pids[$((passed + failed))]}"; then
		passed=$((passed + 1))
		awk -v name="$name" '
		    /^stat::number_of_executed_units/ { runs = $2 }
		    /^stat::average_exec_per_sec/ { rate = $2 }
		    /^stat::new_units_added/ { new = $2 }
		    END { printf "ok - fuzz %s: %d inputs, %d a second, " \
			"%d new\n", name, runs, rate, new }' "$name.log"
	else
		failed=$((failed + 1))
		tail -n 60 "$name.log" | sed 's/^/# /'
		echo "not ok - fuzz $name: see build/fuzz/$name.log," \
		    "input" "$name"-*
	fi
done
pids=()
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
