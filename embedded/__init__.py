"""The recipe of the embedded model that speaks: from espeak-ng to a base checkpoint. See README.md."""
