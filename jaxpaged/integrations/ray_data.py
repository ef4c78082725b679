"""A dataset through a pool of engines, on Ray Data (`jaxpaged[ray]`), finished rows kept as they finish.

    prompts = ray.data.read_parquet("prompts")  # with columns id and prompt
    generate(prompts, "Qwen/Qwen3-0.6B", SamplingParams(max_tokens=256), checkpoint="done").write_parquet("answers")

A worker that is killed loses no finished row and none is answered twice; nor is one when the whole job is run again
with the same `checkpoint`, which then goes on where it ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from jaxpaged.errors import ConfigError, RequestError
from jaxpaged.integrations.journal import Journal
from jaxpaged.llm import LLM
from jaxpaged.outputs import RequestOutput
from jaxpaged.sampling_params import SamplingParams

COLUMNS = ("generated_text", "generated_token_ids", "finish_reason", "error")
"""What `generate` adds to each row. Where a prompt cannot be served `error` says why, and the others are empty."""

Row = dict[str, Any]


def generate(
    dataset: ray.data.Dataset,
    model: str | Path,
    sampling_params: SamplingParams | None = None,
    *,
    checkpoint: str | Path,
    prompt_column: str = "prompt",
    id_column: str = "id",
    num_workers: int = 1,
    batch_size: int = 256,
    ray_remote_args: Mapping[str, Any] | None = None,
    **settings: Any,
) -> ray.data.Dataset:
    """`dataset` with `COLUMNS` added to each row; lazy, as datasets are.

    A prompt is text, token ids, or a list of chat messages; ids tell rows apart, within `checkpoint`, a folder that
    every machine sees. `num_workers` actors each load the model with `settings`, which are those of `LLM`, and take
    `batch_size` rows at a time; `ray_remote_args` are an actor's, such as {"num_gpus": 1}. Raises ConfigError.
    """
    if missing := {prompt_column, id_column} - set(dataset.columns() or ()):
        raise ConfigError(
            f"the dataset has no column {' and no '.join(sorted(missing))}; name prompt_column, id_column"
        )
    params = sampling_params or SamplingParams()
    if params.n != 1:
        raise ConfigError(
            f"sampling_params.n is {params.n}; a row has one answer: repeat the rows, each with its own id"
        )
    job = {"model": str(model), "sampling_params": json.dumps(asdict(params), default=_plain)}
    arguments = {"model": model, "params": params, "settings": settings, "columns": (id_column, prompt_column)}
    return dataset.map_batches(
        Worker,
        fn_constructor_kwargs=arguments | {"folder": Path(checkpoint).absolute(), "job": job},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        **dict(ray_remote_args or {}),
    )


class Worker:
    """One actor of the pool: an engine, and the journal that all share."""

    def __init__(
        self,
        model: Any,
        params: SamplingParams,
        settings: Mapping[str, Any],
        columns: tuple[str, str],
        folder: Path,
        job: Mapping[str, Any],
    ) -> None:
        """Load the model."""
        self._journal = Journal(folder, job)
        self._engine = LLM(model, **settings).engine
        self._params, self._columns = params, columns

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Answer those rows that nobody has answered yet, all at once; a row is kept as soon as it is done."""
        ids = [str(row_id) for row_id in batch[self._columns[0]]]
        if len(set(ids)) != len(ids):
            twice = next(row_id for row_id in ids if ids.count(row_id) > 1)
            raise ConfigError(f"{self._columns[0]} {twice!r} is there twice; give each row an id of its own")
        rows = self._journal.finished(ids)
        for row_id, prompt in zip(ids, batch[self._columns[1]], strict=True):
            if row_id not in rows:
                try:
                    self._engine.add_request(row_id, self._prompt(prompt), self._params, output_kind="final")
                except RequestError as error:
                    self._keep(rows, row_id, {"error": str(error)})
        while self._engine.has_unfinished:
            for output in self._engine.step():
                self._keep(rows, output.request_id, _row(output))
        return batch | {name: _column(name, [rows[row_id].get(name) for row_id in ids]) for name in COLUMNS}

    def _keep(self, rows: dict[str, Row], row_id: str, row: Row) -> None:
        self._journal.finish(row_id, row)
        rows[row_id] = row

    def _prompt(self, given: Any) -> str | list[int]:
        if isinstance(given, str):
            return given
        items = list(given)
        if not items or not isinstance(items[0], Mapping):
            return [int(token) for token in items]
        if self._engine.tokenizer is None:
            raise RequestError("the model came without a tokenizer; give prompts as token ids")
        return self._engine.tokenizer.encode_chat(items)


def _row(output: RequestOutput) -> Row:
    (completion,) = output.outputs
    if completion.finish_reason == "error":
        return {"error": str(completion.stop_reason)}
    return dict(zip(COLUMNS, (completion.text, list(completion.token_ids), completion.finish_reason), strict=False))


def _plain(value: Any) -> Any:
    """A parameter that JSON has no word for, the same in every process."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "__qualname__", repr(value))


def _column(name: str, values: list[Any]) -> Any:
    """Rows of unequal length stay lists: numpy would make a matrix of those that happen to be equal."""
    column = np.empty(len(values), object)
    column[:] = [v if v is not None else [] if name == "generated_token_ids" else "" for v in values]
    return column
