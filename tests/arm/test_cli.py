"""Do doctor and inspect name Arm CPUs and their kernels, and say what a CPU without dot products lacks?"""

from __future__ import annotations

import json

import pytest
from root import ISAS
from shipped import Shipped

BEST = "the best that this CPU has"
SLOW = "works, but slowly: this CPU lacks asimdhp, asimddp for neon-dot; a bundle with portable operators may be faster"


@pytest.mark.parametrize("isa", ISAS)
def test_inspect_names_the_cpu_and_chooses_its_kernels(shipped: Shipped, tmp_path, isa: str) -> None:
    environment = {**shipped.environment, "EDGELM_ISA": ""}
    command = ["python", "-m", "edgelm", "inspect", "--cpu", "--json"]
    document = json.loads(shipped.root.run(command, isa=isa, env=environment, cwd=tmp_path).stdout)
    assert (document["processor"], document["architecture"]) == (ISAS[isa].name, "aarch64")
    assert (document["chosen"], document["why"]) == (isa, SLOW if isa == "scalar" else BEST)


def test_a_forced_instruction_set_that_the_cpu_lacks_is_an_error(shipped: Shipped, tmp_path) -> None:
    environment = {**shipped.environment, "EDGELM_ISA": "neon-dot"}
    command = ["python", "-m", "edgelm", "inspect", "--cpu"]
    done = shipped.root.run(command, isa="scalar", env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "EDGELM_ISA=neon-dot: this CPU lacks asimdhp, asimddp. Set it to one of scalar" in done.stdout


def test_doctor_says_that_a_cpu_without_dot_products_is_slow(shipped: Shipped, tmp_path) -> None:
    environment = {**shipped.environment, "EDGELM_ISA": ""}
    text = shipped.root.run(["python", "-m", "edgelm", "doctor"], isa="scalar", env=environment, cwd=tmp_path).stdout
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.startswith("  ")}
    assert rows["CPU"] == ISAS["scalar"].name
    assert rows["operators"] == f"compiled, scalar: {SLOW}"
    assert rows["quantize"] == "yes, compiled"
