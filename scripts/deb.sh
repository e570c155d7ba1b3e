#!/usr/bin/env bash
# Makes a Debian package of the towpath command: target/debian/towpath_VERSION_ARCHITECTURE.deb. The command must have
# been built (make build). Manual pages, completions and the configuration come from the command itself.
# VERSION=… gives it another version than the workspace's.
set -euo pipefail
cd "$(dirname "$0")/.."
binary=target/release/towpath
[ -x $binary ] || { echo "deb: no $binary; run: make build" >&2; exit 1; }
version=${VERSION:-$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)}
architecture=$(dpkg --print-architecture)
work=target/debian/work root=target/debian/work/root
rm -rf $work
mkdir -p $root $work/debian
umask 022

put() { install -D -m "$1" "$2" "$root/$3"; }
put 755 $binary usr/bin/towpath
strip $root/usr/bin/towpath
$binary generate $work
for page in "$work"/man/*; do
    gzip -9n "$page"
    put 644 "$page.gz" "usr/share/man/man8/$(basename "$page").gz"
done
put 644 $work/completions/towpath.bash usr/share/bash-completion/completions/towpath
put 644 $work/completions/_towpath usr/share/zsh/vendor-completions/_towpath
put 644 $work/completions/towpath.fish usr/share/fish/vendor_completions.d/towpath.fish
put 644 $work/towpath.toml etc/towpath/towpath.toml
put 644 dist/towpath.service lib/systemd/system/towpath.service
put 644 README.md usr/share/doc/towpath/README.md
put 644 dist/debian/copyright usr/share/doc/towpath/copyright
for script in postinst prerm postrm; do put 755 dist/debian/$script DEBIAN/$script; done
echo /etc/towpath/towpath.toml >$root/DEBIAN/conffiles
(cd $root && find usr etc lib -type f ! -path 'etc/towpath/towpath.toml' -print0 | sort -z | xargs -0 md5sum) >$root/DEBIAN/md5sums

# Libraries, by what the binary asks for.
printf 'Source: towpath\n\nPackage: towpath\nArchitecture: any\n' >$work/debian/control
depends=$(cd $work && dpkg-shlibdeps -O root/usr/bin/towpath | sed -n 's/^shlibs:Depends=//p')
cat >$root/DEBIAN/control <<END
Package: towpath
Version: $version
Architecture: $architecture
Maintainer: the authors of Towpath <towpath@localhost>
Installed-Size: $(du -sk --exclude=DEBIAN $root | cut -f1)
Depends: $depends
Recommends: iproute2
Section: net
Priority: optional
Description: fast path beside the Linux network stack
 Forwarded packets go from driver to driver by an XDP program, or by workers on
 cores of their own, that repeat what Linux decided. Everything else, and
 everything that cannot be repeated exactly, goes to Linux as it arrived.
 Linux is configured as always.
END
package=target/debian/towpath_${version}_$architecture.deb
dpkg-deb --root-owner-group --build $root "$package" >/dev/null
echo "$package"
