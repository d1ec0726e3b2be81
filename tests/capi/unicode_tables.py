"""Write the tables of unicode.h: properties, case and normal forms, as the `tokenizers` library has them.

The library is asked about every code point, since its parts are of different versions of Unicode: its regular
expressions (Oniguruma) of 16, Rust's standard library of 17, normal forms of 12. Upper and title case, which only chat
templates use, are Python's, with the pairs that Rust has besides.

    python tests/capi/unicode_tables.py [--check]
"""

from __future__ import annotations

import bisect
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

OUT = Path(__file__).parents[2] / "runtimes/csrc/capi/common/unicode/tables.inc"
CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
NAMES = "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCsCoCn"
CATEGORIES = [NAMES[i : i + 2] for i in range(0, len(NAMES), 2)]
HANGUL = range(0xAC00, 0xAC00 + 11172)
BLOCK = 4096
LAST_BLOCK = 0x330  # of 256 characters; beyond it there are few records


def kept(change: Callable[[str], str]) -> set[int]:
    """Return the code points that `change` does not remove from a text."""
    blocks = ("".join(map(chr, CODES[start : start + BLOCK])) for start in range(0, len(CODES), BLOCK))
    return {ord(character) for block in blocks for character in change(block)}


def matched(pattern: str) -> set[int]:
    """Return the code points that a regular expression of the library matches."""
    return set(CODES) - kept(normalizers.Replace(Regex(pattern), "").normalize_str)


def joined(split: pre_tokenizers.PreTokenizer) -> Callable[[str], str]:
    """Return a function that removes what `split` does."""
    return lambda text: "".join(part for part, _ in split.pre_tokenize_str(text))


def numeric() -> set[int]:
    """Return the digits by the library's step for them."""
    digits = set()
    for start in range(0, len(CODES), BLOCK):
        block = CODES[start : start + BLOCK]
        text = "a".join(map(chr, block))
        for part, _ in pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(f"a{text}a"):
            if len(part) == 1 and part != "a":
                digits.add(ord(part))
    return digits


def words() -> set[int]:
    """Return the characters next to which a token with `single_word` does not match."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens([AddedToken("Q", single_word=True)])
    found = tokenizer.encode_batch([f"{chr(code)}Q" for code in CODES])
    return {code for code, encoding in zip(CODES, found, strict=True) if not encoding.ids}


def combining_classes() -> dict[int, int]:
    """Return Python's classes where the library reorders the character."""
    decompose = normalizers.NFD().normalize_str
    classes = {}
    for code in CODES:
        number = unicodedata.combining(chr(code))
        other = "\u0301" if number == 1 else "\u0334"  # of class 230 and 1
        pair = f"{other}{chr(code)}" if number == 1 else f"{chr(code)}{other}"
        if number and decompose(pair) != pair:
            classes[code] = number
    return classes


def records() -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """Return where records begin, with their numbers, and the records: category, flags, combining class."""
    category = dict.fromkeys(range(0xD800, 0xE000), CATEGORIES.index("Cs"))
    for number, name in enumerate(CATEGORIES):
        category |= dict.fromkeys(matched(rf"\p{{{name}}}"), number)
    marks = normalizers.StripAccents().normalize_str
    flags = (
        matched(r"\p{Alphabetic}"),
        matched(r"\p{Uppercase}"),
        matched(r"\p{Lowercase}"),
        matched(r"\p{Case_Ignorable}"),
        set(CODES) - kept(joined(pre_tokenizers.Punctuation("removed"))),
        set(CODES) - kept(marks),
        numeric(),
    )
    letters = {number for number, name in enumerate(CATEGORIES) if name[0] == "M" or name in (NAMES[16:18], "Pc")}
    expected = flags[0] | {code for code, number in category.items() if number in letters} | {0x200C, 0x200D}
    assert words() == expected, "a word is something else now: change is_word"
    classes = combining_classes()
    numbers: dict[tuple[int, int, int], int] = {}
    starts = []
    for code in range(0x110000):
        bits = sum(1 << bit for bit, codes in enumerate(flags) if code in codes)
        record = (category[code], bits, classes.get(code, 0))
        number = numbers.setdefault(record, len(numbers))
        if not starts or starts[-1][1] != number:
            starts.append((code, number))
    return starts, list(numbers)


def case_maps() -> tuple[dict[int, str], dict[int, str], dict[int, str]]:
    """Return lower, upper and title case of the characters that have another."""
    rust = normalizers.Lowercase().normalize_str
    lower = {code: rust(chr(code)) for code in CODES if rust(chr(code)) != chr(code)}
    upper = {code: chr(code).upper() for code in CODES if chr(code).upper() != chr(code)}
    for code, small in lower.items():
        if unicodedata.category(chr(code)) == "Cn" and len(small) == 1:
            upper.setdefault(ord(small), chr(code))
    title = {code: chr(code).title() for code in CODES if chr(code).title() != upper.get(code, chr(code))}
    title = {code: text for code, text in title.items() if text != chr(code) or unicodedata.category(chr(code)) != "Cn"}
    return lower, upper, title


