"""Copy a bundle and flip one bit of one expert's weights in the copy, to see what `edgelm parity` says of it.

edgelm export examples/checkpoints/olmoe-tiny -o olmoe-int4
python examples/damage.py olmoe-int4 damaged --layer 1 --expert 5
edgelm parity damaged
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path


def damage(bundle: Path, copy: Path, layer: int, expert: int) -> str:
    """Copy the bundle and flip one bit of one expert's weights.

    Args:
        bundle: a bundle for the CPU with native operators, of a mixture-of-experts model.
        copy: the folder to write; replaced where it exists.
        layer: index of the layer, from 0.
        expert: index of the expert, from 0.

    Returns:
        What was damaged, in words.

    Raises:
        SystemExit: the bundle has no such expert.
    """
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    count = manifest["model"].get("num_experts") or 0
    tensors = [
        tensor
        for tensor in manifest["tensors"]
        if tensor["layer"] == layer and tensor["contents"]["layout"] == "packed-experts"
    ]
    if not tensors or not 0 <= expert < count:
        layers = manifest["model"]["num_layers"]
        sys.exit(f"{bundle} has no expert {expert} in layer {layer}: it has {count} experts in each of {layers} layers")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bundle, copy)
    # The weights of a layer's experts lie one expert after the other.
    size = tensors[0]["size"] // count
    place = tensors[0]["offset"] + size * expert + size // 4
    with (copy / "model.onnx.data").open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0x80]))
    return f"{copy}: flipped one bit of layer {layer}, expert {expert}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("copy", type=Path)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--expert", type=int, default=7)
    options = parser.parse_args()
    print(damage(options.bundle, options.copy, options.layer, options.expert))
