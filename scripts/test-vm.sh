#!/usr/bin/env bash
# Runs the test binaries that meet the kernel once more, on a distribution kernel: the same binaries, the same test
# names. Two virtual machines take them from one list, the longest first. What fails is run once more, in one machine
# with nothing beside it; what passed only then is named ("unsteady: …"). Arguments go to the binaries (a name to filter
# by, --nocapture, …). Logs: out/test/vm/.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(towpath-filter towpath-engine towpath-cm towpath-hitflags towpath-fptun towpath-user towpath towpath-lab)
longest=(policies captures load lifecycle kernel differential guard refusals decisions engine)
export RESULTS=$PWD/out/test/vm

# One line for each test binary, the longest first: name, working directory, path. Without the user engine's table of
# cases, which needs no kernel and would take long.
binaries() {
    cargo test "${packages[@]/#/-p}" --lib --bins --tests --no-run --message-format=json |
        python3 -c '
import json, os, sys
longest, found = sys.argv[1:], []
for line in sys.stdin:
    m = json.loads(line)
    if m["reason"] == "compiler-artifact" and m["profile"]["test"] and m["executable"] and m["target"]["name"] != "cases":
        found.append((m["target"]["name"], os.path.dirname(m["manifest_path"]), m["executable"]))
for test in sorted(found, key=lambda t: longest.index(t[0]) if t[0] in longest else len(longest)):
    print(*test)' "${longest[@]}"
}

# The guest translates instructions: fewer frames and rounds there, and no second run beside the first.
export TOWPATH_DIFF_FRAMES=${TOWPATH_VM_DIFF_FRAMES:-10000}
export TOWPATH_ROUNDS=${TOWPATH_ROUNDS:-1}
export TOWPATH_LOAD_ROUTES=${TOWPATH_LOAD_ROUTES:-30000}
export TOWPATH_BIN=${TOWPATH_BIN:-$PWD/target/release/towpath}
# One test is left out: it tries the differential test's own harness, which needs no other kernel and many frames.
# Nothing may be skipped for want of a kernel feature: supplying those is what this kernel is for.
export TOWPATH_NO_SKIP=1
root=()
[ "$(id -u)" = 0 ] || root=(sudo -E)

# In the guest: runs what no other machine has taken. A folder is made by one of them only.
guest='while read -r name dir binary; do
    mkdir "$RESULTS/$name.taken" 2>/dev/null || continue
    start=$SECONDS status=0
    echo "vm: $name begins"
    (cd "$dir" && exec "$binary" --test-threads=1 --skip another_configuration_is_found "$@") \
        </dev/null &>"$RESULTS/$name.log" || status=$?
    echo "$status" >"$RESULTS/$name.status"
    [ "$status" = 0 ] && how= || how=", FAILED"
    echo "vm: $((SECONDS - start)) s for $name$how" | tee -a "$RESULTS/times"
done <<<"$LIST"'

# machines COUNT LIST [ARG…]: that many machines run the binaries of the list. Calls guarded against speculation take
# many times longer under translation, which does not speculate.
machines() {
    local count=$1
    export LIST=$2
    shift 2
    for ((; count > 0; count--)); do
        "${root[@]}" lab/vm --writable "$RESULTS" --memory 4096 --timeout "${TOWPATH_VM_TIMEOUT:-1800}" \
            --append spectre_v2=off --modules veth,tun,8021q,bridge,dummy,vrf,nf_tables,nf_conntrack -- bash -c "$guest" vm "$@" &
    done
    wait
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

# The lines of those in the list that did not end well.
failures() {
    while read -r name rest; do
        [ "$(cat "$RESULTS/$name.status" 2>/dev/null)" = 0 ] || echo "$name $rest"
    done <<<"$1"
}

list=$(binaries)
rm -rf "$RESULTS" && mkdir -p "$RESULTS"
machines "${TOWPATH_VM_MACHINES:-2}" "$list" "$@"
first=$(failures "$list") failed=
if [ -n "$first" ]; then
    while read -r name _; do
        echo "vm: $name failed; once more"
        [ ! -e "$RESULTS/$name.log" ] || mv "$RESULTS/$name.log" "$RESULTS/$name.first.log"
        rm -rf "$RESULTS/$name".{taken,status}
    done <<<"$first"
    machines 1 "$first" "$@"
    failed=$(failures "$first")
fi

while read -r name _; do
    echo "     Running $name in the virtual machine"
    cat "$RESULTS/$name.log" || echo "error: it was not run"
done <<<"$list"
sort -k2,2rn "$RESULTS/times" || true
[ -z "$first" ] || while read -r name _; do
    if [ "$(cat "$RESULTS/$name.status" 2>/dev/null)" = 0 ]; then
        tests=$(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$RESULTS/$name.first.log" 2>/dev/null | paste -sd ' ' || true)
        echo "unsteady: $name in the virtual machine (${tests:-it did not end})"
    else
        echo "error: $name failed in the virtual machine ($RESULTS/$name.log)"
    fi
done <<<"$first"
[ -z "$failed" ]
