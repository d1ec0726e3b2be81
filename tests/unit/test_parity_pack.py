"""Is a parity pack read back as it was written, and are damaged ones refused with the reason?"""

from __future__ import annotations

import dataclasses
import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edgelm.errors import ParityError
from edgelm.parity.limits import LIMITS, LOSS_WARNINGS, Limits, kind_of, loosened
from edgelm.parity.pack import GoldenPrompt, ParityPack, ReferenceRecord, RoundedRecord, TokenizerPrint
from edgelm.parity.prompts import BUILT_IN, load_prompts


def make_record(rng, layers=2, count=9, top=4, probes=3, experts=8, k=2):
    def floats(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def integers(*shape):
        return rng.integers(0, max(experts, 1), shape).astype(np.int32)

    return ReferenceRecord(
        top_logits=floats(count, top),
        logsumexp=floats(count),
        probe_logits=floats(count, probes),
        next_logit=floats(count),
        best=integers(count),
        gap=floats(count),
        norms=floats(layers + 1, count),
        sketches=floats(layers + 1, count, 64),
        router=floats(layers, count, experts) if experts else None,
        experts=integers(layers, count, k) if experts else None,
    )


def make_pack(quantized=True, **options):
    rng = np.random.default_rng(0)
    return ParityPack(
        prompts=(GoldenPrompt("a", "Ä text", "Ä text", 0, 4, (5, 6, 7)), GoldenPrompt("b", "more", " more", 6, 3, ())),
        ids=np.arange(9, dtype=np.int32),
        top_ids=rng.integers(0, 50, (9, 4)).astype(np.int32),
        probe_ids=np.array([1, 20, 40], np.int32),
        reference=make_record(rng, **options),
        quantized=make_record(rng, **options) if quantized else None,
        tokenizer=TokenizerPrint(50, "ab" * 32),
        made_with={"edgelm": "0.1.0"},
    )


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("experts", [8, 0])
def test_a_pack_reads_back_equal(tmp_path, quantized, experts):
    pack = make_pack(quantized, experts=experts)
    pack.save(tmp_path)
    again = ParityPack.load(tmp_path)
    assert again.prompts == pack.prompts
    assert again.tokenizer == pack.tokenizer
    assert again.made_with == pack.made_with
    assert (again.quantized is None) == (not quantized)
    for item in dataclasses.fields(ReferenceRecord):
        a, b = getattr(again.target, item.name), getattr(pack.target, item.name)
        assert (a is None and b is None) or (np.array_equal(a, b) and a.dtype == b.dtype)


def test_a_rounded_record_reads_back_equal_and_is_optional(tmp_path):
    pack = make_pack()
    target = pack.target
    record = RoundedRecord(
        rows=np.arange(6, dtype=np.int32),
        top_logits=target.top_logits[:6] + 1,
        logsumexp=target.logsumexp[:6] + 1,
        probe_logits=target.probe_logits[:6] + 1,
        next_logit=target.next_logit[:6] + 1,
        best=target.best[:6],
        flipped=(np.arange(6) == 2).astype(np.int32),
        kv="int8",
    )
    dataclasses.replace(pack, rounded=record).save(tmp_path)
    again = ParityPack.load(tmp_path).rounded
    assert again.kv == "int8"
    for item in dataclasses.fields(RoundedRecord):
        assert np.array_equal(getattr(again, item.name), getattr(record, item.name)), item.name
    make_pack().save(tmp_path)
    assert ParityPack.load(tmp_path).rounded is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.arange(4, 10, dtype=np.int32)}, "not positions of the pack"),
        ({"best": np.zeros(5, np.int32)}, r"rounded\.best has shape"),
        ({"logsumexp": np.full(6, np.nan, np.float32)}, r"rounded\.logsumexp has values that are not finite"),
        ({"kv": "int2"}, r"rounded\.kv.*int2"),
    ],
)
def test_a_rounded_record_that_does_not_fit_is_refused(tmp_path, change, message):
    pack = make_pack()
    values = {item.name: getattr(pack.target, item.name)[:6] for item in dataclasses.fields(RoundedRecord)[1:6]}
    record = RoundedRecord(np.arange(6, dtype=np.int32), **values, flipped=np.zeros(6, np.int32), kv="float16")
    dataclasses.replace(pack, rounded=dataclasses.replace(record, **change)).save(tmp_path)
    with pytest.raises(ParityError, match=message):
        ParityPack.load(tmp_path)


def test_equal_packs_give_equal_bytes(tmp_path):
    for name in ("one", "two"):
        make_pack().save(tmp_path / name)
    assert (tmp_path / "one/pack.npz").read_bytes() == (tmp_path / "two/pack.npz").read_bytes()


def test_positions_of_prompts_and_continuations():
    pack = make_pack()
    first, second = pack.prompts
    assert (first.fed, second.fed) == (6, 3)
    assert first.greedy_positions == slice(3, 6)
    assert second.greedy_positions == slice(8, 8)
    assert pack.has_next.tolist() == [True] * 3 + [False] * 3 + [True] * 2 + [False]
    assert pack.next_ids.tolist() == [1, 2, 3, 4, 5, 0, 7, 8, 0]


