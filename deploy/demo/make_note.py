#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes a chat request whose user message is a long note with a few codes in it, and asks for one of them.

The demo model was trained to find such codes in notes of up to 14,000 tokens. The sentence with the code that is asked
for stands at --depth of the note; the answer goes to standard error, so that the request can be piped to curl:

  deploy/demo/make_note.py --tokens 6000 |
    curl -s http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d @-
"""
import argparse
import json
import random
import sys

COLOURS = ["red", "blue", "green", "white", "black", "violet", "silver", "gold", "orange", "pink", "brown", "grey"]
ANIMALS = ["falcon", "otter", "rabbit", "heron", "tiger", "whale", "zebra", "panda", "raven", "lynx", "beaver", "turtle"]
NAMES = ["Ada", "John", "Grace", "Linus", "Nora", "Edsger"]
ADJECTIVES = ["quick", "quiet", "happy", "hungry", "clever", "strange", "warm", "bright"]
THINGS = ["lamp", "ladder", "basket", "mirror", "clock", "garden", "river", "bridge"]
VERBS = ["washed", "painted", "carried", "moved", "opened", "drew"]
PLACES = ["in the old library", "behind the station", "near the harbour", "next to the mill", "inside the tower",
          "at the market"]
TOKENS_PER_SENTENCE = 10.6  # of the demo's tokenizer, measured over many notes


def sentence(draw):
    pick = draw.choice
    return pick([
        lambda: f"The {pick(ADJECTIVES)} {pick(ANIMALS)} {pick(VERBS)} a {pick(ADJECTIVES)} {pick(THINGS)} {pick(PLACES)}.",
        lambda: f"Nobody knew why the {pick(ANIMALS)} {pick(VERBS)} the {pick(THINGS)}.",
        lambda: f"{pick(NAMES)} and {pick(NAMES)} talked about the {pick(ADJECTIVES)} {pick(THINGS)}.",
        lambda: f"A {pick(ADJECTIVES)} wind moved the {pick(THINGS)} {pick(PLACES)}.",
        lambda: f"On Friday, {pick(NAMES)} {pick(VERBS)} the {pick(THINGS)} {pick(PLACES)}.",
    ])()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=6000, help="length of the note, about; 200 to 14000")
    parser.add_argument("--depth", type=float, default=0.4, help="where the code stands, 0 (first) to 1 (last)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="millrace-demo")
    options = parser.parse_args()
    if not 200 <= options.tokens <= 14000:
        parser.error(f"--tokens: found {options.tokens}, allowed 200 to 14000")
    draw = random.Random(options.seed)
    lines = [sentence(draw) for _ in range(int(options.tokens / TOKENS_PER_SENTENCE) - 4)]
    owners = draw.sample([f"{colour} {animal}" for colour in COLOURS for animal in ANIMALS], 4)
    codes = [draw.randrange(1000, 10000) for _ in owners]
    for owner, code, depth in zip(owners, codes, [options.depth, 0.1, 0.6, 0.9]):
        lines.insert(int(depth * len(lines)), f"The code of the {owner} is {code}.")
    question = f"What is the code of the {owners[0]}?"
    content = "Here are some notes. " + " ".join(lines) + " " + question
    json.dump({"model": options.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}, sys.stdout)
    sys.stdout.write("\n")
    print(f"asked: {question} It says {codes[0]}.", file=sys.stderr)


if __name__ == "__main__":
    main()
