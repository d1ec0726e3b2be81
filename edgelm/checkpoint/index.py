"""Find the weight files of a checkpoint folder, and check them against the index."""

from __future__ import annotations

from pathlib import Path

from edgelm.checkpoint.jsonfile import read_json_object
from edgelm.checkpoint.safetensors import SafetensorsFile
from edgelm.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20  # the largest published index has 140 000 tensors in 14 MB
MAX_INDEX_TENSORS = 400_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def _check_file_name(index: Path, tensor: str, file: object) -> str:
    # Shards must lie in the folder of their index. Symbolic links are allowed: the hub's cache consists of them.
    plain = isinstance(file, str) and file == Path(file).name and not set(file) & set('/\\:\0"') and len(file) < 200
    if not plain or not isinstance(file, str) or file in ("", ".", ".."):
        raise CheckpointError(
            f"{index}: tensor {tensor!r} is said to be in {str(file)[:200]!r}, which is not a file of this folder; "
            "do not use this checkpoint unless you trust where it came from"
        )
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{index}: tensor {tensor!r} is in {file!r}; only .safetensors files are read")
    return file


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index, MAX_INDEX_BYTES, MAX_INDEX_TENSORS).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; fetch the file again")
    return {tensor: _check_file_name(index, tensor, file) for tensor, file in weight_map.items()}


def _open_sharded(index: Path) -> list[SafetensorsFile]:
    weight_map = _weight_map(index)
    first_tensor: dict[str, str] = {}
    for tensor, file in weight_map.items():
        first_tensor.setdefault(file, tensor)
    missing = [file for file in sorted(first_tensor) if not (index.parent / file).exists()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: shard {missing[0]!r} is missing (it holds {first_tensor[missing[0]]!r}; "
            f"{len(missing)} of {len(first_tensor)} shards are missing in all); download the checkpoint again"
        )
    files = [SafetensorsFile(index.parent / file) for file in sorted(first_tensor)]
    found = {name: file.path.name for file in files for name in file.tensors}
    for tensor, file in weight_map.items():
        if tensor not in found:
            raise CheckpointError(f"{index.parent / file}: tensor {tensor!r} is missing, {index.name} says it is there")
        if found[tensor] != file:
            raise CheckpointError(
                f"{index}: tensor {tensor!r} is in {found[tensor]}, not in {file}; download the checkpoint again"
            )
    for file_ in files:
        for tensor in file_.tensors:
            if weight_map.get(tensor) != file_.path.name:
                raise CheckpointError(
                    f"{file_.path}: extra tensor {tensor!r}, which {index.name} does not list in this file; "
                    "download the checkpoint again"
                )
    return files


def open_weight_files(folder: Path) -> list[SafetensorsFile]:
    """Open the safetensors files of a folder, sorted by name.

    `model.safetensors` comes before an index, as in transformers. Without both, a single `*.safetensors` is opened.

    Raises:
        CheckpointError: there are no such files, or index and files disagree.
    """
    if (folder / SINGLE).exists():
        return [SafetensorsFile(folder / SINGLE)]
    if (folder / INDEX).exists():
        return _open_sharded(folder / INDEX)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return [SafetensorsFile(files[0])]
    if files:
        raise CheckpointError(
            f"{folder}: {len(files)} .safetensors files but no {INDEX}; download the checkpoint again"
        )
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: the weights are pickle files ({pickles[0]}), which can run code when they are loaded and are "
            "not read; convert them with transformers' save_pretrained(..., safe_serialization=True)"
        )
    is_bundle = (folder / "manifest.json").is_file()
    what = "this is a bundle, give the checkpoint it was made from" if is_bundle else "is this a checkpoint folder?"
    raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}; {what}")
