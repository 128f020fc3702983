"""Score the shipped file through the real engine: `python evaluate.py`, exit status 1 below 90 %.

Short questions are answered greedily over the chat endpoint and must match exactly. Pronoun items are scored
as in lm-evaluation-harness's Winogrande: fill the blank with each option and compare the log-likelihood of
the text after it. The training code takes no part, so a broken export cannot pass.
"""

from __future__ import annotations

import argparse
import json
import socket
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import xllamacpp

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "src" / "promptai"
MODEL = PACKAGE / "models" / "data" / "promptai-tiny.gguf"
QUESTIONS = HERE / "heldout-questions.jsonl"
PRONOUNS = PACKAGE / "bench" / "data" / "edge-pronouns.jsonl"
PASS = 0.9
FORCE = 1000.0


class Engine:
    """llama-server on a free local port, in this process."""

    def __init__(self, model: Path, threads: int = 2) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.port = port
        params.n_ctx = 8192
        params.n_parallel = 1
        params.cache_ram_mib = 0
        params.cpuparams.n_threads = threads
        params.ui = False
        params.verbosity = 0
        self.server = xllamacpp.Server(params)
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One JSON request."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - a local http address
            self.url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310
            answer: dict[str, Any] = json.load(reply)
        return answer

    def chat(self, messages: list[dict[str, str]], max_tokens: int = 32) -> tuple[str, str]:
        """A greedy answer and its finish reason."""
        body = {"messages": messages, "temperature": 0, "top_k": 1, "max_tokens": max_tokens}
        choice = self.post("/v1/chat/completions", body)["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]

    def tokenize(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids, with the special tokens of the text."""
        body = {"content": text, "add_special": bos, "parse_special": True}
        ids: list[int] = self.post("/tokenize", body)["tokens"]
        return ids

    def log_likelihood(self, head: list[int], tail: list[int]) -> float:
        """Sum of the raw log-probabilities of `tail` after `head`."""
        total = 0.0
        for i, target in enumerate(tail):
            body = {
                "prompt": head + tail[:i],
                "n_predict": 1,
                "temperature": 0,
                "n_probs": 1,
                "logit_bias": [[target, FORCE]],
                "cache_prompt": True,
            }
            first = self.post("/completion", body)["completion_probabilities"][0]
            if first["id"] != target:
                raise RuntimeError(f"the engine returned token {first['id']} instead of {target}")
            total += first["logprob"]
        return total


def read(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def score_questions(engine: Engine, *, verbose: bool) -> dict[str, list[bool]]:
    """Exact match after strip, by kind."""
    right: dict[str, list[bool]] = defaultdict(list)
    for item in read(QUESTIONS):
        content, reason = engine.chat(item["messages"])
        ok = content.strip() == item["answer"] and reason == "stop"
        right[item["kind"]].append(ok)
        if verbose and not ok:
            print(
                f"{item['id']} {item['kind']}: {item['messages'][-1]['content']!r} -> {content!r},"
                f" wanted {item['answer']!r}"
            )
    return right


def pick(engine: Engine, item: dict[str, Any]) -> str:
    """The option that makes the rest of the sentence likelier."""
    before, after = item["sentence"].split("_")
    scores = []
    for option in (item["option1"], item["option2"]):
        head = engine.tokenize(before + option)
        whole = engine.tokenize(before + option + after)
        if whole[: len(head)] != head:
            raise RuntimeError(f"the token boundary moves in {item['id']}")
        scores.append(engine.log_likelihood(head, whole[len(head) :]))
    return "1" if scores[0] > scores[1] else "2"


def score_pronouns(engine: Engine, *, verbose: bool) -> list[bool]:
    """Right or wrong for each item."""
    right = []
    for item in read(PRONOUNS):
        ok = pick(engine, item) == item["answer"]
        right.append(ok)
        if verbose and not ok:
            print(f"{item['id']}: {item['sentence']} not {item['answer']}")
    return right


def main() -> None:
    """Score both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--verbose", action="store_true", help="print what went wrong")
    args = parser.parse_args()
    engine = Engine(args.model)
    by_kind = score_questions(engine, verbose=args.verbose)
    for kind in sorted(by_kind):
        print(f"  {kind:16} {sum(by_kind[kind])}/{len(by_kind[kind])}")
    short = [ok for oks in by_kind.values() for ok in oks]
    twins = score_pronouns(engine, verbose=args.verbose)
    print(f"short questions  {sum(short)}/{len(short)} = {sum(short) / len(short):.3f}")
    print(f"pronoun items    {sum(twins)}/{len(twins)} = {sum(twins) / len(twins):.3f}")
    ok = sum(short) >= PASS * len(short) and sum(twins) >= PASS * len(twins)
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
