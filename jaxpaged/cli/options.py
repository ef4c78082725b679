"""Flags made from the settings themselves: a field's name, type and default, and its line in the class's docstring."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from jaxpaged.config import PARALLEL_SIZES, EngineConfig
from jaxpaged.errors import ConfigError
from jaxpaged.lora_request import LoRARequest
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.settings import Settings
from jaxpaged.speculative_config import SpeculativeConfig

ALIASES = {
    "memory_utilization": "--gpu-memory-utilization",
    "page_size": "--block-size",
    "cache_dtype": "--kv-cache-dtype",
    "quantization": "-q",
    "max_num_queued_requests": "--max-num-queued-reqs",
    "tensor_parallel_size": "-tp",
    "data_parallel_size": "-dp",
    "pipeline_parallel_size": "-pp",
    "speculative_config": "-sc",
}
"""What vLLM calls the same flag."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float", "half")

INSTEAD = {
    "--model": "the model stands first, without a flag",
    "--trust-remote-code": "a checkpoint's own code is never run; leave it out",
    "--enforce-eager": "every step is compiled; leave it out",
    "--enable-auto-tool-choice": "tools are always served; leave it out",
    "--enable-chunked-prefill": "prompts are always computed in chunks; leave it out",
    "--disable-log-requests": "requests are logged with --enable-log-requests only; leave it out",
    "--disable-log-stats": "an idle server logs nothing; leave it out",
    "--swap-space": "pages are kept on the host with --host-cache-gb",
    "--load-format": "the format is told by the files; leave it out",
    "--max-cpu-loras": "every adapter that is known stays in the host's memory; leave it out",
    "--fully-sharded-loras": "factors are always cut as their weights are; leave it out",
    "--root-path": "it is served below any path; have the proxy take the path off",
}
"""vLLM's flags that people bring along, and what to do without them."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}

NO_FLAGS = {
    "detokenize",
    "logit_bias",
    "logits_processor",
    "structured_outputs",
}  # of no use in a terminal; `seed` is the engine's


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how it runs."""
    parser.add_argument("model", help="a Hugging Face, native or Orbax folder, a .gguf file or a hub id")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--tokenizer", default=argparse.SUPPRESS, help="a folder with another tokenizer than the model's"
    )
    group.add_argument(
        "--dtype",
        default=argparse.SUPPRESS,
        choices=DTYPES,
        help="of the weights (default: auto, as in the checkpoint)",
    )
    add_fields(group, EngineConfig, fields(EngineConfig))


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Which of several processes this is."""
    group = parser.add_argument_group(
        "processes", "one model over the devices of several processes; the same command on each, but for --process-id"
    )
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="where process 0 listens for the others")
    group.add_argument("--num-processes", type=int, metavar="INT", help="how many processes there are")
    group.add_argument("--process-id", type=int, metavar="INT", help="which one this is; 0 leads, the others follow")
    group.add_argument(
        "--distributed", action="store_true", help="what is not given is detected: SLURM, Open MPI, Kubernetes"
    )


def join_processes(args: argparse.Namespace) -> bool:
    """Join the others, if there are any; whether this process leads. Raises ConfigError."""
    given = (args.coordinator_address, args.num_processes, args.process_id)
    if given == (None, None, None) and not args.distributed:
        return True
    if None in given and not args.distributed:
        flags = ("--coordinator-address", "--num-processes", "--process-id")
        missing = [flag for flag, value in zip(flags, given, strict=True) if value is None]
        raise ConfigError(f"{', '.join(missing)} not given; give all 3, or --distributed to have the rest detected")
    from jaxpaged import distributed

    distributed.start(*given)
    sizes = {name: getattr(args, name, 1) for name in PARALLEL_SIZES}
    if (size := math.prod(sizes.values())) < distributed.num_processes():
        raise ConfigError(
            f"tensor_parallel_size is {sizes['tensor_parallel_size']}, which with the other sizes makes {size} "
            f"device(s), but there are {distributed.num_processes()} processes; raise it, or pipeline_parallel_size, "
            "until there are as many as all have together"
        )
    return distributed.is_leader()


def add_lora_modules(group: Any) -> None:
    """Adapters to serve, by name."""
    group.add_argument(
        "--lora-modules",
        nargs="+",
        type=_lora_module,
        default=[],
        metavar="NAME=PATH",
        help="adapters, each a folder as PEFT saves it, for requests whose `model` is NAME; with --enable-lora",
    )


def lora_modules(args: argparse.Namespace) -> list[LoRARequest]:
    """Those adapters, known to be there. Raises ConfigError and CheckpointError: loading the model takes long."""
    from jaxpaged.convert.checkpoint import locate

    modules: list[tuple[str, str]] = args.lora_modules
    names = [name for name, _ in modules]
    if modules and not getattr(args, "enable_lora", False):
        raise ConfigError(f"--lora-modules names {', '.join(names)} but --enable-lora is not given; give it")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--lora-modules names {', '.join(sorted(twice))} more than once; give each its own name")
    for _, path in modules:
        locate(path)
    return [LoRARequest(name, number, path) for number, (name, path) in enumerate(modules, 1)]


def _lora_module(text: str) -> tuple[str, str]:
    """NAME=PATH, or vLLM's JSON of the same."""
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r:.80} is no JSON: {error}") from None
        name, path = given.get("name"), given.get("path")
    else:
        name, _, path = text.partition("=")
    if not (isinstance(name, str) and name and isinstance(path, str) and path):
        raise argparse.ArgumentTypeError(f"{text!r:.80} names no adapter; write NAME=PATH")
    return name, path


