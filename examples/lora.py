"""Adapters trained beside the engine that serves them: the trainer's arrays, no files, all in one batch with the model.

`python examples/lora.py [MODEL]`
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from any_model import open_llm

from jaxpaged import SamplingParams
from jaxpaged.functional import Adapter, init_adapter, with_adapter
from jaxpaged.model.params import Params
from jaxpaged.model.spec import Decoder

PROMPT = "The capital of France is"
LESSONS = {"pirate": " a fine harbour, arr!", "oracle": " hidden in the mist."}
RANK, NUM_STEPS, STEP_SIZE = 4, 40, 4e-3


def loss(adapter: Adapter, params: Params, tokens: jax.Array, spec: Decoder, start: int) -> jax.Array:
    """Mean -log p of the tokens from `start` on."""
    logprobs = jax.nn.log_softmax(spec.apply(with_adapter(params, adapter), tokens[:-1]))
    return -jnp.take_along_axis(logprobs, tokens[1:, None], 1)[start - 1 :].mean()


def main() -> None:
    """Teach each adapter its sentence, and see it answer better after half the lesson, and after all of it."""
    llm = open_llm(enable_lora=True, max_loras=2, max_lora_rank=RANK, max_num_seqs=4, num_pages=64, max_model_len=128)
    encoded = [llm.engine.encode(text, SamplingParams()) for text in (PROMPT, *(PROMPT + t for t in LESSONS.values()))]
    start, lessons = len(encoded[0]), dict(zip(LESSONS, map(jnp.asarray, encoded[1:]), strict=True))
    spec, params = llm.engine.spec, llm.engine.params
    gradient = jax.jit(jax.grad(partial(loss, spec=spec, start=start)))
    adapters = {name: init_adapter(spec, RANK, jax.random.key(i)) for i, name in enumerate(LESSONS)}

    greedy = SamplingParams(temperature=0, max_tokens=max(map(len, encoded)) - start)
    for step in range(NUM_STEPS + 1):
        if step % (NUM_STEPS // 2) == 0:
            for name, adapter in adapters.items():
                llm.update_lora(name, adapter)  # copied between two steps; nothing compiles
            print(f"after {step} steps")
            outputs = llm.generate([PROMPT] * 3, greedy, lora_request=[None, *LESSONS], use_tqdm=False)
            for name, output in zip(("model", *LESSONS), outputs, strict=True):
                print(f"  {name}: {PROMPT}{output.outputs[0].text!r}")
        for name, tokens in lessons.items():
            signs = jax.tree.map(jnp.sign, gradient(adapters[name], params, tokens))
            adapters[name] = jax.tree.map(lambda x, sign: x - STEP_SIZE * sign, adapters[name], signs)


if __name__ == "__main__":
    main()
