"""Makes the demo voice of this folder with espeak-ng (Debian package `espeak-ng`), the same files every time.

    python voices/make_english_voice.py

Writes english_voice/english_voice.wav (the reference), english_voice/clips/*.flac, and the raw row files
english_voice/train_raw.jsonl and english_voice/validation_raw.jsonl ({"audio", "text", "ref_audio"} a line, no codes).
"""

import json
import subprocess
import tempfile
from pathlib import Path

import librosa
import soundfile

FOLDER = Path(__file__).parent / "english_voice"
SAMPLE_RATE_HZ = 24_000
ESPEAK = ["espeak-ng", "-v", "en-gb", "-s", "165", "-p", "45"]

REFERENCE = "Good morning. This is the voice that the demo learns. It reads short sentences, clearly and without haste."

#: The first two begin alike, so a model that only remembers how a sentence starts would be found out.
TRAIN = """\
The train to the coast leaves at nine.
The train to the coast is late today.
Please open the window.
She sells fresh bread.
Rain is on its way.
Turn left at the church.
My brother plays the violin.
The soup needs more salt.
We met in the old library.
Nobody heard the bell.
A grey cat slept on the stairs.
Keep the change.
They walked home in the dark.
Winter came early this year.
Is there any tea left?
The museum on the hill is closed on Monday, but the garden behind it stays open.
He wrote a long letter to his sister and carried it to the post office himself.
Bring me the blue notebook.
The river runs past the mill.
I forgot my umbrella again.
Two apples and a pear, please.
The children laughed out loud.
Can you hear the sea?
That was a very good idea.
""".splitlines()

VALIDATION = """\
The bus to the city is on time.
Please close the door.
The garden needs more water.
We walked home in the rain.
""".splitlines()


def speak(text: str, path: Path) -> None:
    """Writes one sentence as 24 kHz mono 16-bit audio in the format that the path's ending names."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as spoken:
        subprocess.run([*ESPEAK, "-w", spoken.name, text], check=True)
        audio, rate = soundfile.read(spoken.name, dtype="float32")
    audio, _ = librosa.effects.trim(audio, top_db=50)
    audio = librosa.resample(audio, orig_sr=rate, target_sr=SAMPLE_RATE_HZ)
    soundfile.write(path, audio, SAMPLE_RATE_HZ, subtype="PCM_16")


def main() -> None:
    clips = FOLDER / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    speak(REFERENCE, FOLDER / "english_voice.wav")
    for name, sentences in (("train", TRAIN), ("validation", VALIDATION)):
        rows = []
        for number, text in enumerate(sentences, 1):
            file = f"clips/{name}_{number:02d}.flac"
            speak(text, FOLDER / file)
            rows.append({"audio": file, "text": text, "ref_audio": "english_voice.wav", "language": "English"})
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (FOLDER / f"{name}_raw.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
