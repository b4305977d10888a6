"""Rows of a table that stays in its file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.checkpoint import open_checkpoint
from runtime.errors import WeightsError
from runtime.memory.rows import StoredEmbedding
from runtime.memory.source import WeightFiles
from tests.unit.checkpoint_fixtures import TEXT_ENCODER, tensors_of
from tests.unit.stream_fixtures import Faults, inputs_of, streamed, written

TABLE = "token_embedding.weight"


def table_of(
    root: Path, stored: torch.dtype, dtype: torch.dtype, layout: str, system: Any = None
) -> tuple[StoredEmbedding, nn.Embedding]:
    """The table in a file, and the same loaded."""
    form = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[stored]
    state = {name: t.to(stored) for name, t in tensors_of("text_encoder", 7).items()}
    if layout == "pickle":
        file = root / "model_t5.pth"
        torch.save(state, file)
    else:
        file = root / f"{form}.safetensors"
        save_file(state, file)
    checkpoint = open_checkpoint(file, "text_encoder")
    loaded = nn.Embedding.from_pretrained(checkpoint.read(TABLE).to(dtype))
    return StoredEmbedding(checkpoint, TABLE, WeightFiles(system), dtype), loaded


@pytest.mark.parametrize("layout", ["safetensors", "pickle"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_are_those_of_a_loaded_table(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, layout: str
) -> None:
    ours, loaded = table_of(tmp_path, stored, dtype, layout, Faults(short=1))
    generator = torch.Generator().manual_seed(8)
    for shape in ((1, 1), (2, 9), (3, 40), (1, 0), (5,)):
        ids = torch.randint(0, TEXT_ENCODER.vocab_size, shape, generator=generator)
        rows = ours(ids)
        assert rows.dtype == dtype and rows.shape == (*shape, TEXT_ENCODER.dim)
        assert torch.equal(rows, loaded(ids))
    ends = torch.tensor([[0, TEXT_ENCODER.vocab_size - 1, 0]])
    assert torch.equal(ours(ends), loaded(ends))
    assert torch.equal(ours(ends.int()), loaded(ends))


def test_only_the_rows_that_occur_are_read_each_once(tmp_path: Path) -> None:
    ours, _ = table_of(tmp_path, torch.float32, torch.bfloat16, "safetensors")
    ours(torch.tensor([[3, 3, 17], [17, 3, 3]]))
    counts = ours._files.counts
    assert counts.cached_bytes + counts.disk_bytes == 2 * 4 * TEXT_ENCODER.dim
    assert not list(ours.parameters()) and not ours.state_dict()


@pytest.mark.parametrize("wrong", [-1, TEXT_ENCODER.vocab_size, 10**6])
def test_a_token_outside_of_the_table(tmp_path: Path, wrong: int) -> None:
    ours, _ = table_of(tmp_path, torch.bfloat16, torch.bfloat16, "safetensors")
    with pytest.raises(
        IndexError, match=f"token {wrong} is outside of the table's {TEXT_ENCODER.vocab_size}"
    ):
        ours(torch.tensor([[1, wrong, 2]]))


def test_a_table_in_another_order_is_read_through_its_mapping(tmp_path: Path) -> None:
    state = tensors_of("text_encoder", 9, torch.bfloat16)
    state[TABLE] = state[TABLE].t().contiguous().t()
    torch.save(state, tmp_path / "t5.pth")
    checkpoint = open_checkpoint(tmp_path / "t5.pth", "text_encoder")
    assert checkpoint.tensors[TABLE].offset is None
    ours = StoredEmbedding(checkpoint, TABLE, WeightFiles(), torch.float32)
    ids = torch.tensor([[5, 0, 39, 5]])
    assert torch.equal(ours(ids), state[TABLE].float()[ids])


def test_faults_name_the_table(tmp_path: Path) -> None:
    ours, _ = table_of(tmp_path, torch.bfloat16, torch.bfloat16, "safetensors", Faults(fail_after=0))
    with pytest.raises(WeightsError, match=rf"cannot be read at tensor {TABLE}"):
        ours(torch.tensor([[1]]))


def test_a_streamed_encoder_has_no_table_in_memory(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, "text_encoder", "fp8", "pickle")
    with streamed(checkpoint) as (model, _):
        assert isinstance(model.token_embedding, StoredEmbedding)
        assert "token_embedding" not in "".join(model.state_dict())
        ids, _mask = inputs_of("text_encoder")
        table: Tensor = checkpoint.read(TABLE)
        assert torch.equal(model.token_embedding(ids), table.bfloat16()[ids])


def test_rows_that_are_kept_are_read_once_and_are_the_same(tmp_path: Path) -> None:
    ours, loaded = table_of(tmp_path, torch.float32, torch.bfloat16, "safetensors")
    ours.keep(8)
    row = 4 * TEXT_ENCODER.dim

    def read() -> int:
        counts = ours._files.counts
        return (counts.cached_bytes + counts.disk_bytes) // row

    steps = [  # ids, rows that were read by then
        ([[3, 3, 17], [17, 3, 5]], 3),
        ([[5, 17, 3, 3]], 3),
        ([[5, 1, 2, 4, 6, 7]], 8),  # eight different ones now: there is room for no other
        ([[6, 6, 1]], 8),
        ([[6, 9]], 10),  # all are let go
        ([[9, 6]], 10),
        ([list(range(9))], 19),  # more than there is room for: read, and what is kept stays
        ([[9, 6]], 19),
    ]
    for ids, total in steps:
        given = torch.tensor(ids)
        assert torch.equal(ours(given), loaded(given)) and read() == total, ids
    assert ours(torch.empty((1, 0), dtype=torch.long)).shape == (1, 0, TEXT_ENCODER.dim)


def test_rows_are_kept_where_they_are_wanted(tmp_path: Path) -> None:
    ours, loaded = table_of(tmp_path, torch.float32, torch.bfloat16, "safetensors")
    ours.keep(50, torch.device("cpu"))
    for ids in ([[4, 9, 4]], [[9, 4, 11]]):
        assert torch.equal(ours(torch.tensor(ids)), loaded(torch.tensor(ids)))
    assert ours._kept is not None and ours._kept.device.type == "cpu" and set(ours._slots) == {4, 9, 11}
    counts = ours._files.counts
    assert counts.cached_bytes + counts.disk_bytes == 3 * 4 * TEXT_ENCODER.dim
