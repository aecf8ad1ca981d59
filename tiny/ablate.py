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
    "inward + override": {},
    "cached, k = 2": {"cache_interval": 2},
    "cached, k = 5": {"cache_interval": 5},
}
SEEDS = {
    "test": 2_000_000,
    "choice": 3_000_000,
    "true": 4_000_000,
}  # of scenes: settings are chosen on "choice"


# --------------------------------------------------------------------------------------------------
# The detector. It looks at frames of the native size; larger ones are averaged down to it.


def hue_and_saturation(rgb):
    """Hue in radians and saturation in [0, 1], (N, H, W) each, of (N, 3, H, W) in [0, 1]."""
    red, green, blue = rgb.unbind(1)
    hue = torch.atan2(math.sqrt(3) / 2 * (green - blue), red - (green + blue) / 2)
    return hue, (rgb.amax(1) - rgb.amin(1)) / rgb.amax(1).clamp(min=1e-3)


def blobs(mask):
    """The connected parts of masks (N, H, W): numbers from 1 on at each pixel, 0 outside, the same
    within a part."""
    mask = mask[:, None].float()
    labels = (torch.arange(mask.numel(), device=mask.device) + 1.0).view_as(mask) * mask
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if torch.equal(spread, labels):
            return labels[:, 0].long()
        labels = spread


