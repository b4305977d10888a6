"""The prompt tokenizer: cleaning, the end mark, cutting and padding, and what it says of bad input."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from runtime.errors import RequestError, WeightsError
from runtime.tokenizer import PromptTokenizer, clean

WORDS = ["a", "red", "circle", "moves", "left", "on", "blue", "background"]
LETTERS = "abcdefghiklmnorstuv."
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]


def unigram(ends: bool) -> Tokenizer:
    """A small tokenizer of umT5's kind; `ends` says whether its post-processor appends the end mark."""
    vocab = [(piece, 0.0) for piece in SPECIAL] + [("▁", -2.0)]
    vocab += [("▁" + word, -3.0) for word in WORDS if len(word) > 1] + [(c, -5.0) for c in LETTERS]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens(SPECIAL)
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    return tokenizer


def words(special: list[str] = SPECIAL) -> Tokenizer:
    """A vocabulary of whole words."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def prompt_of(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS[1:], k=count))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  a red\n\n circle\t moves ", "a red circle moves"),
        ("a\u00a0red\u3000circle\u2003 moves", "a red circle moves"),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("&lt;b&gt; &nbsp; x &quot;y&quot;", '<b> x "y"'),
        ("caf\u00c3\u00a9 na\u00c3\u00afve", "café naïve"),  # UTF-8 that was read as Latin-1
        ("It\u2019s \u201cfine\u201d", 'It\'s "fine"'),
        ("ﬁreﬂy", "firefly"),
        ("a\x00b\x1b[31m red\x1b[0m", "ab red"),
        ("eine Straße, 夕焼けの海 🌅", "eine Straße, 夕焼けの海 🌅"),
        ("broken \udcff byte", "broken \ufffd byte"),  # how an invalid byte of a shell's argument arrives
    ],
)
def test_cleaning(prompt: str, expected: str) -> None:
    assert clean(prompt) == expected


@pytest.mark.parametrize("ends", [True, False])
def test_the_end_mark_comes_once(ends: bool, tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(saved(unigram(ends), tmp_path))
    tokens = tokenizer("a red circle moves left")
    vocabulary = unigram(ends).get_vocab()
    expected = [vocabulary[p] for p in ["▁", "a", "▁red", "▁circle", "▁moves", "▁left"]] + [1]
    assert tokens.ids == expected + [0] * (512 - len(expected))
    assert (tokens.n, tokens.total, tokens.truncated, tokens.unknown) == (7, 7, False, [])
    assert tokenizer("  a red&nbsp;circle\nmoves left ") == tokens
    assert tokenizer("a red circle moves left </s>").ids.count(1) == 1


@pytest.mark.parametrize("count", [1, 9, 10, 11, 40])
@pytest.mark.parametrize("ends", [True, False])
def test_a_long_prompt_is_cut_before_the_end_mark_and_says_so(ends: bool, count: int, tmp_path: Path) -> None:
    tokens = PromptTokenizer(saved(unigram(ends), tmp_path), max_length=11)(prompt_of(count, seed=count))
    reference = unigram(ends=True)  # the library's own cut and padding
    reference.enable_truncation(11)
    reference.enable_padding(pad_id=0, pad_token="<pad>", length=11)
    assert tokens.ids == reference.encode(prompt_of(count, seed=count)).ids
    assert tokens.n == min(count + 1, 11) and tokens.ids[tokens.n - 1] == 1
    assert tokens.total == count + 1
    assert tokens.truncated == (count > 10)


def test_the_limits_in_the_file_are_not_used(tmp_path: Path) -> None:
    tokenizer = unigram(ends=True)
    path = saved(tokenizer, tmp_path)
    expected = PromptTokenizer(path, max_length=32)(prompt_of(20, seed=1))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=3, pad_token="<unk>", length=64)
    assert PromptTokenizer(saved(tokenizer, tmp_path), max_length=32)(prompt_of(20, seed=1)) == expected
    assert not expected.truncated and expected.n == 21


@pytest.mark.parametrize("prompt", ["", " ", "\n\t \u3000", "&nbsp;", "\x00", "</s>"])
@pytest.mark.parametrize("make", [lambda: unigram(True), words], ids=["unigram", "words"])
def test_an_empty_prompt_is_refused(make: Callable[[], Tokenizer], prompt: str, tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.add_special_tokens(SPECIAL)
    with pytest.raises(RequestError, match="is empty"):
        PromptTokenizer(saved(tokenizer, tmp_path))(prompt)


def test_words_that_the_vocabulary_lacks_are_named(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(saved(words(), tmp_path))
    tokens = tokenizer("A  RED zebra moves left,\n a Zebra &amp; a &quot;zebra&quot; on blue")
    assert tokens.unknown == ["zebra", ",", "Zebra", "&", '"']
    assert tokens.ids[:3] == [4, 5, 3] and tokens.ids[tokens.n - 1] == 1
    assert tokenizer("a red circle").unknown == []


def test_pieces_that_the_vocabulary_lacks_are_named(tmp_path: Path) -> None:
    tokens = PromptTokenizer(saved(unigram(ends=True), tmp_path))("a red xylo moves 海へ left")
    assert tokens.unknown == ["xy", "海へ"]


@given(prompt=st.text(max_size=60))
def test_whatever_is_typed_is_tokenized_or_refused(
    prompt: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "tokenizer.json"
    tokenizer = PromptTokenizer(path if path.exists() else saved(unigram(ends=True), folder), max_length=24)
    if not clean(prompt):
        with pytest.raises(RequestError):
            tokenizer(prompt)
        return
    tokens = tokenizer(prompt)
    assert len(tokens.ids) == 24 and 2 <= tokens.n <= 24 and tokens.ids[tokens.n - 1] == 1
    assert not any(tokens.ids[tokens.n :])
    assert tokens.truncated == (tokens.total > tokens.n)
    assert (3 in tokens.ids) <= bool(tokens.unknown)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "tokenizer.json", tmp_path):
        with pytest.raises(WeightsError) as caught:
            PromptTokenizer(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[1, 2]", b"\xff\xfe\x00", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_malformed_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        PromptTokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "special", [["<s>", "</s>", "<pad>", "<unk>"], ["<pad>", "<unk>", "</s>"], ["<unk>"]]
)
def test_the_tokenizer_of_another_model_is_refused(special: list[str], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="another model"):
        PromptTokenizer(saved(words(special), tmp_path))


def test_no_torch_is_needed() -> None:
    program = "import sys, runtime.tokenizer; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
