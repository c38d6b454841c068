"""The toy world: "a red circle on a blue background", drawn on 32x32 pixels and measured from the pixels
alone.

Attributes are integers [..., 3]: shape, color and background, as positions in SHAPES, COLORS, COLORS.
Position, size and shade vary at random and are not part of the caption, so that correct pictures of one
caption stay diverse. Pictures are uint8 [N, 32, 32, 3].
"""

import itertools

import numpy as np

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "white")
RGB = np.array([(215, 40, 45), (35, 150, 65), (45, 70, 205), (240, 205, 45), (240, 240, 240)], np.float32)

# Every combination with color != background, [80, 3]. One shape of each (color, background) is held out:
# a quarter of the combinations, while every pair of values still occurs in training.
COMBINATIONS = np.array(
    [(s, c, b) for s, c, b in itertools.product(range(len(SHAPES)), range(len(COLORS)), range(len(COLORS)))
     if c != b]
)
HELD_OUT = (COMBINATIONS[:, 1] + COMBINATIONS[:, 2]) % len(SHAPES) == COMBINATIONS[:, 0]

RADIUS = (8.5, 10.5)  # pixels
SHIFT = 3.0  # pixels, of the center, in each direction
SHADE = 12.0  # each color channel of shape and background varies by up to this much


def caption(attributes) -> str:
    """Return the caption of (shape, color, background)."""
    shape, color, background = attributes
    return f"a {COLORS[color]} {SHAPES[shape]} on a {COLORS[background]} background"


_ATTRIBUTES = {caption(c): tuple(int(v) for v in c) for c in COMBINATIONS}


def attributes(captions) -> np.ndarray:
    """Return the attributes of captions of this world, int [N, 3]."""
    return np.array([_ATTRIBUTES[c] for c in captions])


def captions(held_out: bool | None = None) -> list[str]:
    """Return the captions of the training combinations (False), of the held-out ones (True), or all (None).
    """
    chosen = COMBINATIONS if held_out is None else COMBINATIONS[HELD_OUT == held_out]
    return [caption(c) for c in chosen]


def _masks(shape, radius, center) -> np.ndarray:
    """Return the shape's coverage of every pixel, fp32 [N, 32, 32].

    shape: int [N]; radius: [N]; center: [N, 2] (x, y).

    Each shape is a signed distance in pixels; half a pixel on either side of the edge is anti-aliased.
    """
    grid = np.arange(SIZE, dtype=np.float32)
    radius = np.asarray(radius, np.float32)[:, None, None]
    center = np.asarray(center, np.float32)
    x, y = grid[None, :] - center[:, 0, None, None], grid[:, None] - center[:, 1, None, None]
    x, y = np.broadcast_arrays(x, y)
    ax, ay = np.abs(x), np.abs(y)
    circle = np.hypot(x, y) - radius
    square = np.maximum(ax, ay) - 0.9 * radius
    half = 1.1 * radius  # half the base; apex at y = -radius, base at y = +0.9 radius
    side = (1.9 * radius * ax - half * (y + radius)) / np.hypot(1.9 * radius, half)
    triangle = np.maximum(side, y - 0.9 * radius)
    arm = 0.36 * radius
    cross = np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ax - arm, ay - radius))
    distance = np.choose(np.asarray(shape)[:, None, None], [circle, square, triangle, cross])
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def render(wanted, rng: np.random.Generator) -> np.ndarray:
    """Render captions, or attributes int [N, 3], to pictures uint8 [N, 32, 32, 3].

    One caption gives one picture [32, 32, 3].
    """
    if isinstance(wanted, str):
        return render([wanted], rng)[0]
    if isinstance(wanted[0], str):
        wanted = attributes(wanted)
    wanted = np.asarray(wanted)
    n = len(wanted)
    middle = (SIZE - 1) / 2
    mask = _masks(wanted[:, 0], rng.uniform(*RADIUS, n),
                  middle + rng.uniform(-SHIFT, SHIFT, (n, 2)))[..., None]
    front, back = (RGB[wanted[:, i]] + rng.uniform(-SHADE, SHADE, (n, 3)).astype(np.float32) for i in (1, 2))
    pictures = mask * front[:, None, None] + (1 - mask) * back[:, None, None]
    return np.clip(pictures + 0.5, 0, 255).astype(np.uint8)


# Templates that measure() compares with: every shape at five sizes, centered, as Fourier transforms.
_T_SHAPE, _T_RADIUS = (a.ravel()
                       for a in np.meshgrid(np.arange(len(SHAPES)), np.linspace(*RADIUS, 5), indexing="ij"))
