#!/usr/bin/env bash
# Runs the packaged systemd unit (scripts/deb.sh) in a clean root, with systemd as process 1 of namespaces of its own and a
# router's two ports in them: start, death, watchdog, upgrade, a wrong configuration, stop.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/clean-root.sh

# In the namespaces: mounts, ports, and then systemd.
if [ "${1:-}" = boot ]; then
    root=$2
    mount --make-rprivate /
    mount --bind "$root" "$root"
    cd "$root"
    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount -t bpf bpf sys/fs/bpf
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    for folder in run tmp dev; do mount -t tmpfs -o mode=755 tmpfs $folder; done
    mkdir dev/net
    for device in null zero full random urandom tty net/tun; do cp -a /dev/$device dev/$device; done
    ln -s /proc/self/fd dev/fd
    ip link set lo up
    for port in 0 1; do
        ip link add eth$port type veth peer name far$port
        ip link set eth$port up
        ip link set far$port up
        ip address add 192.0.2.$((port * 128 + 1))/25 dev eth$port
    done
    mkdir old
    pivot_root . old
    umount -l /old
    exec env -i container=towpath PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --log-target=null --show-status=no
fi

work=$(mktemp -d)
root=$work/root
cgroups=$(findmnt -n -t cgroup2 -o TARGET | head -n 1)
[ -n "$cgroups" ] || die "there is no cgroup2 file system"
group=$cgroups/towpath-test-$$
manager=
finish() {
    if [ -n "$manager" ]; then kill -KILL "$manager" || true; fi
    until [ ! -d "$group" ] || find "$group" -depth -type d -exec rmdir {} + 2>/dev/null; do sleep 0.1; done
    rm -rf "$work"
}
trap finish EXIT

old=$(VERSION=0.0.1 scripts/deb.sh)
new=$(scripts/deb.sh)
clean_root "$root"
cp "$old" "$root/old.deb"
cp "$new" "$root/new.deb"
inside "$root" dpkg -i /old.deb >/dev/null
settings=$root/etc/towpath/towpath.toml
echo 'ports = ["eth0", "eth1"]' >>"$settings"
# What is for a machine, and not for namespaces on one.
for unit in systemd-sysctl systemd-modules-load systemd-random-seed systemd-logind systemd-networkd systemd-remount-fs; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit.service"
done
printf '[Unit]\nWants=systemd-journald.service\n' >"$root/etc/systemd/system/default.target"
# A kernel without netfilter's list of hooks, and a machine that does not let limits be raised, want more.
mkdir "$root/etc/systemd/system/towpath.service.d"
printf '[Service]\nCapabilityBoundingSet=%s\n' "${CAPABILITIES:-}" >"$root/etc/systemd/system/towpath.service.d/test.conf"
[ -n "${CAPABILITIES:-}" ] || rm -r "$root/etc/systemd/system/towpath.service.d"

mkdir "$group"
bash -c 'echo $$ >"$0/cgroup.procs" && exec unshare --pid --mount --net --uts --ipc --cgroup --fork --kill-child "$@"' \
    "$group" "$0" boot "$root" >"$work/log" 2>&1 &
within() {
    nsenter -t "$manager" -m -p -n -u -i -C -r -w \
        env -i DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
}
# Waits until a command succeeds, a minute at most.
await() {
    local what=$1 end=$((SECONDS + 60))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || { [ -z "$manager" ] || within journalctl --no-pager -o cat -n 20 >&2; die "not seen: $what"; }
        sleep 0.1
    done
}
found() { manager=$(pgrep -P "$(pgrep -P $! -x unshare || echo $!)" -x systemd); }
await "systemd" found
await "systemd at work" within systemctl list-units
pid() { within systemctl show -P MainPID towpath; }
replaced() { [ "$(pid)" != "$before" ] && within towpath status | grep -q "taken over"; }
taken_off() { ! within test -e /sys/fs/bpf/towpath; }
failed() { within systemctl is-failed -q towpath; }

within systemctl start towpath
expect "it says nothing of itself" grep -q "^StatusText=2 ports, .* in sync" <(within systemctl show towpath)
expect "it is not confined" grep -q "^Seccomp:.*2" <(within cat "/proc/$(pid)/status")
within systemctl start towpath

before=$(pid)
within systemctl kill --kill-who=main --signal=SIGKILL towpath
await "tables taken over from one that was killed" replaced
before=$(pid)
within sh -c "kill -STOP $before"
await "another one when one has hung" replaced
before=$(pid)
within dpkg -i /new.deb >/dev/null
await "tables taken over by another version" replaced
expect "it was killed" grep -q "leaving the fast path to the next daemon" <(within journalctl -u towpath -o cat)

sed -i 's/^ports/prots/' "$settings"
within systemctl kill --kill-who=main --signal=SIGKILL towpath
await "an end to what cannot go on" failed
expect "the fast path is still there" taken_off
expect "the journal has no error" grep -q 'towpath.toml:.*did you mean ports' <(within journalctl -u towpath -p err -o cat)
sed -i 's/^prots/ports/' "$settings"
within systemctl start towpath
within systemctl stop towpath
expect "the fast path outlasts it" taken_off
expect "it did not end well" test "$(within systemctl show -P Result towpath)" = success
echo "test-unit: started, killed, hung, upgraded, misled and stopped"
