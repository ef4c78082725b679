"""Start-up from an export against start-up by tracing: seconds to the first token, in processes of their own.

python benchmarks/startup.py --output benchmarks/results/startup.jsonl

Four starts, one after another: traced and exported, each with an empty compilation cache and with the one just filled.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path
from typing import Any

import measure

from jaxpaged import EngineConfig
from jaxpaged.cli.export import export

_START = """
import json, sys, time
began = time.perf_counter()
from jaxpaged import LLM, SamplingParams
imported = time.perf_counter()
path, settings, is_export = json.loads(sys.argv[1])
llm = LLM.from_export(path, **settings) if is_export else LLM(path, **settings)
ready = time.perf_counter()
(output,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=1, detokenize=False), use_tqdm=False)
done = time.perf_counter()
print(json.dumps({"import": imported - began, "ready": ready - imported, "first_token": done - ready,
                  "total": done - began, "num_compilations": llm.engine.stats().num_compilations,
                  "token": output.outputs[0].token_ids[0]}))
"""


def main() -> None:
    """Export, start four times, write the row."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--max-num-seqs", type=int, default=4)
    parser.add_argument("--max-num-batched-tokens", type=int, default=64)
    parser.add_argument("--num-pages", type=int, default=512)
    parser.add_argument("--output", type=Path, help="append the row to this file")
    args = parser.parse_args()
    names = ("max_num_seqs", "max_num_batched_tokens", "num_pages")
    shapes = {name: getattr(args, name) for name in names}
    row: dict[str, Any] = {"benchmark": "startup", "model": Path(measure.model_path(args)).name, "engine": shapes}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "export"
        functions, num_bytes = export(
            str(measure.model_path(args)), folder, EngineConfig(**shapes), dtype="float32", platforms=["cpu"]
        )
        row |= {"functions": functions, "export_bytes": num_bytes}
        starts = {"traced": (folder, shapes, False), "exported": (folder, {}, True)}
        for name, (path, settings, is_export) in starts.items():
            cache = Path(place) / f"cache-{name}"
            for state in ("cold", "warm"):
                with_cache = settings | {"compilation_cache_dir": str(cache)}
                row[f"{name}_{state}_seconds"] = _start(path, with_cache, is_export)
    tokens = {row[f"{name}_{state}_seconds"].pop("token") for name in starts for state in ("cold", "warm")}
    row["same_token"] = len(tokens) == 1
    measure.write(row | measure.host(), args.output)


def _start(path: Path, settings: dict[str, Any], is_export: bool) -> dict[str, Any]:
    given = json.dumps([str(path), settings, is_export])
    done = subprocess.run([sys.executable, "-c", _START, given], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in found.items()}


if __name__ == "__main__":
    main()
