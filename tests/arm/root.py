"""A 64-bit Arm machine in emulation: Debian's Python, and the run-time packages as aarch64 wheels, under qemu-user.

    root = arm_root()                                                   # made once, in build/arm-root
    root.run(["python", "-m", "edgelm", "parity", "bundle"], isa="neon-dot")

Packages come by this system's own apt, which is told to work in a folder, so that the system is left as it is. Nothing
is registered with the kernel: `python` in there is a shell script that starts qemu, also for its own child processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgelm.errors import EdgeLMError
from edgelm.system.platforms import named

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "build" / "arm-root"
EMULATOR = "qemu-aarch64"
# Python with venv and pip, and what wheels link: apt adds what these need.
PACKAGES = ("python3", "python3-venv", "libstdc++6", "libgomp1")
PLATFORM = named("linux-aarch64")

SHIM = """#!/bin/sh
exec {qemu} -cpu "${{QEMU_CPU:-{cpu}}}" -L "${{QEMU_LD_PREFIX:-{prefix}}}" -0 "$0" {python} "$@"
"""


class ArmRootUnavailable(EdgeLMError):  # noqa: N818 - a reason to skip
    """This machine cannot make or run the emulated machine; the message says what is missing."""


@dataclass(frozen=True)
class Isa:
    """An emulated CPU: qemu's name of it, EdgeLM's, and what its /proc/cpuinfo shows."""

    cpu: str
    name: str
    features: str
    implementer: str
    part: str


_V8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_V82 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
ISAS = {
    # All that qemu has, without what no board has: the vectors and matrices of variable length (SVE, SME).
    "neon-i8mm": Isa(
        "max,sve=off,sme=off,pauth-impdef=on", "CPU implementer 0x00 part 0x051", f"{_V82} i8mm bf16", "0x00", "0x051"
    ),
    "neon-dot": Isa("cortex-a76", "Arm Cortex-A76", _V82, "0x41", "0xd0b"),  # as on a Raspberry Pi 5
    "scalar": Isa("cortex-a72", "Arm Cortex-A72", _V8, "0x41", "0xd08"),  # as on a Raspberry Pi 4
}
"""Emulated CPUs by the kernels that they run."""


@dataclass(frozen=True)
class ArmRoot:
    """The emulated machine.

    Attributes:
        folder: what was made: `root/`, Debian's files; `env/`, Python with the packages that run bundles; `isa/`, for
            each CPU a view of `root/` with its /proc/cpuinfo.
    """

    folder: Path

    def run(
        self,
        command: list[str],
        *,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        isa: str | None = None,
        network: bool = False,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the emulated machine, with text for output.

        `python` has numpy, ONNX Runtime and the other packages that run bundles; `python3` is Debian's alone. Programs
        for Arm are emulated where they are the command itself. Other commands, such as sh, are this machine's.

        Args:
            command: the program and its arguments.
            env: environment variables besides PATH, HOME and LANG; others of this process are not passed on.
            cwd: the folder to run in.
            isa: a name of `ISAS`: the CPU, and EDGELM_ISA. The default is neon-i8mm, without EDGELM_ISA.
            network: leave the network on. It is off only where `can_unshare()`.
            check: raise an error with the output if the command fails.

        Raises:
            AssertionError: the command failed, and `check` is set.
        """
        view = self.folder / "isa" / (isa or "neon-i8mm")
        path = os.pathsep.join((str(self.folder / "env" / "bin"), str(self.folder / "root" / "usr" / "bin")))
        variables = {
            "PATH": f"{path}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "QEMU_CPU": ISAS[isa or "neon-i8mm"].cpu,
            "QEMU_LD_PREFIX": str(view),
            **({"EDGELM_ISA": isa} if isa else {}),
            **(env or {}),
        }
        program = Path(shutil.which(command[0], path=variables["PATH"]) or command[0])
        full = [str(program), *command[1:]]
        if _is_arm(program):
            full = [_emulator(), *full]
        if not network and can_unshare():
            full = [*_UNSHARE, *full]
        done = subprocess.run(full, env=variables, cwd=cwd, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{command}: code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def shim(self, program: Path) -> None:
        """Replace an Arm program by a script that starts it in emulation, so that scripts can call it."""
        real = program.with_name(program.name + ".arm64")
        program.rename(real)
        _write_script(program, real, self.folder)


_UNSHARE = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")


@cache
def can_unshare() -> bool:
    """Return whether a process may be started without network here; containers often forbid it."""
    try:
        return subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@cache
def arm_root() -> ArmRoot:
    """Return the emulated machine. It is made when it is missing, or was made with other packages or pins.

    Raises:
        ArmRootUnavailable: a program is missing, or packages cannot be fetched.
    """
    problem = missing()
    if problem:
        raise ArmRootUnavailable(problem)
    FOLDER.parent.mkdir(exist_ok=True)
    with (FOLDER.parent / "arm-root.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_current(FOLDER):
            _make()
    return ArmRoot(FOLDER)


def missing() -> str | None:
    """Return what is missing for the emulated machine here; None if nothing is."""
    if sys.platform != "linux":
        return f"64-bit Arm is emulated by qemu-user on Linux, and this is {platform.system()}"
    packages = {EMULATOR: "qemu-user", "apt-get": "apt", "dpkg-deb": "dpkg"}
    lacking = [package for program, package in packages.items() if not shutil.which(program)]
    return f"64-bit Arm cannot be emulated here: apt-get install {' '.join(lacking)}" if lacking else None


def pins() -> list[str]:
    """Return the pinned packages that run bundles: those of constraints.txt under "# run"."""
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    section = text.split("\n# run\n", 1)[1].split("\n\n", 1)[0]
    return section.split()


def _key() -> str:
    recipe = (Path(__file__).read_text(encoding="utf-8"), str(FOLDER), _emulator(), pins(), PLATFORM.pip_tags)
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def _is_current(folder: Path) -> bool:
    key = folder / "key"
    return key.is_file() and key.read_text(encoding="utf-8") == _key()


def _make() -> None:
    """Make the machine in a folder of its own, then move it to its place."""
    work = FOLDER.with_name("arm-root.new")
    for folder in (work, FOLDER):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir()
    _debian(work)
    version = next((work / "root" / "usr" / "bin").glob("python3.*")).name
    _python(work, version)
    _environment(work, version)
    for name, isa in ISAS.items():
        _view(work, name, isa)
    (work / "key").write_text(_key(), encoding="utf-8")
    work.rename(FOLDER)


def _debian(work: Path) -> None:
    """Unpack the packages and what they need, in the versions that apt serves, to `root`."""
    apt = work / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (apt / folder).mkdir(parents=True)
    options = (
        "APT::Architecture=arm64", "APT::Architectures=arm64", "APT::Sandbox::User=root", "Debug::NoLocking=1",
        f"Dir::State::Lists={apt}/lists", "Dir::State::status=/dev/null",
        f"Dir::Cache={apt}", f"Dir::Cache::archives={apt}/archives",
        "Acquire::Languages=none", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
    )  # fmt: skip
    get = ["apt-get", "-q", "-y", *(f"-o{option}" for option in options)]
    # One of several sources may fail, or have nothing for Arm: what counts is whether the packages are there.
    subprocess.run([*get, "update"], capture_output=True, check=False)
    _checked([*get, "install", "--no-install-recommends", "--download-only", *PACKAGES], "packages for arm64")
    root = work / "root"
    for name in ("bin", "lib", "sbin"):
        (root / "usr" / name).mkdir(parents=True)
    for package in sorted((apt / "archives").glob("*.deb")):
        _checked(["dpkg-deb", "--extract", str(package), str(root)], package.name)
    shutil.rmtree(apt)


def _python(work: Path, version: str) -> None:
    """Put a script in Python's place that starts it in emulation, and remove the programs that cannot be started."""
    programs = work / "root" / "usr" / "bin"
    (work / "root" / "usr" / "libexec").mkdir(exist_ok=True)
    (programs / version).rename(work / "root" / "usr" / "libexec" / version)
    shutil.rmtree(programs)
    programs.mkdir()
    _write_script(programs / version, FOLDER / "root" / "usr" / "libexec" / version, FOLDER)
    (programs / "python3").symlink_to(version)


def _write_script(script: Path, program: Path, folder: Path) -> None:
    prefix = folder / "isa" / "neon-i8mm"
    text = SHIM.format(qemu=_emulator(), cpu=ISAS["neon-i8mm"].cpu, prefix=prefix, python=program)
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)


def _environment(work: Path, version: str) -> None:
    """Make a virtual environment with the pinned packages; pip chooses the wheels for Arm, none is built."""
    env, wheels = work / "env", work / "wheels"
    site = env / "lib" / version / "site-packages"
    site.mkdir(parents=True)
    (env / "bin").mkdir()
    (env / "bin" / "python").symlink_to(FOLDER / "root" / "usr" / "bin" / version)
    (env / "pyvenv.cfg").write_text(f"home = {FOLDER}/root/usr/bin\ninclude-system-site-packages = false\n")
    tags = [part for tag in PLATFORM.pip_tags for part in ("--platform", tag)]
    _checked(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
            "--dest", str(wheels), "--implementation", "cp", "--python-version", version.removeprefix("python"),
            *tags, *pins(),
        ],
        "wheels for aarch64",
    )  # fmt: skip
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    shutil.rmtree(wheels)


