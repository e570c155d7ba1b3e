#!/usr/bin/env bash
# Prepares DPDK, for the feature of that name and as the peer of the user engine's benchmarks. Installs Debian's packages
# if they are missing (about 25 MB) and builds l3fwd from the source in dpdk-doc, unchanged, with bench/dpdk/feed.c
# beside it. Prints the program's path. As root or with sudo; safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/debian.sh

folder=target/dpdk
say() { echo "dpdk: $*" >&2; }
die() { say "$*"; exit 1; }

command -v apt-get >/dev/null || die "not a Debian system: put an l3fwd built with bench/dpdk/feed.c at $folder/l3fwd yourself"
missing=()
for package in gcc libc6-dev pkg-config libdpdk-dev dpdk-dev; do
    installed "$package" || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    { as_root apt-get update -q && as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends "${missing[@]}"; } >&2 || die "apt-get failed (its words are above)"
fi

version=$(dpkg-query -W -f '${Version}' libdpdk-dev)
mkdir -p "$folder"
source=$folder/doc-$version/usr/share/dpdk/examples/l3fwd
if [ ! -d "$source" ]; then
    say "unpacking l3fwd's source from dpdk-doc $version"
    (cd "$folder" && rm -f dpdk-doc_*.deb && apt-get download -q "dpdk-doc=$version" >&2) || die "download of dpdk-doc failed"
    dpkg -x "$folder"/dpdk-doc_*.deb "$folder/doc-$version" && rm "$folder"/dpdk-doc_*.deb
fi
if [ ! "$folder/l3fwd" -nt bench/dpdk/feed.c ] || [ ! "$folder/l3fwd" -nt "$source" ]; then
    say "building l3fwd"
    # As its own Makefile does; the files *_route_parse.c are included by others.
    files=$(find "$source" -name '*.c' ! -name '*_route_parse.c')
    # shellcheck disable=SC2046,SC2086
    gcc -O3 $(pkg-config --cflags libdpdk) -I"$source/../common" -DALLOW_EXPERIMENTAL_API -w $files bench/dpdk/feed.c -o "$folder/l3fwd.new" \
        -Wl,--wrap=rte_eth_dev_start,--wrap=rte_eth_dev_configure,--wrap=rte_eth_rx_queue_setup,--wrap=rte_fib_create $(pkg-config --libs libdpdk) || die "l3fwd does not build"
    mv "$folder/l3fwd.new" "$folder/l3fwd"
fi
echo "$folder/l3fwd"
