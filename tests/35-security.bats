#!/usr/bin/env bats
# Who may read what, what the daemon may do, and what stands in its way in the
# cache directory.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2010,SC2012,SC2016,SC2030,SC2031,SC2034,SC2164,SC2317

load helpers

# For each user (uid, gid, groups) and each path below the descriptor of TOP:
# may it be read, listed, searched, executed?  Root passes like anybody's group.
matrix() { # TOP -> "UID:GIDS PATH WHAT RESULT" lines
	python3 - "$1" <<-'END'
		import errno, os, sys
		USERS = [(0, 0, []), (1001, 1001, []), (1002, 1002, [2001]),
		         (1002, 2001, []), (1003, 1003, [])]
		def attempt(f):
		    try:
		        f()
		        return "yes"
		    except OSError as e:
		        return errno.errorcode[e.errno]
		os.chdir(sys.argv[1])
		names = sorted(os.listdir("m"))
		for uid, gid, groups in USERS:
		    if os.fork() == 0:
		        os.setgroups(groups); os.setgid(gid); os.setuid(uid)
		        for n in names:
		            p = "m/" + n
		            def read(path):
		                fd = os.open(path, os.O_RDONLY)
		                os.read(fd, 10)
		            tests = {"stat": lambda: os.stat(p)}
		            if n.startswith("d"):
		                tests["list"] = lambda: os.listdir(p)
		                tests["search"] = lambda: read(p + "/in")
		            else:
		                tests["read"] = lambda: read(p)
		                tests["exec"] = lambda: os.access(p, os.X_OK) or \
		                    read("/nonexistent")
		            for what, f in tests.items():
		                print(uid, gid, groups, n, what, attempt(f), flush=True)
		        os._exit(0)
		    os.wait()
	END
}

@test "owner, group and mode decide for each user as they do on the server" {
	need root
	mkdir "$EXPORT/m"
	for mode in 000 400 040 004 440 404 444 500 050 005 755 700 070 007 711 4755 2750 1777; do
		echo text >"$EXPORT/m/f$mode"
		mkdir "$EXPORT/m/d$mode"
		echo text >"$EXPORT/m/d$mode/in"
		chown 1001:2001 "$EXPORT/m/f$mode" "$EXPORT/m/d$mode"
		chmod "$mode" "$EXPORT/m/f$mode" "$EXPORT/m/d$mode"
	done
	chmod 755 "$EXPORT" "$WORK" "$MNT"
	matrix "$EXPORT" >"$WORK/native"
	[ "$(grep -c ' yes$' "$WORK/native")" -gt 100 ]
	[ "$(grep -c ' EACCES$' "$WORK/native")" -gt 50 ]
	BACKEND=$EXPORT start_cachefs fuse_allow_other=yes
	matrix "$MNT" >"$WORK/ours"
	diff "$WORK/native" "$WORK/ours"
	matrix "$MNT" >"$WORK/ours"		# now that all is cached
	diff "$WORK/native" "$WORK/ours"
	stop_cachefs
	start_nfs
	rm -rf "$CACHE"
	start_cachefs fuse_allow_other=yes
	matrix "$MNT" >"$WORK/ours"
	diff "$WORK/native" "$WORK/ours"
}

@test "an ordinary user mounts by fusermount3, without passthrough, and is told so" {
	need root
	local as=(setpriv --reuid 65534 --regid 65534 --clear-groups)
	[ -u "$(command -v fusermount3)" ]
	in_the_open
	chown 65534 "$(dirname "$CACHE")" "$MNT"
	undo chmod "$(stat -c %a /dev/fuse)" /dev/fuse
	chmod 666 /dev/fuse		# as udev has it
	undo force_unmount "$MNT"
	timeout 30 "${as[@]}" "$CACHEFS" -o \
	    "$(BACKEND=$EXPORT cachefs_opts)" "$MNT" 2>"$WORK/err" 3>&- 4>&-
	CACHEFS_PID=$(daemon_of "$MNT")
	[ "$(stat -c %u "/proc/$CACHEFS_PID")" = 65534 ]
	grep -q 'passthrough is off: needs CAP_SYS_ADMIN' "$WORK/err"
	[ "$("${as[@]}" "$CACHEFS" stats -j "$MNT" | jq -r .passthrough)" = \
	    'off:needs CAP_SYS_ADMIN' ]
	"${as[@]}" cmp "$EXPORT/f" "$MNT/f"
	"${as[@]}" cmp "$EXPORT/f" "$MNT/f"
	not cat "$MNT/f"			# nor may root
	"${as[@]}" fusermount3 -u "$MNT"
	wait_until 10 gone "$CACHEFS_PID"
}

@test "what others planted in the cache directory is not followed" {
	make_file "$EXPORT/f" 3M
	make_file "$EXPORT/g" 3M
	start_nfs
	start_cachefs
	same "$EXPORT/f" "$MNT/f"
	wait_complete "$MNT/f"
	stop_cachefs
	# A directory, a data file, an index, a listing and the temporary files
	# are links to what is not ours; another is a hard link.
	mkdir "$WORK/outside"
	make_file "$WORK/outside/victim" 3M
	victim=$(sha256sum <"$WORK/outside/victim")
	data=$(find "$CACHE/objects" -type f ! -name '*.idx')
	plant() { # NAME...
		for name; do
			rm -rf "$name"
			ln -s "$WORK/outside/victim" "$name"
		done
	}
	untouched() {
		start_cachefs
		same "$EXPORT/f" "$MNT/f"
		same "$EXPORT/g" "$MNT/g"
		ls "$MNT" >/dev/null
		stop_cachefs
		[ "$(sha256sum <"$WORK/outside/victim")" = "$victim" ]
		[ "$(ls "$WORK/outside")" = victim ]
	}
	plant "$data"
	untouched
	plant "$data" "$data.idx" "$data.tmp"
	untouched
	plant "$(find "$CACHE/tree" -mindepth 2 -type f | head -n 1)"
	untouched
	rm -rf "$(dirname "$data")"
	ln -s "$WORK/outside" "$(dirname "$data")"
	untouched
	rm "$(dirname "$data")"
	untouched
	data=$(find "$CACHE/objects" -type f ! -name '*.idx' -size +2M | head -n 1)
	cp "$data" "$WORK/outside/victim"
	victim=$(sha256sum <"$WORK/outside/victim")
	printf damaged | dd of="$WORK/outside/victim" conv=notrunc status=none
	victim=$(sha256sum <"$WORK/outside/victim")
	ln -f "$WORK/outside/victim" "$data"
	untouched
}

@test "a subcommand that reaches into the cache is for root and the daemon's user" {
	need root
	in_the_open
	BACKEND=$EXPORT start_cachefs fuse_allow_other=yes
	cat "$MNT/f" >/dev/null
	"$CACHEFS" verify "$MNT/f"
	run setpriv --reuid 65534 --regid 65534 --clear-groups "$CACHEFS" \
	    verify "$MNT/f"
	[ "$status" = 1 ]
	[[ $output == *"$MNT/f: Operation not permitted"* ]]
	run setpriv --reuid 65534 --regid 65534 --clear-groups "$CACHEFS" \
	    -o remount,cache_size=1G none "$MNT"
	[ "$status" = 1 ]
	[[ $output == *"$MNT: Operation not permitted"* ]]
	[ "$(stat_of cache_limit_bytes)" = 0 ]
}
