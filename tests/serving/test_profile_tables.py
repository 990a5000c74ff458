"""Profiles as tables: those that are shipped, those of one's own, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from live_avatar.errors import ConfigError
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.checks import check, served_profile
from live_avatar.serving.profiles import (
    ALIASES,
    PROFILES,
    load_profile,
    profile_names,
    read_profile,
    require_gpus,
)
from live_avatar.serving.server_options import ServerOptions

GOOD = """\
# One of my own.
max_sessions = 2
known_avatars = 0
conditioning = "cpu"
avatar_encoder = "gpu11"
decoder = "gpu1"
[steps]
1 = "gpu0"
2-4 = "cpu"
"""
# The steps of every shipped profile with their GPUs, and the GPU of conditioning, encoder and decoder; None: the CPU.
SHIPPED: dict[str, tuple[dict[str, int | None], int | None]] = {
    "cpu": ({"dit_step_1": None, "dit_step_2": None, "dit_step_3": None, "dit_step_4": None}, None),
    "cpu-3-steps": ({"dit_step_1": None, "dit_step_2": None, "dit_step_3": None}, None),
    "gpux1": ({"dit_steps_1_4": 0}, 0),
    "gpux2": ({"dit_steps_1_2": 0, "dit_steps_3_4": 1}, 1),
    "gpux3": ({"dit_steps_1_2": 0, "dit_steps_3_4": 1}, 2),
    "gpux4": ({"dit_step_1": 0, "dit_step_2": 1, "dit_step_3": 2}, 3),
    "gpux5": ({"dit_step_1": 0, "dit_step_2": 1, "dit_step_3": 2, "dit_step_4": 3}, 4),
}


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_there_are_these_profiles() -> None:
    assert profile_names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_stage_of_a_shipped_profile_has_its_place(name: str) -> None:
    profile, (steps, ends) = load_profile(name), SHIPPED[name]
    assert {place.name: place.gpu for place in profile.chain} == {"conditioning": ends, **steps, "vae_decoder": ends}
    assert [place.name for place in profile.chain] == ["conditioning", *steps, "vae_decoder"]
    assert (profile.name, profile.encoder_gpu) == (name, ends)
    assert profile.gpus == sorted({gpu for gpu in (*steps.values(), ends) if gpu is not None})
    assert (profile.max_sessions, profile.known_avatars) == ((4, 16) if name.startswith("cpu") else (1, 1))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_is_read_at_a_glance(name: str) -> None:
    lines = (PROFILES / f"{name}.toml").read_text().splitlines()
    assert lines[0].startswith("# ")
    settings = [line for line in lines if not line.startswith("#")]
    assert len(settings) <= 10


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    profile = load_profile(str(written(tmp_path, GOOD)))
    assert profile.name == "mine"
    assert [(place.name, place.processor) for place in profile.chain] == [
        ("conditioning", "cpu"),
        ("dit_step_1", "gpu0"),
        ("dit_steps_2_4", "cpu"),
        ("vae_decoder", "gpu1"),
    ]
    assert (profile.max_sessions, profile.known_avatars, profile.idle_seconds) == (2, 0, 30.0)
    assert (profile.gpus, profile.step_count) == ([0, 1, 11], 4)
    assert [place.memory_stage for place in profile.on_cpu] == ["conditioning", range(2, 5)]


def test_limits_of_the_command_line_replace_those_of_the_profile(tmp_path: Path) -> None:
    path = written(tmp_path, "idle_seconds = 12.5\n" + GOOD)
    profile = read_profile(path)
    assert profile.idle_seconds == 12.5
    assert profile.limited() == profile
    limited = profile.limited(max_sessions=7, known_avatars=3, idle_seconds=2)
    assert (limited.max_sessions, limited.known_avatars, limited.idle_seconds) == (7, 3, 2)
    assert limited.chain == profile.chain


KEYS = "a profile has max_sessions, known_avatars, idle_seconds, conditioning, avatar_encoder, decoder, steps."
ONE_GPU = '1 = "gpu0"\n2-4 = "cpu"\n'


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ('1 = "gpu0"\n', "", "step 1 is left out; name every step from 1 to 4."),
        (ONE_GPU, '1 = "cpu"\n3-4 = "cpu"\n', "step 2 is left out; name every step from 1 to 4."),
        ("2-4 =", "1-4 =", "step 1 is named twice; name every step once."),
        ("2-4 =", "1-1 =", "step 1 is named twice; name every step once."),
        (ONE_GPU, '2-4 = "cpu"\n1 = "gpu0"\n', "the steps are out of order; write 1, 2-4."),
        ("2-4 =", "four =", 'steps = \'four\' is no range of steps; write one such as "2" or "1-4", counted from 1.'),
        ("2-4 =", "4-2 =", 'steps = \'4-2\' is no range of steps; write one such as "2" or "1-4", counted from 1.'),
        ("1 =", "0 =", 'steps = \'0\' is no range of steps; write one such as "2" or "1-4", counted from 1.'),
        (
            "[steps]\n" + ONE_GPU,
            "steps = 4",
            'steps is no table of steps; write [steps] and below it lines such as 1-2 = "gpu0".',
        ),
        (ONE_GPU, "", 'steps is no table of steps; write [steps] and below it lines such as 1-2 = "gpu0".'),
        ('"gpu0"', '"cuda0"', 'steps 1 = \'cuda0\' is no device; write "cpu", or "gpu0" for the first GPU.'),
        ('decoder = "gpu1"', "decoder = 1", 'decoder = 1 is no device; write "cpu", or "gpu0" for the first GPU.'),
        ("max_sessions", "sessions", f"there is no key 'sessions'; {KEYS}"),
        ("max_sessions = 2\n", "", f"'max_sessions' is missing; {KEYS}"),
        ("max_sessions = 2", "max_sessions = 0", "max_sessions = 0; expected a whole number of at least 1."),
        ("max_sessions = 2", "max_sessions = true", "max_sessions = True; expected a whole number of at least 1."),
        ("known_avatars = 0", "known_avatars = 0.5", "known_avatars = 0.5; expected a whole number of at least 0."),
        ("# One", "idle_seconds = 0.5\n# One", "idle_seconds = 0.5; expected 1 to 86400 seconds."),
    ],
)
def test_a_wrong_table_is_one_sentence_with_the_file(tmp_path: Path, old: str, new: str, wrong: str) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_profile(str(path))
    assert str(caught.value) == f"profile {path}: {wrong}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (GOOD.replace("2-4", "1").encode(), r"Cannot overwrite a value \(at line 9, column \d+\)"),
        (b"max_sessions 4", r"Expected '=' after a key in a key/value pair \(at line 1, column 14\)"),
        (b"# \xff", "'utf-8' codec can't decode byte 0xff in position 2: invalid start byte"),
    ],
)
def test_a_file_that_is_no_toml(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    message = rf"^profile \S+mine\.toml is no TOML \({reason}\); correct it, for example after \S+cpu\.toml\.$"
    with pytest.raises(ConfigError, match=message):
        load_profile(str(path))


def test_a_profile_that_does_not_exist(tmp_path: Path) -> None:
    names = ", ".join(sorted(SHIPPED))
    with pytest.raises(ConfigError) as caught:
        load_profile("gpux9")
    assert str(caught.value) == (
        f"there is no profile 'gpux9'; choose one of {names}, or give a file of your own (NAME.toml)."
    )
    for path, reason in ((tmp_path / "none.toml", "No such file or directory"), (tmp_path, "Is a directory")):
        named = path if path.suffix else path.rename(path.with_suffix(".toml"))
        with pytest.raises(ConfigError) as caught:
            load_profile(str(named))
        assert str(caught.value) == (
            f"cannot read the profile {named} ({reason}); give an existing file, or one of {names}."
        )


@pytest.mark.parametrize(("former", "name"), ALIASES.items())
def test_a_former_name_is_served_with_a_sentence(former: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert served_profile(ServerOptions(Path("artifacts"), former)) == load_profile(name)
    assert caplog.messages == [f"Profile {former} is now called {name}; the old name still works."]
    caplog.clear()
    assert served_profile(ServerOptions(Path("artifacts"), name)) == load_profile(name)
    assert caplog.messages == []


def test_a_profile_needs_gpus_that_the_machine_has(tmp_path: Path) -> None:
    require_gpus(load_profile("gpux2"), 2)
    require_gpus(load_profile("cpu"), 0)
    for name, present, wanted, seen in (("gpux2", 1, "0, 1", "0"), ("gpux1", 0, "0", "none")):
        with pytest.raises(ConfigError) as caught:
            require_gpus(load_profile(name), present)
        assert str(caught.value) == (
            f"profile {name} needs GPU {wanted}, but NVIDIA's driver shows {seen} on this machine; serve where there "
            "are enough of them, or choose another --profile."
        )
    require_gpus(read_profile(written(tmp_path, GOOD)), 12)
    with pytest.raises(ConfigError, match=r"needs GPU 0, 1, 11, but NVIDIA's driver shows 0, 1, 2, 3 on"):
        require_gpus(read_profile(written(tmp_path, GOOD)), 4)


def test_the_gpus_are_checked_before_the_start(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServerOptions(artifacts.folder, "gpux3").on_free_ports()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"gpux3 needs GPU 0, 1, 2, but NVIDIA's driver shows 0, 1 on this machine"):
        check(options, served_profile(options))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    check(options, served_profile(options))
