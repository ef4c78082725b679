"""The engine under asyncio: the same tokens, and whatever goes wrong with one reader is nobody else's business."""

from __future__ import annotations

import asyncio
import time

import jax
import pytest

from jaxpaged import AsyncEngine, Engine, EngineConfig, RequestError, SamplingParams
from jaxpaged.engine.ledger import Ledger
from jaxpaged.errors import EngineDeadError, QueueFullError, TooLongError
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope
from jaxpaged.server.async_engine import NewRequest
from jaxpaged.server.inbox import Inbox

_NORM = Norm("rms", 1e-5)
_BLOCK = Block(Attention(4, 2, 8, 8**-0.5, Rope(1e4, 8)), Mlp(48, "silu"), _NORM)
SPEC = Decoder(64, 32, 96, (_BLOCK,), _NORM, 32, tied_head=False)
PARAMS = jax.tree.map(lambda w: w * 3, dummy_params(SPEC, seed=1))
PROMPTS = [[3, 1, 4], [1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9]]
LONG = SamplingParams(temperature=0, max_tokens=80)
SHORT = SamplingParams(temperature=0, max_tokens=5)


def make_engine():
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32, num_pages=64, page_size=4, warmup=False)
    return Engine(SPEC, PARAMS, config)


@pytest.fixture(scope="module")
def engine():
    """Shared by the tests that leave it healthy."""
    engine = AsyncEngine(make_engine())
    yield engine
    engine.stop()
    assert not engine._thread.is_alive()


def slowed(step):
    """Slower than the readers of a test are."""
    return lambda: (time.sleep(0.02), step())[1]


async def collect(engine, prompt, params=SHORT, **options):
    return await to_the_end(engine.generate(prompt, params, **options))


async def to_the_end(generator):
    return [output async for output in generator]


async def idle(engine):
    """Until nothing runs: the pages that are held then."""
    while (stats := await engine.stats()).num_running or stats.num_waiting:
        await asyncio.sleep(0.001)
    return stats.pages_held


def test_requests_together_get_the_tokens_they_get_alone(engine):
    async def run():
        together = await asyncio.gather(*[collect(engine, p) for p in PROMPTS])
        alone = [await collect(engine, p) for p in PROMPTS]
        return [[outputs[-1].outputs[0].token_ids for outputs in side] for side in (together, alone)]

    together, alone = asyncio.run(run())
    assert together == alone
    assert all(len(tokens) == 5 for tokens in alone)


@pytest.mark.parametrize("kind", ["delta", "final"])
def test_deltas_add_up_and_final_comes_once(engine, kind):
    outputs = asyncio.run(collect(engine, PROMPTS[0], output_kind=kind))
    assert len(outputs) == (1 if kind == "final" else 5)
    tokens = [token for output in outputs for token in output.outputs[0].token_ids]
    assert tokens == asyncio.run(collect(engine, PROMPTS[0]))[-1].outputs[0].token_ids


@pytest.mark.parametrize("way", ["closed", "cancelled"])
def test_reader_that_goes_away_frees_its_pages_within_two_steps(engine, way, monkeypatch):
    monkeypatch.setattr(engine._engine, "step", slowed(engine._engine.step))

    async def run():
        generator = engine.generate(PROMPTS[3], LONG, "leaver", output_kind="delta")
        await anext(generator)
        before = (await engine.stats()).num_steps
        if way == "closed":
            await generator.aclose()
        else:
            reader = asyncio.create_task(to_the_end(generator))
            await asyncio.sleep(0)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        held = await idle(engine)
        return held, (await engine.stats()).num_steps - before

    held, steps = asyncio.run(run())
    assert held == 0
    assert steps <= 2 + 4, "80 tokens were to come"  # a slow machine's reader may see the first of them late


def test_discarded_request_is_gone_before_the_next_step(engine):
    async def run():
        inbox = Inbox()
        await engine.submit([NewRequest("d", PROMPTS[3], LONG, "delta")], inbox)
        await inbox.get()
        engine.discard(["d"], inbox)
        return await engine.call(lambda e: (e.shards.num_running, e.stats().pages_held))

    assert asyncio.run(run()) == (0, 0)


