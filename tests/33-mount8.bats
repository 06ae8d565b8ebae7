#!/usr/bin/env bats
# mount(8), fstab(5), umount(8) and findmnt(8): what administrators type.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

setup() {
	common_setup
	make_file "$EXPORT/f" 3M
	make_file "$EXPORT/g" 2M
}

# Run the script on standard input in a mount namespace of its own, in which
# /sbin has mount.cachefs, as it is installed.  It finds $MNT, $CACHE, $EXPORT and
# $WORK, and in $W/fstab what it wrote there.
in_namespace() {
	need root fuse
	mkdir -p "$WORK/sbin"
	ln -sf "$CACHEFS" "$WORK/sbin/mount.cachefs"
	ln -sf "$CACHEFS" "$WORK/sbin/mount.fuse.cachefs"
	ln -sf "$CACHEFS" "$WORK/sbin/cachefs"
	undo end_cache_users
	{
		declare -f not fail
		cat
	} >"$WORK/script"
	export MNT CACHE EXPORT WORK CACHEFS
	# shellcheck disable=SC2016	# for the other shell
	timeout -k 5 $((100 * SLOW)) unshare -m --propagation slave \
	    bash -euc '
	mount -t overlay -o "lowerdir=$WORK/sbin:$(readlink -f /sbin)" none \
	    "$(readlink -f /sbin)"
	export LIBMOUNT_FSTAB=$WORK/fstab
	cd /
	bash -eu "$WORK/script"' 3>&- 4>&- </dev/null
	wait_until 20 no_cache_users
}

no_cache_users() {
	local lock
	for lock in "$WORK"/*cache*/lock; do
		[ ! -s "$lock" ] || gone "$(cat "$lock")" || return 1
	done
}

# The daemon of a script that failed, in its namespace.
end_cache_users() {
	local lock
	for lock in "$WORK"/*cache*/lock; do
		[ ! -s "$lock" ] || end_process "$(cat "$lock")"
	done
}

@test "the ancestor's mount line mounts as it stands, and findmnt shows the mount" {
	BACKEND=$EXPORT start_cachefs
	need io_uring			# the line wants it
	stop_cachefs
	in_namespace <<-'END'
	mount -t cachefs -o nfs_backend="$EXPORT",cache_dir="$CACHE",nvme_use_io_uring=true,nvme_queue_depth=256,nvme_polling_mode=true cachefs "$MNT"
	cmp "$EXPORT/f" "$MNT/f"
	[ "$(findmnt -no FSTYPE,SOURCE -M "$MNT" | tr -s ' ')" = "fuse.cachefs cachefs" ]
	findmnt -no OPTIONS -M "$MNT" | grep -qw ro
	umount "$MNT"
	[ -z "$(findmnt -no TARGET -M "$MNT")" ]
	END
}

@test "fstab lines of the ancestor mount by mount -a, once, and umount -a unmounts" {
	mkdir "$WORK/a" "$WORK/b" "$WORK/c"
	# As its documentation has them: a dummy for the source, with systemd's
	# words, and the mounted directory as the source.
	cat >"$WORK/fstab" <<-END
	cachefs $WORK/a cachefs nfs_backend=$EXPORT,cache_dir=$WORK/cache.a,cache_size_gb=50,block_size_mb=4,allow_other,_netdev,nofail 0 0
	cachefs $WORK/b cachefs nfs_backend=$EXPORT,cache_dir=$WORK/cache.b,x-systemd.automount,x-systemd.requires-mounts-for=$EXPORT,x-systemd.after=remote-fs.target,defaults,_netdev 0 0
	$EXPORT $WORK/c fuse.cachefs ro,noatime,cache_dir=$WORK/cache.c 0 0
	cachefs $MNT cachefs nfs_backend=$EXPORT,cache_dir=$CACHE,noauto,user 0 0
	END
	in_namespace <<-'END'
	for again in 1 2; do
		mount -a
		for m in a b c; do
			cmp "$EXPORT/f" "$WORK/$m/f"
			[ "$(grep -c " $WORK/$m " /proc/self/mountinfo)" = 1 ]
		done
	done
	[ -z "$(findmnt -no TARGET -M "$MNT")" ]	# noauto
	mount "$MNT"
	cmp "$EXPORT/g" "$MNT/g"
	umount "$WORK/a" "$WORK/b" "$WORK/c" "$MNT"
	not grep " $WORK/" /proc/self/mountinfo
	END
}

@test "a fstab line of type fuse, as the ancestor had them, mounts by mount.fuse" {
	command -v mount.fuse >/dev/null || skip "no mount.fuse here"
	# A link by the ancestor's name is the administrator's to make.
	mkdir "$WORK/a" "$WORK/sbin"
	ln -s "$CACHEFS" "$WORK/sbin/nfs-cachefs"
	cat >"$WORK/fstab" <<-END
	cachefs#$EXPORT $WORK/a fuse cache_dir=$WORK/cache.a,allow_other,_netdev 0 0
	nfs-cachefs#$EXPORT $MNT fuse cache_dir=$CACHE,cache_size_gb=50,allow_other,_netdev 0 0
	END
	in_namespace <<-'END'
	mount -a
	for m in "$WORK/a" "$MNT"; do
		cmp "$EXPORT/f" "$m/f"
		[ "$(findmnt -no FSTYPE -M "$m")" = fuse.cachefs ]
	done
	umount "$WORK/a" "$MNT"
	END
}

