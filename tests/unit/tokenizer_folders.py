"""Write folders with small tokenizers of every supported kind."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from edgelm.synth import tokenizer as synth_tokenizer

TEXTS = (
    "Hello, world! The people know how to make it good.",
    "  two  spaces\n\n\ttab 12345 3.14 ",
    "def f(x):\n    return x**2  # Größe",
    "漢字かな交じり文 한국어 العربية हिन्दी",
    "🎉👩‍👩‍👧 flags 🇩🇪 and e\u0301 \u00e9 \ufffd",
    "",
    " ",
    "\n",
)


def put(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def olmoe(folder: Path, size: int = 3000, *, renamed_eos: bool = True) -> Path:
    """Byte-level BPE in OLMoE's layout."""
    folder.mkdir()
    synth_tokenizer.write_olmoe_tokenizer(folder, size, size - 1, renamed_eos=renamed_eos)
    put(folder, "config.json", {"eos_token_id": size - 1, "pad_token_id": 1})
    return folder


def gemma(folder: Path, size: int = 3000) -> Path:
    """SentencePiece in Gemma's layout with Fox's wrong configs."""
    folder.mkdir()
    synth_tokenizer.write_gemma_tokenizer(folder, size)
    for name in ("config.json", "generation_config.json"):
        put(folder, name, {"bos_token_id": 1, "eos_token_id": 2})
    return folder


def _byte_fallback_model() -> models.BPE:
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdehlort,!."]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("o", "r"), ("l", "d")]
    names += [left + right for left, right in merges]
    vocab = {name: i for i, name in enumerate(names)}
    return models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def gemma_json(folder: Path) -> Path:
    """tokenizer.json like Gemma's: BPE with byte tokens; a post-processor prepends bos."""
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(_byte_fallback_model())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<eos>", "<bos>", "<unk>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def llama_json(folder: Path) -> Path:
    """tokenizer.json like Llama 2's: encoding prepends a space, and decoding drops it."""
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(_byte_fallback_model())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<eos>", "<bos>", "<unk>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def plain_byte_level(folder: Path) -> Path:
    """Byte-level BPE with an added token of spaces, as in GPT-NeoX."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("é", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def trained_pieces(folder: Path, **options: Any) -> Path:
    """A SentencePiece model trained with `options`; the library's defaults prepend and drop a space."""
    folder.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(synth_tokenizer.SAMPLE.splitlines() * 4),
        model_writer=model,
        vocab_size=400,
        minloglevel=2,
        num_threads=1,
        **{"model_type": "bpe", "byte_fallback": True, **options},
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


KINDS = {
    "olmoe": olmoe,
    "gemma": gemma,
    "gemma_json": gemma_json,
    "llama_json": llama_json,
    "plain_byte_level": plain_byte_level,
    "pieces_defaults": trained_pieces,
    "pieces_prefix": lambda folder: trained_pieces(folder, remove_extra_whitespaces=False),
    "pieces_identity": lambda folder: trained_pieces(
        folder, remove_extra_whitespaces=False, add_dummy_prefix=False, normalization_rule_name="identity"
    ),
}


def llama(folder: Path, **settings: Any) -> Path:
    """tokenizer.model like Llama 2's, with its tokenizer class and `settings` such as `legacy`."""
    trained_pieces(folder, remove_extra_whitespaces=False, normalization_rule_name="identity")
    put(folder, "config.json", {"model_type": "llama", "eos_token_id": 2})
    put(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **settings})
    return folder


def example(folder: Path, name: str) -> Path:
    """The tokenizer files of one of the trained checkpoints in examples/."""
    folder.mkdir()
    for file in (Path(__file__).parents[2] / "examples/checkpoints" / name).glob("*.*"):
        if file.suffix in (".json", ".model") and file.name != "training.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


# Tokens that a fine-tune may add: content and flags. The first two are chat markers.
ADDITIONS: tuple[tuple[str, dict[str, bool]], ...] = (
    ("<|im_start|>", {"special": True, "normalized": False}),
    ("<|im_end|>", {"special": True, "normalized": False}),
    ("<tool>", {"normalized": True}),
    ("<left>", {"lstrip": True, "special": True, "normalized": False}),
    ("<right>", {"rstrip": True, "normalized": False}),
    ("<both>", {"lstrip": True, "rstrip": True, "normalized": True}),
    ("word", {"single_word": True, "normalized": False}),
    ("two words", {"normalized": True}),
    ("caf\u00e9", {"normalized": True}),
)


def _edit(folder: Path, name: str, **values: Any) -> None:
    file = folder / name
    put(folder, name, {**(json.loads(file.read_text()) if file.exists() else {}), **values})


def add_by_file(folder: Path, first: int) -> None:
    """added_tokens.json as written by transformers 4; the end-of-turn token is the eos_token."""
    put(folder, "added_tokens.json", {content: first + i for i, (content, _) in enumerate(ADDITIONS)})
    _edit(folder, "tokenizer_config.json", eos_token="<|im_end|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    put(folder, "tokenizer_config.json", config)


def add_by_decoder(folder: Path, first: int) -> None:
    """tokenizer_config.json with an added_tokens_decoder in addition to its entries."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": False}
    added = {str(first + i): {"content": content, **flags, **given} for i, (content, given) in enumerate(ADDITIONS)}
    _edit(
        folder,
        "tokenizer_config.json",
        added_tokens_decoder={**config.get("added_tokens_decoder", {}), **added},
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def add_by_both(folder: Path, first: int) -> None:
    """Both, and a special_tokens_map.json. The ids of the decoder take precedence."""
    add_by_file(folder, first + 3)
    add_by_decoder(folder, first)
    put(folder, "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>", "lstrip": True}})


def add_by_map(folder: Path, first: int) -> None:
    """added_tokens.json, and a special_tokens_map.json that lists which of the tokens are special."""
    add_by_file(folder, first)
    special = {"content": "<|im_start|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    put(folder, "special_tokens_map.json", {"cls_token": special, "extra_special_tokens": ["<left>", "<new>"]})


WAYS = {"none": None, "file": add_by_file, "decoder": add_by_decoder, "both": add_by_both, "map": add_by_map}
