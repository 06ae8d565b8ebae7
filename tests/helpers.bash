# shellcheck shell=bash
# helpers.bash - what the bats files share.  Each says `load helpers` first.
#
# Everything a test makes lives in $BATS_TEST_TMPDIR, which has to be on a real
# disk (TMPDIR).  Whatever is started registers its own undoing, so that the
# teardown cleans up after a test that failed half-way, too.
#
#   CACHEFS           the program under test     (default: ../cachefs)
#   CACHEFS_REQUIRE   "root fuse nfs netns loop passthrough io_uring ...":
#                     what must not be skipped here; or "all"
#   CACHEFS_SLOW      factor for every time limit (sanitizers: 4)
#   CACHEFS_LIMIT     seconds after which a test's daemons are killed (150): a
#                     process that hangs in a mount can't be ended otherwise
#
# In a test:  $MNT mount point   $CACHE cache directory   $EXPORT the server's
# files   $LOG the daemon's log   $CACHEFS_PID the daemon

ROOT=$(cd "$BATS_TEST_DIRNAME/.." && pwd -P)
TESTS=$BATS_TEST_DIRNAME
CACHEFS=$(readlink -f "${CACHEFS:-$ROOT/cachefs}")
BUILD=${CACHEFS_BUILD:-$ROOT/build}	# nfscopy, badfs
SLOW=${CACHEFS_SLOW:-1}
CACHES_LOCK=/tmp/cachefs-tests.caches
export LC_ALL=C

setup() {
	common_setup
}

teardown() {
	common_teardown
}

# ------------------------------------------------------------ around a test

common_setup() {
	WORK=$BATS_TEST_TMPDIR
	MNT=$WORK/mnt CACHE=$WORK/cache EXPORT=$WORK/export
	LOG=$WORK/cachefs.log
	case $(stat -f -c %T "$WORK") in
	tmpfs | ramfs)
		echo "$WORK is in memory: set TMPDIR to a directory on a disk," \
		    "such as /var/tmp" >&2
		return 1 ;;
	esac
	mkdir "$MNT" "$EXPORT"
	: >"$LOG"
	mkfifo "$WORK/clock"
	watchdog 3>&- 4>&- &
	WATCHDOG=$!
	# A sanitizer's report must be found although a daemon has no stderr.
	export ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}log_path=$WORK/san
	export UBSAN_OPTIONS=${UBSAN_OPTIONS:+$UBSAN_OPTIONS:}log_path=$WORK/san:print_stacktrace=1
	export TSAN_OPTIONS=${TSAN_OPTIONS:+$TSAN_OPTIONS:}log_path=$WORK/san
}

# Kill the daemons of a test that takes too long, and whatever waits for them
# in the kernel gets an error.
watchdog() {
	local f
	! read -r -t $((${CACHEFS_LIMIT:-150} * SLOW)) <>"$WORK/clock" || return
	echo "too long: killing the daemons" >>"$WORK/watchdog.log"
	for f in "$WORK"/*.pid; do
		[ ! -e "$f" ] || kill -KILL "$(cut -d' ' -f1 "$f")"
	done
}

common_teardown() {
	local bad=0 f
	cd /
	end_process "$WATCHDOG"
	rm -f "$WORK/stalling.flag"	# or nothing could end
	end_readers
	for f in "$WORK"/*.pid; do
		[ -e "$f" ] || continue
		MNT=${f%.pid}
		stop_cachefs || bad=1
	done
	sanitizers_silent || bad=1
	undo_all
	if [ "$bad" = 1 ] || [ -z "${BATS_TEST_COMPLETED:-}" ]; then
		show_logs
	fi
	return "$bad"
}

# Run CMD behind the test, which finds it in $!; at the latest its end is that
# of the test.  (<&0: else the shell would give it /dev/null.)
background() { # CMD...
	"$@" <&0 3>&- 4>&- &
	echo $! >>"$WORK/background"
}

# Whatever a failed test has left open or reading would keep the mount busy.
end_readers() {
	local pid fd
	if [ -e "$WORK/background" ]; then
		while read -r pid; do
			running "$pid" || continue
			kill -KILL "$pid" || :
			! wait_until 0 gone "$pid" || wait "$pid" || :
		done <"$WORK/background" 2>/dev/null
	fi
	for fd in "/proc/$BASHPID/fd"/*; do
		case $(readlink "$fd") in
		"$WORK"/mnt*)
			fd=${fd##*/}
			exec {fd}<&- ;;
		esac
	done
}

