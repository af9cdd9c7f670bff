"""What runs inside vLLM's worker process: taking new weights, and dying with the trainer.

vLLM mixes `TrainerLink` into its worker class (``worker_extension_cls``); the method names must not
clash with its own. Importing this module in an engine process starts a watcher thread: an engine
whose trainer was killed would otherwise run on forever and hold its memory.
"""

from __future__ import annotations

import os
import select
import signal
import threading

TRAINER_PID = "PRIORZERO_TRAINER_PID"


def _watch_trainer(trainer: int) -> None:
    """Block until the trainer is gone, then end this engine: its parent (EngineCore, where that is
    another one) too.
    """
    try:
        select.select([os.pidfd_open(trainer)], [], [])
    except ProcessLookupError:
        pass  # it died before we could look: the same outcome
    parent = os.getppid()
    if parent not in (0, 1, trainer):
        try:
            os.kill(parent, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it went first
    os._exit(1)


def _start_watching() -> None:
    trainer = os.environ.get(TRAINER_PID)
    if trainer and int(trainer) != os.getpid() and hasattr(os, "pidfd_open"):
        threading.Thread(
            target=_watch_trainer, args=(int(trainer),), daemon=True, name="trainer-watch"
        ).start()


_start_watching()


class TrainerLink:
    """Extension of vLLM's worker."""

    def trainer_link_pids(self) -> list[int]:
        """This worker's process and, where the worker is a child of it, EngineCore's."""
        parent = os.getppid()
        outside = (0, 1, int(os.environ.get(TRAINER_PID, "0")))
        return [os.getpid()] if parent in outside else [os.getpid(), parent]

    def trainer_link_load(self, folder: str, tensors: int) -> float:
        """Load all weights from ``folder`` and return the error of the output head (see
        `_head_error`).

        :raises RuntimeError: the folder does not hold exactly ``tensors`` tensors; vLLM would mix
            old and new ones.
        """
        from safetensors import safe_open
        from vllm.config import set_current_vllm_config

        with safe_open(os.path.join(folder, "model.safetensors"), "pt") as file:
            found = len(file.keys())
        if found != tensors:
            raise RuntimeError(f"the weight file holds {found} tensors, {tensors} were written")
        if self.vllm_config.lora_config is not None:
            from vllm.lora.layers import BaseLayerWithLoRA

            if not hasattr(
                BaseLayerWithLoRA, "load_weights"
            ):  # 0.26 looks for tensors under the wrapped layers' names
                raise RuntimeError(
                    "this vLLM cannot load full weights once it was started for adapters"
                )
        with set_current_vllm_config(
            self.vllm_config
        ):  # 0.26 does not set it around reload_weights
            self.reload_weights(weights_path=folder)
            head = getattr(self.model_runner.get_model(), "lm_head", None)
            method = getattr(head, "quant_method", None)
            if self.device.type == "cpu" and method is not None:
                # A tied head gets no tensor from the file, so vLLM (0.32, CPU) keeps its packed
                # copy of the old one.
                method.process_weights_after_loading(head)
            return self._head_error(head)

    def trainer_link_adapter(self, name: str, number: int, folder: str, modules: int) -> str:
        """Load the adapters of ``modules`` modules from ``folder`` and forget all others.

        :returns: why vLLM cannot take them, or "". The adapters loaded before are then still there
            if ``folder`` was refused as a whole.
        """
        from vllm.lora.request import LoRARequest

        others = self.list_loras()
        try:
            self.add_lora(LoRARequest(name, number, folder))
        except (
            ValueError
        ) as error:  # a module or a feature it does not know; any other fault is not the adapter's
            return str(error)
        for other in others & self.list_loras():
            self.remove_lora(other)
        # vLLM says nothing of adapters for modules it did not prepare: they would be left out of
        # every answer.
        manager = self.model_runner.lora_manager._adapter_manager
        loaded = {
            n: a.lora_a
            for n, a in manager.get_adapter(number).loras.items()
            if n in manager.modules
        }
        parts = [
            part for a in loaded.values() for part in (a if isinstance(a, list) else [a])
        ]  # a list: q, k and v
        found = sum(part is not None for part in parts)
        return (
            "" if found == modules else f"it has a place for {found} of {modules} adapted modules"
        )

    def _head_error(self, head) -> float:
        """Largest difference between the output head vLLM multiplies with and the embedding it is
        tied to; 0 on CUDA, where they share storage, and for heads of their own.

        Unit vectors go through the head, so its answer is a column of its weights, exact in every
        dtype: even one bfloat16 value from before the update shows.
        """
        import torch

        tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
        table = getattr(getattr(self.model_runner.get_model(), "model", None), "embed_tokens", None)
        if not tied or self.device.type != "cpu" or table is None or table.weight.dim() != 2:
            return 0.0
        weight = table.weight
        with torch.inference_mode():
            columns = torch.linspace(0, weight.shape[1] - 1, 16).long()
            units = torch.nn.functional.one_hot(columns, weight.shape[1]).to(weight.dtype)
            used = head.quant_method.apply(head, units)
            return float((used.T[: weight.shape[0]] - weight[:, columns]).float().abs().max())
