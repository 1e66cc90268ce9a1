"""The stock package, imported without its banner."""

from __future__ import annotations

import contextlib
import io
from types import ModuleType


def import_qwen_tts() -> ModuleType:
    """The package ``qwen_tts``. Its import prints a warning about flash-attn, also where nobody could install it."""
    with contextlib.redirect_stdout(io.StringIO()):
        import qwen_tts
    return qwen_tts
