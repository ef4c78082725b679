"""`LLM`: a model and an engine in one object, for scripts. Loads, generates, chats, streams, scores."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxpaged.config import PARALLEL_SIZES, EngineConfig
from jaxpaged.convert.checkpoint import orbax_tree
from jaxpaged.convert.gguf_reader import gguf_metadata
from jaxpaged.convert.load import LoadedModel, load
from jaxpaged.convert.peft import read_adapter
from jaxpaged.engine import exports
from jaxpaged.engine.adapters import ReadAdapter
from jaxpaged.engine.chat_template import TEMPLATE_SWITCHES, variables_of
from jaxpaged.engine.compilation import Build, traced
from jaxpaged.engine.embedding import unit_length
from jaxpaged.engine.engine import Engine, UpdatePolicy, request_ids
from jaxpaged.engine.prompts import AnyPrompt, given, listed
from jaxpaged.engine.report import OutputKind
from jaxpaged.engine.tokenizer import Tokenizer, load_tokenizer
from jaxpaged.errors import CheckpointError, ConfigError, RequestError
from jaxpaged.lora_request import LoRARequest
from jaxpaged.model.lora import Adapter
from jaxpaged.model.params import Params
from jaxpaged.model.sharding import Placement, ShardingRules, parallel
from jaxpaged.model.spec import Decoder
from jaxpaged.outputs import Pooling, RequestOutput
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams

_MOMENT = 5e-4  # seconds: under a hundredth of most steps

_OF_ANY_TEMPLATE = ("add_generation_prompt", "continue_final_message", *TEMPLATE_SWITCHES)

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}"""

AskedLoRA = LoRARequest | str | None
"""An adapter, the name of one that the engine knows, or none."""