_TEMPLATES = _masks(_T_SHAPE, _T_RADIUS, np.full((len(_T_SHAPE), 2), (SIZE - 1) / 2))
_T_FOURIER = np.conj(np.fft.rfft2(_TEMPLATES))
FAR_COLOR = 75.0  # RGB distance beyond which a color has no name; the names are > 130 apart
FAR_SHAPE = 0.25  # share of its area by which a shape's mask may differ from the best template


def measure(pictures) -> np.ndarray:
    """Measure the attributes, int [N, 3], of pictures uint8 [N, 32, 32, 3] from the pixels alone; -1 where
    they are unclear.

    Background: median color of the border. Color: mean color of the pixels that are far from the background,
    without those on the edge. Shape: best template over all positions for the soft mask between these two
    colors.
    """
    pictures = np.asarray(pictures)
    return np.concatenate([_measure(pictures[i : i + 256]) for i in range(0, len(pictures), 256)])


def _measure(pictures):
    p = pictures.astype(np.float32)
    n = len(p)
    border = np.concatenate([p[:, 0], p[:, -1], p[:, :, 0], p[:, :, -1]], axis=1)  # [n, 128, 3]
    back = np.median(border, axis=1)
    difference = p - back[:, None, None]
    far = np.linalg.norm(difference, axis=-1)
    # The strongest third of a shape's smallest area (a cross of radius 8.5: 170 pixels) is inside the shape.
    threshold = np.partition(far.reshape(n, -1), -60, axis=1)[:, -60]
    inside = (far >= 0.9 * threshold[:, None, None])[..., None]
    front = (p * inside).sum((1, 2)) / inside.sum((1, 2))
    found = np.empty((n, 3), int)
    for i, color in ((1, front), (2, back)):
        distance = np.linalg.norm(color[:, None] - RGB, axis=-1)
        found[:, i] = np.where(distance.min(1) < FAR_COLOR, distance.argmin(1), -1)
    direction = front - back
    length = np.maximum((direction**2).sum(-1), 1.0)[:, None, None]
    mask = np.clip((difference * direction[:, None, None]).sum(-1) / length, 0, 1)  # [n, 32, 32]
    # |mask - template|^2 at every shift, from one correlation: [n, templates, 32, 32]
    overlap = np.fft.irfft2(np.fft.rfft2(mask)[:, None] * _T_FOURIER, s=(SIZE, SIZE)).max((-1, -2))
    area = (_TEMPLATES**2).sum((-1, -2))
    error = ((mask**2).sum((-1, -2))[:, None] + area - 2 * overlap) / area  # [n, templates]
    best = error.argmin(1)
    found[:, 0] = np.where(error.min(1) < FAR_SHAPE, _T_SHAPE[best], -1)
    found[:, 1] = np.where(found[:, 1] == found[:, 2], -1, found[:, 1])
    return found


def right(pictures, captions) -> np.ndarray:
    """Return whether each of N pictures uint8 [N, 32, 32, 3] shows what its caption asks for, bool [N]."""
    return (measure(pictures) == attributes(captions)).all(-1)


# Probabilities that a loser differs from the winner in 1, 2 or 3 attributes.
_CHANGES = (0.6, 0.25, 0.15)


def pairs(n: int, seed: int, held_out: bool = False) -> dict:
    """Render n preference pairs, as columns in Pick-a-Pic's layout.

    caption: list[str]. picture_0, picture_1: uint8 [n, 32, 32, 3]. label_0, label_1: fp32 [n], 1 for the
    winner. The winner is correct; the loser is wrong in one or more attributes. Captions, and in training the
    losers too, use only the combinations of their split.
    """
    rng = np.random.default_rng((seed, int(held_out)))
    asked = COMBINATIONS[HELD_OUT == held_out]
    others = COMBINATIONS if held_out else asked
    changed = (asked[:, None] != others[None]).sum(-1)  # [asked, others]
    want = rng.integers(len(asked), size=n)
    number = rng.choice([1, 2, 3], size=n, p=_CHANGES)
    # A uniform choice among the others with the chosen number of changes: the largest of random keys.
    keys = rng.random((n, len(others))) * (changed[want] == number[:, None])
    winner, loser = render(asked[want], rng), render(others[keys.argmax(1)], rng)
    first = rng.random(n) < 0.5  # the winner is picture 0
    swap = first[:, None, None, None]
    return {
        "caption": [caption(asked[i]) for i in want],
        "picture_0": np.where(swap, winner, loser),
        "picture_1": np.where(swap, loser, winner),
        "label_0": first.astype(np.float32),
        "label_1": 1 - first.astype(np.float32),
    }