# What to run at the end, whatever happens: last registered, first run.  Kept
# in a file because a test may call the helpers from subshells.
undo() { # CMD...
	printf '%q ' "$@" >>"$WORK/undo"
	echo >>"$WORK/undo"
}

undo_all() {
	local line
	[ -e "$WORK/undo" ] || return 0
	while IFS= read -r line; do
		eval "$line" || echo "cleaning up: failed: $line" >&2
	done < <(tac "$WORK/undo")
	rm -f "$WORK/undo"
}

show_logs() {
	local f
	for f in "$WORK"/*.log "$WORK"/san.*; do
		[ -s "$f" ] || continue
		echo "--- ${f##*/} (last 60 lines)"
		tail -n 60 "$f"
	done >&2
}

fail() { # MESSAGE...
	echo "$*" >&2
	return 1
}

# ! CMD does not fail a test; this does.
not() { # CMD...
	if "$@"; then
		fail "should have failed: $*"
	fi
}

# Skip the test unless all of WHAT is to be had here; CACHEFS_REQUIRE turns
# the skip into a failure.  passthrough and io_uring: of the mounted $MNT.
need() { # WHAT...
	local what why
	for what; do
		why=$(lacks "$what")
		[ -n "$why" ] || continue
		case " ${CACHEFS_REQUIRE:-} " in
		*" $what "* | *" all "*) fail "$what is required: $why" ;;
		*) skip "$why" ;;
		esac
	done
}

lacks() { # WHAT -> why not
	case $1 in
	root) [ "$EUID" = 0 ] || echo "needs root" ;;
	fuse) [ -c /dev/fuse ] || echo "no /dev/fuse" ;;
	nfs)
		[ "$EUID" = 0 ] || echo "the NFS server needs root"
		command -v ganesha.nfsd >/dev/null ||
			echo "no ganesha.nfsd (package nfs-ganesha)" ;;
	netns)
		ip netns add "cfprobe$$" 2>/dev/null ||
			{ echo "cannot make a network namespace"; return; }
		ip netns del "cfprobe$$" ;;
	loop) losetup -f >/dev/null 2>&1 || echo "no loop devices" ;;
	passthrough)
		[ "$(stat_of passthrough)" = on ] ||
			echo "no passthrough: $(stat_of passthrough)" ;;
	io_uring)
		[ "$(stat_of io_engine)" = io_uring ] ||
			echo "no io_uring: the engine is $(stat_of io_engine)" ;;
	promtool)
		[ -x "$ROOT/build/deps/promtool/promtool" ] ||
			command -v promtool >/dev/null || echo "no promtool" ;;
	*) command -v "$1" >/dev/null || echo "no $1" ;;
	esac
}

# ------------------------------------------------------------ waiting

# Poll until CMD succeeds; fail after SECS.
wait_until() { # SECS CMD...
	local end=$((SECONDS + $1 * SLOW + 1)) secs=$1
	shift
	until "$@"; do
		[ "$SECONDS" -lt "$end" ] ||
			{ fail "not within $secs s: $*"; return; }
		sleep 0.05	# the pause of wait_until
	done
}