def find_fish(frames):
    """The fish in every frame of (N, 3, H, W) in [0, 1]: per frame a list of dicts of colour, x,
    mask (H, W)."""
    frames = F.interpolate(frames, (NATIVE.height, NATIVE.width), mode="area")
    hue, saturation = hue_and_saturation(frames)
    palette, _ = hue_and_saturation(
        torch.tensor(list(world.COLOURS.values()), device=frames.device).view(-1, 3, 1, 1)
    )
    distance = (hue[:, None] - palette.view(1, -1, 1, 1) + math.pi).remainder(2 * math.pi) - math.pi
    distance, colour = distance.abs().min(dim=1)
    sandy = (hue > math.radians(24)) & (hue < math.radians(60))
    coloured = (
        (distance < math.radians(24))
        & (saturation > torch.where(sandy, 0.58, 0.36))
        & (frames.amax(1) > 0.22)
    )

    def grow(mask, size):
        return F.max_pool2d(mask, size, stride=1, padding=size // 2)

    def close(mask):  # over white stripes, spots and eyes
        return -grow(-grow(mask.float(), 9), 9)

    mask = close(coloured[:, None])
    mask = grow(-grow(-mask, 3), 3)[:, 0] > 0.5  # without specks
    labels, found = blobs(mask), []
    for n in range(len(frames)):
        fish = []
        for label in labels[n].unique().tolist():
            part = labels[n] == label
            if label == 0 or part.sum() < 60:  # a small fish has about 400 pixels
                continue
            share = torch.bincount(
                colour[n][part & coloured[n]], minlength=len(world.COLOURS)
            ).float()
            share = share / share.sum().clamp(min=1)
            colours = (share > 0.12).nonzero().flatten().tolist()
            for index in colours:  # two fish that touch are two
                own = part & coloured[n] & (colour[n] == index)
                x = own.nonzero()[:, 1].float().mean().item()
                whole = part if len(colours) == 1 else close(own[None])[0] > 0.5
                fish.append({"colour": list(world.COLOURS)[index], "x": x, "mask": whole})
        found.append(fish)
    return found


def pattern_of(frame, mask):
    """`plain`, `striped` or `spotted`: how much the whiteness changes inside a fish, and along
    which axis."""
    white = frame.amin(0)
    inside = -F.max_pool2d(-mask[None].float(), 5, stride=1, padding=2)[0, 1:, 1:] > 0.5
    across = (white[1:, 1:] - white[1:, :-1]).abs()[inside].mean().item()
    along = (white[1:, 1:] - white[:-1, 1:]).abs()[inside].mean().item()
    if (across + along) * mask.sum().item() ** 0.5 < 4.2:
        return "plain"
    return "striped" if along < 0.85 * across else "spotted"


def looked_at(video):
    """What the detector sees of clips (B, 3, F, H, W) in [-1, 1]: five frames of the native size,
    (B, 5, 3, h, w) in [0, 1], from the third on every third."""
    frames = (video[:, :, 2:15:3].transpose(1, 2) + 1) / 2
    return F.interpolate(
        frames.flatten(0, 1), (NATIVE.height, NATIVE.width), mode="area"
    ).unflatten(0, (-1, 5))


def asked_for(scenes, row):
    """The fish that a scene's caption names, one dict each."""
    return [
        {
            "colour": list(world.COLOURS)[scenes["colour"][row, n]],
            "direction": scenes["direction"][row, n].item(),
            "pattern": world.PATTERNS[scenes["pattern"][row, n]],
        }
        for n in range(scenes["fish"][row])
    ]


def judge(frames, wanted):
    """How much of what is `asked_for` can be seen in a clip's frames, as `looked_at` gives them."""
    frames = torch.as_tensor(frames)
    start, *middle, end = find_fish(frames)
    counts = sorted(len(fish) for fish in middle)
    colours = sorted(fish["colour"] for fish in wanted)
    result = {
        "fish too many": counts[1] - len(wanted),
        "count": float(counts[1] == len(wanted)),
        "colours": float(
            sum(sorted(fish["colour"] for fish in found) == colours for found in middle) >= 2
        ),
    }
    direction, pattern = [], []
    for fish in wanted:
        before, after = (
            [f["x"] for f in found if f["colour"] == fish["colour"]] for found in (start, end)
        )
        direction.append(bool(before and after) and (after[0] - before[0]) * fish["direction"] > 0)
        seen = [
            pattern_of(frame, f["mask"])
            for frame, found in zip(frames[1:-1], middle, strict=True)
            for f in found
            if f["colour"] == fish["colour"]
        ]
        pattern.append(bool(seen) and max(set(seen), key=seen.count) == fish["pattern"])
    return result | {"direction": float(all(direction)), "pattern": float(all(pattern))}


# --------------------------------------------------------------------------------------------------
# Detail, against true clips


def sharpness(frames):
    """Mean absolute Laplacian of the luma of frames (N, 3, H, W) in [0, 1], one number each."""
    luma = (frames * frames.new_tensor([0.299, 0.587, 0.114]).view(-1, 1, 1)).sum(1, keepdim=True)
    kernel = frames.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return F.conv2d(luma, kernel).abs().mean((1, 2, 3))


def patch_features(frames, channels=48):
    """What patches of 32 pixels, every 16, look like to a random convolutional network: (N, rows,
    columns, D)."""
    draw = torch.Generator().manual_seed(0)
    x, maps = 4 * frames - 2, []
    for wide, size in ((3, 5), (channels, 3), (channels, 3)):
        weight = torch.randn(channels, wide, size, size, generator=draw) * math.sqrt(
            2 / (wide * size**2)
        )
        x = F.relu(F.conv2d(x, weight.to(x), stride=2, padding=size // 2))
        reach = 32 * x.shape[-1] // frames.shape[-1]
        maps.append(F.avg_pool2d(x, reach, reach // 2))
    return torch.cat(maps, dim=1).permute(0, 2, 3, 1)


def at_border(features, patches=2):
    """Patch features (N, rows, columns, D) as two lists of patches: those near the border, and
    those inside."""
    border = torch.ones(features.shape[1:3], dtype=torch.bool, device=features.device)
    border[patches:-patches, patches:-patches] = False
    return features[:, border].flatten(0, 1), features[:, ~border].flatten(0, 1)


def frechet(a, b):
    """Frechet distance of two sets of vectors, taken as normally distributed."""
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    return (
        (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * cross
    ).item()


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
    frames = (video[:, :, [2, 8, 14]].transpose(1, 2) + 1) / 2  # (B, 3 frames, 3, H, W)
    return [sharpness(clip).mean().item() for clip in frames], torch.stack(
        [patch_features(clip) for clip in frames]
    )


def measure(models, video, scenes, base=None):
    """One dict of numbers per clip of (B, 3, F, H, W) in [-1, 1], and the features of its patches.
    What the detector says is under "verdict", as a promise: other processes look while the next
    clips are made."""
    (sharp, features), results, seen = detail(video), [], looked_at(video).cpu().numpy()
    for row, clip in enumerate(video):
        result = {
            "verdict": models.judges.submit(judge, seen[row], asked_for(scenes, row)),
            "sharpness": sharp[row],
        }
        if base is not None:
            small = [
                F.interpolate(
                    v.transpose(0, 1), (NATIVE.height // 2, NATIVE.width // 2), mode="area"
                )
                for v in (clip, base[row])
            ]
            result["layout"] = -10 * math.log10((small[0] - small[1]).square().mean().item() / 4)
        results.append(result)
    return results, features


def settled(results):
    """The numbers of clips, with what the detector promised."""
    return [
        numbers["verdict"].result() | {key: numbers[key] for key in numbers if key != "verdict"}
        for numbers in results
    ]


def share(values):
    """Markdown: a share of clips, and the half of its 95% interval (Agresti and Coull's, honest
    near 0 and 1)."""
    clips, guess = len(values) + 4, (sum(values) + 2) / (len(values) + 4)
    return f"{np.mean(values):.1%} ± {1.96 * math.sqrt(guess * (1 - guess) / clips):.1%}"


def native_table(judged):
    """Markdown: a line per kind of clips; `judged` is {name: list of dicts}."""
    lines = [
        "| | count right | colours right | direction right | pattern right |",
        "|---|---|---|---|---|",
    ]
    for name, results in judged.items():
        cells = [
            share([result[column] for result in results])
            for column in ("count", "colours", "direction", "pattern")
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(results, truth):
    """Markdown: a line per method; results is {method: (list of dicts, features (clips, 3, rows,
    columns, D))}."""
    lines = [
        "| | fish too many | count right | colours right | layout, dB | sharpness | patches inside "
        "| at the border | s per clip |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def spread(values, form):
        values = np.array(values, dtype=float)
        return (
            f"{form.format(values.mean())} ± "
            f"{form.format(1.96 * values.std() / math.sqrt(len(values)))}"
        )

    for method, (numbers, features) in results.items():
        column = {
            name: [result[name] for result in numbers if name in result]
            for name in ("fish too many", "count", "colours", "layout", "sharpness", "seconds")
        }
        fifths = [at_border(part.flatten(0, 1)) for part in features.chunk(5)]
        cells = [
            spread(column["fish too many"], "{:.2f}"),
            share(column["count"]),
            share(column["colours"]),
            spread(column["layout"], "{:.1f}") if column["layout"] else "",
            spread(np.array(column["sharpness"]) / truth["sharpness"], "{:.2f}"),
            spread([frechet(inside, truth["inside"]) for _, inside in fifths], "{:.3f}"),
            spread([frechet(border, truth["border"]) for border, _ in fifths], "{:.3f}"),
            f"{np.median(column['seconds']):.2f}" if column["seconds"] else "",
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
    bases, judged = {}, {"true clips": [], "true clips through the VAE": [], "base clips": []}
    for start, end in tqdm(batches, "base"):
        part = rows_of(scenes, start, end)
        true = render(part, 1, models.device)
        judged["true clips"] += measure(models, true, part)[0]
        judged["true clips through the VAE"] += measure(
            models, decode(models.vae, encode(models.vae, true)), part
        )[0]
        prompts = [*world.captions(part), ""]
        text, negative = encode_prompt(models.encoder, models.tokenizer, prompts).split(
            [len(prompts) - 1, 1]
        )
        negative = negative.expand_as(text)
        shape = len(text), 16, NATIVE.frames // 4 + 1, NATIVE.height // 8, NATIVE.width // 8
        for seed in range(args.seeds):
            latents = generate(
                models.transformer,
                text,
                negative,
                shape,
                steps=args.steps,
                guidance=NATIVE.guidance,
                flow_shift=NATIVE.base_shift,
                generator=torch.Generator().manual_seed(1000 * seed + start),
            )
            base = decode(models.vae, latents)
            judged["base clips"] += measure(models, base, part)[0]
            bases[start, seed] = base.cpu(), text, negative
    return bases, judged


def true_clips(args, models, batches, scale):
    """What other scenes than those of the prompts look like at a multiple of the native size:
    sharpness and patches at the border and inside; and, as `measure` gives it for each batch, what
    the VAE makes of them."""
    scenes = world.sample_scenes(
        args.prompts, torch.Generator().manual_seed(SEEDS["true"]), NATIVE.frames
    )
    truth, ceiling = [], []
    for start, end in batches:
        part = rows_of(scenes, start, end)
        video = render(part, scale, models.device)
        truth.append(detail(video))
        ceiling.append(measure(models, decode(models.vae, encode(models.vae, video)), part))
    border, inside = at_border(torch.cat([features for _, features in truth]).flatten(0, 1))
    return {
        "sharpness": np.mean(sum((sharp for sharp, _ in truth), [])),
        "border": border,
        "inside": inside,
    }, ceiling


def refined_clips(args, models, scenes, bases, scale, settings):
    """Every base clip refined by every method: {method: what `measure` gives for each batch}, and
    of six clips the middle frame by every method, [{method: [frame]}]."""
    native = NATIVE.height // 16, NATIVE.width // 16
    height, width = NATIVE.height * scale, NATIVE.width * scale
    results, pictures = {name: [] for name in ("bilinear upscale", *args.methods)}, []
    for (start, seed), (base, text, negative) in tqdm(bases.items(), f"{scale}x"):
        part, base = rows_of(scenes, start, start + len(base)), base.to(models.device)
        videos = {"bilinear upscale": upsample(base, height, width)}
        results["bilinear upscale"].append(measure(models, videos["bilinear upscale"], part, base))
        clean = encode(models.vae, videos["bilinear upscale"])
        for method in args.methods:
            began = time.time()
            latents = refine(
                models.transformer,
                clean,
                text,
                negative,
                native=native,
                steps=args.steps,
                generator=torch.Generator().manual_seed(1000 * seed + start + 500),
                window_attention=models.windows.get(method, models.windows["inward window"]),
                **settings,
                **METHODS[method],
            )
            if models.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = (time.time() - began) / len(base)
            videos[method] = decode(models.vae, latents)
            numbers, features = measure(models, videos[method], part, base)
            results[method].append(
                ([number | {"seconds": seconds} for number in numbers], features)
            )
        if not pictures:
            pictures = [
                {name: [media.to_frame(video[row : row + 1], 8)] for name, video in videos.items()}
                for row in range(min(6, len(base)))
            ]
    return results, pictures


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


@torch.no_grad()
def main():
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    device, dtype = (
        torch.device(args.device),
        torch.bfloat16 if args.device != "cpu" else torch.float32,
    )
    models = SimpleNamespace(
        device=device,
        encoder=TextEncoder.from_pretrained(args.model / "text_encoder", device),
        tokenizer=load_tokenizer(args.model / "tokenizer", NATIVE.text_length),
        transformer=WanTransformer.from_pretrained(args.model / "transformer", device, dtype),
        vae=WanVAE.from_pretrained(args.model / "vae", device),
        windows=window_attentions(device),
        judges=ProcessPoolExecutor(
            max(1, os.cpu_count() - 1),
            multiprocessing.get_context("spawn"),
            torch.set_num_threads,
            (1,),
        ),
    )
    scenes = world.sample_scenes(
        args.prompts, torch.Generator().manual_seed(SEEDS[args.scenes]), NATIVE.frames
    )
    batches = [
        (start, min(start + args.batch, args.prompts))
        for start in range(0, args.prompts, args.batch)
    ]
    lines = []

    def report(text):
        print(text, flush=True)
        lines.append(text)
        (args.output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    bases, judged = base_clips(args, models, scenes, batches)
    judged = {name: settled(results) for name, results in judged.items()}
    report(
        f"At the native size, {args.prompts} prompts, {args.seeds} seeds:\n\n"
        + native_table(judged)
    )
    for scale in args.scales:
        truth, ceiling = true_clips(args, models, batches, scale)
        for strength, shift, guidance in itertools.product(
            args.strength, args.flow_shift, args.guidance
        ):
            settings = {"strength": strength, "flow_shift": shift, "guidance": guidance}
            results, pictures = refined_clips(args, models, scenes, bases, scale, settings)
            results["true clips through the VAE"] = ceiling
            joined = {
                name: (
                    settled(sum((numbers for numbers, _ in parts), [])),
                    torch.cat([f for _, f in parts]),
                )
                for name, parts in results.items()
            }
            report(
                f"\nAt {scale} times the native size, strength {strength}, flow shift "
                f"{shift}, guidance {guidance}, "
                f"{args.steps} steps, {args.prompts} prompts, {args.seeds} seeds:\n\n"
                + table(joined, truth)
            )
            name = f"{scale}x-strength{strength}-shift{shift}-guidance{guidance}"
            for row, methods in enumerate(pictures):
                strips = np.split(
                    np.asarray(media.comparison(methods, detail_from=list(methods)[-1])),
                    len(methods),
                )  # a frame, and a part enlarged,
                columns = [
                    np.concatenate(np.split(strip, 2, axis=1)) for strip in strips
                ]  # now one above the other
                Image.fromarray(np.concatenate(columns, axis=1)).save(
                    args.output / f"{name}-{row}.png"
                )
            (args.output / f"{name}.json").write_text(
                json.dumps({key: value[0] for key, value in joined.items()}), encoding="utf-8"
            )


if __name__ == "__main__":
    main()
