"""Keeping a pipeline's parts within memory: the plan that they follow, and leaner ones when it runs out."""

from collections.abc import Callable
from typing import TypeVar

from runtime.errors import OutOfMemoryError, first_sentence
from runtime.memory.change import change
from runtime.memory.exhausted import is_out_of_memory
from runtime.memory.plan import Job, Plan
from runtime.memory.visit import give_back
from runtime.parts import Parts
from runtime.stages import LoadProgress, OnStage

Planner = Callable[[Job], Plan]
Done = TypeVar("Done")


class Fitting:
    """Has `parts` follow plans. Without `planner` they stay as they are, and nothing leaner is known.

    `plan` is what is followed now; `stepped_down` tells in words what was made leaner since the beginning,
    for the records.
    """

    def __init__(self, parts: Parts, planner: Planner | None) -> None:
        self.parts, self._planner = parts, planner
        self.plan: Plan | None = None
        self.stepped_down: list[str] = []
        self._notes: list[str] = []

    def prepare(
        self, job: Job, on_plan: Callable[[Plan], None] | None = None, on_stage: OnStage | None = None
    ) -> None:
        """Plan for `job`, unless the plan is for such a one already, and place the parts by it.

        Raises PlanError before anything moves, and OutOfMemoryError.
        """
        if self._planner is None or (self.plan is not None and job == self.plan.job):
            return
        plan = self._planner(job)
        if on_plan is not None:
            on_plan(plan)
        progress = None if self.plan is not None else LoadProgress(self.parts.load_bytes(plan), on_stage)
        self.plan, reason = plan, ""
        try:
            self.parts.follow(plan, progress)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_sentence(error)
        if reason:
            self.step_down("denoise", reason)
        if progress is not None:
            progress.done()

    def within(self, phase: str, run: Callable[[], Done]) -> Done:
        """run(), again with a leaner plan whenever memory runs out; OutOfMemoryError after the leanest."""
        while True:
            try:
                return run()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_sentence(error)
            # Outside of the handler, whose traceback would keep alive what the attempt had allocated.
            self.step_down(phase, reason)

    def step_down(self, phase: str, reason: str) -> None:
        """Follow the next plan that is leaner in `phase`; OutOfMemoryError where there is none."""
        while True:
            give_back(self.parts.device)
            before, leaner = self.plan, None if self.plan is None else self.plan.lower(phase)
            if before is None or leaner is None:
                raise OutOfMemoryError(
                    f"Memory ran out in the {phase} phase ({reason}) and there is no leaner way left: ask "
                    "for a smaller --height and --width or fewer --frames, or close what else uses the GPU."
                )
            by = change(before, leaner)
            self.stepped_down.append(f"{phase}: {by}")
            self._notes.append(f"memory ran out in the {phase} phase ({reason}); going on with {by}.")
            self.plan = leaner
            try:
                return self.parts.follow(leaner)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_sentence(error)

    def take_notes(self) -> tuple[str, ...]:
        """What the user should read, once."""
        notes, self._notes = tuple(self._notes), []
        return notes
