"""Messages of the library in the command's own words: its options in place of Python's arguments.

An argument that the command has no option for keeps its name, and the message says that it is Python's.
"""

import re

_LEFT_OUT = (
    r"drop_nonfinite=True(?: in token_grams or fisher_spectrum)? "
    r"leaves (?:them out|out such tokens)(?: and counts them)?"
)
_IN_OPTIONS = (
    (
        re.compile(_LEFT_OUT),
        "try --dtype float64, or in Python drop_nonfinite=True of fisherfunc.fisher_spectrum, which leaves such tokens "
        "out and counts them",
    ),
    (re.compile(r"\btargets=(?:ff\.targets\.)?sampled\(.*?\)"), "--targets sampled"),
    (re.compile(r"\btargets=(?:ff\.targets\.)?all_classes\(\)"), "--targets all-classes"),
    (re.compile(r"\btargets=(?:ff\.targets\.)?observed\(\)"), "--targets observed"),
    (re.compile(r"\bmemory_limit=(\d+)(?: bytes)?"), r"--memory \1"),
    (re.compile(r"\bmemory_limit\b"), "--memory"),
    (re.compile(r"\bnum_tokens=(\w+)"), r"--tokens \1"),
    (re.compile(r"\bnum_tokens\b"), "--tokens"),
    (re.compile(r"\b(unit|intervals|bos|device|dtype)='([\w:]+)'"), r"--\1 \2"),
    (re.compile(r"\bdtype=torch\.(\w+)"), r"--dtype \1"),
    (re.compile(r"\b(context|seed)=(\w+)"), r"--\1 \2"),
    (re.compile(r"\bcenter=True"), "--center"),
    (re.compile(r"\bsketch= got"), "--sketch got"),
    (re.compile(r"(--sketch got [\w, ]*)\bcheckpoint\b"), r"\1--resume"),
    (re.compile(r"\bnum_draws=(\w+)"), r"--draws \1"),
    (re.compile(r"\bcheckpoint='([^']*)'"), r"--resume '\1'"),
    (re.compile(r"(?<=\); )choose another one$"), "choose another --out"),
)
_PYTHONS_ALONE = re.compile(
    r"\bff\.[a-z]|\b(?:drop_nonfinite|route|chunk_size|loss|parameters|blocks|labels|kernel|gram_dtype|max_coordinates"
    r"|self_check|eigensolve_\w+|plan|progress|model|batch)="
)


def in_options(message: str) -> str:
    """Return the message with options in place of arguments.

    Example:
        >>> in_options("memory_limit=1000 bytes is below the 9 bytes that the smallest chunk needs; lower num_tokens")
        '--memory 1000 is below the 9 bytes that the smallest chunk needs; lower --tokens'
        >>> in_options("this model needs route='dense'")
        "this model needs route='dense' (an argument of Python's fisherfunc.fisher_spectrum, not of this command)"
    """
    for argument, option in _IN_OPTIONS:
        message = argument.sub(option, message)
    if "fisherfunc.fisher_spectrum" not in message and _PYTHONS_ALONE.search(message):
        message += " (an argument of Python's fisherfunc.fisher_spectrum, not of this command)"
    return message
