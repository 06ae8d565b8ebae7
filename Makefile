# cachefs: GNU make.  `sudo make deps` installs what is needed, then `make`.
#
# Yours to set: CC CFLAGS CPPFLAGS LDFLAGS, and everything with ?= below.
# WITH_URING=0 builds without liburing.  WERROR=1 makes warnings errors.

PREFIX		?= /usr/local
SBINDIR		?= $(PREFIX)/sbin
MANDIR		?= $(PREFIX)/share/man
DOCDIR		?= $(PREFIX)/share/doc/cachefs
BASHCOMPDIR	?= $(PREFIX)/share/bash-completion/completions
UNITDIR		?= $(PREFIX)/lib/systemd/system
MOUNTDIR	?= /sbin
PKG_CONFIG	?= pkg-config
OBJCOPY		?= objcopy
WITH_URING	?= 1
WERROR		?= 0
CFLAGS		?= -O2 -g

# --- Flags ----------------------------------------------------------------

XCFLAGS	= -std=gnu17 -pthread -Wall -Wextra -Wshadow -Wstrict-prototypes \
	-Wmissing-prototypes -Wpointer-arith -Wcast-qual -Wwrite-strings \
	-Wvla -Wundef -Wformat=2 -Wimplicit-fallthrough \
	$(if $(filter 1,$(WERROR)),-Werror)
XCPPFLAGS = -DWITH_URING=$(WITH_URING) $(if $(RING),-DFUSE_RING=1)

# The libraries.  What `make deps` built comes before the distribution's; a
# directory that is not there does no harm.  All this is evaluated when first
# used, which is after `deps` has run, and then kept.
DEPSDIR	?= $(CURDIR)/build/deps
PRIVATE	= $(DEPSDIR)/prefix/lib/pkgconfig
PC	= PKG_CONFIG_PATH='$(PRIVATE)':"$$PKG_CONFIG_PATH" $(PKG_CONFIG)
once	= $(eval $(1) := $(2))$($(1))
pc	= $(shell $(PC) $(1) 2>/dev/null)
# $(call need,PACKAGE,ARGUMENTS): its flags, or an end with a sentence.
need	= $(if $(call pc,--modversion $(1)),$(call pc,$(2) $(1)),$(error \
	$(1) not found: run 'sudo make deps'$(if $(filter liburing,$(1)),$(comma) \
	or build with WITH_URING=0)))
comma	:= ,
# $(call want,PACKAGE,FALLBACK): libraries of one that may have no .pc file.
want	= $(or $(call pc,--libs $(1)),$(2))

# Headers that are not ours get no warnings from our flags.
FUSE_CFLAGS	= $(call once,FUSE_CFLAGS,$(call need,fuse3,--cflags))
FUSE_LIBS	= $(call once,FUSE_LIBS,$(call need,fuse3,--libs))
URING_CFLAGS	= $(call once,URING_CFLAGS,$(call need,liburing,--cflags))
URING_LIBS	= $(call once,URING_LIBS,$(call need,liburing,--libs))
# FUSE over io_uring takes a libfuse that has it and is linked statically: then the
# linker can put a function of ours in front of its own.
RING_FN		= fuse_session_process_uring_cqe
LIBFUSE		= $(call pc,--variable=libdir fuse3)/libfuse3
RING		= $(call once,RING,$(if $(wildcard $(LIBFUSE).so),,$(shell nm \
	$(LIBFUSE).a 2>/dev/null | sed -n 's/.* T \($(RING_FN)\)$$/\1/p')))
OTHER_CFLAGS	= $(call once,OTHER_CFLAGS,$(foreach p,libnfs iniparser \
	libxxhash,$(call pc,--cflags $(p))) \
	$(patsubst %,-I%,$(wildcard /usr/include/iniparser)))
OTHER_LIBS	= $(call once,OTHER_LIBS,$(call want,libnfs,-lnfs) \
	$(call want,iniparser,-liniparser) $(call want,libxxhash,-lxxhash))
VERSIONS	= $(call once,VERSIONS,$(foreach p,fuse3 liburing,$(p) \
	$(call pc,--modversion $(p))))

uring		= $(filter 1,$(WITH_URING))
DEP_CFLAGS	= $(patsubst -I%,-isystem %,$(sort $(FUSE_CFLAGS) \
	$(if $(uring),$(URING_CFLAGS)) $(OTHER_CFLAGS)))
DEP_LIBS	= $(if $(RING),-Wl$(comma)--wrap=$(RING)) $(FUSE_LIBS) $(if $(uring),$(URING_LIBS)) $(OTHER_LIBS)
COMPILE		= $(CC) $(XCPPFLAGS) $(CPPFLAGS) $(XCFLAGS) $(DEP_CFLAGS) \
	$(CFLAGS)

