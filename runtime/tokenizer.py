"""From a prompt to token ids: umT5's cleaning rule, then the tokenizer.json that lies beside the weights."""

import html
import json
from dataclasses import dataclass, field
from pathlib import Path

import ftfy
from tokenizers import Encoding, Tokenizer

from runtime.errors import RequestError, WeightsError

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

    Raises WeightsError when the file is missing, cannot be read, or is of another family of models.
    """

    def __init__(self, tokenizer_json: Path, max_length: int = 512) -> None:
        self.max_length = max_length
        self._tokenizer = _load(tokenizer_json)
        self._unknown_id = _unknown_id(self._tokenizer)
        # The file may carry its own limits; ours must be the only ones, so that a cut is never silent.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, prompt: str) -> Tokens:
        """Clean, tokenize, cut to `max_length` (the end mark stays), pad; RequestError if nothing is left."""
        text = clean(prompt)
        encoding = self._tokenizer.encode(text, add_special_tokens=True)
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

    def _unknown_pieces(self, text: str, encoding: Encoding) -> list[str]:
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        pieces = [text[start:end].strip() for token, (start, end) in spans if token == self._unknown_id]
        return list(dict.fromkeys(piece for piece in pieces if piece))


def clean(prompt: str) -> str:
    """Repair broken encodings, resolve HTML entities (twice: `&amp;amp;`), and make every gap one space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def _load(path: Path) -> Tokenizer:
    if not path.is_file():
        raise WeightsError(f"{path} is missing: the tokenizer.json of umT5 is expected there")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise WeightsError(f"{path} cannot be read as a tokenizer.json: {error}") from error
    found = tokenizer.id_to_token(PAD_ID), tokenizer.id_to_token(EOS_ID)
    if found != (PAD, EOS):
        raise WeightsError(
            f"{path} has {found[0]!r} and {found[1]!r} as ids 0 and 1, where umT5 has {PAD!r} and {EOS!r}: "
            "it belongs to another model"
        )
    return tokenizer


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id that stands for whatever the vocabulary lacks; unigram models give an id, all others a token."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_id") is not None:
        return model["unk_id"]
    token = model.get("unk_token")
    return None if token is None else tokenizer.token_to_id(token)
