"""Tokens per second and memory of a packed stream, beside tokenizing everything first.

    python benchmarks/streaming.py --gigabytes 1 10 --seconds 30

1. Throughput, on the first documents of one file: (a) tokenized by `map`, packed into an Arrow file, then read in
   batches; (b) read as a stream, for as many windows of blocks. In one process, interleaved, in a new order each round;
   medians of the CPU time, which other processes disturb less than that of a clock.
2. Memory: for each size of the corpus, a process of its own reads the stream for `--seconds` seconds of CPU time, a
   fifth of them from each of five files that are spread over it, and reports the peak of its resident memory.
3. Resuming: the seconds of CPU time to the first block, at the beginning of a file of 100 MB and further on.

The text is synthetic: each document is a piece of about 5 kB of 20 MB of random words. One file is written, the others
are links to it; all are in `--folder`, and removed at the end. `--rounds 0` measures the memory alone.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, default_data_collator

from hf_gr import __version__
from hf_gr.data.streams import DocumentStream, PackedStream, Position
from hf_gr.data.text import pack, train_tokenizer

FILE_BYTES = 100_000_000
ROWS_PER_GROUP = 500
BLOCK, BATCH = 1024, 8


def write_corpus(folder: Path, gigabytes: float) -> None:
    """Parquet files of 100 MB, uncompressed, so that their size is that of the text."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlcumwfgypbvk", k=draw.randint(2, 9))) for _ in range(20_000)]
    pool = " ".join(draw.choices(words, k=3_000_000))
    for i in range(round(gigabytes * 1e9 / FILE_BYTES)):
        file = folder / f"{i:04}.parquet"
        if i == 0:
            write_file(file, pool, draw)
        else:
            file.hardlink_to(folder / "0000.parquet")


def write_file(file: Path, pool: str, draw: random.Random) -> None:
    schema = pa.schema({"text": pa.string()})
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        written = 0
        while written < FILE_BYTES:
            starts = [draw.randrange(len(pool) - 10_000) for _ in range(ROWS_PER_GROUP)]
            texts = [pool[start : start + draw.randint(1000, 9000)] for start in starts]
            writer.write_table(pa.table({"text": texts}, schema))
            written += sum(map(len, texts))


def stream_of(folder: Path, tokenizer: PreTrainedTokenizerFast, file: str = "*.parquet") -> PackedStream:
    data = load_dataset("parquet", data_files=str(folder / file), streaming=True, split="train")
    return PackedStream(DocumentStream(data, "text"), tokenizer, BLOCK)


def batches(data: torch.utils.data.Dataset) -> DataLoader:
    return DataLoader(data, batch_size=BATCH, collate_fn=default_data_collator)


# ---- Throughput ----


def by_map(folder: Path, tokenizer: PreTrainedTokenizerFast, documents: int) -> dict[str, float]:
    """Tokens per second of tokenizing and packing, and of reading all blocks once."""
    data = load_dataset("parquet", data_files=str(folder / "0000.parquet"), split=f"train[:{documents}]")
    start = time.process_time()
    blocks = pack(data, tokenizer, "text", BLOCK)
    packed = time.process_time()
    tokens = sum(batch["input_ids"].numel() for batch in batches(blocks))
    read = time.process_time()
    return {"tokenized and packed first": tokens / (packed - start), "read when packed": tokens / (read - packed)}