# --- Programs -------------------------------------------------------------

# Each variant is build/NAME/cachefs and build/NAME/unit.  All have the fault
# hooks, which ./cachefs lacks.  (private: prerequisites do not inherit it.)
VARIANTS	= test nouring asan tsan
variant		= $(addprefix build/$(1)/,cachefs unit)
$(foreach v,$(VARIANTS),$(call variant,$(v))) build/unit: \
    private XCPPFLAGS += -DCACHEFS_TEST
$(call variant,nouring) $(call variant,tsan): private override WITH_URING = 0
# gcc's shared libubsan does not honour log_path beside ASan.
$(call variant,asan): private XCFLAGS += -fsanitize=address,undefined \
	-fno-sanitize-recover=all -fno-omit-frame-pointer \
	$(if $(findstring clang,$(CC)),,-static-libubsan)
$(call variant,tsan): private XCFLAGS += -fsanitize=thread \
	-fno-omit-frame-pointer

all: cachefs

cachefs $(VARIANTS:%=build/%/cachefs): cachefs.c cachefs.h Makefile build/flags
	@mkdir -p $(@D)
	$(COMPILE) -o $@ $< $(LDFLAGS) $(DEP_LIBS)

# With the code under test in it, but for main().
build/unit $(VARIANTS:%=build/%/unit): tests/unit.c
build/evictsim: tests/evictsim.c
build/unit build/evictsim $(VARIANTS:%=build/%/unit): cachefs.c cachefs.h \
    Makefile build/flags
	@mkdir -p $(@D)
	$(COMPILE) -DCACHEFS_NO_MAIN -o $@ $(filter tests/%,$^) $(LDFLAGS) \
	    $(DEP_LIBS)

# For other distributions than this one: all libraries in it, but libc, or with
# STATIC_LIBC=1 that, too; for which see README.md.  cachefs.c puts functions in
# front of libnfs's, whose own get other names to be called by.
STATIC_LIBC	?= 0
STATIC_LIBS	= $(filter-out -pthread -lpthread -ldl -lrt,$(FUSE_LIBS) \
	$(if $(uring),$(URING_LIBS)) $(call want,iniparser,-liniparser) \
	$(call want,libxxhash,-lxxhash))
OWN	= $(call once,OWN,$(shell sed -n 's/^\tLIBNFS_OWN(\(.*\));/\1/p' cachefs.c))

whole		= $(filter 1,$(STATIC_LIBC))

static: build/static/cachefs
build/static/cachefs: private XCPPFLAGS += -DLIBNFS_STATIC
build/static/cachefs: cachefs.c build/static/libnfs.o \
    $(if $(whole),contrib/static-nss.c) cachefs.h build/flags
	$(COMPILE) $(if $(whole),-static) -o $@ $(filter %.c %.o,$^) \
	    $(LDFLAGS) -Wl,-Bstatic $(STATIC_LIBS) \
	    $(if $(whole),,-Wl,-Bdynamic) -lpthread -ldl -lrt

build/static/libnfs.o: cachefs.c Makefile build/flags
	@mkdir -p $(@D)
	$(CC) -r -nostdlib -o $@ $(call pc,--libs-only-L libnfs) \
	    -Wl,--whole-archive -l:libnfs.a \
	    $(foreach f,$(OWN),-Wl,--defsym=own_$f=$f)
	$(OBJCOPY) $(OWN:%=--weaken-symbol=%) $@

# Changes when the flags or the libraries do, and only then.
build/flags: export NOW = $(COMPILE) $(LDFLAGS) $(DEP_LIBS) $(VERSIONS) \
	$(STATIC_LIBC)
build/flags: FORCE
	@mkdir -p build
	@new=$@.$$$$; printf '%s\n' "$$NOW" >$$new; \
	if cmp -s $$new $@; then rm $$new; else mv $$new $@; fi
FORCE:

# In `make deps all`, whatever -j says, deps comes first.
ifneq ($(filter deps,$(MAKECMDGOALS)),)
build/flags: | deps
lint-sh lint-man dist: | deps
endif

deps:
	@bash tests/deps.sh

# --- Checks ---------------------------------------------------------------

# Each ends with a line "N passed, N failed".  A skipped test is a failure
# unless its reason matches CACHEFS_ALLOW_SKIP, an extended regular expression.
# Extra arguments for bats: make check BATSFLAGS="--filter evict"; some files
# only: make check-asan FILES="tests/40-read.bats".
RUN	= CACHEFS_TEST_BIN=$(CURDIR)/$(1)/cachefs UNIT=$(2) \
	BATSFLAGS='$(BATSFLAGS)' $(3) tests/run-tests.sh
