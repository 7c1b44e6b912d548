"""The second pass: which gradient a regularized step takes at the perturbed weights.

With z(theta) the logits, J their Jacobian and l the loss of them, pass 1 has g1 = J(theta)^T grad l(z(theta)). Pass 2,
at theta' = theta + r d, takes

    full:        g2 = J(theta')^T grad l(z(theta'))    the gradient of the loss there
    functional:  g2 = J(theta')^T grad l(z(theta))     the logits' gradient of pass 1, back through the perturbed model

`OutputGradients` does the latter: it records grad l in pass 1, and in pass 2 starts the backward pass from it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


class SecondPass(NamedTuple):
    """A kind of second pass: what `--help` says of it, its equation, and the BibTeX of its source."""

    help: str
    latex: str
    citation: str = ""


FUNCTIONAL_CITATION = """\
@inproceedings{singh2025avoiding,
  title     = {Avoiding Spurious Sharpness Minimization Broadens Applicability of SAM},
  author    = {Singh, Sidak Pal and Mobahi, Hossein and Agarwala, Atish and Dauphin, Yann},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
  url       = {https://arxiv.org/abs/2502.02407}
}"""

SECOND_PASSES: dict[str, SecondPass] = {
    "full": SecondPass("the gradient of the loss", r"g_2 = J(\theta')^\top \nabla \ell(z(\theta'))"),
    "functional": SecondPass(
        "that of the logits from the first pass, back through the perturbed model, as in Functional SAM",
        r"g_2 = J(\theta')^\top \nabla \ell(z(\theta))",
        FUNCTIONAL_CITATION,
    ),
}


def refusal(reason: str) -> ValueError:
    """The error of what the functional second pass does not support."""
    return ValueError(f"gr_second_pass_kind='functional': {reason}. Set gr_second_pass_kind=full.")


class OutputGradients:
    """The gradients of the loss with respect to the logits of a model, kept from one pass for another.

        outputs = OutputGradients()
        with outputs.of(model) as logits:
            loss = loss_of(model)
            outputs.record(loss, loss.backward, logits)  # .grad = g1
        perturbation.apply(r, gradient_norm(params), grad_scale=(r - lambda_) / lambda_)
        with outputs.of(model) as logits:
            loss_of(model)
            outputs.replay(logits)  # .grad = (r/lambda - 1) g1 + g2

    What is recorded contains every factor of the loss: the mean over tokens, masks, label smoothing, a loss scale. Each
    micro-batch is recorded once and replayed once, in the same order. Memory: the logits of all of them.
    """

    def __init__(self) -> None:
        self._recorded: list[list[Tensor]] = []

    def forget(self) -> None:
        """Drop what has been recorded and not replayed."""
        self._recorded.clear()

    @staticmethod
    @contextmanager
    def of(model: nn.Module) -> Iterator[list[GradientEdge]]:
        """Within the context, collects where in the graph each forward pass of `model` made its logits.

        Raises:
            ValueError: an output has no `logits`. Passes without gradients, such as those of a reference model, are
                not looked at.
        """
        edges: list[GradientEdge] = []

        def collect(module: nn.Module, _: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                edges.append(_edge_of(_logits(module, output)))

        handle = model.register_forward_hook(collect)
        try:
            yield edges
        finally:
            handle.remove()

    def record(self, loss: Tensor, backward: Callable[[], None], edges: list[GradientEdge]) -> None:
        """Run `backward()`, which differentiates `loss`, and keep the gradients that arrive at `edges`.

        Raises:
            ValueError: the loss depends on parameters other than through the logits, as that of a mixture of experts
                does through its auxiliary loss: its part would be lost.
        """
        if _reaches_parameters(loss, {edge.node for edge in edges}):
            raise refusal("the loss depends on parameters not only through the logits, as an auxiliary loss does")
        arrived: dict[int, Tensor] = {}

        def keep_at(index: int, output: int) -> Callable[[Any], None]:
            def keep(grads: Any) -> None:
                if grads[output] is not None:
                    arrived[index] = grads[output]

            return keep

        handles = [edge.node.register_prehook(keep_at(i, edge.output_nr)) for i, edge in enumerate(edges)]
        try:
            backward()
        finally:
            for handle in handles:
                handle.remove()
        if len(arrived) < len(edges):
            raise refusal("the loss does not depend on the logits that the model returns")
        self._recorded.append([arrived[i].detach() for i in range(len(edges))])

    def replay(self, edges: list[GradientEdge]) -> None:
        """Backward from the logits with the gradients of the oldest record."""
        recorded = self._recorded.pop(0)
        assert len(recorded) == len(edges)
        torch.autograd.backward(edges, recorded)


def _logits(module: nn.Module, output: Any) -> Tensor:
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not logits.requires_grad:
        raise refusal(f"{type(module).__name__} returns no logits to differentiate")
    return logits


def _edge_of(logits: Tensor) -> GradientEdge:
    """Where they were computed. Mixed precision returns a copy in float32, of which a loss inside the model knows
    nothing."""
    edge = get_gradient_edge(logits)
    while edge.node.name().startswith("ToCopyBackward"):
        node, output = edge.node.next_functions[0]
        assert node is not None
        edge = GradientEdge(node, output)
    return edge


def _reaches_parameters(loss: Tensor, boundary: set[Node]) -> bool:
    """Whether the graph of `loss` has a leaf this side of `boundary`."""
    if loss.grad_fn is None:
        return False
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        if node in boundary:
            continue
        if hasattr(node, "variable"):  # where the gradient of a leaf accumulates
            return True
        following = {following for following, _ in node.next_functions if following is not None}
        waiting += following - seen
        seen |= following
    return False
