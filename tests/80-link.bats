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

bare() { # FILE: the milliseconds that bare libnfs takes for it
	local out
	out=$("$(tool nfscopy libnfs)" -n "nfs://${NFS_BIND:-127.0.0.1}$NFS_DIR/$1?$(
	    sed 's/nfs_version=/version=/; s/nfs_port/nfsport/
		s/nfs_mount_port/mountport/; s/,/\&/g' <<<"$NFS_OPTS")")
	awk '{ printf "%d", $4 * 1000 }' <<<"$out"
}

@test "a cold read over a link of 1 Gbit/s runs at 95 % of what bare NFS does" {
	make_file "$EXPORT/f" 512M
	netns_link up
	start_nfs
	start_cachefs
	bare=$(bare f)
	[ "$bare" -ge 4000 ]		# or it is no such link
	ms=$(ms_of read_all "$MNT/f")
	echo "bare NFS $bare ms, cachefs $ms ms"
	[ $((ms * 95)) -le $((bare * 100)) ]
	[ "$(stat_of backend_read_bytes)" -le $(((512 << 20) * 101 / 100)) ]
	wait_complete "$MNT/f"
	same "$EXPORT/f" "$MNT/f"
}

@test "a cold stream from a server 20 ms away is not one request at a time" {
	make_file "$EXPORT/f" 128M
	start_nfs
	start_proxy -d 10
	start_cachefs
	ms=$(ms_of read_all "$MNT/f")
	echo "$ms ms; bare NFS $(bare f) ms"
	# 128 requests of 1 MiB one after the other are 2560 ms of waiting.
	[ "$ms" -le $((1600 * SLOW)) ]
	same "$EXPORT/f" "$MNT/f"
}

@test "small files from a server 20 ms away cost few round trips each" {
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