NOURING	= CACHEFS_ALLOW_SKIP="io_uring$${CACHEFS_ALLOW_SKIP:+|$$CACHEFS_ALLOW_SKIP}"
NOASLR	= $$(setarch -R true 2>/dev/null && echo setarch -R)
SANLOG	= SANITIZER_LOG='$(CURDIR)/build/$(1)/report'
SAN	= halt_on_error=1:exitcode=99:log_path=$(CURDIR)/build/$(1)/report

check: cachefs build/test/cachefs build/unit build/evictsim
	@$(call RUN,build/test,build/unit) ./cachefs $(FILES)

# The program that has its own libnfs, against servers that mean harm.
check-static: static build/evictsim
	@UNIT= tests/run-tests.sh build/static/cachefs tests/30-mount.bats \
	    tests/75-hostile.bats

# Minutes of readers, writers, faults and evictions at random.
check-long: cachefs
	@UNIT= tests/run-tests.sh ./cachefs tests/72-consistency.bats \
	    tests/75-soak.bats

check-nouring: $(call variant,nouring) build/evictsim
	@$(NOURING) $(call RUN,build/nouring,build/nouring/unit) $< $(FILES)

check-asan: $(call variant,asan) build/evictsim
	@ASAN_OPTIONS="$(call SAN,asan):detect_stack_use_after_return=1:$$ASAN_OPTIONS" \
	UBSAN_OPTIONS="$(call SAN,asan):print_stacktrace=1:$$UBSAN_OPTIONS" \
	LSAN_OPTIONS="suppressions=$(CURDIR)/tests/lsan.supp:print_suppressions=0" \
	$(call SANLOG,asan) $(call RUN,build/asan,build/asan/unit) $< $(FILES)

# TSan cannot see the kernel's half of a ring, hence the thread engine.  Older
# TSan stops where address space randomisation is high (Ubuntu 24.04): setarch.
check-tsan: $(call variant,tsan) build/evictsim
	@TSAN_OPTIONS="$(call SAN,tsan):second_deadlock_stack=1:$$TSAN_OPTIONS" \
	$(call SANLOG,tsan) $(NOURING) \
	$(call RUN,build/tsan,build/tsan/unit,$(NOASLR)) $< $(FILES)

# The unit tests in memcheck, which knows neither io_uring nor openat2(2), and says
# so each time.
check-valgrind: build/nouring/unit
	timeout -k 5 900 valgrind -q --error-exitcode=99 --leak-check=full \
	    --errors-for-leak-kinds=definite --log-file=build/valgrind.log $<; \
	rc=$$?; grep -v -e 'WARNING: unhandled' -e '^--[0-9]*-- ' \
	    build/valgrind.log; exit $$rc

# What others write, mutated: tests/fuzz.c, by clang's libFuzzer from the inputs
# in tests/corpus, FUZZ_S seconds each.  New inputs stay in build/fuzz.
FUZZERS	= index tree conf ioctl
FUZZ_S	?= 60
check-fuzz: $(FUZZERS:%=build/fuzz/%)
	@ASAN_OPTIONS="allocator_may_return_null=1:$$ASAN_OPTIONS" \
	FUZZ_S=$(FUZZ_S) tests/run-fuzz.sh $(FUZZERS)

$(FUZZERS:%=build/fuzz/%): private override CC = clang
$(FUZZERS:%=build/fuzz/%): private XCFLAGS += -fno-omit-frame-pointer \
	-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
$(FUZZERS:%=build/fuzz/%): tests/fuzz.c cachefs.c cachefs.h Makefile build/flags
	@mkdir -p $(@D)
	$(COMPILE) -DCACHEFS_NO_MAIN -DFUZZ_$(@F) -o $@ $< $(LDFLAGS) $(DEP_LIBS)

# In Debian's Linux 6.1 and 6.12, emulated, with power cuts: nine minutes
# on two busy cores, as root.  GUEST=optional: no failure where there is no
# qemu or no kernel to be had.
check-kernels: cachefs
	@bash tests/deps.sh guest || echo 'check-kernels: going on with what is there'
	@CACHEFS=$(CURDIR)/cachefs tests/guest

# Debian packages of this, for the suites named, each in a chroot: built, looked
# at, installed, upgraded under a mount, removed.  As root; some 10 minutes.
check-packages:
	@bash tests/deps.sh packages
	@tests/packages $(SUITES)

demo: cachefs
	@CACHEFS=$(CURDIR)/cachefs tests/demo.sh

