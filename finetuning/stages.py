"""TRAIN_STAGES: what trains in which optimizer steps of a run.

The names of a stage, and the weights that they stand for, as far as the settings train them at all:

===============  ======================================================================================================
``embeddings``   the text table, the codec tables of all codebooks, and vectors that are trained by themselves (of
                 speakers, of languages), which live on the objective
``new_layers``   replaced and added talker layers
``talker``       all talker layers, the final norm, ``codec_head`` and ``text_projection``
``sub_talker``   the sub-talker without its codec tables
``heads``        ``codec_head`` and the sub-talker's heads
``adapters``     LoRA matrices, wherever they stand
``all``          everything
===============  ======================================================================================================

There is one optimizer, over everything that ever trains, made once. What is out of the stage gets no gradient, so that
every optimizer leaves it and what is kept of it exactly as they are: no momentum, no weight decay. Which stage it is
follows from the number of the step alone; so there is nothing to save, and a resumed run is in the right one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import accumulate

from torch import nn

from finetuning.adapters import is_adapter
from finetuning.base_model import Base
from finetuning.console import say
from finetuning.errors import UserError
from finetuning.layer_utils import is_new_layer
from finetuning.memory import layer_of, weights_of
from finetuning.objective import TrainingObjective
from finetuning.settings import Settings, Stage

#: Name of a stage -> settings that would make it train something.
_CURES = {
    "embeddings": "TRAIN_TEXT_EMBEDDING, TRAIN_CODEC_EMBEDDING or SPEAKER_EMBEDDING_TRAINABLE=true, or NEW_LANGUAGES",
    "new_layers": "REPLACE_LAST_N_LAYERS or ADD_NEW_LAYERS above 0",
    "talker": "REPLACE_LAST_N_LAYERS or ADD_NEW_LAYERS above 0, FREEZE_ORIGINAL_LAYERS=false, or LORA_TARGETS=all",
    "sub_talker": "LORA_TARGETS=all where LORA_RANK is set, else any layer settings",
    "heads": "LORA_RANK=0, or LORA_TARGETS=codec_head,lm_head",
    "adapters": "LORA_RANK=8, say",
    "all": "FREEZE_ORIGINAL_LAYERS=false, or others of the layer settings",
}
_PREDICTOR = "talker.code_predictor."
_TABLES = ("talker.model.text_embedding.", "talker.model.codec_embedding.", f"{_PREDICTOR}model.codec_embedding.")


# ------------------------------------------------------------------------------------------------ which weights


def names_of(parameter: str, is_new: bool = False, is_of_adapter: bool = False) -> set[str]:
    """The names in TRAIN_STAGES that a parameter of the objective belongs to.

    Args:
        parameter: its name there, such as ``talker.codec_head.weight``.
        is_new: whether it is of a replaced or added layer.
    """
    names = {"all"} | ({"adapters"} if is_of_adapter else set()) | ({"new_layers"} if is_new else set())
    if not parameter.startswith("talker.") or parameter.startswith(_TABLES):
        return names | {"embeddings"}
    if parameter.startswith(("talker.codec_head.", f"{_PREDICTOR}lm_head.")):
        names.add("heads")
    return names | {"sub_talker" if parameter.startswith(_PREDICTOR) else "talker"}


def trained_by_name(objective: TrainingObjective) -> dict[str, list[nn.Parameter]]:
    """Name in TRAIN_STAGES -> what trains of it."""
    new = {index for index, layer in enumerate(objective.talker.model.layers) if is_new_layer(layer)}
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            for part in names_of(name, layer_of(name) in new, is_adapter(name)):
                found.setdefault(part, []).append(parameter)
    return found


def check_stages_of_base(settings: Settings, base: Base) -> None:
    """What the files' headers tell, before anything is loaded.

    Raises:
        UserError: a stage would train nothing.
    """
    if not settings.train_stages:
        return
    first_new = base.talker_config["num_hidden_layers"] - settings.replace_last_n_layers
    found: set[str] = set()
    for weight in weights_of(base, settings):
        if weight.trains:
            layer = layer_of(weight.name)
            is_of_adapter = weight.adapter_width > 0
            found |= names_of(weight.name, layer is not None and layer >= first_new, is_of_adapter)
    _check_names(settings, found)


def check_stages(settings: Settings, objective: TrainingObjective) -> None:
    """The same of the objective, as it will train.

    Raises:
        UserError: a stage would train nothing.
    """
    if settings.train_stages:
        _check_names(settings, trained_by_name(objective))


def _check_names(settings: Settings, found: Iterable[str]) -> None:
    for name in [name for stage in settings.stages() for name in stage.names]:
        if name not in found:
            raise UserError(
                f"TRAIN_STAGES: nothing of {name} trains with these settings, so its stage would do nothing. Take it "
                f"out, or let something of it train ({_CURES[name]})"
            )


# ------------------------------------------------------------------------------------------------ in the run


class Stages:
    """The stages of a run; without TRAIN_STAGES everything trains always.

    Args:
        objective: with all that ever trains asking for gradients, sharded or not.
        num_steps: of the whole run.
        freezes: whether what is out of the stage may stop asking for gradients, so that none are computed. A wrapper
            for several processes has noted once what it synchronises; there they are computed and thrown away.
    """

    def __init__(self, settings: Settings, objective: TrainingObjective, num_steps: int, freezes: bool) -> None:
        self.plan, self._freezes, self._num_steps = settings.stages(), freezes, num_steps
        self._trained = trained_by_name(objective) if self.plan else {}
        self._ends = list(accumulate(stage.num_steps or num_steps for stage in self.plan))
        self._number: int | None = None
        self._paused: list[nn.Parameter] = []
        if self.plan:
            self._say_oddities()

    def enter(self, step: int) -> None:
        """Makes the stage of this step, counted from 1, that of the next calls; says so where it is another."""
        if not self.plan:
            return
        number = self.number_at(step)
        if number != self._number:
            self._number = number
            trains = {id(parameter) for parameter in self._of(self.plan[number])}
            self._paused = [parameter for parameter in self._trained["all"] if id(parameter) not in trains]
            say(self.describe(number))

    def number_at(self, step: int) -> int:
        """Index of the stage that a step belongs to. The last one goes on for as long as the run does."""
        return next((index for index, end in enumerate(self._ends) if step <= end), len(self.plan) - 1)

    def describe(self, number: int) -> str:
        """A line about a stage."""
        stage = self.plan[number]
        first = self._ends[number - 1] + 1 if number else 1
        is_last = number == len(self.plan) - 1
        last = self._num_steps if is_last else min(self._ends[number], self._num_steps)
        count = sum(parameter.numel() for parameter in self._of(stage))
        return f"Stage {number + 1} of {len(self.plan)}, {stage.label}: {count:,} weights train, steps {first}-{last}"

    @contextlib.contextmanager
    def freezing(self) -> Iterator[None]:
        """For forward and backward: what is out of the stage asks for no gradient, where that can be had.

        Outside, ``requires_grad`` says what trains at any time, which is what is saved and exported.
        """
        paused = self._paused if self._freezes else []
        for parameter in paused:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in paused:
                parameter.requires_grad_(True)

    def drop_gradients(self) -> None:
        """Before anything is made of the gradients, their norm included: those out of the stage are thrown away."""
        for parameter in self._paused:
            parameter.grad = None

    def _of(self, stage: Stage) -> list[nn.Parameter]:
        """What trains in a stage, each parameter once."""
        found = {id(parameter): parameter for name in stage.names for parameter in self._trained[name]}
        return list(found.values())

    def _say_oddities(self) -> None:
        """What somebody who wrote this TRAIN_STAGES may not have meant."""
        last, num_steps = self.plan[-1], self._num_steps
        if last.num_steps and self._ends[-1] < num_steps:
            say(
                f"TRAIN_STAGES names {self._ends[-1]} steps and the run has {num_steps}: its last stage, {last.label}, "
                "goes on to the end"
            )
        late = [stage.label for stage, end in zip(self.plan[1:], self._ends, strict=False) if end >= num_steps]
        if late:
            say(f"TRAIN_STAGES: the run ends after step {num_steps}, before {', '.join(late)} would begin")
        trains = {id(parameter) for stage in self.plan for parameter in self._of(stage)}
        left_out = sum(parameter.numel() for parameter in self._trained["all"] if id(parameter) not in trains)
        if left_out:
            say(f"TRAIN_STAGES: {left_out:,} weights that the settings would train are in none of its stages")
