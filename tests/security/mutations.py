"""Random damage to JSON files, for tests of what reads them."""

import copy
import json

VALUES = (
    None, True, False, -1, 0, 1, 2, 7, 10**5, 10**9, 2**31, 2**32 - 1, 2**63, 10**30, -(10**18),
    0.5, -0.5, 1e-300, 1e308, 1.5, "", "x", "../x", "/etc/passwd", "a\0b", "\n\x1b[2J", "ж" * 2000,
    [], [1], ["x"], [[]], {}, {"x": 1}, {"type": "x"}, [None], [0, 0, 0], "gelu", "Sequence",
)  # fmt: skip


def places(value, path=()):
    """The paths of all values in a tree of JSON."""
    found = [path]
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(rng, tree):
    """A tree with one value deleted, replaced, repeated or nested."""
    tree = copy.deepcopy(tree)
    paths = places(tree)[1:]
    if not paths:
        return tree
    *parents, last = paths[rng.integers(len(paths))]
    node = tree
    for key in parents:
        node = node[key]
    action = rng.integers(8)
    if action == 0:
        del node[last]
    elif action == 1:
        node[last] = [node[last]]
    elif action == 2 and isinstance(node[last], list):
        node[last] = node[last] * 3
    elif action == 3 and isinstance(node[last], (int, float)):
        node[last] = node[last] * [-1, 2, 1000, 0.5][rng.integers(4)]
    elif action == 4 and isinstance(node, dict):
        node["new"] = node.pop(last)
    elif action == 5:
        other = paths[rng.integers(len(paths))]
        value = tree
        for key in other:
            if not isinstance(value, (dict, list)) or (
                key not in value if isinstance(value, dict) else key >= len(value)
            ):
                break
            value = value[key]
        node[last] = copy.deepcopy(value)
    else:
        node[last] = VALUES[rng.integers(len(VALUES))]
    return tree


def damaged(rng, content):
    """The bytes of a JSON file with one to three changes; often no longer JSON."""
    kind = rng.integers(16)
    if kind == 0:
        return content[: rng.integers(len(content))]
    if kind == 1:
        return (b"", b"\xef\xbb\xbf" + content, b"\xff\xfe" + content, content + b"}", b"null")[
            rng.integers(5)
        ]
    if kind == 2:
        at = rng.integers(len(content))
        return content[:at] + bytes(rng.integers(0, 256, 2, "uint8")) + content[at + 1 :]
    if kind == 3:
        depth = int(rng.choice([50, 500, 100_000]))
        return b'{"a":' * depth + content + b"}" * depth
    text = content.decode()
    if kind == 4 and ": " in text:  # A name twice, or a number that is none.
        parts = text.split(": ")
        at = rng.integers(len(parts) - 1)
        new = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, '1, "x"')[rng.integers(6)]
        return ": ".join([*parts[: at + 1], f"{new}, {parts[at + 1]}"]).encode()
    tree = json.loads(text)
    for _ in range(rng.integers(1, 4)):
        tree = changed(rng, tree)
    return json.dumps(tree).encode()
