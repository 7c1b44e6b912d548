"""The estimate that IRE reads: the gradient of the loss with labels drawn from the model's own distribution.

Its square is the Gauss-Newton-Bartlett estimate of the diagonal of the Fisher matrix, up to the batch size (Liu et al.,
"Sophia", 2023, Algorithm 2): h ~ B g^2, with g = 1/B sum_b grad(-log p(y_b | x_b)) and y_b ~ p(. | x_b).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Labels with this value take no part in the loss; the convention of torch and transformers.
IGNORED = -100


@torch.no_grad()
def sample_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row of `logits` (rows x classes), drawn from softmax(logits).

    By an exponential race, as `torch.multinomial` does it, which however stops the program at a logit that is not a
    number; here the loss of the label is not a number then.
    """
    probabilities = logits.float().softmax(dim=-1)
    return probabilities.div_(torch.empty_like(probabilities).exponential_(generator=generator)).argmax(dim=-1)


def classification_losses(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """-log p(y | x) for a sampled y in place of each label, and 0 for those that are -100: to leave these out, a GPU
    would have to tell the host how many there are.

    Args:
        logits: ... x classes.
        labels: with the same leading dimensions: one label per example, per token or per masked position.
    """
    logits, labels = logits.flatten(0, -2), labels.flatten()
    sampled = sample_labels(logits, generator).masked_fill_(labels == IGNORED, IGNORED)
    return F.cross_entropy(logits.float(), sampled, reduction="none", ignore_index=IGNORED)


def causal_lm_losses(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """-log p(y_t | x_<t) for a sampled y_t at each position, and 0 where the label, the next token, is -100.

    Args:
        logits: batch x length x vocabulary.
        labels: batch x length, not shifted.
    """
    return classification_losses(logits[:, :-1], _next_tokens(labels), generator)


def multi_label_losses(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """-log p(y_c | x) for every class c of every example: y_c is 1 with probability sigmoid(z_c), and 0 otherwise.

    These are the probabilities that binary cross-entropy assumes; the labels themselves are not used.
    """
    logits = logits.float()
    draws = torch.empty_like(logits).uniform_(generator=generator)
    sampled = (draws < logits.detach().sigmoid()).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, sampled, reduction="none")


def regression_losses(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """-log p(y | x), up to a constant, for every output z of every example: y is drawn from a Gaussian around z.

    Squared error assumes such a Gaussian. Its variance, here 1, scales the estimate and does not change its order. The
    labels themselves are not used.
    """
    logits = logits.float()
    sampled = logits.detach() + torch.empty_like(logits).normal_(generator=generator)
    return 0.5 * (sampled - logits).square()


def _same(labels: Tensor) -> Tensor:
    return labels


def _next_tokens(labels: Tensor) -> Tensor:
    return labels[:, 1:]


@dataclass(frozen=True)
class Head:
    """What the logits of a kind of model mean.

    Attributes:
        help: the models, for errors and the docs.
        endings: of the names of their classes.
        sampling: how labels are drawn, for the docs.
        losses: from logits, labels, and a generator to -log p of a drawn label in place of each that counts.
        applies: whether a model of such a class has this head, given its config.
        predicted: the part of the labels that can count.
        allows_fractions: whether labels may be floating-point numbers.
        feeds_decoder: whether the model makes the inputs of its decoder from the labels.
    """

    help: str
    endings: tuple[str, ...]
    sampling: str
    losses: Callable[[Tensor, Tensor, torch.Generator], Tensor] = classification_losses
    applies: Callable[[Any], bool] = lambda config: True
    predicted: Callable[[Tensor], Tensor] = _same
    allows_fractions: bool = False
    feeds_decoder: bool = False


def _is_decoder_alone(config: Any) -> bool:
    return not getattr(config, "is_encoder_decoder", False)


def _predicts_next_token(config: Any) -> bool:
    """Whether an encoder-decoder predicts one token per position; ProphetNet is trained on several."""
    return not _is_decoder_alone(config) and getattr(config, "ngram", 1) == 1


def _problem_type(config: Any) -> str:
    """As transformers determines it where it is not set."""
    default = "regression" if getattr(config, "num_labels", 1) == 1 else "single_label_classification"
    return getattr(config, "problem_type", None) or default


#: Known heads. If the name of a class has several of the endings, the first entry that applies counts.
HEADS = {
    "masked_lm": Head(
        "masked language models",
        ("ForMaskedLM", "WithLMHeadModel", "XLNetLMHeadModel"),  # the last two do not shift labels either
        "at each position with a label, from its softmax",
    ),
    "causal_lm": Head(
        "causal language models",
        ("ForCausalLM", "LMHeadModel"),
        "at each position whose next token has a label, from its softmax",
        losses=causal_lm_losses,
        applies=_is_decoder_alone,
        predicted=_next_tokens,
    ),
    "seq2seq": Head(
        "encoder-decoder language models",
        ("ForConditionalGeneration",),
        "at each position of the decoder with a label, from its softmax; the decoder reads the original labels",
        applies=_predicts_next_token,
        feeds_decoder=True,
    ),
    "token_classification": Head(
        "token classifiers", ("ForTokenClassification",), "for each token with a label, from its softmax"
    ),
    "multiple_choice": Head(
        "multiple-choice models", ("ForMultipleChoice",), "for each example, from the softmax over its choices"
    ),
    "classification": Head(
        "single-label classifiers of images and sequences",
        ("ForImageClassification", "ForSequenceClassification"),
        "for each example, from the softmax over the classes",
        applies=lambda config: _problem_type(config) == "single_label_classification",
    ),
    "multi_label": Head(
        "multi-label classifiers of images and sequences",
        ("ForImageClassification", "ForSequenceClassification"),
        "for each class of each example, 0 or 1, independently",
        losses=multi_label_losses,
        applies=lambda config: _problem_type(config) == "multi_label_classification",
        allows_fractions=True,
    ),
    "regression": Head(
        "regressions of images and sequences with squared error",
        ("ForImageClassification", "ForSequenceClassification"),
        "for each output of each example, from a Gaussian around it",
        losses=regression_losses,
        applies=lambda config: _problem_type(config) == "regression",
        allows_fractions=True,
    ),
}


def head_of(model: nn.Module) -> Head | None:
    """What the logits of `model` mean; None where that is not known."""
    unwrap = getattr(model, "get_base_model", None)  # of peft
    inner = unwrap() if unwrap is not None else model
    name, config = type(inner).__name__, getattr(inner, "config", None)
    return next((head for head in HEADS.values() if name.endswith(head.endings) and head.applies(config)), None)


def first_rows(inputs: dict[str, Any], rows: int, batch_size: int) -> dict[str, Any]:
    """The first `rows` examples of a batch: whatever has `batch_size` as its first dimension is cut."""
    return {
        key: value[:rows] if isinstance(value, Tensor) and value.dim() and len(value) == batch_size else value
        for key, value in inputs.items()
    }


@contextmanager
def without_randomness(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, so that dropout is off and the running statistics of BatchNorm stand still; the modes of
    all modules as they were afterwards.

    A layer with activation checkpointing stays in training mode itself, not its children: it would not save memory
    otherwise.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, was_training in modes:
        if getattr(module, "gradient_checkpointing", False) and was_training:
            module.training = True
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def layer_kind(name: str, module: nn.Module) -> str:
    """What kind of layer a parameter belongs to, told from its name and the module that owns it."""
    path = f".{name.lower()}"
    if path.endswith("bias"):
        return "bias"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if isinstance(module, nn.Embedding) or any(word in path for word in ("embed", "cls_token", "mask_token")):
        return "embedding"
    if path.split(".")[-2] in ("lm_head", "classifier", "score", "head", "fc", "output_layer"):
        return "head"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if any(word in path for word in ("attn", "attention")):
        return "attention"
    return "mlp" if "mlp" in path or "intermediate" in path or "feed_forward" in path else "other"


def layer_kinds(model: nn.Module) -> dict[Tensor, str]:
    """The kind of every trainable parameter; one that is shared counts where it is found first."""
    modules = dict(model.named_modules())
    return {
        p: layer_kind(name, modules[name.rpartition(".")[0]]) for name, p in model.named_parameters() if p.requires_grad
    }
