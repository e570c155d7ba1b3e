#!/usr/bin/env bash
# Builds another revision of the project and has it and this one take over from each other under traffic: upgrades and
# downgrades with both engines, with routes that change and with connections, and daemons of either killed at random moments.
#
#     scripts/upgrade.sh [--keep] [--kills N] REVISION [TEST…]
#
# The revision is checked out and built in out/upgrade/REVISION, which goes again unless --keep says otherwise; with it the next
# run of the same revision builds nothing. TESTs are names to filter by; log: out/test/upgrade.log. Needs root.
set -euo pipefail
cd "$(dirname "$0")/.."

keep= kills=20
while [[ ${1:-} == -* ]]; do
    case $1 in
    --keep) keep=1 ;;
    --kills) kills=$2 && shift ;;
    *) echo "upgrade: unknown option $1" >&2 && exit 2 ;;
    esac
    shift
done
[ $# != 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
revision=$(git rev-parse --verify --quiet --short "$1^{commit}") || { echo "upgrade: no revision '$1'" >&2; exit 2; }
shift

tree=$PWD/out/upgrade/$revision
binary=$tree/target/release/towpath
layout() { git show "$1:crates/tables/src/record.rs" | sed -n 's/^pub const LAYOUT_VERSION: u32 = \([0-9]*\);/\1/p'; }
remove() { git worktree remove --force "$tree" 2>/dev/null || rm -rf "$tree"; git worktree prune; }
[ -n "$keep" ] || trap remove EXIT

if [ ! -x "$binary" ]; then
    git worktree prune
    [ -d "$tree" ] || git worktree add --quiet --detach "$tree" "$revision"
    echo "upgrade: building $revision ($(git log -1 --format=%cs "$revision"))"
    (cd "$tree" && unset CARGO_TARGET_DIR && cargo build --release --quiet -p towpath)
fi
root=()
[ "$(id -u)" = 0 ] || root=(sudo -E)
mkdir -p out/test
test_binary=$(cargo test --release -p towpath --test upgrade --no-run --message-format=json |
    sed -n 's/.*"name":"upgrade".*"executable":"\([^"]*\)".*/\1/p')
echo "upgrade: layout $(layout "$revision") of $revision, $(layout HEAD) of this tree's last revision"
export TOWPATH_OTHER=$binary TOWPATH_DAEMON_CRASHES=$kills
(cd crates/towpath && "${root[@]}" "$test_binary" --include-ignored --nocapture --test-threads 1 \
    --skip replaced_without_loss "${@:-}") 2>&1 | tee out/test/upgrade.log | grep -E '^(test |this build|the other build|\[|[0-9]+ packets)|panicked|TOWPATH_SEED'
