#!/usr/bin/env bash
# Runs the C++ tests for 64-bit Arm: cross-compiled, under qemu-user. Compares the kernels' results with those of this
# machine's build (build/csrc). Then packs and checks the wheel and the C archive, for the tests of tests/arm. If a tool
# is missing, prints that and exits; with CI=true this is a failure.
set -euo pipefail
cd "$(dirname "$0")/../../.."
python=${PYTHON:-.venv/bin/python}

if [[ $(uname -m) == aarch64 ]]; then
    echo "test-arm: this machine is 64-bit Arm, test-cpp has run these tests"
    exit 0
fi
if ! command -v qemu-aarch64 >/dev/null; then
    [[ ${CI:-} == true ]] && outcome=FAILED || outcome=SKIPPED
    echo "test-arm: $outcome, the Arm kernels are not tested. To test them: apt-get install qemu-user" >&2
    [[ $outcome == SKIPPED ]]
    exit
fi

# The emulator's command line, with the system that the tests run in.
emulator=$("$python" tests/arm/root.py)
# The build folder of the wheel and the C archive: what is tested here is what ships, by the same compiler.
build=build/dist/linux-aarch64
zig=${EDGELM_ZIG:-$("$python" -c 'import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).parent / "zig")')}
target=$("$python" -c 'from edgelm.system.platforms import PLATFORMS; print(PLATFORMS["linux-aarch64"].zig)')
cmake -S runtimes/csrc -B $build -DCMAKE_TOOLCHAIN_FILE=cmake/zig.cmake -DEDGELM_ZIG="$zig" -DEDGELM_TARGET="$target" \
    -DEDGELM_BUILD_TESTS=ON -DCMAKE_CROSSCOMPILING_EMULATOR="${emulator// /;}"
cmake --build $build --parallel 2
ctest --test-dir $build --output-on-failure --parallel 2 --exclude-regex digest  # digest follows below

build/csrc/digest_test >build/digest-here.txt
$emulator $build/digest_test >build/digest-arm.txt
if ! diff -u <(grep '^digest ' build/digest-here.txt) <(grep '^digest ' build/digest-arm.txt); then
    echo "test-arm: these kernels' results differ between $(uname -m) and aarch64" >&2
    exit 1
fi
echo "test-arm: $(grep -c '^digest ' build/digest-arm.txt) checksums are the same on $(uname -m) and aarch64"

rm -rf build/dist/packed
# The packed files need some date, and a copy of the sources without Git has none.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1704067200} "$python" runtimes/csrc/dist/build.py linux-aarch64 \
    --out build/dist/packed 2>build/dist/packed.log || { cat build/dist/packed.log >&2; exit 1; }
