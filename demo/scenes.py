"""The world of the demo model: one coloured shape that moves over a plain background.

Three shapes, six colours, five motions and four backgrounds make 360 scenes; 36 of them, chosen by a fixed
rule, are held out of training. A scene and a starting point say every pixel, so a program can check a video.
"""

import random
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

HEIGHT, WIDTH, FRAMES = 96, 160, 17

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 85, 235),
    "yellow": (245, 220, 50),
    "purple": (175, 50, 205),
    "cyan": (45, 215, 225),
}
# Displacement over the whole clip, in pixels (x to the right, y down).
MOTIONS = {
    "left": (-56.0, 0.0),
    "right": (56.0, 0.0),
    "up": (0.0, -32.0),
    "down": (0.0, 32.0),
    "still": (0.0, 0.0),
}
BACKGROUNDS = {"black": (12, 12, 12), "white": (242, 242, 242), "gray": (128, 128, 128), "navy": (18, 24, 84)}

# Half width and half height of each shape's bounding box, in pixels.
HALF_EXTENT = {"circle": (20.0, 20.0), "square": (18.0, 18.0), "triangle": (23.0, 22.0)}
MARGIN = 5.0  # the object never comes nearer to the border than this
START_SPAN = (48.0, 24.0)  # widest range of the starting point
SOFT_EDGE = 1.6  # width of the edge's ramp, in pixels

SHAPE_WORDS = {"circle": ("circle", "disc", "ball"), "square": ("square", "box"), "triangle": ("triangle",)}
COLOUR_WORDS = {"purple": ("purple", "violet"), "cyan": ("cyan", "turquoise")}
BACKGROUND_WORDS = {"gray": ("gray", "grey")}
_MOVING_VERBS = ("moves {0}", "slides {0}", "goes {0}", "moves to the {0}", "is moving {0}", "drifts {0}")
_STILL_VERBS = ("stays still", "does not move", "stands still", "rests", "is still")

TEMPLATES = (
    "a {colour} {shape} {verb} on a {background} background",
    "on a {background} background, a {colour} {shape} {verb}",
    "{background} background, a {colour} {shape} {verb}",
    "a {colour} {shape} {verb} over a {background} background",
    "the {shape} is {colour}, it {verb}, the background is {background}",
    "the {colour} {shape} {verb}. the background is {background}",
)
# Never used in training: how well does the model read an unknown order of known words?
HELD_OUT_TEMPLATE = "the background is {background} and on it the {shape}, {colour}, {verb}"


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: a name from each of SHAPES, COLOURS, MOTIONS and BACKGROUNDS."""

    shape: str
    colour: str
    motion: str
    background: str

    def indices(self) -> tuple[int, int, int, int]:
        """Position of each attribute in its table."""
        return (
            SHAPES.index(self.shape),
            list(COLOURS).index(self.colour),
            list(MOTIONS).index(self.motion),
            list(BACKGROUNDS).index(self.background),
        )

    def prompt(self) -> str:
        """The plain phrasing, used for scoring and in the documentation."""
        return describe(self, TEMPLATES[0], self.shape, self.colour, _verbs(self.motion)[0], self.background)


def describe(scene: Scene, template: str, shape: str, colour: str, verb: str, background: str) -> str:
    """Fill `template` with the chosen words; `verb` may hold a place for the direction."""
    return template.format(shape=shape, colour=colour, verb=verb.format(scene.motion), background=background)


def _verbs(motion: str) -> tuple[str, ...]:
    return _STILL_VERBS if motion == "still" else _MOVING_VERBS


def phrase(scene: Scene, choice: random.Random) -> str:
    """A random training phrasing of `scene` (synonyms, word order, capital, full stop)."""
    text = describe(
        scene,
        choice.choice(TEMPLATES),
        choice.choice(SHAPE_WORDS[scene.shape]),
        choice.choice(COLOUR_WORDS.get(scene.colour, (scene.colour,))),
        choice.choice(_verbs(scene.motion)),
        choice.choice(BACKGROUND_WORDS.get(scene.background, (scene.background,))),
    )
    # A prompt may leave something out: no background means black, no motion means still.
    if scene.background == "black" and choice.random() < 0.15:
        text = f"a {scene.colour} {scene.shape} {choice.choice(_verbs(scene.motion)).format(scene.motion)}"
    elif scene.motion == "still" and choice.random() < 0.15:
        text = f"a {scene.colour} {scene.shape} on a {scene.background} background"
    return text + "." if choice.random() < 0.3 else text


def held_out_phrase(scene: Scene) -> str:
    """The phrasing that training never shows."""
    verb = _verbs(scene.motion)[0]
    return describe(scene, HELD_OUT_TEMPLATE, scene.shape, scene.colour, verb, scene.background)


def words() -> list[str]:
    """Every word and sign of the grammar, sorted: the tokenizer's vocabulary."""
    texts = [*TEMPLATES, HELD_OUT_TEMPLATE, *_MOVING_VERBS, *_STILL_VERBS, *MOTIONS, *COLOURS, *BACKGROUNDS]
    for table in (SHAPE_WORDS, COLOUR_WORDS, BACKGROUND_WORDS):
        for names in table.values():
            texts.extend(names)
    places = ("{colour}", "{shape}", "{verb}", "{background}", "{0}")
    found = {",", "."}
    for text in texts:
        for place in places:
            text = text.replace(place, " ")
        found.update(text.replace(",", " ").replace(".", " ").split())
    return sorted(found)


