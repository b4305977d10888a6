"""From a prompt to token ids: umT5's cleaning rule, then the tokenizer.json that lies beside the weights."""

import base64
import html
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ftfy
from tokenizers import Encoding, Tokenizer

from runtime.errors import RequestError, WeightsError

MAX_FILE_BYTES = 256 << 20
"""umT5's tokenizer.json, with its 256,000 pieces, has 17 MB; a larger file is the wrong one."""

MAX_GROWTH = 4096
"""How many times longer the normalizer may make a text; umT5's replaces one character by another."""

PAD, PAD_ID = "<pad>", 0
EOS, EOS_ID = "</s>", 1


@dataclass(frozen=True)
class Tokens:
    """The ids of one prompt, and what the reader of the prompt should be told about them."""

    ids: list[int]
    """`max_length` ids: the prompt, the end mark, then padding."""
    n: int
    """How many of `ids` are real, the end mark included."""
    truncated: bool
    """Whether the prompt was longer than `max_length` and lost its tail."""
    total: int
    """How many ids the whole prompt has, the end mark included; equal to `n` unless truncated."""
    unknown: list[str] = field(default_factory=list)
    """The words, or pieces of words, that the vocabulary does not have, in order and each once."""


class PromptTokenizer:
    """Tokenizes prompts with the umT5-style `tokenizer_json` (pad id 0, end mark id 1).

    `vocab_size`: rows of the embedding that the ids choose from. Raises WeightsError when the file is
    missing, cannot be read, or is of another family of models or of another vocabulary.
    """

    def __init__(self, tokenizer_json: Path, max_length: int = 512, vocab_size: int | None = None) -> None:
        self.max_length = max_length
        self.path = tokenizer_json
        self._tokenizer, content = _load(tokenizer_json)
        self._unknown_id = _unknown_id(self._tokenizer, content)
        # The file may carry its own limits; ours must be the only ones, so that a cut is never silent.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._encode("a \u2603")  # a file that loads and cannot be used is told now, not after the weights
        if vocab_size is not None:
            self._check_ids(vocab_size)

    def __call__(self, prompt: str) -> Tokens:
        """Clean, tokenize, cut to `max_length` (the end mark stays), pad; RequestError if nothing is left."""
        text = clean(prompt)
        encoding = self._encode(text)
        body = list(encoding.ids)
        while body and body[-1] == EOS_ID:  # the file's own post-processor may have ended it already
            body.pop()
        if not (text and body):
            raise RequestError(f"the prompt {prompt!r} is empty: describe the video in a few words")
        ids = [*body[: self.max_length - 1], EOS_ID]
        return Tokens(
            ids=ids + [PAD_ID] * (self.max_length - len(ids)),
            n=len(ids),
            truncated=len(body) >= self.max_length,
            total=len(body) + 1,
            unknown=self._unknown_pieces(text, encoding),
        )

    def nothing(self) -> Tokens:
        """The end mark alone: what an empty negative prompt stands for."""
        ids = [EOS_ID] + [PAD_ID] * (self.max_length - 1)
        return Tokens(ids=ids, n=1, truncated=False, total=1)

    def _encode(self, text: str) -> Encoding:
        with _understood(self.path):
            return self._tokenizer.encode(text, add_special_tokens=True)

    def _check_ids(self, vocab_size: int) -> None:
        piece, last = max(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        if last >= vocab_size:
            raise WeightsError(
                f"{self.path} gives {piece[:40]!r} the id {last}, and the text encoder has {vocab_size} ids: "
                "the two belong to different models"
            )

    def _unknown_pieces(self, text: str, encoding: Encoding) -> list[str]:
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        pieces = [text[start:end].strip() for token, (start, end) in spans if token == self._unknown_id]
        return list(dict.fromkeys(piece for piece in pieces if piece))


def clean(prompt: str) -> str:
    """Repair broken encodings, resolve HTML entities (twice: `&amp;amp;`), and make every gap one space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def _load(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and the JSON that it was made from."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing: the tokenizer.json of umT5 is expected there")
    with _understood(path):
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        _refuse_bombs(content)
        tokenizer = Tokenizer.from_str(text)
    found = tokenizer.id_to_token(PAD_ID), tokenizer.id_to_token(EOS_ID)
    if found != (PAD, EOS):
        raise WeightsError(
            f"{path} has {found[0]!r} and {found[1]!r} as ids 0 and 1, where umT5 has {PAD!r} and {EOS!r}: "
            "it belongs to another model"
        )
    return tokenizer, content


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Whatever the library raises on a file that it does not understand, as a WeightsError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # its Rust code panics with an exception that is no Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise WeightsError(
            f"{path} cannot be used as a tokenizer.json ({reason}); download it again"
        ) from error


def _refuse_bombs(content: Any) -> None:
    """ValueError for a file of a few bytes that would have the library take all memory, which kills it.

    Each replacement may lengthen a text by its own length, and the next one that; a table of characters says
    how long its index is.
    """
    growth, waiting = 1, [content.get("normalizer"), content.get("pre_tokenizer")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        if not isinstance(part, dict):
            continue
        waiting += part.values()
        added = part.get("content", part.get("prepend"))
        growth *= len(added) + 1 if isinstance(added, str) else 1
        if growth > MAX_GROWTH:
            raise ValueError("its normalizer makes texts too long")
        table = part.get("precompiled_charsmap")
        if isinstance(table, str):
            head = base64.b64decode(table[:8] + "=" * (-len(table[:8]) % 4))
            if int.from_bytes(head[:4], "little") > len(table):
                raise ValueError("its table of characters is cut")


def _unknown_id(tokenizer: Tokenizer, content: dict[str, Any]) -> int | None:
    """The id that stands for whatever the vocabulary lacks; unigram models give an id, all others a token."""
    model = content["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    token = model.get("unk_token")
    return None if token is None else tokenizer.token_to_id(token)
