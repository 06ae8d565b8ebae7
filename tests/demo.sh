#!/bin/bash
# demo.sh - what cachefs does, shown on this machine in under two minutes.
#
# Starts an NFS server (nfs-ganesha) on loopback, mounts its export through
# cachefs, reads a big file and a tree of small ones cold and hot, prints the
# speeds beside those of the disk and of bare NFS, compares every byte with
# the original, and cleans up.  Ends with 0 only if all bytes were equal.
#
# Needs root.  Environment: CACHEFS     the program (../cachefs)
#                           DEMO_DIR    a directory on the disk to show (/var/tmp)
#                           DEMO_MIB    size of the big file in MiB (1024)
#                           DEMO_FILES  number of small files (2000)
# shellcheck disable=SC2317	# functions called by name: timed, wait_until, trap
set -euo pipefail
export LC_ALL=C

top=$(cd "$(dirname "$0")/.." && pwd -P)
cachefs=$(readlink -f "${CACHEFS:-$top/cachefs}")
nfscopy=$top/build/nfscopy
mib=${DEMO_MIB:-1024}
files=${DEMO_FILES:-2000}
dir='' daemon='' wrong=0

say() { printf '%s\n' "$*"; }
die() { echo "demo: $*" >&2; exit 1; }

now_us() { echo "${EPOCHREALTIME/./}"; }