ALL_SCENES = tuple(Scene(*names) for names in product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS))


def is_held_out(scene: Scene) -> bool:
    """A fixed tenth of the combinations; every pair of attribute values still occurs in training."""
    shape, colour, motion, background = scene.indices()
    return (shape + 3 * colour + 2 * motion + 5 * background) % 10 == 0


TRAIN_SCENES = tuple(scene for scene in ALL_SCENES if not is_held_out(scene))
HELD_OUT_SCENES = tuple(scene for scene in ALL_SCENES if is_held_out(scene))


def scene_indices(scenes: list[Scene], device: torch.device | str = "cpu") -> Tensor:
    """(B, 4) int64 table positions of shape, colour, motion and background."""
    return torch.tensor([scene.indices() for scene in scenes], dtype=torch.int64, device=device)


def start_box(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest starting centre, (B, 2) each in pixels, so that the path stays inside the frame."""
    device = indices.device
    half = torch.tensor([HALF_EXTENT[s] for s in SHAPES], device=device)[indices[:, 0]]
    step = torch.tensor(list(MOTIONS.values()), device=device)[indices[:, 2]]
    size = torch.tensor([float(WIDTH), float(HEIGHT)], device=device)
    low = half + MARGIN - step.clamp(max=0)
    high = size - half - MARGIN - step.clamp(min=0)
    excess = ((high - low) - torch.tensor(START_SPAN, device=device)).clamp(min=0) / 2
    return low + excess, high - excess


def centre_path(indices: Tensor, start: Tensor, frames: int = FRAMES) -> Tensor:
    """Centre of the object in each frame, (B, F, 2) in pixels; `start` (B, 2) is in 0..1 of the start box."""
    low, high = start_box(indices)
    step = torch.tensor(list(MOTIONS.values()), device=indices.device)[indices[:, 2]]
    time = torch.linspace(0, 1, frames, device=indices.device)[None, :, None]
    return (low + (high - low) * start)[:, None] + step[:, None] * time


def signed_distance(shape: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Distance to the outline, negative inside; `shape` (B,) and offsets from the centre (B, ..., H, W)."""
    circle = torch.sqrt(dx * dx + dy * dy) - HALF_EXTENT["circle"][0]
    square = torch.maximum(dx.abs(), dy.abs()) - HALF_EXTENT["square"][0]
    half_width, half_height = HALF_EXTENT["triangle"]
    # Apex above, base below: inside both slanted half planes and above the base.
    slope = (2 * half_height * dx.abs() - half_width * (dy + half_height)) / (
        4 * half_height**2 + half_width**2
    ) ** 0.5
    triangle = torch.maximum(slope, dy - half_height)
    shape = shape.view(-1, *[1] * (dx.dim() - 1))
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))


def draw(
    indices: Tensor, path: Tensor, height: int = HEIGHT, width: int = WIDTH, origin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw scenes with anti-aliased edges.

    `indices` (B, 4), `path` (B, F, 2) centres in pixels, `origin` (B, 2) the top left pixel of a crop.
    Returns frames (B, 3, F, H, W) in [-1, 1] and signed distances (B, F, H, W) in pixels, both fp32.
    """
    device = indices.device
    ys = torch.arange(height, device=device).view(1, 1, height, 1) + 0.5
    xs = torch.arange(width, device=device).view(1, 1, 1, width) + 0.5
    if origin is not None:
        path = path - origin[:, None]
    distance = signed_distance(indices[:, 0], xs - path[..., 0, None, None], ys - path[..., 1, None, None])
    inside = (0.5 - distance / SOFT_EDGE).clamp(0, 1)[:, None]  # (B, 1, F, H, W)
    palette = torch.tensor(list(COLOURS.values()), device=device) / 127.5 - 1
    grounds = torch.tensor(list(BACKGROUNDS.values()), device=device) / 127.5 - 1
    colour = palette[indices[:, 1]][:, :, None, None, None]
    ground = grounds[indices[:, 3]][:, :, None, None, None]
    return ground + (colour - ground) * inside, distance


def render(indices: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Full clips (B, 3, 17, 96, 160) in [-1, 1] and signed distances (B, 17, 96, 160)."""
    return draw(indices, centre_path(indices, start))
