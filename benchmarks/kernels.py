"""Times the attention kernels: how near a shape comes to a copy or a matmul of the same run, and how others do on it.

    python benchmarks/kernels.py --output benchmarks/results/kernels.jsonl

Decode is counted in the bytes of keys and values that it must read, over the bytes a second of a device-to-device copy;
prompts in the operations of their two products, over those a second of a square bfloat16 matmul; a mix in the time that
both would take. A kernel whose numbers are not the reference's gets no time, and neither does another's.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rivals
from measure import host

from jaxpaged.kernels import trial
from jaxpaged.kernels.tiles import current_device
from jaxpaged.kernels.trial import Run, Shape, decode_shape, prompt_shape
from jaxpaged.model import sampling

MHA = {"kv_heads": 32}
SHAPES = [
    decode_shape(64, 2048),
    prompt_shape(1, 8192),
    Shape((1,) * 64 + (1024,) * 2, (2048,) * 64 + (4096,) * 2),
    decode_shape(8, 8192),
    decode_shape(1, 131072),
    decode_shape(256, 512),
    decode_shape(64, 2048, page_size=64),
    prompt_shape(1, 8192, page_size=64),
    prompt_shape(8, 1024),
    decode_shape(1, 8192),
    decode_shape(64, 2048, dtype="int8"),
    decode_shape(32, 2048, **MHA),
    prompt_shape(1, 8192, **MHA),
    decode_shape(256, 512, page_size=64),
    decode_shape(1, 131072, page_size=64),
    decode_shape(64, 2048, dtype="float8_e4m3fn"),
]
SMALL: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 16}
SMALL_SHAPES = [decode_shape(3, 20, **SMALL), prompt_shape(1, 40, **SMALL), Shape((1, 5), (30, 9), **SMALL)]


class Rates(NamedTuple):
    """What the device does at best, measured beside everything else."""

    copy_bytes_per_s: float
    matmul_flop_per_s: float


def main() -> None:
    """Measure, print and append."""
    args = _arguments()
    start = time.monotonic()
    shared = host() | {"benchmark": "kernels"}
    sizes = (8, 128) if args.small else (1024, 8192)
    rates = Rates(trial.copy_rate(sizes[0]), trial.matmul_rate(sizes[1]))
    print(f"copy {rates.copy_bytes_per_s / 1e9:,.1f} GB/s, matmul {rates.matmul_flop_per_s / 1e12:,.3f} TFLOP/s")
    for row in _rows(args, rates, start + args.budget_seconds):
        print(_line(row), flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a") as file:
                file.write(json.dumps(shared | rates._asdict() | row) + "\n")


def _rows(args: Namespace, rates: Rates, deadline: float) -> Iterator[dict[str, Any]]:
    yield sampling_row(*(3, 500) if args.small else (64, 128256), rates)
    for shape in SMALL_SHAPES if args.small else SHAPES:
        if time.monotonic() > deadline:
            yield described(shape) | {"not_measured": f"the budget of {args.budget_seconds:.0f} s was spent"}
        else:
            yield attention_row(shape, rates)


def attention_row(shape: Shape, rates: Rates) -> dict[str, Any]:
    """Our backends and everybody else on one shape."""
    inputs = trial.make_inputs(shape)
    ours = {name: trial.chain(shape, inputs, backend=name) for name in _backends()}
    others, reasons = rivals.available(shape, inputs)
    made = trial.first_runs(ours | others)
    want = trial.expected(shape, inputs)
    right: dict[str, Run] = {}
    errors: dict[str, float] = {}
    for name, out in made.items():
        if isinstance(out, Exception):
            reasons[name] = rivals.told(out)
            continue
        errors[name] = trial.error(out[0], want)
        if errors[name] < trial.MAX_ERROR:
            right[name] = (ours | others)[name]
        else:
            reasons[name] = f"wrong: its error is {errors[name]:.3g}, and {trial.MAX_ERROR} is allowed"
    made.clear()
    calls = trial.num_calls(shape, inputs)
    seconds = {name: taken / calls for name, taken in trial.medians(right).items()}
    row = described(shape) | {"layers_in_chain": calls}
    timed = [name for name in ours if name in seconds]
    row["ours"] = {n: _achieved(shape, seconds[n], rates) | {"error": round(errors[n], 5)} for n in timed}
    if "auto" in seconds:
        row["others"] = {
            n: {"microseconds": round(seconds[n] * 1e6, 2), "time_over_ours": round(seconds[n] / seconds["auto"], 3)}
            for n in others
            if n in seconds
        }
    return row | ({"not_run": reasons} if reasons else {})


def sampling_row(rows: int, vocab: int, rates: Rates) -> dict[str, Any]:
    """Top-k, top-p and min-p sampling of a step's logits, counted in one reading of them."""
    logits = jax.random.normal(jax.random.key(0), (rows, vocab), jnp.float32) * 3
    each = np.arange(rows)
    inputs = sampling.SamplingInputs(
        temperature=jnp.full(rows, 0.8, jnp.float32),
        top_k=jnp.full(rows, 50, jnp.int32),
        top_p=jnp.full(rows, 0.9, jnp.float32),
        min_p=jnp.full(rows, 0.01, jnp.float32),
        seeds=jnp.asarray(np.stack([each, each], 1).astype(np.uint32)),
        positions=jnp.asarray(each.astype(np.int32)),
    )
    run = trial.repeated(jax.jit(lambda x, i: sampling.sample(x, i).tokens), logits, inputs)
    tokens = np.asarray(run(1))
    best = np.sort(np.asarray(logits), 1)[:, -50]
    if not (np.asarray(logits)[each, tokens] >= best).all():
        return {"op": "sampling", "rows": rows, "vocab": vocab, "not_run": "wrong: a token beyond the 50 likeliest"}
    seconds = trial.medians({"ours": run})["ours"]
    rate = logits.nbytes / seconds
    row = {"op": "sampling", "rows": rows, "vocab": vocab, "microseconds": round(seconds * 1e6, 2)}
    return row | {"bytes_per_s": rate, "of_copy": round(rate / rates.copy_bytes_per_s, 4)}


