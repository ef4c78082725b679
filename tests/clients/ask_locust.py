"""Run by test_clients under locust: users who chat, complete and embed, streamed and whole, as fast as they can."""

import json

from locust import FastHttpUser, task


class User(FastHttpUser):
    """One of those who come."""

    def ask(self, path, **body):
        with self.client.post(path, json={"model": "tiny", "temperature": 0} | body, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"{response.status_code}: {response.text}")
            return response.text

    @task
    def chat(self):
        self.ask("/v1/chat/completions", messages=[{"role": "user", "content": "ban"}], max_tokens=5)

    @task
    def stream(self):
        text = self.ask("/v1/completions", prompt="banana", max_tokens=5, stream=True)
        events = [line.removeprefix("data: ") for line in text.splitlines() if line]
        if events[-1] != "[DONE]" or json.loads(events[-2])["choices"][0]["finish_reason"] != "length":
            raise RuntimeError(f"the stream ends with {events[-2:]}")

    @task
    def embed(self):
        self.ask("/v1/embeddings", input="banana 12")
