"""The text normaliser of VQA and EvalAI, and soft accuracy over ten human answers.

Scores of VQAv2, TextVQA and VizWiz are defined by this program, its slips included: they are kept,
and marked, because scores have to be equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_CONTRACTIONS = dict(
    pair.split("=")
    for pair in """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
    couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
    hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's
    howd=how'd howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd
    itd've=it'd've it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't
    mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've
    neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at
    'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've she's=she's shouldve=should've
    shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
    somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll
    somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've
    someonell=someone'll someones=someone's somethingd=something'd somethingd've=something'd've
    something'dve=something'd've somethingll=something'll thats=that's thered=there'd
    thered've=there'd've there'dve=there'd've therere=there're theres=there's theyd=they'd
    theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas
    wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll
    whatre=what're whats=what's whatve=what've whens=when's whered=where'd wheres=where's
    whereve=where've whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's
    whove=who've whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't
    wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll
    yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
    you'dve=you'd've youll=you'll youre=you're youve=you've
    """.split()
)
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# As published: meant to spare the period behind a digit, but "(?!<=" only forbids a literal "<=".
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_DIGIT_COMMA = re.compile(r"(?<=\d),+(?=\d)")
# As published: a flag stands where the number of replacements belongs, so later periods stay.
_PERIODS = 32

Normaliser = Callable[[str], str]


def split_words(text: str) -> str:
    """First step: lower case, no commas and question marks, a space before ``'s``.

    Example: ``split_words("Jay's, OK?")`` is ``"jay 's ok"``.
    """
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def strip_punctuation(text: str) -> str:
    """Second step: line breaks to spaces, punctuation removed or spaced, periods removed.

    A mark that stands beside a space anywhere in the text is removed wherever it stands, else each
    becomes a space; a comma between digits has all marks removed.

    Example: ``strip_punctuation("a-b. 3.5")`` is ``"a b 3.5"``.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text or _DIGIT_COMMA.search(text) is not None
        plain = plain.replace(mark, "" if beside else " ")
    return _PERIOD.sub("", plain, count=_PERIODS)


def map_words(text: str) -> str:
    """Third step: number words to digits, articles dropped, apostrophes put back.

    Example: ``map_words("The two dont")`` is ``"2 don't"``.
    """
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise(text: str) -> str:
    """All three steps: TextVQA, VizWiz and the answers uploaded for VQAv2."""
    return map_words(strip_punctuation(split_words(text)))


def normalise_vqav2(text: str) -> str:
    """Without the first step, as the official scorer of VQAv2."""
    return map_words(strip_punctuation(text))


def soft_accuracy(
    answer: str, references: Sequence[str], normaliser: Normaliser = normalise
) -> float:
    """`agreement` of the normalised answer with the normalised human answers.

    Example: ``soft_accuracy("Two.", ["2"] * 2 + ["3"] * 8)`` is 0.6.
    """
    return agreement(normaliser(answer), [normaliser(reference) for reference in references])


def agreement(answer: str, references: Sequence[str]) -> float:
    """Mean over the human answers of min(1, equal ones among the others / 3).

    Args:
        answer: normalised. Doing that twice is not the same as once.
        references: human answers, normalised, usually ten.

    Example: with 0, 1, 2, 3 and 4 of ten equal it is 0, 0.3, 0.6, 0.9 and 1.

    Raises:
        ValueError: no references.
    """
    if not references:
        raise ValueError("there are no human answers to compare with")
    same = [reference == answer for reference in references]
    total = sum(same)
    return sum(min(1.0, (total - equal) / 3) for equal in same) / len(same)
