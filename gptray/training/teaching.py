"""Knowledge distillation: trained models whose predictions are targets, besides the text.

The teachers read the same inputs as the model, replaced tokens included (Beyer et al. 2021,
Knowledge distillation: A good teacher is patient and consistent).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptray.config import TrainConfig
from gptray.model.distillation import SoftTargets
from gptray.model.gpt import GPT
from gptray.model.hf import load_weights, network_of
from gptray.model.lora import freeze
from gptray.model.shape import model_folder, weights_sha256


class Teachers:
    """Frozen models, stored and computed in their student's dtype, with dropout off.

    sha256: the checksum of each teacher's weights, by its name in train.teachers.
    """

    def __init__(
        self, config: TrainConfig, *, vocab_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Read train.teachers. Raises UserError for one that is missing or damaged."""
        self.sha256 = {one: weights_sha256(model_folder(one)) for one in config.teachers}
        self._models = [
            _frozen(one, vocab_size=vocab_size, dtype=dtype).to(device) for one in config.teachers
        ]
        self._share = config.teacher_weight

    @torch.no_grad()
    def soft_targets(self, idx: Tensor) -> SoftTargets:
        """The teachers' predictions for inputs (B, T)."""
        return SoftTargets(
            hidden=[model.hidden(idx).flatten(0, 1) for model in self._models],
            heads=[model.head for model in self._models],
            share=self._share,
        )


def _frozen(source: str, *, vocab_size: int, dtype: torch.dtype) -> GPT:
    folder = model_folder(source)
    model = network_of(folder, device="meta")
    model.compute_dtype = dtype
    freeze(model, ())
    model.to_empty(device="cpu")
    load_weights(model, folder)
    model.valid_vocab_size = vocab_size
    return model.eval()
