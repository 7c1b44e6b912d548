"""Small real models and datasets, the same in every process."""

import inspect

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_gr import GRConfig, GRTrainer

VOCABULARY = 50


def llama(dropout: float = 0.0, **kwargs) -> PreTrainedModel:
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_dropout=dropout,
            **kwargs,
        )
    )


def vit(dropout: float = 0.0) -> PreTrainedModel:
    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=10,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def swin() -> PreTrainedModel:
    set_seed(0)
    return SwinForImageClassification(
        SwinConfig(
            image_size=16, patch_size=2, window_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], num_labels=10
        )
    )


def text(count: int = 24, length: int = 12) -> list[dict]:
    """Random tokens; a different number of leading labels is masked in every example."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(0, length - 3, (1,), generator=generator))] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def images(count: int = 24, size: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(3, size, size, generator=generator),
            "labels": int(torch.randint(0, 10, (1,), generator=generator)),
        }
        for _ in range(count)
    ]


def arguments(output_dir, **kwargs) -> dict:
    """Keyword arguments for a `TrainingArguments`: quick, quiet, on the CPU."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "max_steps": 6,
        "learning_rate": 1e-2,
        **kwargs,
    }


def trainer(output_dir, model=None, data=None, cls=GRTrainer, **kwargs) -> GRTrainer:
    """A trainer of a ViT on images, if nothing else is given, on the CPU.

    Args:
        kwargs: of the trainer, or flags.
    """
    own = {name: kwargs.pop(name) for name in kwargs.keys() & inspect.signature(Trainer).parameters.keys()}
    args = GRConfig(**arguments(output_dir, **kwargs))
    own["train_dataset"] = images() if data is None else data
    return cls(model=vit() if model is None else model, args=args, **own)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


class PathRecorder(TrainerCallback):
    """Keeps the weights, as one flat vector, before the first step and after each."""

    def __init__(self):
        self.path = []

    def _record(self, model):
        self.path.append(weights(model))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._record(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._record(model)


class ScaledTrainer(GRTrainer):
    """With the gradient scaler that fp16 has on a GPU, and that accelerate does not give a CPU."""

    SCALE = 1024.0

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.SCALE)

    def training_step(self, *args, **kwargs):
        # After the model is prepared: the passes themselves stay float32.
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        return super().training_step(*args, **kwargs)
