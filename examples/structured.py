"""Answers that a program can read: JSON by a schema, one of several texts, a regular expression.

`python examples/structured.py [MODEL]` (pip install 'jaxpaged[structured]')
"""

from __future__ import annotations

import json
from typing import Any

from any_model import open_llm

from jaxpaged import SamplingParams, StructuredOutputsParams

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,12}$"},
        "country": {"enum": ["France", "Japan", "Peru"]},
        "founded": {"type": "integer", "minimum": 1, "maximum": 2026},
        "capital": {"type": "boolean"},
    },
    "required": ["name", "country", "founded", "capital"],
    "additionalProperties": False,
}
FORMS = {
    "Describe a city as JSON.": StructuredOutputsParams(json=CITY, disable_any_whitespace=True),
    "Is the sky blue?": StructuredOutputsParams(choice=["yes", "no"]),
    "What time is it?": StructuredOutputsParams(regex="(0[1-9]|1[0-2]):[0-5][0-9] [ap]m"),
}


def main() -> None:
    """Ask three questions in one batch, each with a form of its own."""
    llm = open_llm(max_num_seqs=4, num_pages=96, max_model_len=256)
    params = [SamplingParams(temperature=0, max_tokens=96, structured_outputs=form) for form in FORMS.values()]
    outputs = llm.chat([[{"role": "user", "content": question}] for question in FORMS], params, use_tqdm=False)
    city, colour, hour = (output.outputs[0].text for output in outputs)
    print("city:", json.loads(city))
    print("blue:", colour)
    print("time:", hour)


if __name__ == "__main__":
    main()
