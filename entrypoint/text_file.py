"""`--text-states FILE`: the prompt's states come from the file if it is there, else they go into it."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import OutputError, RequestError
from runtime.request import Request

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline
    from runtime.resume import ResumePoint
    from runtime.text_states import TextStates
    from runtime.tokenizer import Tokens


@dataclass
class GivenText:
    """The file of --text-states, and what it holds; neither if none was asked for."""

    path: Path | None
    states: "TextStates | None"
    encoder: str = ""  # digest of this model's encoder, once it is known

    @classmethod
    def of(cls, path: Path | None) -> "GivenText":
        """Read the file if it is there; RequestError if it is something else, OutputError if it cannot be."""
        if path is None:
            return cls(None, None)
        path = path.expanduser()
        if path.exists():
            from runtime.text_states import read_states

            return cls(path, read_states(path))
        place = next(parent for parent in path.absolute().parents if parent.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise OutputError(
                f"The text states cannot be written to {path}: {place} is no writable directory; name "
                "another --text-states."
            )
        return cls(path, None)

    def prompted(self, request: Request) -> Request:
        """`request` with the file's prompt; RequestError if it has another of its own."""
        if self.states is None:
            return request
        if request.prompt is not None:
            from runtime.tokenizer import clean

            if clean(request.prompt) != clean(self.states.prompt):
                raise RequestError(
                    f"The prompt is {request.prompt[:60]!r}, and {self.path} has the states of "
                    f"{self.states.prompt[:60]!r}; leave one out, or name another --text-states."
                )
            return request
        return replace(request, prompt=self.states.prompt)

    def check_encoder(self, files: list[Path]) -> None:
        """RequestError if the states are another encoder's than that of `files`."""
        if self.path is None:
            return
        from runtime.provenance import fingerprints
        from runtime.text_states import encoder_digest

        self.encoder = encoder_digest(fingerprints(files))
        if self.states is not None and self.states.encoder != self.encoder:
            raise RequestError(
                f"The states in {self.path} were made by another text encoder than {files[0].name}; name the "
                "model that they were made with, or another --text-states."
            )

    def point(self) -> "ResumePoint | None":
        """Where a run begins that need not read its prompt; None if it must."""
        if self.states is None:
            return None
        from runtime.resume import ResumePoint

        return ResumePoint(0, self.states.rows)

    def exchange(self, pipe: "Pipeline", tokens: "Tokens", point: "ResumePoint", prompt: str) -> None:
        """Write the states that were not given; RequestError if the given ones are of other tokens."""
        if self.path is None:
            return
        from runtime.encoding import how_computed
        from runtime.text_states import TextStates, export_states

        ids = tuple(tokens.ids[: tokens.n])
        if self.states is None:
            computed = how_computed(pipe.device, pipe.profile)
            export_states(self.path, TextStates(point.text_states, ids, prompt, self.encoder, computed))
        elif self.states.ids != ids:
            raise RequestError(
                f"{self.path} has the states of other tokens than this model's tokenizer makes of the same "
                "prompt; name the model that they were made with, or another --text-states."
            )
