"""The denoise steps of a run: each is looked at before the next, and repeated a way lower if it is wrong."""

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.errors import OutputCheckError
from runtime.fitting import Fitting
from runtime.guard import Fault, judge, measure
from runtime.request import CheckedRequest
from runtime.resume import ResumePoint
from runtime.sampler import denoise, schedule, timestep
from runtime.schema import Envelope
from runtime.transformer import Condition
from runtime.ways import Ways


class Denoising:
    """The steps of `request` from `start` on, with the parts that `fitting` keeps within memory.

    dtype: of the text states on their way into the transformer. envelope: what right weights stay in.
    """

    def __init__(
        self,
        fitting: Fitting,
        ways: Ways,
        start: ResumePoint,
        request: CheckedRequest,
        dtype: torch.dtype,
        envelope: Envelope | None,
    ) -> None:
        self._fitting, self._parts, self._ways = fitting, fitting.parts, ways
        self._start, self._request = start, request
        self._dtype, self._envelope = dtype, envelope
        self._sigmas = schedule(request.steps, request.shift)
        self._done = start.step
        self._prepare()

    def step(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """The latents (1, 16, T, h, w) after the next step.

        One whose result is wrong is made again from the same latents and the same noise. Raises
        OutputCheckError when no way is left.
        """
        number, state = self._done + 1, generator.get_state()
        while True:
            after, fault = self._try(latents, generator)
            if fault is None:
                self._ways.worked()
                self._done = number
                return after
            del after
            generator.set_state(state)
            if self._ways.lower(fault, f"denoise step {number}") is None:
                raise OutputCheckError(
                    f"Denoise step {number} of {self._request.steps} is wrong, with no other way left to "
                    f"compute it ({fault}), so the video would be black or noise: run it again with another "
                    "model variant or with --device cpu, to see whether the weights or the GPU are at fault."
                )
            self._prepare()

    def _prepare(self) -> None:
        """Conditions and attention by the way in use; anew after each change, as they may have been wrong."""
        self._ways.keep_to(self._fitting.plan)
        self._ways.use_in(self._parts.transformer)
        left = self._request.steps - self._done
        # Of all steps, also those that are done: a product of other height rounds its rows differently.
        times = [timestep(sigma) for sigma in self._sigmas[:-1]]
        self._conditions = dict(zip(times, self._conditions_of(times), strict=True)) if left else {}
        self._parts.expect(left * len(self._conditions[times[0]]) if left else 0)

    def _conditions_of(self, times: list[float]) -> list[tuple[Condition, ...]]:
        """For each time the condition of the prompt, and with guidance that of the negative prompt too."""
        texts = [self._padded(self._start.text_states)]  # (1, text_len, text_dim)
        if self._start.negative_states is not None:
            texts.append(self._padded(self._start.negative_states))
        steps = torch.tensor(times, device=self._parts.device)[:, None]  # (S, 1)
        with self._ways.computing():
            of_texts = self._fitting.within("denoise", lambda: self._parts.conditions(steps, texts))
        return [*zip(*of_texts, strict=True)]

    def _padded(self, states: Tensor) -> Tensor:
        """Rows (n, text_dim) -> (1, text_len, text_dim) on the device, with rows of zeros at the end."""
        text_len = self._parts.transformer.config.text_len
        return F.pad(states.to(self._parts.device, self._dtype), (0, 0, 0, text_len - len(states)))[None]

    def _try(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Fault | None]:
        made: list[Tensor] = []

        def velocity_of(latents: Tensor, t: float) -> Tensor:
            made.append(self._velocity(latents, t))
            return made[0]

        steps = denoise(velocity_of, latents, self._sigmas, self._request.sampler, generator, self._done)
        with self._ways.computing():
            after = next(steps)
        # Popped: a tensor that outlives its step would lie in the middle of the next one's memory.
        numbers = measure(made.pop(), latents, after, self._sigmas[self._done])
        attention, kernels = self._ways.sampled, self._ways.kernel_samples
        found = [attention.numbers()] if kernels is None else [attention.numbers(), kernels.numbers()]
        everything = torch.cat([numbers, *(samples.to(numbers).flatten() for samples in found)])
        read = everything.tolist()  # where a step waits for the GPU
        pairs = [read[at : at + 2] for at in range(len(numbers), len(read), 2)]
        of_attention, of_kernels = pairs[: len(found[0])], pairs[len(found[0]) :]
        kernel_bound = 0.0 if kernels is None else kernels.bound
        samples = (of_attention, attention.bound, of_kernels, kernel_bound)
        return after, judge(read[: len(numbers)], self._envelope, *samples)

    def _velocity(self, latents: Tensor, t: float) -> Tensor:
        """With negative states, classifier-free guidance: v = v_neg + guidance * (v_text - v_neg)."""
        transformer = self._parts.transformer

        def run() -> Tensor:
            if self._ways.keep_to(self._fitting.plan):  # a leaner one than that of the step's begin
                self._ways.use_in(transformer)
            self._ways.begin(self._done)  # anew after a shortage of memory, wherever in a forward that was
            velocity, *away = (transformer.velocity(latents, condition) for condition in self._conditions[t])
            return away[0] + self._request.guidance * (velocity - away[0]) if away else velocity

        return self._fitting.within("denoise", run)
