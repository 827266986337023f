"""``Distill``: distillation in ``transformers.Trainer``."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers

from halfbyte.errors import HalfbyteError
from halfbyte.train.objectives import Distillation, SecondModel, Teacher, distillation_loss
from halfbyte.train.student import student_of
from halfbyte.train.token_batches import TokenBatches
from halfbyte.train.training_loop import held_out_loss


class Distill(transformers.TrainerCallback):  # type: ignore[misc]
    """Makes a Trainer minimize KL(teacher || student), and keeps the best step.

    ``teacher``: a model, or any ``halfbyte.train.objectives.Teacher``; ``top_k`` as in ``distillation_loss``. With
    ``held_out`` batches the loss is looked at every ``check_every`` steps, the start included, and the masters are
    those of the best step afterwards; ``history`` holds the losses by step. Positions that the attention mask leaves
    out do not count. A loss that is not finite is a HalfbyteError that names the step.
    """

    def __init__(
        self,
        teacher: Any,
        top_k: int | None = None,
        held_out: TokenBatches | None = None,
        check_every: int = 50,
    ) -> None:
        self.teacher: Teacher = SecondModel(teacher) if isinstance(teacher, torch.nn.Module) else teacher
        self.top_k, self.held_out, self.check_every = top_k, held_out, check_every
        self.history: dict[int, float] = {}
        self.best = 0
        self._best: list[torch.Tensor] = []
        self._hook: Any = None
        self._step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put the divergence in the place of the model's own loss."""
        student_of(model)
        self._hook = model.register_forward_hook(self._replace_loss, with_kwargs=True)
        self._step = state.global_step
        self._check(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the held-out text from time to time."""
        self._step = state.global_step
        if state.global_step % self.check_every == 0 or state.global_step == state.max_steps:
            self._check(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Give the masters of the best step back, and the model its own loss."""
        self._hook.remove()
        if self._best:
            with torch.no_grad():
                for master, best in zip(student_of(model).masters, self._best, strict=True):
                    master.copy_(best)

    def _replace_loss(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        student, teacher = output.logits, self.teacher(ids)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask.all():
            if not isinstance(teacher, torch.Tensor):
                raise HalfbyteError("a cached teacher knows whole sequences only; train without padding")
            student, teacher = student[mask.bool()], teacher[mask.bool()]
        loss = distillation_loss(student, teacher, self.top_k)
        if not torch.isfinite(loss):
            raise HalfbyteError(f"the loss after step {self._step} is {loss.item()}; train with a lower rate")
        total = kwargs.get("num_items_in_batch")
        # the Trainer expects a sum over all parts of a step then
        output.loss = loss if total is None else loss * (student.numel() // student.shape[-1]) / total
        return output

    def _check(self, model: Any, step: int) -> None:
        if self.held_out is None or step in self.history:
            return
        training, objective = model.training, Distillation(self.teacher, self.top_k)
        model.eval()
        loss = held_out_loss(model, objective, self.held_out)
        model.train(training)
        self.history[step] = loss
        best = self.history.get(self.best, math.inf)
        if not self._best or loss < best:
            self.best = step
            self._best = [master.detach().clone() for master in student_of(model).masters]