def by_stream(folder: Path, tokenizer: PreTrainedTokenizerFast, documents: int) -> dict[str, float]:
    """The same of a stream, which endlessly reads these documents, for as many windows as they fill."""
    stream = stream_of(folder, tokenizer, "0000.parquet")
    stream.documents = DocumentStream(stream.documents.dataset, "text", stop=documents)
    windows = round(documents / 500)
    start = time.process_time()
    tokens = sum(batch["input_ids"].numel() for batch in islice(batches(stream), windows * stream.window // BATCH))
    return {"streamed": tokens / (time.process_time() - start)}


def throughput(folder: Path, tokenizer: PreTrainedTokenizerFast, documents: int, rounds: int) -> dict[str, list[float]]:
    datasets.disable_caching()
    contestants: list[Callable] = [by_map, by_stream]
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        random.shuffle(contestants)
        for contestant in contestants:
            for name, rate in contestant(folder, tokenizer, documents).items():
                found.setdefault(name, []).append(rate)
    return found


# ---- Memory and resuming, each in a process of its own ----


def megabytes(entry: str) -> float:
    """Resident memory: now (VmRSS), or at its peak (VmHWM). The peak that `getrusage` has may be that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) * 1024 / 1e6


def read_for(folder: Path, tokenizer: PreTrainedTokenizerFast, seconds: float) -> dict[str, float]:
    """What a process that reads `seconds` of the stream in all, in five files, needs."""
    before = megabytes("VmRSS")
    stream, blocks, files = stream_of(folder, tokenizer), 0, stream_of(folder, tokenizer).documents.num_shards
    for part in np.linspace(0, files - 1, min(5, files)).astype(int):
        stream.resume({0: Position(part=int(part))}, 0, BATCH)
        end = time.process_time() + seconds / min(5, files)
        for batch in batches(stream):
            blocks += len(batch["input_ids"])
            if time.process_time() > end:
                break
    return {"files": files, "tokens": blocks * BLOCK, "MB before": before, "MB peak": megabytes("VmHWM")}


def resume_times(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Seconds to the first block."""
    stream, found = stream_of(folder, tokenizer, "0000.parquet"), {}
    rows = pq.read_metadata(folder / "0000.parquet").num_rows
    for name, row in (("beginning", 0), ("middle", rows // 2), ("nine tenths", rows * 9 // 10)):
        stream.resume({0: Position(row=row)}, 0, 1)
        start = time.process_time()
        next(iter(stream))
        found[name] = time.process_time() - start
    return found


def in_own_process(kind: str, folder: Path, tokenizer: Path, seconds: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", kind, "--folder", folder, "--tokenizer", tokenizer]
    done = subprocess.run([*map(str, command), "--seconds", str(seconds)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seconds", type=float, default=30, help="of CPU time, of reading for the memory")
    parser.add_argument("--documents", type=int, default=2000, help="how many the throughput is measured on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf_gr_streaming")
    parser.add_argument("--worker", choices=["memory", "resume"], help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
        result = (
            read_for(args.folder, tokenizer, args.seconds)
            if args.worker == "memory"
            else resume_times(args.folder, tokenizer)
        )
        print(json.dumps(result))
        return
    versions = f"hf_gr {__version__}, torch {torch.__version__}, datasets {datasets.__version__}"
    print(
        f"{date.today()}, {versions}, transformers {transformers.__version__}, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    for i, gigabytes in enumerate(args.gigabytes):
        shutil.rmtree(args.folder, ignore_errors=True)
        args.folder.mkdir(parents=True)
        try:
            write_corpus(args.folder, gigabytes)
            saved = args.folder / "tokenizer"
            sample = islice(DocumentStream(stream_of(args.folder, None).documents.dataset, "text"), 2000)
            tokenizer = train_tokenizer(sample, 4096, BLOCK)
            tokenizer.save_pretrained(saved)
            if i == 0 and args.rounds:
                for name, rates in throughput(args.folder, tokenizer, args.documents, args.rounds).items():
                    low, middle, high = min(rates), statistics.median(rates), max(rates)
                    print(f"{name}: {middle:,.0f} tokens/s ({low:,.0f} to {high:,.0f})", flush=True)
                print("seconds to the first block:", in_own_process("resume", args.folder, saved, 0), flush=True)
            print(f"{gigabytes} GB:", in_own_process("memory", args.folder, saved, args.seconds), flush=True)
        finally:
            shutil.rmtree(args.folder)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
