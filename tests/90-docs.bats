#!/usr/bin/env bats
# The documents say what the program says: its own -h, its statistics and the
# Makefile are compared with the manual, the example and the README.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

# The options of -h, as NAME=DEFAULT; "..." where there is none.
help_options() {
	"$CACHEFS" -h | sed -nE 's/^  ([a-z]+_[a-z_]+=[^ ]*)( .*)?$/\1/p' | sort
}

# The same of the manual: .It Cm KEY , Fl o Cm SECTION_KEY ... below .Ss Section
# [SECTION], and a line that begins with Default, or No default.
manual_options() {
	awk '
	/^\.Sh / { section = "" }
	/^\.Ss Section \[/ { section = substr($3, 2, length($3) - 2) }
	/^\.It Cm [a-z_]+ , Fl o Cm / {
		name = $8
		if (name != section "_" $3) {
			print "misplaced: " $0
			next
		}
		getline
		if (/^(No default|Default: the)/) value = "..."
		else if (/^Default: empty/) value = ""
		else if (/^Default$/ && getline && /^\.Ql /) value = $2
		else value = "(no default is given)"
		print name "=" value
	}' "$ROOT/cachefs.8" | sort
}

# The same of the example: ; KEY = VALUE, below [SECTION].
example_options() {
	sed -nE '
	/^\[.*\]$/ { s/^\[(.*)\]$/\1_/; h; d; }
	/^; / { s/^; ([a-z_]+) = ?(.*)$/\1=\2/; G; s/^(.*)\n(.*)$/\2\1/; p; }
	' "$ROOT/cachefs.ini.example" | sort
}

# The names between .It Va of the manual, a line each.
manual_statistics() {
	sed -n '/^\.Sh STATISTICS/,/^\.Sh SIGNALS/s/^\.It Va //p' \
	    "$ROOT/cachefs.8" | sed 's/ , /\n/g' | sort
}

# Both outputs are the same, and not empty.
alike() { # A B
	[ -s "$1" ]
	diff "$1" "$2"
}

@test "the manual has every option of -h with its default, and no other" {
	help_options >"$WORK/help"
	manual_options >"$WORK/manual"
	alike "$WORK/help" "$WORK/manual"
}

@test "the example has every option of -h with its default, and no other" {
	help_options >"$WORK/help"
	example_options >"$WORK/example"
	# What has no default has a value for show there.
	sed -n 's/=\.\.\.$//p' "$WORK/help" | while read -r name; do
		grep -q "^$name=." "$WORK/example" || fail "no $name"
		sed -i "s|^$name=.*|$name=...|" "$WORK/example"
	done
	alike "$WORK/help" "$WORK/example"
}

@test "the example sets nothing, and has a comment of one line for each key" {
	not grep -nE '^[^#;[]' "$ROOT/cachefs.ini.example"
	awk '/^; / && last !~ /^# / { print; bad = 1 } { last = $0 }
	    END { exit bad }' "$ROOT/cachefs.ini.example"
}

@test "the manual has every name that stats -j prints, and no other" {
	make_file "$EXPORT/f" 1M
	BACKEND=$EXPORT start_cachefs cache_fill=100
	head -c 1 "$MNT/f" >/dev/null
	"$CACHEFS" stats -j "$MNT" |
		jq -r 'paths(scalars) | join(".")' >"$WORK/names"
	grep -q '^bypass\.' "$WORK/names"
	# A reason is printed once it has occurred: all are in the source.
	sed -n '/^#define REASONS(X)/,/[^\\]$/p' "$ROOT/cachefs.c" |
		grep -oE 'X\([a-z_]+\)' | sed -E 's/X\((.*)\)/bypass.\1/' |
		sort -u - "$WORK/names" >"$WORK/all"
	[ "$(wc -l <"$WORK/all")" -gt "$(wc -l <"$WORK/names")" ]
	manual_statistics >"$WORK/manual"
	alike "$WORK/all" "$WORK/manual"
}

@test "the manual explains every message, and no other" {
	need python3
	"$TESTS/messages.py" "$ROOT/cachefs.c" "$ROOT/cachefs.8"
}

@test "the manual has every signal that the daemon takes, and no other but SIGKILL" {
	sed -nE 's/.*sigaddset\(&set, (SIG[A-Z0-9]+)\);.*/\1/p' \
	    "$ROOT/cachefs.c" | sort >"$WORK/taken"
	sed -n '/^\.Sh SIGNALS/,/^\.Sh FILES/s/^\.It Dv //p' "$ROOT/cachefs.8" |
		sed 's/ , /\n/g' | grep -vx SIGKILL | sort >"$WORK/manual"
	alike "$WORK/taken" "$WORK/manual"
}

@test "the manual has every exit status, and no other" {
	{ echo 0; echo 1	# EXIT_SUCCESS and EXIT_FAILURE
	sed -nE 's/^#define EXIT_[A-Z]+[[:space:]]+([0-9]+).*/\1/p' \
	    "$ROOT/cachefs.c" "$ROOT/cachefs.h"; } | sort >"$WORK/used"
	sed -n '/^\.Sh EXIT STATUS/,/^\.Sh EXAMPLES/s/^\.It //p' \
	    "$ROOT/cachefs.8" | sort >"$WORK/manual"
	[ "$(wc -l <"$WORK/used")" -gt 2 ]
	alike "$WORK/used" "$WORK/manual"
}

@test "the manual has every file of a cache, and no other" {
	mkdir "$EXPORT/d"
	make_file "$EXPORT/d/f" 1M
	start_nfs
	start_cachefs
	ls "$MNT/d" >/dev/null
	cache_file d/f
	stop_cachefs
	(cd "$CACHE" && find . -type f) | sed -E 's|^\.|DIR|
	    s|/[0-9a-f]{2}/|/xx/|; s|xx/[0-9a-f]+|xx/KEY|' | sort -u \
	    >"$WORK/files"
	sed -n '/^\.Sh FILES/,/^\.Sh EXIT/s/^\.It Pa //p' "$ROOT/cachefs.8" |
		grep ^DIR/ | sort >"$WORK/manual"
	alike "$WORK/files" "$WORK/manual"
}

@test "the manual has every subcommand and flag that -h has, and no other" {
	# "cachefs [-dfhmV] [-c FILE]" is "cachefs c d f h m V", "warm [-q]" "warm q".
	# shellcheck disable=SC2016	# for awk
	flags='{
		n = split($0, word, /[^A-Za-z-]+/)
		for (i = 1; i <= n; i++)
			if (word[i] ~ /^-[a-zA-Z]+$/)
				for (j = 2; j <= length(word[i]); j++)
					print $1, substr(word[i], j, 1)
		print $1
	}'
	"$CACHEFS" -h | sed '/^$/q' | sed -nE 's/^(usage:)? +cachefs ([a-z]+ )?(.*)/\2 \3/p' |
		sed 's/^ *\[-dfhmV\]/mount -dfhmV/' | awk "$flags" | sort -u >"$WORK/help"
	sed -n '/^\.Sh SYNOPSIS/,/^\.Sh DESC/p' "$ROOT/cachefs.8" | awk '
	/^\.Nm/ { print line; line = "mount"; next }
	/^\.Cm / { line = $2; next }
	{ while (match($0, /Fl [a-zA-Z|][a-zA-Z |]*/)) {
		f = substr($0, RSTART + 3, RLENGTH - 3)
		$0 = substr($0, RSTART + RLENGTH)
		sub(/ Ar.*/, "", f); gsub(/[ |]/, "", f)
		line = line " -" f
	} }
	END { print line }' | sed '/^$/d' | awk "$flags" | sort -u >"$WORK/manual"
	grep -qx 'warm T' "$WORK/help"
	alike "$WORK/help" "$WORK/manual"
}

