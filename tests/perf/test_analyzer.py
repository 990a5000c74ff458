"""perf_analyzer's options and export; and, where it can be had (slow), the program itself on a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from live_avatar.errors import ServerError
from live_avatar.graphs.artifacts import Artifacts
from perf import analyzer
from perf.analyzer import REAL_TIME, Load, options, program, sequences
from perf.load import Speaker
from perf.scenario import Context

CLOCKS_S = 1_000.0


def request(sequence: int, sent_s: float, *received_s: float) -> dict[str, Any]:
    answers = [round(seconds * 1e9) for seconds in received_s]
    return {"sequence_id": str(sequence), "timestamp": round(sent_s * 1e9), "response_timestamps": answers}


def test_an_export_becomes_blocks_of_sequences() -> None:
    requests = [request(5, 1001.0, 1001.25), request(6, 1001.1, 1001.5), request(5, 1001.48, 1001.6)]
    found = sequences({"experiments": [{"requests": requests}]}, CLOCKS_S)
    assert list(found) == [5, 6]
    first, second = found[5]
    assert (first.sent_s, first.received_s) == pytest.approx((1.0, 1.25))
    assert first.begun_s == first.complete_s == first.sent_s
    assert second.sent_s == pytest.approx(1.48)
    assert first.frames == 12


def test_a_block_without_an_answer_is_an_error() -> None:
    with pytest.raises(ServerError, match=r"perf_analyzer saw no answer to a block of sequence 5"):
        sequences({"experiments": [{"requests": [request(5, 1.0)]}]}, 0.0)


def test_a_rate_or_one_block_in_flight() -> None:
    paced = options(Load(40, 2, 2 * REAL_TIME, 1000))
    assert paced[:4] == ["--request-rate-range", "4.16667", "--num-of-sequences", "2"]
    assert "--serial-sequences" not in paced
    assert options(Load(40, 2))[:3] == ["--concurrency-range", "2", "--serial-sequences"]
    assert paced[paced.index("--request-count") + 1] == "40"
    assert paced[paced.index("--sequence-id-range") + 1] == "1000:1001000"


def test_no_program_is_a_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(analyzer, "PLACE", tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match=r"there is no perf_analyzer; run perf/get_perf_analyzer.sh, or"):
        program()


@pytest.mark.slow
def test_the_real_one_drives_the_ensemble(real_program: Path, artifacts: Artifacts, tmp_path: Path) -> None:
    assert real_program == program()
    with Context(artifacts.folder, tmp_path).server() as target:
        speaker = Speaker(target, tmp_path)
        run = speaker.analyzed(6, REAL_TIME)
        (blocks,) = run.sequences.values()
        assert len(blocks) == 6
        assert blocks[-1].sent_s - blocks[0].sent_s == pytest.approx(5 * 0.48, abs=0.2)
        assert all(b.received_s > b.sent_s for b in blocks)
        assert {i.block for i in speaker.intervals(blocks)} == set(range(6)), "the clocks are one"
        assert run.version.startswith("2.5")


@pytest.mark.slow
def test_what_it_says_of_a_server_that_is_not_there(real_program: Path, tmp_path: Path) -> None:
    data = tmp_path / "input.json"
    data.write_text('{"data": [[{"AUDIO": {"content": [0], "shape": [1]}}]]}')
    with pytest.raises(ServerError, match=r"perf_analyzer ended with code \d+: .+"):
        analyzer.measure("127.0.0.1:9", data, Load(2), tmp_path)
