"""Common prefixes of prompts, and the replica on which gateways agree without communicating."""

from random import Random

import pytest

from promptai.router.estimate.prefix import WINDOW, Chain, chain, rendezvous


def letters(windows: int, seed: int) -> str:
    """Random text of that many windows; each seed gives a different text."""
    generator = Random(seed)
    return "".join(generator.choices("abcdefgh ", k=windows * WINDOW))


def test_texts_that_differ_in_their_first_character_share_nothing() -> None:
    """A KV cache is useful only from its first token on."""
    text = letters(10, 1)

    assert chain(text).shared(chain("x" + text[1:])) == 0


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 300, 640])
def test_shared_counts_whole_windows(length: int) -> None:
    text = letters(10, 1)
    other = text[:length] + letters(10, 2)

    assert length // WINDOW * WINDOW == chain(text).shared(chain(other)) == chain(other).shared(chain(text))


def test_a_non_ascii_character_does_not_change_the_links_before_it() -> None:
    text = letters(10, 1)

    assert chain(text).shared(chain(text + "ü" * WINDOW)) == 10 * WINDOW


def test_a_text_shorter_than_a_window_has_no_links_but_a_head() -> None:
    assert Chain((), 5) == chain("short")
    assert chain("short").head == chain("trust").head != chain("longer").head


def test_text_with_lone_surrogates_has_a_chain() -> None:
    assert len(chain("\ud800" * 2 * WINDOW).links) == 2


def test_gateways_pick_the_same_replica_in_any_order_of_names() -> None:
    names = [f"pi-{number}" for number in range(4)]

    assert {rendezvous(7, names)} == {rendezvous(7, list(reversed(names))) for _ in range(3)}


def test_conversations_spread_evenly_and_keep_their_replica_when_another_leaves() -> None:
    names = [f"pi-{number}" for number in range(4)]
    before = {head: rendezvous(head, names) for head in range(2000)}
    after = {head: rendezvous(head, names[:3]) for head in before}

    shares = [list(before.values()).count(name) for name in names]
    assert max(shares) < 1.2 * min(shares)
    assert all(after[head] == name for head, name in before.items() if name != "pi-3")


def test_similar_replica_names_get_equal_shares_of_conversations() -> None:
    names = [f"10.0.0.{number}:8080" for number in (11, 12, 13, 14)]
    picked = [rendezvous(head, names) for head in range(4000)]

    assert all(900 < picked.count(name) < 1100 for name in names)
