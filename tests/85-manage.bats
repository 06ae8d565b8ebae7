#!/usr/bin/env bats
# The cache as something one manages: warm, ls, evict, pin, stats.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

# A directory tree on the server: $1 files of 300 KiB in d/, and big.
some_files() { # COUNT
	local i
	mkdir -p "$EXPORT/d/e"
	for ((i = 1; i <= $1; i++)); do
		make_file "$EXPORT/d/f$i" 300K
	done
	make_file "$EXPORT/d/e/deep" 100K
	: >"$EXPORT/d/empty"
}

# CMD fails with STATUS and says REGEX, in one line.
says() { # STATUS REGEX ARG...
	local want=$1 regex=$2 rc=0
	shift 2
	timeout 60 "$CACHEFS" "$@" >"$WORK/stdout" 2>"$WORK/stderr" || rc=$?
	cat "$WORK/stderr" >&2
	[ "$rc" = "$want" ]
	[ "$(wc -l <"$WORK/stderr")" = 1 ]
	grep -qE -e "$regex" "$WORK/stderr"
}

# What ls -j says of FILE under KEY.
ls_of() { # KEY FILE
	"$CACHEFS" ls -j "$2" | jq -r ".$1"
}

complete_below() { # DIR -> how many files
	"$CACHEFS" ls -r -j "$1" | jq -r 'select(.size > 0) | .state' |
	    grep -c '^complete$' || :
}

@test "warm fetches trees whole, each byte once, and they survive kill -9" {
	some_files 20
	start_nfs
	start_cachefs cache_fill=100
	[ "$(complete_below "$MNT")" = 0 ]
	"$CACHEFS" warm "$MNT/d" >"$WORK/said.log"
	tail -n 1 "$WORK/said.log" | grep -qx \
	    '22 files, 6246400 bytes cached of 6246400'
	[ "$(complete_below "$MNT")" = 21 ]
	[ "$(stat_of backend_read_bytes)" = 6246400 ]
	kill_cachefs KILL
	start_cachefs cache_fill=100
	diff -r "$EXPORT/d" "$MNT/d"
	[ "$(stat_of backend_read_bytes)" = 0 ]
	"$CACHEFS" warm -q "$MNT/d" >"$WORK/quiet" 2>&1
	[ ! -s "$WORK/quiet" ]
	[ "$(stat_of backend_read_bytes)" = 0 ]
}

@test "warm takes its paths from a list too, also from standard input" {
	some_files 3
	BACKEND=$EXPORT start_cachefs
	printf '%s\n' "$MNT/d/f1" "$MNT/d/e" >"$WORK/list"
	"$CACHEFS" warm -T "$WORK/list" >&2
	[ "$(complete_below "$MNT")" = 2 ]
	echo "$MNT/d/f2" | "$CACHEFS" warm -n 1 -T - >&2
	[ "$(complete_below "$MNT")" = 3 ]
	[ "$(ls_of state "$MNT/d/f3")" = absent ]
	says 1 'nolist: No such file' warm -T "$WORK/nolist"
}

@test "what warm can't have cached is named with its reason, the rest is cached" {
	some_files 3
	make_file "$EXPORT/d/big" 2M
	make_file "$EXPORT/d/x.tmp" 10K
	BACKEND=$EXPORT start_cachefs cache_max_file_size=1M \
	    cache_exclude='*.tmp'
	! "$CACHEFS" warm "$MNT/d" "$MNT/none" >"$WORK/said.log" \
	    2>"$WORK/why.log" || fail "exit status 0"
	grep -q 'd/big: not cached: too big$' "$WORK/why.log"
	grep -q 'd/x.tmp: not cached: excluded$' "$WORK/why.log"
	grep -q 'none: No such file or directory$' "$WORK/why.log"
	[ "$(wc -l <"$WORK/why.log")" = 3 ]
	[ "$(complete_below "$MNT")" = 4 ]
}

