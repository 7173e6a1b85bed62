# Everything that is made stays under target/. See `make help`.
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup build guest-image package demo test soak fuzz bench bench-check check

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install the Debian packages that are missing
	@tests/setup/install build kernel lab

build: ## the binaries, static, in target/release
	@tests/setup/install build
	cargo build --release --workspace --bins

guest-image: build ## guest kernel and initramfs, with sizes and hashes
	@tests/setup/install kernel
	@guest-image/build

package: build guest-image ## a Debian package and a tarball in target/package
	@package/build

demo: build guest-image ## a container and a pod in VMs, shown from inside and outside
	@tests/demo/run

test: ## every layer of tests, one summary at the end
	@tests/run

ROUNDS ?= 300
PODS ?= 500
soak: guest-image ## ROUNDS=300 of killing somebody, PODS=500 one after another; hours
	@HUSK_E2E_ROUNDS=$(ROUNDS) HUSK_E2E_PODS=$(PODS) HUSK_E2E_TIMEOUT=172800 \
		tests/e2e/run --all --runtime husk --filter soak/

SECONDS_EACH ?= 3600
fuzz: ## the fuzz targets one after another, SECONDS_EACH=3600 for each
	@fuzz/run --seconds $(SECONDS_EACH)

bench: build guest-image ## starts, I/O and many pods beside runc; writes docs/performance.md
	@bench/run --page

bench-check: build guest-image ## a short run of bench against bench/promises.toml
	@bench/run --check

check: ## formatting, lints, dependency rules
	@tests/check
