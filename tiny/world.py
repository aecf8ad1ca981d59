"""The procedural aquarium that the bundled model learned: scenes, their captions, and their
pictures at any size.

A scene is a dict of tensors with one row per scene. Positions are in frame heights: x from 0 to
1.5, y from 0 at the top to 1. Everything is drawn by distance and blended over one pixel, so that
the same scene can be rendered at every size, and is sharper the larger it is. A clip has 16 frames
per second.
"""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

COLOURS = {
    "red": (0.86, 0.13, 0.11),
    "orange": (0.98, 0.50, 0.06),
    "yellow": (0.98, 0.86, 0.10),
    "pink": (0.98, 0.42, 0.70),
    "purple": (0.52, 0.20, 0.78),
}
PATTERNS = ("plain", "striped", "spotted")
WIDTH = 1.5
FPS = 16
FISH = 2  # at the most; so many rows are drawn for every scene
BLADES = 3  # of seaweed
BUBBLES = 3
WORDS = (
    "a two large small fish swims swim left right and above a sandy floor with seaweed bubbles"
).split()

# --------------------------------------------------------------------------------------------------
# Scenes


class Draw:
    """Random numbers for `count` scenes."""

    def __init__(self, count, generator):
        self.count = count
        self.generator = generator

    def uniform(self, low, high, *shape):
        numbers = torch.rand(self.count, *shape, generator=self.generator)
        return low + (high - low) * numbers

    def choice(self, options, *shape):
        return torch.randint(0, options, (self.count, *shape), generator=self.generator)

    def apart(self, things):
        """Places along the floor, so that no thing hides another."""
        within_its_part = self.uniform(0.2, 0.8, things)
        return (torch.arange(things) + within_its_part) * WIDTH / things


def sample_scenes(count, generator, frames=17):
    """`count` random scenes: one fish, or, in a third of them, two in two different colours, one
    above the other."""
    draw = Draw(count, generator)
    colour = draw.choice(len(COLOURS), FISH)
    other = 1 + draw.choice(len(COLOURS) - 1)
    colour[:, 1] = (colour[:, 0] + other) % len(COLOURS)
    two = draw.choice(3) == 0
    length = sample_lengths(draw, two)
    direction = 2 * draw.choice(2, FISH) - 1
    speed = draw.uniform(0.12, 0.25, FISH)
    room = WIDTH - length - 0.1
    start = draw.uniform(0, 1, FISH) * room
    middle = start + length / 2 + 0.05  # where it is half-way through
    above = heights_of_two(draw, length)
    alone = draw.uniform(0.03, 0.80, FISH)
    alone = alone.clamp(min=0.24 * length, max=0.82 - 0.22 * length)
    scenes = {
        "fish": 1 + two.long(),
        "colour": colour,
        "pattern": draw.choice(len(PATTERNS), FISH),
        "length": length,
        "direction": direction,
        "speed": speed,
        "x": middle - direction * speed * half_time(frames),
        "y": torch.where(two[:, None], above, alone),
        "wag": draw.uniform(5, 8, FISH),
        "phase": draw.uniform(0, 6.28, FISH),
        "floor": draw.uniform(0.82, 0.90),
        "dune": draw.uniform(0, 6.28),
        "light": draw.uniform(-1, 1),
        "ray": draw.uniform(0, 6.28),
        "seaweed": draw.choice(2),
        "blade_x": draw.apart(BLADES),
        "blade_height": draw.uniform(0.25, 0.5, BLADES),
        "blade_phase": draw.uniform(0, 6.28, BLADES),
        "bubbles": draw.choice(2),
        "bubble_radius": draw.uniform(0.03, 0.05, BUBBLES),
        "bubble_speed": draw.uniform(0.12, 0.25, BUBBLES),
    }
    place_bubbles(draw, scenes, frames)
    return scenes


def sample_lengths(draw, two):
    """Fish are small or large, and two of them not too large."""
    is_small = draw.choice(2, FISH) == 0
    small = draw.uniform(0.30, 0.38, FISH)
    large = draw.uniform(0.60, 0.74, FISH)
    length = torch.where(is_small, small, large)
    return torch.where(two[:, None], length.clamp(max=0.62), length)


def heights_of_two(draw, length):
    """y of two fish, one above the other."""
    free = 0.84 - 0.44 * length.sum(1, keepdim=True)  # the height that they leave free
    free = free.clamp(min=0)
    gaps, _ = torch.sort(draw.uniform(0, 1, FISH), dim=1)
    upper_gap, lower_gap = (gaps * free).split(1, dim=1)
    upper_length, lower_length = length.split(1, dim=1)
    upper = upper_gap + 0.22 * upper_length
    lower = lower_gap + 0.44 * upper_length
    lower = lower + 0.22 * lower_length
    return torch.cat([upper, lower], dim=1)


