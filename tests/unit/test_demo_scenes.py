"""The demo's scenes: combinations, the held-out split, phrasings, and what is drawn."""

import itertools
import random

import pytest
import torch

from demo.scenes import (
    ALL_SCENES,
    BACKGROUNDS,
    COLOURS,
    FRAMES,
    HEIGHT,
    HELD_OUT_SCENES,
    MOTIONS,
    SHAPES,
    TRAIN_SCENES,
    WIDTH,
    Scene,
    centre_path,
    held_out_phrase,
    phrase,
    render,
    scene_indices,
)
from demo.tokenizer import build_tokenizer, save_tokenizer


def test_the_split_is_a_tenth_and_disjoint():
    assert len(ALL_SCENES) == 360
    assert len(HELD_OUT_SCENES) == 36
    assert not set(HELD_OUT_SCENES) & set(TRAIN_SCENES)
    assert set(HELD_OUT_SCENES) | set(TRAIN_SCENES) == set(ALL_SCENES)


def test_training_shows_every_pair_of_attribute_values():
    tables = {"shape": SHAPES, "colour": COLOURS, "motion": MOTIONS, "background": BACKGROUNDS}
    for first, second in itertools.combinations(tables, 2):
        seen = {(getattr(s, first), getattr(s, second)) for s in TRAIN_SCENES}
        assert seen == set(itertools.product(tables[first], tables[second]))


def test_held_out_scenes_hold_every_attribute_value():
    for name, table in {
        "shape": SHAPES,
        "colour": COLOURS,
        "motion": MOTIONS,
        "background": BACKGROUNDS,
    }.items():
        assert {getattr(scene, name) for scene in HELD_OUT_SCENES} == set(table)


def test_phrasings_differ_and_use_known_words_only():
    tokenizer, choice = build_tokenizer(), random.Random(3)
    for scene in ALL_SCENES:
        texts = {phrase(scene, choice) for _ in range(8)} | {scene.prompt(), held_out_phrase(scene)}
        assert len(texts) > 3
        for text in texts:
            ids = tokenizer.encode(text).ids
            assert 2 not in ids, text
            assert ids[-1] == 1
            assert len(ids) <= 32


def test_the_held_out_phrasing_is_never_trained_on():
    choice = random.Random(4)
    scene = Scene("circle", "red", "up", "navy")
    assert held_out_phrase(scene) not in {phrase(scene, choice).rstrip(".") for _ in range(500)}


def test_tokenizer_file_reads_back(tmp_path):
    from runtime.tokenizer import PromptTokenizer

    tokens = PromptTokenizer(save_tokenizer(tmp_path), max_length=32)("A RED circle moves left, zebra.")
    words = build_tokenizer()
    assert tokens.ids[: tokens.n] == words.encode("a red circle moves left, zebra.").ids
    assert tokens.unknown == ["zebra"]


@pytest.mark.parametrize("motion", list(MOTIONS))
def test_the_object_stays_inside_and_moves_as_said(motion):
    scenes = [s for s in ALL_SCENES if s.motion == motion]
    indices = scene_indices(scenes)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)))[torch.arange(len(scenes)) % 4]
    path = centre_path(indices, corners)
    moved = path[:, -1] - path[:, 0]
    assert torch.allclose(moved, torch.tensor(MOTIONS[motion]).expand_as(moved), atol=1e-3)
    frames, distance = render(indices[::9], corners[::9])
    assert frames.shape == (len(indices[::9]), 3, FRAMES, HEIGHT, WIDTH)
    assert frames.min() >= -1
    assert frames.max() <= 1
    inside = distance < 1
    for edge in (inside[..., :4, :], inside[..., -4:, :], inside[..., :4], inside[..., -4:]):
        assert not edge.any()


def test_a_seed_of_start_moves_the_object():
    indices = scene_indices([ALL_SCENES[0]] * 2)
    frames, _ = render(indices, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert (frames[0] - frames[1]).abs().mean() > 0.01
