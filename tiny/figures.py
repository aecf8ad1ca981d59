"""The pictures of the README, computed: `python -m tiny.figures [FOLDER]`, some minutes on two CPU
cores.

    windows.png    which tokens three queries see, with clipped and with inward windows
    methods.webp   one clip, refined by windows alone, by FreeSwim and by full attention
    sample.webp    the refined clip of `python sample.py`

They are written to FOLDER, by default the folder of this file.
"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from freeswim import (
    generate,
    grouped_window,
    no_window,
    refine,
    upsample,
    window_mask,
)
from model import TextEncoder, WanTransformer, WanVAE, encode_prompt, load_tokenizer
from support.media import read_clip, to_frame
from support.presets import BUNDLED

TINY = Path(__file__).parent

# --------------------------------------------------------------------------------------------------
# Windows

FRAME = (24, 36)  # rows and columns of tokens
WINDOW = (9, 13)
QUERIES = {"middle": (12, 18), "edge": (12, 1), "corner": (1, 34)}  # (row, column)
CELL = 10  # pixels of a token
GAP = 24  # pixels between frames
HEAD = 30  # pixels for the label above each

UNSEEN = (238, 238, 234)
SEEN = (94, 151, 196)
QUERY = (214, 84, 48)
INK = (40, 40, 40)
PAPER = (255, 255, 255)


def draw_windows():
    """A row of frames for each kind of window, a column for each query."""
    height, width = FRAME
    panel_height = HEAD + CELL * height + GAP
    panel_width = CELL * width + GAP
    size = (GAP + len(QUERIES) * panel_width, GAP // 2 + 2 * panel_height)
    picture = Image.new("RGB", size, PAPER)
    for row, border in enumerate(("clipped", "inward")):
        mask = window_mask(height, width, WINDOW, border).view(height, width, height, width)
        for column, (place, query) in enumerate(QUERIES.items()):
            seen = mask[query]  # (H, W): what this query sees
            label = f"{border}, {place}: sees {seen.sum().item()} tokens"
            top = GAP // 2 + row * panel_height
            left = GAP + column * panel_width
            draw_frame(picture, top, left, seen, query, label)
    return picture


def draw_frame(picture, top, left, seen, query, label):
    draw = ImageDraw.Draw(picture)
    draw.text((left, top), label, INK, ImageFont.load_default(18))
    for row in range(FRAME[0]):
        for column in range(FRAME[1]):
            colour = SEEN if seen[row, column] else UNSEEN
            if (row, column) == query:
                colour = QUERY
            x = left + CELL * column
            y = top + HEAD + CELL * row
            draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), colour)


# --------------------------------------------------------------------------------------------------
# Methods

PROMPT = "a large red striped fish swims right above a sandy floor with bubbles"
SEED = 0
FLOW_SHIFT = 7.0  # enough noise for windows to go wrong
SIZE = (256, 384)  # pixels, twice the native size

CLIPPED = partial(grouped_window, border="clipped")
METHODS = {
    "clipped windows": {"override": False, "window_attention": CLIPPED},
    "inward windows": {"override": False},
    "FreeSwim": {"cache_interval": 5},
    "full attention": {"override": False, "window_attention": no_window},
}


@torch.no_grad()
def refine_by_all_methods():
    """The same clip, refined by each method: {name: (1, 3, F, H, W)}."""
    transformer = WanTransformer.from_pretrained(TINY / "transformer")
    vae = WanVAE.from_pretrained(TINY / "vae")
    encoder = TextEncoder.from_pretrained(TINY / "text_encoder")
    tokenizer = load_tokenizer(TINY / "tokenizer", BUNDLED.text_length)
    text, negative = encode_prompt(encoder, tokenizer, [PROMPT, ""]).split(1)
    settings = {"steps": BUNDLED.steps, "guidance": BUNDLED.guidance}

    latent_frames = BUNDLED.frames // 4 + 1
    shape = (1, 16, latent_frames, BUNDLED.height // 8, BUNDLED.width // 8)
    base = generate(
        transformer,
        text,
        negative,
        shape,
        flow_shift=BUNDLED.base_shift,
        generator=torch.Generator().manual_seed(SEED),
        progress=partial(tqdm, desc="base"),
        **settings,
    )
    upscaled = upsample(vae.decode(base, tiled=False), *SIZE)
    latents = vae.encode(upscaled, tiled=False)

    videos = {}
    for name, options in METHODS.items():
        refined = refine(
            transformer,
            latents,
            text,
            negative,
            native=(BUNDLED.height // 16, BUNDLED.width // 16),
            strength=BUNDLED.strength,
            flow_shift=FLOW_SHIFT,
            generator=torch.Generator().manual_seed(SEED + 1),
            progress=partial(tqdm, desc=name),
            **settings,
            **options,
        )
        videos[name] = vae.decode(refined, tiled=False)
    return videos


def draw_methods():
    """Pictures (H, W, 3), one for each frame: all methods side by side."""
    videos = refine_by_all_methods()
    pictures = []
    for index in range(BUNDLED.frames):
        frames = {name: to_frame(video, index) for name, video in videos.items()}
        pictures.append(labelled_row(frames))
    return pictures


def labelled_row(frames):
    """Frames (H, W, 3) by label, side by side, each under its label."""
    height, width, _ = next(iter(frames.values())).shape
    gap = 6
    head = 50  # pixels for the labels, which have to be read when the picture is scaled down
    picture = Image.new("RGB", (len(frames) * (width + gap) - gap, head + height), PAPER)
    draw = ImageDraw.Draw(picture)
    for column, (label, frame) in enumerate(frames.items()):
        left = column * (width + gap)
        draw.text((left + 2, 2), label, INK, ImageFont.load_default(36))
        picture.paste(Image.fromarray(frame), (left, head))
    return picture


# --------------------------------------------------------------------------------------------------
# The sample


def draw_sample():
    """The frames of the refined clip of `python sample.py`."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        command = [sys.executable, TINY.parent / "sample.py", "--output", output]
        subprocess.run(command, check=True)
        clip = read_clip(output / "freeswim.mp4", BUNDLED.frames)
    return [Image.fromarray(frame.numpy()) for frame in clip.frames.permute(0, 2, 3, 1)]


def save_animation(file, pictures):
    """A WebP that plays in a loop, as fast as the clip."""
    first, *rest = pictures
    duration = round(1000 / BUNDLED.fps)  # milliseconds
    first.save(file, save_all=True, append_images=rest, duration=duration, loop=0, quality=90)


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    draw_windows().save(folder / "windows.png", optimize=True)
    save_animation(folder / "methods.webp", draw_methods())
    save_animation(folder / "sample.webp", draw_sample())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TINY)
