"""What a server says of itself and what its operator may set: defaults of sampling, other sites' pages, documents."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
from running_server import running
from tiny_chat_model import write_chat_model

from jaxpaged.__main__ import main
from jaxpaged.errors import RequestError
from jaxpaged.server.app import App, ServerOptions
from jaxpaged.server.openapi import OPERATIONS
from jaxpaged.server.serve import tls_files

ROOT = Path(__file__).parents[1]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SITE = "https://example.org"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("set up") / "model")


@pytest.fixture(scope="module")
def server(folder):
    defaults = {"temperature": 0.0, "repetition_penalty": 1.3, "max_tokens": 7}
    with running(folder, sampling_defaults=defaults, allowed_origins=(SITE,), enable_admin=True) as server:
        yield server


# Sampling parameters of the checkpoint


def test_requests_that_say_nothing_are_sampled_as_the_checkpoint_says(server):
    said = {"temperature": 0, "repetition_penalty": 1.3, "max_tokens": 7}
    messages = [{"role": "user", "content": "ban"}]
    for path, asked in ((COMPLETIONS, {"prompt": "ban"}), (CHAT, {"messages": messages})):
        bare, full = (server.post(path, **asked, **fields).json() for fields in ({}, said))
        assert bare["choices"] == full["choices"] and bare["usage"]["completion_tokens"] == 7
        other = server.post(path, **asked, repetition_penalty=1, max_tokens=9).json()
        assert other["choices"] != full["choices"] and other["usage"]["completion_tokens"] == 9
    response = server.post("/v1/responses", input="ban").json()
    assert (response["temperature"], response["usage"]["output_tokens"]) == (0.0, 7)


FILE = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "max_new_tokens": 12, "do_sample": True, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ([], {"temperature": 0.6, "top_p": 0.9, "max_tokens": 12}),
        (["--generation-config", "vllm"], {}),
        pytest.param(["--generation-config", "OTHER"], {"min_p": 0.1}, marks=pytest.mark.slow),
        (
            ["--override-generation-config", '{"top_p": 0.5, "min_p": 0.2}'],
            {"temperature": 0.6, "top_p": 0.5, "max_tokens": 12, "min_p": 0.2},
        ),
    ],
    ids=str,
)
def test_the_flag_says_where_they_come_from(folder, tmp_path, monkeypatch, flags, found):
    (folder / "generation_config.json").write_text(json.dumps(FILE))
    (tmp_path / "generation_config.json").write_text('{"min_p": 0.1}')
    served = []
    monkeypatch.setattr("jaxpaged.server.async_engine.AsyncEngine.load", lambda model, **_: FakeEngine())

    def serve(engine, app, found, timeout):
        found.close()
        served.append(app.options)
        return 0

    monkeypatch.setattr("jaxpaged.server.serve.serve", serve)
    flags = [flag.replace("OTHER", str(tmp_path)) for flag in flags]
    try:
        assert main(["serve", str(folder), "--port", "0", *flags, "--allowed-origins", f'["{SITE}/"]']) == 0
    finally:
        (folder / "generation_config.json").unlink()
    assert served[0].sampling_defaults == found and served[0].allowed_origins == (SITE,)


class FakeEngine:
    tokenizer = None

    def describe(self):
        return "nothing"

    def loras(self):
        return []


@pytest.mark.parametrize("text", ['{"top_p": 2}', '{"temperature": "hot"}', "{", "[]"])
def test_a_broken_file_is_named(folder, tmp_path, capsys, text):
    (tmp_path / "generation_config.json").write_text(text)
    assert main(["serve", str(folder), "--port", "0", "--generation-config", str(tmp_path)]) == 2
    assert f"cannot use {tmp_path / 'generation_config.json'}" in capsys.readouterr().err


def test_the_operators_template_stands_before_the_checkpoints(folder):
    with running(folder, chat_template="{{ messages[0].content }}") as server:
        tokens = server.post("/tokenize", messages=[{"role": "user", "content": "ban"}]).json()["tokens"]
        assert tokens == server.engine.tokenizer.encode("ban")


def test_the_template_is_given_what_the_operator_says_unless_the_request_does(folder):
    template = "{{ messages[0].content }}{% if enable_thinking %} 12{% endif %}{{ persona }}"
    defaults = {"enable_thinking": True, "persona": "an"}
    with running(folder, chat_template=template, template_defaults=defaults) as server:
        asked = {"messages": [{"role": "user", "content": "ban"}], "max_tokens": 1}

        def prompt(path=CHAT, **more):
            return server.post(path, **asked, **more).json()["usage"]["prompt_tokens"]

        long, short = (len(server.engine.tokenizer.encode(text)) for text in ("ban 12an", "banan"))
        assert prompt() == long != short
        assert prompt(chat_template_kwargs={"enable_thinking": False}) == prompt(reasoning_effort="none") == short
        response = server.post("/v1/responses", input="ban", max_output_tokens=1).json()
        assert response["usage"]["input_tokens"] == long
        with pytest.raises(RequestError, match="sets 'mood'"):
            App(server.engine, ServerOptions(models=("tiny",), template_defaults={"mood": 1}))


# Other sites' pages


FOREIGN = {"Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"}


def test_pages_of_allowed_origins_may_ask_and_no_others(server):
    asked = {"content": '{"prompt": "ban"}', "headers": FOREIGN | {"Origin": SITE}}
    answer = server.http.post(COMPLETIONS, **asked)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == SITE
    fault = server.http.post(COMPLETIONS, content="{", headers=FOREIGN | {"Origin": SITE})
    assert fault.status_code == 400 and fault.headers["access-control-allow-origin"] == SITE
    for origin in ({"Origin": "https://example.org.evil.org"}, {"Origin": "null"}, {}):
        answer = server.http.post(COMPLETIONS, content='{"prompt": "ban"}', headers=FOREIGN | origin)
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
        assert answer.headers["vary"] == "Origin"


def test_a_browser_that_asks_first_is_told(server):
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-mine"}
    told = server.http.options(COMPLETIONS, headers=asks | {"Origin": SITE})
    assert told.status_code == 204 and "POST" in told.headers["access-control-allow-methods"]
    assert told.headers["access-control-allow-headers"] == "authorization,x-mine"
    assert told.headers["access-control-allow-origin"] == SITE
    assert server.http.options(COMPLETIONS, headers=asks | {"Origin": "https://other.org"}).status_code == 405


def test_any_origin_but_never_without_the_key(folder):
    with running(folder, allowed_origins=("*",), api_keys=("one",)) as server:
        asks = {"Access-Control-Request-Method": "POST", "Origin": "https://any.org"}
        assert server.http.options(COMPLETIONS, headers=asks).status_code == 204
        asked = {"content": '{"prompt": "ban"}', "headers": FOREIGN | {"Origin": "https://any.org"}}
        answer = server.http.post(COMPLETIONS, **asked)
        assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "https://any.org"
        asked["headers"]["Authorization"] = "Bearer one"
        assert server.http.post(COMPLETIONS, **asked).status_code == 200
        document = server.http.get("/openapi.json", headers={"Authorization": "Bearer one"}).json()
        assert document["security"] == [{"key": []}] and document["paths"]["/health"]["get"]["security"] == []


def test_origins_are_a_list(folder, capsys):
    with pytest.raises(SystemExit):
        main(["serve", str(folder), "--allowed-origins", SITE])
    assert "is no list of origins" in capsys.readouterr().err


# TLS


def certificate(folder, name):
    """Files of a certificate of this machine's own, and of its key, as an operator makes them."""
    made = folder / f"{name}.pem", folder / f"{name}-key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-out", made[0], "-keyout", made[1]]
    subprocess.run(["openssl", "req", "-x509", *kind, *subject, *files], check=True, capture_output=True)
    return made


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_the_api_speaks_tls(folder, tmp_path, capsys):
    mine, other = certificate(tmp_path, "mine"), certificate(tmp_path, "other")
    with running(folder, tls=tls_files(*mine)) as server:
        assert server.url.startswith("https://")
        assert server.post(COMPLETIONS, prompt="ban").status_code == 200
        asked = json.dumps({"prompt": "ban", "stream": True})
        answer = server.http.post(COMPLETIONS, content=asked, headers={"Content-Type": "application/json"})
        assert answer.text.endswith("data: [DONE]\n\n")
    for flags, told in (
        (["--ssl-certfile", mine[0], "--ssl-keyfile", other[1]], "key values mismatch|KEY_VALUES_MISMATCH"),
        (["--ssl-certfile", tmp_path / "none.pem"], "No such file"),
        (["--ssl-keyfile", mine[1]], "but there is no --ssl-certfile; give both"),
    ):
        assert main(["serve", str(folder), "--port", "0", *map(str, flags)]) == 2
        assert re.search(told, capsys.readouterr().err)


