#!/usr/bin/env bash
# Runs the tests: all steps, or those named. Each step's output goes to out/test/<step>.log, its course to the
# terminal; the last line is the total. Status 0 only if nothing failed.
set -uo pipefail
cd "$(dirname "$0")/.."
logs=out/test
mkdir -p $logs

# Tests that make network namespaces and load programs run as root, whoever builds them.
[ "$(id -u)" = 0 ] || export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="sudo -E"
export TOWPATH_BIN=$PWD/target/release/towpath
# What random tests begin with: of the sources, so that it is no matter of chance what a commit is tested with, and the next
# one is tested with something else. (Another one each time is for longer runs; see docs/testing.md.)
sources() { find crates lab bench fuzz -name target -prune -o -name '*.rs' -print0 | LC_ALL=C sort -z | xargs -0 cat; }
export TOWPATH_SEED=${TOWPATH_SEED:-$(sources | cksum | cut -d ' ' -f 1)}
export CARGO_TERM_COLOR=never RUST_BACKTRACE=1 RUST_LIB_BACKTRACE=0

steps=(build fmt clippy unit dpdk loom miri vm instructions)
# The command, and beside it the tests: neither build keeps two cores busy by itself. Every later step takes what is built
# here, so it must choose the same packages: with others cargo would build much of it again, with other features.
step_build() {
    local status=0
    cargo test --workspace --no-run &
    cargo build --release || status=1
    wait $! || status=1
    return $status
}
bpf_crates=(crates/xdp crates/fptun/bpf)
step_fmt() {
    local status=0 crate
    cargo fmt --all --check || status=1
    for crate in "${bpf_crates[@]}"; do cargo fmt --manifest-path "$crate/Cargo.toml" --check || status=1; done
    return $status
}
# The BPF crates by themselves: linted together with the others, they would get their features. (In release, where a panic
# aborts, because they have no unwinding.)
step_clippy() {
    local status=0 crate
    cargo clippy --workspace --all-targets -- -D warnings || status=1
    for crate in "${bpf_crates[@]}"; do
        cargo clippy --release --manifest-path "$crate/Cargo.toml" --target-dir target/bpf-lint -- -D warnings || status=1
    done
    return $status
}
step_unit() { cargo test --workspace --no-fail-fast "$@"; }
step_loom() { scripts/loom.sh; }
step_miri() { scripts/miri.sh; }
# What is built only with DPDK.
step_dpdk() {
    scripts/dpdk.sh >/dev/null || return 3
    local features=towpath/dpdk,towpath-user/dpdk status=0
    cargo clippy -p towpath -p towpath-user --features $features --all-targets -- -D warnings || status=1
    cargo test -p towpath -p towpath-user --features $features --no-fail-fast --test dpdk --test wires || status=1
    return $status
}
# Of the step unit, the differential test alone, with what it says: for longer runs.
step_lab() { cargo test --workspace --test differential -- --nocapture; }
step_vm() { scripts/test-vm.sh; }
# Instructions a packet, counted in the virtual machine: a regression bound that does not depend on the machine's speed.
step_instructions() {
    cargo build --release -q &&
        target/release/towpath-bench instructions --judge --report out/test/instructions.html
}

# Lines worth seeing while a step runs.
course() { grep --line-buffered -E '^( +Running|test result|test .*FAILED|vm:|lab:|unsteady:|SKIP|Miri |  .*(met|MISSED)$)|^error|panicked at'; }

# Sums of passed and failed tests over a log's "test result" lines, of a binary that ran twice the second; nothing if there are
# none.
totals() {
    awk '/^ +(Running|Doc-tests) / { binary = $0 }
        /^test result/ { if (binary == "") binary = NR; ok[binary] = $4; bad[binary] = $6; binary = "" }
        END { for (binary in ok) { passed += ok[binary]; failed += bad[binary]; some = 1 }; if (some) print passed, failed }' "$1"
}

# The targets of which a test failed, as cargo is to be asked for them, of all packages: of one alone cargo would build with
# other features.
failed_targets() { sed -nE 's/^error: test failed, to rerun pass `-p [^ ]+ (.*)`$/\1/p' "$1" | sort -u; }

# The step unit's tests run against real kernels under whatever else the machine does. Binaries of which one fails are run
# once more, and what passed only then is named at the end: unsteady is a defect to mend, but not the one that the test is
# about. The step vm does so itself.
once_more() {
    local log=$logs/unit.log first=$logs/unit.first.log targets
    mapfile -t targets < <(failed_targets "$log" | tr ' ' '\n')
    [ ${#targets[@]} != 0 ] || return 1
    echo "== unit failed; once more: ${targets[*]}"
    cp "$log" "$first"
    unsteady+=("unit ($(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$first" | sort -u | paste -sd ' '))")
    step_unit "${targets[@]}" 2>&1 | tee -a "$log" | course
    return "${PIPESTATUS[0]}"
}

passed=0 failed=0 broken=() skipped=() unsteady=()
run_step() {
    local step=$1 log=$logs/$1.log started=$SECONDS status ok='' bad=0
    echo "== $step"
    "step_$step" 2>&1 | tee "$log" | course
    status=${PIPESTATUS[0]}
    if [ "$step" = unit ] && [ "$status" != 0 ]; then
        once_more && status=0
    fi
    while read -r what; do unsteady+=("$what"); done < <(sed -n 's/^unsteady: //p' "$log")
    read -r ok bad < <(totals "$log")
    # Status 3 says that a step could not be run here. A step without tests of its own counts as one; so does a
    # failure that no test reported (it did not build, …).
    if [ "$status" = 3 ] && [ -z "$ok" ]; then
        skipped+=("$step")
    elif [ "$status" != 0 ]; then
        [ "${bad:-0}" != 0 ] || bad=1
    else
        ok=${ok:-1}
    fi
    ok=${ok:-0} bad=${bad:-0}
    if [ "$bad" != 0 ]; then
        broken+=("$step")
        grep -E -A 12 '^Error: |^test .* FAILED|panicked at|^error' "$log" | tail -n 120
    fi
    passed=$((passed + ok)) failed=$((failed + bad))
    echo "== $step: $ok passed, $bad failed, $((SECONDS - started)) s ($log)"
}

for step in "${@:-${steps[@]}}"; do
    declare -F "step_$step" >/dev/null || { echo "test: no step '$step' (there are: ${steps[*]})" >&2; exit 2; }
    run_step "$step"
done
[ ${#skipped[@]} = 0 ] || echo "skipped: ${skipped[*]}"
[ ${#unsteady[@]} = 0 ] || echo "failed at the first try: ${unsteady[*]} (out/test/*.first.log)"
[ ${#broken[@]} = 0 ] || echo "failed: ${broken[*]}"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
