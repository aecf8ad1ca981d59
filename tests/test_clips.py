"""Clips and pictures from real life. Each test makes its own files with PyAV or Pillow, so what is
in them is known."""

import os
import pickle
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from command import parse, record, run, run_here
from PIL import Image

from model import is_finite
from support import UserError, media
from support.plan import make_plan

HEIGHT = 128
WIDTH = 192
NTSC = [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001)]


def audio_frame(samples):
    """Of one channel."""
    channels = samples[None].astype(np.float32)
    return av.AudioFrame.from_ndarray(channels, "fltp", "mono")


def first_frame(file):
    """(H, W, 3), uint8."""
    frames = media.read_clip(file, 1).frames
    return frames[0].permute(1, 2, 0).numpy()


def black(frames):
    """A video, (1, 3, frames, H, W)."""
    return torch.zeros(1, 3, frames, HEIGHT, WIDTH)


def grey_frame(level, height=HEIGHT, width=WIDTH):
    return np.full((height, width, 3), level, np.uint8)


def levels_of(clip):
    """The grey level of each frame."""
    return [round(frame.float().mean().item()) for frame in clip.frames]


def close(levels, expected):
    return levels == pytest.approx(expected, abs=3)


def write(
    file,
    frames,
    rate=16,
    times=None,
    codec="libx264",
    aspect=None,
    tags=None,
    matrix=Colorspace.ITU601,
    rotation=None,
    sound=None,
    sound_start=0,
    pix_fmt="yuv420p",
    options=None,
):
    """A video of `frames`, uint8 (H, W, 3). `times` are those of the frames in milliseconds; `tags`
    a dict of the codec's colour fields; `matrix` the one that pixels are converted with."""
    with av.open(str(file), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = pix_fmt
        if codec == "libx264":
            stream.options = {"crf": "4", "bf": "0"}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if sound is not None:
            sound_stream = container.add_stream("aac", rate=48000)
            sound_stream.layout = "mono"
        if sound is not None:
            part = audio_frame(sound)
            part.rate = 48000
            part.time_base = Fraction(1, 48000)
            part.pts = sound_start
            container.mux(sound_stream.encode(part))
            container.mux(sound_stream.encode(None))
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(
                format=pix_fmt,
                dst_colorspace=matrix,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
            )
            frame.pts = index
            if times is not None:
                frame.pts = times[index]
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


LEVELS = [20, 50, 80, 110, 140, 170, 200, 230]
GREYS = [grey_frame(level) for level in LEVELS]


def planned(checkpoint, tmp_path, clip, *arguments):
    return make_plan(
        parse(
            *("--model", checkpoint, "--output", tmp_path / "run", "--prompt", "a red fish"),
            *("--base-video", clip, *arguments),
        )
    )


# --------------------------------------------------------------------------------------------------
# Time


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "avi", "ts"])
def test_every_frame_is_read_once_and_in_order(tmp_path, suffix):
    file = write(tmp_path / f"clip.{suffix}", GREYS)
    clip = media.read_clip(file, 99)
    assert close(levels_of(clip), LEVELS)
    assert clip.fps == 16


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_stream_that_starts_late(tmp_path, suffix):
    """As where the sound begins first."""
    times = [1500 + 40 * index for index in range(8)]
    file = write(tmp_path / f"clip.{suffix}", GREYS, 25, times)
    clip = media.read_clip(file, 99)
    assert close(levels_of(clip), LEVELS)
    assert clip.fps == 25


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_frame_rate(tmp_path, suffix):
    """The output's rate is the average. How long the last frame lasts, not all containers say."""
    times = [0, 20, 200, 220, 400, 420, 600, 620]
    file = write(tmp_path / f"clip.{suffix}", GREYS, 25, times)
    clip = media.read_clip(file, 99)
    assert close(levels_of(clip), LEVELS)
    assert abs(clip.fps / (7 / 0.62) - 1) < 0.15


