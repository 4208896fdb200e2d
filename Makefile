# Transship. `make help` lists what there is.

PREFIX ?= /usr/local
UNITDIR ?= $(PREFIX)/lib/systemd/system
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)

.PHONY: help deps build demo test fuzz bench bench-quick bench-shim install clean

help:
	@echo "make demo        show it: a Redis with a writing client moves to another node and back"
	@echo "make test        everything: unit tests, both ends in one process, the real thing"
	@echo "make fuzz        every door that foreign bytes come in at, SECONDS=60 each (nightly)"
	@echo "make bench       pauses and throughput beside CRIU's own ways (docs/benchmarks.md)"
	@echo "make bench-quick the same in under four minutes, for seven figures"
	@echo "make bench-shim  our shim beside containerd's own for runc: start time and memory"
	@echo "make build       release binaries in $(TARGET)/release"
	@echo "make install     binaries, both names of the shim, systemd unit (PREFIX=$(PREFIX))"
	@echo "make deps        install what is missing on Debian 12 (run by demo and test)"
	@echo "make clean       remove what was built"

deps:
	@hack/install-deps.sh

build: deps
	$(CARGO) build --release --workspace --lib --bins

demo: build
	@$(TARGET)/release/demo

# One profile for everything, so that nothing is compiled twice. The tests on
# real nodes come one after another: two cores carry no more.
test: deps
	$(CARGO) build --workspace --lib --bins
	$(CARGO) test --workspace --exclude transship-integration
	$(CARGO) test --package transship-integration -- --test-threads=1

# The shell's own SECONDS counts; hence the other name.
fuzz:
	@SECONDS_EACH=$(or $(SECONDS),60) hack/fuzz.sh

bench: build
	@$(TARGET)/release/bench

bench-quick: build
	@$(TARGET)/release/bench --quick

bench-shim: build
	@$(TARGET)/release/bench-shim

install:
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(TARGET)/release/transship \
		$(TARGET)/release/transshipd $(TARGET)/release/containerd-shim-transship-v2
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/transship $(TARGET)/release/libtransship_hollow.so
	ln -sf containerd-shim-transship-v2 $(DESTDIR)$(PREFIX)/bin/containerd-shim-runc-v2-transship
	install -D -m 644 -t $(DESTDIR)$(UNITDIR) crates/agent/transshipd.service

clean:
	$(CARGO) clean
