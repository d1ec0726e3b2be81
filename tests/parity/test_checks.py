"""Does every check pass just inside its limit, and fail alone just outside?

The tests use synthetic packs and devices (synthetic.py, device_faults.py). A new check needs a fault, or a test fails.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import edgelm.parity
from edgelm.parity.check import first_divergence, judge
from edgelm.parity.limits import LIMITS
from edgelm.parity.pytest_plugin import item_names, stands_for

from . import test_checks_others as others
from .device_faults import INSIDE, JUDGED, OUTSIDE, experts, failures, judged, steps
from .synthetic import ALL, COUNT, EXPERTS, LAYERS, blur, disturb, make_scene

MODELS = ("moe", "dense")


def checks_in_the_code() -> set[str]:
    """Return the names of all checks in the source of edgelm/parity; `layer[i]` becomes `layer`."""
    found = set()
    for file in Path(edgelm.parity.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ("Check", "at_most", "at_least"):
                found.add(_name(node.args[0], f"{file.name}:{node.lineno}"))
    return found - {None}


def _name(argument: ast.expr, where: str) -> str | None:
    if isinstance(argument, ast.JoinedStr):
        argument = argument.values[0]
        assert isinstance(argument, ast.Constant), where
        return argument.value.rstrip("[")
    if isinstance(argument, ast.Name) and argument.id == "name":
        return None  # at_most and at_least themselves
    assert isinstance(argument, ast.Constant), f"{where}: the name of a check is not a constant"
    return argument.value


# Checks that a run does not make, and the tests of them.
OTHERS = {
    "integrity": others.test_integrity_fails_with_the_first_problem,
    "tokenizer": others.test_a_tokenizer_that_does_not_load_is_a_failed_check,
    "tokenizer.encode": others.test_a_wrong_tokenizer_fails_the_right_check,
    "tokenizer.decode": others.test_a_wrong_tokenizer_fails_the_right_check,
    "tokenizer.vocabulary": others.test_a_wrong_tokenizer_fails_the_right_check,
    "pack": others.test_a_stored_pack_may_differ_by_rounding_only,
    "float_kl": others.test_the_loss_against_the_float_model_is_a_check_only_on_request,
    "perplexity": others.test_without_data_no_check_passes_or_fails,
    "greedy": others.test_without_data_no_check_passes_or_fails,
}
# Name, fault, kind of recipe, dense. The limits of "none" are the tightest: float32 itself comes near them.
PAIRS = [
    pytest.param(name, fault, kind, dense, id=f"{fault.__name__}-{kind}-{'dense' if dense else 'moe'}")
    for name, (faults, _) in JUDGED.items()
    for fault in faults
    for kind, dense in (("int4", False), ("int4", True), ("none", False))
    if not (dense and fault is experts)
]


def test_every_check_has_a_fault():
    assert checks_in_the_code() == {*JUDGED, *OTHERS}


def test_every_check_is_an_item_of_the_pytest_plugin():
    items = item_names(SimpleNamespace(num_layers=2, num_experts=EXPERTS), max_kl=0.1)
    # The check of the stored pack needs a checkpoint, which the plugin does not have.
    for name in checks_in_the_code() - {"pack"}:
        name = f"{name}[1]" if name in ("layer", "experts") else name
        assert sum(stands_for(item, name) for item in items) == 1, name


@pytest.mark.parametrize("kind", ["none", "int4"])
@pytest.mark.parametrize("model", MODELS)
def test_a_device_that_computes_the_target_passes_every_check(kind, model):
    scene = make_scene(LIMITS[kind], model == "dense")
    found, diagnosis = judge(scene.pack, scene.device.run(scene.pack), scene.limits)
    assert all(item.passed for item in found), [item for item in found if not item.passed]
    expected = {*JUDGED, *(f"layer[{i}]" for i in range(LAYERS))} - {"layer", "experts"}
    if model == "moe":
        expected |= {f"experts[{i}]" for i in range(LAYERS)}
    assert {item.name for item in found} == expected
    assert first_divergence(diagnosis, found) == (None, None)


@pytest.mark.parametrize(("name", "fault", "kind", "dense"), PAIRS)
def test_a_check_passes_just_inside_its_limit_and_fails_alone_just_outside(name, fault, kind, dense):
    for size, expected in ((INSIDE, set()), (OUTSIDE, JUDGED[name][1])):
        scene = make_scene(LIMITS[kind], dense)
        fault(scene, size)
        assert failures(scene) == expected, size


@pytest.mark.parametrize("model", MODELS)
def test_nan_results_fail_every_numeric_check(model):
    scene = make_scene(LIMITS["int4"], model == "dense")
    for array in (scene.device.at_once, scene.device.decoded, scene.device.debug, scene.device.sketches):
        array[:] = np.nan
    # The check of experts uses their indices, which are integers.
    layers = {f"layer[{i}]" for i in range(LAYERS)}
    assert failures(scene) == set(JUDGED) - {"layer", "experts"} | layers


def test_nan_at_one_position_fails_the_checks_of_all_positions():
    scene = make_scene(LIMITS["int4"], dense=True)
    scene.device.at_once[33] = np.nan
    scene.device.decoded[steps(scene)[3]] = np.nan
    assert {"logits.kl_mean", "logits.kl_p99", "logits.kl_max", "greedy.kl", "perplexity.device"} <= failures(scene)
    assert "1 positions have logits that are NaN" in judged(scene, "logits.kl_max").detail


def test_a_share_of_positions_may_be_wrong_if_the_limits_allow_it():
    for count, expected in ((3, set()), (4, {"layer[1]"})):
        scene = make_scene(replace(LIMITS["int4"], bad_positions=3.5 / COUNT), dense=False)
        disturb(scene, 2, ALL[50 : 50 + count], np.full(count, 0.1))
        assert failures(scene) == expected
    scene.limits = replace(scene.limits, bad_positions=0.9 / COUNT)
    scene.device.sketches[:] = scene.pack.target.sketches
    experts(scene, OUTSIDE)
    assert failures(scene) == {"experts[1]", "layer[1]"}


def test_an_error_of_the_last_layer_is_not_blamed_on_the_head():
    """The limit of the head is its own plus `layer_gain` times the median error of the last layer."""
    for size, expected in ((INSIDE, set()), (OUTSIDE, {"head"})):
        scene = make_scene(LIMITS["int4"], dense=True)
        limits, want = scene.limits, scene.pack.target
        disturb(scene, 0, ALL, 0.9 * limits.embedding_error * want.norms[0])
        brought = float(np.median(0.9 * limits.embedding_error * want.norms[0] / want.norms[-1]))
        blur(scene, "debug", ALL, size * (limits.head_error + limits.layer_gain * brought))
        assert failures(scene) == expected


def test_an_incoming_error_raises_the_limit_of_a_layer():
    """The limit grows by `layer_gain` times the incoming error; without that, the error would be 8 times the limit."""
    for size, expected in ((INSIDE, set()), (OUTSIDE, {"layer[1]"})):
        scene = make_scene(LIMITS["int4"], dense=True)
        limits, want = scene.limits, scene.pack.target
        row, came = ALL[COUNT // 2 : COUNT // 2 + 1], 0.9 * limits.embedding_error
        disturb(scene, 0, row, came * want.norms[0, row])
        update = np.linalg.norm((want.sketches[2] - want.sketches[1])[row], axis=1) / 8
        allowed = limits.layer_base + limits.layer_gain * came * want.norms[0, row] / want.norms[1, row]
        disturb(scene, 2, row, size * allowed * update)
        assert failures(scene) == expected
