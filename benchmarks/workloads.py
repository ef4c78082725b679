"""What the benchmarks ask for: requests of seeded random lengths, or those of a file. Knows no engine."""

from __future__ import annotations

import csv
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.bench.lengths import SIGMA


class BenchRequest(NamedTuple):
    """Prompt and answer of fixed lengths: exactly `num_output_tokens` are generated, whatever the model says."""

    prompt_token_ids: list[int]
    num_output_tokens: int


class Workload(NamedTuple):
    """The requests in order of arrival, and what made them, for the row."""

    requests: list[BenchRequest]
    description: dict[str, Any]


def add_arguments(parser: ArgumentParser) -> None:
    """The options that `from_arguments` reads."""
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--workload",
        default="lognormal",
        help="uniform, lognormal, shared-prefix, or a file: .csv with columns of input and output tokens, "
        ".json or .jsonl with prompts (default: %(default)s)",
    )
    group.add_argument("--num-requests", type=int, default=64, help="how many (default: %(default)s)")
    group.add_argument("--input-mean", type=int, default=128, help="mean prompt tokens (default: %(default)s)")
    group.add_argument("--output-mean", type=int, default=96, help="mean generated tokens (default: %(default)s)")
    group.add_argument("--prefix", type=int, default=512, help="shared-prefix: tokens shared (default: %(default)s)")
    group.add_argument("--workload-seed", type=int, default=0, help="of lengths and tokens (default: %(default)s)")


def from_arguments(
    args: Namespace, vocab_size: int, max_model_len: int, encode: Callable[[str], list[int]] | None
) -> Workload:
    """The workload that the options ask for. Raises SystemExit, with what to do, where there is none."""
    rng = np.random.default_rng(args.workload_seed)
    mean = (args.input_mean, args.output_mean)
    description = {"name": args.workload, "num_requests": args.num_requests, "seed": args.workload_seed}
    match args.workload:
        case "uniform" | "lognormal":
            draw = _uniform if args.workload == "uniform" else _lognormal
            lengths = list(zip(*(draw(rng, m, args.num_requests) for m in mean), strict=True))
            requests = [_random_request(rng, i, o, vocab_size) for i, o in lengths]
            description |= {"input_mean": mean[0], "output_mean": mean[1]}
        case "shared-prefix":
            shared = _random_tokens(rng, args.prefix, vocab_size)
            lengths = list(zip(*(_lognormal(rng, m, args.num_requests) for m in mean), strict=True))
            own = [_random_request(rng, i, o, vocab_size) for i, o in lengths]
            requests = [BenchRequest(shared + r.prompt_token_ids, r.num_output_tokens) for r in own]
            description |= {"input_mean": mean[0], "output_mean": mean[1], "prefix": args.prefix}
        case name if Path(name).suffix == ".csv":
            lengths = _trace_lengths(Path(name))[: args.num_requests]
            requests = [_random_request(rng, i, o, vocab_size) for i, o in lengths]
            description |= {"name": Path(name).name}
        case name if Path(name).suffix in (".json", ".jsonl"):
            if encode is None:
                raise SystemExit(f"{name} holds text but the model has no tokenizer; use a model that has one")
            outputs = _lognormal(rng, mean[1], args.num_requests)
            texts = _prompts(Path(name))[: args.num_requests]
            requests = [
                BenchRequest(encode(text), wanted or drawn)
                for (text, wanted), drawn in zip(texts, outputs, strict=False)
            ]
            description |= {"name": Path(name).name, "output_mean": mean[1]}
        case name:
            raise SystemExit(
                f"no workload {name!r}; known: uniform, lognormal, shared-prefix, a .csv, .json or .jsonl file"
            )
    fitting = [r for r in requests if len(r.prompt_token_ids) + r.num_output_tokens <= max_model_len]
    if not fitting:
        raise SystemExit(f"none of {len(requests)} requests fits max_model_len {max_model_len:,}; lower --input-mean")
    description |= {
        "num_requests": len(fitting),
        "left_out_too_long": len(requests) - len(fitting),
        "prompt_tokens": sum(len(r.prompt_token_ids) for r in fitting),
        "output_tokens": sum(r.num_output_tokens for r in fitting),
    }
    return Workload(fitting, description)


def fixed(num_requests: int, input_len: int, output_len: int, vocab_size: int, seed: int = 0) -> Workload:
    """Requests of one length, for latency."""
    rng = np.random.default_rng(seed)
    requests = [_random_request(rng, input_len, output_len, vocab_size) for _ in range(num_requests)]
    return Workload(
        requests, {"name": "fixed", "num_requests": num_requests, "input_len": input_len, "output_len": output_len}
    )


def _uniform(rng: np.random.Generator, mean: int, num: int) -> list[int]:
    """Half the mean to one and a half times the mean."""
    lengths: list[int] = rng.integers(max(1, mean - mean // 2), mean + mean // 2 + 1, num).tolist()
    return lengths


def _lognormal(rng: np.random.Generator, mean: int, num: int) -> list[int]:
    """Spread by SIGMA, then scaled so that the sample's own mean is `mean`; none is shorter than 4."""
    drawn = rng.lognormal(0.0, SIGMA, num)
    lengths: list[int] = np.maximum(4, np.rint(drawn * mean / drawn.mean())).astype(int).tolist()
    return lengths


def _random_tokens(rng: np.random.Generator, num: int, vocab_size: int) -> list[int]:
    tokens: list[int] = rng.integers(0, vocab_size, num).tolist()
    return tokens


def _random_request(rng: np.random.Generator, num_input: int, num_output: int, vocab_size: int) -> BenchRequest:
    return BenchRequest(_random_tokens(rng, num_input, vocab_size), num_output)


def _trace_lengths(path: Path) -> list[tuple[int, int]]:
    """Input and output tokens of every row; columns by name (as in Azure's traces), else the last two."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    names = [name.lower() for name in header]
    if "contexttokens" in names and "generatedtokens" in names:
        columns: Sequence[int] = (names.index("contexttokens"), names.index("generatedtokens"))
    else:
        columns = (len(names) - 2, len(names) - 1)
    return [(int(float(row[columns[0]])), max(1, int(float(row[columns[1]])))) for row in rows]


def _prompts(path: Path) -> list[tuple[str, int | None]]:
    """Texts, with the tokens to generate where given. An entry is a string, or an object: prompt, max_tokens, turns."""
    text = path.read_text()
    entries = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.splitlines() if x.strip()]
    found: list[tuple[str, int | None]] = []
    for number, entry in enumerate(entries):
        if isinstance(entry, str):
            found.append((entry, None))
        elif isinstance(entry, dict) and "prompt" in entry:
            found.append((entry["prompt"], entry.get("max_tokens")))
        elif isinstance(entry, dict) and "turns" in entry:
            found.append((entry["turns"][0], None))
        else:
            raise SystemExit(f"{path}: entry {number} is neither a string nor an object with a prompt")
    return found
