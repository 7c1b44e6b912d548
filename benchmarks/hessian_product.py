"""What a product of the Hessian and a vector costs, in each of two ways, against a plain forward and backward pass.

    python benchmarks/hessian_product.py --threads 1 2

All kinds run in one process, interleaved in a new order each round; what is reported are medians of the ratios within a
round, with the range of their middle half. The last column is ||difference - exact|| / ||exact||.
"""

import argparse
import platform
import random
import statistics
from datetime import date

import torch
from gr_step import interleave, ratio
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, logging

from hf_gr import __version__
from hf_gr.analysis import curvature
from hf_gr.models.presets import create_vit
from hf_gr.optim.ascents import length


def vit(batch: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = create_vit("vit-ti", [str(i) for i in range(10)], dropout=0.0)
    return model, {"pixel_values": torch.randn(batch, 3, 32, 32), "labels": torch.randint(0, 10, (batch,))}


def llama(batch: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
    )
    ids = torch.randint(0, 2048, (batch, 64))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def product(name: str, model: nn.Module, inputs: dict[str, torch.Tensor], rounds: int, threads: int) -> str:
    generator = torch.Generator().manual_seed(0)
    model.eval()  # as the products are measured

    def plain():
        model.zero_grad()
        model(**inputs).loss.backward()

    with curvature._measured(model, lambda model, batch: model(**batch).loss, [inputs], curvature.alone) as loss:
        v = [curvature._like(p, curvature._signs(p.shape, generator)) for p in loss.params]
        found = {}

        def measure(method):
            found[method] = loss.product(v, method)

        kinds = {"plain": plain, **{method: lambda method=method: measure(method) for method in curvature.METHODS}}
        seconds = interleave(kinds, rounds)
    errors = [a - b for a, b in zip(found["difference"], found["exact"], strict=True)]
    name = f"{name}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M, {threads} thread{'s' * (threads > 1)}"
    return (
        f"| {name} | {statistics.median(seconds['plain']):.2f} s | {ratio(seconds, 'difference', 'plain')} "
        f"| {ratio(seconds, 'exact', 'plain')} | {length(errors) / length(found['exact']):.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    logging.set_verbosity_error()
    random.seed(0)

    print(
        f"{date.today()}, hf_gr {__version__}, torch {torch.__version__}, {platform.processor() or 'CPU'}; medians of"
    )
    print(f"{options.rounds} paired ratios, the middle half in brackets.\n")
    print("| | plain pass | difference / plain | exact / plain | error of the difference |\n|---|---|---|---|---|")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, create in (("ViT-Ti", vit), ("Llama", llama)):
            torch.manual_seed(0)
            print(product(f"{name}, batch {options.batch}", *create(options.batch), options.rounds, threads))


if __name__ == "__main__":
    main()