@test "warm into a cache that is too small says so, and for which files" {
	for i in 1 2 3 4; do
		make_file "$EXPORT/f$i" 4M
	done
	make_file "$EXPORT/huge" 12M
	BACKEND=$EXPORT start_cachefs cache_size=9M
	wait_until 10 grep -q . <(stat_of state)
	! "$CACHEFS" warm "$MNT"/f* "$MNT/huge" >&2 2>"$WORK/why.log" ||
		fail "exit status 0"
	grep -qE 'f[1-4]: not cached: (evicted again|no space)' "$WORK/why.log"
	grep -q 'huge: not cached: too big$' "$WORK/why.log"
	[ "$(stat_of cache_used_bytes)" -le $((9 << 20)) ]
}

@test "warm waits for no server that is gone, and says what it lacks" {
	make_file "$EXPORT/f" 4M
	make_file "$EXPORT/g" 4M
	start_nfs
	start_cachefs nfs_timeout=2
	cache_file f
	ls -l "$MNT" >/dev/null
	stop_nfs
	! timeout 60 "$CACHEFS" warm "$MNT/f" "$MNT/g" >&2 2>"$WORK/why.log" ||
		fail "exit status 0"
	grep -q 'g: not cached: ' "$WORK/why.log"
	not grep -q 'f: not cached' "$WORK/why.log"
}

@test "a warm that is interrupted goes on where it was" {
	make_file "$EXPORT/f" 64M
	start_nfs
	start_proxy -r 400
	start_cachefs cache_fill=100
	some_cached() { [ "$(ls_of cached "$MNT/f")" -gt 0 ]; }
	"$CACHEFS" warm "$MNT/f" >&2 &
	wait_until 20 some_cached
	kill -INT $!
	wait $! || :
	"$CACHEFS" warm -q "$MNT/f"
	[ "$(stat_of backend_read_bytes)" = $((64 << 20)) ]
	same "$EXPORT/f" "$MNT/f"
}

@test "ls shows state, share, size, pin and last use; to be listed is no use" {
	some_files 3
	BACKEND=$EXPORT
	start_cachefs cache_fill=100
	"$CACHEFS" warm -q "$MNT/d/f1"
	head -c 100 "$MNT/d/f2" >/dev/null
	wait_until 20 grep -q . <(ls_of cached "$MNT/d/f2")
	"$CACHEFS" ls "$MNT/d" >"$WORK/said.log"
	grep -qE '^complete 100%  300K - .*/d/f1$' "$WORK/said.log"
	grep -qE '^absent +0%  300K - +never +.*/d/f3$' "$WORK/said.log"
	[ "$(wc -l <"$WORK/said.log")" = 4 ]	# not what is in d/e
	[ "$(ls_of size "$MNT/d/f1")" = 307200 ]
	[ "$(ls_of cached "$MNT/d/f1")" = 307200 ]
	used=$(ls_of used "$MNT/d/f1")
	[ "$used" -ge $(($(date +%s) - 60)) ] && [ "$used" -le "$(date +%s)" ]
	stop_cachefs
	find "$CACHE/objects" -name '*.idx' -exec touch -d @1000000 {} +
	start_cachefs cache_fill=100
	"$CACHEFS" ls "$MNT/d" >/dev/null
	[ "$(ls_of used "$MNT/d/f1")" = 1000000 ]
	head -c 1 "$MNT/d/f1" >/dev/null
	[ "$(ls_of used "$MNT/d/f1")" -ge "$used" ]
	printf x >"$EXPORT/"$'a"b\n\\c'
	"$CACHEFS" ls -j "$MNT/"$'a"b\n\\c' | jq -r .path | grep -qx '\\c'
}