def test_two_rates_one_after_the_other(tmp_path):
    """As in a concatenation of 50 and 12.5 frames per second."""
    times = [0, 20, 40, 60, 80, 160, 240, 320]
    file = write(tmp_path / "clip.mp4", GREYS, 25, times)
    clip = media.read_clip(file, 99)
    assert close(levels_of(clip), LEVELS)
    first_half = media.read_clip(tmp_path / "clip.mp4", 4)
    assert close(levels_of(first_half), LEVELS[:4])


@pytest.mark.parametrize("rate", NTSC)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "ts", "avi"])
@pytest.mark.parametrize("most", [5, 99])
def test_ntsc_rates_are_exact(tmp_path, rate, suffix, most):
    """Matroska keeps whole milliseconds, MPEG-TS a clock of 90 kHz."""
    frames = GREYS * 3
    file = write(tmp_path / f"clip.{suffix}", frames, rate)
    assert media.read_clip(file, most).fps == rate


@pytest.mark.parametrize("typed, fps", [("24000/1001", NTSC[0]), ("23.976", Fraction("23.976"))])
def test_the_rate_that_was_typed(checkpoint, tmp_path, typed, fps):
    clip = write(tmp_path / "clip.mp4", GREYS)
    assert planned(checkpoint, tmp_path, clip, "--fps", typed).fps == fps


@pytest.mark.parametrize("typed", ["24000/0", "nan", "inf", "-24", "0", "fast", "1e9", "24/"])
def test_rates_that_cannot_be_are_refused(typed, capsys):
    with pytest.raises(SystemExit):
        parse(f"--fps={typed}")
    assert f"--fps {typed}" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [NTSC[0], Fraction(25)])
def test_a_rate_is_written_exactly(tmp_path, rate):
    media.write_video(tmp_path / "out.mp4", black(9), rate)
    assert media.read_clip(tmp_path / "out.mp4", 99).fps == rate
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].average_rate == rate


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_has_the_average_of_all_its_durations(tmp_path, suffix):
    images = [Image.fromarray(frame) for frame in GREYS[:4]]
    durations = [100, 100, 100, 500]
    images[0].save(
        tmp_path / f"a.{suffix}", save_all=True, append_images=images[1:], duration=durations
    )
    clip = media.read_clip(tmp_path / f"a.{suffix}", 99)
    assert close(levels_of(clip), LEVELS[:4])
    assert clip.fps == Fraction(4000, 800)
    assert media.read_clip(tmp_path / f"a.{suffix}", 1).fps == Fraction(4000, 800)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "gif"])
def test_start_picks_where_to_begin(tmp_path, suffix):
    file = tmp_path / f"clip.{suffix}"
    if suffix == "gif":
        images = [Image.fromarray(frame) for frame in GREYS]
        images[0].save(file, save_all=True, append_images=images[1:], duration=100)
    else:
        write(file, GREYS, 10)
    clip = media.read_clip(file, 4, start=0.3)
    assert close(levels_of(clip), LEVELS[3:7])
    assert clip.notes == ("4 frames of the clip are used, from 0.3 seconds on",)
    with pytest.raises(UserError, match="--start 99"):
        media.read_clip(file, 4, start=99)


def test_a_long_film_starts_as_quickly_as_a_short_one(tmp_path, monkeypatch):
    """Nothing is decoded but the frames that are used, and a few from the last keyframe on."""
    decoded = []

    def count(frame, stream):
        decoded.append(frame)
        return GREYS[0]

    monkeypatch.setattr(media, "rgb_of", count)
    film = write(tmp_path / "film.mp4", [GREYS[0]] * 1500, 25)
    media.read_clip(film, 5, start=50)
    assert len(decoded) == 5
    media.read_clip(film, 5)
    assert len(decoded) == 10


# --------------------------------------------------------------------------------------------------
# Length


