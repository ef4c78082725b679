"""`jaxpaged bench serve`: load on any OpenAI-compatible server, measured. Flags and results are called as vLLM's."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxpaged.bench import serving, workload
from jaxpaged.bench.http_client import HTTPError, Server, get_json, server_at
from jaxpaged.bench.workload import Ask
from jaxpaged.errors import ConfigError

ABOUT = "load on a running server, ours or another: throughput, latencies, goodput"
SIZES = {
    "--max-total-len": 2048,
    "--random-input-len": 1024,
    "--random-output-len": 128,
    "--prefix-repetition-prefix-len": 256,
    "--prefix-repetition-suffix-len": 256,
    "--prefix-repetition-num-prefixes": 10,
    "--prefix-repetition-output-len": 128,
}
LEAST = dict.fromkeys(SIZES, 1) | {"--max-total-len": 8, "--num-prompts": 1, "--max-concurrency": 1, "--num-warmups": 0}
DATASETS = ("sharegpt", "alpaca", "random", "prefix_repetition", "trace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--base-url", metavar="URL", help="(default: http://HOST:PORT)")
    parser.add_argument("--host", default="127.0.0.1", metavar="TEXT", help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="INT", help="(default: %(default)s)")
    parser.add_argument(
        "--endpoint",
        default="/v1/completions",
        metavar="PATH",
        help="or /v1/chat/completions (default: %(default)s); OPENAI_API_KEY in the environment is sent",
    )
    parser.add_argument("--model", metavar="TEXT", help="(default: the first that the server names)")
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--dataset-name",
        choices=DATASETS,
        default="sharegpt",
        help="lengths as of ShareGPT's or Alpaca's conversations, equal ones, with shared beginnings, or of a trace "
        "(default: %(default)s)",
    )
    what.add_argument(
        "--dataset-path", type=Path, metavar="CSV", help="the trace: columns arrival (in seconds), input, output"
    )
    what.add_argument("--num-prompts", type=int, metavar="INT", help="(default: 1000, or the whole trace)")
    what.add_argument("--seed", type=int, default=0, metavar="INT", help="(default: %(default)s)")
    for name, default in SIZES.items():
        text = "most tokens of a conversation " if name == "--max-total-len" else ""
        what.add_argument(name, type=int, default=default, metavar="INT", help=f"{text}(default: %(default)s)")
    what.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="FLOAT", help="lengths differ by so much, 0 to 1"
    )
    what.add_argument("--ignore-eos", action="store_true", help="answers are as long as asked; not every server knows")
    what.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="more fields of each request")
    when = parser.add_argument_group("when")
    when.add_argument(
        "--request-rate", type=float, default=math.inf, metavar="FLOAT", help="requests a second; inf: all at once"
    )
    when.add_argument(
        "--burstiness", type=float, default=1.0, metavar="FLOAT", help="1: Poisson arrivals; less: in bursts"
    )
    when.add_argument("--max-concurrency", type=int, metavar="INT", help="most requests under way (default: no limit)")
    when.add_argument("--num-warmups", type=int, default=1, metavar="INT", help="asked before (default: %(default)s)")
    told = parser.add_argument_group("what is told")
    told.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="limits, such as ttft:500 itl:50, that a request must meet to be counted as good; also tpot, e2el",
    )
    told.add_argument("--metric-percentiles", default="99", metavar="LIST", help="such as 50,99 (default: %(default)s)")
    told.add_argument("--save-result", action="store_true", help="write a JSON file")
    told.add_argument("--save-detailed", action="store_true", help="with each request's times in it")
    told.add_argument("--result-dir", type=Path, default=Path(), metavar="DIR", help="(default: here)")
    told.add_argument("--result-filename", metavar="NAME", help="(default: by rate, model and time)")
    told.add_argument("--plot", type=Path, metavar="PNG", help="draw how the times are spread")
    told.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Ask, wait, tell; 1 where nothing was answered. Raises ConfigError, also where there is no server."""
    if args.plot is not None and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed; pip install 'jaxpaged[plot]'")
    limits, percentiles = _limits(args.goodput), _percentiles(args.metric_percentiles)
    asks = _asks(args)
    key = os.environ.get("OPENAI_API_KEY")
    url = args.base_url or f"http://{args.host}:{args.port}"
    server = server_at(url, {"Authorization": f"Bearer {key}"} if key else {})
    found, answers = asyncio.run(_measure(args, server, url, asks, limits, percentiles))
    _print(found)
    if args.save_result or args.save_detailed:
        rate = f"{args.request_rate:g}qps"
        name = args.result_filename or f"jaxpaged-{rate}-{Path(found['model_id']).name}-{found['date']}.json"
        args.result_dir.mkdir(parents=True, exist_ok=True)
        path = args.result_dir / name
        path.write_text(json.dumps(found | (serving.details(answers) if args.save_detailed else {})) + "\n")
        print(f"wrote {path}")
    if args.plot is not None:
        from jaxpaged.bench import serving_plots

        title = f"{found['model_id']}: {found['completed']:,} requests, {found['output_throughput']:.0f} tokens/s"
        serving_plots.spread(answers, limits, title, args.plot)
        print(f"wrote {args.plot}")
    if errors := [answer.error for answer in answers if answer.error]:
        print(f"{len(errors):,} requests failed, the first with: {errors[0]}")
    return 0 if found["completed"] else 1


