"""What an optimizer step costs on many processes, as formulas: memory, traffic, and seconds.

Every number is per process and optimizer step, with float32 weights, gradients and optimizer state. `scale.py` counts
memory and traffic on real tensors and processes, and fails where these formulas disagree. Seconds follow from the rates
that the caller gives: they are computed, not measured.

    rates = Rates(flops=0.35 * 989e12, memory=3.35e12, network=50e9)
    run = Run(parameters=1e9, tokens=8192, processes=1024)
    slowdown = run.seconds(METHODS["gr global"], rates) / run.seconds(METHODS["adamw"], rates)
"""

from dataclasses import dataclass
from typing import NamedTuple

FLOAT = 4  # bytes
#: Numbers per parameter that a fused AdamW (7) and clipping (3) read or write.
ADAMW_ARRAYS = 10


class Method(NamedTuple):
    """What a method does in a step, beside AdamW.

    Attributes:
        passes: forward and backward passes over the batch of the step.
        reductions: how many of them end with a reduction of the gradient.
        copies: numbers per parameter at the peak of the memory, beyond weights, gradients and optimizer state.
        arrays: numbers per parameter read or written once per step, beyond the passes and `ADAMW_ARRAYS`.
        each: the same, once per micro-batch.
        counts: bytes that FSDP2 reduces beside gradients.
    """

    passes: float = 1
    reductions: float = 1
    copies: float = 0
    arrays: float = 0
    each: float = 0
    counts: float = 0


def admire(interval: int = 10, fraction: float = 1.0) -> Method:
    """AdamW with IRE, estimating from a `fraction` of the batch every `interval` steps.

    The mask is a byte per parameter. The step holds a copy of the weights, except around a fused AdamW on a CPU. Under
    FSDP2 the processes find the threshold in two histograms of 2^16 counts each.
    """
    return Method(1 + fraction / interval, 1 + 1 / interval, copies=1.25, arrays=13.25, counts=2**20 / interval)


#: GR with lambda = r, and with the arrays of a GPU; on a CPU a perturbation takes 2 fewer. Another lambda takes 4 more.
METHODS = {
    "adamw": Method(),
    "gr global": Method(passes=2, reductions=2, copies=1, arrays=11),
    "gr local": Method(passes=2, copies=1, arrays=11),
    "gr micro": Method(passes=2, copies=1, arrays=1, each=10),
    "gr momentum": Method(copies=1, arrays=1, each=10),
    "admire": admire(),
}


class Rates(NamedTuple):
    """Of one process: operations per second of a pass, bytes per second of its memory, bytes per second that it sends,
    and seconds before a collective begins to send."""

    flops: float
    memory: float
    network: float
    latency: float = 0.0

    @property
    def hiding_tokens(self) -> float:
        """Tokens per process and micro-batch from which computation can hide all communication, on many processes.

        A backward pass takes 4 N operations per token, and sends 8 N bytes: twice 4 N in DDP's all-reduce, or gathered
        weights and scattered gradients in FSDP2, whose forward pass has half of both.
        """
        return 2 * self.flops / self.network


class Traffic(NamedTuple):
    """Payload in bytes: gradients all-reduced, weights gathered, gradients reduced and scattered."""

    reduced: float = 0.0
    gathered: float = 0.0
    scattered: float = 0.0

    def sent(self, processes: int) -> float:
        """Bytes that each process of a ring sends."""
        return (processes - 1) / processes * (2 * self.reduced + self.gathered + self.scattered)


@dataclass(frozen=True)
class Run:
    """A data-parallel run.

    Attributes:
        parameters: N, all of them trained.
        tokens: of one process in one optimizer step, over all micro-batches.
        processes: P.
        sharded: FSDP2 instead of DDP.
        accumulation: micro-batches per step.
        root: parameters outside the wrapped layers, which FSDP2 gathers once per pass instead of twice.
        layers: wrapped layers of FSDP2, or buckets of DDP; each is a collective.
        overlap: fraction of the computation that can run while the network sends.
    """

    parameters: float
    tokens: float = 0.0
    processes: int = 1
    sharded: bool = False
    accumulation: int = 1
    root: float = 0.0
    layers: int = 1
    overlap: float = 1.0

    def memory(self, method: Method, states: float = 2.0) -> float:
        """Bytes of weights, gradients, optimizer state (`states` numbers per parameter) and the method's copies.
        Activations are not included.

        DDP keeps the gradients a second time, in its buckets. FSDP2 holds the root and two layers gathered, and under
        accumulation the whole gradient, because accelerate reduces it with the last micro-batch only.
        """
        held = self.parameters * (2 + states + method.copies)
        if not self.sharded:
            return FLOAT * (held + self.parameters * (self.processes > 1))
        gathered = self.root + 2 * (self.parameters - self.root) / self.layers
        return FLOAT * (held / self.processes + gathered + self.parameters * (self.accumulation > 1))

    def traffic(self, method: Method) -> Traffic:
        """What a step communicates; collectives of a few hundred bytes (norms, counts) are left out."""
        if self.processes == 1:
            return Traffic()
        reduced = FLOAT * self.parameters * method.reductions
        if not self.sharded:
            return Traffic(reduced=reduced)
        gathered = method.passes * self.accumulation * (2 * self.parameters - self.root)
        return Traffic(method.counts, FLOAT * gathered, reduced)

    def seconds(self, method: Method, rates: Rates) -> float:
        """Time of a step: 6 operations per parameter and token and pass, one third of them forward; the communication
        that these do not hide; and reading and writing the arrays."""
        forward = 2 * self.parameters * self.tokens / self.accumulation / rates.flops
        first, middle, last = self._communication(rates)
        inner = self._hidden(forward, first) + self._hidden(2 * forward, middle)
        outer = self._hidden(2 * forward, last) - self._hidden(2 * forward, middle)
        arrays = ADAMW_ARRAYS + method.arrays + method.each * self.accumulation
        moved = FLOAT * self.parameters * arrays / (self.processes if self.sharded else 1)
        return method.passes * self.accumulation * inner + method.reductions * outer + moved / rates.memory

    def _communication(self, rates: Rates) -> tuple[float, float, float]:
        """Seconds during a forward pass, a backward pass, and a backward pass that ends with a reduction."""

        def seconds(traffic: Traffic, collectives: int) -> float:
            return traffic.sent(self.processes) / rates.network + collectives * rates.latency

        weights = FLOAT * self.parameters
        if self.processes == 1:
            return 0.0, 0.0, 0.0
        if not self.sharded:
            return 0.0, 0.0, seconds(Traffic(reduced=weights), self.layers)
        again = Traffic(gathered=weights - FLOAT * self.root)
        return (
            seconds(Traffic(gathered=weights), self.layers),
            seconds(again, self.layers),
            seconds(again._replace(scattered=weights), 2 * self.layers),
        )

    def _hidden(self, computing: float, communicating: float) -> float:
        """Both together."""
        return computing + max(0.0, communicating - self.overlap * computing)
