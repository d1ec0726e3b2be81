"""The models of a server: loaded at start or with their first request, and unloaded when another needs the memory."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from edgelm.bundle import Bundle
from edgelm.bundle.kv_cache import row_bytes
from edgelm.errors import EdgeLMError
from edgelm.json_dataclass import ErrorFactory, read_json
from edgelm.serving.api.answers import ModelEntry
from edgelm.serving.api.errors import ApiError
from edgelm.serving.engine.cache_folder import CacheFolder
from edgelm.serving.settings import Settings
from edgelm.sizes import format_size
from edgelm.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from edgelm.serving.constraints import GrammarTokenizer
    from edgelm.serving.engine import Engine

T = TypeVar("T")

DEFAULT_CONTEXT = 4096
UNLOADED, LOADING, LOADED, UNLOADING = "unloaded", "loading", "loaded", "unloading"


class ServedModel:
    """A bundle of the server, loaded or not. Only the event loop changes it.

    Attributes:
        name: its name in requests.
        bundle: the bundle.
        engine: what runs it; None unless it is loaded.
        state: "unloaded", "loading", "loaded" or "unloading".
        problem: why it could not be loaded the last time; None if it could.
        users: requests that use it now.
        used: when it was last used, as `time.monotonic`.
        defaults: sampling options of generation_config.json.
        fingerprint: changes with the bundle and the version of EdgeLM.
        context_length: tokens of prompt and answer together.
        needed_bytes: estimate of the memory that it takes when it is loaded.
    """

    def __init__(self, name: str, path: Path, settings: Settings) -> None:
        """Open the bundle, which reads its manifest.

        Raises:
            BundleError: it is not a bundle.
        """
        self.name, self.bundle = name, Bundle.open(path)
        self.engine: Engine | None = None
        self.state = UNLOADED
        self.problem: EdgeLMError | None = None
        self.users, self.used = 0, 0.0
        self.defaults = sampling_defaults(self.bundle.path)
        self._lock = threading.Lock()
        self._made: dict[str, Any] = {}
        manifest, loading = self.bundle.manifest, settings.loading
        digest = hashlib.sha256(f"{__version__} {manifest.to_json()}".encode()).hexdigest()
        self.fingerprint = f"edgelm-{digest[:12]}"
        model = manifest.model
        self.context_length = loading.get("context_length") or min(model.context_length, DEFAULT_CONTEXT)
        weights = sum(item.size for item in manifest.files.values())
        kv = loading.get("kv") or manifest.graph.kv_dtype
        row = 2 * model.num_layers * model.num_kv_heads * row_bytes(kv, model.head_dim, manifest.ops)
        self.needed_bytes = weights + settings.prefix_bytes + settings.slots * self.context_length * row

    @property
    def hidden(self) -> dict[str, str]:
        """What messages to clients must not show, and what they say in its place."""
        return {str(self.bundle.path.resolve()): self.name, str(self.bundle.path): self.name}

    @property
    def running(self) -> Engine:
        """The engine of a model that is in use."""
        assert self.engine is not None, f"{self.name} is not loaded"
        return self.engine

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return the result of `make`, which is called once while the model is loaded; from any thread."""
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            found: T = self._made[name]
            return found

    def grammar_tokenizer(self) -> GrammarTokenizer:
        """Return the vocabulary for grammars; from any thread."""
        from edgelm.serving.constraints import GrammarTokenizer

        model = self.running.model
        return self.once("grammars", lambda: GrammarTokenizer(model.tokenizer, model.end_ids, model.runtime.vocab_size))

    def entry(self) -> ModelEntry:
        """Return its entry in the list of models."""
        from edgelm.tokenization.template_files import read_templates

        manifest = self.bundle.manifest
        model, created = manifest.model, 0
        if manifest.created is not None:
            with contextlib.suppress(ValueError):
                made = datetime.fromisoformat(manifest.created.replace("Z", "+00:00"))
                created = int((made if made.tzinfo else made.replace(tzinfo=timezone.utc)).timestamp())
        with contextlib.suppress(EdgeLMError):
            chat = bool(read_templates(self.bundle.path))
            return ModelEntry(
                id=self.name, object="model", created=created, owned_by="edgelm", state=self.state,
                context_length=self.context_length, family=model.family, recipe=manifest.recipe.name,
                num_layers=model.num_layers, num_experts=model.num_experts,
                experts_per_token=model.experts_per_token, vocab_size=model.vocab_size, chat=chat,
            )  # fmt: skip
        raise ApiError(500, f"the chat template of {self.name} cannot be read")


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Return the sampling options of a bundle's generation_config.json that are numbers in their range.

    As vLLM does, and unlike transformers, whatever `do_sample` says: a server's clients expect sampling.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    data = read_json(path, ErrorFactory(EdgeLMError, "export the bundle again"))
    limits = {"temperature": (0, 2), "top_p": (1e-6, 1), "top_k": (0, 2**31 - 1), "min_p": (0, 1)}
    found: dict[str, Any] = {}
    for name, (least, most) in {**limits, "repetition_penalty": (0.01, 100)}.items():
        value = data.get(name) if isinstance(data, dict) else None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most:
            found[name] = int(value) if name == "top_k" else float(value)
    return found


