"""Does `pytest --edgelm-bundle` run the checks as tests, and does the plugin do nothing without the option?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edgelm
from edgelm.parity.check import check_parity
from edgelm.parity.pytest_plugin import stands_for

from . import damage

IMPORT_ROOT = Path(edgelm.__file__).parents[1]


def run_pytest(folder, *arguments):
    # In a new process outside the repository: the plugin as on a device, whether or not edgelm is installed.
    # Without autoload and with -p, since an installed edgelm would register the entry point a second time.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(IMPORT_ROOT)}
    command = [sys.executable, "-P", "-m", "pytest", "-p", "edgelm.parity.pytest_plugin", "--rootdir", str(folder)]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_check_of_a_healthy_bundle_is_a_passing_item(exported, tmp_path):
    bundle = exported("olmoe", "int4")
    result = run_pytest(tmp_path, "-v", "--edgelm-threads", "1", "--edgelm-bundle", str(bundle))
    assert result.returncode == 0, result.stdout + result.stderr
    layers = damage.manifest(bundle)["model"]["num_layers"]
    assert f"{7 + 2 * layers} passed" in result.stdout
    assert f"experts[{layers - 1}] PASSED" in result.stdout


def test_a_damaged_bundle_fails_in_the_right_items(copied, tmp_path):
    folder = copied("olmoe", "int4")
    damage.renormalise_routing(folder, layer=2)
    damage.reseal(folder)
    result = run_pytest(tmp_path, "--edgelm-threads", "1", "--edgelm-bundle", str(folder))
    assert result.returncode == 1
    assert "first difference: layer 2, the MoE" in result.stdout
    assert "Traceback" not in result.stdout
    assert "::layer[2]" in result.stdout or "layer[2]" in result.stdout


ONE_CHECK_FAILS = """
import dataclasses
from edgelm.parity import check

judge, healthy = check.check_parity, []

def one_fails(folder, **options):
    healthy or healthy.append(judge(folder, **options))
    checks = [dataclasses.replace(one, passed=one.name != folder.name) for one in healthy[0].checks]
    return dataclasses.replace(healthy[0], checks=checks, passed=False)

check.check_parity = one_fails
"""


def test_any_single_check_that_fails_fails_its_item_and_no_other(exported, tmp_path):
    bundle = exported("olmoe", "int4")
    names = [check.name for check in check_parity(bundle, threads=1, max_kl=1.0).checks]
    # One name of the bundle per check; with each name, the check of that name fails.
    (tmp_path / "conftest.py").write_text(ONE_CHECK_FAILS)
    options = []
    for name in names:
        (tmp_path / name).symlink_to(bundle)
        options += ["--edgelm-bundle", str(tmp_path / name)]
    result = run_pytest(tmp_path, "-q", "--tb=no", "-rf", "--edgelm-threads", "1", "--edgelm-max-kl", "1", *options)
    assert result.returncode == 1
    found = re.findall(r"^FAILED (\S+?)::(\S+)", result.stdout, re.MULTILINE)
    assert len(found) == len(names), result.stdout
    for name, (folder, item) in zip(names, found, strict=True):
        assert folder.endswith(name)
        assert stands_for(item, name)


def test_the_loss_against_the_float_model_is_printed_and_fails_only_on_request(exported, tmp_path):
    bundle = str(exported("fox", "int4"))
    arguments = ("-q", "--edgelm-threads", "1", "--edgelm-bundle", bundle)
    told = run_pytest(tmp_path, *arguments)
    assert told.returncode == 0, told.stdout
    assert f"{bundle}: lost against the float model: mean KL" in told.stdout
    assert run_pytest(tmp_path, *arguments, "-k", "float_kl", "--edgelm-max-kl", "0.5").returncode == 0
    failed = run_pytest(tmp_path, *arguments, "-k", "float_kl", "--edgelm-max-kl", "1e-6")
    assert failed.returncode == 1
    assert "1 failed" in failed.stdout


def test_markers_and_names_select_items(exported, tmp_path):
    (tmp_path / "test_other.py").write_text("def test_other():\n    pass\n")
    bundle = str(exported("fox", "int4"))
    both = run_pytest(tmp_path, "-q", "--collect-only", "--strict-markers", "--edgelm-bundle", bundle)
    assert "test_other" in both.stdout
    alone = run_pytest(tmp_path, "-q", "--collect-only", "-m", "edgelm_bundle", "--edgelm-bundle", bundle)
    assert "test_other" not in alone.stdout
    assert "tokenizer" in alone.stdout
    one = run_pytest(tmp_path, "-q", "-k", "tokenizer", "--edgelm-threads", "1", "--edgelm-bundle", bundle)
    assert "1 passed" in one.stdout


def test_another_folder_is_a_usage_error(tmp_path):
    result = run_pytest(tmp_path, "--edgelm-bundle", str(tmp_path))
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "is not a bundle" in result.stdout + result.stderr


def test_without_the_option_nothing_is_collected_or_imported(tmp_path):
    heavy = "{'numpy', 'onnxruntime', 'torch', 'edgelm.bundle', 'edgelm.parity.check'}"
    (tmp_path / "test_other.py").write_text(
        f"import sys\n\ndef test_other():\n    assert not {heavy} & set(sys.modules)\n"
    )
    result = run_pytest(tmp_path, "-q")
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout
