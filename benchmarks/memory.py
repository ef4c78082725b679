"""How much KV memory holds tokens: pages against contiguous reservations, and what sharing saves. No model, no GPU.

python benchmarks/memory.py --output benchmarks/results/memory.jsonl

Requests have lognormal lengths with the means of PagedAttention's traces (arXiv 2309.06180, section 6.1), all queued at
the start; figures are means over the steps while some still wait. Pages run through the real scheduler and page pool.
The baselines reserve at admission what a sequence may need: the model's length, the answer's length rounded up to a
power of two, or exactly its length ("oracle"). `packed` ones take their reservations from the page pool too and suffer
no external fragmentation, better than any contiguous allocator; `buddy` ones take powers of two, as in the paper.

Completions of one request are equally long. Beams branch as made-up distributions of the next token say (see
`simulation`): what they save is what these make of them.
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import measure
import numpy as np
from simulation import Memory, Simulation
from workloads import SIGMA

from jaxpaged.engine.page_pool import PagePool

MEANS = {"sharegpt": (161, 338), "alpaca": (19, 58)}
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
KINDS = ("samples", "beams")
MAX_LEN = 2048
SLOTS = 16_384  # about what an A100 of 40 GB has left beside a model of 13B, as in the paper


class Lengths(NamedTuple):
    """Prompt tokens, generated tokens."""

    prompt: int
    output: int


def main() -> None:
    """One row for each workload."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=sorted(MEANS), default=list(MEANS), help="mean lengths")
    parser.add_argument("--num-requests", type=int, default=1000, help="requests of each run")
    parser.add_argument("--num-sharing", type=int, default=100, help="requests of each run that measures sharing")
    parser.add_argument("--sigma", type=float, default=SIGMA, help="spread of the lognormal lengths")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths")
    parser.add_argument("--output", type=Path, help="append the rows to this file of JSON lines")
    args = parser.parse_args()
    for name in args.workloads:
        requests = draw(MEANS[name], args.num_requests, args.sigma, args.seed)
        paged = {str(size): pages(requests, size) for size in PAGE_SIZES}
        row = {"benchmark": "memory"} | measure.host()
        row |= {"workload": name, "means": MEANS[name], "sigma": args.sigma, "num_requests": args.num_requests}
        row |= {"seed": args.seed, "slots": SLOTS, "max_len": MAX_LEN}
        row |= {"by_page_size": paged, "baselines": baselines(requests)}
        oracle = row["baselines"]["oracle"]
        in_flight = paged["16"]["in_flight"]
        row["in_flight_over_oracle"] = {k: round(in_flight / oracle[k]["in_flight"], 2) for k in oracle}
        few = requests[: args.num_sharing]
        row["saved_by_sharing"] = {kind: {str(n): saved(few, n, kind) for n in (2, 4, 6)} for kind in KINDS}
        measure.write(row, args.output)