def test_a_missing_pack_is_a_clear_error(tmp_path):
    with pytest.raises(ParityError, match=r"pack\.json is missing"):
        ParityPack.load(tmp_path)


def test_a_truncated_archive_is_refused(tmp_path):
    make_pack().save(tmp_path)
    file = tmp_path / "pack.npz"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ParityError, match=r"pack\.npz: cannot be read"):
        ParityPack.load(tmp_path)


def test_a_flipped_byte_in_the_archive_is_refused(tmp_path):
    make_pack().save(tmp_path)
    file = tmp_path / "pack.npz"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(bytes(data))
    with pytest.raises(ParityError, match=r"pack\.npz"):
        ParityPack.load(tmp_path)


def change_index(folder, change):
    file = folder / "pack.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format_version=99), "format_version is 99, this EdgeLM reads 1: upgrade"),
        (lambda index: index["prompts"].pop(), "do not add up"),
        (lambda index: index["prompts"][1].update(start=5), "misplaced"),
        (lambda index: index["prompts"][0].pop("text"), "text"),
        (lambda index: index["arrays"]["ids"].update(shape=[8]), "'ids'"),
        (lambda index: index["arrays"].pop("reference.norms"), "reference.norms"),
        (lambda index: index["arrays"].pop("ids"), "arrays.ids is missing"),
        (lambda index: index["arrays"].update(more={"shape": [1], "dtype": "int32"}), "has no array"),
        (
            lambda index: index["arrays"]["ids"].update(shape=[10**12]),
            r"arrays.ids.shape\[0\] is 1000000000000, expected",
        ),
        (lambda index: index["arrays"]["ids"].update(shape=[2**31] * 4), "too many for its size"),
        (lambda index: index["arrays"]["ids"].update(dtype="object"), "array 'ids' of|array 'ids' is not what"),
        (
            lambda index: index["prompts"][0].update(length=True),
            r"prompts\[0\].length is true, expected a whole number",
        ),
        (lambda index: index["prompts"][0].update(greedy=[2**40]), r"prompts\[0\].greedy\[0\] is 1099511627776"),
        (lambda index: index["sketch"].update(width=65), "sketch.width is 65, expected a whole number from 64 to 64"),
        (lambda index: index.update(format_version="1"), r'format_version is "1" \(a string\), this EdgeLM reads 1'),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, change, message):
    make_pack().save(tmp_path)
    change_index(tmp_path, change)
    with pytest.raises(ParityError, match=message):
        ParityPack.load(tmp_path)


def test_arrays_of_different_lengths_are_refused(tmp_path):
    pack = make_pack()
    broken = dataclasses.replace(pack, quantized=dataclasses.replace(pack.target, gap=pack.target.gap[:-1]))
    broken.save(tmp_path)
    with pytest.raises(ParityError, match=r"quantized\.gap"):
        ParityPack.load(tmp_path)


def test_the_built_in_prompts_are_of_several_kinds_and_not_long():
    names = [prompt.name for prompt in BUILT_IN]
    assert len(set(names)) == len(names) >= 6
    assert sum(len(prompt.text) for prompt in BUILT_IN) < 1500
    assert any(not prompt.text.isascii() for prompt in BUILT_IN)


def test_prompts_from_a_file_one_per_line_or_as_json(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("first\n\nzweite Zeile\n", encoding="utf-8")
    assert [prompt.text for prompt in load_prompts(lines)] == ["first", "zweite Zeile"]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(["two\nlines", "x"]))
    assert [prompt.text for prompt in load_prompts(listed)] == ["two\nlines", "x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("\n \n", "no prompt"), ("[1, 2]", "list of strings"), ("[", "not valid JSON"), ("caf\xe9", "cannot be read")],
)
def test_useless_prompt_files_are_refused(tmp_path, content, message):
    file = tmp_path / "prompts"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ParityError, match=message):
        load_prompts(file)


@pytest.mark.parametrize(
    ("toml", "kind"),
    [
        ('name = "int4"\ndefault = "float"\n', "none"),
        ('default = "int8-g128-sym"\n', "int8"),
        ('default = "int8-g128-sym"\n\n[[rule]]\nmatch = "x"\nscheme = "int4-g32-sym"\n', "int4"),
        ('default = "int8-g128-sym"\n\n[[rule]]\nmatch = "x"\nscheme = "fp8-row"\n', "fp8"),
        ('default = "int4-g32-sym"\n\n[[rule]]\nmatch = "x"\nscheme = "fp8-b128"\n', "int4"),
        ('default = "int4-g32-sym"\n\n[[rule]]\nmatch = "x"\nscheme = "int3-g32-sym"\n', "int3"),
        ('default = "int5-g32-sym"\n\n[[rule]]\nmatch = "x"\nscheme = "int6-g32-sym"\n', "int5"),
        ('default = "fp8-row"\n\n[[rule]]\nmatch = "x"\nscheme = "int6-g32-sym"\n', "fp8"),
    ],
)
def test_the_limits_are_those_of_the_coarsest_type(toml, kind):
    assert kind_of(toml) == kind
    assert kind in LIMITS
    assert kind in LOSS_WARNINGS


