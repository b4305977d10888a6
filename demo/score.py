"""Does a video show the scene it was asked for? Decided from pixels alone.

Background: the border's colour. Shape: the outline whose mask agrees best with the object's, after both are
scaled to the object's bounding box. Colour: a vote of the object's pixels. Motion: the path of the centroid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from demo.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene

ATTRIBUTES = ("shape", "colour", "motion", "background")

BORDER = 4  # pixels; the object never comes this near to the edge of the frame
GROUND_TOLERANCE = (
    60.0  # largest RGB distance (0..255 a channel) of the border's median from a named background
)
CLEAN_BORDER = 0.9  # share of border pixels that must lie within the tolerance of the border's own median
AREA = (500.0, 2400.0)  # pixels of the object in a 96 x 160 frame: nominal 1012 to 1296
OVERLAP = 0.8  # smallest mean intersection over union with the best outline
STILL, MOVED_X, MOVED_Y = 8.0, 28.0, 16.0  # pixels over the clip; nominal 0, 56, 32


@dataclass(frozen=True)
class Reading:
    """What the pixels show; None where they show nothing that has a name."""

    shape: str | None
    colour: str | None
    motion: str | None
    background: str | None


def score_video(frames: np.ndarray | Tensor, scene: Scene) -> dict[str, bool]:
    """Right or wrong for each attribute of `scene`, and `all`.

    `frames` (F, H, W, 3): uint8, or floating point in 0..1.
    """
    return judge(read_video(frames), scene)


def judge(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Compare a reading with the scene that was asked for."""
    right = {name: getattr(reading, name) == getattr(scene, name) for name in ATTRIBUTES}
    right["all"] = all(right.values())
    return right


def read_video(frames: np.ndarray | Tensor) -> Reading:
    """Read a video of shape (F, H, W, 3), uint8 or floating point in 0..1."""
    video = torch.as_tensor(frames)
    if video.dim() != 4 or video.shape[-1] != 3:
        raise ValueError(f"frames have shape {tuple(video.shape)}; expected (frames, height, width, 3)")
    video = video.float() * (1.0 if video.dtype == torch.uint8 else 255.0)
    ground, background = _background(video)
    away = (video - ground).norm(dim=-1)  # (F, H, W)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=video.device)
    strong = away > 60.0
    if int(strong.sum()) < video.shape[0] * AREA[0] / 2:
        return Reading(None, None, None, background)
    nearest = torch.cdist(video[strong], palette).argmin(dim=1)
    votes = torch.bincount(nearest, minlength=len(COLOURS)).float()
    best = int(votes.argmax())
    clear = float(votes[best] / votes.sum()) > 0.6
    # The object's own mean colour splits object from ground halfway along the line between the two.
    colour = video[strong][nearest == best].mean(dim=0)
    clear = clear and float((colour - palette[best]).norm()) < 80.0
    line = colour - ground
    mask = ((video - ground) @ line) / (line @ line) > 0.5
    boxes = _boxes(mask)
    shape = None if boxes is None else _shape(mask, boxes)
    motion = None if boxes is None else _motion(mask)
    return Reading(shape, list(COLOURS)[best] if clear else None, motion, background)


def _background(video: Tensor) -> tuple[Tensor, str | None]:
    """The border's median colour, and its name when the border is plain and the colour has one."""
    edge = torch.ones(video.shape[1:3], dtype=torch.bool, device=video.device)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    border = video[:, edge].reshape(-1, 3)
    ground = border.median(dim=0).values
    plain = float(((border - ground).norm(dim=-1) < GROUND_TOLERANCE).float().mean())
    named = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=video.device)
    distance = (named - ground).norm(dim=-1)
    best = int(distance.argmin())
    if plain < CLEAN_BORDER or float(distance[best]) > GROUND_TOLERANCE:
        return ground, None
    return ground, list(BACKGROUNDS)[best]


def _boxes(mask: Tensor) -> Tensor | None:
    """Bounding box of the object in each frame, (F, 4) as x0, x1, y0, y1; None unless each frame has one.

    A row or column counts once two of its pixels are set, so a stray pixel does not move the box.
    """
    area = mask.sum(dim=(1, 2))
    if bool((area < AREA[0]).any()) or bool((area > AREA[1]).any()):
        return None
    boxes = []
    for frame in mask:
        columns = (frame.sum(dim=0) >= 2).nonzero().flatten()
        rows = (frame.sum(dim=1) >= 2).nonzero().flatten()
        boxes.append([int(columns[0]), int(columns[-1]) + 1, int(rows[0]), int(rows[-1]) + 1])
    return torch.tensor(boxes, dtype=torch.float32, device=mask.device)


def _shape(mask: Tensor, boxes: Tensor) -> str | None:
    """The outline with the best mean overlap, when the boxes are near square and the overlap is good."""
    x0, x1, y0, y1 = (boxes[:, i, None, None] for i in range(4))
    aspect = ((x1 - x0) / (y1 - y0)).flatten()
    if bool((aspect < 0.66).any()) or bool((aspect > 1.5).any()):
        return None
    ys = torch.arange(mask.shape[1], device=mask.device).view(1, -1, 1) + 0.5
    xs = torch.arange(mask.shape[2], device=mask.device).view(1, 1, -1) + 0.5
    u = (2 * xs - x0 - x1) / (x1 - x0)  # -1..1 across the box
    v = (2 * ys - y0 - y1) / (y1 - y0)
    outlines = {
        "circle": u * u + v * v <= 1,
        "square": torch.maximum(u.abs(), v.abs()) <= 1,
        "triangle": (v.abs() <= 1) & (u.abs() <= (v + 1) / 2),
    }
    overlaps = []
    for name in SHAPES:
        outline = outlines[name]
        both = (mask & outline).sum(dim=(1, 2)).float()
        overlaps.append((both / (mask | outline).sum(dim=(1, 2))).mean())
    best = int(torch.stack(overlaps).argmax())
    return SHAPES[best] if float(overlaps[best]) >= OVERLAP else None


def _motion(mask: Tensor) -> str | None:
    """Direction of the centroid's path: far enough, straight enough and without turning back."""
    weight = mask.float()
    area = weight.sum(dim=(1, 2))
    ys = torch.arange(mask.shape[1], device=mask.device, dtype=torch.float32)
    xs = torch.arange(mask.shape[2], device=mask.device, dtype=torch.float32)
    path = torch.stack([(weight.sum(dim=1) @ xs) / area, (weight.sum(dim=2) @ ys) / area], dim=1)  # (F, 2)
    net = path[-1] - path[0]
    length = float((path[1:] - path[:-1]).norm(dim=1).sum())
    dx, dy = float(net[0]), float(net[1])
    spread = float((path.max(dim=0).values - path.min(dim=0).values).max())
    if spread < STILL:
        return "still"
    if length > 1.5 * float(net.norm()) + 4:
        return None
    if abs(dx) >= MOVED_X and abs(dy) < 0.35 * abs(dx):
        return "right" if dx > 0 else "left"
    if abs(dy) >= MOVED_Y and abs(dx) < 0.35 * abs(dy):
        return "down" if dy > 0 else "up"
    return None


def shares(results: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Share of right answers for each attribute and for all together."""
    if not results:
        raise ValueError("there are no results; score at least one video")
    return {name: sum(r[name] for r in results) / len(results) for name in (*ATTRIBUTES, "all")}


def table(rows: dict[str, dict[str, float]]) -> str:
    """A markdown table with one row of shares for each name."""
    lines = ["| | shape | colour | motion | background | all |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[a]:.3f}" for a in (*ATTRIBUTES, "all")) + " |")
    return "\n".join(lines)