def place_bubbles(draw, scenes, frames):
    """Let each bubble rise where it meets no fish, or leave it out: half hidden, it would be too
    hard for a tiny model."""
    scenes["bubble_x"] = torch.zeros(draw.count, BUBBLES)
    scenes["bubble_y"] = -torch.ones(draw.count, BUBBLES)  # above the water
    for _ in range(6):
        x = draw.apart(BUBBLES)
        y = draw.uniform(0.2, 0.75, BUBBLES)
        found = (scenes["bubble_y"] < 0) & meets_no_fish(scenes, x, y, frames)
        scenes["bubble_x"] = torch.where(found, x, scenes["bubble_x"])
        scenes["bubble_y"] = torch.where(found, y, scenes["bubble_y"])


def meets_no_fish(scenes, x, y, frames):
    """Whether bubbles that begin at `x` and `y`, (B, BUBBLES) each, keep clear of the box that each
    fish swims in."""
    x = x[..., None]
    y = y[..., None]
    speed = scenes["bubble_speed"][..., None]
    fish_y = scenes["y"][:, None]
    length = scenes["length"][:, None]
    clear = torch.ones(len(x), BUBBLES, FISH, dtype=torch.bool)
    for seconds in (0, half_time(frames), 2 * half_time(frames)):
        dx = x - fish_x(scenes, seconds)[:, None]
        dy = y - speed * seconds - fish_y
        across = dx.abs() - 0.55 * length - 0.06
        along = dy.abs() - 0.32 * length - 0.06
        clear &= torch.maximum(across, along) > 0
    fish = scenes["fish"][:, None, None]
    is_absent = torch.arange(FISH) >= fish
    return (clear | is_absent).all(-1)


def half_time(frames):
    """The middle of a clip, in seconds."""
    return (frames - 1) / FPS / 2


def fish_x(scenes, seconds):
    """Where the fish are at a time, a number or one for each scene, (B, 1): x, (B, 2)."""
    velocity = scenes["direction"] * scenes["speed"]
    return scenes["x"] + velocity * seconds


# --------------------------------------------------------------------------------------------------
# Captions


def captions(scenes, window=None, shape=None, frames=17):
    """What a scene shows half-way through the clip, in words, one string per scene. With a `window`
    as in `render`, of `shape` pixels, what is seen in it: fish of which a third is there, as large
    as they seem, and the rest at all."""
    if window is None:  # all of it, as one pixel high
        zero = torch.zeros(len(scenes["x"]))
        window = (zero, zero, zero + 1)
        shape = (1, WIDTH)
    half = half_time(frames)
    scenes = scenes | {"middle": fish_x(scenes, half)}
    scenes = {name: value.tolist() for name, value in scenes.items()}
    height, width = shape
    lefts, tops, pixels = (part.tolist() for part in window)
    result = []
    for row, pixel in enumerate(pixels):
        scene = {name: value[row] for name, value in scenes.items()}
        frame = Frame(lefts[row], tops[row], width * pixel, height * pixel)
        result.append(caption(scene, frame, half))
    return result


class Frame:
    """The part of a scene that is seen, in frame heights."""

    def __init__(self, left, top, width, height):
        self.left = left
        self.top = top
        self.width = width
        self.height = height

    def share_of(self, x, y, width, height):
        """How much of a box around a point is seen."""
        across = overlap(x, width, self.left, self.width) / width
        along = overlap(y, height, self.top, self.height) / height
        return across * along


def overlap(middle, size, start, extent):
    """Length that an interval around `middle` has in common with one from `start` on."""
    half = size / 2
    begin = max(middle - half, start)
    end = min(middle + half, start + extent)
    return max(end - begin, 0)


def caption(scene, frame, half):
    fish = []
    for one in range(scene["fish"]):
        x = scene["middle"][one]
        y = scene["y"][one]
        length = scene["length"][one]
        if frame.share_of(x, y, length, 0.4 * length) > 1 / 3:
            fish.append(describe_fish(scene, one, frame))
    words = [" and ".join(fish)]
    floor = scene["floor"] + 0.03
    if frame.top + frame.height > floor:
        words.append("above a sandy floor")

    blades = []
    for x, height in zip(scene["blade_x"], scene["blade_height"], strict=True):
        y = floor - height / 2
        blades.append(frame.share_of(x, y, 0.03, height))
    bubbles = []
    for one in range(BUBBLES):
        size = 2 * scene["bubble_radius"][one]
        x = scene["bubble_x"][one]
        risen = scene["bubble_speed"][one] * half
        y = scene["bubble_y"][one] - risen
        bubbles.append(frame.share_of(x, y, size, size))
    things = []
    if scene["seaweed"] and max(blades) > 0.2:
        things.append("seaweed")
    if scene["bubbles"] and max(bubbles) > 0.2:
        things.append("bubbles")
    if things:
        words.append("with " + " and ".join(things))
    else:
        words.append("")
    return " ".join(words).strip()


