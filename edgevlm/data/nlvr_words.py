"""The words of NLVR: which spellings and synonyms mean the same, and the vocabulary that the drawn sentences need.

Written after reading training sentences only. Nothing is rewritten when a model runs: `train.reasoning` gives a word
the embedding of the one it stands for, so that apps need no rules beside the vocabulary.
"""

_SAME = {
    "1": "one",
    "2": "two tow",
    "3": "three thee",
    "4": "four",
    "5": "five",
    "6": "six",
    "7": "seven",
    "8": "eight",
    "9": "nine",
    "a": "an isa another",
    "above": "over",
    "all": "ll al",
    "and": "ad ans",
    "at": "t",
    "base": "bottom bases floor lower lowest",
    "below": "bellow under underneath beneath",
    "black": "blacks bkack back",
    "block": "blocks blicks bloxk",
    "blue": "ble ue ablue",
    "box": "boxes abox bow",
    "circle": "circles cirlce circ ciircles",
    "color": "colors colour colours coloured colored",
    "corner": "corners",
    "each": "every",
    "edge": "edges wall walls side sides line egde adge",
    "exactly": "eactly exacty exacrly",
    "has": "have having contains contain containing including consists includes",
    "is": "are ia being do",
    "it": "them they",
    "item": "items object objects objetcs shape shapes",
    "large": "big",
    "least": "atleast leats lest lease tleast",
    "less": "fewer smaller",
    "many": "multiple lot",
    "more": "greater",
    "most": "atmost",
    "nearly": "almost nealy near",
    "no": "bo",
    "number": "numbers count",
    "of": "od",
    "only": "just",
    "right": "rights",
    "roof": "ceiling",
    "square": "squares sqaures rectangle rectangles",
    "stacked": "stack",
    "attached": "attach",
    "that": "which where whose",
    "the": "hte its their",
    "there": "theer",
    "touching": "touhing touches touch",
    "tower": "towers",
    "triangle": "triangles trianlge traingles traingle",
    "with": "wth wih wirh wwith",
    "yellow": "yelow yelllow yelloe",
}
SAME = {other: word for word, others in _SAME.items() for other in others.split()}
"""Word of the data -> the word that stands for it."""

_WORDS = """
0 1 2 3 4 5 6 7 8 9 a above all and any as at attached base below between black block blue box circle closely color
corner different directly each edge exactly fourth from grey has height in is it item large least left less level many
medium middle more most nearly no none not number of on only other right roof same second size small square stacked
than that the there third together top touching tower triangle with very without yellow single both
"""
WORDS = tuple(_WORDS.split())
"""Words of the drawn sentences; each is one token."""

VOCABULARY = tuple(dict.fromkeys((*WORDS, *_SAME, *SAME)))
"""What the WordPiece vocabulary must hold as whole words."""
