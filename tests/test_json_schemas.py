"""Seeded schemas like public ones: most are served, each served one is kept to, the others are refused and told why."""

from __future__ import annotations

import json_answers
import json_schemas
import jsonschema
import pytest
from real_model import smollm2_gguf
from running_server import running
from tiny_chat_model import write_chat_model
from tiny_vocabularies import byte_level_metadata

from jaxpaged.convert.gguf_reader import gguf_metadata
from jaxpaged.engine.tokenizer import load_tokenizer


def check(llm, count):
    schemas = json_schemas.schemas(count)
    outcomes = json_answers.ask(llm, schemas)
    served = [outcome for outcome in outcomes if outcome.refused is None]
    assert len(served) >= 0.85 * count
    assert [(o.problem, o.text) for o in served if o.problem is not None] == []
    assert {outcome.finish_reason for outcome in served} == {"stop"}
    assert all(
        o.refused.startswith("structured_outputs cannot be compiled: ") for o in outcomes if o.refused is not None
    )


def test_answers_of_a_random_model_are_valid():
    tokenizer = load_tokenizer(byte_level_metadata())
    check(json_answers.tiny_llm(tokenizer, max_num_seqs=8, max_num_batched_tokens=8, num_pages=385), 10)


@pytest.mark.slow
@pytest.mark.long
def test_answers_over_a_real_vocabulary_are_valid():
    tokenizer = load_tokenizer(gguf_metadata(smollm2_gguf()))
    check(json_answers.tiny_llm(tokenizer, max_num_seqs=32, num_pages=8193), 200)


@pytest.mark.slow
def test_the_server_takes_what_the_engine_takes_and_the_rest_is_the_clients_fault(tmp_path):
    with running(write_chat_model(tmp_path / "model")) as server:
        answers = [
            server.post("/v1/completions", prompt="ban", max_tokens=1, structured_outputs={"json": schema})
            for schema in json_schemas.schemas(150)
        ]
    assert sum(answer.status_code == 200 for answer in answers) >= 0.85 * len(answers)
    for answer in answers:
        if answer.status_code != 200:
            assert answer.status_code == 400, answer.text
            assert "structured_outputs cannot be compiled: " in answer.json()["error"]["message"]


def test_a_seed_gives_the_same_schemas_again_and_they_are_schemas():
    made = json_schemas.schemas(50, seed=3)
    assert made == json_schemas.schemas(60, seed=3)[:50] and made != json_schemas.schemas(50, seed=4)
    for schema in made:
        jsonschema.Draft202012Validator.check_schema(schema)
