#!/usr/bin/env bash
# Cross-compiles everything for 64-bit Windows with zig and runs it under wine: the C++ tests, and edgelm-parity with
# Windows' own ONNX Runtime on the four tiny bundles. Results must be those of this machine's build (build/csrc), bit for
# bit. If a tool is missing, prints that and exits; with CI=true this is a failure. Makes build/windows and
# build/dist/windows-x86_64, 600 MB.
set -euo pipefail
cd "$(dirname "$0")/../../../.."
python=${PYTHON:-.venv/bin/python} edgelm=${EDGELM:-.venv/bin/edgelm} work=build/windows
# The build folder of the wheel and the C archive: what is tested here is what ships.
build=build/dist/windows-x86_64

zig=${ZIG:-$("$python" -c 'import os, ziglang; print(os.path.join(os.path.dirname(ziglang.__file__), "zig"))' 2>/dev/null || true)}
missing=()
[[ -x $zig ]] || missing+=("pip install ziglang")
command -v wine >/dev/null || missing+=("apt-get install wine64 wine")
if ((${#missing[@]})); then
    [[ ${CI:-} == true ]] && outcome=FAILED || outcome=SKIPPED
    echo "test-windows: $outcome, nothing was run for Windows. To run it:" "${missing[@]/#/$'\n  '}" >&2
    [[ $outcome == SKIPPED ]]
    exit
fi
export WINEDEBUG=${WINEDEBUG:--all} WINEPREFIX=${WINEPREFIX:-$PWD/$work/wine}
# Without these wine asks for Mono and Gecko, and writes menus.
export WINEDLLOVERRIDES="mscoree,mshtml=;winemenubuilder.exe=d"
mkdir -p "$work"

cmake -S runtimes/csrc -B "$build" -DCMAKE_TOOLCHAIN_FILE=cmake/zig.cmake -DEDGELM_ZIG="$zig" \
    -DEDGELM_TARGET=x86_64-windows-gnu -DEDGELM_BUILD_TESTS=ON -DCMAKE_CROSSCOMPILING_EMULATOR=wine
cmake --build "$build" --parallel 2
cmake --build "$build" --parallel 2 --target edgelm_tests
wine cmd /c ver  # makes the prefix first: two tests at once would make it twice
ctest --test-dir "$build" --output-on-failure --exclude-regex digest  # digest follows below

build/csrc/digest_test >"$work/digest-here.txt"
wine "$build/digest_test.exe" | tr -d '\r' >"$work/digest-windows.txt"
diff -u <(grep '^digest ' "$work/digest-here.txt") <(grep '^digest ' "$work/digest-windows.txt")
echo "test-windows: $(grep -c '^digest ' "$work/digest-windows.txt") checksums are the same here and under wine"

if [[ ! -f $work/onnxruntime.dll ]]; then
    version=$("$python" -c 'import onnxruntime; print(onnxruntime.__version__)')
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --platform win_amd64 --python-version 3.11 \
        --dest "$work/wheels" "onnxruntime==$version"
    "$python" -m zipfile -e "$work"/wheels/onnxruntime-*.whl "$work/wheels"
    cp "$work"/wheels/onnxruntime/capi/onnxruntime*.dll "$work"  # beside edgelm.dll
fi
cp "$build/edgelm.dll" "$build/edgelm-parity.exe" "$work"
cc -std=c11 -Iruntimes/csrc runtimes/csrc/tests/windows/logits.c -Lbuild/csrc -ledgelm -o "$work/logits"
"$zig" cc -target x86_64-windows-gnu -std=c11 -Iruntimes/csrc runtimes/csrc/tests/windows/logits.c "$build/edgelm.lib" \
    -o "$work/logits.exe"

here=$("$python" -c 'import onnxruntime.capi as c, glob; print(glob.glob(c.__path__[0] + "/libonnxruntime.so*")[0])')
for model in fox olmoe; do
    for recipe in int4 int8; do
        for ops in native portable; do
            bundle="$work/bundles/a bündle 漢/$model-tiny-$recipe-$ops"
            mkdir -p "$(dirname "$bundle")"
            "$edgelm" export "examples/checkpoints/$model-tiny" -o "$bundle" --recipe "$recipe" --ops "$ops" \
                --overwrite >/dev/null
            echo "test-windows: $model-tiny, $recipe, $ops"
            LC_ALL=C.UTF-8 wine "$work/edgelm-parity.exe" "$bundle"
            LD_LIBRARY_PATH=build/csrc EDGELM_ONNXRUNTIME=$here "$work/logits" "$bundle" "Once upon a time" >"$work/here.txt"
            # `logits` takes its arguments in the code page: a path without such characters
            ln -sfn "$PWD/$bundle" "$work/bundle"
            wine "$work/logits.exe" "$work/bundle" "Once upon a time" | tr -d '\r' >"$work/there.txt"
            # ONNX Runtime's own operators are compiled by another compiler for Windows: their last bits may differ.
            if [[ $ops == native ]]; then diff -u "$work/here.txt" "$work/there.txt"; fi
        done
    done
done
echo "test-windows: the bundles pass parity under wine, and the logits of native operators are those of this machine"
