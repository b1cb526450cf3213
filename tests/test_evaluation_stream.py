"""Text as it comes: whole characters, and in the end exactly the decoded text."""

from __future__ import annotations

import pytest
import torch
from evaluation_reference import Scripted, tiny_model
from generation_reference import slow_stop
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError
from minilm.evaluation.generate import generate, stream
from minilm.evaluation.text import StoppedText, TextPieces, text_of

TEXT = "héllo wörld 中文字符 👩‍👩‍👧 end"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat. " * 5, "def f(x):\n    return x\n" * 5], vocab_size=300)


def pieces_of(tokenizer, ids):
    decoder = TextPieces(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.finish()]


def test_multi_byte_characters_never_come_in_halves(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT), "characters must be split over tokens for this to mean something"
    script = [*ids, tokenizer.eos_id]
    prompt = tokenizer.prompt("cat")
    model = Scripted(script, tokenizer.num_tokens, prompt_tokens=len(prompt))
    pieces = list(stream(model, tokenizer, "cat", max_new_tokens=500))
    assert "".join(pieces) == TEXT
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 20, "as it comes, not all at the end"


def test_a_character_is_given_with_its_last_byte_not_later(tokenizer):
    ids = tokenizer.encode("é中👩")
    given = []
    decoder = TextPieces(tokenizer)
    for i in ids:
        given.append(decoder.push(i))
    assert given == ["", "é", "", "", "中", "", "", "", "👩"]
    assert decoder.finish() == ""


def test_bytes_that_can_no_longer_become_a_character_are_replaced_at_once_those_that_can_at_the_end(
    tokenizer,
):
    euro, a = tokenizer.encode("€"), tokenizer.encode("a")
    assert pieces_of(tokenizer, [euro[0], euro[1], *a]) == ["", "", "\ufffda", ""]
    assert pieces_of(tokenizer, [euro[0], euro[1]]) == ["", "", "\ufffd"]
    assert pieces_of(tokenizer, [euro[1]]) == ["\ufffd", ""]  # can begin nothing


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_pieces_put_together_are_the_decoded_text_for_any_tokens(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.num_tokens - 1), max_size=20))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids) == text_of(tokenizer, ids)


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=20), more=st.text(max_size=3))
def test_what_was_given_is_never_taken_back(tokenizer, text, more):
    ids = tokenizer.encode(text) + tokenizer.encode(more)
    decoder, given = TextPieces(tokenizer), ""
    for i in ids:
        given += decoder.push(i)
        assert (text + more).startswith(given)
    assert given == text + more


class WordPieces:
    """A tokenizer whose tokens do not stand for fixed bytes: a full stop takes back the space before it."""

    bos_id, eos_id = None, 0
    names = ("", " Hello", " world", " ", ".", "\ufffd")
    halves = (6, 7)  # together: é

    @property
    def byte_lengths(self):
        raise DataError("no fixed bytes")

    def prompt(self, text):
        return [1]

    def decode(self, ids):
        text = ""
        for n, i in enumerate(ids):
            if i == 7 and n and ids[n - 1] == 6:
                text = text.removesuffix("\ufffd") + "é"
            else:
                text += "\ufffd" if i >= 6 else self.names[i]
        return text.replace(" .", ".").removeprefix(" ")


def test_a_tokenizer_without_fixed_bytes_is_decoded_as_a_whole():
    tokenizer, ids = WordPieces(), [1, 2, 6, 7, 3, 4, 1, 6]
    pieces = pieces_of(tokenizer, ids)
    assert pieces == ["Hello", " world", "", "é", "", ".", " Hello", "", "\ufffd"]
    assert "".join(pieces) == tokenizer.decode(ids)
    model = Scripted(ids, 8, prompt_tokens=1)
    assert "".join(stream(model, tokenizer, "x", max_new_tokens=len(ids))) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "seed": 8}]
)
def test_streamed_text_is_the_text_of_generate(tokenizer, options):
    model = tiny_model(tokenizer.num_tokens)
    (whole,) = generate(
        model, [tokenizer.prompt("the cat")], max_new_tokens=40, eos_id=tokenizer.eos_id, **options
    )
    assert "".join(stream(model, tokenizer, "the cat", max_new_tokens=40, **options)) == tokenizer.decode(
        whole.tokens
    )


def test_an_empty_text_starts_from_bos(tokenizer):
    model = tiny_model(tokenizer.num_tokens)
    (whole,) = generate(model, [[tokenizer.bos_id]], max_new_tokens=9, temperature=0, eos_id=tokenizer.eos_id)
    assert "".join(stream(model, tokenizer, "", max_new_tokens=9, temperature=0)) == tokenizer.decode(
        whole.tokens
    )


def test_wrong_settings_and_long_prompts_are_refused_at_the_call_not_at_the_first_piece(tokenizer):
    model = Scripted([5], tokenizer.num_tokens, max_length=16)
    with pytest.raises(ConfigError, match="top_k is 0"):
        stream(model, tokenizer, "a", max_new_tokens=4, top_k=0)
    with pytest.raises(ConfigError, match="context of"):
        stream(model, tokenizer, "a" * 50, max_new_tokens=4)
    assert model.modes_seen == []


