"""`jaxpaged COMMAND`, one of `cli.commands`. Failures are one line `error: ...`, and exit status 2; 130 after Ctrl-C.

Whatever takes long to import waits for `main`: numpy and jax fail in ways of their own where Ctrl-C meets them halfway,
so until they are there it ends the process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn


def main(argv: list[str] | None = None) -> int:
    """Run one command and give its exit status. JAXPAGED_DEBUG=1 shows the traceback of a failure."""
    try:
        command = _imported(sys.argv[1:] if argv is None else argv)
        return int(command())
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("JAXPAGED_DEBUG"):
            raise
        print(f"error: {_explain(error)}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2


def _imported(argv: list[str]) -> Callable[[], Any]:
    """The command, once nothing is left to import; Ctrl-C ends the process until then."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where it is ignored, as in a shell's background
        try:
            signal.signal(signal.SIGINT, _leave)
        except ValueError:  # this is no main thread, and that alone is interrupted
            before = None
    try:
        from jaxpaged.cli.commands import chosen

        return chosen(argv)
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def _leave(*_: object) -> NoReturn:
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def _explain(error: BaseException) -> str:
    from jaxpaged.errors import JaxpagedError

    match error:
        case KeyboardInterrupt():
            return "interrupted"
        case JaxpagedError():
            return str(error)
        case OSError(filename=str(name), strerror=reason):
            return f"{name}: {reason}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}; JAXPAGED_DEBUG=1 shows where"


if __name__ == "__main__":
    sys.exit(main())