def test_a_picture_means_one_frame(checkpoint, tmp_path):
    Image.fromarray(GREYS[0]).save(tmp_path / "a.jpg")
    assert planned(checkpoint, tmp_path, tmp_path / "a.jpg").options.frames == 1


@pytest.mark.parametrize("count, used", [(2, 1), (5, 5), (8, 5), (9, 9), (16, 13)])
def test_a_short_clip_takes_what_it_has(checkpoint, tmp_path, count, used):
    clip = write(tmp_path / "clip.mp4", (GREYS * 2)[:count])
    plan = planned(checkpoint, tmp_path, clip)
    assert plan.options.frames == used
    assert any(f"has {count} frames, of which {used} are used" in note for note in plan.notes)


def test_only_frames_that_were_asked_for_are_refused(checkpoint, tmp_path):
    clip = write(tmp_path / "clip.mp4", GREYS)
    with pytest.raises(UserError, match="--frames 9: .* has 8 frames; use --frames 5"):
        planned(checkpoint, tmp_path, clip, "--frames", 9)


# --------------------------------------------------------------------------------------------------
# Shape

ASPECTS = [Fraction(4, 3), Fraction(8, 9), Fraction(32, 27)]


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pixels_that_are_not_square(tmp_path, aspect, suffix):
    file = write(tmp_path / f"clip.{suffix}", GREYS[:2], aspect=aspect)
    clip = media.read_clip(file, 99)
    height, width = clip.frames.shape[2:]
    assert abs(Fraction(width, height) / (Fraction(WIDTH, HEIGHT) * aspect) - 1) < 0.02
    assert height >= HEIGHT
    assert width >= WIDTH


def corners():
    """A picture with another colour in each corner."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:64, :96] = (250, 0, 0)
    pixels[:64, 96:] = (0, 250, 0)
    pixels[64:, :96] = (0, 0, 250)
    pixels[64:, 96:] = (250, 250, 250)
    return pixels


# What brings each EXIF orientation upright, as the standard has it.
EXIF = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", EXIF)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    image = Image.fromarray(corners())
    exif = image.getexif()
    exif[0x0112] = orientation
    more = {"lossless": True} if suffix == "webp" else {}
    image.save(tmp_path / f"a.{suffix}", exif=exif, **more)
    read = first_frame(tmp_path / f"a.{suffix}")
    expected = EXIF[orientation](corners())
    assert read.shape == expected.shape
    assert np.abs(read.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_videos_are_upright(tmp_path, degrees):
    """The display matrix turns counterclockwise."""
    file = write(tmp_path / "clip.mp4", [corners()] * 2, rotation=degrees)
    read = first_frame(file)
    expected = np.rot90(corners(), degrees // 90)
    assert read.shape == expected.shape
    assert np.abs(read.astype(int) - expected).mean() < 6


# --------------------------------------------------------------------------------------------------
# Colour

PATCHES = [(200, 60, 50), (60, 180, 70), (50, 70, 200), (190, 180, 60), (128, 128, 128)]


def patches(height=HEIGHT, width=160):
    """Fields of strong but not extreme colours, each 32 pixels wide."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for index, colour in enumerate(PATCHES):
        pixels[:, 32 * index : 32 * index + 32] = colour
    return pixels


def colours_of(frame):
    """The middle of each field."""
    pixels = np.asarray(frame).astype(int)
    middles = range(16, 32 * len(PATCHES), 32)
    return np.array([pixels[40, column] for column in middles])


def colour_difference(frame, other):
    """The largest between two frames' fields."""
    return np.abs(colours_of(frame) - colours_of(other)).max()


def test_a_cropped_video_is_checked_without_a_copy():
    """What is computed is often larger than what was asked for. On a GPU that holds one video of
    3840x2160, a copy ran out of memory when all was computed."""
    cropped = media.center_crop(torch.zeros(1, 3, 9, 64, 96), 60, 96)
    with torch.profiler.profile(profile_memory=True) as profile:
        assert is_finite(cropped)
    most = max(event.cpu_memory_usage for event in profile.key_averages())
    assert most < 1000  # bytes
    for number in (torch.nan, torch.inf, -torch.inf):
        cropped[0, 1, 4, 30, 40] = number
        assert not is_finite(cropped)


