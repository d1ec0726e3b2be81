"""Quantise with mixed precision and calibration, export, and measure the loss.

    python examples/calibrate.py examples/checkpoints/olmoe-tiny out/ --bits 4.5 --text my_corpus/

The steps of `edgelm export --bits --calibration` and `edgelm eval`, one by one: measure the loss of each matrix, choose
a recipe, calibrate the quantised values, export, and compare the bundle on this device with the float model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgelm.evaluation import EvalOptions, evaluate
from edgelm.export import ExportOptions, export_bundle
from edgelm.progress import Bars
from edgelm.quant.calibration import CalibrationOptions
from edgelm.quant.mixed_precision import mixed_precision_recipe


def main() -> None:
    """Read the arguments and run the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="float checkpoint, a folder or a hub id")
    parser.add_argument("out", type=Path, help="folder for the recipe and the bundle")
    parser.add_argument("--bits", type=float, default=4.5, help="mean bits of a weight, scales included")
    parser.add_argument("--text", default="builtin", help='a file, a folder, or "builtin"')
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, help="default: one for each core")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    progress = Bars()

    tokens = min(8192, options.samples * options.length)
    chosen = mixed_precision_recipe(
        options.checkpoint, bits=options.bits, text=options.text, tokens=tokens, progress=progress
    )
    # The recipe is a TOML file that can be edited; here it is used unchanged.
    (options.out / "recipe.toml").write_text(chosen.toml, encoding="utf-8")
    print(f"{chosen.bits:.2f} bits per weight, expected KL {chosen.predicted:.1e} nats per token before calibration")

    calibration = CalibrationOptions(text=options.text, samples=options.samples, length=options.length)
    bundle = export_bundle(
        options.checkpoint,
        options.out / "bundle",
        recipe=chosen.recipe,
        calibration=calibration,
        options=ExportOptions(threads=options.threads),
        progress=progress,
    )

    report = evaluate([bundle.path], options.checkpoint, EvalOptions(tokens=2048, speed=False), progress)
    (found,) = report.targets
    assert found.kl is not None
    print(f"KL {found.kl.mean:.2e} +- {found.kl.standard_error:.0e}, same most probable token {found.kl.top1:.1%}")


if __name__ == "__main__":
    main()
