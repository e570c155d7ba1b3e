#!/usr/bin/env bash
# Does what the README tells a newcomer to do, in a clean Debian 12 (debootstrap) that has git, make and this machine's stable
# Rust toolchain and nothing else: clones the repository as it is committed here, `make setup`, and then the steps of
# scripts/test.sh that are named, or all.
#
#     scripts/test-bare.sh [STEP…]
#
# The clean root has mounts and processes of its own and this machine's network, from which packages are fetched. As root; some
# 20 GB in target/bare while it runs.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/clean-root.sh

# In the namespaces.
if [ "${1:-}" = enter ]; then
    root=$2 rust=$3
    shift 3
    mount --make-rprivate /
    cd "$root"
    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount -t bpf bpf sys/fs/bpf
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    mount --rbind /dev dev
    for folder in run tmp; do mount -t tmpfs tmpfs $folder; done
    mount --bind "$rust" opt/rust
    exec chroot . env -i HOME=/root LC_ALL=C PATH=/opt/rust/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        sh -c 'cd /root/towpath && make setup && make setup && make build && exec scripts/test.sh "$@"' sh "$@"
fi

root=$PWD/target/bare
rust=$(rustc +stable --print sysroot 2>/dev/null || rustc --print sysroot)
finish() { rm -rf --one-file-system "$root"; }
rm -rf --one-file-system "$root"
trap finish EXIT
clean_root "$root"
# As the installer leaves it.
cat >"$root/etc/apt/sources.list" <<'END'
deb http://deb.debian.org/debian bookworm main
deb http://deb.debian.org/debian bookworm-updates main
deb http://deb.debian.org/debian-security bookworm-security main
END
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
mkdir "$root/opt/rust"
inside "$root" sh -c 'apt-get update -q && apt-get install -y -q --no-install-recommends ca-certificates git make'
# Whom this machine trusts besides: a mirror of its own, perhaps.
cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
inside "$root" update-ca-certificates >/dev/null
git clone -q . "$root/root/towpath"
unshare --pid --mount --ipc --fork --kill-child "$0" enter "$root" "$rust" "$@"
