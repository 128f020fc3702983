"""The training text: a seeded, endless stream of documents, and its packing into token rows.

A document is a list of (text, weight) pieces. Weights say how much a piece counts in the loss: answers count
fully, the random facts behind them hardly at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

import longform
import openform
import pronouns
from scenes import LOOKUP_KINDS, LOOKUPS, SCENES
from vocabulary import NOISE, NOTED, SYSTEMS
from world import Question, Scene, held_out

Message = dict[str, str]
BOS, END = "<s>", "<|end|>"
ROLE = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIALS = (BOS, END, *ROLE.values())
PROMPT_WEIGHT, LONG_WEIGHT, REASON_WEIGHT = 0.05, 0.4, 2.0
FIRST_SEED, SHORT_SEED, LONG_SEED = 3, 1, 2


@dataclass
class Document:
    """Pieces of text with their weight in the loss, and the keys of the questions inside."""

    pieces: list[tuple[str, float]]
    keys: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All pieces in one string."""
        return "".join(text for text, _ in self.pieces)


def chat_document(messages: list[Message], keys: list[str]) -> Document:
    """A conversation in the model's chat format."""
    pieces: list[tuple[str, float]] = [(BOS, 0.0)]
    for message in messages:
        body = message["content"] + END
        if message["role"] != "assistant":
            pieces.append((ROLE[message["role"]] + body, PROMPT_WEIGHT))
        else:
            pieces.append((ROLE["assistant"], PROMPT_WEIGHT))
            pieces.append((body, LONG_WEIGHT if len(body) > 120 else 1.0))
    return Document(pieces, keys)


def pick_scene(rng: random.Random) -> Scene:
    """A random scene by the weights of `SCENES`."""
    make = rng.choices([f for f, _ in SCENES], [w for _, w in SCENES])[0]
    return make(rng)


def stage(scene: Scene, asked: list[Question], rng: random.Random) -> list[Message]:
    """Turn facts and questions into messages, including the last answer."""
    facts = list(scene.facts)
    if not scene.ordered:
        rng.shuffle(facts)
        for _ in range(rng.choice((0, 0, 0, 1))):
            facts.insert(rng.randint(0, len(facts)), rng.choice(NOISE))
    text, messages = " ".join(facts), list[Message]()
    kind = asked[0].kind
    in_system = facts and (kind.startswith("duty") or rng.random() < 0.15)
    if in_system:
        messages.append({"role": "system", "content": text})
    elif rng.random() < 0.35:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    lead = "" if in_system or not facts else text + " "
    if lead and rng.random() < 0.3:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": rng.choice(NOTED)}]
        lead = ""
    for question in asked:
        messages += [
            {"role": "user", "content": lead + question.text},
            {"role": "assistant", "content": question.answer},
        ]
        lead = ""
    return messages


def short_chat(rng: random.Random) -> Document:
    """One scene with up to seven of its trained questions."""
    while True:
        scene = pick_scene(rng)
        asked = [q for q in scene.questions if not held_out(q.key)]
        if asked:
            break
    rng.shuffle(asked)
    asked = asked[: rng.randint(1, 7)]
    return chat_document(stage(scene, asked, rng), [q.key for q in asked])


def drill(rng: random.Random) -> Document:
    """Plain look-ups in plain facts, several in a scene; training starts with these."""
    scene = rng.choice(LOOKUPS)(rng)
    asked = [q for q in scene.questions if q.kind in LOOKUP_KINDS and not held_out(q.key)]
    rng.shuffle(asked)
    asked = asked[:7]
    return chat_document(stage(scene, asked, rng), [q.key for q in asked]) if asked else drill(rng)


def recite(rng: random.Random) -> Document:
    """Facts to repeat, whole or the sentence with a given word: the simplest reading exercise."""
    scene = pick_scene(rng)
    while not scene.facts:
        scene = pick_scene(rng)
    facts = [*scene.facts, *rng.sample(NOISE, rng.choice((0, 1)))]
    rng.shuffle(facts)
    lead, messages = " ".join(facts) + " ", list[Message]()
    for _ in range(rng.choice((1, 2, 3))):
        word, fact = rng.choice([(w, f) for f in facts for w in f.rstrip(".").split()])
        if rng.random() < 0.2:
            ask, answer = rng.choice(("Repeat the facts.", "Say that again.")), " ".join(facts)
        elif sum(word in other.rstrip(".").split() for other in facts) == 1:
            ask, answer = (
                rng.choice((f"Quote the sentence with {word}.", f"Which sentence has {word}?")),
                fact,
            )
        else:
            continue
        messages += [{"role": "user", "content": lead + ask}, {"role": "assistant", "content": answer}]
        lead = ""
    return chat_document(messages, []) if messages else recite(rng)


