"""The scorer: real scenes are right in everything, and each kind of mistake is seen as what it is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from demo.scenes import ALL_SCENES, BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene, draw, render, scene_indices
from demo.score import ATTRIBUTES, judge, read_video, score_video, shares, table

TABLES = {"shape": SHAPES, "colour": COLOURS, "motion": MOTIONS, "background": BACKGROUNDS}


def video(scene: Scene, seed: int = 0) -> np.ndarray:
    """uint8 (F, H, W, 3) of a scene at a random starting point."""
    start = torch.rand(1, 2, generator=torch.Generator().manual_seed(seed))
    frames, _ = render(scene_indices([scene]), start)
    return ((frames[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


SOME = [ALL_SCENES[i] for i in range(0, 360, 31)]


@pytest.mark.parametrize("scene", SOME, ids=Scene.prompt)
def test_real_scenes_are_right(scene):
    assert all(score_video(video(scene, seed=sum(scene.indices())), scene).values())


def test_real_scenes_with_noise_and_blur_are_right():
    generator = torch.Generator().manual_seed(5)
    for scene in SOME[:3]:
        frames = torch.from_numpy(video(scene)).float().permute(0, 3, 1, 2)
        soft = torch.nn.functional.avg_pool2d(frames, 3, stride=1, padding=1, count_include_pad=False)
        noisy = soft + 6 * torch.randn(soft.shape, generator=generator)
        assert all(score_video(noisy.permute(0, 2, 3, 1).clamp(0, 255) / 255, scene).values())


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_each_wrong_attribute_is_seen_as_that_one(attribute):
    for scene in SOME[:3]:
        reading = read_video(video(scene))
        for other in TABLES[attribute]:
            asked = replace(scene, **{attribute: other})
            result = judge(reading, asked)
            assert result[attribute] == (other == getattr(scene, attribute))
            assert all(result[name] for name in ATTRIBUTES if name != attribute)
            assert result["all"] == (asked == scene)


def test_floats_and_tensors_score_like_bytes():
    scene = SOME[3]
    shown = video(scene)
    expected = read_video(shown)
    assert read_video(shown.astype(np.float32) / 255) == expected
    assert read_video(torch.from_numpy(shown)) == expected


def test_blank_and_noise_are_wrong():
    scene = Scene("circle", "red", "left", "black")
    blank = np.full((17, 96, 160, 3), 12, dtype=np.uint8)
    assert [score_video(blank, scene)[name] for name in ATTRIBUTES] == [False, False, False, True]
    noise = np.random.default_rng(0).integers(0, 256, (17, 96, 160, 3), dtype=np.uint8)
    assert not any(score_video(noise, scene).values())


def test_an_object_that_vanishes_or_turns_back_is_wrong():
    scene = Scene("square", "green", "right", "white")
    shown = video(scene)
    vanishing = shown.copy()
    vanishing[12:] = 242
    assert not score_video(vanishing, scene)["shape"]
    there_and_back = np.concatenate([shown[::2], shown[::-2][1:]])
    assert not score_video(there_and_back, scene)["motion"]


def test_two_objects_are_no_shape():
    first = torch.tensor([[[40.0, 40.0]]]).expand(1, 17, 2)
    second = torch.tensor([[[100.0, 50.0]]]).expand(1, 17, 2)
    scene = Scene("circle", "red", "still", "white")
    indices = scene_indices([scene])
    both = torch.minimum(draw(indices, first)[0], draw(indices, second)[0])
    frames = ((both[0] + 1) / 2).permute(1, 2, 3, 0)
    assert not score_video(frames, scene)["shape"]


@pytest.mark.parametrize("kind", ["diamond", "ring", "bar", "upside down"])
def test_other_outlines_are_no_shape_of_ours(kind):
    ys, xs = np.mgrid[0:96, 0:160]
    x, y = xs - 80.0, ys - 48.0
    inside = {
        "diamond": abs(x) + abs(y) < 24,
        "ring": (np.hypot(x, y) < 24) & (np.hypot(x, y) > 14),
        "bar": (abs(x) < 30) & (abs(y) < 10),
        "upside down": (abs(y) < 22) & (abs(x) < (22 - y) / 44 * 23),
    }[kind]
    frame = np.where(inside[..., None], np.uint8([225, 40, 40]), np.uint8([242, 242, 242]))
    reading = read_video(np.stack([frame] * 17))
    assert reading.shape is None
    assert reading.colour == "red"


def test_shares_and_table():
    scene = SOME[0]
    right = score_video(video(scene), scene)
    wrong = score_video(video(scene), replace(scene, colour="blue" if scene.colour != "blue" else "red"))
    row = shares([right, wrong])
    assert row == {"shape": 1.0, "colour": 0.5, "motion": 1.0, "background": 1.0, "all": 0.5}
    assert "| half | 1.000 | 0.500 | 1.000 | 1.000 | 0.500 |" in table({"half": row})


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="expected"):
        read_video(np.zeros((96, 160, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="at least one"):
        shares([])
