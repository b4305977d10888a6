"""What sets one plan apart from the one before it, in words: for the user and for the video's record."""

from runtime.memory.plan import Plan


def change(before: Plan, after: Plan) -> str:
    """The differences that make `after` leaner: `12 instead of 24 resident blocks, decode "2x2"`."""
    found = []
    if before.text_kv and not after.text_kv:
        found.append("the text's keys and values made in each step")
    if before.attention and not after.attention:
        found.append("attention in 16 bits")
    if after.token_slice != before.token_slice:
        found.append(f"slices of {after.token_slice} tokens")
    if len(after.blocks.resident) != len(before.blocks.resident):
        found.append(
            f"{len(after.blocks.resident)} instead of {len(before.blocks.resident)} blocks on the GPU"
        )
    if after.blocks.slots < before.blocks.slots:
        found.append(f"{after.blocks.slots} instead of {before.blocks.slots} slots")
    if after.text != before.text:
        read = "read from disk for each prompt" if before.text == "cached" else after.text
        found.append(f"the text encoder {read}")
    if before.vae_stays and not after.vae_stays:
        found.append("the VAE in RAM between decodes")
    if after.release_for_decode and not before.release_for_decode:
        found.append("no blocks on the GPU during the decode")
    if after.rung != before.rung:
        found.append(f"decode rung {after.rung.name}")
    return ", ".join(found) or "a leaner plan"
