"""How much memory a run needs at its peak, and MEMORY_PROFILE: settings that fit into a GPU.

Everything here is computed from the sizes in the base's files, before anything is loaded. ``benchmarks/peak_memory.py``
counts what the same steps really keep alive, tensor by tensor, and a test holds the two together. Nobody has measured
either on a GPU yet.

A step's memory has three high points:

- the end of the forward pass, while the sub-talker's last frames are computed: weights, optimizer states, what
  autocast rounded to bf16, what the layers keep for the backward pass, and the frames' embeddings and their gradients;
- a checkpointed layer that is computed again in the backward pass;
- the end of the backward pass: weights, optimizer states, all gradients.

Between the steps, when neither activations nor gradients are there, samples are decoded and judged: the codec and the
judges, which lie on the CPU otherwise, stand beside the weights and optimizer states then.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetuning.adapters import linear_names, target_modules
from finetuning.base_model import Base
from finetuning.codec import FRAMES_PER_SECOND, NUM_CODEBOOKS
from finetuning.errors import UserError
from finetuning.objective import SUB_TALKER_CHUNK_FRAMES
from finetuning.optimizers import check_optimizer
from finetuning.settings import Settings, divides_rows
from finetuning.sharding import asks_for_fsdp

#: A row of 15 s, which few clips exceed: its frames, and its positions with the text (3.5 tokens a second) and the
#: prompt around it.
ROW_SECONDS = 15
ROW_FRAMES = round(ROW_SECONDS * FRAMES_PER_SECOND)
ROW_POSITIONS = ROW_FRAMES + 67
#: Profile -> bytes of the GPU.
PROFILES = {"16gb": 16 * 10**9, "24gb": 24 * 10**9, "40gb": 40 * 10**9, "80gb": 80 * 10**9}
#: Not for tensors: the CUDA context and libraries' workspaces; the allocator's gaps and the
#: formula's error (up to 3 % where it was counted), as a share of the GPU.
CONTEXT_BYTES, GAPS_SHARE = 1.5e9, 0.07
#: So much less than its name says a GPU may have (an A10G has 23.8 of 24 GB); what a profile leaves free covers it.
UNDER_NOMINAL_SHARE = 0.03
#: Bytes of both moments of a weight: in 8 bits, one scale for 256 values of each.
BYTES_OF_MOMENTS, BYTES_OF_8_BIT_MOMENTS = 8, 2 + 2 * 4 / 256
#: Of a weight\'s running average, where EMA_DECAY asks for one: fp32.
BYTES_OF_AVERAGE = 4
#: What the codec or a judge computes of a sample, beside its weights; an estimate.
BYTES_OF_LISTENING = 5e8


# ------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Weight:
    """A tensor of the model as it is trained.

    Attributes:
        size: number of weights.
        itemsize: bytes of each, where it does not train.
        adapter_width: of the values that go into it, where it is an adapter's.
    """

    name: str
    size: int
    itemsize: int
    trains: bool
    adapter_width: int = 0

    @property
    def is_vector(self) -> bool:
        """A norm or a bias: always fp32."""
        return self.name.endswith(".bias") or "norm" in self.name

    @property
    def is_table(self) -> bool:
        """An embedding: looked up in its own precision, its moments never in 8 bits."""
        return "embedding" in self.name


def weights_of(base: Base, settings: Settings) -> list[Weight]:
    """The weights of the run on ``base``, from the files' headers."""
    dtypes, num_layers = base.weight_dtypes(), base.talker_config["num_hidden_layers"]
    shapes = {name: shape for name, shape in base.weight_shapes().items() if not name.startswith("speaker_encoder.")}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    keeps_dtype = settings.mixed_precision == "bf16" and not asks_for_fsdp()  # see building.keeps_bf16
    itemsizes = {name: dtypes[name].itemsize if keeps_dtype else 4 for name in sizes}
    first_new = num_layers - settings.replace_last_n_layers
    weights = [Weight(name, size, itemsizes[name], _trains(name, settings, first_new)) for name, size in sizes.items()]
    one_layer = {name: size for name, size in sizes.items() if layer_of(name) == 0}
    for index in range(num_layers, num_layers + settings.add_new_layers):
        for name, size in one_layer.items():
            weights.append(Weight(name.replace(".0.", f".{index}.", 1), size, 4, True))
    return [*weights, *_own_vectors(base, settings), *_adapters(weights, shapes, settings)]