def add_lora_path(parser: argparse.ArgumentParser) -> None:
    """One adapter for all that is asked."""
    parser.add_argument("--lora-path", metavar="PATH", help="answer with this adapter, a folder as PEFT saves it")


def lora_options(args: argparse.Namespace) -> dict[str, Any]:
    """What of LLM's keyword arguments the adapter of --lora-path takes."""
    return {} if args.lora_path is None else {"enable_lora": True, "max_loras": 1}


def lora_request(args: argparse.Namespace) -> LoRARequest | None:
    """The adapter of --lora-path, known to be there. Raises CheckpointError: loading the model takes long."""
    from jaxpaged.convert.checkpoint import locate

    return None if args.lora_path is None else LoRARequest("adapter", 1, locate(args.lora_path))


def add_sampling_arguments(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """How tokens are chosen. What belongs to the command itself is left out."""
    wanted = [f for f in _sampling_fields() if f.name not in leave_out]
    add_fields(parser.add_argument_group("sampling"), SamplingParams, wanted)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of LLM's keyword arguments; the rest stays at its defaults."""
    return _given(args, ["tokenizer", "dtype", *(f.name for f in fields(EngineConfig))])


def sampling_params(args: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """The parameters given, the command's own defaults, then SamplingParams'. Raises RequestError."""
    return SamplingParams(**(defaults | _given(args, [f.name for f in _sampling_fields()])))


def field_help(settings: type[Settings]) -> dict[str, str]:
    """Field -> its line in the docstring's table."""
    return dict(re.findall(r"^    (\w+) {2,}(\S.*)$", settings.__doc__ or "", re.MULTILINE))


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _sampling_fields() -> list[Field[Any]]:
    return [f for f in fields(SamplingParams) if f.name not in NO_FLAGS | {"seed"}]


def add_fields(group: Any, settings: type[Settings], wanted: Sequence[Field[Any]]) -> None:
    """A flag for each of these fields of the settings."""
    hints, helps = typing.get_type_hints(settings), field_help(settings)
    for field in wanted:
        flags = ["--" + field.name.replace("_", "-")]
        if field.name in ALIASES:
            flags.append(ALIASES[field.name])
        default = "" if field.default is None else f" (default: {field.default})"
        text = (helps.get(field.name, "") + default).replace("%", "%%")
        group.add_argument(*flags, dest=field.name, default=argparse.SUPPRESS, help=text, **_kind(hints[field.name]))


def _kind(hint: Any) -> dict[str, Any]:
    """argparse's keywords for a field's type; a sequence is a flag that may be given several times."""
    options = [h for h in typing.get_args(hint) if h is not types.NoneType] if _is_union(hint) else [hint]
    for option in options:
        if typing.get_origin(option) is Sequence:
            (element,) = typing.get_args(option)
            return {"action": "append", "type": element, "metavar": element.__name__.upper()}
    (kind, *_) = options
    if kind is SpeculativeConfig:
        return {"type": _speculative, "metavar": "JSON"}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    return {"type": whole if kind is int else kind, "metavar": {int: "INT", float: "FLOAT"}.get(kind, "TEXT")}


def _speculative(text: str) -> SpeculativeConfig:
    """The settings that a JSON object names."""
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("it must be an object")
        return SpeculativeConfig(**given)
    except (ValueError, ConfigError) as error:
        example = '{"method": "ngram", "num_speculative_tokens": 8}'
        raise argparse.ArgumentTypeError(f"{text!r:.80}: {error}; such as {example}") from None


def whole(text: str) -> int:
    """A whole number, as 8192, 8K (of 1,024) or 8k (of 1,000), as vLLM takes them."""
    found = re.fullmatch(r"([+-]?[\d_]+|\d+\.\d+(?=[kmg]))([kmgKMG]?)", text.strip())
    try:
        number = float(found[1]) if found and "." in found[1] else int(found[1] if found else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    return int(number * _UNITS[found[2] if found else ""])


def unknown_flags(given: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What to say of arguments that a command does not take."""
    name = given[0].partition("=")[0]
    if name in INSTEAD:
        return f"there is no {name}: {INSTEAD[name]}"
    close = difflib.get_close_matches(name, parser._option_string_actions, n=1, cutoff=0.75)
    return f"unrecognized arguments: {' '.join(given)}" + (f"; did you mean {close[0]}?" if close else "")


def chat_template(asked: str | None) -> str | None:
    """The template of `--chat-template`: a file's, or the text itself. Raises ConfigError."""
    if asked is None:
        return None
    from jaxpaged.engine.chat_template import fault_of

    is_text = "{{" in asked or "{%" in asked
    try:
        text = asked if is_text else Path(asked).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template is {asked!r:.80}, which cannot be read: {error}; name a file") from None
    if fault := fault_of(text):
        raise ConfigError(f"--chat-template is no template: {fault}")
    return text


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
