"""The paper's claims, counted on the aquarium: `python -m tiny.ablate --output FOLDER`.

Scenes that nobody chose a setting on give prompts; the bundled model makes a base clip of each and
refines it in every way of METHODS; a detector counts the fish that are there against those that
were asked for, and the detail is held against true clips, which the renderer can draw at any size.
Writes table.md and, per setting, pictures and numbers.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from freeswim import dense_window, generate, grouped_window, no_window, refine, upsample
from model import TextEncoder, WanTransformer, WanVAE, encode_prompt, load_tokenizer
from support import media
from support.presets import BUNDLED
from tiny import world

HERE = Path(__file__).parent
NATIVE = BUNDLED
METHODS = {
    "full attention": {"override": False},
    "clipped window": {"override": False},
    "inward window": {"override": False},
    "inward window and override": {},
    "cached, k = 2": {"cache_interval": 2},
    "cached, k = 5": {"cache_interval": 5},
}
ENLARGED = "base clip, enlarged"
AFTER_VAE = "true clips after the VAE"
SEEDS = {  # of scenes: settings are chosen on "choice"
    "test": 2_000_000,
    "choice": 3_000_000,
    "true": 4_000_000,
}


# --------------------------------------------------------------------------------------------------
# The detector. It looks at frames of the native size; larger ones are averaged down to it.


def hue_and_saturation(rgb):
    """Hue in radians and saturation in [0, 1], (N, H, W) each, of (N, 3, H, W) in [0, 1]."""
    red, green, blue = rgb.unbind(1)
    across = math.sqrt(3) / 2 * (green - blue)
    hue = torch.atan2(across, red - (green + blue) / 2)
    brightest = rgb.amax(1)
    saturation = (brightest - rgb.amin(1)) / brightest.clamp(min=1e-3)
    return hue, saturation


def blobs(mask):
    """The connected parts of masks (N, H, W): numbers from 1 on at each pixel, 0 outside, the same
    within a part."""
    mask = mask[:, None].float()
    numbers = torch.arange(mask.numel(), device=mask.device) + 1.0
    labels = numbers.view_as(mask) * mask
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if torch.equal(spread, labels):
            return labels[:, 0].long()
        labels = spread


def find_fish(frames):
    """The fish in every frame of (N, 3, H, W) in [0, 1]: per frame a list of dicts of colour, x,
    mask (H, W)."""
    frames = F.interpolate(frames, (NATIVE.height, NATIVE.width), mode="area")
    colour, is_coloured = nearest_colours(frames)
    mask = close(is_coloured[:, None])
    mask = grow(-grow(-mask, 3), 3)  # without specks
    labels = blobs(mask[:, 0] > 0.5)
    found = []
    for frame_labels, frame_colour, frame_coloured in zip(labels, colour, is_coloured, strict=True):
        fish = []
        for label in frame_labels.unique().tolist():
            part = frame_labels == label
            is_large = part.sum() >= 60  # a small fish has about 400 pixels
            if label > 0 and is_large:
                fish += fish_of(part, frame_colour, part & frame_coloured)
        found.append(fish)
    return found


def nearest_colours(frames):
    """For each pixel, (N, H, W), the index of the fish's colour whose hue is nearest, and whether
    the pixel is near it."""
    hue, saturation = hue_and_saturation(frames)
    colours = torch.tensor(list(world.COLOURS.values()), device=frames.device)
    palette, _ = hue_and_saturation(colours[:, :, None, None])
    turn = hue[:, None] - palette.view(1, -1, 1, 1)
    distance = (turn + math.pi).remainder(2 * math.pi) - math.pi
    distance, colour = distance.abs().min(dim=1)
    is_sandy = (hue > math.radians(24)) & (hue < math.radians(60))
    is_near = distance < math.radians(24)
    is_strong = saturation > torch.where(is_sandy, 0.58, 0.36)
    is_bright = frames.amax(1) > 0.22
    return colour, is_near & is_strong & is_bright


def grow(mask, size):
    return F.max_pool2d(mask, size, stride=1, padding=size // 2)


def close(mask):
    """A mask with its holes filled: white stripes, spots and eyes."""
    return -grow(-grow(mask.float(), 9), 9)


def fish_of(part, colour, coloured):
    """The fish in a connected part (H, W) of a frame: two, if they touch and differ in colour."""
    pixels = torch.bincount(colour[coloured], minlength=len(world.COLOURS)).float()
    share = pixels / pixels.sum().clamp(min=1)
    colours = (share > 0.12).nonzero().flatten().tolist()
    fish = []
    for index in colours:
        own = coloured & (colour == index)
        x = own.nonzero()[:, 1].float().mean().item()
        mask = part
        if len(colours) > 1:
            mask = close(own[None])[0] > 0.5
        fish.append({"colour": list(world.COLOURS)[index], "x": x, "mask": mask})
    return fish


def pattern_of(frame, mask):
    """`plain`, `striped` or `spotted`: how much the whiteness changes inside a fish, and along
    which axis."""
    white = frame.amin(0)
    outside = F.max_pool2d(-mask[None].float(), 5, stride=1, padding=2)
    inside = outside[0, 1:, 1:] < -0.5
    here = white[1:, 1:]
    across = (here - white[1:, :-1]).abs()[inside].mean().item()
    along = (here - white[:-1, 1:]).abs()[inside].mean().item()
    size = mask.sum().item() ** 0.5
    if (across + along) * size < 4.2:
        return "plain"
    return "striped" if along < 0.85 * across else "spotted"


def looked_at(video):
    """What the detector sees of clips (B, 3, F, H, W) in [-1, 1]: five frames of the native size,
    (B, 5, 3, h, w) in [0, 1], from the third on every third."""
    frames = video[:, :, 2:15:3].transpose(1, 2)
    frames = (frames.flatten(0, 1) + 1) / 2
    frames = F.interpolate(frames, (NATIVE.height, NATIVE.width), mode="area")
    return frames.unflatten(0, (-1, 5))


def asked_for(scenes, row):
    """The fish that a scene's caption names, one dict each."""
    fish = []
    for one in range(scenes["fish"][row]):
        colour = scenes["colour"][row, one]
        pattern = scenes["pattern"][row, one]
        fish.append(
            {
                "colour": list(world.COLOURS)[colour],
                "direction": scenes["direction"][row, one].item(),
                "pattern": world.PATTERNS[pattern],
            }
        )
    return fish


