"""How many of 500 JSON schemas are served, whether every answer is valid, and what it costs.

python benchmarks/json_answers.py --output benchmarks/results/json_answers.jsonl

The model is tiny and random, its vocabulary SmolLM2's: nothing but the grammar makes its answers JSON.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import json_schemas
import jsonschema
import measure
import numpy as np

from jaxpaged import LLM, RequestError, SamplingParams, StructuredOutputsParams
from jaxpaged.convert.gguf_reader import gguf_metadata
from jaxpaged.engine.tokenizer import Tokenizer, load_tokenizer
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope


class Outcome(NamedTuple):
    """What became of one schema: refused and why, or the text, why it ended, and what is wrong with it."""

    refused: str | None
    text: str = ""
    finish_reason: str = ""
    problem: str | None = None


def main() -> None:
    """Ask for all and write the row."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="whose vocabulary: an HF directory or a .gguf file (default: PyPI's SmolLM2)")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="append the row to this file of JSON lines")
    args = parser.parse_args()
    path = measure.model_path(args)
    tokenizer = load_tokenizer(gguf_metadata(path) if path.suffix == ".gguf" else path)
    if tokenizer is None:
        raise SystemExit(f"{path} has no tokenizer")
    llm = tiny_llm(tokenizer, max_num_seqs=32, num_pages=8193)
    made = json_schemas.schemas(args.count, args.seed)
    compiling: list[float] = []
    began = time.perf_counter()
    outcomes = ask(llm, made, compiling)
    seconds = time.perf_counter() - began
    served = [outcome for outcome in outcomes if outcome.refused is None]
    row = {"benchmark": "json_answers"} | measure.host()
    row |= {"vocabulary": path.name, "schemas": args.count, "seed": args.seed, "served": len(served)}
    row["valid"] = sum(outcome.problem is None for outcome in served)
    row["problems"] = [outcome.problem for outcome in served if outcome.problem is not None][:5]
    row["refused_because"] = dict(
        Counter(str(o.refused)[:100] for o in outcomes if o.refused is not None).most_common()
    )
    row["compile_ms"] = {f"p{p}": round(float(np.percentile(compiling, p)) * 1e3, 2) for p in (50, 99)}
    row["tokens"] = llm.engine.stats().generation_tokens
    row["tokens_per_s"] = round(row["tokens"] / seconds, 1)
    measure.write(row, args.output)


def tiny_llm(tokenizer: Tokenizer, **settings: Any) -> LLM:
    """A random model of one layer with this vocabulary."""
    norm = Norm("rms", eps=1e-5)
    attention = Attention(heads=2, kv_heads=2, head_dim=8, scale=8**-0.5, rope=Rope(theta=10_000.0, dim=8))
    block = Block(attention, Mlp(dim=16, act="silu"), norm)
    spec = Decoder(tokenizer.vocab_size, 16, 4096, (block,), norm, embed_dim=16, tied_head=True)
    return LLM((spec, dummy_params(spec)), tokenizer=tokenizer, warmup=False, **settings)


def ask(llm: LLM, schemas: list[json_schemas.Schema], compiling: list[float] | None = None) -> list[Outcome]:
    """One answer for each schema, all in one batch, those refused left out."""
    if llm.tokenizer is None:
        raise ValueError("the model needs a tokenizer")
    # Else a random model's texts, lists and numbers hardly end, and it hardly finds the `@` that a pattern wants.
    texts = {token: llm.tokenizer.token_text(token) for token in range(llm.tokenizer.vocab_size)}
    bias = {t: 4.0 for t, text in texts.items() if len(text) == 1 and text.isascii() and not text.isalpha()}
    bias |= {t: 6.0 for t, text in texts.items() if text[:1] in ('"', "}", "]")}
    refused: dict[int, str] = {}
    params: dict[int, SamplingParams] = {}
    for index, schema in enumerate(schemas):
        form = StructuredOutputsParams(json=schema)
        params[index] = SamplingParams(seed=index, max_tokens=None, logit_bias=bias, structured_outputs=form)
        began = time.perf_counter()
        try:
            llm.engine.grammar(params[index])
        except RequestError as error:
            refused[index] = str(error)
            del params[index]
        if compiling is not None:
            compiling.append(time.perf_counter() - began)
    outputs = llm.generate([[1]] * len(params), list(params.values()), use_tqdm=False)
    found = {index: output.outputs[0] for index, output in zip(params, outputs, strict=True)}
    return [
        Outcome(refused[index])
        if index in refused
        else Outcome(None, found[index].text, str(found[index].finish_reason), problem(found[index].text, schema))
        for index, schema in enumerate(schemas)
    ]


def problem(text: str, schema: json_schemas.Schema) -> str | None:
    """What is wrong with an answer; None for nothing."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}: {text[-80:]!r}"
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    return next((f"{error.message} of {error.json_path}" for error in validator.iter_errors(value)), None)


if __name__ == "__main__":
    main()
