#!/usr/bin/env bash
# Installs what the tests and the demo need: Debian packages (only those missing), a distribution kernel for the test
# virtual machine, and the toolchain for BPF. As root or with sudo; safe to run again.
#
# The virtual machine's kernel is unpacked into a private folder, not installed: an installed kernel would change what
# this machine boots. Services of the packages are not started: the lab runs its own instances in its own namespaces.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/debian.sh

packages() {
    cat <<'END'
gcc               links Rust programs
libc6-dev         links Rust programs
iproute2          namespaces, links, addresses and routes of the lab
iputils-ping      echo requests in the lab
ethtool           offloads of the lab's veth links
nftables          rules that must send traffic to Linux
iptables          the same with iptables-nft and iptables-legacy
conntrack         looks at connection tracking
tcpdump           captures that must see forwarded traffic
iperf3            TCP streams through the router
curl              fetches and sends files through a gateway, by HTTP and FTP
python3-pyftpdlib a server of FTP behind a gateway
dropbear-bin      a session of SSH through a gateway: server and client
dnsmasq-base      a server of DNS behind a gateway
bind9-dnsutils    its client
keepalived        fail-over between two gateways
conntrackd        connections that outlive it
frr               BGP between the lab's routers
bpftool           looks at programs and maps
xdp-tools         contenders for comparison
kmod              modules inside the test virtual machine
python3           runs the test virtual machine (lab/vm)
python3-prometheus-client a parser of OpenMetrics
groff-base        reads the manual pages
busybox-static    first program inside the test virtual machine
qemu-system-x86   the test virtual machine
END
}

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

package_lists_fresh() {
    apt-cache policy linux-image-cloud-amd64 rustc-web 2>/dev/null | grep -c 'Candidate: [0-9]' | grep -qx 2
}

# While it stands, Debian's maintainer scripts start no service.
install_quietly() {
    local hold=/usr/sbin/policy-rc.d made=
    if [ ! -e $hold ]; then
        printf '#!/bin/sh\nexit 101\n' | as_root tee $hold >/dev/null
        as_root chmod 755 $hold
        made=yes
    fi
    local status=0
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" || status=$?
    if [ -n "$made" ]; then as_root rm -f $hold; fi
    return $status
}

install_packages() {
    local missing=() name why
    while read -r name why; do
        installed "$name" && continue
        say "needs $name: $why"
        missing+=("$name")
    done < <(packages)
    if [ ${#missing[@]} -gt 0 ] || ! package_lists_fresh; then
        say "refreshing the package lists"
        as_root apt-get update -q
    fi
    [ ${#missing[@]} -gt 0 ] || { say "every package is installed"; return; }
    say "installing ${#missing[@]} packages"
    install_quietly "${missing[@]}" || die "apt-get install failed (its words are above)"
    # Nor with the machine, next time.
    for name in "${missing[@]}"; do
        [ ! -e "/lib/systemd/system/$name.service" ] || as_root systemctl --quiet disable "$name" || true
    done
}

# A released toolchain without rustfmt and clippy cannot run the lint step.
rust_components() {
    command -v cargo >/dev/null || die "no cargo: install Rust from https://rustup.rs"
    cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 && return
    say "needs rustfmt and clippy: the lint step"
    rustup component add rustfmt clippy
}

install_packages
rust_components
scripts/vm-kernel.sh >/dev/null
scripts/bpf-toolchain.sh >/dev/null
say "done"
