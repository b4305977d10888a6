"""Filling a budget: which ring, slots, blocks, slices and rung; pure arithmetic.

More memory of any kind never gives a slower plan. So what is taken only for want of memory (short slices, one
slot) goes without resident blocks, RAM is cached in only beside the longest ring, and the text encoder stays
in RAM only beside all blocks that could ever be cached.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf

from runtime.layers.tiles import WHOLE, Rung
from runtime.memory.account import (
    CHUNK,
    CHUNKS,
    FEW_CHUNKS,
    SHORT_SLICES,
    SLOTS,
    Choice,
    Inputs,
    Ring,
    Text,
    Wish,
    decode_slowdown,
    decoding,
    denoise_time,
    device_parts,
    host_bytes,
    later_passes,
    moved,
    text_time,
    times,
)
from runtime.memory.costs import LONGEST_SLICE, MIB, free_slice, usual_slice
from runtime.memory.decode_costs import rungs

BEFORE_DECODE = ("text", "entry", "denoise")
ROUNDING = 1e-10  # times that differ by less are the same


class DoesNotFitError(Exception):
    """`phase` needs `needed` bytes of `what` (vram or ram), more than the budget has."""

    def __init__(self, what: str, phase: str, needed: int, excess: int) -> None:
        super().__init__(what, phase, needed)
        self.what, self.phase, self.needed, self.excess = what, phase, needed, excess


def choose(inputs: Inputs, wish: Wish) -> Choice:
    """The decisions for `inputs`. Raises DoesNotFitError when even the leanest are too much.

    An attention in 8 bits if that is faster, with what remains for blocks beside its copies.
    """
    chosen = _chosen(inputs, wish, "")
    if inputs.device == "cpu":
        return chosen
    if wish.attention:
        with suppress(DoesNotFitError):
            eight_bits = _chosen(inputs, wish, wish.attention)
            if denoise_time(inputs, eight_bits).seconds <= denoise_time(inputs, chosen).seconds:
                chosen = eight_bits
    return _with_text_cached(inputs, chosen, wish)


def _chosen(inputs: Inputs, wish: Wish, attention: str) -> Choice:
    choice = _leanest_start(inputs, attention)
    usual = choice.token_slice == _slices(inputs, attention)[0]
    if inputs.device == "cpu":
        # There the ring takes the same memory as the blocks, and what fits is simply there: nothing visits.
        wish = Wish(text_stays=True)
        usual = usual and choice.ring.chunks == FEW_CHUNKS[0]
    if not usual:
        return with_cache(inputs, _with_rung(inputs, choice))
    filled = _with_residents(inputs, choice)
    if not filled.slots:
        choice = _with_rung(inputs, _with_stays(inputs, filled, wish))
        return _if_it_fits(inputs, with_cache(inputs, choice))
    ways = [with_cache(inputs, _with_rung(inputs, filled))]
    kept = _if_it_fits(inputs, choice)
    if kept.text_kv:
        ways.append(with_cache(inputs, _with_rung(inputs, _with_residents(inputs, kept))))
    return _fastest(inputs, ways)


def _if_it_fits(inputs: Inputs, choice: Choice) -> Choice:
    """The same with the text's keys and values kept, if that fits and there is a step that uses them."""
    kept = replace(choice, text_kv=True)
    useful = later_passes(inputs, kept)[1] > 0
    return kept if useful and exceeds(inputs, kept, BEFORE_DECODE) is None else choice


def _fastest(inputs: Inputs, ways: Sequence[Choice]) -> Choice:
    """The one that denoises soonest; of those as fast (computing hides the copies) the one that reads least
    from disk, then the one that moves least.

    GPU memory for the text's keys and values, 419 MB a text at 14B, spares two of the ten matrices of each
    block that streams; as resident blocks it spares one block or two. So the first pays while many stream.
    """
    seconds = [denoise_time(inputs, way).seconds for way in ways]
    soonest = min(seconds) * (1 + ROUNDING)
    return min(
        (way for way, took in zip(ways, seconds, strict=True) if took <= soonest),
        key=lambda way: (times(inputs, way)[0], moved(inputs, way)),
    )


def exceeds(
    inputs: Inputs, choice: Choice, phases: Sequence[str] = (*BEFORE_DECODE, "decode")
) -> DoesNotFitError | None:
    """Where `choice` exceeds the budget most, in `phases`; None if it fits."""
    parts = device_parts(inputs, choice)
    host = host_bytes(inputs, choice, parts)
    asked = [phase for phase in phases if phase in parts]
    needs = [("ram", phase, host[phase], inputs.budget.ram) for phase in asked]
    if inputs.device == "cuda":
        needs += [("vram", phase, sum(parts[phase].values()), inputs.budget.vram) for phase in asked]
    over = [DoesNotFitError(what, phase, n, n - have) for what, phase, n, have in needs if n > have]
    return max(over, key=lambda fault: fault.excess, default=None)


