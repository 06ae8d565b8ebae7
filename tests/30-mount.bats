#!/usr/bin/env bats
# What the mount shows is what the server has: names, metadata, nothing else.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2010,SC2012,SC2030,SC2031,SC2034,SC2164,SC2317

load helpers

# Names that programs trip over.  NFSv4 names are UTF-8, so for it (v4) none
# that isn't.
odd_names() { # [v4]
	local n
	n=$(printf 'n%.0s' {1..255})
	# shellcheck disable=SC2016	# no expansion meant
	printf '%s\0' $'new\nline' -dash '-rf *' ' space ' '*' '$HOME' "it's" \
	    'back\slash' $'tab\ttab' ... .hidden 'Übermut-日本語' "$n" 'a"b' \
	    $'\x01\x7f' 'con:aux|<>?'
	[ "${1:-}" = v4 ] || printf '%s\0' $'\xff\xfe-no-utf8' $'\xc3('
}

# A bit of everything, below $EXPORT/tree.
make_tree() { # [v4]
	local name d=$EXPORT/tree
	mkdir -p "$d/names" "$d/kinds" "$d/deep"
	while IFS= read -r -d '' name; do
		printf '%s' "$name" >"$d/names/$name"
		mkdir "$d/names/$name.d" 2>/dev/null || mkdir "$d/names/long.d"
	done < <(odd_names "$@")
	cd "$d/kinds"
	: >empty
	truncate -s 5G sparse
	printf end | dd of=sparse bs=1 seek=4500000000 conv=notrunc status=none
	truncate -s 0 grown && truncate -s 4294967297 grown
	mkfifo fifo
	python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
	mknod null c 1 3
	mknod disk b 259 70000
	ln -s /no/such/target dangling
	ln -s "$(printf '../%.0s' {1..1000})x" far
	ln -s $'odd\xff\ntarget' oddlink
	for name in x xx xxx xxxx xxxxx xxxxxx xxxxxxx xxxxxxxx; do
		ln -s "$name" "link-to-$name"	# XDR pads to four bytes
	done
	echo one >link1
	ln link1 link2
	ln link1 ../deep/link3
	for mode in 0000 0444 0600 0755 4755 2755 1777 7777; do
		: >"mode$mode"
		chmod "$mode" "mode$mode"
		mkdir "dir$mode"
		chmod "$mode" "dir$mode"
	done
	: >owned
	chown 12345:54321 owned
	ln -s owned ownedlink
	chown -h 2147483647:1 ownedlink
	: >old && touch -d '1970-01-01 00:00:00 UTC' old
	: >future && touch -d '2037-12-31 23:59:59.123456789 UTC' future
	: >nano && touch -d '2020-02-29 12:34:56.987654321 UTC' nano
	cd "$d/deep"
	for name in {1..40}; do
		mkdir "level$name"
		cd "level$name"
	done
	echo bottom >bottom
	cd "$WORK"
}

names_of() { # DIR -> sorted, NUL-separated
	(cd "$1" && find . -print0 | sort -z)
}

equals_the_server() {
	local ignore=()
	# libnfs 4 and 5 don't ask an NFSv4 server for device numbers.
	[ "$KIND" != v4 ] || ignore=(-i rdev)
	"$TESTS/treecheck.py" "${ignore[@]}" "$MNT/tree" "$EXPORT/tree"
	names_of "$MNT/tree" >"$WORK/a"
	names_of "$EXPORT/tree" >"$WORK/b"
	same "$WORK/a" "$WORK/b"
}

@test "names and metadata equal the server's, of all kinds of files, by every backend" {
	need root
	make_tree v4
	each_backend equals_the_server
}

@test "names that are no UTF-8 come through by NFSv3 and from a directory" {
	need root
	make_tree
	for KIND in v3 dir; do
		CACHE=$WORK/cache.$KIND
		start_kind "$KIND"
		equals_the_server
		stop_cachefs
	done
}

