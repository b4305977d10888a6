"""The text of a run: the states of its prompts, from the cache or by the encoder, looked at before use."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.checkpoint import Checkpoint
from runtime.errors import OutputCheckError
from runtime.fitting import Fitting
from runtime.guard import Fault
from runtime.provenance import fingerprints, versions
from runtime.request import CheckedRequest
from runtime.resume import ResumePoint, check_point
from runtime.schema import Profile
from runtime.text_sample import TextSample
from runtime.text_states import TextCache, encoder_digest
from runtime.tokenizer import PromptTokenizer, Tokens
from runtime.ways import FUSED, Ways


class Text(NamedTuple):
    """What the denoise steps begin with."""

    point: ResumePoint
    source: str  # of the prompt's states: computed, cached, given


class Encoding:
    """Tokens to text states, with the encoder that `fitting` keeps within memory.

    cache: states that need no encoder; it gets those that are made here, too.
    """

    def __init__(
        self, fitting: Fitting, ways: Ways, tokenizer: PromptTokenizer, cache: TextCache | None
    ) -> None:
        self._fitting, self._parts, self._ways = fitting, fitting.parts, ways
        self._tokenizer, self._cache = tokenizer, cache

    def begin(self, request: CheckedRequest, tokens: Tokens, start: ResumePoint | None) -> Text:
        """The point before the first step, or `start`, with all text states that the request needs.

        Raises RequestError for a `start` of another request, OutputCheckError for states that are wrong.
        """
        if start is None:
            known = self.known(tokens)
            source = "computed" if known is None else "cached"
            point = ResumePoint(0, self.encode(tokens) if known is None else known)
        else:
            source, point = "given", check_point(start, tokens.n, self._parts.text_dim, request)
        if request.guidance != 1 and point.negative_states is None:
            negative = request.negative_prompt
            away = self._tokenizer(negative) if negative.strip() else self._tokenizer.nothing()
            known = self.known(away)
            point = replace(point, negative_states=self.encode(away) if known is None else known)
        return Text(point, source)

    def known(self, tokens: Tokens) -> Tensor | None:
        """The states of these tokens where the cache has them, so that they need no text encoder."""
        return None if self._cache is None else self._cache.find(_ids(tokens), self._parts.text_dim)

    @torch.inference_mode()
    def encode(self, tokens: Tokens) -> Tensor:
        """Text states (n, text_dim) of the prompt's n tokens, on the CPU; the cache gets them too."""
        # Padding changes nothing in the rows before it, so it is not encoded at all.
        batch = torch.tensor([_ids(tokens)], device=self._parts.device)  # (1, n)

        def run() -> tuple[Tensor, Fault | None]:
            with self._ways.computing(), self._parts.text_encoder() as encoder:
                sample = TextSample(encoder)
                with sample if self._ways.kernels == FUSED else nullcontext():
                    states = encoder(batch)[0].cpu()  # (n, text_dim)
                return states, sample.fault()

        while True:
            states, fault = self._fitting.within("text", run)
            finite = bool(torch.isfinite(states).all())
            if finite and fault is None:
                break
            fault = Fault("the text states are not finite") if fault is None or not finite else fault
            if self._ways.lower_kernels(fault, "text encoder") is None:
                raise OutputCheckError(
                    "The text states are not finite, so the video would be black or noise: check the text "
                    "encoder's file with `t2v weights verify`, or run with --device cpu."
                )
        self._ways.worked()
        if self._cache is not None:
            self._cache.keep(_ids(tokens), states)
        return states


def _ids(tokens: Tokens) -> Sequence[int]:
    return tokens.ids[: tokens.n]


def text_cache(directory: Path, encoder: Checkpoint, device: str, profile: Profile) -> TextCache:
    """The cache below `directory` of what this encoder makes, computed like this."""
    digest = encoder_digest(fingerprints(encoder.files))
    return TextCache(directory, digest, how_computed(device, profile))


def how_computed(device: str, profile: Profile) -> str:
    """What the bits of text states depend on beside encoder and tokens, in words."""
    used = versions()
    where = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{profile.dtype} on {where}, torch {used['torch']}, fourstep {used['fourstep']}"