@test "evict frees space at once, and the files are fetched anew" {
	some_files 5
	BACKEND=$EXPORT start_cachefs
	"$CACHEFS" warm -q "$MNT"
	"$CACHEFS" evict "$MNT/d/f1" "$MNT/d/e"
	[ "$(complete_below "$MNT")" = 4 ]
	[ "$(ls_of state "$MNT/d/f1")" = absent ]
	[ "$(stat_of evicted_objects)" = 2 ]
	[ "$(find "$CACHE/objects" -name '*.idx' | wc -l)" = 4 ]
	drop_caches
	same "$EXPORT/d/f1" "$MNT/d/f1"
	wait_complete "$MNT/d/f1"
	"$CACHEFS" evict "$MNT"
	[ "$(complete_below "$MNT")" = 0 ]
	[ -z "$(find "$CACHE/objects" -type f)" ]
	diff -r "$EXPORT" "$MNT"
}

@test "who has a file open that is evicted reads on" {
	make_file "$EXPORT/f" 8M
	BACKEND=$EXPORT
	start_cachefs
	cache_file f
	exec 5<"$MNT/f"
	head -c 1M <&5 >"$WORK/a"
	"$CACHEFS" evict "$MNT/f"
	[ "$(ls_of state "$MNT/f")" = absent ]
	# and who opens it then has it cached anew meanwhile
	"$CACHEFS" warm -q "$MNT/f"
	[ "$(ls_of state "$MNT/f")" = complete ]
	same "$EXPORT/f" "$MNT/f"
	cat <&5 >>"$WORK/a"
	exec 5<&-
	cmp "$EXPORT/f" "$WORK/a"
	stop_cachefs
	start_cachefs
	same "$EXPORT/f" "$MNT/f"
	[ "$(stat_of backend_read_bytes)" = 0 ]
}

@test "what is pinned is spared by evict and by eviction, also after a restart" {
	for i in 1 2 3 4 5 6; do
		make_file "$EXPORT/f$i" 2M
	done
	BACKEND=$EXPORT
	start_cachefs cache_size=8M
	"$CACHEFS" warm -q "$MNT/f1"
	"$CACHEFS" pin "$MNT/f1"
	[ "$(ls_of pinned "$MNT/f1")" = true ]
	says 1 'f1: is pinned' evict "$MNT/f1"
	wait_until 20 grep -qx 1 <(getfattr --only-values -n \
	    user.cachefs.pinned "$MNT/f1"; echo)
	stop_cachefs
	start_cachefs cache_size=8M
	for i in 2 3 4 5 6; do
		cat "$MNT/f$i" >/dev/null
	done
	some_evicted() { [ "$(stat_of evicted_objects)" -gt 0 ]; }
	wait_until 20 some_evicted
	[ "$(ls_of state "$MNT/f1")" = complete ]
	"$CACHEFS" unpin "$MNT/f1"
	[ "$(ls_of pinned "$MNT/f1")" = false ]
	"$CACHEFS" evict "$MNT/f1"
	[ "$(ls_of state "$MNT/f1")" = absent ]
}

@test "pins take no more than cache_pin_max, and only what is cached" {
	make_file "$EXPORT/f" 2M
	make_file "$EXPORT/g" 2M
	BACKEND=$EXPORT start_cachefs cache_pin_max=3M
	says 1 'f: nothing of it is cached' pin "$MNT/f"
	"$CACHEFS" warm -q "$MNT"
	"$CACHEFS" pin "$MNT/f"
	"$CACHEFS" pin "$MNT/f"
	says 1 'g: pinned files would take more than cache_pin_max'     pin "$MNT/g"
	"$CACHEFS" unpin "$MNT/f"
	"$CACHEFS" pin "$MNT/g"
}

