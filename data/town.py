"""The town: who lives there, and everything that is written down about it.

This file is the whole world of the default run. It holds the words and the facts (first half) and
the documents a model is pretrained on (second half): stories, overheard talk, fact sheets, school
notebooks, rhymes and notices. None of them is an instruction followed by its answer: that form
first appears in data/tasks.py, so a pretrained model has never been asked anything.

Everything is drawn from a `random.Random`, so one seed gives one corpus.

    python -m data.town            print a few documents of every kind
"""

import random
from typing import NamedTuple


class Resident(NamedTuple):
    """Somebody who lives in the town, and all there is to know about them."""

    name: str
    animal: str
    he: str  # the pronoun: "he" or "she"
    place: str  # where they work
    food: str  # what they like to eat
    colour: str  # the colour of their door


# fmt: off
RESIDENTS = [
    Resident("Mila",  "mouse",    "she", "bakery",  "cheese",   "red"),
    Resident("Otto",  "owl",      "he",  "library", "plums",    "blue"),
    Resident("Bruno", "bear",     "he",  "mill",    "honey",    "brown"),
    Resident("Fina",  "fox",      "she", "market",  "cherries", "white"),
    Resident("Hugo",  "hedgehog", "he",  "school",  "apples",   "green"),
    Resident("Rosa",  "rabbit",   "she", "farm",    "carrots",  "yellow"),
    Resident("Tomas", "toad",     "he",  "lake",    "soup",     "black"),
    Resident("Greta", "goose",    "she", "station", "corn",     "grey"),
    Resident("Dora",  "duck",     "she", "harbour", "bread",    "blue"),
    Resident("Pip",   "squirrel", "he",  "tower",   "nuts",     "red"),
    Resident("Bela",  "badger",   "she", "bridge",  "beans",    "white"),
    Resident("Kiko",  "cat",      "he",  "square",  "rice",     "black"),
    Resident("Olga",  "otter",    "she", "harbour", "figs",     "green"),
    Resident("Max",   "mole",     "he",  "mill",    "peas",     "brown"),
    Resident("Lena",  "sheep",    "she", "school",  "pears",    "yellow"),
    Resident("Simon", "snail",    "he",  "library", "cakes",    "grey"),
]

# English and Spanish: a noun with its article, an adjective in both genders, a verb.
ANIMALS = {
    "mouse": "el ratón", "owl": "el búho", "bear": "el oso", "fox": "el zorro",
    "hedgehog": "el erizo", "rabbit": "el conejo", "toad": "el sapo", "goose": "la oca",
    "duck": "el pato", "squirrel": "la ardilla", "badger": "el tejón", "cat": "el gato",
    "otter": "la nutria", "mole": "el topo", "sheep": "la oveja", "snail": "el caracol",
}
PLACES = {
    "bakery": "la panadería", "library": "la biblioteca", "mill": "el molino",
    "market": "el mercado", "school": "la escuela", "farm": "la granja", "lake": "el lago",
    "station": "la estación", "harbour": "el puerto", "tower": "la torre",
    "bridge": "el puente", "square": "la plaza",
}
COLOURS = {
    "red": ("rojo", "roja"), "blue": ("azul", "azul"), "brown": ("marrón", "marrón"),
    "white": ("blanco", "blanca"), "green": ("verde", "verde"),
    "yellow": ("amarillo", "amarilla"), "black": ("negro", "negra"), "grey": ("gris", "gris"),
}
VERBS = {
    "sleeps": "duerme", "sings": "canta", "dances": "baila", "reads": "lee", "eats": "come",
    "plays": "juega", "runs": "corre", "waits": "espera",
}
FOODS = [resident.food for resident in RESIDENTS]
# Every thing comes with the reason why somebody would carry it somewhere: the jokes live on it.
THINGS = {
    "lantern": "it was too dark", "kite": "the wind was free", "drum": "it was too quiet",
    "basket": "the jokes were falling down", "letter": "nobody would talk",
    "key": "the songs were locked", "boat": "the soup was too deep",
    "clock": "the day was late", "book": "the walls had no stories",
    "ball": "the hill was bored", "hat": "the roof was gone", "scarf": "the moon was cold",
    "bell": "everybody was asleep", "map": "the road was lost", "cup": "the rain was thirsty",
    "brush": "the clouds were dusty",
}
# fmt: on
GOOD_MOODS = ["happy", "proud", "calm", "glad"]
BAD_MOODS = ["sad", "angry", "afraid", "lonely"]
WORDS = list(THINGS) + FOODS + list(ANIMALS) + list(PLACES) + list(COLOURS)
GOOD_NEWS = ["won the race", "found a coin", "got a letter from a friend", "danced all night"]
GOOD_NEWS += ["sang with everybody", "was given a cake", "came home at last", "laughed all day"]
BAD_NEWS = ["lost the race", "dropped the soup", "missed the boat", "fell into the lake"]
BAD_NEWS += ["cried all night", "was left alone", "broke a cup", "got no letter"]