def test_what_is_written_has_the_colours_of_the_png(tmp_path):
    frames = torch.from_numpy(patches()).permute(2, 0, 1)[None]
    video = media.to_video(frames)
    media.write_video(tmp_path / "out.mp4", video, 16)
    media.write_picture(tmp_path / "out.png", video)
    with av.open(str(tmp_path / "out.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert codec.colorspace == 1
        assert codec.color_range == ColorRange.MPEG
        assert codec.color_primaries == ColorPrimaries.BT709
        assert codec.color_trc == ColorTrc.BT709
        frame = next(container.decode(video=0))
    frame = frame.reformat(
        format="rgb24",
        src_colorspace=Colorspace.ITU709,
        interpolation=Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
    )
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert colour_difference(frame.to_ndarray(), picture) <= 2
    again = first_frame(tmp_path / "out.mp4")
    assert colour_difference(again, picture) <= 2


@pytest.mark.parametrize(
    "height, tag, matrix",
    [
        (128, None, Colorspace.ITU601),  # untagged, by its height
        (720, None, Colorspace.ITU709),
        (128, 1, Colorspace.ITU709),  # tagged against its height
        (720, 5, Colorspace.ITU601),
        (720, 6, Colorspace.ITU601),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_input_is_read_with_its_matrix(tmp_path, height, tag, matrix, suffix):
    tags = {} if tag is None else {"colorspace": tag}
    pixels = patches(height)
    file = write(tmp_path / f"clip.{suffix}", [pixels] * 2, tags=tags, matrix=matrix)
    read = first_frame(file)
    assert colour_difference(read, pixels) <= 4


def test_pictures_of_16_bits_keep_their_values(tmp_path):
    ramp = np.linspace(0, 65535, WIDTH).round().astype(np.uint16)
    grey = np.repeat(ramp[None], HEIGHT, axis=0)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).save(tmp_path / "grey.tiff")
    for name in ("grey.png", "grey.tiff"):
        read = media.read_clip(tmp_path / name, 1).frames[0]
        expected = torch.from_numpy(ramp / 257.0)
        difference = read[0, 5].float() - expected
        assert difference.abs().max() <= 1
    rgb = np.stack([grey, grey[:, ::-1], grey // 2], axis=-1)
    for name, codec, pix_fmt in (("rgb.png", "png", "rgb48be"), ("rgb.tiff", "tiff", "rgb48le")):
        write_rgb48(tmp_path / name, rgb, codec, pix_fmt)
        read = first_frame(tmp_path / name)
        difference = read.astype(float) - rgb / 257
        assert np.abs(difference).max() <= 1.5


def write_rgb48(file, pixels, codec, pix_fmt):
    """16 bits for each of three channels, which Pillow cannot write."""
    with av.open(str(file), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream(codec, rate=1)
        stream.height, stream.width, _ = pixels.shape
        stream.pix_fmt = pix_fmt
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le")
        container.mux(stream.encode(frame.reformat(format=pix_fmt)))
        container.mux(stream.encode(None))


def test_other_kinds_of_pixels_look_as_in_a_viewer(tmp_path):
    image = Image.fromarray(patches())
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    image.convert("CMYK").save(tmp_path / "cmyk.tiff")
    image.quantize(16).save(tmp_path / "palette.png")
    image.quantize(16).save(tmp_path / "palette.gif")
    image.convert("YCbCr").save(tmp_path / "ycc.jpg", quality=98)
    for name in ("cmyk.jpg", "cmyk.tiff", "palette.png", "palette.gif", "ycc.jpg"):
        read = first_frame(tmp_path / name)
        assert colour_difference(read, patches()) <= 6, name
    black_and_white = Image.fromarray(GREYS[7]).convert("1", dither=Image.Dither.NONE)
    for suffix in ("png", "tiff", "bmp"):
        black_and_white.save(tmp_path / f"one.{suffix}")
        assert media.read_clip(tmp_path / f"one.{suffix}", 1).frames.eq(255).all()


def test_transparent_palettes_are_shown_on_black(tmp_path):
    image = Image.fromarray(GREYS[7]).quantize(4)
    image.info["transparency"] = image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=image.getpixel((0, 0)))
    assert media.read_clip(tmp_path / "a.png", 1).frames.eq(0).all()


@pytest.mark.parametrize("transfer", [16, 18], ids=["PQ", "HLG"])
def test_hdr_is_tone_mapped_and_noted(tmp_path, transfer):
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer}
    frames = [grey_frame(130)] * 2
    file = write(
        tmp_path / "clip.mkv",
        frames,
        tags=tags,
        matrix=Colorspace.BT2020,
        pix_fmt="yuv420p10le",
    )
    clip = media.read_clip(file, 1)
    assert any("HDR" in note for note in clip.notes)
    assert clip.frames.float().std() < 3  # grey stays grey
    assert 90 < clip.frames.float().mean() < 250


# --------------------------------------------------------------------------------------------------
# Sound


def tone(seconds, hertz=440):
    times = np.arange(int(48000 * seconds)) / 48000
    return 0.5 * np.sin(2 * np.pi * hertz * times)


def loudest_pitch(samples):
    spectrum = np.abs(np.fft.rfft(samples))
    return spectrum.argmax() * 48000 / len(samples)


def test_sound_is_cut_to_the_frames_that_are_used(tmp_path):
    two_tones = np.concatenate([tone(1, 440), tone(1, 880)])
    file = write(tmp_path / "clip.mp4", GREYS * 4, 16, sound=two_tones)
    clip = media.read_clip(file, 8, start=1.0)
    assert clip.has_sound
    sound = media.read_sound(file, clip.times[0], clip.end)
    assert sound.samples.shape == (1, 24000)  # 8 frames at 16 per second
    pitch = loudest_pitch(sound.samples[0, 4000:-4000])
    assert abs(pitch - 880) < 10

    media.write_video(tmp_path / "out.mp4", black(8), 16, sound)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.audio[0]
        parts = [frame.to_ndarray() for frame in container.decode(stream)]
    written = np.concatenate(parts, axis=1)
    assert abs(written.shape[1] - 24000) < 3000  # AAC writes whole blocks of 1024
    pitch = loudest_pitch(written[0, 4000:20000])
    assert abs(pitch - 880) < 10
    assert media.count_frames(tmp_path / "out.mp4") == 8


def test_sound_comes_with_a_run_and_resumes(checkpoint, tmp_path, capfd):
    file = write(tmp_path / "clip.mp4", GREYS, 16, sound=tone(0.5))
    arguments = ["--model", checkpoint, "--base-video", file, "--prompt", "a red fish"]
    arguments += ["--steps", 2, "--frames", 5, "--device", "cpu", "--output", tmp_path / "run"]
    run_here(*arguments)
    with av.open(str(tmp_path / "run" / "freeswim.mp4")) as container:
        assert len(container.streams.audio) == 1
    assert record(tmp_path / "run")["sound"] == ["0", "5/16"]
    run_here("--resume", tmp_path / "run")
    with av.open(str(tmp_path / "run" / "freeswim.mp4")) as container:
        assert len(container.streams.audio) == 1
    # Later, the clip is not needed any more, but its sound is.
    file.unlink()
    capfd.readouterr()
    run_here("--resume", tmp_path / "run")
    assert "the clip's sound cannot be carried over" in capfd.readouterr().err
    assert media.count_frames(tmp_path / "run" / "freeswim.mp4") == 5


def test_another_rate_leaves_the_sound_out_and_says_so(checkpoint, tmp_path):
    file = write(tmp_path / "clip.mp4", GREYS, 16, sound=tone(0.5))
    plan = planned(checkpoint, tmp_path, file, "--fps", 8)
    assert plan.sound is None
    assert any("sound is left out" in note for note in plan.notes)


# --------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("height, width", [(64, 640), (640, 64), (128, 1000)])
def test_a_very_wide_clip_never_plans_less_than_native(checkpoint, tmp_path, height, width):
    clip = write(tmp_path / "clip.mp4", [grey_frame(99, height, width)] * 5)
    plan = planned(checkpoint, tmp_path, clip)
    assert plan.target[0] >= plan.native[0]
    assert plan.target[1] >= plan.native[1]


def chessboard(height, width):
    """Of single pixels, (height, width, 1)."""
    row, column = np.indices((height, width))
    is_white = (row + column) % 2
    return 255 * is_white[..., None]


def test_the_comparison_says_what_each_strip_is():
    """The detail is where the full result is sharpest, not where another strip is."""
    result = [grey_frame(10) for _ in range(3)]
    result[1][80:120, 130:180] = chessboard(40, 50)
    other = [grey_frame(10) for _ in range(3)]
    other[1][:40, :40] = chessboard(40, 40)
    picture = media.comparison({"FreeSwim": result, "clipped windows": other}, "FreeSwim")
    assert picture.shape == (2 * HEIGHT, 4 * WIDTH, 3)
    detail = picture[:HEIGHT, 3 * WIDTH :]
    assert detail[30:].std() > 40
    labels = np.asarray(picture)[:, :120]
    assert labels[:20].max() > 200
    assert labels[HEIGHT : HEIGHT + 20].max() > 200


# --------------------------------------------------------------------------------------------------
# Resuming


def test_a_run_stopped_before_its_clip_was_kept_goes_on(checkpoint, tmp_path):
    file = write(tmp_path / "clip.mp4", GREYS)
    arguments = ["--model", checkpoint, "--base-video", file, "--prompt", "a red fish"]
    arguments += ["--steps", 2, "--frames", 5, "--device", "cpu", "--output", tmp_path / "run"]
    run_here(*arguments)
    finished = record(tmp_path / "run")["latents_sha256"]
    for name in ("clip", "encode", "refine"):
        (tmp_path / "run" / "state" / f"{name}.safetensors").unlink()
    run_here("--resume", tmp_path / "run")
    assert record(tmp_path / "run")["latents_sha256"] == finished

    other = write(tmp_path / "other.mp4", GREYS[::-1])
    moved = file.rename(tmp_path / "moved.mp4")
    (tmp_path / "run" / "state" / "clip.safetensors").unlink()
    with pytest.raises(UserError, match="its clip .* is gone"):
        run_here("--resume", tmp_path / "run")
    other.rename(file)
    with pytest.raises(UserError, match="is not the one it began with"):
        run_here("--resume", tmp_path / "run")
    moved.rename(file)
    run_here("--resume", tmp_path / "run")
    assert record(tmp_path / "run")["latents_sha256"] == finished


# --------------------------------------------------------------------------------------------------
# What is refused


def test_a_clip_needs_a_prompt(tmp_path):
    status, _, errors = run("--base-video", tmp_path / "clip.mp4", "--output", tmp_path / "run")
    assert status == 2
    assert len(errors) == 1
    assert "--base-video needs --prompt" in errors[0]


@pytest.mark.parametrize("denied", ["the file", "its folder"])
def test_a_clip_that_may_not_be_read(tmp_path, denied):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = write(folder / "clip.mp4", GREYS[:2])
    (file if denied == "the file" else folder).chmod(0)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)  # nobody
        with pytest.raises(UserError, match="clip.mp4: permission denied"):
            media.read_clip(file, 5)
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o700)


def test_sound_alone_is_no_clip(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        stream.layout = "mono"
        part = audio_frame(tone(0.2))
        part.rate = 48000
        container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="has no video"):
        media.read_clip(tmp_path / "sound.mp4", 5)


# --------------------------------------------------------------------------------------------------
# Damaged and extreme files


@pytest.mark.parametrize(
    "suffix", ["webp", "ico", "jpg", "png", "gif", "bmp", "tiff", "mp4", "avi"]
)
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    if suffix in ("mp4", "avi"):
        write(file, GREYS[:3])
    else:
        Image.fromarray(corners()).save(file)
    whole = file.read_bytes()
    draw = np.random.default_rng(0)
    for index in range(40):
        content = bytearray(whole)
        if index % 2 == 0:
            del content[draw.integers(len(content)) :]
        else:
            for place in draw.integers(0, len(content), 8):
                content[place] = draw.integers(256)
        file.write_bytes(content)
        try:
            clip = media.read_clip(file, 3)
            assert clip.count >= 1
        except UserError as error:
            assert str(file) in str(error)
            assert "\n" not in str(error)


def test_a_title_in_latin_1(tmp_path):
    file = write(tmp_path / "a.avi", GREYS[:5], options={})
    content = file.read_bytes()
    title = b"INAM\x08\0\0\0\xe9t\xe9 1999"
    length = 4 + len(title)
    entry = b"LIST" + length.to_bytes(4, "little") + b"INFO" + title
    place = content.index(b"LIST", content.index(b"hdrl"))
    size = int.from_bytes(content[4:8], "little") + len(entry)
    place = content.index(b"movi") - 8
    head = content[:4] + size.to_bytes(4, "little")
    file.write_bytes(head + content[8:place] + entry + content[place:])
    assert media.read_clip(file, 5).count == 5


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (1, 200)])
def test_pictures_that_are_too_small(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"is {size[0]}x{size[1]}, too small"):
        media.read_clip(tmp_path / "a.png", 1)


