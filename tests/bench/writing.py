"""x264's presets on clips with grain and without: `python tests/bench/writing.py`, two minutes on
two cores. For each preset the seconds, the file's size, and how near the decoded video comes (PSNR,
in dB) at the quality that the command writes."""

import math
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from freeswim import upsample
from support import media

PRESETS = ("medium", "fast", "faster", "veryfast", "superfast", "ultrafast")
FRAMES = 17


def clips():
    """17 frames of 1920x1080: the bundled fish enlarged, and the same with film grain."""
    fish = media.read_clip(ROOT / "tiny" / "sample.webp", FRAMES)
    video = upsample(media.to_video(fish.frames), 1080, 1920)
    grain = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    grainy = (video + 0.06 * grain).clamp(-1, 1)
    return {"fish": video, "fish with grain": grainy}


def psnr(file, video):
    read = media.to_video(media.read_clip(file, FRAMES).frames)
    error = (read - video).square().mean().item()
    return -10 * math.log10(error / 4)


def main():
    print("| clip | preset | seconds | MiB | PSNR, dB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, video in clips().items():
            for preset in PRESETS:
                file = Path(folder) / "clip.mp4"
                start = time.time()
                media.write_video(file, video, 16, preset=preset)
                seconds = time.time() - start
                size = file.stat().st_size / 2**20
                quality = psnr(file, video)
                row = f"| {name} | {preset} | {seconds:.1f} | {size:.1f} | {quality:.1f} |"
                print(row, flush=True)


if __name__ == "__main__":
    main()