def describe_fish(scene, one, frame):
    length = scene["length"][one]
    size = "large" if length > frame.height / 2 else "small"
    colour = list(COLOURS)[scene["colour"][one]]
    pattern = PATTERNS[scene["pattern"][one]]
    side = "right" if scene["direction"][one] > 0 else "left"
    return f"a {size} {colour} {pattern} fish swims {side}"


def build_tokenizer(file):
    """Write a tokenizer.json of whole words, in which `</s>` ends every text."""
    special = ["<pad>", "</s>", "<unk>"]
    words = dict.fromkeys([*special, *WORDS, *COLOURS, *PATTERNS])  # each once
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(file))
    return len(ids)


# --------------------------------------------------------------------------------------------------
# Drawing. A picture is a list of three maps, red, green and blue. Distances are signed: negative
# inside a shape, and in frame heights, unless a docstring says otherwise

FAR = 9.0  # added to the distance of what a scene does not have


class Canvas:
    """Maps of positions and time, to which all that is drawn is broadcast."""

    def __init__(self, x, y, t, pixel):
        self.x = x  # (B, 1, H, W)
        self.y = y  # (B, 1, H, W)
        self.t = t  # (1, F, 1, 1), in seconds
        self.pixel = pixel  # (B, 1, 1, 1), a pixel's size


def make_canvas(height, width, frames, window, device):
    left, top, pixel = (part.view(-1, 1, 1, 1) for part in window)
    column = torch.arange(width, device=device)
    row = torch.arange(height, device=device)[:, None]
    x = left + (column + 0.5) * pixel  # (B, 1, 1, W)
    y = top + (row + 0.5) * pixel  # (B, 1, H, 1)
    x, y = torch.broadcast_tensors(x, y)
    frame = torch.arange(frames, device=device)
    t = frame.view(1, -1, 1, 1) / FPS
    return Canvas(x, y, t, pixel)


def paint(picture, colour, distance, pixel):
    """Cover what has a negative distance with a colour: three numbers or maps."""
    cover = (0.5 - distance / pixel).clamp(0, 1)
    painted = []
    for below, above in zip(picture, colour, strict=True):
        painted.append(below + cover * (above - below))
    return painted


def circle(x, y, radius):
    """Signed distance from a circle around 0."""
    return length_of(x, y) - radius


def length_of(x, y):
    """Of a vector, and never quite 0."""
    return torch.sqrt(x**2 + y**2 + 1e-9)


def ellipse(x, y, width, height):
    """Signed distance from an ellipse around 0, nearly."""
    k = length_of(x / width, y / height)
    slope = length_of(x / width**2, y / height**2)
    return k * (k - 1) / slope


def render(scenes, height, width, frames=17, window=None):
    """Clips of the scenes, (B, 3, frames, height, width) in [-1, 1].

    `window` renders only a part: (left, top, pixel), each (B,), in frame heights.
    """
    device = scenes["x"].device
    if window is None:
        zero = torch.zeros(len(scenes["x"]), device=device)
        window = (zero, zero, zero + 1 / height)
    canvas = make_canvas(height, width, frames, window, device)
    picture = draw_water(scenes, canvas)
    for one in range(BLADES):
        picture = draw_blade(picture, scenes, one, canvas)
    for one in range(BUBBLES):
        picture = draw_bubble(picture, scenes, one, canvas)
    picture = draw_floor(picture, scenes, canvas)
    for one in range(FISH):
        picture = draw_fish(picture, scenes, one, canvas)
    maps = [part.expand(-1, frames, -1, -1) for part in picture]
    video = torch.stack(maps, dim=1).clamp(0, 1)
    return video * 2 - 1


def of_scene(scenes, name):
    """A property of scenes, to be broadcast to maps."""
    return scenes[name].view(-1, 1, 1, 1)


def of_one(scenes, name, one):
    """A property of one of a scene's fish, blades or bubbles, likewise."""
    value = scenes[name][:, one]
    return value.view(-1, 1, 1, 1)


