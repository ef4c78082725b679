"""One of several processes that run a model together: python process.py ADDRESS NUM ID MODEL DEVICES [LINGER].

STAGES in the environment says in how many pipeline stages it lies. The leader answers greedily, prints its tokens and,
with LINGER, goes on until it is killed.
"""

from __future__ import annotations

import json
import os
import sys

import jax

address, num, process, model, devices, *linger = sys.argv[1:]
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
stages = int(os.environ.get("STAGES", 1))
sizes = {"pipeline_parallel_size": stages, "tensor_parallel_size": len(jax.devices()) // stages}
llm = LLM(model, warmup=False, **sizes, **SETTINGS)
told = {"read": BYTES_READ.total, "stored": open_checkpoint(model).nbytes}
if distributed.is_leader():
    outputs = llm.generate(PROMPTS, [GREEDY, EDITED, DRAWN], use_tqdm=False)
    if stages > 1:
        of = llm.engine.runner.functions
        made = {key for key in llm.engine.runner._compiler._functions if key[0] == "move"}
        told["moves"] = len(made), len(made - {of._links.key(*moved) for moved in of._moved()})
    told["tokens"] = [[list(c.token_ids) for c in o.outputs] for o in outputs]
    llm.engine.sleep()
    llm.engine.wake_up()
    told["again"] = [list(c.token_ids) for o in llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False) for c in o.outputs]
    print(json.dumps(told), flush=True)
    while linger == ["steps"]:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    if linger:
        sys.stdin.read()
else:
    print(json.dumps(told), flush=True)
    llm.follow()
    print("the leader is done", flush=True)