def layer_of(name: str) -> int | None:
    """The talker layer that a weight belongs to."""
    prefix = "talker.model.layers."
    return int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None


def _trains(name: str, settings: Settings, first_new: int) -> bool:
    """As ``layer_utils.set_trainable`` decides."""
    if name == "talker.model.text_embedding.weight":
        return settings.train_text_embedding
    if not settings.freeze_original_layers:
        return True
    if (layer := layer_of(name)) is not None:
        return layer >= first_new
    if "codec_embedding" in name:
        return settings.train_codec_embedding
    if settings.lora_rank:
        return settings.has_new_layers and name.startswith(("talker.model.norm.", "talker.codec_head."))
    is_sub_talker = name.startswith("talker.code_predictor.") and "embedding" not in name
    return is_sub_talker or name.startswith(("talker.model.norm.", "talker.codec_head."))


def _own_vectors(base: Base, settings: Settings) -> list[Weight]:
    """What the objective holds itself and trains: next to nothing, but it lies below the lowest layer."""
    width = base.talker_config["hidden_size"]
    vectors = {"language_embedding": len(base.new_languages), "speaker_embedding": settings.speaker_embedding_trainable}
    return [Weight(name, count * width, 4, True) for name, count in vectors.items() if count]


def _adapters(weights: Sequence[Weight], shapes: Mapping[str, Sequence[int]], settings: Settings) -> list[Weight]:
    """The adapters' matrices, on the frozen linear maps that LORA_TARGETS names."""
    if not settings.lora_rank:
        return []
    frozen = [weight.name for weight in weights if not weight.trains]
    return [
        Weight(f"{path}.lora", settings.lora_rank * sum(shape := shapes[f"{path}.weight"]), 4, True, shape[1])
        for path in target_modules(linear_names(frozen, shapes), settings)
    ]


def parameter_counts(base: Base, settings: Settings) -> tuple[int, int]:
    """(trained, frozen) weights of the run."""
    weights = weights_of(base, settings)
    trained = sum(weight.size for weight in weights if weight.trains)
    return trained, sum(weight.size for weight in weights) - trained


