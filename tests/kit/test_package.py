"""Are kits complete, the same each time, and refused with what to do where something is missing?"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from kit_inputs import PYTHON, wheel

from edgelm.bundle import Bundle
from edgelm.cli.main import cli
from edgelm.errors import EdgeLMError
from edgelm.kit import archives, package
from edgelm.kit.entries import Entry, check_name, of_bytes, with_sums
from edgelm.kit.package import check_target
from edgelm.kit.wheels import Target, Wheel, WheelSource, our_wheel
from edgelm.system.platforms import PLATFORMS, Platform
from edgelm.version import __version__

ENTRIES = with_sums(
    [
        of_bytes("kit.json", "{}"),
        of_bytes("check.sh", "#!/bin/sh\n", executable=True),
        of_bytes("lib/long" + "er" * 60, b"x" * 1000),
        Entry("lib/link", "../check.sh", 0, "0" * 64),
    ]
)
TIME = 1_700_000_000
TOOLS = {".tar": None, ".tar.gz": None, ".tar.zst": "zstd", ".zip": None}


def write(target: Path, **options: bool) -> Path:
    given = {"overwrite": False, **options}
    archives.write_kit(target, "kit", ENTRIES, time=TIME, sources=[], **given)
    return target


@pytest.mark.parametrize("suffix", archives.SUFFIXES)
def test_an_archive_has_names_modes_times_and_links_and_the_same_bytes_each_time(suffix: str, tmp_path: Path) -> None:
    if suffix == ".tar.zst" and not shutil.which("zstd"):
        pytest.skip("needs zstd")
    first = write(tmp_path / f"a{suffix}").read_bytes()
    assert write(tmp_path / f"b{suffix}").read_bytes() == first
    if suffix == ".zip":
        with zipfile.ZipFile(tmp_path / "a.zip") as archive:
            infos = {info.filename: info for info in archive.infolist()}
            assert archive.read("kit/lib/link") == b"../check.sh"
        assert [oct(infos[f"kit/{name}"].external_attr >> 16) for name in ("check.sh", "kit.json", "lib/link")] == [
            "0o100755", "0o100644", "0o120777",
        ]  # fmt: skip
        assert {info.date_time for info in infos.values()} == {(2023, 11, 14, 22, 13, 20)}
        names = list(infos)
    else:
        # Read by tar itself, as on a device.
        folder = tmp_path / "there"
        folder.mkdir()
        subprocess.run(["tar", "xf", tmp_path / f"a{suffix}", "-C", folder], check=True)
        listed = subprocess.run(["tar", "tf", tmp_path / f"a{suffix}"], capture_output=True, text=True, check=True)
        names = listed.stdout.split()
        assert os.access(folder / "kit/check.sh", os.X_OK)
        assert not os.access(folder / "kit/kit.json", os.X_OK)
        assert (folder / "kit/kit.json").stat().st_mtime == TIME
        assert str((folder / "kit/lib/link").readlink()) == "../check.sh"
        assert (folder / f"kit/lib/long{'er' * 60}").read_bytes() == b"x" * 1000
    assert names == [f"kit/{entry.name}" for entry in ENTRIES]
    assert names[0] == "kit/SHA256SUMS"


def test_a_folder_is_written_too(tmp_path: Path) -> None:
    kit = write(tmp_path / "kit")
    assert {path.relative_to(kit).as_posix() for path in kit.rglob("*") if not path.is_dir()} == {
        entry.name for entry in ENTRIES
    }
    assert os.access(kit / "check.sh", os.X_OK)
    (kit / "env").mkdir()
    (kit / "env" / "made by check.sh").touch()
    write(kit, overwrite=True)
    assert not (kit / "env").exists()


@pytest.mark.parametrize("suffix", ["", *archives.SUFFIXES])
def test_only_a_kit_is_overwritten(suffix: str, tmp_path: Path) -> None:
    if suffix == ".tar.zst" and not shutil.which("zstd"):
        pytest.skip("needs zstd")
    kit = write(tmp_path / f"kit{suffix}")
    with pytest.raises(EdgeLMError, match="--overwrite"):
        write(kit)
    write(kit, overwrite=True)
    other = tmp_path / f"other{suffix}"
    if suffix:
        other.write_bytes(b"my letters" * 100)
    else:
        other.mkdir()
        (other / "letters").write_text("mine")
    with pytest.raises(EdgeLMError, match="is no kit"):
        write(other, overwrite=True)
    if suffix.startswith(".tar"):
        mine = io.BytesIO()
        with tarfile.open(fileobj=mine, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("mine/SHA256SUMS"))
        data = gzip.compress(mine.getvalue()) if suffix == ".tar.gz" else mine.getvalue()
        if suffix == ".tar.zst":
            data = subprocess.run(["zstd", "-q"], input=data, capture_output=True, check=True).stdout
        other.write_bytes(data)
        with pytest.raises(EdgeLMError, match="is no kit"):
            write(other, overwrite=True)
    assert not list(tmp_path.glob(".*"))


def test_other_suffixes_and_names_are_refused() -> None:
    for name in ("kit.tgz", "kit.tar.xz", "kit.7z", "kit.rar"):
        with pytest.raises(EdgeLMError, match=r"it ends with \.tar\.zst, \.tar\.gz, \.tar, \.zip, or is a folder"):
            archives.suffix_of(Path(name))
    assert [archives.suffix_of(Path(name)) for name in ("a.b", "A.TAR.GZ", "a.tar")] == ["", ".tar.gz", ".tar"]
    for name in ("../x", "a//b", "a b", "a\nb", "-rf", "a/.ssh", "a'b", "ä"):
        with pytest.raises(EdgeLMError, match="a kit cannot hold a file named"):
            check_name(name)
    with pytest.raises(EdgeLMError, match=r"two files of the kit would be named readme\.md"):
        with_sums([of_bytes("README.md", ""), of_bytes("readme.md", "")])


def test_a_file_that_changes_while_it_is_packed_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("after")
    entry = Entry("file", tmp_path / "file", 5, hashlib.sha256(b"first").hexdigest())
    with pytest.raises(EdgeLMError, match="changed while the kit was written"):
        archives.write_kit(tmp_path / "x.tar", "x", [entry], time=TIME, sources=[], overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- wheels ------------------------------------------------------------------------------------------------------------


def made(folder: Path, name: str, *requires: str, tag: str = "py3-none-any") -> Path:
    label, _, version = name.partition("-")
    lines = [
        f"Name: {label}",
        f"Version: {version}",
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    return wheel(folder / f"{name}-{tag}.whl", {f"{name}.dist-info/METADATA": "\n".join(lines).encode()})


def test_the_wheels_of_another_machine_are_chosen_by_its_tags_and_markers(tmp_path: Path) -> None:
    ours = made(
        tmp_path, f"edgelm-{__version__}", "alpha>=2", 'beta; sys_platform == "win32"', 'gamma; extra == "cpu"',
        'delta; platform_machine == "aarch64" and python_version < "3.12"', "huggingface_hub",
    )  # fmt: skip
    for tag in ("cp311-cp311-manylinux_2_27_aarch64", "cp312-cp312-manylinux_2_27_aarch64", "cp39-abi3-win_amd64"):
        made(tmp_path, "alpha-2.0", "epsilon", tag=tag)
    made(tmp_path, "alpha-3.0", tag="cp311-cp311-manylinux_2_34_aarch64")  # too new a system
    made(tmp_path, "alpha-1.0")
    made(tmp_path, "beta-1.0")
    made(tmp_path, "gamma-1.0", tag="cp38-abi3-manylinux2014_aarch64")
    made(tmp_path, "delta-1.0")
    made(tmp_path, "epsilon-1.0")
    source, first = WheelSource(tmp_path), Wheel.at(ours)
    assert first is not None

    def names(platform: str, minor: int, extra: str | None = None) -> list[str]:
        chosen = source.closure(first, extra, Target(PLATFORMS[platform], minor))
        return [f"{one.name}-{one.version}-{one.tags[0]}" for one in chosen]

    us = f"edgelm-{__version__}-py3-none-any"
    assert names("linux-aarch64", 11) == [
        "alpha-2.0-cp311-cp311-manylinux_2_27_aarch64", "delta-1.0-py3-none-any", us, "epsilon-1.0-py3-none-any",
    ]  # fmt: skip
    assert names("linux-aarch64", 12, "cpu") == [
        "alpha-2.0-cp312-cp312-manylinux_2_27_aarch64", us, "epsilon-1.0-py3-none-any",
        "gamma-1.0-cp38-abi3-manylinux2014_aarch64",
    ]  # fmt: skip
    assert names("windows-x86_64", 13)[:2] == ["alpha-2.0-cp39-abi3-win_amd64", "beta-1.0-py3-none-any"]
    with pytest.raises(EdgeLMError, match=r"no wheel of alpha >=2 for macos-arm64 and Python 3\.12"):
        names("macos-arm64", 12)


def test_a_wheel_for_the_platform_goes_before_the_pure_one(tmp_path: Path) -> None:
    platform = PLATFORMS["linux-aarch64"]
    pure = made(tmp_path, f"edgelm-{__version__}")
    found = our_wheel([tmp_path / "none", tmp_path], __version__, platform)
    assert found is not None
    assert found.path == pure
    right = made(tmp_path, f"edgelm-{__version__}", tag=f"py3-none-{platform.wheel_tag}")
    made(tmp_path, f"edgelm-{__version__}", tag=f"py3-none-{PLATFORMS['linux-x86_64'].wheel_tag}")
    made(tmp_path, "edgelm-99.0", tag=f"py3-none-{platform.wheel_tag}")
    found = our_wheel([tmp_path], __version__, platform)
    assert found is not None
    assert found.path == right


def test_a_damaged_wheel_is_named(tmp_path: Path) -> None:
    path = made(tmp_path, f"edgelm-{__version__}")
    path.write_bytes(path.read_bytes()[:-30])
    found = Wheel.at(path)
    assert found is not None
    for read in (found.metadata, lambda: found.holds("edgelm/")):
        with pytest.raises(EdgeLMError, match=r"edgelm-.*\.whl is damaged .*: remove it"):
            read()


def test_a_kit_names_what_is_wrong_before_it_takes_packages(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = (bundle, "-o", tmp_path / "kit.tar", "--dist", tmp_path)
    missing = run(*place, status=2)
    assert "Missing option '--for'. Choose from linux-x86_64, linux-aarch64, macos-arm64, windows-x86_64." in missing
    made(tmp_path, f"edgelm-{__version__}")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    assert "SOURCE_DATE_EPOCH is 'today'" in run(*place, "--for", "linux-x86_64", status=1)
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    with pytest.raises(EdgeLMError, match=r"there is no folder .*none: --wheels names the folder"):
        WheelSource(tmp_path / "none")


def test_pip_without_a_network_says_to_check_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.requirements import Requirement

    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:1/", "PIP_RETRIES": "0", "PIP_NO_INDEX": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EdgeLMError, match=r"pip cannot download nowhere.*check the network"):
        WheelSource().get([Requirement("nowhere")], Target(PLATFORMS["linux-x86_64"], 11))


def test_each_target_has_its_platforms(bundle: Path) -> None:
    opened = Bundle.open(bundle)

    def on(platform: str, target: str) -> None:
        manifest = dataclasses.replace(opened.manifest, target=target)
        check_target(Bundle(opened.path, manifest), PLATFORMS[platform])

    for platform in PLATFORMS:
        on(platform, "cpu")
    on("linux-aarch64", "tensorrt")
    on("windows-x86_64", "cuda")
    for platform, target in (("linux-aarch64", "cuda"), ("macos-arm64", "tensorrt"), ("windows-x86_64", "tensorrt")):
        with pytest.raises(EdgeLMError, match=f"for the target {target}, which EdgeLM does not have on {platform}"):
            on(platform, target)


# -- the command -------------------------------------------------------------------------------------------------------


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(cli, ["package", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def test_the_command_writes_a_kit_and_says_what_it_is(
    bundle: Path, dist: Path, wheels: Path, platform: Platform, tmp_path: Path
) -> None:
    places = ("--for", platform.name, "--dist", dist, "--wheels", wheels)
    printed = run(bundle, "-o", tmp_path / "kit", *places, "--python", PYTHON, "--json")
    document = json.loads(printed.splitlines()[-1])
    assert document["pythons"] == [PYTHON]
    assert document["platform"] == platform.name
    kit = tmp_path / "kit"
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=kit, check=True)
    listed = {line[66:] for line in (kit / "SHA256SUMS").read_text().splitlines()}
    assert listed == {p.relative_to(kit).as_posix() for p in kit.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    assert not {name for name in listed if "huggingface" in name}
    readme = (kit / "README.md").read_text()
    assert "\n    sh check.sh\n" in readme
    assert max(map(len, readme.splitlines())) < 250
    # The same inputs give the same bytes.
    again = tmp_path / "again"
    run(bundle, "-o", again, *places, "--python", PYTHON)
    assert (again / "SHA256SUMS").read_bytes() == (kit / "SHA256SUMS").read_bytes()


def test_what_is_missing_is_named_with_what_to_type(
    bundle: Path, dist: Path, wheels: Path, platform: Platform, tmp_path: Path, tiny_bundle: Callable[..., Path]
) -> None:
    kit, empty = tmp_path / "kit.tar", tmp_path / "empty"
    empty.mkdir()
    printed = run(bundle, "-o", kit, "--for", "linux-riscv64", status=2)
    assert "'linux-riscv64' is not one of 'linux-x86_64', 'linux-aarch64', 'macos-arm64', 'windows-x86_64'" in printed
    assert "a kit is no .tgz file" in run(bundle, "-o", tmp_path / "kit.tgz", "--for", platform.name, status=2)
    assert "not with --c" in run(bundle, "-o", kit, "--for", platform.name, "--c", "--python", "3.11", status=2)
    places = (bundle, "-o", kit, "--for", platform.name, "--dist")
    wanted = f"make wheels PLATFORMS={platform.name} in a checkout makes it; --dist names another folder"
    assert wanted in run(*places, empty, status=1)
    assert wanted in run(*places, empty, "--c", status=1)
    assert "write for example 3.11,3.13" in run(*places, dist, "--python", "eleven", status=2)
    assert "need Python 3.11 or newer, not 3.10" in run(*places, dist, "--python", "3.10", status=1)
    printed = run(*places, dist, "--wheels", empty, "--python", PYTHON, status=1)
    assert "has no wheel of numpy" in printed
    made(empty, f"edgelm-{__version__}")
    assert "has no compiled operators" in run(*places, empty, "--wheels", wheels, status=1)
    assert not kit.exists()


def test_a_portable_bundle_is_packed_with_the_pure_wheel(
    tiny_bundle: Callable[[str, str, str], Path], wheels: Path, platform: Platform, tmp_path: Path
) -> None:
    made(tmp_path, f"edgelm-{__version__}", "click")
    portable = tiny_bundle("fox", "int4", "portable")
    package(portable, tmp_path / "kit", platform=platform.name, pythons=[PYTHON], dist=tmp_path, wheels=wheels)
    assert (tmp_path / "kit" / "wheels" / f"edgelm-{__version__}-py3-none-any.whl").is_file()


def test_a_damaged_bundle_is_not_packed(
    bundle: Path, dist: Path, wheels: Path, platform: Platform, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    with (damaged / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff" * 64)
    with pytest.raises(EdgeLMError, match=r"is damaged, so nothing was packed: model\.onnx\.data: tensor "):
        package(damaged, tmp_path / "kit.tar", platform=platform.name, pythons=[PYTHON], dist=dist, wheels=wheels)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