running() { # PID; a zombie does not run
	local stat
	{ read -r stat <"/proc/$1/stat"; } 2>/dev/null &&
		[[ ${stat##*) } != Z* ]]
}

wait_until() { # SECS CMD...
	local end=$((SECONDS + $1 + 1))
	shift
	until "$@"; do
		[ "$SECONDS" -lt "$end" ] || return 1
		sleep 0.05	# the pause of wait_until
	done
}

mounted() { grep -qF " $dir/mnt " /proc/self/mountinfo; }
unmount() { ! mounted || timeout 5 umount "$dir/mnt" 2>/dev/null; }
gone() { ! running "$1"; }
up_or_gone() { gone "$daemon" || { mounted && [ -e "$dir/mnt/.cachefs/stats" ]; }; }
complete() { [ "$(xattr state "$1")" = complete ]; }
xattr() { getfattr --only-values --absolute-names -n "user.cachefs.$1" "$2"; }
stat_of() { jq -r ".$1" "$dir/mnt/.cachefs/stats"; }

# Whatever happened: no mount, no process and no file stays behind.
cleanup() {
	local rc=$?
	trap '' INT TERM
	[ -n "$dir" ] || exit "$rc"
	if [ "$rc" != 0 ] && [ -s "$dir/cachefs.log" ]; then
		echo "demo: the last lines of cachefs:" >&2
		tail -n 20 "$dir/cachefs.log" >&2
	fi
	wait_until 10 unmount || umount -l "$dir/mnt" || rc=1
	if [ -n "$daemon" ] && ! wait_until 20 gone "$daemon"; then
		echo "demo: cachefs did not end by itself" >&2
		kill -KILL "$daemon" || :
		rc=1
	fi
	NFS_STATE=$dir/nfs "$top/tests/nfs-server.sh" stop || rc=1
	if mounted; then
		echo "demo: still mounted: $dir/mnt" >&2
		rc=1
	else
		rm -rf --one-file-system "$dir"
	fi
	exit "$rc"
}

# Forget the page cache, so that the next reads come from the disk.
drop() {
	sync -f "$dir"
	echo 3 >/proc/sys/vm/drop_caches
}

read_file() { dd if="$1" of=/dev/null bs=1M status=none; }
read_tree() { find "$1" -type f -print0 | xargs -0 cat >/dev/null; }

# Run CMD and leave in $us how long it took.
timed() { # CMD...
	local t
	t=$(now_us)
	"$@"
	us=$(($(now_us) - t))
	[ "$us" -gt 0 ] || us=1
}

# The best of three, by itself or each time with an empty page cache: disks and
# shared machines have moods.
best() { # CMD...
	local best=
	for _ in 1 2 3; do
		timed "$@"
		[ -n "$best" ] && [ "$best" -lt "$us" ] || best=$us
	done
	us=$best
}

best_cold() { # CMD...
	local best=
	for _ in 1 2 3; do
		drop
		timed "$@"
		[ -n "$best" ] && [ "$best" -lt "$us" ] || best=$us
	done
	us=$best
}

# A line of the table; AMOUNT / us is MB/s or (times a million) files/s.
declare -A base
row() { # GROUP BASE-OF-RATIO AMOUNT SCALE LABEL
	[ -n "${base[$1$2]:-}" ] || base[$1$2]=$us
	table+=$(awk -v l="$5" -v a="$3" -v s="$4" -v u="$us" \
	    -v b="${base[$1$2]}" 'BEGIN {
		printf "  %-42s %9.0f %12.2f", l, a * s / u, b / u }')$'\n'
}
big() { row big "$1" $((mib << 20)) 1 "$2"; }
tree() { row tree "$1" "$files" 1e6 "$2"; }

check() { # CMD...: compares
	if ! "$@"; then
		wrong=1
		say "  NOT EQUAL"
	fi
}

# ------------------------------------------------------------ before we start

[ "$EUID" = 0 ] || die "needs root, for mounting and for the NFS server: sudo make demo"
[ -x "$cachefs" ] || die "no $cachefs: run make first"
for p in ganesha.nfsd jq getfattr openssl awk; do
	command -v "$p" >/dev/null || die "no $p: run 'sudo make deps' first"
done
if [ ! -x "$nfscopy" ] || [ "$top/tests/nfscopy.c" -nt "$nfscopy" ]; then
	mkdir -p "$top/build"
	"${CC:-cc}" -O2 -o "$nfscopy" "$top/tests/nfscopy.c" -lnfs -lpthread
fi
parent=${DEMO_DIR:-/var/tmp}
case $(stat -f -c %T "$parent") in
tmpfs | ramfs) die "$parent is in memory: set DEMO_DIR to a directory on a disk" ;;
esac
need=$((mib * 5 / 2 + 512))
free=$(df -Pm "$parent" | awk 'NR == 2 { print $4 }')
[ "$free" -ge "$need" ] || die "$parent has $free MiB free, $need are needed:" \
    "set DEMO_DIR to a directory on a larger disk"
trap cleanup EXIT
trap 'exit 130' INT TERM
dir=$(mktemp -d "$parent/cachefs-demo.XXXXXX")
mkdir "$dir/export" "$dir/export/tree" "$dir/mnt"
export NFS_STATE=$dir/nfs

# ------------------------------------------------------------ the original

say "Making the original: a file of $mib MiB and $files small files, in $dir/export"
random() { # MIB SEED
	head -c "${1}M" /dev/zero |
		openssl enc -aes-128-ctr -K "$(printf %032x "$2")" -iv "$(printf %032x 0)"
}
random "$mib" 1 >"$dir/export/big"
random $((mib / 4)) 2 >"$dir/export/other"
size=$((24 << 10))
for ((i = 0; i * 100 < files; i++)); do
	n=$((files - i * 100 < 100 ? files - i * 100 : 100))
	mkdir "$dir/export/tree/$i"
	random 3 "$((i + 3))" | { head -c $((n * size)); cat >/dev/null; } |
		split -b "$size" -a 4 -d - "$dir/export/tree/$i/file"
done
[ "$(find "$dir/export/tree" -type f | wc -l)" = "$files" ] || die "miscounted"

say "Reading it straight from the disk, for comparison"
table=
best_cold read_file "$dir/export/big"
big cold "the disk itself"
best read_file "$dir/export/big"
big warm "  again, from the page cache"

# From here on the server has the original in memory, as if it were a fast
# server far away: what is slow now is the network's or our own.
port=$("$top/tests/nfs-server.sh" start "$dir/export")
say "Started an NFS server for it on 127.0.0.1, port $port"
say "Reading it with bare libnfs, 4 connections"
url="nfs://127.0.0.1$dir/export/big?nfsport=$port&mountport=$((port + 1))"
us=$(for _ in 1 2 3; do "$nfscopy" -n "$url"; done |
	awk '!best || $4 < best { best = $4 } END { printf "%d", best * 1e6 }')
big cold "bare NFS"

cat >"$dir/cachefs.ini" <<-END
	[nfs]
	backend = nfs://127.0.0.1$dir/export
	version = 3
	port = $port
	mount_port = $((port + 1))
	[cache]
	dir = $dir/cache
END
say "Mounting it: cachefs -c $dir/cachefs.ini $dir/mnt"
"$cachefs" -f -c "$dir/cachefs.ini" "$dir/mnt" >"$dir/cachefs.log" 2>&1 </dev/null &
daemon=$!
wait_until 20 up_or_gone || die "cachefs has not mounted after 20 s"
if gone "$daemon"; then
	daemon=
	die "cachefs could not mount"
fi

# ------------------------------------------------------------ the big file

say "Reading the big file through cachefs for the first time (cold)"
timed read_file "$dir/mnt/big"
big cold "cachefs, cold: from NFS, into the cache"
check cmp "$dir/export/big" "$dir/mnt/big"
wait_until 60 complete "$dir/mnt/big" ||
	die "the big file is still $(xattr state "$dir/mnt/big") a minute later"

say "Reading it again (hot)"
fetched=$(stat_of backend_read_bytes)
opens=$(stat_of opens_passthrough)
hits=$(stat_of hit_bytes)
best_cold read_file "$dir/mnt/big"
big cold "cachefs, hot: from the cache on the disk"
best read_file "$dir/mnt/big"
big warm "  again, from the page cache"
opens=$(($(stat_of opens_passthrough) - opens))
hits=$(($(stat_of hit_bytes) - hits))
fetched=$(($(stat_of backend_read_bytes) - fetched))
say "Comparing every byte with the original, hot, and another file cold"
check cmp "$dir/export/big" "$dir/mnt/big"
check cmp "$dir/export/other" "$dir/mnt/other"

# ------------------------------------------------------------ the small files

say "Reading the $files small files: disk, then cachefs cold, then hot"
best_cold read_tree "$dir/export/tree"
tree cold "the disk itself"
best read_tree "$dir/export/tree"
tree warm "  again, from the page cache"
timed read_tree "$dir/mnt/tree"
tree cold "cachefs, cold: from NFS, into the cache"
best_cold read_tree "$dir/mnt/tree"
tree cold "cachefs, hot: from the cache on the disk"
best read_tree "$dir/mnt/tree"
tree warm "  again, from the page cache"
say "Comparing every byte of them with the original"
check diff -r "$dir/export/tree" "$dir/mnt/tree"

# ------------------------------------------------------------ the result

say
printf '%-44s %9s %12s\n' "One file of $mib MiB" MB/s "of the disk"
printf '%s' "$table" | head -n 6
say
printf '%-44s %9s %12s\n' "$files files of $((size >> 10)) KiB" files/s "of the disk"
printf '%s' "$table" | tail -n +7
say
say "The lines marked 'from the page cache' compare with the disk's own such line."
case $(stat_of passthrough) in
on) say "Passthrough: on. Of the 6 hot reads of the big file $opens went from the kernel straight" \
    "to the cache;"
	say "the daemon itself served $hits bytes of them, the server $fetched." ;;
*) say "Passthrough: $(stat_of passthrough). The daemon itself served the hot reads ($hits bytes," \
    "the server $fetched)." ;;
esac
if [ "$wrong" = 0 ]; then
	say "Every byte equals the original."
else
	say "Some bytes DIFFER from the original."
fi
exit "$wrong"
