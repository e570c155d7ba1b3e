# Sourced by the scripts that try the Debian package: a clean Debian 12 with systemd, by debootstrap, which is unpacked and not
# installed. Needs root and the distribution's mirror; an image is kept in target/debian/clean.tar.

die() { echo "$(basename "$0" .sh): $*" >&2; exit 1; }

# Unpacks it into a folder that is not there yet.
clean_root() {
    local root=$1 image=$PWD/target/debian/clean.tar made
    [ "$(id -u)" = 0 ] || die "must run as root"
    if [ ! -e "$image" ]; then
        made=$(mktemp -d)
        (cd "$made" && apt-get download -q debootstrap >/dev/null && dpkg-deb -x debootstrap_*.deb tool)
        DEBOOTSTRAP_DIR=$made/tool/usr/share/debootstrap "$made/tool/usr/sbin/debootstrap" \
            --variant=minbase --include=systemd bookworm "$made/root" >"$made/log" 2>&1 ||
            { tail -n 20 "$made/log" >&2; die "debootstrap made no clean root"; }
        mkdir -p target/debian
        tar -C "$made/root" -cf "$image.new" . && mv "$image.new" "$image"
        rm -rf "$made"
    fi
    mkdir "$root" && tar -C "$root" -xf "$image"
}

# A command in a root, by this environment and no other.
inside() { chroot "$1" env -i DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin "${@:2}"; }

expect() { "${@:2}" || die "$1"; }