@test "evict, pin and unpin are for root and the daemon's user; ls and warm for readers" {
	need root fuse
	in_the_open
	some_files 2
	BACKEND=$EXPORT start_cachefs fuse_allow_other=yes
	as() { setpriv --reuid 12345 --regid 12345 --clear-groups "$@"; }
	chmod 644 "$EXPORT/d"/*
	chmod 755 "$EXPORT/d/e"
	chmod 600 "$EXPORT/d/f2"
	as "$CACHEFS" warm -q "$MNT/d/f1"
	as "$CACHEFS" ls "$MNT/d/f1" | grep -q ^complete
	for op in evict pin unpin; do
		not as "$CACHEFS" $op "$MNT/d/f1" 2>"$WORK/why.log"
		grep -q 'f1: Operation not permitted' "$WORK/why.log"
	done
	not as "$CACHEFS" warm "$MNT/d/f2" 2>"$WORK/why.log"
	grep -q 'f2: not cached: Permission denied' "$WORK/why.log"
	[ "$(ls_of state "$MNT/d/f1")" = complete ]
}

@test "paths of no mount, and no paths, get a sentence and the right exit status" {
	BACKEND=$EXPORT start_cachefs
	for cmd in ls warm evict pin unpin; do
		says 2 'usage: cachefs '$cmd "$cmd"
		says 1 'helpers.bash: is not a file of a cachefs mount'     "$cmd" "$TESTS/helpers.bash"
		says 1 "$EXPORT: is not in a cachefs mount" "$cmd" "$EXPORT"
		says 1 'nothing: No such file' "$cmd" "$MNT/nothing"
		says 2 'invalid option.*Z' "$cmd" -Z "$MNT"
	done
	says 2 '-n 0: 1 to 64' warm -n 0 "$MNT"
	mkdir "$EXPORT/d"
	ln -s d "$EXPORT/link"
	"$CACHEFS" warm -q "$MNT/d" "$MNT/./" "$MNT"
	(cd "$MNT/d" && "$CACHEFS" warm -q . ..)
	# of many each is named
	not "$CACHEFS" ls "$MNT"/none{1..30} 2>"$WORK/why.log"
	[ "$(grep -c 'none[0-9]*: No such file' "$WORK/why.log")" = 30 ]
	kill_cachefs KILL
	says 1 'the daemon of this mount has ended' ls "$MNT"
	says 1 'the daemon of this mount has ended' stats "$MNT"
	force_unmount "$MNT"
	# where it was, and with nothing in it
	says 1 "$MNT: is not in a cachefs mount" warm "$MNT"
}

@test "stats fits a terminal, has bars, and repeats as rates" {
	make_file "$EXPORT/f" 4M
	BACKEND=$EXPORT start_cachefs cache_size=8M
	"$CACHEFS" warm -q "$MNT"
	"$CACHEFS" stats "$MNT" >"$WORK/said.log"
	[ "$(wc -l <"$WORK/said.log")" -le 24 ]
	[ "$(wc -L <"$WORK/said.log")" -le $((79 + ${#MNT})) ]
	grep -qE '^space   \[##########-+\]  50% of 8.0M: 1 files, 1 of them whole$' \
	    "$WORK/said.log"
	timeout 2 "$CACHEFS" stats -w 0.2 "$MNT" >"$WORK/rates" || :
	head -n 1 "$WORK/rates" | grep -q '^state .* hit/s .* errs/s$'
	[ "$(wc -l <"$WORK/rates")" -ge 3 ]
	timeout 2 "$CACHEFS" stats -j -w 0.2 "$MNT" >"$WORK/json" || :
	[ "$(jq -r .state <"$WORK/json" | sort -u)" = online ]
	for args in '-w 0' '-w x' '-j -p' '-p -w 1'; do
		# shellcheck disable=SC2086	# words
		says 2 'usage: cachefs stats' stats $args "$MNT"
	done
}

@test "stats -p is what Prometheus reads" {
	need promtool
	make_file "$EXPORT/f" 4M
	BACKEND=$EXPORT start_cachefs cache_size=8M cache_max_file_size=1M
	cat "$MNT/f" >/dev/null
	"$CACHEFS" stats -p "$MNT" >"$WORK/prom"
	PATH=$PATH:$ROOT/build/deps/promtool promtool check metrics <"$WORK/prom"
	grep -qE '^cachefs_bypass_total\{mount="[^"]*",reason="too_big"\} [1-9]' \
	    "$WORK/prom"
	grep -qE '^cachefs_state\{mount="[^"]*",state="online"\} 1$' "$WORK/prom"
	# each statistic is there, but for those of a line of their own
	"$CACHEFS" stats -j "$MNT" | jq -r 'to_entries[] |
	    select(.value | type == "number") | .key' |
	    sed 's/^uptime_s$/uptime_seconds/; s/^buffer_bytes_used$/buffer_used_bytes/' |
	    while read -r name; do
		grep -qE "^cachefs_$name(_total)?\{" "$WORK/prom" ||
			fail "no $name"
	done
}

# Mount $EXPORT once more, on $WORK/NAME.
one_more() { # NAME
	MNT=$WORK/$1 CACHE=$WORK/cache.$1
	mkdir -p "$MNT"
	BACKEND=$EXPORT start_cachefs
}

# Show FROM on TO, too.
bind() { # FROM TO
	mkdir "$2"
	mount --bind "$1" "$2"
	undo unbind "$2"
}

unbind() { # DIR...
	local dir
	for dir; do
		! mountpoint -q "$dir" || umount "$dir"
	done
}

# Prometheus reads FILE, and all of a metric stands together.
is_prom() { # FILE
	PATH=$PATH:$ROOT/build/deps/promtool promtool check metrics <"$1"
	awk -F '[{ ]' '/^#/ { next }
	    $1 != last && seen[$1]++ { print "apart: " $1; bad = 1 }
	    { last = $1 }
	    END { exit bad }' "$1"
}

# The textfile collector's script.  It finds all mounts of the machine; only
# ours are asked.
textfile() { # ARG...
	cat >"$WORK/ours" <<-END
		#!/bin/bash
		for a; do
			[[ \$a != /* || \$a == $WORK/* ]] && args+=("\$a")
		done
		exec $CACHEFS "\${args[@]}"
	END
	chmod +x "$WORK/ours"
	CACHEFS=$WORK/ours timeout $((30 * SLOW)) \
	    "$ROOT/contrib/cachefs-textfile" "$@"
}

@test "cachefs-textfile writes one file of all mounts, each once, that Prometheus reads" {
	need root promtool
	make_file "$EXPORT/d" 1K
	mkdir "$EXPORT/e" "$WORK/prom"
	one_more mnt1
	head -c 1 "$MNT/d" >/dev/null
	bind "$MNT" "$WORK/bound"
	# the second one is on a path with all that must be escaped
	one_more mnt2
	odd=$WORK/$'o \t"2"\\040\n'
	bind "$MNT/e" "$WORK/part"
	bind "$MNT" "$odd"
	umount "$MNT"
	echo old >"$WORK/prom/cachefs.prom"
	exec 5<"$WORK/prom/cachefs.prom"
	textfile "$WORK/prom"
	unbind "$WORK/bound" "$WORK/part" "$odd"
	is_prom "$WORK/prom/cachefs.prom"
	[ "$(grep -c '^cachefs_up{' "$WORK/prom/cachefs.prom")" = 2 ]
	for sample in 'up{mount="WORK/mnt1"} 1' \
	    'opens_buffered_total{mount="WORK/mnt1"} 1' \
	    $'up{mount="WORK/o \t\\"2\\"\\\\040\\n"} 1' \
	    $'opens_buffered_total{mount="WORK/o \t\\"2\\"\\\\040\\n"} 0'; do
		grep -qxF -e "cachefs_${sample/WORK/$WORK}" \
		    "$WORK/prom/cachefs.prom" || fail "no $sample"
	done
	# replaced, not written into; readable; nothing left behind
	[ "$(cat <&5)" = old ]
	[ "$(stat -c %a "$WORK/prom/cachefs.prom")" = 644 ]
	[ "$(ls -A "$WORK/prom")" = cachefs.prom ]
	not textfile "$WORK/noprom"
}

@test "cachefs-textfile reports mounts that live beside one that died and one that hangs" {
	need root promtool
	mkdir "$WORK/prom"
	one_more mnt1
	kill_cachefs KILL
	one_more mnt2
	kill -STOP "$CACHEFS_PID"
	one_more mnt3
	textfile "$WORK/prom" 2>"$WORK/why.log"
	kill -CONT "$(cat "$WORK/mnt2.pid")"
	is_prom "$WORK/prom/cachefs.prom"
	sed -nE "s|^cachefs_up\{mount=\"$WORK/(.*)\"\}|\1|p" \
	    "$WORK/prom/cachefs.prom" >"$WORK/up"
	diff - "$WORK/up" <<<$'mnt1 0\nmnt2 0\nmnt3 1'
	grep -q "^cachefs_state{mount=\"$WORK/mnt3\",state=\"online\"} 1" \
	    "$WORK/prom/cachefs.prom"
	[ "$(grep -c '^cachefs_objects{' "$WORK/prom/cachefs.prom")" = 1 ]
	[ "$(wc -l <"$WORK/why.log")" = 2 ]
	grep -q 'mnt1: the daemon of this mount has ended$' "$WORK/why.log"
	grep -q 'mnt2: the daemon does not answer$' "$WORK/why.log"
	force_unmount "$WORK/mnt1"
}

@test "the dashboard is one of Grafana, and asks for nothing that stats -p lacks" {
	need promtool
	local board=$ROOT/contrib/grafana-dashboard.json
	make_file "$EXPORT/f" 1M
	BACKEND=$EXPORT start_cachefs
	head -c 1 "$MNT/f" >/dev/null
	"$CACHEFS" stats -p "$MNT" >"$WORK/prom"
	# shellcheck disable=SC2016	# Grafana's variables
	jq -e '.schemaVersion >= 38 and .__inputs[0].pluginId == "prometheus" and
	    ([.templating.list[].name] == ["instance", "mount"]) and
	    ([.panels[].id] | length > 9 and length == (unique | length)) and
	    ([.panels[].title] | length == (unique | length)) and
	    all(.panels[], .templating.list[];
	    .datasource.uid == "${DS_PROMETHEUS}")' "$board"
	# no panel over another
	jq -e '[.panels[].gridPos | range(.x; .x + .w) as $x |
	    range(.y; .y + .h) as $y | [$x, $y]] |
	    length == (unique | length) and all(.[]; .[0] < 24)' "$board"
	jq -r '.panels[].targets[].expr' "$board" >"$WORK/exprs"
	jq -r '.templating.list[].query.query' "$board" >"$WORK/queries"
	cat "$WORK/exprs" "$WORK/queries" | grep -oE 'cachefs_[a-z_0-9]+' |
		sort -u >"$WORK/names"
	[ "$(wc -l <"$WORK/names")" -gt 20 ]
	while read -r name; do
		grep -q "^$name{" "$WORK/prom" || fail "stats -p has no $name"
	done <"$WORK/names"
	# and the labels with their values, as in state="online"
	grep -oE '[a-z]+="[^"]*"' "$WORK/exprs" | sort -u >"$WORK/labels"
	[ -s "$WORK/labels" ]
	while read -r label; do
		grep -qF ",$label" "$WORK/prom" || fail "stats -p has no $label"
	done <"$WORK/labels"
	# it is PromQL: as rules, which are JSON, and so YAML
	# shellcheck disable=SC2016
	sed 's/\$__rate_interval/1m/g' "$WORK/exprs" | jq -nR '{groups: [{
	    name: "board", rules: [inputs | {expr: .}] | to_entries |
	    map(.value + {record: "r\(.key)"})}]}' >"$WORK/rules.json"
	PATH=$PATH:$ROOT/build/deps/promtool promtool check rules \
	    "$WORK/rules.json"
}