def test_the_model_is_free_between_two_pieces_and_after_a_stream_that_nobody_finished(tokenizer):
    model = tiny_model(tokenizer.num_tokens, dropout=0.5).train()
    pieces = stream(model, tokenizer, "the", max_new_tokens=50)
    next(pieces)
    assert model.training and torch.is_grad_enabled()
    pieces.close()
    assert model.training and torch.is_grad_enabled()


# --- stop strings


def stopped_pieces(tokenizer, ids, stop):
    decoder = StoppedText(tokenizer, stop)
    pieces = [decoder.push(i) for i in ids]
    return [*pieces, decoder.finish()], decoder.stopped


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(alphabet="abc é", max_size=25),
    stop=st.lists(st.text(alphabet="abc é", min_size=1, max_size=4), max_size=3),
)
def test_a_text_is_cut_before_the_first_stop_string_wherever_the_borders_of_tokens_are(tokenizer, text, stop):
    ids = [i for character in text for i in tokenizer.encode(character)]
    pieces, found = stopped_pieces(tokenizer, ids, tuple(stop))
    after = [tokenizer.decode(ids[: n + 1]).rstrip("\ufffd") for n in range(len(ids))]
    want, number = slow_stop(after, stop)
    assert "".join(pieces) == want
    assert (found in stop) == (number is not None)
    if number is not None:
        assert not any(pieces[number:])


def test_what_may_become_a_stop_string_is_held_back_and_nothing_else(tokenizer):
    ids = [tokenizer.encode(c)[0] for c in "xENxEEND"]
    assert stopped_pieces(tokenizer, ids, ("END",)) == (["x", "", "", "ENx", "", "E", "", "", ""], "END")
    assert stopped_pieces(tokenizer, ids[:3], ("END",)) == (["x", "", "", "EN"], None)


def test_generate_and_stream_stop_at_the_same_token_and_give_the_same_text(tokenizer):
    model = tiny_model(tokenizer.num_tokens)
    options = {"max_new_tokens": 40, "temperature": 0.9, "seed": 3}
    prompts = [tokenizer.prompt("the cat"), tokenizer.prompt("x")]
    free = generate(model, prompts, eos_id=tokenizer.eos_id, tokenizer=tokenizer, **options)
    text = free[0].text
    place = next(
        n for n in range(8, 30) if text.find(text[n : n + 3]) == n and "\ufffd" not in text[n : n + 3]
    )
    stop = free[0].text[place : place + 3]
    rows = generate(model, prompts, eos_id=tokenizer.eos_id, tokenizer=tokenizer, stop=stop, **options)
    assert rows[0].text == free[0].text[:place] and rows[0].stopped == "stop"
    assert rows[0].tokens == free[0].tokens[: len(rows[0].tokens)]
    assert stop in text_of(tokenizer, rows[0].tokens) and stop not in text_of(tokenizer, rows[0].tokens[:-1])
    assert rows[1].tokens == free[1].tokens or stop in free[1].text
    pieces = stream(model, tokenizer, "the cat", stop=[stop, "never there"], **options)
    assert "".join(pieces) == rows[0].text
    assert (pieces.result.tokens, pieces.result.stopped) == (rows[0].tokens, "stop")


def test_the_result_of_a_stream_is_that_of_generate(tokenizer):
    model = tiny_model(tokenizer.num_tokens)
    options = {"max_new_tokens": 12, "temperature": 1.1, "seed": 3, "min_p": 0.01, "repetition_penalty": 1.1}
    (whole,) = generate(
        model, [tokenizer.prompt("the")], eos_id=tokenizer.eos_id, tokenizer=tokenizer, **options
    )
    pieces = stream(model, tokenizer, "the", **options)
    first = next(pieces)
    assert pieces.result.text == first and pieces.result.stopped == "cancelled"
    assert "".join([first, *pieces]) == whole.text == pieces.result.text
    assert pieces.result == whole


def test_a_stream_ends_when_it_is_cancelled_and_gives_what_was_held_back(tokenizer):
    ids = [tokenizer.encode(c)[0] for c in "xENy"]
    model = Scripted(ids, tokenizer.num_tokens, prompt_tokens=len(tokenizer.prompt("a")))
    asked = iter([False, False, False, True])
    pieces = stream(model, tokenizer, "a", max_new_tokens=9, temperature=0, stop="END", cancel=asked.__next__)
    assert list(pieces) == ["x", "EN"]
    assert pieces.result.stopped == "cancelled" and pieces.result.text == "xEN"


def test_a_stream_that_failed_is_over(tokenizer):
    model = Scripted([5], tokenizer.num_tokens)
    model.forward = lambda *a, **k: 1 / 0
    pieces = stream(model, tokenizer, "a", max_new_tokens=9)
    with pytest.raises(ZeroDivisionError):
        next(pieces)
    assert list(pieces) == [] and pieces._writer is None
