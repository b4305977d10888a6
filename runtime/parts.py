"""The models of one pipeline, each where the plan wants it while its phase runs, and gone when it does not.

`Parts` holds models that are whole, made in memory. `PlannedParts` loads them from files as a `Plan` says:
blocks resident, cached or read from disk each time, the text encoder through slots of its own for its phase,
the entry of the transformer for a moment, the VAE's decoder for the decode.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from runtime import loading
from runtime.loading import DTYPES, ModelFiles, OnBytes
from runtime.memory.allocator import cap
from runtime.memory.plan import Blocks, Plan
from runtime.memory.ring import Ring
from runtime.memory.stream import BlockStream
from runtime.memory.visit import give_back, visiting
from runtime.schema import ModelManifest, Profile
from runtime.text_encoder import TextEncoder
from runtime.transformer import Condition, Transformer
from runtime.vae import VAE


class Parts:
    """Text encoder, transformer and VAE, whole; encoder and VAE visit `device` if they are elsewhere."""

    def __init__(self, text_encoder: TextEncoder, transformer: Transformer, vae: VAE, device: str) -> None:
        self.whole_text_encoder = text_encoder
        self.transformer = transformer
        self.whole_vae = vae
        self.device = device

    @contextmanager
    def text_encoder(self) -> Iterator[TextEncoder]:
        """The encoder on the device, for the block."""
        with visiting(self.whole_text_encoder, self.device):
            yield self.whole_text_encoder

    @contextmanager
    def vae(self) -> Iterator[VAE]:
        """The VAE on the device, for the block."""
        with visiting(self.whole_vae, self.device):
            yield self.whole_vae

    def conditions(self, timesteps: Tensor, texts: list[Tensor]) -> list[list[Condition]]:
        """For each of `texts` (1, text_len, text_dim) the condition of every time (S, 1)."""
        return [self.transformer.conditions(timesteps, text) for text in texts]

    def expect(self, forwards: int) -> None:
        """So many forwards are to come before the decode."""

    @property
    def text_dim(self) -> int:
        """Width of the text states."""
        return self.transformer.config.text_dim

    def load_bytes(self, plan: Plan) -> int:
        """Bytes that the first `follow` of a plan will read."""
        return 0

    def follow(self, plan: Plan, on_bytes: OnBytes | None = None) -> None:
        """Take on a plan, the first one or another; on_bytes(n) is told what is read."""
        self.transformer.token_slice = plan.token_slice

    def close(self) -> None:
        """Free what is held beyond the models themselves."""


class PlannedParts(Parts):
    """The parts of opened files, as a plan places them; the first `follow` loads. `close` them in the end."""

    transformer: Transformer

    def __init__(self, files: ModelFiles, manifest: ModelManifest, profile: Profile, device: str) -> None:
        self._files, self._manifest = files, manifest
        self._dtype, self._vae_dtype = DTYPES[profile.dtype], DTYPES[profile.vae.dtype]
        self.device = device
        self._plan: Plan | None = None
        self._ring: Ring | None = None
        self._stream: BlockStream | None = None
        self._encoder: TextEncoder | None = None  # when it is resident
        self._entry_here = False

    @property
    def plan(self) -> Plan:
        """What is followed."""
        assert self._plan is not None, "follow() comes first"
        return self._plan

    @property
    def ring(self) -> Ring:
        """The staging memory that all weights go through."""
        if self._ring is None:
            size = self.plan.ring
            device = None if self.device == "cpu" else self.device
            self._ring = Ring(size.chunk_bytes, size.chunks, size.pinned, device=device)
        return self._ring

    @property
    def stream(self) -> BlockStream:
        """The transformer's blocks."""
        assert self._stream is not None, "follow() comes first"
        return self._stream

    @property
    def text_dim(self) -> int:
        """Width of the text states, from the file's header."""
        return int(self._files.transformer.sizes()["text_dim"])

    def load_bytes(self, plan: Plan) -> int:
        """As the headers tell."""
        transformer = self._files.transformer
        whole = sum(info.nbytes for name, info in transformer.tensors.items() if name.startswith("blocks."))
        share = len(plan.blocks.resident) / max(transformer.sizes()["num_layers"], 1)
        encoder = self._files.text_encoder.nbytes if plan.text == "resident" else 0
        return int(whole * share) + encoder + self._files.vae.nbytes

    def follow(self, plan: Plan, on_bytes: OnBytes | None = None) -> None:
        """Load what the plan keeps, or move to it: what is no longer placed is freed before anything else.

        Raises WeightsError, or torch's out of memory, after which a leaner plan may be followed.
        """
        cap(self.device, plan.budget.vram)
        self._plan = plan
        if self._stream is None:
            self._load(plan, on_bytes)
            return
        if plan.text != "resident":
            self._encoder = None
        if not plan.vae_stays and next(self.whole_vae.parameters()).device.type != "cpu":
            self.whole_vae.to("cpu")
        if plan.blocks.slots and self._entry_here:
            self._drop_entry()
        give_back(self.device)
        self.stream.resize(plan.blocks.resident, plan.blocks.cached, plan.blocks.slots)
        self.transformer.token_slice = plan.token_slice

    def _load(self, plan: Plan, on_bytes: OnBytes | None) -> None:
        files, manifest = self._files, self._manifest
        self._encoder = None  # of an attempt that ran out of memory
        home = self.device if plan.vae_stays else "cpu"
        self.whole_vae = loading.load_vae(files.vae, manifest, home, self._vae_dtype, on_bytes, encoder=False)
        if plan.text == "resident":
            self._encoder = loading.load_text_encoder(
                files.text_encoder, manifest, self.device, self._dtype, on_bytes
            )
        self.transformer, self._stream = loading.stream_transformer(
            files.transformer, manifest, self.device, self._dtype, plan.blocks, self.ring, on_bytes
        )
        self.transformer.token_slice = plan.token_slice

    @contextmanager
    def text_encoder(self) -> Iterator[TextEncoder]:
        """The encoder: resident, or built for the block with its matrices streaming."""
        if self._encoder is not None:
            yield self._encoder
            return
        encoder, stream = loading.stream_text_encoder(
            self._files.text_encoder,
            self._manifest,
            self.device,
            self._dtype,
            Blocks((), (), self.plan.text_slots),
            self.ring,
        )
        try:
            stream.expect(1)
            yield encoder
        finally:
            stream.close()
            del encoder
            give_back(self.device)

    def conditions(self, timesteps: Tensor, texts: list[Tensor]) -> list[list[Condition]]:
        """As for `Parts`; the entry comes from the file and leaves again, unless all blocks are resident."""
        if not self._entry_here:
            loading.load_entry(self.transformer, self._files.transformer, self.device, self._dtype)
            self._entry_here = True
        try:
            return super().conditions(timesteps, texts)
        finally:
            if self.plan.blocks.slots:
                self._drop_entry()

    def _drop_entry(self) -> None:
        for name in Transformer.ENTRY:
            self.transformer.get_submodule(name).to("meta")
        self._entry_here = False
        give_back(self.device)

    def expect(self, forwards: int) -> None:
        """So that nothing is fetched for a forward that never comes."""
        self.stream.expect(forwards)

    @contextmanager
    def vae(self) -> Iterator[VAE]:
        """The VAE's decoder on the device; before it comes, the blocks leave if the plan says so."""
        if self.plan.release_for_decode:
            self.stream.park()
        with visiting(self.whole_vae, self.device):
            yield self.whole_vae

    def close(self) -> None:
        """Stop the readers, free the buffers, unpin the ring; idempotent."""
        if self._stream is not None:
            self._stream.close()
        self._encoder = None
        if self._ring is not None:
            self._ring.close()
        give_back(self.device)
