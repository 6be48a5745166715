"""A million NF4 weights made float again: ours against torchao and bitsandbytes, one thread.

    OMP_NUM_THREADS=1 python benchmarks/nf4.py    # 1024 x 1024, double quantisation, 101 rounds

The ways take turns within a round, and ours runs twice (A/A). Rows are appended to
benchmarks/rows/nf4.jsonl. Needs torchao and bitsandbytes (pip install 'ravine[bench]').
"""

import argparse
import warnings

import torch
from versus import compare
from versus import rounds as time_rounds

from ravine.callbacks.quantization import nf4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from torchao.quantization import NF4Tensor

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024) * 0.02
    parts = list(nf4.quantize(weight).values())
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    packed = NF4Tensor.from_tensor(weight, 64, 256)

    def quantize_ravine() -> torch.Tensor:
        return nf4.dequantize(weight.shape, torch.float32, *parts)

    ways = {
        "ours": quantize_ravine,
        "torchao": packed.get_original_weight,
        "bitsandbytes": lambda: dequantize_4bit(codes, state),
        "ours again": quantize_ravine,
    }
    error = {
        name: round(float((way() - weight).norm() / weight.norm()), 5) for name, way in ways.items()
    }
    what = "a million NF4 weights made float again"
    packages = ["torchao", "bitsandbytes"]
    compare("nf4", what, time_rounds(ways, rounds, 10), packages, relative_rms_error=error)


if __name__ == "__main__":
    main()
