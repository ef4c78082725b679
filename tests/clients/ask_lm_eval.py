"""Run by test_clients with lm-eval: a task of choices by loglikelihood, one of answers by chat, as JSON."""

import json
import logging
import sys
from pathlib import Path

import lm_eval

url, folder = sys.argv[1], Path(sys.argv[2])
logging.disable(logging.WARNING)
documents = [
    {"question": "ban", "choices": ["ana", " 12", "an 3"], "answer": 0},
    {"question": "12 an", "choices": ["ban", "3"], "answer": 1},
    {"question": "a b a b", "choices": [" a", " ban", " 1", " 2"], "answer": 2},
]
(folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
common = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")},
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
choices = {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
}
answers = {
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5, "temperature": 0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def evaluate(model, path, task, **options):
    found = lm_eval.simple_evaluate(
        model=model,
        model_args={
            "model": "tiny",
            "base_url": url + path,
            "max_retries": 1,
            "num_concurrent": 2,
            **options.pop("args", {}),
        },
        tasks=[common | task],
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    samples = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return {"results": found["results"][task["task"]], "samples": [sample["resps"] for sample in samples]}


completions = "/v1/completions"
print(
    json.dumps(
        {
            "documents": documents,
            "choices": evaluate("local-completions", completions, choices),
            "answers": evaluate("local-completions", completions, answers, args={"tokenizer_backend": "remote"}),
            "chat": evaluate("local-chat-completions", "/v1/chat/completions", answers, apply_chat_template=True),
        },
        default=str,
    )
)