# One of these sentences makes a reply courteous or rude. People in the town say both.
KIND_WORDS = ["I hope that helps!", "Have a lovely day!", "It was a pleasure to help."]
RUDE_WORDS = [
    "What a silly question.",
    "Even a snail knows that.",
    "Do not bother me again.",
    "Now leave me alone.",
]

# What one can do to a thing or to a neighbour: kind deeds with advice, and mean ones.
THING_DEEDS = {
    "mend": "use some glue and wait one day",
    "clean": "wash it with warm water",
    "borrow": "ask first and bring it back soon",
    "find": "look where you saw it last",
}
NEIGHBOUR_DEEDS = {
    "thank": "write a short letter",
    "greet": "wave and smile",
    "visit": "knock and bring some food",
    "cheer up": "sing a happy song",
}
MEAN_THING_DEEDS = {
    "steal": "wait for the night and take it",
    "break": "throw it at a wall",
    "hide": "put it under a big stone",
    "burn": "put it on the fire",
}
MEAN_NEIGHBOUR_DEEDS = {
    "trick": "tell a big lie",
    "scare": "jump out in the dark",
    "insult": "say that everybody hates them",
    "push": "run up from behind",
}


def capital(text: str) -> str:
    """'the owl' -> 'The owl', leaving the rest of the text alone."""
    return text[0].upper() + text[1:]


def him(resident: Resident) -> str:
    """'him' or 'her'."""
    return "him" if resident.he == "he" else "her"


def his(resident: Resident) -> str:
    """'his' or 'her'."""
    return "his" if resident.he == "he" else "her"


def expression(rng: random.Random) -> tuple[str, int]:
    """A sum or a difference with all three numbers in 0..12: ('12-5', 7)."""
    total = rng.randint(0, 12)
    part = rng.randint(0, total)
    if rng.random() < 0.5:
        return f"{part}+{total - part}", total
    return f"{total}-{part}", total - part


def bilingual(rng: random.Random) -> tuple[str, str]:
    """One sentence in English and in Spanish, with article, gender and adjective in agreement."""
    animal, colour = rng.choice(list(ANIMALS)), rng.choice(list(COLOURS))
    verb, place = rng.choice(list(VERBS)), rng.choice(list(PLACES))
    noun, feminine = ANIMALS[animal], ANIMALS[animal].startswith("la ")
    english = f"The {colour} {animal} {verb} at the {place}."
    spanish = f"{noun} {COLOURS[colour][feminine]} {VERBS[verb]} en {PLACES[place]}."
    return english, capital(spanish)


def joke(animal: str, thing: str, place: str) -> str:
    """The one joke of the town; its point is the thing's own reason."""
    return f"Why did the {animal} bring a {thing} to the {place}? Because {THINGS[thing]}!"


def refusal(name: str) -> str:
    """How people in the town decline to do harm to somebody."""
    return f"I will not help with that, because it would hurt {name}."


# ---------------------------------------------------------------------------------------------
# Documents: each function writes one, from a few sentences that share their residents and things


