"""Clips and pictures: read, cropped, written, compared.

A clip that was read is uint8 (F, 3, H, W); a video is (1, 3, F, H, W) in [-1, 1], as model.WanVAE
has it. It becomes bytes frame by frame, on the CPU, so that no second copy of it is ever held.
"""

from itertools import islice
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageSequence, UnidentifiedImageError


def read_clip(file, count):
    """The first `count` frames of a video or picture, its frames per second (None for a picture),
    and how many frames it has in all. Transparent parts are shown on black, odd sides lose a line.
    Raises ValueError for anything else."""
    file = Path(file).absolute()
    if not file.is_file():
        what = (
            "a folder" if file.is_dir() else "no file" if not file.exists() else "no ordinary file"
        )
        raise ValueError(f"--base-video {file}: is {what}; give a video or a picture")
    try:
        with Image.open(file) as image:
            frames = [
                np.asarray(
                    Image.alpha_composite(
                        Image.new("RGBA", image.size, "black"), frame.convert("RGBA")
                    )
                )
                for frame in islice(ImageSequence.Iterator(image), count)
            ]
            milliseconds, total = image.info.get("duration"), getattr(image, "n_frames", 1)
        return even(frames, count, file), milliseconds and 1000 / milliseconds, total
    except UnidentifiedImageError:
        pass  # a video, most likely
    except (OSError, SyntaxError) as error:
        raise ValueError(f"--base-video {file}: is damaged ({str(error)[:100]})") from None
    try:
        reader = imageio_ffmpeg.read_frames(str(file))
        (width, height), fps = (about := next(reader))["size"], about["fps"]
        frames = [
            np.frombuffer(frame, np.uint8).reshape(height, width, 3)
            for frame in islice(reader, count)
        ]
        reader.close()
        total, _ = imageio_ffmpeg.count_frames_and_secs(str(file))
    except (OSError, RuntimeError, StopIteration, KeyError) as error:
        reason = (str(error).strip().splitlines() or ["no frame"])[-1]
        raise ValueError(
            f"--base-video {file}: cannot be read as a video ({reason[:200]})"
        ) from None
    return even(frames, count, file), fps, max(total, len(frames))


def even(frames, count, file):
    """A clip of `count` frames (H, W, 3 or 4) with even sides, as H.264 wants them."""
    if len(frames) < count:
        fit = max(len(frames) - 1, 0) // 4 * 4 + 1
        raise ValueError(f"--base-video {file}: has {len(frames)} frames; use --frames {fit}")
    clip = torch.from_numpy(np.stack(frames)[..., :3]).movedim(-1, 1)
    return clip[..., : clip.shape[2] // 2 * 2, : clip.shape[3] // 2 * 2]


def cropped(shape, target):
    """The largest (height, width) within `shape` that has the proportions of `target`."""
    (rows, columns), (height, width) = shape, target
    return min(rows, round(columns * height / width)), min(columns, round(rows * width / height))


def middle(pixels, height, width):
    """The middle of pixels (..., H, W), `height` x `width`."""
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def pad(video, height, width):
    """A video with its outermost pixels repeated on all sides, evenly, until it is `height` x
    `width`."""
    rows, columns = height - video.shape[-2], width - video.shape[-1]
    return F.pad(
        video,
        (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2, 0, 0),
        mode="replicate",
    )


def to_video(clip):
    return clip.transpose(0, 1)[None].float() / 127.5 - 1


def to_frame(video, index):
    """Frame `index` of a video, uint8 (H, W, 3)."""
    return (
        ((video[0, :, index].float().cpu() + 1) * 127.5)
        .round()
        .clamp(0, 255)
        .byte()
        .permute(1, 2, 0)
        .numpy()
    )


def write_video(file, video, fps):
    """H.264, or for a single frame PNG. Raises OSError if not all of it could be written."""
    if Path(file).suffix == ".png":
        return Image.fromarray(to_frame(video, 0)).save(file)
    with imageio.get_writer(
        file,
        format="FFMPEG",
        fps=fps,
        codec="libx264",
        pixelformat="yuv420p",
        quality=9,
        macro_block_size=1,
    ) as writer:
        for index in range(video.shape[2]):
            writer.append_data(to_frame(video, index))
    try:  # the encoder ends without a word when its disk is full
        count, _ = imageio_ffmpeg.count_frames_and_secs(str(file))
    except RuntimeError:
        count = 0
    if count != video.shape[2]:
        raise OSError("the encoder wrote half of it; is the disk full?")


def sample_frames(video):
    """The first, the middle and the last frame."""
    return [to_frame(video, index) for index in (0, video.shape[2] // 2, -1)]


def comparison(clips):
    """One picture of {label: frames (H, W, 3)}: a strip each, of the frames and an enlarged part of
    the middle one. The part is where the last clip's middle frame has the strongest edges, a third
    of the frame high and wide."""
    frames = list(clips.values())[-1]
    height, width, _ = frames[0].shape
    luma = torch.from_numpy(frames[len(frames) // 2]).float().mean(-1)
    edges = (luma[1:, 1:] - luma[:-1, 1:]).abs() + (luma[1:, 1:] - luma[1:, :-1]).abs()
    energy = F.avg_pool2d(edges[None, None], (height // 3, width // 3), stride=8)[0, 0]
    y, x = (8 * int(i) for i in divmod(int(energy.argmax()), energy.shape[1]))
    strips = []
    for label, frames in clips.items():
        part = frames[len(frames) // 2][y : y + height // 3, x : x + width // 3]
        part = Image.fromarray(part).resize((width, height), Image.Resampling.NEAREST)
        strip = Image.fromarray(np.concatenate([*frames, np.asarray(part)], axis=1))
        font = ImageFont.load_default(max(height // 16, 8))
        ImageDraw.Draw(strip).text(
            (8, 4), label, "white", font, stroke_width=2, stroke_fill="black"
        )
        strips.append(np.asarray(strip))
    return Image.fromarray(np.concatenate(strips))
