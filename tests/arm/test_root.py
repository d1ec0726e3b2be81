"""Is the emulated machine what tests take it for: 64-bit Arm, with Python, without network?"""

from __future__ import annotations

import json
import socket

import pytest
from root import ISAS, ArmRoot, can_unshare

# What a process sees, and what a process sees that it starts, as chat templates are rendered in one.
LOOK = """
import ctypes, json, os, platform, re, subprocess, sys

if len(sys.argv) == 1:
    child = subprocess.run([sys.executable, "-I", "-S", __file__, "child"], stdout=subprocess.PIPE, env={}, check=True)
    capabilities = ctypes.CDLL(None).getauxval
    capabilities.restype, capabilities.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    with open("/proc/cpuinfo") as stream:
        features = re.search("^Features.*: (.*)$", stream.read(), re.MULTILINE)[1].split()
    print(json.dumps({
        "machine": platform.machine(),
        "child": child.stdout.decode().strip(),
        "asimddp": [bool(capabilities(16) >> 20 & 1), "asimddp" in features],
        "i8mm": [bool(capabilities(26) >> 13 & 1), "i8mm" in features],
    }))
else:
    print(platform.machine())
"""


@pytest.mark.parametrize("isa", ISAS)
def test_cpu_and_cpuinfo_have_the_instruction_sets(arm: ArmRoot, tmp_path, isa: str) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    seen = json.loads(arm.run(["python3", "look.py"], cwd=tmp_path, isa=isa).stdout)
    assert seen == {
        "machine": "aarch64",
        "child": "aarch64",
        "asimddp": [isa != "scalar"] * 2,
        "i8mm": [isa == "neon-i8mm"] * 2,
    }


def test_the_network_is_off_unless_it_is_asked_for(arm: ArmRoot) -> None:
    if not can_unshare():
        pytest.skip("this system forbids `unshare --net`, so that the emulated machine keeps the network")
    connect = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), 20)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = ["python3", "-c", connect, str(server.getsockname()[1])]
        assert "Network is unreachable" in arm.run(command, check=False).stderr
        arm.run(command, network=True)


def test_debians_python_has_no_package(arm: ArmRoot) -> None:
    assert "No module named 'numpy'" in arm.run(["python3", "-c", "import numpy"], check=False).stderr
