"""Write the held-out questions and the pronoun items, and prove that the training text does not contain them.

`python make_items.py` writes both files; `--check` also reads the whole training stream and fails if a
held-out key, prompt or sentence occurs in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import corpus
import pronouns
from world import held_out

HERE = Path(__file__).resolve().parent
QUESTIONS = HERE / "heldout-questions.jsonl"
PRONOUNS = HERE.parent / "src" / "promptai" / "bench" / "data" / "edge-pronouns.jsonl"
N_QUESTIONS, PAIRS_PER_RULE, SEED = 200, 6, 2026
MOST_OF_A_KIND = 6
STREAMS = (  # seed, mixture, and more documents than training draws from it
    (corpus.FIRST_SEED, corpus.FIRST, 20_000),
    (corpus.SHORT_SEED, corpus.SHORT, 150_000),
    (corpus.LONG_SEED, corpus.LONG, 10_000),
)


def reason_question(rng: random.Random) -> dict[str, Any]:
    """A held-out pronoun sentence as a chat question."""
    fill = pronouns.draw(rng, want_held_out=True)
    sentence, ask, answer, key = pronouns.question_on(fill, doer_side=rng.random() < 0.5)
    return {
        "messages": [{"role": "user", "content": f"{sentence} {ask}"}],
        "answer": answer,
        "kind": "pronoun_reason",
        "key": key,
    }


def scene_question(rng: random.Random) -> dict[str, Any] | None:
    """A held-out question, sometimes after a trained question on the same facts."""
    scene = corpus.pick_scene(rng)
    wanted = [q for q in scene.questions if held_out(q.key)]
    if not wanted:
        return None
    question = rng.choice(wanted)
    before = [q for q in scene.questions if not held_out(q.key)]
    asked = [*rng.sample(before, min(len(before), rng.choice((0, 0, 1)))), question]
    messages = corpus.stage(scene, asked, rng)
    return {"messages": messages[:-1], "answer": question.answer, "kind": question.kind, "key": question.key}


def questions(seed: int, wanted: int, most: int) -> list[dict[str, Any]]:
    """Draw `wanted` held-out questions, no key twice, at most `most` of a kind."""
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    kinds: Counter[str] = Counter()
    keys: set[str] = set()
    while len(found) < wanted:
        item = reason_question(rng) if rng.random() < 0.05 else scene_question(rng)
        if item is None or item["key"] in keys or kinds[item["kind"]] >= most:
            continue
        keys.add(item["key"])
        kinds[item["kind"]] += 1
        found.append(item)
    found.sort(key=lambda item: (item["kind"], item["key"]))
    return [{"id": f"edge-short-{i:03d}", **item} for i, item in enumerate(found)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def check(asked: list[dict[str, Any]], items: list[dict[str, str]]) -> tuple[int, int]:
    """Count held-out keys, prompts or sentences in the training streams, and the documents read."""
    prompts = {corpus.chat_document(item["messages"], []).text for item in asked}
    keys = {item["key"] for item in asked}
    sentences = {item["sentence"].replace("_", item[o]) for item in items for o in ("option1", "option2")}
    found = read = 0
    streams = (itertools.islice(corpus.documents(seed, mix), n) for seed, mix, n in STREAMS)
    for document in itertools.chain.from_iterable(streams):
        read += 1
        found += sum(key in keys or held_out(key) for key in document.keys)
        turns = document.text.split(corpus.ROLE["assistant"])
        heads = itertools.accumulate(turns[:-1], lambda a, b: a + corpus.ROLE["assistant"] + b)
        found += sum(head in prompts for head in heads)
        plain = document.text.removeprefix(corpus.BOS).removesuffix(corpus.END)
        found += sum(f"{part.strip()}." in sentences for part in plain.split(".")) if len(turns) == 1 else 0
    return found, read


def main() -> None:
    """Write both files, and check them if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    asked = questions(SEED, N_QUESTIONS, MOST_OF_A_KIND)
    items = list(pronouns.items(random.Random(SEED), PAIRS_PER_RULE))
    write(QUESTIONS, [{k: v for k, v in item.items() if k != "key"} for item in asked])
    write(PRONOUNS, items)
    answers = Counter(item["answer"] for item in items)
    kinds = {item["kind"] for item in asked}
    print(f"{len(asked)} questions of {len(kinds)} kinds; {len(items)} pronoun items, answers {dict(answers)}")
    if args.check:
        found, read = check(asked, items)
        print(f"{found} held-out texts in {read} training documents")
        raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
