"""The scheduler at scale, without a model: progress under pressure, and where the memory goes."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpaged.bench import memory
from jaxpaged.bench.lengths import MEANS, draw
from jaxpaged.bench.simulation import Simulation
from jaxpaged.engine.scheduler import Plan


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_with_four_times_more_wanted_than_there_is_nobody_is_preempted_more_than_eight_times(
    seed: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    seats, size = 24, 8
    lengths = [
        (int(min(p, 150)), int(min(o, 300)))
        for p, o in zip(*(4 + rng.lognormal(np.log(mean), spread, 60) for mean in (20, 120)), strict=True)
    ]
    wanted = sorted((-(-(p + o) // size) for p, o in lengths), reverse=True)[:seats]
    simulation = Simulation(
        max(sum(wanted) // 4, 60), size, max_num_seqs=seats, max_num_batched_tokens=128, max_model_len=472
    )
    sequences = [s for prompt, output in lengths for s in simulation.add(prompt, [output])]
    simulation.run()
    assert all(s.num_output_tokens == s.max_tokens for s in sequences)
    assert simulation.scheduler.num_preemptions > 0
    assert max(s.num_preemptions for s in sequences) <= 8
    assert simulation.pool.num_held == 0


def test_pages_waste_little_and_hold_more_requests_than_contiguous_reservations() -> None:
    requests = draw(MEANS["sharegpt"], 150, 0.7, 0, memory.MAX_LEN)
    paged = memory.shares(memory.paged(requests, 16))
    assert paged["wasted_of_held"] < 0.04
    assert paged["useful_of_held"] > 0.96
    oracle = memory.shares(memory.reserved(requests, memory.RULES["oracle"], memory.Packed()))
    assert paged["in_flight"] > 1.3 * oracle["in_flight"]
    assert oracle["wasted_of_held"] > 0.3


@pytest.mark.parametrize("kind", memory.KINDS)
def test_sharing_saves_more_the_more_share(kind: str) -> None:
    requests = draw((40, 20), 8, 0.3, 0, memory.MAX_LEN)
    two, four = (memory.saved(requests, n, kind) for n in (2, 4))
    assert 0.1 < two < four < 0.75


def test_buddies_join_again() -> None:
    buddy = memory.Buddy()
    taken = [buddy.take(size) for size in (1, 100, 3000, 5, 64)]
    assert [length for _, length in taken] == [1, 128, 4096, 8, 64]
    assert len({begin for begin, _ in taken}) == 5
    for slots in taken:
        buddy.give(slots)
    assert buddy.take(memory.SLOTS) == [0, memory.SLOTS]
    assert buddy.take(1) is None


def test_a_step_is_timed_in_its_parts() -> None:
    simulation = Simulation(64, 4, max_num_seqs=4, max_model_len=64)
    sequences = simulation.add(6, [5, 5])
    times, plan = simulation.timed_step(Plan([], []))
    assert all(part > 0 for part in times)
    simulation.timed_step(plan)
    assert [s.num_output_tokens for s in sequences] == [1, 1]
