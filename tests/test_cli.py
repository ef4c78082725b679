"""The command line: what it prints, and what it refuses in one line."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_chat_model import write_chat_model

from jaxpaged import LLM, EngineConfig, SamplingParams
from jaxpaged.__main__ import main
from jaxpaged.cli.chat import Chat
from jaxpaged.cli.commands import COMMANDS
from jaxpaged.cli.options import INSTEAD, field_help

ROOT = Path(__file__).parents[1]
SMALL = ["--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--num-pages", "64", "--temperature", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_num_seqs=4, max_num_batched_tokens=32, num_pages=64)


@pytest.fixture
def jaxpaged(capsys, monkeypatch):
    """Runs a command in this process: (exit status, standard output, standard error)."""

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as leave:
            status = leave.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def greedy(llm, prompt, **params):
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, **params), use_tqdm=False)
    return output.outputs[0]


# generate


def test_one_prompt_prints_its_completion(jaxpaged, folder, llm):
    status, out, _ = jaxpaged("generate", folder, "banana", *SMALL, "--max-tokens", 6)
    assert (status, out) == (0, greedy(llm, "banana", max_tokens=6).text + "\n")


def test_several_prompts_print_each_below_its_prompt(jaxpaged, folder, llm):
    status, out, _ = jaxpaged("generate", folder, "ban", "123", *SMALL, "--max-tokens", 4)
    parts = [f"> {p}\n{greedy(llm, p, max_tokens=4).text}\n\n" for p in ("ban", "123")]
    assert (status, out) == (0, "".join(parts))


@pytest.mark.parametrize("source", ["arguments", "file", "jsonl", "stdin"])
def test_prompts_come_from_everywhere(jaxpaged, folder, llm, tmp_path, source):
    prompts, given, stdin = ["ban", "an 12"], [], ""
    match source:
        case "arguments":
            given = prompts
        case "file":
            (tmp_path / "prompts.txt").write_text("ban\n\nan 12\n")
            given = ["--file", tmp_path / "prompts.txt"]
        case "jsonl":
            lines = ['{"prompt": "ban", "id": 7}', json.dumps(llm.tokenizer.encode("an 12"))]
            (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
            given = ["--file", tmp_path / "prompts.jsonl"]
        case "stdin":
            stdin = "ban\nan 12\n"
    status, out, _ = jaxpaged("generate", folder, *given, *SMALL, "--json", "--max-tokens", 3, stdin=stdin)
    texts = [json.loads(line)["outputs"][0]["text"] for line in out.splitlines()]
    assert (status, texts) == (0, [greedy(llm, p, max_tokens=3).text for p in prompts])


def test_json_holds_what_the_output_holds(jaxpaged, folder, llm):
    _, out, _ = jaxpaged("generate", folder, "ban", *SMALL, "--json", "--n", 2, "--max-tokens", 2, "--logprobs", 1)
    values = json.loads(out)
    expected = greedy(llm, "ban", max_tokens=2, logprobs=1)
    assert values["prompt_token_ids"] == llm.tokenizer.encode("ban")
    assert [completion["index"] for completion in values["outputs"]] == [0, 1]
    completion = values["outputs"][0]
    assert (completion["token_ids"], completion["finish_reason"]) == (expected.token_ids, "length")
    token = expected.token_ids[0]
    assert completion["logprobs"][0][str(token)]["decoded_token"] == llm.tokenizer.token_text(token)


def test_chat_flag_renders_the_template(jaxpaged, folder, llm):
    _, out, _ = jaxpaged("generate", folder, "ban", *SMALL, "--chat", "--json", "--max-tokens", 2)
    assert json.loads(out)["prompt_token_ids"] == llm.tokenizer.encode("user:ban\nassistant:")


def test_flags_reach_the_sampling_parameters(jaxpaged, folder, llm):
    first = greedy(llm, "ban", max_tokens=1)
    _, out, _ = jaxpaged("generate", folder, "ban", *SMALL, "--json", "--stop-token-ids", first.token_ids[0])
    completion = json.loads(out)["outputs"][0]
    assert (completion["finish_reason"], completion["stop_reason"]) == ("stop", first.token_ids[0])


# Refusals

REFUSED = [
    ([], "the following arguments are required: COMMAND"),
    (["generte"], "invalid choice: 'generte'"),
    (["generate"], "the following arguments are required: model"),
    (["generate", "MODEL", "x", "--n", "two"], "argument --n: invalid int value: 'two'"),
    (["generate", "MODEL", "x", "--top-p", "3"], "top_p is 3; it must be a finite number above 0 and at most 1"),
    (["generate", "MODEL", "x", "--page-size", "12"], "page_size is 12; it must be a power of two"),
    (["generate", "MODEL", "x", "--file", "y"], "1 prompts and --file y were given"),
    (["generate", "MODEL", "--file", "/no/such/file"], "/no/such/file: No such file or directory"),
    (["generate", "MODEL"], "standard input has no prompt"),
    (["generate", "/no/such/model", "x"], "/no/such/model does not exist"),
    (["generate", "MODEL", "a" * 600, *SMALL], "the prompt has 600 tokens but max_model_len is 512"),
    (["chat", "/no/such/model"], "/no/such/model does not exist"),
    (["generate", "MODEL", "x", "--max-model-len", "8q"], "argument --max-model-len: invalid int value: '8q'"),
    (["generate", "MODEL", "x", "--max-model-len", "8k"], "max_model_len is 8,000 but the model was made for 512"),
    (["generate", "MODEL", "x", "--max-model-len", "1.5k"], "max_model_len is 1,500 but"),
    (["generate", "MODEL", "x", "--max-model-len", "8K"], "max_model_len is 8,192 but"),
    (["serve", "--model", "MODEL"], "there is no --model: the model stands first, without a flag; see `jaxpaged serve"),
    (
        ["serve", "MODEL", "--trust-remote-code"],
        "there is no --trust-remote-code: a checkpoint's own code is",
    ),
    (["serve", "MODEL", "--tool-call-parsers", "x"], "--tool-call-parsers x; did you mean --tool-call-parser?"),
    (
        ["serve", "MODEL", "--override-generation-config", "[]"],
        "--override-generation-config is '[]'; it must be",
    ),
    (["serve", "MODEL", "--override-generation-config", '{"top_p": 2}'], "top_p is 2; it must be"),
    (["serve", "MODEL", "--default-chat-template-kwargs", "x"], "--default-chat-template-kwargs is 'x'; it must be"),
    (["serve", "MODEL", "--chat-template", "/no/such"], "--chat-template is '/no/such', which cannot be read"),
    (
        ["serve", "MODEL", "--chat-template", "{% if %}"],
        "--chat-template is no template: line 1: Expected",
    ),
    (["bench", "speed"], "invalid choice: 'speed'"),
    (["bench", "memory", "--num-requests", "0"], "--num-requests is 0 and --page-size 16; both must be at least 1"),
    (["convert", "/no/such/model", "/no/such/folder"], "/no/such/model does not exist"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_every_failure_is_one_line_and_status_2(jaxpaged, folder, argv, message):
    status, out, err = jaxpaged(*[folder if arg == "MODEL" else arg for arg in argv])
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and out == ""
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("line", ["{", "3", '{"text": "x"}', '["a"]'])
def test_wrong_line_of_a_prompt_file_is_named(jaxpaged, folder, tmp_path, line):
    (tmp_path / "p.jsonl").write_text(f'"fine"\n{line}\n')
    status, _, err = jaxpaged("generate", folder, "--file", tmp_path / "p.jsonl")
    assert status == 2 and "p.jsonl, line 2 " in err


def test_chat_needs_a_template(jaxpaged, folder, llm, tmp_path):
    for path in folder.iterdir():
        if path.name != "tokenizer_config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    status, _, err = jaxpaged("chat", tmp_path, *SMALL)
    assert status == 2 and "has no chat template; use `jaxpaged generate`, or give --chat-template" in err
    (tmp_path / "mine.jinja").write_text("{{ messages[-1].content }}")
    flags = ["--chat-template", tmp_path / "mine.jinja", "--max-tokens", 4, *SMALL]
    status, out, _ = jaxpaged("chat", tmp_path, *flags, stdin="ban")
    assert status == 0 and greedy(llm, "ban", max_tokens=4).text in out


def test_vllms_names_of_dtypes_are_known(jaxpaged, folder):
    by_one, by_other = (
        jaxpaged("generate", folder, "ban", *SMALL, "--dtype", name)[:2] for name in ("float", "float32")
    )
    assert by_one == by_other and by_one[0] == 0


def test_no_flag_that_is_said_not_to_be_there_is_one():
    parser = argparse.ArgumentParser()
    importlib.import_module("jaxpaged.cli.serve").add_arguments(parser)
    assert not INSTEAD.keys() & parser._option_string_actions.keys()


def test_a_defect_of_ours_is_one_line_too(jaxpaged, monkeypatch):
    monkeypatch.setattr("jaxpaged.cli.generate.run", lambda args: 1 / 0)
    status, _, err = jaxpaged("generate", "m", "x")
    assert (status, err) == (2, "error: ZeroDivisionError: division by zero; JAXPAGED_DEBUG=1 shows where\n")
    monkeypatch.setenv("JAXPAGED_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        jaxpaged("generate", "m", "x")


# chat


def test_conversation_is_remembered_until_reset(jaxpaged, folder, llm):
    lines = ["ban", "123", "/reset", "ban", "/system be brief", "ban", "/nonsense", "/exit", "never read"]
    status, out, _ = jaxpaged("chat", folder, *SMALL, "--max-tokens", 4, stdin="\n".join(lines))

    def reply(text):
        return greedy(llm, text, max_tokens=4).text

    first = reply("user:ban\nassistant:")
    second = reply(f"user:ban\nassistant:{first}\nuser:123\nassistant:")
    instructed = reply("system:be brief\nuser:ban\nassistant:")
    assert status == 0
    help_line = out.splitlines()[0]
    answers = out.removeprefix(help_line + "\n").split("\n> ")
    assert [a.rstrip("\n") for a in answers if a] == [
        *(first.rstrip("\n"), second.rstrip("\n")),
        *(first.rstrip("\n"), instructed.rstrip("\n")),
        help_line,
    ]


def test_end_of_input_leaves(jaxpaged, folder):
    status, out, _ = jaxpaged("chat", folder, *SMALL, stdin="")
    assert status == 0 and out.endswith("> \n")


def test_stats_count_the_tokens(llm, capsys):
    chat = Chat(llm, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), show_stats=True)
    chat.take("ban")
    last = capsys.readouterr().out.splitlines()[-1]
    num_prompt = len(llm.tokenizer.encode("user:ban\nassistant:"))
    assert re.fullmatch(
        rf"\[prompt {num_prompt} tokens, \d+ of them cached; first token after [\d.]+ s; 5 tokens, [\d.]+ tokens/s\]",
        last,
    )


def interrupt_after(llm, monkeypatch, num_deltas, times=1):
    stream = llm.stream

    def interrupted(prompt, params, **asked):
        for number, delta in enumerate(stream(prompt, params, **asked), 1):
            if number == num_deltas:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            yield delta

    monkeypatch.setattr(llm, "stream", interrupted)


def test_interrupt_stops_the_answer_and_keeps_what_was_said(llm, monkeypatch, capsys):
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    whole = greedy(llm, "user:ban\nassistant:", max_tokens=50, ignore_eos=True).text
    interrupt_after(llm, monkeypatch, 3)
    chat = Chat(llm, params)
    assert chat.take("ban")
    said = chat.messages[-1]["content"]
    assert whole.startswith(said) and len(said) < len(whole)
    assert capsys.readouterr().out == f"{said} [stopped]\n"
    assert llm.engine.stats().num_running == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_interrupt_leaves(llm, monkeypatch):
    interrupt_after(llm, monkeypatch, 2, times=2)
    with pytest.raises(KeyboardInterrupt):
        Chat(llm, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)).take("ban")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_message_that_does_not_fit_is_refused_and_forgotten(llm, capsys):
    chat = Chat(llm, SamplingParams(temperature=0, max_tokens=2), "brief")
    assert chat.take("a" * 600)
    assert "tokens but max_model_len is 512" in capsys.readouterr().err
    assert chat.messages == [{"role": "system", "content": "brief"}]


# bench


def test_bench_memory_says_and_draws_where_memory_goes(jaxpaged, tmp_path):
    from matplotlib import image

    status, out, err = jaxpaged(
        "bench", "memory", "--workload", "alpaca", "--num-requests", 12, "--output-dir", tmp_path
    )
    assert (status, err) == (0, "")
    table = {line[:36].strip(): line[36:].split() for line in out.splitlines() if "%" in line and "n =" not in line}
    wasted = {name: float(columns[1].rstrip("%")) for name, columns in table.items()}
    assert len(wasted) == 4
    assert wasted["pages of 16 tokens"] < min(w for name, w in wasted.items() if name.startswith("contiguous"))
    drawn = {path.stem: image.imread(path) for path in tmp_path.iterdir()}
    assert drawn.keys() == {"waste", "sharing", "page-map"}
    assert all(picture[..., :3].std() > 0.05 for picture in drawn.values())


def test_bench_without_matplotlib_says_what_to_install(jaxpaged, monkeypatch):
    monkeypatch.setattr("jaxpaged.cli.bench.find_spec", lambda name: None)
    status, _, err = jaxpaged("bench", "memory")
    assert (status, err) == (2, "error: matplotlib is not installed; pip install 'jaxpaged[plot]'\n")


# Ctrl-C


MODULE = ["-m", "jaxpaged"]
SCRIPT = ["-c", "import sys; from jaxpaged.__main__ import main; sys.exit(main())"]


@pytest.mark.parametrize(
    ("start", "command"), [(MODULE, name) for name in COMMANDS if name != "bench"] + [(SCRIPT, "serve")]
)
def test_interrupt_while_modules_are_imported_is_one_line(tmp_path, start, command):
    (tmp_path / "jax.py").write_text(
        """if True:
        import time
        print("importing", flush=True)
        try:
            time.sleep(60)
        except BaseException:  # as numpy and jax do
            raise ImportError from None
        """
    )
    arguments = {
        "convert": ["a", "b"],
        "run-batch": ["m", "-i", "x", "-o", "y"],
        "export": ["m", "y"],
        "plan": ["m", "--devices", "1"],
    }
    process = subprocess.Popen(
        [sys.executable, *start, command, *arguments.get(command, ["m"])],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n", process.communicate()[1]
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "error: interrupted\n" and process.returncode == 130


def test_interrupt_later_is_one_line_and_the_handler_is_the_usual_one(jaxpaged, monkeypatch):
    def run(args):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("jaxpaged.cli.generate.run", run)
    assert jaxpaged("generate", "m", "x") == (130, "", "error: interrupted\n")


# Help


def test_help_needs_no_jax():
    program = """if True:
        import sys
        from contextlib import suppress
        sys.modules["jax"] = None  # fails whoever imports it
        from jaxpaged.__main__ import main
        for command in sys.argv[1:]:
            with suppress(SystemExit):
                print("ended with", main([command, "--help"]), file=sys.stderr)
        """
    commands = [name for name in COMMANDS if name != "convert"]
    done = subprocess.run([sys.executable, "-c", program, *commands], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("usage: ") == len(commands)


@pytest.mark.parametrize("settings", [SamplingParams, EngineConfig])
def test_every_field_has_its_line_of_help(settings):
    assert set(field_help(settings)) == {f.name for f in dataclasses.fields(settings)}


@pytest.mark.parametrize("flag", ["--max-model-len", "--gpu-memory-utilization", "--kv-cache-dtype", "--no-warmup"])
def test_vllms_flags_are_known(jaxpaged, flag):
    status, out, _ = jaxpaged("generate", "--help")
    assert status == 0 and flag in out
