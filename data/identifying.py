"""What may tell who a patient is, by the look of it: names of columns, and texts.

One rule for the sources, which refuse such labels, and for the audit, which reports them: what one takes, the other
passes. It catches slips and no more: a surname in a column called `group` looks like any other word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

ANYWHERE = r"patient|name|birth|geburt|address|adresse|accession|e_?mail|phone|telefon|physician|doctor|surgeon"
ANYWHERE += r"|hospital|clinic(?!al)"
WORDS = (
    r"[pu]?ids?\d*|[gu]uids?|mrn|ssn|nhs|dob|yob|born|anon|empi|initials|subjects?|cases?|charts?|records?|stud(y|ies)"
)
WORDS += r"|exams?|referr?\w{0,3}|referring|referral|tel|fax|zip|zip_?code|post_?code|street|city|date\w*|files?|urls?"
WORDS += r"|(subject|case|chart|record|study|exam|image|film|scan|series|person)_?(id|no|nr|num)s?"
LAST_WORDS = r"no|nr|num|numbers?|\w*nummer|paths?|folder|directory|radiologist|operator|technologist|author|\w*datum"
LAST_WORDS += r"|\w*(?<!candi)(?<!up)date"
IDENTIFYING = re.compile(rf"{ANYWHERE}|(^|_)({WORDS})(_|$)|(^|_)({LAST_WORDS})$|^(last|first|middle|maiden)$")
HARMLESS = re.compile(
    r"difficult_negative_case|(case|exam|study|record)_(type|kind|class|category|quality)|(number|no|num)_of_\w+"
    r"|(abnormality|lesion|finding|mass|slice|frame|class|category|fold)_(id|no|nr|num|number)"
)

MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}"
DAY = r"(?:0?[1-9]|[12]\d|3[01])"
TELLING = {
    "a date": re.compile(
        rf"(?<![\d.])(?:(?:19|20)\d\d[-/.](?:0?[1-9]|1[0-2])[-/.]{DAY}|{DAY}[-/.]{DAY}[-/.](?:19|20)?\d\d"
        rf"|\d\d-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])"
        rf"|(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))(?![\d.])"
        rf"|\b(?:\d\d?[ .-]{{0,2}})?{MONTH}[ .,-]{{1,2}}(?:\d\d?,? )?(?:19|20)\d\d\b",
        re.IGNORECASE,
    ),
    "a UID": re.compile(r"(?<![\d.])[0-2](?:\.\d+){3}"),
    "an e-mail address": re.compile(r"(?<=[^\s@])@[^\s@.]+\.\w"),
    "a name in DICOM's spelling": re.compile(r"\w\^\w"),
    "a name with a title": re.compile(r"\b(?:Dr|Prof|Mrs?|Ms|Miss|Frau|Herr|Mme)\b\.? ?[A-Z]"),
    "a phone number": re.compile(r"(?<!\w)\+\d[\d ()/-]{7,}"),
    "a path": re.compile(r"^(?:/|~/|\\\\|[A-Za-z]:[\\/])\w"),
}


def identifies(name: str) -> bool:
    """Whether a column or field of that name is likely to say who a patient is."""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\W_]+", "_", name).strip("_").lower()
    return IDENTIFYING.search(plain) is not None and HARMLESS.fullmatch(plain) is None


def told_by(text: str) -> Iterator[str]:
    """What a text holds that tells who a patient is."""
    yield from (what for what, pattern in TELLING.items() if pattern.search(text))
