"""Does the serving benchmark read streams and compute its figures correctly?"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import serving
from serving_load import Answer, Load, Round, figures_of, parse, percentile, ratios, share, usable
from serving_servers import LLAMA, OURS

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(text: str, finish: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": finish}]}).encode() + b"\n\n"


def usage(tokens: int, **details: int) -> bytes:
    counts: dict[str, Any] = {"prompt_tokens": 5, "completion_tokens": tokens, "prompt_tokens_details": details}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\ndata: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def answer(sent: float, *times: float, tokens: int = 0, cached: int | None = 0) -> Answer:
    return Answer(sent, times, times[-1], "x", tokens or len(times), 10, cached, "length")


ROUND = Round(
    "fox int4", "distinct", 8, "t", 0, OURS, requests=8, tokens=64, prompt_tokens=80, computed=80, seconds=1.0, rate=64,
    first50=1, first99=2, gap50=0.1, gap99=0.2, client_share=0.01, server_share=2, other_share=0,
)  # fmt: skip


# -- streams -------------------------------------------------------------------------------------------------------


def test_a_tokens_time_is_the_arrival_of_the_part_that_completes_its_event() -> None:
    parts = [
        (1.0, HEAD),
        (2.0, chunk(event(" a"))),
        (3.0, chunk(event(" b"))[:9]),
        (4.0, chunk(event(" b"))[9:] + chunk(event(" c"))),
        (5.0, chunk(event("", "length")) + chunk(usage(3, cached_tokens=4)) + b"0\r\n\r\n"),
    ]
    found = parse(0.5, 6.0, parts)
    assert found == Answer(0.5, (2.0, 4.0, 4.0), 6.0, " a b c", 3, 5, 4, "length")
    assert found.first == 1.5
    assert found.gaps == [2.0, 0.0]


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_a_stream_reads_the_same_in_parts_of_any_size(size: int) -> None:
    whole = HEAD + b"".join(map(chunk, (event(" a"), event("é"), event("", "stop"), usage(2)))) + b"0\r\n\r\n"
    parts = [(float(i), whole[i : i + size]) for i in range(0, len(whole), size)]
    found = parse(0.0, 9e9, parts)
    assert (found.text, found.tokens, found.finish, found.cached_tokens) == (" aé", 2, "stop", None)
    ends = [whole.index(mark) + len(mark) for mark in (event(" a"), event("é"))]
    assert list(found.times) == [(end - 1) // size * size for end in ends]


def test_a_stream_without_chunks_ends_with_the_connection() -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    found = parse(0.0, 3.0, [(1.0, head + event(" a")), (2.0, event("", "length") + usage(1))])
    assert (found.times, found.text) == ((1.0,), " a")


def test_the_last_event_counts_if_it_brings_text() -> None:
    parts = [(1.0, HEAD + chunk(event("a"))), (2.0, chunk(event("held back", "length")) + chunk(usage(3)))]
    assert parse(0.0, 3.0, parts).times == (1.0, 2.0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n{busy}", "503.*busy"),
        (HEAD + chunk(event("a")), "ended early, after 1 tokens"),
        (HEAD + chunk(event("a")) + chunk(b'data: {"error": {"message": "no memory"}}\n\n'), "no memory"),
    ],
)
def test_a_failed_request_is_no_answer(raw: bytes, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        parse(0.0, 1.0, [(0.5, raw)])


# -- figures -------------------------------------------------------------------------------------------------------


def test_a_percentile_is_the_nearest_rank() -> None:
    assert percentile([3, 1, 2], 50) == 2
    assert percentile(range(1, 101), 99) == 99
    assert percentile(range(1, 51), 99) == 50
    assert percentile([7], 1) == 7
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


def test_the_rate_counts_all_clients_from_the_first_request_to_the_last_answer() -> None:
    load = Load([[answer(0, 1, 2), answer(2, 3, 4)], [answer(1, 4, 9, tokens=4)]], cpu_seconds=0.9)
    found = figures_of(load, server_cpu_seconds=18, busy_seconds=20.7)
    assert found["seconds"] == 9
    assert found["rate"] == 8 / 9
    assert (found["first50"], found["first99"]) == (1, 3)
    assert (found["gap50"], found["gap99"]) == (1, 5)
    assert (found["client_share"], found["server_share"]) == (0.1, 2)
    assert found["other_share"] == pytest.approx(0.2)


def test_computed_prompt_tokens_are_known_only_if_every_answer_tells() -> None:
    known = Load([[answer(0, 1, 2, cached=9), answer(2, 3, 4, cached=0)]], 0)
    assert figures_of(known, 0, 0)["computed"] == 11
    assert figures_of(Load([[*known.all, answer(4, 5, 6, cached=None)]], 0), 0, 0)["computed"] is None


def test_ratios_are_of_rounds_that_belong_together() -> None:
    theirs = replace(ROUND, engine=LLAMA, rate=16)
    rounds = [ROUND, theirs, replace(ROUND, number=1, rate=30), replace(theirs, number=1, rate=10)]
    alone = [replace(ROUND, number=2), replace(theirs, started="another run", number=2)]
    assert ratios([*rounds, *alone], "rate", OURS, LLAMA) == [4, 3]


def test_a_turn_that_others_spoiled_or_that_is_not_complete_is_left_out() -> None:
    theirs = replace(ROUND, engine=LLAMA)
    spoiled = [replace(ROUND, number=1), replace(theirs, number=1, other_share=0.2)]
    interrupted = [replace(theirs, number=2)]
    alone = [replace(ROUND, started="a run of ours only")]
    assert usable([ROUND, theirs, *spoiled, *interrupted, *alone], 0.1) == [ROUND, theirs, *alone]


def test_the_share_of_the_bandwidth_is_of_one_client() -> None:
    assert share([ROUND], 1e9) is None
    one = replace(ROUND, clients=1, gap50=0.05, bandwidth=40e9)
    assert share([ROUND, one], 1e9) == 0.5


# -- requests and output -------------------------------------------------------------------------------------------


def test_only_the_shared_workload_has_a_common_prefix() -> None:
    sizes = serving.Sizes(prompt=6, prefix=5, own=2, requests=2)
    shared = [asked.prompt for mine in serving.Requests(1, 400, sizes).of(serving.SHARED, 3) for asked in mine]
    assert len({tuple(prompt[:5]) for prompt in shared}) == 1
    assert len({tuple(prompt) for prompt in shared}) == 6
    assert {len(prompt) for prompt in shared} == {7}
    distinct = [asked.prompt for mine in serving.Requests(1, 400, sizes).of(serving.DISTINCT, 3) for asked in mine]
    assert len({tuple(prompt[:2]) for prompt in distinct}) == 6
    assert {len(prompt) for prompt in distinct} == {6}
    assert all(260 <= token < 400 for prompt in [*shared, *distinct] for token in prompt)


def test_answers_differ_in_length_and_fit_the_context() -> None:
    sizes = serving.Sizes(new=64, requests=100)
    lengths = [asked.new for mine in serving.Requests(1, 400, sizes).of(serving.DISTINCT, 2) for asked in mine]
    assert (min(lengths), max(lengths)) == (32, 96)
    assert sum(lengths) / len(lengths) == pytest.approx(64, abs=3)
    assert sizes.context >= sizes.prefix + sizes.own + 96


def test_the_table_has_medians_spread_and_ratios() -> None:
    theirs = replace(ROUND, engine=LLAMA, rate=16, gap99=0.4)
    text = serving.table([ROUND, replace(ROUND, number=1, rate=80), theirs, replace(theirs, number=1, rate=20)])
    assert "fox int4, distinct, 8 clients" in text
    assert "tokens/s 72.0 (64.0 .. 80.0)" in text
    assert "gap p99 400 (400 .. 400) ms" in text
    assert "tokens/s 4.00 (4.00 .. 4.00)" in text
    assert "gap p99 0.50 (0.50 .. 0.50)" in text
    assert "generate_many" not in text
    assert "80 % of generate_many" in serving.table([replace(ROUND, alone=80)])


def test_results_are_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    one = replace(ROUND, clients=1, gap50=0.05, bandwidth=40e9)
    shares = [{"column": "fox int4", "engine": OURS, "bytes_per_token": 1e9, "share": 0.5}]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"rounds": [one.as_dict()], "shares": shares}))
    monkeypatch.setattr(
        sys, "argv", ["serving.py", "--work", str(tmp_path), "--add", str(earlier), "--out", str(tmp_path / "out.json")]
    )
    assert serving.main() == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (tmp_path / "out.json").read_text().strip()
    found = json.loads(line)
    assert found["shares"] == shares
    assert found["rounds"] == [one.as_dict()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --checkpoint"),
        (["--checkpoint", "fox"], "NAME=DIR"),
        (["--quick", "--rounds", "0"], "give 1 or more"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        serving.parse([*arguments, "--work", str(tmp_path)])
    assert message in capsys.readouterr().err
