"""AdamW against AdmIRE and its controls: a Llama of 6.8 million parameters on WikiText-2, equal steps, several seeds.

    python benchmarks/admire_wikitext2.py FOLDER --output runs.jsonl

FOLDER has train.parquet and validation.parquet with a column `text`. Every run is a line of the output file; runs that
are in it already are not repeated, so the script can be stopped and started. Last it prints a table.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, logging, set_seed

from hf_gr import GRConfig, GRTrainer

VOCABULARY, LENGTH = 4096, 128
ARMS: dict[str, dict] = {
    "AdamW": {},
    "AdmIRE": {"ire_preset": "llama"},
    "inverted": {"ire_preset": "llama", "ire_mask": "inverted"},
    "random": {"ire_preset": "llama", "ire_mask": "random"},
    "uniform": {"ire_preset": "llama", "ire_mask": "uniform"},
}


def token_blocks(folder: str) -> tuple[Dataset, Dataset]:
    """Train and validation text as blocks of `LENGTH` tokens, by a byte-level BPE learnt on the training text."""
    files = {split: str(Path(folder) / f"{split}.parquet") for split in ("train", "validation")}
    text = load_dataset("parquet", data_files=files)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text["train"]["text"], trainer)

    def blocks(split: str) -> Dataset:
        ids = tokenizer.encode("".join(text[split]["text"])).ids
        rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH).tolist()
        return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")

    return blocks("train"), blocks("validation").select(range(400))


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def run(arm: str, learning_rate: float, seed: int, steps: int, train: Dataset, validation: Dataset) -> dict:
    args = GRConfig(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=32,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=steps // 10,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        gr_lambda=0,
        seed=seed,
        eval_strategy="steps",
        eval_steps=steps // 2,
        logging_steps=steps // 20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **ARMS[arm],
    )
    set_seed(seed)
    trainer = GRTrainer(llama(), args, train_dataset=train, eval_dataset=validation)
    start = time.process_time()
    trainer.train()
    history = trainer.state.log_history
    return {
        "arm": arm,
        "learning_rate": learning_rate,
        "seed": seed,
        "steps": steps,
        "kappa_at_the_end": next((e["ire_kappa"] for e in reversed(history) if "ire_kappa" in e), 0.0),
        "eval_loss": {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e},
        "train_loss": statistics.mean([e["loss"] for e in history if "loss" in e][-2:]),
        "cpu_seconds": time.process_time() - start,
        "seconds": next(e["train_runtime"] for e in history if "train_runtime" in e),
        "flat_fraction": {
            k.removeprefix("ire_flat_fraction_"): v
            for e in history
            if e.get("ire_kappa")
            for k, v in e.items()
            if k.startswith("ire_flat_fraction_")
        },
        "mask_overlap": [e["ire_mask_overlap"] for e in history if "ire_mask_overlap" in e],
    }


def table(runs: list[dict]) -> None:
    kinds = sorted(
        {(r["arm"], r["learning_rate"], r["steps"]) for r in runs}, key=lambda k: (k[1], list(ARMS).index(k[0]))
    )
    print("| arm | peak learning rate | steps | seeds | validation loss, mean ± std | best in steps | CPU seconds |")
    print("|---|---|---|---|---|---|---|")
    for arm, rate, steps in kinds:
        mine = [r for r in runs if (r["arm"], r["learning_rate"], r["steps"]) == (arm, rate, steps)]
        final = [list(r["eval_loss"].values())[-1] for r in mine]
        std = f" ± {statistics.stdev(final):.3f}" if len(final) > 1 else ""
        best = [min(r["eval_loss"].values()) for r in mine]
        seeds = ", ".join(str(r["seed"]) for r in mine)
        cost = statistics.mean(r["cpu_seconds"] for r in mine)
        print(
            f"| {arm} | {rate:g} | {steps} | {seeds} | {statistics.mean(final):.3f}{std} "
            f"| {statistics.mean(best):.3f} | {cost:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--output", default="admire_wikitext2.jsonl")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()

    output = Path(options.output)
    runs = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {(r["arm"], r["learning_rate"], r["seed"], r["steps"]) for r in runs}
    train, validation = token_blocks(options.folder)
    print(f"{len(train):,} training blocks of {LENGTH} tokens, {len(validation):,} for validation", flush=True)
    for seed in options.seeds:
        for rate in options.learning_rates:
            for arm in options.arms:
                if (arm, rate, seed, options.steps) in done:
                    continue
                runs.append(run(arm, rate, seed, options.steps, train, validation))
                with output.open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    table(runs)


if __name__ == "__main__":
    main()