# Documents


def test_the_openapi_document_names_every_route_and_its_references_resolve(server):
    document = server.http.get("/openapi.json").json()
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert described == {(path, method) for path, methods in server.app._routes.items() for method in methods}
    assert set(OPERATIONS) == set(server.app._routes)
    schemas = document["components"]["schemas"]
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert named <= set(schemas) and {"ChatRequest", "CompletionRequest", "Error"} <= named
    fields = schemas["CompletionRequest"]
    assert fields["required"] == ["prompt"] and "use_beam_search" not in fields["properties"]
    assert {"type": "number", "minimum": 0} in fields["properties"]["temperature"]["anyOf"]


SERVED = [
    ("CompletionRequest", COMPLETIONS, {"prompt": "ban", "n": 2, "logit_bias": {"3": 1.5}, "stop": "x"}),
    ("CompletionRequest", COMPLETIONS, {"prompt": [[1, 2], [3]], "echo": True, "logprobs": 20, "max_tokens": 1}),
    ("ChatRequest", CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "ban"}]}]}),
    ("EmbeddingRequest", "/v1/embeddings", {"model": None, "input": ["a", "b"], "encoding_format": "base64"}),
    ("ResponseRequest", "/v1/responses", {"input": "ban", "top_logprobs": 3}),
    ("ScoreRequest", "/v1/score", {"text_1": "a", "text_2": [[1, 2], [3]]}),
    ("RerankRequest", "/v2/rerank", {"query": "a", "documents": ["a", "b"], "top_n": 0}),
    ("DetokenizeRequest", "/detokenize", {"tokens": []}),
]
REFUSED = [
    ("CompletionRequest", COMPLETIONS, {"prompt": []}),
    ("CompletionRequest", COMPLETIONS, {"prompt": ["a", 1]}),
    ("CompletionRequest", COMPLETIONS, {"prompt": [99_999]}),
    ("CompletionRequest", COMPLETIONS, {"prompt": "a", "top_p": 0}),
    ("CompletionRequest", COMPLETIONS, {"prompt": "a", "n": 129}),
    ("CompletionRequest", COMPLETIONS, {"prompt": "a", "logprobs": 21}),
    ("CompletionRequest", COMPLETIONS, {"prompt": "a", "bad_words": ["a"] * 257}),
    ("ChatRequest", CHAT, {"messages": []}),
    ("EmbeddingRequest", "/v1/embeddings", {"input": "a", "model": "other"}),
    ("RerankRequest", "/rerank", {"query": "a", "documents": ["a"], "top_n": -1}),
    ("DetokenizeRequest", "/detokenize", {"tokens": [-1]}),
]


