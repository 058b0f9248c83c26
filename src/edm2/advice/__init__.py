"""Settings for a data set, from its spectrum, its size, and the speed measured here."""

from edm2.advice.choose import DEFAULT_HOURS, suggest
from edm2.advice.pictures import check_pictures, mending_words, words_for
from edm2.advice.reasons import SUGGESTED, Advice

__all__ = [
    "DEFAULT_HOURS",
    "SUGGESTED",
    "Advice",
    "check_pictures",
    "mending_words",
    "suggest",
    "words_for",
]
