"""A discrete-event model of the pipe: when each block of each session passes each stage, and a node's capacity.

The model's rules: A stage works on one block at a time, in the order of arrival. A session opens in every stage before
its first block. A client has a bounded number of blocks in flight. The last step makes the new sink at the end of its
work, before it waits for a stage-time floor. The next block that enters the pipe carries the sink, and each step
prefills it after that block (enough memory is assumed). At the latest, the block at which the sink takes effect waits
for it in conditioning and carries it. Stages on one processor share it evenly with one another and with the work of
server and client to pass blocks on.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

from live_avatar.errors import ConfigError
from live_avatar.serving.tensors import NO_BLOCK
from live_avatar.serving.trace import Interval
from live_avatar_client.protocol import FPS
from perf.figures import BlockTimes, playback

EPSILON_S = 1e-12


@dataclass(frozen=True)
class StageWork:
    """One stage alone on its processor, in seconds.

    blocks_s: work on block 0, 1, 2, ... of a session, the last value for all further blocks; open_s: work at the start
    of a session; prefill_s: work on the new sink; floor_s: the least time of an answer to a block.
    """

    name: str
    processor: str
    blocks_s: tuple[float, ...]
    open_s: float = 0.0
    prefill_s: float = 0.0
    floor_s: float = 0.0

    def work_s(self, block: int) -> float:
        return self.open_s if block == NO_BLOCK else self.blocks_s[min(block, len(self.blocks_s) - 1)]

    def least_s(self, block: int) -> float:
        return 0.0 if block == NO_BLOCK else self.floor_s


@dataclass(frozen=True)
class Pipeline:
    """The stages in order, and their links. The last is the decoder, the one before it the last step.

    capacity: how many stages a processor serves at full speed (the cores of a CPU; 1 by default, for a GPU). hop_s:
    from a request or a stage's answer to the start of the next stage, and of the next block in the same stage.
    delivery_s: from the decoder's answer to the client's receipt. passing_s: work of server and client for one block on
    processor `host`, the same part at each hop; it delays no block, but may slow a stage.
    """

    stages: tuple[StageWork, ...]
    capacity: Mapping[str, float] = field(default_factory=dict)
    block_frames: int = 12
    sink_update_block: int | None = 5
    hop_s: float = 0.0
    delivery_s: float = 0.0
    passing_s: float = 0.0
    host: str = "cpu"

    def __post_init__(self) -> None:
        if len(self.stages) < 3:
            raise ConfigError(
                f"a pipe of {len(self.stages)} stages; give conditioning, at least one step, and the decoder."
            )

    @property
    def takes_sink(self) -> int | None:
        """The block, from 0, at which the new sink takes effect."""
        return None if self.sink_update_block is None else self.sink_update_block - 1

    @property
    def block_s(self) -> float:
        """Playback time of a block."""
        return self.block_frames / FPS

    def with_floor(self, floor_s: float) -> Pipeline:
        """The same with a least time per block in every stage."""
        return replace(self, stages=tuple(replace(stage, floor_s=floor_s) for stage in self.stages))


@dataclass(frozen=True)
class Client:
    """One session: its start, its blocks, and the most blocks in flight.

    pace_s: time in which a block is spoken; 0 for recorded speech. A known avatar needs no work at the start.
    """

    blocks: int
    start_s: float = 0.0
    window: int = 8
    pace_s: float = 0.0
    known: bool = True

    def spoken_s(self, block: int) -> float:
        """When all samples before this block have been spoken."""
        return self.start_s + block * self.pace_s


@dataclass(frozen=True)
class SimulatedRun:
    """Every client's blocks, and the stages' intervals."""

    sessions: tuple[tuple[BlockTimes, ...], ...]
    intervals: tuple[Interval, ...]


def simulate(pipeline: Pipeline, clients: Sequence[Client]) -> SimulatedRun:
    """Runs all clients to their end."""
    return _Simulation(pipeline, clients).run()


@dataclass(eq=False)
class _Work:
    """Remaining work on a processor, and what happens at its end."""

    processor: str
    left_s: float
    then: Callable[[], None]


@dataclass(frozen=True)
class _Job:
    """A block (or a session's start) in one stage; it ends when its work is done, and not before `earliest_s`."""

    session: int
    block: int
    stage: int
    begun_s: float
    earliest_s: float


class _Simulation:
    """Simulated time, which moves to the next event: a timed one, or the end of a stage's work at its present speed."""

    def __init__(self, pipeline: Pipeline, clients: Sequence[Client]) -> None:
        self._pipeline = pipeline
        self._clients = clients
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._queues: list[deque[tuple[int, int]]] = [deque() for _ in pipeline.stages]
        self._occupied = [False] * len(pipeline.stages)
        self._working: list[_Work] = []
        self._waiting: dict[int, _Job] = {}
        self._sinks: set[int] = set()
        self._carriers: dict[int, int] = {}
        self._ahead: set[tuple[int, int]] = set()
        self._sent_s: list[list[float]] = [[] for _ in clients]
        self._received_s: list[list[float]] = [[] for _ in clients]
        self._intervals: list[Interval] = []

    def run(self) -> SimulatedRun:
        for session, client in enumerate(self._clients):
            self._at(client.start_s, partial(self._start, session))
        while self._events or self._working:
            self._step()
        return SimulatedRun(tuple(map(self._seen, range(len(self._clients)))), tuple(self._intervals))

    def _seen(self, session: int) -> tuple[BlockTimes, ...]:
        client, frames = self._clients[session], self._pipeline.block_frames
        times = enumerate(zip(self._sent_s[session], self._received_s[session], strict=True))
        return tuple(BlockTimes(frames, client.spoken_s(n), client.spoken_s(n + 1), *pair) for n, pair in times)

    def _at(self, time_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), event))

    def _step(self) -> None:
        """Moves to the next event."""
        speeds = self._speeds()
        timed = self._events[0][0] if self._events else math.inf
        done = min((self._now + work.left_s / speed for work, speed in speeds), default=math.inf)
        until = min(timed, done)
        for work, speed in speeds:
            work.left_s -= speed * (until - self._now)
        self._now = until
        for work in [work for work in self._working if work.left_s <= EPSILON_S]:
            self._working.remove(work)
            work.then()
        while self._events and self._events[0][0] <= self._now:
            heapq.heappop(self._events)[2]()

    def _speeds(self) -> list[tuple[_Work, float]]:
        """Each piece of work with its share of its processor."""
        crowd = Counter(work.processor for work in self._working)
        speed = {name: min(1.0, self._pipeline.capacity.get(name, 1.0) / n) for name, n in crowd.items()}
        return [(work, speed[work.processor]) for work in self._working]

    # ---- The client

    def _start(self, session: int) -> None:
        self._pass_on(session, NO_BLOCK, 0)
        self._send(session)

    def _send(self, session: int) -> None:
        """Sends the next block if it is spoken and there is room for it; else waits for that."""
        client, sent_s = self._clients[session], self._sent_s[session]
        while (block := len(sent_s)) < client.blocks and block - len(self._received_s[session]) < client.window:
            if (spoken_s := client.spoken_s(block + 1)) > self._now + EPSILON_S:
                self._at(spoken_s, partial(self._send, session))
                return
            sent_s.append(self._now)
            self._pass_on(session, block, 0)

    def _receive(self, session: int) -> None:
        self._received_s[session].append(self._now)
        self._send(session)

    # ---- The stages

    def _arrive(self, session: int, block: int, stage: int) -> None:
        self._queues[stage].append((session, block))
        self._take(stage)

    def _take(self, stage: int) -> None:
        if self._occupied[stage] or not self._queues[stage]:
            return
        session, block = self._queues[stage].popleft()
        times = self._pipeline.stages[stage]
        opening = block == NO_BLOCK and self._clients[session].known
        if stage == 0 and session in self._sinks:
            self._carriers.setdefault(session, block)
        work_s = 0.0 if opening else times.work_s(block) + self._inline_s(session, block, stage)
        self._occupied[stage] = True
        job = _Job(session, block, stage, self._now, self._now + times.least_s(block))
        self._working.append(_Work(times.processor, work_s, partial(self._worked, job)))

    def _worked(self, job: _Job) -> None:
        """Ends the stage's own work: it may put the sink, or wait for the sink or for its floor."""
        takes = self._pipeline.takes_sink
        if job.block == 0 and job.stage == len(self._pipeline.stages) - 2:
            self._sinks.add(job.session)
            if (waiting := self._waiting.pop(job.session, None)) is not None:
                self._end_at(waiting)
        if job.stage == 0 and job.block == takes and job.session not in self._sinks:
            self._waiting[job.session] = job
        else:
            self._end_at(job)

    def _end_at(self, job: _Job) -> None:
        self._at(max(self._now, job.earliest_s), partial(self._ended, job))

    def _ended(self, job: _Job) -> None:
        if job.block != NO_BLOCK:
            name = self._pipeline.stages[job.stage].name
            self._intervals.append(Interval(name, job.session, job.block, job.begun_s, self._now))
        self._free_after(job)
        if job.stage + 1 < len(self._pipeline.stages):
            self._pass_on(job.session, job.block, job.stage + 1)
        elif job.block != NO_BLOCK:
            self._pass(job.block)
            self._at(self._now + self._pipeline.delivery_s, partial(self._receive, job.session))

    def _pass_on(self, session: int, block: int, stage: int) -> None:
        self._pass(block)
        self._at_hop(partial(self._arrive, session, block, stage))

    def _pass(self, block: int) -> None:
        """Adds the work of one hop to the host. A block has one hop more than stages."""
        if block != NO_BLOCK and self._pipeline.passing_s:
            share_s = self._pipeline.passing_s / (len(self._pipeline.stages) + 1)
            self._working.append(_Work(self._pipeline.host, share_s, _nothing))

    # ---- The new sink

    def _inline_s(self, session: int, block: int, stage: int) -> float:
        """Work on the sink that is left for its own block."""
        if block == NO_BLOCK or block != self._pipeline.takes_sink:
            return 0.0
        return 0.0 if (stage, session) in self._ahead else self._pipeline.stages[stage].prefill_s

    def _free_after(self, job: _Job) -> None:
        """Starts the next block, after the prefill of a sink that came with an earlier block."""
        free = partial(self._at_hop, partial(self._free, job.stage))
        stage = self._pipeline.stages[job.stage]
        came = self._carriers.get(job.session, math.inf) <= job.block < (self._pipeline.takes_sink or 0)
        if came and stage.prefill_s and (job.stage, job.session) not in self._ahead:
            self._ahead.add((job.stage, job.session))
            self._working.append(_Work(stage.processor, stage.prefill_s, free))
        else:
            free()

    def _at_hop(self, event: Callable[[], None]) -> None:
        self._at(self._now + self._pipeline.hop_s, event)

    def _free(self, stage: int) -> None:
        self._occupied[stage] = False
        self._take(stage)


