#!/usr/bin/env bash
# Installs, upgrades, removes and purges the Debian package (scripts/deb.sh) in a clean root, and looks at what is there
# after each.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/clean-root.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root wanted=etc/systemd/system/multi-user.target.wants/towpath.service

# Everything there is, but for what dpkg and systemctl write for themselves.
files() { (cd "$root" && find . \( -path ./run -o -path ./var/lib/dpkg -o -path ./var/log -o -path ./var/cache \) -prune -o -print | sort); }

old=$(VERSION=0.0.1 scripts/deb.sh)
new=$(scripts/deb.sh)
clean_root "$root"
cp "$old" "$root/old.deb"
cp "$new" "$root/new.deb"
files >"$work/before"

inside "$root" dpkg -i /old.deb
expect "the command does not run" inside "$root" towpath --version
expect "a page is missing" test -s "$root/usr/share/man/man8/towpath-up.8.gz"
expect "the unit is not accepted" inside "$root" systemd-analyze --man=no verify /lib/systemd/system/towpath.service
expect "it was enabled" test ! -e "$root/$wanted"
expect "files are not as packed" inside "$root" dpkg --verify towpath
echo 'ports = ["eth0"]' >>"$root/etc/towpath/towpath.toml"
inside "$root" systemctl --quiet enable towpath.service

inside "$root" dpkg -i /new.deb
expect "the configuration was changed" grep -q '^ports = ' "$root/etc/towpath/towpath.toml"
expect "it is no longer enabled" test -L "$root/$wanted"
expect "the new version is not there" test "$(inside "$root" dpkg-query -W -f '${Version}' towpath)" != 0.0.1

inside "$root" dpkg --remove towpath
expect "the command is still there" test ! -e "$root/usr/bin/towpath"
expect "it is still enabled" test ! -L "$root/$wanted"
expect "the configuration is gone" test -e "$root/etc/towpath/towpath.toml"
inside "$root" dpkg --purge towpath
files >"$work/after"
diff "$work/before" "$work/after" || die "not all of it is gone, or something else is"
echo "test-deb: installed, upgraded, removed and purged without a trace"
