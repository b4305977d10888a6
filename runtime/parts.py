"""The models of one pipeline, each where the plan wants it while its phase runs, and gone when it does not.

`Parts` holds models that are whole, made in memory. `PlannedParts` loads them from files as a `Plan` says:
blocks resident, cached or read from disk each time, the text encoder through slots of its own for its phase
(from the second prompt on out of RAM, where the plan keeps it there), the entry of the transformer for a
moment, the VAE's decoder for the decode.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from runtime import loading
from runtime.layers.kept_text import KeptText
from runtime.loading import DTYPES, ModelFiles, OnBytes
from runtime.memory.allocator import cap
from runtime.memory.plan import Blocks, Plan
from runtime.memory.ring import Ring
from runtime.memory.sizes import KEPT_ROWS
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
        self._kept: Sequence[KeptText] = ()

    @contextmanager
    def text_encoder(self) -> Iterator[TextEncoder]:
        """The encoder on the device, for the block."""
        with visiting(self.whole_text_encoder, self.device):
            yield self.whole_text_encoder

    @contextmanager
    def vae(self) -> Iterator[VAE]:
        """The VAE on the device, for the block; what was kept of the texts has left."""
        self._drop_text()
        with visiting(self.whole_vae, self.device):
            yield self.whole_vae

    def conditions(self, timesteps: Tensor, texts: list[Tensor]) -> list[list[Condition]]:
        """For each of `texts` (1, text_len, text_dim) the condition of every time (S, 1).

        What was kept of the texts before leaves, so whoever computes otherwise from now on calls it again. A
        forward for each text comes first, in their order; with `Plan.text_kv` the later ones use the keys and
        values that it has made.
        """
        self._drop_text()
        made = [self.transformer.conditions(timesteps, text) for text in texts]
        self._kept = [of_text[0].kept for of_text in made if of_text and of_text[0].kept is not None]
        self._text_changed()
        return made

    def _drop_text(self) -> None:
        if not self._kept:
            return
        for kept in self._kept:
            kept.drop()
        self._kept = ()
        self._text_changed()

    def _text_changed(self) -> None:
        """Other keys and values are there now, or none."""

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
        if not plan.text_kv:
            self._drop_text()
        self._set_out(plan)

    def _set_out(self, plan: Plan) -> None:
        self.transformer.token_slice, self.transformer.keep_text = plan.token_slice, plan.text_kv

    def close(self) -> None:
        """Free what is held beyond the models themselves."""
        self._drop_text()


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
        self._encoder: tuple[TextEncoder, BlockStream] | None = None  # when it is resident or cached
        self._entry_here = False
        self._kept = ()

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
        """As the headers tell; the blocks come later, most of them during the first forward."""
        encoder = 0
        if plan.text == "resident":
            file = self._files.text_encoder
            encoder = file.nbytes - file.tensors["token_embedding.weight"].nbytes
        return encoder + self._files.vae.nbytes

    def follow(self, plan: Plan, on_bytes: OnBytes | None = None) -> None:
        """Load what the plan keeps, or move to it: what is no longer placed is freed before anything else.

        Raises WeightsError, or torch's out of memory, after which a leaner plan may be followed.
        """
        cap(self.device, plan.budget.vram)
        before, self._plan = self._plan, plan
        if self._stream is None:
            self._load(plan, on_bytes)
            return
        if plan.text_kv:
            self._text_changed()  # an attempt that failed may have made some of them
        else:
            self._drop_text()
        if before is None or plan.text != before.text:
            self._drop_encoder()
        if not plan.vae_stays and next(self.whole_vae.parameters()).device.type != "cpu":
            self.whole_vae.to("cpu")
        if plan.blocks.slots and self._entry_here:
            self._drop_entry()
        give_back(self.device)
        self.stream.resize(plan.blocks.resident, plan.blocks.cached, plan.blocks.slots)
        self._set_out(plan)

    def _load(self, plan: Plan, on_bytes: OnBytes | None) -> None:
        files, manifest = self._files, self._manifest
        self._drop_encoder()  # of an attempt that ran out of memory
        self.transformer, self._stream = loading.stream_transformer(
            *(files.transformer, manifest, self.device, self._dtype, plan.blocks, self.ring, on_bytes),
            preload=False,
        )
        home = self.device if plan.vae_stays else "cpu"
        try:
            if plan.text == "resident":
                self._encoder = self._placed_encoder(plan, on_bytes)
            if plan.text in ("resident", "known"):  # else the ring is the text encoder's at first
                self._fetch_early()
            self.whole_vae = loading.load_vae(
                files.vae, manifest, home, self._vae_dtype, on_bytes, encoder=False
            )
        except BaseException:
            self._stream.close()  # a leaner plan loads anew
            self._stream = None
            raise
        self._set_out(plan)

    def _fetch_early(self) -> None:
        """Have blocks that stay come now, behind what else is done before the first forward.

        It does not wait for the last of them either: each is waited for in its turn. Not where blocks stream
        or are cached, whose memory is the denoise phase's.
        """
        if not self.plan.blocks.slots:
            self.stream.start()

    @contextmanager
    def text_encoder(self) -> Iterator[TextEncoder]:
        """The encoder: resident, or visiting from RAM, or built for the block with its matrices streaming."""
        if self.plan.text == "cached":
            with self._visiting_encoder() as visitor:
                yield visitor
            return
        if self._encoder is not None:
            yield self._encoder[0]
            return
        encoder, stream = self._placed_encoder(self.plan)
        try:
            stream.expect(1)
            yield encoder
        finally:
            stream.close()
            del encoder
            give_back(self.device)

    @contextmanager
    def _visiting_encoder(self) -> Iterator[TextEncoder]:
        """The encoder whose blocks stay in RAM: on the device, with slots and what is small, for the block.

        The first prompt reads the blocks. Then they are pinned, in the background: it takes about a second.
        """
        if self._encoder is None:
            self._encoder = self._placed_encoder(self.plan)
        encoder, stream = self._encoder
        try:
            encoder.to(self.device)
            stream.expect(0)  # until the blocks begin: readers would slow down who fetches the tokens' rows
            yield encoder
        finally:
            stream.park()
            encoder.to("cpu")
            give_back(self.device)
        stream.pin_cached()

    def _placed_encoder(self, plan: Plan, on_bytes: OnBytes | None = None) -> tuple[TextEncoder, BlockStream]:
        """The encoder with all blocks on the device, or with all of them coming through the plan's slots."""
        file = self._files.text_encoder
        stays = plan.text == "resident"
        every = tuple(range(int(file.sizes()["num_layers"])))
        cached = every if plan.text == "cached" else ()
        placement = Blocks(every, (), 0) if stays else Blocks((), cached, plan.text_slots)
        where = (file, self._manifest, self.device, self._dtype, placement, self.ring, on_bytes)
        kept = KEPT_ROWS if stays or cached else 0
        return loading.stream_text_encoder(*where, kept_rows=kept, rows_in_ram=not stays)

    def _drop_encoder(self) -> None:
        if self._encoder is not None:
            self._encoder[1].close()
            self._encoder = None

    def conditions(self, timesteps: Tensor, texts: list[Tensor]) -> list[list[Condition]]:
        """As for `Parts`; the entry comes from the file and leaves again, unless all blocks are resident."""
        self._fetch_early()
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

    def _text_changed(self) -> None:
        """The stream leaves out what makes keys and values, once a forward of each text has made them."""
        if self._stream is None:
            return
        if not self._kept:
            self._stream.leave_out(())
            return
        # Texts take turns: so many passes hold a forward of each, whichever was to be next, or is repeated.
        incomplete = any(not kept.complete for kept in self._kept)
        self._stream.leave_out(Transformer.OF_TEXT, after=len(self._kept) if incomplete else 0)

    def expect(self, forwards: int) -> None:
        """So that nothing is fetched for a forward that never comes."""
        self.stream.expect(forwards)

    @contextmanager
    def vae(self) -> Iterator[VAE]:
        """The VAE's decoder on the device; before it comes, the blocks leave if the plan says so.

        What was kept of the texts leaves in any case.
        """
        self._drop_text()
        if self.plan.release_for_decode:
            self.stream.park()
        with visiting(self.whole_vae, self.device):
            yield self.whole_vae

    def close(self) -> None:
        """Stop the readers, free the buffers, unpin the ring; idempotent."""
        self._drop_text()
        if self._stream is not None:
            self._stream.close()
        self._drop_encoder()
        if self._ring is not None:
            self._ring.close()
        give_back(self.device)
