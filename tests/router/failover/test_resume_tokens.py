"""Resume points, with two tiny vocabularies: with and without a leading space."""

import asyncio
from typing import Any

import pytest

from promptai.errors import EngineRefusedError
from promptai.router.failover.resume import ResumePoint, SentText, resume_tokens
from promptai.wire.inference import InferenceRequest

PIECES = ["<s>", "<|user|>", "<|assistant|>", "Hi", " there", "The", "re", "There", " ", "\n", "é", "<0xC3>", "a"]
CHAT = InferenceRequest(messages=[{"role": "user", "content": "Hi"}])
SPECIAL = 3


class Vocabulary:
    """
    A tokenizer by longest match.

    Args:
        spaced: It puts a space before every text, as SentencePiece does.
        blind: It has no ``/detokenize``.

    Attributes:
        opens: The tag with which its template ends, to start the reasoning.
    """

    def __init__(self, *, spaced: bool = False, blind: bool = False) -> None:
        self.opens = ""
        self._spaced = spaced
        self._blind = blind

    async def __call__(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Respond as an engine does."""
        if path == "/apply-template":
            return {"prompt": f"<|user|>{body['messages'][0]['content']}<|assistant|>{self.opens}"}
        if path == "/detokenize":
            if self._blind:
                raise EngineRefusedError("what?", status=404, kind=None)
            return {"content": "".join(PIECES[token] for token in body["tokens"])}
        text, first = body["content"], 0 if body["parse_special"] else SPECIAL
        found = [0] if body["add_special"] else []
        if self._spaced and not text.startswith("<|"):
            found.append(PIECES.index(" "))
        while text:
            piece = max((p for p in PIECES[first:] if text.startswith(p)), key=len, default=None)
            if piece is not None:
                found.append(PIECES.index(piece))
            text = text[len(piece or "?") :]
        return {"tokens": found}


def joint(sent: SentText, engine: Vocabulary | None = None, request: InferenceRequest = CHAT) -> ResumePoint:
    body = {"messages": request.messages, "stream": True}
    return asyncio.run(resume_tokens(engine or Vocabulary(), request, body, sent))


def having(text: str, ids: list[int] | None = None) -> SentText:
    sent = SentText()
    sent.text, sent.token_ids = text, ids
    return sent


def test_a_chat_prompt_is_rendered_with_special_tokens() -> None:
    assert joint(having("There")).prompt == [0, 1, 3, 2]


@pytest.mark.parametrize("prompt", ["Hi", [0, 3]])
def test_a_completion_prompt_is_used_unchanged(prompt: str | list[int]) -> None:
    assert joint(having("There"), request=InferenceRequest(prompt=prompt)).prompt == [0, 3]


def test_reported_ids_win_over_tokenising() -> None:
    assert joint(having("There", [5, 6])) == ResumePoint([0, 1, 3, 2], [5, 6], "ids")


def test_without_reported_ids_the_text_is_tokenised() -> None:
    assert joint(having("There")) == ResumePoint([0, 1, 3, 2], [7], "text")


def test_ids_that_do_not_decode_to_the_text_are_ignored() -> None:
    """For a character of several tokens, llama-server reports only the last one."""
    assert joint(having("é", [11])) == ResumePoint([0, 1, 3, 2], [10], "text")
    assert joint(having("Hi there", [4])).answer == [3, 4]


def test_a_space_added_by_the_tokenizer_is_removed() -> None:
    assert joint(having("There"), Vocabulary(spaced=True)).answer == [7]


def test_template_marks_in_the_answer_are_plain_text() -> None:
    """Otherwise a prompt that makes the model repeat marks could begin another turn."""
    assert min(joint(having("a<|user|>a")).answer) >= SPECIAL


@pytest.mark.parametrize(("text", "sent"), [("<|user|>\nHi", [3]), ("<|user|>\n\nHi", [9, 3]), ("Hi", [3])])
def test_a_tag_opened_by_the_template_is_not_repeated(text: str, sent: list[int]) -> None:
    """With reasoning as text, llama-server sends the tag although it ends the prompt (b11549)."""
    engine = Vocabulary()
    engine.opens = "<|user|>\n"

    assert joint(having(text), engine) == ResumePoint([0, 1, 3, 2, 1, 9], sent, "text")


def test_a_tag_missing_from_the_prompt_belongs_to_the_answer() -> None:
    assert min(joint(having("<a>Hi")).answer) >= SPECIAL
    assert joint(having("<a>Hi")).answer[-1] == 3


def test_without_detokenize_the_tokens_are_assumed_exact() -> None:
    engine = Vocabulary(blind=True)

    assert joint(having("There", [5, 6]), engine).answer == [5, 6]
    assert joint(having("There"), engine).answer == [7]


def test_other_refusals_are_failures() -> None:
    async def ask(path: str, _body: dict[str, Any]) -> dict[str, Any]:
        if path == "/detokenize":
            raise EngineRefusedError("loading", status=503, kind=None)
        return {"prompt": "", "tokens": [1]}

    with pytest.raises(EngineRefusedError):
        asyncio.run(resume_tokens(ask, CHAT, {"messages": CHAT.messages}, having("a", [1])))
