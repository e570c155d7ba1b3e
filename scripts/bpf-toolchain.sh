#!/usr/bin/env bash
# Prepares what compiles Rust for the BPF target, without root and without touching installed toolchains, and prints
# the folder it lives in. Used by the build script of crates/towpath and by `make setup`; safe to run again.
#
#   <folder>/env          RUSTC, LD_LIBRARY_PATH, PATH entries for the BPF build (sourced or read line by line)
#
# A rustup nightly that has rust-src is taken as it is. Otherwise a rustc with its library source comes from Debian's
# archive (rustc-web and friends), unpacked into the folder: as installed packages they would fight with rustup.
set -euo pipefail

cache=${TOWPATH_BPF_TOOLCHAIN:-${XDG_CACHE_HOME:-$HOME/.cache}/towpath/bpf-toolchain}
linker_version=0.10.3
# The oldest Rust that the programs were built with.
oldest_rust=1.96
say() { echo "bpf-toolchain: $*" >&2; }
die() { say "$*"; exit 1; }

mkdir -p "$cache"
exec 9>"$cache/.lock"
flock 9

install_linker() {
    local have
    have=$("$cache/bin/bpf-linker" --version 2>/dev/null || true)
    [ "$have" = "bpf-linker $linker_version" ] && return
    say "installing bpf-linker $linker_version (links BPF objects; about a minute)"
    env -u RUSTC -u LD_LIBRARY_PATH -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS -u CARGO_TARGET_DIR -u RUSTUP_TOOLCHAIN \
        cargo install --quiet --locked --root "$cache" bpf-linker --version "$linker_version" >&2
}

nightly_with_source() {
    command -v rustup >/dev/null || return 1
    local sysroot
    sysroot=$(rustup run nightly rustc --print sysroot 2>/dev/null) || return 1
    [ -d "$sysroot/lib/rustlib/src/rust/library/core" ] && echo "$sysroot"
}

# The shared libraries that this rustc is linked with and the machine lacks; LLVM's always, for an installed one is removed
# some day.
libraries() {
    local only=(--no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances) name
    apt-cache depends --recurse "${only[@]}" rustc-web "$1" | grep -E '^lib[^:<>]*$' | grep -v -e '-dev$' -e '^libstd-rust' |
        while read -r name; do
            [[ $name != libllvm* && $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) = installed ]] || echo "$name"
        done
}

unpack_debian() {
    [ -e "$cache/debian/.complete" ] && return
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || die \
        "no nightly Rust with rust-src, and this is not a Debian system: run 'rustup toolchain install nightly --component rust-src'"
    say "unpacking rustc with its library source from Debian's archive (about 150 MB; compiles the BPF programs)"
    rm -rf "$cache/debian" "$cache/deb" && mkdir -p "$cache/debian" "$cache/deb"
    local refresh="run 'apt-get update' (with bookworm-security among the sources), or 'rustup toolchain install nightly --component rust-src'" std version
    std=$(apt-cache search --names-only '^libstd-rust-web-[0-9.]+$' | awk '{print $1}' | sort -V | tail -n 1)
    [ -n "$std" ] || die "Debian's package lists hold no libstd-rust-web: $refresh"
    version=${std##*-}
    printf '%s\n' $oldest_rust "$version" | sort -V -C ||
        die "Debian's package lists hold rustc-web $version, and $oldest_rust is needed: $refresh"
    (cd "$cache/deb" && apt-get download --quiet rustc-web libstd-rust-web-dev "$std" rust-web-src $(libraries "$std") >&2) ||
        die "download of rustc-web failed: check the network and 'apt-get update'"
    for deb in "$cache"/deb/*.deb; do dpkg -x "$deb" "$cache/debian"; done
    rm -rf "$cache/deb"
    touch "$cache/debian/.complete"
}

install_linker
if sysroot=$(nightly_with_source); then
    cat >"$cache/env.new" <<END
RUSTC=$sysroot/bin/rustc
LD_LIBRARY_PATH=$sysroot/lib
BPF_LINKER=$cache/bin/bpf-linker
END
else
    unpack_debian
    cat >"$cache/env.new" <<END
RUSTC=$cache/debian/usr/bin/rustc
LD_LIBRARY_PATH=$cache/debian/usr/lib/x86_64-linux-gnu
BPF_LINKER=$cache/bin/bpf-linker
END
fi
mv "$cache/env.new" "$cache/env"
echo "$cache"
