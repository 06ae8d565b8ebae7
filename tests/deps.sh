#!/bin/bash
# Bring a Debian or Ubuntu machine to where `make` and `make check` work.
# Called by `make deps`; with the argument "bench", by `make bench`, "guest", by
# `make check-kernels`, or "packages", by `make check-packages`, for what that
# needs besides; with "build", for what `make` alone needs.  Needs root only if
# something has to be installed; does nothing, quickly, when everything is there.
#
# Passthrough needs libfuse >= 3.17.  Where the distribution's is older, the
# newer Debian sources of fuse3 and liburing are fetched (signed, by apt, with
# a configuration of our own that leaves the machine's alone) and built, static,
# into build/deps/prefix, where the Makefile finds them.  Without a newer source
# the build goes on with the distribution's libfuse.
#
#	DEBIAN_MIRROR=URL	where the sources are; "none": don't look
#
# shellcheck disable=SC2086,SC2016	# lists of words; text for others to expand
set -eu
cd "$(dirname "$0")/.."
goal=${1:-deps}
export LC_ALL=C DEBIAN_FRONTEND=noninteractive

build_pkgs="build-essential pkg-config libfuse3-dev libnfs-dev
    libiniparser-dev libxxhash-dev liburing-dev"
check_pkgs="bats fio fuse3 git nfs-ganesha nfs-ganesha-vfs python3 procps mount
    attr acl jq strace systemd xfsprogs e2fsprogs iproute2 python3-yaml"
lint_pkgs="clang clang-tidy cppcheck shellcheck mandoc valgrind"
bench_pkgs="fio rclone bindfs gnuplot-nox"
guest_pkgs="qemu-system-x86 busybox-static xz-utils"
package_pkgs="debootstrap git systemd-container"
fuse_pkgs="debian-archive-keyring meson ninja-build python3 libnuma-dev"

want=3.17			# the first libfuse with passthrough
suites="forky trixie"		# Debian suites that have it, newest first
deps=$PWD/build/deps
prefix=$deps/prefix
log=$deps/build.log
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
policy=/usr/sbin/policy-rc.d
policy_mark="# placed by cachefs tests/deps.sh, to be removed by it"
daemons="nfs-ganesha rpcbind"	# wanted as programs, not as services
new_daemons=
updated=			# apt-get update has been run
lacking=			# packages no source offers

say() { printf 'deps: %s\n' "$*"; }
die() { printf 'deps: %s\n' "$*" >&2; exit 1; }

# Those of the packages named that are not installed.
missing()
{
	local p
	for p; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" \
		    = installed ] || echo "$p"
	done
}

# Those of the packages named that apt could install.
available()
{
	local p
	for p; do
		if apt-cache policy "$p" 2>/dev/null |
		    grep -q 'Candidate: [^(]'; then
			echo "$p"
		fi
	done
}

# No package's installation starts a service from here on.
services_off()
{
	if [ -e "$policy" ] || [ -L "$policy" ]; then
		mv -f "$policy" "$policy.cachefs-saved"
	fi
	printf '#!/bin/sh\n%s\nexit 101\n' "$policy_mark" >"$policy"
	chmod 755 "$policy"
}

# Undo services_off, and keep daemons that came just now ($new_daemons) from
# starting at the next boot.
services_on()
{
	local d
	if grep -qsF "$policy_mark" "$policy"; then
		rm -f "$policy"
	fi
	if [ -e "$policy.cachefs-saved" ] || [ -L "$policy.cachefs-saved" ]; then
		mv -f "$policy.cachefs-saved" "$policy"
	fi
	command -v systemctl >/dev/null || return 0
	for d in $new_daemons; do
		systemctl --quiet disable "$d.service" 2>/dev/null || :
		systemctl --quiet disable "$d.socket" 2>/dev/null || :
	done
	new_daemons=
}

# Install what of the packages named can be had; list the others in $lacking.
apt_install()
{
	local can p rc=0
	lacking=
	[ "$(id -u)" -eq 0 ] ||
	    die "run 'sudo make $goal'; not installed:" "$@"
	if [ -z "$updated" ]; then
		apt-get -q -o DPkg::Lock::Timeout=300 update </dev/null ||
		    say "warning: apt-get update failed for some source;" \
			"going on with what the others offer"
		updated=yes
	fi
	can=$(available "$@")
	for p; do
		grep -qxF "$p" <<<"$can" || lacking="$lacking $p"
	done
	[ -n "$can" ] || return 0
	new_daemons=$(missing $daemons)
	say "installing" $can
	trap services_on EXIT
	trap 'exit 1' HUP INT TERM
	services_off
	apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
	    install --no-install-recommends $can </dev/null || rc=$?
	services_on
	trap - EXIT HUP INT TERM
	return $rc
}

