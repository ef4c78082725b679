"""Compiles grammars in a process of its own, to learn whether that takes too long or too much memory.

A program, run by `grammar.py`; imports nothing of ours, so that it starts in a moment. A line of JSON in, a line out:
first the tokenizer, then grammar after grammar, each answered by what is wrong with it, "" for nothing. Where one needs
too much memory the process dies, and that is an answer too.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import llguidance


def main() -> None:
    """Answer until the input ends. Arguments: the memory, in bytes, that a grammar may take."""
    made = json.loads(sys.stdin.readline())
    tokenizer = llguidance.LLTokenizer(made["tokenizer"], n_vocab=made["vocab_size"], eos_token=made["eos_token_ids"])
    limits = llguidance.LLParserLimits(**made["limits"])
    if (statm := Path("/proc/self/statm")).exists():  # elsewhere time alone is bounded
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps(""), flush=True)
    for line in sys.stdin:
        matcher = llguidance.LLMatcher(tokenizer, json.loads(line), limits=limits, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        print(json.dumps(matcher.get_error()), flush=True)


if __name__ == "__main__":
    main()
