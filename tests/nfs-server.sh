#!/bin/sh
# nfs-server.sh - run a private user-space NFS server (nfs-ganesha) for tests.
#
#   nfs-server.sh start EXPORTDIR PORT   serve EXPORTDIR on PORT until stopped
#   nfs-server.sh start EXPORTDIR        the same on a free port, and print it
#   nfs-server.sh stop [PORT]            stop one instance, or all of ours
#   nfs-server.sh kill PORT              the same with SIGKILL (a crash)
#   nfs-server.sh pid PORT               print the server's process id
#
# Needs root and ganesha.nfsd with FSAL_VFS (Debian: nfs-ganesha
# nfs-ganesha-vfs).  Neither rpcbind, dbus nor systemd is needed.
# NFSv3, MOUNT and NFSv4 all answer on the ports PORT and PORT+1:
#   v3: nfs://127.0.0.1/EXPORTDIR?version=3&nfsport=PORT&mountport=PORT+1
#   v4: nfs://127.0.0.1/EXPORTDIR?version=4&nfsport=PORT
#
# Environment: NFS_STATE   state directory (default /tmp/nfs-server.$UID)
#              NFS_PREFIX  root of an unpacked, not installed, ganesha
#              NFS_BIND    address to listen on (default 127.0.0.1)
#              NFS_MAXIO   largest read and write (default 1048576)
#              NFS_VMEM    address space in KiB (default 8388608): a client
#                          gone wild must not take the machine's memory
#              NFS_NETNS   network namespace to run in
#              NFS_ACCESS  RW (default), RO, None: nobody may mount it
#              NFS_SQUASH  No_Root_Squash (default), Root_Squash, ...
#              NFS_LOG     log level (default EVENT; FULL_DEBUG is the most)
#              NFS_EXTRA   more lines for the NFS_CORE_PARAM block
#              NFS_EXPORT_EXTRA  more lines for the EXPORT block
#              NFS_EXPORT  a file whose EXPORT block, but for the path, is taken
set -eu

state=${NFS_STATE:-/tmp/nfs-server.$(id -u)}
prefix=${NFS_PREFIX:-}
bind=${NFS_BIND:-127.0.0.1}
maxio=${NFS_MAXIO:-1048576}
vmem=${NFS_VMEM:-8388608}

die() { echo "nfs-server.sh: $*" >&2; exit 1; }

# Ours and alive?  A pid file can outlive its process, and the pid be reused.
alive() {
	[ -r "$state/$1/pid" ] || return 1
	pid=$(tr -dc 0-9 <"$state/$1/pid")
	[ -n "$pid" ] && [ -r "/proc/$pid/cmdline" ] || return 1
	tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q "$state/$1/ganesha.conf"
}

stop_one() { # PORT SIGNAL
	if alive "$1"; then
		kill -CONT "$pid" 2>/dev/null || :
		kill "-$2" "$pid" 2>/dev/null || :
		# Until its last thread, and so its listening socket, is gone:
		# the first thread is a zombie before that.
		n=0
		while threads=$(ls "/proc/$pid/task" 2>/dev/null) &&
		      { [ "$threads" != "$pid" ] ||
			! grep -q '^State:.Z' "/proc/$pid/status"; } 2>/dev/null; do
			n=$((n + 1))
			[ "$n" -ne 100 ] || kill -KILL "$pid" 2>/dev/null || :
			[ "$n" -lt 200 ] || die "process $pid does not end"
			sleep 0.05
		done
	fi
	rm -f "$state/$1/pid"
}

# Is nobody listening on PORT?  (In a network namespace: never mind.)
is_free() { # PORT
	hex=$(printf ':%04X' "$1")
	! awk -v p="$hex" '$4 == "0A" && substr($2, length($2) - 4) == p { f = 1 }
		END { exit !f }' /proc/net/tcp /proc/net/tcp6 2>/dev/null
}

# An even port below the ephemeral ones, it and its neighbour free.
pick_port() {
	while :; do
		p=$(od -An -N2 -tu2 /dev/urandom)
		p=$((20000 + p % 6000 * 2))
		if is_free "$p" && is_free $((p + 1)); then
			echo "$p"
			return
		fi
	done
}

# Two that start at once may have picked the same port: the loser tries again.
start_anywhere() { # EXPORTDIR
	for try in 1 2 3; do
		p=$(pick_port)
		if out=$("$0" start "$1" "$p" 2>&1); then
			echo "$p"
			return
		fi
	done
	echo "$out" >&2
	die "no server came up in $try tries"
}