running() { # PID: does it, or a thread of it, still run?
	local stat tasks
	{ read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
	stat=${stat##*) }
	[ "${stat%% *}" = Z ] || return 0
	tasks=("/proc/$1/task"/*)
	[ "${#tasks[@]}" -gt 1 ]
}

gone() { # PID
	! running "$1"
}

# Until nothing has been fetched or written any more for a whole second.
wait_quiet() {
	wait_until 60 has_been_quiet
}

has_been_quiet() {
	local was now
	was=$(activity)
	for _ in {1..10}; do
		sleep 0.1	# the pause of wait_until
		now=$(activity)
		[ "$now" = "$was" ] || return 1
	done
}

activity() {
	jq -c '[.backend_read_bytes, .cache_write_bytes, .fills_completed]' \
	    "$MNT/.cachefs/stats"
}

# ------------------------------------------------------------ the NFS server

# Serve DIR (default $EXPORT) over NFS version $NFS_VERSION (default 3).
# Sets NFS_URL, NFS_PORT and NFS_OPTS, the options that go with the URL.
# shellcheck disable=SC2119,SC2120	# the argument is for tests
start_nfs() { # [DIR]
	local dir
	need nfs
	dir=$(cd "${1:-$EXPORT}" && pwd -P)
	NFS_DIR=$dir
	export NFS_STATE=$WORK/nfs
	NFS_PORT=$("$TESTS/nfs-server.sh" start "$dir")
	undo stop_nfs
	NFS_URL=nfs://${NFS_BIND:-127.0.0.1}$dir
	nfs_opts "$NFS_PORT" $((NFS_PORT + 1))
}

# Begun as a function of its own: the proxy's ports replace the server's.
nfs_opts() { # PORT MOUNTPORT
	NFS_OPTS=nfs_version=${NFS_VERSION:-3},nfs_port=$1,nfs_mount_port=$2
}

stop_nfs() {
	"$TESTS/nfs-server.sh" stop
}

kill_nfs() {
	"$TESTS/nfs-server.sh" kill "$NFS_PORT"
}

restart_nfs() { # after stop_nfs or kill_nfs: same port, same files
	"$TESTS/nfs-server.sh" stop
	"$TESTS/nfs-server.sh" start "$NFS_DIR" "$NFS_PORT"
}

# Put netproxy ARGS (-d MS, -r MBIT) between cachefs and the server.
start_proxy() { # [ARGS...]
	local host=${NFS_BIND:-127.0.0.1} ports
	rm -f "$WORK/proxy.pidfile"
	"$TESTS/netproxy" -p "$WORK/proxy.pidfile" "$@" "0=$host:$NFS_PORT" \
	    "0=$host:$((NFS_PORT + 1))" >"$WORK/proxy.ports" \
	    2>"$WORK/proxy.log" 3>&- 4>&- </dev/null &
	PROXY_PID=$!
	undo stop_proxy "$PROXY_PID"
	wait_until 10 test -e "$WORK/proxy.pidfile"
	mapfile -t ports <"$WORK/proxy.ports"
	NFS_URL=nfs://127.0.0.1$NFS_DIR
	nfs_opts "${ports[0]}" "${ports[1]}"
}

proxy_signal() { # USR1 reset | USR2 hang | HUP refuse | CONT garble
	kill "-$1" "$PROXY_PID"
}

stop_proxy() { # [PID]
	end_process "${1:-$PROXY_PID}"
}

# End a process that a test started, and reap it if it is a child.
end_process() { # PID
	running "$1" || return 0
	kill -CONT "$1" 2>/dev/null || :
	kill -TERM "$1" 2>/dev/null || :
	if ! wait_until 5 gone "$1" 2>/dev/null; then
		kill -KILL "$1" 2>/dev/null || :
		wait_until 5 gone "$1"
	fi
	wait "$1" 2>/dev/null || :
}

# A link of 1 Gbit/s (119 MB/s of payload): a network namespace for start_nfs
# to put the server in, which the callers reach through a shaped veth pair.
netns_link() { # up | down [NAME]
	local ns=${2:-} net
	if [ "$1" = down ]; then
		ip netns del "$ns"	# takes the pair along
		return
	fi
	need root netns tc
	# Up to 16384 of them at once in 198.18.0.0/16, set aside for tests.
	ns=cf$((SRANDOM % 16384))
	net=$((${ns#cf} * 4))
	net=198.18.$((net / 256)).$((net % 256))
	ip netns add "$ns"
	undo netns_link down "$ns"
	ip link add "$ns" type veth peer name "$ns" netns "$ns"
	ip addr add "${net%.*}.$((${net##*.} + 1))/30" dev "$ns"
	ip link set "$ns" up
	ip -n "$ns" addr add "${net%.*}.$((${net##*.} + 2))/30" dev "$ns"
	ip -n "$ns" link set "$ns" up
	ip -n "$ns" link set lo up
	tc qdisc add dev "$ns" root tbf rate 1gbit burst 256kb latency 20ms
	tc -n "$ns" qdisc add dev "$ns" root tbf rate 1gbit burst 256kb \
	    latency 20ms
	export NFS_NETNS=$ns NFS_BIND=${net%.*}.$((${net##*.} + 2))
}

# An empty ext4 (or xfs) of SIZE on a loop device, mounted on $WORK/NAME.
loop_disk() { # NAME SIZE [xfs | ext4 MKFS-ARG...]
	need root loop
	mkdir "$WORK/$1"
	truncate -s "$2" "$WORK/$1.img"
	if [ "${3:-ext4}" = xfs ]; then
		mkfs.xfs -q "$WORK/$1.img"
		mount -o loop "$WORK/$1.img" "$WORK/$1"
	else
		mkfs.ext4 -q -F -m 0 "${@:4}" "$WORK/$1.img"
		mount -o loop,errors=remount-ro "$WORK/$1.img" "$WORK/$1"
	fi
	undo umount -l "$WORK/$1"
}

# A program of ours, built from tests/NAME.c with the libraries of PKG where
# that has not been done.
tool() { # NAME PKG -> its path
	local bin=$BUILD/$1 src=$TESTS/$1.c flags
	if [ ! -x "$bin" ] || [ "$src" -nt "$bin" ]; then
		mkdir -p "$BUILD"
		flags=$(PKG_CONFIG_PATH=$ROOT/build/deps/prefix/lib/pkgconfig \
		    pkg-config --cflags --libs "$2")
		# shellcheck disable=SC2086	# words
		"${CC:-cc}" -O2 -o "$bin.$$" "$src" $flags -lpthread >&2
		mv "$bin.$$" "$bin"
	fi
	echo "$bin"
}

# Show DIR on $WORK/NAME, a file system that does as $WORK/NAME.flag says: see
# badfs.c.
bad_fs() { # DIR NAME [OPTION]
	local bin
	need fuse
	bin=$(tool badfs fuse3)
	mkdir -p "$1" "$WORK/$2"
	"$bin" -f -o "src=$1,flag=$WORK/$2.flag${3:+,$3}" "$WORK/$2" \
	    >>"$WORK/badfs.log" 2>&1 3>&- 4>&- </dev/null &
	undo end_process $!
	undo force_unmount "$WORK/$2"
	undo rm -f "$WORK/$2.flag"
	wait_until 10 is_mounted "$WORK/$2"
}

# $EXPORT as a backend in which reads of files named stall* stall from stall_on
# to stall_off.
stalling_backend() {
	bad_fs "$EXPORT" stalling cached
	BACKEND=$WORK/stalling
}

stall_on() {
	echo 0 s >"$WORK/stalling.flag"
}

stall_off() {
	rm "$WORK/stalling.flag"
}

# ------------------------------------------------------------ cachefs

# Mount $EXPORT by a KIND of backend: v3, v4 (NFS) or dir.
start_kind() { # KIND [OPT...]
	local kind=$1
	shift
	if [ "$kind" = dir ]; then
		BACKEND=$EXPORT start_cachefs "$@"
		return
	fi
	[ -n "${NFS_PORT:-}" ] || start_nfs "$EXPORT"
	NFS_VERSION=${kind#v} nfs_opts "$NFS_PORT" $((NFS_PORT + 1))
	BACKEND='' start_cachefs "$@"
}

# Run CHECK with every kind of backend, each with a new mount and a new cache.
each_backend() { # CHECK [ARG...]
	local KIND
	for KIND in v3 v4 dir; do
		echo "--- backend: $KIND"
		CACHE=$WORK/cache.$KIND
		start_kind "$KIND"
		"$@"
		stop_cachefs
	done
}

# From here on cachefs is run by CMD.
run_by() { # CMD...
	local cmd
	printf -v cmd '%q ' exec "$@" "$CACHEFS"
	CACHEFS=$WORK/run-by
	printf '#!/bin/sh\n%s "$@"\n' "$cmd" >"$CACHEFS"
	chmod +x "$CACHEFS"
}

# The options of a mount: ours, then the caller's, which win.
cachefs_opts() { # [OPT...]
	local backend=${BACKEND:-$NFS_URL} opts IFS=,
	opts=nfs_backend=$backend,cache_dir=$CACHE
	case $backend in nfs://*) opts+=,$NFS_OPTS ;; esac
	echo "$opts${1:+,$*}"
}

# Mount $BACKEND (default: the started server) on $MNT, in the foreground as
# our child.  Fails, with the log, when it does not come up.
start_cachefs() { # [OPT...]
	need fuse
	launch -f -o "$(cachefs_opts "$@")" "$MNT"
}

# The same with CACHEFS's own arguments.
launch() { # ARG...
	local rc=0
	"$CACHEFS" "$@" >>"$LOG" 2>&1 3>&- 4>&- </dev/null &
	CACHEFS_PID=$!
	echo "$CACHEFS_PID" >"$MNT.pid"
	undo force_unmount "$MNT"
	wait_until 30 mounted_or_ended "$CACHEFS_PID"
	if gone "$CACHEFS_PID"; then
		rm -f "$MNT.pid"
		wait "$CACHEFS_PID" || rc=$?
		fail "cachefs ended with status $rc instead of mounting"
	fi
}

# The usual form: it returns when it is mounted, and stays as a daemon.
mount_cachefs() { # [OPT...]
	need fuse
	undo force_unmount "$MNT"
	timeout -k 5 $((30 * SLOW)) "$CACHEFS" -o "$(cachefs_opts "$@")" \
	    "$MNT" >>"$LOG" 2>&1 3>&- 4>&- </dev/null || {
		cat "$LOG" >&2
		fail "cachefs: mounting failed"
		return
	}
	CACHEFS_PID=$(daemon_of "$MNT")
	echo "$CACHEFS_PID daemon" >"$MNT.pid"
}

# The process that has the mount point as an argument of its own.
daemon_of() { # MNT
	local f
	for f in /proc/[0-9]*/cmdline; do
		if { tr '\0' '\n' <"$f" | grep -qxF -- "$1"; } 2>/dev/null &&
		    [ "$(readlink "${f%cmdline}exe")" = "$CACHEFS" ]; then
			f=${f#/proc/}
			echo "${f%/cmdline}"
			return
		fi
	done
	fail "no daemon for $1"
}

mounted_or_ended() { # PID
	gone "$1" || { is_mounted &&
		timeout 5 jq -e .state "$MNT/.cachefs/stats" >/dev/null 2>&1; }
}

is_mounted() { # [MNT]; asks the kernel's table, so a hung mount can't hang us
	awk -v m="${1:-$MNT}" '{ gsub(/\\040/, " ", $5) } $5 == m { f = 1 }
	    END { exit !f }' /proc/self/mountinfo
}

unmount() { # MNT
	! is_mounted "$1" || timeout 5 umount "$1" 2>/dev/null ||
		timeout 5 fusermount3 -u "$1" 2>/dev/null
}

# Unmount $MNT and see the daemon end: of its own, soon, with status 0.
stop_cachefs() {
	local pid kind rc=0 bad=0
	[ -e "$MNT.pid" ] || return 0
	read -r pid kind <"$MNT.pid"
	rm -f "$MNT.pid"
	wait_until 10 unmount "$MNT" || bad=1
	if [ "$bad" = 1 ] || ! wait_until 20 gone "$pid"; then
		echo "cachefs ($pid) does not end: killed" >&2
		ls -l "/proc/$pid/fd" >&2 || :
		cat "/proc/$pid"/task/*/wchan >&2 || :
		kill -KILL "$pid" || :
		wait_until 10 gone "$pid" || :
		force_unmount "$MNT"
		bad=1
	fi
	if [ "$kind" != daemon ]; then
		wait "$pid" || rc=$?
		[ "$rc" = 0 ] || fail "cachefs ended with status $rc" || bad=1
	fi
	sanitizers_silent || bad=1
	return "$bad"
}

# End the daemon with SIGNAL; what it leaves mounted stays so.
kill_cachefs() { # SIGNAL
	local pid kind
	read -r pid kind <"$MNT.pid"
	rm -f "$MNT.pid"
	kill "-$1" "$pid"
	wait_until 10 gone "$pid"
	[ "$kind" = daemon ] || wait "$pid" || :
}

force_unmount() { # MNT
	for _ in 1 2 3; do
		is_mounted "$1" || return 0
		umount -l "$1" 2>/dev/null || fusermount3 -uz "$1" || :
	done
}

sanitizers_silent() {
	! grep -sE 'ERROR: [A-Z][A-Za-z]+Sanitizer|runtime error:|WARNING: ThreadSanitizer' \
	    "$WORK"/*.log "$WORK"/san.* >&2
}

# cachefs ARGS... must give up with STATUS, say why in one line on stderr that
# contains every WORD, print nothing else, and leave nothing mounted.
refuses() { # STATUS WORD... -- ARG...
	local want=$1 words=() word rc=0
	shift
	while [ "$1" != -- ]; do
		words+=("$1")
		shift
	done
	shift
	undo force_unmount "$MNT"
	timeout -k 5 $((60 * SLOW)) "$CACHEFS" "$@" >"$WORK/stdout" \
	    2>"$WORK/stderr" 3>&- 4>&- </dev/null || rc=$?
	if is_mounted; then
		fail "mounted: cachefs $*"
		return
	fi
	if [ "$rc" != "$want" ] || [ -s "$WORK/stdout" ] ||
	    [ "$(wc -l <"$WORK/stderr")" != 1 ]; then
		echo "cachefs $*: status $rc, wanted $want and one line:" >&2
		cat "$WORK/stdout" "$WORK/stderr" >&2
		return 1
	fi
	for word in "${words[@]}"; do
		grep -qF -- "$word" "$WORK/stderr" || {
			echo "cachefs $*: '$word' is not named in:" >&2
			cat "$WORK/stderr" >&2
			return 1
		}
	done
}

# ------------------------------------------------------------ looking at it

stat_of() { # NAME, or a jq path below the top
	jq -er ".$1" "$MNT/.cachefs/stats"
}

state_is() { # STATE
	[ "$(stat_of state)" = "$1" ]
}

state_of() { # FILE -> absent, partial, complete
	getfattr --absolute-names --only-values -n user.cachefs.state -- "$1"
}

cached_of() { # FILE -> bytes
	getfattr --absolute-names --only-values -n user.cachefs.cached -- "$1"
}

is_complete() { # FILE
	[ "$(state_of "$1")" = complete ]
}

wait_complete() { # FILE
	wait_until 60 is_complete "$1"
}

# Was FILE of $EXPORT opened so often, as its index in $CACHE says?
used_is() { # FILE COUNT
	local ino ns
	printf -v ino %016x "$(stat -c %i "$EXPORT/$1")"
	ns=$(stat -c %y "$CACHE"/objects/*/*"$ino.idx") || return 1
	ns=${ns#*.}
	[ $((10#${ns%% *} % 1000000)) = "$2" ]
}

# The directories and the program where any user reaches them.
in_the_open() {
	local open
	open=$(mktemp -d "${TMPDIR:-/tmp}/cachefs-open.XXXXXX")
	undo rm -rf "$open"
	mkdir "$open/export" "$open/mnt" "$open/user"
	cp "$CACHEFS" "$open/cachefs"
	chmod -R 755 "$open"
	EXPORT=$open/export MNT=$open/mnt CACHE=$open/user/cache
	CACHEFS=$open/cachefs
	make_file "$EXPORT/f" 3M
	chmod 644 "$EXPORT/f"
}

# Read FILEs through the mount until they are whole in the cache.
cache_file() { # FILE...
	local f
	for f; do
		same "$EXPORT/$f" "$MNT/$f"
		wait_complete "$MNT/$f"
	done
	wait_quiet
}

# Does a sanitizer run in the daemon?  It keeps freed memory for long.
sanitized() {
	grep -q 'lib[at]san' "/proc/$CACHEFS_PID/maps"
}

# The statistic NAME must have grown by no more than MAX since it was WAS.
grew_at_most() { # NAME WAS MAX
	local now
	now=$(stat_of "$1")
	[ $((now - $2)) -le "$3" ] ||
		fail "$1: $2 -> $now, grew by $((now - $2)), more than $3"
}

# ------------------------------------------------------------ files

# SIZE (K, M, G) bytes that look random and depend on the file's name and SEED
# only.
make_file() { # PATH SIZE [SEED]
	local key
	key=$(printf '%s %s' "${1##*/}" "${3:-}" | md5sum)
	head -c "$(numfmt --from=iec "$2")" /dev/zero |
		openssl enc -aes-128-ctr -K "${key%% *}" \
		    -iv 00000000000000000000000000000000 >"$1"
}

same() { # A B: the same bytes, both readable
	cmp -- "$1" "$2"
}

# Try to read FILE at OFFSET by one pread; prints ok or the error's name, and
# the tenths of a second that open and read took.
attempt() { # FILE [OFFSET]
	timeout -s KILL $((100 * SLOW)) python3 - "$1" "${2:-0}" <<-'END'
		import errno, os, sys, time
		start, result = time.monotonic(), "ok"
		try:
		    fd = os.open(sys.argv[1], os.O_RDONLY)
		    os.pread(fd, 65536, int(sys.argv[2]))
		except OSError as e:
		    result = errno.errorcode[e.errno]
		print(result, int((time.monotonic() - start) * 10))
	END
}

# Forget the page cache: of FILEs only, or of the machine.  That waits for tests
# that run beside this one and count on it.
drop_caches() { # [FILE...]
	local f
	for f; do
		dd if="$f" iflag=nocache count=0 status=none
	done
	[ $# = 0 ] || return 0
	if [ -z "${KEEPING:-}" ]; then
		flock -o "$CACHES_LOCK" sh -c 'echo 3 >/proc/sys/vm/drop_caches'
		return
	fi
	flock -x "$KEEPING"
	echo 3 >/proc/sys/vm/drop_caches
	flock -s "$KEEPING"
}

# From here on nobody else makes the kernel forget: a test that counts what the
# kernel asks the daemon begins so.
keep_caches() {
	exec {KEEPING}>"$CACHES_LOCK"
	flock -s "$KEEPING"
}