async def _measure(
    args: argparse.Namespace,
    server: Server,
    url: str,
    asks: list[Ask],
    limits: Mapping[str, float],
    percentiles: list[float],
) -> tuple[dict[str, Any], list[serving.Answer]]:
    try:
        model = args.model or (await get_json(server, "/v1/models"))["data"][0]["id"]
    except (HTTPError, OSError, LookupError, TypeError) as error:
        raise ConfigError(f"{url} does not say which models it has ({error}); is it running? or give --model") from None
    extra = args.extra_body | ({"ignore_eos": True} if args.ignore_eos else {})
    target = serving.Target(server, args.endpoint, model, {"temperature": 0} | extra)
    warm = [asks[place % len(asks)]._replace(arrival=0.0) for place in range(args.num_warmups)]
    warmed, _ = await serving.load(target, warm, args.max_concurrency, lambda: None)
    if failed := next((answer.error for answer in warmed if answer.error), None):
        raise ConfigError(f"{url}{args.endpoint} does not answer a first request: {failed}")
    with tqdm(total=len(asks), unit="request", disable=args.disable_tqdm) as bar:
        answers, seconds = await serving.load(target, asks, args.max_concurrency, bar.update)
    setting = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint": args.endpoint,
        "model_id": model,
        "dataset_name": args.dataset_name,
        "num_prompts": len(asks),
        "request_rate": args.request_rate if math.isfinite(args.request_rate) else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "seed": args.seed,
        "goodput": {name: 1e3 * seconds for name, seconds in limits.items()},
    }
    return setting | serving.summary(answers, seconds, limits, percentiles), answers


def _asks(args: argparse.Namespace) -> list[Ask]:
    for name, low in LEAST.items():
        number = getattr(args, name.removeprefix("--").replace("-", "_"))
        if number is not None and number < low:
            raise ConfigError(f"{name} is {number:,}; it must be at least {low}")
    for name, rate in {"--request-rate": args.request_rate, "--burstiness": args.burstiness}.items():
        if not rate > 0:
            raise ConfigError(f"{name} is {rate:g}; it must be above 0")
    if not 0 <= args.random_range_ratio <= 1:
        raise ConfigError(f"--random-range-ratio is {args.random_range_ratio:g}; it must be from 0 to 1")
    if (args.dataset_name == "trace") != (args.dataset_path is not None):
        raise ConfigError("--dataset-name trace and --dataset-path FILE.csv belong together; give both or neither")
    if args.dataset_name == "trace" and math.isfinite(args.request_rate):
        raise ConfigError(f"--request-rate is {args.request_rate:g}, but a trace says when requests come; leave it out")
    count, seed = args.num_prompts or 1000, args.seed
    times = workload.arrivals(count, args.request_rate, args.burstiness, seed)
    prefix_len, num_prefixes = 0, 1
    match args.dataset_name:
        case "trace":
            times, lengths = workload.trace(args.dataset_path, args.num_prompts)
        case "random":
            sizes = args.random_input_len, args.random_output_len
            lengths = workload.uniform(*sizes, args.random_range_ratio, count, seed)
        case "prefix_repetition":
            sizes = args.prefix_repetition_suffix_len, args.prefix_repetition_output_len
            lengths = workload.uniform(*sizes, 0.0, count, seed)
            prefix_len, num_prefixes = args.prefix_repetition_prefix_len, args.prefix_repetition_num_prefixes
        case name:
            lengths = workload.conversations(name, count, args.max_total_len, seed)
    texts = workload.prompts([both.prompt for both in lengths], seed, prefix_len, num_prefixes)
    return [Ask(second, text, both.output) for second, text, both in zip(times, texts, lengths, strict=True)]


def _limits(given: list[str]) -> dict[str, float]:
    """Name -> seconds."""
    limits = {}
    for text in given:
        name, _, number = text.partition(":")
        try:
            limits[name] = float(number) / 1e3
        except ValueError:
            raise ConfigError(f"--goodput has {text!r}; it must be as in ttft:500, in milliseconds") from None
        if name not in serving.METRICS:
            raise ConfigError(f"--goodput has {text!r}; known: {', '.join(serving.METRICS)}")
    return limits


def _percentiles(text: str) -> list[float]:
    try:
        wanted = [float(part) for part in text.split(",")]
    except ValueError:
        wanted = [-1.0]
    if not all(0 <= p <= 100 for p in wanted):
        raise ConfigError(f"--metric-percentiles is {text!r}; it must be numbers from 0 to 100, such as 50,99")
    return wanted


def _print(found: Mapping[str, Any]) -> None:
    names = {
        "completed": "requests answered",
        "failed": "requests failed",
        "duration": "seconds",
        "total_input_tokens": "prompt tokens",
        "total_output_tokens": "generated tokens",
        "request_throughput": "requests/s",
        "request_goodput": "requests/s within the limits",
        "output_throughput": "generated tokens/s",
        "total_token_throughput": "prompt and generated tokens/s",
    }
    for name, text in names.items():
        if name in found:
            print(f"{text:32} {found[name]:>12,{'' if isinstance(found[name], int) else '.2f'}}")
    kinds = dict.fromkeys(name.rpartition("_ttft_ms")[0] for name in found if name.endswith("_ttft_ms"))
    print(f"{'milliseconds':16}" + "".join(f"{kind:>12}" for kind in kinds))
    for name in serving.METRICS:
        cells = (found[f"{kind}_{name}_ms"] for kind in kinds)
        print(f"{name:16}" + "".join(f"{'-':>12}" if cell is None else f"{cell:12,.2f}" for cell in cells))
