"""Fine-tuning for Qwen3-TTS-12Hz: from audio files to a checkpoint that the stock ``qwen-tts`` package speaks with.

The rooms, in the order in which data flows through them (a room imports only from rooms before it)::

    settings → audio → codec → manifest → prompt → dataset → speakers → base_model → objective → trainer → checkpoint
"""
