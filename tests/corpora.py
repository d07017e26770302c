"""Requests of many subjects, made from word lists: 1,000 to remember, paraphrases of them, and other subjects."""

from __future__ import annotations

from itertools import product

# Subject → things, and pairs of templates that ask the same in other words.
REMEMBERED: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "cooking": (
        (
            "lentil soup; mushroom risotto; apple strudel; beef goulash; fish tacos; pad thai; ratatouille; "
            "sourdough bread; chicken curry; spinach lasagne; potato salad; onion tart; pumpkin pie; miso "
            "ramen; vegetable paella; falafel; cheese fondue; cinnamon rolls; tomato chutney; roast duck"
        ),
        [
            ("How do I cook {} for six guests?", "Give me a recipe for {} that feeds six people."),
            ("How long does {} keep in the fridge?", "How many days can {} be stored refrigerated?"),
            ("What can I use instead of salt in {}?", "I want to make {} without salt; what is a substitute?"),
            ("Which wine goes well with {}?", "Suggest a wine to serve with {}."),
            ("Can I freeze {} and warm it up later?", "Is it possible to freeze {} and reheat it?"),
        ],
    ),
    "servers": (
        (
            "nginx; postgresql; redis; rabbitmq; grafana; jenkins; elasticsearch; haproxy; memcached; kafka; "
            "mongodb; prometheus; openvpn; postfix; bind9; mysql; apache; docker; gitlab; keycloak"
        ),
        [
            ("Restart {} on the production server", "The production machine needs {} restarted"),
            ("Where does {} write its log files?", "Find the location of the logs of {}"),
            ("Upgrade {} to the latest stable version", "Bring {} up to the newest stable release"),
            ("Make {} start automatically at boot", "Enable {} so that it comes up when the machine boots"),
            ("Back up the configuration of {}", "Save a copy of the config files of {}"),
        ],
    ),
    "travel": (
        (
            "Lisbon; Kyoto; Reykjavik; Marrakesh; Buenos Aires; Vancouver; Prague; Hanoi; Cape Town; Tbilisi; "
            "Edinburgh; Oaxaca; Helsinki; Istanbul; Wellington; Cusco; Dubrovnik; Seville; Zanzibar; Tallinn"
        ),
        [
            ("What should I see in {} in three days?", "Plan a three day sightseeing trip to {}."),
            ("Do I need a visa to visit {}?", "Is a visa required for a holiday in {}?"),
            ("When is the best season to visit {}?", "Which time of year is best for a trip to {}?"),
            ("How do I get from the airport of {} to the centre?", "Airport transfer to downtown {}: what is there?"),
            ("Find a cheap hotel in {} near the station", "Inexpensive accommodation in {} close to the train station"),
        ],
    ),
    "gardening": (
        (
            "tomatoes; roses; lavender; blueberries; tulips; basil; courgettes; hydrangeas; raspberries; "
            "garlic; orchids; rhubarb; sunflowers; strawberries; rosemary; dahlias; carrots; peonies; "
            "cucumbers; ferns"
        ),
        [
            ("When should I plant {}?", "What is the right month for planting {}?"),
            ("How often do {} need watering?", "How frequently should I water my {}?"),
            ("Why are the leaves of my {} turning yellow?", "My {} have got yellow leaves; what is the cause?"),
            ("How do I keep slugs away from {}?", "Slugs are eating my {}; how can I stop them?"),
            ("Which fertiliser suits {}?", "What kind of plant food is right for {}?"),
        ],
    ),
    "cars": (
        (
            "brake pads; clutch; alternator; timing belt; spark plugs; radiator; exhaust pipe; fuel pump; "
            "starter motor; wheel bearing; shock absorbers; gearbox; windscreen wipers; headlights; battery; "
            "turbocharger; oil filter; power steering; air conditioning; catalytic converter"
        ),
        [
            ("What does it cost to replace the {} of my car?", "How expensive is a new {} for a car, fitted?"),
            ("My car makes a strange noise near the {}", "There is an odd sound from the {} of my vehicle"),
            ("How can I check the {} of my car myself?", "Explain how to inspect a car's {} at home"),
            ("How long does the {} of a car last?", "After how many kilometres does a car's {} wear out?"),
            ("Is it safe to drive with a faulty {}?", "May I still drive my car when the {} is broken?"),
        ],
    ),
    "programming": (
        (
            "list of tuples; JSON file; CSV export; binary tree; linked list; date string; regular "
            "expression; hash map; priority queue; text file; XML document; matrix; graph; URL; YAML "
            "configuration; byte array; priority list; nested dictionary; set of strings; image file"
        ),
        [
            ("Write a Python function that reads a {}", "I need Python code for reading a {}"),
            ("Sort a {} in descending order in Java", "In Java, order a {} from largest to smallest"),
            ("Write unit tests for a class that validates a {}", "Test a {} validator class with unit tests"),
            ("Convert a {} to a string in Rust", "Rust: how do I turn a {} into a String?"),
            ("Print every element of a {} in Go", "Loop over a {} in Golang and print each item"),
        ],
    ),
    "music": (
        (
            "guitar; piano; violin; saxophone; cello; flute; trumpet; accordion; harp; clarinet; banjo; "
            "trombone; ukulele; drums; oboe; mandolin; double bass; harmonica; pipe organ; viola"
        ),
        [
            ("How long does it take to learn the {}?", "How many years until I can play the {} well?"),
            ("Recommend easy pieces for a {} beginner", "Which simple songs suit someone new to the {}?"),
            ("How do I tune a {}?", "Explain the tuning of a {}"),
            ("What does a good second-hand {} cost?", "Price of a decent used {}?"),
            ("How should I clean my {}?", "What is the proper way of cleaning a {}?"),
        ],
    ),
    "banking": (
        (
            "credit card; savings account; mortgage; student loan; pension fund; debit card; current account; "
            "overdraft; standing order; direct debit; gift card; joint account; travel insurance; home "
            "insurance; car loan; investment fund; cash withdrawal; foreign transfer; cheque book; mobile "
            "payment"
        ),
        [
            ("What fees are charged for my {}?", "How much does the bank charge for a {}?"),
            ("I want to cancel my {}", "Please terminate my {}"),
            ("Why was my {} declined?", "My {} got refused; what is the reason?"),
            ("How do I apply for a {}?", "What are the steps for requesting a {}?"),
            ("Someone has used my {} fraudulently", "There was fraud with my {}"),
        ],
    ),
    "sport": (
        (
            "marathon; triathlon; half marathon; bicycle race; swimming competition; rowing regatta; boxing "
            "match; ski tour; climbing trip; tennis tournament; football season; judo contest; basketball "
            "game; ballet exam; ice hockey match; dressage show; fencing bout; surf camp; golf tournament; "
            "handball league"
        ),
        [
            ("Make me a training plan for a {}", "Set up a workout schedule that prepares me for a {}"),
            ("What should I eat before a {}?", "Best meal ahead of a {}?"),
            ("Which shoes or gear do I need for a {}?", "What equipment does a {} require?"),
            ("How do I recover after a {}?", "Tips for recovery following a {}"),
            ("How do I avoid injuries in a {}?", "Prevent getting hurt during a {}"),
        ],
    ),
    "history": (
        (
            "French Revolution; fall of Constantinople; Meiji Restoration; Black Death; Boer War; Peace of "
            "Westphalia; Battle of Hastings; Spanish Armada; Congress of Vienna; Opium Wars; Crimean War; "
            "Great Fire of London; Russian Revolution; Marshall Plan; Cuban Missile Crisis; Suez Crisis; "
            "Hundred Years' War; Punic Wars; Boston Tea Party; fall of the Berlin Wall"
        ),
        [
            ("What caused the {}?", "Explain the reasons for the {}"),
            ("When did the {} happen?", "In which year was the {}?"),
            ("Who were the main figures of the {}?", "Name the most important people in the {}"),
            ("Summarise the {} in five sentences", "Give me a short summary of the {}"),
            ("What were the consequences of the {}?", "How did the {} change things afterwards?"),
        ],
    ),
}  # fmt: skip

