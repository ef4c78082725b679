"""One of several processes that train and answer in turn: python training_process.py ADDRESS NUM ID.

All run the same lines, but that the leader alone asks while the others follow. Each prints what it was told.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpaged import LLM, SamplingParams, distributed
from jaxpaged.errors import ConfigError
from jaxpaged.model.params import Params, dummy_params, map_specs
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

_NORM = Norm("rms", 1e-5)
# One kv head, so that on two devices the engine has copies of the weights of heads, and the arrays given of all others.
_BLOCK = Block(Attention(4, 1, 8, 8**-0.5, Rope(1e4, 8)), Mlp(24, "silu"), _NORM)
SPEC = Decoder(40, 16, 64, (_BLOCK,), _NORM, 16, tied_head=False)
SETTINGS: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "num_pages": 64, "page_size": 4}
PROMPTS = [np.random.default_rng(i).integers(0, 40, 5 + 3 * i).tolist() for i in range(2)]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def weights(seed: int, spec: Decoder = SPEC) -> Params:
    tripled: Params = jax.tree.map(lambda w: w * 3, dummy_params(spec, seed=seed))
    return tripled


def trained(params: Params) -> Params:
    after: Params = jax.tree.map(lambda w: w * 1.5, params)
    return after


def bytes_of(arrays: list[jax.Array]) -> int:
    """In this process's memory; an array and its shards may share some."""
    shards = [shard.data for array in arrays for shard in array.addressable_shards]
    return sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())


def held() -> int:
    gc.collect()
    return bytes_of(jax.live_arrays())


def num_arrays() -> int:
    gc.collect()
    return len(jax.live_arrays())


def main(address: str, num: str, process: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    distributed.start(address, int(num), int(process))
    mesh = Mesh(np.asarray(jax.devices()), ("model",))
    placement = Placement(mesh)
    cut = map_specs(lambda path, leaf: placement.sharding(*leaf.axes), SPEC)
    make = jax.jit(weights, out_shardings=cut)
    train = jax.jit(trained, donate_argnums=0, out_shardings=cut)
    leads = distributed.is_leader()
    told: dict[str, Any] = {}

    def turn(name: str, ask: Callable[[], Any]) -> None:
        """What the leader asks while the others follow, and what these are told then."""
        told[name] = ask() if leads else llm.follow()
        gc.collect()  # the leader's: what it has let go of the others learn when they are released
        llm.release()

    def answers() -> Any:
        return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]

    def refusal(call: Callable[[], object]) -> str:
        try:
            call()
        except ConfigError as error:
            return str(error)
        return "nothing was refused"

    llm = LLM((SPEC, weights(1)), mesh=mesh, warmup=False, **SETTINGS)
    engine = llm.engine
    turn("first", answers)
    params = make(2)
    engine.update_params(params)
    turn("second", answers)
    told["arrays"] = [num_arrays()]

    headless = {name: tree for name, tree in params.items() if name != "head"}
    told["refused"] = refusal(partial(engine.update_params, params if leads else headless))
    told["policy"] = [
        refusal(partial(engine.update_params, params, "wait" if leads == leader_is_wrong else "keep"))
        for leader_is_wrong in (True, False)
    ]
    turn("alone", partial(refusal, partial(engine.update_params, params)))
    turn("unchanged", answers)
    told["arrays"] += [num_arrays()]

    done = {}

    def some_steps(num: int) -> Any:
        for _ in range(num):
            done.update({o.request_id: o.outputs[0] for o in engine.step() if o.finished})
        return len(done)

    if leads:
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(str(index), prompt, GREEDY)
    turn("under way", lambda: some_steps(7))
    params, headless = train(params), {}
    told["early"] = refusal(engine.step) if leads else ""
    engine.update_params(params)
    turn("over", lambda: some_steps(20))
    told["versions"] = [done[str(index)].weight_versions for index in range(len(done))]
    turn("third", answers)

    del params
    told["owned"] = bytes_of(jax.tree.leaves(engine.params)) + SETTINGS["num_pages"] * engine.runner.page_bytes // 2
    before = held()
    turn("asleep", lambda: engine.sleep(2))
    told["freed"] = before - held()
    told["without"] = refusal(engine.wake_up)
    engine.wake_up(make(2))
    turn("woken", answers)
    engine.sleep(2)
    told["freed by all"] = before - held()
    engine.wake_up(make(1))
    engine.sleep()
    llm.release()  # when nobody follows: that is not for the next turn to hear
    turn("woken by all", lambda: engine.wake_up() or answers())
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
