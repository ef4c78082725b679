"""Finished rows that survive whoever finished them."""

from __future__ import annotations

import pytest

from jaxpaged.errors import ConfigError
from jaxpaged.integrations.journal import Journal

JOB = {"model": "tiny", "sampling_params": {"max_tokens": 4}}


def test_rows_are_seen_by_all_workers_and_by_the_next_job(tmp_path):
    first, second = Journal(tmp_path, JOB), Journal(tmp_path, JOB)
    first.finish("a", {"text": "A"})
    assert second.finished(["a", "b"]) == {"a": {"text": "A"}}
    second.finish("b", {"text": "B\n"})
    first.finish("c", {"text": "C"})
    for journal in (first, second, Journal(tmp_path, JOB)):
        assert journal.finished(["a", "b", "c", "d"]) == {"a": {"text": "A"}, "b": {"text": "B\n"}, "c": {"text": "C"}}


def test_a_line_cut_off_by_a_kill_is_no_row_and_one_still_being_written_is_read_once_it_is_whole(tmp_path):
    writer, reader = Journal(tmp_path, JOB), Journal(tmp_path, JOB)
    writer.finish("a", {"text": "A"})
    (path,) = tmp_path.glob("rows-*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + b'["b", {"te')
    assert reader.finished(["a", "b"]).keys() == {"a"}
    path.write_bytes(whole + b'["b", {"text": "B"}]\n')
    assert reader.finished(["a", "b"]).keys() == {"a", "b"}


def test_another_jobs_rows_are_refused(tmp_path):
    Journal(tmp_path, JOB).finish("a", {})
    with pytest.raises(ConfigError, match=r"rows of another job: model was 'tiny' and is 'big'; choose another folder"):
        Journal(tmp_path, JOB | {"model": "big"})
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["journ", "rows-"]
