"""Minutes of mixed load on `jaxpaged serve`: does its memory grow, does it compile, are descriptors or pages lost?

python benchmarks/soak.py --minutes 10 --output benchmarks/results/soak.jsonl

Chats, completions, streams, several completions of a prompt, embeddings, faulty requests, and clients that go away at
any time, at a steady rate. Memory is the server's resident set. Its growth is a line fitted after a fifth of the time,
from when on compilations count too.
"""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import measure
import numpy as np
from served import ask, request

_FLAGS = "--port 0 --max-num-seqs 8 --max-num-batched-tokens 64 --num-pages 257 --max-model-len 256"
_WARM = 0.2  # of the time, before growth and compilations count
_TEXT = "The quick brown fox jumps over the lazy dog and says that it is so. " * 3


class Sample(NamedTuple):
    """The server at one moment."""

    seconds: float
    resident_bytes: int
    num_descriptors: int
    num_threads: int


def main() -> None:
    """Start the server, load it, write the row."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=4.0, help="requests/s that come, on average")
    parser.add_argument("--max-tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="append the row to this file")
    args = parser.parse_args()
    model = measure.model_path(args)
    command = [sys.executable, "-m", "jaxpaged", "serve", str(model), *_FLAGS.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            if server.stdout is None or not server.stdout.readline():
                raise SystemExit("the server did not start; what it said stands above")
            found = asyncio.run(_soak(server, server.stdout.readline(), args.minutes * 60, args))
        finally:
            server.terminate()
        found["exit_status"] = server.wait(60)
    row = {"benchmark": "soak", "model": model.name, "minutes": args.minutes, "rate": args.rate} | measure.host()
    measure.write(row | found, args.output)


async def _soak(server: subprocess.Popen[str], said: str, seconds: float, args: Any) -> dict[str, Any]:
    port, rng = int(said.split(":")[2].split(",")[0]), random.Random(args.seed)
    for count in range(1, 25):  # what is imported or allocated once, and embeddings' functions, in every bucket
        await asyncio.gather(*(ask(port, _request(rng, args.max_tokens)[1]) for _ in range(count)))
        await asyncio.gather(*(ask(port, request({"input": _TEXT[: 8 * count]}, "/v1/embeddings")) for _ in range(8)))
    statuses: Counter[str] = Counter()
    samples: list[Sample] = []
    under_way: set[asyncio.Task[None]] = set()

    async def one() -> None:
        kind, sent, leave_after = _request(rng, args.max_tokens)
        reply = await ask(port, sent, leave_after)
        statuses[f"{kind} {reply.status or 'left'}"] += 1

    began, next_sample, compiled = time.monotonic(), 0.0, None
    while (elapsed := time.monotonic() - began) < seconds:
        if elapsed >= next_sample:
            samples.append(_sample(server.pid, elapsed))
            next_sample += 1.0
            if compiled is None and elapsed >= seconds * _WARM:  # embeddings compile when they are first asked for
                compiled = await _metric(port, "compilations_total")
        task = asyncio.create_task(one())
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        await asyncio.sleep(rng.expovariate(args.rate))
    await asyncio.gather(*under_way)
    await asyncio.sleep(0.5)
    samples.append(_sample(server.pid, time.monotonic() - began))
    steady = [sample for sample in samples if sample.seconds >= seconds * _WARM]
    slope = np.polyfit([s.seconds for s in steady], [s.resident_bytes for s in steady], 1)[0]
    return {
        "requests": sum(statuses.values()),
        "answers": dict(sorted(statuses.items())),
        "server_errors": sum(count for name, count in statuses.items() if name.split()[-1].startswith("5")),
        "resident_bytes_first": steady[0].resident_bytes,
        "resident_bytes_last": steady[-1].resident_bytes,
        "growth_bytes_per_minute": round(float(slope) * 60),
        "descriptors_first": samples[0].num_descriptors,
        "descriptors_last": samples[-1].num_descriptors,
        "threads_first": samples[0].num_threads,
        "threads_last": samples[-1].num_threads,
        "compilations": await _metric(port, "compilations_total") - (compiled or 0),
        "pages_held_at_the_end": await _metric(port, "kv_cache_usage_perc"),
    }


def _request(rng: random.Random, max_tokens: int) -> tuple[str, bytes, float | None]:
    """What kind it is, its bytes, and the seconds after which its client goes away."""
    text = _TEXT[: rng.randint(4, len(_TEXT))]
    body: dict[str, Any] = {"max_tokens": rng.randint(1, max_tokens), "stream": rng.random() < 0.5}
    leave_after = rng.uniform(0, 1) if rng.random() < 0.15 else None
    messages = [{"role": "user", "content": text}]
    match kind := rng.choice(["chat", "completion", "several", "embedding", "fault"]):
        case "chat":
            return kind, request(body | {"messages": messages}, "/v1/chat/completions"), leave_after
        case "completion":
            return kind, request(body | {"prompt": text, "logprobs": 2}), leave_after
        case "several":
            return kind, request(body | {"prompt": [text, "x"], "n": 2, "stop": ["zz"]}), leave_after
        case "embedding":
            return kind, request({"input": text}, "/v1/embeddings"), None
    faults = ({"prompt": ""}, {"prompt": text, "temperature": -1}, {"prompt": text, "model": "other"}, {"prompt": [-1]})
    return kind, request(rng.choice(faults)), None


async def _metric(port: int, name: str) -> float:
    reply = await ask(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    found = re.search(rf"^jaxpaged:{name}{{.*}} (\S+)$", reply.body.decode(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"/metrics says nothing of {name}; it answered {reply.status}")
    return float(found[1])


def _sample(pid: int, seconds: float) -> Sample:
    process = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    resident = int(fields["VmRSS"].split()[0]) * 1024
    return Sample(seconds, resident, len(list((process / "fd").iterdir())), int(fields["Threads"]))


if __name__ == "__main__":
    main()
