"""What each checkpoint was trained for, and the settings that suit it. Nothing here needs
PyTorch."""

from dataclasses import dataclass, replace

FISH = (
    "a large purple striped fish swims left and a small pink plain fish swims right above a sandy "
    "floor with bubbles"
)
CAT = (
    "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a "
    "spotlighted stage."
)
BLUR = (
    "overexposed, static, blurred details, subtitles, worst quality, low quality, deformed, still "
    "picture, cluttered"
)


@dataclass(frozen=True)
class Preset:
    """A checkpoint, or several that were trained alike. Options that are not typed come from here;
    a field and an option of the same name belong together."""

    title: str
    width_of_model: int  # channels of a token in the transformer, by which it is recognised
    height: int  # pixels, native
    width: int  # pixels, native
    frames: int  # 4k + 1
    fps: int  # frames per second
    steps: int  # of the whole noise schedule
    strength: float  # share of them that the refinement runs
    guidance: float
    base_shift: float  # flow shift of the base generation
    flow_shift: float  # flow shift of the refinement
    compare_shift: float  # the same with --compare: one at which windows alone go wrong
    prompt: str
    negative_prompt: str
    guidance_2: float | None = None  # of Wan2.2's second expert
    text_length: int = 512  # tokens to which prompts are padded with zeros, which attention sees
    portrait: bool = True  # whether it was also trained on frames higher than wide
    untrained_words: tuple[str, ...] = ()  # its tokenizer has them, but no caption did


BUNDLED = Preset(
    title="the bundled model",
    width_of_model=240,
    height=128,
    width=192,
    frames=17,
    fps=16,
    steps=30,
    strength=0.7,
    guidance=2.0,
    base_shift=3.0,
    flow_shift=1.0,
    compare_shift=6.0,
    prompt=FISH,
    negative_prompt="",
    text_length=32,
    portrait=False,
    untrained_words=("swim", "two"),
)
WAN_1_3B = Preset(
    title="Wan2.1 1.3B",
    width_of_model=1536,
    height=480,
    width=832,
    frames=81,
    fps=16,
    steps=50,
    strength=0.7,
    guidance=5.0,
    base_shift=3.0,
    flow_shift=9.0,
    compare_shift=9.0,
    prompt=CAT,
    negative_prompt=BLUR,
)
WAN_14B = replace(
    WAN_1_3B, title="Wan2.1 14B", width_of_model=5120, height=720, width=1280, base_shift=5.0
)
WAN_2_2_14B = replace(
    WAN_14B, title="Wan2.2 A14B", steps=40, guidance=4.0, guidance_2=3.0, base_shift=12.0
)
WAN_2_2_5B = replace(
    WAN_1_3B,
    title="Wan2.2 TI2V 5B",
    width_of_model=3072,
    height=704,
    width=1280,
    frames=121,
    fps=24,
    base_shift=5.0,
)
PRESETS = (BUNDLED, WAN_1_3B, WAN_14B, WAN_2_2_5B, WAN_2_2_14B)
SUPPORTED = "Wan2.1 text-to-video (1.3B, 14B), Wan2.2-T2V-A14B and Wan2.2-TI2V-5B"


def find_preset(width_of_model, two_experts):
    """The preset of a transformer of this width, or None if no supported model has it. Of models
    as wide as each other, `two_experts` decides; a small model with two has its width's preset."""
    matches = [preset for preset in PRESETS if preset.width_of_model == width_of_model]
    for preset in matches:
        if (preset.guidance_2 is not None) == two_experts:
            return preset
    return matches[0] if matches else None


def defaults_of(name):
    """The presets' own values of an option, in words: "30 with the bundled model, 50 with Wan2.1
    1.3B, ...". A value that most presets share is named once."""
    titles = {}  # by value
    for preset in PRESETS:
        value = getattr(preset, name)
        if value is not None:
            titles.setdefault(value, []).append(preset.title)
    if len(titles) == 1:
        return f"{next(iter(titles)):g}"
    return "; ".join(f"{value:g} with {' and '.join(names)}" for value, names in titles.items())