def judge(frames, wanted):
    """How much of what is `asked_for` can be seen in a clip's frames, as `looked_at` gives them."""
    frames = torch.as_tensor(frames)
    start, *middle, end = find_fish(frames)
    _, count, _ = sorted(len(found) for found in middle)  # the median
    colours = colours_of(wanted)
    frames_with_colours = sum(colours_of(found) == colours for found in middle)
    directions = []
    patterns = []
    for fish in wanted:
        directions.append(swims_right_way(fish, start, end))
        patterns.append(pattern_seen(fish, frames[1:-1], middle) == fish["pattern"])
    return {
        "extra fish": count - len(wanted),
        "count": float(count == len(wanted)),
        "colours": float(frames_with_colours >= 2),
        "direction": float(all(directions)),
        "pattern": float(all(patterns)),
    }


def colours_of(fish):
    return sorted(one["colour"] for one in fish)


def alike(fish, found):
    """Those that were found in a frame and have this fish's colour."""
    return [one for one in found if one["colour"] == fish["colour"]]


def swims_right_way(fish, start, end):
    """Whether it is farther in its direction in the last frame than in the first."""
    before = alike(fish, start)
    after = alike(fish, end)
    if not before or not after:
        return False
    return (after[0]["x"] - before[0]["x"]) * fish["direction"] > 0


