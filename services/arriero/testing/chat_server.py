"""A chat completions endpoint that misbehaves on request, as a process of its own.

    python -m arriero.testing.chat_server DIRECTORY

Responsibility: speak enough of the OpenAI API over real HTTP that a client of it
can be tested through refusals, hangs and kills. Does not know any model.

In DIRECTORY: `address` (written once it listens, the base URL), `requests.jsonl`
(one line per request, before it is answered: prompt, authorization, whole body)
and `rules.json` (read at each request): a list of rules, the first whose `match`
is in the user's prompt and whose `times` are not used up decides.

    {"match": "llama", "times": 2, "status": 429, "headers": {"Retry-After": "0"}}
    {"match": "", "answer": "text", "finish": "length", "delay": 0.1}
    {"match": "slow", "hang": true}      {"match": "cut", "drop": true}
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["main"]


class _Endpoint(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.lock = threading.Lock()
        self.used: dict[int, int] = {}
        self.log = (directory / "requests.jsonl").open("a", encoding="utf-8")

    def rule(self, prompt: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Log a request, and find what is to be done with it."""
        path = self.directory / "rules.json"
        with self.lock:
            self.log.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self.log.flush()
            rules = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            for number, rule in enumerate(rules):
                if rule["match"] in prompt and self.used.get(number, 0) < rule.get(
                    "times", 1 << 30
                ):
                    self.used[number] = self.used.get(number, 0) + 1
                    return dict(rule)
        return {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Endpoint

    def do_POST(self) -> None:
        """Answer a chat completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": f"no {self.path}"}}, {})
            return
        prompt = body["messages"][-1]["content"]
        authorization = self.headers.get("Authorization", "")
        rule = self.server.rule(
            prompt, {"prompt": prompt, "authorization": authorization, "body": body}
        )
        time.sleep(rule.get("delay", 0))
        if rule.get("hang"):
            threading.Event().wait()
        if rule.get("drop"):
            self.close_connection = True
            self.connection.close()
            return
        if rule.get("status", 200) != 200:
            error = {"error": {"message": rule.get("message", "injected")}}
            self._send(rule["status"], error, rule.get("headers", {}))
            return
        if "raw" in rule:
            self._send(200, rule["raw"], {})
            return
        text = rule.get("answer", f"answer to {prompt}")
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": rule.get("finish", "stop"),
        }
        self._send(
            200,
            {
                "object": "chat.completion",
                "model": body["model"],
                "choices": [choice],
                "usage": {**usage, "total_tokens": sum(usage.values())},
            },
            {},
        )

    def _send(self, status: int, body: Any, headers: dict[str, str]) -> None:
        data = json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def main(directory: Path) -> None:
    """Serve until killed."""
    server = _Endpoint(directory)
    place = directory / "address.new"
    place.write_text(f"http://127.0.0.1:{server.server_address[1]}/v1", encoding="utf-8")
    place.rename(directory / "address")
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
