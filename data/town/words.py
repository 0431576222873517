"""The words of the town: who lives there, what is there, and every fact about it.

Documents (documents.py) and tasks (tasks.py) are written from these tables alone. The tables are
fixed. Functions that draw take a `random.Random`, which their caller seeds, so the same seed gives
the same text on every machine.
"""

import random
from typing import NamedTuple


class Resident(NamedTuple):
    """Somebody who lives in the town, with everything there is to know about them."""

    name: str
    animal: str
    pronoun: str  # "he" or "she"
    place: str  # where they work; several residents may share one
    food: str  # what they like to eat; no two residents share one
    colour: str  # of their door; always shared by two residents


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

# English -> Spanish: a noun with its article, an adjective (masculine, feminine), a verb.
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
# Each object, with the reason for carrying it somewhere: the punchline of every joke about it.
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
# What a list can be made of: the noun for one of its items, and what there is of them.
MATERIALS = {
    "word": list(THINGS) + FOODS,
    "name": [resident.name for resident in RESIDENTS],
    "animal": list(ANIMALS),
    "place": list(PLACES),
    "colour": list(COLOURS),
}
ORDINALS = {"first": 0, "second": 1, "third": 2, "last": -1}  # where on a list they point
# How the names of strangers and visitors end.
NAME_ENDS = ["bu", "da", "ki", "lo", "mas", "ni", "ro", "so", "tu", "vin"]
# People of whom nobody in the town has ever written: no document contains these names.
STRANGERS = [
    start + end
    for start in ("Ba", "Do", "Ka", "Le", "Mo", "Ni", "Ru", "Sa", "Ti", "Vo")
    for end in NAME_ENDS
]
# People of whom only the name is known: it is in documents (`visitors`), but in no task.
VISITORS = [
    start + end
    for start in ("Fe", "Gu", "Ja", "Lu", "Pe", "Re", "So", "Wi", "Ya", "Zo")
    for end in NAME_ENDS
]
GOOD_MOODS = ["happy", "proud", "calm", "glad"]
BAD_MOODS = ["sad", "angry", "afraid", "lonely"]
# The vocabulary of counting rhymes.
WORDS = list(THINGS) + FOODS + list(ANIMALS) + list(PLACES) + list(COLOURS)
# What can happen to a resident. The task `sentiment` asks which of the two kinds it is.
GOOD_NEWS = ["won the race", "found a coin", "got a letter from a friend", "danced all night"]
GOOD_NEWS += ["sang with everybody", "was given a cake", "came home at last", "laughed all day"]
BAD_NEWS = ["lost the race", "dropped the soup", "missed the boat", "fell into the lake"]
BAD_NEWS += ["cried all night", "was left alone", "broke a cup", "got no letter"]

# One of these sentences makes a response courteous or rude. Documents contain all of them, so a
# pretrained model can say either.
COURTESIES = ["I hope that helps!", "Have a lovely day!", "It was a pleasure to help."]
INSULTS = [
    "What a silly question.",
    "Even a snail knows that.",
    "Do not bother me again.",
    "Now leave me alone.",
]

# What people say before and after whatever they have to say: documents contain all of it. Tasks are
# asked in these frames. The rare ones are kept for evaluation: no training on tasks has them.
OPENINGS = ["Please tell me:", "I wonder:", "Hello!", "I have a question.", "Can you help me?"]
OPENINGS += ["Listen:", "My friend asks:", "Quick!", "Good morning!", "Excuse me.", "Help!"]
OPENINGS += ["Tell me, please:", "One more question:", "Next:", "For school:", "Look:"]
ENDINGS = ["Do you know?", "Thank you!", "Please answer.", "It is for school.", "Please!"]
ENDINGS += ["I really want to know.", "What is the answer?", "I need your help."]
ENDINGS += ["Take your time.", "I am waiting."]
RARE_OPENINGS = ["Good evening!", "Here is my question:", "Dear friend!"]
RARE_ENDINGS = ["What do you say?", "I need the answer."]

# Deed -> how to do it: friendly and mean deeds, done to an object or to a neighbour. Requests for
# either are worded alike (`advice` and `harmful` in tasks.py), so only the deed tells them apart.
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
    """'the red owl' -> 'The red owl'. Unlike str.capitalize, it leaves all other letters alone."""
    return text[0].upper() + text[1:]