install_packages()
{
	local need p
	need=$(missing $build_pkgs $check_pkgs $lint_pkgs)
	[ -n "$need" ] || return 0
	apt_install $need || die "apt-get could not install the packages"
	for p in $lacking; do
		grep -qwF "$p" <<<"$build_pkgs" || continue
		die "no package source offers $p, without which nothing can" \
		    "be built (on Ubuntu: is 'universe' enabled?)"
	done
	[ -z "$lacking" ] || say "warning: no package source offers" \
	    "${lacking# }: checks that need it will fail"
}

# What a target wants besides, and does without, too.
more_packages() # PACKAGE...
{
	local need
	need=$(missing "$@")
	[ -n "$need" ] || return 0
	apt_install $need || die "apt-get could not install the packages"
	[ -z "$lacking" ] || say "warning: no package source offers" \
	    "${lacking# }: left out"
}

# Run a command with its output in the log.
quietly()
{
	echo "+ $*" >>"$log"
	"$@" >>"$log" 2>&1 </dev/null
}

# Point apt at the sources of one suite of one mirror, and at nothing else.
private_apt()
{
	local dir=$deps/apt
	rm -rf "$dir"
	mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
	echo "deb-src [signed-by=$keyring] $1 $2 main" >"$dir/sources.list"
	cat >"$dir/apt.conf" <<-END
	Dir::Etc::SourceList "$dir/sources.list";
	Dir::Etc::SourceParts "/dev/null";
	Dir::State::Lists "$dir/lists";
	Dir::Cache "$dir/cache";
	APT::Sandbox::User "root";
	Acquire::Languages "none";
	Acquire::Retries "1";
	Acquire::http::Timeout "20";
	Acquire::https::Timeout "20";
	END
	export APT_CONFIG=$dir/apt.conf
	quietly timeout 120 apt-get -q --error-on=any update
}

