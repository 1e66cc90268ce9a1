"""Fine-tuning for Qwen3-TTS-12Hz: from audio files to a checkpoint that the stock ``qwen-tts`` package speaks with.

Data flows one way: settings → audio → codec → manifest → prompt → dataset → objective → trainer → checkpoint. A room
imports only from rooms before it; docs/code.md lists them all, and tests/test_rooms.py holds them to it.
"""