# The figures of README.md: half an hour, as root, on an idle machine.
#	make bench BENCHFLAGS="-n 1 --size 64M hot cold"
bench: cachefs build/nfscopy
	@bash tests/deps.sh bench || echo 'bench: going on with what is there'
	@CACHEFS=$(CURDIR)/cachefs tests/bench $(BENCHFLAGS)

build/nfscopy: tests/nfscopy.c
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -pthread -o $@ $< $(LDFLAGS) \
	    $(call want,libnfs,-lnfs)

# A million cached files, 100,000 names, 10,000 open files: some 5 minutes and
# 10 GB, as root.	make scale SCALEFLAGS="-n 20000"
scale: cachefs build/mkcache
	@CACHEFS=$(CURDIR)/cachefs tests/scale $(SCALEFLAGS)

build/mkcache: tests/mkcache.c cachefs.c cachefs.h Makefile build/flags
	@mkdir -p $(@D)
	$(COMPILE) -DCACHEFS_NO_MAIN -o $@ $< $(LDFLAGS) $(DEP_LIBS)

# gcc's analyzer (which optimisation blinds), clang's lock analysis, clang-tidy,
# cppcheck, shellcheck, mandoc; `make -k lint` goes on to the next.
LINT	= lint-gcc lint-clang lint-tidy lint-cppcheck lint-sh lint-man
lint: $(LINT)

# The analyzer gives up on a function sooner than by default (5): else it takes
# eight minutes.
lint-gcc: cachefs.c cachefs.h build/flags
	$(COMPILE) -O0 -Werror -fanalyzer \
	    --param=analyzer-bb-explosion-factor=2 -c -o build/lint.o $<

lint-gcc: private override CC = gcc
lint-clang lint-tidy: private override CC = clang
lint-clang: cachefs.c cachefs.h build/flags
	$(COMPILE) -Werror -Wthread-safety -fsyntax-only $<

lint-tidy: cachefs.c cachefs.h build/flags
	clang-tidy --quiet --warnings-as-errors='*' $< -- \
	    $(filter-out $(CC),$(COMPILE))

# cppcheck reads no system header, but needs to know these macros.
QUEUE_H	= $(shell $(CC) -E -xc -include sys/queue.h /dev/null | \
	grep -o '/[^"]*sys/queue\.h' | head -n 1)
lint-cppcheck: cachefs.c cachefs.h
	cppcheck --quiet --error-exitcode=1 --inline-suppr --std=c11 \
	    --enable=warning,performance,portability \
	    --suppress=missingIncludeSystem --include=$(QUEUE_H) $(XCPPFLAGS) $<