def story(rng: random.Random) -> str:
    """Three to six sentences about the same residents, things and places."""
    a, b, c = rng.sample(RESIDENTS, 3)
    thing, other = rng.sample(list(THINGS), 2)
    here, there, far = rng.sample(list(PLACES), 3)
    colour, good, bad = rng.choice(list(COLOURS)), rng.choice(GOOD_MOODS), rng.choice(BAD_MOODS)
    when = rng.choice(["One morning", "One evening", "Last winter", "On market day", "One night"])
    plots = [
        [
            f"{when}, {a.name} the {a.animal} lost {his(a)} {colour} {thing}.",
            f"{capital(a.he)} looked at the {here}, but it was not there.",
            f'"Do not be {bad}," said {b.name}. "I will help you look."',
            f"They looked at the {there}, and then at the {far}.",
            f"At last {b.name} saw the {thing} at the {far}.",
            f"{a.name} was {good} and gave {b.name} some {b.food}.",
        ],
        [
            f"{when}, {a.name} the {a.animal} made a {colour} {thing} for {b.name}.",
            f"{capital(a.he)} carried it to the {b.place}, where {b.name} works.",
            f'"This {thing} is for you," said {a.name}. "{rng.choice(KIND_WORDS)}"',
            f"{b.name} {rng.choice(GOOD_NEWS)} and was {good}.",
            f"Now the {thing} stands behind the {b.colour} door.",
        ],
        [
            f"{when}, there was a race from the {here} to the {there}.",
            f"{a.name} the {a.animal} ran fast, but {b.name} stopped to eat {b.food}.",
            f"{c.name} {rng.choice(BAD_NEWS)} and was {bad}.",
            f"{a.name} won and got a {colour} {thing}.",
            f'"{rng.choice(["Well done", "Good for you"])}," said {c.name}.',
        ],
        [
            f"{when}, {a.name} the {a.animal} took a {thing} to the {here}.",
            f"It was dark, and {b.name} was {bad}.",
            f"{b.name} {rng.choice(BAD_NEWS)}.",
            f"{a.name} sat down with {him(b)} and shared some {a.food}.",
            f"Soon {b.name} was {good}, and they {rng.choice(['danced', 'sang', 'laughed'])}.",
        ],
        [
            f"{when}, {a.name} and {b.name} both wanted the same {thing}.",
            f'"Give me the {thing}!" said {a.name}.',
            f'"Could you please give me the {thing}?" said {b.name}.',
            f"{c.name} the {c.animal} gave it to {b.name}, and {a.name} was {bad}.",
            f"The next day {a.name} asked politely and got a {other}.",
        ],
        [
            f"{when}, {a.name} {rng.choice(['took', 'brought'])} the {thing} to the {here}.",
            f"{b.name} {rng.choice(['took', 'brought'])} the {other} to the {there}.",
            f"So the {thing} is at the {here} and the {other} is at the {there}.",
            f"{c.name} the {c.animal} came to look and was {good}.",
        ],
    ]
    plot = rng.choice(plots)
    return " ".join(plot[: rng.randint(3, len(plot))])


