"""How fast does `edgelm serve` answer several clients, compared with llama.cpp's llama-server?

    python tests/bench/serving.py --checkpoint olmoe=DIR --checkpoint fox=DIR --work DIR \\
        --llama-python PYTHON --llama-server FILE [--out results.json]
    python tests/bench/serving.py --quick --work DIR      # the tiny checkpoints, a smoke test; without llama.cpp too

Both servers are started with the same weights (int4; Q4_0), threads and slots, and get the same requests: streamed
completions of token ids, greedy, that ignore the end token. 1, 4, 8 and 16 clients each send requests back to back:
    distinct  prompts of 256 tokens with nothing in common
    shared    prompts of 1,000 tokens in common, which no server has seen before, and 24 of their own
Answers have 64 tokens on average, 32 to 96, so that clients do not end in step. For each number of clients the servers
are measured in turn, and the first one alternates; both are loaded, and the one that waits must take no CPU time.

Checked before: our answers equal those of `model.generate`, alone and with other clients; llama-server's are not empty
and have the right length.

Prints per number of clients, workload and server: tokens/s of all clients, and the median and 99th percentile of the
time to the first token and between tokens; ratios (the median over rounds); the share of the memory's bandwidth that
decoding for one client uses; how many prompt tokens were computed; and, with --alone, our speed as a share of that of
`generate_many`, which gets the same requests without a server. One JSON line last. Nothing else may run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from peers import Worker, Workplace
from serving_load import Round, figures_of, ratios, run, share, usable
from serving_servers import LLAMA, MODEL, OURS, Command, Server, busy_seconds, llama, ours
from vs_peers import SETTLE, TINY, say

import edgelm
from edgelm import devices
from edgelm.benchmark import bytes_per_token, read_bandwidth
from edgelm.bundle import Bundle
from edgelm.generation.options import GenerateOptions

DISTINCT, SHARED = "distinct", "shared"
CLIENTS = (1, 4, 8, 16)
# An idle server may wake up now and then, but not spin.
IDLE_SHARE = 0.03
# More CPU time of other processes than this spoils a round; the system itself takes a little.
BUSY_SHARE = 0.1
FIGURES = {"rate": "tokens/s", "first50": "first p50", "first99": "first p99", "gap50": "gap p50", "gap99": "gap p99"}


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens, of requests per client and of rounds."""

    prompt: int = 256
    prefix: int = 1000
    own: int = 24
    new: int = 64
    requests: int = 2
    rounds: int = 3

    @property
    def context(self) -> int:
        """Tokens that a slot must hold."""
        return max(self.prompt, self.prefix + self.own) + 2 * self.new


QUICK = Sizes(prompt=32, prefix=96, own=8, new=8, requests=1, rounds=1)


@dataclass(frozen=True)
class Asked:
    """A request for `new` tokens after a prompt."""

    prompt: list[int]
    new: int