def pattern_seen(fish, frames, found):
    """The pattern that it has in most frames, or None if it is in none."""
    seen = []
    for frame, found_there in zip(frames, found, strict=True):
        for one in alike(fish, found_there):
            seen.append(pattern_of(frame, one["mask"]))
    if not seen:
        return None
    return max(set(seen), key=seen.count)


# --------------------------------------------------------------------------------------------------
# Detail, against true clips


LUMA = (0.299, 0.587, 0.114)
LAPLACIAN = ((0, 1, 0), (1, -4, 1), (0, 1, 0))


def sharpness(frames):
    """Mean absolute Laplacian of the luma of frames (N, 3, H, W) in [0, 1], one number each."""
    weights = frames.new_tensor(LUMA).view(-1, 1, 1)
    luma = (frames * weights).sum(1, keepdim=True)
    kernel = frames.new_tensor(LAPLACIAN)[None, None]
    return F.conv2d(luma, kernel).abs().mean((1, 2, 3))


def patch_features(frames, channels=48):
    """What patches of 32 pixels, every 16, look like to a random convolutional network: (N, rows,
    columns, D)."""
    draw = torch.Generator().manual_seed(0)
    x = 4 * frames - 2
    maps = []
    for inputs, size in ((3, 5), (channels, 3), (channels, 3)):
        weight = torch.randn(channels, inputs, size, size, generator=draw)
        weight = weight * math.sqrt(2 / (inputs * size**2))
        x = F.conv2d(x, weight.to(x), stride=2, padding=size // 2)
        x = F.relu(x)
        reach = 32 * x.shape[-1] // frames.shape[-1]
        maps.append(F.avg_pool2d(x, reach, reach // 2))
    return torch.cat(maps, dim=1).permute(0, 2, 3, 1)


def at_border(features, patches=2):
    """Patch features (N, rows, columns, D) as two lists of patches: those near the border, and
    those inside."""
    border = torch.ones(features.shape[1:3], dtype=torch.bool, device=features.device)
    border[patches:-patches, patches:-patches] = False
    near = features[:, border].flatten(0, 1)
    inside = features[:, ~border].flatten(0, 1)
    return near, inside


def frechet(a, b):
    """Frechet distance of two sets of vectors, taken as normally distributed."""
    a = a.double()
    b = b.double()
    cov_a = a.T.cov()
    cov_b = b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    products = torch.linalg.eigvalsh(root @ cov_b @ root)
    cross = products.clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return (apart + cov_a.trace() + cov_b.trace() - 2 * cross).item()


# --------------------------------------------------------------------------------------------------
# The measurement


def rows_of(scenes, start, end):
    return {key: value[start:end] for key, value in scenes.items()}


def render(scenes, scale, device):
    """True clips at a multiple of the native size."""
    scenes = {key: value.to(device) for key, value in scenes.items()}
    return world.render(scenes, NATIVE.height * scale, NATIVE.width * scale, NATIVE.frames)


def encode(vae, video):
    return torch.cat([vae.encode(clip, tiled=False) for clip in video.split(4)])


def decode(vae, latents):
    return torch.cat([vae.decode(clip, tiled=False) for clip in latents.split(4)])


def detail(video):
    """Of clips (B, 3, F, H, W) in [-1, 1], in three frames: sharpness, B numbers, and the features
    of patches."""
    frames = video[:, :, [2, 8, 14]].transpose(1, 2)  # (B, 3 frames, 3, H, W)
    frames = (frames + 1) / 2
    sharp = [sharpness(clip).mean().item() for clip in frames]
    features = [patch_features(clip) for clip in frames]
    return sharp, torch.stack(features)


def measure(models, video, scenes, base=None):
    """One dict of numbers per clip of (B, 3, F, H, W) in [-1, 1], and the features of its patches.
    What the detector says is under "verdict", as a promise: other processes look while the next
    clips are made."""
    sharp, features = detail(video)
    seen = looked_at(video).cpu().numpy()
    results = []
    for row, clip in enumerate(video):
        wanted = asked_for(scenes, row)
        result = {"verdict": models.judges.submit(judge, seen[row], wanted)}
        result["sharpness"] = sharp[row]
        if base is not None:
            result["layout"] = psnr(half_size(clip), half_size(base[row]))
        results.append(result)
    return results, features


def half_size(clip):
    """A clip (3, F, H, W) at half the native size."""
    size = (NATIVE.height // 2, NATIVE.width // 2)
    return F.interpolate(clip.transpose(0, 1), size, mode="area")


def psnr(a, b):
    """Of pixels in [-1, 1], in dB."""
    error = (a - b).square().mean().item()
    return -10 * math.log10(error / 4)


def wait_for_verdicts(results):
    """The numbers of clips, with what the detector promised."""
    complete = []
    for numbers in results:
        rest = {name: value for name, value in numbers.items() if name != "verdict"}
        complete.append(numbers["verdict"].result() | rest)
    return complete


def share(values):
    """Markdown: a share of clips, and the half of its 95% interval (Agresti and Coull's, honest
    near 0 and 1)."""
    clips = len(values) + 4
    guess = (sum(values) + 2) / clips
    half = 1.96 * math.sqrt(guess * (1 - guess) / clips)
    return f"{np.mean(values):.1%} ± {half:.1%}"


def mean(values, form):
    """Markdown: a mean, and the half of its 95% interval."""
    values = np.array(values, dtype=float)
    half = 1.96 * values.std() / math.sqrt(len(values))
    return f"{form.format(values.mean())} ± {form.format(half)}"


def native_table(judged):
    """Markdown: a line per kind of clips; `judged` is {name: list of dicts}."""
    lines = [
        "| | count right | colours right | direction right | pattern right |",
        "|---|---|---|---|---|",
    ]
    for name, results in judged.items():
        cells = [name]
        for column in ("count", "colours", "direction", "pattern"):
            cells.append(share([result[column] for result in results]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table(results, truth):
    """Markdown: a line per method; results is {method: (list of dicts, features (clips, 3, rows,
    columns, D))}."""
    lines = [
        "| | extra fish | count right | colours right | layout, dB | sharpness | patches inside "
        "| at the border | s per clip |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, (numbers, features) in results.items():
        cells = [method, *cells_of(numbers, features, truth)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cells_of(numbers, features, truth):
    """The cells of a method in `table`."""

    def column(name):
        return [result[name] for result in numbers if name in result]

    sharp = np.array(column("sharpness")) / truth["sharpness"]
    layout = column("layout")
    seconds = column("seconds")
    borders = []
    insides = []
    for fifth in features.chunk(5):
        border, inside = at_border(fifth.flatten(0, 1))
        borders.append(frechet(border, truth["border"]))
        insides.append(frechet(inside, truth["inside"]))
    return [
        mean(column("extra fish"), "{:.2f}"),
        share(column("count")),
        share(column("colours")),
        mean(layout, "{:.1f}") if layout else "",
        mean(sharp, "{:.2f}"),
        mean(insides, "{:.3f}"),
        mean(borders, "{:.3f}"),
        f"{np.median(seconds):.2f}" if seconds else "",
    ]


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FOLDER")
    add(
        "--scenes", choices=("test", "choice"), default="test", help="choose settings on the second"
    )
    add("--prompts", type=int, default=200)
    add("--seeds", type=int, default=2, help="of the noise")
    add("--batch", type=int, default=25, help="clips at once")
    add("--scales", type=int, nargs="*", default=[2, 3])
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--steps", type=int, default=NATIVE.steps)
    add(
        "--strength",
        type=float,
        nargs="+",
        default=[NATIVE.strength],
        help="several: every combination is measured",
    )
    add("--flow-shift", type=float, nargs="+", default=[NATIVE.flow_shift])
    add("--guidance", type=float, nargs="+", default=[NATIVE.guidance])
    add("--model", type=Path, default=HERE, metavar="FOLDER")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def base_clips(args, models, scenes, batches):
    """Of every batch and seed the base clips and text embeddings, {(start, seed): (base, text,
    negative)}, and what the detector says of them and of true clips, {name: list of dicts}."""
    bases = {}
    judged = {"true clips": [], AFTER_VAE: [], "base clips": []}
    shape = (16, NATIVE.frames // 4 + 1, NATIVE.height // 8, NATIVE.width // 8)
    for start, end in tqdm(batches, "base"):
        part = rows_of(scenes, start, end)
        true = render(part, 1, models.device)
        judged["true clips"] += measure(models, true, part)[0]
        decoded = decode(models.vae, encode(models.vae, true))
        judged[AFTER_VAE] += measure(models, decoded, part)[0]
        prompts = [*world.captions(part), ""]
        embedded = encode_prompt(models.encoder, models.tokenizer, prompts)
        text = embedded[:-1]
        negative = embedded[-1:].expand_as(text)
        for seed in range(args.seeds):
            latents = generate(
                models.transformer,
                text,
                negative,
                (len(text), *shape),
                steps=args.steps,
                guidance=NATIVE.guidance,
                flow_shift=NATIVE.base_shift,
                generator=torch.Generator().manual_seed(1000 * seed + start),
            )
            base = decode(models.vae, latents)
            judged["base clips"] += measure(models, base, part)[0]
            bases[start, seed] = (base.cpu(), text, negative)
    return bases, judged


def true_clips(args, models, batches, scale):
    """What other scenes than those of the prompts look like at a multiple of the native size:
    sharpness and patches at the border and inside; and, as `measure` gives it for each batch, what
    the VAE makes of them."""
    draw = torch.Generator().manual_seed(SEEDS["true"])
    scenes = world.sample_scenes(args.prompts, draw, NATIVE.frames)
    sharp = []
    features = []
    after_vae = []
    for start, end in batches:
        part = rows_of(scenes, start, end)
        video = render(part, scale, models.device)
        sharp_here, features_here = detail(video)
        sharp += sharp_here
        features.append(features_here)
        decoded = decode(models.vae, encode(models.vae, video))
        after_vae.append(measure(models, decoded, part))
    border, inside = at_border(torch.cat(features).flatten(0, 1))
    truth = {"sharpness": np.mean(sharp), "border": border, "inside": inside}
    return truth, after_vae


def refined_clips(args, models, scenes, bases, scale, settings):
    """Every base clip refined by every method: {method: what `measure` gives for each batch}, and
    of six clips the middle frame by every method, [{method: [frame]}]."""
    size = (NATIVE.height * scale, NATIVE.width * scale)
    results = {name: [] for name in (ENLARGED, *args.methods)}
    pictures = []
    for (start, seed), (base, text, negative) in tqdm(bases.items(), f"{scale}x"):
        part = rows_of(scenes, start, start + len(base))
        base = base.to(models.device)
        enlarged = upsample(base, *size)
        videos = {ENLARGED: enlarged}
        results[ENLARGED].append(measure(models, enlarged, part, base))
        clean = encode(models.vae, enlarged)
        draw_seed = 1000 * seed + start + 500
        for method in args.methods:
            began = time.time()
            latents = refine_by(method, args, models, clean, text, negative, draw_seed, settings)
            seconds = (time.time() - began) / len(base)
            videos[method] = decode(models.vae, latents)
            numbers, features = measure(models, videos[method], part, base)
            for number in numbers:
                number["seconds"] = seconds
            results[method].append((numbers, features))
        if not pictures:
            pictures = middle_frames(videos, min(6, len(base)))
    return results, pictures


def refine_by(method, args, models, clean, text, negative, seed, settings):
    windows = models.windows
    latents = refine(
        models.transformer,
        clean,
        text,
        negative,
        native=(NATIVE.height // 16, NATIVE.width // 16),
        steps=args.steps,
        generator=torch.Generator().manual_seed(seed),
        window_attention=windows.get(method, windows["inward window"]),
        **settings,
        **METHODS[method],
    )
    if models.device.type == "cuda":
        torch.cuda.synchronize()
    return latents


def middle_frames(videos, count):
    """Those of the first clips, [{method: [frame]}]."""
    pictures = []
    for row in range(count):
        frames = {}
        for method, video in videos.items():
            frames[method] = [media.to_frame(video[row : row + 1], NATIVE.frames // 2)]
        pictures.append(frames)
    return pictures


def window_attentions(device):
    """The window attention of each ablation. Each is prepared once for all clips of a size."""
    window = grouped_window
    if device.type == "cuda":
        window = dense_window  # of so few tokens, a mask is faster there
    return {
        "full attention": no_window,
        "clipped window": cache(partial(window, border="clipped")),
        "inward window": cache(window),
    }


def load_models(args, device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    judges = ProcessPoolExecutor(
        max_workers=max(1, os.cpu_count() - 1),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    return SimpleNamespace(
        device=device,
        encoder=TextEncoder.from_pretrained(args.model / "text_encoder", device),
        tokenizer=load_tokenizer(args.model / "tokenizer", NATIVE.text_length),
        transformer=WanTransformer.from_pretrained(args.model / "transformer", device, dtype),
        vae=WanVAE.from_pretrained(args.model / "vae", device),
        windows=window_attentions(device),
        judges=judges,
    )


def join(parts):
    """What `measure` gave for each batch, as one."""
    numbers = []
    features = []
    for numbers_here, features_here in parts:
        numbers += numbers_here
        features.append(features_here)
    return wait_for_verdicts(numbers), torch.cat(features)


def save_pictures(folder, name, pictures):
    """For each clip a picture, NAME-ROW.png: for each method a frame, and below it a part of it,
    enlarged."""
    for row, methods in enumerate(pictures):
        *_, last = methods
        strips = np.split(media.comparison(methods, detail_from=last), len(methods))
        columns = []
        for strip in strips:
            frame, part = np.split(strip, 2, axis=1)
            columns.append(np.concatenate([frame, part]))
        picture = np.concatenate(columns, axis=1)
        Image.fromarray(picture).save(folder / f"{name}-{row}.png")


@torch.no_grad()
def main():
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    models = load_models(args, torch.device(args.device))
    draw = torch.Generator().manual_seed(SEEDS[args.scenes])
    scenes = world.sample_scenes(args.prompts, draw, NATIVE.frames)
    batches = []
    for start in range(0, args.prompts, args.batch):
        batches.append((start, min(start + args.batch, args.prompts)))
    count = f"{args.prompts} prompts, {args.seeds} seeds"
    lines = []

    def report(text):
        print(text, flush=True)
        lines.append(text)
        (args.output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    bases, judged = base_clips(args, models, scenes, batches)
    judged = {name: wait_for_verdicts(results) for name, results in judged.items()}
    report(f"At the native size, {count}:\n\n{native_table(judged)}")
    for scale in args.scales:
        truth, after_vae = true_clips(args, models, batches, scale)
        for strength, shift, guidance in itertools.product(
            args.strength, args.flow_shift, args.guidance
        ):
            settings = {"strength": strength, "flow_shift": shift, "guidance": guidance}
            results, pictures = refined_clips(args, models, scenes, bases, scale, settings)
            results[AFTER_VAE] = after_vae
            joined = {name: join(parts) for name, parts in results.items()}
            report(
                f"\nAt {scale} times the native size, strength {strength}, flow shift {shift}, "
                f"guidance {guidance}, {args.steps} steps, {count}:\n\n{table(joined, truth)}"
            )
            name = f"{scale}x-strength{strength}-shift{shift}-guidance{guidance}"
            save_pictures(args.output, name, pictures)
            numbers = {method: numbers for method, (numbers, _) in joined.items()}
            (args.output / f"{name}.json").write_text(json.dumps(numbers), encoding="utf-8")


if __name__ == "__main__":
    main()