def runs(mapping: dict[int, str]) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, ...]]]:
    """Return runs of characters whose maps have one distance (first, last, step, distance), and all other maps."""
    single = {code: ord(text) - code for code, text in mapping.items() if len(text) == 1}
    result: list[tuple[int, int, int, int]] = []
    for code, distance in sorted(single.items()):
        if result:
            first, last, step, previous = result[-1]
            gap = code - last
            if distance == previous and (gap == step or (first == last and gap <= 2)):
                result[-1] = (first, code, gap, distance)
                continue
        result.append((code, code, 1, distance))
    others = [(code, *(map(ord, text.ljust(3, "\0")))) for code, text in sorted(mapping.items()) if len(text) != 1]
    return result, others


def decompositions() -> tuple[list[tuple[int, int, int, int]], list[int], list[int]]:
    """Return ranges of characters with decompositions (first, count, index, kind), values, and texts in UTF-16.

    Kind 1: only a compatibility decomposition; 2: the values are characters, not places in the texts. A character with
    both gets two ranges, first the canonical one. A text begins with its size.
    """
    canonical, compatible = normalizers.NFD().normalize_str, normalizers.NFKD().normalize_str
    entries = []
    for code in (code for code in CODES if code not in HANGUL):
        character = chr(code)
        texts = (canonical(character), compatible(character))
        if texts[0] != character:
            entries.append((code, 0, texts[0]))
        if texts[1] != texts[0]:
            entries.append((code, 1, texts[1]))
    ranges: list[tuple[int, int, int, int]] = []
    values: list[int] = []
    pool: list[int] = []
    places: dict[str, int] = {}
    for code, kind, text in sorted(entries, key=lambda entry: (entry[1], entry[0])):
        data = text.encode("utf-16-le")
        units = [int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2)]
        kind |= 2 * (len(units) == 1)
        if len(units) > 1 and text not in places:
            places[text] = len(pool)
            pool += [len(units), *units]
        if ranges and ranges[-1][0] + ranges[-1][1] == code and ranges[-1][3] == kind:
            first, count, index, _ = ranges[-1]
            ranges[-1] = (first, count + 1, index, kind)
        else:
            ranges.append((code, 1, len(values), kind))
        values.append(units[0] if len(units) == 1 else places[text])
    return ranges, values, pool


def compositions() -> list[tuple[int, int, int]]:
    """Return pairs of characters that the library composes: first, second, composite."""
    canonical, composed = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
    result = []
    for code in (code for code in CODES if code not in HANGUL):
        text = canonical(chr(code))
        if len(text) > 1 and composed(text) == chr(code):
            first = composed(text[:-1])
            assert len(first) == 1, hex(code)
            result.append((ord(first), ord(text[-1]), code))
    return sorted(result)


def array(kind: str, name: str, rows: Iterable[Sequence[int] | int]) -> str:
    """Return the definition of an array."""
    items = [str(row) if isinstance(row, int) else "{" + ", ".join(map(str, row)) + "}" for row in rows]
    lines = [""]
    for item in items:
        if len(lines[-1]) + len(item) + 4 > 118:
            lines.append("")
        lines[-1] += f" {item},"
    body = "\n ".join(lines)
    return f"constexpr {kind} {name}[] = {{\n {body}\n}};\n"


def tables() -> str:
    """Return the file."""
    starts, kinds = records()
    codes = [code for code, _ in starts]
    blocks = [bisect.bisect_right(codes, block << 8) - 1 for block in range(LAST_BLOCK + 1)]
    parts = [
        "// Written by tests/capi/unicode_tables.py. Do not edit.",
        "// clang-format off",
        array("Record", "kRecords", kinds),
        "// Where a record begins to apply: code point << 8 | record.",
        array("std::uint32_t", "kStarts", [code << 8 | number for code, number in starts]),
        "// For each 256 characters, the entry of kStarts that applies to the first.",
        array("std::uint16_t", "kBlocks", blocks),
    ]
    for name, mapping in zip(("Lower", "Upper", "Title"), case_maps(), strict=True):
        several, others = runs(mapping)
        parts.append(array("CaseRun", f"k{name}Runs", several))
        if others:
            parts.append(array("CaseSpecial", f"k{name}Special", others))
    ranges, values, pool = decompositions()
    parts += [
        array("Decomposed", "kDecomposed", [(code << 2 | kind, *rest) for code, *rest, kind in ranges]),
        array("std::uint16_t", "kDecomposedValues", values),
        array("char16_t", "kDecomposedTexts", pool),
        array("Composed", "kComposed", [row for row in compositions() if max(row) < 0x10000]),
        array("ComposedWide", "kComposedWide", [row for row in compositions() if max(row) >= 0x10000]),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    text = tables()
    if "--check" not in sys.argv:
        OUT.write_text(text)
    elif OUT.read_text() != text:
        sys.exit(f"{OUT.name} is not what the installed libraries give; run {Path(__file__).name}")
