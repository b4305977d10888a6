"""Where a run can go on in another process, and whether what is offered for that belongs to the run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import RequestError
from runtime.request import CheckedRequest


@dataclass(frozen=True)
class ResumePoint:
    """All that a run needs to go on after `step`; 0: only its text is known."""

    step: int
    text_states: Tensor  # (n, text_dim) on the CPU, the rows of the prompt's n tokens
    negative_states: Tensor | None = None  # (m, text_dim), with guidance
    latents: Tensor | None = None  # (16, T, h, w) fp32 on the CPU; None at step 0
    generator_state: Tensor | None = None  # uint8, of the generator that draws the noise; None at step 0


def check_point(start: ResumePoint, n: int, text_dim: int, request: CheckedRequest) -> ResumePoint:
    """`start`, if it belongs to a request of `n` tokens and a model of `text_dim`; RequestError if not."""
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]
    expected = {"text states": (start.text_states, (n, text_dim))}
    if start.step > 0:
        expected["latents"] = (start.latents, request.latent_shape)
    for what, (tensor, shape) in expected.items():
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise RequestError(
                f"The {what} to go on from have shape {found}; this request and model expect {shape}: they "
                "belong to another run."
            )
    if not 0 <= start.step <= request.steps or (start.step > 0 and start.generator_state is None):
        raise RequestError(
            f"The run to go on with is at step {start.step}; expected 0 to {request.steps}, and the state of "
            "its noise from step 1 on: it belongs to another run."
        )
    if start.negative_states is not None and request.guidance == 1:
        raise RequestError(
            "The run to go on with has states of a negative prompt, and this one runs without guidance: it "
            "belongs to another run."
        )
    return start


def restore(generator: torch.Generator, state: Tensor) -> None:
    """Put `generator` where `state` (uint8, of its own kind) says; RequestError if that is no such state."""
    try:
        generator.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise RequestError(
            f"The state of the noise to go on from is none of a {generator.device.type} generator "
            f"({str(error).splitlines()[0]}); it belongs to another run."
        ) from error
