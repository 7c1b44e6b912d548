"""What a line of the costs table is made of."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from timing import Run, nothing


class Row(NamedTuple):
    """The time of one kind by that of the fastest of its peers.

    Attributes:
        what: the kind.
        peers: the kinds that it is compared with; one that is not installed is left out.
        bar: the most that the ratio may be; None where nothing is promised.
        gpu_bar: the same on a GPU, if it differs.
        against: what the peers are called together, if there are several.
        cpu_only: whether the row is left out on a GPU.
    """

    what: str
    peers: tuple[str, ...]
    bar: float | None = None
    gpu_bar: float | None = None
    against: str = ""
    cpu_only: bool = False


class Fact(NamedTuple):
    """Something that no clock measures: a number with its upper bound, or whether something holds."""

    what: str
    measure: Callable[[], float | bool]
    bar: float | bool | None = None
    unit: str = ""


@dataclass
class Bench:
    """What a comparison runs.

    Attributes:
        kinds: name -> what is timed.
        before: runs ahead of each kind, outside the clock.
        averages: name -> the share of each kind in it: a kind that is computed from others of the same round.
        facts: measured once, after the clock has stopped.
        images: how many images a run returns, if that is what it is for.
    """

    kinds: dict[str, Run]
    before: Run = nothing
    averages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    facts: Iterable[Fact] = ()
    images: int = 0


class Comparison(NamedTuple):
    """Several rows whose kinds run interleaved.

    Attributes:
        where: model and batch.
        rows: lines of the table.
        make: device -> what runs.
        rounds: as many as its time is worth.
        uses_threads: whether the number of torch's threads makes a difference.
    """

    where: str
    rows: tuple[Row, ...]
    make: Callable[[str], Bench]
    rounds: int
    uses_threads: bool = True


class Group(NamedTuple):
    """A table of its own.

    Attributes:
        title: its heading.
        about: what a reader has to know.
        comparisons: whether all models are to be tiny -> the comparisons.
    """

    title: str
    about: str
    comparisons: Callable[[bool], list[Comparison]]