def draw_water(scenes, canvas):
    """Darker farther down, with rays of light."""
    y = canvas.y
    t = canvas.t
    slope = canvas.x + 0.45 * y
    light = of_scene(scenes, "light")
    phase = of_scene(scenes, "ray")
    wide = torch.sin(9 * slope + phase + 0.5 * t)
    narrow = torch.sin(4 * slope - 0.7 * t)
    ray = 0.07 * wide * narrow * (1 - y)
    red = 0.38 - 0.36 * y
    green = 0.74 - 0.46 * y + 0.05 * light
    blue = 0.92 - 0.36 * y - 0.04 * light
    return [red + ray, green + ray, blue + ray]


def draw_blade(picture, scenes, one, canvas):
    """A blade of seaweed, which sways."""
    x = of_one(scenes, "blade_x", one)
    height = of_one(scenes, "blade_height", one)
    phase = of_one(scenes, "blade_phase", one)
    root = of_scene(scenes, "floor") + 0.03
    up = (root - canvas.y) / height
    up = up.clamp(0, 1)  # 0 at the root, 1 at the tip
    swing = torch.sin(2.2 * canvas.t + phase - 3 * up)
    ripple = torch.sin(10 * up + phase)
    sway = 0.05 * up * up * swing + 0.012 * ripple
    dx = canvas.x - x - sway
    half_width = 0.022 * (1 - 0.7 * up)
    above_tip = root - height - canvas.y
    blade = torch.maximum(dx.abs() - half_width, above_tip)
    is_absent = of_scene(scenes, "seaweed") == 0
    red = 0.08 + 0.06 * up
    green = 0.42 + 0.2 * up
    blue = 0.16 + 0 * up
    return paint(picture, [red, green, blue], blade + FAR * is_absent, canvas.pixel)


RIM = (0.80, 0.92, 0.97)
INSIDE = (0.55, 0.80, 0.94)
GLINT = (0.95, 0.98, 1.00)


def draw_bubble(picture, scenes, one, canvas):
    t = canvas.t
    pixel = canvas.pixel
    radius = of_one(scenes, "bubble_radius", one)
    x = of_one(scenes, "bubble_x", one)
    y = of_one(scenes, "bubble_y", one)
    speed = of_one(scenes, "bubble_speed", one)
    sway = 0.008 * torch.sin(5 * t + 9 * x)
    dx = canvas.x - x - sway
    dy = canvas.y - y + speed * t
    is_absent = of_scene(scenes, "bubbles") == 0
    away = FAR * is_absent
    ball = circle(dx, dy, radius) + away
    shift = 0.3 * radius
    glint = circle(dx + shift, dy + shift, 0.25 * radius) + away
    picture = paint(picture, RIM, ball, pixel)
    picture = paint(picture, INSIDE, ball + 0.25 * radius, pixel)
    return paint(picture, GLINT, glint, pixel)


def draw_floor(picture, scenes, canvas):
    x = canvas.x
    dune = of_scene(scenes, "dune")
    wave = 0.012 * torch.sin(5.1 * x + dune)
    surface = of_scene(scenes, "floor") + wave
    depth = canvas.y - surface
    bend = 2 * torch.sin(7 * x + dune)
    lines = 0.05 * torch.sin(60 * depth + bend)
    ripple = 1 - 0.9 * depth + lines
    colour = [0.82 * ripple, 0.73 * ripple, 0.55 * ripple]
    return paint(picture, colour, -depth, canvas.pixel)


# In a fish's own coordinates, its length is 1: the nose is at (0.5, 0) and the tail at (-0.5, 0).

WHITE = (0.97, 0.97, 0.94)
BLACK = (0.05, 0.05, 0.08)
OUTLINE = 0.014  # half of its width


def draw_fish(picture, scenes, one, canvas):
    """Fish number `one` of each scene, if there is one."""
    length = of_one(scenes, "length", one)
    pixel = canvas.pixel / length
    is_absent = of_scene(scenes, "fish") <= one
    away = FAR * is_absent / length
    dx, dy, swing = fish_coordinates(scenes, one, canvas)
    palette = torch.tensor(list(COLOURS.values()), device=length.device)
    base = palette[scenes["colour"][:, one]]
    base = base.view(-1, 3, 1, 1, 1).unbind(1)
    dark = [0.4 * part for part in base]
    shade = [0.85 * part for part in base]

    for part in (fish_tail(dx, dy), fish_fin(dx, dy)):
        picture = paint(picture, dark, part - OUTLINE + away, pixel)
        picture = paint(picture, shade, part + OUTLINE + away, pixel)
    body = ellipse(dx - 0.12, dy, 0.38, 0.19)
    picture = paint(picture, dark, body - OUTLINE + away, pixel)
    pattern = of_one(scenes, "pattern", one)
    skin = fish_skin(base, pattern, dx, dy, swing, pixel)
    return paint(picture, skin, body + OUTLINE + away, pixel)


