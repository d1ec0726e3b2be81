"""Choose the recipe with the least expected loss within a number of bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.checkpoint import Checkpoint
from edgelm.corpus import BUILTIN, Corpus, read_corpus, windows
from edgelm.errors import RecipeError
from edgelm.progress import Progress, Silent
from edgelm.quant.mixed_precision.losses import Sensitivity
from edgelm.quant.mixed_precision.recipe_toml import Choice, make_recipe, to_toml
from edgelm.quant.mixed_precision.sensitivity import Measured, measure
from edgelm.quant.mixed_precision.solve import Option, solve
from edgelm.quant.mixed_precision.units import Unit, find_units, fixed_bytes
from edgelm.quant.recipe import FLOAT, Recipe
from edgelm.quant.scheme import INTEGER_BITS, AnyScheme, Scheme, parse_scheme
from edgelm.quant.source import refuse_quantized
from edgelm.tokenization.tokenizer import Tokenizer

_GROUPS = {3: (32, 64, 128), 4: (32, 64, 128), 5: (32, 64, 128), 6: (32, 64, 128), 8: (64, 128)}
SCHEMES = tuple(f"int{bits}-g{group}-sym" for bits, groups in _GROUPS.items() for group in groups)
"""Default candidates: every number of bits, with the groups that are worth their bytes."""
TOKENS = 8192
LENGTH = 256


@dataclass(frozen=True)
class MixedPrecision:
    """A mixed-precision recipe with its expected loss and size.

    Attributes:
        recipe: The recipe.
        toml: The recipe as TOML, with comments on what each rule costs.
        choices: Scheme, loss and bytes of every unit.
        predicted: Expected KL(float || quantised) in nats per token, with weights rounded to nearest, on text like the
            one measured with.
        bound: Lower bound of `predicted` for any choice among the candidates.
        nbytes: Bytes of the units in a native bundle.
        file_bytes: Upper limit for the whole weights file of a native bundle, in bytes.
        bits: Mean bits per weight over the units, scales included.
        text: Name of the text measured with.
        tokens: Number of its tokens.
        notes: Notes for the user.
    """

    recipe: Recipe
    toml: str
    choices: Sequence[Choice]
    predicted: float
    bound: float
    nbytes: int
    file_bytes: int
    bits: float
    text: str
    tokens: int
    notes: tuple[str, ...] = ()


def parse_candidates(names: str) -> list[AnyScheme | None]:
    """Parse a list of schemes such as "int3-g32,int4-g64-sym,float"; "-sym" is the default, and float gives None.

    Raises:
        RecipeError: A name is not a scheme, or the list is empty.
    """
    found: list[AnyScheme | None] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        symmetric = name.startswith("int") and not name.endswith(("-sym", "-asym"))
        found.append(None if name == FLOAT else parse_scheme(f"{name}-sym" if symmetric else name))
    if not found:
        raise RecipeError("no schemes to choose from: give names such as int3-g32,int4-g32,int8-g128")
    return list(dict.fromkeys(found))


def mixed_precision_recipe(
    checkpoint: str | Path | Checkpoint,
    *,
    bits: float | None = None,
    max_size: int | None = None,
    text: str | Path | Corpus = BUILTIN,
    tokens: int = TOKENS,
    schemes: Sequence[AnyScheme | None] | None = None,
    factors: Mapping[int, float] | None = None,
    name: str = "mixed-precision",
    progress: Progress | None = None,
) -> MixedPrecision:
    """Choose a scheme for every matrix and every expert of a float checkpoint, for the least loss at a given size.

    The loss of each matrix in each scheme is measured on a text (`edgelm.quant.mixed_precision.sensitivity`).

    Args:
        checkpoint: Folder, hub id or open checkpoint.
        bits: Mean bits per weight over all matrices except routers, scales included. Give this or `max_size`.
        max_size: Largest size of a native bundle's weights file, in bytes.
        text: Text to measure with: a UTF-8 file, a folder, "builtin" (without its held-out part), or a `Corpus`.
        tokens: Tokens to measure with, in windows of at most 256.
        schemes: Candidates; None in the list means float. Default: `SCHEMES`.
        factors: By bits, the share of the loss that a better method than rounding to nearest leaves; 1 if not given.
        name: Name of the recipe.
        progress: Gets every layer.

    Returns:
        The recipe, with its expected loss and size.

    Raises:
        RecipeError: Both or neither of `bits` and `max_size` are given, they are too small, or the checkpoint is
            quantised already.
        EdgeLMError: There is too little text.
    """
    if (bits is None) == (max_size is None):
        raise RecipeError("give either bits or max_size, not both or neither")
    if not isinstance(checkpoint, Checkpoint):
        with Checkpoint.open(checkpoint, progress) as opened:
            return mixed_precision_recipe(
                opened, bits=bits, max_size=max_size, text=text, tokens=tokens, schemes=schemes, factors=factors,
                name=name, progress=progress,
            )  # fmt: skip
    plan = _Plan.of(checkpoint, bits, max_size, schemes)
    corpus = text if isinstance(text, Corpus) else read_corpus(text)
    length = min(LENGTH, plan.context, max(2, tokens))
    sample = windows(Tokenizer.from_folder(checkpoint.path), corpus.documents, max(1, tokens // length), length)
    measured = measure(checkpoint, sample, plan.quantised, nominal=plan.nominal, progress=progress)
    result = plan.choose(measured, factors or {}, name, corpus.name, len(sample) * length)
    for note in result.notes:
        (progress or Silent()).note(note)
    return result


@dataclass(frozen=True)
class _Plan:
    """Everything known before the measurement.

    Attributes:
        units: The units to choose schemes for.
        candidates: Schemes; None for float.
        room: Bytes for the units.
        fixed: Bytes of the rest of the weights file.
        context: Longest sequence of the model.
        has_router: Whether the model has routers, which stay float.
    """

    units: Sequence[Unit]
    candidates: Sequence[AnyScheme | None]
    room: int
    fixed: int
    context: int
    has_router: bool

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        bits: float | None,
        max_size: int | None,
        schemes: Sequence[AnyScheme | None] | None,
    ) -> _Plan:
        """Make the plan.

        Raises:
            RecipeError: The limit is below the smallest possible size, or the checkpoint is quantised already.
        """
        refuse_quantized(checkpoint)
        candidates = [parse_scheme(scheme) for scheme in SCHEMES] if schemes is None else list(schemes)
        if not candidates:
            raise RecipeError("no schemes to choose from: give names such as int3-g32,int4-g32,int8-g128")
        decoder = checkpoint.decoder
        units, fixed = find_units(decoder), fixed_bytes(decoder)
        weights = sum(unit.weights for unit in units)
        room = int(bits * weights / 8) if bits is not None else (max_size or 0) - fixed
        smallest = sum(min(unit.nbytes(scheme) for scheme in candidates) for unit in units)
        if room < smallest:
            least = f"{_ceil(8 * smallest / weights)} bits" if bits is not None else f"{smallest + fixed} bytes"
            asked = f"{bits:g} bits" if bits is not None else f"{max_size} bytes"
            smaller = "" if schemes is None else ", or name smaller schemes"
            raise RecipeError(
                f"the limit of {asked} is too small: these schemes take at least {least}. Allow more{smaller}"
            )
        return cls(units, candidates, room, fixed, decoder.context_length, decoder.first_moe is not None)

    @property
    def weights(self) -> int:
        """Number of weights in all units."""
        return sum(unit.weights for unit in self.units)

    @property
    def quantised(self) -> list[AnyScheme]:
        """The candidates without float."""
        return [scheme for scheme in self.candidates if scheme is not None]

    @property
    def nominal(self) -> AnyScheme:
        """The integer scheme with groups of 32 whose size is nearest to the limit."""
        bits = 8 * self.room / self.weights
        return min((Scheme(width, 32) for width in INTEGER_BITS), key=lambda scheme: abs(scheme.bits + 0.5 - bits))

    def choose(
        self, measured: Measured, factors: Mapping[int, float], name: str, text: str, tokens: int
    ) -> MixedPrecision:
        """Choose the schemes for the measured losses."""
        options = [[self._choice(one, scheme, factors) for scheme in self.candidates] for one in measured.units]
        solution = solve([[Option(c.nbytes, c.loss) for c in choices] for choices in options], self.room)
        choices = [found[pick] for found, pick in zip(options, solution.picks, strict=True)]
        bits = 8 * solution.nbytes / self.weights
        notes = []
        if all(choice.nbytes == max(c.nbytes for c in found) for choice, found in zip(choices, options, strict=True)):
            notes.append(
                f"the limit is above the largest possible size: every matrix has its largest scheme, {bits:.2f} bits"
            )
        unseen = sum(one.tokens == 0 for one in measured.units if one.unit.kind == "expert down")
        if unseen:
            notes.append(f"{unseen} experts saw no token and are taken to matter little: give more or other text")
        predicted = solution.loss + measured.swaps
        recipe, comments = make_recipe(name, choices, self.has_router)
        head = [
            f"{bits:.3f} bits per weight, {solution.nbytes} bytes; with norms, routers and padding at most "
            f"{solution.nbytes + self.fixed}.",
            f"Expected KL to the float model {predicted:.2e} nats per token (weights rounded to nearest; at least "
            f"{solution.bound + measured.swaps:.2e} with these schemes),",
            f"measured with {tokens} tokens of {text}. The first rule that matches decides: edit freely.",
            *notes,
        ]
        return MixedPrecision(
            recipe=recipe,
            toml=to_toml(recipe, comments, head),
            choices=choices,
            predicted=predicted,
            bound=solution.bound + measured.swaps,
            nbytes=solution.nbytes,
            file_bytes=solution.nbytes + self.fixed,
            bits=bits,
            text=text,
            tokens=tokens,
            notes=tuple(notes),
        )

    def _choice(self, one: Sensitivity, scheme: AnyScheme | None, factors: Mapping[int, float]) -> Choice:
        unit, loss = one.unit, 0.0
        if scheme is not None:
            scheme = unit.effective(scheme)
            loss = one.losses[scheme.name] * factors.get(scheme.bits, 1.0)
        return Choice(unit, scheme, loss, unit.nbytes(scheme), one.tokens)


def _ceil(bits: float) -> float:
    """Round up to two digits, so that the number in the message is large enough."""
    return math.ceil(100 * bits) / 100