def test_pictures_that_are_too_large(tmp_path):
    Image.new("1", (20000, 16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="is 20000x16, but sides may have 16384"):
        media.read_clip(tmp_path / "a.png", 1)


def test_a_clips_size_is_judged_by_one_frame(checkpoint, tmp_path, monkeypatch):
    decoded = []
    rgb_of = media.rgb_of

    def count_and_decode(*given):
        decoded.append(1)
        return rgb_of(*given)

    monkeypatch.setattr(media, "rgb_of", count_and_decode)
    clip = write(tmp_path / "clip.mp4", [grey_frame(9, 600, 900)] * 9)
    with pytest.raises(UserError, match="is 900x600, larger than the"):
        planned(checkpoint, tmp_path, clip)
    assert len(decoded) == 1


def test_a_clip_is_not_kept_in_the_plan(checkpoint, tmp_path):
    clip = write(tmp_path / "clip.mp4", GREYS)
    plan = pickle.dumps(planned(checkpoint, tmp_path, clip))
    assert len(plan) < 10 * 128 * 192


@pytest.mark.parametrize("rate", [23.976, 29.97002997002997, Fraction(24000, 1001), 12])
def test_rates_of_any_kind_are_written(tmp_path, rate):
    media.write_video(tmp_path / "out.mp4", black(5), rate)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert abs(container.streams.video[0].average_rate / rate - 1) < 1e-4


OF_BYTES = torch.zeros(1, 3, 1, 16, 16).byte()
NOT_FINITE = torch.full((1, 3, 1, 16, 16), torch.nan)


@pytest.mark.parametrize("video", [OF_BYTES, NOT_FINITE])
def test_what_is_no_video_is_not_written(tmp_path, video):
    with pytest.raises(ValueError, match="finite floating-point"):
        media.write_video(tmp_path / "out.mp4", video, 16)
    assert not (tmp_path / "out.mp4").exists()
