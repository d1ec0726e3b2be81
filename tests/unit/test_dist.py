"""Do the checks of `make wheels` refuse what may not ship, and do its texts say what is there?"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.tags import parse_tag

from edgelm.errors import EdgeLMError
from edgelm.runtimes.csrc.dist import archive, binaries, build, checks, sbom
from edgelm.runtimes.csrc.dist.binaries import Binary
from edgelm.system.platforms import PLATFORMS, Platform

ROOT = Path(__file__).parents[2]
MACHINE = os.uname().machine
HERE = PLATFORMS[f"linux-{MACHINE}"]
PURE = ["edgelm/__init__.py", "edgelm/quant/__init__.py"]


def compiled(folder: Path, *flags: str) -> Binary:
    source, library = folder / "small.c", folder / "small.so"
    source.write_text("int edgelm_one(void) { return 1; }\nint two(void) { return 2; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library), *flags], check=True)
    return binaries.read(library)


def problems(binary: Binary, *expected: str, platform: Platform = HERE) -> list[str]:
    return checks.check_binary("small.so", binary, platform, frozenset(expected))


def test_what_an_elf_file_exports_and_needs_is_read(tmp_path: Path) -> None:
    good = compiled(tmp_path)
    assert (good.format, good.cpu, good.executable_stack, good.rpaths) == ("ELF", MACHINE, False, ())
    assert good.exports == {"edgelm_one", "two"}
    assert problems(good, "edgelm_one", "two") == []
    assert problems(good, "edgelm_one") == ["small.so: exports two, which no header declares"]
    assert problems(good, "edgelm_one", "two", "three") == ["small.so: does not export three"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("-Wl,--no-as-needed", "-lstdc++"), "needs libstdc++.so.6, which not every linux system has"),
        (("-Wl,-z,execstack",), "does not refuse an executable stack"),
        (("-Wl,-rpath,/opt/lib",), "the loader would look in /opt/lib, which is no place beside the file"),
    ],
)
def test_a_library_that_may_not_ship_is_refused(flags: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    assert f"small.so: {reason}" in problems(compiled(tmp_path, *flags), "edgelm_one", "two")


def test_a_newer_glibc_and_another_cpu_are_refused(tmp_path: Path) -> None:
    good = compiled(tmp_path)
    newer = dataclasses.replace(good, glibc=(2, 28))
    assert problems(newer, "edgelm_one", "two") == ["small.so: needs glibc 2.28, expected 2.17 or older"]
    (problem,) = problems(good, "edgelm_one", "two", platform=PLATFORMS["macos-arm64"])
    assert problem == f"small.so: is ELF for {MACHINE}, expected Mach-O for aarch64"


def test_a_library_for_macos_needs_a_signature_and_names_without_the_build_folder(tmp_path: Path) -> None:
    source, library = tmp_path / "small.c", tmp_path / "small.dylib"
    source.write_text("int edgelm_one(void) { return 1; }\n")
    command = [build.ZIG, "cc", "-target", PLATFORMS["macos-arm64"].zig, "-dynamiclib", source, "-o", library]
    subprocess.run([*command, "-install_name", "@rpath/small.dylib"], check=True)
    good = binaries.read(library)
    assert problems(good, "edgelm_one", platform=PLATFORMS["macos-arm64"]) == []
    (problem,) = problems(dataclasses.replace(good, signed=False), "edgelm_one", platform=PLATFORMS["macos-arm64"])
    assert problem == "small.so: has no signature, and macOS on Arm runs nothing without one"
    program = tmp_path / "program"
    (tmp_path / "main.c").write_text("int edgelm_one(void);\nint main(void) { return edgelm_one(); }\n")
    command = [build.ZIG, "cc", "-target", PLATFORMS["macos-arm64"].zig, tmp_path / "main.c", library]
    subprocess.run([*command, "-fvisibility=hidden", "-o", program], check=True)
    assert "@rpath/small.dylib" in binaries.read(program).needs
    (problem,) = problems(binaries.read(program), platform=PLATFORMS["macos-arm64"])
    assert problem == "small.so: needs @rpath/small.dylib, which not every macos system has"


def test_a_path_of_the_build_machine_is_found(tmp_path: Path) -> None:
    content = b"\0" + str(tmp_path / "small.c").encode()
    assert checks.check_paths("small.so", content, [tmp_path]) == [
        f"small.so: has the path {tmp_path} of the build machine inside"
    ]
    assert checks.check_paths("small.so", b"/usr/lib", [tmp_path, Path("/")]) == []


def test_a_wheel_has_the_files_of_the_pure_wheel_and_the_libraries() -> None:
    names = {*PURE, *checks.wheel_libraries(HERE)}
    assert checks.check_wheel_files(names, PURE, HERE) == []
    assert checks.check_wheel_files({*names, "edgelm/x"}, PURE, HERE) == [
        "the wheel has edgelm/x, which the pure wheel has not"
    ]
    assert checks.check_wheel_files(names - {PURE[0]}, PURE, HERE) == [f"the wheel lacks {PURE[0]}"]
    assert len(checks.check_wheel_files(PURE, PURE, HERE)) == 3


def test_the_sources_say_what_each_library_exports() -> None:
    names = checks.exported(ROOT)
    assert "RegisterCustomOps" in names["_edgelm_ops"]
    assert "edgelm_quantize" in names["_edgelm_quant"]
    assert names["libedgelm_plugins"] == {"edgelm_gpu_call", "getCreators", "setLoggerFinder"}
    listed = (ROOT / "runtimes" / "csrc" / "capi" / "exports.map").read_text()
    assert all(f"    {name};\n" in listed for name in names["libedgelm"])


def test_an_archive_is_the_same_bytes_whoever_packs_it(tmp_path: Path) -> None:
    packed = []
    for number, mode in enumerate((0o700, 0o755)):
        folder = tmp_path / str(number) / "edgelm-1.0-linux-x86_64"
        for name in ("README.md", "bin/edgelm-parity", "lib/libedgelm.so.1"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
            (folder / name).chmod(mode)
        (folder / "lib" / "libedgelm.so").symlink_to("libedgelm.so.1")
        archive.write_archive(folder, tmp_path / f"{number}.tar.gz", epoch=1_000_000_000)
        packed.append((tmp_path / f"{number}.tar.gz").read_bytes())
    assert packed[0] == packed[1]
    with tarfile.open(tmp_path / "0.tar.gz") as tar:
        members = {member.name.partition("/")[2]: member for member in tar.getmembers()}
    assert members["bin/edgelm-parity"].mode == 0o755
    assert members["README.md"].mode == 0o644
    assert members["lib/libedgelm.so"].linkname == "libedgelm.so.1"
    missing = checks.check_archive_files((member.name for member in members.values()), HERE)
    assert r"the archive lacks include/edgelm/edgelm\.h" in missing
    assert not any("libedgelm" in line or "README" in line for line in missing)


@pytest.mark.parametrize("platform", PLATFORMS.values(), ids=lambda platform: platform.name)
def test_a_platform_is_named_alike_everywhere(platform: Platform) -> None:
    assert {tag.platform for tag in parse_tag(f"py3-none-{platform.wheel_tag}")} == set(platform.wheel_tag.split("."))
    assert platform.zig.partition("-")[0] in {"x86_64", "aarch64"}
    text = archive.readme(platform, "1.0")
    assert f"EdgeLM 1.0 for {platform.name}" in text
    assert max(map(len, text.splitlines())) <= 120
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    assert f"archive: {platform.name} }}" in workflow


def test_the_bill_of_materials_has_the_installed_versions(tmp_path: Path) -> None:
    wheel = tmp_path / "edgelm-1.0-py3-none-any.whl"
    wheel.write_bytes(b"content")
    bill = json.loads(json.dumps(sbom.bill("1.0", [wheel], epoch=1_000_000_000)))
    assert bill == sbom.bill("1.0", [wheel], epoch=1_000_000_000)
    assert bill["metadata"]["timestamp"] == "2001-09-09T01:46:40Z"
    found = {one["name"]: one for one in bill["components"]}
    for name in ("numpy", "onnxruntime", "tokenizers", "markupsafe"):  # the last is a requirement of jinja2
        assert found[name]["version"] == metadata.version(name)
    assert not {"torch", "onnx", "pytest"} & set(found)
    assert found["libc++"]["version"] == f"zig-{metadata.version('ziglang')}"
    assert found[wheel.name]["hashes"][0]["content"].startswith("ed7002b4")
    references = [one["bom-ref"] for one in bill["components"]]
    assert len(set(references)) == len(references)
    assert bill["dependencies"][0]["dependsOn"] == references


def test_checksums_are_those_that_sha256sum_checks(tmp_path: Path) -> None:
    (tmp_path / "b.whl").write_bytes(b"content")
    (tmp_path / "a.tar.gz").write_bytes(b"more")
    build.write_sums([tmp_path / "b.whl", tmp_path / "a.tar.gz"], tmp_path)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "b.whl").write_bytes(b"changed")
    ran = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path, check=False, capture_output=True)
    assert ran.returncode == 1


def test_only_a_commit_is_built_twice(tmp_path: Path) -> None:
    with pytest.raises(EdgeLMError, match="--reproducible builds a commit twice: fatal: not a git repository"):
        build.committed(tmp_path)
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "file").write_text("1")
    with pytest.raises(EdgeLMError, match=r"changes that are not committed(.|\n)*\?\? file"):
        build.committed(tmp_path)
    subprocess.run(["git", "-C", tmp_path, "add", "file"], check=True)
    subprocess.run(["git", "-C", tmp_path, *name, "commit", "--quiet", "-m", "Add"], check=True)
    assert len(build.committed(tmp_path)) == 40