def pronoun_chat(rng: random.Random) -> Document:
    """A sentence with a pronoun, and a question about its referent."""
    sentence, ask, answer, key = pronouns.chat_question(rng)
    messages = [{"role": "user", "content": f"{sentence} {ask}"}, {"role": "assistant", "content": answer}]
    return chat_document(messages, [key])


def pronoun_text(rng: random.Random) -> Document:
    """One to three resolved sentences as raw text."""
    pieces: list[tuple[str, float]] = [(BOS, 0.0)]
    keys = []
    for i in range(rng.choice((1, 1, 1, 2, 3))):
        fill = pronouns.draw(rng, want_held_out=False)
        start, rest = fill.resolved(doer_side=rng.random() < 0.5)
        pieces += [((" " if i else "") + start, 0.1), (rest, REASON_WEIGHT)]
        keys.append(pronouns.pair_key(fill.rule, fill.doer, fill.other))
    return Document([*pieces, (END, 0.1)], keys)


def long_chat(rng: random.Random) -> Document:
    """One or two open requests with longer answers."""
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    for _ in range(rng.choice((1, 1, 2))):
        ask, answer = longform.open_turn(rng)
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return chat_document(messages, [])


def open_chat(rng: random.Random) -> Document:
    """Requests in unknown words, with general advice."""
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice((*SYSTEMS, openform.request(rng)))})
    for ask, answer in openform.turns(rng):
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return chat_document(messages, [])


def small_talk(rng: random.Random) -> Document:
    """A greeting, a thank-you, or a question about the model itself."""
    asks, answer = rng.choice(longform.SMALL_TALK)
    return chat_document([{"role": "user", "content": rng.choice(asks)}, {"role": "assistant", "content": answer}], [])


def long_text(rng: random.Random) -> Document:
    """An explanation as raw text."""
    topic = rng.choice(longform.TOPICS)
    return Document([(BOS, 0.0), (longform.explanation(topic, rng), LONG_WEIGHT), (END, LONG_WEIGHT)])


Mix = tuple[tuple[Callable[[random.Random], Document], int], ...]
FIRST: Mix = ((drill, 60), (recite, 15), (pronoun_text, 25))
SHORT: Mix = ((short_chat, 58), (drill, 6), (recite, 4), (pronoun_chat, 8), (pronoun_text, 24), (small_talk, 1))
LONG: Mix = ((long_chat, 7), (open_chat, 4), (long_text, 1))


def documents(seed: int, mix: Mix) -> Iterator[Document]:
    """An endless stream of documents for one seed."""
    rng = random.Random(seed)
    makers, weights = [m for m, _ in mix], [w for _, w in mix]
    while True:
        yield rng.choices(makers, weights)[0](rng)


def encode(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Token ids and loss weights; pieces are encoded separately, at boundaries where the ids do not change."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in document.pieces:
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


def batches(
    stream: Iterator[Document], tokenizer: Tokenizer, rows: int, length: int
) -> Iterator[dict[str, np.ndarray]]:
    """Rows of `length + 1` tokens; documents are packed whole where they fit and cut where they do not."""
    waiting: list[tuple[list[int], list[float]]] = []
    while True:
        tokens = np.zeros((rows, length + 1), np.int32)
        segments = np.full((rows, length + 1), -1, np.int32)
        weights = np.zeros((rows, length + 1), np.float32)
        for row in range(rows):
            at = number = 0
            while at < length + 1:
                while len(waiting) < 24:
                    waiting.append(encode(next(stream), tokenizer))
                room = length + 1 - at
                best = next((i for i, (ids, _) in enumerate(waiting) if len(ids) <= room), None)
                if best is None and at > 0:
                    break
                ids, weight = waiting.pop(best or 0)
                n = min(len(ids), room)
                tokens[row, at : at + n], weights[row, at : at + n] = ids[:n], weight[:n]
                segments[row, at : at + n] = number
                weights[row, at] = 0.0
                at, number = at + n, number + 1
        yield {"tokens": tokens, "segments": segments, "weights": weights}