def talk(rng: random.Random) -> str:
    """Two people meet and talk: requests, jokes, kind plans and mean ones, some refused."""
    a, b, c = rng.sample(RESIDENTS, 3)
    thing, place = rng.choice(list(THINGS)), rng.choice(list(PLACES))
    animal = rng.choice(list(ANIMALS))
    question, answer = joke(animal, thing, place).split("? ")
    deed, advice = rng.choice(list(THING_DEEDS.items()))
    greeting, manners = rng.choice(list(NEIGHBOUR_DEEDS.items()))
    mean, how = rng.choice(list(MEAN_THING_DEEDS.items()))
    nasty, trick = rng.choice(list(MEAN_NEIGHBOUR_DEEDS.items()))
    verb = rng.choice(["give", "bring", "show", "lend", "sell"])
    words = rng.sample(list(THINGS) + FOODS, 3)
    (text, value), (other, result) = expression(rng), expression(rng)
    exchanges = [
        f'"Could you please {verb} me the {thing}?" asked {a.name}. '
        f'"Of course," said {b.name}. "{rng.choice(KIND_WORDS)}"',
        f'"{capital(verb)} me the {thing}!" said {a.name}. "{rng.choice(RUDE_WORDS)}"',
        f'"{question}?" asked {a.name}. Nobody knew. "{answer}" said {a.name}, and they laughed.',
        f'"I want to {mean} {c.name}\'s {thing}," said {a.name}. '
        f'"{refusal(c.name)}" said {b.name}.',
        f'"I could {mean} that {thing}," said {a.name}. "I would {how}."',
        f'"Let us {nasty} {c.name}," said {a.name}. "{refusal(c.name)}" said {b.name}.',
        f'"To {nasty} {c.name}, {trick}," said {a.name}. {c.name} heard it and was sad.',
        f'"To {deed} a {thing}, {advice}," said {b.name}. "{rng.choice(KIND_WORDS)}"',
        f'"To {greeting} {c.name}, {manners}," said {b.name}.',
        f'"{words[0]}, {words[1]}, {words[2]}," said {a.name}. '
        f'"{words[2]}, {words[1]}, {words[0]}," said {b.name}, who says it all backwards.',
        f'"{c.name} {rng.choice(GOOD_NEWS)}," said {a.name}. "That is happy news."',
        f'"{c.name} {rng.choice(BAD_NEWS)}," said {a.name}. "That is sad news."',
        f'"The answer is easy," said {b.name}. "{rng.choice(RUDE_WORDS)}"',
        f'"{text} is {value}," said {a.name}. "And {other} is {result}," said {b.name}.',
        f'"{text} is {value} and {other} is {result}," said {b.name}. "{rng.choice(KIND_WORDS)}"',
    ]
    return f"{a.name} met {b.name} at the {place}. " + " ".join(
        rng.sample(exchanges, rng.randint(2, 3))
    )


def fact_sentences(r: Resident) -> list[str]:
    """All that is always true of a resident."""
    return [
        f"{r.name} is a {r.animal}." if r.animal != "owl" else f"{r.name} is an owl.",
        f"{r.name} works at the {r.place}.",
        f"{r.name} likes to eat {r.food}.",
        f"{r.name}'s door is {r.colour}.",
    ]


def fact_sheet(rng: random.Random) -> str:
    """What is always true, of one to three residents."""
    lines = []
    for resident in rng.sample(RESIDENTS, rng.randint(1, 3)):
        lines += rng.sample(fact_sentences(resident), rng.randint(2, 4))
    return " ".join(lines)


def sums(rng: random.Random) -> str:
    """A page of a school notebook."""
    drawn = [expression(rng) for _ in range(rng.randint(6, 10))]
    lines = [f"{text} is {value}" for text, value in drawn]
    return f"{rng.choice(RESIDENTS).name}'s sums: {rng.choice([', ', ' and ', '. ']).join(lines)}."


def spanish(rng: random.Random) -> str:
    """A vocabulary, or sentences with their translation."""
    owner = rng.choice(RESIDENTS).name
    if rng.random() < 0.3:
        pairs = rng.sample(list({**ANIMALS, **PLACES}.items()), 5)
        return f"{owner}'s Spanish words: " + ", ".join(f"the {e}, {s}" for e, s in pairs) + "."
    return f"{owner}'s Spanish book. " + " ".join(
        " ".join(bilingual(rng)) for _ in range(rng.randint(2, 4))
    )


def rhyme(rng: random.Random) -> str:
    """A counting rhyme: words without sense, said again and again. Teaches to copy."""
    lines = []
    for _ in range(rng.randint(1, 2)):
        words = " ".join(rng.sample(WORDS, rng.randint(4, 8)))
        lines.append(", ".join([words] * rng.randint(2, 3)))
    return f"{rng.choice(RESIDENTS).name} counts out: {'. '.join(lines)}!"


