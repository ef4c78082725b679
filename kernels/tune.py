"""Measures tile sizes on the GPU at hand and writes those that beat the rule to `tuned/<device>.json`.

    python -m jaxpaged.kernels.tune --budget-seconds 300

For each case (op, query heads a kv head, head size, pool) all candidates run on the first of its shapes, the fastest of
them on the others. The one with the best mean is kept if it is faster than the rule by `MARGIN` and on no shape slower.
Whoever answers wrongly or does not compile is out. A table says what was found; cases that the time does not suffice
for are named, and keep the rule.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpaged.kernels import trial
from jaxpaged.kernels.tiles import SHARED, TUNED, Device, Tiles, current_device, file_name, mosaic_shared_bytes, rule
from jaxpaged.kernels.trial import Shape, decode_shape, prompt_shape

MARGIN = 0.03  # a gain that is above what two timings of one program differ by
_FINALISTS = 4
_KV_HEADS = 8


class Case(NamedTuple):
    """What a row of the tuned file goes by."""

    op: Literal["decode", "ragged"]
    group: int
    head_dim: int
    pool: str

    @property
    def conditions(self) -> dict[str, Any]:
        """As the row says them."""
        return {"group": self.group, "head_dim": self.head_dim, "pool": self.pool}


class Candidate(NamedTuple):
    """A backend and its sizes; None leaves a size to the backend."""

    backend: str
    block_q: int | None
    block_k: int
    num_warps: int | None
    num_stages: int

    @property
    def how(self) -> dict[str, Any]:
        """The op's arguments."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @property
    def row(self) -> dict[str, Any]:
        """The same in a tuned file, where triton goes without saying."""
        return {name: value for name, value in self.how.items() if (name, value) != ("backend", "triton")}


class Choice(NamedTuple):
    """The best candidate, and its time over the rule's: the geometric mean over all shapes."""

    candidate: Candidate
    ratio: float


Measure = Callable[[Shape, Sequence[Candidate]], dict[Candidate, float]]
"""Seconds of those that compile and answer rightly."""

