#!/usr/bin/env python3
"""A task of calling functions, and a copy of a checkpoint whose chat template can write calls.

    python tests/tools/make_calls.py OUT --model SMOLLM2
    python train.py --model OUT/model --data OUT/data --out OUT/run --dtype bfloat16
    python export.py OUT/run --out OUT/int4
    python -m minismoe.runtime OUT/int4 "Turn on the lamp in the hall." --tools OUT/tools.json

Each of 400 lines to train on, and of 100 to test with, offers three of 40 functions. Most ask for
one of them in a sentence with random values, and the answer is its call; in one line of eight none
of the three fits, and the answer says so. No test sentence is trained on.
"""

import argparse
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TRAIN, TEST, OFFERED, UNFIT = 400, 100, 3, 1 / 8
NONE_FITS = "None of these functions can do that."

# SmolLM2's own, with tools and calls as in the model card of SmolLM2-1.7B.
TEMPLATE = (Path(__file__).resolve().parents[2] / "minismoe" / "data" / "smollm2_tools.jinja"
            ).read_text(encoding="utf-8")

# Values of a parameter: words of a sentence, or words and the JSON value that each stands for.
ON = {"on": True, "off": False}
ROOMS = ["kitchen", "hall", "bathroom", "bedroom", "office", "cellar", "garage", "living room"]
NAMES = ["Anna", "Bilal", "Chen", "Dora", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jules"]
CITIES = ["Zürich", "Lagos", "Lima", "Oslo", "Osaka", "Perth", "Quito", "Riga", "Sofia", "Tunis"]
THINGS = ["milk", "bread", "batteries", "soap", "apples", "coffee", "paper", "rice", "tea", "salt"]
TOPICS = ["tax return", "holiday", "budget", "team lunch", "new roof", "garden", "concert", "move"]
TIMES = [f"{hour:02}:{minute:02}" for hour in range(6, 23) for minute in (0, 15, 30, 45)]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SONGS = ["Imagine", "Yesterday", "Jolene", "Hallelujah", "Respect", "Waterloo", "Hurt", "Creep"]
LANGUAGES = ["French", "Hindi", "Polish", "Swahili", "Turkish", "Welsh", "Korean", "Greek"]
CURRENCIES = {"dollars": "USD", "euros": "EUR", "francs": "CHF", "pounds": "GBP", "yen": "JPY"}
SMALL, LARGE = range(2, 13), range(15, 100)

# name, what it does, its parameters, and sentences that ask for it.
FUNCTIONS: list[tuple[str, str, Mapping[str, Any], Sequence[str]]] = [
    ("set_light", "Switch a lamp", {"room": ROOMS, "on": ON},
     ["Turn {on} the lamp in the {room}.", "Please switch {on} the light in the {room}."]),
    ("dim_light", "Set how bright a lamp is", {"room": ROOMS, "percent": LARGE},
     ["Dim the {room} light to {percent} percent.", "I want the {room} lamp at {percent} %."]),
    ("set_heating", "Set the temperature of a room", {"room": ROOMS, "degrees": range(16, 26)},
     ["Heat the {room} to {degrees} degrees.", "Make it {degrees} degrees in the {room}."]),
    ("open_blinds", "Open or close blinds", {"room": ROOMS, "open": {"Open": True, "Close": False}},
     ["{open} the blinds in the {room}.", "{open} the {room} blinds, please."]),
    ("lock_door", "Lock or unlock a door", {"door": ["front", "back", "cellar", "garage"],
                                            "locked": {"Lock": True, "Unlock": False}},
     ["{locked} the {door} door.", "{locked} the door at the {door}, please."]),
    ("start_vacuum", "Clean the floor of a room", {"room": ROOMS},
     ["Vacuum the {room}.", "The floor of the {room} is dirty, clean it."]),
    ("make_coffee", "Brew coffee", {"cups": SMALL, "strong": {"strong": True, "mild": False}},
     ["Brew {cups} cups of {strong} coffee.", "I need {cups} {strong} coffees."]),
    ("set_oven", "Heat the oven", {"degrees": range(120, 251, 10), "minutes": LARGE},
     ["Oven at {degrees} degrees for {minutes} minutes.",
      "Bake this for {minutes} minutes at {degrees} degrees."]),
    ("send_message", "Send a text message", {"to": NAMES, "text": TOPICS},
     ["Text {to} about the {text}.", "Send {to} a message on the {text}."]),
    ("call_person", "Start a phone call", {"name": NAMES, "video": {"video": True, "voice": False}},
     ["Make a {video} call to {name}.", "Ring {name} by {video}."]),
    ("send_email", "Write an email", {"to": NAMES, "subject": TOPICS},
     ["Email {to} with the subject {subject}.", "Write to {to} by mail about the {subject}."]),
    ("read_messages", "Read new messages aloud", {"sender": NAMES},
     ["What did {sender} write?", "Read me the messages of {sender}."]),
    ("block_number", "Block calls of a person", {"name": NAMES},
     ["Block {name}.", "I want no more calls from {name}."]),
    ("set_alarm", "Ring at a time", {"time": TIMES},
     ["Wake me at {time}.", "Set an alarm for {time}."]),
    ("set_timer", "Ring after some minutes", {"minutes": LARGE},
     ["Timer for {minutes} minutes.", "Tell me when {minutes} minutes are over."]),
    ("add_event", "Put an appointment into the calendar",
     {"title": TOPICS, "day": DAYS, "time": TIMES},
     ["Put {title} into my calendar on {day} at {time}.",
      "I have an appointment on {day} at {time}: {title}."]),
    ("delete_event", "Cancel an appointment", {"title": TOPICS, "day": DAYS},
     ["Cancel the {title} on {day}.", "Take {title} out of my calendar for {day}."]),
    ("list_events", "Show the appointments of a day", {"day": DAYS},
     ["What is on for {day}?", "Show me my appointments of {day}."]),
    ("add_reminder", "Remind of something at a time", {"text": TOPICS, "time": TIMES},
     ["Remind me of the {text} at {time}.", "At {time}, remind me about the {text}."]),
    ("add_to_list", "Put something on the shopping list", {"item": THINGS, "count": SMALL},
     ["We need {count} packs of {item}.", "Put {count} times {item} on the shopping list."]),
    ("remove_from_list", "Take something off the shopping list", {"item": THINGS},
     ["We have enough {item}, take it off the list.", "No more {item} on the shopping list."]),
    ("find_recipe", "Find a recipe", {"ingredient": THINGS, "people": SMALL},
     ["What can I cook with {ingredient} for {people} people?",
      "A recipe with {ingredient} for {people}, please."]),
    ("get_weather", "Tell the weather of a city", {"city": CITIES, "day": DAYS},
     ["What will the weather be in {city} on {day}?", "Will it rain in {city} on {day}?"]),
    ("book_train", "Buy train tickets", {"to": CITIES, "day": DAYS, "people": SMALL},
     ["Buy {people} train tickets to {to} for {day}.",
      "{people} of us go to {to} by train on {day}."]),
    ("book_hotel", "Book a hotel room", {"city": CITIES, "nights": SMALL},
     ["Find me a hotel in {city} for {nights} nights.", "{nights} nights in a hotel in {city}."]),
    ("find_flight", "Look for flights", {"origin": CITIES, "to": CITIES},
     ["Flights from {origin} to {to}?", "I want to fly to {to} from {origin}."]),
    ("get_directions", "Show a way", {"to": CITIES, "by": {"car": "car", "bike": "bike"}},
     ["How do I get to {to} by {by}?", "Show me the way to {to} by {by}."]),
    ("call_taxi", "Order a taxi", {"time": TIMES, "people": SMALL},
     ["A taxi for {people} at {time}.", "We are {people} and need a cab at {time}."]),
    ("play_song", "Play a song", {"title": SONGS},
     ["Play {title}.", "I would like to hear {title}."]),
    ("set_volume", "Set how loud the music is", {"percent": LARGE},
     ["Volume to {percent} percent.", "Play it at {percent} % volume."]),
    ("skip_songs", "Skip some songs", {"count": SMALL},
     ["Skip {count} songs.", "Go on by {count} songs."]),
    ("play_radio", "Listen to the radio of a city", {"city": CITIES},
     ["Radio from {city}, please.", "What is on the air in {city}? Turn the radio on."]),
    ("translate", "Translate a word", {"text": THINGS, "language": LANGUAGES},
     ["What is {text} in {language}?", "Translate {text} into {language}."]),
    ("define_word", "Explain a word", {"word": THINGS},
     ["What does the word {word} mean?", "Define {word}."]),
    ("convert_money", "Convert an amount of money",
     {"amount": LARGE, "source": CURRENCIES, "target": CURRENCIES},
     ["How much are {amount} {source} in {target}?", "Convert {amount} {source} to {target}."]),
    ("send_money", "Pay a person", {"to": NAMES, "amount": LARGE, "currency": CURRENCIES},
     ["Send {to} {amount} {currency}.", "I owe {to} {amount} {currency}, pay that."]),
    ("multiply", "Multiply two numbers", {"a": LARGE, "b": SMALL},
     ["What is {a} times {b}?", "Multiply {a} by {b}."]),
    ("roll_dice", "Throw dice", {"count": SMALL},
     ["Throw {count} dice.", "Roll {count} dice for me."]),
    ("take_note", "Write a note", {"text": TOPICS},
     ["Note: {text}.", "Write down the {text} in my notes."]),
    ("search_photos", "Find photos of a person in a place", {"person": NAMES, "place": CITIES},
     ["Photos of {person} in {place}.", "Show me pictures from {place} with {person}."])]


def schema(name: str) -> dict[str, Any]:
    """The schema of a function, as OpenAI's."""
    _, does, parameters, _ = next(f for f in FUNCTIONS if f[0] == name)
    types = {bool: "boolean", int: "integer", str: "string"}
    properties = {}
    for key, values in parameters.items():
        meant = list(values.values()) if isinstance(values, dict) else list(values)
        properties[key] = {"type": types[type(meant[0])]}
        if values is CURRENCIES:
            properties[key]["enum"] = meant
    return {"type": "function", "function": {"name": name, "description": does, "parameters": {
        "type": "object", "properties": properties, "required": list(properties)}}}


def ask(name: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A sentence that asks for a function, and the arguments that it names."""
    _, _, parameters, sentences = next(f for f in FUNCTIONS if f[0] == name)
    words = {key: rng.choice(list(values)) for key, values in parameters.items()}
    meant = {key: values[words[key]] if isinstance(values, dict) else words[key]
             for key, values in parameters.items()}
    return rng.choice(sentences).format(**words), meant


def line(rng: random.Random) -> dict[str, Any]:
    """One line of the task."""
    names = rng.sample([f[0] for f in FUNCTIONS], OFFERED + 1)
    wanted, offered = names[0], names[:OFFERED]
    sentence, arguments = ask(wanted, rng)
    answer: dict[str, Any] = {"role": "assistant", "tool_calls": [
        {"type": "function", "function": {"name": wanted, "arguments": arguments}}]}
    if rng.random() < UNFIT:
        answer, offered = {"role": "assistant", "content": NONE_FITS}, names[1:]
    rng.shuffle(offered)
    return {"messages": [{"role": "user", "content": sentence}, answer],
            "tools": [schema(name) for name in offered]}


def lines(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines to train on and to test with; all sentences differ."""
    rng, found = random.Random(seed), dict[str, dict[str, Any]]()
    while len(found) < TRAIN + TEST:
        new = line(rng)
        found.setdefault(new["messages"][0]["content"], new)
    every = list(found.values())
    return every[:TRAIN], every[TRAIN:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--model", type=Path, help="a checkpoint folder in ChatML, to copy")
    args = parser.parse_args()
    task = args.out / "data" / "calls"
    task.mkdir(parents=True)
    for name, part in zip(("train", "test"), lines()):
        (task / f"{name}.jsonl").write_text(
            "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in part), encoding="utf-8")
    (args.out / "tools.json").write_text(json.dumps([schema(name) for name in (
        "set_light", "set_alarm", "get_weather", "convert_money")], indent=1))
    if args.model:
        shutil.copytree(args.model, args.out / "model")
        (args.out / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    main()
