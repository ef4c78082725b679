"""Prompts known by their beginnings, and which replica they are sent back to."""

from __future__ import annotations

import json

import pytest

from jaxpaged.integrations.prefix_routing import Affinity, chain_of


def chat(*contents, **more):
    return chain_of(json.dumps({"messages": [{"role": "user", "content": c} for c in contents]} | more).encode())


def completion(prompt, **more):
    return chain_of(json.dumps({"prompt": prompt} | more).encode())


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_a_conversations_next_turn_begins_with_the_chain_of_the_last():
    first, second = chat("one", "two"), chat("one", "two", "three")
    assert second[:2] == first
    assert common(first, chat("one", "other")) == 1
    assert common(first, chat("other", "two")) == 0


@pytest.mark.parametrize("more", [{"cache_salt": "a"}, {"tools": [{"type": "function"}]}])
def test_what_shares_no_pages_shares_no_link(more):
    assert common(chat("one"), chat("one", **more)) == 0


def test_plain_prompts_are_cut_into_full_pieces():
    text = "".join(map(str, range(400)))
    assert common(completion(text), completion(text + "more")) == len(completion(text)) == len(text) // 256
    assert common(completion(text), completion(text[:300] + "x" * 900)) == 1
    ids = list(range(600))
    assert completion(ids) == completion([ids]) == completion(ids[:512])
    assert len(completion(ids)) == 2


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b"3", b'{"prompt": 3}', b'{"messages": {}}', b"\xff", b'{"prompt": "\\ud800"}']
)
def test_what_cannot_be_read_has_no_chain_and_is_left_to_the_engine(body):
    assert chain_of(body) == ()


def test_the_longest_known_beginning_decides_and_replicas_that_are_gone_are_passed_over():
    affinity = Affinity()
    affinity.given(chat("one"), "a")
    affinity.given(chat("one", "two"), "b")
    loads = {"a": 0, "b": 0, "c": 0}
    assert affinity.choose(chat("one", "two", "three"), loads) == "b"
    assert affinity.choose(chat("new"), loads) is None
    del loads["b"]
    assert affinity.choose(chat("one", "two", "three"), loads) is None
    affinity.given(chat("one"), "c")
    assert affinity.choose(chat("one", "other"), loads) == "c"


def test_a_replica_that_is_much_busier_than_the_idlest_is_passed_over():
    affinity = Affinity(max_imbalance=4)
    affinity.given(chat("one"), "a")
    assert affinity.choose(chat("one"), {"a": 5, "b": 2}) == "a"
    assert affinity.choose(chat("one"), {"a": 6, "b": 2}) is None


def test_the_least_recently_used_beginnings_are_forgotten():
    affinity = Affinity(max_links=2)
    for word in ("one", "two", "one", "three"):
        affinity.given(chat(word), "a")
    known = [affinity.choose(chat(word), {"a": 0}) for word in ("one", "two", "three")]
    assert known == ["a", None, "a"]