CASES = [
    *(Case(op, 4, 128, "bfloat16") for op in ("decode", "ragged")),
    *(Case(op, group, 128, "bfloat16") for group in (8, 1) for op in ("decode", "ragged")),
    *(Case(op, 4, 64, "bfloat16") for op in ("decode", "ragged")),
    *(Case(op, 4, 128, "int8") for op in ("decode", "ragged")),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget-seconds", type=float, default=300, help="begin no case after (default: %(default)s)")
    parser.add_argument("--cases", nargs="*", help="such as decode,4,128,bfloat16 (default: a list of common ones)")
    parser.add_argument("--output", type=Path, help="the file to write (default: the one that the kernels read)")
    parser.add_argument("--interpret", action="store_true", help="on the CPU, tiny: tries this command, tunes nothing")
    args = parser.parse_args(arguments)
    device = current_device()
    if device.platform != "gpu" and not args.interpret:
        raise SystemExit(f"tuning measures a GPU and JAX runs on {device.platform}; run it where it finds one")
    cases = CASES if args.cases is None else [_parse(text) for text in args.cases]
    deadline = time.monotonic() + args.budget_seconds
    found: dict[Case, Choice] = {}
    for case in cases:
        if time.monotonic() > deadline:
            print(f"{_name(case)}  no time left; the rule stays")
            continue
        start = time.monotonic()
        choice = tune(case, device, interpret=args.interpret, deadline=deadline)
        took = f"{time.monotonic() - start:.0f} s"
        if choice is None:
            print(f"{_name(case)}  the rule stays  ({took})")
            continue
        print(f"{_name(case)}  {choice.ratio:.3f} of the rule's time: {choice.candidate.row}  ({took})")
        found[case] = choice
    write(args.output or TUNED / f"{file_name(device.name)}.json", {c: f.candidate for c, f in found.items()})


def tune(case: Case, device: Device, *, interpret: bool = False, deadline: float = float("inf")) -> Choice | None:
    """What beats the rule on this device, or None."""
    sizes = rule(case.op, device, case.group, case.head_dim, jnp.dtype(case.pool).itemsize)
    ours = Candidate("triton", sizes.block_q if case.op == "ragged" else None, *sizes[1:])
    others = list(_few(candidates(case, device), interpret))
    return best(ours, others, shapes(case, small=interpret), lambda s, c: measure(s, c, interpret, deadline))


def best(ours: Candidate, others: Sequence[Candidate], shapes: Sequence[Shape], measure: Measure) -> Choice | None:
    """The fastest of `others`, if it beats `ours` by MARGIN on the whole, and is slower by as much on no shape."""
    first = measure(shapes[0], [ours, *(c for c in others if c != ours)])
    if ours not in first:
        raise RuntimeError(f"the rule's sizes fail on {shapes[0]}: {ours}")
    finalists = sorted((c for c in first if c != ours), key=first.__getitem__)[:_FINALISTS]
    times = [first, *(measure(shape, [ours, *finalists]) for shape in shapes[1:])]
    choices = []
    for candidate in finalists:
        if all(candidate in t for t in times):
            ratios = np.asarray([t[candidate] / t[ours] for t in times])
            if ratios.max() <= 1 + MARGIN:
                choices.append(Choice(candidate, float(np.exp(np.log(ratios).mean()))))
    fastest = min(choices, key=lambda choice: choice.ratio, default=None)
    return fastest if fastest is not None and fastest.ratio <= 1 - MARGIN else None


def measure(
    shape: Shape, those: Sequence[Candidate], interpret: bool, deadline: float = float("inf")
) -> dict[Candidate, float]:
    """Each candidate's seconds a layer on this machine; past the deadline no more of them are begun."""
    inputs = trial.make_inputs(shape)
    want = trial.expected(shape, inputs)
    calls = trial.num_calls(shape, inputs)
    right: dict[str, trial.Run] = {}
    for begin in range(0, len(those), 8):  # so many compile at a time
        if begin and time.monotonic() > deadline:
            break
        batch = enumerate(those[begin : begin + 8], begin)
        runs = {str(i): trial.chain(shape, inputs, **candidate.how, interpret=interpret) for i, candidate in batch}
        made = trial.first_runs(runs)
        right |= {
            name: runs[name]
            for name, out in made.items()
            if not isinstance(out, Exception) and trial.error(out[0], want) < trial.MAX_ERROR
        }
    seconds = trial.medians(right)
    return {those[int(name)]: taken / calls for name, taken in seconds.items()}


def candidates(case: Case, device: Device) -> Iterable[Candidate]:
    """Every sensible cut, likely ones first."""
    if case.op == "decode":
        for block_k, warps, stages in product((64, 128, 32), (4, 8, 2), (5, 3, 4)):
            yield Candidate("triton", None, block_k, warps, stages)
    else:
        for rows, block_k, warps, stages in product((128, 64), (64, 32, 128), (8, 4), (5, 3, 2)):
            if rows * case.head_dim < 128 * 128 or warps == 8:  # or it spills registers, compiled for an H200
                yield Candidate("triton", max(1, rows // case.group), block_k, warps, stages)
    if device.capability == 9.0 and case.pool in ("bfloat16", "float16"):
        for rows, block_k, stages in product((128, 64) if case.op == "ragged" else (0,), (128, 64), (2, 3, 4, 1)):
            sizes = Tiles(max(1, rows // case.group), block_k, num_warps=4, num_stages=stages)
            if mosaic_shared_bytes(case.op, case.group, case.head_dim, sizes) <= SHARED:
                yield Candidate("mosaic", sizes.block_q if rows else None, block_k, None, stages)


def shapes(case: Case, *, small: bool = False) -> list[Shape]:
    """What a case is measured on, the most telling first."""
    kv_heads = 1 if small else _KV_HEADS
    more: dict[str, Any] = {"heads": case.group * kv_heads, "kv_heads": kv_heads, "head_dim": case.head_dim}
    more["dtype"] = case.pool
    if small:
        return [decode_shape(2, 40, **more)] if case.op == "decode" else [prompt_shape(1, 40, **more)]
    if case.op == "decode":
        return [decode_shape(n, context, **more) for n, context in ((64, 2048), (8, 8192), (1, 65536))]
    return [prompt_shape(1, 8192, **more), prompt_shape(8, 512, **more), Shape((512,) * 2, (8192,) * 2, **more)]


def write(path: Path, found: dict[Case, Candidate]) -> None:
    """Put the rows in the file, each before the rows of other conditions; those of the same conditions go."""
    table: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}
    for case, candidate in found.items():
        kept = [row for row in table.get(case.op, []) if not row.items() >= case.conditions.items()]
        table[case.op] = [case.conditions | candidate.row, *kept]
    if not found:
        print(f"nothing beats the rule; {path} is as it was")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'"{op}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for op, rows in sorted(table.items())]
    path.write_text("{" + ",\n ".join(lines) + "}\n")
    print(f"wrote {path}")


def _few(those: Iterable[Candidate], interpret: bool) -> Iterable[Candidate]:
    """The interpreter shows that things run; one of each backend will do."""
    return list(those)[1:2] if interpret else those


def _parse(text: str) -> Case:
    op, group, head_dim, pool = text.split(",")
    if op not in ("decode", "ragged"):
        raise SystemExit(f"no op {op!r} in {text!r}; a case is decode or ragged, then heads a group, head size, pool")
    return Case("decode" if op == "decode" else "ragged", int(group), int(head_dim), pool)


def _name(case: Case) -> str:
    return f"{case.op:7}group {case.group:<3}head {case.head_dim:<4}{case.pool:9}"


if __name__ == "__main__":
    main()