def _rings(inputs: Inputs) -> list[Ring]:
    """Rings to try, the best first. A pinned one is not longer than what can be pinned."""
    chunk = _chunk(inputs)
    if inputs.device == "cuda":
        pinned = [n for n in (CHUNKS, *FEW_CHUNKS) if n * chunk <= inputs.budget.pinned]
        if pinned:
            return [Ring(chunk, n, pinned=True) for n in pinned]
    return [Ring(chunk, n, pinned=False) for n in FEW_CHUNKS]


def _chunk(inputs: Inputs) -> int:
    """Bytes of a chunk: no more than a whole block of a small model and what its reading rounds up to."""
    largest = max(inputs.sizes.blocks.stored, inputs.sizes.text.stored)
    return min(CHUNK, (largest // MIB + 2) * MIB)


def _slices(inputs: Inputs, attention: str = "") -> tuple[int | None, ...]:
    """Slices of tokens to try, the usual first: on the CPU all tokens at once."""
    what = (inputs.sizes, inputs.job.video, inputs.fused, attention)
    usual = usual_slice(*what)
    if inputs.device == "cpu":
        return (None, usual, *SHORT_SLICES)
    return (*sorted({usual, free_slice(*what), LONGEST_SLICE}, reverse=True), *SHORT_SLICES)


def _leanest_start(inputs: Inputs, attention: str) -> Choice:
    """No resident and no cached block; the longest ring and slices that fit."""
    text: Text = "streamed" if inputs.job.encode_text else "known"
    slots = min(SLOTS, inputs.sizes.blocks.count)
    fault = None
    for number, slices in ((slots, _slices(inputs, attention)), (1, SHORT_SLICES[-1:])):
        for ring in _rings(inputs):
            for token_slice in slices:
                choice = Choice(ring, text, 0, 0, number, token_slice, WHOLE, attention=attention)
                fault = exceeds(inputs, choice, BEFORE_DECODE) or _decode_ram(inputs, choice)
                if fault is None:
                    return choice
    assert fault is not None
    raise fault


def _decode_ram(inputs: Inputs, choice: Choice) -> DoesNotFitError | None:
    """Whether RAM is short in the decode, beside such a ring; GPU memory is no matter of the ring."""
    if inputs.device == "cpu":
        return None
    enough = replace(inputs, budget=replace(inputs.budget, vram=1 << 62))
    return exceeds(enough, choice, ("decode",))


def _with_residents(inputs: Inputs, choice: Choice) -> Choice:
    """As many resident blocks as fit, and no slots if that is all of them."""
    count = inputs.sizes.blocks.count
    every = replace(choice, resident=count, slots=0)
    if exceeds(inputs, every, BEFORE_DECODE) is None:
        return every
    low, high = 0, count - choice.slots
    while low < high:
        middle = (low + high + 1) // 2
        fits = exceeds(inputs, replace(choice, resident=middle), BEFORE_DECODE) is None
        low, high = (middle, high) if fits else (low, middle - 1)
    return replace(choice, resident=low)


def _with_stays(inputs: Inputs, choice: Choice, wish: Wish) -> Choice:
    """The text encoder and the VAE stay if they are wanted and all fits together, the fastest decode
    included.
    """
    texts: list[Text] = ["resident"] if wish.text_stays and choice.text == "streamed" else []
    for text in (*texts, choice.text):
        for vae in (True, False) if wish.vae_stays else (False,):
            together = replace(choice, text=text, vae_stays=vae, rung=WHOLE, release=False)
            if exceeds(inputs, together) is None:
                return together
    return choice


def _with_rung(inputs: Inputs, choice: Choice) -> Choice:
    """The fastest rung that fits when the blocks leave; they stay if it fits beside them."""
    alone = replace(choice, rung=WHOLE, release=True)
    if exceeds(inputs, alone, ("decode",)) is not None:
        alone = replace(alone, rung=_tiled(inputs, alone))
    beside = replace(alone, release=False)
    return beside if exceeds(inputs, beside, ("decode",)) is None else alone


def _tiled(inputs: Inputs, choice: Choice) -> Rung:
    """The fastest rung that fits. Raises DoesNotFitError when not even the leanest does."""
    ladder = rungs(inputs.job.height, inputs.job.width)  # a tenth of a second, so only where it is needed
    faults = {rung: exceeds(inputs, replace(choice, rung=rung), ("decode",)) for rung in ladder}
    fitting = [rung for rung, fault in faults.items() if fault is None]
    if not fitting:
        fault = faults[min(ladder, key=lambda rung: decoding(inputs, rung))]
        assert fault is not None
        raise fault
    return min(fitting, key=lambda rung: decode_slowdown(inputs, rung))


def _with_text_cached(inputs: Inputs, choice: Choice, wish: Wish) -> Choice:
    """The text encoder stays in RAM where it is wished to stay on the GPU, which has no room, and RAM has.

    Not where reading it again is faster. It takes no more of the GPU, and of RAM what nobody else could want:
    with more GPU memory more blocks may stream than now, for the sake of the text's keys and values or of
    another attention, and they would be cached first.
    """
    kept = replace(choice, text="cached")
    if not wish.text_stays or choice.text != "streamed":
        return choice
    if text_time(inputs, kept).seconds > text_time(inputs, choice).seconds * (1 + ROUNDING):
        return choice
    most = replace(kept, cached=_most_streamed(inputs, wish), ring=_longest_ring(inputs))
    return kept if exceeds(inputs, most) is None else choice


def _most_streamed(inputs: Inputs, wish: Wish) -> int:
    """Blocks that stream at most, in whichever way a plan with this GPU memory, or more, may be made."""
    count, most = inputs.sizes.blocks.count, 0
    for attention in {"", wish.attention}:
        try:
            start = _leanest_start(inputs, attention)
        except DoesNotFitError:
            return count
        if start.token_slice != _slices(inputs, attention)[0]:
            return count
        filled = _with_residents(inputs, start)
        kept = replace(start, text_kv=True)
        if filled.slots and later_passes(inputs, kept)[1] > 0:
            if exceeds(inputs, kept, BEFORE_DECODE) is not None:
                return count
            filled = _with_residents(inputs, kept)
        most = max(most, count - filled.resident)
    return most


def _longest_ring(inputs: Inputs) -> Ring:
    # Whichever it is: that more may be pinned takes nothing out of RAM.
    return Ring(_chunk(inputs), CHUNKS, pinned=False)


def with_cache(inputs: Inputs, choice: Choice) -> Choice:
    """As many cached blocks as fit in RAM, as long as that is no slower than reading them from the disk.

    A text encoder in RAM leaves if it is in their way.
    """
    if choice.text == "cached":
        alone = with_cache(inputs, replace(choice, text="streamed"))
        beside = replace(alone, text="cached")
        fits = exceeds(inputs, replace(beside, ring=_longest_ring(inputs))) is None
        return beside if fits else alone
    choice = replace(choice, cached=0)
    if inputs.device == "cpu":
        return choice
    longest = _longest_ring(inputs)
    streamed = inputs.sizes.blocks.count - choice.resident
    best, seconds = choice, inf
    for cached in range(streamed + 1):
        candidate = replace(choice, cached=cached)
        if exceeds(inputs, replace(candidate, ring=longest), ("denoise", "decode")) is not None:
            break
        took = denoise_time(inputs, candidate).seconds
        if took <= seconds:
            best, seconds = candidate, took
    return best


# ----------------------------------------------------------------------------------------------------- leaner


def leaner(inputs: Inputs, choice: Choice, phase: str) -> list[Choice]:
    """What may be tried when memory ran out in `phase`, least change first; not each takes less."""
    if phase == "decode":
        now = decoding(inputs, choice.rung)
        ladder = rungs(inputs.job.height, inputs.job.width)
        smaller = [rung for rung in ladder if decoding(inputs, rung) < now]
        released = [replace(choice, release=True)] if not choice.release else []
        return [*released, *_leaving(choice), *(replace(choice, rung=rung, release=True) for rung in smaller)]
    ways: list[Choice] = []
    if phase == "denoise" and choice.text_kv:
        choice = replace(choice, text_kv=False)
        ways = [choice]
    ways += _leaving(choice) + _fewer_blocks(inputs, choice)
    if phase == "denoise":
        ways += _other_bits(inputs, ways[-1] if ways else choice)
    return [*ways, replace(choice, resident=0, slots=1)]


def _other_bits(inputs: Inputs, choice: Choice) -> list[Choice]:
    """Shorter slices, then attention in 16 bits: what may change the picture, or does."""
    tokens = inputs.job.video.tokens
    now = min(choice.token_slice or tokens, tokens)
    slices = [n for n in _slices(inputs, choice.attention) if n is not None and n < now]
    ways = [replace(choice, token_slice=n) for n in slices]
    if choice.attention:
        usual = _slices(inputs)[0]
        ways.append(replace(choice, attention="", token_slice=now if usual is None else min(now, usual)))
    return ways


def _leaving(choice: Choice) -> list[Choice]:
    """The same without what only stays for the next video."""
    without_text = replace(choice, text="streamed") if choice.text == "resident" else choice
    ways = [without_text] if choice.text == "resident" else []
    return [*ways, replace(without_text, vae_stays=False)] if choice.vae_stays else ways


def _fewer_blocks(inputs: Inputs, choice: Choice) -> list[Choice]:
    """Half the resident blocks, and half of those, down to none."""
    count, resident = inputs.sizes.blocks.count, choice.resident
    ways = []
    while resident:
        resident //= 2
        ways.append(replace(choice, resident=resident, slots=min(SLOTS, count - resident)))
    return ways
