"""Convert a checkpoint for OpenVINO, with optimum-intel and NNCF's weight compression.

    python tests/bench/openvino_from_checkpoint.py CHECKPOINT OUT --width int4|int8 [--group 64]

int4 is symmetric, with all matrices of the layers in groups (ratio 1.0), and embedding and head in int8, the default.
int8 is symmetric per channel. No tokenizer is written, since the benchmark uses token ids. Runs in the environment of
OpenVINO.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

GROUP = 64


def convert(checkpoint: Path, out: Path, width: str, group: int = GROUP) -> None:
    """Write the stateful IR of `checkpoint` to the folder `out`; on an error nothing is written."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    scheme = (
        OVWeightQuantizationConfig(bits=4, sym=True, group_size=group, ratio=1.0)
        if width == "int4"
        else OVWeightQuantizationConfig(bits=8, sym=True)
    )
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, stateful=True, quantization_config=scheme, tokenizer=None
    )
    model.save_pretrained(unfinished)
    unfinished.rename(out)


def main() -> int:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", required=True, choices=["int4", "int8"])
    parser.add_argument("--group", type=int, default=GROUP)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: remove it, or name another folder")
    convert(options.checkpoint, options.out, options.width, options.group)
    return 0


if __name__ == "__main__":
    sys.exit(main())
