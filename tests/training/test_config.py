"""What is said of a configuration that cannot be meant: the file, and the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from live_avatar.errors import ConfigError
from training.config import LoRAConfig, load

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
STAGE = "steps = 2\nbatch = 1\nlearning_rate = 1e-3\n"
WHOLE = "".join(
    f"[{name}]\n{STAGE}" for name in ("vae", "mouths", "encoders", "decoder", "teacher", "stage1", "stage2")
)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_are_read(path: Path) -> None:
    assert load(path).seed == 0


def test_values_come_from_the_file_and_defaults_from_the_paper(tmp_path: Path) -> None:
    text = WHOLE.replace("learning_rate = 1e-3", "learning_rate = 1") + "[stage2.lora]\nrank = 8\nalpha = 4\n"
    config = load(written(tmp_path, text))
    assert isinstance(config.vae.learning_rate, float)
    assert config.stage2.lora == LoRAConfig(8, 4.0)
    assert config.stage2.fake_learning_rate == 2e-6
    assert config.stage1.clip_norm == 1.0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "[vae]",
            "sed = 1\n[vae]",
            "there is no key 'sed'; the keys there are data, decoder, encoders, mouths, preset, seed,",
        ),
        ("batch", "bacth", "there is no key 'vae.bacth'; the keys there are batch, checkpoint_every,"),
        ("steps = 2\n", "", "key 'vae.steps' is missing; it has no default."),
        ("[encoders]\n" + STAGE, "", "key 'encoders' is missing; it has no default."),
        ("steps = 2", "steps = 2.5", "key 'vae.steps' is 2.5; expected int."),
        ("steps = 2", "steps = true", "key 'vae.steps' is True; expected int."),
        ("batch = 1", "batch = '1'", "key 'vae.batch' is '1'; expected int."),
        ("[vae]\n" + STAGE, "vae = 3\n", "key 'vae' is 3; expected a table, [vae]."),
        ("steps = 2", "steps = 0", "in [vae], key 'steps' is 0; expected at least 1."),
        ("1e-3", "-1e-3", "in [vae], key 'learning_rate' is -0.001; expected a number above 0."),
        ("[vae]\n", "[vae]\nema = 1.0\n", "in [vae], key 'ema' is 1.0; expected a number from 0 to below 1."),
        ("[vae]\n", "[vae]\nframes = 12\n", "in [vae], key 'frames' is 12; expected 1 + a multiple of 4."),
        ("[teacher]\n", "[teacher]\nfar_share = 2\n", "in [teacher], key 'far_share' is 2.0; expected a number from 0"),
        (
            "[teacher]\n",
            "[teacher]\nblocks = 9\n",
            "key 'teacher.blocks' is 9; expected at most data.blocks, 8: a step",
        ),
        ("[vae]", "preset = 'tinny'\n[vae]", "there is no preset 'tinny'; choose one of s2v-14b, tiny."),
        ("[vae]", "preset = 's2v-14b'\n[vae]", "key 'preset' is 's2v-14b', whose encoders are the official ones; only"),
        (
            "[decoder]\n",
            "[decoder]\nchannels = [8, 0]\n",
            "key 'decoder.channels' is [8, 0]; expected whole numbers above 0, such as [2, 1].",
        ),
        (
            "[decoder]\n",
            "[decoder]\nchannels = [8]\n",
            "in [decoder], channels (8,) are 1 widths; time_upscale (1, 2, 2)",
        ),
        ("[stage2]", "[stage2.lora]\nrank = 0\nalpha = 1\n[stage2]", "in [stage2.lora], key 'rank' is 0; expected at"),
    ],
)
def test_a_fault_is_named_by_its_key(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = written(tmp_path, WHOLE.replace(old, new, 1))
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: {re.escape(said)}"):
        load(path)


def test_a_file_that_is_no_toml_or_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.toml cannot be read \(No such file or directory\); give a TOML"):
        load(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match=r"run.toml is no TOML \(.*line 1.*\); mend it there"):
        load(written(tmp_path, "steps 3"))
