"""The interface of a scenario: its context, its figures and its checks.

A scenario measures something and returns its figures as JSON values; `perf.run` adds command, machine and commit, and
writes them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from live_avatar.errors import InputError
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions

Figures = dict[str, Any]
"""JSON values. The optional key `checks` holds results of `check`."""

METRICS_PORT = 8002


@dataclass(frozen=True)
class Target:
    """A server to measure. pids: of Triton and of the gateway; none, and no trace, if it was started elsewhere."""

    url: str
    metrics_url: str
    pids: tuple[int, ...] = ()
    trace: Path | None = None


@dataclass(frozen=True)
class Context:
    """Context of a run. `quick` asks for the shortest useful run; pictures go to `out`."""

    artifacts: Path
    out: Path
    url: str | None = None
    quick: bool = False
    seed: int = 0
    log: Callable[[str], None] = print

    @contextmanager
    def server(self, **options: Any) -> Iterator[Target]:
        """The server at `url`, or a new one with trace and the `ServerOptions` of `options`.

        Raises `InputError` for options together with `url`.
        """
        if self.url is not None:
            if options:
                named = ", ".join(sorted(options))
                raise InputError(f"this needs a server with its own {named}; leave --url out.")
            yield Target(self.url, f"http://{self.url.rpartition(':')[0]}:{METRICS_PORT}/metrics")
            return
        with tempfile.TemporaryDirectory(prefix="live-avatar-trace-") as trace:
            wanted = {"artifacts": self.artifacts, "trace": Path(trace), "share_avatars": True, **options}
            with serving(ServerOptions(**wanted).on_free_ports()) as server:
                chosen = server.options
                metrics_url = f"http://{chosen.host}:{chosen.metrics_port}/metrics"
                yield Target(chosen.url, metrics_url, server.process_ids, Path(trace))

    def picture(self, name: str) -> Path:
        """Path of the picture with that name."""
        self.out.mkdir(parents=True, exist_ok=True)
        return self.out / f"{name}.png"


@dataclass(frozen=True)
class Scenario:
    """One measurement, by name. `measure` returns its figures; `needs_server` is False for a calculation."""

    name: str
    about: str
    measure: Callable[[Context], Figures]
    packages: tuple[str, ...] = field(default=())
    """Packages whose versions are recorded with the figures."""


def check(what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """One entry of the figures' `checks`. Checks compare ratios inside one run, so they hold on any machine."""
    holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    bounds = {name: bound for name, bound in (("at_least", at_least), ("at_most", at_most)) if bound is not None}
    return {"what": what, "value": value, **bounds, "holds": holds}


def broken(figures: Mapping[str, Any]) -> list[str]:
    """A sentence for each failed check."""
    return [_sentence(one) for one in figures.get("checks", ()) if not one["holds"]]


def _sentence(one: Mapping[str, Any]) -> str:
    bound = f"at least {one['at_least']:g}" if "at_least" in one else f"at most {one['at_most']:g}"
    return f"{one['what']} is {one['value']:.4g}, must be {bound}"
