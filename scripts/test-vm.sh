#!/usr/bin/env bash
# Runs tests that meet the kernel once more, on a distribution kernel: the same binaries, the same test names. Two
# virtual machines take the binaries from one list, the longest first. What fails is run once more, in one machine with
# nothing beside it; what passed only then is named ("unsteady: …"). Logs: out/test/vm/.
#
#     scripts/test-vm.sh                  # what the list below names
#     scripts/test-vm.sh --all [ARG…]     # every test of every binary; ARGs go to them (a name to filter by, …)
set -euo pipefail
cd "$(dirname "$0")/.."
export RESULTS=$PWD/out/test/vm

# What runs in the guest, the longest first: a binary, and tests of it if not all. All of what needs more than the
# machine's own kernel may have (GRE, VLANs, VRFs, dummy devices, queueing disciplines) or has to do with a kernel's
# version: its netlink, its hooks, its verifier, its sockets. Of the rest, which met a kernel in the step `unit`, one test
# for each thing that Towpath asks of the kernel. (The differential test's own harness needs no other kernel.)
selection() {
    cat <<'END'
differential towpath_agrees_with_linux_about_tunnels towpath_agrees_with_linux_about_vlans towpath_agrees_with_linux_about_vrfs towpath_agrees_with_linux_about_connections_in_vrfs towpath_agrees_with_linux towpath_agrees_with_linux_about_reverse_paths towpath_agrees_with_linux_about_redirects histories::settings::every_device_above_a_port_is_honoured workers_agree_with_linux_about_tunnels workers_agree_with_linux_about_vlans ports_in_memory_agree_with_linux_about_vlans
policies netfilter_holds_for_the_stream what_does_not_concern_forwarding_leaves_it_fast a_capture_sees_forwarded_packets_on_either_port
tunnels
engine
decisions
flows a_flowtable_hands_connections_over what_a_program_held_does_not_count_for_new_rules transfers_through_nat_are_whole_and_fast a_rule_that_drops_a_connection_stops_it
failover connections_in_a_flowtable_do_so_too connections_in_a_flowtable_outlive_a_gateway_that_dies
vlans
vrfs
gateway files_are_sent_and_fetched_by_ftp
user workers_forward_and_down_gives_back_to_linux_without_loss several_workers_and_queues_lose_nothing
kernel
conntrack
connections
guard
packet_path
lifecycle programs_go_on_after_kill_and_a_new_daemon_reconciles_without_loss generic_mode_forwards_if_it_is_asked_for a_port_whose_peer_cannot_receive_what_is_redirected_is_left_to_linux
captures a_filter_takes_what_it_matches_from_the_fast_path_and_nothing_else several_captures_see_each_its_own
nat mappings_come_and_go_and_outlast_the_daemon a_vlan_sub_interface_has_mappings_of_its_own filters_of_others_do_not_get_around_mappings mappings_end_where_their_programs_are_gone_at_start
af_packet
af_xdp
devices what_is_left_to_a_device_is_not_overlooked a_changed_mtu_is_followed_while_packets_flow
refusals a_port_without_native_xdp_is_refused_with_the_remedies three_capabilities_are_enough_where_netfilter_hooks_can_be_known a_foreign_xdp_program_is_left_alone
separate a_neighbour_in_use_is_probed_through_the_socket
wires a_port_on_a_tap_forwards_and_linux_gets_and_sends_the_rest
load policies_overtake_routes_on_a_socket
neighbours
trace tagged_frames_are_told_with_their_port each_packet_s_way_is_told_with_what_it_met
shadow linux_carries_all_and_the_counters_are_those_of_up connections_are_predicted_and_linux_s_entries_stay_what_they_were
check tables_that_have_fallen_behind_linux_are_found_out what_rules_lead_to_is_compared_by_port_and_source
doctor what_a_device_cannot_do_is_found_and_gone_when_it_is_mended
remote a_neighbour_in_use_is_probed_by_the_other_host
top the_busiest_prefixes_are_estimated_from_a_sample
metrics a_resync_is_counted
clock
towpath_fptun
tap
filters
filter what_is_matched_is_dropped_and_nothing_else
random
END
}