files_read_by_odd_names() {
	local name
	while IFS= read -r -d '' name; do
		[ "$(cat -- "$MNT/tree/names/$name")" = "$name" ]
	done < <(odd_names v4)
	[ "$(cat "$MNT/tree/kinds/link2")" = one ]
	[ "$(cat "$MNT/tree/deep/link3")" = one ]
	[ ! -s "$MNT/tree/kinds/empty" ]
	[ "$(tail -c +4500000001 "$MNT/tree/kinds/sparse" | head -c 3)" = end ]
	[ "$(tail -c 1 "$MNT/tree/kinds/grown" | od -An -tx1)" = ' 00' ]
	[ "$(find "$MNT/tree/deep" -name bottom -exec cat {} +)" = bottom ]
}

@test "files with odd names, sizes and depths read right, by every backend" {
	need root
	make_tree v4
	each_backend files_read_by_odd_names
}

lists_all() {
	[ "$(ls "$MNT/many" | wc -l)" = 5000 ]
	names_of "$MNT/many" >"$WORK/a"
	names_of "$EXPORT/many" >"$WORK/b"
	same "$WORK/a" "$WORK/b"
	# By the directory stream itself: . and .. once each, nothing twice.
	ls -fa "$MNT/many" | sort | uniq -d >"$WORK/twice"
	[ ! -s "$WORK/twice" ]
	[ "$(ls -fa "$MNT/many" | grep -cxF -e . -e ..)" = 2 ]
}

@test "a directory of 5000 entries lists whole, none twice, by every backend" {
	mkdir "$EXPORT/many"
	(cd "$EXPORT/many" && seq -f 'a-name-of-some-length-%06.0f' 5000 | xargs touch)
	each_backend lists_all
}

# All names, at the price of LOOKUPs and a question whether they are right.
lists_by_itself() {
	local requests
	requests=$(stat_of backend_requests)
	[ "$(ls -f "$MNT/many" | wc -l)" = 5002 ] &&
	    [ "$(stat_of backend_requests)" -le $((requests + 3)) ]
}

@test "a directory is not listed by the server again until it has changed" {
	keep_caches
	mkdir "$EXPORT/many"
	(cd "$EXPORT/many" && seq -f 'a-name-of-some-length-%06.0f' 5000 | xargs touch)
	start_nfs
	start_cachefs
	wait_until 10 lists_by_itself
	for i in {1..50}; do		# each shows at once
		touch "$EXPORT/many/new$i"
		ls -f "$MNT/many" | grep -qx "new$i"
	done
	[ "$(ls -f "$MNT/many" | wc -l)" = 5052 ]
}

nothing_can_be_changed() {
	"$TESTS/rofs.py" "$MNT"
}

@test "whatever would modify fails with EROFS, and the server is as before, by every backend" {
	echo text >"$EXPORT/file"
	mkdir "$EXPORT/dir" "$EXPORT/full"
	echo text >"$EXPORT/full/file"
	ln -s file "$EXPORT/link"
	cp -a "$EXPORT" "$WORK/before"
	each_backend nothing_can_be_changed
	"$TESTS/treecheck.py" -i ctime_ns "$EXPORT" "$WORK/before"
	diff -r "$EXPORT" "$WORK/before"
}

statfs_is_the_servers() {
	local got want
	got=$(stat -f -c '%b * %S' "$MNT")
	want=$(stat -f -c '%b * %S' "$EXPORT")
	[ $((got)) = $((want)) ]
	[ "$(stat -f -c %l "$MNT")" = 255 ]
	# Free space moves while we look.
	got=$(($(stat -f -c '%f * %S' "$MNT") >> 20))
	want=$(($(stat -f -c '%f * %S' "$EXPORT") >> 20))
	[ $((got - want)) -lt 4096 ]
	[ $((want - got)) -lt 4096 ]
}

@test "statfs is the server's, by every backend" {
	each_backend statfs_is_the_servers
}

missing_is_missing() {
	local before
	not stat "$MNT/none" 2>"$WORK/err"
	grep -q 'No such file' "$WORK/err"
	not stat "$MNT/file/below" 2>"$WORK/err"
	grep -q 'Not a directory' "$WORK/err"
	not cat "$MNT/dir" 2>"$WORK/err"
	grep -q 'Is a directory' "$WORK/err"
	not stat "$MNT/$(printf 'n%.0s' {1..256})" 2>"$WORK/err"
	grep -q 'name too long' "$WORK/err"
	# A name made on the server is there once the negative entry has expired.
	echo new >"$EXPORT/none"
	wait_until 5 test -e "$MNT/none"
	[ "$(cat "$MNT/none")" = new ]
	rm "$EXPORT/none"
	gone_from_mount() { [ ! -e "$MNT/none" ]; }
	wait_until 5 gone_from_mount
}

