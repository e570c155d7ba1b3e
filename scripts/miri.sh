#!/usr/bin/env bash
# Runs the tests of the shared tables and of the user engine's workers under Miri, where a nightly toolchain with Miri is installed
# (rustup +nightly component add miri rust-src). Exit status 3 says that it was not run.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! cargo +nightly miri --version >/dev/null 2>&1; then
    echo "Miri was NOT run: 'cargo +nightly miri' is not installed here (rustup +nightly component add miri rust-src)" >&2
    exit 3
fi
export MIRIFLAGS="-Zmiri-disable-isolation ${MIRIFLAGS:-}"
exec cargo +nightly miri test -p towpath-tables -p towpath-user "$@"
