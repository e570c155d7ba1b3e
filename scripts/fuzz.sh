#!/usr/bin/env bash
# Fuzzes targets of fuzz/ with libFuzzer, and keeps what led to new ways through the code in fuzz/corpus/.
#
#     scripts/fuzz.sh SECONDS [TARGET…]       # each target for so long; all of them if none is named
#
# An input that breaks a promise is left in out/fuzz/TARGET/; make a named test of it.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?seconds for each target}
shift
targets=("$@")
[ $# != 0 ] || targets=(frames messages manager netlink filters tables)
host=$(rustc -vV | sed -n 's/^host: //p')
# What libFuzzer needs to see the ways taken; a target of its own, so that build scripts go without.
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1
    -Cdebug-assertions -Coverflow-checks"
RUSTFLAGS=$(echo $coverage) cargo build -q --release -p towpath-fuzz --bin guided --features guided --target "$host" \
    --target-dir target/fuzz
guided=target/fuzz/$host/release/guided
status=0
for target in "${targets[@]}"; do
    folder=out/fuzz/$target
    rm -rf "$folder"/{all,least} && mkdir -p "$folder"/{all,least}
    cargo run -q -p towpath-fuzz --bin corpus -- unpack "$target" "$folder/all"
    export TOWPATH_FUZZ=$target
    "$guided" -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=4096 -print_final_stats=1 \
        -artifact_prefix="$folder/" "$folder/all" 2>"$folder/log" || { status=1; tail -n 40 "$folder/log"; continue; }
    "$guided" -merge=1 -max_len=400 "$folder/least" "$folder/all" 2>"$folder/merge.log"
    cargo run -q -p towpath-fuzz --bin corpus -- pack "$target" "$folder/least"
    echo "$target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$folder/log") inputs tried, $(wc -l <"fuzz/corpus/$target.hex") kept"
done
exit $status
