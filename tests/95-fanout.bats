#!/usr/bin/env bats
# A tier between the nodes and the origin: contrib/fanout.
#	origin (Ganesha) - site: cachefs, exported again by Ganesha - nodes: cachefs
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

SITE_PORT=

# What is exported can't be unmounted.
teardown() {
	[ -z "$SITE_PORT" ] || NFS_STATE=$WORK/nfs.site \
	    "$TESTS/nfs-server.sh" stop
	export NFS_STATE=$WORK/nfs	# the origin's
	common_teardown
}

# The site's cachefs, on $WORK/site.
start_site() {
	MNT=$WORK/site CACHE=$WORK/cache.site
	mkdir -p "$MNT"
	NFS_STATE=$WORK/nfs nfs_opts "$ORIGIN_PORT" $((ORIGIN_PORT + 1))
	NFS_URL=nfs://127.0.0.1$EXPORT
	start_cachefs
	SITE_PID=$CACHEFS_PID
}

# The site's export of that, each time on the same port.
start_export() {
	export NFS_EXPORT=$ROOT/contrib/fanout/ganesha.conf
	NFS_STATE=$WORK/nfs.site
	if [ -z "$SITE_PORT" ]; then
		SITE_PORT=$("$TESTS/nfs-server.sh" start "$WORK/site")
	else
		"$TESTS/nfs-server.sh" start "$WORK/site" "$SITE_PORT"
	fi
}

start_node() { # N [OPT...]
	local n=$1
	shift
	MNT=$WORK/node.$n CACHE=$WORK/cache.$n
	mkdir -p "$MNT"
	nfs_opts "$SITE_PORT" $((SITE_PORT + 1))
	NFS_URL=nfs://127.0.0.1$WORK/site
	start_cachefs "$@"
}

tiers() { # NODES [OPT...]
	local nodes=$1 n
	shift
	need root fuse nfs
	start_nfs
	# shellcheck disable=SC2153	# start_nfs sets it
	ORIGIN_PORT=$NFS_PORT
	start_site
	start_export
	for ((n = 1; n <= nodes; n++)); do
		start_node "$n" "$@"
	done
}

# As an administrator would: first who exports it, then what is exported.
stop_site() { # stop | kill
	NFS_STATE=$WORK/nfs.site "$TESTS/nfs-server.sh" "$1" "$SITE_PORT"
	MNT=$WORK/site
	stop_cachefs
}

bytes_of() { # NAME: what it has fetched
	jq .backend_read_bytes "$WORK/$1/.cachefs/stats"
}

@test "four nodes behind a site read each byte of the origin once, and right" {
	make_file "$EXPORT/f" 48M
	mkdir "$EXPORT/d"
	for i in {1..20}; do make_file "$EXPORT/d/$i" 100K; done
	tiers 4
	for n in 1 2 3 4; do
		background cmp "$EXPORT/f" "$WORK/node.$n/f"
		pids+=($!)
	done
	for pid in "${pids[@]}"; do wait "$pid"; done
	for n in 1 2 3 4; do
		diff -r "$EXPORT" "$WORK/node.$n"
	done
	want=$(((48 << 20) + 20 * 100 * 1024))
	echo "from the origin: $(bytes_of site) of $want"
	[ "$(bytes_of site)" -ge "$want" ]
	[ "$(bytes_of site)" -le $((want * 101 / 100)) ]
	# A node has each byte once, too, and the numbers of the origin's files.
	[ "$(bytes_of node.3)" -le $((want * 101 / 100)) ]
	[ "$(stat -c %i "$WORK/node.1/d/7")" = "$(stat -c %i "$EXPORT/d/7")" ]
}

@test "the site's restart costs its nodes neither a byte nor an error, not in mid-read" {
	for d in a b; do
		mkdir "$EXPORT/$d"
		for f in x y; do make_file "$EXPORT/$d/$f" 1M "$d"; done
	done
	make_file "$EXPORT/whole" 5M
	make_file "$EXPORT/f" 160M
	make_file "$EXPORT/g" 160M
	tiers 1 cache_fill=100 nfs_timeout=20 fuse_attr_timeout=3600 \
	    fuse_entry_timeout=3600
	N=$WORK/node.1
	same "$EXPORT/whole" "$N/whole"
	same "$EXPORT/a/x" "$N/a/x"
	same "$EXPORT/b/x" "$N/b/x"
	exec 5<"$N/f" 6<"$N/g"
	head -c 1M <&5 >"$WORK/f"
	head -c 1M <&6 >"$WORK/g"
	whole=$(bytes_of node.1)

	stop_site kill
	start_site 5<&- 6<&-		# for the daemon not to keep them
	# What the server's handles stood for they stand for no more: another order.
	stat "$WORK/site"/{b/y,b,a/y,a,g,f,whole} >/dev/null
	start_export 5<&- 6<&-
	MNT=$N
	background sh -c 'cat <&6' >>"$WORK/g"
	cat <&5 >>"$WORK/f"
	wait $!
	exec 5<&- 6<&-
	cmp "$EXPORT/f" "$WORK/f"
	cmp "$EXPORT/g" "$WORK/g"
	for d in a b; do
		for f in x y; do same "$EXPORT/$d/$f" "$N/$d/$f"; done
	done
	diff <(ls "$EXPORT/a") <(ls "$N/a")
	# What was cached still is: the numbers are the same, and the file
	# system's although it is another one for the kernel.
	was=$(stat -c %d "$WORK/site")
	mkdir "$WORK/other"
	stop_site kill
	mount -t tmpfs none "$WORK/other"	# takes the device's number
	undo umount "$WORK/other"
	start_site
	[ "$(stat -c %d "$WORK/site")" != "$was" ]
	start_export
	MNT=$N
	wait_until 20 state_is online
	drop_caches
	before=$(bytes_of node.1)
	same "$EXPORT/whole" "$N/whole"
	same "$EXPORT/f" "$N/f"
	is_complete "$N/f"
	[ "$(bytes_of node.1)" = "$before" ]
	same "$EXPORT/b/y" "$N/b/y"
}

@test "the configurations of contrib/fanout are good" {
	for f in site node; do
		sed "s|^backend = .*|backend = $EXPORT|; s|^dir = .*|dir = $CACHE.$f|
		    s|^size = .*T|size = 1G|" "$ROOT/contrib/fanout/$f.ini" \
		    >"$WORK/$f.ini"
		launch -f -c "$WORK/$f.ini" "$MNT"
		stop_cachefs
		not grep -E '(error|warning):' "$LOG"
	done
}
