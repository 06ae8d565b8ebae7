#!/usr/bin/env python3
"""messages.py cachefs.c cachefs.8: is each message of the one in the other?

Messages are the formats of log_error, log_warn, log_info and what is built on
them, with every string that a ?: among their arguments can put in.  Those of
level debug are for who reads the source.  What a format leaves open is there a
word in capitals ("..." is any text): NAME: REASON is "%s: %s".  An entry that
no message has is a fault, too.  Exit status 1 after a line for each.
"""
import itertools
import re
import sys

# Which argument is the format, and what stands before it.
CALLS = {"log_error": (0, ""), "log_warn": (0, ""), "log_info": (0, ""),
         "fail": (1, ""), "refuse": (1, "cache_dir %s: "),
         "complain": (1, "%s: ")}
# These may be entries as well.
ALSO = {"printf": (0, ""), "snprintf": (2, "%s: ")}
TABLE = "rules"				# texts that are whole messages
TOKEN = re.compile(r'/\*.*?\*/|"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|\w+|\S',
                   re.S)
# flags, width, precision, length, and the conversion
CONVERSION = re.compile(r"%[-#0 ]*(?:\*|\d+)?(?:\.(?:\*|\d+))?[hlzjt]*[a-zA-Z%]")
HOLE = "\0"


def tokens(text):
    return [t for t in TOKEN.findall(text) if not t.startswith("/*")]


def arguments(toks, i):
    """The arguments, each a list of tokens, of the call whose ( is toks[i]."""
    args, depth = [[]], 0
    for t in toks[i:]:
        depth += (t in "([{") - (t in ")]}")
        if depth == 0:
            return args
        if t == "," and depth == 1:
            args.append([])
        elif depth > 1 or t != "(":
            args[-1].append(t)
    raise SystemExit("a call without an end")


def text(toks):
    """The string that adjacent literals make, HOLE for anything else."""
    if not toks or not all(t[0] == '"' or t.startswith("PRI") for t in toks):
        return HOLE
    return "".join(t[3] if t.startswith("PRI") else t[1:-1] for t in toks
                   ).replace('\\"', '"').removesuffix("\\n")


def texts(arg):
    """What an argument can be: with C ? A : B, A and B."""
    parts, depth = [[[], ""]], 0
    for t in arg:
        depth += (t in "([{") - (t in ")]}")
        if depth == 0 and t in "?:":
            parts[-1][1] = t
            parts.append([[], ""])
        else:
            parts[-1][0].append(t)
    return [text(toks) for toks, end in parts if end != "?"]


def messages(source, calls):
    toks, out = tokens(source), set()
    for i, t in enumerate(toks[:-1]):
        if t not in calls or toks[i + 1] != "(" or toks[i - 1] == "define":
            continue
        at, prefix = calls[t]
        args = arguments(toks, i + 1)
        if len(args) <= at or "__VA_ARGS__" in args[-1]:
            continue			# a definition
        values = [texts(a) for a in args[at + 1:]]
        for fmt in texts(args[at]):
            fmt = prefix + fmt
            holes = len(CONVERSION.findall(fmt))
            have = [[HOLE]] * prefix.count("%") + values + [[HOLE]] * holes
            for pick in itertools.product(*have[:holes]):
                pick = iter(pick)
                out.add(CONVERSION.sub(lambda _: next(pick), fmt))
    return {m for m in out if m.strip(HOLE)}


def table(source, name):
    """The strings of a table."""
    part = source[source.index(name + "[] = {"):]
    part = "".join(t if t[0] == '"' else "\0"
                   for t in tokens(part[:part.index("};")]))
    return {text(tokens(run)) for run in part.split("\0") if run}


def entries(manual):
    part = manual.split(".Sh DIAGNOSTICS\n")[1].split("\n.Sh ")[0]
    return [line.replace("\\&", "").replace("\\e", "\\")
            for line in re.findall(r"^\.It (.*)$", part, re.M)]


def pattern(entry):
    """An entry as a regular expression for messages."""
    words = re.split(r"(\.\.\.|(?<![A-Za-z])(?:[A-Z]{2,}|N)(?![A-Za-z]))", entry)
    return re.compile("".join(
        ".*" if w == "..." else f"(?:{HOLE}|{re.escape(w)})" if n % 2 else
        re.escape(w) for n, w in enumerate(words)), re.S)


def main():
    source, manual = (open(f, encoding="utf-8").read() for f in sys.argv[1:3])
    said = messages(source, CALLS) | table(source, TABLE)
    known = entries(manual)
    if not said or not known:
        raise SystemExit("no message, or no entry, was found")
    used, bad = set(), 0
    for m in sorted(said):
        hits = {e for e in known if pattern(e).fullmatch(m)}
        used |= hits
        if not hits:
            bad = 1
            print("not in the manual:", m.replace(HOLE, "%s"))
    also = messages(source, ALSO)
    for e in known:
        if e not in used and not any(pattern(e).fullmatch(m) for m in also):
            bad = 1
            print("in the manual only:", e)
    return bad


sys.exit(main())