def _widths(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(hidden, MLP, queries, keys) of a layer."""
    heads, keys, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    return config["hidden_size"], config["intermediate_size"], heads * size, keys * size


# ------------------------------------------------------------------------------------------------------- the needs


@dataclass(frozen=True)
class Needs:
    """Bytes that a run needs on each GPU.

    Attributes:
        talker: ``talker_config`` of the base.
        weights: see ``weights_of``.
        num_processes: of the job; each holds the whole model, or under FSDP its share.
        beside: bytes of the models that come to the GPU between the steps; 0 for none.
    """

    talker: Mapping[str, Any]
    weights: list[Weight]
    settings: Settings
    num_processes: int = 1
    is_sharded: bool = False
    beside: float = 0.0

    @classmethod
    def of(cls, base: Base, settings: Settings, num_processes: int = 1, beside: float = 0.0) -> Needs:
        weights = weights_of(base, settings)
        return cls(base.talker_config, weights, settings, num_processes, asks_for_fsdp(), beside)

    def peak_bytes(self) -> float:
        """The highest point of a step, with rows of 15 s, or between the steps."""
        frames = self.settings.max_frames_per_batch or self.settings.batch_size * ROW_FRAMES
        positions = frames * ROW_POSITIONS / ROW_FRAMES
        step = self.bytes_for(frames, positions, self.settings.gradient_accumulation_steps)
        return max(step, self.bytes_between_steps)

    @property
    def bytes_between_steps(self) -> float:
        """While samples are decoded or judged; 0 where nothing is."""
        if not self.beside:
            return 0
        return self.standing_bytes + self._bucket_bytes + self.beside + BYTES_OF_LISTENING

    @property
    def _bucket_bytes(self) -> float:
        """DDP's buckets hold a whole gradient from the first step to the last."""
        return self.gradient_bytes if self.num_processes > 1 and not self.is_sharded else 0

    @property
    def least_bytes(self) -> float:
        """Of the shortest rows."""
        return self.bytes_for(0, 0, self.settings.gradient_accumulation_steps)

    def bytes_for(self, num_frames: float, num_positions: float, num_micro_batches: int) -> float:
        """The highest point of a step of micro-batches of so many frames and positions."""
        standing, gradients = self.standing_bytes + self._gathered, self.gradient_bytes
        if self.is_sharded and num_micro_batches == 1:
            gradients /= self.num_processes  # shared out layer by layer; while they accumulate each process has all
        before = standing + (gradients if num_micro_batches > 1 else self._bucket_bytes)
        frame_bytes = num_frames * 4 * NUM_CODEBOOKS * self.talker["hidden_size"]  # all embeddings of the frames, fp32
        forward = (
            before
            + self._of_adapters(num_positions, num_frames)
            + self._kept(num_positions)
            + self.cast_bytes
            + self._sub_talker(num_frames)
            + frame_bytes
        )
        again = (
            before
            + self._of_adapters(num_positions, 0)
            + self._kept(num_positions)
            + frame_bytes
            + self._layer_again(num_positions)
        )
        backward = standing + gradients + 2 * frame_bytes + self._looked_up
        return max(forward, again, backward)

    @property
    def standing_bytes(self) -> float:
        """Weights, the optimizer's states and the weights' average: there from the first step to the last."""
        whole = sum(map(self._weight_bytes, self.weights)) + sum(map(self._state_bytes, self._trained()))
        if self.settings.ema_decay:
            whole += sum(BYTES_OF_AVERAGE * weight.size for weight in self._trained())
        return whole / self.num_processes if self.is_sharded else whole

    @property
    def _gathered(self) -> float:
        """Whole weights that a process of a sharded run holds while it computes: those outside the layers and the text
        table, and two layers, the second of which is fetched ahead; see ``sharding.shard``."""
        if not self.is_sharded:
            return 0
        first = sum(self._weight_bytes(weight) for weight in self.weights if layer_of(weight.name) == 0)
        others = [weight for weight in self.weights if ".layers." not in weight.name and "text_emb" not in weight.name]
        return 2 * first + sum(map(self._weight_bytes, others))

    @cached_property
    def gradient_bytes(self) -> float:
        """Of all that trains, in the weights' precision."""
        return sum(map(self._weight_bytes, self._trained()))

    @property
    def cast_bytes(self) -> float:
        """bf16 copies of fp32 matrices that train; autocast keeps each from its first use to the end of the forward."""
        return sum(2 * weight.size for weight in self._trained() if self._is_cast(weight))

    # --------------------------------------------------------------------------------------------------- of a weight

    def _trained(self) -> Iterator[Weight]:
        return (weight for weight in self.weights if weight.trains)

    def _weight_bytes(self, weight: Weight) -> float:
        if weight.is_vector:
            return 4 * weight.size
        if not weight.trains:
            return weight.itemsize * weight.size
        is_bf16 = self.settings.weights_precision == "bf16" and not weight.adapter_width  # adapters stay fp32
        return (2 if is_bf16 else 4) * weight.size

    def _state_bytes(self, weight: Weight) -> float:
        if self.settings.optimizer == "adafactor":  # a number for each row and column, next to nothing
            return 4 * weight.size if weight.is_vector else 0
        is_small = self.settings.optimizer == "adamw_8bit" and not (weight.is_vector or weight.is_table)
        return weight.size * (BYTES_OF_8_BIT_MOMENTS if is_small else BYTES_OF_MOMENTS)

    def _is_cast(self, weight: Weight) -> bool:
        is_fp32 = self.settings.weights_precision == "fp32" and not weight.is_vector and not weight.is_table
        return is_fp32 and self._is_mixed

    @property
    def _is_mixed(self) -> bool:
        return self.settings.mixed_precision != "no"

    # ---------------------------------------------------------------------------------------------- of the positions

    def _kept(self, num_positions: float) -> float:
        """What the talker keeps for the backward pass."""
        layers = [layer for weight in self._trained() if (layer := layer_of(weight.name)) is not None]
        num_layers = self._num_layers
        is_below = any(weight.is_table or "text_projection" in weight.name for weight in self._trained())
        num_with_graph = num_layers if is_below else num_layers - min(layers, default=num_layers)
        num_whole = 0 if self.settings.gradient_checkpointing else num_with_graph
        width = self.talker["hidden_size"]
        inputs = (num_with_graph - num_whole) * 4 * width
        return num_positions * (inputs + num_whole * self._layer_bytes(self.talker) + 5 * 4 * width)

    def _of_adapters(self, num_positions: float, num_frames: float) -> float:
        """Their dropout's masks, a byte for each value that goes into an adapted matrix, and an fp32 copy of those that
        go into the widest of the sub-talker's."""
        talker, sub_talker = [], []
        for weight in self.weights:
            (sub_talker if "code_predictor" in weight.name else talker).append(weight.adapter_width)
        has_masks = self.settings.lora_dropout > 0
        kept = 0 if self.settings.gradient_checkpointing else num_positions
        in_chunk = NUM_CODEBOOKS * min(num_frames, SUB_TALKER_CHUNK_FRAMES)
        masks = has_masks * (kept * sum(talker) + in_chunk * sum(sub_talker))
        return masks + 4 * in_chunk * max(sub_talker)

    @property
    def _num_layers(self) -> int:
        """Of the talker as it is trained."""
        return 1 + max(layer for weight in self.weights if (layer := layer_of(weight.name)) is not None)

    def _layer_bytes(self, config: Mapping[str, Any]) -> float:
        """What a decoder layer keeps of a position.

        Read off the layer's operations: the residual stream and the norms are fp32, and under autocast each matrix
        keeps its own bf16 copy of its input. A norm that does not train (LoRA) keeps less.
        """
        width, inner, queries, keys = _widths(config)
        if self._is_mixed:
            whole, norms = 26 * width + 8 * inner + 10 * (queries + keys), 8 * width + 2 * (queries + keys)
        else:
            whole, norms = 24 * width + 16 * inner + 16 * (queries + keys), 8 * width + 4 * (queries + keys)
        return whole if any(weight.is_vector for weight in self._trained()) else whole - norms

    def _layer_again(self, num_positions: float) -> float:
        """A layer in the backward pass: computed again where it is checkpointed, and gradients of its widest parts."""
        width, inner, *_ = _widths(self.talker)
        again = self._layer_bytes(self.talker) if self.settings.gradient_checkpointing else 0
        return num_positions * (again + 8 * width + (6 if self._is_mixed else 12) * inner)

    def _sub_talker(self, num_frames: float) -> float:
        """A chunk of frames through the sub-talker and its heads, and the gradients of the chunks before it."""
        predictor = self.talker["code_predictor_config"]
        num_chunk = num_frames if self.is_sharded else min(num_frames, SUB_TALKER_CHUNK_FRAMES)
        logits = (NUM_CODEBOOKS - 1) * predictor["vocab_size"] * (12 if self._is_mixed else 16)
        layers = NUM_CODEBOOKS * predictor["num_hidden_layers"] * self._layer_bytes(predictor)
        inputs = NUM_CODEBOOKS * 6 * self.talker["hidden_size"]
        num_before = max(num_frames // max(num_chunk, 1) - 1, 0) * num_chunk  # the last whole chunk is the peak
        before = num_before * 4 * NUM_CODEBOOKS * self.talker["hidden_size"]
        of_weights = sum(self._weight_bytes(weight) for weight in self._trained() if "code_predictor" in weight.name)
        return num_chunk * (logits + layers + inputs) + before + (of_weights if num_before else 0)

    @property
    def _looked_up(self) -> float:
        """The codec tables joined for one lookup, and their gradient, where they train."""
        tables = [weight for weight in self.weights if weight.is_table and "codec" in weight.name]
        return sum(2 * 4 * weight.size for weight in tables if weight.trains)


# ---------------------------------------------------------------------------------------------------- the profiles


@dataclass(frozen=True)
class Picks:
    """Settings for a GPU.

    Attributes:
        settings: with what was picked.
        peak_bytes: that they need.
        message: what was picked, in one line.
    """

    settings: Settings
    peak_bytes: float
    message: str


def pick_for_memory(
    settings: Settings, base: Base, gpu_bytes: int | None = None, num_processes: int = 1, beside: float = 0.0
) -> Picks | None:
    """What MEMORY_PROFILE picks: the first combination that fits, of those that learn best first.

    See ``_order`` for what is given up first; a step always keeps its rows. What the user set stays. The same settings,
    base, GPU and processes give the same picks, so a run can be resumed.

    Args:
        gpu_bytes: memory of the GPU, the smallest of all processes; None where there is none.
        num_processes: of the job.
        beside: see ``Needs``.

    Returns:
        None where nothing is to be picked.

    Raises:
        UserError: nothing fits, or what fits needs a package that is missing, or the launch asks for FSDP.
    """
    profile = settings.memory_profile
    if profile is None:
        return None
    if profile == "auto" and gpu_bytes is None:
        _check_rows_without_gpu(settings, num_processes)
        return None
    if asks_for_fsdp():
        raise UserError(
            "MEMORY_PROFILE: it knows what a GPU needs that holds the whole model, not a share of it as under FSDP. "
            "Unset it, or launch without FSDP"
        )
    profile = largest_profile(gpu_bytes) if profile == "auto" else profile
    room, weights = usable_bytes(PROFILES[profile]), weights_of(base, settings)
    candidates = _candidates(settings, num_processes)
    known = {"num_processes": num_processes, "beside": beside}
    needs = [Needs(base.talker_config, weights, candidate, **known) for candidate in candidates]
    fitting = next((need for need in needs if need.peak_bytes() <= room), None)
    if fitting is None:
        raise UserError(_nothing_fits(profile, settings, min(need.peak_bytes() for need in needs)))
    check_optimizer(fitting.settings)
    message = _message(profile, settings, fitting)
    if gpu_bytes is not None and gpu_bytes < PROFILES[profile] * (1 - UNDER_NOMINAL_SHARE):
        message += f". This GPU has {gpu_bytes / 1e9:.1f} GB only: MEMORY_PROFILE=auto takes the profile that fits it"
    return Picks(fitting.settings, fitting.peak_bytes(), message)


def _check_rows_without_gpu(settings: Settings, num_processes: int) -> None:
    """Raises UserError where the profile was to divide EFFECTIVE_BATCH_SIZE."""
    if divides_rows(settings) and settings.effective_batch_size != settings.rows_per_step(num_processes):
        raise UserError(
            "EFFECTIVE_BATCH_SIZE: MEMORY_PROFILE=auto divides it into micro-batches where there is a GPU; here, set "
            "BATCH_SIZE and GRADIENT_ACCUMULATION_STEPS"
        )


def largest_profile(gpu_bytes: int) -> str:
    """The largest that fits a GPU.

    Raises:
        UserError: the GPU is smaller than the smallest.
    """
    fitting = [name for name, size in PROFILES.items() if size * (1 - UNDER_NOMINAL_SHARE) <= gpu_bytes]
    if not fitting:
        raise UserError(
            f"MEMORY_PROFILE: auto found a GPU of {gpu_bytes / 1e9:.1f} GB, and the smallest profile is for 16 GB. "
            "Unset it and set BATCH_SIZE=1, GRADIENT_CHECKPOINTING=true, OPTIMIZER=adamw_8bit, or take a 0.6B base"
        )
    return fitting[-1]


def usable_bytes(gpu_bytes: float) -> float:
    """What is left for tensors."""
    return gpu_bytes * (1 - GAPS_SHARE) - CONTEXT_BYTES


#: Field -> what may be picked for it, the best first.
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "weights_precision": ("fp32", "bf16"),
    "optimizer": ("adamw", "adamw_8bit"),
    "gradient_checkpointing": (False, True),
}


def _candidates(settings: Settings, num_processes: int) -> list[Settings]:
    """All combinations that may be picked, the best first."""
    choices = {field: (getattr(settings, field),) if settings.is_set(field) else _CHOICES[field] for field in _CHOICES}
    if settings.mixed_precision != "bf16" or settings.optimizer == "adafactor":
        choices["weights_precision"] = (settings.weights_precision,)  # see the settings' checks
    combinations = itertools.product(_micro_batches(settings, num_processes), *choices.values())
    return sorted(
        (
            settings.model_copy(update=batch | dict(zip(choices, values, strict=True)))
            for batch, *values in combinations
        ),
        key=_order,
    )


def _order(settings: Settings) -> tuple[int, ...]:
    """The smaller, the better: first large micro-batches are given up, then the speed of no checkpointing, AdamW's fp32
    moments, and fp32 weights.

    With weights in bf16 the gradients are bf16 too and lose bits when micro-batches are added up, so there large
    micro-batches are kept longer than the speed.
    """
    accumulation, in_bf16 = settings.gradient_accumulation_steps, settings.weights_precision == "bf16"
    is_small = settings.optimizer == "adamw_8bit"
    return (in_bf16, is_small, accumulation * in_bf16, settings.gradient_checkpointing, accumulation)


def _micro_batches(settings: Settings, num_processes: int) -> list[dict[str, int]]:
    """Micro-batches and accumulation for the same rows or frames of a step, the largest micro-batch first."""
    accumulation, max_frames = settings.gradient_accumulation_steps, settings.max_frames_per_batch
    if settings.is_set("gradient_accumulation_steps") or settings.is_set("batch_size"):
        return [{}]
    if max_frames is None:
        total = settings.batch_size * accumulation
        if divides_rows(settings):
            total = settings.effective_batch_size // num_processes
        sizes = [size for size in range(total, 0, -1) if total % size == 0]
        return [{"batch_size": size, "gradient_accumulation_steps": total // size} for size in sizes]
    halvings = [2**times for times in range(8) if max_frames % 2**times == 0 and max_frames // 2**times >= ROW_FRAMES]
    return [
        {"max_frames_per_batch": max_frames // parts, "gradient_accumulation_steps": accumulation * parts}
        for parts in halvings or [1]
    ]


def _message(profile: str, settings: Settings, needs: Needs) -> str:
    shown = (*_batch_fields(settings), *_CHOICES)
    picked = [field for field in shown if not settings.is_set(field) or _differs(field, settings, needs.settings)]
    kept = [field for field in shown if field not in picked]
    kept_note = f" (set by you: {_assignments(kept, needs.settings)})" if kept else ""
    return (
        f"Memory profile {profile}: {_assignments(picked, needs.settings) or 'nothing left to pick'}{kept_note}; about "
        f"{needs.peak_bytes() / 1e9:.1f} of {PROFILES[profile] / 1e9:.0f} GB with clips of {ROW_SECONDS} s (computed, "
        "not measured)"
    )


def _batch_fields(settings: Settings) -> tuple[str, str]:
    return "max_frames_per_batch" if settings.max_frames_per_batch else "batch_size", "gradient_accumulation_steps"


def _differs(field: str, one: Settings, other: Settings) -> bool:
    return getattr(one, field) != getattr(other, field)


def _assignments(fields: Iterable[str], settings: Settings) -> str:
    return " ".join(f"{field.upper()}={str(getattr(settings, field)).lower()}" for field in fields)


def _nothing_fits(profile: str, settings: Settings, smallest: float) -> str:
    """What to say, and what would fit."""
    kept = [field for field in (*_batch_fields(settings), *_CHOICES) if settings.is_set(field)]
    ways = [f"unset {', '.join(field.upper() for field in kept)}"] if kept else []
    if settings.max_frames_per_batch and settings.max_frames_per_batch % 2:
        ways.append("take an even MAX_FRAMES_PER_BATCH, which can be halved")
    if not settings.freeze_original_layers:
        ways.append(
            "train new layers instead of the whole model (REPLACE_LAST_N_LAYERS=2 ADD_NEW_LAYERS=4 "
            "FREEZE_ORIGINAL_LAYERS=true)"
        )
    if not settings.lora_rank:
        ways.append("train adapters (LORA_RANK=8)")
    ways += ["take a 0.6B base", "take a larger GPU, or several with FSDP"]
    size = PROFILES[profile]
    return (
        f"MEMORY_PROFILE: nothing fits into {size / 1e9:.0f} GB; a step takes at least about {smallest / 1e9:.1f} GB, "
        f"and {usable_bytes(size) / 1e9:.1f} GB are left for it. One of these helps: {'; '.join(ways)}"
    )
