"""Train both tokenizers and write their files like those of the published checkpoints, inconsistencies included."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

Encode = Callable[[str], list[int]]

OLMOE_TOKENS = 2024  # the embedding has 2048 rows: padded, like the published one
FOX_TOKENS = 3072

# The chat templates of the published models: role markers are plain text, and turns end with the end-of-text token.
OLMOE_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
FOX_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def olmoe_tokenizer(texts: list[str], out: Path) -> Encode:
    """Train byte-level BPE like GPT-NeoX's: id 0 is a masking token, 1 is padding, the last id is bos and eos."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=OLMOE_TOKENS - 1,
        special_tokens=["|||IP_ADDRESS|||", "<|padding|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    end = OLMOE_TOKENS - 1
    assert (tokenizer.token_to_id("<|padding|>"), tokenizer.token_to_id("<|endoftext|>")) == (1, end)
    tokenizer.save(str(out / "tokenizer.json"))
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                "0": {"content": "|||IP_ADDRESS|||", **token},
                "1": {"content": "<|padding|>", **token},
                str(end): {"content": "<|endoftext|>", **token},
            },
            "bos_token": "<|endoftext|>",
            "chat_template": OLMOE_CHAT,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "model_max_length": 512,
            "pad_token": "<|padding|>",
            "tokenizer_class": "GPTNeoXTokenizer",
            "unk_token": None,
        },
    )
    return lambda text: [*tokenizer.encode(text).ids, end]


def fox_tokenizer(texts: list[str], out: Path) -> Encode:
    """Train SentencePiece BPE with byte fallback and Gemma's ids: pad 0, eos 1, bos 2, unk 3."""
    import sentencepiece

    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=FOX_TOKENS,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        # Training sees single lines, so it would not find a piece for newlines.
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", *("\n" * n for n in range(1, 4))],
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert processor.vocab_size() == FOX_TOKENS
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {str(processor.piece_to_id(s)): {"content": s, **token} for s in special},
            "bos_token": "<bos>",
            "chat_template": FOX_CHAT,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<eos>",
            "legacy": None,
            "model_max_length": 512,
            "pad_token": "<pad>",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )
    return lambda text: [*processor.encode(text), 1]
