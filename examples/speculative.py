"""Tokens guessed ahead and checked together: fewer steps, the same tokens. From the text, or by your own function.

`python examples/speculative.py [MODEL]`
"""

from __future__ import annotations

from collections.abc import Sequence

from any_model import open_llm

from jaxpaged import LLM, SamplingParams

TEXT = "The quick brown fox jumps over the lazy dog, and the lazy dog does not look up."
QUESTIONS = [f"Repeat this text word for word: {TEXT}", f"Write this text in capital letters: {TEXT}"]
PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=64)
KNOWN: list[Sequence[int]] = []


def as_before(token_ids: Sequence[int], count: int) -> Sequence[int]:
    """What came last time: a training loop that samples the same prompts again knows it from the last epoch."""
    begin = len(token_ids)
    return next((known[begin : begin + count] for known in KNOWN if tuple(known[:begin]) == tuple(token_ids)), ())


def ask(name: str, llm: LLM) -> list[list[int]]:
    """The answers' tokens; says how many steps they took."""
    outputs = llm.chat([[{"role": "user", "content": q}] for q in QUESTIONS], PARAMS, use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    KNOWN[:] = [(output.prompt_token_ids or []) + answer for output, answer in zip(outputs, answers, strict=True)]
    stats = llm.engine.stats()
    came_true = f", {stats.num_accepted_tokens} of {stats.num_drafted_tokens} guesses came true"
    print(f"{name}: {sum(map(len, answers))} tokens in {stats.num_steps} steps" + came_true * (stats.num_drafts > 0))
    return answers


def main() -> None:
    """Ask without guesses, with guesses from the text, and with last time's answers as guesses."""
    size = {"max_num_seqs": 2, "num_pages": 96, "max_model_len": 256}
    want = ask("one by one", open_llm(**size))
    for name, method in (("from the text", "ngram"), ("as before", as_before)):
        got = ask(name, open_llm(speculative_config={"method": method}, **size))
        print("  the same tokens" if got == want else "  other tokens: rounding may decide between equals")


if __name__ == "__main__":
    main()
