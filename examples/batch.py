"""Many requests at once, each with its own parameters: `python examples/batch.py [MODEL]`.

Continuous batching: a request joins the running ones as soon as there is room and leaves when it is done. What the
prompts share is computed once.
"""

from __future__ import annotations

import time

from any_model import open_llm

from jaxpaged import SamplingParams

INSTRUCTIONS = {"role": "system", "content": "You answer with a single word, without any explanation, in lower case."}
WORDS = ["sun", "grass", "snow", "coal", "blood", "lemon", "sky", "carrot"]


def main() -> None:
    """Thirty-two requests through eight places."""
    llm = open_llm(max_num_seqs=8, max_model_len=256)
    questions = [f"What is the colour of {word}?" for word in WORDS for _ in range(4)]
    chats = [[INSTRUCTIONS, {"role": "user", "content": question}] for question in questions]
    params = [SamplingParams(temperature=0.2 * (i % 4), seed=i, max_tokens=8 + i % 8) for i in range(len(chats))]

    start = time.perf_counter()
    outputs = llm.chat(chats, params)
    seconds = time.perf_counter() - start

    for question, output in list(zip(questions, outputs, strict=True))[::4]:
        print(f"{question} {output.outputs[0].text.strip()!r}")
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    stats = llm.engine.stats()
    print(f"{len(outputs)} requests, {num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s")
    print(f"{stats.prefix_cache_hits} of {stats.prefix_cache_queries} prompt tokens came from the prefix cache")
    print(f"{stats.num_steps} steps, {stats.kv_waste:.1%} of the held KV slots were empty")


if __name__ == "__main__":
    main()
