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
WIDTH, FPS, FISH, BLADES, BUBBLES = 1.5, 16, 2, 3, 3
WORDS = (
    "a two large small fish swims swim left right and above a sandy floor with seaweed bubbles"
).split()


def sample_scenes(count, generator, frames=17):
    """`count` random scenes: one fish, or, of three, one time two in two different colours, one
    above the other."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def choice(options, *shape):
        return torch.randint(0, options, (count, *shape), generator=generator)

    def apart(things):  # along the floor, so that none hides another
        return (torch.arange(things) + uniform(0.2, 0.8, things)) * WIDTH / things

    colour = choice(len(COLOURS), FISH)
    colour[:, 1] = (colour[:, 0] + 1 + choice(len(COLOURS) - 1)) % len(COLOURS)
    two = choice(3) == 0
    length = torch.where(choice(2, FISH) == 0, uniform(0.30, 0.38, FISH), uniform(0.60, 0.74, FISH))
    length = torch.where(two[:, None], length.clamp(max=0.62), length)
    direction = 2 * choice(2, FISH) - 1
    speed = uniform(0.12, 0.25, FISH)
    middle = (
        uniform(0, 1, FISH) * (WIDTH - length - 0.1) + length / 2 + 0.05
    )  # where it is half-way through the clip
    room = 0.84 - 0.44 * length.sum(1, keepdim=True)  # the height that two fish leave free
    gaps = torch.sort(uniform(0, 1, FISH), dim=1).values * room.clamp(min=0)
    above = torch.cat(
        [
            gaps[:, :1] + 0.22 * length[:, :1],
            gaps[:, 1:] + 0.44 * length[:, :1] + 0.22 * length[:, 1:],
        ],
        dim=1,
    )
    alone = uniform(0.03, 0.80, FISH).clamp(min=0.24 * length, max=0.82 - 0.22 * length)
    scenes = {
        "fish": 1 + two.long(),
        "colour": colour,
        "pattern": choice(len(PATTERNS), FISH),
        "length": length,
        "direction": direction,
        "speed": speed,
        "x": middle - direction * speed * half_time(frames),
        "y": torch.where(two[:, None], above, alone),
        "wag": uniform(5, 8, FISH),
        "phase": uniform(0, 6.28, FISH),
        "floor": uniform(0.82, 0.90),
        "dune": uniform(0, 6.28),
        "light": uniform(-1, 1),
        "ray": uniform(0, 6.28),
        "seaweed": choice(2),
        "blade_x": apart(BLADES),
        "blade_height": uniform(0.25, 0.5, BLADES),
        "blade_phase": uniform(0, 6.28, BLADES),
        "bubbles": choice(2),
        "bubble_radius": uniform(0.03, 0.05, BUBBLES),
        "bubble_speed": uniform(0.12, 0.25, BUBBLES),
    }
    # A bubble rises where it meets no fish, or is not there: half hidden, it would be too hard for
    # a tiny model.
    scenes["bubble_x"], scenes["bubble_y"] = (
        torch.zeros(count, BUBBLES),
        -torch.ones(count, BUBBLES),
    )  # above the water
    for _ in range(6):
        x, y = apart(BUBBLES), uniform(0.2, 0.75, BUBBLES)
        found = (scenes["bubble_y"] < 0) & meets_no_fish(scenes, x, y, frames)
        scenes["bubble_x"] = torch.where(found, x, scenes["bubble_x"])
        scenes["bubble_y"] = torch.where(found, y, scenes["bubble_y"])
    return scenes


def meets_no_fish(scenes, x, y, frames):
    """Whether bubbles that begin at `x` and `y`, (B, BUBBLES) each, keep clear of the box that each
    fish swims in."""
    x, y, speed = x[..., None], y[..., None], scenes["bubble_speed"][..., None]
    fish_y, length = scenes["y"][:, None], scenes["length"][:, None]
    clear = torch.ones(len(x), BUBBLES, FISH, dtype=torch.bool)
    for seconds in (0, half_time(frames), 2 * half_time(frames)):
        across = (x - fish_x(scenes, seconds)[:, None]).abs() - 0.55 * length - 0.06
        along = (y - speed * seconds - fish_y).abs() - 0.32 * length - 0.06
        clear &= torch.maximum(across, along) > 0
    absent = torch.arange(FISH) >= scenes["fish"][:, None, None]
    return (clear | absent).all(-1)


def half_time(frames):
    """The middle of a clip, in seconds."""
    return (frames - 1) / FPS / 2


def fish_x(scenes, seconds):
    """Where the fish are at a time, a number or one for each scene, (B, 1): x, (B, 2)."""
    return scenes["x"] + scenes["direction"] * scenes["speed"] * seconds


def captions(scenes, window=None, shape=None, frames=17):
    """What a scene shows half-way through the clip, in words, one string per scene. With a `window`
    as in `render`, of `shape` pixels, what is seen in it: fish of which a third is there, as large
    as they seem, and the rest at all."""
    if window is None:  # all of it, as one pixel high
        zero, shape = torch.zeros(len(scenes["x"])), (1, WIDTH)
        window = zero, zero, zero + 1
    half, result = half_time(frames), []
    scenes = {
        key: value.tolist() for key, value in (scenes | {"middle": fish_x(scenes, half)}).items()
    }
    for row, (left, top, pixel) in enumerate(zip(*(part.tolist() for part in window), strict=True)):
        scene, height, width = (
            {key: value[row] for key, value in scenes.items()},
            shape[0] * pixel,
            shape[1] * pixel,
        )

        def share(
            x, y, long, high, left=left, top=top, width=width, height=height
        ):  # of a box around a point, how much is in the window
            inside = [
                max(min(middle + size / 2, start + extent) - max(middle - size / 2, start), 0)
                / size
                for middle, size, start, extent in ((x, long, left, width), (y, high, top, height))
            ]
            return inside[0] * inside[1]

        fish = []
        for one in range(scene["fish"]):
            length = scene["length"][one]
            if share(scene["middle"][one], scene["y"][one], length, 0.4 * length) > 1 / 3:
                size = "large" if length > height / 2 else "small"
                colour, pattern = (
                    list(COLOURS)[scene["colour"][one]],
                    PATTERNS[scene["pattern"][one]],
                )
                side = "right" if scene["direction"][one] > 0 else "left"
                fish.append(f"a {size} {colour} {pattern} fish swims {side}")
        blades = [
            share(x, scene["floor"] + 0.03 - up / 2, 0.03, up)
            for x, up in zip(scene["blade_x"], scene["blade_height"], strict=True)
        ]
        bubbles = [
            share(x, y - speed * half, 2 * radius, 2 * radius)
            for x, y, speed, radius in zip(
                *(scene[f"bubble_{part}"] for part in ("x", "y", "speed", "radius")), strict=True
            )
        ]
        seen = {"seaweed": blades, "bubbles": bubbles}
        things = [thing for thing, shares in seen.items() if scene[thing] and max(shares) > 0.2]
        floor = ["above a sandy floor"] * (top + height > scene["floor"] + 0.03)
        result.append(
            " ".join(
                [" and ".join(fish), *floor, "with " * bool(things) + " and ".join(things)]
            ).strip()
        )
    return result


def build_tokenizer(file):
    """Write a tokenizer.json of whole words, in which `</s>` ends every text."""
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys([*WORDS, *COLOURS, *PATTERNS])]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(file))
    return len(words)


# --------------------------------------------------------------------------------------------------
# Drawing. `x` and `y` are maps of positions, (B, 1, H, W); `t` is (1, F, 1, 1), in seconds; `pixel`
# is a pixel's size.


def paint(picture, colour, distance, pixel):
    """Cover what has a negative distance with a colour: three numbers or maps."""
    cover = (0.5 - distance / pixel).clamp(0, 1)
    return [below + cover * (above - below) for below, above in zip(picture, colour, strict=True)]


def ellipse(x, y, width, height):
    """Signed distance from an ellipse, nearly: negative inside."""
    k = torch.sqrt((x / width) ** 2 + (y / height) ** 2 + 1e-9)
    return k * (k - 1) / torch.sqrt((x / width**2) ** 2 + (y / height**2) ** 2 + 1e-9)


def render(scenes, height, width, frames=17, window=None):
    """Clips of the scenes, (B, 3, frames, height, width) in [-1, 1].

    `window` renders only a part: (left, top, pixel), each (B,), in frame heights.
    """
    device = scenes["x"].device
    if window is None:
        zero = torch.zeros(len(scenes["x"]), device=device)
        window = zero, zero, zero + 1 / height
    left, top, pixel = (part.view(-1, 1, 1, 1) for part in window)
    x = left + (torch.arange(width, device=device) + 0.5) * pixel  # (B, 1, 1, W)
    y = top + (torch.arange(height, device=device)[:, None] + 0.5) * pixel  # (B, 1, H, 1)
    x, y = torch.broadcast_tensors(x, y)
    t = torch.arange(frames, device=device).view(1, -1, 1, 1) / FPS

    def of(name, one=None):
        value = scenes[name] if one is None else scenes[name][:, one]
        return value.view(-1, 1, 1, 1)

    slope, light = x + 0.45 * y, of("light")
    ray = (
        0.07 * torch.sin(9 * slope + of("ray") + 0.5 * t) * torch.sin(4 * slope - 0.7 * t) * (1 - y)
    )
    picture = [
        0.38 - 0.36 * y + ray,
        0.74 - 0.46 * y + 0.05 * light + ray,
        0.92 - 0.36 * y - 0.04 * light + ray,
    ]

    for one in range(BLADES):
        h, phase = of("blade_height", one), of("blade_phase", one)
        up = ((of("floor") + 0.03 - y) / h).clamp(0, 1)
        sway = 0.05 * up * up * torch.sin(2.2 * t + phase - 3 * up) + 0.012 * torch.sin(
            10 * up + phase
        )
        blade = (x - of("blade_x", one) - sway).abs() - 0.022 * (1 - 0.7 * up)
        blade = torch.maximum(blade, of("floor") + 0.03 - h - y) + 9.0 * (of("seaweed") == 0)
        picture = paint(picture, [0.08 + 0.06 * up, 0.42 + 0.2 * up, 0.16 + 0 * up], blade, pixel)

    for one in range(BUBBLES):
        r, away = of("bubble_radius", one), 9.0 * (of("bubbles") == 0)
        dx = x - of("bubble_x", one) - 0.008 * torch.sin(5 * t + 9 * of("bubble_x", one))
        dy = y - of("bubble_y", one) + of("bubble_speed", one) * t
        ball = torch.sqrt(dx * dx + dy * dy + 1e-9) - r + away
        glint = torch.sqrt((dx + 0.3 * r) ** 2 + (dy + 0.3 * r) ** 2 + 1e-9) - 0.25 * r + away
        picture = paint(picture, (0.80, 0.92, 0.97), ball, pixel)
        picture = paint(picture, (0.55, 0.80, 0.94), ball + 0.25 * r, pixel)
        picture = paint(picture, (0.95, 0.98, 1.00), glint, pixel)

    surface = of("floor") + 0.012 * torch.sin(5.1 * x + of("dune"))
    depth = y - surface
    ripple = 1 - 0.9 * depth + 0.05 * torch.sin(60 * depth + 2 * torch.sin(7 * x + of("dune")))
    picture = paint(picture, [0.82 * ripple, 0.73 * ripple, 0.55 * ripple], -depth, pixel)

    palette = torch.tensor(list(COLOURS.values()), device=device)
    for one in range(FISH):
        base = palette[scenes["colour"][:, one]].view(-1, 3, 1, 1, 1).unbind(1)
        there = 9.0 * (of("fish") <= one)
        picture = draw_fish(
            picture,
            base,
            {
                name: of(name, one)
                for name in ("x", "y", "length", "direction", "speed", "wag", "phase", "pattern")
            },
            x,
            y,
            t,
            pixel,
            there,
        )
    return (
        torch.stack([part.expand(-1, frames, -1, -1) for part in picture], dim=1).clamp(0, 1) * 2
        - 1
    )


def draw_fish(picture, base, fish, x, y, t, pixel, there):
    """A fish in its own coordinates: nose at (0.5, 0), tail at (-0.5, 0), upright; `there` is large
    if it is not."""
    length, direction = fish["length"], fish["direction"]
    pixel, there = pixel / length, there / length
    dx = direction * (x - fish["x"] - direction * fish["speed"] * t) / length
    dy = (y - fish["y"] - 0.01 * torch.sin(4 * t + fish["phase"])) / length
    swing = fish["wag"] * t + fish["phase"]
    behind = (0.25 - dx).clamp(0, 0.8)
    dy = dy - 0.3 * behind * behind * torch.sin(swing + 4.5 * dx)  # the body bends, the tail most
    dark, pale = [0.4 * c for c in base], [0.45 + 0.55 * c for c in base]
    white, black = (0.97, 0.97, 0.94), (0.05, 0.05, 0.08)

    tail = torch.maximum(dy.abs() - 0.03 - (-0.2 - dx) * 0.55, dx + 0.15)
    tail = torch.maximum(tail, -(dx + 0.5 - 0.6 * (0.17 - dy.abs()).clamp(min=0)))
    fin = ellipse(dx - 0.03 + 0.3 * (dy + 0.16), dy + 0.15, 0.17, 0.11)
    body = ellipse(dx - 0.12, dy, 0.38, 0.19)
    for part in (tail, fin):
        picture = paint(picture, dark, part - 0.014 + there, pixel)
        picture = paint(picture, [0.85 * c for c in base], part + 0.014 + there, pixel)
    picture = paint(picture, dark, body - 0.014 + there, pixel)

    belly = (2 * dy).clamp(-0.35, 0.4)
    skin = [
        c * (1 + belly.clamp(max=0)) + belly.clamp(min=0) * (p - c)
        for c, p in zip(base, pale, strict=True)
    ]
    band = (((dx + 0.5 * dy * dy) / 0.19 + 0.25) % 1 - 0.5).abs() * 0.19 - 0.04
    stripes = torch.maximum(band, (dx - 0.24).abs() - 0.42) + 9.0 * (fish["pattern"] != 1)
    row = torch.floor(dy / 0.12 + 0.5)
    across = ((dx / 0.14 + 0.5 * row) % 1 - 0.5) * 0.14
    spots = torch.sqrt(across**2 + (dy - 0.12 * row) ** 2 + 1e-9) - 0.038
    spots = torch.maximum(spots, dx - 0.22) + 9.0 * (fish["pattern"] != 2)
    stripes = torch.maximum(stripes, dx - 0.22)
    skin = paint(skin, white, torch.minimum(stripes, spots), pixel)

    side_fin = ellipse(
        dx - 0.06 + 0.5 * (dy - 0.07), dy - 0.07 - 0.02 * torch.sin(0.7 * swing), 0.08, 0.045
    )
    skin = paint(skin, dark, side_fin - 0.01, pixel)
    skin = paint(skin, [0.7 * c for c in base], side_fin + 0.01, pixel)
    mouth = torch.maximum((dy - 0.06 + 0.3 * (dx - 0.46)).abs() - 0.012, 0.4 - dx)
    skin = paint(skin, dark, mouth, pixel)
    for colour, place, radius in (
        (dark, 0.345, 0.078),
        (white, 0.345, 0.064),
        (black, 0.36, 0.038),
    ):
        skin = paint(
            skin, colour, torch.sqrt((dx - place) ** 2 + (dy + 0.04) ** 2 + 1e-9) - radius, pixel
        )
    return paint(picture, skin, body + 0.014 + there, pixel)
