#!/usr/bin/env bats
# In containers: what contrib/ has for podman and Kubernetes.  A container's
# runtime is not needed: what it does with mounts is done here by hand.
# Each test is a subshell of its own with errexit on; helpers read its variables.
# shellcheck disable=SC2030,SC2031,SC2034

load helpers

KUBE=$ROOT/contrib/kubernetes

# What yq would be for: EXPR of the samples' documents, by kind, in python.
kube() { # EXPR
	/usr/bin/python3 - "$1" "$KUBE"/*.yaml <<-'END'
		import sys, yaml
		doc = {d["kind"]: d for f in sys.argv[2:]
		       for d in yaml.safe_load_all(open(f))}
		print(eval(sys.argv[1]))
	END
}

# A root directory for a container: the system's programs and this cachefs.
make_root() {
	local dir
	ROOTFS=$WORK/root HOST=$WORK/host
	mkdir -p "$HOST" "$WORK/etc" "$WORK/var" "$ROOTFS"/{usr,proc,dev,tmp} \
	    "$ROOTFS"/{etc/cachefs,var/cache/cachefs,srv/cachefs,export,opt}
	for dir in bin sbin lib lib64; do
		[ ! -L /$dir ] || ln -s "usr/$dir" "$ROOTFS/$dir"
	done
	cp "$CACHEFS" "$ROOTFS/opt/cachefs"
	cp /etc/ld.so.cache "$ROOTFS/etc"
	# a directory of the host that is shared with the container, alone
	mount --bind "$HOST" "$HOST"
	undo umount -l "$HOST"
	mount --make-private "$HOST"
	mount --make-shared "$HOST"
}

# Run the DaemonSet's command as its container would: as process 1, in a mount
# namespace whose /srv/cachefs is the host's (Bidirectional).
start_container() {
	local child
	undo force_unmount "$HOST/models"
	# shellcheck disable=SC2016	# for the other shell
	# A sanitizer's file is not in there, and what is open at the end is not
	# freed.
	LSAN_OPTIONS=detect_leaks=0 unshare -m -p -f --kill-child --propagation unchanged \
	    /bin/sh -ec '
		mount --make-slave "$(findmnt -no TARGET -T "$1")"
		mount --bind "$1" "$1"
		mount --make-private "$1"
		mount --rbind /usr "$1/usr"
		mount -t proc proc "$1/proc"
		mount --rbind /dev "$1/dev"
		mount --bind "$2/etc" "$1/etc/cachefs"
		mount --bind "$2/var" "$1/var/cache/cachefs"
		mount --bind "$3" "$1/export"
		mount --rbind "$2/host" "$1/srv/cachefs"
		exec chroot "$1" /bin/sh -c "$4"' - "$ROOTFS" "$WORK" "$EXPORT" \
	    "PATH=/opt:\$PATH; $(kube 'doc["DaemonSet"]["spec"]["template"]["spec"]["containers"][0]["command"][2]')" \
	    >>"$LOG" 2>&1 3>&- 4>&- </dev/null &
	CONTAINER=$!
	undo end_process "$CONTAINER"
	wait_until 20 answers "$HOST/models"
	child=$(pgrep -P "$CONTAINER")
	INSIDE=(nsenter -t "$child" -m -p -r -w env "PATH=/opt:$PATH")
}

answers() { # MNT
	is_mounted "$1" && timeout 5 jq -e .state "$1/.cachefs/stats" >/dev/null 2>&1
}

dead() { # MNT
	! stat "$1" >/dev/null 2>&1
}

@test "the Kubernetes samples fit together, and kubectl knows all that is in them" {
	/usr/bin/python3 - "$KUBE"/*.yaml <<-'END'
		import json, shutil, subprocess, sys, yaml
		docs = [d for f in sys.argv[1:] for d in yaml.safe_load_all(open(f))]
		doc = {d["kind"]: d for d in docs}
		assert set(doc) == {"ConfigMap", "DaemonSet", "Pod"}, doc

		def path(mount, pod):
		    v = next(v for v in pod["volumes"] if v["name"] == mount["name"])
		    return v["hostPath"]["path"] if "hostPath" in v else ""

		daemon = doc["DaemonSet"]["spec"]["template"]["spec"]
		for pod in daemon, doc["Pod"]["spec"]:
		    used = {m["name"] for c in pod["containers"]
		            for m in c["volumeMounts"]}
		    assert used == {v["name"] for v in pod["volumes"]}, used
		    for v in pod["volumes"]:
		        assert v.get("hostPath", {}).get("type", "Directory") in (
		            "Directory", "DirectoryOrCreate"), v
		    for c in pod["containers"]:
		        for m in c["volumeMounts"]:
		            # others must see the mount where the daemon made it
		            kind = m.get("mountPropagation", "None")
		            if path(m, pod) == "/srv/cachefs":
		                assert m["mountPath"] == "/srv/cachefs", m
		                assert kind == ("Bidirectional" if c["name"] ==
		                    "cachefs" else "HostToContainer"), c["name"]
		            else:
		                assert kind == "None", m
		cachefs = daemon["containers"][0]
		# the API server's rule for Bidirectional
		assert cachefs["securityContext"]["privileged"] is True
		where = cachefs["command"][2].split()[-1]
		assert cachefs["readinessProbe"]["exec"]["command"][-1] == where
		ini = cachefs["command"][2].split()[-2].rsplit("/", 1)
		config = next(m for m in cachefs["volumeMounts"] if m["name"] == "config")
		assert config["mountPath"] == ini[0], config
		assert ini[1] in doc["ConfigMap"]["data"]
		assert daemon["volumes"][0]["configMap"]["name"] == \
		    doc["ConfigMap"]["metadata"]["name"]
		assert doc["DaemonSet"]["spec"]["selector"]["matchLabels"].items() <= \
		    doc["DaemonSet"]["spec"]["template"]["metadata"]["labels"].items()

		# kubectl reads the types of its API and drops what they lack
		def within(a, b, at):
		    if isinstance(a, dict):
		        assert isinstance(b, dict), at
		        for k in a:
		            assert k in b, f"kubectl does not know {at}.{k}"
		            within(a[k], b[k], f"{at}.{k}")
		    elif isinstance(a, list):
		        assert len(a) == len(b), at
		        for i, (x, y) in enumerate(zip(a, b)):
		            within(x, y, f"{at}[{i}]")
		    else:
		        assert a == b or at.endswith(".image"), f"{at}: {a} {b}"
		for d in docs if shutil.which("kubectl") else []:
		    if d["kind"] == "ConfigMap":	# set image takes pods only
		        continue
		    out = subprocess.run(["kubectl", "set", "image", "--local", "-f",
		        "-", "*=other", "-o", "json"], input=json.dumps(d), text=True,
		        stdout=subprocess.PIPE, check=True).stdout
		    within(d, json.loads(out), d["kind"])
	END
}

@test "the DaemonSet's command mounts for the host, also after a kill, and SIGTERM unmounts" {
	need root fuse
	make_root
	make_file "$EXPORT/f" 3M
	kube 'doc["ConfigMap"]["data"]["models.ini"]' |
		sed 's|^backend = .*|backend = /export|' >"$WORK/etc/models.ini"
	grep -qx 'backend = /export' "$WORK/etc/models.ini"
	start_container
	same "$EXPORT/f" "$HOST/models/f"
	# The readiness probe's command, there; the daemon is process 1.
	mapfile -t probe < <(kube '"\n".join(doc["DaemonSet"]["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["exec"]["command"])')
	"${INSIDE[@]}" "${probe[@]}" | grep -q '^cachefs_up.* 1$'
	kill -KILL "$(pgrep -P "$CONTAINER")"
	wait_until 10 gone "$CONTAINER"
	is_mounted "$HOST/models"
	wait_until 10 dead "$HOST/models"

	start_container
	grep -q 'cleared the mount of a cachefs that died' "$LOG"
	same "$EXPORT/f" "$HOST/models/f"
	exec 5<"$HOST/models/f"
	kill -TERM "$(pgrep -P "$CONTAINER")"	# from outside, as a runtime does
	wait_until 10 gone "$CONTAINER"
	exec 5<&-
	wait "$CONTAINER"
	not is_mounted "$HOST/models"
}

@test "without privileges it mounts in a user namespace, for those in it" {
	need root fuse
	unshare -U -r -m true || skip "no user namespaces"
	make_file "$EXPORT/f" 3M
	# shellcheck disable=SC2016	# for the other shell
	timeout $((30 * SLOW)) unshare -U -r -m /bin/sh -ec '
		"$1" -o "$2" "$3"
		cmp "$4/f" "$3/f"
		"$1" stats -j "$3" | jq -r .passthrough
		umount "$3"' - "$CACHEFS" \
	    "$(BACKEND=$EXPORT cachefs_opts)" "$MNT" "$EXPORT" >"$WORK/out" 2>>"$LOG"
	[ "$(cat "$WORK/out")" = "off:needs CAP_SYS_ADMIN" ]
	not is_mounted
}

@test "the Containerfile builds with the libraries of deps.sh, and copies what is there" {
	sed -nE '/^build_pkgs=/,/"$/p' "$TESTS/deps.sh" | sed 's/build_pkgs=//' |
		tr -d '"' | xargs -n 1 | sort >"$WORK/deps"
	sed -n '/AS build$/,/^WORKDIR/p' "$ROOT/contrib/Containerfile" |
		xargs -n 1 | grep -E '^(build-essential|pkg-config|lib.*-dev)$' |
		sort >"$WORK/built"
	[ -s "$WORK/deps" ]
	diff "$WORK/deps" "$WORK/built"
	sed -nE 's/^COPY ([^-].*) [^ ]+$/\1/p' "$ROOT/contrib/Containerfile" |
		xargs -n 1 >"$WORK/copied"
	[ "$(wc -l <"$WORK/copied")" -ge 6 ]
	while read -r f; do
		[ -e "$ROOT/$f" ] || fail "no $f"
	done <"$WORK/copied"
}
