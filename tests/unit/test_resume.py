"""A run that goes on from any of its points ends as the run that was never ended, bit for bit."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime import whole_file
from runtime.errors import RequestError
from runtime.pipeline import Pipeline, Stage
from runtime.request import Request
from runtime.resume import ResumePoint
from runtime.sampler import SAMPLERS, denoise, draw_noise, schedule
from runtime.whole_file import remove_leftovers
from tests.tiny import PROMPTS, SMALL


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> Pipeline:
    return Pipeline.load(model=tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def guided(pipe: Pipeline) -> Pipeline:
    """The same model, as if it were none that is distilled."""
    other = copy.copy(pipe)
    sampling = pipe.manifest.sampling.model_copy(update={"distilled": False, "guidance": 4.0})
    other.manifest = pipe.manifest.model_copy(update={"sampling": sampling})
    return other


def points(stages: Iterator[Stage]) -> tuple[list[ResumePoint], np.ndarray]:
    """The points of a run, copied as another process would have them, and its frames."""
    found = []
    for stage in stages:
        if stage.point is not None:
            found.append(copy.deepcopy(stage.point))
        if stage.video is not None:
            return found, stage.video.frames
    raise AssertionError("no video")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("negative", [None, "", PROMPTS[0]], ids=["plain", "guided", "negative"])
def test_going_on_from_any_point(
    pipe: Pipeline, guided: Pipeline, sampler: str, negative: str | None
) -> None:
    model = pipe if negative is None else guided
    request = Request(PROMPTS[1], seed=11, sampler=sampler, negative_prompt=negative, **SMALL)
    whole, frames = points(model.stages(request))
    assert [point.step for point in whole] == [0, 1, 2, 3, 4]
    assert (whole[0].negative_states is None) == (negative is None)
    for start in whole:
        rest, again = points(model.stages(request, start))
        assert [point.step for point in rest] == [start.step, *range(start.step + 1, 5)]
        for point in rest[1:]:
            same = whole[point.step]
            assert torch.equal(point.latents, same.latents)
            assert torch.equal(point.generator_state, same.generator_state)
        print(f"{sampler} from {start.step}: largest difference {np.abs(frames - again.astype(int)).max()}")
        assert np.array_equal(frames, again)


def test_the_noise_of_each_step_is_new(pipe: Pipeline) -> None:
    """What would go wrong without the generator's state: other latents, from the next step on."""
    request = Request(PROMPTS[1], seed=11, **SMALL)
    whole, _ = points(pipe.stages(request))
    begun = replace(whole[2], generator_state=torch.Generator().manual_seed(11).get_state())
    rest, _ = points(pipe.stages(request, begun))
    assert not torch.allclose(rest[1].latents, whole[3].latents, atol=0.1)


def test_time_left_counts_what_this_process_does(pipe: Pipeline) -> None:
    request = Request(PROMPTS[0], **SMALL)
    whole, _ = points(pipe.stages(request))
    told = [stage for stage in pipe.stages(request, whole[2]) if stage.phase == "denoise"]
    assert [(stage.step, stage.steps) for stage in told] == [(3, 4), (4, 4)]
    assert told[0].eta == pytest.approx(told[0].seconds) and told[1].eta == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_states": torch.randn(3, 64)}, "text states"),
        ({"text_states": torch.randn(12, 32)}, "text states"),
        ({"latents": torch.randn(16, 2, 4, 4)}, "latents"),
        ({"latents": None}, "latents"),
        ({"step": 5}, "at step 5"),
        ({"generator_state": None}, "state of its noise"),
        ({"generator_state": torch.randint(0, 255, (77,), dtype=torch.uint8)}, "state of the noise"),
        ({"negative_states": torch.randn(2, 64)}, "negative"),
    ],
)
def test_a_point_of_another_run_is_refused(pipe: Pipeline, change: dict[str, Tensor], said: str) -> None:
    request = Request(PROMPTS[0], **SMALL)
    whole, _ = points(pipe.stages(request))
    with pytest.raises(RequestError, match=said):
        list(pipe.stages(request, replace(whole[2], **change)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_sampler_goes_on(sampler: str) -> None:
    def velocity_of(x: Tensor, t: float) -> Tensor:
        return x.roll(1) * (t / 1000) - x

    generator = torch.Generator().manual_seed(5)
    states, whole = [], []
    noise = draw_noise((3, 7), generator)
    for latents in denoise(velocity_of, noise, schedule(6), sampler, generator):
        whole.append(latents)
        states.append(generator.get_state())
    for done in range(1, 7):
        other = torch.Generator()
        other.set_state(states[done - 1])
        rest = list(denoise(velocity_of, whole[done - 1], schedule(6), sampler, other, done))
        assert len(rest) == 6 - done
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[done:], strict=True))
    with pytest.raises(ValueError, match="done is 7"):
        next(denoise(velocity_of, noise, schedule(6), sampler, generator, 7))


# --------------------------------------------------------------------------------------------- whole files


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / ("x" * 200 + ".safetensors")
    with whole_file.whole_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), whole_file.whole_file(path) as file:
        file.write(b"second, half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"first" and len(list(path.parent.iterdir())) == 1
    with whole_file.whole_file(path) as file:
        file.write(b"second")
    assert path.read_bytes() == b"second" and len(list(path.parent.iterdir())) == 1


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    mine, other = tmp_path / "a.run.safetensors", tmp_path / "ab.run.safetensors"
    writing = [whole_file.whole_file(path) for path in (mine, other)]
    for one in writing:
        one.__enter__().write(b"half")  # and never left: the process is gone
    (tmp_path / ".a.run.safetensors.partial").write_bytes(b"someone's")
    assert len(list(tmp_path.iterdir())) == 3
    remove_leftovers(mine)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2 and left[0] == ".a.run.safetensors.partial" and left[1].startswith(".ab.run")