def _nothing() -> None:
    pass


# ---- Capacity of a node


def sessions_without_stall(pipeline: Pipeline, most: int, blocks: int = 40) -> int:
    """How many real-time sessions a node serves without a stall, if their starts are evenly spread over a block."""
    held = 0
    while held < most:
        held += 1
        clients = [Client(blocks, start_s=pipeline.block_s * n / held, pace_s=pipeline.block_s) for n in range(held)]
        if any(playback(seen).stalls for seen in simulate(pipeline, clients).sessions):
            return held - 1
    return held


# ---- Capacity of many nodes


def erlang_b(slots: int, load: float) -> float:
    """Share of sessions that `slots` slots refuse under a load in erlangs (arrivals per mean session length)."""
    refused = 1.0
    for slot in range(1, slots + 1):
        refused = load * refused / (slot + load * refused)
    return refused


def load_for(slots: int, refused: float) -> float:
    """The load in erlangs at which `slots` slots refuse that share of sessions."""
    low, high = 0.0, slots / (1 - refused) + 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if erlang_b(slots, middle) < refused else (low, middle)
    return low


def refused_share(nodes: int, slots: int, load: float, sessions: int, seed: int, *, informed: bool) -> float:
    """Share of `sessions` that are refused, with `slots` on each node: Poisson arrivals, exponential lengths of mean 1.

    informed: a session goes to the node with the most free slots. Otherwise it goes to a random node, and is refused if
    that node is full.
    """
    rng = random.Random(seed)
    free = [slots] * nodes
    ends: list[tuple[float, int]] = []
    now, refused = 0.0, 0
    for _ in range(sessions):
        now += rng.expovariate(load)
        while ends and ends[0][0] <= now:
            free[heapq.heappop(ends)[1]] += 1
        node = max(range(nodes), key=free.__getitem__) if informed else rng.randrange(nodes)
        if free[node]:
            free[node] -= 1
            heapq.heappush(ends, (now + rng.expovariate(1.0), node))
        else:
            refused += 1
    return refused / sessions
