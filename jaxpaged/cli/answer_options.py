"""What the commands that answer requests to the API share: how answers are sampled and read."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jaxpaged.cli.options import chat_template
from jaxpaged.errors import ConfigError
from jaxpaged.sampling_params import SamplingParams


def add_answer_arguments(group: Any) -> None:
    """Defaults of sampling, and parsers."""
    group.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="how the model writes calls of tools: hermes, llama3_json, mistral, pythonic, qwen or qwen3_coder "
        "(default: as its chat template says)",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja template for chats, in a file or as it is (default: the checkpoint's)",
    )
    group.add_argument(
        "--reasoning-parser",
        metavar="NAME",
        help="tell thoughts apart from the answer: qwen3 where a mark opens them, deepseek_r1 where every answer "
        "begins with them (default: they are part of the answer)",
    )
    group.add_argument(
        "--generation-config",
        default="auto",
        metavar="TEXT",
        help="where sampling parameters come from that a request leaves out: auto, the model's generation_config.json; "
        "a folder with another; or vllm, none (default: %(default)s)",
    )
    group.add_argument(
        "--override-generation-config",
        default="{}",
        metavar="JSON",
        help="sampling parameters that stand before those, as in '{\"temperature\": 0.5}'",
    )
    group.add_argument(
        "--default-chat-template-kwargs",
        default="{}",
        metavar="JSON",
        help="what the template is given where a request says nothing, as in '{\"enable_thinking\": false}'",
    )


def answer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ServerOptions, and `chat_template`. Raises ConfigError; needs the extra `serve`."""
    from jaxpaged.server.chat import REASONING_PARSERS, Parsers
    from jaxpaged.server.generation_config import sampling_defaults
    from jaxpaged.server.tool_formats import FORMATS

    parsers = Parsers(args.tool_call_parser, args.reasoning_parser)
    for flag, name, known in (
        ("--tool-call-parser", parsers.tools, FORMATS),
        ("--reasoning-parser", parsers.reasoning, REASONING_PARSERS),
    ):
        if name is not None and name not in known:
            raise ConfigError(f"{flag} is {name!r}; known: {', '.join(known)}")
    overrides = _object("--override-generation-config", args.override_generation_config)
    SamplingParams(**overrides)  # or RequestError
    return {
        "chat_template": chat_template(args.chat_template),
        "parsers": parsers,
        "sampling_defaults": {**sampling_defaults(args.generation_config, args.model), **overrides},
        "template_defaults": _object("--default-chat-template-kwargs", args.default_chat_template_kwargs),
    }


def _object(flag: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{flag} is {text!r:.80}; it must be a JSON object")
    return found