@test "each line of ANCESTOR.md names a test that there is" {
	grep -E '^\|' "$ROOT/contrib/ANCESTOR.md" | grep -vE '^\|(---| There )' |
		sed -E 's/.*\| ([^|]*) \|$/\1/' >"$WORK/named"
	[ "$(wc -l <"$WORK/named")" -gt 60 ]
	while IFS= read -r line; do
		file=${line%%: *} name=${line#*: }
		case $file in
		unit) grep -qF "claim(\"$name\")" "$TESTS/unit.c" ;;
		*) grep -qxF "@test \"$name\" {" "$TESTS/$file.bats" ;;
		esac || fail "no test: $line"
	done <"$WORK/named"
}

@test "ANCESTOR.md and the manual have every name of the ancestor's that is taken" {
	sed -n '/^static const struct alias/,/^};/p' "$ROOT/cachefs.c" |
		sed -nE 's/^\t\{ "([a-z_]+)\*?".*/\1/p' >"$WORK/names"
	[ "$(wc -l <"$WORK/names")" -gt 10 ]
	sed -n '/^\.Ss Names of the ancestor/,/^\.Sh/p' "$ROOT/cachefs.8" \
	    >"$WORK/part"
	while read -r name; do
		grep -qw -- "$name" "$WORK/part" || fail "cachefs.8 lacks $name"
		grep -q "\`${name}[\`*=]" "$ROOT/contrib/ANCESTOR.md" ||
			fail "ANCESTOR.md lacks $name"
	done <"$WORK/names"
}