UNRELATED: dict[str, tuple[str, list[str]]] = {
    "astronomy": (
        "Saturn; neutron stars; the Andromeda galaxy; comets; Europa",
        ["What is {} made of?", "How far away is the nearest of {} in light years?", "Why does {} emit radio waves?",
         "Who first observed {} through a telescope?"],
    ),
    "tenancy": (
        "a noisy upstairs neighbour; mould in the bedroom; an unpaid deposit; a broken lift; a sublet room",
        ["Draft a letter to my landlord about {}", "Does tenancy law allow a rent reduction for {}?",
         "Which court decides disputes over {}?", "Am I liable to pay when there is {}?"],
    ),
    "pets": (
        "my hamster; a limping greyhound; our deaf cat; the parrot; a pregnant guinea pig",
        ["Which vaccinations are due for {}?", "{} refuses to leave the cage, is that normal?",
         "What toys would keep {} busy?", "Find a name for the offspring of {}"],
    ),
    "mathematics": (
        "the harmonic series; a prime ideal; this integral; an orthogonal projection; the Euler characteristic",
        ["Prove the convergence properties of {}", "Give a counterexample involving {}",
         "Explain the geometric intuition behind {}", "Which theorem generalises {}?"],
    ),
    "knitting": (
        "a cable-stitch scarf; mittens; a baby blanket; a raglan jumper; lace socks",
        ["How many skeins of wool does it take to knit {}?", "I dropped a stitch while knitting {}",
         "Which needle size suits {}?", "How do I block and hem {}?"],
    ),
}  # fmt: skip


def things(text: str) -> list[str]:
    """Return the things of a list."""
    return [thing.strip() for thing in text.split(";")]


def remembered() -> list[tuple[str, str]]:
    """Return 1,000 (task, paraphrase) pairs."""
    return [
        (task.format(thing), paraphrase.format(thing))
        for names, templates in REMEMBERED.values()
        for thing, (task, paraphrase) in product(things(names), templates)
    ]


def unrelated() -> list[str]:
    """Return 100 requests of other subjects."""
    return [
        t.format(thing) for names, templates in UNRELATED.values() for thing, t in product(things(names), templates)
    ]