lint-sh:
	shellcheck -x $(wildcard tests/*.sh tests/*.bash tests/*.bats .ci/run \
	    tests/guest tests/guest.d/job tests/packages contrib/cachefs-textfile)

lint-man:
	mandoc -T lint -W warning cachefs.8

# --- Installing -----------------------------------------------------------

# Links to the one there is.  mount(8) looks for the second helper when it is told
# the type that the kernel shows: mount -o remount does.
HELPERS	= mount.cachefs mount.fuse.cachefs
PAGES	= $(HELPERS:%=%.8) cachefs-textfile.8
UNITS	= cachefs@.service cachefs-textfile.service cachefs-textfile.timer

# Installs what is built; builds only what is not, so that `sudo make install`
# never rebuilds with other flags.
install:
	@test -x cachefs || $(MAKE) all
	install -d '$(DESTDIR)$(SBINDIR)' '$(DESTDIR)$(MOUNTDIR)' \
	    '$(DESTDIR)$(MANDIR)/man8' '$(DESTDIR)$(DOCDIR)'
	install -m 755 cachefs '$(DESTDIR)$(SBINDIR)/cachefs'
	for helper in $(HELPERS); do \
		ln -sf '$(if $(filter $(SBINDIR),$(MOUNTDIR)),,$(SBINDIR)/)cachefs' \
		    '$(DESTDIR)$(MOUNTDIR)'/"$$helper" || exit; \
	done
	install -m 644 cachefs.8 '$(DESTDIR)$(MANDIR)/man8/cachefs.8'
	for page in $(PAGES); do \
		ln -sf cachefs.8 '$(DESTDIR)$(MANDIR)/man8'/"$$page" || exit; \
	done
	install -m 644 README.md cachefs.ini.example '$(DESTDIR)$(DOCDIR)'
ifneq ($(wildcard contrib/cachefs.bash-completion),)
	install -d '$(DESTDIR)$(BASHCOMPDIR)'
	install -m 644 contrib/cachefs.bash-completion \
	    '$(DESTDIR)$(BASHCOMPDIR)/cachefs'
endif
ifneq ($(wildcard contrib/cachefs-textfile),)
	install -m 755 contrib/cachefs-textfile '$(DESTDIR)$(SBINDIR)'
endif
ifneq ($(wildcard contrib/fanout),)
	install -d '$(DESTDIR)$(DOCDIR)/fanout'
	install -m 644 contrib/fanout/* '$(DESTDIR)$(DOCDIR)/fanout'
endif
ifneq ($(wildcard contrib/grafana-dashboard.json),)
	install -m 644 contrib/grafana-dashboard.json '$(DESTDIR)$(DOCDIR)'
endif
ifneq ($(wildcard $(UNITS:%=contrib/%)),)
	install -d '$(DESTDIR)$(UNITDIR)'
	for u in $(notdir $(wildcard $(UNITS:%=contrib/%))); do \
		sed 's|/usr/sbin/cachefs|$(SBINDIR)/cachefs|' "contrib/$$u" \
		    >'$(DESTDIR)$(UNITDIR)'/"$$u" && \
		chmod 644 '$(DESTDIR)$(UNITDIR)'/"$$u" || exit; \
	done
endif

uninstall:
	rm -f '$(DESTDIR)$(SBINDIR)/cachefs' \
	    '$(DESTDIR)$(SBINDIR)/cachefs-textfile' \
	    $(HELPERS:%='$(DESTDIR)$(MOUNTDIR)/%') \
	    '$(DESTDIR)$(MANDIR)/man8/cachefs.8' \
	    $(PAGES:%='$(DESTDIR)$(MANDIR)/man8/%') \
	    '$(DESTDIR)$(DOCDIR)/README.md' \
	    '$(DESTDIR)$(DOCDIR)/cachefs.ini.example' \
	    '$(DESTDIR)$(DOCDIR)/grafana-dashboard.json' \
	    '$(DESTDIR)$(BASHCOMPDIR)/cachefs' \
	    $(UNITS:%='$(DESTDIR)$(UNITDIR)/%')
	rm -rf '$(DESTDIR)$(DOCDIR)/fanout'
	-rmdir '$(DESTDIR)$(DOCDIR)' 2>/dev/null

# What is committed, the same bytes every time.
V	= $(call once,V,$(or $(shell git show HEAD:cachefs.h | \
	sed -n 's/^\#define CACHEFS_VERSION[ \t]*"\(.*\)".*/\1/p'),$(error \
	dist: this is no git clone)))
dist:
	@mkdir -p build
	@git -c tar.umask=0022 archive --format=tar --prefix=cachefs-$V/ \
	    HEAD >build/dist.tar
	@gzip -9n <build/dist.tar >cachefs-$V.tar.gz
	@rm build/dist.tar && echo cachefs-$V.tar.gz

# Packages of that, in build/deb and build/rpm, against a libfuse of `make deps`
# where there is one.  On Debian rpm can't know what is installed: --nodeps.
DEBFLAGS	?= -us -uc -b
RPMFLAGS	?= -bb $(if $(wildcard /etc/debian_version),--nodeps)
deb rpm: export DEPSDIR := $(DEPSDIR)
deb rpm: private export override MAKEFLAGS =
deb: dist
	rm -rf build/deb && mkdir build/deb
	tar -C build/deb -xzf cachefs-$V.tar.gz
	cp cachefs-$V.tar.gz build/deb/cachefs_$V.orig.tar.gz
	cp -r build/deb/cachefs-$V/contrib/debian build/deb/cachefs-$V/debian
	cd build/deb/cachefs-$V && dpkg-buildpackage $(DEBFLAGS)
	rm -rf build/deb/cachefs-$V

rpm: dist
	rm -rf build/rpm && mkdir build/rpm
	rpmbuild -D '_topdir $(CURDIR)/build/rpm' -D '_sourcedir $(CURDIR)' \
	    $(RPMFLAGS) contrib/cachefs.spec

# build/deps, build/guest and build/packages stay: they are not made from this source.
clean:
	rm -rf cachefs cachefs-*.tar.gz build/flags* build/unit build/lint.* \
	    build/nfscopy build/evictsim build/mkcache build/result build/fuzz \
	    build/valgrind.log build/rest.log \
	    build/static build/deb build/rpm \
	    $(VARIANTS:%=build/%)

.PHONY: all check check-long check-nouring check-asan check-tsan check-fuzz \
	check-kernels check-packages check-static check-valgrind lint $(LINT) \
	demo bench scale static install uninstall dist deb rpm clean deps FORCE
.DELETE_ON_ERROR:
