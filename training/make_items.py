"""Write the held-out questions and the pronoun items, and prove that training never shows them.

`python make_items.py` writes both files; `--check` also reads the whole training stream and fails if a
held-out key, prompt or sentence occurs in it.
"""

from __future__ import annotations

import argparse
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
MOST_OF_A_KIND = 5


def reason_question(rng: random.Random) -> dict[str, Any]:
    """A held-out pronoun sentence as a chat question."""
    fill = pronouns.draw(rng, want_held_out=True)
    sentence, ask, answer, key = pronouns.question_on(fill, doer_side=rng.random() < 0.5)
    return {"messages": [{"role": "user", "content": f"{sentence} {ask}"}], "answer": answer,
            "kind": "pronoun_reason", "key": key}


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
    """`wanted` held-out questions, no key twice, at most `most` of a kind."""
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
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def check(asked: list[dict[str, Any]], items: list[dict[str, str]], n_documents: int) -> int:
    """Number of held-out keys, prompts or sentences found in the training stream."""
    prompts = {corpus.chat_document(item["messages"], []).text for item in asked}
    keys = {item["key"] for item in asked}
    sentences = {item["sentence"].replace("_", item[o]) for item in items for o in ("option1", "option2")}
    found = 0
    for number, document in enumerate(corpus.documents(corpus.TRAIN_SEED)):
        if number >= n_documents:
            break
        found += sum(key in keys or held_out(key) for key in document.keys)
        text = document.text
        cuts = [i for i in range(len(text)) if text.startswith(corpus.ROLE["assistant"], i)]
        found += sum(text[:i] in prompts for i in cuts)
        if not cuts:
            found += sum(f"{part.strip()}." in sentences
                         for part in text.removeprefix(corpus.BOS).removesuffix(corpus.END).split("."))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--documents", type=int, default=corpus.TRAIN_DOCUMENTS)
    args = parser.parse_args()
    asked = questions(SEED, N_QUESTIONS, MOST_OF_A_KIND)
    items = list(pronouns.items(random.Random(SEED), PAIRS_PER_RULE))
    write(QUESTIONS, [{k: v for k, v in item.items() if k != "key"} for item in asked])
    write(PRONOUNS, items)
    answers = Counter(item["answer"] for item in items)
    print(f"{len(asked)} questions of {len({q['kind'] for q in asked})} kinds; {len(items)} pronoun items, {dict(answers)}")
    if args.check:
        found = check(asked, items, args.documents)
        print(f"{found} held-out texts in {args.documents} training documents")
        raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