class Models:
    """All models of a server.

    Args:
        settings: settings of the server.

    Raises:
        EdgeLMError: a folder is not a bundle, or the folder of computed prompts cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.all = {name: ServedModel(name, path, settings) for name, path in settings.models.items()}
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._store: CacheFolder | None = None
        if settings.cache_dir is not None:
            make = CacheFolder.numbered if settings.cache_dir_shared else CacheFolder
            self._store = make(settings.cache_dir, settings.cache_dir_bytes)

    def find(self, name: str | None) -> ServedModel:
        """Return a model; without a name the only one.

        Raises:
            ApiError: there is no such model.
        """
        if name is None and len(self.all) == 1:
            return next(iter(self.all.values()))
        if name is None or name not in self.all:
            what = "model is missing" if name is None else f"there is no model {name!r:.100}"
            raise ApiError(
                404 if name is not None else 400, f"{what}: this server has {', '.join(self.all)}",
                code="model_not_found", param="model",
            )  # fmt: skip
        return self.all[name]

    @contextlib.asynccontextmanager
    async def use(self, name: str | None, seconds: float) -> AsyncIterator[ServedModel]:
        """Have a model loaded for the block; wait for that at most `seconds`.

        Raises:
            ApiError: there is no such model, it cannot be loaded, or that takes too long.
        """
        model = self.find(name)
        try:
            with anyio.fail_after(seconds):
                await self._acquire(model)
        except TimeoutError:
            raise ApiError(504, f"{model.name} was not loaded within {seconds:.0f} seconds", code="timeout") from None
        try:
            yield model
        finally:
            model.users -= 1
            model.used = time.monotonic()
            await asyncio.shield(self._notify())

    async def _acquire(self, model: ServedModel) -> None:
        while True:
            if model.state == LOADED:
                model.users += 1
                return
            await self.load(model)

    async def load(self, model: ServedModel) -> None:
        """Load a model, unless it is loaded.

        Raises:
            ApiError: it cannot be loaded.
        """
        async with self._changed:
            while model.state == UNLOADING or (model.state == UNLOADED and not await self._make_room(model)):
                await self._changed.wait()
            if model.state == UNLOADED:
                model.state = LOADING
                # A task of its own: the request that waits for it may be cancelled, others may wait too.
                self._spawn(self._load(model))
            while model.state == LOADING:
                await self._changed.wait()
            if model.state == UNLOADED:
                raise ApiError(
                    503, f"{model.name} cannot be loaded; the server's log has the reason"
                ) from model.problem

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, model: ServedModel) -> None:
        try:
            engine: Engine | None = await asyncio.to_thread(self._open, model)
            model.problem = None
        except EdgeLMError as error:
            engine, model.problem = None, error
        except MemoryError:
            engine, model.problem = None, EdgeLMError(f"not enough memory to load {model.bundle.path}")
        model.engine, model.state = engine, UNLOADED if engine is None else LOADED
        model.used = time.monotonic()
        await self._notify()

    def _open(self, model: ServedModel) -> Engine:
        from edgelm.generation.language_model import load
        from edgelm.serving.engine import Engine

        settings = self._settings
        opened = load(model.bundle.path, **settings.loading)
        return Engine(
            opened,
            slots=settings.slots,
            queue=settings.limits.queue,
            prefix_bytes=settings.prefix_bytes,
            store=self._store,
        )

    async def _make_room(self, model: ServedModel) -> bool:
        """Unload idle models until there is room for `model`; return whether there is. Called with the lock.

        Raises:
            ApiError: it cannot fit.
        """
        limit = self._settings.memory
        if limit is None:
            return True
        if model.needed_bytes > limit:
            raise ApiError(
                503, f"{model.name} needs about {format_size(model.needed_bytes)} of memory, and the server's limit is "
                f"{format_size(limit)}",
            )  # fmt: skip
        held = sum(other.needed_bytes for other in self.all.values() if other.state != UNLOADED)
        idle = sorted(
            (other for other in self.all.values() if other.state == LOADED and not other.users),
            key=lambda other: other.used,
        )
        if held + model.needed_bytes <= limit:
            return True
        if idle:
            idle[0].state = UNLOADING
            self._spawn(self._unload(idle[0], 0))
        return False

    async def unload(self, model: ServedModel) -> None:
        """Unload a model, after the requests that use it.

        Raises:
            ApiError: it is in use.
        """
        async with self._changed:
            while model.state in (LOADING, UNLOADING):
                await self._changed.wait()
            if model.users:
                raise ApiError(409, f"{model.name} is in use by {model.users} requests: try again later")
            if model.state == UNLOADED:
                return
            model.state = UNLOADING
            self._spawn(self._unload(model, 0))
            while model.state == UNLOADING:
                await self._changed.wait()

    async def _unload(self, model: ServedModel, finish_seconds: float) -> None:
        engine, model.engine = model.engine, None
        model._made.clear()
        if engine is not None:
            await asyncio.to_thread(engine.close, finish_seconds)
        model.state = UNLOADED
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        """Unload all models, and wait for those that load."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))
        for model in self.all.values():
            if model.state == LOADED:
                await self._unload(model, 0)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)
