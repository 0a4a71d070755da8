"""Sentences with figures, and how they are read out: two domains, made by rules and a seed.

General: British readings ("12/03/1984" is "the twelfth of march nineteen eighty four"). Statutes:
other words, other forms ("§ 4-210(b)"), and American readings of the same forms ("december third
nineteen hundred eighty four"), so that a model of the first domain is wrong there in ways that only
examples tell.
"""

import random
from collections.abc import Callable


def _listed(text: str) -> list[str]:
    return text.split(",")


_ONES = _listed(
    "zero,one,two,three,four,five,six,seven,eight,nine,ten,eleven,twelve,thirteen,fourteen,fifteen,"
    "sixteen,seventeen,eighteen,nineteen"
)
_TENS = _listed("twenty,thirty,forty,fifty,sixty,seventy,eighty,ninety")
_IRREGULAR = {"one": "first", "two": "second", "three": "third", "five": "fifth"}
_IRREGULAR |= {"eight": "eighth", "nine": "ninth", "twelve": "twelfth"}
_MONTHS = _listed(
    "january,february,march,april,may,june,july,august,september,october,november,december"
)


def cardinal(number: int, link: str = "") -> str:
    """A number below a million in words; `link` stands before the last two digits, as "and"."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return f"{_TENS[ten - 2]}{f' {_ONES[one]}' if one else ''}"
    unit, word = (1000, "thousand") if number >= 1000 else (100, "hundred")
    high, low = divmod(number, unit)
    words = f"{cardinal(high, link)} {word}"
    if not low:
        return words
    joint = f"{link} " if link and low < 100 else ""
    return f"{words} {joint}{cardinal(low, link)}"


def ordinal(number: int) -> str:
    """The ordinal of a number below a hundred."""
    *words, last = cardinal(number).split()
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    else:
        last = f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th"
    return " ".join([*words, last])


def _year_british(year: int) -> str:
    high, low = divmod(year, 100)
    return f"{cardinal(high)} {'oh ' if low < 10 else ''}{cardinal(low)}"


def _year_american(year: int) -> str:
    high, low = divmod(year, 100)
    return f"{cardinal(high)} hundred {cardinal(low)}" if low else f"{cardinal(high)} hundred"


_PLACES = _listed("london,leeds,paris,oslo,rome,dublin,bristol,cairo,delhi,lisbon,madrid,vienna")
_PEOPLE = _listed("the mayor,the crew,a nurse,the editor,two boys,my aunt,the band,a judge")
_DEEDS = _listed("left,arrived,slept,won the match,sold the boat,met the press,cooked,sang")
_OFFICES = _listed("the council,the director,the board,the department,an inspector,the trustee")
_DUTIES = _listed(
    "shall issue a permit,may revoke the licence,shall hold a hearing,may impose a penalty,"
    "shall publish notice,may grant an exemption,shall deposit the fee"
)
_THINGS = _listed("the lien,the easement,this chapter,the ordinance,the bond,the assessment")

_Part = Callable[[random.Random], tuple[str, str]]


def _date(rng: random.Random, *, american: bool) -> tuple[str, str]:
    first, second, year = rng.randint(1, 12), rng.randint(1, 12), rng.randint(1901, 1999)
    if american:
        said = f"{_MONTHS[first - 1]} {ordinal(second)} {_year_american(year)}"
    else:
        said = f"the {ordinal(first)} of {_MONTHS[second - 1]} {_year_british(year)}"
    return f"{first:02}/{second:02}/{year}", said


def _count(rng: random.Random, *, american: bool) -> tuple[str, str]:
    number = rng.choice([rng.randint(2, 99), rng.randint(100, 9999)])
    return f"{number}", cardinal(number, "" if american else "and")


def _money(rng: random.Random, *, american: bool) -> tuple[str, str]:
    whole, part = rng.randint(2, 999), rng.randint(1, 9) * 10
    if american:
        said = f"the sum of {cardinal(whole)} dollars and {cardinal(part)} cents"
    else:
        said = f"{cardinal(whole, 'and')} pounds {cardinal(part)}"
    return f"{whole}.{part}", said


def _clock(rng: random.Random) -> tuple[str, str]:
    hour, minute = rng.randint(1, 12), rng.choice((0, 15, 30))
    name = cardinal(hour)
    said = {0: f"{name} o'clock", 15: f"quarter past {name}", 30: f"half past {name}"}[minute]
    return f"{hour}:{minute:02}", said


def _section(rng: random.Random) -> tuple[str, str]:
    title, number, letter = rng.randint(1, 50), rng.randint(101, 999), rng.choice("abcdefgh")
    return (
        f"§ {title}-{number}({letter})",
        f"title {cardinal(title)} section {cardinal(number)} paragraph {letter}",
    )


def _filled(rng: random.Random, template: str, **parts: _Part) -> tuple[str, str]:
    """Source and target of a template, each part as it is written and as it is said."""
    made = {name: part(rng) for name, part in parts.items()}
    written = template.format(**{name: pair[0] for name, pair in made.items()})
    said = template.format(**{name: pair[1] for name, pair in made.items()})
    return written, said.replace(",", "")


def _of(words: list[str]) -> _Part:
    def choose(rng: random.Random) -> tuple[str, str]:
        word = rng.choice(words)
        return word, word

    return choose


def general(rng: random.Random) -> tuple[str, str]:
    """A sentence of the domain that a model is trained on."""
    templates = (
        "{who} {did} in {place} on {date}",
        "{who} {did} at {clock} on {date}",
        "on {date} {who} paid {money} in {place}",
        "{count} people from {place} {did} at {clock}",
        "{who} saw {count} birds and paid {money}",
    )
    return _filled(
        rng,
        rng.choice(templates),
        who=_of(_PEOPLE),
        did=_of(_DEEDS),
        place=_of(_PLACES),
        date=lambda r: _date(r, american=False),
        count=lambda r: _count(r, american=False),
        money=lambda r: _money(r, american=False),
        clock=_clock,
    )


def statutes(rng: random.Random) -> tuple[str, str]:
    """A sentence of the domain that only the memory holds."""
    templates = (
        "under {section} {office} {duty} by {date}",
        "{office} {duty} of {money} within {count} days",
        "{thing} took effect on {date} under {section}",
        "for {thing} {office} {duty} before {date}",
        "{thing} of {money} expires after {count} days",
    )
    return _filled(
        rng,
        rng.choice(templates),
        office=_of(_OFFICES),
        duty=_of(_DUTIES),
        thing=_of(_THINGS),
        section=_section,
        date=lambda r: _date(r, american=True),
        count=lambda r: _count(r, american=True),
        money=lambda r: _money(r, american=True),
    )


def pairs(
    domain: Callable[[random.Random], tuple[str, str]], count: int, seed: int
) -> list[dict[str, str]]:
    """`count` different pairs of a domain, as rows with an id, a source and a text."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        source, text = domain(rng)
        found[source] = text
    name = domain.__name__
    return [
        {"id": f"{name}-{seed}-{n}", "source": source, "text": text}
        for n, (source, text) in enumerate(found.items())
    ]
