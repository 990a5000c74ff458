"""The soak test: sessions of random length, pace and ending on a real server, with a check of every frame, and
attackers among the callers.

`make soak MINUTES=60` prints a line per minute and a summary, and writes the report as JSON. Ctrl-C or SIGTERM ends it
early, with a report of the part that was run. Exit code 1: a frame was wrong, a session ended unexpectedly, a slot was
lost, an attack worked, the gateway has died, a process was left behind, or memory grew by more than the bound (by more
than three standard errors).

The expected frames come from the generator, on the same graphs. A pool of utterances (avatar, prompt, seed, speech) is
generated before the run. The model is causal, so a session that says the first blocks of an utterance gets its first
frames. Needs Linux, and artifacts without look-ahead.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import click

from live_avatar import interrupts
from live_avatar.arrays import Array
from live_avatar.environment import environment
from live_avatar.errors import LiveAvatarError
from live_avatar.gateway.keys import add_key
from live_avatar.graphs.artifacts import load_artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving.access import Access
from live_avatar.serving.metrics import read_series
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.serving.supervisor import WITHOUT_PROXY
from live_avatar_client.errors import AvatarError
from live_avatar_client.pacing import BLOCK_S
from live_avatar_client.status import ServerStatus, server_status
from perf.growth import MIB, Memory, Process, Slope, group, own_cpu_s
from perf.soak_attacks import Attacker
from perf.soak_endings import CALL_S, ENDINGS
from perf.soak_sessions import (
    AVATARS,
    UTTERANCE_BLOCKS,
    Ending,
    Oracle,
    Outcome,
    SoakContext,
    SoakSession,
    Utterance,
    generate,
    make_utterances,
)

SESSIONS = 4
KNOWN_AVATARS = AVATARS - 2  # fewer than are used
IDLE_S = 10.0
SAMPLE_S, PROGRESS_S, TICK_S = 10.0, 60.0, 1.0
OUTAGE_S = 150.0
RESTORE_S = 60.0
DRAIN_S = 7.0  # a session of 3 blocks ends within it on a busy machine, one of UTTERANCE_BLOCKS does not
# One ends by itself, two get the error to reconnect, and one is refused.
DRAIN_ENDS = {outcome: {Outcome.EXPECTED: 1, Outcome.SHUT_DOWN: 3}.get(outcome, 0) for outcome in Outcome}
WARM_UP = 1 / 3
"""The part of the run in which stages are killed. Triton 2.51 leaks memory at each kill, so the growth of memory is
measured after it, when no process is replaced."""
MOST_CREDIT_S = 10.0
ATTACK_PAUSE_S = 4.0
"""Mean time between two attacks."""
MOST_SHOWN = 20


class Counters:
    """Sums of counters that begin again at 0 when a stage's process is replaced."""

    def __init__(self) -> None:
        self.totals: defaultdict[str, float] = defaultdict(float)
        self._last: dict[str, float] = {}

    def update(self, scraped: Mapping[str, float]) -> None:
        for name, value in scraped.items():
            before = self._last.get(name, 0.0)
            self.totals[name] += value - before if value >= before else value
            self._last[name] = value


def scrape(port: int) -> dict[str, float]:
    """The project's own series of /metrics by name and labels."""
    with WITHOUT_PROXY.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        numbers = read_series(page.read().decode())
    return {name: value for name, value in numbers.items() if name.startswith("live_avatar_")}


class Governor:
    """Limits the mean CPU time of server and clients to `cores`: no session starts while it is higher."""

    def __init__(self, cores: float) -> None:
        self.used_s = 0.0
        self._cores = cores
        self._credit_s = MOST_CREDIT_S
        self._last_cpu_s: float | None = None
        self._last_s = time.monotonic()
        self._go = threading.Event()

    def update(self, cpu_s: float, now_s: float) -> None:
        """Records the CPU time so far; less than before means that a process is gone."""
        used = 0.0 if self._last_cpu_s is None else max(cpu_s - self._last_cpu_s, 0.0)
        self.used_s += used
        self._credit_s = min(self._credit_s + self._cores * (now_s - self._last_s) - used, MOST_CREDIT_S)
        self._last_cpu_s, self._last_s = cpu_s, now_s
        if self._credit_s > 0:
            self._go.set()
        else:
            self._go.clear()

    def wait(self, limit_s: float) -> bool:
        return self._go.wait(limit_s)