start() { # EXPORTDIR PORT
	dir=$(cd "$1" && pwd -P) || die "no directory $1"
	port=$2
	st=$state/$port
	alive "$port" && die "already running on port $port (pid $pid)"
	mkdir -p "$st/recov"
	lib=$prefix/usr/lib
	plugins=
	for d in "$lib"/*/ganesha "$lib/ganesha" "${lib}64/ganesha"; do
		[ -e "$d/libfsalvfs.so" ] && plugins=$d && break
	done
	[ -n "$plugins" ] || die "no libfsalvfs.so: install nfs-ganesha-vfs"
	# From version 6 on it would not start in a container without the one,
	# and would believe its cached directories without the other.
	flusher=
	mdcache=
	if grep -qai allow_set_io_flusher_fail "$prefix/usr/bin/ganesha.nfsd"; then
		flusher='allow_set_io_flusher_fail = true;'
		mdcache='MDCACHE { Dir_Chunk = 0; }'
	fi
	cat >"$st/ganesha.conf" <<-EOF
	NFS_CORE_PARAM {
		Bind_addr = $bind;
		NFS_Port = $port;
		MNT_Port = $((port + 1));
		Protocols = 3, 4;
		mount_path_pseudo = true;	# v3 and v4 see the same path
		Enable_NLM = false;		# no lock manager, no rpc.statd
		Enable_RQUOTA = false;
		Enable_UDP = false;
		Plugins_Dir = "$plugins";
		MaxRPCSendBufferSize = $((maxio + 1048576));
		MaxRPCRecvBufferSize = $((maxio + 1048576));
		$flusher
		${NFS_EXTRA:-}
	}
	$mdcache
	NFS_KRB5 { Active_krb5 = false; }
	NFSv4 {
		Graceless = true;
		Lease_Lifetime = 10;
		Grace_Period = 5;
		UseGetpwnam = true;		# no nfsidmap, no /etc/idmapd.conf
		Only_Numeric_Owners = true;
		RecoveryBackend = fs;
		RecoveryRoot = "$st/recov";
	}
	EXPORT {
		Export_Id = 1;
		Path = "$dir";
		Pseudo = "$dir";
		Access_Type = ${NFS_ACCESS:-RW};
		Squash = ${NFS_SQUASH:-No_Root_Squash};
		SecType = sys;
		Transports = TCP;
		MaxRead = $maxio;
		MaxWrite = $maxio;
		PrefRead = $maxio;
		PrefWrite = $maxio;
		# Changes made behind the server's back must show at once.
		Attr_Expiration_Time = 0;
		${NFS_EXPORT_EXTRA:-}
		FSAL { Name = VFS; }
	}
	LOG {
		Default_Log_Level = ${NFS_LOG:-EVENT};
		Facility { name = FILE; destination = "$st/log"; enable = active; }
	}
	EOF
	if [ -n "${NFS_EXPORT:-}" ]; then
		sed -i '/^EXPORT {/,/^}/d' "$st/ganesha.conf"
		sed -n '/^EXPORT {/,/^}/p' "$NFS_EXPORT" |
			sed -E "s|(Path\|Pseudo) = .*|\1 = \"$dir\";|" \
			    >>"$st/ganesha.conf"
	fi
	bin=$(command -v ganesha.nfsd || :)
	if [ -n "$prefix" ]; then
		bin=$prefix/usr/bin/ganesha.nfsd
		LD_LIBRARY_PATH=$(echo "$lib"/*-linux-gnu "$lib/ganesha" | tr ' ' :)
		export LD_LIBRARY_PATH
	fi
	[ -x "$bin" ] || die "no ganesha.nfsd: install nfs-ganesha"
	# Ganesha exits unless rpcbind takes its NFSv3 registration, which no
	# client of ours looks up.  This stands in for registering.
	if [ ! -e "$state/noreg.so" ]; then
		echo '_Bool svc_reg(void) { return 1; }
		_Bool rpcb_unset(void) { return 1; }' |
			"${CC:-cc}" -shared -fPIC -x c -o "$state/noreg.so.$$" -
		mv "$state/noreg.so.$$" "$state/noreg.so"
	fi
	rm -f "$st/pid"
	: >"$st/log"
	# A test runner's own descriptors must not live on in a daemon.
	exec 3>&- 4>&-
	# shellcheck disable=SC3045	# dash, bash and busybox have it
	ulimit -v "$vmem"
	${NFS_NETNS:+ip netns exec "$NFS_NETNS"} \
		env LD_PRELOAD="$state/noreg.so" "$bin" -f "$st/ganesha.conf" \
			-L "$st/log" -p "$st/pid" >"$st/out" 2>&1 </dev/null ||
		{ cat "$st/out" "$st/log" >&2; die "ganesha.nfsd failed"; }
	# Ready when it says so: the listening socket opens before the exports.
	n=0
	until grep -q 'NFS SERVER INITIALIZED' "$st/log"; do
		n=$((n + 1))
		if [ "$n" -gt 200 ] || { [ "$n" -gt 20 ] && ! alive "$port"; }; then
			cat "$st/log" >&2
			die "server on port $port did not come up"
		fi
		sleep 0.05
	done
}

case "${1:-}:$#" in
start:3) start "$2" "$3" ;;
start:2) start_anywhere "$2" ;;
stop:2) stop_one "$2" TERM ;;
stop:1)
	for d in "$state"/[0-9]*; do
		[ -d "$d" ] && stop_one "${d##*/}" TERM
	done ;;
kill:2) stop_one "$2" KILL ;;
pid:2) alive "$2" && echo "$pid" ;;
*) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2; exit 2 ;;
esac
