"""`jaxpaged bench`: measurements that need nothing but the package, of where KV memory goes and of a running server."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from jaxpaged.cli import bench_serve
from jaxpaged.errors import ConfigError

NUM_SHARING = (2, 4, 6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments, and those of what it can measure."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    about = "how much KV memory holds tokens, with pages and without; no model and no GPU needed"
    memory = kinds.add_parser("memory", help=about, description=about)
    memory.add_argument(
        "--workload",
        choices=("sharegpt", "alpaca"),
        default="sharegpt",
        help="mean lengths of prompts and answers (default: %(default)s)",
    )
    memory.add_argument(
        "--num-requests", type=int, default=300, help="queued at the start (default: %(default)s)", metavar="INT"
    )
    memory.add_argument("--page-size", type=int, default=16, help="tokens of a page (default: %(default)s)")
    memory.add_argument("--seed", type=int, default=0, help="of the lengths (default: %(default)s)", metavar="INT")
    memory.add_argument(
        "--output-dir", type=Path, default=Path(), help="where the three PNG go (default: here)", metavar="DIR"
    )
    bench_serve.add_arguments(kinds.add_parser("serve", help=bench_serve.ABOUT, description=bench_serve.ABOUT))


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for."""
    return _memory(args) if args.kind == "memory" else bench_serve.run(args)


def _memory(args: argparse.Namespace) -> int:
    """Measure, say it in a table, draw it. Raises ConfigError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ConfigError("matplotlib is not installed; pip install 'jaxpaged[plot]'")
    if args.num_requests < 1 or args.page_size < 1:
        raise ConfigError(
            f"--num-requests is {args.num_requests:,} and --page-size {args.page_size:,}; both must be at least 1"
        )
    from jaxpaged.bench import memory, memory_plots  # only here: `--help` needs neither jax nor matplotlib
    from jaxpaged.bench.lengths import MEANS, SIGMA, draw

    requests = draw(MEANS[args.workload], args.num_requests, SIGMA, args.seed, memory.MAX_LEN)
    reserve = {
        "contiguous, exact length (oracle)": "oracle",
        "contiguous, power of two": "power_of_two",
        "contiguous, longest possible": "max",
    }
    runs = {f"pages of {args.page_size} tokens": memory.paged(requests, args.page_size)}
    runs |= {name: memory.reserved(requests, memory.RULES[rule], memory.Buddy()) for name, rule in reserve.items()}
    few = requests[:100]
    saved = {
        name: {n: memory.saved(few, n, kind) for n in NUM_SHARING}
        for name, kind in (("parallel samples", "samples"), ("beam search", "beams"))
    }

    print(f"{'memory given by':36} {'requests':>8} {'wasted of held':>15} {'useful of all':>14}")
    for name, found in runs.items():
        means = memory.shares(found)
        print(f"{name:36} {means['in_flight']:8.1f} {means['wasted_of_held']:15.2%} {means['useful_of_all']:14.2%}")
    for name, by_n in saved.items():
        print(f"saved by sharing, {name}: " + ", ".join(f"n = {n}: {share:.1%}" for n, share in by_n.items()))

    args.output_dir.mkdir(parents=True, exist_ok=True)
    waste, sharing, pages = (args.output_dir / f"{name}.png" for name in ("waste", "sharing", "page-map"))
    prompt, answer = MEANS[args.workload]
    lengths = f"prompts of {prompt} and answers of {answer} tokens on average"
    memory_plots.waste_over_time(runs, f"KV memory over time: {lengths}", waste)
    memory_plots.sharing(saved, "Pages that completions of one request share", sharing)
    scene, num_steps = memory.scene(requests, args.page_size)
    memory_plots.page_map(
        scene, args.page_size, f"{len(scene):,} pages of {args.page_size} tokens after {num_steps:,} steps", pages
    )
    print("\n".join(f"wrote {path}" for path in (waste, sharing, pages)))
    return 0
