"""`jaxpaged serve`: an OpenAI-compatible HTTP API for one model."""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxpaged.cli.answer_options import add_answer_arguments, answer_options
from jaxpaged.cli.options import (
    add_engine_arguments,
    add_lora_modules,
    add_process_arguments,
    engine_options,
    join_processes,
    lora_modules,
)
from jaxpaged.errors import ConfigError

if TYPE_CHECKING:
    from jaxpaged.server.tracing import Tracing

MAX_NUM_QUEUED = 1_024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_engine_arguments(parser)
    add_process_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, metavar="INT", help="0: any free one (default: %(default)s)")
    group.add_argument(
        "--served-model-name", nargs="+", metavar="TEXT", help="names to serve it under (default: MODEL)"
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="TEXT",
        help="what clients must send, one of several; also read from JAXPAGED_API_KEY (default: none)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="FLOAT",
        help="seconds that requests under way have after SIGTERM (default: %(default)s)",
    )
    group.add_argument(
        "--hang-timeout",
        type=float,
        default=8.0,
        metavar="FLOAT",
        help="seconds in one step after which /health says 503 (default: %(default)s)",
    )
    group.add_argument(
        "--enable-admin", action="store_true", help="serve /pause, /resume, /sleep, /wake_up, /reset_prefix_cache"
    )
    add_lora_modules(group)
    add_answer_arguments(group)
    group.add_argument(
        "--allowed-origins",
        type=_origins,
        default=(),
        metavar="JSON",
        help="whose pages may ask from a browser, as in '[\"https://example.org\"]', or '[\"*\"]' (default: none)",
    )
    group.add_argument("--ssl-certfile", type=Path, metavar="PEM", help="speak TLS with this certificate (default: no)")
    group.add_argument("--ssl-keyfile", type=Path, metavar="PEM", help="its key (default: in the certificate's file)")
    group.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send a span of each request there, as OTLP over HTTP: http://localhost:4318/v1/traces (default: none)",
    )
    group.add_argument("--enable-log-requests", action="store_true", help="a line in the log for each request")


def run(args: argparse.Namespace) -> int:
    """Load, listen, serve. Raises JaxpagedError where one of these cannot be done."""
    if not 0 <= args.port < 1 << 16:
        raise ConfigError(f"--port is {args.port:,}; it must be 0 to {(1 << 16) - 1:,}")
    try:
        from jaxpaged.server.app import App, ServerOptions
        from jaxpaged.server.serve import listen, serve, tls_files
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("jaxpaged"):
            raise
        raise ConfigError(f"{error.name} is not installed; run pip install 'jaxpaged[serve]'") from None

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("jaxpaged").setLevel(logging.INFO)
    modules = lora_modules(args)
    answers, tracing = answer_options(args), _tracing(args.otlp_traces_endpoint)
    tls = tls_files(args.ssl_certfile, args.ssl_keyfile)
    options = engine_options(args)
    if not join_processes(args):
        from jaxpaged import LLM

        options.pop("max_num_queued_requests", None)
        LLM(args.model, **options).follow()
        return 0
    found = listen(args.host, args.port)  # first: loading takes long, and a port in use is known at once
    from jaxpaged.server.async_engine import AsyncEngine

    queued = options.pop("max_num_queued_requests", MAX_NUM_QUEUED)
    engine = AsyncEngine.load(args.model, max_num_queued_requests=queued, lora_modules=modules, **options)
    keys = tuple(key for key in (*args.api_key, os.environ.get("JAXPAGED_API_KEY", "")) if key)
    app = App(
        engine,
        ServerOptions(
            models=tuple(args.served_model_name or [str(args.model)]),
            api_keys=keys,
            hang_timeout=args.hang_timeout,
            enable_admin=args.enable_admin,
            log_requests=args.enable_log_requests,
            allowed_origins=args.allowed_origins,
            tls=tls,
            **answers,
        ),
        tracing,
    )
    host, port = found.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    print(f"{app.options.models[0]}: {engine.describe()}")
    if defaults := app.options.sampling_defaults:
        told = ", ".join(f"{name} {value}" for name, value in defaults.items())
        print(f"what requests leave out is as the checkpoint says: {told}; --generation-config vllm: as OpenAI's API")
    print(
        f"listening at {'https' if tls else 'http'}://{where}:{port}{'' if keys else ', no API key needed'}", flush=True
    )
    status = serve(engine, app, found, args.shutdown_timeout)
    if tracing is not None:
        tracing.close()
    return status


def _tracing(endpoint: str | None) -> Tracing | None:
    if endpoint is None:
        return None
    try:
        from jaxpaged.server.tracing import Tracing
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("jaxpaged"):
            raise
        raise ConfigError(f"{error.name} is not installed; run pip install 'jaxpaged[otel]'") from None
    return Tracing(endpoint)


def _origins(text: str) -> tuple[str, ...]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(origin, str) and origin for origin in found):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of origins; it must be as in '[\"https://example.org\"]'"
        )
    return tuple(origin.rstrip("/") for origin in found)
