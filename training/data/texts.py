"""Sentences to read aloud, from patterns and word lists. Each split has its own patterns and words.

They share only the words of numbers and the small words of the patterns ("the", "and").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from training.data.split import Split

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Vocabulary:
    """patterns with slots such as {noun}; words by slot; numbers: from, to (exclusive), for the slot {number}."""

    patterns: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]
    numbers: tuple[int, int]


def _words(**lists: str) -> dict[str, tuple[str, ...]]:
    return {slot: tuple(words.split()) for slot, words in lists.items()}


VOCABULARIES = {
    Split.TRAIN: Vocabulary(
        patterns=(
            "The {adjective} {noun} {past} the {noun} {place}.",
            "My {person} {past} {number} {plural} {time}.",
            "{name} and {name} {past} a {adjective} {noun} {place}!",
            "Could you {verb} the {noun} {time}?",
            "I {adverb} {verb} {plural}, but never {adjective} {plural}.",
            "Every {noun} is {adjective}, {adjective} and {adjective}.",
            "{number} {plural}, {number} {plural}, and one {noun}.",
            "Where did {name} {verb} that {adjective} {noun}?",
            "Please {verb} me a {noun} {time}; it is {adjective} {place}.",
            "{name} said: {verb} your {noun}, {adverb}.",
            "{interjection}, the {person} {past} it {adverb}.",
            "We {verb}, we {verb}, and then we {verb} {place}.",
            "If the {noun} is {adjective}, {verb} the {plural}.",
            "{interjection}! {number} {adjective} {plural} {place}.",
        ),
        words=_words(
            noun="apple boat table window garden river letter bridge mountain candle pocket mirror basket bottle "
            "kitchen ladder blanket orange pumpkin camera hammer hat shoe spoon cup door road field house "
            "church tower tree flower feather leaf stone cloud storm winter summer island harbour engine "
            "wheel train bicycle paper book pencil guitar piano drum bell clock watch ring coin purse lamp "
            "chair carpet pillow bowl oven butter cheese pepper salt sugar honey bread soup potato tomato "
            "onion carrot lemon cherry plum pear fox bear wolf rabbit mouse horse cow sheep goat pigeon owl "
            "whale shark beetle",
            plural="boxes birds dogs cats fishes stamps rooms walls maps roads gloves socks shirts jackets buttons "
            "rivers farmers teachers doctors songs stories questions answers hours minutes mornings bubbles "
            "peppers mushrooms beans eggs knives forks plates cushions ropes sails wagons brothers fathers "
            "mothers babies puppies voices wishes years eyes ears arms faces feet teeth houses",
            adjective="big small red blue green yellow purple warm cold heavy light quick slow happy sad angry brave "
            "shy loud quiet smooth rough round square empty full broken open closed old young early late "
            "clever simple wonderful beautiful terrible famous pale golden wooden foreign usual fair poor "
            "pure thick thin",
            past="found carried followed painted opened closed moved bought borrowed washed watched pushed pulled "
            "lifted dropped touched counted answered promised remembered noticed covered finished showed",
            verb="bring make take move open show choose read write paint wash watch push pull carry follow "
            "remember borrow count measure mix boil bake share enjoy imagine",
            adverb="always often slowly quickly gently loudly softly badly clearly carefully hardly usually",
            place="by_the_river under_the_bridge in_the_garden behind_the_church near_the_harbour at_home "
            "in_the_kitchen on_the_mountain around_the_corner over_there above_the_clouds beside_the_oven",
            time="today tomorrow tonight this_morning last_summer at_noon before_breakfast after_supper now again "
            "every_Monday in_February",
            person="mother father brother teacher doctor farmer boss uncle cousin baker pilot butcher",
            name="Tom Bob Mary Emma Peter Paul Michael Joshua Barbara Phoebe Victor William Olivia Laura George Thomas",
            interjection="oh ah wow well hmm yes no ha",
        ),
        numbers=(2, 100),
    ),
    Split.VALIDATION: Vocabulary(
        patterns=(
            "Nobody {past} this {noun} before {number}.",
            "Is it {adjective} or {adjective} to {verb} {plural}?",
            "{name} has {number} {plural} for {name}.",
            "All {plural} {place} were {adjective}, {name} told us.",
            "Let us {verb}, then {verb} what they {past}.",
        ),
        words=_words(
            noun="airport ticket blossom cabin diamond elbow forest grape hospital jewel kettle lobster market napkin",
            plural="ambulances bakeries calendars dolphins elephants fountains giraffes helmets islands",
            adjective="ancient bitter comfortable dusty elegant foolish generous humble muddy puzzled",
            past="admired built climbed discovered examined fixed mended painted_over poured ruined",
            verb="admit build climb discover fix gather hurry improve pour roam",
            place="across_the_valley along_the_beach below_the_roof outside_the_market",
            name="Abigail Benjamin Charlotte Douglas Fiona Patrick",
        ),
        numbers=(100, 200),
    ),
    Split.TEST: Vocabulary(
        patterns=(
            "Why would {name} ever {verb} {number} {plural}?",
            "Such a {adjective} {noun} was {past} {time}.",
            "{plural} {verb} best when a {noun} looks {adjective}.",
            "From {place} to {place}, people {verb} and {verb}.",
            "It was {name} who {past} her {noun}, {noun} and {noun}.",
            "Perhaps {number} {plural} could {verb} our {adjective} {noun} {time}.",
            "Look, {name}: {plural} have {past} some {adjective} {plural}!",
        ),
        words=_words(
            noun="avenue balloon biscuit computer curtain dragon village finger fabric memory moment museum "
            "newspaper opinion package parrot picture problem rainbow robot secret shadow theatre umbrella "
            "vehicle voyage waterfall",
            plural="actors bananas blueberries castles customers drawings farms numbers oceans photographs planets "
            "robins sausages shops visitors weavers",
            adjective="amazing awful bright calm curious delicious enormous fragile grey honest lovely modern narrow "
            "peculiar polite proud strange",
            past="arranged believed collected described forgotten loved misplaced observed offered preserved wrapped",
            verb="arrive believe collect describe dream improvise laugh perform play sing travel whisper",
            place="Oxford Paris Bombay Vienna Moscow Florida Warsaw Copenhagen",
            time="yesterday at_midnight in_September long_ago someday",
            name="Alice Bruno Deborah Frederick Hannah Marvin Sophia Wolfgang",
        ),
        numbers=(200, 1000),
    ),
}
"""Words of more than one part are joined by an underscore."""


def sentence(split: Split, generator: np.random.Generator) -> str:
    """One sentence of the split, its first letter a capital."""
    vocabulary = VOCABULARIES[split]

    def fill(slot: re.Match[str]) -> str:
        if slot[1] == "number":
            return str(generator.integers(*vocabulary.numbers))
        words = vocabulary.words[slot[1]]
        return words[generator.integers(len(words))].replace("_", " ")

    pattern = vocabulary.patterns[generator.integers(len(vocabulary.patterns))]
    text = _SLOT.sub(fill, pattern)
    return text[0].upper() + text[1:]
