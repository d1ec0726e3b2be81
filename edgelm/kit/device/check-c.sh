#!/bin/sh
# Checks this machine with the kit in this folder, offline and without Python:   sh check.sh
# Needs a shell, uname, and sha256sum or shasum; those of busybox do. It writes report.json into this folder, nothing else.
# EMULATOR="qemu-aarch64 -L /root" runs the program in an emulator. Options are those of edgelm-parity: --threads N, --kv TYPE.
CDPATH='' cd -- "$(dirname -- "$0")" || exit 1
fail() {
    echo "check.sh: $*" >&2
    exit 1
}

[ -f SHA256SUMS ] || fail "SHA256SUMS is missing: unpack the kit again"
if command -v sha256sum >/dev/null 2>&1; then
    sums=sha256sum
elif command -v shasum >/dev/null 2>&1; then
    sums='shasum -a 256'
else
    fail "neither sha256sum nor shasum was found, which check the files"
fi
# A line for each file that is missing or differs, and no other.
wrong=$($sums -c SHA256SUMS 2>&1 | grep -v ': OK$')
if [ -n "$wrong" ]; then
    printf '%s\n' "$wrong" >&2
    fail "the files above are missing or damaged: unpack the kit again, or copy it again"
fi
echo "files     $(grep -c . SHA256SUMS) files, every hash is that of the kit"

system=$(uname -s) machine=$(uname -m)
echo "machine   $system $machine"
case "$system $machine" in
    "@MACHINE@") ;;
    *) [ -n "${EMULATOR:-}" ] || fail "this kit is for @PLATFORM@: make one for this machine with --for" ;;
esac
program=libedgelm/bin/edgelm-parity
[ -x $program ] || fail "$program may not be executed: unpack the kit on a file system that keeps permissions"

echo "parity    does this machine compute what PyTorch computed?"
echo
# The emulator and its options are words of their own.
# shellcheck disable=SC2086
${EMULATOR:-} $program bundle --json report.json "$@"
status=$?
echo
case $status in
    0) echo "The parity check passed. report.json tells more; libedgelm/include and lib are for your program." ;;
    1) echo "The parity check FAILED: do not use the model on this machine." ;;
    2) exit 2 ;;
    126 | 127) fail "$program cannot be started here: this system is not @PLATFORM@, or too old (glibc @GLIBC@ is needed)" ;;
    132) fail "the program ended with an illegal instruction: this CPU lacks what ONNX Runtime needs" ;;
    137) fail "the system killed the program, mostly for lack of memory: close programs, or take a smaller model" ;;
    *) fail "the program ended with exit code $status" ;;
esac
exit $status