# Fetch and unpack the newest source of package $1 into $deps/src/$1.
fetch_source()
{
	mkdir -p "$deps/src/dl-$1"
	(cd "$deps/src/dl-$1" &&
	    quietly timeout 300 apt-get -q source --download-only "$1" &&
	    quietly dpkg-source --no-check -x ./*.dsc "$deps/src/$1")
}

# The machine's meson, or where it is too old for this libfuse, the one of the
# same suite, unpacked (it is plain Python) but not installed.
find_meson()
{
	local need dir=$deps/src/meson
	need=$(sed -n "s/.*meson_version *: *'[^0-9]*\([0-9.]*\).*/\1/p" \
	    "$deps/src/fuse3/meson.build" | head -n 1)
	meson=meson
	if dpkg --compare-versions "$(meson --version)" ge "${need:-0}"; then
		return 0
	fi
	say "libfuse wants meson $need: fetching a newer one"
	sed -i 'p; s/^deb-src/deb/' "$deps/apt/sources.list"
	mkdir -p "$dir"
	cd "$dir" || return 1
	quietly timeout 120 apt-get -q --error-on=any update || return 1
	quietly timeout 120 apt-get -q download meson || return 1
	quietly dpkg-deb -x meson_*.deb . || return 1
	meson="env PYTHONPATH=$dir/usr/lib/python3/dist-packages"
	meson="$meson python3 $dir/usr/bin/meson"
}

# Build both, static, and put them at $prefix.  Nothing is ever configured with
# a prefix outside this tree: liburing's install ignores DESTDIR.  Only what
# libfuse is to look for at run time (fusermount3) is the system's.
build_sources()
{
	local stage=$deps/stage b=$deps/src/fuse3-build meson pc uring=
	local pcdir=$stage/lib/pkgconfig
	rm -rf "$stage"
	cd "$deps/src/liburing" || return 1
	quietly ./configure --prefix="$stage" || return 1
	quietly make -C src ENABLE_SHARED=0 install || return 1
	quietly make liburing.pc || return 1
	mkdir -p "$pcdir"
	cp liburing.pc "$pcdir" || return 1

	find_meson || return 1
	if grep -qs enable-io-uring "$deps/src/fuse3/meson_options.txt"; then
		uring=-Denable-io-uring=true
	fi
	export PKG_CONFIG_PATH=$pcdir
	quietly $meson setup "$b" "$deps/src/fuse3" --prefix="$stage" \
	    --libdir=lib --bindir=/usr/bin --sysconfdir=/etc \
	    --buildtype=release -Ddefault_library=static -Dutils=false \
	    -Dexamples=false -Dtests=false $uring || return 1
	quietly ninja -C "$b" || return 1
	quietly $meson install -C "$b" --no-rebuild || return 1
	grep -qs '^#define HAVE_URING' "$b/fuse_config.h" ||
	    say "warning: this libfuse has no FUSE over io_uring"

	# They find their prefix by their own place, so the tree can be moved.
	for pc in "$pcdir"/*.pc; do
		sed -i -e 's|^prefix=.*|prefix=${pcfiledir}/../..|' \
		    -e "s|$stage|\${prefix}|g" "$pc"
	done
	rm -rf "$prefix"
	mv "$stage" "$prefix"
}

# Fetch and build the newest that can be had.
newer_fuse()
{
	local mirror suite version mirrors=${DEBIAN_MIRROR:-}
	if [ -z "$mirrors" ]; then
		mirrors=$(apt-get indextargets --format '$(REPO_URI)' \
		    'Origin: Debian' 'Label: Debian' 2>/dev/null | sort -u)
		mirrors="http://deb.debian.org/debian/ $mirrors"
		mirrors=$(printf '%s\n' $mirrors | awk '!seen[$0]++')
	fi
	for mirror in $mirrors; do
		for suite in $suites; do
			rm -rf "$deps/src"
			private_apt "$mirror" "$suite" || continue
			version=$(apt-cache showsrc fuse3 2>>"$log" |
			    sed -n 's/^Version: //p' | sort -V | tail -n 1)
			dpkg --compare-versions "$version" ge $want || continue
			say "building fuse3 $version of Debian $suite"
			if fetch_source fuse3 && fetch_source liburing &&
			    (build_sources); then
				return 0
			fi
		done
	done
	return 1
}

# A libfuse with passthrough: the distribution's, ours, or neither.
private_fuse()
{
	local need have
	pkg-config --atleast-version=$want fuse3 && return 0
	PKG_CONFIG_PATH=$prefix/lib/pkgconfig \
	    pkg-config --atleast-version=$want fuse3 && return 0

	have=$(pkg-config --modversion fuse3)
	if [ "${DEBIAN_MIRROR:-}" = none ]; then
		say "DEBIAN_MIRROR=none: going on with libfuse $have," \
		    "and passthrough is off"
		return 0
	fi
	say "libfuse $have has no passthrough: building a newer one in build/deps"
	mkdir -p "$deps"
	: >"$log"
	need=$(missing $fuse_pkgs)
	[ -z "$need" ] || apt_install $need || :
	if (newer_fuse); then
		say "built libfuse" "$(PKG_CONFIG_PATH=$prefix/lib/pkgconfig \
		    pkg-config --modversion fuse3) (static)"
		rm -rf "$deps/src" "$deps/stage" "$deps/apt"
	else
		grep -E '^(E:|W: GPG|ERROR)|FAILED|\*\*\* ' "$log" | tail -n 5
		say "no newer libfuse could be had (see build/deps/build.log):" \
		    "going on with $have, and passthrough is off"
	fi
	# Under sudo the tree stays its owner's.
	chown -R --reference=. build
}

# promtool, for one test, without the server that its package would start: up to
# Debian 12 that of prometheus, then one of its own.
private_promtool()
{
	local dir=$deps/promtool
	[ ! -x "$dir/promtool" ] && ! command -v promtool >/dev/null || return 0
	mkdir -p "$dir"
	(cd "$dir" && { quietly timeout 120 apt-get -q download promtool ||
	    quietly timeout 120 apt-get -q download prometheus; } &&
	    quietly dpkg-deb -x prom*.deb x &&
	    mv x/usr/bin/promtool . && rm -rf x prom*.deb) ||
		say "no promtool could be had: what it checks is skipped"
	chown -R --reference=. build
}

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
	die "this is not Debian or Ubuntu: install a C compiler, pkg-config" \
	    "and the development files of libfuse3 (>= $want), liburing," \
	    "libnfs, iniparser and xxhash yourself; for the tests bats, fio," \
	    "jq and nfs-ganesha"
fi
services_on			# if an earlier run was killed
case $goal in
bench)
	more_packages $bench_pkgs
	exit ;;
guest)
	more_packages $guest_pkgs
	exit ;;
packages)
	more_packages $package_pkgs
	exit ;;
build)
	check_pkgs='' lint_pkgs='' ;;
esac
install_packages
if [ "$goal" = build ]; then
	private_fuse
	exit
fi
# nfs-ganesha finds file systems by it; a bare container has none.
[ -e /etc/mtab ] || ln -s ../proc/self/mounts /etc/mtab ||
    die "cannot make /etc/mtab, which nfs-ganesha needs: run 'sudo make deps'"
private_fuse
private_promtool
say "everything is there"