def described(shape: Shape) -> dict[str, Any]:
    """The shape in a row's words; equal lengths are told once."""
    facts = shape._asdict()
    lens = list(zip(facts.pop("q_lens"), facts.pop("kv_lens"), strict=True))
    counts = {pair: lens.count(pair) for pair in lens}
    sequences = [{"count": n, "new": new, "context": context} for (new, context), n in counts.items()]
    return {"op": {"ragged": "prompts"}.get(shape.kind, shape.kind), "sequences": sequences, **facts}


def _achieved(shape: Shape, seconds: float, rates: Rates) -> dict[str, Any]:
    row: dict[str, Any] = {"microseconds": round(seconds * 1e6, 2)}
    if shape.kind == "decode":
        rate = shape.decode_bytes / seconds
        return row | {"bytes_per_s": rate, "of_copy": round(rate / rates.copy_bytes_per_s, 4)}
    if shape.kind == "ragged":
        rate = shape.chunk_flops / seconds
        return row | {"flop_per_s": rate, "of_matmul": round(rate / rates.matmul_flop_per_s, 4)}
    return row | {"of_both": round(shape.floor(*rates) / seconds, 4)}


def _backends() -> list[str]:
    """auto is what the engine takes; the others are there to see whether it chooses well."""
    device = current_device()
    if device.platform != "gpu":
        return ["auto"]
    return ["auto", "triton", "mosaic"] if device.capability == 9.0 else ["auto", "triton"]


def _line(row: dict[str, Any]) -> str:
    what = " + ".join(f"{s['count']}x{s['new']}of{s['context']}" for s in row.get("sequences", ()))
    facts = " ".join(str(row[k]) for k in ("page_size", "kv_heads", "dtype", "rows", "vocab") if k in row)
    parts = [f"{row['op']:9}{what} ({facts})"]
    for name, told in ({"ours": row} if "microseconds" in row else row.get("ours", {})).items():
        share = next((f"{k} {told[k]:.3f}" for k in ("of_copy", "of_matmul", "of_both") if k in told), "")
        parts.append(f"{name} {told['microseconds']} us {share}")
    parts += [f"{name} x{told['time_over_ours']}" for name, told in row.get("others", {}).items()]
    parts += [str(row[key]) for key in ("not_run", "not_measured") if key in row]
    return "  ".join(parts)


def _arguments() -> Namespace:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget-seconds", type=float, default=600, help="begin no shape after (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the command without a GPU")
    parser.add_argument("--output", type=Path, help="append rows to this file of JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
