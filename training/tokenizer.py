"""Build the byte-level BPE vocabulary: `python tokenizer.py`, which writes tokenizer.json beside it.

The pre-tokenizer is the one of GPT-2, which llama.cpp calls `gpt-2`. Names and two-digit numbers
of the world are repeated until they become single tokens; the chats of the benchmark's workload are read too,
if present, for their ordinary English. Weights are never trained on those chats.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from corpus import LONG, SHORT, SPECIALS, documents
from vocabulary import ALARMS, DAYS, PEOPLE, PLURAL, SINGULAR, SITES

HERE = Path(__file__).resolve().parent
PATH = HERE / "tokenizer.json"
CHATS = HERE.parent / "src" / "promptai" / "bench" / "data" / "edge-50"
SIZE = 2048


def load() -> Tokenizer:
    """The shipped tokenizer."""
    tokenizer: Tokenizer = Tokenizer.from_file(str(PATH))
    return tokenizer


def tokens() -> list[str]:
    """All tokens in the order of their ids."""
    vocab = load().get_vocab()
    return sorted(vocab, key=lambda token: vocab[token])


def sample() -> Iterator[str]:
    """Text to learn merges from."""
    rng = random.Random(3)
    for document in itertools.islice(documents(3, SHORT + LONG), 6000):
        text = document.text
        for special in SPECIALS:
            text = text.replace(special, "\n")
        yield text
    names = [*SITES, *PEOPLE, *DAYS, *(a.code for a in ALARMS), *map(str, range(1, 100)), *SINGULAR, *PLURAL]
    for _ in range(400):
        rng.shuffle(names)
        yield " ".join(names)
        yield "\n".join(names)
    for path in sorted(CHATS.glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            yield "\n".join(message["content"] for message in json.loads(line)["messages"])


def main() -> None:
    """Train and write."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    tokenizer.save(str(PATH))
    print(f"{PATH.name}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