@test "one bad line of fstab is named, and does not keep the others from mounting" {
	mkdir "$WORK/a" "$WORK/b"
	cat >"$WORK/fstab" <<-END
	$WORK/nothing $WORK/a cachefs cache_dir=$WORK/cache.a 0 0
	$EXPORT $WORK/b cachefs cache_dir=$WORK/cache.b 0 0
	END
	in_namespace <<-'END'
	rc=0
	mount -a 2>"$WORK/said" || rc=$?
	[ "$rc" = 64 ]		# mount(8): some have succeeded
	grep -q "backend $WORK/nothing: No such file or directory" "$WORK/said"
	cmp "$EXPORT/f" "$WORK/b/f"
	umount "$WORK/b"
	END
}

@test "mount -f mounts nothing, but says what is wrong with the options" {
	in_namespace <<-'END'
	mount -f -t cachefs -o cache_dir="$CACHE" "$EXPORT" "$MNT"
	[ -z "$(findmnt -no TARGET -M "$MNT")" ]
	[ ! -e "$CACHE" ]
	not mount -f -t cachefs -o cache_dir="$CACHE",cache_fill=x "$EXPORT" \
	    "$MNT" 2>"$WORK/said"
	grep -q "option cache_fill=x" "$WORK/said"
	END
	CACHEFS=$WORK/sbin/mount.cachefs
	rc=0
	"$CACHEFS" "$EXPORT" "$MNT" -N 1 -o "cache_dir=$CACHE" \
	    2>"$WORK/said" || rc=$?
	[ "$rc" = 2 ]
	grep -q -- '-N 1: not supported' "$WORK/said"
	not is_mounted
}

@test "mount -o remount changes what can change, and it stays so after SIGHUP" {
	printf '[nfs]\nbackend=%s\n[cache]\ndir=%s\nsize=1G\n' "$EXPORT" \
	    "$CACHE" >"$WORK/ini"
	in_namespace <<-'END'
	limit() { cachefs stats -j "$MNT" | jq .cache_limit_bytes; }
	refused() { # STATUS WORDS OPTIONS
		local rc=0
		mount -o "remount,$3" "$MNT" 2>"$WORK/said" || rc=$?
		cat "$WORK/said"
		[ "$rc" = "$1" ]
		grep -qF -- "$2" "$WORK/said"
	}
	cachefs -c "$WORK/ini" -o allow_other "$MNT"
	[ "$(limit)" = $((1 << 30)) ]
	mount -o remount,cache_size=2G,noexec "$MNT"
	[ "$(limit)" = $((2 << 30)) ]
	findmnt -no OPTIONS -M "$MNT" | tr , '\n' >"$WORK/options"
	for o in ro nosuid nodev noexec default_permissions allow_other; do
		grep -qx "$o" "$WORK/options"
	done
	cmp "$EXPORT/f" "$MNT/f"

	# All or nothing, and a sentence.
	refused 1 "fuse_threads can't change without a new mount" \
	    cache_size=3G,fuse_threads=3
	refused 2 "option cache_fill=300" cache_size=3G,cache_fill=300
	refused 1 "nothing would be cached" \
	    cache_size=3G,cache_max_file_size=1K,cache_min_file_size=2K
	[ "$(limit)" = $((2 << 30)) ]

	# SIGHUP, and the next remount, read the file again; what was said since
	# wins.
	printf '[cache]\nsize = 4G\nttl = 5\n' >>"$WORK/ini"
	sed -i '/size=1G/d' "$WORK/ini"
	kill -HUP "$(cat "$CACHE/lock")"
	mount -o remount,cache_ttl=7 "$MNT"
	[ "$(limit)" = $((2 << 30)) ]
	umount "$MNT"
	END
}

@test "a remount of what is no cachefs, or is gone, says so" {
	in_namespace <<-'END'
	rc=0
	cachefs -o remount x "$EXPORT" 2>"$WORK/said" || rc=$?
	[ "$rc" = 1 ]
	grep -q "$EXPORT: is not a cachefs mount" "$WORK/said"
	END
}

@test "the old path can be mounted over, so that programs keep their paths" {
	start_nfs "$EXPORT"
	OPTS=$(cachefs_opts)
	export OPTS
	in_namespace <<-'END'
	# what stood there before: the export, mounted by other means
	mount --bind "$EXPORT" "$MNT"
	cmp "$EXPORT/f" "$MNT/f"
	exec 9<"$MNT/g"
	mount -t cachefs -o "$OPTS" over "$MNT"
	[ "$(findmnt -no FSTYPE -M "$MNT" | tail -n 1)" = fuse.cachefs ]
	cmp "$EXPORT/f" "$MNT/f"
	cmp "$EXPORT/g" <(cat <&9)	# whoever had it open reads on
	# The daemon does not keep what its caller had open.
	[ -z "$(find "/proc/$(cat "$CACHE/lock")/fd" -lname '*/g')" ]
	exec 9<&-
	umount "$MNT"
	[ "$(findmnt -no FSTYPE -M "$MNT")" != fuse.cachefs ]
	cmp "$EXPORT/f" "$MNT/f"
	umount "$MNT"
	END
}

@test "a directory can be mounted over itself, also after kill -9" {
	in_namespace <<-'END'
	for again in 1 2; do
		mount -t cachefs -o cache_dir="$CACHE" "$EXPORT" "$EXPORT"
		[ "$(findmnt -no FSTYPE -M "$EXPORT")" = fuse.cachefs ]
		md5sum "$EXPORT/f" "$EXPORT/g" >"$WORK/sums.$again"
		pid=$(cat "$CACHE/lock")
		[ "$again" = 2 ] || {
			kill -KILL "$pid"
			tail --pid="$pid" -f /dev/null
			not cat "$EXPORT/f" 2>/dev/null
		}
	done
	cmp "$WORK/sums.1" "$WORK/sums.2"
	umount "$EXPORT"
	md5sum -c --quiet "$WORK/sums.1"
	END
}
