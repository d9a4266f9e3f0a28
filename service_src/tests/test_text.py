"""From tokens to text: characters whole, stop strings cut."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from qwen_coder_service.backends.text import Text


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


def pieces(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """An answer as a reader of every token gets it."""
    text, parts = Text(tokenizer, stop), []
    for token in ids:
        ended = text.add(token)
        if ended:
            break
        parts.append(text.take())
    return [*parts, text.rest()]


@pytest.mark.parametrize("answer", ["plain text", "Grüße, 世界 🚀👩‍👩‍👧", "def f():\n    return '€'\n", "Ã\u2028x\u00a0"])
def test_characters_that_span_tokens_come_whole(tokenizer: Any, answer: str) -> None:
    ids = tokenizer.encode(answer).ids
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces(tokenizer, ids))


def test_any_tokens_give_the_text_of_all_but_a_character_that_the_end_cuts(tokenizer: Any) -> None:
    source = random.Random(1)
    for _ in range(300):
        ids = [source.randrange(tokenizer.get_vocab_size()) for _ in range(source.randrange(1, 60))]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        text = "".join(pieces(tokenizer, ids))
        assert whole.startswith(text)
        assert text == whole or whole.endswith("\ufffd")


def test_a_character_that_the_end_cuts_is_left_out(tokenizer: Any) -> None:
    ids = tokenizer.encode("ab🚀").ids
    assert pieces(tokenizer, ids[:-1])[-1] == ""
    assert "".join(pieces(tokenizer, ids[:-1])) == "ab"


def test_special_tokens_are_no_text(tokenizer: Any) -> None:
    ids = [*tokenizer.encode("ab").ids, tokenizer.token_to_id("<|im_end|>"), *tokenizer.encode("c").ids]
    assert "".join(pieces(tokenizer, ids)) == "abc"


@pytest.mark.parametrize(
    ("answer", "stop", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("abcabd!", ("abd",), "abc"),
        ("aaab", ("aab",), "a"),
        ("say <end> now", ("<end>", "<e"), "say "),
        ("xyz", ("q",), "xyz"),
        ("ends with ab", ("abc",), "ends with ab"),
        ("abc", ("bc", "abc"), "a"),
        ("vor 🚀 nach", ("🚀",), "vor "),
    ],
)
def test_a_stop_string_is_cut_and_its_beginning_never_let_out(tokenizer: Any, answer: str, stop: tuple[str, ...], expected: str) -> None:
    parts = pieces(tokenizer, tokenizer.encode(answer).ids, stop)
    assert "".join(parts) == expected
    # a reader who comes late gets the same
    text = Text(tokenizer, stop)
    for token in tokenizer.encode(answer).ids:
        if text.add(token):
            break
    assert text.rest() == expected


def test_what_no_stop_string_can_begin_with_is_not_held_back(tokenizer: Any) -> None:
    text = Text(tokenizer, ("a long stop string",))
    for token in tokenizer.encode("nothing of the kind").ids:
        text.add(token)
    assert text.take() == "nothing of the kind"
