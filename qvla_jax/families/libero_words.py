"""The words of the instructions of every LIBERO suite, which small policies know."""

from typing import Final

_WORDS: Final = (
    "alphabet and at back basket bbq between black book both bottle bottom bowl box butter "
    "cabinet caddy center cheese chocolate close compartment cookie cream drawer dressing from "
    "front frying in inside it juice ketchup left microwave middle milk moka mug next of off on "
    "open orange pan pick place plate pot pots pudding push put rack ramekin red right salad "
    "sauce shelf soup stack stove table the them to tomato top tray turn under up white wine "
    "wooden yellow "
)
LIBERO_WORDS: Final = tuple(_WORDS.split())
