"""Rows of the talker's codec table for new speakers and languages: the one allocator, and the ranges it takes from.

The table has 3,072 rows: 2,048 codes of codebook 0, then control ids, languages and speakers wherever the release put
them. Stock generation never predicts an id above 2,047 but codec_eos, so a free row there is nobody's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetuning.errors import UserError

#: New speakers take free rows from here to the end; the presets of the CustomVoice release lie below and in between.
FIRST_SPEAKER_ROW = 3000
#: New languages take free rows from here, behind the control ids and the languages of the release, and before 2,800.
FIRST_LANGUAGE_ROW, END_OF_LANGUAGE_ROWS = 2200, 2800


def allocate_codec_rows(config: Mapping[str, Any], count: int) -> list[int]:
    """Free rows for so many new speakers.

    Args:
        config: a base's config.json.

    Raises:
        UserError: fewer rows are free.
    """
    free = _free_rows(config, FIRST_SPEAKER_ROW, config["talker_config"]["vocab_size"])
    if count > len(free):
        raise UserError(
            f"{count} speakers, but the codec table has only {len(free)} free rows for new ones; train fewer "
            "(SPEAKER_COLUMN says how they are told apart), or EXPORT_TYPE=base, which clones and needs no rows"
        )
    return free[:count]


def allocate_language_rows(config: Mapping[str, Any], count: int) -> list[int]:
    """Free rows for so many new languages.

    Raises:
        UserError: fewer rows are free.
    """
    end = min(END_OF_LANGUAGE_ROWS, config["talker_config"]["vocab_size"])
    free = _free_rows(config, FIRST_LANGUAGE_ROW, end)
    if count > len(free):
        raise UserError(f"NEW_LANGUAGES: {count} languages, but the codec table has only {len(free)} rows for new ones")
    return free[:count]


def _free_rows(config: Mapping[str, Any], first: int, end: int) -> list[int]:
    """Rows that nothing in the configuration names."""
    talker = config["talker_config"]
    used = {value for key, value in talker.items() if key.startswith("codec_") and isinstance(value, int)}
    used |= set((talker.get("codec_language_id") or {}).values()) | set((talker.get("spk_id") or {}).values())
    return [row for row in range(first, end) if row not in used]