NO_LIMITS = Limits(**{item.name: 0.0 for item in dataclasses.fields(Limits)} | {"top1_clear": 1.0})


def limit_rows(*columns):
    """A row for each limit that some column has; limits that need none are 0."""
    for item in dataclasses.fields(Limits):
        values = [getattr(column, item.name) for column in columns]
        yield [f"`{item.name}`", *(f"{value:g}" for value in values)]


TABLES = {
    "limits": list(limit_rows(LIMITS["none"], LIMITS["int8"])),
    "values": [
        row
        for row in limit_rows(*(loosened(NO_LIMITS, kind, kind) for kind in ("float16", "bfloat16")))
        if row[1] != "0"
    ],
    "loss": [[kind, f"{warning.kl:g}", f"{warning.perplexity:g}"] for kind, warning in LOSS_WARNINGS.items()],
}
"""The first three cells of every row that a table of the page has."""


@pytest.mark.parametrize("name", TABLES)
def test_the_documentation_shows_the_current_limits(name):
    page = Path(__file__).parents[2] / "docs" / "reference" / ("parity.md" if name == "loss" else "parity-limits.md")
    shown = page.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]
    assert [line.strip("| ").split(" | ")[:3] for line in shown.splitlines()[2:]] == TABLES[name]


def test_every_quantised_recipe_has_the_same_limits_as_the_documentation_says():
    assert {LIMITS[kind] for kind in LIMITS if kind != "none"} == {LIMITS["int8"]}


def test_a_type_without_limits_is_refused():
    with pytest.raises(ParityError, match="int2"):
        kind_of('default = "int2-g32-sym"')


def rewrite(folder, **changed):
    """Replace arrays in the archive, and update the index."""
    with np.load(folder / "pack.npz") as archive:
        arrays = dict(archive) | changed
    np.savez_compressed(folder / "pack.npz", **arrays)
    arrays = {name: {"shape": list(array.shape), "dtype": array.dtype.name} for name, array in arrays.items()}
    change_index(folder, lambda index: index.update(arrays=arrays))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {"ids": a["ids"] - 50}, "ids holds the token id"),
        (lambda a: {"ids": a["ids"][None]}, "another number of dimensions"),
        (lambda a: {"ids": a["ids"].astype(np.int64)}, "array 'ids' is not what"),
        (lambda a: {"top_ids": a["top_ids"][:, :0]}, "top_ids has shape"),
        (lambda a: {"reference.best": -1 - a["reference.best"]}, "reference.best holds the token id"),
        (
            lambda a: {"reference.gap": a["reference.gap"] * np.float32(np.nan)},
            "reference.gap has values that are not finite",
        ),
        (lambda a: {"reference.norms": a["reference.norms"][:, :-1]}, "reference.norms has shape"),
        (
            lambda a: {"reference.experts": a["reference.experts"] + 100},
            r"reference.experts holds an expert outside 0\.\.",
        ),
        (lambda a: {"reference.experts": a["reference.experts"][0, 0]}, "reference.experts has shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, change, said):
    make_pack().save(tmp_path)
    with np.load(tmp_path / "pack.npz") as archive:
        changed = change(archive)
    rewrite(tmp_path, **changed)
    with pytest.raises(ParityError, match=said):
        ParityPack.load(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path):
    make_pack().save(tmp_path)
    rewrite(tmp_path, bomb=np.zeros(25 << 20, np.float32))
    tracemalloc.start()
    with pytest.raises(ParityError, match=r"unpacks to 104[0-9]* bytes, too many for its size"):
        ParityPack.load(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


class Touches:
    """When it is unpickled, it creates a file."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def test_a_pickle_in_an_archive_is_not_executed(tmp_path):
    make_pack().save(tmp_path)
    evidence = tmp_path / "it ran"
    with np.load(tmp_path / "pack.npz") as archive:
        arrays = dict(archive)
    trap = np.array([Touches(evidence)] * len(arrays["ids"]), dtype=object)
    pickle.loads(pickle.dumps(trap))
    assert evidence.exists()  # unpickling the archive does run the code
    evidence.unlink()
    np.savez(tmp_path / "pack.npz", **{**arrays, "ids": trap})
    for said in ("int32", "object"):  # the index may give a wrong type, or the right one
        change_index(tmp_path, lambda index, said=said: index["arrays"]["ids"].update(dtype=said))
        with pytest.raises(ParityError, match="array 'ids' is not what"):
            ParityPack.load(tmp_path)
        assert not evidence.exists()


def test_objects_are_not_written_either(tmp_path):
    pack = make_pack()
    with pytest.raises(ValueError, match="allow_pickle=False"):
        dataclasses.replace(pack, ids=pack.ids.astype(object)).save(tmp_path)
