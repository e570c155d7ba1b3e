#!/usr/bin/env bash
# Unpacks Debian's cloud kernel and its modules for the test virtual machine into a private folder, and prints the
# folder: boot/vmlinuz-<release> and lib/modules/<release> lie in it. Needs no root; safe to run again.
set -euo pipefail

cache=${TOWPATH_VM_KERNEL:-${XDG_CACHE_HOME:-$HOME/.cache}/towpath/vm-kernel}
say() { echo "vm-kernel: $*" >&2; }
die() { say "$*"; exit 1; }

mkdir -p "$cache"
exec 9>"$cache/.lock"
flock 9
if [ ! -e "$cache/.complete" ]; then
    package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/ {print $2}')
    [ -n "$package" ] || die "Debian's package lists hold no linux-image-cloud-amd64: run 'apt-get update'"
    say "unpacking $package (about 30 MB; the test virtual machine's kernel)"
    rm -rf "$cache/deb" "$cache/boot" "$cache/lib" && mkdir -p "$cache/deb"
    (cd "$cache/deb" && apt-get download --quiet "$package" >&2) ||
        die "download of $package failed: check the network and 'apt-get update'"
    dpkg -x "$cache"/deb/*.deb "$cache"
    release=$(basename "$cache"/lib/modules/*)
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$cache" "$release"
    rm -rf "$cache/deb" "$cache/usr"
    touch "$cache/.complete"
fi
echo "$cache"
