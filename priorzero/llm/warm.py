"""The embedded LLM with a warm-up's adapters: those which this repository carries, or a folder's.

The repository's were made by the command in `embedded_warm/priorzero.json`, on games that TextWorld
generates from seeds no run plays. At first use adapters are merged into the embedded LLM, in the
cache; after that it loads like any other folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from priorzero.llm.seen import FACTS
from priorzero.llm.weights.export import Weights
from priorzero.llm.weights.identity import ModelIdentity
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

ADAPTERS = Path(__file__).with_name("embedded_warm")


def warm_checkpoint(base: Path, cache: Path, adapters: Path = ADAPTERS) -> Path:
    """Folder with the LLM and the adapters merged in float32.

    Several processes may ask at once: the finished folder appears by rename, and the first wins.

    Args:
        base: folder of the embedded LLM.
        cache: folder for models this project prepares.
        adapters: in PEFT's format, with the warm-up's record.

    Raises:
        PriorZeroError: the adapters were made for another LLM, or nothing says for which.
    """
    weights = adapters / "adapter_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    target = cache / f"{base.name}-warm-{digest}"
    if (target / "config.json").is_file():
        return target

    logger.info("Preparing the warm %s once, in %s (some seconds)", base.name, target)
    making = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=cache))
    try:
        _merge(base, adapters, making / "whole")
        try:
            os.rename(making / "whole", target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return target


def _merge(base: Path, adapters: Path, out: Path) -> None:
    """Write base and adapters together; what is merged is float32, the rest as it was."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made_for = _base_weights(adapters / FACTS)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if ModelIdentity.of(model).weights != made_for:
        raise PriorZeroError(
            f"the adapters in {adapters} were made for another LLM than the {base.name} that is "
            "installed; use --llm embedded, or make a warm-up of your own"
        )

    module = get_peft_model(model, LoraConfig.from_pretrained(adapters))
    for name, parameter in module.named_parameters():
        if ".lora_" in name:  # peft gives them the frozen weight's dtype
            parameter.data = parameter.data.float()
    told = set_peft_model_state_dict(module, load_file(adapters / "adapter_model.safetensors"))
    assert not told.unexpected_keys, f"adapters of other layers: {told.unexpected_keys[:3]}"
    Weights(module).save(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    shutil.copy(adapters / FACTS, out / FACTS)


def _base_weights(path: Path) -> str:
    """Identity of the weights that the adapters of this record were trained on.

    Raises:
        PriorZeroError: there is no such record, or it does not say.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))["base"]["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PriorZeroError(
            f"{path} does not say which LLM these adapters were made for ({error!r}); give a "
            "folder that `warmup --adapter` wrote, or a whole checkpoint"
        ) from error
