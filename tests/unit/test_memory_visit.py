"""A model that visits the device of its phase: it goes, it comes home whatever happens, or it stays."""

from collections.abc import Generator

import pytest
import torch
from torch import nn

from runtime.memory.visit import visiting


class Traveller(nn.Module):
    """A module that notes where it is sent; "cuda" needs no GPU, since its tensors stay where they are."""

    def __init__(self, home: str = "cpu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, device=home))
        self.trips: list[str] = []

    def to(self, *args: object, **kwargs: object) -> "Traveller":
        """Note the device; do not go."""
        assert not kwargs and len(args) == 1
        self.trips.append(str(args[0]))
        return self


def test_it_goes_for_the_block_and_comes_home() -> None:
    model = Traveller()
    with visiting(model, "meta"):
        assert model.trips == ["meta"]
    assert model.trips == ["meta", "cpu"]


def test_it_comes_home_from_a_block_that_fails() -> None:
    model = Traveller()
    with pytest.raises(RuntimeError, match="out of memory"), visiting(model, "meta"):
        raise RuntimeError("out of memory")
    assert model.trips == ["meta", "cpu"]


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_it_comes_home_from_a_generator_that_is_left(taken: int) -> None:
    model = Traveller()

    def pieces() -> Generator[int, None, None]:
        with visiting(model, "meta"):
            yield from range(3)

    running = pieces()
    for expected in range(taken):
        assert next(running) == expected
    assert model.trips == ["meta"] * min(taken, 1)
    running.close()
    assert model.trips == (["meta", "cpu"] if taken else [])


@pytest.mark.parametrize(("home", "device"), [("cpu", "cpu"), ("meta", "meta")])
def test_it_stays_where_it_is_at_home(home: str, device: str) -> None:
    model = Traveller(home)
    with visiting(model, device):
        pass
    assert model.trips == []


def test_a_trip_to_the_gpu_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, emptied = Traveller(), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(list(model.trips)))
    with visiting(model, "cuda:1"):
        assert emptied == []
    assert emptied == [["cuda:1", "cpu"]]  # after it has left, or there would be nothing to give


def test_real_tensors_come_back_unchanged() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with visiting(model, "cpu"):
        pass
    assert torch.equal(model.weight, before) and model.weight.device.type == "cpu"
