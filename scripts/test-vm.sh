#!/usr/bin/env bash
# Runs the test binaries that meet the kernel once more inside the virtual machine, on a distribution kernel: the same
# binaries, the same test names. Arguments go to the binaries (a name to filter by, --nocapture, …).
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(towpath-engine towpath-cm towpath-hitflags towpath-user towpath towpath-lab)

# One line for each test binary: working directory, path. Without the user engine's table of cases, which needs no kernel
# and would take long.
binaries() {
    cargo test "${packages[@]/#/-p}" --lib --bins --tests --no-run --message-format=json |
        python3 -c '
import json, os, sys
for line in sys.stdin:
    m = json.loads(line)
    if m["reason"] == "compiler-artifact" and m["profile"]["test"] and m["executable"] and m["target"]["name"] != "cases":
        print(os.path.dirname(m["manifest_path"]), m["executable"])'
}

# The guest translates instructions: fewer frames and rounds there, and no second run beside the first.
export TOWPATH_DIFF_FRAMES=${TOWPATH_VM_DIFF_FRAMES:-10000}
export TOWPATH_ROUNDS=${TOWPATH_ROUNDS:-1}
export TOWPATH_BIN=${TOWPATH_BIN:-$PWD/target/release/towpath}
# One test is left out: it tries the differential test's own harness, which needs no other kernel and many frames.
# Nothing may be skipped for want of a kernel feature: supplying those is what this kernel is for.
export TOWPATH_NO_SKIP=1
root=()
[ "$(id -u)" = 0 ] || root=(sudo -E)

list=$(binaries)
script='status=0 times=()
while read -r dir binary; do
    name=$(basename "${binary%-*}") start=$SECONDS
    echo "     Running $name in the virtual machine"
    (cd "$dir" && exec "$binary" --test-threads=1 --skip another_configuration_is_found "$@") </dev/null || status=1
    times+=("$((SECONDS - start)) $name")
done <<<"$LIST"
printf "%s\n" "${times[@]}" | sort -rn | while read -r seconds name; do echo "vm: $seconds s for $name"; done
exit $status'
LIST=$list exec "${root[@]}" lab/vm --memory 4096 --timeout "${TOWPATH_VM_TIMEOUT:-1800}" \
    --modules veth,8021q,bridge,dummy,vrf,nf_tables,nf_conntrack -- bash -c "$script" vm "$@"
