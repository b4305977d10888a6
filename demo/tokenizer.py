"""The demo's vocabulary in the file format of the real one (`google/umt5-xxl/tokenizer.json`).

Special ids as in umT5: padding 0, end of text 1 (appended to each prompt), unknown 2. Words are matched whole
and in lower case.
"""

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from demo.scenes import words

SPECIAL = ("<pad>", "</s>", "<unk>")


def build_tokenizer() -> Tokenizer:
    """A word-level tokenizer for the grammar of demo.scenes."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save_tokenizer(folder: Path) -> Path:
    """Write `google/umt5-xxl/tokenizer.json` under `folder`; returns the file."""
    path = folder / "google" / "umt5-xxl" / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(path))
    return path