def test_reader_cancelled_before_its_first_token_leaves_nothing(engine):
    async def run():
        for turns in range(6):
            task = asyncio.create_task(collect(engine, PROMPTS[3], LONG))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return await idle(engine), engine.num_open

    assert asyncio.run(run()) == (0, 0)


def test_refused_request_leaves_the_others_alone(engine):
    async def run():
        bad = [collect(engine, p) for p in ([], [64], [1] * 96, [-1], "text", [True])]
        good = asyncio.create_task(collect(engine, PROMPTS[0]))
        refused = await asyncio.gather(*bad, return_exceptions=True)
        return refused, await good

    refused, good = asyncio.run(run())
    assert {type(error) for error in refused} == {RequestError, TooLongError}
    assert good[-1].outputs[0].finish_reason == "length"


def test_request_whose_tokens_cannot_be_read_ends_alone(engine, monkeypatch, caplog):
    take = Ledger._take_token

    def picky(self, tracked, sequence, *rest):
        if sequence.request_id == "unlucky" and sequence.num_output_tokens == 2:
            raise KeyError("no such token")
        take(self, tracked, sequence, *rest)

    monkeypatch.setattr(Ledger, "_take_token", picky)

    async def run():
        return await asyncio.gather(collect(engine, PROMPTS[0], request_id="unlucky"), collect(engine, PROMPTS[1]))

    unlucky, lucky = (outputs[-1].outputs[0] for outputs in asyncio.run(run()))
    assert (unlucky.finish_reason, unlucky.stop_reason) == ("error", "KeyError: 'no such token'")
    assert len(unlucky.token_ids) == 2 and lucky.finish_reason == "length" and len(lucky.token_ids) == 5
    assert asyncio.run(idle(engine)) == 0
    assert "no such token" in caplog.text


def test_request_id_in_use_is_refused_and_its_owner_unharmed(engine):
    async def run():
        owner = engine.generate(PROMPTS[0], LONG, "mine")
        await anext(owner)
        with pytest.raises(RequestError, match="'mine' is in use"):
            await collect(engine, PROMPTS[1], request_id="mine")
        return (await to_the_end(owner))[-1]

    assert asyncio.run(run()).outputs[0].finish_reason == "length"


def test_group_is_queued_whole_or_not_at_all(engine):
    async def run():
        group = [NewRequest("g0", PROMPTS[0], SHORT), NewRequest("g0", PROMPTS[1], SHORT)]
        with pytest.raises(RequestError, match="in use"):
            await engine.submit(group, Inbox())
        return await idle(engine), engine.num_open

    assert asyncio.run(run()) == (0, 0)


def test_abort_ends_with_a_last_output_even_while_paused(engine):
    async def run():
        generator = engine.generate(PROMPTS[0], LONG, "a", output_kind="final")
        waiting = asyncio.create_task(anext(generator))
        while not await engine.call(lambda e: e.shards.num_running):
            await asyncio.sleep(0)
        await engine.pause()
        known = await engine.abort("a"), await engine.abort("nobody")
        last = await asyncio.wait_for(waiting, 5)
        await engine.resume()
        return known, last.outputs[0].finish_reason

    assert asyncio.run(run()) == ((True, False), "abort")


def test_paused_engine_takes_no_step_and_goes_on_with_the_same_tokens(engine):
    async def run():
        whole = (await collect(engine, PROMPTS[1], LONG))[-1].outputs[0].token_ids
        generator = engine.generate(PROMPTS[1], LONG)
        await anext(generator)
        await engine.pause()
        before = await engine.stats()
        await asyncio.sleep(0.05)
        after = await engine.stats()
        await engine.resume()
        return whole, before, after, (await to_the_end(generator))[-1].outputs[0].token_ids

    whole, before, after, resumed = asyncio.run(run())
    assert before.num_steps == after.num_steps and after.num_running == 1
    assert resumed == whole