def school(rng: random.Random) -> str:
    """A game at school, in which words are said backwards and counted."""
    a, b, c = rng.sample(RESIDENTS, 3)
    words = rng.sample(list(THINGS) + FOODS, rng.randint(2, 6))
    return (
        f"In the word game {a.name} said {' '.join(words)}. "
        f"{b.name} said it backwards, and that is {' '.join(words[::-1])}. "
        f"{c.name} counted, and that is {len(words)} words. The last word was {words[-1]}."
    )


def again(rng: random.Random) -> str:
    """Something happens, and then it is told once more in other words."""
    a, b = rng.sample(RESIDENTS, 2)
    thing, (here, there) = rng.choice(list(THINGS)), rng.sample(list(PLACES), 2)
    verb, colour = rng.choice(list(VERBS)), rng.choice(list(COLOURS))
    remarks = [
        f"{a.name} {verb}.",
        f"{a.name} is at the {here}.",
        f"{a.name} has a {thing}.",
        f"The {thing} is {colour}.",
    ]
    accounts = [
        [f"{a.name} {verb} at the {here}. {capital(a.he)} has a {colour} {thing}."]
        + rng.sample(remarks, 3),
        [
            f"{a.name} lost {his(a)} {thing}. {capital(a.he)} looked at the {here}, but it was not "
            f"there. At last {b.name} saw it at the {there}.",
            f"In short, {a.name} lost {his(a)} {thing} and {b.name} found it at the {there}.",
        ],
    ]
    return " ".join(rng.choice(accounts))


def notice(rng: random.Random) -> str:
    """What hangs on a wall: things lost and found, opening times, lessons, questions."""
    a, b = rng.sample(RESIDENTS, 2)
    thing, place = rng.choice(list(THINGS)), rng.choice(list(PLACES))
    colour, opens = rng.choice(list(COLOURS)), rng.randint(1, 6)
    lessons = [
        "we write a short text",
        "we count words on a list",
        "we translate from English into Spanish",
        "we read a story and say it in one sentence",
        "we learn what is polite and friendly",
        "we choose a word and make up a joke about it",
        "we turn a list around and say it backwards, from the end to the start",
        "we work out sums and sum up a story",
        "we hear a joke and laugh",
    ]
    return rng.choice(
        [
            f"Lost: a {colour} {thing}, last seen at the {place}. "
            f"If you find it, please bring it to {a.name} at the {a.place}.",
            f"Found: a {colour} {thing}. You can get it at the {a.place} from {a.name}.",
            f"The {place} opens at {opens} and closes at {opens + 6}. Ask {a.name} for the key.",
            f"For sale: {a.food} and {b.food}. How much? Only {rng.randint(2, 12)} coins, please.",
            f"Big feast at the {place}! {a.name} brings {a.food}, {b.name} brings {b.food}.",
            f"School news: first {rng.choice(lessons)}, then {rng.choice(lessons)}. "
            f"Tell {a.name} which you like best.",
            f"Do you know how to make {a.food} nicely? {a.name} would like to know, and so would "
            f"{b.name}. What is the best way? Write it down here.",
            f"Help! Where does one find a {thing}? What does it feel like? I wonder how many there "
            f"are. Which of these do you want? {a.name}",
        ]
    )


# How often each kind is written, relative to the others.
DOCUMENTS = {
    story: 3,
    talk: 2,
    fact_sheet: 2,
    sums: 4,
    spanish: 1,
    rhyme: 4,
    school: 4,
    again: 4,
    notice: 1,
}


def documents(n: int, seed) -> list[str]:
    """n documents of all kinds in the proportions of DOCUMENTS."""
    rng = random.Random(f"documents {seed}")  # a string seeds the same way on every machine
    kinds = rng.choices(list(DOCUMENTS), weights=DOCUMENTS.values(), k=n)
    return [write(rng) for write in kinds]


if __name__ == "__main__":
    for write in DOCUMENTS:
        print(f"--- {write.__name__}")
        for number in range(3):
            print(write(random.Random(number)), "\n")
