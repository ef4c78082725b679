"""All that a step can do, asked of one engine: copies of shared pages, edits and limits of logits, logprobs of both
kinds, beams, embeddings, chunks, draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxpaged import LLM, BeamSearchParams, RequestOutput, SamplingParams

_RNG = np.random.default_rng(0)
_PROMPTS = [_RNG.integers(0, 64, n).tolist() for n in (9, 21, 6, 13, 30, 7)]
_ASKED = [
    SamplingParams(temperature=0, max_tokens=9, n=2, logprobs=2),
    SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=1),
    SamplingParams(temperature=0.7, seed=3, max_tokens=9, top_k=20, repetition_penalty=1.3),
    SamplingParams(temperature=0, max_tokens=9, allowed_token_ids=[3, 5, 8]),
    SamplingParams(temperature=1.1, seed=4, n=3, max_tokens=9, prompt_logprobs=0, logit_bias={4: 3.0}),
    SamplingParams(temperature=0, max_tokens=9, presence_penalty=1.5),
]


def everything(llm: LLM, times: int = 1) -> tuple[list[Any], list[Any]]:
    """The tokens, and the numbers, that the engine gives; asked several times, the last ones."""
    for _ in range(times):
        outputs = llm.generate(_PROMPTS, _ASKED, use_tqdm=False)
    beams = llm.beam_search(_PROMPTS[:3], BeamSearchParams(3, max_tokens=6), use_tqdm=False)
    tokens = [[c.token_ids for c in output.outputs] for output in outputs + beams]
    found = [*map(_logprobs, outputs), *llm.embed(_PROMPTS), *llm.score(_PROMPTS)]
    assert llm.engine.stats().pages_leaked == llm.engine.stats().pages_held == 0
    return tokens, found


def _logprobs(output: RequestOutput) -> list[float]:
    """Every one that was asked for."""
    entries = [*(output.prompt_logprobs or []), *(e for c in output.outputs for e in c.logprobs or [])]
    return [entry.logprob for found in entries if found for _, entry in sorted(found.items())]
