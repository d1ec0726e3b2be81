#!/usr/bin/env bash
# Runs the C++ tests for 64-bit Arm: cross-compiled, under qemu-user. Compares the kernels' results with those of this
# machine's build (build/csrc). If a tool is missing, prints that and exits; with CI=true this is a failure.
set -euo pipefail
cd "$(dirname "$0")/../../.."
python=${PYTHON:-.venv/bin/python}

if [[ $(uname -m) == aarch64 ]]; then
    echo "test-arm: this machine is 64-bit Arm, test-cpp has run these tests"
    exit 0
fi
missing=()
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
if ((${#missing[@]})); then
    [[ ${CI:-} == true ]] && outcome=FAILED || outcome=SKIPPED
    echo "test-arm: $outcome, the Arm kernels are not tested. To test them: apt-get install ${missing[*]}" >&2
    [[ $outcome == SKIPPED ]]
    exit
fi

cmake -S runtimes/csrc -B build/csrc-arm -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DEDGELM_BUILD_TESTS=ON
cmake --build build/csrc-arm --parallel 2
ctest --test-dir build/csrc-arm --output-on-failure --parallel 2 --exclude-regex digest  # digest follows below

build/csrc/digest_test >build/digest-here.txt
qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu build/csrc-arm/digest_test >build/digest-arm.txt
if ! diff -u <(grep '^digest ' build/digest-here.txt) <(grep '^digest ' build/digest-arm.txt); then
    echo "test-arm: these kernels' results differ between $(uname -m) and aarch64" >&2
    exit 1
fi
echo "test-arm: $(grep -c '^digest ' build/digest-arm.txt) checksums are the same on $(uname -m) and aarch64"

# What the wheel and the C archive for aarch64 hold, in their own build folder, for tests/arm.
zig=${EDGELM_ZIG:-$("$python" -c 'import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).parent / "zig")')}
target=$("$python" -c 'from edgelm.system.platforms import PLATFORMS; print(PLATFORMS["linux-aarch64"].zig)')
cmake -S runtimes/csrc -B build/dist/linux-aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/zig.cmake -DEDGELM_ZIG="$zig" \
    -DEDGELM_TARGET="$target"
cmake --build build/dist/linux-aarch64 --parallel 2 --target _edgelm_ops _edgelm_quant edgelm_plugins edgelm_parity
