"""The stock package, imported without its banner, and heavy imports without needless work."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import sys
from collections.abc import Iterator
from types import ModuleType


def import_qwen_tts() -> ModuleType:
    """The package ``qwen_tts``. Its import prints a warning about flash-attn, also where nobody could install it."""
    if "qwen_tts" not in sys.modules:
        with contextlib.redirect_stdout(io.StringIO()), quick_imports():
            importlib.import_module("qwen_tts")
    return importlib.import_module("qwen_tts")  # waits where another thread has begun to import it


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """For the heavy imports inside: they make half a million objects that stay, and Python's garbage collector would
    look through them again and again meanwhile, and half a second long in every full collection afterwards."""
    was_on = gc.isenabled()
    gc.collect()  # garbage that is there already would be kept for ever
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' remarks inside: of the pad token that stock leaves unset, say, in each call of generate."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
