"""An image classification script with the structure of the transformers examples, training with a plain `Trainer`.

`test_swap.py` replaces the two class names and nothing else.
"""

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class DataTrainingArguments:
    train_dir: str = field(metadata={"help": "Folder with one folder of images per class."})


@dataclass
class ModelArguments:
    model_folder: str = field(metadata={"help": "Folder with the configuration and the image processor."})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    dataset = load_dataset("imagefolder", data_dir=data_args.train_dir, split="train")
    dataset = dataset.train_test_split(0.25, seed=training_args.seed)
    image_processor = AutoImageProcessor.from_pretrained(model_args.model_folder)
    config = AutoConfig.from_pretrained(
        model_args.model_folder, num_labels=dataset["train"].features["label"].num_classes
    )
    model = AutoModelForImageClassification.from_config(config)

    def transform(batch):
        batch["pixel_values"] = image_processor([i.convert("RGB") for i in batch["image"]])["pixel_values"]
        return batch

    def collate_fn(examples):
        pixel_values = torch.stack([torch.as_tensor(np.asarray(example["pixel_values"])) for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

    def compute_metrics(p):
        return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}

    dataset["train"].set_transform(transform)
    dataset["test"].set_transform(transform)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        compute_metrics=compute_metrics,
        processing_class=image_processor,
        data_collator=collate_fn,
    )

    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="image-classification", dataset="test images")


if __name__ == "__main__":
    main()