def test_requests_outlive_the_engines_sleep(engine):
    async def run():
        whole = (await collect(engine, PROMPTS[1], LONG))[-1].outputs[0].token_ids
        generator = engine.generate(PROMPTS[1], LONG)
        await anext(generator)
        await engine.sleep()
        later = asyncio.create_task(collect(engine, PROMPTS[0]))
        aborted = asyncio.create_task(collect(engine, PROMPTS[2], LONG, request_id="bored", output_kind="final"))
        while not await engine.abort("bored"):
            await asyncio.sleep(0)
        reason = (await asyncio.wait_for(aborted, 10))[-1].outputs[0].finish_reason
        await engine.wake_up()
        return whole, (await to_the_end(generator))[-1].outputs[0].token_ids, reason, await later

    whole, resumed, reason, later = asyncio.run(run())
    assert resumed == whole and reason == "abort" and later[-1].finished


def test_idle_engine_does_not_run():
    engine = AsyncEngine(make_engine())
    asyncio.run(collect(engine, PROMPTS[0]))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    spent = time.process_time() - before
    engine.stop()
    assert spent < 0.1


def test_full_queue_refuses_at_once_and_free_seats_do_not_count():
    inner = make_engine()
    inner.step = slowed(inner.step)
    engine = AsyncEngine(inner, max_num_queued_requests=2)

    async def run():
        seated = [asyncio.create_task(collect(engine, PROMPTS[0], LONG)) for _ in range(4)]
        while (await engine.stats()).num_running < 4:
            await asyncio.sleep(0.001)
        await engine.pause()
        queued = [asyncio.create_task(collect(engine, PROMPTS[1])) for _ in range(2)]
        while engine.num_queued < 2:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFullError, match="2 requests wait, 1 more came"):
            await collect(engine, PROMPTS[2])
        with pytest.raises(RequestError, match="7 prompts came at once but 6 may run and wait"):
            await engine.submit([NewRequest(str(i), [1], SHORT) for i in range(7)], Inbox())
        await engine.resume()
        return [outputs[-1].outputs[0].finish_reason for outputs in await asyncio.gather(*seated, *queued)]

    assert asyncio.run(run()) == ["length"] * 6
    engine.stop()


def test_dead_engine_fails_every_open_request_and_says_so(caplog):
    inner = make_engine()
    inner.step = slowed(inner.step)
    engine = AsyncEngine(inner)

    def fail():
        raise ValueError("device lost")

    async def run():
        open_ones = [asyncio.create_task(collect(engine, p, LONG)) for p in PROMPTS]
        while (await engine.stats()).num_running < 4:
            await asyncio.sleep(0.001)
        inner.step = fail
        ended = await asyncio.gather(*open_ones, return_exceptions=True)
        later = await asyncio.gather(collect(engine, PROMPTS[0]), engine.stats(), return_exceptions=True)
        return ended + later

    errors = asyncio.run(run())
    assert {type(error) for error in errors} == {EngineDeadError}
    assert {str(error) for error in errors} == {"the engine failed: ValueError: device lost; start it anew"}
    assert engine.problem() == str(errors[0])
    assert "device lost" in caplog.text


def test_step_that_hangs_is_a_problem_while_it_does():
    inner = make_engine()
    engine = AsyncEngine(inner)
    step = inner.step

    def slow():
        time.sleep(0.3)
        inner.step = step
        return step()

    async def run():
        inner.step = slow
        task = asyncio.create_task(collect(engine, PROMPTS[0]))
        await asyncio.sleep(0.2)
        during = engine.problem(patience=0.1), engine.problem(patience=10)
        await task
        return during, engine.problem(patience=0.1)

    during, after = asyncio.run(run())
    assert during[0].startswith("the engine has been in one step for") and during[1] is None
    assert after is None
    engine.stop()


def test_stopped_engine_ends_what_is_open():
    inner = make_engine()
    inner.step = slowed(inner.step)
    engine = AsyncEngine(inner)

    async def run():
        async with engine:
            task = asyncio.create_task(collect(engine, PROMPTS[0], LONG))
            while not (await engine.stats()).num_running:
                await asyncio.sleep(0.001)
        with pytest.raises(EngineDeadError, match="the engine was stopped"):
            await task

    asyncio.run(run())


def test_closed_event_loop_does_not_hold_the_engine_up(engine):
    async def leave():
        await engine.submit([NewRequest("orphan", PROMPTS[0], LONG, "delta")], Inbox())

    asyncio.run(leave())
    assert asyncio.run(idle(engine)) == 0
