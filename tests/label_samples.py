"""Samples to rank in the tests of the labelling page, and the realistic ones of its screenshots."""

from __future__ import annotations

import random
from typing import Any

PLANTS = {
    "prompt": "My basil keeps dying on the kitchen windowsill. The leaves turn yellow and drop. What am I doing wrong? "
    "Answer in at most five sentences.",
    "responses": [
        "Yellow leaves that drop usually mean too much water. Let the top two centimetres of soil dry out before you water "
        "again, and make sure that the pot drains.\n\nSupermarket basil is also often twenty seedlings in one small pot: split "
        "it into three or four pots and most of them will recover.",
        "Basil needs at least six hours of sun a day, so a windowsill that faces north is too dark. Try a brighter window and "
        "turn the pot every few days.",
        "There are many reasons why a basil plant may be dying, and it is important to consider all of them carefully.\n\n"
        "1. Water. Too much or too little water can be harmful.\n2. Light. Too much or too little light can be harmful.\n"
        "3. Temperature. Basil originates from warm regions.\n4. Nutrients. Plants need nutrients.\n5. Pests. Insects can "
        "damage leaves.\n6. Disease. Fungi can damage leaves.\n\nIf none of this helps, please consult a professional "
        "gardener in your area, who will be happy to advise you on your individual situation.",
        "Your basil is sad because nobody sings to it! Plants that hear music grow 300 % faster, as was proved at Oxford in "
        "1962. Play it something cheerful in the morning.",
    ],
}
TIDES = {
    "prompt": "Explain to a ten-year-old why there are two high tides a day and not one.",
    "responses": [
        "The Moon pulls on everything on Earth, and it pulls hardest on what is closest. The sea on the side that faces the "
        "Moon is pulled towards it and makes a bump. On the far side the pull is weakest, so the water there is left behind a "
        "little, and that makes a second bump. The Earth turns once a day underneath both bumps. So most beaches pass through "
        "two high tides.",
        "Because the Moon goes around the Earth twice a day.",
        "Imagine a stretchy ball. If you pull one side, it gets longer on both sides! The Moon does that to our seas. And as the "
        "Earth spins, your beach goes past both long ends each day.",
        "Tides result from the gradient of the lunar gravitational potential. In the frame of the Earth's centre of mass, the "
        "differential acceleration stretches the hydrosphere along the Earth–Moon axis into a prolate spheroid, of which the two "
        "antipodal maxima are traversed per sidereal rotation.",
    ],
}
MAIL = {
    "prompt": "Write a short, polite e-mail to my landlord: the heating in the bedroom has not worked since Monday, and I would "
    "like it repaired this week.",
    "responses": [
        "Subject: Heating in the bedroom\n\nDear Ms Okafor,\n\nsince Monday the radiator in our bedroom has stayed cold, although "
        "the thermostat is fully open and the other rooms are warm. Could you please send someone to repair it this week? I am "
        "at home every day after 4 pm, and mornings are possible too if I know a day ahead.\n\nThank you, and kind regards,\n"
        "Jonas Weber",
        "Hi! Heating's broken since Monday. Please fix it ASAP or I'll have to reduce the rent. Thx",
        "Dear landlord, I hope this e-mail finds you well. I am writing to you today in order to bring to your attention the "
        "matter of the heating, which is, regrettably, not in working order.",
        "I'm sorry, but I cannot write e-mails to landlords.",
    ],
}
REALISTIC = [PLANTS, TIDES, MAIL]

WORDS = (
    "the sea rises and falls because water follows the pull of the moon while our planet turns below it and a harbour "
    "that is dry in the morning may carry ships at noon so sailors keep tables which say when to leave"
).split()


def essay(words: int, seed: int) -> str:
    """Prose of that many words, in paragraphs."""
    generator = random.Random(seed)
    paragraphs = []
    while words > 0:
        length = min(words, generator.randint(60, 140))
        paragraphs.append(" ".join(generator.choices(WORDS, k=length)).capitalize() + ".")
        words -= length
    return "\n\n".join(paragraphs)


def numbered(count: int, k: int = 3) -> list[dict[str, Any]]:
    """Rows whose answers say which one they are: "item 4, answer 2"."""
    return [
        {"prompt": f"Question {item}?", "responses": [f"item {item}, answer {answer}" for answer in range(k)]}
        for item in range(count)
    ]
