#!/usr/bin/env bash
# Plants bugs in a copy of the packet path, one after the other, and runs the differential test against each: it must
# find every one. Prints a table, status 0 only if the unchanged tree passes and every bug is found.
#   scripts/mutants.sh [NAME…]     those bugs only; needs root and what scripts/setup.sh installs
set -euo pipefail
cd "$(dirname "$0")/.."

# name | file | change (sed) | needs VLANs, so runs in the virtual machine
bugs() {
    cat <<'END'
ttl-twice          | crates/pipeline/src/network.rs | s/self\.decrement_ttl\(\);/self.decrement_ttl(); self.decrement_ttl();/
ttl-kept           | crates/pipeline/src/network.rs | s/self\.decrement_ttl\(\);//
hop-limit-kept     | crates/pipeline/src/network.rs | s/self\.hop_limit\.wrapping_sub\(1\)/self.hop_limit/
ttl-one-forwarded  | crates/pipeline/src/route.rs   | s/hops_left\(\) <= 1/hops_left() == 0/
checksum-kept      | crates/wire/src/ipv4.rs        | s/self\.checksum\.set\(\(sum .*\);/let _ = sum;/
checksum-no-carry  | crates/wire/src/ipv4.rs        | s/u32::from\(sum >= 0xffff\)/0/
checksum-ignored   | crates/pipeline/src/network.rs | s/!self\.checksum_ok\(\)/false/
mtu-plus-one       | crates/pipeline/src/route.rs   | s/packet_len > hop\.mtu as usize/packet_len > hop.mtu as usize + 1/
padding-kept       | crates/pipeline/src/rewrite.rs | s/if padding != 0 \&\&/if padding > 65535 \&\&/
ihl-ignored        | crates/pipeline/src/network.rs | s/self\.version_ihl != Ipv4::PLAIN/self.version_ihl >> 4 != 4/
version6-ignored   | crates/pipeline/src/network.rs | s/self\.version\(\) != 6/false/
hop-by-hop-ignored | crates/pipeline/src/network.rs | s/self\.next_header == protocol::HOP_BY_HOP/false/
local-source       | crates/pipeline/src/source.rs  | s/Way::Ours => Err\(Reason::MartianSource\)/Way::Ours => Ok(())/
zero-source        | crates/pipeline/src/network.rs | s/if source == 0 \|\| /if /
loopback-source    | crates/pipeline/src/network.rs | s/source >> 24 == 127 \&\& !loopback_ok/false/
multicast-source   | crates/pipeline/src/network.rs | s/is_multicast\(source\) \|\| //
multicast-forward  | crates/pipeline/src/network.rs | s/if is_multicast\(destination\)/if false/
multicast6-source  | crates/pipeline/src/network.rs | s/is_multicast6\(source\) \|\| //
link-local         | crates/pipeline/src/network.rs | s/is_link_local\(source\) \|\| //
other-mac          | crates/pipeline/src/ingress.rs | s/if !entry\.owns\(.*\) \{/if false {/
mac-kept           | crates/pipeline/src/rewrite.rs | s/^( *)\*frame\.get_mut::<L>\(0\).*$/\1let _ = hop.l2;/
redirect-missed    | crates/pipeline/src/route.rs   | s/hop\.port == entry\.slot \&\&/false \&\&/
strict-as-loose    | crates/pipeline/src/source.rs  | s/Way::Unicast\(port\) if !strict \|\| port == entry\.slot/Way::Unicast(_)/
loose-ignored      | crates/pipeline/src/source.rs  | s/Kind::None if filtered => Err\(Reason::RpFilter\),//
total-length       | crates/pipeline/src/network.rs | s/if len > available \{/if len > available + 9 {/
vlan-id-ignored    | crates/pipeline/src/ingress.rs | s/filter\(\|_\| id != 0\)/filter(|_| true)/; s/port\.vlan\.load\(\) != .*\{/false {/ | vlan
tag-kept           | crates/pipeline/src/rewrite.rs | s/parsed\.offset as i32 - size_of::<L>\(\) as i32/0/ | vlan
END
}

work=target/mutants
tree=$work/tree
export CARGO_TARGET_DIR=$PWD/$work/target TOWPATH_DIFF_FRAMES=${TOWPATH_DIFF_FRAMES:-400000} RUST_BACKTRACE=0
root=()
[ "$(id -u)" = 0 ] || root=(sudo -E)

rm -rf $tree && mkdir -p $tree
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t $tree
test_binary=$(cargo test -q -p towpath-lab --test differential --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*differential[^"]*\)".*/\1/p')

# Builds the tree and runs the differential test with it; the verdict.
try() {
    local name=$1 vlan=$2 log=$work/$1.log
    local run=(env TOWPATH_BIN="$CARGO_TARGET_DIR/release/towpath" "$test_binary" towpath_agrees --nocapture)
    [ -z "$vlan" ] || run=(lab/vm --modules 8021q -t 300 -- env TOWPATH_DIFF_FRAMES=20000 "${run[@]:1}")
    if ! (cd $tree && cargo build --release -q) >"$log" 2>&1; then echo "does not build"
    elif "${root[@]}" "${run[@]}" >>"$log" 2>&1; then echo "agrees"
    elif grep -q 'differs from linux' "$log"; then echo "found"
    else echo "failed otherwise"; fi
}

report() { printf '%-20s %-18s %s\n' "$@"; }

status=0
verdict=$(try unchanged '')
report unchanged "$verdict" ''
[ "$verdict" = agrees ] || { echo "mutants: the unchanged tree must agree with Linux ($work/unchanged.log)"; exit 1; }
while IFS='|' read -r name file rest; do
    name=${name// /} file=${file// /}
    # The change may itself hold a bar; only a last field "vlan" is the need.
    vlan=; [[ $rest =~ ^(.*)\|\ vlan$ ]] && rest=${BASH_REMATCH[1]} && vlan=yes
    [ $# = 0 ] || [[ " $* " = *" $name "* ]] || continue
    sed -E -i "${rest# }" "$tree/$file"
    if cmp -s "$file" "$tree/$file"; then verdict="changes nothing"; else verdict=$(try "$name" "$vlan"); fi
    cp "$file" "$tree/$file"
    report "$name" "$verdict" "$(grep -m1 -o 'frame(s) entering by eth[0-9]' "$work/$name.log" 2>/dev/null || true)"
    [ "$verdict" = found ] || status=1
done < <(bugs)
exit $status
