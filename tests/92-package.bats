#!/usr/bin/env bats
# What is installed, packed and released.  (`make check-packages` builds the
# packages and lives with them.)

load helpers

# A git clone of the tree as it is, at $WORK/src; the tree need not be one.
tree_clone() {
	need git
	mkdir "$WORK/src"
	tar -C "$ROOT" --exclude=./build --exclude=./.git --exclude=./cachefs \
	    --exclude='./cachefs-*.tar.gz' -c . | tar -C "$WORK/src" -x
	cd "$WORK/src" || return
	git init -q
	git add -A
	git -c user.name=test -c user.email=test@localhost commit -qm test
}

# make for packagers: nothing of the suite's own make, and of its terminal.
run_make() {
	env -u MAKEFLAGS -u MAKELEVEL make "$@"
}

version() {
	sed -n 's/^#define CACHEFS_VERSION[ \t]*"\(.*\)".*/\1/p' \
	    "$ROOT/cachefs.h"
}

@test "make dist makes the same bytes again, in another place, time and umask" {
	tree_clone
	run_make dist
	git clone -q . "$WORK/other"
	(cd "$WORK/other" && umask 077 && TZ=Asia/Tokyo GZIP='' run_make dist)
	cmp "cachefs-$(version).tar.gz" "$WORK/other/cachefs-$(version).tar.gz"
	# Owner, group and mode are nobody's in particular.
	tar -tvf "cachefs-$(version).tar.gz" >"$WORK/list"
	not grep -vE '^.rw(-r--r--|xr-xr-x|xrwxrwx) root/root ' "$WORK/list"
	grep -q " cachefs-$(version)/cachefs.c$" "$WORK/list"
}

@test "make install with DESTDIR installs all, and uninstall leaves nothing" {
	tree_clone
	cp "$CACHEFS" cachefs
	dirs=(DESTDIR="$WORK/d e" PREFIX=/usr MOUNTDIR=/usr/sbin)
	run_make install "${dirs[@]}"
	cd "$WORK/d e"
	find . ! -type d | sort >"$WORK/files"
	diff - "$WORK/files" <<-END
	./usr/lib/systemd/system/cachefs-textfile.service
	./usr/lib/systemd/system/cachefs-textfile.timer
	./usr/lib/systemd/system/cachefs@.service
	./usr/sbin/cachefs
	./usr/sbin/cachefs-textfile
	./usr/sbin/mount.cachefs
	./usr/sbin/mount.fuse.cachefs
	./usr/share/bash-completion/completions/cachefs
	./usr/share/doc/cachefs/README.md
	./usr/share/doc/cachefs/cachefs.ini.example
	./usr/share/doc/cachefs/fanout/README.md
	./usr/share/doc/cachefs/fanout/ganesha.conf
	./usr/share/doc/cachefs/fanout/nfs-ganesha.service.d.conf
	./usr/share/doc/cachefs/fanout/node.ini
	./usr/share/doc/cachefs/fanout/site.ini
	./usr/share/doc/cachefs/grafana-dashboard.json
	./usr/share/man/man8/cachefs-textfile.8
	./usr/share/man/man8/cachefs.8
	./usr/share/man/man8/mount.cachefs.8
	./usr/share/man/man8/mount.fuse.cachefs.8
	END
	usr/sbin/mount.cachefs -V
	cmp usr/share/man/man8/mount.cachefs.8 "$ROOT/cachefs.8"
	cd "$WORK/src" || return
	run_make uninstall "${dirs[@]}"
	[ -z "$(find "$WORK/d e" ! -type d)" ]
	[ ! -e "$WORK/d e/usr/share/doc/cachefs" ]
}

@test "make install without PREFIX: units and the mount helper find /usr/local" {
	tree_clone
	cp "$CACHEFS" cachefs
	run_make install DESTDIR="$WORK/d"
	[ "$(readlink "$WORK/d/sbin/mount.cachefs")" = /usr/local/sbin/cachefs ]
	cd "$WORK/d/usr/local/lib/systemd/system"
	grep -h '^Exec[A-Z][a-z]*=' ./* | grep cachefs >"$WORK/exec"
	not grep -v '=/usr/local/sbin/cachefs' "$WORK/exec"
	run_make -C "$WORK/src" uninstall DESTDIR="$WORK/d"
	[ -z "$(find "$WORK/d" ! -type d)" ]
}

@test "the program, the packages and the tarball have one version" {
	[ -n "$(version)" ]
	[ "$("$CACHEFS" -V)" = "cachefs $(version)" ]
	grep -q "^Version: *$(version)\$" "$ROOT/contrib/cachefs.spec"
	sed -n '/^%changelog/{n;p;}' "$ROOT/contrib/cachefs.spec" |
		grep -q -- " - $(version)-[0-9]*\$"
	head -n 1 "$ROOT/contrib/debian/changelog" |
		grep -q "^cachefs ($(version)-[0-9]*) "
}

@test "dpkg reads debian/, and finds what is built there" {
	need dpkg-parsechangelog
	tree_clone
	cp -r contrib/debian debian
	dpkg-parsechangelog --all >"$WORK/changes" 2>"$WORK/warnings"
	[ ! -s "$WORK/warnings" ]
	perl -MDpkg::Control::Info -e '
	    my $c = Dpkg::Control::Info->new("debian/control");
	    print $c->get_source()->{Source}, " ", map { $_->{Package} }
	        $c->get_packages()' >"$WORK/names"
	[ "$(cat "$WORK/names")" = "cachefs cachefs" ]
	[ -x debian/rules ]
	sh -n debian/prerm
	sh -n debian/postinst
	run_make -n -f debian/rules override_dh_auto_install >"$WORK/rules"
	grep -q 'PREFIX=/usr ' "$WORK/rules"
}

@test "rpm reads the spec, where there is one" {
	spec=$ROOT/contrib/cachefs.spec
	if command -v rpmspec >/dev/null; then
		rpmspec -P "$spec" >"$WORK/spec" 2>"$WORK/warnings"
		[ ! -s "$WORK/warnings" ]
		[ "$(rpmspec -q --qf '%{name} %{version}\n' "$spec" | uniq)" = \
		    "cachefs $(version)" ]
	fi
	for part in description prep build install files changelog; do
		grep -qx "%$part" "$spec" || fail "no %$part"
	done
}
