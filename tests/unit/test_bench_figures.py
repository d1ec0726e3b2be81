"""Does the benchmark against other engines compute ratios, check targets and print results correctly?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_graph import Shape, write_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import figures
import vs_peers
from figures import DECODE, LLAMA, LLAMA_PLAIN, MACHINE, NATIVE, NATIVE_INT8, OPENVINO, PORTABLE, PREFILL, Measurements
from peers import Engine, Worker, Workplace, cache_bytes

from edgelm.benchmark import bytes_per_token
from edgelm.bundle import Bundle

COLUMN = "fox int4"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", Shape(vocab=512, context=128))


def measured(*rows: tuple[str, str, str, list[float]]) -> Measurements:
    """Return measurements from (match, row, engine, values)."""
    found = Measurements()
    for match, row, engine, values in rows:
        found.add(COLUMN, match, row, engine, values)
    return found


def ours(bundle: Bundle, name: str) -> Engine:
    weights = bundle.path / bundle.manifest.graph.weights_file
    options = {"path": str(bundle.path), "kv": None}
    return Engine(name, "edgelm_worker.py", sys.executable, options, weights, bytes_per_token(bundle.manifest, 0))


# -- ratios --------------------------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_ratios_of_repetitions() -> None:
    # The machine slows down by half in the second repetition: the ratio of medians would be 4 / 2.
    found = measured(
        ("llama.cpp", PREFILL, NATIVE, [6.0, 3.0, 4.0]),
        ("llama.cpp", PREFILL, LLAMA, [2.0, 1.0, 4.0]),
    )
    assert figures.ratio(found, COLUMN, PREFILL, NATIVE, [LLAMA]) == 3.0


def test_the_best_peer_is_the_one_with_the_smallest_ratio() -> None:
    found = measured(
        ("llama.cpp", DECODE, NATIVE, [8.0]),
        ("llama.cpp", DECODE, LLAMA, [4.0]),
        ("llama.cpp", DECODE, LLAMA_PLAIN, [5.0]),
        ("openvino", DECODE, NATIVE, [2.0]),
        ("openvino", DECODE, OPENVINO, [0.5]),
        ("portable", DECODE, NATIVE, [2.0]),
        ("portable", DECODE, PORTABLE, [2.0]),
    )
    assert figures.ratio(found, COLUMN, DECODE, NATIVE, figures.PEERS) == 8 / 5
    assert figures.ratio(found, COLUMN, DECODE, NATIVE, [OPENVINO]) == 4
    assert figures.ratio(found, COLUMN, DECODE, NATIVE_INT8, figures.PEERS) is None
    assert figures.ratio(found, "olmoe int4", DECODE, NATIVE, figures.PEERS) is None


def test_measurements_that_were_not_interleaved_are_not_paired() -> None:
    one = measured(("llama.cpp", DECODE, NATIVE, [1.0]), ("llama.cpp", DECODE, LLAMA, [1.0, 2.0]))
    with pytest.raises(ValueError, match="not measured in turns"):
        figures.ratio(one, COLUMN, DECODE, NATIVE, [LLAMA])
    other = measured(("openvino", DECODE, NATIVE, [1.0]), ("llama.cpp", DECODE, LLAMA, [1.0]))
    with pytest.raises(ValueError, match="not measured in turns"):
        figures.paired(*other.all)


def test_rows_of_an_earlier_run_complete_the_table() -> None:
    found = measured(("llama.cpp", DECODE, NATIVE, [3.0]), ("llama.cpp", DECODE, LLAMA, [2.0]))
    earlier = measured(
        ("llama.cpp", DECODE, NATIVE, [9.0, 9.0]),
        ("llama.cpp", DECODE, LLAMA_PLAIN, [1.0, 1.0]),
        ("portable", DECODE, NATIVE, [4.0]),
        ("portable", DECODE, PORTABLE, [2.0]),
    )
    found.extend(figures.Measurement.from_dict(json.loads(json.dumps(item.as_dict()))) for item in earlier.all)
    assert [item.match for item in found.all] == ["llama.cpp", "llama.cpp", "portable", "portable"]
    assert found.all[2:] == earlier.all[2:]


def test_a_measurement_needs_at_least_one_value() -> None:
    assert measured(("alone", DECODE, NATIVE, [])).all == []


def test_the_share_uses_the_bandwidth_of_the_same_repetition() -> None:
    found = measured(
        ("llama.cpp", figures.BYTES, NATIVE, [2e9]),
        ("llama.cpp", DECODE, NATIVE, [10.0, 5.0]),
        ("llama.cpp", figures.ANONYMOUS, MACHINE, [40e9, 20e9]),
        ("portable", DECODE, NATIVE, [9.0]),
        ("portable", figures.ANONYMOUS, MACHINE, [20e9]),
    )
    assert figures.share(found, COLUMN, NATIVE) == 0.5
    assert figures.share(found, COLUMN, NATIVE, figures.MAPPED) is None


# -- targets -------------------------------------------------------------------------------------------------------


def reached(records: list[dict[str, object]], target: str) -> object:
    return next(record["reached"] for record in records if record["target"] == target)


def test_targets_say_reached_and_not_reached() -> None:
    found = measured(
        ("llama.cpp", PREFILL, NATIVE, [230.0]),
        ("llama.cpp", PREFILL, LLAMA, [100.0]),
        ("portable", PREFILL, NATIVE, [200.0]),
        ("portable", PREFILL, PORTABLE, [100.0]),
        ("alone", figures.FIRST, NATIVE, [0.7, 0.9, 3.0]),
        ("alone", figures.MEMORY, NATIVE, [1.09]),
        ("alone", figures.BATCH, NATIVE, [60.0, 30.0]),
        ("alone", figures.BATCH_ONE, NATIVE, [10.0, 5.0]),
    )
    records = figures.target_records(found)
    assert reached(records, "prefill vs llama.cpp, x") is True
    assert reached(records, "prefill vs portable, x") is False
    assert reached(records, "load to first token, s") is True
    assert reached(records, "resident over needed, x") is False
    assert reached(records, "batch 8 decode over batch 1, x") is True
    table = figures.target_table(found)
    assert "| prefill vs llama.cpp, x | 2.30 (>= 2.20) reached |" in table
    assert "| prefill vs portable, x | 2.00 (>= 2.50) not reached |" in table
    assert "| resident over needed, x | 1.09 (<= 1.08) not reached |" in table
    assert "| prefill vs OpenVINO, x | not measured |" in table


def test_a_value_just_below_its_target_is_not_reached() -> None:
    target = next(target for target in figures.TARGETS if target.name == "decode vs the best peer, x")
    assert target.reached("fox int8", 1.0)
    assert not target.reached("fox int8", 0.9999)
    assert target.reached("some other model", 0.1) is None


def test_a_column_without_targets_is_printed_without_bounds() -> None:
    found = Measurements()
    found.add("tiny int4", "portable", PREFILL, NATIVE, [3.0])
    found.add("tiny int4", "portable", PREFILL, PORTABLE, [2.0])
    assert "| prefill vs portable, x | 1.50 |" in figures.target_table(found)


def test_the_row_table_has_medians_spread_and_ratios() -> None:
    found = measured(
        ("llama.cpp", DECODE, NATIVE, [30.0, 20.0, 40.0]),
        ("llama.cpp", DECODE, LLAMA, [20.0, 20.0, 20.0]),
        ("llama.cpp", figures.ANONYMOUS, MACHINE, [38e9]),
    )
    first, second, third = figures.row_table(found, COLUMN).splitlines()
    assert "30.00 tokens/s (20.00 .. 40.00)" in first
    assert "native: 1.50x (1.00 .. 2.00)" in second
    assert "38.00 GB/s" in third


# -- agreement -----------------------------------------------------------------------------------------------------


def test_agreement_is_that_of_the_worst_position_and_detects_a_wrong_scale() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    same = figures.agreement("peer", logits, logits)
    assert (same.error, same.same, same.positions) == (0, 3, 3)
    assert same.kl == pytest.approx(0, abs=1e-12)
    other = logits.copy()
    other[1] = np.random.default_rng(1).standard_normal(1000)
    worst = figures.agreement("peer", logits, other)
    ours, theirs = logits[1].astype(np.float64), other[1].astype(np.float64)
    assert worst.error == pytest.approx(np.sqrt(((theirs - ours) ** 2).mean()) / ours.std(), rel=1e-9)
    assert worst.error > 1.3  # it is sqrt(2) for unrelated logits
    assert worst.correlation == pytest.approx(np.corrcoef(ours, theirs)[0, 1], rel=1e-9)
    assert worst.same >= 2
    assert figures.agreement("peer", logits, 2 * logits).error == pytest.approx(1, rel=0.01)


def test_logits_that_are_not_finite_or_of_another_vocabulary_are_refused() -> None:
    logits = np.zeros((2, 10), np.float32)
    with pytest.raises(ValueError, match="not finite"):
        figures.agreement("peer", logits, np.full_like(logits, np.nan))
    with pytest.raises(ValueError, match=r"\(2, 9\)"):
        figures.agreement("peer", logits, logits[:, :9])


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_options_have_defaults_and_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = ["--work", str(tmp_path)]
    quick = vs_peers.parse([*work, "--quick", "--peer", "none"])
    assert list(quick.checkpoints) == ["olmoe-tiny", "fox-tiny"]
    assert quick.peer == []
    assert quick.sizes.prefill < 512
    (tmp_path / "config.json").write_text("{}")
    full = vs_peers.parse([*work, "--checkpoint", f"fox={tmp_path}", "--repetitions", "2", "--recipe", "int8"])
    assert (full.sizes.prefill, full.sizes.repetitions, full.recipe) == (512, 2, ["int8"])
    assert full.peer == ["llama.cpp", "portable", "openvino"]
    for wrong, message in (
        ([], "give --checkpoint"),
        (["--checkpoint", "fox=nowhere"], "config.json"),
        (["--quick", "--repetitions", "0"], "give 1 or more"),
    ):
        with pytest.raises(SystemExit):
            vs_peers.parse([*work, *wrong])
        assert message in capsys.readouterr().err


def test_earlier_results_are_read_and_the_latest_counts(tmp_path: Path) -> None:
    files = []
    for name, values in (("old", [1.0]), ("new", [2.0])):
        found = measured(("alone", figures.FIRST, NATIVE, values))
        files.append(tmp_path / name)
        files[-1].write_text(json.dumps({"measurements": [item.as_dict() for item in found.all]}))
    options = vs_peers.parse(["--work", str(tmp_path), "--add", str(files[0]), "--add", str(files[1])])
    assert options.checkpoints == {}
    (item,) = vs_peers.together([], options.add).all
    assert item.values == (2.0,)


def test_a_short_context_shortens_the_rows() -> None:
    sizes = vs_peers.Sizes().within(4096)
    assert sizes == vs_peers.Sizes()
    small = vs_peers.Sizes().within(128)
    assert (small.prefill, small.long + small.long_new, small.new) == (128, 128, 64)


def test_an_absent_peer_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, config in (("dense", {}), ("moe", {"num_experts": 8})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    place = Workplace(tmp_path, 1, "/nowhere/python", "/nowhere/python")
    assert place.peers("llama.cpp", "x", tmp_path / "dense", "int4") == []
    assert place.peers("llama.cpp", "x", tmp_path / "dense", "fp8") == []
    assert place.peers("openvino", "x", tmp_path / "dense", "int4") == []
    assert place.peers("openvino", "x", tmp_path / "moe", "int4") == []
    assert place.peers("openvino", "x", tmp_path / "moe", "int4") == []
    assert len(place.notes) == 4
    assert capsys.readouterr().out.splitlines() == place.notes
    assert "/nowhere/python lacks llama-cpp-python" in place.notes[0]


def test_bundles_are_measured_in_turns_and_in_new_processes(bundle: Bundle, tmp_path: Path) -> None:
    sizes = vs_peers.Sizes(prefill=32, new=4, long=60, long_new=2, repetitions=2, long_repetitions=1)
    engines = [ours(bundle, NATIVE), ours(bundle, PORTABLE)]
    run = vs_peers.Run("tiny int4", engines[:1], sizes, ["prefill", "decode", "long", "first"], threads=1)
    run.match("portable", engines, ["prefill", "decode", "long"], tmp_path / "log")
    run.first(engines[0], tmp_path / "log", 1)
    assert [item.error for item in run.agreements] == [0]
    for row, count in ((PREFILL, 2), (DECODE, 2), (figures.LONG_PREFILL, 1), (figures.LONG_DECODE, 1)):
        for engine in (NATIVE, PORTABLE):
            (found,) = run.found.select("tiny int4", row, [engine], match="portable")
            assert len(found.values) == count
            assert found.median > 0
    (bandwidth,) = run.found.select("tiny int4", figures.MAPPED)
    assert len(bandwidth.values) == 2
    imported, loaded = (run.found.select("tiny int4", row)[0].median for row in (figures.FIRST_IMPORTED, figures.FIRST))
    assert run.found.select("tiny int4", figures.FIRST_SPAWNED)[0].median > imported > loaded > 0
    resident, cache = (run.found.select("tiny int4", row)[0].median for row in (figures.RESIDENT, figures.CACHE))
    assert resident > 20e6
    assert cache == cache_bytes(bundle.manifest, 20, "float16") == 2 * 2 * 2 * 16 * 2 * 20
    document = json.loads(vs_peers.report([run], run.found, [], vs_peers.parse(["--work", str(tmp_path), "--quick"])))
    assert document["agreement"][0]["engine"] == PORTABLE
    assert {item["row"] for item in document["measurements"]} >= {PREFILL, DECODE, figures.FIRST, figures.MEMORY}


def test_an_engine_with_different_logits_stops_the_run(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("other")
    other = write_tiny_model(folder / "bundle", Shape(vocab=512, context=128), seed=7)
    run = vs_peers.Run("tiny int4", [ours(bundle, NATIVE)], vs_peers.QUICK, ["decode"], threads=1)
    with pytest.raises(SystemExit, match="portable does not compute the same model"):
        run.match("portable", [ours(bundle, NATIVE), ours(other, PORTABLE)], ["decode"], folder / "log")
    assert run.found.select("tiny int4", DECODE) == []


def test_a_worker_that_fails_names_its_log(bundle: Bundle, tmp_path: Path) -> None:
    engine = ours(bundle, NATIVE)
    with (
        pytest.raises(SystemExit, match=r"ended with code 1 in load: see the end of .*log"),
        Worker(engine.script, engine.python, tmp_path / "log") as worker,
    ):
        worker("load", path=str(tmp_path / "none"), threads=1, context=64, kv=None)
    assert "does not exist" in (tmp_path / "log").read_text()