class LLM:
    """A language model ready to generate. Threads that use it at once have their requests batched together."""

    def __init__(
        self,
        model: str | Path | tuple[Decoder, Params],
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        dtype: str = "auto",
        mesh: Mesh | None = None,
        sharding_rules: ShardingRules | None = None,
        config: EngineConfig | None = None,
        build: Build = traced,
        **settings: Any,
    ) -> None:
        """Load `model`: an HF, native or Orbax directory, a .gguf file, a hub id, or (spec, params) already in memory.

        `tokenizer` is a folder or a `Tokenizer` where the model's own is not meant; `dtype` is the weights' (auto,
        float32, bfloat16, float16). `mesh` holds the devices to run on and `sharding_rules` say what is cut along which
        of its axes; `tensor_parallel_size` and the like among the settings make a mesh of so many devices.
        `settings` are the fields of `EngineConfig`, which may be given whole instead. `build` is `from_export`'s.
        Raises CheckpointError and ConfigError, each with what to do.
        """
        config = config or EngineConfig(**settings)
        placement = _placement(mesh, sharding_rules, config)
        eos_token_ids: frozenset[int] = frozenset()
        read: ReadAdapter | None = None
        if isinstance(model, tuple):
            spec, params = model
        elif orbax_tree(model) is not None:
            spec, params = _load_orbax(model, dtype, placement)
            tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
        else:
            put_for = placement.put_for if placement is not None else None
            loaded = load(model, dtype=dtype, quantization=config.quantization, put_for=put_for)
            spec, params = loaded.spec, loaded.params
            eos_token_ids = _eos_of(loaded.config)
            read = partial(read_adapter, spec=spec, config=loaded.config) if loaded.config else None
            tokenizer = tokenizer if tokenizer is not None else _own_tokenizer(loaded)
        if isinstance(tokenizer, (str, Path)):
            folder, tokenizer = tokenizer, load_tokenizer(tokenizer)
            if tokenizer is None:
                raise CheckpointError(f"{folder} holds no tokenizer; name a folder with a tokenizer.json, or none")
        self.engine = Engine(
            spec,
            params,
            config,
            tokenizer=tokenizer,
            eos_token_ids=tuple(eos_token_ids),
            show_progress=True,
            placement=placement,
            build=build,
            read_adapter=read,
        )
        self._ids = request_ids()
        self._inbox: dict[str, list[RequestOutput]] = {}  # outputs of requests that are being waited for
        self._lock = threading.Lock()  # around every use of the engine
        self._threads: set[int] = set()  # that wait for it

    @classmethod
    def from_export(cls, path: str | Path, *, tokenizer: str | Path | Tokenizer | None = None, **settings: Any) -> LLM:
        """Start from a folder of `jaxpaged export`: nothing of the model is traced or lowered.

        `settings` may change what is not compiled in, such as `seed` or `scheduling_policy`. Raises CheckpointError
        where the export does not fit this device or these versions, ConfigError where a setting does not fit it.
        """
        export = exports.read(path, **settings)
        return cls(path, tokenizer=tokenizer, config=export.config, build=export.build)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it came with one."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: AnyPrompt | Iterable[AnyPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: AskedLoRA | Sequence[AskedLoRA] = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs come in the order of the prompts.

        A prompt is text, token ids (a list or an array), or as in vLLM {"prompt": ...} or {"prompt_token_ids": ...}.
        One `SamplingParams` serves all prompts, or each has its own; so does one `lora_request`. Raises RequestError
        before anything runs where one of them cannot be served.
        """
        return self._run(listed(prompts), sampling_params, use_tqdm, lora_request)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: AskedLoRA | Sequence[AskedLoRA] = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, rendered with the model's chat template, or another.

        What the template asks for, such as `tools` or `enable_thinking`, is given by name or in `chat_template_kwargs`.
        """
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        variables = {**(chat_template_kwargs or {}), **template_variables}
        prompts = [self.encode_chat(c, chat_template=chat_template, **variables) for c in conversations]
        return self._run(prompts, sampling_params, use_tqdm, lora_request)

    def beam_search(
        self,
        prompts: AnyPrompt | Iterable[AnyPrompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = True,
        lora_request: AskedLoRA | Sequence[AskedLoRA] = None,
    ) -> list[RequestOutput]:
        """Continue every prompt by beam search; the `outputs` of each are its hypotheses, best first."""
        if not isinstance(params, BeamSearchParams):
            raise RequestError(f"the parameters of a beam search are {params!r:.80}; give a BeamSearchParams")
        return self._run(listed(prompts), params, use_tqdm, lora_request)

    def stream(
        self,
        prompt: AnyPrompt,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: AskedLoRA = None,
    ) -> Generator[RequestOutput, None, None]:
        """Complete one prompt, yielding what is new as it comes; closing the iterator ends the request."""
        request_id = self._add(prompt, sampling_params, "delta", lora_request=lora_request)
        try:
            while True:
                while inbox := self._inbox[request_id]:
                    yield (output := inbox.pop(0))
                    if output.finished:
                        return
                self._step()
        finally:
            self._forget([request_id])

    def score(
        self,
        prompts: AnyPrompt | Iterable[AnyPrompt],
        completions: Iterable[AnyPrompt] | None = None,
        *,
        lora_request: AskedLoRA = None,
    ) -> list[np.ndarray]:
        """log p(token | those before it) of every token of each prompt but the first: float32 arrays [tokens - 1].

        With `completions`, one for each prompt, of the tokens of each completion after its prompt: [tokens].
        """
        before = [given(prompt).prompt for prompt in listed(prompts)]
        after = [given(completion).prompt for completion in completions] if completions is not None else None
        with self._alone():
            return self.engine.score(before, after, lora_request)

    def embed(
        self,
        prompts: AnyPrompt | Iterable[AnyPrompt],
        pooling: Pooling = "mean",
        *,
        normalize: bool = True,
        use_tqdm: bool = True,
        lora_request: AskedLoRA = None,
    ) -> np.ndarray:
        """A vector for each prompt, float32 [prompts, dim]: the mean of its tokens' last hidden states, or the last.

        They are the model's after its last norm. With `normalize` each vector has length 1. A prompt whose logits were
        not finite gets NaNs. Raises RequestError before anything runs where a prompt cannot be served.
        """
        requests = (self._add(prompt, None, "final", pooling, lora_request) for prompt in listed(prompts))
        outputs = self._wait(requests, "embedding", use_tqdm)
        nothing = np.full(self.engine.spec.dim, np.nan, np.float32)
        rows = [output.embedding if output.embedding is not None else nothing for output in outputs]
        vectors = np.stack(rows) if rows else np.zeros((0, len(nothing)), np.float32)
        return unit_length(vectors) if normalize else vectors

    def encode_chat(
        self, messages: Sequence[Message], *, chat_template: str | None = None, **template_variables: Any
    ) -> list[int]:
        """The token ids of a conversation, ready for the assistant's answer.

        `add_generation_prompt=False` opens no answer, `continue_final_message=True` goes on with the last message.
        """
        if self.tokenizer is None:
            raise RequestError("the model came without a tokenizer; give prompts to generate as token ids")
        asked = variables_of(chat_template or self.tokenizer.chat_template or "")
        for name, value in template_variables.items():
            if name not in asked and name not in _OF_ANY_TEMPLATE and value is not None:
                known = ", ".join(sorted(asked - self.tokenizer.named_tokens.keys() - {"messages"}))
                raise RequestError(f"the chat template asks for no {name!r}; known: {known or 'nothing'}")
        return self.tokenizer.encode_chat(messages, chat_template=chat_template, **template_variables)

    def follow(self) -> bool:
        """In every process but 0, where a mesh spans several: take part in what process 0's LLM does, until it releases
        this process or ends; whether it may go on, and wants `follow` called again.

        The process ends with a line on standard error where another one is lost.
        """
        return self.engine.runner.follow()

    def release(self) -> None:
        """Let the other processes return from `follow`, so that all can do something else together, such as training.

        Requests under way wait. The next step begins when all others follow again.
        """
        self.engine.runner.release()

    def close(self) -> None:
        """Let the other processes return from `follow` for good; the engine takes no step afterwards. At exit this is
        done, unless they have been released.
        """
        self.engine.runner.end()

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read an adapter before it is asked for: `Engine.add_lora`."""
        with self._alone():
            return self.engine.add_lora(lora_request)

    def update_lora(self, name: str, adapter: Adapter, *, scale: float = 1.0, policy: UpdatePolicy = "keep") -> None:
        """Give an adapter, known or new, these arrays: `Engine.update_lora`."""
        with self._alone():
            self.engine.update_lora(name, adapter, scale=scale, policy=policy)

    def remove_lora(self, name: str) -> None:
        """Forget an adapter: `Engine.remove_lora`."""
        with self._alone():
            self.engine.remove_lora(name)

    def list_loras(self) -> list[LoRARequest]:
        """The adapters that requests may name."""
        return self.engine.list_loras()

    def sleep(self, level: Literal[1, 2] = 1) -> None:
        """Give back the pool's memory and, at level 2, the weights': `Engine.sleep`."""
        with self._alone():
            self.engine.sleep(level)

    def wake_up(self, params: Params | None = None) -> None:
        """Make the pool again, after `sleep`: `Engine.wake_up`."""
        with self._alone():
            self.engine.wake_up(params)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        with self._alone():
            self.engine.reset_prefix_cache()

    def _run(
        self,
        prompts: Sequence[AnyPrompt],
        params: SamplingParams | Sequence[SamplingParams] | BeamSearchParams | None,
        use_tqdm: bool,
        lora_request: AskedLoRA | Sequence[AskedLoRA],
    ) -> list[RequestOutput]:
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts):,} prompts but {len(each):,} sampling_params; give one, or one for each")
        is_one = lora_request is None or isinstance(lora_request, (LoRARequest, str))
        loras: Any = [lora_request] * len(prompts) if is_one else lora_request
        if len(loras) != len(prompts):
            raise RequestError(f"{len(prompts):,} prompts but {len(loras):,} lora_requests; give one, or one for each")
        wanted = zip(prompts, each, loras, strict=True)
        adding = (self._add(prompt, own, "final", lora_request=lora) for prompt, own, lora in wanted)
        return self._wait(adding, "generating", use_tqdm)

    def _wait(self, adding: Iterator[str], doing: str, use_tqdm: bool) -> list[RequestOutput]:
        """The last outputs of the requests that `adding` adds and names."""
        request_ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        bar = tqdm(desc=doing, unit="prompt", disable=not use_tqdm)
        try:
            for request_id in adding:
                request_ids.append(request_id)
            bar.reset(total=len(request_ids))
            before = self.engine.stats().generation_tokens
            while len(done) < len(request_ids):
                self._step()
                for request_id in request_ids:
                    if request_id not in done and self._inbox[request_id]:
                        done[request_id] = self._inbox[request_id].pop()
                        bar.update()
                if not bar.disable:
                    elapsed = bar.format_dict["elapsed"] or 1e-9
                    rate = (self.engine.stats().generation_tokens - before) / elapsed
                    bar.set_postfix_str(f"{rate:.0f} output tokens/s", refresh=False)
        finally:
            bar.close()
            self._forget(request_ids)
        return [done[request_id] for request_id in request_ids]

    def _add(
        self,
        prompt: AnyPrompt,
        params: SamplingParams | BeamSearchParams | None,
        kind: OutputKind,
        pooling: Pooling | None = None,
        lora_request: AskedLoRA = None,
    ) -> str:
        plain, text, salt = given(prompt)
        with self._alone():
            request_id = next(self._ids)
            if isinstance(params, BeamSearchParams):
                self.engine.add_beam_search(
                    request_id, plain, params, prompt_text=text, cache_salt=salt, lora_request=lora_request
                )
            else:
                self.engine.add_request(
                    request_id,
                    plain,
                    params,
                    output_kind=kind,
                    prompt_text=text,
                    cache_salt=salt,
                    pooling=pooling,
                    lora_request=lora_request,
                )
            self._inbox[request_id] = []
        return request_id

    def _step(self) -> None:
        """One step for all threads; each finds its outputs in the inbox."""
        with self._alone():
            for output in self.engine.step():
                if output.request_id in self._inbox:
                    self._inbox[output.request_id].append(output)
        if self._threads:  # that wait: who steps all the time would leave them no moment to come in
            time.sleep(_MOMENT)

    def _forget(self, request_ids: Sequence[str]) -> None:
        """Whatever ended the wait, nothing of these requests stays behind."""
        with self._alone():
            for request_id in request_ids:
                self._inbox.pop(request_id, None)
                self.engine.abort(request_id)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The engine is this thread's, once no other has it."""
        me = threading.get_ident()
        self._threads.add(me)
        try:
            self._lock.acquire()
        finally:
            self._threads.discard(me)
        try:
            yield
        finally:
            self._lock.release()


def _load_orbax(path: str | Path, dtype: str, placement: Placement | None) -> tuple[Decoder, Params]:
    try:
        from jaxpaged.integrations import orbax
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} is an Orbax checkpoint; pip install 'jaxpaged[orbax]' ({error})") from error
    return orbax.load(path, dtype=dtype, placement=placement)


def _own_tokenizer(loaded: LoadedModel) -> Tokenizer | None:
    return load_tokenizer(gguf_metadata(loaded.path) if loaded.format == "gguf" else loaded.path)


def _eos_of(config: Mapping[str, Any]) -> frozenset[int]:
    """End-of-sequence ids named by the config: one, several or none."""
    named = config.get("eos_token_id")
    if named is None:
        return frozenset()
    return frozenset([named] if isinstance(named, int) else named)


def _placement(mesh: Mesh | None, rules: ShardingRules | None, config: EngineConfig) -> Placement | None:
    """Where the model is to lie; None: on the default device."""
    sizes = {name: getattr(config, name) for name in PARALLEL_SIZES}
    asked = " and ".join(f"{name} is {size}" for name, size in sizes.items() if size != 1)
    if mesh is None:
        return parallel(*sizes.values(), rules=rules) if asked else None
    if asked:
        raise ConfigError(f"a mesh of {mesh.devices.size} devices was given and {asked}; leave one of them out")
    return Placement(mesh, rules or ShardingRules())
