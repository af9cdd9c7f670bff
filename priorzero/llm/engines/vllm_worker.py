"""What runs inside vLLM's worker process: taking new weights, and dying with the trainer.

vLLM mixes `TrainerLink` into its worker class (`worker_extension_cls`); the method names must not
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
    """Block until the trainer is gone, then end this engine and its EngineCore, if it has one."""
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
        """Load all weights from `folder` and return the error of the output head (`_head_error`).

        Raises:
            RuntimeError: the folder does not hold exactly `tensors` tensors; vLLM would mix old and
                new ones.
        """
        from safetensors import safe_open
        from vllm.config import set_current_vllm_config

        with safe_open(os.path.join(folder, "model.safetensors"), "pt") as file:
            found = len(file.keys())
        if found != tensors:
            raise RuntimeError(f"the weight file holds {found} tensors, {tensors} were written")
        # 0.26 does not set it around reload_weights.
        with set_current_vllm_config(self.vllm_config):
            self.reload_weights(weights_path=folder)
            head = getattr(self.model_runner.get_model(), "lm_head", None)
            method = getattr(head, "quant_method", None)
            if self.device.type == "cpu" and method is not None:
                # A tied head gets no tensor from the file, so vLLM (0.32, CPU) keeps its packed
                # copy of the old one.
                method.process_weights_after_loading(head)
            return self._head_error(head)

    def _head_error(self, head) -> float:
        """Largest difference between a tied output head as vLLM multiplies with it and its table.

        0 on CUDA, where they share storage, and for heads of their own.

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