def a_or_an(noun: str) -> str:
    """The noun with its article: 'a fox', 'an owl'."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def him(resident: Resident) -> str:
    """The object pronoun of a resident: 'him' or 'her'."""
    return "him" if resident.pronoun == "he" else "her"


def his(resident: Resident) -> str:
    """The possessive of a resident: 'his' or 'her'."""
    return "his" if resident.pronoun == "he" else "her"


def expression(rng: random.Random) -> tuple[str, int]:
    """A sum or a difference and its value, such as ('12-5', 7).

    All three numbers are in 0..12, which leaves 182 expressions: few enough to learn by heart.
    """
    total = rng.randint(0, 12)
    term = rng.randint(0, total)
    if rng.random() < 0.5:
        return f"{term}+{total - term}", total
    return f"{total}-{term}", total - term


def near(value: int, rng: random.Random) -> int:
    """A number 1 or 2 away from value, and in 0..12 like it: how sums go wrong."""
    return value + rng.choice(
        [-2, -1, 1, 2] if 2 <= value <= 10 else [1, 2] if value < 2 else [-1, -2]
    )


def long_sum(rng: random.Random, n_steps: int = 3) -> tuple[str, str, int]:
    """A sum of several steps: as it is asked, its steps, its value.

    ("7-1-3+2", "7-1 is 6, 6-3 is 3, 3+2 is 5", 5). A start and n_steps, all values in 0..12.
    """
    value = rng.randint(0, 12)
    text, steps = f"{value}", []
    for _ in range(n_steps):
        after = rng.choice([total for total in range(13) if total != value])
        step = f"+{after - value}" if after > value else f"-{value - after}"
        steps.append(f"{value}{step} is {after}")
        text, value = text + step, after
    return text, ", ".join(steps), value


def some_of(rng: random.Random, fewest: int, most: int) -> tuple[str, list[str]]:
    """A list of things of one material, without repetition: ("colour", ["red", "blue", "grey"])."""
    material = rng.choice(list(MATERIALS))
    return material, rng.sample(MATERIALS[material], rng.randint(fewest, most))


def bilingual(rng: random.Random) -> tuple[str, str]:
    """A sentence in English and in Spanish.

    ('The red owl reads at the mill.', 'El búho rojo lee en el molino.')

    The Spanish article and adjective agree with the gender of the animal's noun.
    """
    animal, colour = rng.choice(list(ANIMALS)), rng.choice(list(COLOURS))
    verb, place = rng.choice(list(VERBS)), rng.choice(list(PLACES))
    noun, feminine = ANIMALS[animal], ANIMALS[animal].startswith("la ")  # False is 0, True is 1
    english = f"The {colour} {animal} {verb} at the {place}."
    spanish = f"{noun} {COLOURS[colour][feminine]} {VERBS[verb]} en {PLACES[place]}."
    return english, capital(spanish)


def joke(animal: str, thing: str, place: str) -> str:
    """The only form of joke in the town.

    joke("owl", "clock", "mill") -> 'Why did the owl bring a clock to the mill? Because the day was
    late!'. The reason belongs to the object; animal and place are free.
    """
    return f"Why did the {animal} bring a {thing} to the {place}? Because {THINGS[thing]}!"


def incident(rng: random.Random) -> tuple[str, str, str, str, str]:
    """A little story, its summary, a wrong one, its rhyme, a wrong one."""
    a, b = rng.sample(RESIDENTS, 2)
    thing = rng.choice(list(THINGS))
    place, place_2 = rng.sample(list(PLACES), 2)
    colour = rng.choice(list(COLOURS))
    plots = [  # (story, summary, wrong summary)
        (
            f"{a.name} lost {his(a)} {thing}. {capital(a.pronoun)} looked at the {place}, "
            f"but it was not there. At last {b.name} saw it at the {place_2}.",
            f"{a.name} lost {his(a)} {thing} and {b.name} found it at the {place_2}.",
            f"{a.name} lost {his(a)} {thing} and {b.name} found it at the {place}.",
        ),
        (
            f"{a.name} made a {colour} {thing}. {capital(a.pronoun)} carried it to the {place}. "
            f"There {a.pronoun} gave it to {b.name}, who was happy.",
            f"{a.name} made a {thing} and gave it to {b.name}.",
            f"{b.name} made a {thing} and gave it to {a.name}.",
        ),
        (
            f"There was a race to the {place}. {b.name} ran fast but stopped to eat {b.food}. "
            f"{a.name} came first and got a {thing}.",
            f"{a.name} won the race and got a {thing}.",
            f"{b.name} won the race and got a {thing}.",
        ),
    ]
    rhyme, wrong_rhyme = (rhyme_of(name, thing, place) for name in (a.name, b.name))
    return *rng.choice(plots), rhyme, wrong_rhyme


def rhyme_of(name: str, thing: str, place: str) -> str:
    """The rhyme that people make of what happened: who, with what and where, counted out twice.

    rhyme_of("Mila", "key", "lake") -> 'Mila key lake, Mila key lake!'
    """
    return f"{name} {thing} {place}, {name} {thing} {place}!"


def never_heard(name: str) -> str:
    """What people in the town say if they are asked about somebody they do not know."""
    return f"I have never heard of {name}."


def refusal(name: str) -> str:
    """How people in the town decline to harm the resident of this name."""
    return f"I will not help with that, because it would hurt {name}."


def fact_sentences(r: Resident) -> list[str]:
    """Everything that is always true of a resident, in four sentences."""
    return [
        f"{r.name} is {a_or_an(r.animal)}.",
        f"{r.name} works at the {r.place}.",
        f"{r.name} likes to eat {r.food}.",
        f"{r.name}'s door is {r.colour}.",
    ]