@test "errors are the server's: ENOENT ENOTDIR EISDIR ENAMETOOLONG, by every backend" {
	echo text >"$EXPORT/file"
	mkdir "$EXPORT/dir"
	each_backend missing_is_missing
}

changes_show() {
	ls "$MNT/dir" >/dev/null
	stat -c %a "$MNT/file" >/dev/null
	echo new >"$EXPORT/dir/added"
	chmod 600 "$EXPORT/file"
	listed() { ls "$MNT/dir" | grep -qx "$1"; }
	moded() { [ "$(stat -c %a "$MNT/file")" = "$1" ]; }
	wait_until 5 listed added
	wait_until 5 moded 600
	rm "$EXPORT/dir/added"
	chmod 644 "$EXPORT/file"
	not_listed() { ! listed "$1"; }
	wait_until 5 not_listed added
	wait_until 5 moded 644
}

@test "names and attributes changed on the server show after the timeouts, by every backend" {
	echo text >"$EXPORT/file"
	mkdir "$EXPORT/dir"
	each_backend changes_show
}

@test ".cachefs/stats is there, is JSON, and is in no listing" {
	echo text >"$EXPORT/file"
	BACKEND=$EXPORT start_cachefs
	[ "$(ls -A "$MNT")" = file ]
	[ "$(find "$MNT" -mindepth 1)" = "$MNT/file" ]
	jq -e . "$MNT/.cachefs/stats" >/dev/null
	# Whole by one read, by small reads, and fresh each time.
	dd if="$MNT/.cachefs/stats" bs=7 status=none | jq -e .state >/dev/null
	was=$(stat_of opens_buffered)
	cat "$MNT/file"
	[ "$(($(stat_of opens_buffered) + $(stat_of opens_passthrough)))" -gt "$was" ]
}

@test "a subdirectory of the export can be the backend" {
	mkdir -p "$EXPORT/a/b"
	echo text >"$EXPORT/a/b/file"
	echo secret >"$EXPORT/above"
	for NFS_VERSION in 3 4; do
		start_nfs
		CACHE=$WORK/cache.$NFS_VERSION
		NFS_URL+=/a/b
		start_cachefs
		[ "$(ls -A "$MNT")" = file ]
		[ "$(cat "$MNT/file")" = text ]
		stop_cachefs
		stop_nfs
	done
}

@test "host:/export and a port in the URL name the same server" {
	echo text >"$EXPORT/file"
	start_nfs
	NFS_URL=127.0.0.1:$NFS_DIR
	launch -f -o "nfs_backend=$NFS_URL,$NFS_OPTS,cache_dir=$CACHE" "$MNT"
	[ "$(cat "$MNT/file")" = text ]
	stop_cachefs
	launch -f -o "nfs_backend=nfs://127.0.0.1:$NFS_PORT$NFS_DIR,nfs_mount_port=$((NFS_PORT + 1)),cache_dir=$CACHE.2" "$MNT"
	[ "$(cat "$MNT/file")" = text ]
}

@test "the version is found by itself: auto mounts" {
	echo text >"$EXPORT/file"
	start_nfs
	start_cachefs nfs_version=auto
	[ "$(cat "$MNT/file")" = text ]
}

@test "the mount is read-only, nosuid and nodev, and says where it is from" {
	BACKEND=$EXPORT start_cachefs
	findmnt -no OPTIONS -M "$MNT" | tr , '\n' >"$WORK/options"
	for o in ro nosuid nodev default_permissions; do
		grep -qx "$o" "$WORK/options" || fail "not mounted $o"
	done
	[ "$(findmnt -no FSTYPE -M "$MNT")" = fuse.cachefs ]
	[ -n "$(findmnt -no SOURCE -M "$MNT")" ]
}

