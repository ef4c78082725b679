"""Guessing ahead from the text: chats about paragraphs of the docs, with and without drafts in turns; a row a size.

python benchmarks/drafts.py --output benchmarks/results/drafts.jsonl
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import measure

from jaxpaged import LLM, SamplingParams
from jaxpaged.outputs import RequestOutput

ROOT = Path(__file__).parents[1]
TASKS = ("Repeat this text word for word", "Rewrite this text so that it reads better", "Summarise this text")


def main() -> None:
    """Build both engines, let them take turns, write a row for each batch size."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="chats at a time")
    parser.add_argument("--output-len", type=int, default=96, help="most tokens of an answer")
    parser.add_argument("--turns", type=int, default=3, help="timed turns of each engine")
    args = parser.parse_args()

    args.speculative_config = args.speculative_config or {"method": "ngram"}
    ahead = measure.build(args)
    args.speculative_config, config = None, args.speculative_config
    plain = measure.build(args)
    params = SamplingParams(temperature=0, max_tokens=args.output_len)
    for size in args.batch_sizes:
        chats = _chats(max(args.batch_sizes), size)
        before = ahead.engine.stats()
        ratios = []
        for turn in range(args.turns + 1):
            (seconds, want), (other_seconds, got) = (_answer(llm, chats, params) for llm in (plain, ahead))
            if turn:  # the first is to warm up
                ratios.append(_num_tokens(got) / other_seconds / (_num_tokens(want) / seconds))
        stats = ahead.engine.stats()
        equal = sum(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(got, want, strict=True))
        row = {"benchmark": "drafts"} | measure.environment(plain, args) | {"speculative_config": config}
        row |= {
            "workload": {"name": "chats about paragraphs of the docs", "num_requests": len(got), "batch_size": size},
            "output_tokens_per_s": round(_num_tokens(want) / seconds, 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "accepted_of_drafted": round(
                (stats.num_accepted_tokens - before.num_accepted_tokens)
                / (stats.num_drafted_tokens - before.num_drafted_tokens),
                3,
            ),
            "requests_with_equal_tokens": equal,
        }
        measure.write(row, args.output)


def _chats(count: int, size: int) -> list[list[list[dict[str, str]]]]:
    """`count` chats, `size` at a time."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paragraphs = [p.replace("\n", " ") for p in text.split("\n\n") if 300 < len(p) < 900 and p[0].isalpha()]
    asked = [f"{TASKS[i % len(TASKS)]}: {paragraphs[i]}" for i in range(count)]
    chats = [[{"role": "user", "content": question}] for question in asked]
    return [chats[begin : begin + size] for begin in range(0, count, size)]


def _answer(
    llm: LLM, batches: list[list[list[dict[str, str]]]], params: SamplingParams
) -> tuple[float, list[RequestOutput]]:
    start = time.perf_counter()
    outputs = [output for chats in batches for output in llm.chat(chats, params, use_tqdm=False)]
    return time.perf_counter() - start, outputs


def _num_tokens(outputs: list[RequestOutput]) -> int:
    return sum(len(output.outputs[0].token_ids) for output in outputs)


if __name__ == "__main__":
    main()