@dataclass
class Stop:
    """The end of the run, for its threads."""

    at_s: float
    event: threading.Event = field(default_factory=threading.Event)

    def come(self) -> bool:
        return self.event.is_set() or time.monotonic() >= self.at_s


class Soak:
    """One run against a running server."""

    def __init__(
        self,
        server: TritonServer,
        context: SoakContext,
        attacker: Attacker,
        seconds: float,
        seed: int,
        cores: float,
    ) -> None:
        self.server = server
        self.context = context
        self.attacker = attacker
        self.governor = Governor(cores)
        self.memory = Memory(server.process.pid)
        self.counters = Counters()
        self.restores_s: list[float] = []
        self.clients_stuck = 0
        self.kills: list[tuple[float, str]] = []
        self.begun_s = time.monotonic()
        self._seconds = seconds
        self._seed = seed
        self._stop = Stop(self.begun_s + seconds)

    def run(self) -> bool:
        """Returns whether it ran to its end. All its clients have ended then."""
        threads = [threading.Thread(target=self._run_sessions, args=(n,), daemon=True) for n in range(SESSIONS + 1)]
        threads += [threading.Thread(target=work, daemon=True) for work in (self._kill_stages, self._attack)]
        for thread in threads:
            thread.start()
        try:
            self._watch()
            return True
        except KeyboardInterrupt:
            return False
        finally:
            self._stop.event.set()
            deadline = time.monotonic() + CALL_S
            for thread in threads:
                thread.join(max(deadline - time.monotonic(), 0.0))
            self.clients_stuck += sum(thread.is_alive() for thread in threads)

    def slots_lost(self) -> int:
        """Slots in use after all clients have ended; waits at most a little longer than the idle limit."""
        deadline = time.monotonic() + IDLE_S + 10.0
        while (lost := self._slots_taken()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return lost

    def _attack(self) -> None:
        rng = random.Random(self._seed - 1)
        while not self._stop.event.wait(rng.expovariate(1 / ATTACK_PAUSE_S)) and not self._stop.come():
            if self.governor.wait(0.5):
                self.attacker.attack()

    def status(self) -> ServerStatus:
        return server_status(self.server.options.url, api_key=self.context.api_key)

    def _slots_taken(self) -> int:
        """Number of slots in use; all of them if the server does not answer."""
        with suppress(OSError, AvatarError):
            free = scrape(self.server.options.metrics_port).get("live_avatar_sessions_free", 0.0)
            live = self.status().live_sessions
            return max(SESSIONS - int(free), SESSIONS if live is None else live)
        return SESSIONS

    def drain(self) -> dict[str, Any]:
        """Drains with live sessions: a short one ends by itself, the long ones are ended, a new one is refused."""
        rng = random.Random(self._seed)
        utterances = [rng.choice(self.context.utterances) for _ in range(3)]
        lengths = (UTTERANCE_BLOCKS, UTTERANCE_BLOCKS, 3)
        sessions = [
            _RealTime(self.context, rng, Ending.DRAINED, utterance, blocks)
            for utterance, blocks in zip(utterances, lengths, strict=True)
        ]
        end = ENDINGS[Ending.DRAINED]
        threads = [threading.Thread(target=session.run, args=(end,), daemon=True) for session in sessions]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        live = self._slots_taken()
        threads.append(threading.Thread(target=self._come_late, args=(rng, utterances[0]), daemon=True))
        threads[-1].start()
        by_themselves = self.server.drain(DRAIN_S)
        for thread in threads:
            thread.join(CALL_S)
        self.clients_stuck += sum(thread.is_alive() for thread in threads)
        seen = {outcome.value: self.context.results.outcomes[Ending.DRAINED, outcome] for outcome in Outcome}
        return {"live_before": live, "all_ended_by_themselves": by_themselves, "clients_saw": seen}

    def _come_late(self, rng: random.Random, utterance: Utterance) -> None:
        """Starts one more session as soon as the server is no longer ready."""
        ready = True
        while ready:
            time.sleep(0.05)
            with suppress(AvatarError):  # a busy server may answer late
                ready = bool(self.status().ready)
        SoakSession(self.context, rng, Ending.DRAINED, utterance, 1).run(ENDINGS[Ending.DRAINED])

    def _run_sessions(self, number: int) -> None:
        rng = random.Random(self._seed * 1000 + number)
        while not self._stop.come():
            if self.governor.wait(0.5):
                session = SoakSession.random(self.context, rng)
                session.run(ENDINGS[session.ending])
                self._stop.event.wait(rng.expovariate(4.0))

    def _watch(self) -> None:
        sample_s = progress_s = self.begun_s
        while not self._stop.come():
            now_s, processes = time.monotonic(), group(self.server.process_ids)
            self.governor.update(sum(process.cpu_s for process in processes) + own_cpu_s(), now_s)
            if now_s >= sample_s:
                sample_s += SAMPLE_S
                leaders = self.server.process_ids  # those that decode pictures come and go
                self.memory.sample([one for one in processes if one.stage or one.pid in leaders], now_s)
                with suppress(OSError):
                    self.counters.update(scrape(self.server.options.metrics_port))
            if now_s >= progress_s:
                progress_s += PROGRESS_S
                click.echo(self._progress(now_s))
            self._stop.event.wait(TICK_S)

    def _progress(self, now_s: float) -> str:
        results, minutes = self.context.results, (now_s - self.begun_s) / 60
        mib = self.memory.now
        return (
            f"{minutes:5.1f} min: {results.outcomes.total()} sessions, "
            f"{results.frames} frames, {results.wrong_frames} wrong, "
            f"{results.count(Outcome.UNEXPECTED)} unexpected; {self.attacker.done.total()} attacks, "
            f"{len(self.attacker.breaches)} worked; {len(self.kills)} stages killed; "
            f"MiB: Triton {mib('triton'):.1f}, gateway {mib('gateway'):.1f}, vae_decoder {mib('vae_decoder'):.1f}, "
            f"/dev/shm {mib('/dev/shm'):.1f}; "
            f"{self.governor.used_s / max(now_s - self.begun_s, 1.0):.2f} cores"
        )

    def _kill_stages(self) -> None:
        rng = random.Random(self._seed)
        last = Stop(self.begun_s + WARM_UP * self._seconds, self._stop.event)
        pause_s = min(OUTAGE_S, WARM_UP * self._seconds / 3)
        while not self._stop.event.wait(rng.uniform(0.7, 1.0) * pause_s) and not last.come():
            if stages := [one for one in group(self.server.process_ids) if one.stage]:
                self._kill(rng.choice(stages))

    def _kill(self, stage: Process) -> None:
        begun_s = time.monotonic()
        self.context.outages.append((begun_s, float("inf")))
        self.kills.append((round(begun_s - self.context.begun_s, 1), stage.name))
        with suppress(ProcessLookupError):
            os.kill(stage.pid, signal.SIGKILL)
        while time.monotonic() < begun_s + RESTORE_S:
            time.sleep(0.5)  # the supervisor checks four times a second
            if self._is_back(stage):
                self.restores_s.append(time.monotonic() - begun_s)
                break
        else:
            self.context.results.findings.append(f"{stage.name} was not back {RESTORE_S:g} s after it was killed")
        self.context.outages[-1] = (begun_s, time.monotonic())

    def _is_back(self, stage: Process) -> bool:
        again = [one for one in group(self.server.process_ids) if one.name == stage.name and one.pid != stage.pid]
        with suppress(AvatarError):
            return bool(again) and bool(self.status().ready)
        return False


@dataclass(frozen=True)
class _RealTime(SoakSession):
    """A session that speaks in real time."""

    def speech(self) -> Iterator[Array]:
        for block in self.utterance.speech[: self.blocks]:
            time.sleep(BLOCK_S)
            yield block


def failures(report: Mapping[str, Any], bound: float) -> list[str]:
    """A sentence for each fault."""
    wrong = [f"{report[name]} {name.replace('_', ' ')}" for name in FAULTS if report[name]]
    for one in report["memory"]:
        if one["slope"] is not None and Slope(**one["slope"]).exceeds(bound):
            grows = f"{one['slope']['mib_per_hour']:.1f} +- {one['slope']['error']:.1f} MiB per hour"
            wrong.append(f"{one['name']} grows by {grows}, more than {bound:g}")
    return wrong


# Triton 2.51 never waits for a stage that was killed, so each kill leaves a zombie until Triton ends.
FAULTS = (
    "wrong_frames",
    "unexpected_ends",
    "sessions_without_answer",
    "stages_not_restored",
    "slots_lost",
    "attacks_that_worked",
    "gateways_lost",
    "clients_stuck",
    "drain_surprises",
    "zombies_unexplained",
    "processes_left_behind",
)


def summary(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{report['sessions']} sessions in {report['minutes']:.1f} minutes, {report['frames']} frames checked"
    for name in FAULTS:
        yield f"  {name.replace('_', ' ')}: {report[name]}"
    yield "What the clients saw:"
    for ending, outcomes in report["outcomes"].items():
        yield f"  {ending:20} " + ", ".join(f"{outcome} {number}" for outcome, number in outcomes.items())
    yield "Private memory, and shared files, MiB (first, last; slope per hour after the warm-up):"
    for one in report["memory"]:
        slope = one["slope"]
        shown = f"{slope['mib_per_hour']:+.2f} +- {slope['error']:.2f}" if slope else "too short"
        threads = f"{one['threads_first']} to {one['threads_last']} threads"
        yield f"  {one['name']:16} {one['first_mib']:8.1f} {one['last_mib']:8.1f}  {shown}, {threads}"
    yield f"Stages killed: {report['stages_killed']}, back after {report['restored_s']} s, {report['zombies']} zombies"
    yield "Attacks: " + ", ".join(f"{name} {number}" for name, number in report["attacks"].items())
    yield f"Drain: {report['drain']}"
    yield from report["findings"]


def left_behind(leaders: Collection[int]) -> int:
    """Number of processes of a server that has ended; init has some time to collect the dead ones."""
    deadline = time.monotonic() + 5.0
    while (left := len(group(leaders))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def soak(
    options: ServerOptions,
    log: Callable[[str], None],
    context: SoakContext,
    attacker: Attacker,
    minutes: float,
    seed: int,
    cores: float,
) -> dict[str, Any]:
    """Starts a server, whose output goes to `log`, runs the soak, and returns the report."""
    with serving(options, log) as server:
        leaders = server.process_ids
        run = Soak(server, context, attacker, minutes * 60, seed, cores)
        finished = run.run()
        ran_s = time.monotonic() - run.begun_s
        slots_lost = run.slots_lost()
        zombies = sum(process.zombie for process in group(leaders))
        with suppress(OSError):
            run.counters.update(scrape(options.metrics_port))
        drain = run.drain()
        gateways_lost = int(server.process_ids != leaders)
    results = context.results
    counted = {name: number for name, number in sorted(run.counters.totals.items()) if "_bucket" not in name}
    return {
        "minutes": round(ran_s / 60, 2),
        "finished": finished,
        "seed": seed,
        "sessions_limit": SESSIONS,
        "clients": SESSIONS + 1,
        "idle_limit_s": IDLE_S,
        "avatars": {"known_to_the_server": KNOWN_AVATARS, "used": AVATARS, "takes": len(context.utterances)},
        "mean_cores": round(run.governor.used_s / ran_s, 3),
        "sessions": results.outcomes.total(),
        "frames": results.frames,
        "wrong_frames": results.wrong_frames,
        "unexpected_ends": results.count(Outcome.UNEXPECTED),
        "sessions_without_answer": results.count(Outcome.HUNG),
        "stages_not_restored": len(run.kills) - len(run.restores_s),
        "slots_lost": slots_lost,
        "attacks_that_worked": len(attacker.breaches),
        "attacks": dict(sorted(attacker.done.items())),
        "gateways_lost": gateways_lost,
        "clients_stuck": run.clients_stuck,
        "drain_surprises": sum(abs(drain["clients_saw"][seen.value] - due) for seen, due in DRAIN_ENDS.items()),
        "zombies": zombies,
        "zombies_unexplained": max(zombies - len(run.kills), 0),
        "processes_left_behind": left_behind(leaders),
        "outcomes": results.table(),
        "stages_killed": run.kills,
        "restored_s": [round(seconds, 1) for seconds in run.restores_s],
        "drain": drain,
        "memory": run.memory.findings(run.begun_s + WARM_UP * ran_s),
        "metrics": {name: number for name, number in counted.items() if "_total" in name or "_count" in name},
        "findings": [*attacker.breaches, *results.findings][:MOST_SHOWN],
        "environment": environment("nvidia-pytriton", "onnxruntime", "numpy", "grpcio"),
    }


def prepare(artifacts: Path, seed: int) -> tuple[Oracle, list[Utterance]]:
    """The oracle and its pool of utterances; prints how long that took."""
    generator = Generator(OnnxRuntime(load_artifacts(artifacts)))
    stream = generator.preset.stream
    if stream.lookahead_frames:
        raise click.ClickException(
            f"the artifacts look {stream.lookahead_ms} ms ahead, so that frames of a beginning are not those of the "
            "whole; export some with --lookahead-ms 0."
        )
    begun_s = time.monotonic()
    utterances = list(make_utterances(generator, seed))
    size_mib = sum(utterance.frames.nbytes for utterance in utterances) / MIB
    click.echo(
        f"{len(utterances)} utterances of {UTTERANCE_BLOCKS} blocks made in {time.monotonic() - begun_s:.0f} s, "
        f"{size_mib:.0f} MiB"
    )
    return Oracle(lambda utterance, blocks: generate(generator, utterance, blocks)), utterances


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0.5), default=60.0, show_default=True, help="How long to run.")
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("artifacts/tiny"),
    show_default=True,
    help="Folder made by `live-avatar export`.",
)
@click.option("--report", "path", type=click.Path(path_type=Path), help="Also write the report to this JSON file.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sessions' choices and of the speech.")
@click.option("--cores", type=float, default=1.3, show_default=True, help="Mean number of CPU cores to keep busy.")
@click.option(
    "--bound",
    type=float,
    default=10.0,
    show_default=True,
    help="Largest allowed growth of a process, in MiB per hour.",
)
@click.option("--log", type=click.File("w", lazy=False), default=os.devnull, help="File for the server's log.")
def main(
    minutes: float, artifacts: Path, path: Path | None, seed: int, cores: float, bound: float, log: IO[str]
) -> None:
    """Run sessions of every kind, and check every frame and the server's memory."""
    interrupts.install()
    try:
        oracle, utterances = prepare(artifacts, seed)
        with tempfile.TemporaryDirectory() as folder:
            keys = Path(folder) / "keys"
            caller, attacker = (add_key(keys, name) for name in ("caller", "attacker"))
            options = ServerOptions(
                artifacts,
                max_sessions=SESSIONS,
                idle_seconds=IDLE_S,
                known_avatars=KNOWN_AVATARS,
                access=Access(keys),
            ).on_free_ports()
            report = soak(
                options,
                partial(click.echo, file=log),
                SoakContext(options.url, oracle, utterances, IDLE_S, caller),
                Attacker(options, attacker, random.Random(seed)),
                minutes,
                seed,
                cores,
            )
    except LiveAvatarError as problem:
        raise click.ClickException(str(problem)) from problem
    wrong = failures(report, bound)
    report |= {"bound_mib_per_hour": bound, "failures": wrong}
    for line in summary(report):
        click.echo(line)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    for sentence in wrong:
        click.echo(f"WRONG: {sentence}")
    click.echo("failed" if wrong else "passed")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
