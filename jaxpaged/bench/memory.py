"""How much KV memory holds tokens: pages against contiguous reservations, and what sharing saves. No model, no GPU.

All requests are queued at the start; figures are means over the steps while some still wait. Pages run through the real
scheduler and page pool. The baselines reserve at admission what a sequence may need: the model's length, the answer's
length rounded up to a power of two, or exactly its length ("oracle"). `Packed` ones take their reservations from the
page pool too and suffer no external fragmentation, better than any contiguous allocator; `Buddy` ones take powers of
two, as in the paper.

Completions of one request are equally long. Beams branch as made-up distributions of the next token say (see
`simulation`): what they save is what these make of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxpaged.bench.lengths import Lengths
from jaxpaged.bench.simulation import Memory, Simulation
from jaxpaged.engine.page_map import PageInfo, page_map
from jaxpaged.engine.page_pool import PagePool

MAX_LEN = 2048
SLOTS = 16_384  # about what an A100 of 40 GB has left beside a model of 13B, as in the paper
KINDS = ("samples", "beams")

RULES: dict[str, Callable[[Lengths], int]] = {
    "max": lambda r: MAX_LEN,
    "power_of_two": lambda r: min(MAX_LEN, r.prompt + _power_of_two(r.output)),
    "oracle": lambda r: r.prompt + r.output,
}
"""What a contiguous sequence reserves at admission."""


class Run(NamedTuple):
    """What lay in memory in each step while requests waited, and how often one was preempted."""

    seen: list[Memory]
    num_preemptions: int = 0


def shares(run: Run) -> dict[str, float]:
    """Means over the steps.

    in_flight       requests under way
    wasted_of_held  of the slots that requests hold, reservations included, the share that holds no token yet or ever
    useful_of_held  the rest of them: what PagedAttention's authors call token states
    useful_of_all   the share of all slots that holds a token; also counts as lost what is free but not given away
    """
    in_flight, held, used, _ = np.mean(run.seen, axis=0)
    return {
        "in_flight": round(float(in_flight), 1),
        "wasted_of_held": round(float(1 - used / held), 4),
        "useful_of_held": round(float(used / held), 4),
        "useful_of_all": round(float(used / SLOTS), 4),
    }


def paged(requests: Sequence[Lengths], page_size: int) -> Run:
    """Pages of that size, handed out as tokens come."""
    simulation = Simulation(SLOTS // page_size + 1, page_size, max_model_len=MAX_LEN)
    for request in requests:
        simulation.add(request.prompt, [request.output])
    seen = []
    while simulation.scheduler.waiting:
        simulation.step()
        seen.append(simulation.memory())
    return Run(seen, simulation.scheduler.num_preemptions)


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


def reserved(requests: Sequence[Lengths], rule: Callable[[Lengths], int], memory: Packed | Buddy) -> Run:
    """First come first served, each with all it reserves from the start; a token each per step."""
    queue = list(reversed(requests))
    running: list[tuple[Lengths, list[int], int]] = []  # request, its slots, tokens generated
    seen = []
    while queue:
        while queue and (slots := memory.take(rule(queue[-1]))) is not None:
            running.append((queue.pop(), slots, 0))
        used = sum(r.prompt + done for r, _, done in running)
        seen.append(Memory(len(running), memory.held(), used, memory.held()))
        going_on = []
        for request, slots, done in running:
            if done + 1 < request.output:
                going_on.append((request, slots, done + 1))
            else:
                memory.give(slots)
        running = going_on
    return Run(seen)


def saved(requests: Sequence[Lengths], n: int, kind: str) -> float:
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


def scene(requests: Sequence[Lengths], page_size: int) -> tuple[list[PageInfo], int]:
    """The page map of a pool at work, and after how many steps: single answers, four samples and four beams in turn."""
    simulation = Simulation(SLOTS // page_size + 1, page_size, max_num_seqs=64, max_model_len=MAX_LEN)
    for index, request in enumerate(requests):
        if index % 3 == 2:
            simulation.add_beams(request.prompt, request.output, 4)
        else:
            simulation.add(request.prompt, [request.output] * (1, 4)[index % 3])
    num_steps = 0
    half = len(requests) // 2
    while len(simulation.scheduler.waiting) > half or num_steps == 0:
        simulation.step()
        num_steps += 1
    return page_map(simulation.pool, simulation.scheduler.running), num_steps


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
