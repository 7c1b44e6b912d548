"""Tokens per second and memory of a packed stream, beside tokenizing everything first.

    python benchmarks/streaming.py --gigabytes 1 10 --seconds 60

1. Throughput: one file of the corpus, (a) tokenized by `map`, packed into an Arrow file, and read in batches; (b) read
   as a stream. In one process, interleaved, in a new order each round; medians, of wall and of CPU time.
2. Memory: for each size of the corpus, a process of its own reads the stream for `--seconds` seconds, a fifth of them
   from each of five files that are spread over it, and reports the peak of its resident memory.
3. Resuming: the seconds to the first block, at the beginning of a file and at its last window.

The text is synthetic: sentences of English words, drawn anew for each document of about 5 kB. The files are written to
`--folder` and removed.
"""

import argparse
import json
import os
import random
import resource
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
    sentences = [" ".join(draw.choices(words, k=draw.randint(5, 20))).capitalize() + "." for _ in range(50_000)]
    schema = pa.schema({"text": pa.string()})
    for i in range(round(gigabytes * 1e9 / FILE_BYTES)):
        with pq.ParquetWriter(folder / f"{i:04}.parquet", schema, compression="none", use_dictionary=False) as writer:
            written = 0
            while written < FILE_BYTES:
                texts = [" ".join(draw.choices(sentences, k=draw.randint(20, 90))) for _ in range(ROWS_PER_GROUP)]
                writer.write_table(pa.table({"text": texts}, schema))
                written += sum(map(len, texts))


def stream_of(folder: Path, tokenizer: PreTrainedTokenizerFast, file: str = "*.parquet") -> PackedStream:
    data = load_dataset("parquet", data_files=str(folder / file), streaming=True, split="train")
    return PackedStream(DocumentStream(data, "text"), tokenizer, BLOCK)


def batches(data: torch.utils.data.Dataset) -> DataLoader:
    return DataLoader(data, batch_size=BATCH, collate_fn=default_data_collator)


# ---- Throughput ----


def by_map(folder: Path, tokenizer: PreTrainedTokenizerFast, documents: int) -> dict[str, float]:
    """Seconds to tokenize and pack, and to read all blocks once."""
    data = load_dataset("parquet", data_files=str(folder / "0000.parquet"), split=f"train[:{documents}]")
    datasets.disable_caching()
    start = clocks()
    blocks = pack(data, tokenizer, "text", BLOCK)
    packed = clocks()
    tokens = sum(batch["input_ids"].numel() for batch in batches(blocks))
    return rates("tokenize and pack first", tokens, start, packed) | rates(
        "read what is packed", tokens, packed, clocks()
    )


def by_stream(folder: Path, tokenizer: PreTrainedTokenizerFast, documents: int) -> dict[str, float]:
    stream = stream_of(folder, tokenizer, "0000.parquet")
    stream.documents = DocumentStream(stream.documents.dataset, "text", stop=documents)
    count = len(stream.take(10**9)) // BATCH
    start = clocks()
    tokens = sum(batch["input_ids"].numel() for batch in islice(batches(stream), count))
    return rates("stream", tokens, start, clocks())


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def rates(name: str, tokens: int, start: tuple[float, float], end: tuple[float, float]) -> dict[str, float]:
    return {f"{name}, {kind}": tokens / (b - a) for kind, a, b in zip(("wall", "CPU"), start, end, strict=True)}


def throughput(folder: Path, tokenizer: PreTrainedTokenizerFast, documents: int, rounds: int) -> dict[str, float]:
    contestants: list[Callable] = [by_map, by_stream]
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        random.shuffle(contestants)
        for contestant in contestants:
            for name, rate in contestant(folder, tokenizer, documents).items():
                found.setdefault(name, []).append(rate)
    return {name: statistics.median(values) for name, values in found.items()}


# ---- Memory and resuming, each in a process of its own ----


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def read_for(folder: Path, tokenizer: PreTrainedTokenizerFast, seconds: float) -> dict[str, float]:
    """What a process that reads `seconds` of the stream in all, in five files, needs."""
    before = resident_megabytes()
    stream, blocks, files = stream_of(folder, tokenizer), 0, stream_of(folder, tokenizer).documents.num_shards
    for part in np.linspace(0, files - 1, min(5, files)).astype(int):
        stream.resume({0: Position(part=int(part))}, 0, BATCH)
        end = time.perf_counter() + seconds / min(5, files)
        for batch in batches(stream):
            blocks += len(batch["input_ids"])
            if time.perf_counter() > end:
                break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"files": files, "tokens": blocks * BLOCK, "MB before": before, "MB peak": peak}


def resume_times(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Seconds to the first block."""
    stream, found = stream_of(folder, tokenizer, "0000.parquet"), {}
    rows = pq.read_metadata(folder / "0000.parquet").num_rows
    for name, row in (("beginning", 0), ("middle", rows // 2), ("nine tenths", rows * 9 // 10)):
        stream.resume({0: Position(row=row)}, 0, 1)
        start = time.perf_counter()
        next(iter(stream))
        found[name] = time.perf_counter() - start
    return found


def in_own_process(kind: str, folder: Path, tokenizer: Path, seconds: float) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", kind, "--folder", folder, "--tokenizer", tokenizer]
    done = subprocess.run([*map(str, command), "--seconds", str(seconds)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seconds", type=float, default=60, help="how long the stream is read for the memory")
    parser.add_argument("--documents", type=int, default=3000, help="how many the throughput is measured on")
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
            if i == 0:
                for name, rate in throughput(args.folder, tokenizer, args.documents, args.rounds).items():
                    print(f"{name}: {rate:,.0f} tokens/s", flush=True)
                print("seconds to the first block:", in_own_process("resume", args.folder, saved, 0), flush=True)
            print(f"{gigabytes} GB:", in_own_process("memory", args.folder, saved, args.seconds), flush=True)
        finally:
            shutil.rmtree(args.folder)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