def _view(work: Path, name: str, isa: Isa) -> None:
    """Make `isa/NAME`. Files of it win over this machine's; ONNX Runtime reads those of /proc and /sys below."""
    view = work / "isa" / name
    view.mkdir(parents=True)
    for entry in (work / "root").iterdir():
        if entry.name not in ("proc", "sys"):
            (view / entry.name).symlink_to(Path("../../root") / entry.name)
    (view / "proc").mkdir()
    core = (
        f"BogoMIPS\t: 100.00\nFeatures\t: {isa.features}\nCPU implementer\t: {isa.implementer}\n"
        f"CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {isa.part}\nCPU revision\t: 0\n\n"
    )
    count = os.cpu_count() or 1
    text = "".join(f"processor\t: {index}\n{core}" for index in range(count))
    (view / "proc" / "cpuinfo").write_text(text, encoding="utf-8")
    cpus = view / "sys" / "devices" / "system" / "cpu"
    for index in range(count):
        (cpus / f"cpu{index}").mkdir(parents=True)
    for file in ("possible", "present", "online"):
        (cpus / file).write_text(f"0-{count - 1}\n" if count > 1 else "0\n", encoding="utf-8")


def _checked(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = re.findall(r"^(?:E:|ERROR:).*$", done.stderr, re.MULTILINE) or done.stderr.splitlines()[-3:]
        raise ArmRootUnavailable(f"{what} cannot be had: {command[0]}: {' '.join(lines)}")


def _emulator() -> str:
    return str(shutil.which(EMULATOR) or EMULATOR)


def _is_arm(program: Path) -> bool:
    """Return whether this is a program for 64-bit Arm: an ELF file of machine 183."""
    if not program.is_file():
        return False
    with program.open("rb") as stream:
        head = stream.read(20)
    return head[:4] == b"\x7fELF" and head[18:20] == (183).to_bytes(2, "little")


def main() -> None:
    """Make the machine, and print the command that starts a program of it: for scripts."""
    try:
        root = arm_root()
    except ArmRootUnavailable as error:
        sys.exit(f"test-arm: {error}")
    print(_emulator(), "-cpu", ISAS["neon-i8mm"].cpu, "-L", root.folder / "isa" / "neon-i8mm")


if __name__ == "__main__":
    main()