def draw(means: tuple[int, int], count: int, sigma: float, seed: int) -> list[Lengths]:
    """Lognormal lengths with these means, cut where prompt and answer exceed the model's length."""
    rng = np.random.default_rng(seed)
    prompts, outputs = (_lognormal(rng, mean, count, sigma) for mean in means)
    prompts = np.minimum(prompts, MAX_LEN // 2)
    return [Lengths(int(p), int(min(o, MAX_LEN - p))) for p, o in zip(prompts, outputs, strict=True)]


def pages(requests: list[Lengths], page_size: int) -> dict[str, float]:
    """Shares of the memory and requests in flight, with pages of that size."""
    simulation = Simulation(SLOTS // page_size + 1, page_size, max_model_len=MAX_LEN)
    for request in requests:
        simulation.add(request.prompt, [request.output])
    seen = []
    while simulation.scheduler.waiting:
        simulation.step()
        seen.append(simulation.memory())
    means = Memory(*np.mean(seen, axis=0))
    return _shares(means.num_running, means.used, means.held) | {
        "preemptions_per_request": round(simulation.scheduler.num_preemptions / len(requests), 3)
    }


def baselines(requests: list[Lengths]) -> dict[str, dict[str, dict[str, float]]]:
    """The same for contiguous reservations."""
    rules: dict[str, Callable[[Lengths], int]] = {
        "max": lambda r: MAX_LEN,
        "power_of_two": lambda r: min(MAX_LEN, r.prompt + _power_of_two(r.output)),
        "oracle": lambda r: r.prompt + r.output,
    }
    return {
        name: {"packed": reserved(requests, rule, Packed()), "buddy": reserved(requests, rule, Buddy())}
        for name, rule in rules.items()
    }


class Packed:
    """Reservations out of the page pool, slot by slot: as if memory could always be moved together."""

    def __init__(self) -> None:
        """All free."""
        self.pool = PagePool(SLOTS + 1, 1, enable_caching=False)

    def take(self, size: int) -> list[int] | None:
        """So many slots, or None."""
        return self.pool.allocate(size) if size <= self.pool.num_available else None

    def give(self, slots: list[int]) -> None:
        """Back."""
        self.pool.release(slots)

    def held(self) -> int:
        """Slots taken."""
        return self.pool.num_held


class Buddy:
    """Runs of 2^k slots, halved as needed and joined again with their other half."""

    def __init__(self) -> None:
        """All free."""
        self.free: dict[int, set[int]] = {1 << k: set() for k in range(SLOTS.bit_length())}
        self.free[SLOTS].add(0)
        self.num_held = 0

    def take(self, size: int) -> list[int] | None:
        """[begin, length] of a run of at least `size` slots, or None."""
        wanted = _power_of_two(size)
        length = next((n for n, begins in self.free.items() if n >= wanted and begins), None)
        if length is None:
            return None
        begin = min(self.free[length])
        self.free[length].remove(begin)
        while length > wanted:
            length //= 2
            self.free[length].add(begin + length)
        self.num_held += wanted
        return [begin, wanted]

    def give(self, slots: list[int]) -> None:
        """Back."""
        begin, length = slots
        self.num_held -= length
        while (other := begin ^ length) in self.free.get(length, ()):
            self.free[length].remove(other)
            begin, length = min(begin, other), 2 * length
        self.free[length].add(begin)

    def held(self) -> int:
        """Slots taken."""
        return self.num_held


def reserved(requests: list[Lengths], rule: Callable[[Lengths], int], memory: Packed | Buddy) -> dict[str, float]:
    """First come first served, each with all it reserves from the start; a token each per step."""
    queue = list(reversed(requests))
    running: list[tuple[Lengths, list[int], int]] = []  # request, its slots, tokens generated
    seen = []
    while queue:
        while queue and (slots := memory.take(rule(queue[-1]))) is not None:
            running.append((queue.pop(), slots, 0))
        seen.append((len(running), sum(r.prompt + done for r, _, done in running), memory.held()))
        going_on = []
        for request, slots, done in running:
            if done + 1 < request.output:
                going_on.append((request, slots, done + 1))
            else:
                memory.give(slots)
        running = going_on
    num_running, used, held = np.mean(seen, axis=0)
    return _shares(num_running, used, held)


def saved(requests: list[Lengths], n: int, kind: str) -> float:
    """The share of the memory that sharing saves with `n` completions or beams per request, 32 requests at a time."""
    simulation = Simulation(n * 32 * MAX_LEN // 16 + 1, 16, max_num_seqs=32 * n, max_model_len=MAX_LEN)
    for request in requests:
        if kind == "beams":
            simulation.add_beams(request.prompt, request.output, n)
        else:
            simulation.add(request.prompt, [request.output] * n)
    held = unshared = 0
    while not simulation.is_done:
        simulation.step()
        memory = simulation.memory()
        held += memory.held
        unshared += memory.unshared
    return round(1 - held / unshared, 4)


def _shares(in_flight: float, used: float, held: float) -> dict[str, float]:
    return {
        "in_flight": round(float(in_flight), 1),
        "wasted_of_held": round(float(1 - used / held), 4),
        "useful_of_all": round(float(used / SLOTS), 4),
    }


def _lognormal(rng: np.random.Generator, mean: float, count: int, sigma: float) -> np.ndarray:
    return np.maximum(4, np.rint(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count))).astype(int)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


if __name__ == "__main__":
    main()