# The selection with each binary's folder and path in place: name, folder, path, tests. With --all: every binary, without
# the user engine's table of cases, which needs no kernel and would take long. Built as for the step `unit`, which leaves
# nothing to build.
binaries() {
    cargo test --workspace --no-run --message-format=json | SELECTION=$(selection) python3 -c '
import json, os, sys
packages = ["filter", "engine", "cm", "hitflags", "fptun", "user", "towpath", "lab"]
selected = [line.split() for line in os.environ["SELECTION"].splitlines()]
order = [words[0] for words in selected]
found = {}
for line in sys.stdin:
    m = json.loads(line)
    if m["reason"] != "compiler-artifact" or not m["profile"]["test"] or not m["executable"]:
        continue
    folder = os.path.dirname(m["manifest_path"])
    if os.path.basename(folder) in packages and m["target"]["name"] != "cases":
        found[m["target"]["name"]] = [folder, m["executable"]]
if sys.argv[1:] == ["all"]:
    names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    selected = [[name] for name in names]
for name, *tests in selected:
    if name not in found:
        sys.exit(f"test-vm: no test binary {name}")
    print(name, *found[name], *tests)' "$@"
}

# The guest translates instructions: fewer frames and rounds there, more patience, and no second run beside the first.
export TOWPATH_PATIENCE=${TOWPATH_PATIENCE:-5}
export TOWPATH_DIFF_FRAMES=${TOWPATH_VM_DIFF_FRAMES:-6000}
export TOWPATH_ROUNDS=${TOWPATH_ROUNDS:-1}
export TOWPATH_LOAD_ROUTES=${TOWPATH_LOAD_ROUTES:-10000}
export TOWPATH_BIN=${TOWPATH_BIN:-$PWD/target/release/towpath}
# Translated, a command that was built for debugging takes several times as long.
export TOWPATH_COMMAND=$TOWPATH_BIN
# Nothing may be skipped for want of a kernel feature: supplying those is what this kernel is for.
export TOWPATH_NO_SKIP=1
root=()
[ "$(id -u)" = 0 ] || root=(sudo -E)

# In the guest: runs what no other machine has taken. A folder is made by one of them only.
guest='while read -r name dir binary tests; do
    mkdir "$RESULTS/$name.taken" 2>/dev/null || continue
    start=$SECONDS status=0
    echo "vm: $name begins"
    (cd "$dir" && exec "$binary" --test-threads=1 ${tests:+--exact} $tests "$@") </dev/null &>"$RESULTS/$name.log" || status=$?
    for test in $tests; do
        grep -q "^test $test \.\.\. " "$RESULTS/$name.log" && continue
        echo "error: $name has no test $test" >>"$RESULTS/$name.log"
        status=1
    done
    echo "$status" >"$RESULTS/$name.status"
    [ "$status" = 0 ] && how= || how=", FAILED"
    echo "vm: $((SECONDS - start)) s for $name$how" | tee -a "$RESULTS/times"
done <<<"$LIST"'

# machines COUNT LIST [ARG…]: that many machines run the binaries of the list. What guards against speculation takes many
# times longer under translation, which does not speculate.
machines() {
    local count=$1
    export LIST=$2
    shift 2
    for ((; count > 0; count--)); do
        "${root[@]}" lab/vm --writable "$RESULTS" --memory 4096 --timeout "${TOWPATH_VM_TIMEOUT:-1800}" \
            --append "mitigations=off init_on_alloc=0" --modules veth,tun,8021q,bridge,dummy,vrf,macvlan,ipvlan,sch_tbf,nf_tables,nf_conntrack,nf_nat_ftp,nf_flow_table_inet,nft_flow_offload,sch_ingress,cls_bpf,cls_matchall,act_gact,act_mirred,nfnetlink_queue,nft_queue -- bash -c "$guest" vm "$@" &
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

all=
if [ "${1:-}" = --all ]; then
    all=all
    shift
    # These try the differential test's own harness, with many frames.
    set -- --skip another_configuration --skip another_firewall --skip linux_agrees_with_itself "$@"
fi
list=$(binaries $all)
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
