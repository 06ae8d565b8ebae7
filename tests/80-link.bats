#!/usr/bin/env bats
# Slow and far servers: a cold read runs at the speed of the link.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

# Milliseconds that CMD takes.
ms_of() { # CMD...
	local t=${EPOCHREALTIME/./}
	"$@" >&2
	echo $(((${EPOCHREALTIME/./} - t) / 1000))
}

read_all() { # FILE
	dd if="$1" of=/dev/null bs=1M status=none
}

@test "over a link of 1 Gbit/s each byte of a cold file crosses once" {
	make_file "$EXPORT/f" 256M
	netns_link up
	start_nfs
	start_cachefs
	read_all "$MNT/f"
	[ "$(stat_of backend_read_bytes)" -le $(((256 << 20) * 101 / 100)) ]
	wait_complete "$MNT/f"
	same "$EXPORT/f" "$MNT/f"
}

# Eight or more READs of 1 MiB sent and not answered, since REQUESTS were counted?
many_unanswered() { # REQUESTS
	[ $(($(stat_of backend_requests) - $1 -
	    $(stat_of backend_read_bytes) / (1 << 20))) -ge 8 ]
}

@test "a sequential reader has many requests on their way to the server at once" {
	make_file "$EXPORT/f" 128M
	start_nfs
	start_proxy
	start_cachefs cache_fill=100 nfs_timeout=100
	exec 5<"$MNT/f"
	opened=$(stat_of backend_requests)
	dd bs=1M count=16 status=none <&5 >"$WORK/a"
	proxy_signal USR2		# nothing is answered from here on
	cat <&5 >>"$WORK/a" &
	wait_until 20 many_unanswered "$opened"
	proxy_signal USR2
	wait $!
	cmp "$EXPORT/f" "$WORK/a"
}

@test "small files from a server 20 ms away cost few round trips each" {
	keep_caches
	mkdir "$EXPORT/d"
	for i in {1..40}; do
		make_file "$EXPORT/d/$i" 10000
	done
	start_nfs
	start_proxy -d 10
	start_cachefs
	ls "$MNT/d" >/dev/null
	calls=$(stat_of backend_requests)
	ms=$(ms_of cat "$MNT"/d/{1..40} 2>/dev/null)
	calls=$(($(stat_of backend_requests) - calls))
	echo "$ms ms, $calls calls"
	# LOOKUP, GETATTR at open, READ, GETATTR after it; and the directories'.
	[ "$calls" -le $((40 * 4 + 20)) ]
	diff -r "$EXPORT/d" "$MNT/d"
}

@test "a link that is slow for its many readers is not taken for a silent server" {
	for i in 1 2 3 4 5 6 7 8; do
		make_file "$EXPORT/f$i" 12M
	done
	start_nfs
	start_proxy -r 80
	start_cachefs nfs_timeout=2
	for i in 1 2 3 4 5 6 7 8; do
		same "$EXPORT/f$i" "$MNT/f$i" &
		pids+=($!)
	done
	for pid in "${pids[@]}"; do
		wait "$pid"
	done
	[ "$(stat_of backend_reconnects)" = 0 ]
	[ "$(stat_of backend_errors)" = 0 ]
}
