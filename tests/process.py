"""One of several processes that run a model together: python process.py ADDRESS NUM ID MODEL DEVICES MESHES [LINGER].

On each of the MESHES (JSON: a list of parallel sizes) the leader answers and prints its tokens. With LINGER it goes on
until it is killed.
"""

from __future__ import annotations

import json
import sys

import jax

address, num, process, model, devices, meshes, *linger = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(devices))

from jaxpaged import LLM, SamplingParams, distributed  # noqa: E402
from jaxpaged.convert.checkpoint import open_checkpoint  # noqa: E402
from jaxpaged.convert.stored_tensor import BYTES_READ  # noqa: E402

PROMPTS = [[5, 8, 2, 60], list(range(40)), [7] * 9]
SETTINGS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_pages": 32, "page_size": 8, "max_model_len": 96}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
EDITED = SamplingParams(temperature=0, max_tokens=8, n=2, repetition_penalty=1.3, prompt_logprobs=1)
DRAWN = SamplingParams(seed=3, top_p=0.9, max_tokens=8, allowed_token_ids=[3, 5, 8, 11])

if int(num) > 1:
    distributed.start(address, int(num), int(process))
first, *others = json.loads(meshes)
llm = None
for sizes in (first, *others):
    if llm is not None:
        llm.close()
    before = BYTES_READ.total
    llm = LLM(model, warmup=False, **SETTINGS | sizes)
    told = {"read": BYTES_READ.total - before, "stored": open_checkpoint(model).nbytes}
    if distributed.is_leader():
        outputs = llm.generate(PROMPTS, [GREEDY, EDITED, DRAWN], use_tqdm=False)
        if sizes.get("pipeline_parallel_size", 1) > 1:
            of = llm.engine.runner.functions
            made = {key for key in llm.engine.runner._compiler._functions if key[0] == "move"}
            told["moves"] = len(made), len(made - {of._links.key(*moved) for moved in of._moved()})
        told["tokens"] = [[list(c.token_ids) for c in o.outputs] for o in outputs]
        llm.engine.sleep()
        llm.engine.wake_up()
        (again,) = llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
        told["again"] = list(again.outputs[0].token_ids)
        print(json.dumps(told), flush=True)
        while linger == ["steps"]:
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        if linger:
            sys.stdin.read()
    else:
        print(json.dumps(told), flush=True)
        llm.follow()
        print("the leader is done", flush=True)