def fish_coordinates(scenes, one, canvas):
    """Positions in a fish's coordinates, in which its body is straight; and the phase with which it
    swings."""
    t = canvas.t
    x = of_one(scenes, "x", one)
    y = of_one(scenes, "y", one)
    length = of_one(scenes, "length", one)
    direction = of_one(scenes, "direction", one)
    speed = of_one(scenes, "speed", one)
    phase = of_one(scenes, "phase", one)
    wag = of_one(scenes, "wag", one)
    swum = direction * speed * t
    dx = direction * (canvas.x - x - swum)
    dx = dx / length
    bob = 0.01 * torch.sin(4 * t + phase)
    dy = (canvas.y - y - bob) / length
    swing = wag * t + phase
    behind = (0.25 - dx).clamp(0, 0.8)
    wave = torch.sin(swing + 4.5 * dx)
    bend = 0.3 * behind * behind * wave  # the tail bends most
    return dx, dy - bend, swing


def fish_tail(dx, dy):
    """Signed distance from the tail fin, which is forked."""
    off_axis = dy.abs()
    spread = (-0.2 - dx) * 0.55
    tail = torch.maximum(off_axis - 0.03 - spread, dx + 0.15)
    fork = 0.6 * (0.17 - off_axis).clamp(min=0)
    return torch.maximum(tail, -(dx + 0.5 - fork))


def fish_fin(dx, dy):
    """Signed distance from the fin on its back, which leans backward."""
    lean = 0.3 * (dy + 0.16)
    return ellipse(dx - 0.03 + lean, dy + 0.15, 0.17, 0.11)


def fish_skin(base, pattern, dx, dy, swing, pixel):
    """The picture of its body: darker above, paler below, with its pattern, side fin, mouth and
    eye."""
    dark = [0.4 * part for part in base]
    belly = (2 * dy).clamp(-0.35, 0.4)
    shadow = 1 + belly.clamp(max=0)
    bright = belly.clamp(min=0)
    skin = []
    for part in base:
        pale = 0.45 + 0.55 * part
        skin.append(part * shadow + bright * (pale - part))
    marks = torch.minimum(stripes(dx, dy, pattern), spots(dx, dy, pattern))
    skin = paint(skin, WHITE, marks, pixel)

    fin_y = dy - 0.07
    fin_x = dx - 0.06 + 0.5 * fin_y
    flap = 0.02 * torch.sin(0.7 * swing)
    side_fin = ellipse(fin_x, fin_y - flap, 0.08, 0.045)
    side = [0.7 * part for part in base]
    skin = paint(skin, dark, side_fin - 0.01, pixel)
    skin = paint(skin, side, side_fin + 0.01, pixel)
    smile = dy - 0.06 + 0.3 * (dx - 0.46)
    mouth = torch.maximum(smile.abs() - 0.012, 0.4 - dx)
    skin = paint(skin, dark, mouth, pixel)
    eye_x = dx - 0.345
    eye_y = dy + 0.04
    skin = paint(skin, dark, circle(eye_x, eye_y, 0.078), pixel)
    skin = paint(skin, WHITE, circle(eye_x, eye_y, 0.064), pixel)
    return paint(skin, BLACK, circle(dx - 0.36, eye_y, 0.038), pixel)


def stripes(dx, dy, pattern):
    """Signed distance from the stripes, behind the head."""
    along = (dx + 0.5 * dy * dy) / 0.19
    phase = (along + 0.25) % 1 - 0.5
    band = phase.abs() * 0.19 - 0.04
    beyond = (dx - 0.24).abs() - 0.42
    is_other = pattern != PATTERNS.index("striped")
    found = torch.maximum(band, beyond) + FAR * is_other
    return torch.maximum(found, dx - 0.22)


def spots(dx, dy, pattern):
    """Signed distance from the spots, in rows that are shifted against each other."""
    row = torch.floor(dy / 0.12 + 0.5)
    phase = (dx / 0.14 + 0.5 * row) % 1
    across = (phase - 0.5) * 0.14
    found = circle(across, dy - 0.12 * row, 0.038)
    is_other = pattern != PATTERNS.index("spotted")
    return torch.maximum(found, dx - 0.22) + FAR * is_other