class Requests:
    """The requests of a round; equal seeds give equal ones. `vocabulary`: ids are below it."""

    def __init__(self, seed: int | Sequence[int], vocabulary: int, sizes: Sizes) -> None:
        self.generator = np.random.default_rng(seed)
        self.vocabulary, self.sizes = vocabulary, sizes

    def ids(self, count: int) -> list[int]:
        """Return random token ids; the lowest are left out, since tokenizers have special ones there."""
        found: list[int] = self.generator.integers(260, self.vocabulary, count).tolist()
        return found

    def of(self, workload: str, clients: int) -> list[list[Asked]]:
        """Return the requests of each client."""
        sizes = self.sizes
        prefix = self.ids(sizes.prefix) if workload == SHARED else []
        own = sizes.own if workload == SHARED else sizes.prompt
        return [[Asked(prefix + self.ids(own), self.length()) for _ in range(sizes.requests)] for _ in range(clients)]

    def length(self) -> int:
        """Return the length of an answer: on average `sizes.new`, at least half of it."""
        new = self.sizes.new
        return int(self.generator.integers(new - new // 2, new + new // 2 + 1))


def body(command: Command, asked: Asked) -> dict[str, Any]:
    """Return the JSON of a streamed, greedy request."""
    return {
        "model": MODEL, "prompt": asked.prompt, "max_tokens": asked.new, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, **command.fields,
    }  # fmt: skip


def check(
    bundle: Path, servers: Sequence[Server], workload: str, requests: Requests, clients: int, threads: int
) -> None:
    """Compare the servers' answers with what they must be.

    Raises:
        SystemExit: an answer is wrong; nothing is timed.
    """
    asked = [mine[0] for mine in requests.of(workload, clients)]
    for server in servers:
        bodies = [body(server.command, one) for one in asked]
        together = run(server.base, [[mine] for mine in bodies]).all
        alone = run(server.base, [bodies[:2]]).all
        for answer, one in zip((*together, *alone), (*asked, *asked), strict=False):
            if not (answer.text and answer.tokens == one.new and answer.finish == "length"):
                raise SystemExit(f"{server.command.name} gave {answer.tokens} of {one.new} tokens: {answer.finish}")
        same = sum(a.text == b.text for a, b in zip(alone, together, strict=False))
        name = f"{server.command.name}, {workload}"
        print(f"{name}: {same} of {len(alone)} answers are the same with {clients} clients and with one")
        if server.command.name != OURS:
            # Its matrix products of several rows round in another way, so a random model's tokens may differ.
            continue
        if same != len(alone):
            raise SystemExit(f"{OURS}: other clients change an answer")
        with edgelm.load(bundle, chat=False, threads=threads) as model:
            model.end_ids = frozenset()
            wanted = [model.generate(one.prompt, max_tokens=one.new).text for one in asked]
        equal = sum(answer.text == text for answer, text in zip(together, wanted, strict=True))
        print(f"{name}: {equal} of {len(wanted)} answers equal those of model.generate")
        if equal != len(wanted):
            raise SystemExit(f"{OURS} does not give the tokens of model.generate")


def check_idle(servers: Sequence[Server], seconds: float) -> None:
    """Exit if a server takes CPU time without a request."""
    time.sleep(SETTLE)
    before = [server.cpu_seconds() for server in servers]
    time.sleep(seconds)
    for server, earlier in zip(servers, before, strict=True):
        taken = (server.cpu_seconds() - earlier) / seconds
        print(f"{server.command.name}: takes {100 * taken:.1f} % of a core while it waits")
        if taken > IDLE_SHARE:
            raise SystemExit(f"{server.command.name} computes without a request: nothing is timed")


def measure_alone(model: edgelm.LanguageModel, requests: Sequence[Sequence[Asked]]) -> float:
    """Return the tokens per second of `generate_many` for the requests of all clients."""
    time.sleep(SETTLE)
    # All first requests, then all second ones, as clients that begin together send them.
    flat = [asked for turn in zip(*requests, strict=True) for asked in turn]
    each: list[GenerateOptions] = [{"max_tokens": asked.new} for asked in flat]
    began = time.perf_counter()
    answers = model.generate_many([asked.prompt for asked in flat], batch=len(requests), each=each)
    return sum(len(answer.tokens) for answer in answers) / (time.perf_counter() - began)


def measure_once(server: Server, requests: Sequence[Sequence[Asked]]) -> dict[str, Any]:
    """Send the requests of every client to a server; return the figures."""
    time.sleep(SETTLE)
    before, busy = server.cpu_seconds(), busy_seconds()
    load = run(server.base, [[body(server.command, asked) for asked in mine] for mine in requests])
    cpu, busy = server.cpu_seconds() - before, busy_seconds() - busy
    for mine, answers in zip(requests, load.answers, strict=True):
        for asked, answer in zip(mine, answers, strict=True):
            if answer.tokens != asked.new:
                raise SystemExit(f"{server.command.name} gave {answer.tokens} tokens instead of {asked.new}")
    return figures_of(load, cpu, busy)


def measure(
    column: str,
    servers: Sequence[Server],
    vocabulary: int,
    options: argparse.Namespace,
    weights: Path,
    model: edgelm.LanguageModel | None,
) -> Iterator[Round]:
    """Measure all workloads and numbers of clients, the servers in turn; `model` does the same without a server."""
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    sizes: Sizes = options.sizes
    for number in range(sizes.rounds):
        for workload in options.workload:
            for clients in options.clients:
                # Prompts that no server has seen: the clock is part of the seed.
                requests = Requests([time.time_ns(), number, clients], vocabulary, sizes).of(workload, clients)
                turns = servers if (number + clients.bit_length()) % 2 else servers[::-1]
                for server in turns:
                    name = server.command.name
                    figures = measure_once(server, requests)
                    figures["bandwidth"] = read_bandwidth(options.threads, weights) if clients == 1 else None
                    figures["alone"] = measure_alone(model, requests) if model and name == OURS else None
                    done = Round(column, workload, clients, started, number, name, **figures)
                    say(
                        f"{column}, {workload}, {clients} clients, round {number + 1}: {name} {done.rate:.1f} tokens/s "
                        f"in {done.seconds:.0f} s, p99 between tokens {1000 * done.gap99:.0f} ms"
                    )
                    if done.other_share > BUSY_SHARE:
                        say(f"other processes took {done.other_share:.2f} of a core: the figures are worth little")
                    yield done


def table(rounds: Sequence[Round]) -> str:
    """Return the medians and the spread of every figure, and the ratios."""
    lines = []
    for column, workload, clients in dict.fromkeys((item.column, item.workload, item.clients) for item in rounds):
        mine = [item for item in rounds if (item.column, item.workload, item.clients) == (column, workload, clients)]
        lines.append(f"{column}, {workload}, {clients} clients")
        for engine in dict.fromkeys(item.engine for item in mine):
            own = [item for item in mine if item.engine == engine]
            cells = []
            for field, label in FIGURES.items():
                values = [getattr(item, field) for item in own]
                scale, unit, digits = (1, "", 1) if field == "rate" else (1000, " ms", 0)
                low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
                cells.append(f"{label} {middle:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f}){unit}")
            last = own[-1]
            computed = "" if last.computed is None else f", computed {last.computed}"
            cells.append(f"prompt tokens {last.prompt_tokens}{computed}")
            others = max(item.other_share for item in own)
            cells.append(f"CPU: server {last.server_share:.2f}, clients {last.client_share:.3f}, others {others:.2f}")
            alone = [item.rate / item.alone for item in own if item.alone]
            cells += [f"{100 * statistics.median(alone):.0f} % of generate_many"] if alone else []
            lines.append(f"  {engine:<10}{len(own)} x {last.requests}: " + "; ".join(cells))
        found = {field: ratios(mine, field, OURS, LLAMA) for field in FIGURES}
        if found["rate"]:
            cells = [
                f"{FIGURES[field]} {statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"
                for field, values in found.items()
                if values
            ]
            lines.append(f"  {OURS} / {LLAMA}: " + "; ".join(cells))
    return "\n".join(lines)


def shares(rounds: Sequence[Round], bytes_read: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return the share of the memory's bandwidth of each column and engine at one client."""
    found = []
    for column, engines in bytes_read.items():
        for engine, count in engines.items():
            value = share([item for item in rounds if (item.column, item.engine) == (column, engine)], count)
            if value is not None:
                found.append({"column": column, "engine": engine, "bytes_per_token": count, "share": value})
    return found


def report(rounds: Sequence[Round], bytes_read: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """Return the JSON line."""
    return json.dumps(
        {
            "date": time.strftime("%Y-%m-%d"), "cpu": devices.describe().cpu, "threads": options.threads,
            "slots": options.slots, "sizes": vars(options.sizes), "shares": shares(rounds, bytes_read),
            "rounds": [item.as_dict() for item in rounds],
        }
    )  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", metavar="NAME=DIR", help="may be given more than once")
    parser.add_argument("--work", type=Path, required=True, help="where bundles and GGUFs are made and kept")
    parser.add_argument("--llama-server", type=Path, help="binary; without it only our server is measured")
    parser.add_argument("--llama-python", default=sys.executable, help="has llama-cpp-python and gguf: makes the GGUF")
    parser.add_argument("--llama-option", action="append", default=[], help="one more argument of llama-server")
    parser.add_argument("--engine", choices=[OURS, LLAMA], help="measure only this one")
    parser.add_argument("--clients", type=int, action="append", help=f"default: {', '.join(map(str, CLIENTS))}")
    parser.add_argument("--workload", action="append", choices=[DISTINCT, SHARED], help="default: both")
    parser.add_argument("--slots", type=int, default=16, help="sequences that a server decodes together")
    parser.add_argument("--requests", type=int, help="of each client in a round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--new", type=int, help="mean number of tokens of an answer")
    parser.add_argument("--threads", type=int, default=devices.allowed_cores())
    parser.add_argument("--quick", action="store_true", help="small sizes; without --checkpoint the tiny checkpoints")
    parser.add_argument("--alone", action="store_true", help="measure generate_many with the same requests too")
    parser.add_argument("--no-check", action="store_true", help="an earlier run has checked the same files")
    parser.add_argument("--out", type=Path, help="write the JSON line to this file too, after every round")
    parser.add_argument("--add", type=Path, action="append", default=[], help="results of an earlier run, to print too")
    options = parser.parse_args(arguments)
    if not (options.checkpoint or options.quick or options.add):
        parser.error("give --checkpoint NAME=DIR, or --quick, or --add FILE to print earlier results")
    options.checkpoints = {}
    for pair in options.checkpoint or ([f"{name}={path}" for name, path in TINY.items()] if options.quick else []):
        name, _, folder = pair.partition("=")
        if not (name and Path(folder, "config.json").is_file()):
            parser.error(f"--checkpoint {pair}: give NAME=DIR with a config.json in DIR")
        options.checkpoints[name] = Path(folder)
    options.sizes = QUICK if options.quick else Sizes()
    for field in ("requests", "rounds", "new"):
        given = getattr(options, field)
        if given is not None:
            if given < 1:
                parser.error(f"--{field} {given}: give 1 or more")
            options.sizes = replace(options.sizes, **{field: given})
    options.clients = options.clients or list(CLIENTS)
    options.workload = options.workload or [DISTINCT, SHARED]
    return options


def commands(name: str, options: argparse.Namespace, place: Workplace, bundle: Bundle) -> list[Command]:
    """Return how the servers are started; the GGUF is made if it is missing."""
    shape = {"slots": options.slots, "threads": options.threads, "context": options.sizes.context}
    found = [ours(bundle.path, bytes_per_token=bytes_per_token(bundle.manifest, 0), **shape)]
    if options.llama_server:
        gguf = options.work / f"{name}-Q4_0-words.gguf"
        with Worker("llamacpp_worker.py", options.llama_python, place.log) as worker:
            made = worker(
                "prepare", checkpoint=str(options.checkpoints[name]), out=str(gguf), file_type="Q4_0", words=True
            )
        found.append(llama(options.llama_server, gguf, options.llama_option, bytes_per_token=made["bytes"], **shape))
    return [command for command in found if options.engine in (None, command.name)]


def main() -> int:
    """Parse the command line, make missing files, check, measure, and print."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end too
    options.work.mkdir(parents=True, exist_ok=True)
    place = Workplace(options.work, options.threads, options.llama_python, "")
    print(f"{devices.describe().cpu}, {options.threads} threads, load average {os.getloadavg()[0]:.2f}")
    rounds: list[Round] = []
    read: dict[str, dict[str, float]] = {}
    for path in options.add:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        rounds += [Round(**record) for record in earlier["rounds"]]
        kept = usable(rounds, BUSY_SHARE)
        say(f"{path}: {len(rounds) - len(kept)} rounds are left out: spoiled by other processes, or not complete")
        rounds = kept
        for item in earlier["shares"]:
            read.setdefault(item["column"], {})[item["engine"]] = item["bytes_per_token"]
    for name, checkpoint in options.checkpoints.items():
        column = f"{name} int4"
        bundle = place.native(name, checkpoint, "int4")[0]
        opened = Bundle.open(bundle.options["path"])
        vocabulary = min(50000, opened.manifest.model.vocab_size)
        with ExitStack() as stack:
            servers = []
            for command in commands(name, options, place, opened):
                say(f"{column}: starting {command.name}")
                servers.append(stack.enter_context(Server(command, place.log)))
                read.setdefault(column, {})[command.name] = command.bytes_per_token
            for workload in () if options.no_check else options.workload:
                requests = Requests(1, vocabulary, options.sizes)
                check(opened.path, servers, workload, requests, min(4, options.slots), options.threads)
            check_idle(servers, 2.0)
            model = None
            if options.alone:
                model = stack.enter_context(edgelm.load(opened.path, chat=False, threads=options.threads))
                model.end_ids = frozenset()
            for done in measure(column, servers, vocabulary, options, bundle.weights, model):
                rounds.append(done)
                if options.out:
                    options.out.write_text(report(rounds, read, options) + "\n", encoding="utf-8")
            for server in servers:
                say(f"{column}: {server.command.name} had up to {server.peak_bytes() / 2**30:.1f} GiB of memory")
    print(f"\nmedian (least .. greatest) of the rounds\n{table(rounds)}")
    for item in shares(rounds, read):
        print(f"{item['column']}, 1 client: {item['engine']} reads at {100 * item['share']:.0f} % of the bandwidth")
    line = report(rounds, read, options)
    if options.out:
        options.out.write_text(line + "\n", encoding="utf-8")
    print(f"\n{line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