@test "mount.cachefs takes mount(8)'s arguments" {
	need root
	echo text >"$EXPORT/file"
	ln -s "$CACHEFS" "$WORK/mount.cachefs"
	undo force_unmount "$MNT"
	for source in "$EXPORT" dummy; do
		extra=
		[ "$source" = "$EXPORT" ] || extra=,nfs_backend=$EXPORT
		timeout 60 "$WORK/mount.cachefs" "$source" "$MNT" -o \
		    "rw,noatime,_netdev,cache_dir=$CACHE$extra" 3>&- 4>&-
		is_mounted
		[ "$(cat "$MNT/file")" = text ]
		pid=$(CACHEFS=$(readlink -f "$WORK/mount.cachefs") daemon_of "$MNT")
		umount "$MNT"
		wait_until 10 gone "$pid"
	done
}

@test "another user is kept out, or with allow_other held to the file's permissions" {
	need root
	echo public >"$EXPORT/public"
	echo secret >"$EXPORT/secret"
	chmod 600 "$EXPORT/secret"
	mkdir -m 700 "$EXPORT/private"
	echo secret >"$EXPORT/private/file"
	BACKEND=$EXPORT start_cachefs
	[ "$(as_nobody public)" = EACCES ]
	stop_cachefs
	BACKEND=$EXPORT start_cachefs fuse_allow_other=yes
	[ "$(as_nobody public)" = public ]
	[ "$(as_nobody secret)" = EACCES ]
	[ "$(as_nobody private/file)" = EACCES ]
	# The statistics are no secret, the contents stay one once cached.
	same "$EXPORT/secret" "$MNT/secret"
	[ "$(as_nobody secret)" = EACCES ]
}

# What user 65534 reads from $MNT/FILE, reached from a descriptor of root's.
as_nobody() { # FILE
	python3 - "$MNT" "$1" <<-'END'
		import errno, os, sys
		top = os.open(sys.argv[1], os.O_PATH)
		os.setgroups([]); os.setgid(65534); os.setuid(65534)
		try:
		    fd = os.open(sys.argv[2], os.O_RDONLY, dir_fd=top)
		    print(os.read(fd, 100).decode(), end="")
		except OSError as e:
		    print(errno.errorcode[e.errno])
	END
}

@test "the server is asked as nfs_uid and nfs_gid" {
	need root
	echo text >"$EXPORT/theirs"
	chown 12345:54321 "$EXPORT/theirs"
	chmod 400 "$EXPORT/theirs"
	echo text >"$EXPORT/roots"
	chmod 400 "$EXPORT/roots"
	chmod 755 "$EXPORT" "$WORK"
	start_nfs
	start_cachefs nfs_uid=12345 nfs_gid=54321
	[ "$(cat "$MNT/theirs")" = text ]
	not cat "$MNT/roots" 2>"$WORK/err"
	grep -qE 'Permission denied|Input/output error' "$WORK/err"
}

@test "nothing outside the mount is touched: a symbolic link is given, not followed" {
	echo outside >"$WORK/outside"
	ln -s "$WORK/outside" "$EXPORT/out"
	ln -s ../outside "$EXPORT/up"
	BACKEND=$EXPORT start_cachefs
	[ "$(readlink "$MNT/out")" = "$WORK/outside" ]
	[ "$(readlink "$MNT/up")" = ../outside ]
	cat "$MNT/out" >/dev/null
	wait_quiet
	[ "$(stat_of backend_read_bytes)" = 0 ]
	[ "$(stat_of objects)" = 0 ]
}

@test "of root's capabilities the daemon keeps what it needs, in every thread" {
	need root
	make_file "$EXPORT/f" 1M
	# CAP_SYS_ADMIN is 21, IPC_LOCK 14, NET_BIND_SERVICE 10, DAC_READ_SEARCH 2.
	capabilities() {
		cat "$MNT/f" >/dev/null
		grep -hE '^Cap(Inh|Prm|Eff)' "/proc/$CACHEFS_PID/task"/*/status |
			sort -u | tr '\n\t' ' '
	}
	start_nfs
	start_cachefs
	[ "$(capabilities)" = "CapEff: 0000000000204400 CapInh: 0000000000000000 CapPrm: 0000000000204400 " ]
	stop_cachefs
	rm -rf "$CACHE"
	chmod 000 "$EXPORT/f"		# which root may read all the same
	chown 12345:12345 "$EXPORT/f"
	BACKEND=$EXPORT start_cachefs
	[ "$(capabilities)" = "CapEff: 0000000000204004 CapInh: 0000000000000000 CapPrm: 0000000000204004 " ]
}