@pytest.mark.parametrize(
    ("name", "path", "asked", "is_served"), [(*c, True) for c in SERVED] + [(*c, False) for c in REFUSED]
)
def test_the_document_allows_what_is_served_and_no_more(server, name, path, asked, is_served):
    document = server.http.get("/openapi.json").json()
    schema = document | {"$ref": f"#/components/schemas/{name}"}
    assert jsonschema.Draft202012Validator(schema).is_valid(asked) == is_served
    assert (server.post(path, **asked).status_code == 200) == is_served


def test_admin_routes_are_not_described_where_there_are_none(folder):
    with running(folder) as server:
        assert "/pause" not in server.http.get("/openapi.json").json()["paths"]


def test_the_dashboard_shows_metrics_that_there_are_and_leaves_none_out(server):
    server.post(COMPLETIONS, prompt="ban")
    text = server.http.get("/metrics").text
    told = set(re.findall(r"^(jaxpaged:\w+)\{", text, re.M))
    dashboard = (ROOT / "docs" / "grafana-dashboard.json").read_text()
    json.loads(dashboard)
    shown = set(re.findall(r"jaxpaged:\w+", dashboard))
    assert shown <= told, shown - told
    families = {name.removesuffix("_total") for name in re.findall(r"^# TYPE (jaxpaged:\w+) ", text, re.M)}
    families -= {name for name in families if name.endswith("_created")}
    missing = {family for family in families if not any(name.startswith(family) for name in shown)}
    assert not missing
