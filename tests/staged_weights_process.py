"""One of two processes, each a pipeline stage, that take new weights: python staged_weights_process.py ADDRESS NUM ID.

The leader prints its tokens with each weights, both what they were refused.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import jax
import numpy as np
import training_process
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from training_process import GREEDY, PROMPTS, SETTINGS, trained, weights

from jaxpaged import LLM, ConfigError, distributed

SPEC = replace(training_process.SPEC, blocks=training_process.SPEC.blocks * 2)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    address, num, process = sys.argv[1:]
    distributed.start(address, int(num), int(process))
    llm = LLM((SPEC, weights(1, SPEC)), pipeline_parallel_size=2, warmup=False, **SETTINGS)
    told = {}

    def answer(name: str) -> None:
        if distributed.is_leader():
            told[name] = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
            llm.release()
        else:
            llm.follow()

    answer("first")
    llm.engine.update_params(trained(llm.engine.params))
    answer("larger")
    everywhere = NamedSharding(Mesh(np.asarray(jax.devices()), ("all",)), PartitionSpec())
    elsewhere = jax.tree.map(
        lambda w: jax.make_array_from_callback(w.shape, everywhere, lambda cut: np.ones(w.shape, w.dtype)[cut]),
        weights(1, SPEC),
    )
    try:
        llm.engine.update_params(elsewhere)
    except ConfigError as error:
        told["refused"] = str(error)
    llm.engine.update_params(weights(2, SPEC))
    answer("second")
    llm.engine.sleep(2)
    llm.engine.wake_up(weights(1, SPEC))
    answer("woken")
    print(json.dumps(told), flush=True)
