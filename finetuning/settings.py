"""Every setting: its name, aliases, default, meaning and check. Read once; nothing else reads the environment.

Sources, strongest first: the process environment, the file named by ENV_FILE (default ``.env``), the default. An empty
value means unset. All problems are reported together as one ``UserError``, with file and line and never with a value:
the value of a misspelt name may be a secret.

This room imports nothing heavy, so that a mistake is reported at once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv.main import resolve_variables
from dotenv.parser import parse_stream
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from finetuning.disk import write_json
from finetuning.errors import UserError
from finetuning.metrics import METRICS

DEFAULT_ENV_FILE = ".env"
#: Variables of other tools that may stand in the file; they are exported before those tools are imported.
PASS_THROUGH_PREFIXES = (
    "WANDB_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_", "NCCL_", "CUDA_", "TORCH_",
    "PYTORCH_", "OMP_", "MKL_", "ACCELERATE_", "XDG_",
)  # fmt: skip

#: Names of transformers' get_scheduler that need nothing but the number of steps.
LR_SCHEDULERS = (
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
    "inverse_sqrt", "warmup_stable_decay",
)  # fmt: skip


#: Predictors that MOS_MODEL knows by name; ``recognition`` knows which package each comes from.
MOS_MODELS = ("distillmos", "dnsmos", "utmos")
#: What REPORT_TO may name, besides none.
TRACKERS = ("wandb", "tensorboard")
#: What a stage of TRAIN_STAGES may name; ``stages`` knows which weights belong to each.
STAGE_NAMES = ("embeddings", "new_layers", "talker", "sub_talker", "heads", "adapters", "all")


@dataclass(frozen=True)
class Stage:
    """A part of the run, of those that TRAIN_STAGES lists.

    Attributes:
        names: of ``STAGE_NAMES``; what belongs to one of them trains.
        num_steps: optimizer steps of it; None for the last one, which goes on to the end of the run.
    """

    names: tuple[str, ...]
    num_steps: int | None = None

    @property
    def label(self) -> str:
        return "+".join(self.names)


def parse_stages(text: str) -> list[Stage]:
    """The stages of a TRAIN_STAGES such as ``embeddings+new_layers:200,all``.

    Raises:
        ValueError: what is wrong, to be read behind the setting's name.
    """
    items = text.split(",")
    stages = [_parse_stage(item) for item in items]
    if open_ended := [item for item, stage in zip(items[:-1], stages, strict=False) if stage.num_steps is None]:
        raise ValueError(
            f'"{open_ended[0]}" has no steps, which only the last stage may go without: {open_ended[0]}:200'
        )
    return stages


def _parse_stage(item: str) -> Stage:
    label, colon, steps = item.partition(":")
    names = tuple(label.split("+"))
    if unknown := [name for name in names if name not in STAGE_NAMES]:
        raise ValueError(
            f'"{unknown[0]}" is no stage; the names are {", ".join(STAGE_NAMES)}, as in embeddings:200,new_layers:9,all'
        )
    if colon and not (steps.isascii() and steps.isdigit() and int(steps)):
        raise ValueError(f'"{item}": the steps of a stage are a whole number from 1 up, as in {label}:200')
    return Stage(names, int(steps) if colon else None)


def read_eval_texts(value: str) -> list[str]:
    """The texts that an EVAL_TEXTS gives: the lines of a file, or what stands between its vertical bars.

    What has no vertical bar and is a file, or looks like the path of a text file, is taken for one.

    Raises:
        ValueError: what is wrong, to be read behind the setting's name.
    """
    texts = value.split("|")
    path = Path(value.strip()).expanduser()
    if len(texts) == 1 and (_is_file(path) or path.suffix.lower() == ".txt"):
        try:
            texts = path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise ValueError(
                f"{path} does not exist; give a file with one text a line, or texts with | between them"
            ) from None
        except (OSError, UnicodeDecodeError):
            raise ValueError(f"{path} cannot be read as UTF-8 text") from None
    found = [text for text in texts if text.strip()]
    if not found:
        raise ValueError("holds no text; give a file with one text a line, or texts with | between them")
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text that is too long for a path
        return False


def _all_is_none(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() == "all" else value


def _normal_list(value: str | None) -> str | None:
    """The same in one spelling, so that a resumed run knows it again."""
    words = [":".join(part.strip() for part in word.split(":")) for word in (value or "").lower().split(",")]
    return value and ",".join(words)


Count = Annotated[int, Field(ge=1)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
OptionalCount = Annotated[Count | None, BeforeValidator(_all_is_none)]
ColumnName = Annotated[str, Field(min_length=1)]
StageList = Annotated[str, AfterValidator(lambda text: "".join(text.split()))]  # a blank is no difference at a resume
Word = Annotated[str, AfterValidator(lambda text: text.strip().lower())]


def _setting(default: Any, help: str, *aliases: str, **constraints: Any) -> Any:
    """A field with its one-line meaning and its other names."""
    return Field(default, description=help, json_schema_extra={"aliases": list(aliases)}, **constraints)


class Settings(BaseSettings):
    """All settings; the field ``batch_size`` is the setting BATCH_SIZE. Made by ``load_settings`` alone."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    device: Literal["auto", "cuda", "cpu", "mps"] = _setting("auto", "where to train: auto, cuda, cpu, mps")
    mixed_precision: Literal["bf16", "fp16", "no"] = _setting("bf16", "precision of the computation: bf16, fp16, no")
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = _setting(
        "auto", "attention: auto (FlashAttention 2 where it works, else sdpa), flash_attention_2, sdpa, eager"
    )
    weights_precision: Literal["fp32", "bf16"] = _setting(
        "fp32",
        "in which the weights that train are kept: fp32, or bf16 with stochastic rounding (half the memory, with "
        "gradients that lose bits over many micro-batches; needs torchao)",
    )
    gradient_checkpointing: bool = _setting(
        False, "keep little for the backward pass and compute the rest again: much less memory, up to a fifth slower"
    )
    compile: bool = _setting(False, "compile the layers with torch.compile; the first steps take minutes")
    prefix_cache: Literal["off", "ram", "disk"] = _setting(
        "off", "keep what the frozen layers below the first trained one compute for each row: off, ram, disk"
    )
    prefix_cache_gb: float = _setting(16.0, "how large the prefix cache may grow (10^9 bytes)", gt=0)
    prefix_cache_dir: UserPath = _setting(Path("./data/prefix_cache"), "where PREFIX_CACHE=disk lies")
    memory_profile: Literal["auto", "16gb", "24gb", "40gb", "80gb"] | None = _setting(
        None,
        "memory of the GPU: picks micro-batch, checkpointing, optimizer and weights' precision, for the same rows of a "
        "step; auto takes the GPU's own; default nothing is picked",
    )
    num_workers: int = _setting(0, "data loading workers per process", ge=0, le=64)

    init_model_path: str = _setting(
        "Qwen/Qwen3-TTS-12Hz-1.7B-Base",
        "base: Hub id, folder, or tiny / tiny-random / tiny-random-0.6b for an embedded model",
        "MODEL_PATH",
        min_length=1,
    )
    tokenizer_path: str | None = _setting(None, "12 Hz speech tokenizer, Hub id or folder; default the base's own")
    output_dir: UserPath = _setting(Path("./output"), "where checkpoints and logs go", "OUTPUT_MODEL_PATH")
    overwrite_output: bool = _setting(False, "replace a run in OUTPUT_DIR that RESUME does not go on with")
    resume: str = _setting(
        "auto",
        "auto (go on with the run in OUTPUT_DIR where it has the same settings and data), never, or the folder of a "
        "state or a run",
        min_length=1,
    )

    data_mode: Literal["jsonl", "direct", "none"] = _setting(
        "jsonl",
        "rows from TRAIN_JSONL, encoded where codes are missing (jsonl), streamed from DATASET_NAME (direct), "
        "or from TRAIN_JSONL without ever encoding or downloading (none)",
    )
    train_jsonl: UserPath = _setting(Path("./data/train.jsonl"), "training rows")
    validation_jsonl: UserPath = _setting(
        Path("./data/validation.jsonl"), "validation rows; may be missing; /dev/null = no file at all"
    )
    validation_fraction: float = _setting(
        0.05, "share held out for validation where there is no validation file; 0 = none", ge=0, le=0.5
    )
    max_train_samples: OptionalCount = _setting(None, "use only the first so many training rows; default all")
    max_eval_samples: OptionalCount = _setting(None, "use only the first so many validation rows; default all")
    speaker_balance: float = _setting(
        0.0,
        "how far speakers are balanced: 0 (every clip once an epoch) to 1 (each speaker has the same share of an "
        "epoch); between, n clips have a share like n^(1 - SPEAKER_BALANCE)",
        ge=0,
        le=1,
    )
    curriculum: Literal["none", "short_first"] = _setting(
        "none", "none, or short_first: the first epochs take the clips in the order of their length, shortest first"
    )
    curriculum_epochs: Count = _setting(1, "so many epochs are in that order, the others are shuffled")
    text_column: ColumnName = _setting("text", "row key or column of the transcript")
    audio_column: ColumnName = _setting("audio", "row key or column of the audio file")
    speaker_column: ColumnName | None = _setting(None, "row key or column of the speaker; default the key speaker")
    language_column: ColumnName | None = _setting(None, "row key or column of the language; default the key language")
    dataset_name: str = _setting(
        "vaghawan/hausa-tts-22k",
        "speech dataset: Hub id, folder or table file; if set, a missing TRAIN_JSONL is prepared from it",
        min_length=1,
    )
    dataset_config: str | None = _setting(None, "configuration name of the dataset")
    train_split: str = _setting("train", "split to train on", min_length=1)
    validation_split: str = _setting("validation", "split to validate on; may be missing", min_length=1)
    save_audio: bool = _setting(False, "prepare: keep the clips that the dataset embeds as files beside the JSONL")
    shuffle_buffer_rows: int = _setting(1000, "direct: rows of the shuffle buffer; 0 = the order of the split", ge=0)
    codes_cache_dir: UserPath = _setting(Path("./data/codes_cache"), "direct: where codes are kept for later epochs")
    codes_cache_gb: float = _setting(20.0, "direct: how large that folder may grow; 0 = codes are not kept", ge=0)
    augment_copies: int = _setting(
        0, "altered copies of each training clip, encoded as extra rows; 0 = off", ge=0, le=20
    )
    augment_speed: float = _setting(
        0.1, "copies: largest change of speed, at the same pitch (0.1 = 0.9 to 1.1); 0 = none", ge=0, le=0.5
    )
    augment_pitch_semitones: float = _setting(
        2.0, "copies: largest change of pitch, at the same length, in semitones; 0 = none", ge=0, le=12
    )
    augment_gain_db: float = _setting(6.0, "copies: largest change of level, in dB; 0 = none", ge=0, le=40)
    augment_noise_dir: UserPath | None = _setting(
        None, "copies: folder of noise files, one of which lies behind each copy; default no noise"
    )
    augment_noise_snr_db: float = _setting(20.0, "copies: how far that noise lies below the clip, in dB", ge=-10, le=80)
    data_check: Literal["stop", "warn", "off"] = _setting(
        "stop", "check of the rows before training: stop (errors stop the run), warn (they are only shown), off"
    )
    prepare_only: bool = _setting(False, "prepare the data, walk the loader once, print shapes and stop")

    speaker_name: str = _setting("reference_speaker", "speaker of rows that name none; the name to speak with later")
    ref_audio_path: UserPath | None = _setting(None, "reference clip for rows that name none; default one is chosen")
    ref_text: str | None = _setting(None, "transcript of REF_AUDIO_PATH; written into prepared rows")
    speaker_embedding: Literal["mean", "first", "longest"] = _setting(
        "mean", "vector of a speaker with several references: their mean, that of the first, or of the longest"
    )
    speaker_embedding_trainable: bool = _setting(
        False, "the speakers' vectors train as well, from what the speaker encoder gives"
    )
    speaker_encoder_path: str | None = _setting(
        None, "Base model (Hub id or folder) whose speaker encoder is used, where INIT_MODEL_PATH has none"
    )
    export_type: Literal["custom_voice", "base"] = _setting(
        "custom_voice",
        "what checkpoints are: custom_voice (speaks by name, generate_custom_voice) or base (keeps the speaker encoder "
        "and clones, generate_voice_clone)",
    )
    freeze_speaker_encoder: bool = _setting(
        True, "the encoder is only read before training; false is accepted and says so"
    )

    num_epochs: int = _setting(3, "passes over the training rows", ge=1, le=100_000)
    max_steps: OptionalCount = _setting(None, "stop after so many optimizer steps; default NUM_EPOCHS decides")
    batch_size: int = _setting(2, "utterances per process and micro-batch", ge=1, le=4096)
    max_frames_per_batch: OptionalCount = _setting(
        None, "instead of BATCH_SIZE: as many utterances per process and micro-batch as have so many codec frames"
    )
    gradient_accumulation_steps: int = _setting(4, "micro-batches per optimizer step", ge=1, le=65536)
    effective_batch_size: OptionalCount = _setting(
        None,
        "a check: must equal BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS x processes; with neither set, MEMORY_PROFILE "
        "divides it",
    )
    learning_rate: float = _setting(2e-5, "peak learning rate", "LR", gt=0, le=1)
    lr_scaling: Literal["none", "linear", "sqrt"] = _setting(
        "none", "how LEARNING_RATE grows with the rows of a step (over all processes): none, linear, sqrt"
    )
    lr_scaling_base_batch_size: Count = _setting(8, "rows of a step that LEARNING_RATE was chosen for")
    lr_scheduler: str = _setting("cosine", "a name of transformers' get_scheduler")
    lr_min: float = _setting(0.0, "final learning rate of the cosine schedule", ge=0, le=1)
    lr_num_cycles: OptionalCount = _setting(None, "warm restarts of the cosine schedule; default none")
    warmup_steps: int = _setting(100, "optimizer steps of linear warm-up; at most a tenth of the run", ge=0)
    weight_decay: float = _setting(0.01, "AdamW weight decay; none on embeddings, norms and biases", ge=0, le=1)
    max_grad_norm: float = _setting(1.0, "gradient norm is clipped to this", gt=0)
    train_layout: Literal["non_streaming", "streaming", "both"] = _setting(
        "non_streaming",
        "how rows are laid out: non_streaming (the whole text first, generate_custom_voice's default), streaming (a "
        "text token a frame, non_streaming_mode=False), both (either for each row, drawn anew in every epoch)",
    )
    language_mix: float = _setting(
        0.0,
        "share of the rows with a language, drawn anew in every epoch, that train as Auto, so that both work",
        ge=0,
        le=1,
    )
    new_languages: Annotated[str | None, AfterValidator(_normal_list)] = _setting(
        None,
        "languages to add, such as hausa,yoruba; hausa:english starts from English, else from the mean of all",
    )
    instruct_dropout: float = _setting(
        0.0, "share of the rows with an instruction, drawn anew in every epoch, that train without it", ge=0, le=1
    )
    icl_fraction: float = _setting(
        0.0,
        "share of the rows, drawn anew in every epoch, that train in context: behind the transcript and the codes of "
        "their reference, as generate_voice_clone speaks; needs EXPORT_TYPE=base",
        ge=0,
        le=1,
    )
    reference_sampling: Literal["fixed", "same_speaker"] = _setting(
        "fixed",
        "with EXPORT_TYPE=base a row's reference is its ref_audio (fixed), or another clip of its speaker, drawn anew "
        "in every epoch (same_speaker), so that cloning generalises",
    )
    sub_talker_loss_weight: float = _setting(0.3, "weight of codebooks 1-15 beside codebook 0", ge=0, le=100)
    sub_talker_frame_fraction: float = _setting(
        1.0,
        "share of the frames, drawn anew in every epoch, that the sub-talker trains on; validation takes all",
        gt=0,
        le=1,
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = _setting(
        "adamw", "adamw, adamw_8bit (moments in 8 bits; needs torchao) or adafactor (factored second moments only)"
    )
    seed: int = _setting(42, "seed of new weights, held-out rows and row order", ge=0, le=2**32 - 1)

    replace_last_n_layers: int = _setting(2, "how many of the talker's last layers are made anew", ge=0)
    add_new_layers: int = _setting(4, "how many layers are added on top", ge=0, le=128)
    freeze_original_layers: bool = _setting(
        True, "train only new layers, final norm, codec head and sub-talker; 0, 0 and false = full fine-tuning"
    )
    train_text_embedding: bool = _setting(
        False, "train the text embedding table as well, a sixth of all weights of the 1.7B"
    )
    train_codec_embedding: bool = _setting(
        False, "train the codec embedding tables (of all 16 codebooks) where FREEZE_ORIGINAL_LAYERS freezes them"
    )
    lora_rank: int = _setting(
        0,
        "train adapters (LoRA) of this rank beside frozen weights, 8 is the usual start; 0 = off. The layer settings "
        "then default to 0 new layers",
        ge=0,
        le=1024,
    )
    lora_alpha: float = _setting(16.0, "adapters are multiplied by LORA_ALPHA / LORA_RANK", gt=0)
    lora_dropout: float = _setting(
        0.05, "share of an adapter's inputs that are left out at random in training", ge=0, lt=1
    )
    lora_targets: str = _setting(
        "all",
        "what gets adapters: attention, mlp (of the talker), sub_talker, all, or names of linear maps; separated by "
        "commas",
        min_length=1,
    )
    lora_export_scale: float = _setting(
        1.0, "how much of what the adapters learnt goes into best/ and last/; adapter/ beside them has all", gt=0, le=4
    )
    layer_init: Literal["preserve", "copy", "xavier"] = _setting(
        "preserve",
        "preserve (the model starts as the base), copy (each new layer starts with the weights of the layer before it) "
        "or xavier (new layers start from random weights)",
    )
    train_stages: StageList | None = _setting(
        None,
        "what trains when: stages such as embeddings:200,new_layers:500,all, each with its optimizer steps; of "
        "embeddings, new_layers, talker, sub_talker, heads, adapters, all, joined by +. Default all, always",
    )
    ema_decay: float = _setting(
        0.0,
        "validate and export a running average of the weights, of which every step keeps this share (0.999, say); "
        "0 = off",
        ge=0,
        lt=1,
    )

    logging_steps: Count = _setting(10, "log every so many optimizer steps")
    save_steps: Count = _setting(500, "checkpoint-N/ and a state to resume from, every so many optimizer steps")
    save_minutes: float | None = _setting(
        None, "last/ and a state to resume from, every so many minutes as well; default by steps only", gt=0
    )
    eval_steps: Count = _setting(500, "validate every so many optimizer steps, besides every epoch's end")
    sample_steps: int | None = _setting(
        None, "speak EVAL_TEXTS every so many optimizer steps, and at the end; 0 = off, default EVAL_STEPS", ge=0
    )
    eval_texts: str | None = _setting(
        None,
        "what samples say: a text file with one text a line, or texts separated by a vertical bar; default the first "
        "few validation (else training) texts",
    )
    save_total_limit: Count = _setting(3, "how many checkpoint-N/ to keep")
    save_epochs: bool = _setting(False, "keep epoch-N/ as well, outside the rotation")
    epoch_folder: Literal["epoch", "checkpoint-epoch"] = _setting(
        "epoch", "what SAVE_EPOCHS names them: epoch (epoch-0/, …) or checkpoint-epoch (as the official script does)"
    )
    verify_roundtrip: int = _setting(
        0, "after training, generate this many training clips with stock qwen-tts and count codes; 0 = off", ge=0
    )
    compare_jsonl: UserPath | None = _setting(
        None,
        "rows with recordings that training has not heard: at the end the base and the checkpoint say their texts, "
        "into OUTPUT_DIR/comparison; default off",
    )
    best_metric: Word = _setting(
        "loss",
        "figure of the validation log that best/ is chosen by: loss, accuracy, speaker_embedding_similarity, wer, … "
        "(docs/results.md lists them)",
    )
    early_stopping_patience: int = _setting(
        0, "end the run after so many evaluations in a row without a better BEST_METRIC; 0 = off", ge=0
    )
    report_to: Word | None = _setting(
        None, "trackers: wandb, tensorboard, both (wandb,tensorboard) or none; default what USE_WANDB says"
    )

    asr_model: str | None = _setting(
        None,
        "speech recogniser for the word errors of the samples: Hub id or folder of a transformers model, such as "
        "openai/whisper-large-v3-turbo; default not measured",
        min_length=1,
    )
    mos_model: str | None = _setting(
        None,
        "predictor of an opinion score for the samples: distillmos, dnsmos, utmos, or a TorchScript file; default not "
        "measured",
        min_length=1,
    )

    use_wandb: bool = _setting(
        True, "log to Weights & Biases, the short form of REPORT_TO; without a key and a terminal it logs offline"
    )
    wandb_project: str = _setting("qwen3-tts-hausa", "W&B project", min_length=1)
    wandb_run_name: str | None = _setting(None, "W&B run name")
    wandb_entity: str | None = _setting(None, "W&B user or team")
    upload_to_hub: bool = _setting(
        False,
        "send best/ and last/ to repositories on the Hugging Face Hub, which the next two name",
        "UPLOAD_TO_HF",
    )
    hub_model_id_best: str | None = _setting(
        None, "repository of best/, owner/name; made when it is missing. Default best/ stays here", "HF_BEST_MODEL_REPO"
    )
    hub_model_id_last: str | None = _setting(
        None, "repository of last/, owner/name, another one; default last/ stays here", "HF_LAST_MODEL_REPO"
    )
    hub_private: bool = _setting(True, "repositories that are made are private; those that are there stay as they are")
    hub_every: Literal["end", "save"] = _setting(
        "end", "send them at the end of the run, or, beside the training, after each save of one (save)"
    )
    hf_token: SecretStr | None = _setting(
        None, "Hugging Face token; never printed, logged or saved. Default that of `hf auth login`"
    )

    @property
    def has_new_layers(self) -> bool:
        """Whether talker layers are replaced or added."""
        return self.replace_last_n_layers + self.add_new_layers > 0

    def lora_words(self) -> list[str]:
        """The words of LORA_TARGETS."""
        return [word.strip() for word in self.lora_targets.split(",") if word.strip()]

    def new_language_names(self) -> list[tuple[str, str | None]]:
        """NEW_LANGUAGES as (name, the language that it starts from or None), in lower case."""
        words = [word.strip().lower() for word in (self.new_languages or "").split(",") if word.strip()]
        pairs = [word.partition(":") for word in words]
        return [(name.strip(), relative.strip() or None) for name, _, relative in pairs]

    def trackers(self) -> tuple[str, ...]:
        """The services that the run reports to, of ``TRACKERS``."""
        if self.report_to is None:
            return ("wandb",) if self.use_wandb else ()
        words = [word.strip() for word in self.report_to.split(",")]
        return tuple(word for word in TRACKERS if word in words)

    def stages(self) -> list[Stage]:
        """The stages of TRAIN_STAGES; [] where all trains always."""
        return parse_stages(self.train_stages) if self.train_stages else []

    @property
    def steps_between_samples(self) -> int:
        """Optimizer steps from one time to the next that the model speaks; 0 where it never does."""
        return self.eval_steps if self.sample_steps is None else self.sample_steps

    def texts_to_speak(self) -> list[str]:
        """The texts of EVAL_TEXTS as they stand there; [] where it is unset.

        Raises:
            ValueError: what is wrong, to be read behind the setting's name.
        """
        return read_eval_texts(self.eval_texts) if self.eval_texts is not None else []

    def rows_per_step(self, num_processes: int) -> int:
        """Rows of an optimizer step, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps * num_processes

    def scaled_learning_rate(self, num_processes: int) -> float:
        """LEARNING_RATE, scaled as LR_SCALING says: by k or the square root of k for k times the base's rows."""
        ratio = self.rows_per_step(num_processes) / self.lr_scaling_base_batch_size
        return self.learning_rate * {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.lr_scaling]

    @classmethod
    def settings_customise_sources(cls, settings_cls: type[BaseSettings], init_settings: Any, **_: Any) -> tuple:
        """Only what ``load_settings`` passes: it has resolved file, environment and aliases, with their conflicts."""
        return (init_settings,)

    def repositories(self) -> dict[str, str]:
        """Checkpoint ("best", "last") -> the repository that it is sent to; {} without UPLOAD_TO_HUB."""
        named = {"best": self.hub_model_id_best, "last": self.hub_model_id_last}
        return {name: repository for name, repository in named.items() if repository} if self.upload_to_hub else {}

    def is_set(self, field: str) -> bool:
        """Whether the user set this field, as opposed to its default."""
        return field in self.model_fields_set

    def demands_validation_file(self) -> bool:
        """Whether the user named one: VALIDATION_JSONL=/dev/null names none, not even the default one."""
        return self.is_set("validation_jsonl") and self.validation_jsonl != Path(os.devnull)

    def public(self) -> dict[str, Any]:
        """Name -> JSON value of every setting, secrets left out."""
        values = self.model_dump(mode="json")
        secret = {name for name, value in self if isinstance(value, SecretStr) or name == "hf_token"}
        return {name.upper(): value for name, value in values.items() if name not in secret}

    def describe(self) -> str:
        """The resolved settings as aligned lines; what the user set is marked with ``*``."""
        lines = []
        for name, value in self.public().items():
            mark = "*" if self.is_set(name.lower()) else " "
            shown = "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            lines.append(f"  {mark} {name:<28} {shown}")
        return "\n".join(["Settings (* set by you):", *lines])

    def save(self, path: Path) -> None:
        """Writes ``public()`` as JSON."""
        write_json(path, self.public())


# -------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Given:
    """One assignment that the user made."""

    name: str
    value: str
    origin: str  # "environment", or "<file> line <n>"


def canonical_names() -> dict[str, str]:
    """Every name that users may type -> the field it sets."""
    names = {}
    for field, info in Settings.model_fields.items():
        for name in (field.upper(), *info.json_schema_extra["aliases"]):
            names[name] = field
    return names


def load_settings(overrides: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """Reads, resolves and checks all settings.

    Args:
        overrides: field -> value, stronger than every other source (for command-line forms).
        environment: default ``os.environ``.

    Raises:
        UserError: with all problems of all sources.
    """
    environment = os.environ if environment is None else environment
    problems: list[str] = []
    in_file = _read_env_file(environment, problems)
    names = canonical_names()
    in_environment = [_Given(name, environment[name], "environment") for name in names if environment.get(name, "")]
    given: dict[str, _Given] = {}
    for source in (in_file, in_environment):  # later sources are stronger
        given |= _resolve_aliases(source, names, problems)
    values = {field: assignment.value for field, assignment in given.items()} | dict(overrides or {})
    settings = _validate(values, given, int(environment.get("WORLD_SIZE") or 1), problems)
    if problems:
        heading = "1 problem in the settings" if len(problems) == 1 else f"{len(problems)} problems in the settings"
        raise UserError("\n  - ".join([f"{heading}:", *problems]))
    _export_pass_through(in_file, settings)
    return settings


def export_variables_of_file(environment: Mapping[str, str] | None = None) -> None:
    """Makes HF_TOKEN and the file's variables of other tools visible to them, for commands that read no setting: what
    is wrong in the file is not their concern."""
    ours = canonical_names().keys() - {"HF_TOKEN"}
    for assignment in _read_env_file(os.environ if environment is None else environment, []):
        if assignment.name.startswith(PASS_THROUGH_PREFIXES) and assignment.name not in ours:
            _export(assignment.name, assignment.value)


def _read_env_file(environment: Mapping[str, str], problems: list[str]) -> list[_Given]:
    path = Path(environment.get("ENV_FILE") or DEFAULT_ENV_FILE)
    if path == Path(os.devnull):  # no file, not even the default one
        return []
    if not path.is_file():
        if environment.get("ENV_FILE"):
            problems.append(f"ENV_FILE: {path} does not exist")
        return []
    try:
        with path.open(encoding="utf-8") as stream:
            bindings = list(parse_stream(stream))
    except (OSError, UnicodeDecodeError):
        problems.append(f"ENV_FILE: {path} cannot be read as UTF-8 text")
        return []
    pairs = [(binding.key, binding.value) for binding in bindings if binding.key and binding.value is not None]
    values = resolve_variables(pairs, override=True)
    given: dict[str, _Given] = {}
    for binding in bindings:
        origin = f"{path} line {binding.original.line + _leading_newlines(binding.original.string)}"
        if binding.error or (binding.key and binding.value is None):  # a name alone, or a stray secret
            problems.append(f"{origin}: not of the form NAME=value")
        elif binding.key and binding.key in given:
            problems.append(f"{origin}: {binding.key} stands twice (first: {given[binding.key].origin}); keep one")
        elif binding.key:
            given[binding.key] = _Given(binding.key, values[binding.key] or "", origin)
    _check_names(given.values(), problems)
    return [assignment for assignment in given.values() if assignment.value]


def _leading_newlines(text: str) -> int:
    return text[: len(text) - len(text.lstrip())].count("\n")


def _check_names(given: Iterable[_Given], problems: list[str]) -> None:
    """Unknown names of the file are errors: a misspelt setting must not be ignored. Values are never shown."""
    known = canonical_names()
    for assignment in given:
        if assignment.name in known:
            continue
        nearest = difflib.get_close_matches(assignment.name.upper(), known, n=1, cutoff=0.6)
        if assignment.name.startswith(PASS_THROUGH_PREFIXES):
            # HF_TOKNE would pass for a variable of the hub's; a near-miss of one of our names is taken for a mistake.
            nearest = difflib.get_close_matches(assignment.name, known, n=1, cutoff=0.85)
            if not nearest:
                continue
        hint = f"; did you mean {nearest[0]}?" if nearest else "; .env.training.example lists all settings"
        problems.append(f"{assignment.origin}: unknown setting {assignment.name}{hint}")


def _resolve_aliases(source: list[_Given], names: Mapping[str, str], problems: list[str]) -> dict[str, _Given]:
    resolved: dict[str, _Given] = {}
    for assignment in source:
        field = names.get(assignment.name)
        if field is None:
            continue
        other = resolved.get(field)
        if other and not _same_value(field, other.value, assignment.value):
            places = f"{other.name} ({other.origin}) and {assignment.name} ({assignment.origin})"
            problems.append(f"{places} are the same setting with different values; keep one")
        resolved[field] = assignment
    return resolved


def _same_value(field: str, one: str, other: str) -> bool:
    """As the setting reads them: true and 1, 0.5 and .5, out and out/."""
    reader = TypeAdapter(Settings.model_fields[field].rebuild_annotation())
    try:
        return one == other or reader.validate_python(one) == reader.validate_python(other)
    except ValidationError:
        return False


def _export_pass_through(in_file: list[_Given], settings: Settings) -> None:
    """Makes the file's variables of other tools visible to them; HF_ENDPOINT, say, is read at the hub's import."""
    names = canonical_names()
    for assignment in in_file:
        if assignment.name not in names:
            _export(assignment.name, assignment.value)
    if settings.hf_token:
        _export("HF_TOKEN", settings.hf_token.get_secret_value())


def _export(name: str, value: str) -> None:
    if not os.environ.get(name):  # an empty value means unset
        os.environ[name] = value


# ------------------------------------------------------------------------------------------------------- checking


def _validate(
    values: dict[str, Any], given: Mapping[str, _Given], num_processes: int, problems: list[str]
) -> Settings | None:
    def where(field: str) -> str:
        return f"{given[field].name} ({given[field].origin})" if field in given else field.upper()

    failed: set[str] = set()
    try:
        settings = Settings(**values)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            field = str(detail["loc"][0])
            if field not in failed:
                problems.append(f"{where(field)}: {detail['msg'].replace('Input should be', 'must be')}")
            failed.add(field)
        settings = Settings(**{field: value for field, value in values.items() if field not in failed})
    settings = _without_new_layers(settings) if settings.lora_rank else settings
    for fields, check in _CROSS_CHECKS:
        if failed.isdisjoint(fields) and (message := check(settings, num_processes)):
            problems.append(f"{where(fields[0])}: {message}")
    return _with_short_form(settings) if settings.report_to else settings


def _with_short_form(settings: Settings) -> Settings:
    """USE_WANDB as REPORT_TO has it, so that what is shown and saved does not contradict itself."""
    changed = settings.model_copy(update={"use_wandb": "wandb" in settings.trackers()})
    if not settings.is_set("use_wandb"):
        changed.model_fields_set.discard("use_wandb")  # nobody set it
    return changed


def _without_new_layers(settings: Settings) -> Settings:
    """LORA_RANK's own defaults of the layer settings."""
    unset = [name for name in ("replace_last_n_layers", "add_new_layers") if not settings.is_set(name)]
    changed = settings.model_copy(update=dict.fromkeys(unset, 0))
    changed.model_fields_set.difference_update(unset)  # nobody set them
    return changed


def _check_lora(settings: Settings, _: int) -> str | None:
    if not settings.lora_words():
        return "LORA_TARGETS names nothing"
    if settings.lora_rank and not settings.freeze_original_layers:
        return "adapters stand beside frozen weights; set FREEZE_ORIGINAL_LAYERS=true, or LORA_RANK=0 to train them all"
    return None


def _check_best_metric(settings: Settings, _: int) -> str | None:
    if settings.best_metric in METRICS:
        return None
    nearest = difflib.get_close_matches(settings.best_metric, METRICS, n=1, cutoff=0.6)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"is no figure of the validation log{hint}; set one of {', '.join(METRICS)}"


def _check_report_to(settings: Settings, _: int) -> str | None:
    if settings.report_to is None:
        return None
    words = [word.strip() for word in settings.report_to.split(",")]
    if words != ["none"] and not set(words) <= set(TRACKERS):
        return f"must be {', '.join(TRACKERS)}, several of them joined by commas, or none"
    if settings.is_set("use_wandb") and settings.use_wandb != ("wandb" in words):
        wandb = "without" if settings.use_wandb else "with"
        return (
            f"is {wandb} wandb, but USE_WANDB is {str(settings.use_wandb).lower()}; unset USE_WANDB, which is its "
            "short form"
        )
    return None


def _check_stages(settings: Settings, _: int) -> str | None:
    if settings.train_stages is None:
        return None
    try:
        parse_stages(settings.train_stages)
    except ValueError as error:
        return str(error)
    if settings.prefix_cache != "off":
        return (
            "does not work with PREFIX_CACHE, since the lowest layer that trains differs from stage to stage; set "
            "PREFIX_CACHE=off, or unset TRAIN_STAGES"
        )
    return None


def divides_rows(settings: Settings) -> bool:
    """Whether MEMORY_PROFILE is to divide EFFECTIVE_BATCH_SIZE among micro-batches."""
    is_open = not (settings.is_set("batch_size") or settings.is_set("gradient_accumulation_steps"))
    return bool(settings.memory_profile and settings.effective_batch_size) and is_open


def _check_effective_batch(settings: Settings, num_processes: int) -> str | None:
    product = settings.rows_per_step(num_processes)
    if settings.effective_batch_size in (None, product) or settings.max_frames_per_batch:
        return None
    if divides_rows(settings):
        if settings.effective_batch_size % num_processes == 0:
            return None
        return f"is {settings.effective_batch_size}, which {num_processes} processes cannot share equally; change it"
    return (
        f"is {settings.effective_batch_size}, but BATCH_SIZE {settings.batch_size} x GRADIENT_ACCUMULATION_STEPS "
        f"{settings.gradient_accumulation_steps} x {num_processes} process(es) = {product}; change one of them"
    )


def _check_max_frames(settings: Settings, _: int) -> str | None:
    if settings.max_frames_per_batch is None:
        return None
    if settings.is_set("batch_size"):
        return "takes the place of BATCH_SIZE; unset one of them"
    if settings.effective_batch_size or settings.lr_scaling != "none":
        name = "EFFECTIVE_BATCH_SIZE" if settings.effective_batch_size else "LR_SCALING"
        return f"leaves the number of rows of a step open, and {name} needs it; unset one of them"
    if settings.data_mode == "direct":
        return "needs the lengths of all rows ahead, which DATA_MODE=direct does not know; set BATCH_SIZE instead"
    return None


def _check_scheduler(settings: Settings, _: int) -> str | None:
    if settings.lr_scheduler not in LR_SCHEDULERS:
        return f"must be one of {', '.join(LR_SCHEDULERS)}"
    return None


def _check_lr_min(settings: Settings, _: int) -> str | None:
    if settings.lr_min and settings.lr_scheduler not in ("cosine", "cosine_with_min_lr"):
        return "is for LR_SCHEDULER=cosine only"
    if settings.lr_min and settings.lr_min >= settings.learning_rate:
        return "must be below LEARNING_RATE"
    return None


def _check_cycles(settings: Settings, _: int) -> str | None:
    if settings.lr_num_cycles and settings.lr_scheduler not in ("cosine", "cosine_with_restarts"):
        return "is for LR_SCHEDULER=cosine or cosine_with_restarts only"
    if settings.lr_num_cycles and settings.lr_min:
        return "cannot be combined with LR_MIN; unset one of them"
    return None


def _check_files(settings: Settings, _: int) -> str | None:
    if settings.train_jsonl.resolve() == settings.validation_jsonl.resolve():
        return "is the same file as VALIDATION_JSONL; unset one, VALIDATION_FRACTION holds rows out"
    return None


def _check_output(settings: Settings, _: int) -> str | None:
    if settings.output_dir.exists() and not settings.output_dir.is_dir():
        return f"{settings.output_dir} is a file, a folder is needed"
    return None


def _check_eval_texts(settings: Settings, _: int) -> str | None:
    try:
        settings.texts_to_speak()
    except ValueError as error:
        return str(error)
    return None


def _check_speaker(settings: Settings, _: int) -> str | None:
    return speaker_name_problem(settings.speaker_name)


def _check_new_languages(settings: Settings, _: int) -> str | None:
    names = [name for name, _ in settings.new_language_names()]
    if settings.new_languages is not None and not names:
        return "names no language"
    for name in names:
        if (
            not name or not name.isprintable() or name == "auto" or "dialect" in name
        ):  # what stock does not take for one
            return f'"{name}" cannot be the name of a language; give names such as hausa,yoruba or hausa:english'
    if repeated := [name for name in names if names.count(name) > 1]:
        return f"names {repeated[0]} twice; keep one"
    return None


def _check_language_mix(settings: Settings, _: int) -> str | None:
    if settings.new_languages and settings.language_mix == 1:
        return "of 1 would train all rows as Auto, and NEW_LANGUAGES nothing; lower it"
    return None


def _check_ref_text(settings: Settings, _: int) -> str | None:
    if settings.ref_text and settings.ref_audio_path is None:
        return "is the transcript of REF_AUDIO_PATH, which is not set; rows have theirs in ref_text"
    return None


def _check_export_type(settings: Settings, _: int) -> str | None:
    if settings.export_type == "custom_voice":
        return None
    if settings.speaker_embedding_trainable:
        return "a base checkpoint takes vectors from its speaker encoder; set SPEAKER_EMBEDDING_TRAINABLE=false"
    if settings.prefix_cache != "off" and (settings.reference_sampling == "same_speaker" or settings.icl_fraction % 1):
        return "with other references in every epoch there is nothing to keep; set PREFIX_CACHE=off"
    return None


def _check_in_context(settings: Settings, _: int) -> str | None:
    return _what_references_need(settings) if settings.icl_fraction else None


def _check_reference_sampling(settings: Settings, _: int) -> str | None:
    return _what_references_need(settings) if settings.reference_sampling != "fixed" else None


def _what_references_need(settings: Settings) -> str | None:
    """Why rows cannot have references of their own, or None."""
    if settings.export_type != "base":
        return "is for EXPORT_TYPE=base; a custom_voice checkpoint clones nobody, its speakers have one vector each"
    if settings.data_mode == "direct":
        return "needs all rows ahead, which DATA_MODE=direct does not have; set DATA_MODE=jsonl"
    return None


def _check_upload(settings: Settings, _: int) -> str | None:
    if settings.upload_to_hub and not settings.repositories():
        return "needs a repository: set HUB_MODEL_ID_BEST, HUB_MODEL_ID_LAST or both, as owner/name"
    return None


def _check_token(settings: Settings, _: int) -> str | None:
    return token_problem(settings.hf_token.get_secret_value()) if settings.hf_token else None


def _check_best_repository(settings: Settings, _: int) -> str | None:
    return repository_problem(settings.hub_model_id_best) if settings.hub_model_id_best else None


def _check_last_repository(settings: Settings, _: int) -> str | None:
    best, last = settings.hub_model_id_best, settings.hub_model_id_last
    if last is None:
        return None
    if best is not None and best.lower() == last.lower():
        return "is that of HUB_MODEL_ID_BEST, and each would replace the other there; name two, or unset one"
    return repository_problem(last)


def _check_prefix_cache(settings: Settings, _: int) -> str | None:
    if settings.prefix_cache == "off":
        return None
    if settings.lora_rank and {"attention", "mlp", "all"} & set(settings.lora_words()):
        return "there is nothing to keep, since adapters train in the lowest layer; set off, or LORA_TARGETS=sub_talker"
    if settings.new_languages or settings.speaker_embedding_trainable:
        name = "NEW_LANGUAGES" if settings.new_languages else "SPEAKER_EMBEDDING_TRAINABLE"
        return f"there is nothing to keep, since what {name} trains stands below the first layer; set it to off"
    if settings.freeze_original_layers and not (settings.train_text_embedding or settings.train_codec_embedding):
        return None
    return (
        "there is nothing to keep, since embeddings below the first layer train; set it to off, or "
        "FREEZE_ORIGINAL_LAYERS=true with TRAIN_TEXT_EMBEDDING=false and TRAIN_CODEC_EMBEDDING=false"
    )


def _check_resume(settings: Settings, _: int) -> str | None:
    # A named state may have been rotated away by the run that has gone on from it, in OUTPUT_DIR.
    if (
        settings.resume in ("auto", "never")
        or Path(settings.resume).expanduser().is_dir()
        or (settings.output_dir / "state").is_dir()
    ):
        return None
    return f"{settings.resume} is no folder; set auto, never, or the folder of a state or of a run"


def _check_weights_precision(settings: Settings, _: int) -> str | None:
    if settings.weights_precision == "bf16" and settings.mixed_precision != "bf16":
        return "bf16 is for MIXED_PRECISION=bf16 only; set both, or fp32 here"
    if settings.weights_precision == "bf16" and settings.optimizer == "adafactor":
        return "bf16 is not for OPTIMIZER=adafactor, under which most of them would not move; set adamw_8bit"
    return None


def _check_speaker_balance(settings: Settings, _: int) -> str | None:
    if settings.speaker_balance and settings.data_mode == "direct":
        return (
            "needs to know all clips of a speaker ahead, which DATA_MODE=direct does not; set it to 0, or prepare them"
        )
    return None


def _check_curriculum(settings: Settings, _: int) -> str | None:
    if settings.curriculum != "none" and settings.data_mode == "direct":
        return "needs the lengths of all clips ahead, which DATA_MODE=direct does not know; set none, or prepare them"
    return None


def _check_direct(settings: Settings, _: int) -> str | None:
    if settings.data_mode == "direct" and not settings.is_set("dataset_name"):
        return "direct streams a dataset; name it in DATASET_NAME"
    return None


def _check_augment(settings: Settings, _: int) -> str | None:
    if settings.augment_copies == 0:
        return None
    if settings.data_mode != "jsonl":
        what = "streams its clips" if settings.data_mode == "direct" else "encodes nothing"
        return f"copies are encoded into a file, but DATA_MODE={settings.data_mode} {what}; set 0, or DATA_MODE=jsonl"
    changes = (settings.augment_speed, settings.augment_pitch_semitones, settings.augment_gain_db)
    if not any(changes) and settings.augment_noise_dir is None:
        return (
            "copies would be the clips themselves; set AUGMENT_SPEED, AUGMENT_PITCH_SEMITONES, AUGMENT_GAIN_DB or "
            "AUGMENT_NOISE_DIR, or 0 copies"
        )
    return None


def _check_noise(settings: Settings, _: int) -> str | None:
    folder = settings.augment_noise_dir
    if settings.augment_copies and folder is not None and not folder.is_dir():
        return f"{folder} is no folder; name one with noise files, or unset it"
    return None


def _check_mos_model(settings: Settings, _: int) -> str | None:
    name = settings.mos_model
    if name is None or name in MOS_MODELS or Path(name).expanduser().is_file():
        return None
    return f"{name} is neither a file nor one of {', '.join(MOS_MODELS)}"


#: (fields that the check reads, the blamed one first; check). A check is skipped when one of its fields is bad itself.
_CROSS_CHECKS: tuple[tuple[tuple[str, ...], Callable[[Settings, int], str | None]], ...] = (
    (
        ("effective_batch_size", "batch_size", "gradient_accumulation_steps", "memory_profile"),
        _check_effective_batch,
    ),
    (("max_frames_per_batch", "batch_size", "effective_batch_size", "lr_scaling", "data_mode"), _check_max_frames),
    (("lora_rank", "lora_targets", "freeze_original_layers"), _check_lora),
    (("train_stages", "prefix_cache"), _check_stages),
    (("best_metric",), _check_best_metric),
    (("report_to", "use_wandb"), _check_report_to),
    (("lr_scheduler",), _check_scheduler),
    (("lr_min", "lr_scheduler", "learning_rate"), _check_lr_min),
    (("lr_num_cycles", "lr_scheduler", "lr_min"), _check_cycles),
    (("train_jsonl", "validation_jsonl"), _check_files),
    (("output_dir",), _check_output),
    (("eval_texts",), _check_eval_texts),
    (("speaker_name",), _check_speaker),
    (("new_languages",), _check_new_languages),
    (("language_mix", "new_languages"), _check_language_mix),
    (("ref_text", "ref_audio_path"), _check_ref_text),
    (
        ("export_type", "speaker_embedding_trainable", "prefix_cache", "reference_sampling", "icl_fraction"),
        _check_export_type,
    ),
    (("icl_fraction", "export_type", "data_mode"), _check_in_context),
    (("reference_sampling", "export_type", "data_mode"), _check_reference_sampling),
    (("upload_to_hub", "hub_model_id_best", "hub_model_id_last"), _check_upload),
    (("hf_token",), _check_token),
    (("hub_model_id_best",), _check_best_repository),
    (("hub_model_id_last", "hub_model_id_best"), _check_last_repository),
    (("weights_precision", "mixed_precision", "optimizer"), _check_weights_precision),
    (("data_mode", "dataset_name"), _check_direct),
    (("speaker_balance", "data_mode"), _check_speaker_balance),
    (("curriculum", "data_mode"), _check_curriculum),
    (
        (
            "augment_copies",
            "augment_speed",
            "augment_pitch_semitones",
            "augment_gain_db",
            "augment_noise_dir",
            "data_mode",
        ),
        _check_augment,
    ),
    (("augment_noise_dir", "augment_copies"), _check_noise),
    (
        (
            "prefix_cache",
            "freeze_original_layers",
            "train_text_embedding",
            "train_codec_embedding",
            "lora_rank",
            "lora_targets",
            "new_languages",
            "speaker_embedding_trainable",
        ),
        _check_prefix_cache,
    ),
    (("resume",), _check_resume),
    (("mos_model",), _check_mos_model),
)


def speaker_name_problem(name: str) -> str | None:
    """Why a speaker name cannot be used, or None.

    Inference looks names up in lower case in a JSON table, and people type them: so they are printable, of at most 100
    characters, and without white space at the ends.
    """
    if not name.strip():
        return "a speaker name must not be empty"
    if name != name.strip() or not name.isprintable() or len(name) > 100:
        return "a speaker name must be printable, at most 100 characters, without white space at the ends"
    return None


def token_problem(token: str) -> str | None:
    """Why this is no token of the Hub, or None; what no request can carry. The token is not repeated."""
    if re.fullmatch(r"[!-~]+", token.strip()):
        return None
    return "is no token: one is made of Latin letters, digits and _ alone; copy the whole of it"


def repository_problem(name: str) -> str | None:
    """Why this names no repository on the Hub, or None; the Hub's own rules, with an owner. The name, which may be a
    token in the wrong place, is not repeated."""
    owner, slash, rest = name.partition("/")
    if not slash or not owner or not rest or "/" in rest:
        return "names no repository; write it as owner/name, the owner being you or your organisation"
    if len(rest) > 96 or not re.fullmatch(r"[A-Za-z0-9_.-]+", owner + rest):
        return "names no repository: an owner and a name are made of letters, digits, - _ and ., the name of at most 96"
    is_odd = any(part[0] in "-." or part[-1] in "-." for part in (owner, rest))
    if is_odd or "--" in name or ".." in name or name.endswith(".git"):
        return "names no repository: - and . must not stand twice in a row or at an end, nor .git at the end"
    return None
