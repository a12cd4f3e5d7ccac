"""What students learn from: the dense model's outputs on the calibration texts and on made-up ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from paredown.pipeline._memory import give_back_what_is_freed
from paredown.pipeline._prepare import Prepared
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._work import Work
from paredown.recovery import distill
from paredown.tasks import Tokens, augment, tokenize

TRIM_EVERY = 3.0  # seconds of distilling: batches of changing lengths leave the heap full of holes (10 s: 100 MiB more)
EXTRA_TEXTS = 1.0  # made-up texts per real one to distil on
TEACHING_SHARE = (0.2, 0.1)  # of the minutes at most for the teacher's outputs on real and on made-up texts, on top


@dataclass
class Teaching:
    """The dense model as the teacher of a run's students."""

    prepared: Prepared
    settings: Settings
    work: Work
    progress: Progress

    def distilled(self, name: str, model: Any, minutes: float) -> tuple[Any, tuple[dict[str, Any], ...]]:
        """The model after so many minutes of learning the dense one's outputs, and the curve of it; goes on where it
        was stopped.
        """
        tokens, wanted, extra, extra_wanted = self.lessons
        give_back_what_is_freed()
        self.progress.stage(f"Distilling {name}", minutes * 60)
        spent = 0.0

        def report(at: distill.Progress) -> None:
            nonlocal spent
            self.progress.advance(at.seconds - spent, f"divergence {at.distance:.4f}, best {at.best:.4f}")
            if at.seconds // TRIM_EVERY > spent // TRIM_EVERY:
                give_back_what_is_freed()
            spent = at.seconds

        model, history = distill.recover(
            model,
            layout=self.prepared.anatomy.layout,
            tokens=tokens,
            wanted=wanted,
            extra_tokens=extra,
            extra_wanted=extra_wanted,
            minutes=minutes,
            checkpoint=self.work.path(f"distill-{name}.safetensors"),
            seed=self.settings.seed,
            report=report,
        )
        give_back_what_is_freed()
        curve = tuple(
            {"candidate": name, "step": at.step, "minutes": at.seconds / 60, "distance": at.distance} for at in history
        )
        return model, curve

    @cached_property
    def lessons(self) -> tuple[Tokens, Tensor, Tokens | None, Tensor | None]:
        """Calibration texts with the teacher's outputs, and made-up texts with its outputs on them."""
        prepared = self.prepared
        encoder, tokens = prepared.encoder, prepared.calibration
        minute = 60 * self.settings.minutes

        def real() -> dict[str, Tensor]:
            self.progress.stage("Asking the dense model", len(tokens))
            budget = TEACHING_SHARE[0] * minute
            return {"wanted": distill.teach(encoder, tokens, seconds=budget, progress=self.progress.advance)}

        wanted = self.work.tensors("taught", real)["wanted"]
        tokens = replace(tokens, ids=tokens.ids[: len(wanted)])
        count = int(EXTRA_TEXTS * len(tokens))
        texts = augment(prepared.task.all_texts(prepared.splits.calibration), count, seed=self.settings.seed)
        length = int(tokens.lengths.max())
        extra = tokenize(prepared.loaded.tokenizer, texts, max_length=max(length, 4), input_names=tokens.input_names)

        def made_up() -> dict[str, Tensor]:
            self.progress.stage("Asking it about made-up texts", len(extra))
            budget = TEACHING_SHARE[1] * minute
            return {"wanted": distill.teach(encoder, extra, seconds=budget, progress=self.progress.advance)}

        taught = self.work.tensors("taught-extra", made_up)["wanted"]
        if not len(taught):
            return tokens, wanted, None, None
        return tokens, wanted, Tokens(extra.ids[: len(taught)], extra.pad_id, extra.input_names, 0), taught
