# The commands a user and a CI need. Each says what it does and may be run twice.
.PHONY: build deb setup demo test bench lint

build: ## the towpath command, with its BPF programs inside: target/release/towpath
	scripts/bpf-toolchain.sh
	cargo build --release

deb: build ## a Debian package of it: target/debian/towpath_*.deb
	scripts/deb.sh

setup: ## what the tests and the demo need on this machine
	scripts/setup.sh

demo: setup build ## a router with BGP, made faster while it runs; a report in out/demo.html
	$(if $(filter 0,$(shell id -u)),,sudo) target/release/towpath-demo

test: setup ## every test; ends with one line of totals
	scripts/test.sh

bench: setup build ## ratios to peers measured in this run, with a report in out/bench.html
	scripts/dpdk.sh || echo "bench: without DPDK beside the user engine"
	cargo run --release -q -p towpath-bench -- $(BENCH)

lint: ## formatting and clippy only
	scripts/test.sh fmt clippy