@test "TUNING has a word on all that the ancestor advised" {
	sed -n '/^\.Sh TUNING/,/^\.Sh /p' "$ROOT/cachefs.8" >"$WORK/part"
	for word in nvme_use_hugepages nvme_queue_depth nvme_polling_mode \
	    nvme_io_poll noatime fuse_readahead read_ahead_kb scheduler \
	    cache_block_size nvme_direct_io cache_eviction vm.dirty_ratio; do
		grep -q "$word" "$WORK/part" || fail "TUNING lacks $word"
	done
}

@test "every option and statistic that the manual mentions is one" {
	{ help_options | sed 's/=.*//'
	manual_statistics
	sed -n '/^static const struct alias/,/^};/p' "$ROOT/cachefs.c" |
		grep -oE '[a-z]+_[a-z_]+'; } | sort -u >"$WORK/known"
	grep -oE '\b((nfs|cache|nvme|fuse|log)_|bypass\.)[a-z_]+' \
	    "$ROOT/cachefs.8" | sort -u >"$WORK/said"
	[ "$(wc -l <"$WORK/said")" -gt 40 ]
	comm -13 "$WORK/known" "$WORK/said" >"$WORK/unknown"
	diff /dev/null "$WORK/unknown"
}

@test "the manual has no fault that mandoc would warn of" {
	need mandoc
	mandoc -T lint -W warning "$ROOT/cachefs.8"
}

@test "what the README says to make, the Makefile makes" {
	grep -E '^    (sudo )?make\b' "$ROOT/README.md" | sed 's/#.*//' |
		grep -oE '\b[a-z]+\b' | grep -vxE 'sudo|make' | sort -u >"$WORK/made"
	for target in deps demo check install; do
		grep -qx "$target" "$WORK/made" || fail "README lacks make $target"
	done
	while read -r target; do
		grep -qE "^$target( [a-z ]*)?:([^=]|$)" "$ROOT/Makefile" ||
			fail "Makefile lacks $target"
	done <"$WORK/made"
}

@test "what the README mounts with, mounts" {
	need root fuse
	sed -nE 's/^    (printf .*) >my\.ini$/\1/p' "$ROOT/README.md" >"$WORK/cmd"
	[ -s "$WORK/cmd" ]
	# shellcheck source=/dev/null
	. "$WORK/cmd" | sed "s|nfs://server/export|$EXPORT|
	    s|/var/cache/nfs|$CACHE|" >"$WORK/my.ini"
	grep -q "^backend = $EXPORT" "$WORK/my.ini"
	launch -f -c "$WORK/my.ini" "$MNT"
	[ "$(stat_of state)" = online ]
}

@test "the completion completes the options, their words and the subcommands of -h" {
	need bash
	completed() { # WORD... -> the candidates for the last
		# shellcheck disable=SC2016	# for the other shell
		bash --norc -c '. "$1"; shift
		compopt() { :; }
		COMP_LINE="$*" COMP_WORDS=()
		for w; do
			while [[ $w == *=* ]]; do
				COMP_WORDS+=("${w%%=*}" =)
				w=${w#*=}
			done
			[ -z "$w" ] || COMP_WORDS+=("$w")
		done
		COMP_POINT=${#COMP_LINE} COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
		_cachefs; printf "%s\n" "${COMPREPLY[@]}"' \
		    - "$ROOT/contrib/cachefs.bash-completion" "$@"
	}
	cd "$WORK"
	for option in $(help_options); do
		option=${option%%=*}
		[ "$(completed "$CACHEFS" -o "$option")" = "$option=" ] ||
			completed "$CACHEFS" -o "$option" | grep -qx "$option="
	done
	[ "$(completed "$CACHEFS" -o cache_consistency=st)" = strict ]
	[ "$(completed "$CACHEFS" -o nfs_version=3,cache_che)" = 3,cache_checksum= ]
	[ "$(completed "$CACHEFS" -o cache_checksum= | xargs)" = "yes no" ]
	[ "$(completed "$CACHEFS" sta)" = stats ]
	[ "$(completed "$CACHEFS" stats - | xargs)" = "-j -w -p" ]
	[ "$(completed "$CACHEFS" warm - | xargs)" = "-q -n -T" ]
	[ "$(completed "$CACHEFS" un)" = unpin ]
	[ "$(completed "$CACHEFS" verify -)" = -r ]
	touch "$WORK/file"
	for cmd in verify ls warm evict pin unpin; do
		completed "$CACHEFS" $cmd "fi" | grep -qx file
	done
	! completed "$CACHEFS" stats "fi" | grep -qx file ||
		fail "stats takes no file"
}
