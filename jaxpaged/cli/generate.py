"""`jaxpaged generate`: complete prompts from the command line, a file or standard input."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jaxpaged.cli.options import (
    add_engine_arguments,
    add_lora_path,
    add_process_arguments,
    add_sampling_arguments,
    engine_options,
    join_processes,
    lora_options,
    lora_request,
    sampling_params,
)
from jaxpaged.config import EngineConfig
from jaxpaged.errors import RequestError
from jaxpaged.outputs import Logprob, RequestOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_engine_arguments(parser)
    add_process_arguments(parser)
    add_lora_path(parser)
    parser.add_argument("prompt", nargs="*", help="prompts; none: one per line of --file or of standard input")
    parser.add_argument(
        "--file", type=Path, help="one prompt per line; a .jsonl line is a string or a list of token ids"
    )
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message to an assistant")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt, with token ids and reasons")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Complete all prompts; a single one is shown as it is written. Raises JaxpagedError."""
    prompts = _read_prompts(args)
    params, adapter = sampling_params(args), lora_request(args)

    from jaxpaged import LLM  # only here: `--help` needs no jax

    leads = join_processes(args)

    room = min(EngineConfig.max_num_seqs, len(prompts) * params.num_completions)  # few prompts need few compiled steps
    llm = LLM(args.model, **({"max_num_seqs": room} | lora_options(args) | engine_options(args)))
    if not leads:
        llm.follow()
        return 0
    if args.chat:
        prompts = [llm.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]

    if len(prompts) == 1 and params.num_completions == 1 and not args.json:
        for delta in llm.stream(prompts[0], params, lora_request=adapter):
            print(delta.outputs[0].text, end="", flush=True)
        print()
        return 0
    use_tqdm = sys.stderr.isatty()
    for output in llm.generate(prompts, params, use_tqdm=use_tqdm, lora_request=adapter):
        print(json.dumps(as_json(output), ensure_ascii=False) if args.json else _as_text(output))
    return 0


def as_json(output: RequestOutput) -> dict[str, Any]:
    """The output as plain JSON values; what is None is left out."""
    values: dict[str, Any] = _plain(output)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Logprob):
        return _plain(value._asdict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: _plain(v) for name, v in named.items() if v is not None}
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _as_text(output: RequestOutput) -> str:
    texts = [completion.text.strip("\n") for completion in output.outputs]
    return "\n".join([f"> {output.prompt or output.prompt_token_ids}", *texts, ""])


def _read_prompts(args: argparse.Namespace) -> list[Any]:
    if args.prompt and args.file:
        raise RequestError(f"{len(args.prompt)} prompts and --file {args.file} were given; give one of the two")
    if args.prompt:
        return list(args.prompt)
    text = args.file.read_text(encoding="utf-8") if args.file else sys.stdin.read()
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    is_json = args.file is not None and args.file.suffix == ".jsonl"
    prompts = [_json_prompt(line, number, args.file) if is_json else line for number, line in lines]
    if not prompts:
        raise RequestError(f"{args.file or 'standard input'} has no prompt; write at least 1 line")
    return prompts


def _json_prompt(line: str, number: int, path: Path) -> Any:
    try:
        prompt = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{path}, line {number:,} is not JSON: {error}") from error
    prompt = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)):
        return prompt
    raise RequestError(f"{path}, line {number:,} has no prompt: it must be a string, token ids or {{'prompt': ...}}")
